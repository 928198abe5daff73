"""Whose source address is replaced, and by which; and what the host itself sends."""

import numpy as np
import pytest

from dataplane import batch as b
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason, Verdict
from tests import world as w
from tests.frames import fragments, lan_frame, ping, pod_frame, tcp, udp
from tests.lines import Scenario, packet_of
from tests.world import World


@pytest.fixture
def world():
    world = World()
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    return world


@pytest.fixture
def scenario(world):
    return Scenario(world)


def test_nat_outgoing_is_for_what_leaves_the_pools(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.run("""
        a: udp a:4000 > out:53       -> lan: node:*1 > out:53
        lan: udp out:53 > node:*1    -> a: out:53 > a:4000
        a: udp a:4000 > remote:53    -> tunnel: a:4000 > remote:53
        a: udp a:4000 > b:53         -> b: a:4000 > b:53
        a: icmp a:7 > out            -> lan: node:*2 > out
        lan: icmp reply out > node:*2  -> a: out > a:7
    """)


def test_with_keep_if_free_a_source_keeps_its_port_and_its_mapping(world, scenario):
    world.tables.settings[b.NAT_OUTGOING], world.tables.settings[b.NAT_RANDOM] = 1, 0
    scenario.run(
        """
        a: udp a:4000 > out:53       -> lan: node:4000 > out:53
        b: udp b:4000 > out:53       -> lan: node:*1 > out:53
        b: udp b:4000 > lan:53       -> neigh.resolve
    """.replace("neigh.resolve", "lan: node:*1 > lan:53")
    )
    assert scenario.chosen["*1"] != "4000"


def test_a_reply_without_a_flow_is_the_hosts(world):
    assert world.one(lan_frame(packet_of("udp", None, "out:53", "node:40000")), w.UPLINK).reason == Reason.HOST_OWNED


def test_no_port_is_free(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    world.tables.settings[b.MASQUERADE_LOW] = world.tables.settings[b.MASQUERADE_HIGH] = 50000
    scenario.run("""
        a: udp a:1 > out:53 -> lan: node:50000 > out:53
        a: udp a:2 > out:53 -> nat.no-port
        a: udp a:2 > out:54 -> lan: node:50000 > out:54
    """)


def test_a_client_that_reaches_a_pod_directly_and_by_service_from_one_port_gets_two_flows(world, scenario):
    world.service(w.VIP, 80, (w.IP_B, 8080), protocol="udp")
    scenario.run("""
        a: udp a:4000 > b:8080     -> b: a:4000 > b:8080
        a: udp a:4000 > vip:80     -> b: a:* > b:8080
        b: udp b:8080 > a:4000     -> a: b:8080 > a:4000
        b: udp b:8080 > a:*        -> a: vip:80 > a:4000
    """)
    assert scenario.chosen["*"] != "4000"


def test_a_masqueraded_flow_dies_with_its_address(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.line("a: udp a:4000 > out:53 -> lan: node:*1 > out:53")
    world.route("198.51.100.0/24", Route(Kind.TUNNEL, vtep=world.peer))
    scenario.line("a: udp a:4000 > out:53 -> tunnel: node:*1 > out:53")
    world.tables.settings[b.ROUTE_GENERATION] += np.uint64(1)
    scenario.line("a: udp a:4000 > out:53 -> tunnel: tunnel:*2 > out:53")


def test_an_answer_to_a_masqueraded_flow_does_not_end_it(world, scenario):
    """It would be taken for a new flow, from outside to the host, and hold the tuple that the real one needs."""
    world.host()
    world.tables.settings[b.NAT_OUTGOING] = world.tables.settings[b.UPLINK_OWN] = 1
    scenario.line("a: udp a:4000 > out:53 -> lan: node:*1 > out:53")
    world.route("198.51.100.0/24", Route(Kind.TUNNEL, vtep=world.peer))
    world.tables.settings[b.ROUTE_GENERATION] += np.uint64(1)
    scenario.run("""
        tunnel: udp out:53 > node:*1 -> a: out:53 > a:4000
        a: udp a:4000 > out:53       -> tunnel: tunnel:*2 > out:53
    """)
    assert world.flows == 1


def test_without_an_address_nothing_is_masqueraded(world):
    for setting in (b.NODE_LO, b.GATEWAY_LO, b.TUNNEL_LO):
        world.tables.settings[setting] = 0
    world.service(w.VIP, 80, (w.IP_A, 8080))
    outcome = world.one(pod_frame(packet_of("tcp", "S", "a:7", "vip:80")), w.POD_A)
    assert outcome.reason == Reason.NAT_MASQ_NO_ADDR


# --- the host ---------------------------------------------------------------------------------------------------------


def test_the_host_reaches_services_and_pods_by_its_device(world, scenario):
    world.host()
    world.service(w.VIP, 80, (w.IP_B, 8080))
    scenario.run("""
        host: tcp S  node:4000 > vip:80    -> b: node:* > b:8080
        b:    tcp SA b:8080 > node:*       -> host: vip:80 > node:4000
        host: tcp S  node:5000 > a:22      -> a: node:5000 > a:22
        a:    tcp SA a:22 > node:5000      -> host: a:22 > node:5000
        a:    tcp S  a:6000 > node:10250   -> host: a:6000 > node:10250
        host: tcp SA node:10250 > a:6000   -> a: node:10250 > a:6000
    """)


def test_what_the_host_sends_into_the_tunnel_comes_from_the_tunnels_address(world, scenario):
    world.host()
    scenario.run("""
        host:   udp node:4000 > remote:53       -> tunnel: tunnel:* > remote:53
        tunnel: udp remote:53 > tunnel:*        -> host: remote:53 > node:4000
    """)


def test_an_uplink_of_our_own_hands_everything_for_the_node_to_the_host(world, scenario):
    world.host()
    scenario.line("lan: tcp S out:4000 > node:22 -> host.owned")
    world.tables.settings[b.UPLINK_OWN] = 1
    scenario.line("lan: tcp S out:4000 > node:22 -> host: out:4000 > node:22")


@pytest.mark.parametrize("iif", [w.UPLINK, w.UNDERLAY])
@pytest.mark.parametrize("ip", [udp(w.NODE, src=w.OUTSIDE), tcp(w.NODE, src=w.PEER), ping(w.NODE, src=w.OUTSIDE)])
def test_what_is_for_the_host_is_left_to_its_own_stack(world, ip, iif):
    outcome = world.one(lan_frame(ip), iif)
    assert (outcome.verdict, outcome.reason, outcome.oif) == (Verdict.STOLEN, Reason.HOST_OWNED, 0)


def test_fragments_of_tunnel_datagrams_are_the_hosts_to_reassemble(world):
    outcomes = [
        world.one(lan_frame(piece), w.UNDERLAY)
        for piece in fragments(udp(w.NODE, src=w.PEER, dport=4789, size=3000), 1400)
    ]
    assert outcomes[-1].reason == Reason.HOST_OWNED
