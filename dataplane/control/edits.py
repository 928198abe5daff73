"""The steps that lead from one desired state to another: what ``reconcile.plan`` lists and the node carries out."""

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import collapse_addresses
from typing import Literal, TypeAlias

from dataplane.control.claims import masquerade_ports
from dataplane.control.services import Destination, VirtualServer
from dataplane.control.state import Address, Balancing, DesiredState, Network, Node, Peer, Pod, PodNetwork

RouteKind: TypeAlias = Literal["pod", "local", "via", "tunnel", "blackhole", "unreachable", "service"]


class Source(IntEnum):
    """Who wants a route. Of two for one prefix the lower source wins (Calico's order, ``routetable/defs.go``).

    Calico's list starts with the workloads: the node's own addresses stand before it, because the kernel looks into
    its ``local`` table first, where kube-proxy's addresses are as well. Static routes and on-link prefixes are
    what Calico finds on the host: after its own, before the blackhole.
    """

    LOCAL_HOST = 0
    SERVICE = 1
    LOCAL_WORKLOAD = 2
    VXLAN_SAME_SUBNET = 3
    VXLAN_TUNNEL = 4
    NO_ENCAP = 5
    STATIC = 6
    ON_LINK = 7
    BLACKHOLE = 8

    @property
    def label(self) -> str:
        """``VxlanTunnel``: the name that people see."""
        return self.name.title().replace("_", "")


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """What becomes of packets to one prefix.

    Attributes:
        target: The interface's name (pod, via) or the peer's name (tunnel); else empty.
        gateway: The next hop; None when the destination itself is on the link.
        announced: This node answers for the address on the uplink.
        hosted: The host's own stack has the address, and gets what is sent to it if there is a way to it.
    """

    kind: RouteKind
    source: Source
    target: str = ""
    gateway: Address | None = None
    announced: bool = False
    hosted: bool = False


@dataclass(frozen=True, slots=True)
class AddPod:
    """Make the pod's link and namespace."""

    pod: Pod


@dataclass(frozen=True, slots=True)
class RemovePod:
    """Take the pod's link away, and its namespace if the node made it."""

    pod: Pod


@dataclass(frozen=True, slots=True)
class ChangePod:
    """Change addresses, MAC, MTU, labels or the namespace; the link and its counters stay."""

    old: Pod
    new: Pod


@dataclass(frozen=True, slots=True)
class AddVtep:
    """Make a remote node known: a tunnel target, and an address that VXLAN is accepted from."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class RemoveVtep:
    """Forget a remote node."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class ChangeVtep:
    """Change a remote node's address, MAC or blocks; its counters stay."""

    old: Peer
    new: Peer


@dataclass(frozen=True, slots=True)
class SetRoute:
    """Add the route, or put it in the place of the one that this prefix has."""

    prefix: Network
    route: RouteSpec


@dataclass(frozen=True, slots=True)
class DeleteRoute:
    """Take the prefix out of the table."""

    prefix: Network


@dataclass(frozen=True, slots=True)
class ChangeSettings:
    """Take over what no row of a table holds: zone, proxy ARP, blocks, default MTU, timeouts, pools.

    Attributes:
        cluster: Prefixes whose traffic to cluster IPs keeps its source address.
        outgoing: Prefixes that are masqueraded towards all others; empty without ``natOutgoing``.
        ports: Source ports of masqueraded flows, first and last; zeros: by the kernel's rules.
    """

    node: Node
    pod_network: PodNetwork
    balancing: Balancing
    cluster: tuple[Network, ...] = ()
    outgoing: tuple[Network, ...] = ()
    ports: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, state: DesiredState) -> "ChangeSettings":
        """Take from a state what is set."""
        cluster = state.balancing.cluster_cidrs
        blocks = [*state.pod_network.cidrs, *(cidr for peer in state.peers for cidr in peer.pod_cidrs)]
        outgoing = (cluster or _collapsed(blocks)) if state.pod_network.nat_outgoing else ()
        ports = masquerade_ports(state) or (0, 0)
        return cls(state.node, state.pod_network, state.balancing, cluster, outgoing, ports)


@dataclass(frozen=True, slots=True)
class AddServer:
    """Make a virtual server, with its destinations."""

    server: VirtualServer


@dataclass(frozen=True, slots=True)
class RemoveServer:
    """Take a virtual server away; its connections end."""

    server: VirtualServer


@dataclass(frozen=True, slots=True)
class ChangeServer:
    """Change how a virtual server schedules, or who may use it; its destinations are left to edits of their own."""

    old: VirtualServer
    new: VirtualServer


@dataclass(frozen=True, slots=True)
class AddDestination:
    """Give a virtual server one more destination, the newest."""

    server: VirtualServer
    destination: Destination


@dataclass(frozen=True, slots=True)
class RemoveDestination:
    """Take a destination from a virtual server, once its connections have ended (``VirtualServer.drain_seconds``)."""

    server: VirtualServer
    destination: Destination


@dataclass(frozen=True, slots=True)
class ChangeDestination:
    """Change a destination's weight."""

    server: VirtualServer
    destination: Destination


@dataclass(frozen=True, slots=True)
class NeedsRestart:
    """These keys cannot be changed while packets flow; a plan with this edit has no other and is not applied."""

    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"cannot be changed while running: {', '.join(self.keys)}; restart the node to apply"


Edit: TypeAlias = (
    AddPod
    | RemovePod
    | ChangePod
    | AddVtep
    | RemoveVtep
    | ChangeVtep
    | SetRoute
    | DeleteRoute
    | ChangeSettings
    | AddServer
    | RemoveServer
    | ChangeServer
    | AddDestination
    | RemoveDestination
    | ChangeDestination
    | NeedsRestart
)


def _collapsed(blocks: list[Network]) -> tuple[Network, ...]:
    return tuple(collapse_addresses(block for block in blocks if block.version == 4))


def describe(edit: Edit) -> str:
    """Return one line about an edit, for the one who asked for it."""
    match edit:
        case AddPod(pod) | RemovePod(pod) | ChangePod(_, pod):
            return f"pod {pod.id} {_VERBS[type(edit)]}"
        case AddVtep(peer) | RemoveVtep(peer) | ChangeVtep(_, peer):
            return f"peer {peer.name} {_VERBS[type(edit)]}"
        case SetRoute(prefix, spec):
            return f"route {prefix} {spec.kind} {spec.target}".rstrip()
        case DeleteRoute(prefix):
            return f"route {prefix} deleted"
        case AddServer(server) | RemoveServer(server) | ChangeServer(_, server):
            return f"service {server.service} {_VERBS[type(edit)]} at {server.key}"
        case AddDestination(server, each) | RemoveDestination(server, each) | ChangeDestination(server, each):
            verb = _VERBS.get(type(edit), f"has weight {each.weight}")
            return f"endpoint {each.address}:{each.port} of {server.service} {verb} at {server.key}"
    return "settings changed"


_VERBS = {
    **dict.fromkeys((AddPod, AddVtep, AddServer, AddDestination), "added"),
    **dict.fromkeys((RemovePod, RemoveVtep, RemoveServer, RemoveDestination), "removed"),
    **dict.fromkeys((ChangePod, ChangeVtep, ChangeServer), "changed"),
}
