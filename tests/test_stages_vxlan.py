"""vxlan: who may come out of the tunnel and how, and what goes into it, against scapy and RFC 6040."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.devices.memory import Vnet
from dataplane.stages.vxlan import decapsulate
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason, Verdict
from tests import strategies
from tests import world as w
from tests.frames import (
    BROADCAST,
    fragments,
    inner_frame,
    lan_frame,
    patched,
    ping,
    pod_frame,
    recomputed,
    tcp,
    tunnel,
    tunneled,
    udp,
)
from tests.world import World

OUTER = 50  # bytes in front of the inner frame
VXLAN_AT = 42
NOT_ECT, ECT1, ECT0, CE = range(4)


@pytest.fixture
def world():
    return World()


def unwrapped(world, frame, iif=w.UNDERLAY, vnet=None):
    return world.stage(decapsulate, [frame], iif, [vnet] if vnet else ())[0]


INNER = inner_frame(udp(w.IP_A, src=w.IP_REMOTE))
GOOD = bytes(tunnel(INNER))
VALID_CSUM = Ether(bytes(tunnel(INNER, chksum=None)))[UDP].chksum


def inner(**fields):
    return tunnel(inner_frame(udp(w.IP_A, src=w.IP_REMOTE), **fields))


RECEIVE = [
    ("checksum absent", tunnel(INNER), Reason.ACCEPTED),
    ("checksum valid", tunnel(INNER, chksum=VALID_CSUM), Reason.ACCEPTED),
    ("checksum wrong", tunnel(INNER, chksum=VALID_CSUM ^ 1), Reason.TUNNEL_CSUM),
    ("payload wrong under its checksum", patched(tunnel(INNER, chksum=VALID_CSUM), 90, b"\xee"), Reason.TUNNEL_CSUM),
    ("no I flag", tunnel(INNER, flags=0), Reason.TUNNEL_BAD_FLAGS),
    ("all flags but I", tunnel(INNER, flags=0xF7), Reason.TUNNEL_BAD_FLAGS),
    ("another VNI", tunnel(INNER, vni=4097), Reason.TUNNEL_VNI),
    ("VNI 0", tunnel(INNER, vni=0), Reason.TUNNEL_VNI),
    ("the VNI in the wrong place", patched(GOOD, VXLAN_AT + 4, b"\x10\x00\x00"), Reason.TUNNEL_VNI),
    ("its own VTEP as source", inner(source=w.VTEP), Reason.TUNNEL_OWN_MAC),
    ("another VTEP as destination", inner(to=w.PEER_VTEP), Reason.TUNNEL_INNER_MAC),
    ("an inner broadcast", inner(to=BROADCAST), Reason.ACCEPTED),
    ("an inner multicast", inner(to="01:00:5e:00:00:fb"), Reason.ACCEPTED),
    ("a strange inner source", inner(source="02:00:00:00:00:77"), Reason.ACCEPTED),
    ("a sender that is no node", tunnel(INNER, source=w.STRANGER), Reason.TUNNEL_SRC_NOT_NODE),
    ("itself as sender", tunnel(INNER, source=w.NODE), Reason.TUNNEL_SRC_NOT_NODE),
    ("an inner EtherType we do not know", tunnel(Ether(src=w.PEER_VTEP, dst=w.VTEP, type=0x88CC) / Raw(bytes(50))),
     Reason.L2_BAD_ETHERTYPE),
    ("an inner header that is wrong", tunnel(inner_frame(udp(w.IP_A, src=w.IP_REMOTE, ihl=4))), Reason.IP_BAD_HDR),
    ("an inner checksum that is wrong", patched(GOOD, OUTER + 24, b"\xde\xad"), Reason.IP_BAD_CSUM),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "reason"), [row[1:] for row in RECEIVE], ids=[row[0] for row in RECEIVE])
def test_a_datagram_from_the_tunnel_with(world, frame, reason):
    outcome = unwrapped(world, frame)
    assert outcome.reason == reason
    assert outcome.verdict == reason.verdict
    if reason == Reason.ACCEPTED:
        assert outcome.frame == bytes(frame)[OUTER:]
        assert outcome.record["flags"] & b.TUNNELED


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_the_vxlan_header_is_checked(bit):
    header = int.from_bytes(GOOD[VXLAN_AT : VXLAN_AT + 8]) ^ 1 << 63 - bit
    reason = Reason.TUNNEL_RESERVED
    if bit == 4:
        reason = Reason.TUNNEL_BAD_FLAGS
    elif 32 <= bit < 56:
        reason = Reason.TUNNEL_VNI
    assert unwrapped(WORLD, patched(GOOD, VXLAN_AT, header.to_bytes(8))).reason == reason


def outer_cut(length):
    """An outer packet of a right length whose UDP payload has ``length`` bytes of the tunnel's."""
    ip = IP(src=w.PEER, dst=w.NODE) / UDP(sport=40000, dport=4789, chksum=0) / Raw(GOOD[VXLAN_AT:][:length])
    return Ether(src=w.LAN_MAC, dst=w.UPLINK_MAC) / ip


