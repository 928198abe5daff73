"""slowpath: what the node itself says, byte by byte against scapy, and when it must say nothing."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane import pipeline
from dataplane.resolve import Outgoing
from dataplane.slowpath import BUDGET, QUOTE, ErrorLimit, echo_reply, icmp_error, may_answer
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason
from tests import world as w
from tests.frames import (
    BROADCAST,
    arp_request,
    fragments,
    lan_frame,
    patched,
    ping,
    pod_frame,
    recomputed,
    tcp,
    tunneled,
    udp,
)
from tests.world import SECOND, World


class Node(World):
    """A world whose punted rows are handled."""

    def __init__(self):
        super().__init__()
        self.slow = self.slow_path()

    def answers(self, frames, iif=w.POD_A, **how):
        """What the slow path makes of a burst."""
        frames = frames if isinstance(frames, list) else [frames]
        count = len(self.run(frames, iif, **how))
        return self.slow.handle(self.batch, count, self.now)


@pytest.fixture
def node():
    return Node()


def only(outgoing):
    """The IP packet of the one frame that is to be routed."""
    assert [packet.oif for packet in outgoing] == [0]
    assert recomputed(outgoing[0].frame) == outgoing[0].frame
    assert outgoing[0].frame[:14] == bytes(12) + b"\x08\x00"
    return IP(outgoing[0].frame[14:])


# --- errors ----------------------------------------------------------------------------------------------------------


def error(about, kind, code, source=w.NODE, **icmp):
    """The error as RFC 792 wants it, by scapy."""
    about = bytes(about)
    original = IP(about)
    ip = IP(src=source, dst=original.src, ttl=64, id=0, tos=0xC0 | original.tos & 0x1C)
    return bytes(ip / ICMP(type=kind, code=code, **icmp) / Raw(about[:QUOTE]))


BIG: dict[str, Any] = {"size": 1600, "flags": "DF"}
ERRORS = [
    ("no hops left", udp(w.IP_B, ttl=1), (11, 0), {}),
    ("no hops left in TCP", tcp(w.IP_B, ttl=1), (11, 0), {}),
    ("no hops left for a ping", ping(w.IP_B, ttl=1), (11, 0), {}),
    ("larger than the pod's link", udp(w.IP_B, **BIG), (3, 4), {"nexthopmtu": w.POD_MTU}),
    ("larger than the tunnel", ping(w.IP_REMOTE, **BIG), (3, 4), {"nexthopmtu": w.POD_MTU}),
    ("larger than the uplink", udp(w.OUTSIDE, **BIG), (3, 4), {"nexthopmtu": 1500}),
    ("no route", udp("8.8.8.8"), (3, 0), {}),
    ("unreachable", udp("203.0.113.9"), (3, 1), {}),
    ("with a class of service", udp("8.8.8.8", tos=0xB8 | 2), (3, 0), {}),
]


@pytest.mark.parametrize(("ip", "code", "fields"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_the_error_about_a_packet(node, ip, code, fields):
    answer = only(node.answers(pod_frame(ip)))
    assert bytes(answer) == error(ip, *code, **fields)


def test_nothing_listens_on_the_node(node):
    answer = only(node.answers(pod_frame(udp(w.NODE))))
    assert bytes(answer) == error(udp(w.NODE), 3, 3)
    assert node.count(Reason.LOCAL_NO_LISTENER) == 1
    assert node.balanced()


def test_a_closed_port_answers_from_the_address_that_was_asked(node):
    """As Linux: the destination of the packet, when it was ours."""
    node.route("169.254.1.1/32", Route(Kind.LOCAL))
    ip = udp("169.254.1.1", dport=33434)
    assert bytes(only(node.answers(pod_frame(ip)))) == error(ip, 3, 3, source="169.254.1.1")


def test_an_error_into_the_tunnel_comes_from_the_tunnels_address(node):
    ip = udp(w.IP_A, src=w.IP_REMOTE, ttl=1)
    answer = only(node.answers(tunneled(ip), w.UNDERLAY))
    assert bytes(answer) == error(ip, 11, 0, source=w.TUNNEL_ADDRESS)


def test_an_error_to_the_lan_comes_from_the_nodes_address(node):
    ip = udp(w.IP_A, src=w.OUTSIDE, ttl=1)
    assert only(node.answers(lan_frame(ip), w.UPLINK)).src == w.NODE


def test_a_node_without_addresses_speaks_as_the_pods_gateway(node):
    node.tables.settings[b.NODE_LO] = 0
    assert only(node.answers(pod_frame(udp("8.8.8.8")))).src == "169.254.1.1"


@pytest.mark.parametrize("size", [0, 1, 519, 520, 521, 1400])
def test_the_quote_is_as_much_as_fits_into_576_bytes(node, size):
    answer = only(node.answers(pod_frame(udp("8.8.8.8", size=size))))
    assert len(answer) == min(576, 20 + 8 + 28 + size)
    assert bytes(answer)[28:] == bytes(udp("8.8.8.8", size=size))[:QUOTE]


def test_options_of_the_packet_are_quoted(node):
    ip = IP(src=w.IP_A, dst="8.8.8.8", options=[IPOption_RR(routers=["0.0.0.0"] * 9)]) / UDP() / Raw(b"x")
    assert bytes(only(node.answers(pod_frame(ip))))[28:] == bytes(ip)


def test_padding_is_not_quoted(node):
    answer = only(node.answers(bytes(pod_frame(udp("8.8.8.8", size=0))) + b"\xa5" * 18))
    assert bytes(answer)[28:] == bytes(udp("8.8.8.8", size=0))


def test_a_datagram_that_came_in_fragments_is_quoted_whole(node):
    whole = udp("8.8.8.8", size=3000)
    answer = only(node.answers([pod_frame(piece) for piece in fragments(whole, 1400)]))
    assert bytes(answer)[28:] == bytes(whole)[:QUOTE]


def test_an_error_is_routed_and_delivered(node):
    outcome = node.one(node.answers(pod_frame(udp("8.8.8.8")))[0].frame, 0, flags=b.INJECTED)
    assert (outcome.reason, outcome.oif) == (Reason.ACCEPTED, w.POD_A)
    assert outcome.frame[:14] == bytes(Ether(src=w.GATEWAY_MAC, dst=w.MAC_A, type=0x0800))


# --- silence (RFC 1122 3.2.2, RFC 1812 4.3.2.7) -----------------------------------------------------------------------

KINDS_OF_ERRORS = [3, 4, 5, 11, 12]


@pytest.mark.parametrize("kind", range(256))
def test_never_an_error_about_an_error(kind):
    """Types that nobody has defined might be errors, too: Linux answers none above 18."""
    packet = bytes(IP(src=w.IP_A, dst="8.8.8.8") / ICMP(type=kind) / Raw(b"x" * 28))
    assert may_answer(packet) == (kind not in KINDS_OF_ERRORS and kind <= 18)


SILENCE = [
    ("a later fragment", IP(src=w.IP_A, dst=w.IP_B, frag=1, proto=17) / Raw(b"x" * 8)),
    ("a source of zero", udp(w.IP_B, src="0.0.0.0")),
    ("a source of this network", udp(w.IP_B, src="0.1.2.3")),
    ("a loopback source", udp(w.IP_B, src="127.0.0.1")),
    ("a multicast source", udp(w.IP_B, src="224.0.0.5")),
    ("a source of class E", udp(w.IP_B, src="250.0.0.1")),
    ("a broadcast source", udp(w.IP_B, src="255.255.255.255")),
    ("a multicast", udp("224.0.0.5")),
    ("a broadcast", udp("255.255.255.255")),
    ("ICMP without a type", IP(src=w.IP_A, dst=w.IP_B, proto=1)),
]


@pytest.mark.parametrize("ip", [row[1] for row in SILENCE], ids=[row[0] for row in SILENCE])
def test_no_error_about(ip):
    assert not may_answer(bytes(ip))


def test_no_error_about_ipv6():
    assert not may_answer(b"\x60" + bytes(60))


@pytest.mark.parametrize("ip", [udp(w.NODE), udp("8.8.8.8"), udp(w.IP_B, ttl=1)])
def test_no_error_about_a_frame_to_many(node, ip):
    assert node.answers(pod_frame(ip, to=BROADCAST)) == []


def test_no_error_about_an_icmp_error_that_finds_no_way(node):
    ip = IP(src=w.IP_A, dst="8.8.8.8") / ICMP(type=11) / Raw(bytes(udp(w.IP_A, src="8.8.8.8")))
    assert node.answers(pod_frame(ip)) == []
    assert node.balanced()


@pytest.mark.parametrize("target", [w.IP_FREE, w.IP_LOST, "127.0.0.1", "224.0.0.1"])
def test_no_error_from_where_silence_is_the_answer(node, target):
    assert node.answers(pod_frame(udp(target))) == []


@settings(max_examples=200)
@given(st.binary(min_size=20, max_size=120))
def test_any_ip_packet_can_be_judged(octets):
    packet = bytes([0x45 | octets[0] & 0x0A]) + octets[1:]
    if may_answer(packet):
        answer = icmp_error(packet, b"\xc0\x00\x02\x0b", 3, 1, 0)
        assert recomputed(answer) == answer
    reply = echo_reply(packet)
    assert reply is None or recomputed(reply) == reply


# --- limits ----------------------------------------------------------------------------------------------------------


def limited(node, ip, times):
    return sum(len(node.answers(pod_frame(ip))) for _ in range(times))


def test_a_destination_gets_six_errors_at_once_then_one_a_second(node):
    ip = udp("8.8.8.8")
    assert limited(node, ip, 10) == 6
    assert node.slow.answered["errors limited"] == 4
    node.now += SECOND - 1
    assert limited(node, ip, 3) == 0
    node.now += 1
    assert limited(node, ip, 3) == 1
    node.now += 3 * SECOND
    assert limited(node, ip, 10) == 3
    node.now += 3600 * SECOND
    assert limited(node, ip, 10) == 6


def test_destinations_do_not_share_their_limit(node):
    assert limited(node, udp("8.8.8.8"), 10) == 6
    answers = node.answers([pod_frame(udp("8.8.8.8", src=w.IP_B), source=w.MAC_B)] * 10, w.POD_B)
    assert len(answers) == 6


def test_path_mtu_discovery_is_never_limited(node):
    """Linux's icmpv4_mask_allow: 3/4 passes both limits, or connections hang."""
    assert limited(node, udp(w.IP_B, **BIG), 100) == 100
    assert node.tables.counters[b.ERRORS_LIMITED] == 0


