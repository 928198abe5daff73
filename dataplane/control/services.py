"""From services to virtual servers, as kube-proxy's IPVS mode makes them (``pkg/proxy/ipvs/proxier.go``); pure.

A service has one virtual server for each of its ports at each of its addresses: the cluster IPs, the external IPs, the
addresses that a load balancer handed out, and, for a node port, each of the node's own addresses. Two never share
protocol, address and port; of two services that want the same, the first in the state has it.

Who gets traffic (``pkg/proxy/topology.go``, without hints): the ready endpoints; when there are none, those that
terminate but still serve. With traffic policy Local the same rule among the endpoints of this node. Here we leave
kube-proxy: when all of them are elsewhere, IPVS would send to those (kubernetes#97081) and clients would get answers
from an address that they never asked; we drop with a reason.

Destinations are listed in the order in which they are added, which decides what the schedulers pick: by the text of
"address:port", as kube-proxy does.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import ip_network
from itertools import compress
from operator import is_not
from typing import Literal, NamedTuple, TypeAlias

from dataplane.control.state import Address, DesiredState, Endpoint, Network, Protocol, Service, ServicePort

ServerKind: TypeAlias = Literal["cluster-ip", "external-ip", "load-balancer-ip", "node-port"]


class ServerKey(NamedTuple):
    """What a virtual server is found by; no two have the same."""

    protocol: Protocol
    address: Address
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}/{self.protocol}"


class Destination(NamedTuple):
    """A backend of a virtual server. Weight 0 is for connections that there are already."""

    address: Address
    port: int
    weight: int = 1


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """One port of a service at one address.

    Attributes:
        service: ``namespace/name``.
        port_name: The port's name in the service; often "".
        kind: Which of the service's addresses this is.
        local: Only endpoints of this node may be used, and the client's address is kept.
        no_local: ``local``, and all usable endpoints are on other nodes.
        ranges: Clients outside are dropped; empty: no such rule.
        scheduler: ipvsadm's name.
        flags: Of ``sh-port``, ``sh-fallback``, ``mh-port``, ``mh-fallback``.
        affinity_seconds: How long a client stays with its backend; 0: not at all.
        drain_seconds: How long connections of a removed destination may go on; 0: until they end.
        origin: ``Service.origin``.
        destinations: Oldest first.
    """

    key: ServerKey
    service: str
    port_name: str
    kind: ServerKind
    local: bool = False
    no_local: bool = False
    ranges: tuple[Network, ...] = ()
    scheduler: str = "rr"
    flags: frozenset[str] = frozenset()
    affinity_seconds: float = 0
    drain_seconds: float = 0
    origin: str = "file"
    destinations: tuple[Destination, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a service's virtual servers depend on besides the service.

    Attributes:
        pods: The addresses of this node's pods.
        node_port_addresses: Where node ports are answered.
    """

    node: str
    addresses: tuple[Address, ...]
    node_port_addresses: tuple[Address, ...]
    scheduler: str
    pods: frozenset[Address]

    @classmethod
    def of(cls, state: DesiredState) -> "Surroundings":
        """Take from a state what matters to services."""
        return cls(
            node=state.node.name,
            addresses=state.node.addresses,
            node_port_addresses=node_port_addresses(state.node.addresses, state.balancing.node_port_addresses),
            scheduler=state.balancing.scheduler,
            pods=frozenset(address for pod in state.pods for address in pod.addresses),
        )

    def has(self, endpoint: Endpoint) -> bool:
        """Say whether an endpoint is on this node."""
        address = endpoint.address
        return endpoint.node == self.node or address in self.pods or address in self.addresses


def node_port_addresses(addresses: Iterable[Address], prefixes: tuple[Network, ...]) -> tuple[Address, ...]:
    """Return the node's addresses that answer node ports; never a loopback address."""
    return tuple(
        address
        for address in addresses
        if not address.is_loopback and (not prefixes or any(address in prefix for prefix in prefixes))
    )


def virtual_addresses(service: Service) -> tuple[Address, ...]:
    """Return the addresses of a service that the node takes as its own, without the node's for node ports."""
    return (*service.cluster_ips, *service.external_ips, *service.load_balancer_ips) if service.ports else ()


