"""From one desired state to another: the list of edits that leads there.

``routes`` derives the routing table from a state, ``plan`` compares two states. Both are pure. The node applies a plan
between two bursts, so a packet sees the old state or the new one; the order keeps every step whole as well, in case an
edit fails half way:

1. settings; 2. routes that vanish or whose target goes, longest prefix first; 3. pods and VTEPs that go; 4. those that
change in place; 5. new ones; 6. routes, shortest prefix first, so that the blackhole of the node's own block stands
before the /32s inside it.

At no step does a route point to something that is not there, do two pods share a namespace, or two VTEPs an address.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_network
from typing import Generic, Literal, TypeAlias, TypeVar

from dataplane.control.state import Address, DesiredState, Network, Node, Peer, Pod, PodNetwork, Settings, StaticRoute

RouteKind: TypeAlias = Literal["pod", "local", "via", "tunnel", "blackhole", "unreachable"]


class Source(IntEnum):
    """Who wants a route. Of two for one prefix the lower source wins (Calico's order, ``routetable/defs.go``).

    Calico's list starts with the workloads: the node's own addresses stand before it, because the kernel looks into
    its ``local`` table first. Static routes and on-link prefixes are what Calico finds on the host: after its own,
    before the blackhole.
    """

    LOCAL_HOST = 0
    LOCAL_WORKLOAD = 1
    VXLAN_SAME_SUBNET = 2
    VXLAN_TUNNEL = 3
    NO_ENCAP = 4
    STATIC = 5
    ON_LINK = 6
    BLACKHOLE = 7

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
    """

    kind: RouteKind
    source: Source
    target: str = ""
    gateway: Address | None = None


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
    """Take over what no row of a table holds: zone, proxy ARP, blocks, default MTU."""

    node: Node
    pod_network: PodNetwork


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
    | NeedsRestart
)
Item = TypeVar("Item", Pod, Peer)
_Table: TypeAlias = dict[Network, RouteSpec]


# --- the routing table of a state ------------------------------------------------------------------------------------


def routes(state: DesiredState) -> dict[Network, RouteSpec]:
    """Derive the routing table; of several wishes for one prefix the first source wins.

    The tunnel address of a remote node is inside its block, so it needs no /32 of its own as Calico's does.
    """
    table: dict[Network, RouteSpec] = {}
    for prefix, spec in _wishes(state):
        held = table.get(prefix)
        if held is None or spec.source < held.source:
            table[prefix] = spec
    return table


def _wishes(state: DesiredState) -> Iterator[tuple[Network, RouteSpec]]:
    own = [*state.node.addresses, state.pod_network.gateway]
    if state.tunnel_address is not None:
        own.append(state.tunnel_address)
    for address in own:
        yield ip_network(address), RouteSpec("local", Source.LOCAL_HOST)
    for pod in state.pods:
        for address in pod.addresses:
            yield ip_network(address), RouteSpec("pod", Source.LOCAL_WORKLOAD, pod.interface)
    for cidr in state.pod_network.cidrs:
        if cidr.prefixlen < cidr.max_prefixlen:  # a block of one address is that pod's own
            yield cidr, RouteSpec("blackhole", Source.BLACKHOLE)
    if state.uplink is None:
        return
    for peer in state.peers:
        spec = _peer_route(state, peer, state.uplink.interface)
        for cidr in peer.pod_cidrs:
            yield cidr, spec
    for prefix in state.on_link:
        yield prefix, RouteSpec("via", Source.ON_LINK, state.uplink.interface)
    for route in state.routes:
        yield route.destination, _static_route(route, state.uplink.interface)


def _peer_route(state: DesiredState, peer: Peer, uplink: str) -> RouteSpec:
    if state.vxlan.mode == "Never":
        return RouteSpec("via", Source.NO_ENCAP, uplink, peer.address)
    if state.vxlan.mode == "CrossSubnet" and any(peer.address in prefix for prefix in state.on_link):
        return RouteSpec("via", Source.VXLAN_SAME_SUBNET, uplink, peer.address)
    return RouteSpec("tunnel", Source.VXLAN_TUNNEL, peer.name, peer.tunnel_address)


def _static_route(route: StaticRoute, uplink: str) -> RouteSpec:
    if route.type == "unicast":
        return RouteSpec("via", Source.STATIC, uplink, route.via)
    return RouteSpec(route.type, Source.STATIC)


# --- the difference of two states ------------------------------------------------------------------------------------


def plan(old: DesiredState | None, new: DesiredState | None) -> tuple[Edit, ...]:
    """List what to do, in order, to get from ``old`` to ``new``; None is a node with nothing in it.

    ``plan(None, state)`` builds a node, ``plan(state, None)`` empties it, ``plan(state, state)`` is empty.
    """
    keys = restart_keys(old, new) if old and new else ()
    if keys:
        return (NeedsRestart(keys),)
    pods = _difference(old.pods if old else (), new.pods if new else ())
    vteps = _difference(_vteps(old), _vteps(new))
    before, after = (routes(state) if state else {} for state in (old, new))
    deletes, sets = _route_edits(before, after, pods.targets("pod") | vteps.targets("tunnel"))
    return (
        *_settings(old, new),
        *deletes,
        *(RemovePod(pod) for pod in pods.gone),
        *(RemoveVtep(peer) for peer in vteps.gone),
        *(ChangePod(*pair) for pair in pods.changed),
        *(ChangeVtep(*pair) for pair in vteps.changed),
        *(AddPod(pod) for pod in pods.added),
        *(AddVtep(peer) for peer in vteps.added),
        *sets,
    )