def test_the_memory_of_destinations_is_bounded():
    limit = ErrorLimit()
    for k in range(5000):
        assert limit.allows(k.to_bytes(4), 0)
    assert len(limit.budgets) <= 4096


def owed(node, count):
    """How many of ``count`` errors the node's own limit lets through to the slow path."""
    count = node.load([pod_frame(udp(w.IP_B))] * count, w.POD_A)
    node.batch.packets["verdict"][:count] = 3
    node.batch.packets["reason"][:count] = Reason.ROUTE_NONE
    node.batch.packets["flags"][:count] |= b.OWES_ERROR
    return pipeline.tally(node.batch.arrays, count, node.tables.arrays, node.now)


UPTIMES = [("a minute", 60), ("an hour", 3600), ("110 days", 110 * 86400), ("three years", 3 * 365 * 86400)]


@pytest.mark.parametrize("uptime", [row[1] for row in UPTIMES], ids=[row[0] for row in UPTIMES])
def test_the_node_sends_fifty_errors_at_once_then_a_thousand_a_second(node, uptime):
    node.now = uptime * SECOND
    assert owed(node, 200) == 50
    assert owed(node, 200) == 0
    node.now += SECOND // 1000
    assert owed(node, 200) == 1
    node.now += SECOND // 100
    assert owed(node, 200) == 10
    node.now += 10 * SECOND
    assert owed(node, 200) == 50
    assert node.tables.counters[b.ERRORS_LIMITED] == 150 + 200 + 199 + 190 + 150