def claims(service: Service, node_ports_at: tuple[Address, ...]) -> Iterator[tuple[ServerKey, ServerKind, int]]:
    """Yield what a service's virtual servers will be found by, with the kind and the index of the port."""
    kinds: tuple[tuple[ServerKind, tuple[Address, ...]], ...] = (
        ("cluster-ip", service.cluster_ips),
        ("external-ip", service.external_ips),
        ("load-balancer-ip", service.load_balancer_ips),
    )
    for index, port in enumerate(service.ports):
        if port.protocol == "SCTP":  # a file may not have it; a store's services still have its name and SRV records
            continue
        for kind, addresses in kinds:
            for address in addresses:
                yield ServerKey(port.protocol, address, port.port), kind, index
        for address in node_ports_at if port.node_port else ():
            yield ServerKey(port.protocol, address, port.node_port), "node-port", index


def virtual_servers(state: DesiredState) -> dict[ServerKey, VirtualServer]:
    """Return all virtual servers of a state, in its order."""
    around = Surroundings.of(state)
    servers: dict[ServerKey, VirtualServer] = {}
    for service in state.services:
        for server in build(service, around):
            servers.setdefault(server.key, server)
    return servers


def build(service: Service, around: Surroundings) -> list[VirtualServer]:
    """Return the virtual servers of one service."""
    if service.type == "ExternalName":
        return []
    choice = _Choice(service, around)
    scheduler = service.scheduler or around.scheduler
    flags = service.scheduler_flags | {"mh-port"} if scheduler == "mh" else service.scheduler_flags
    servers = []
    for key, kind, index in claims(service, around.node_port_addresses):
        policy = service.internal_policy if kind == "cluster-ip" else service.external_policy
        local = policy == "Local"
        port = service.ports[index]
        servers.append(
            VirtualServer(
                key=key,
                service=service.id,
                port_name=port.name,
                kind=kind,
                local=local,
                no_local=local and choice.all_elsewhere,
                ranges=_ranges(service, key.address, around) if kind == "load-balancer-ip" else (),
                scheduler=scheduler,
                flags=flags,
                affinity_seconds=service.affinity_seconds,
                drain_seconds=service.drain_seconds,
                origin=service.origin,
                destinations=choice.destinations(index, local),
            )
        )
    return servers


class _Choice:
    """The endpoints of a service that count, here and everywhere.

    Attributes:
        all_elsewhere: There are usable endpoints, and none of them is on this node.
    """

    def __init__(self, service: Service, around: Surroundings) -> None:
        self._ports = service.ports
        self._made: dict[tuple[int, bool], tuple[Destination, ...]] = {}
        usable, draining = usable_endpoints(service, service.endpoints)
        self._endpoints = {False: (*usable, *draining)}
        self.all_elsewhere = False
        if "Local" in (service.internal_policy, service.external_policy):
            here, draining = usable_endpoints(service, [each for each in service.endpoints if around.has(each)])
            self._endpoints[True] = (*here, *draining)
            self.all_elsewhere = bool(usable and not here)

    def destinations(self, index: int, local: bool) -> tuple[Destination, ...]:
        """Return the destinations of the port with this index."""
        if (index, local) not in self._made:
            self._made[index, local] = _destinations(self._ports[index], self._endpoints[local])
        return self._made[index, local]


def usable_endpoints(
    service: Service, endpoints: Sequence[Endpoint]
) -> tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]:
    """Return the endpoints that get new connections, and those that are being drained."""
    draining = tuple(endpoint for endpoint in endpoints if endpoint.draining)
    others = [endpoint for endpoint in endpoints if not endpoint.draining]
    ready = tuple(endpoint for endpoint in others if is_ready(service, endpoint))
    return ready or tuple(endpoint for endpoint in others if endpoint.serving and endpoint.terminating), draining


def is_ready(service: Service, endpoint: Endpoint) -> bool:
    """Say whether an endpoint is ready as an EndpointSlice says it."""
    return service.publish_not_ready or (endpoint.ready and not endpoint.terminating)


