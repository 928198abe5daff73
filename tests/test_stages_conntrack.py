"""What becomes of packets that begin, continue and end flows, and of errors about them."""

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.stages import conntrack
from dataplane.tables.flow import Count, Timeout
from dataplane.tables.policy import LOCAL, Exposure
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason
from tests import world as w
from tests.frames import lan_frame, pod_frame, recomputed
from tests.lines import DEVICES, NAMES, Scenario, entering, leaving, packet_of
from tests.world import World


@pytest.fixture
def world():
    world = World()
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    return world


@pytest.fixture
def scenario(world):
    return Scenario(world)


# --- without translation ----------------------------------------------------------------------------------------------


def test_a_flow_between_pods_is_tracked_and_not_translated(world, scenario):
    scenario.run("""
        a: tcp S  a:4000 > b:80   -> b: a:4000 > b:80
        b: tcp SA b:80 > a:4000   -> a: b:80 > a:4000
        a: tcp A  a:4000 > b:80   -> b: a:4000 > b:80
    """)
    assert world.flows == 1


def test_two_packets_of_a_new_flow_in_one_burst_are_one_flow(world):
    world.service(w.VIP, 53, (w.IP_A, 5353), (w.IP_B, 5353), protocol="udp")
    frames = [entering("lan", packet_of("udp", None, "out:4000", "vip:53"))[0] for _ in range(5)]
    outcomes = world.run(frames, w.UPLINK)
    assert len({leaving(outcome) for outcome in outcomes}) == 1
    assert world.flows == 1
    assert int(world.tables.flows.tuples["packets"][0]) == 5


def test_two_hosts_that_ping_each_other_with_one_id_have_two_flows(world, scenario):
    scenario.run("""
        a: icmp a:7 > b -> b: a:7 > b
        b: icmp b:7 > a -> a: b:7 > a
        b: icmp reply b > a:7 -> a: b > a:7
    """)
    assert world.flows == 2


INVALID = """
    a: tcp FSPU a:1 > b:80    -> ct.invalid-flags
    a: tcp R    a:2 > b:80    -> ct.not-syn
    a: tcp FA   a:3 > b:80    -> ct.not-syn
    a: tcp SA   a:4 > b:80    -> ct.not-syn
    a: icmp reply a > b:9     -> ct.not-syn
    a: tcp A    a:5 > b:80    -> b: a:5 > b:80
"""


def test_what_cannot_begin_a_flow_is_dropped_with_its_reason(world, scenario):
    scenario.run(INVALID)
    assert world.flows == 1
    assert world.tables.flows.counters["invalid"] == 5


def test_a_torn_transport_header_is_invalid(world):
    torn = IP(src=w.IP_A, dst=w.IP_B, proto=17) / Raw(b"1234567")
    assert world.one(pod_frame(torn), w.POD_A).reason == Reason.CT_INVALID_FLAGS


def test_without_loose_pick_up_a_connection_begins_with_syn(world, scenario):
    world.tables.settings[b.TCP_LOOSE] = 0
    scenario.line("a: tcp A a:5 > b:80 -> ct.not-syn")


def test_an_unknown_route_leaves_no_flow(world):
    assert world.one(pod_frame(packet_of("udp", None, "a:1", "free:1")), w.POD_A).reason == Reason.ROUTE_BLACKHOLE
    assert world.flows == 0


# --- ICMP errors ------------------------------------------------------------------------------------------------------


def error(source, target, quoted, kind=3, code=1):
    return IP(src=NAMES.get(source, source), dst=NAMES[target]) / ICMP(type=kind, code=code) / IP(bytes(quoted))