def test_no_part_of_a_millisecond_is_lost(node):
    owed(node, 200)
    total = 0
    for _ in range(100):
        node.now += 1_900_000
        total += owed(node, 5)
    assert total == 190


def test_errors_about_the_mtu_do_not_use_up_the_limit(node):
    node.run([pod_frame(udp(w.IP_B, **BIG))] * 100, w.POD_A)
    assert owed(node, 200) == 50


def test_a_burst_of_punted_rows_is_bounded(node):
    answers = node.answers([pod_frame(ping(w.NODE))] * b.ROWS)
    assert len(answers) == BUDGET
    assert node.count(Reason.OVERLOAD_SLOW_PATH) == b.ROWS - BUDGET
    assert node.balanced()


def test_errors_beyond_the_budget_of_a_burst_are_counted(node):
    answers = node.answers([pod_frame(udp(w.IP_B, **BIG))] * b.ROWS)
    assert len(answers) == BUDGET
    assert node.tables.counters[b.ERRORS_LIMITED] == b.ROWS - BUDGET
    assert node.balanced()


# --- echo ------------------------------------------------------------------------------------------------------------


def echoed(ip):
    """The reply as RFC 1122 3.2.2.6 wants it, by scapy."""
    request = IP(bytes(ip))
    message = request[ICMP]
    head = IP(src=request.dst, dst=request.src, tos=request.tos, id=request.id, ttl=64)
    return bytes(head / ICMP(type=0, id=message.id, seq=message.seq) / Raw(bytes(message.payload)))


PINGS = [
    ("small", ping(w.NODE, size=0)),
    ("odd", ping(w.NODE, size=57)),
    ("with a class of service", ping(w.NODE, tos=0xB8)),
    ("with its last hop", ping(w.NODE, ttl=1)),
    ("with options", IP(src=w.IP_A, dst=w.NODE, options=[IPOption_NOP()]) / ICMP(id=1, seq=2) / Raw(b"x")),
    ("with an id of its own", ping(w.NODE, id=0xBEEF)),
]


