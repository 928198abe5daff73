"""The desired state: what the node should be, as immutable values.

``config.load`` makes it, ``reconcile.plan`` compares two of them, the node carries the difference out. Everything is
frozen and hashable, holds no file, socket or table row, and needs nothing but the standard library. MAC addresses are
integers in host order; IP addresses are ``ipaddress`` objects, because this is the text edge of the program.

Names follow Calico where it has one: a pod's host-side interface is ``cali`` + 11 hex digits of sha1("namespace.name"),
a node's VTEP has the MAC 0x66 + sha1(node)[0:5], and its tunnel address is the first address of its pod block.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from dataplane.control.process import Engine, Heartbeat, Log, Store

if TYPE_CHECKING:
    from dataplane.control.ipam import Rules

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network
Labels: TypeAlias = tuple[tuple[str, str], ...]
UplinkMode: TypeAlias = Literal["af_packet", "udp"]
VxlanMode: TypeAlias = Literal["Always", "CrossSubnet", "Never"]
RouteType: TypeAlias = Literal["unicast", "blackhole", "unreachable"]

VXLAN_OVERHEAD = 50  # Ethernet 14 + IPv4 20 + UDP 8 + VXLAN 8
POD_GATEWAY = IPv4Address("169.254.1.1")  # Calico's: link-local, so no pod or node can have it
INTERFACE_HASH = 11  # hex digits: with a prefix of four letters the kernel's limit of 15 is just kept


@lru_cache(maxsize=4096)
def vtep_mac(node: str) -> int:
    """Return the MAC of a node's VTEP as Calico derives it: 0x66, then the first five bytes of sha1(name)."""
    return int.from_bytes(b"\x66" + hashlib.sha1(node.encode(), usedforsecurity=False).digest()[:5])


def pod_mac(namespace: str, name: str) -> int:
    """Return a pod's MAC when none is given: locally administered, unicast, the same at every start."""
    digest = hashlib.sha1(f"{namespace}/{name}".encode(), usedforsecurity=False).digest()
    return int.from_bytes(b"\x02" + digest[:5])


def host_interface(prefix: str, namespace: str, name: str) -> str:
    """Return the name of a pod's link on the node: Calico's, so that its tools find it."""
    digest = hashlib.sha1(f"{namespace}.{name}".encode(), usedforsecurity=False).hexdigest()
    return prefix + digest[:INTERFACE_HASH]


