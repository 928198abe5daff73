"""guard: everything on a pod's link that is not the pod, and everything from outside that claims to live here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import GRE
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.stages.guard import guard
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason, Verdict
from tests import world as w
from tests.frames import BROADCAST, fragments, inner_frame, lan_frame, ping, pod_frame, tcp, tunneled, udp
from tests.world import World

V6_A, V6_B, V6_OUTSIDE = "2001:db8::a", "2001:db8::b", "2001:db8:ffff::1"


def make_world():
    world = World()
    world.route(f"{V6_A}/128", Route(Kind.POD, w.POD_A))
    world.route(f"{V6_B}/128", Route(Kind.POD, w.POD_B))
    return world


WORLD = make_world()  # the guard changes no table


def guarded(frame, iif):
    return WORLD.stage(guard, [frame], iif)[0]


def v6(dst, src=V6_A, **fields):
    return IPv6(src=src, dst=dst, **fields) / UDP(sport=4000, dport=53) / Raw(b"x")


INNER = inner_frame(udp(w.IP_B))
FROM_A_POD = [
    ("itself to another pod", pod_frame(udp(w.IP_B)), Reason.ACCEPTED),
    ("itself to the node", pod_frame(ping(w.NODE)), Reason.ACCEPTED),
    ("itself to the world", pod_frame(tcp(w.OUTSIDE)), Reason.ACCEPTED),
    ("itself by IPv6", pod_frame(v6(V6_B)), Reason.ACCEPTED),
    ("another MAC address", pod_frame(udp(w.IP_B), source=w.MAC_B), Reason.L2_SPOOFED_SRC),
    ("the gateway's MAC address", pod_frame(udp(w.IP_B), source=w.GATEWAY_MAC), Reason.L2_SPOOFED_SRC),
    ("another pod's address", pod_frame(udp(w.IP_A, src=w.IP_B)), Reason.IP_SPOOFED_SRC),
    ("another pod's MAC and IP address", pod_frame(udp(w.IP_A, src=w.IP_B), source=w.MAC_B), Reason.L2_SPOOFED_SRC),
    ("a free address of the block", pod_frame(udp(w.IP_B, src=w.IP_FREE)), Reason.IP_SPOOFED_SRC),
    ("a remote pod's address", pod_frame(udp(w.IP_B, src=w.IP_REMOTE)), Reason.IP_SPOOFED_SRC),
    ("the node's address", pod_frame(udp(w.IP_B, src=w.NODE)), Reason.IP_SPOOFED_SRC),
    ("an address of the world", pod_frame(udp(w.IP_B, src=w.OUTSIDE)), Reason.IP_SPOOFED_SRC),
    ("an address without a route", pod_frame(udp(w.IP_B, src="8.8.8.8")), Reason.IP_SPOOFED_SRC),
    ("another pod's IPv6 address", pod_frame(v6(V6_A, src=V6_B)), Reason.IP_SPOOFED_SRC),
    ("an IPv6 address of the world", pod_frame(v6(V6_B, src=V6_OUTSIDE)), Reason.IP_SPOOFED_SRC),
    ("IP in IP", pod_frame(IP(src=w.IP_A, dst=w.PEER) / udp(w.IP_B)), Reason.TUNNEL_FROM_POD),
    ("VXLAN to a node", pod_frame(IP(src=w.IP_A, dst=w.PEER) / UDP() / VXLAN() / INNER), Reason.TUNNEL_FROM_POD),
    ("VXLAN to its own node", pod_frame(udp(w.NODE, dport=4789)), Reason.TUNNEL_FROM_POD),
    ("VXLAN to another pod", pod_frame(udp(w.IP_B, dport=4789)), Reason.TUNNEL_FROM_POD),
    (
        "VXLAN in fragments",
        pod_frame(fragments(udp(w.PEER, dport=4789, size=64), 8)[0]),
        Reason.TUNNEL_FROM_POD,
    ),
    ("a reply from VXLAN's port", pod_frame(udp(w.OUTSIDE, sport=4789)), Reason.ACCEPTED),
    ("TCP to VXLAN's number", pod_frame(IP(src=w.IP_A, dst=w.IP_B, proto=6) / Raw(b"\x12\xb5" * 10)), Reason.ACCEPTED),
    ("GRE", pod_frame(IP(src=w.IP_A, dst=w.OUTSIDE) / GRE() / Raw(b"x")), Reason.ACCEPTED),
    ("a multicast", pod_frame(udp("239.1.2.3")), Reason.IP_MULTICAST),
    ("a broadcast", pod_frame(udp("255.255.255.255"), to=BROADCAST), Reason.IP_MULTICAST),
    ("an IPv6 multicast", pod_frame(v6("ff02::1")), Reason.IP_MULTICAST),
]


@pytest.mark.parametrize(("frame", "reason"), [row[1:] for row in FROM_A_POD], ids=[row[0] for row in FROM_A_POD])
def test_a_pod_sends(frame, reason):
    outcome = guarded(frame, w.POD_A)
    assert outcome.reason == reason
    assert outcome.verdict == reason.verdict
    assert outcome.frame == bytes(frame)


MARTIAN_SOURCES = ["0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.9.9.9", "240.0.0.1"]
MARTIAN_SOURCES += ["255.255.255.255"]
MARTIAN_TARGETS = ["0.0.0.0", "0.1.2.3", "127.0.0.1", "127.9.9.9", "240.0.0.1", "255.255.255.254"]
LAWFUL = ["1.0.0.1", "126.255.255.255", "128.0.0.1", "169.254.7.7", "223.255.255.255", "100.64.0.1"]


@pytest.mark.parametrize("iif", [w.POD_A, w.UPLINK, w.UNDERLAY])
@pytest.mark.parametrize("source", MARTIAN_SOURCES)
def test_an_address_that_no_station_has_is_no_source(source, iif):
    ip = udp(w.IP_B, src=source)
    frame = {w.POD_A: pod_frame(ip), w.UPLINK: lan_frame(ip), w.UNDERLAY: tunneled(ip)}[iif]
    assert World().one(frame, iif).reason == Reason.IP_MARTIAN


@pytest.mark.parametrize("target", MARTIAN_TARGETS)
def test_an_address_that_no_station_has_is_no_destination(target):
    assert guarded(pod_frame(udp(target)), w.POD_A).reason == Reason.IP_MARTIAN
    assert guarded(lan_frame(udp(target, src=w.OUTSIDE)), w.UPLINK).reason == Reason.IP_MARTIAN


@pytest.mark.parametrize("address", LAWFUL)
def test_the_neighbors_of_martian_ranges_pass(address):
    assert guarded(pod_frame(udp(address)), w.POD_A).reason == Reason.ACCEPTED
    assert guarded(lan_frame(udp(w.IP_A, src=address)), w.UPLINK).reason == Reason.ACCEPTED


MARTIANS6 = ["::", "::1", "::ffff:10.244.1.10", "::ffff:127.0.0.1", "::ffff:192.0.2.12"]


@pytest.mark.parametrize("address", MARTIANS6)
@pytest.mark.parametrize("iif", [w.POD_A, w.UPLINK])
def test_ipv6_addresses_that_never_are_on_a_wire(address, iif):
    """A mapped address would be found in IPv4's tables; Linux drops it since 5.3 for the same fear."""
    wrap = pod_frame if iif == w.POD_A else lan_frame
    assert guarded(wrap(v6(V6_B, src=address)), iif).reason == Reason.IP_MARTIAN
    assert guarded(wrap(v6(address)), iif).reason == Reason.IP_MARTIAN


