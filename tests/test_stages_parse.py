"""parse: what becomes of a frame's bytes before any table is asked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.devices.memory import Vnet
from dataplane.stages.parse import parse
from dataplane.tables.address import halves
from dataplane.verdict import Reason, Verdict
from tests import strategies
from tests import world as w
from tests.frames import BROADCAST, arp_request, fragments, patched, ping, pod_frame, tcp, udp
from tests.world import World

UDP_FRAME = bytes(pod_frame(udp(w.IP_B)))
V6_A, V6_B = "2001:db8::a", "2001:db8::b"


WORLD = World()  # parse changes no table


def nothing(batch, count, tables, now):
    """A stage that does nothing: parse alone."""


@pytest.fixture
def world():
    return WORLD


def parsed(world, frame, iif=w.POD_A):
    return world.stage(nothing, [frame], iif)[0]


def v6(payload, **fields):
    return pod_frame(IPv6(src=V6_A, dst=V6_B, **fields) / payload)


BAD = [
    ("an empty frame", b"", Reason.L2_TOO_SHORT),
    ("a frame one byte short of a header", UDP_FRAME[:13], Reason.L2_TOO_SHORT),
    ("a header and nothing else", UDP_FRAME[:14], Reason.IP_BAD_HDR),
    ("another station's frame", pod_frame(udp(w.IP_B), to="02:00:00:00:00:99"), Reason.L2_OTHER_MAC),
    ("a short frame of another station", b"\x02" * 14, Reason.L2_OTHER_MAC),
    ("a VLAN tag", Ether(dst=w.GATEWAY_MAC) / Dot1Q(vlan=5) / udp(w.IP_B), Reason.L2_BAD_ETHERTYPE),
    ("an 802.3 length", Ether(dst=BROADCAST, type=38) / Raw(bytes(46)), Reason.L2_BAD_ETHERTYPE),
    ("IPv6 under IPv4's type", patched(UDP_FRAME, 14, b"\x65"), Reason.IP_BAD_HDR),
    ("a header length below 20", patched(UDP_FRAME, 14, b"\x44"), Reason.IP_BAD_HDR),
    ("a header longer than the packet", patched(UDP_FRAME, 14, b"\x4f"), Reason.IP_BAD_HDR),
    ("a total length below the header's", patched(UDP_FRAME, 16, b"\x00\x13"), Reason.IP_BAD_HDR),
    ("a total length behind the frame", patched(UDP_FRAME, 16, b"\x00\x25"), Reason.IP_BAD_HDR),
    ("a header cut off", UDP_FRAME[:33], Reason.IP_BAD_HDR),
    ("a payload cut off", UDP_FRAME[:-1], Reason.IP_BAD_HDR),
    ("a checksum of zero", patched(UDP_FRAME, 24, b"\x00\x00"), Reason.IP_BAD_CSUM),
    ("IPv4 under IPv6's type", patched(UDP_FRAME, 12, b"\x86\xdd"), Reason.IP_BAD_HDR),
    ("an IPv6 header cut off", bytes(v6(UDP() / b"1234"))[:53], Reason.IP_BAD_HDR),
    ("an IPv6 payload cut off", bytes(v6(UDP() / b"1234"))[:-1], Reason.IP_BAD_HDR),
    ("hop-by-hop options not in front", v6(IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / UDP()), Reason.IP_BAD_HDR),
    ("two fragment headers", v6(IPv6ExtHdrFragment() / IPv6ExtHdrFragment() / UDP()), Reason.IP_BAD_HDR),
    ("an extension header without end", v6(Raw(b"\x3c\xff" + bytes(6)), nh=60), Reason.IP_BAD_HDR),
]


@pytest.mark.parametrize(("frame", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_frame_that_cannot_be_read_is_dropped(world, frame, reason):
    outcome = parsed(world, frame)
    assert (outcome.verdict, outcome.reason) == (Verdict.DROP, reason)
    assert outcome.frame == bytes(frame)


@given(st.integers(0, 159))
def test_any_flipped_bit_of_an_ipv4_header_drops_the_packet(bit):
    frame = bytearray(UDP_FRAME)
    frame[14 + bit // 8] ^= 1 << bit % 8
    assert parsed(WORLD, bytes(frame)).verdict == Verdict.DROP


@pytest.mark.parametrize("to", [w.GATEWAY_MAC, BROADCAST, "01:00:5e:00:00:fb"])
def test_frames_to_us_and_to_groups_are_read(world, to):
    assert parsed(world, pod_frame(udp(w.IP_B), to=to)).verdict == Verdict.ACCEPT


def test_the_padding_of_a_short_frame_is_cut_off(world):
    outcome = parsed(world, UDP_FRAME + b"\xa5" * 18)
    assert outcome.frame == UDP_FRAME


def test_options_move_the_transport_header(world):
    ip = IP(src=w.IP_A, dst=w.IP_B, options=[IPOption_RR(routers=["0.0.0.0"] * 3), IPOption_NOP()])
    outcome = parsed(world, pod_frame(ip / UDP(sport=7, dport=9)))
    assert outcome.record["l4"] - outcome.record["l3"] == 36
    assert (outcome.record["sport"], outcome.record["dport"]) == (7, 9)


PORTS = [
    ("udp", udp(w.IP_B, sport=4000, dport=53), (4000, 53, 0)),
    ("tcp", tcp(w.IP_B, flags="SA"), (4000, 80, 0x12)),
    ("an echo request goes from its id to its type", ping(w.IP_B), (7, 8 << 8, 0)),
    ("an echo reply is its request, inverted", IP(src=w.IP_A, dst=w.IP_B) / ICMP(type=0, id=7), (8 << 8, 7, 0)),
    ("a timestamp", IP(src=w.IP_A, dst=w.IP_B) / ICMP(type=13, id=7), (7, 13 << 8, 0)),
    ("its reply", IP(src=w.IP_A, dst=w.IP_B) / ICMP(type=14, id=7), (13 << 8, 7, 0)),
    ("an icmp error has none", IP(src=w.IP_A, dst=w.IP_B) / ICMP(type=3, code=1) / Raw(b"x" * 28), (0, 0, 0)),
    ("another protocol has none", IP(src=w.IP_A, dst=w.IP_B, proto=47) / Raw(b"\xff" * 8), (0, 0, 0)),
    ("udp cut off in its header", IP(src=w.IP_A, dst=w.IP_B, proto=17) / Raw(b"\xff" * 7), (0, 0, 0)),
    ("tcp cut off behind its ports", IP(src=w.IP_A, dst=w.IP_B, proto=6) / Raw(b"\x01" * 13), (0x101, 0x101, 0)),
    ("the first fragment", fragments(udp(w.IP_B, size=64), 16)[0], (4000, 53, 0)),
    ("a later fragment has none", fragments(udp(w.IP_B, size=64), 16)[1], (0, 0, 0)),
]


@pytest.mark.parametrize(("ip", "ports"), [row[1:] for row in PORTS], ids=[row[0] for row in PORTS])
def test_ports_are_read_where_they_are(world, ip, ports):
    record = parsed(world, pod_frame(ip)).record
    assert (record["sport"], record["dport"], record["tcp_flags"]) == ports


FLAGS = [
    ("whole", {}, 0),
    ("don't fragment", {"flags": "DF"}, b.DONT_FRAGMENT),
    ("more fragments", {"flags": "MF"}, b.FRAGMENT),
    ("the last fragment", {"frag": 3}, b.FRAGMENT),
    ("a fragment that may not be cut", {"flags": "DF+MF"}, b.FRAGMENT | b.DONT_FRAGMENT),
    ("the evil bit", {"flags": "evil"}, 0),
]


@pytest.mark.parametrize(("fields", "flags"), [row[1:] for row in FLAGS], ids=[row[0] for row in FLAGS])
def test_the_fragment_word_becomes_flags(world, fields, flags):
    assert parsed(world, pod_frame(udp(w.IP_B, **fields))).record["flags"] == flags


def test_what_an_ipv6_packet_says(world):
    outcome = parsed(world, v6(IPv6ExtHdrDestOpt() / UDP(sport=7, dport=9) / b"x", hlim=9, tc=0xB9) / Raw(b""))
    record = outcome.record
    assert (record["ttl"], record["tos"], record["protocol"]) == (9, 0xB9, 17)
    assert (int(record["src_hi"]), int(record["src_lo"])) == halves(V6_A)
    assert (int(record["dst_hi"]), int(record["dst_lo"])) == halves(V6_B)
    assert (record["sport"], record["dport"], record["l4"] - record["l3"]) == (7, 9, 48)
    assert record["flags"] == b.IPV6 | b.DONT_FRAGMENT


def test_an_ipv6_echo_reply_is_its_request_inverted(world):
    record = parsed(world, v6(ICMPv6EchoRequest(id=99))).record
    assert (record["sport"], record["dport"]) == (99, 128 << 8)
    record = parsed(world, v6(ICMPv6EchoReply(id=99))).record
    assert (record["sport"], record["dport"]) == (128 << 8, 99)


def test_a_later_ipv6_fragment_has_no_ports(world):
    record = parsed(world, v6(IPv6ExtHdrFragment(offset=2, nh=17) / Raw(b"\xff" * 16))).record
    assert (record["sport"], record["dport"], record["protocol"]) == (0, 0, 17)
    assert record["flags"] & b.FRAGMENT


def test_a_record_keeps_nothing_of_the_packet_that_was_there_before(world):
    """Rows are used again; receive clears what it must, parse the rest."""
    count = world.load([pod_frame(tcp(w.IP_B, flags="SA", options=[IPOption_NOP()]))], w.POD_A)
    parse(world.batch.arrays, count, world.tables.arrays, world.now)
    later = bytes(pod_frame(fragments(udp(w.IP_B, size=64), 16)[1]))
    row = world.batch.packets[0]
    world.batch.data[row["start"] : row["start"] + len(later)] = bytearray(later)
    row["length"] = len(later)
    parse(world.batch.arrays, count, world.tables.arrays, world.now)
    again = world.outcomes(1)[0].record
    fresh = parsed(world, later).record
    for name in again.dtype.names:
        assert again[name] == fresh[name], name


@settings(max_examples=150)
@given(strategies.ipv4_packets() | strategies.ipv4_transport_packets())
def test_the_record_says_what_scapy_says(packet):
    outcome = parsed(WORLD, pod_frame(IP(packet)).copy())
    seen, record = IP(packet), outcome.record
    assert outcome.verdict == Verdict.ACCEPT
    assert (record["ttl"], record["tos"], record["protocol"]) == (seen.ttl, seen.tos, seen.proto)
    assert int(record["src_lo"]) == halves(seen.src)[1]
    assert int(record["dst_lo"]) == halves(seen.dst)[1]
    assert record["length"] == 14 + seen.len
    assert record["l4"] - record["l3"] == seen.ihl * 4
    for layer in (UDP, TCP):
        if layer in seen and bytes(seen.payload) == bytes(seen[layer]):
            assert (record["sport"], record["dport"]) == (seen[layer].sport, seen[layer].dport)


@settings(max_examples=200)
@given(st.binary(max_size=120), st.sampled_from([0x0800, 0x86DD, 0x0806, 0x8100]), st.booleans())
def test_any_bytes_are_read_without_leaving_the_frame(payload, kind, plausible):
    head = bytes.fromhex(w.GATEWAY_MAC.replace(":", "")) + bytes(6) + kind.to_bytes(2)
    if plausible and payload:
        payload = (b"\x45" if kind == 0x0800 else b"\x60") + payload[1:]
    frame = head + payload
    outcome = parsed(WORLD, frame)
    record = outcome.record
    end = record["start"] + record["length"]
    assert record["length"] <= len(frame)
    assert outcome.frame == frame[: record["length"]]
    if outcome.verdict == Verdict.ACCEPT and kind != 0x0806:
        assert record["start"] + 14 == record["l3"] < record["l4"] <= end


@pytest.mark.parametrize(("start", "offset", "kept"), [(34, 16, True), (60, 6, True), (34, 15, False)])
def test_a_promised_checksum_stays_behind_what_was_checked(world, start, offset, kept):
    frame = pod_frame(tcp(w.IP_B, size=60))
    record = world.stage(nothing, [frame], w.POD_A, [Vnet(b.NEEDS_CSUM, 0, 0, 0, start, offset)])[0].record
    assert bool(record["vnet_flags"]) is kept


def test_arp_is_left_to_its_stage(world):
    outcome = parsed(world, arp_request("169.254.1.1"))
    assert (outcome.verdict, outcome.record["ethertype"], outcome.record["l4"]) == (Verdict.ACCEPT, 0x0806, 0)
