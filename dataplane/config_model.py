"""The shape of ``node.toml``: every section, every key, its type and its default.

Names are those of Kubernetes and Calico. The models say what a file may contain, also keys that this version does not
carry out yet; ``config_checks`` says which of them are refused, and what must fit together. Services are in
``config_services``, what nodes share in ``config_cluster``, sections of which nothing is carried out yet in
``config_later``: a file without them does not pay for their models.
"""

import socket
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from dataplane.config_types import (
    IP,
    Duration,
    Interface,
    InterfacePrefix,
    Listen,
    Mac,
    Name,
    Netns,
    OptionalInterface,
    OptionalName,
    OptionalNetns,
    OptionalPortRange,
    Path,
    Port,
    Prefix,
    Size,
    Socket,
    Url,
    number,
)

_ACRONYMS = {"mac": "MAC", "cidr": "CIDR", "arp": "ARP", "ip": "IP", "ips": "IPs", "ttl": "TTL"}
Labels: TypeAlias = dict[str, str]


def key_name(field: str) -> str:
    """Return the key of a field: ``gateway_mac`` is ``gatewayMAC``, ``from_`` is ``from``."""
    first, *rest = field.rstrip("_").split("_")
    return first + "".join(_ACRONYMS.get(word, word.capitalize()) for word in rest)


class Section(BaseModel):
    """A table: no other keys than its own, no silent conversion."""

    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=key_name, frozen=True, defer_build=True, protected_namespaces=()
    )


# --- the node, its uplink and its pods -------------------------------------------------------------------------------


class NodeSection(Section):
    """Who this node is."""

    name: Name = Field(default_factory=lambda: socket.gethostname().lower())
    zone: OptionalName = ""
    addresses: list[IP] = []
    netns: OptionalNetns = ""
    host_interface: OptionalInterface | None = None
    labels: Labels = {}


class UplinkSection(Section):
    """The host's NIC; without the section there is none."""

    interface: OptionalInterface = ""
    mode: Literal["af_packet", "tap", "udp", "none"] = "af_packet"
    mtu: Annotated[int, number(576, 65535)] = 1500
    shared: bool = True


class Bandwidth(Section):
    """``kubernetes.io/ingress-bandwidth`` and ``egress-bandwidth``, bits per second."""

    ingress: Size | None = None
    egress: Size | None = None


class StaticPod(Section):
    """A pod that no CNI and no API server gives."""

    name: Name
    namespace: Name = "default"
    netns: Netns | None = None
    ip: list[IP]
    mac: Mac | None = None
    labels: Labels = {}
    bandwidth: Bandwidth | None = None


class PodsSection(Section):
    """What the pods of the node share."""

    cidr: list[Prefix] = []
    mtu: Annotated[int, number(0, 65535, " (0: what the uplink leaves)")] = 0
    gateway: IP | None = None
    gateway_mac: Mac = 0xEEEE_EEEE_EEEE
    interface_prefix: InterfacePrefix = "cali"
    proxy_arp: bool = True
    nat_outgoing: bool = False
    nat_port_range: OptionalPortRange = None
    nat_random_fully: bool = True
    offload: list[Literal["csum", "tso4", "tso6", "uso"]] = ["csum", "tso4", "tso6", "uso"]
    static: list[StaticPod] = []


class VxlanSection(Section):
    """The overlay; ``mode`` is Calico's ``IPPool.spec.vxlanMode``."""

    mode: Literal["Always", "CrossSubnet", "Never"] = "Always"
    vni: Annotated[int, number(1, 0xFFFFFF)] = 4096
    port: Port = 4789
    interface: Interface = "vxlan.calico"
    udp_checksum: bool = False


class PeerSection(Section):
    """Another node."""

    name: Name
    address: IP
    pod_cidr: list[Prefix]
    vtep_mac: Mac | None = None
    labels: Labels = {}


class RouteSection(Section):
    """A route beside the derived ones."""

    dst: Prefix
    via: IP | None = None
    type: Literal["unicast", "blackhole", "unreachable"] = "unicast"


# --- where state comes from, and the process itself ------------------------------------------------------------------


class KubernetesState(Section):
    """An API server."""

    kubeconfig: Path = ""


class EtcdState(Section):
    """An etcd cluster."""

    endpoints: list[Url] = ["http://127.0.0.1:2379"]
    prefix: Path = "/dataplane/v1"
    lease_ttl: Duration = 10.0


class StateSection(Section):
    """Where pods, peers and services come from."""

    source: Literal["static", "kubernetes", "etcd"] = "static"
    kubernetes: KubernetesState = Field(default_factory=KubernetesState)
    etcd: EtcdState = Field(default_factory=EtcdState)


class EngineSection(Section):
    """How packets are worked on."""

    loop: Literal["uvloop", "asyncio"] = "uvloop"
    kernels: Literal["numba", "numpy", "python"] = "numba"
    batch: Annotated[int, number(1, 256)] = 256
    workers: Annotated[int, number(1, 1024)] = 1
    busy_poll_us: Annotated[int, number(0, 1_000_000)] = 0


class ApiSection(Section):
    """The control API on a unix socket."""

    socket: Socket | None = None
    cni: bool = False


class ListenSection(Section):
    """An HTTP listener."""

    listen: Listen = None


class LogSection(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json", "journal"] = "auto"


class SecuritySection(Section):
    """What is given up once the devices are open."""

    user: str = ""
    keep_capabilities: list[str] = []
    seccomp: bool = False


class CaptureSection(Section):
    """Where captures go."""

    dir: Path = ""
    max_size: Size = 100_000_000


class File(Section):
    """The whole file without services; ``config_services`` and ``config_later`` add to it."""

    api_version: Literal["dataplane/v1"] = "dataplane/v1"
    kind: Literal["Node"] = "Node"
    node: NodeSection = Field(default_factory=NodeSection)
    uplink: UplinkSection = Field(default_factory=lambda: UplinkSection(mode="none"))
    pods: PodsSection = Field(default_factory=PodsSection)
    vxlan: VxlanSection = Field(default_factory=VxlanSection)
    peers: list[PeerSection] = []
    routes: list[RouteSection] = []
    state: StateSection = Field(default_factory=StateSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    api: ApiSection = Field(default_factory=ApiSection)
    metrics: ListenSection = Field(default_factory=ListenSection)
    web: ListenSection = Field(default_factory=ListenSection)
    log: LogSection = Field(default_factory=LogSection)
    security: SecuritySection = Field(default_factory=SecuritySection)
    capture: CaptureSection = Field(default_factory=CaptureSection)