@given(st.integers(0, len(GOOD) - VXLAN_AT - 1))
def test_a_datagram_that_ends_too_early_is_dropped(length):
    outcome = unwrapped(WORLD, outer_cut(length))
    assert outcome.verdict == Verdict.DROP
    assert outcome.reason == (Reason.TUNNEL_TRUNCATED if length < 22 else Reason.IP_BAD_HDR)


LENGTHS = [("below its header", 7), ("zero", 0), ("behind the packet", len(GOOD) - 33)]


@pytest.mark.parametrize("length", [row[1] for row in LENGTHS], ids=[row[0] for row in LENGTHS])
def test_a_udp_length(world, length):
    assert unwrapped(world, patched(GOOD, 38, length.to_bytes(2))).reason == Reason.TUNNEL_TRUNCATED


def test_the_inner_packet_ends_where_the_datagram_ends(world):
    """Bytes behind the UDP length belong to nobody, though the outer packet has them."""
    frame = patched(GOOD, 38, (len(GOOD) - 34 - 4).to_bytes(2))
    assert unwrapped(world, frame).reason == Reason.IP_BAD_HDR
    longer = IP(src=w.PEER, dst=w.NODE) / UDP(sport=40000, dport=4789, chksum=0, len=len(GOOD) - 34)
    trailing = Ether(src=w.LAN_MAC, dst=w.UPLINK_MAC) / longer / Raw(GOOD[VXLAN_AT:] + b"\xee" * 9)
    assert unwrapped(world, trailing).frame == bytes(INNER)


PROMISES = [("the device will finish it", b.NEEDS_CSUM), ("the device has verified it", b.DATA_VALID)]


@pytest.mark.parametrize("flags", [row[1] for row in PROMISES], ids=[row[0] for row in PROMISES])
def test_an_outer_checksum_is_not_looked_at_when(world, flags):
    outcome = unwrapped(world, tunnel(INNER, chksum=0x1234), vnet=Vnet(flags, 0, 0, 0, 34, 6))
    assert (outcome.verdict, outcome.record["vnet_flags"]) == (Verdict.ACCEPT, 0)


NOT_OURS = [
    ("another port", lan_frame(udp(w.NODE, src=w.PEER, dport=8472)), w.UNDERLAY),
    ("another address", lan_frame(udp(w.IP_A, src=w.PEER, dport=4789)), w.UNDERLAY),
    ("TCP", lan_frame(IP(src=w.PEER, dst=w.NODE) / TCP(dport=4789)), w.UNDERLAY),
    ("a fragment", lan_frame(fragments(udp(w.NODE, src=w.PEER, dport=4789, size=64), 32)[0]), w.UNDERLAY),
    ("a pod's", pod_frame(udp(w.NODE, dport=4789)), w.POD_A),
    ("our own", pod_frame(udp(w.NODE, dport=4789)), 0),
    (
        "IPv6 with mapped addresses",
        lan_frame(IPv6(src=f"::ffff:{w.PEER}", dst=f"::ffff:{w.NODE}") / UDP(dport=4789) / VXLAN(vni=4096) / INNER),
        w.UNDERLAY,
    ),
    (
        "IPv6 whose lower half looks like ours",
        lan_frame(IPv6(src="2001:db8::1", dst=f"2001:db8::ffff:{w.NODE}") / UDP(dport=4789) / Raw(b"x" * 40)),
        w.UPLINK,
    ),
]


