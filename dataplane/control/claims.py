"""What of the traffic around the node is the dataplane's, as one value; pure.

Three places of the kernel must agree about it: the filter of the uplink's packet socket (what reaches us), the rule
that keeps the host's stack from answering the same packets, and the host's routes into the dataplane.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, collapse_addresses

from dataplane.control.services import claims, node_port_addresses, virtual_addresses
from dataplane.control.state import Address, DesiredState, Network, Protocol

# Beside net.ipv4.ip_local_port_range, 32768-60999: the host's own clients never have them.
SHARED_PORTS = (61000, 65535)


@dataclass(frozen=True, slots=True)
class Claims:
    """IPv4 only, as all of it is for now.

    Attributes:
        arrivals: Whose packets are ours when they come from the LAN: this node's blocks and all services.
        departures: Where the host's own processes reach by way of the dataplane: all pods, and all services.
        addresses: The node's own.
        shared: Whether the host's stack has those on the uplink.
        servers: What is a service's at the node's addresses: node ports, and addresses of services that are the node's.
        ranges: The ports, first and last, that may be ours at a shared address: what a filter of fixed size tests.
        masquerade: The source ports that pods and clients share at the node's address; None: the whole address is ours.
        tunnel_port: VXLAN's UDP port, on which the host's stack receives for us; 0: none.
    """

    arrivals: tuple[IPv4Network, ...] = ()
    departures: tuple[IPv4Network, ...] = ()
    addresses: tuple[IPv4Address, ...] = ()
    shared: bool = True
    servers: frozenset[tuple[Protocol, IPv4Address, int]] = frozenset()
    ranges: tuple[tuple[int, int], ...] = ()
    masquerade: tuple[int, int] | None = None
    tunnel_port: int = 0


def of(state: DesiredState) -> Claims:
    """Derive the claims of a state."""
    addresses = tuple(address for address in state.node.addresses if isinstance(address, IPv4Address))
    shared = state.uplink is None or state.uplink.shared
    servers = frozenset(_servers(state, addresses))
    virtual = {address for service in state.services for address in virtual_addresses(service)}
    cidrs = state.balancing.service_cidrs
    # Ten thousand cluster IPs as prefixes, to be joined into the one that holds them, take most of a second.
    services = [*cidrs, *_hosts(address for address in virtual if not any(address in cidr for cidr in cidrs))]
    pods = [*state.balancing.cluster_cidrs, *(cidr for peer in state.peers for cidr in peer.pod_cidrs)]
    own = state.pod_network.cidrs
    masquerade = masquerade_ports(state)
    ranges = [state.balancing.node_port_range, *((port, port) for _, _, port in servers)]
    return Claims(
        arrivals=_without(addresses, [*own, *services]),
        departures=_without(addresses, [*own, *pods, *services]),
        addresses=addresses,
        shared=shared,
        servers=servers,
        ranges=tuple(_joined([*ranges, masquerade] if masquerade else ranges)),
        masquerade=masquerade,
        tunnel_port=state.vxlan.port if state.tunnels else 0,
    )


def masquerade_ports(state: DesiredState) -> tuple[int, int] | None:
    """Return the source ports that may be used at the node's address; None: all, by the kernel's rules."""
    given = state.pod_network.nat_ports
    return given or (SHARED_PORTS if state.uplink is not None and state.uplink.shared else None)


def _servers(state: DesiredState, addresses: tuple[IPv4Address, ...]) -> Iterator[tuple[Protocol, IPv4Address, int]]:
    answering = node_port_addresses(addresses, state.balancing.node_port_addresses)
    for service in state.services:
        for key, _, _ in claims(service, answering):
            if isinstance(key.address, IPv4Address) and key.address in addresses:
                yield key.protocol, key.address, key.port


def _hosts(addresses: Iterable[Address]) -> Iterator[IPv4Network]:
    return (IPv4Network(address) for address in addresses if isinstance(address, IPv4Address))


def _without(addresses: tuple[IPv4Address, ...], prefixes: Iterable[Network]) -> tuple[IPv4Network, ...]:
    """Return the IPv4 prefixes in as few as possible, without the node's addresses."""
    left = list(collapse_addresses(prefix for prefix in prefixes if isinstance(prefix, IPv4Network)))
    for own in map(IPv4Network, addresses):
        holder = next((prefix for prefix in left if own.subnet_of(prefix)), None)
        if holder is not None:
            left.remove(holder)
            left.extend(holder.address_exclude(own))
    return tuple(sorted(left))


def _joined(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the same ports in as few ranges as possible, in order."""
    first, last = 0, -1
    for low, high in sorted(ranges):
        if low <= last + 1 and last >= 0:
            last = max(last, high)
            continue
        if last >= 0:
            yield first, last
        first, last = low, high
    if last >= 0:
        yield first, last
