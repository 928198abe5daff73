"""States with services of type LoadBalancer on three nodes of one LAN: node1, node2 and node3."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address

from dataplane.control.state import (
    DesiredState,
    Endpoint,
    Node,
    Peer,
    PodNetwork,
    Service,
    ServicePort,
    Uplink,
)

ADDRESS = IPv4Address("192.0.2.200")
NODE = IPv4Address("192.0.2.11")


def peer(number: int) -> Peer:
    address, block = IPv4Address(f"192.0.2.{10 + number}"), IPv4Network(f"10.244.{number}.0/24")
    return Peer(f"node{number}", address, (block,), 0x6600_0000_0000 + number)


HERE = Endpoint(IPv4Address("10.244.1.10"), node="node1")
THERE = Endpoint(IPv4Address("10.244.2.10"), node="node2")
UNNAMED = Endpoint(IPv4Address("10.244.3.10"))  # of a peer's block: node3


def service(*endpoints: Endpoint, ip: IPv4Address | IPv6Address = ADDRESS, **fields) -> Service:
    ports = (ServicePort(80),)
    return Service("web", type="LoadBalancer", ports=ports, endpoints=endpoints, load_balancer_ips=(ip,), **fields)


def state(*services: Service, peers: tuple[int, ...] = (2, 3), shared: bool = True, me: int = 1) -> DesiredState:
    return DesiredState(
        node=Node(f"node{me}", addresses=(IPv4Address(f"192.0.2.{10 + me}"),)),
        pod_network=PodNetwork(cidrs=(IPv4Network(f"10.244.{me}.0/24"),)),
        uplink=Uplink("eth0", shared=shared),
        peers=tuple(peer(number) for number in peers),
        services=services,
    )