@pytest.mark.parametrize(("frame", "iif"), [row[1:] for row in NOT_OURS], ids=[row[0] for row in NOT_OURS])
def test_not_the_tunnels(world, frame, iif):
    outcome = unwrapped(world, frame, iif)
    assert (outcome.verdict, outcome.frame) == (Verdict.ACCEPT, bytes(frame))
    assert not outcome.record["flags"] & b.TUNNELED


def test_a_tunnel_in_the_tunnel_is_unwrapped_once(world):
    twice = inner_frame(IP(src=w.IP_REMOTE, dst=w.NODE) / UDP(dport=4789, chksum=0) / VXLAN(vni=4096) / INNER)
    outcome = unwrapped(world, tunnel(twice))
    assert outcome.frame == bytes(twice)


def test_the_uplink_is_a_way_in_too(world):
    assert unwrapped(world, tunnel(INNER), w.UPLINK).frame == bytes(INNER)


def test_what_came_is_counted_for_its_node(world):
    for _ in range(3):
        unwrapped(world, tunnel(INNER))
    record = world.tables.vteps.records[world.peer]
    assert (record["rx_packets"], record["rx_bytes"]) == (3, 3 * len(INNER))


# --- ECN (RFC 6040) --------------------------------------------------------------------------------------------------

DECAPSULATED: dict[int, dict[int, int | None]] = {  # RFC 6040, figure 4: inner: outer Not-ECT, ECT(0), ECT(1), CE
    NOT_ECT: {NOT_ECT: NOT_ECT, ECT0: NOT_ECT, ECT1: NOT_ECT, CE: None},
    ECT0: {NOT_ECT: ECT0, ECT0: ECT0, ECT1: ECT1, CE: CE},
    ECT1: {NOT_ECT: ECT1, ECT0: ECT1, ECT1: ECT1, CE: CE},
    CE: {NOT_ECT: CE, ECT0: CE, ECT1: CE, CE: CE},
}
MARKS = [(of_inner, of_outer, mark) for of_inner, row in DECAPSULATED.items() for of_outer, mark in row.items()]


@pytest.mark.parametrize(("of_inner", "of_outer", "expected"), MARKS)
@pytest.mark.parametrize("family", [4, 6])
def test_congestion_marks_come_out_of_the_tunnel(world, of_inner, of_outer, expected, family):
    tos = 0xB8 | of_inner
    if family == 4:
        ip = udp(w.IP_A, src=w.IP_REMOTE, tos=tos)
    else:
        ip = IPv6(src="2001:db8::2", dst="2001:db8::1", tc=tos) / UDP(sport=1, dport=2) / Raw(b"x")
    outcome = unwrapped(world, tunneled(ip, tos=0x40 | of_outer))
    if expected is None:
        assert outcome.reason == Reason.TUNNEL_ECN
        return
    layer = Ether(outcome.frame).payload
    assert (layer.tos if family == 4 else layer.tc) == 0xB8 | expected == outcome.record["tos"]
    assert recomputed(outcome.frame) == outcome.frame


def test_arp_has_no_congestion_marks(world):
    assert unwrapped(world, tunnel(inner_frame(ARP()), tos=CE)).verdict == Verdict.ACCEPT


@pytest.mark.parametrize(("mark", "expected"), [(NOT_ECT, NOT_ECT), (ECT0, ECT0), (ECT1, ECT1), (CE, ECT0)])
@pytest.mark.parametrize("dscp", [0, 0xB8])
def test_congestion_marks_go_into_the_tunnel(world, mark, expected, dscp):
    """CE becomes ECT(0): the tunnel's path marks anew. DSCP stays inside."""
    outcome = world.one(pod_frame(udp(w.IP_REMOTE, tos=dscp | mark)), w.POD_A)
    packet = Ether(outcome.frame)
    assert (packet[IP].tos, packet[VXLAN][IP].tos) == (expected, dscp | mark)


