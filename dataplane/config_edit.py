"""Edits of single services, as the control API takes them: the same keys, checks and words as in the file.

Each function returns the overlay with the edit in it and changes nothing. Paths in errors are relative to the service
or the endpoint: ``ports[0].port: expected a number from 1 to 65535 (got "x")``.

Raises, all of them:
    ConfigError: With every problem of what was given.
    MissingError: There is no such service or endpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from dataplane.config import ConfigError, shape
from dataplane.config_checks import Problem, each, path_text, unsupported
from dataplane.config_lines import KeyPath
from dataplane.config_services import Endpoint, ServicesFile, StaticService, endpoint_of, service_of
from dataplane.config_services_checks import (
    Surroundings,
    check_addresses,
    check_endpoint,
    check_service,
    claim,
    held_by,
)
from dataplane.control import state as desired
from dataplane.control.api import MissingError
from dataplane.control.overlay import Overlay
from dataplane.control.services import ServerKey
from dataplane.control.state import DesiredState

_SERVICE: KeyPath = ("services", "static", 0)
_ENDPOINT: KeyPath = (*_SERVICE, "endpoints", 0)


def set_service(values: Mapping[str, Any], overlay: Overlay, state: DesiredState) -> Overlay:
    """Set a service whole; without the key ``endpoints`` one that exists keeps those that it has."""
    given = section(values)
    service = service_of(given)
    old = _find(service.id, state)
    if old is not None and "endpoints" not in given.model_fields_set:
        service = replace(service, endpoints=old.endpoints)
    around = Surroundings.of(state)
    problems = [*check_service(given, _SERVICE, around)]
    for path, endpoint in each((*_SERVICE, "endpoints"), service.endpoints):
        problems += check_endpoint(endpoint, path, service)
    others = held_by((other for other in state.services if other.id != service.id), around.node_addresses)
    problems += claim(service, _SERVICE, around.node_addresses, others)
    _refuse(problems, _SERVICE)
    return overlay.with_service(service)


def delete_service(name: str, overlay: Overlay, state: DesiredState) -> Overlay:
    """Delete a service; ``name`` is ``namespace/name``."""
    _existing(name, state)
    return overlay.without_service(name)


def add_endpoint(name: str, values: Mapping[str, Any], overlay: Overlay, state: DesiredState) -> Overlay:
    """Add an endpoint to a service, or put it in the place of the one at its address."""
    service = _existing(name, state)
    endpoint = endpoint_of(_endpoint(values))
    _refuse(check_endpoint(endpoint, _ENDPOINT, service), _ENDPOINT)
    return overlay.with_endpoint(name, endpoint)


def drain_endpoint(name: str, values: Mapping[str, Any], overlay: Overlay, state: DesiredState) -> Overlay:
    """Give an endpoint no new connections; ``values`` has the key ``ip``."""
    return overlay.with_endpoint(name, replace(_held(name, values, state), draining=True))


def delete_endpoint(name: str, values: Mapping[str, Any], overlay: Overlay, state: DesiredState) -> Overlay:
    """Delete an endpoint; ``values`` has the key ``ip``."""
    return overlay.without_endpoint(name, _held(name, values, state).address)


def check_overlay(overlay: Overlay, state: DesiredState) -> None:
    """Find out whether what the API has set still fits beside a file that was read again; ``state`` is the file's."""
    held: dict[ServerKey, str] = {}
    around, problems = Surroundings.of(state), list[Problem]()
    for service in overlay.over(state.services):
        problems += claim(service, (service.id,), around.node_addresses, held)
        if service.origin == "api":
            problems += check_addresses(service, (service.id,), around)
    _refuse(problems, ())


# --- what is given, and what there is ---------------------------------------------------------------------------------


def section(values: Mapping[str, Any]) -> StaticService:
    """Return the section that one service makes, if its shape is right."""
    return _file(dict(values), _SERVICE).services.static[0]


def _endpoint(values: Mapping[str, Any]) -> Endpoint:
    return _file({"name": "any", "endpoints": [dict(values)]}, _ENDPOINT).services.static[0].endpoints[0]


def _file(service: dict[str, Any], at: KeyPath) -> ServicesFile:
    """Check the shape of a file with this service alone."""
    values = {"services": {"static": [service]}}
    file, problems = shape(values)
    _refuse([*problems, *unsupported(values)], at)
    assert isinstance(file, ServicesFile)
    return file


def _refuse(problems: Iterable[Problem], at: KeyPath) -> None:
    own = f" {path_text(at)}."
    lines = (f"{path_text(problem.path[len(at) :])}: {problem.text.replace(own, ' ')}" for problem in problems)
    errors = tuple(dict.fromkeys(line.removeprefix(": ") for line in lines))
    if errors:
        raise ConfigError(errors)


def _find(name: str, state: DesiredState) -> desired.Service | None:
    return next((service for service in state.services if service.id == name), None)


def _existing(name: str, state: DesiredState) -> desired.Service:
    service = _find(name, state)
    if service is None:
        raise MissingError(f"no such service: {name}")
    return service


def _held(name: str, values: Mapping[str, Any], state: DesiredState) -> desired.Endpoint:
    service, address = _existing(name, state), _endpoint(values).ip
    for endpoint in service.endpoints:
        if endpoint.address == address:
            return endpoint
    raise MissingError(f"no such endpoint of {name}: {address}")
