"""States of a node with services, for tests of what is made of them: a service per letter, each with its addresses."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

from hypothesis import strategies as st

from dataplane.control.state import (
    Balancing,
    DesiredState,
    Endpoint,
    Node,
    Pod,
    PodNetwork,
    Service,
    ServicePort,
    TrafficPolicy,
    host_interface,
    pod_mac,
)

NODE_ADDRESS = IPv4Address("192.0.2.11")
NAMES = "abcd"
HERE = ("10.244.1.10", "10.244.1.11")  # addresses of pods that this node may have
THERE = ("10.244.2.10", "10.244.2.11", "10.244.3.10")


def pod(address: str) -> Pod:
    name = f"pod-{address.rsplit('.', maxsplit=1)[-1]}"
    interface = host_interface("cali", "default", name)
    return Pod(name, "default", name, (IPv4Address(address),), pod_mac("default", name), 1450, interface)


def endpoint(address: str, **fields: object) -> Endpoint:
    return replace(Endpoint(IPv4Address(address)), **fields)  # type: ignore[arg-type]


def web(*endpoints: Endpoint, **fields: object) -> Service:
    """The service of the documentation: 10.96.0.20:80 in front of port 8080."""
    given = {"cluster_ips": (IPv4Address("10.96.0.20"),), "ports": (ServicePort(80, target_port=8080),)} | fields
    return Service("web", endpoints=endpoints, **given)  # type: ignore[arg-type]


def state(*services: Service, **fields: object) -> DesiredState:
    given = {
        "node": Node("node1", addresses=(NODE_ADDRESS,)),
        "pod_network": PodNetwork(cidrs=(IPv4Network("10.244.1.0/24"),)),
        "pods": (pod(HERE[0]),),
    } | fields
    return DesiredState(services=services, **given)  # type: ignore[arg-type]


@st.composite
def endpoints(draw: st.DrawFn) -> tuple[Endpoint, ...]:
    addresses = draw(st.lists(st.sampled_from(HERE + THERE), unique=True))
    return tuple(
        endpoint(
            address,
            weight=draw(st.sampled_from([1, 1, 3, 0])),
            node=draw(st.sampled_from(["", "node1", "node2"])),
            ready=draw(st.booleans()),
            serving=draw(st.booleans()),
            terminating=draw(st.booleans()),
            draining=draw(st.sampled_from([False, False, False, True])),
            ports=draw(st.sampled_from([(), (("http", 8080),)])),
        )
        for address in addresses
    )


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
    number = NAMES.index(name)
    policies: st.SearchStrategy[TrafficPolicy] = st.sampled_from(["Cluster", "Local"])
    node_port = st.sampled_from([0, 30080 + number])
    ports = (
        ServicePort(80, "TCP", "http", draw(st.sampled_from([None, 8080, "http"])), draw(node_port)),
        ServicePort(53, draw(st.sampled_from(["TCP", "UDP"])), "dns"),
    )
    return Service(
        name,
        cluster_ips=draw(st.sampled_from([(), (IPv4Address(f"10.96.0.{20 + number}"),)])),
        external_ips=draw(st.sampled_from([(), (IPv4Address(f"198.51.100.{20 + number}"),)])),
        load_balancer_ips=draw(st.sampled_from([(), (IPv4Address(f"192.0.2.{200 + number}"),)])),
        ports=draw(st.sampled_from([ports, ports[:1], ports[1:]])),
        endpoints=draw(endpoints()),
        affinity_seconds=draw(st.sampled_from([0, 60])),
        external_policy=draw(policies),
        internal_policy=draw(policies),
        source_ranges=draw(st.sampled_from([(), (IPv4Network("192.0.2.0/24"),)])),
        scheduler=draw(st.sampled_from(["", "wrr", "mh", "sh"])),
        drain_seconds=draw(st.sampled_from([0, 5])),
        publish_not_ready=draw(st.booleans()),
    )


@st.composite
def states(draw: st.DrawFn) -> DesiredState:
    """Two of these share neither services nor endpoints as objects; equal ones may still be drawn."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    prefixes = st.sampled_from([(), (IPv4Network("192.0.2.0/24"),), (IPv4Network("203.0.113.0/24"),)])
    return state(
        *(draw(services(name)) for name in names),
        pods=tuple(pod(address) for address in draw(st.lists(st.sampled_from(HERE), unique=True))),
        balancing=Balancing(scheduler=draw(st.sampled_from(["rr", "mh"])), node_port_addresses=draw(prefixes)),
    )