def test_an_error_about_a_translated_flow_reaches_its_client_translated(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.line("a: udp a:4000 > out:53 -> lan: node:* > out:53")
    sent = packet_of("udp", None, f"node:{scenario.chosen['*']}", "out:53")
    outcome = world.one(lan_frame(error("192.0.2.77", "node", sent)), w.UPLINK)
    assert outcome.label == "accepted"
    arrived = Ether(outcome.frame)
    assert (arrived[IP].src, arrived[IP].dst) == ("192.0.2.77", w.IP_A)
    quoted = arrived[ICMP].payload
    assert (quoted.src, quoted.dst, quoted.sport) == (w.IP_A, w.OUTSIDE, 4000)
    assert bytes(arrived)[:38] == recomputed(bytes(arrived))[:38]


RELATED = [
    ("of no flow", error("out", "a", packet_of("udp", None, "a:9", "out:53")), Reason.ICMP_UNRELATED),
    ("torn", IP(src=w.OUTSIDE, dst=w.IP_A) / ICMP(type=3, code=1) / Raw(b"E" * 12), Reason.ICMP_BAD_INNER),
    ("for another", error("out", "b", packet_of("udp", None, "a:4000", "out:53")), Reason.ICMP_BAD_INNER),
    ("for the host", error("out", "node", packet_of("udp", None, "node:9", "out:53")), Reason.HOST_OWNED),
]


@pytest.mark.parametrize(("packet", "reason"), [row[1:] for row in RELATED], ids=[row[0] for row in RELATED])
def test_an_error_of_no_flow_goes_nowhere(world, scenario, packet, reason):
    scenario.line("a: udp a:4000 > out:53 -> lan: a:4000 > out:53")
    assert world.one(lan_frame(packet), w.UPLINK).reason == reason


def test_a_redirect_of_a_translated_flow_is_dropped(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.line("a: udp a:4000 > out:53 -> lan: node:* > out:53")
    sent = packet_of("udp", None, f"node:{scenario.chosen['*']}", "out:53")
    outcome = world.one(lan_frame(error("lan", "node", sent, kind=5)), w.UPLINK)
    assert outcome.reason == Reason.ICMP_UNRELATED


def test_an_error_of_our_own_quotes_the_clients_packet(world):
    """TTL 1 to a service: what route drops has been given a backend, and its bytes are still the client's."""
    world.service(w.VIP, 53, (w.IP_B, 5353), protocol="udp")
    packet = packet_of("udp", None, "a:4000", "vip:53")
    packet.ttl = 1
    assert world.one(pod_frame(packet), w.POD_A).reason == Reason.IP_TTL
    (answer,) = world.slow_path().handle(world.batch, 1, world.now)
    quoted = Ether(answer.frame)[ICMP].payload
    assert (quoted.src, quoted.dst, quoted.dport) == (w.IP_A, w.VIP, 53)
    back = world.one(answer.frame, 0, flags=b.INJECTED)
    assert leaving_oif(back) == "a"


def leaving_oif(outcome):
    assert outcome.label == "accepted"
    return DEVICES[outcome.oif]


# --- limits and time --------------------------------------------------------------------------------------------------


def test_a_full_table_gives_up_what_nobody_has_answered(world):
    for port in range(1, 1 + 2 * w.FLOWS):
        assert world.one(pod_frame(packet_of("udp", None, f"a:{port}", "b:53")), w.POD_A).label == "accepted"
    assert world.flows == w.FLOWS
    assert world.tables.flows.counters["early_drop"] == w.FLOWS


def test_a_full_table_keeps_what_is_assured(world):
    for port in range(1, 1 + w.FLOWS):
        world.one(pod_frame(packet_of("tcp", "S", f"a:{port}", "b:80")), w.POD_A)
        world.one(pod_frame(packet_of("tcp", "SA", "b:80", f"a:{port}"), source=w.MAC_B), w.POD_B)
        world.one(pod_frame(packet_of("tcp", "A", f"a:{port}", "b:80")), w.POD_A)
    outcome = world.one(pod_frame(packet_of("udp", None, "a:1", "b:53")), w.POD_A)
    assert outcome.reason == Reason.CT_TABLE_FULL
    assert world.tables.flows.state[Count.DROP] == 1


TIMES = """
    a: udp a:1 > b:53 -> b: a:1 > b:53
    wait 29
    b: udp b:53 > a:1 -> a: b:53 > a:1
    wait 29
    a: udp a:1 > b:53 -> b: a:1 > b:53
    wait 119
    b: udp b:53 > a:1 -> a: b:53 > a:1
    wait 119
"""


def test_an_answered_udp_flow_becomes_a_stream(world, scenario):
    scenario.run(TIMES)
    assert world.flows == 1
    scenario.line("wait 1")
    assert world.flows == 0


def test_an_unanswered_datagram_is_forgotten_after_30_seconds(world, scenario):
    scenario.line("a: udp a:1 > b:53 -> b: a:1 > b:53")
    scenario.line("wait 30")
    assert world.flows == 0


def test_a_packet_finds_no_flow_whose_time_is_over(world, scenario):
    row = world.service(w.VIP, 53, (w.IP_A, 5353), (w.IP_B, 5353), protocol="udp")
    scenario.line("lan: udp out:1 > vip:53 -> b: node:*1 > b:5353")
    world.now += int(world.tables.timeouts[Timeout.LB + 11])
    scenario.line("lan: udp out:1 > vip:53 -> a: node:*2 > a:5353")
    assert world.flows == 1
    held = [int(world.tables.services.backends[at]["inactive"]) for at, _, _ in world.tables.services.members(row)]
    assert held == [0, 1]


def test_packets_with_another_verdict_are_untouched(world):
    world.load([pod_frame(packet_of("udp", None, "a:1", "b:53"))], w.POD_A)
    world.batch.packets["verdict"][0] = 3
    before = world.batch.packets[0].copy()
    conntrack.conntrack(world.batch.arrays, 1, world.tables.arrays, world.now)
    after = world.batch.packets[0]
    assert all(before[name] == after[name] for name in before.dtype.names if name != "flow")
    assert world.flows == 0


def test_ipv6_is_tracked_as_well(world):
    a, b6 = "2001:db8:1::a", "2001:db8:1::b"
    world.route(f"{a}/128", Route(Kind.POD, w.POD_A))
    world.route(f"{b6}/128", Route(Kind.POD, w.POD_B))
    outcome = world.one(pod_frame(IPv6(src=a, dst=b6) / UDP(sport=1, dport=53) / Raw(b"x")), w.POD_A)
    assert (outcome.label, outcome.oif, world.flows) == ("accepted", w.POD_B, 1)


# --- flows that end while their packets are on the way ----------------------------------------------------------------


def test_a_reset_leaves_as_it_was_translated_although_the_next_segment_begins_anew(world):
    """Both in one burst: nat comes after conntrack, which has ended the first connection by then."""
    world.service(w.VIP, 80, (w.IP_B, 8080), (w.IP_A, 8080))
    scenario = Scenario(world)
    scenario.line("lan: tcp S out:4000 > vip:80 -> a: node:*1 > a:8080")
    frames = [entering("lan", packet_of("tcp", flags, "out:4000", "vip:80"))[0] for flags in ("R", "S")]
    reset, fresh = (leaving(outcome) for outcome in world.run(frames, w.UPLINK))
    assert reset == f"a: node:{scenario.chosen['*1']} > a:8080"
    assert fresh.startswith("b: node:")
    assert world.flows == 1


def test_what_is_given_up_for_a_later_packet_of_the_burst_leaves_translated():
    world = World(flows=1)
    world.service(w.VIP, 53, (w.IP_B, 5353), protocol="udp")
    frames = [entering("a", packet_of("udp", None, f"a:{port}", "vip:53"))[0] for port in (1, 2, 3)]
    left = [leaving(outcome) for outcome in world.run(frames, w.POD_A)]
    assert left == [f"b: a:{port} > b:5353" for port in (1, 2, 3)]


# --- packets that wait for a neighbor ---------------------------------------------------------------------------------


def held(world, *segments):
    """Segments of a backend to a client on the LAN whose link address is not known; what is kept of them."""
    frames = [entering("a", packet_of("tcp", flags, "a:8080", "out:4000"))[0] for flags in segments]
    outcomes = world.run(frames, w.POD_A)
    assert {outcome.reason for outcome in outcomes} == {Reason.NEIGH_RESOLVE}
    return [outcome.frame for outcome in outcomes]


@pytest.fixture
def served():
    """A world with a connection to a service, and that one's row; the way back to the client is not known."""
    world = World()
    row = world.service(w.LB_IP, 80, (w.IP_A, 8080), exposure=Exposure.LOAD_BALANCER, flags=LOCAL)
    Scenario(world).line("lan: tcp S out:4000 > lb:80 -> a: out:4000 > a:8080")
    return world, row


def released(world, *frames):
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    return [leaving(outcome) for outcome in world.run(frames, 0, flags=b.INJECTED | b.WAITED)]


def test_what_has_waited_is_translated_and_counted_once(served):
    world, row = served
    assert released(world, *held(world, "SA")) == ["lan: lb:80 > out:4000"]
    assert world.tables.flows.tuples["packets"][:2].tolist() == [1, 1]
    assert int(world.tables.services.services[row]["out_packets"]) == 1


def test_what_has_waited_for_longer_than_its_flow_lived_does_not_leave_untranslated(served):
    world, _ = served
    frames = held(world, "SA", "SA")
    world.now += 200 * w.SECOND
    assert released(world, *frames) == ["ct.not-syn", "ct.not-syn"]


def test_an_error_of_our_own_is_no_flows(world, scenario):
    """It quotes a packet as that came in: the flow that the inverted quote would name has nothing to undo in it."""
    scenario.line("lan: udp out:1 > a:1 -> a: out:1 > a:1")
    quoted = packet_of("udp", None, "a:1", "out:1")
    own = error("node", "a", quoted)
    (outcome,) = world.run([lan_frame(own)], 0, flags=b.INJECTED)
    assert (leaving_oif(outcome), int(outcome.record["flow"])) == ("a", -1)