# --- unfinished checksums (P1, P2) -----------------------------------------------------------------------------------


def unfinished(ip):
    """The same packet with its transport checksum left to the device: the folded pseudo-header sum."""
    raw = bytes(ip)
    header, protocol = (raw[0] & 15) * 4, raw[9]
    pseudo = raw[12:20] + bytes([0, protocol]) + (len(raw) - header).to_bytes(2)
    at = header + (16 if protocol == 6 else 6)
    return raw[:at] + strategies.naive_sum(pseudo).to_bytes(2) + raw[at + 2 :]


def marked(world, ip):
    """The record of a packet behind decapsulation."""
    return unwrapped(world, tunnel(inner_frame(Raw(bytes(ip))) if isinstance(ip, bytes) else inner_frame(ip))).record


@pytest.mark.parametrize(("make", "offset"), [(udp, 6), (tcp, 16)])
def test_an_unfinished_checksum_is_passed_on_as_unfinished(world, make, offset):
    frame = Ether(src=w.PEER_VTEP, dst=w.VTEP, type=0x0800) / Raw(unfinished(make(w.IP_A, src=w.IP_REMOTE)))
    outcome = unwrapped(world, tunnel(frame))
    record = outcome.record
    assert (record["vnet_flags"], record["csum_start"], record["csum_offset"]) == (b.NEEDS_CSUM, 34, offset)
    assert outcome.frame == bytes(frame)


@settings(max_examples=100)
@given(st.sampled_from([udp, tcp]), st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=40))
def test_only_the_pseudo_headers_sum_is_taken_for_unfinished(make, stored, payload):
    """Anything else stored there, right or wrong, goes on as it is, and the pod verifies it: nothing is laundered."""
    ip = make(w.IP_A, src=w.IP_REMOTE)
    ip[Raw].load = payload
    raw = bytes(IP(bytes(ip)))
    at = 36 if make is tcp else 26
    promised = unfinished(raw)[at : at + 2]
    raw = patched(raw, at, stored.to_bytes(2))
    outcome = unwrapped(WORLD, tunnel(Ether(src=w.PEER_VTEP, dst=w.VTEP, type=0x0800) / Raw(raw)))
    assert bool(outcome.record["vnet_flags"]) == (stored.to_bytes(2) == promised)
    assert outcome.frame[14:] == raw


