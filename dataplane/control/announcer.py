"""Which node answers for a load balancer's address, and when it says so on the LAN; sans-IO, after MetalLB's L2 mode.

Every node decides alone, from the same configuration: the owner of an address is the eligible node with the smallest
sha256("node#address"). So a node that is removed never moves an address of another one, and a node that is added takes
only those that it wins (rendezvous hashing). Eligible are this node and its configured peers; with external traffic
policy Local only those that have a serving endpoint. An address without any serving endpoint is announced by nobody.

Services may share an address, on different ports. It has one owner all the same: a node that is eligible for all of
them, if there is one. (MetalLB does not hand out an address twice where that could not be.)

A new owner sends a gratuitous ARP request and a gratuitous reply at once, since stations differ in which of them they
believe, again every 1.1 s for 5 s, and from then on once a minute: a switch or a router that has forgotten, or was told
otherwise, learns it again without a failover (metallb#2910).

The node's own addresses on an uplink that is ours alone are announced in the same way.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address

from dataplane.control.services import Surroundings
from dataplane.control.state import Address, DesiredState, Endpoint, Service

SECOND = 1_000_000_000
REPEAT_NS = 1_100_000_000
BURST_NS = 5 * SECOND
PERIOD_NS = 60 * SECOND

_REQUEST, _REPLY = 1, 2
_EVERYBODY = b"\xff" * 6
_FRAME = struct.Struct("!6s6sHHHBBH6s4s6s4s")


def winner(nodes: Iterable[str], address: Address) -> str | None:
    """Return the node that owns an address; None without nodes."""
    return min(nodes, key=lambda node: hashlib.sha256(f"{node}#{address}".encode()).digest(), default=None)


def owner(address: Address, state: DesiredState) -> str | None:
    """Return the node that announces a load balancer's address; None: nobody does."""
    return _owner(_sharing(state).get(address, []), state, Surroundings.of(state))


def announced(state: DesiredState) -> frozenset[IPv4Address]:
    """Return the IPv4 addresses that this node answers for on the uplink."""
    if state.uplink is None or state.uplink.mode != "af_packet":
        return frozenset()
    around = Surroundings.of(state)
    addresses: set[Address] = set() if state.uplink.shared else set(state.node.addresses)
    # On a shared uplink the host's stack answers for the node's addresses, also when a service has one.
    for address, services in _sharing(state).items():
        if address not in state.node.addresses and _owner(services, state, around) == state.node.name:
            addresses.add(address)
    return frozenset(address for address in addresses if isinstance(address, IPv4Address))


def gratuitous(mac: int, address: IPv4Address) -> tuple[bytes, bytes]:
    """Return the ARP request and the reply that tell everybody who has an address (RFC 5227 3)."""
    request, reply = (
        _FRAME.pack(
            _EVERYBODY, mac.to_bytes(6), 0x0806, 1, 0x0800, 6, 4, operation,
            mac.to_bytes(6), address.packed, _EVERYBODY, address.packed,
        )
        for operation in (_REQUEST, _REPLY)
    )  # fmt: skip
    return request, reply


class Announcer:
    """Says when to send what. Times are nanoseconds of any monotonic clock.

    Attributes:
        mac: The uplink's; what is sent next has the new one.
        sent: How many frames were handed out (``metallb_layer2_gratuitous_sent``).
    """

    def __init__(self, mac: int) -> None:
        self.mac = mac
        self.sent = 0
        self._since: dict[IPv4Address, int] = {}
        self._due: dict[IPv4Address, int] = {}

    @property
    def owned(self) -> frozenset[IPv4Address]:
        """What this node answers for."""
        return frozenset(self._due)

    @property
    def next_at(self) -> int | None:
        """When `tick` has something to send; None: never."""
        return min(self._due.values(), default=None)

    def update(self, state: DesiredState, now: int) -> list[bytes]:
        """Take over a new state; return the frames to send now. Addresses that stay keep their times."""
        wanted = announced(state)
        for address in self.owned - wanted:
            del self._since[address], self._due[address]
        for address in wanted - self.owned:
            self._since[address] = self._due[address] = now
        return self.tick(now)

    def repeat(self, now: int) -> list[bytes]:
        """Begin anew with everything that is owned, since the link or its MAC is another; return the frames."""
        for address in self._due:
            self._since[address] = self._due[address] = now
        return self.tick(now)

    def tick(self, now: int) -> list[bytes]:
        """Return the frames that are due."""
        due = sorted(address for address, at in self._due.items() if at <= now)
        for address in due:
            following = self._due[address] + REPEAT_NS  # not from now: a late tick does not shift those after it
            if following <= now:
                following = now + REPEAT_NS
            self._due[address] = following if following - self._since[address] <= BURST_NS else now + PERIOD_NS
        frames = [frame for address in due for frame in gratuitous(self.mac, address)]
        self.sent += len(frames)
        return frames


def _sharing(state: DesiredState) -> dict[Address, list[Service]]:
    """Return the services of each load balancer's address."""
    sharing: dict[Address, list[Service]] = {}
    for service in state.services:
        for address in service.load_balancer_ips:
            sharing.setdefault(address, []).append(service)
    return sharing


def _owner(services: list[Service], state: DesiredState, around: Surroundings) -> str | None:
    """Return the owner of an address that these services have; their first addresses decide for the others."""
    eligible = [nodes for service in services if (nodes := _eligible(service, state, around))]
    if not eligible:
        return None
    nodes = frozenset.intersection(*eligible) or frozenset.union(*eligible)
    return winner(nodes, min((service.load_balancer_ips[0] for service in services), key=_order))


def _order(address: Address) -> tuple[int, int]:
    return address.version, int(address)


def _eligible(service: Service, state: DesiredState, around: Surroundings) -> frozenset[str]:
    """Return the nodes that may announce a service; none if it has no serving endpoint."""
    serving = [each for each in service.endpoints if _is_serving(service, each)]
    nodes = frozenset((state.node.name, *(peer.name for peer in state.peers))) if serving else frozenset()
    if service.external_policy == "Local":
        nodes &= {_node_of(endpoint, state, around) for endpoint in serving}
    return nodes


def _is_serving(service: Service, endpoint: Endpoint) -> bool:
    return (endpoint.serving or service.publish_not_ready) and not endpoint.draining


def _node_of(endpoint: Endpoint, state: DesiredState, around: Surroundings) -> str:
    """Return the name of the node that an endpoint is on, alike on every node; "" when that is unknown."""
    if around.has(endpoint):
        return state.node.name
    return endpoint.node or next(_nodes_with(endpoint.address, state), "")


def _nodes_with(address: Address, state: DesiredState) -> Iterator[str]:
    if any(address in cidr for cidr in state.pod_network.cidrs):
        yield state.node.name
    for peer in state.peers:
        if address == peer.address or any(address in cidr for cidr in peer.pod_cidrs):
            yield peer.name
