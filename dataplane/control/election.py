"""Who announces a load balancer's address: the election of MetalLB's L2 mode (``speaker/layer2_controller.go``); pure.

Every node decides alone, from the same configuration: the owner of an address is, of the eligible nodes, the one with
the highest preference and then the smallest sha256("node#address"), where the address is the first of its service. So a
node that is removed never moves an address of another one, and a node that is added takes only those that it wins
(rendezvous hashing).

Eligible are this node and its peers while their network works, they answer heartbeats, no label excludes them, and one
of the L2Advertisements of the address's pool selects them; with external traffic policy Local only those that have a
serving endpoint. An address without any serving endpoint is announced by nobody. Without any L2Advertisement every
node may announce every address; an address of no pool is a matter of those that name no pool.

A store that keeps owners (``DesiredState.owners``) decides instead: an address that it names nobody for is announced
by nobody until somebody has taken it, so that never two nodes answer. Whom it is for is still said by `elected`.

Services may share an address, on different ports. It has one owner all the same: a node that is eligible for all of
them, if there is one. (The allocator does not hand out an address twice where that could not be.) Services of a
``loadBalancerClass`` are somebody else's, and so is the announcement of their addresses.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from ipaddress import IPv4Address
from types import MappingProxyType

from dataplane.control.cluster import EXCLUDED
from dataplane.control.pools import pool_of
from dataplane.control.selector import any_matches, matches
from dataplane.control.services import Surroundings
from dataplane.control.state import Address, DesiredState, Endpoint, L2Advertisement, Labels, Service

_EQUAL: Mapping[str, int] = MappingProxyType({})
_REMEMBERED = 4  # states: a plan compares two, and what is drawn from them asks again


def winner(nodes: Collection[str], address: Address, scores: Mapping[str, int] = _EQUAL) -> str | None:
    """Return the node that owns an address; None without nodes."""
    best = max((scores.get(node, 0) for node in nodes), default=0) if scores else 0
    first = (node for node in nodes if scores.get(node, 0) == best) if scores else nodes
    return _first(frozenset(first), str(address))


@lru_cache(maxsize=1 << 15)  # 10,000 addresses of 100 nodes: a million sums, 1 s
def _first(nodes: frozenset[str], address: str) -> str | None:
    return min(nodes, key=lambda node: hashlib.sha256(f"{node}#{address}".encode()).digest(), default=None)


def owner(address: Address, state: DesiredState) -> str | None:
    """Return the node that announces a load balancer's address; None: nobody does."""
    return owners(state).get(address)


def owners(state: DesiredState) -> Mapping[Address, str]:
    """Return who announces the load balancers' addresses; one that is not in it is announced by nobody."""
    if state.owners is None:
        return elected(state)
    named = dict(state.owners)
    return {address: named[address] for address in holders(state) if address in named}


def elected(state: DesiredState) -> Mapping[Address, str]:
    """Return who should announce the load balancers' addresses by the election, whatever a store says."""
    return _elected(Same(state))


class Same:
    """A state that is found again by being the same object: to compare whole states would cost more than to elect."""

    def __init__(self, state: DesiredState) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self.state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.state is self.state


@lru_cache(maxsize=_REMEMBERED)
def _elected(same: Same) -> Mapping[Address, str]:
    state = same.state
    electorate = _Electorate(state)
    found = ((address, electorate.elect(address, services)) for address, services in holders(state).items())
    return MappingProxyType({address: node for address, node in found if node is not None})


def announced(state: DesiredState) -> frozenset[IPv4Address]:
    """Return the IPv4 addresses that this node answers for on the uplink."""
    if state.uplink is None or state.uplink.mode != "af_packet":
        return frozenset()
    addresses: set[Address] = set() if state.uplink.shared else set(state.node.addresses)
    # On a shared uplink the host's stack answers for the node's addresses, also when a service has one.
    for address, node in owners(state).items():
        if node == state.node.name and address not in state.node.addresses and _is_let_by_uplink(address, state):
            addresses.add(address)
    return frozenset(address for address in addresses if isinstance(address, IPv4Address))


def holders(state: DesiredState) -> dict[Address, list[Service]]:
    """Return the services of each load balancer's address, without those that are somebody else's."""
    found: dict[Address, list[Service]] = {}
    for service in state.services:
        if service.load_balancer_ips and not service.load_balancer_class:
            for address in service.load_balancer_ips:
                found.setdefault(address, []).append(service)
    return found