def local_ready(service: Service, around: Surroundings) -> int:
    """Count the ready endpoints of this node: what a health check of ``healthCheckNodePort`` asks for."""
    return sum(
        is_ready(service, endpoint) and not endpoint.draining and around.has(endpoint) for endpoint in service.endpoints
    )


def target_port(port: ServicePort, endpoint: Endpoint) -> int | None:
    """Return the endpoint's own port; None if it has none of that name."""
    if isinstance(port.target_port, str):
        return dict(endpoint.ports).get(port.target_port)
    return port.target_port or port.port


def _destinations(port: ServicePort, endpoints: tuple[Endpoint, ...]) -> tuple[Destination, ...]:
    found: dict[str, Destination] = {}
    for endpoint in endpoints:
        number = target_port(port, endpoint)
        if number is not None:
            weight = 0 if endpoint.draining else endpoint.weight
            found.setdefault(_text(endpoint.address, number), Destination(endpoint.address, number, weight))
    return tuple(found[text] for text in sorted(found))


@lru_cache(maxsize=1 << 16)
def _text(address: Address, port: int) -> str:
    return f"{address}:{port}"  # what endpoints are ordered by, as kube-proxy does; a pod is one of many services


def _ranges(service: Service, address: Address, around: Surroundings) -> tuple[Network, ...]:
    """The node itself comes with the virtual address as its source, and is let in if its own address would be."""
    ranges = service.source_ranges
    if any(own in prefix for own in around.addresses for prefix in ranges):
        return (*ranges, ip_network(address))
    return ranges


# --- the difference of two states ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Changes:
    """What becomes of virtual servers from one state to the next; ``kept`` are pairs that differ in something."""

    gone: tuple[VirtualServer, ...] = ()
    kept: tuple[tuple[VirtualServer, VirtualServer], ...] = ()
    added: tuple[VirtualServer, ...] = ()


def changes(old: DesiredState | None, new: DesiredState | None) -> Changes:
    """Compare the virtual servers of two states; None is a node without any.

    Only services that differ are looked at, so a state with one changed endpoint among 10,000 services should share the
    others with the state before: identity is found out without comparing.
    """
    if old is None or new is None:
        servers = tuple(virtual_servers(state).values() if (state := old or new) else ())
        return Changes(added=servers) if old is None else Changes(gone=servers)
    before, after = _changed(old, new)
    gone = [server for key, server in before.items() if key not in after]
    added = [server for key, server in after.items() if key not in before]
    kept = [(before[key], server) for key, server in after.items() if key in before and before[key] != server]
    return Changes(tuple(gone), tuple(kept), tuple(added))


def changed_services(old: DesiredState, new: DesiredState) -> tuple[list[Service], list[Service]]:
    """Return the services of the old state that go or change, and those of the new state that come or change."""
    if old.services is new.services:
        return [], []
    if len(old.services) == len(new.services):
        both = zip(old.services, new.services, strict=True)
        pairs = [(a, b) for a, b in compress(both, map(is_not, old.services, new.services)) if a != b]
        if all(a.id == b.id for a, b in pairs):
            return [a for a, _ in pairs], [b for _, b in pairs]
    before, after = ({service.id: service for service in state.services} for state in (old, new))
    return (
        [service for name, service in before.items() if (other := after.get(name)) is not service and other != service],
        [service for name, service in after.items() if (other := before.get(name)) is not service and other != service],
    )


def _changed(
    old: DesiredState, new: DesiredState
) -> tuple[dict[ServerKey, VirtualServer], dict[ServerKey, VirtualServer]]:
    """Return the virtual servers, old and new, of the services that may have others than before."""
    here, there = Surroundings.of(old), Surroundings.of(new)
    if replace(here, pods=there.pods) != there:
        return virtual_servers(old), virtual_servers(new)
    before, after = changed_services(old, new)
    if here != there:  # pods came or went: that matters where only they are used
        names = {service.id for service in before + after}
        before += [each for each in old.services if _is_local(each) and each.id not in names]
        after += [each for each in new.services if _is_local(each) and each.id not in names]
    return (
        {server.key: server for service in before for server in build(service, here)},
        {server.key: server for service in after for server in build(service, there)},
    )


def _is_local(service: Service) -> bool:
    return "Local" in (service.internal_policy, service.external_policy)