def test_a_pod_cannot_reach_ipv4_pods_by_mapped_addresses():
    world = make_world()
    outcome = world.one(pod_frame(v6("::ffff:10.244.1.11", src="::ffff:10.244.1.10")), w.POD_A)
    assert outcome.reason == Reason.IP_MARTIAN


def test_a_multicast_source_is_a_martian_in_ipv6():
    assert guarded(pod_frame(v6(V6_B, src="ff02::1")), w.POD_A).reason == Reason.IP_MARTIAN


FROM_OUTSIDE = [
    ("the world to a pod", udp(w.IP_A, src=w.OUTSIDE), Reason.ACCEPTED),
    ("another node to a pod", udp(w.IP_A, src=w.PEER), Reason.ACCEPTED),
    ("a pod of this node", udp(w.IP_A, src=w.IP_B), Reason.IP_MARTIAN),
    ("a free address of this node's block", udp(w.IP_A, src=w.IP_FREE), Reason.IP_MARTIAN),
    ("this node", udp(w.IP_A, src=w.NODE), Reason.IP_MARTIAN),
    ("this node's pod by IPv6", v6(V6_A, src=V6_B), Reason.IP_MARTIAN),
    ("a multicast", udp("224.0.0.1", src=w.OUTSIDE), Reason.IP_MULTICAST),
    ("a broadcast", udp("255.255.255.255", src=w.OUTSIDE), Reason.IP_MULTICAST),
]


