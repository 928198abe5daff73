"""What must fit together in ``[services]``: Kubernetes' own validation, and no two services at one address and port.

A service is checked alone, against its *surroundings* (the addresses and ranges that the node knows of), and against
the *claims* of the others. A file and the control API use the same checks: for the API, surroundings and claims come
from the running node's state.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from dataplane.config_checks import Problem, each, overlaps, path_text, repeats
from dataplane.config_lines import KeyPath
from dataplane.config_model import File
from dataplane.config_services import ServicePort, ServicesFile, StaticService, service_of
from dataplane.control.services import ServerKey, claims
from dataplane.control.state import Address, DesiredState, Endpoint, Network, Service

ANY = IPv4Address("0.0.0.0")  # stands for all of the node's addresses
_EVERYBODY = IPv4Address("255.255.255.255")
_MAX_AFFINITY = 86400
_SECTION = "services.static"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a service must fit in.

    Attributes:
        blocks: Prefixes of pods, each with its name for people.
        taken: Addresses that no service can have, with what they are.
    """

    node_addresses: tuple[Address, ...]
    service_cidrs: tuple[Network, ...] = ()
    node_port_range: tuple[int, int] = (30000, 32767)
    scheduler: str = "rr"
    blocks: tuple[tuple[Network, str], ...] = ()
    taken: dict[Address, str] = field(default_factory=dict)

    @classmethod
    def of(cls, state: DesiredState) -> "Surroundings":
        """Take what matters from the state of a running node."""
        return cls(
            node_addresses=state.node.addresses,
            service_cidrs=state.balancing.service_cidrs,
            node_port_range=state.balancing.node_port_range,
            scheduler=state.balancing.scheduler,
            blocks=(
                *((cidr, "pods.cidr") for cidr in state.pod_network.cidrs),
                *((cidr, f"the block of {peer.name}") for peer in state.peers for cidr in peer.pod_cidrs),
            ),
            taken={peer.address: peer.name for peer in state.peers} | {state.pod_network.gateway: "pods.gateway"},
        )


def check_services(file: File) -> Iterator[Problem]:
    """Yield the problems of a file's services."""
    assert isinstance(file, ServicesFile)
    yield from _ranges(file)
    around = _surroundings(file)
    sections = [(given, ("services", "static", number)) for number, given in enumerate(file.services.static)]
    yield from repeats(((*at, "name"), f"{given.namespace}/{given.name}") for given, at in sections)
    held: dict[ServerKey, str] = {}
    for given, at in sections:
        service = service_of(given)
        yield from check_service(given, at, around)
        for path, endpoint in each((*at, "endpoints"), service.endpoints):
            yield from check_endpoint(endpoint, path, service)
        yield from claim(service, at, around.node_addresses, held)


def _ranges(file: ServicesFile) -> Iterator[Problem]:
    section = file.services
    blocks = [*each(("pods", "cidr"), file.pods.cidr)]
    for number, peer in enumerate(file.peers):
        blocks += each(("peers", number, "podCIDR"), peer.pod_cidr)
    ranges = list(each(("services", "serviceCIDR"), section.service_cidr))
    yield from overlaps(blocks + ranges, len(blocks))
    for path, prefix in ranges:
        for address in file.node.addresses:
            if address in prefix:
                yield Problem(path, f"{prefix} has this node's own address {address} in it", ("node.addresses",))
    yield from _ipv6(ranges)
    yield from _ipv6(each(("services", "clusterCIDR"), section.cluster_cidr))
    yield from _ipv6(each(("services", "nodePortAddresses"), section.node_port_addresses))


def check_service(given: StaticService, at: KeyPath, around: Surroundings) -> Iterator[Problem]:
    """Yield the problems of one service without its endpoints; ``at`` is its path."""
    yield from _ipv6(_addresses(given, at))
    yield from _type(given, at)
    yield from _exposure(given, at)
    yield from _health_check(given, at, around)
    for number, port in enumerate(given.ports):
        yield from _port(given, port, (*at, "ports", number), around)
    yield from _balancing(given, at, around)
    yield from check_addresses(given, at, around)
    yield from repeats(_virtual_paths(given, at))
    yield from repeats(_endpoint_addresses(given, at))


def claim(service: Service, at: KeyPath, node: tuple[Address, ...], held: dict[ServerKey, str]) -> Iterator[Problem]:
    """Enter what a service will be found by into ``held``, and yield what another has already."""
    for key, kind, index in claims(service, (ANY, *node)):
        path = (*at, "ports", index, "nodePort" if kind == "node-port" else "port")
        name = f"{key.port}/{key.protocol}" if kind == "node-port" else str(key)
        yield from _claim(key, name, path, held)
    if service.health_check_node_port:
        port = service.health_check_node_port
        for address in (ANY, *node):
            yield from _claim(ServerKey("TCP", address, port), f"{port}/TCP", (*at, "healthCheckNodePort"), held)


def _claim(key: ServerKey, name: str, path: KeyPath, held: dict[ServerKey, str]) -> Iterator[Problem]:
    other = held.setdefault(key, path_text(path))
    if other != path_text(path):
        yield Problem(path, f"used twice: {name} is also {other}")


