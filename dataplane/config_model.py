"""The shape of ``node.toml``: every section, every key, its type and its default.

Names are those of Kubernetes, kube-proxy, Calico and MetalLB. The models say what a file may contain, also what this
version does not do yet; ``config_checks`` says which of it is refused, and what must fit together.
"""

import socket
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from dataplane.config_types import (
    IP,
    AddressRange,
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
    Path,
    Port,
    PortRange,
    Prefix,
    Size,
    Socket,
    number,
)

_ACRONYMS = {"mac": "MAC", "cidr": "CIDR", "arp": "ARP", "ip": "IP", "ips": "IPs", "ttl": "TTL"}
_NEVER = 0xFFFF_FFFF
Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]
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


class UplinkSection(Section):
    """The host's NIC; without the section there is none."""

    interface: OptionalInterface = ""
    mode: Literal["af_packet", "tap", "udp", "none"] = "af_packet"
    mtu: Annotated[int, number(576, 65535)] = 1500


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


class RouteSection(Section):
    """A route beside the derived ones."""

    dst: Prefix
    via: IP | None = None
    type: Literal["unicast", "blackhole", "unreachable"] = "unicast"


# --- services, load balancer addresses, DNS, policy ------------------------------------------------------------------


class Ipvs(Section):
    """``KubeProxyConfiguration.ipvs``."""

    scheduler: Literal["rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh"] = "rr"
    tcp_timeout: Duration = 900.0
    tcp_fin_timeout: Duration = 120.0
    udp_timeout: Duration = 300.0
    strict_arp: bool = True


class Conntrack(Section):
    """``KubeProxyConfiguration.conntrack``."""

    max: Annotated[int, number(1, _NEVER)] = 262144
    tcp_established_timeout: Duration = 86400.0
    tcp_close_wait_timeout: Duration = 3600.0
    udp_timeout: Duration = 30.0


class ServicePort(Section):
    """``ServicePort`` of core/v1."""

    name: OptionalName = ""
    protocol: Protocol = "TCP"
    port: Port
    target_port: Port | None = None
    node_port: Port | None = None


class Endpoint(Section):
    """A backend."""

    ip: IP
    weight: Annotated[int, number(0, 65535)] = 1
    node: OptionalName = ""


class StaticService(Section):
    """A service that no API server gives."""

    name: Name
    namespace: Name = "default"
    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    cluster_ips: list[IP] = []
    ports: list[ServicePort] = []
    endpoints: list[Endpoint] = []
    session_affinity: Literal["None", "ClientIP"] = "None"
    session_affinity_timeout: Duration = 10800.0
    external_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    load_balancer_class: str = ""
    health_check_node_port: Annotated[int, number(0, 65535)] = 0


class ServicesSection(Section):
    """kube-proxy's own settings, and services."""

    cluster_cidr: list[Prefix] = []
    service_cidr: list[Prefix] = []
    node_port_range: PortRange = (30000, 32767)
    node_port_addresses: list[Prefix] = []
    masquerade_all: bool = False
    masquerade_bit: Annotated[int, number(0, 31)] = 14
    ipvs: Ipvs = Field(default_factory=Ipvs)
    conntrack: Conntrack = Field(default_factory=Conntrack)
    static: list[StaticService] = []


class IPAddressPool(Section):
    """``IPAddressPool`` of metallb.io/v1beta1."""

    name: Name
    addresses: list[AddressRange]
    auto_assign: bool = True
    avoid_buggy_ips: bool = False


class L2Advertisement(Section):
    """``L2Advertisement`` of metallb.io/v1beta1."""

    ip_address_pools: list[Name] = []
    interfaces: list[Interface] = []


class LoadBalancerSection(Section):
    """Addresses for services of type LoadBalancer."""

    ip_address_pools: list[IPAddressPool] = []
    l2_advertisements: list[L2Advertisement] = []


class DnsSection(Section):
    """Cluster DNS."""

    cluster_domain: Name = "cluster.local"
    cluster_ip: IP | None = None
    ttl: Duration = 5.0
    upstreams: list[IP] = []


class IPBlock(Section):
    """``IPBlock`` of networking.k8s.io/v1."""

    cidr: Prefix
    except_: list[Prefix] = []


class PolicyPeer(Section):
    """``NetworkPolicyPeer`` of networking.k8s.io/v1."""

    pod_selector: Labels | None = None
    namespace_selector: Labels | None = None
    ip_block: IPBlock | None = None


class PolicyPort(Section):
    """``NetworkPolicyPort`` of networking.k8s.io/v1."""

    protocol: Protocol = "TCP"
    port: Port | None = None
    end_port: Port | None = None


class IngressRule(Section):
    """Who may send, and to which ports."""

    from_: list[PolicyPeer] = []
    ports: list[PolicyPort] = []


class EgressRule(Section):
    """Who may be sent to, and on which ports."""

    to: list[PolicyPeer] = []
    ports: list[PolicyPort] = []


class NetworkPolicy(Section):
    """``NetworkPolicy`` of networking.k8s.io/v1."""

    name: Name
    namespace: Name = "default"
    pod_selector: Labels = {}
    policy_types: list[Literal["Ingress", "Egress"]] = ["Ingress"]
    ingress: list[IngressRule] = []
    egress: list[EgressRule] = []


# --- where state comes from, and the process itself ------------------------------------------------------------------


class KubernetesState(Section):
    """An API server."""

    kubeconfig: Path = ""


class EtcdState(Section):
    """An etcd cluster."""

    endpoints: list[str] = []
    prefix: str = "/dataplane/v1"
    lease_ttl: Duration = 10.0


class StateSection(Section):
    """Where pods, peers and services come from."""

    source: Literal["static", "kubernetes", "etcd", "mesh"] = "static"
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
    """The whole file."""

    api_version: Literal["dataplane/v1"] = "dataplane/v1"
    kind: Literal["Node"] = "Node"
    node: NodeSection = Field(default_factory=NodeSection)
    uplink: UplinkSection = Field(default_factory=lambda: UplinkSection(mode="none"))
    pods: PodsSection = Field(default_factory=PodsSection)
    vxlan: VxlanSection = Field(default_factory=VxlanSection)
    peers: list[PeerSection] = []
    routes: list[RouteSection] = []
    services: ServicesSection = Field(default_factory=ServicesSection)
    load_balancer: LoadBalancerSection = Field(default_factory=LoadBalancerSection)
    dns: DnsSection = Field(default_factory=DnsSection)
    network_policies: list[NetworkPolicy] = []
    state: StateSection = Field(default_factory=StateSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    api: ApiSection = Field(default_factory=ApiSection)
    metrics: ListenSection = Field(default_factory=ListenSection)
    web: ListenSection = Field(default_factory=ListenSection)
    log: LogSection = Field(default_factory=LogSection)
    security: SecuritySection = Field(default_factory=SecuritySection)
    capture: CaptureSection = Field(default_factory=CaptureSection)


def validate(values: dict[str, Any]) -> File:
    """Return the file as models, or raise pydantic's ValidationError with everything that is wrong with its shape."""
    return File.model_validate(values)
