"""Read ``node.toml``: all of it or nothing, and everything that is wrong with it at once.

Text becomes TOML values (``tomllib``), then models (``config_model``: the shape), these are checked (``config_checks``:
the sense, and what is refused for now) and become ``Settings`` (``control/state``). What has a wrong shape is taken out
before the checks, so that one mistyped value does not hide the errors of the others. Every error is one line:
``file:line: key: what was expected (got ...)``.
"""

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import PlainValidator, ValidationError
from pydantic.fields import FieldInfo

from dataplane.config_checks import Problem, check, path_text
from dataplane.config_lines import KeyPath, find_lines, line_of
from dataplane.config_model import File, Section, StateSection, key_name
from dataplane.config_types import Expect
from dataplane.control import process
from dataplane.control import state as desired

if TYPE_CHECKING:
    from dataplane.control.ipam import Rules

DEFAULT = Path(__file__).with_name("node.toml")
HOST_INTERFACE = "dp0"
_PASSES = 8  # a value, then the table that needs it, then the table around that: nothing is nested deeper
_KINDS = {
    "bool_type": "true or false",
    "int_type": "a number",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}

_TYPES: dict[Any, str] = {bool: "true or false", int: "a number", str: "a string"}

Model = TypeVar("Model", bound=Section)


class ConfigError(Exception):
    """A file that cannot be used.

    Attributes:
        errors: One line each, ``file:line: key: text``, in the order of the file.
        exit_code: What the command exits with.
    """

    exit_code = 2

    def __init__(self, errors: tuple[str, ...]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


class UnreadableError(ConfigError):
    """A file that may not be read."""

    exit_code = 5


def load(path: Path | None = None) -> desired.Settings:
    """Read and check a configuration; None is the built-in example.

    Raises:
        ConfigError: With every problem of the file.
    """
    return parse(read(path or DEFAULT), path or DEFAULT, path)


def parse(source: str, name: Path | str, path: Path | None = None) -> desired.Settings:
    """Check a configuration that is already text; ``name`` stands before the errors."""
    return _settings(checked(source, name, Schema(_model, _whole_file), check), path)


@dataclass(frozen=True, slots=True)
class Schema(Generic[Model]):
    """The models of one kind of file.

    Attributes:
        smallest: Returns the one that a file with these values needs.
        whole: Returns the one with every section.
    """

    smallest: Callable[[dict[str, Any]], type[Model]]
    whole: Callable[[], type[Section]]


def checked(
    source: str, name: Path | str, schema: Schema[Model], sense: Callable[[Model, dict[str, Any]], Iterable[Problem]]
) -> Model:
    """Return the models of a text whose shape and sense are right.

    Raises:
        ConfigError: With every problem of the text.
    """
    try:
        values = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError((_syntax_error(name, source, str(error)),)) from None
    pruned = _Pruned(copy.deepcopy(values), schema)
    file = pruned.validate()
    problems = list(pruned.problems)
    if file is not None:
        problems += [pruned.restored(problem) for problem in sense(file, pruned.values) if pruned.is_news(problem)]
    if problems or file is None:
        raise ConfigError(_format(name, problems, find_lines(source)))
    return file


def shape(values: dict[str, Any]) -> tuple[File | None, list[Problem]]:
    """Return the models of what has a right shape, and what has not."""
    pruned = _Pruned(copy.deepcopy(values), Schema(_model, _whole_file))
    return pruned.validate(), pruned.problems


def _settings(file: File, path: Path | None) -> desired.Settings:
    assert file.log.format != "journal"  # refused by the checks, as all that has no counterpart in the settings
    return desired.Settings(
        state=_state(file),
        path=path,
        engine=process.Engine(file.engine.loop, file.engine.batch),
        socket=Path(file.api.socket or f"/run/dataplane/{file.node.name}.sock"),
        metrics=file.metrics.listen,
        log=process.Log(file.log.level, file.log.format),
        store=_store(file.state),
        heartbeat=_heartbeat(file),
        cni=file.api.cni,
        ipam=_ipam(file),
    )


def _state(file: File) -> desired.DesiredState:
    uplink = None
    if file.uplink.mode in ("af_packet", "udp"):
        uplink = desired.Uplink(file.uplink.interface, file.uplink.mode, file.uplink.mtu, file.uplink.shared)
    balancing, services = _services(file)
    pools, advertisements, dns = _shared(file)
    vxlan = file.vxlan
    overhead = desired.VXLAN_OVERHEAD if uplink and vxlan.mode != "Never" else 0
    mtu = file.pods.mtu or file.uplink.mtu - overhead
    gateway = file.pods.gateway or desired.POD_GATEWAY
    assert isinstance(gateway, IPv4Address)  # the checks refuse another
    return desired.DesiredState(
        node=desired.Node(
            name=file.node.name,
            zone=file.node.zone,
            addresses=tuple(file.node.addresses),
            netns=file.node.netns,
            host_interface=_host_interface(file),
            labels=tuple(sorted(file.node.labels.items())),
        ),
        pod_network=desired.PodNetwork(
            cidrs=tuple(file.pods.cidr),
            mtu=mtu,
            gateway=gateway,
            gateway_mac=file.pods.gateway_mac,
            interface_prefix=file.pods.interface_prefix,
            proxy_arp=file.pods.proxy_arp,
            offload=frozenset(file.pods.offload),
            nat_outgoing=file.pods.nat_outgoing,
            nat_ports=file.pods.nat_port_range,
            nat_random_fully=file.pods.nat_random_fully,
        ),
        pods=tuple(
            desired.Pod(
                name=pod.name,
                namespace=pod.namespace,
                netns=pod.netns or pod.name,
                addresses=tuple(pod.ip),
                mac=pod.mac or desired.pod_mac(pod.namespace, pod.name),
                mtu=mtu,
                interface=desired.host_interface(file.pods.interface_prefix, pod.namespace, pod.name),
                labels=tuple(sorted(pod.labels.items())),
            )
            for pod in file.pods.static
        ),
        uplink=uplink,
        vxlan=desired.Vxlan(vxlan.mode, vxlan.vni, vxlan.port, vxlan.interface, vxlan.udp_checksum),
        peers=_peers(file),
        routes=tuple(desired.StaticRoute(route.dst, route.via, route.type) for route in file.routes),
        balancing=balancing,
        services=services,
        dns=dns,
        pools=pools,
        advertisements=advertisements,
    )


def _peers(file: File) -> tuple[desired.Peer, ...]:
    return tuple(
        desired.Peer(
            peer.name,
            peer.address,
            tuple(peer.pod_cidr),
            peer.vtep_mac or desired.vtep_mac(peer.name),
            labels=tuple(sorted(peer.labels.items())),
        )
        for peer in file.peers
    )


def _host_interface(file: File) -> str:
    """The host's own way to services and, where the uplink is ours alone, to everything."""
    given = file.node.host_interface
    if given is not None:
        return given
    needed = {"services", "dns"} & file.model_fields_set or not file.uplink.shared or file.state.source != "static"
    return HOST_INTERFACE if needed and file.uplink.mode in ("af_packet", "none") else ""


def _services(file: File) -> tuple[desired.Balancing, tuple[desired.Service, ...]]:
    if "services" not in file.model_fields_set:
        return desired.Balancing(), ()
    from dataplane.config_services import ServicesFile, balancing_of, service_of

    assert isinstance(file, ServicesFile)
    return balancing_of(file.services), tuple(service_of(service) for service in file.services.static)


def _shared(
    file: File,
) -> tuple[tuple[desired.AddressPool, ...], tuple[desired.L2Advertisement, ...] | None, desired.Dns | None]:
    """Return pools, advertisements (None without any: all is announced) and cluster DNS."""
    if not {"load_balancer", "dns"} & file.model_fields_set:
        return (), None, None
    from dataplane.config_cluster import ClusterFile, advertisement_of, dns_of, pool_of

    assert isinstance(file, ClusterFile)
    given = file.load_balancer
    advertisements = tuple(advertisement_of(each) for each in given.l2_advertisements) or None
    return tuple(pool_of(pool) for pool in given.ip_address_pools), advertisements, dns_of(file.dns)


def _heartbeat(file: File) -> process.Heartbeat:
    if "cluster" not in file.model_fields_set:
        return process.Heartbeat()
    from dataplane.config_cluster import ClusterFile, heartbeat_of

    assert isinstance(file, ClusterFile)
    return heartbeat_of(file.cluster)


def _ipam(file: File) -> "Rules | None":
    if "ipam" not in file.model_fields_set:
        return None
    from dataplane.config_ipam import IpamFile, rules_of

    assert isinstance(file, IpamFile)
    return rules_of(file.ipam)


def _store(given: StateSection) -> process.Store:
    etcd = given.etcd
    return process.Store(
        given.source, tuple(etcd.endpoints), etcd.prefix.rstrip("/"), etcd.lease_ttl, given.kubernetes.kubeconfig
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError((f"{path}: no such file",)) from None
    except IsADirectoryError:
        raise ConfigError((f"{path}: is a directory; expected a TOML file",)) from None
    except PermissionError:
        raise UnreadableError((f"{path}: no permission to read the file",)) from None
    except OSError as error:
        raise ConfigError((f"{path}: {(error.strerror or str(error)).lower()}",)) from None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError((f"{path}:{line}: expected UTF-8 (got byte 0x{raw[error.start]:02x})",)) from None


def _syntax_error(name: Path | str, source: str, message: str) -> str:
    """Move tomllib's "(at line 3, column 5)" to where an editor looks for it."""
    match = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    line = match[1] if match and match[1] else str(source.rstrip().count("\n") + 1)
    text = message[: match.start()] if match else message
    return f"{name}:{line}: not TOML: {text[:1].lower()}{text[1:]}"


# --- errors of shape -------------------------------------------------------------------------------------------------


@dataclass
class _Pruned(Generic[Model]):
    """Values from which whatever has a wrong shape is taken out, and what was found wrong on the way.

    Attributes:
        broken: The keys that were taken out, without indexes. An unknown key counts as the one that it was probably
            meant to be, else as its whole table.
        indexes: For each array that lost elements, where the remaining ones stood.
    """

    values: dict[str, Any]
    schema: Schema[Model]

    def __post_init__(self) -> None:
        self.problems: list[Problem] = []
        self.broken: set[str] = set()
        self.indexes: dict[KeyPath, list[int]] = {}

    def validate(self) -> Model | None:
        """Return the models of what is right; None if nothing can be saved."""
        for _ in range(_PASSES):
            try:
                return self.schema.smallest(self.values).model_validate(self.values)
            except ValidationError as failed:
                errors = failed.errors(include_url=False)
            if not self.problems:  # later passes only miss what this one takes out
                self.problems = [Problem(error["loc"], _explain(error, self.schema.whole())) for error in errors]
            offenders = {_offender(error["loc"], error["type"]): error["type"] for error in errors}
            for path in sorted(offenders, key=_order, reverse=True):
                meant = _meant(path, self.schema.whole()) if offenders[path] == "extra_forbidden" else path
                self.broken.add(".".join(part for part in meant if isinstance(part, str)))
                self._take_out(path)
        return None

    def is_news(self, problem: Problem) -> bool:
        """Whether all keys that a problem stands on were right."""
        return not any(
            key == broken or key.startswith(f"{broken}.") or broken.startswith(f"{key}.")
            for key in problem.uses
            for broken in self.broken
        )

    def restored(self, problem: Problem) -> Problem:
        """Return the problem with the indexes that its path has in the file."""
        return Problem(self._original(problem.path), problem.text)

    def _original(self, path: KeyPath) -> KeyPath:
        parts = list(path)
        for at, part in enumerate(path):
            if isinstance(part, int) and path[:at] in self.indexes:
                parts[at] = self.indexes[path[:at]][part]
        return tuple(parts)

    def _take_out(self, path: KeyPath) -> None:
        holder: Any = self.values
        for part in path[:-1]:
            holder = holder[part]
        if isinstance(holder, list):
            where = self.indexes.setdefault(path[:-1], list(range(len(holder))))
            del where[int(path[-1])]
        del holder[path[-1]]


def _offender(path: KeyPath, kind: str) -> KeyPath:
    """What to take out: the value itself, or the table that lacks a key."""
    return path[:-1] if kind == "missing" else path


def _order(path: KeyPath) -> tuple[tuple[str, int], ...]:
    return tuple((part, -1) if isinstance(part, str) else ("", part) for part in path)


def _explain(error: Any, whole: type[Section]) -> str:
    path, kind = error["loc"], error["type"]
    if kind == "missing":
        return f"missing; expected {_expected(path, whole)}"
    if kind == "extra_forbidden":
        return _unknown_key(path, whole)
    if kind == "expected":
        return f"expected {error['ctx']['expected']} (got {_quote(error['input'])})"
    expected = error["ctx"]["expected"].replace("'", '"') if kind == "literal_error" else _KINDS.get(kind, error["msg"])
    return f"expected {expected} (got {_quote(error['input'])})"


def _unknown_key(path: KeyPath, whole: type[Section]) -> str:
    meant = _meant(path, whole)
    if len(meant) == len(path):
        return f'unknown key; did you mean "{meant[-1]}"?'
    return f"unknown key; known are {', '.join(str(key) for key in _fields(_section_at(path[:-1], whole)))}"


def _meant(path: KeyPath, whole: type[Section]) -> KeyPath:
    """Return the path of the known key that is nearest to an unknown one; if none is near, that of the table."""
    folded = {str(key).lower(): key for key in _fields(_section_at(path[:-1], whole))}
    near = difflib.get_close_matches(str(path[-1]).lower(), folded, n=1)
    return (*path[:-1], folded[near[0]]) if near else path[:-1]


def _expected(path: KeyPath, whole: type[Section]) -> str:
    """Say what a missing key should hold."""
    field = _fields(_section_at(path[:-1], whole))[path[-1]]
    items = (part for argument in get_args(field.annotation) for part in getattr(argument, "__metadata__", ()))
    for note in field.metadata:
        if isinstance(note, PlainValidator) and isinstance(note.func, Expect):
            return note.func.expected
    for note in items:
        if isinstance(note, PlainValidator) and isinstance(note.func, Expect):
            return f"a list, each {note.func.expected}"
    return _expected_of_type(field.annotation)


def _expected_of_type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(_quote(value) for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a table"
    return _TYPES.get(annotation, "a value")


def _model(values: dict[str, Any]) -> type[File]:
    """Return the smallest model that knows every section of a file; an unknown one may be meant as any."""
    if values.keys() <= _fields(File).keys():
        return File
    from dataplane.config_services import ServicesFile

    if values.keys() <= _fields(ServicesFile).keys():
        return ServicesFile
    from dataplane.config_cluster import ClusterFile

    if values.keys() <= _fields(ClusterFile).keys():
        return ClusterFile
    from dataplane.config_ipam import IpamFile

    if values.keys() <= _fields(IpamFile).keys():
        return IpamFile
    from dataplane.config_later import WholeFile

    return WholeFile


def _fields(section: type[Section]) -> dict[str | int, FieldInfo]:
    return {key_name(name): field for name, field in section.model_fields.items()}


def _whole_file() -> type[Section]:
    from dataplane.config_later import WholeFile

    return WholeFile


def _section_at(path: KeyPath, whole: type[Section]) -> type[Section]:
    section = whole
    for part in path:
        if isinstance(part, str):
            section = next(_sections(_fields(section)[part].annotation))
    return section


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


# --- text ------------------------------------------------------------------------------------------------------------


def _quote(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _format(name: Path | str, problems: list[Problem], lines: dict[KeyPath, int]) -> tuple[str, ...]:
    placed = [(line_of(lines, problem.path), problem) for problem in problems]
    placed.sort(key=lambda pair: pair[0])
    return tuple(dict.fromkeys(f"{name}:{line}: {path_text(problem.path)}: {problem.text}" for line, problem in placed))