@dataclass(frozen=True, slots=True)
class Node:
    """This node.

    Attributes:
        name: Its Kubernetes node name; the VTEP's MAC is derived from it.
        zone: ``topology.kubernetes.io/zone``; empty when unknown.
        addresses: Its own addresses (InternalIPs) on the uplink.
        labels: Sorted pairs; selectors of load balancer pools and advertisements look at them.
        netns: The namespace of the uplink: "" for the one the process runs in, else a name or a path.
        host_interface: The TAP by which the host's own processes reach pods and services; "" is none.
        announces: As `Peer.announces`, without its labels.
    """

    name: str
    zone: str = ""
    addresses: tuple[Address, ...] = ()
    netns: str = ""
    host_interface: str = ""
    labels: Labels = ()
    announces: bool = True

    @property
    def vtep_mac(self) -> int:
        """The MAC of this node's own VTEP."""
        return vtep_mac(self.name)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod: a TAP whose other end is ``eth0`` in the pod's network namespace.

    A container runtime's pod (CNI) may call it otherwise, and its namespace is never made or removed by the node.

    Attributes:
        netns: A name (``ip netns``) or an absolute path; created when missing.
        addresses: Each a /32 (/128) on ``eth0``.
        mac: ``eth0``'s MAC; our end of the link always has ``PodNetwork.gateway_mac``.
        mtu: Of the link, in bytes of IP packet.
        interface: The link's name on the node, ``cali...``.
        labels: Sorted pairs.
        ifname: The link's name in the pod.
        cookie: The kernel's number for the namespace of a container runtime's pod: no other is taken for it. 0: any.
    """

    name: str
    namespace: str
    netns: str
    addresses: tuple[Address, ...]
    mac: int
    mtu: int
    interface: str
    labels: Labels = ()
    ifname: str = "eth0"
    cookie: int = 0

    @property
    def id(self) -> str:
        """``namespace/name``: what a pod is known by."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """What all pods of the node share.

    Attributes:
        cidrs: The node's own block(s); the part that no pod has is a blackhole.
        mtu: Of pod links and of the tunnel, in bytes of IP packet.
        gateway: The pods' default gateway, an address that no interface has.
        gateway_mac: The MAC of our end of every pod link, and the answer to every proxied ARP request.
        interface_prefix: Of the host-side names.
        proxy_arp: Whether addresses other than the gateway's are answered too.
        offload: What the TAPs may hand over unfinished: of csum, tso4, tso6, uso.
        nat_outgoing: Pods have the node's address when they talk to what is outside the cluster.
        nat_ports: The source ports for that, first and last; None: as the kernel chooses.
        nat_random_fully: A random source port at once, not only when the pod's own one is taken.
    """

    cidrs: tuple[Network, ...] = ()
    mtu: int = 1450
    gateway: IPv4Address = POD_GATEWAY
    gateway_mac: int = 0xEEEE_EEEE_EEEE
    interface_prefix: str = "cali"
    proxy_arp: bool = True
    offload: frozenset[str] = frozenset({"csum", "tso4", "tso6", "uso"})
    nat_outgoing: bool = False
    nat_ports: tuple[int, int] | None = None
    nat_random_fully: bool = True


@dataclass(frozen=True, slots=True)
class Uplink:
    """The host's NIC. ``udp`` mode has the VXLAN socket only and needs no privilege for the uplink.

    Attributes:
        shared: The host's own stack has the node's address on it; else the interface is ours alone.
    """

    interface: str
    mode: UplinkMode = "af_packet"
    mtu: int = 1500
    shared: bool = True


@dataclass(frozen=True, slots=True)
class Vxlan:
    """The overlay: which peers are reached through it, and how it looks on the wire."""

    mode: VxlanMode = "Always"
    vni: int = 4096
    port: int = 4789
    interface: str = "vxlan.calico"
    udp_checksum: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node.

    Attributes:
        address: Where its VXLAN datagrams come from and go to.
        pod_cidrs: The blocks behind it, the one with its tunnel address first.
        vtep_mac: The inner destination MAC of what is sent to it.
        announces: It may own load balancer addresses: its network works, and no label excludes it.
    """

    name: str
    address: Address
    pod_cidrs: tuple[Network, ...]
    vtep_mac: int
    zone: str = ""
    labels: Labels = ()
    announces: bool = True

    @property
    def tunnel_address(self) -> Address | None:
        """The address of its VTEP, the first of its first block; None for a peer without pods."""
        return self.pod_cidrs[0].network_address if self.pod_cidrs else None