# --- who may ---------------------------------------------------------------------------------------------------------


class _Electorate:
    """The nodes of a state that may announce, by the pool of the address."""

    def __init__(self, state: DesiredState) -> None:
        self._state = state
        self._around = Surroundings.of(state)
        self._labels = dict(_candidates(state))
        self._by_pool: dict[str, tuple[frozenset[str], Mapping[str, int]]] = {}

    def elect(self, address: Address, services: list[Service]) -> str | None:
        """Return the owner of an address that these services have; their first addresses decide for the others."""
        nodes, scores = self._of_pool(address)
        eligible = [own for service in services if (own := self._eligible(service, nodes))]
        if not eligible:
            return None
        if len(services) == 1:
            return winner(eligible[0], services[0].load_balancer_ips[0], scores)
        common = frozenset.intersection(*eligible) or frozenset.union(*eligible)
        return winner(common, min((service.load_balancer_ips[0] for service in services), key=_order), scores)

    def _of_pool(self, address: Address) -> tuple[frozenset[str], Mapping[str, int]]:
        """Return the nodes that are selected for an address, and their preferences."""
        pool = _pool_name(address, self._state)
        if pool not in self._by_pool:
            self._by_pool[pool] = self._select(pool)
        return self._by_pool[pool]

    def _select(self, pool: str) -> tuple[frozenset[str], Mapping[str, int]]:
        if self._state.advertisements is None:
            return _only(frozenset(self._labels)), _EQUAL
        concerned = [each for each in self._state.advertisements if _concerns(each, pool)]
        scores: dict[str, int] = {}
        for name, labels in self._labels.items():
            selecting = [each for each in concerned if _selects(each, labels)]
            if selecting:  # what another advertisement prefers does not matter: it would not choose this node at all
                weights = (pair for each in selecting for pair in each.preferences)
                scores[name] = sum(weight for weight, selector in weights if matches(selector, labels))
        return _only(frozenset(scores)), scores if any(scores.values()) else _EQUAL

    def _eligible(self, service: Service, nodes: frozenset[str]) -> frozenset[str]:
        """Return the nodes that may announce a service; none if it has no serving endpoint."""
        serving = (each for each in service.endpoints if _is_serving(service, each))
        if service.external_policy == "Local":
            return nodes & {_node_of(endpoint, self._state, self._around) for endpoint in serving}
        return nodes if any(True for _ in serving) else frozenset()


@lru_cache(maxsize=64)
def _only(nodes: frozenset[str]) -> frozenset[str]:
    """Return the one of equal sets that is remembered: to compare a set with itself costs nothing."""
    return nodes


def _candidates(state: DesiredState) -> Iterator[tuple[str, Labels]]:
    """Yield the nodes that may announce anything, with their labels."""
    every = [(state.node.name, state.node.labels, state.node.announces)]
    every += [(peer.name, peer.labels, peer.announces) for peer in state.peers]
    for name, labels, announces in every:
        if announces and name not in state.silent and all(key != EXCLUDED for key, _ in labels):
            yield name, labels


def _pool_name(address: Address, state: DesiredState) -> str:
    """Return the pool of an address where that matters; "" for an address of none."""
    if state.advertisements is None:
        return ""
    pool = pool_of(state.pools, address)
    return pool.name if pool else ""


def _concerns(advertisement: L2Advertisement, pool: str) -> bool:
    return not advertisement.pools or pool in advertisement.pools


def _selects(advertisement: L2Advertisement, labels: Labels) -> bool:
    return not advertisement.node_selectors or any_matches(advertisement.node_selectors, labels)


def _is_let_by_uplink(address: Address, state: DesiredState) -> bool:
    """Say whether this node's uplink is one of the interfaces that an address is announced on.

    It is no part of the election, since nobody knows the others' interfaces: an owner without a right one is silent.
    """
    if state.advertisements is None or state.uplink is None:
        return True
    pool = _pool_name(address, state)
    concerned = [each for each in state.advertisements if _concerns(each, pool) and _selects(each, state.node.labels)]
    return any(not each.interfaces or state.uplink.interface in each.interfaces for each in concerned)


def _order(address: Address) -> tuple[int, int]:
    return address.version, int(address)


# --- where endpoints are ---------------------------------------------------------------------------------------------


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