def held_by(services: Iterable[Service], node: tuple[Address, ...]) -> dict[ServerKey, str]:
    """Return what services are found by, with the name of each."""
    held: dict[ServerKey, str] = {}
    for service in services:
        name, port = service.id, service.health_check_node_port
        held.update((key, name) for key, _, _ in claims(service, (ANY, *node)))
        if port:
            held.update((ServerKey("TCP", address, port), name) for address in (ANY, *node))
    return held


# --- one service -----------------------------------------------------------------------------------------------------


def _type(given: StaticService, at: KeyPath) -> Iterator[Problem]:
    headless = None in given.cluster_ips
    if given.type == "ExternalName":
        if not given.external_name:
            yield Problem((*at, "externalName"), "missing; expected the DNS name that the service stands for")
        for key, value in (("clusterIPs", given.cluster_ips), ("externalIPs", given.external_ips)):
            if value:
                yield Problem((*at, key), 'a service of type "ExternalName" has none')
        return
    if given.external_name:
        yield Problem((*at, "externalName"), f'needs type = "ExternalName" (got "{given.type}")')
    if headless and (len(given.cluster_ips) > 1 or given.external_ips or given.load_balancer_ips):
        yield Problem((*at, "clusterIPs"), 'expected "None" alone: a headless service has no address')
    elif headless and given.type != "ClusterIP":
        yield Problem((*at, "clusterIPs"), f'expected an address: a "{given.type}" is not headless (got "None")')
    if headless:
        return
    if not given.ports:
        yield Problem((*at, "ports"), "missing; expected at least one port", (f"{_SECTION}.ports",))
    addresses = [*given.cluster_ips, *given.external_ips, *given.load_balancer_ips]
    waits = given.type == "LoadBalancer" and not given.load_balancer_class  # for one out of a pool
    if not addresses and not waits and not any(port.node_port for port in given.ports):
        text = 'missing; expected an address, or ["None"] for a headless service'
        yield Problem((*at, "clusterIPs"), text, (f"{_SECTION}.clusterIPs", f"{_SECTION}.ports"))


def _exposure(given: StaticService, at: KeyPath) -> Iterator[Problem]:
    """What belongs to some types only (``pkg/apis/core/validation``)."""
    if given.type != "LoadBalancer":
        values = {
            "loadBalancerClass": given.load_balancer_class,
            "loadBalancerIPs": given.load_balancer_ips,
            "loadBalancerIP": given.load_balancer_ip,
            "loadBalancerSourceRanges": given.load_balancer_source_ranges,
            "healthCheckNodePort": given.health_check_node_port,
        }
        for key in (key for key, value in values.items() if value):
            yield Problem((*at, key), f'needs type = "LoadBalancer" (got "{given.type}")')
    outside = given.type in ("NodePort", "LoadBalancer") or given.external_ips
    if given.external_traffic_policy == "Local" and not outside:
        text = f'"Local" is for type "NodePort" or "LoadBalancer", or external addresses (got type "{given.type}")'
        yield Problem((*at, "externalTrafficPolicy"), text)


def _health_check(given: StaticService, at: KeyPath, around: Surroundings) -> Iterator[Problem]:
    port, path, (low, high) = given.health_check_node_port, (*at, "healthCheckNodePort"), around.node_port_range
    if not port or given.type != "LoadBalancer":
        return
    if given.external_traffic_policy != "Local":
        yield Problem(path, 'needs externalTrafficPolicy = "Local"')
    elif not low <= port <= high:
        text = f"expected a port of services.nodePortRange, {low} to {high} (got {port})"
        yield Problem(path, text, ("services.nodePortRange",))


def _port(given: StaticService, port: ServicePort, at: KeyPath, around: Surroundings) -> Iterator[Problem]:
    if port.protocol == "SCTP":
        yield Problem((*at, "protocol"), 'SCTP is not supported yet; expected "TCP" or "UDP"')
    if len(given.ports) > 1 and not port.name:
        yield Problem((*at, "name"), "missing; with several ports each needs a name")
    if sum(port.name == other.name for other in given.ports) > 1 and port.name and port is not _first(given, port):
        yield Problem((*at, "name"), f"used twice: {port.name}")
    low, high = around.node_port_range
    if port.node_port is None:
        if given.type == "NodePort":
            yield Problem((*at, "nodePort"), f"missing; expected a port from {low} to {high}: there is no allocator")
        return
    if given.type not in ("NodePort", "LoadBalancer"):
        yield Problem((*at, "nodePort"), f'needs type "NodePort" or "LoadBalancer" (got "{given.type}")')
    elif not low <= port.node_port <= high:
        text = f"expected a port of services.nodePortRange, {low} to {high} (got {port.node_port})"
        yield Problem((*at, "nodePort"), text, ("services.nodePortRange",))


def _first(given: StaticService, port: ServicePort) -> ServicePort:
    return next(other for other in given.ports if other.name == port.name)