@pytest.mark.parametrize("ip", [row[1] for row in PINGS], ids=[row[0] for row in PINGS])
def test_the_node_answers_a_ping(node, ip):
    assert bytes(only(node.answers(pod_frame(ip)))) == echoed(ip)
    assert node.slow.answered["answered"] == 1


def test_a_ping_in_fragments_is_answered_in_fragments_of_its_own_number(node):
    """Replies without DF and with one number would be put together wrongly by who gets several at once."""
    ip = ping(w.NODE, size=4000, id=321)
    outgoing = node.answers([pod_frame(piece) for piece in fragments(ip, 1400)])
    assert bytes(only(outgoing)) == echoed(ip)


def test_a_ping_through_the_tunnel_is_answered(node):
    node.route(f"{w.TUNNEL_ADDRESS}/32", Route(Kind.LOCAL))
    ip = ping(w.TUNNEL_ADDRESS, src=w.IP_REMOTE)
    assert bytes(only(node.answers(tunneled(ip), w.UNDERLAY))) == echoed(ip)


def test_a_ping_with_a_wrong_checksum_is_not_answered(node):
    assert node.answers(patched(pod_frame(ping(w.NODE)), 36, b"\xde\xad")) == []
    assert node.count(Reason.LOCAL_NO_LISTENER) == 1


@pytest.mark.parametrize("kind", [3, 11, 13, 15, 17])
def test_other_icmp_to_the_node_is_dropped_in_silence(node, kind):
    ip = IP(src=w.IP_A, dst=w.NODE) / ICMP(type=kind) / Raw(b"x" * 28)
    assert node.answers(pod_frame(ip)) == []
    assert node.count(Reason.LOCAL_NO_LISTENER) == 1
    assert node.balanced()


def test_icmp_that_ends_early_is_dropped_in_silence(node):
    assert node.answers(pod_frame(IP(src=w.IP_A, dst=w.NODE, proto=1) / Raw(b"\x08\x00\xf7\xff"))) == []


def test_tcp_to_the_node_hears_that_nobody_listens(node):
    ip = IP(src=w.IP_A, dst=w.NODE) / TCP(dport=22, flags="S")
    assert bytes(only(node.answers(pod_frame(ip)))) == error(ip, 3, 3)


# --- what waits for a neighbor ----------------------------------------------------------------------------------------


def test_a_packet_waits_for_its_next_hop_and_then_leaves(node):
    ip = udp(w.OUTSIDE, ttl=9)
    question = node.answers(pod_frame(ip))
    assert question == [Outgoing(bytes(arp_request(w.LAN_GATEWAY, sender=w.NODE, mac=w.UPLINK_MAC)), w.UPLINK)]
    reply = arp_request(w.NODE, sender=w.LAN_GATEWAY, mac=w.LAN_MAC, to=w.UPLINK_MAC)
    reply["ARP"].op = 2
    released = node.answers(reply, w.UPLINK)
    assert released[0].waited
    outcome = node.one(released[0].frame, 0, flags=b.INJECTED | b.WAITED)
    assert (outcome.reason, outcome.oif) == (Reason.ACCEPTED, w.UPLINK)
    assert outcome.frame == bytes(Ether(src=w.UPLINK_MAC, dst=w.LAN_MAC) / udp(w.OUTSIDE, ttl=8))
    assert node.balanced()


def test_the_sender_of_a_packet_whose_next_hop_is_silent_is_told(node):
    node.answers([pod_frame(udp(w.OUTSIDE))] * 2)
    out = []
    for _ in range(3):
        node.now += SECOND
        out += node.slow.tick(node.now)
    answers = [IP(packet.frame[14:]) for packet in out if packet.oif == 0]
    assert [bytes(answer) for answer in answers] == [error(udp(w.OUTSIDE, ttl=63), 3, 1)] * 2
    assert node.count(Reason.NEIGH_UNRESOLVED) == 2
    assert node.balanced()


def test_a_datagram_that_waited_is_cut_as_it_came(node):
    pieces = fragments(udp(w.OUTSIDE, size=4000), 1000)
    for piece in pieces:
        piece.flags = int(piece.flags) | 2
        del piece.chksum
    node.answers([pod_frame(piece) for piece in pieces])
    reply = arp_request(w.NODE, sender=w.LAN_GATEWAY, mac=w.LAN_MAC, to=w.UPLINK_MAC)
    released = node.slow.resolver.learn(w.UPLINK, bytes(reply), node.now)
    assert [packet.max_fragment for packet in released] == [1020]