@dataclass(frozen=True, slots=True)
class StaticRoute:
    """A route that the configuration gives; ``via`` is None unless the type is unicast."""

    destination: Network
    via: Address | None
    type: RouteType = "unicast"


Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]
ServiceType: TypeAlias = Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]
TrafficPolicy: TypeAlias = Literal["Cluster", "Local"]
FamilyPolicy: TypeAlias = Literal["SingleStack", "PreferDualStack", "RequireDualStack"]
Origin: TypeAlias = Literal["file", "api", "etcd", "kubernetes", "node"]


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service. A ``target_port`` that is a name is looked up in each endpoint; None is ``port``."""

    port: int
    protocol: Protocol = "TCP"
    name: str = ""
    target_port: int | str | None = None
    node_port: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A backend of a service, with the conditions of an EndpointSlice.

    Attributes:
        node: The node that it runs on; "" when unknown. This node's pods are recognised by their address.
        ports: Numbers of named target ports, sorted pairs.
        ready: Passes its readiness probe; a terminating one counts as not ready whatever this says.
        serving: Passes it, terminating or not.
        draining: Gets no new connections (weight 0) until it is deleted; asked for by ``endpoint drain``.
        hostname: Its name in cluster DNS; "" is its address with dashes.
    """

    address: Address
    weight: int = 1
    node: str = ""
    zone: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    draining: bool = False
    ports: tuple[tuple[str, int], ...] = ()
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """A Kubernetes service.

    Attributes:
        cluster_ips: None for a headless service and for an ``ExternalName``: those have no virtual servers.
        load_balancer_ips: ``status.loadBalancer.ingress``: the addresses that were handed out.
        affinity_seconds: ``sessionAffinity: ClientIP`` with this timeout; 0 is None.
        source_ranges: ``loadBalancerSourceRanges``.
        scheduler: ipvsadm's name; "" is the node's default.
        scheduler_flags: Of ``sh-port``, ``sh-fallback``, ``mh-port``, ``mh-fallback``, ``ops``.
        drain_seconds: How long connections of a removed endpoint may go on; 0: until they end, as kube-proxy.
        publish_not_ready: ``publishNotReadyAddresses``: all endpoints count as ready.
        external_name: The DNS name that an ``ExternalName`` stands for.
        origin: Who gives it: the node's file, the control API, a store, or the node itself (cluster DNS).
        labels: Sorted pairs; selectors of load balancer pools look at them.
        annotations: Sorted pairs; of them MetalLB's (``metallb.io/...``) matter.
        load_balancer_class: ``loadBalancerClass``: with one, addresses are somebody else's business.
        requested_ip: ``spec.loadBalancerIP``, deprecated and still asked for.
        family_policy: ``ipFamilyPolicy``; which families there are is said by ``cluster_ips``.
        selector: Sorted pairs, of the pods behind it; empty where endpoints are given by hand.
    """

    name: str
    namespace: str = "default"
    type: ServiceType = "ClusterIP"
    cluster_ips: tuple[Address, ...] = ()
    external_ips: tuple[Address, ...] = ()
    load_balancer_ips: tuple[Address, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    affinity_seconds: float = 0
    external_policy: TrafficPolicy = "Cluster"
    internal_policy: TrafficPolicy = "Cluster"
    source_ranges: tuple[Network, ...] = ()
    health_check_node_port: int = 0
    scheduler: str = ""
    scheduler_flags: frozenset[str] = frozenset()
    drain_seconds: float = 0
    publish_not_ready: bool = False
    external_name: str = ""
    origin: Origin = "file"
    labels: Labels = ()
    annotations: Labels = ()
    load_balancer_class: str = ""
    requested_ip: Address | None = None
    family_policy: FamilyPolicy = "SingleStack"
    selector: Labels = ()

    @property
    def id(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Balancing:
    """What all services share: kube-proxy's settings (``KubeProxyConfiguration``).

    Attributes:
        cluster_cidrs: The pods' addresses of the whole cluster: traffic from elsewhere to a cluster IP is masqueraded.
        service_cidrs: Where cluster IPs are taken from; an address in it without a service is a blackhole.
        node_port_addresses: Restricts node ports to the node's addresses in these prefixes; empty: all of them.
        timeouts: Seconds by kube-proxy's names: ``tcpEstablishedTimeout``, ``ipvs.tcpTimeout``, sorted pairs. What is
            not named, or 0, has the kernel's own value.
        conntrack_max: Flows that the table can hold.
        tcp_be_liberal: TCP segments outside the window are counted, not dropped.
    """

    cluster_cidrs: tuple[Network, ...] = ()
    service_cidrs: tuple[Network, ...] = ()
    node_port_range: tuple[int, int] = (30000, 32767)
    node_port_addresses: tuple[Network, ...] = ()
    masquerade_all: bool = False
    scheduler: str = "rr"
    timeouts: tuple[tuple[str, float], ...] = ()
    conntrack_max: int = 262144
    tcp_be_liberal: bool = True


@dataclass(frozen=True, slots=True)
class Selector:
    """A label selector of Kubernetes: all of ``labels`` and all expressions (key, operator, values) have to hold."""

    labels: Labels = ()
    expressions: tuple[tuple[str, Literal["In", "NotIn", "Exists", "DoesNotExist"], tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class AddressPool:
    """``IPAddressPool`` of metallb.io/v1beta1: addresses for services of type LoadBalancer.

    Attributes:
        ranges: First and last address of each, in the order of the file.
        priority: Of the pools that are pinned to a service the lowest number is tried first; 0 is last.
        namespaces: Pins the pool to services of these; empty: of all.
        service_selectors: Pins the pool to services that one of them matches.
    """

    name: str
    ranges: tuple[tuple[Address, Address], ...]
    auto_assign: bool = True
    avoid_buggy_ips: bool = False
    priority: int = 0
    namespaces: frozenset[str] = frozenset()
    service_selectors: tuple[Selector, ...] = ()


@dataclass(frozen=True, slots=True)
class L2Advertisement:
    """``L2Advertisement`` of metallb.io/v1beta1: which nodes may announce the addresses of which pools.

    Attributes:
        pools: Names; with no pool and no selector: all.
        node_selectors: A node is eligible if one of them matches, or if there is none.
        interfaces: Where to announce; empty: on all. A node's only one is its uplink.
        preferences: Weights and which of the selected nodes get them: those with the highest sum come first.
    """

    name: str = ""
    pools: frozenset[str] = frozenset()
    node_selectors: tuple[Selector, ...] = ()
    interfaces: frozenset[str] = frozenset()
    preferences: tuple[tuple[int, Selector], ...] = ()


@dataclass(frozen=True, slots=True)
class Dns:
    """Cluster DNS, answered by the node itself.

    Attributes:
        address: The cluster IP that pods ask (``--cluster-dns``).
        ttl: Of answers, in seconds.
        upstreams: Who is asked about other names, (address, port); empty: nobody.
        pods: CoreDNS's modes for names of pods by their address.
    """

    address: Address
    domain: str = "cluster.local"
    ttl: int = 5
    upstreams: tuple[tuple[Address, int], ...] = ()
    pods: Literal["disabled", "insecure", "verified"] = "disabled"


@dataclass(frozen=True, slots=True)
class DesiredState:
    """All that the data plane should be.

    Attributes:
        uplink: None for a node that stands alone.
        on_link: The uplink's own prefixes, as the node reads them from it; CrossSubnet compares peers with them.
        advertisements: None: every address is announced, by any node. Otherwise only what one of them lets.
        owners: Who announces which load balancer address, where a store decides that; None: each node elects them.
        silent: Nodes that do not answer heartbeats: they are not elected.
        assigned: The load balancer addresses that services got from pools, by the service's id.
        refused: Why a service that waits for such an address has none.
    """

    node: Node
    pod_network: PodNetwork = PodNetwork()
    pods: tuple[Pod, ...] = ()
    uplink: Uplink | None = None
    vxlan: Vxlan = Vxlan()
    peers: tuple[Peer, ...] = ()
    routes: tuple[StaticRoute, ...] = ()
    on_link: tuple[Network, ...] = ()
    balancing: Balancing = Balancing()
    services: tuple[Service, ...] = ()
    dns: Dns | None = None
    pools: tuple[AddressPool, ...] = ()
    advertisements: tuple[L2Advertisement, ...] | None = None
    owners: frozenset[tuple[Address, str]] | None = None
    silent: frozenset[str] = frozenset()
    assigned: Mapping[str, tuple[Address, ...]] = field(default_factory=dict, hash=False)
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def tunnels(self) -> bool:
        """Whether a VXLAN socket is needed."""
        return self.uplink is not None and self.vxlan.mode != "Never"

    @property
    def tunnel_mtu(self) -> int:
        """The largest IP packet that fits into the tunnel; 0 without an uplink."""
        return self.uplink.mtu - VXLAN_OVERHEAD if self.uplink else 0

    @property
    def tunnel_address(self) -> Address | None:
        """The address of this node's own VTEP; None without a tunnel or without pods."""
        return self.pod_network.cidrs[0].network_address if self.tunnels and self.pod_network.cidrs else None

    @property
    def host_address(self) -> Address | None:
        """What the host's link has as its own, as Calico's tunnel has it: the first address of the node's block.

        None without such a link or a block, or when a pod has that address.
        """
        if not self.node.host_interface or not self.pod_network.cidrs:
            return None
        first = self.pod_network.cidrs[0].network_address
        return first if all(first not in pod.addresses for pod in self.pods) else None


@dataclass(frozen=True, slots=True)
class Settings:
    """A whole configuration file: the desired state, and what concerns the process only.

    Attributes:
        path: Where it came from, for reload; None when the built-in example is used.
        socket: The control API's unix socket.
        metrics: Where ``/metrics`` listens, (host, port); None when off.
        cni: The control socket serves the CNI plugin, too.
        heartbeat: How nodes find out that one of them is dead.
        ipam: How pods get addresses; None: as Calico's defaults say, from pools that the store has.
    """

    state: DesiredState
    path: Path | None = None
    engine: Engine = field(default_factory=Engine)
    socket: Path = Path("/run/dataplane/node.sock")
    metrics: tuple[str, int] | None = None
    log: Log = field(default_factory=Log)
    store: Store = field(default_factory=Store)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    cni: bool = False
    ipam: "Rules | None" = None
