"""What people and programs write into a store, read with the models, the words and the checks of the file."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from ipaddress import IPv4Address
from socket import AF_INET, inet_pton
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dataplane import config_edit
from dataplane.config import ConfigError, shape
from dataplane.config_checks import Problem, path_text
from dataplane.config_cluster import ClusterFile, advertisement_of, pool_of
from dataplane.config_lines import KeyPath
from dataplane.config_services import Endpoint, StaticService, endpoint_of, service_of
from dataplane.config_services_checks import Surroundings, check_endpoint, check_service, held_by
from dataplane.config_types import OptionalName
from dataplane.control import state as desired
from dataplane.control.etcd_contents import ObjectError, parsed
from dataplane.control.overlay import Overlay
from dataplane.control.services import ServerKey
from dataplane.control.state import DesiredState

_POOLS: KeyPath = ("loadBalancer", "ipAddressPools")
_ADVERTISEMENTS: KeyPath = ("loadBalancer", "l2Advertisements")
_ENDPOINTS = TypeAdapter(list[Endpoint])
_NAMES = TypeAdapter(OptionalName)
_USUAL = [first not in (0, 127) and first < 224 for first in range(256)]  # unicast, by the first byte
_LINK_LOCAL = 169 << 8 | 254
_NO_SERVICE = desired.Service("any")


class FileObjects:
    """``etcd_contents.Objects`` with the file's means.

    Args:
        state: The node's file, in which a service has to fit.
    """

    def __init__(self, state: DesiredState) -> None:
        self._around = Surroundings.of(state)

    def service(self, namespace: str, name: str, text: str) -> desired.Service:
        """Return a service without endpoints: the keys of ``[[services.static]]``."""
        values = _object(text)
        if "endpoints" in values:
            raise ObjectError(f"endpoints: expected under keys of their own, endpoints/{namespace}/{name}/<slice>")
        for key, expected in (("namespace", namespace), ("name", name)):
            if values.setdefault(key, expected) != expected:
                raise ObjectError(f'{key}: expected what the key says, "{expected}" (got "{values[key]}")')
        try:
            given = StaticService.model_validate(values)
        except ValidationError:
            raise ObjectError(_explained(lambda: config_edit.section(values))) from None
        _refuse(check_service(given, (), self._around))
        return replace(service_of(given), origin="etcd")

    def endpoints(self, text: str) -> tuple[desired.Endpoint, ...]:
        """Return a slice: a list of what ``[[services.static]]`` has as ``endpoints``."""
        values = parsed(text)
        if isinstance(values, list):
            simple = [_simple_endpoint(each) for each in values]
            if None not in simple:
                return tuple(endpoint for endpoint in simple if endpoint is not None)
        try:
            given = _ENDPOINTS.validate_python(values)
        except ValidationError:
            if not isinstance(values, list):
                raise ObjectError("expected a JSON list of endpoints") from None
            service = {"name": "any", "endpoints": values}
            raise ObjectError(_explained(lambda: config_edit.section(service))) from None
        endpoints = tuple(endpoint_of(each) for each in given)
        for number, endpoint in enumerate(endpoints):
            _refuse(check_endpoint(endpoint, (number,), _NO_SERVICE))
        return endpoints

    def pool(self, name: str, text: str) -> desired.AddressPool:
        """Return a pool: the keys of ``[[loadBalancer.ipAddressPools]]``."""
        pool = pool_of(_cluster_file(_POOLS, name, text).ip_address_pools[0])
        if not pool.ranges:
            raise ObjectError("addresses: expected at least one range (got [])")
        if any(first.version == 6 for first, _ in pool.ranges):
            raise ObjectError("addresses: IPv6 is not supported yet")
        return pool

    def advertisement(self, name: str, text: str) -> desired.L2Advertisement:
        """Return an advertisement: the keys of ``[[loadBalancer.l2Advertisements]]``."""
        return advertisement_of(_cluster_file(_ADVERTISEMENTS, name, text).l2_advertisements[0])

    def claims(self, service: desired.Service) -> Iterable[ServerKey]:
        """Return what a service is found by."""
        return held_by((service,), self._around.node_addresses)

    def check_edit(self, name: str, values: tuple[Any, ...], state: DesiredState) -> tuple[str, ...]:
        """Return what is wrong with an edit of the control API.

        Raises:
            MissingError: There is no such service or endpoint.
        """
        try:
            getattr(config_edit, name)(*values, Overlay(), state)
        except ConfigError as error:
            return error.errors
        return ()


def _simple_endpoint(values: Any) -> desired.Endpoint | None:
    """Return an endpoint of the usual keys; None: look closer.

    There may be a hundred thousand of them when a node starts: the models take ten times as long.
    """
    if not isinstance(values, dict) or not values.keys() <= {"ip", "node"}:
        return None
    node, text = values.get("node", ""), values.get("ip")
    if not isinstance(text, str) or not isinstance(node, str):
        return None
    return _endpoint_at(text, node)


@lru_cache(maxsize=1 << 16)
def _endpoint_at(text: str, node: str) -> desired.Endpoint | None:
    """Return the endpoint; one object for all services that a pod belongs to."""
    if not _is_name(node):
        return None
    try:
        number = int.from_bytes(inet_pton(AF_INET, text))
    except (OSError, ValueError):
        return None
    if not _USUAL[number >> 24] or number >> 16 == _LINK_LOCAL:
        return None
    return desired.Endpoint(IPv4Address(number), node=node)


@lru_cache(maxsize=4096)
def _is_name(text: str) -> bool:
    try:
        _NAMES.validate_python(text)
    except ValidationError:
        return False
    return True


def _object(text: str) -> dict[str, Any]:
    values = parsed(text)
    if not isinstance(values, dict):
        raise ObjectError("expected a JSON object")
    return values


def _cluster_file(at: KeyPath, name: str, text: str) -> Any:
    """Return the section ``[loadBalancer]`` of a file with this object alone."""
    values = _object(text)
    if values.setdefault("name", name) != name:
        raise ObjectError(f'name: expected what the key says, "{name}" (got "{values["name"]}")')
    file, problems = shape({"loadBalancer": {str(at[1]): [values]}})
    _refuse(problems, (*at, 0))
    assert isinstance(file, ClusterFile)
    return file.load_balancer


def _refuse(problems: Iterable[Problem], at: KeyPath = ()) -> None:
    lines = [f"{path_text(problem.path[len(at) :])}: {problem.text}" for problem in problems]
    if lines:
        raise ObjectError("; ".join(line.removeprefix(": ") for line in lines))


def _explained(check: Callable[[], object]) -> str:
    try:
        check()
    except ConfigError as error:
        return "; ".join(error.errors)
    raise AssertionError("the models disagree")
