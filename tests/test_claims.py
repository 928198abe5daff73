"""claims: what of a node's traffic is ours, by example, and that prefixes are cut as ``ipaddress`` says."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.control import claims
from dataplane.control.claims import SHARED_PORTS, Claims
from dataplane.control.state import Balancing, DesiredState, Node, Peer, PodNetwork, Service, ServicePort, Uplink, Vxlan

NODE, SECOND = IPv4Address("192.0.2.11"), IPv4Address("198.51.100.11")
BLOCK, REMOTE = IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24")
WEB = Service(
    "web",
    type="LoadBalancer",
    cluster_ips=(IPv4Address("10.96.0.20"), IPv6Address("fd00:96::20")),
    external_ips=(IPv4Address("203.0.113.20"),),
    load_balancer_ips=(IPv4Address("192.0.2.200"),),
    ports=(ServicePort(80, node_port=30080), ServicePort(53, "UDP", "dns", node_port=30053)),
)
STATE = DesiredState(
    node=Node("node1", addresses=(NODE, SECOND)),
    pod_network=PodNetwork(cidrs=(BLOCK, IPv6Network("fd00:10:244:1::/64"))),
    uplink=Uplink("eth0"),
    peers=(Peer("node2", IPv4Address("192.0.2.12"), (REMOTE,), 0x66),),
    services=(WEB,),
)
HOSTS = {IPv4Network(f"{address}/32") for address in ("10.96.0.20", "203.0.113.20", "192.0.2.200")}


def made(**fields) -> Claims:
    return claims.of(replace(STATE, **fields))


def test_what_comes_from_the_lan_is_for_our_pods_and_services():
    assert set(made().arrivals) == {BLOCK, *HOSTS}


def test_the_hosts_processes_reach_all_pods_and_services():
    assert set(made().departures) == {BLOCK, REMOTE, *HOSTS}
    wide = made(balancing=Balancing(cluster_cidrs=(IPv4Network("10.244.0.0/16"),)))
    assert set(wide.departures) == {IPv4Network("10.244.0.0/16"), *HOSTS}
    assert set(wide.arrivals) == {BLOCK, *HOSTS}


def test_a_service_range_stands_for_the_addresses_in_it():
    ranged = made(balancing=Balancing(service_cidrs=(IPv4Network("10.96.0.0/12"),)))
    assert set(ranged.arrivals) == {BLOCK, IPv4Network("10.96.0.0/12"), *HOSTS} - {IPv4Network("10.96.0.20/32")}


def test_node_ports_are_the_services_at_each_address_of_the_node():
    assert made().servers == {
        (protocol, address, port) for protocol, port in (("TCP", 30080), ("UDP", 30053)) for address in (NODE, SECOND)
    }
    one = made(balancing=Balancing(node_port_addresses=(IPv4Network("192.0.2.0/24"),)))
    assert one.servers == {("TCP", NODE, 30080), ("UDP", NODE, 30053)}


def test_an_external_address_that_is_the_nodes_own_is_the_services_only_at_its_ports():
    both = made(services=(replace(WEB, external_ips=(NODE,), load_balancer_ips=()),))
    assert {("TCP", NODE, 80), ("UDP", NODE, 53)} < both.servers
    assert both.arrivals == tuple(sorted({BLOCK, IPv4Network("10.96.0.20/32")}))
    assert both.ranges == ((53, 53), (80, 80), (30000, 32767), SHARED_PORTS)


def test_a_service_without_ports_claims_nothing():
    assert set(made(services=(replace(WEB, ports=()),)).arrivals) == {BLOCK}


def test_on_a_shared_uplink_masqueraded_ports_are_kept_away_from_the_hosts_own():
    assert (made().shared, made().masquerade) == (True, SHARED_PORTS)
    given_ports = made(pod_network=replace(STATE.pod_network, nat_ports=(40000, 50000)))
    assert (given_ports.masquerade, given_ports.ranges) == ((40000, 50000), ((30000, 32767), (40000, 50000)))


def test_on_an_uplink_of_our_own_every_port_is_ours():
    own = made(uplink=Uplink("eth0", shared=False))
    assert (own.shared, own.masquerade, own.ranges) == (False, None, ((30000, 32767),))


def test_the_tunnels_port_stays_the_hosts():
    assert made().tunnel_port == 4789
    assert made(vxlan=Vxlan("Never")).tunnel_port == made(uplink=None).tunnel_port == 0


def test_a_node_that_stands_alone_has_routes_for_its_host_and_nothing_else():
    alone = claims.of(DesiredState(node=Node("node1"), pod_network=STATE.pod_network))
    assert alone == Claims(arrivals=(BLOCK,), departures=(BLOCK,), ranges=((30000, 32767),))


PREFIXES = st.builds(
    lambda address, length: IPv4Network((address >> (32 - length) << (32 - length), length)),
    st.integers(0xC000_0000, 0xC000_03FF),
    st.integers(20, 32),
)
OWN = st.lists(st.integers(0xC000_0000, 0xC000_03FF).map(IPv4Address), max_size=4, unique=True)


@given(st.lists(PREFIXES, max_size=5), OWN, st.data())
def test_an_address_is_claimed_if_a_prefix_has_it_and_it_is_not_the_nodes(prefixes, own, data):
    state = DesiredState(node=Node("node1", addresses=tuple(own)), balancing=Balancing(service_cidrs=tuple(prefixes)))
    found = claims.of(state).arrivals
    edges = [edge for prefix in prefixes for edge in (prefix.network_address, prefix.broadcast_address)]
    address = data.draw(st.sampled_from([*own, *edges])) if own or edges else NODE
    expected = any(address in prefix for prefix in prefixes) and address not in own
    assert sum(address in prefix for prefix in found) == expected


@pytest.mark.parametrize(
    ("given_ports", "joined"),
    [
        ((29000, 29999), ((29000, 32767),)),
        ((32768, 40000), ((30000, 40000),)),
        ((30005, 30006), ((30000, 32767),)),
        ((40000, 40000), ((30000, 32767), (40000, 40000))),
    ],
)
def test_ranges_that_touch_are_one(given_ports, joined):
    assert made(pod_network=replace(STATE.pod_network, nat_ports=given_ports)).ranges == joined