@settings(max_examples=60)
@given(st.sampled_from([udp, tcp]), st.binary(min_size=2, max_size=40), st.data())
def test_a_payload_damaged_on_the_way_is_never_marked(make, payload, data):
    ip = make(w.IP_A, src=w.IP_REMOTE)
    ip[Raw].load = payload
    raw = bytearray(bytes(ip))
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    raw[len(raw) - len(payload) + bit // 8] ^= 1 << bit % 8
    if unfinished(bytes(ip)) == bytes(ip):
        return  # once in 65536 a complete checksum equals the pseudo header's sum
    outcome = unwrapped(WORLD, tunnel(Ether(src=w.PEER_VTEP, dst=w.VTEP, type=0x0800) / Raw(bytes(raw))))
    assert outcome.verdict == Verdict.ACCEPT
    assert outcome.record["vnet_flags"] == 0


UNMARKED = [
    ("a fragment", fragments(udp(w.IP_A, src=w.IP_REMOTE, size=64), 32)[0]),
    ("ICMP", ping(w.IP_A, src=w.IP_REMOTE)),
    ("UDP without a checksum", IP(src=w.IP_REMOTE, dst=w.IP_A) / UDP(chksum=0) / Raw(b"x")),
    ("a transport header that is cut off", IP(src=w.IP_REMOTE, dst=w.IP_A, proto=6) / Raw(b"\x00" * 19)),
]


@pytest.mark.parametrize("ip", [row[1] for row in UNMARKED], ids=[row[0] for row in UNMARKED])
def test_never_unfinished_is(world, ip):
    assert unwrapped(world, tunneled(ip)).record["vnet_flags"] == 0


def test_a_super_frame_out_of_the_tunnel_gets_the_pods_segment_size(world):
    raw = unfinished(tcp(w.IP_A, src=w.IP_REMOTE, size=9000))
    record = unwrapped(world, tunnel(Ether(src=w.PEER_VTEP, dst=w.VTEP, type=0x0800) / Raw(raw))).record
    assert (record["gso_type"], record["gso_size"], record["hdr_len"]) == (b.GSO_TCPV4, w.POD_MTU - 40, 54)
    assert record["vnet_flags"] == b.NEEDS_CSUM


def test_a_large_packet_with_a_complete_checksum_is_no_super_frame(world):
    record = unwrapped(world, tunneled(tcp(w.IP_A, src=w.IP_REMOTE, size=9000))).record
    assert (record["gso_type"], record["vnet_flags"]) == (0, 0)


# --- into the tunnel -------------------------------------------------------------------------------------------------


def wrapped(world, ip, vnet=None):
    return world.one(pod_frame(ip), w.POD_A, vnet)


def test_the_outer_headers_are_calicos(world):
    outcome = wrapped(world, udp(w.IP_REMOTE, ttl=9, tos=0xB8, flags="DF"))
    packet = Ether(outcome.frame)
    assert outcome.oif == w.UNDERLAY
    assert (packet.src, packet.dst, packet.type) == ("00:00:00:00:00:00", "00:00:00:00:00:00", 0x0800)
    ip = packet[IP]
    assert (ip.src, ip.dst, ip.ttl, ip.tos, int(ip.flags), ip.frag, ip.ihl) == (w.NODE, w.PEER, 64, 0, 0, 0, 5)
    assert (packet[UDP].dport, packet[UDP].chksum, packet[UDP].len) == (4789, 0, len(outcome.frame) - 34)
    assert outcome.frame[VXLAN_AT : VXLAN_AT + 8] == bytes.fromhex("0800000000100000")
    within = packet[VXLAN].payload
    assert (within.src, within.dst) == (w.VTEP, w.PEER_VTEP)
    assert bytes(within.payload) == bytes(udp(w.IP_REMOTE, ttl=8, tos=0xB8, flags="DF"))
    assert recomputed(outcome.frame) == outcome.frame


def test_ipv6_goes_through_the_same_tunnel(world):
    world.route("2001:db8::a/128", Route(Kind.POD, w.POD_A))
    world.route("2001:db8:2::/64", Route(Kind.TUNNEL, vtep=world.peer))
    packet = IPv6(src="2001:db8::a", dst="2001:db8:2::1") / UDP(sport=1, dport=2) / Raw(b"x")
    within = Ether(wrapped(world, packet).frame)[VXLAN].payload
    assert (within.type, within[IPv6].dst, within[IPv6].hlim) == (0x86DD, "2001:db8:2::1", 63)


def source_port(world, ip):
    return Ether(wrapped(world, ip).frame)[UDP].sport


def test_the_source_port_is_linuxs_formula_over_the_flows_hash():
    from dataplane.codecs.vxlan import source_port as formula

    for word in (0, 1, 0xFFFF, 0x10000, 0xDEAD_BEEF, 0xFFFF_FFFF):
        mixed = (word ^ word << 16) & 0xFFFF_FFFF
        assert formula(word, 32768, 60999) == 32768 + (mixed * (60999 - 32768) >> 32)


@settings(max_examples=40)
@given(st.integers(0, 0xFFFF), st.integers(1, 0xFFFF), st.integers(0, 60), st.integers(0, 255), st.integers(2, 255))
def test_a_flow_has_one_source_port(sport, dport, size, tos, ttl):
    if dport == 4789:
        return
    one = source_port(WORLD, udp(w.IP_REMOTE, sport=sport, dport=dport))
    two = source_port(WORLD, udp(w.IP_REMOTE, sport=sport, dport=dport, size=size, tos=tos, ttl=ttl, id=size))
    assert 32768 <= one < 60999
    assert one == two


def test_all_pieces_of_an_ipv6_datagram_take_one_path(world):
    """Only the first fragment has ports, so no fragment may use them."""
    world.route("2001:db8::a/128", Route(Kind.POD, w.POD_A))
    world.route("2001:db8:2::/64", Route(Kind.TUNNEL, vtep=world.peer))
    head = IPv6(src="2001:db8::a", dst="2001:db8:2::1")
    first = head / IPv6ExtHdrFragment(offset=0, m=1, nh=17) / Raw(b"\x01" * 16)
    later = head / IPv6ExtHdrFragment(offset=2, m=0, nh=17) / Raw(b"\x02" * 16)
    assert source_port(world, first) == source_port(world, later)


def test_flows_are_spread_over_the_ports():
    ports = [source_port(WORLD, udp(w.IP_REMOTE, sport=1024 + k)) for k in range(200)]
    assert len(set(ports)) > 190
    assert len({(port - 32768) * 8 // (60999 - 32768) for port in ports}) == 8


def test_a_partial_checksum_is_still_found_behind_the_outer_headers(world):
    ip = IP(unfinished(tcp(w.IP_REMOTE, size=40)))
    record = wrapped(world, ip, Vnet(b.NEEDS_CSUM, 0, 0, 0, 34, 16)).record
    assert (record["csum_start"], record["csum_offset"], record["vnet_flags"]) == (34 + OUTER, 16, b.NEEDS_CSUM)
    assert record["flags"] & b.ENCAPSULATED


def test_what_went_is_counted_for_its_node(world):
    wrapped(world, udp(w.IP_REMOTE))
    record = world.tables.vteps.records[world.peer]
    assert (record["tx_packets"], record["tx_bytes"]) == (1, len(pod_frame(udp(w.IP_REMOTE))))


# What conntrack has against most payloads that are no transport header.
TORN = (Reason.CT_INVALID_FLAGS, Reason.CT_NOT_SYN, Reason.ICMP_BAD_INNER, Reason.ICMP_UNRELATED)


@settings(max_examples=60)
@given(st.binary(max_size=80), st.integers(0, 255), st.sampled_from([6, 17, 1, 47]))
def test_what_goes_in_comes_out_at_the_other_end(payload, tos, protocol):
    """Our own datagram, with the roles of the two nodes exchanged, is unwrapped to the same packet."""
    ip = IP(src=w.IP_A, dst=w.IP_REMOTE, tos=tos, proto=protocol) / Raw(payload)
    outcome = wrapped(WORLD, ip)
    if outcome.reason in (Reason.TUNNEL_FROM_POD, *TORN):
        return
    packet = Ether(outcome.frame)
    packet.dst, packet[IP].src, packet[IP].dst = w.UPLINK_MAC, w.PEER, w.NODE
    packet[VXLAN].payload.src, packet[VXLAN].payload.dst = w.PEER_VTEP, w.VTEP
    del packet[IP].chksum
    back = unwrapped(WORLD, packet)
    assert back.verdict == Verdict.ACCEPT
    ip.ttl = 63
    assert back.frame[14:] == bytes(ip)


def test_an_icmp_flow_keeps_its_port_by_its_id(world):
    ports = {source_port(world, IP(src=w.IP_A, dst=w.IP_REMOTE) / ICMP(id=5, seq=k)) for k in range(5)}
    assert len(ports) == 1


@settings(max_examples=100)
@given(st.binary(max_size=120), st.integers(0, 2**32))
def test_any_bytes_in_a_tunnel_are_survived(payload, seed):
    body = payload if seed % 2 else bytes.fromhex("0800000000100000") + bytes(INNER)[:14] + payload
    ip = IP(src=w.PEER, dst=w.NODE) / UDP(sport=zlib.crc32(payload) & 0xFFFF, dport=4789, chksum=0) / Raw(body)
    outcome = WORLD.one(lan_frame(ip), w.UNDERLAY)
    record = outcome.record
    assert record["slot"] <= record["start"]
    assert record["start"] + record["length"] <= record["slot"] + record["size"]


WORLD = World()  # only counters change