def _balancing(given: StaticService, at: KeyPath, around: Surroundings) -> Iterator[Problem]:
    scheduler = given.scheduler or around.scheduler
    for path, flag in each((*at, "schedulerFlags"), given.scheduler_flags):
        if flag == "ops":
            yield Problem(path, '"ops" is not supported: every datagram belongs to a flow, and a flow has one backend')
        elif not flag.startswith(f"{scheduler}-"):
            text = f'"{flag}" belongs to scheduler "{flag[:2]}" (got "{scheduler}")'
            yield Problem(path, text, ("services.ipvs.scheduler",))
    if "session_affinity_timeout" not in given.model_fields_set:
        return
    if not 1 <= given.session_affinity_timeout <= _MAX_AFFINITY:
        seconds = f"{given.session_affinity_timeout:g}s"
        yield Problem((*at, "sessionAffinityTimeout"), f'expected "1s" to "24h" (got "{seconds}")')
    if given.session_affinity == "None":
        yield Problem(
            (*at, "sessionAffinityTimeout"), 'needs sessionAffinity = "ClientIP"', (f"{_SECTION}.sessionAffinity",)
        )


def check_addresses(given: StaticService | Service, at: KeyPath, around: Surroundings) -> Iterator[Problem]:
    """Yield the addresses of a service that are somebody else's."""
    for path, address in _virtual_paths(given, at):
        key = path[len(at)]
        if not _is_unicast(address):
            yield Problem(path, f"expected a unicast address (got {address})")
            continue
        for block, name in around.blocks:
            if address in block:
                yield Problem(
                    path, f"expected an address outside {name} {block} (got {address})", ("pods.cidr", "peers")
                )
        # External addresses may be those of nodes: kube-proxy answers on them beside what the node has there.
        if address in around.node_addresses and key == "clusterIPs":
            yield Problem(path, f"is this node's own address (got {address})", ("node.addresses",))
        if address in around.taken and key != "externalIPs":
            yield Problem(path, f"is the address of {around.taken[address]} (got {address})", ("peers", "pods.gateway"))
        if key == "clusterIPs" and around.service_cidrs and not any(address in cidr for cidr in around.service_cidrs):
            cidrs = ", ".join(str(cidr) for cidr in around.service_cidrs)
            text = f"expected an address inside services.serviceCIDR {cidrs} (got {address})"
            yield Problem(path, text, ("services.serviceCIDR",))


def check_endpoint(endpoint: Endpoint, at: KeyPath, service: Service) -> Iterator[Problem]:
    """Yield the problems of one endpoint of a service."""
    address = endpoint.address
    yield from _ipv6([((*at, "ip"), address)])
    if address.version == 4 and not _is_unicast(address):
        yield Problem((*at, "ip"), f"expected the address of a pod or a node (got {address})")
    names = dict(endpoint.ports)
    for port in service.ports:
        if isinstance(port.target_port, str) and port.target_port not in names:
            text = f'the target port "{port.target_port}" is missing; expected ports = {{ {port.target_port} = 8080 }}'
            yield Problem((*at, "ports"), text, (f"{_SECTION}.ports", f"{_SECTION}.endpoints.ports"))


def _is_unicast(address: Address) -> bool:
    special = address.is_multicast or address.is_loopback or address.is_unspecified or address.is_link_local
    return not special and address != _EVERYBODY


# --- paths -----------------------------------------------------------------------------------------------------------


def _surroundings(file: ServicesFile) -> Surroundings:
    section = file.services
    taken: dict[Address, str] = {peer.address: f"peers[{number}]" for number, peer in enumerate(file.peers)}
    if file.pods.gateway is not None:
        taken[file.pods.gateway] = "pods.gateway"
    return Surroundings(
        node_addresses=tuple(file.node.addresses),
        service_cidrs=tuple(section.service_cidr),
        node_port_range=section.node_port_range,
        scheduler=section.ipvs.scheduler,
        blocks=(
            *((cidr, "pods.cidr") for cidr in file.pods.cidr),
            *((cidr, f"peers[{number}].podCIDR") for number, peer in enumerate(file.peers) for cidr in peer.pod_cidr),
        ),
        taken=taken,
    )


def _virtual_paths(given: StaticService | Service, at: KeyPath) -> Iterator[tuple[KeyPath, Address]]:
    lists: tuple[tuple[str, Sequence[Address | None]], ...] = (
        ("clusterIPs", given.cluster_ips),
        ("externalIPs", given.external_ips),
        ("loadBalancerIPs", given.load_balancer_ips),
    )
    for key, addresses in lists:
        yield from ((path, address) for path, address in each((*at, key), addresses) if address is not None)


def _endpoint_addresses(given: StaticService, at: KeyPath) -> Iterator[tuple[KeyPath, Address]]:
    return (((*path, "ip"), endpoint.ip) for path, endpoint in each((*at, "endpoints"), given.endpoints))


def _addresses(given: StaticService, at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    yield from _virtual_paths(given, at)
    yield from each((*at, "loadBalancerSourceRanges"), given.load_balancer_source_ranges)


def _ipv6(pairs: Iterable[tuple[KeyPath, Any]]) -> Iterator[Problem]:
    for path, value in pairs:
        if value.version == 6:
            yield Problem(path, f"IPv6 is not supported yet (got {value})")