def restart_keys(old: DesiredState, new: DesiredState) -> tuple[str, ...]:
    """Name the keys that differ and are fixed for a running node: its identity, its devices, its pods' gateway."""
    pairs: dict[str, tuple[object, object]] = {
        "node.name": (old.node.name, new.node.name),
        "node.addresses": (old.node.addresses, new.node.addresses),
        "node.netns": (old.node.netns, new.node.netns),
        "uplink": (old.uplink, new.uplink),
        "vxlan.vni": (old.vxlan.vni, new.vxlan.vni),
        "vxlan.port": (old.vxlan.port, new.vxlan.port),
        "vxlan.interface": (old.vxlan.interface, new.vxlan.interface),
        "vxlan.udpChecksum": (old.vxlan.udp_checksum, new.vxlan.udp_checksum),
        "vxlan.mode": (old.vxlan.mode == "Never", new.vxlan.mode == "Never"),  # the socket exists or not
        "pods.gateway": (old.pod_network.gateway, new.pod_network.gateway),
        "pods.gatewayMAC": (old.pod_network.gateway_mac, new.pod_network.gateway_mac),
        "pods.interfacePrefix": (old.pod_network.interface_prefix, new.pod_network.interface_prefix),
        "pods.offload": (old.pod_network.offload, new.pod_network.offload),
    }
    return tuple(key for key, (before, after) in pairs.items() if before != after)


def process_keys(old: Settings, new: Settings) -> tuple[str, ...]:
    """Name the keys beside the desired state that differ; all of them are read at the start only."""
    pairs: dict[str, tuple[object, object]] = {
        "engine": (old.engine, new.engine),
        "api.socket": (old.socket, new.socket),
        "metrics.listen": (old.metrics, new.metrics),
        "log": (old.log, new.log),
    }
    return tuple(key for key, (before, after) in pairs.items() if before != after)


@dataclass(frozen=True, slots=True)
class _Difference(Generic[Item]):
    gone: tuple[Item, ...]
    changed: tuple[tuple[Item, Item], ...]
    added: tuple[Item, ...]

    def targets(self, kind: RouteKind) -> frozenset[tuple[RouteKind, str]]:
        """What routes of this kind must no longer point to."""
        return frozenset((kind, _key(item)) for item in self.gone)


def _key(item: Pod | Peer) -> str:
    """What stays the same when the rest of it changes, and what routes point to."""
    return item.interface if isinstance(item, Pod) else item.name


def _exclusive(item: Pod | Peer) -> frozenset[object]:
    """What no other may have at the same time: ``eth0`` exists once in a namespace, a VTEP's keys once in its table."""
    if isinstance(item, Pod):
        return frozenset({item.netns})
    return frozenset({item.address, item.vtep_mac, item.tunnel_address} - {None})


def _difference(old: tuple[Item, ...], new: tuple[Item, ...]) -> _Difference[Item]:
    """Sort items into gone, changed and added.

    One that would take over what another that stays still has (two pods that swap namespaces) goes and comes again.
    """
    before, after = ({_key(item): item for item in items} for items in (old, new))
    staying = before.keys() & after.keys()
    holders: dict[object, set[str]] = {}
    for name in staying:
        for token in _exclusive(before[name]):
            holders.setdefault(token, set()).add(name)
    replaced = {name for name in staying for token in _exclusive(after[name]) if holders.get(token, set()) - {name}}
    kept = staying - replaced
    return _Difference(
        gone=tuple(item for name, item in sorted(before.items()) if name not in kept),
        changed=tuple((before[name], after[name]) for name in sorted(kept) if before[name] != after[name]),
        added=tuple(item for name, item in sorted(after.items()) if name not in kept),
    )


def _vteps(state: DesiredState | None) -> tuple[Peer, ...]:
    return state.peers if state and state.tunnels else ()


def _settings(old: DesiredState | None, new: DesiredState | None) -> Iterator[Edit]:
    if new and (not old or (old.node, old.pod_network) != (new.node, new.pod_network)):
        yield ChangeSettings(new.node, new.pod_network)


def _route_edits(
    before: _Table, after: _Table, gone: frozenset[tuple[RouteKind, str]]
) -> tuple[tuple[Edit, ...], tuple[Edit, ...]]:
    """Return the deletes and the sets; a route whose target goes is deleted even if it comes again."""
    deleted = {prefix for prefix, spec in before.items() if prefix not in after or (spec.kind, spec.target) in gone}
    wanted = [prefix for prefix, spec in after.items() if prefix in deleted or before.get(prefix) != spec]
    return (
        tuple(DeleteRoute(prefix) for prefix in sorted(deleted, key=_length, reverse=True)),
        tuple(SetRoute(prefix, after[prefix]) for prefix in sorted(wanted, key=_length)),
    )


def _length(prefix: Network) -> tuple[int, int, int]:
    return prefix.prefixlen, prefix.version, int(prefix.network_address)
