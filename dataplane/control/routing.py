"""The routing table that a desired state means: where every prefix that the node knows leads to."""

from collections.abc import Iterator
from functools import lru_cache
from ipaddress import ip_network

from dataplane.control.edits import RouteSpec, Source
from dataplane.control.election import announced
from dataplane.control.services import virtual_addresses
from dataplane.control.state import Address, DesiredState, Network, Peer, StaticRoute


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
    answered = announced(state)
    hosted = {*state.node.addresses, state.host_address} - {None}
    own = {*hosted, state.pod_network.gateway, state.tunnel_address} - {None}
    for address in own:
        yield (
            _host_route(address),
            RouteSpec("local", Source.LOCAL_HOST, announced=address in answered, hosted=address in hosted),
        )
    for service in state.services:
        for address in virtual_addresses(service):
            yield _host_route(address), _ANNOUNCED if address in answered else _SERVICE
    for cidr in state.balancing.service_cidrs:
        yield cidr, RouteSpec("blackhole", Source.BLACKHOLE)
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


_SERVICE = RouteSpec("service", Source.SERVICE)
_ANNOUNCED = RouteSpec("service", Source.SERVICE, announced=True)


@lru_cache(1 << 16)
def _host_route(address: Address) -> Network:
    return ip_network(address)


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