@pytest.mark.parametrize(("ip", "reason"), [row[1:] for row in FROM_OUTSIDE], ids=[row[0] for row in FROM_OUTSIDE])
@pytest.mark.parametrize("way", ["uplink", "tunnel"])
def test_from_outside_comes(ip, reason, way):
    world = make_world()
    outcome = world.one(lan_frame(ip), w.UPLINK) if way == "uplink" else world.one(tunneled(ip), w.UNDERLAY)
    assert outcome.reason == reason


def test_what_is_for_the_node_through_the_tunnel_is_ours():
    outcome = World().one(tunneled(ping(w.NODE, src=w.IP_REMOTE)), w.UNDERLAY)
    assert (outcome.verdict, outcome.reason) == (Verdict.QUEUE, Reason.LOCAL_DELIVERY)


def test_what_the_node_itself_makes_is_not_guarded():
    world = World()
    world.load([pod_frame(udp(w.IP_A, src="127.0.0.1"))], w.POD_A, flags=b.INJECTED)
    assert world.run([pod_frame(udp(w.IP_A, src=w.NODE))], 0, flags=b.INJECTED)[0].verdict == Verdict.ACCEPT


@given(st.ip_addresses(v=4))
def test_whatever_address_a_pod_invents_is_not_accepted(address):
    if str(address) == w.IP_A:
        return
    assert guarded(pod_frame(udp(w.IP_B, src=str(address))), w.POD_A).verdict == Verdict.DROP


GROUPS = [BROADCAST, "01:00:5e:00:00:01", "33:33:00:00:00:01"]


@pytest.mark.parametrize("to", GROUPS)
def test_a_packet_to_one_address_in_a_frame_to_many_is_not_forwarded(to):
    """Every station of the link has it; if each forwarded it, it would arrive many times (Linux: PACKET_HOST only)."""
    world = make_world()
    assert world.one(pod_frame(udp(w.IP_B), to=to), w.POD_A).reason == Reason.IP_MULTICAST
    assert world.one(lan_frame(udp(w.IP_B, src=w.OUTSIDE), to=to), w.UPLINK).reason == Reason.IP_MULTICAST


@pytest.mark.parametrize("target", ["8.8.8.8", "203.0.113.9", w.IP_B, w.OUTSIDE, w.IP_FREE])
@pytest.mark.parametrize("ttl", [1, 64])
def test_a_frame_to_many_never_owes_an_error(target, ttl):
    outcome = make_world().one(pod_frame(udp(target, ttl=ttl), to=BROADCAST), w.POD_A)
    assert outcome.verdict == Verdict.DROP
    assert not outcome.record["flags"] & b.OWES_ERROR
