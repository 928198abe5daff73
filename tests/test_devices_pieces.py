"""Checksums, segments and fragments, against packets that scapy builds one by one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_RR, IPOption_Security
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from dataplane.batch import ENCAPSULATED, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, make_batch
from dataplane.devices.io import IoBuffers
from dataplane.devices.memory import Vnet, collect, load, unload
from dataplane.devices.pieces import MAX_SEGMENTS
from dataplane.devices.transmit import transmit
from dataplane.tables.interface import INTERFACE, UP, Driver
from dataplane.verdict import Reason, Verdict

ETHER = Ether(src="ee:ee:ee:ee:ee:ee", dst="02:00:00:00:00:07")
OUTER = (
    Ether(src="00:00:00:00:00:00", dst="00:00:00:00:00:00")
    / IP(src="192.0.2.1", dst="192.0.2.2", id=0x1234, tos=1)
    / UDP(sport=40000, dport=4789, chksum=0)
    / VXLAN(flags=8, vni=4096)
)
OUTER_BYTES = len(bytes(OUTER))
BATCH, IO = make_batch(), IoBuffers()


def v4(**fields: Any) -> Packet:
    return IP(src="10.244.0.7", dst="10.244.1.9", **fields)


def v6(**fields: Any) -> Packet:
    return IPv6(src="fd00::7", dst="fd00:1::9", **fields)


def payload(size: int) -> bytes:
    return bytes(i * 7 + (i >> 8) & 0xFF for i in range(size))


def sent(frame: Packet, vnet: Vnet = Vnet(), **fields: int) -> list[bytes]:  # noqa: B008
    """Send one frame to a device that takes only finished frames of ``mtu`` bytes; return what it takes."""
    interfaces = np.zeros(2, INTERFACE)
    interfaces[1]["driver"], interfaces[1]["flags"] = Driver.MEMORY, UP
    data = bytes(frame)
    load(BATCH, [data], iif=1, vnet=[vnet])
    record = BATCH.packets[:1]
    tunneled = VXLAN in frame
    inner = frame[VXLAN].payload if tunneled else frame
    record["oif"], record["flags"] = 1, ENCAPSULATED if tunneled else 0
    record["l3"] = record["start"] + (OUTER_BYTES if tunneled else 0) + 14
    record["l4"] = record["l3"] + (inner[IP].ihl * 4 if IP in inner else 40)
    for name, value in fields.items():
        record[name] = value
    taken = transmit(BATCH.arrays, 1, interfaces, IO.arrays)
    frames = [data for _, data in collect(BATCH, 1, interfaces, IO)]
    assert taken == (record["verdict"][0] == Verdict.ACCEPT)
    assert interfaces["tx_packets"][1] == taken
    if taken:
        assert interfaces["tx_frames"][1] == len(frames)
        assert interfaces["tx_bytes"][1] == sum(map(len, frames))
    return frames


def built(packet: Packet) -> Packet:
    """Fill in every length and checksum."""
    return Ether(bytes(packet))


def gso(frame: Packet, size: int) -> Vnet:
    """The virtio header of a super-frame."""
    tunneled = VXLAN in frame
    inner = frame[VXLAN].payload if tunneled else frame
    kind = GSO_UDP_L4 if UDP in inner else GSO_TCPV4 if IP in inner else GSO_TCPV6
    network = inner[IP].ihl * 4 if IP in inner else 40
    begin = (OUTER_BYTES if tunneled else 0) + 14 + network
    return Vnet(NEEDS_CSUM, kind, 0, size, begin, 6 if UDP in inner else 16)


def expected_segments(frame: Packet, size: int) -> list[bytes]:
    """Cut a super-frame as Linux does: one packet per ``size`` bytes of payload."""
    inner = frame[VXLAN].payload if VXLAN in frame else frame
    body = bytes(inner[Raw].load) if Raw in inner else b""
    slices = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    pieces = []
    for k, piece in enumerate(slices):
        packet = inner.copy()
        transport = packet[TCP] if TCP in packet else packet[UDP]
        transport.remove_payload()
        transport.add_payload(Raw(piece))
        if TCP in packet:
            transport.seq = (transport.seq + k * size) & 0xFFFFFFFF
            for flag, kept in ((0x80, k == 0), (0x09, piece is slices[-1])):
                transport.flags = int(transport.flags) if kept else int(transport.flags) & ~flag
        else:
            del transport.len
        del transport.chksum
        if IP in packet:
            packet[IP].id = (packet[IP].id + k) & 0xFFFF
            del packet[IP].len, packet[IP].chksum
        else:
            del packet[IPv6].plen
        pieces.append(tunneled(packet, frame, k))
    return pieces


def tunneled(packet: Packet, frame: Packet, k: int) -> bytes:
    """Put piece ``k`` behind the outer headers that ``frame`` has, if any."""
    if VXLAN not in frame:
        return bytes(packet)
    outer = OUTER.copy()
    outer[IP].id = (outer[IP].id + k) & 0xFFFF
    return bytes(outer / Ether(bytes(packet)))


TRANSPORTS: dict[str, Callable[[], Packet]] = {
    "tcp": lambda: TCP(sport=4000, dport=80, seq=0xFFFFFF00, ack=7, flags="PA", window=500),
    "udp": lambda: UDP(sport=4000, dport=53),
}
NETWORKS: dict[str, Callable[[], Packet]] = {"v4": lambda: v4(id=0xFFFE, ttl=63), "v6": lambda: v6(hlim=63)}


@pytest.mark.parametrize("through", ["plain", "tunnel"])
@pytest.mark.parametrize("network", ["v4", "v6"])
@pytest.mark.parametrize("transport", ["tcp", "udp"])
@pytest.mark.parametrize("size", [1, 1399, 1400, 1401, 9000])
def test_p3_a_super_frame_is_cut_into_segments_with_complete_checksums(through, network, transport, size):
    inner = ETHER / NETWORKS[network]() / TRANSPORTS[transport]() / Raw(payload(size))
    frame = built(OUTER / inner if through == "tunnel" else inner)
    assert sent(frame, gso(frame, 1400)) == expected_segments(frame, 1400)


@settings(max_examples=40)
@given(
    st.sampled_from(["v4", "v6"]),
    st.integers(0, 3000),
    st.integers(100, 1500),
    st.integers(0, 255),
    st.lists(st.sampled_from([("NOP", None), ("Timestamp", (1, 2)), ("SAckOK", b"")]), max_size=3),
    st.booleans(),
)
def test_segments_put_together_are_the_super_frame(network, size, mss, flags, options, through_tunnel):
    transport = TCP(sport=4000, dport=80, seq=0xFFFFF000, flags=flags, options=options, chksum=0x5A5A)
    inner = ETHER / NETWORKS[network]() / transport / Raw(payload(size))
    frame = built(OUTER / inner if through_tunnel else inner)
    frames = sent(frame, gso(frame, mss))
    assert frames == expected_segments(frame, mss)
    stream = b""
    for data in frames:
        piece = Ether(data)
        piece = piece[VXLAN].payload if through_tunnel else piece
        stream += bytes(piece[TCP].payload)
    assert stream == payload(size)


def test_a_large_super_frame_to_the_tunnel_goes_as_segments_of_the_path_p5():
    frame = built(OUTER / ETHER / v4() / TRANSPORTS["tcp"]() / Raw(payload(65000)))
    frames = sent(frame, gso(frame, 1398), mtu=1450)
    assert len(frames) == 47
    assert max(map(len, frames)) == OUTER_BYTES + 14 + 1438


def test_fin_and_psh_are_on_the_last_segment_and_cwr_on_the_first():
    frame = built(ETHER / v4() / TCP(flags="FPACE") / Raw(payload(300)))
    flags = [str(Ether(data)[TCP].flags) for data in sent(frame, gso(frame, 100))]
    assert flags == ["AEC", "AE", "FPAE"]


def test_tcp_segments_that_the_path_cannot_carry_are_made_smaller():
    frame = built(ETHER / v4() / TCP(seq=1000) / Raw(payload(3000)))
    frames = sent(frame, gso(frame, 1460), mtu=1000)
    assert frames == expected_segments(frame, 960)


def test_udp_segments_that_the_path_cannot_carry_are_fragmented():
    frame = built(ETHER / v4(id=9) / UDP(sport=4000, dport=53) / Raw(payload(3000)))
    frames = sent(frame, gso(frame, 1400), mtu=1000)
    assert frames == [
        piece for data in expected_segments(frame, 1400) for piece in expected_fragments(Ether(data), 1000)
    ]


def test_a_super_frame_of_senseless_segments_is_refused():
    frame = built(ETHER / v4() / TCP() / Raw(payload(9000)))
    tiny, wrong_type = gso(frame, 9000 // MAX_SEGMENTS), gso(frame, 1400)._replace(gso_type=GSO_TCPV6)
    for vnet in (tiny, wrong_type, gso(frame, 1400)._replace(gso_type=3), gso(frame, 1400)._replace(gso_size=0)):
        assert sent(frame, vnet) == []
        assert BATCH.packets["reason"][0] == Reason.DEVICE_ERROR


@settings(max_examples=60)
@given(st.sampled_from(["v4", "v6"]), st.sampled_from(["tcp", "udp"]), st.integers(0, 1400), st.booleans())
def test_p3_a_partial_checksum_is_finished_for_a_raw_sink(network, transport, size, through_tunnel):
    inner = ETHER / NETWORKS[network]() / TRANSPORTS[transport]() / Raw(payload(size))
    whole = built(OUTER / inner if through_tunnel else inner)
    vnet = gso(whole, 0)._replace(gso_type=0)
    data = bytearray(bytes(whole))
    at = vnet.csum_start + vnet.csum_offset
    data[at : at + 2] = pseudo_sum(bytes(whole)[vnet.csum_start :], whole).to_bytes(2, "big")
    assert sent(Ether(bytes(data)), vnet) == [bytes(whole)]
    assert BATCH.packets["vnet_flags"][0] == 0


def pseudo_sum(segment: bytes, frame: Packet) -> int:
    inner = frame[VXLAN].payload if VXLAN in frame else frame
    addresses = bytes(inner[IP])[12:20] if IP in inner else bytes(inner[IPv6])[8:40]
    protocol = int(inner[IP].proto if IP in inner else inner[IPv6].nh)
    total = protocol + len(segment)
    total += sum(int.from_bytes(addresses[i : i + 2], "big") for i in range(0, len(addresses), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_p3_a_udp_checksum_that_comes_out_as_zero_is_sent_as_ffff():
    frame = built(ETHER / v4() / UDP(sport=4000, dport=53) / Raw(b"\0\0"))
    frame[UDP].load = int(frame[UDP].chksum).to_bytes(2, "big")  # now everything sums to 0xffff
    data = bytearray(bytes(frame))
    data[40:42] = pseudo_sum(bytes(data)[34:], frame).to_bytes(2, "big")
    frames = sent(Ether(bytes(data)), Vnet(NEEDS_CSUM, csum_start=34, csum_offset=6))
    assert frames[0][40:42] == b"\xff\xff"


def test_a_checksum_field_outside_the_frame_is_refused():
    frame = built(ETHER / v4() / UDP() / Raw(b"hello"))
    assert sent(frame, Vnet(NEEDS_CSUM, csum_start=len(frame) - 7, csum_offset=6)) == []
    assert BATCH.packets["reason"][0] == Reason.DEVICE_ERROR


def expected_fragments(frame: Packet, limit: int) -> list[bytes]:
    """Cut a packet as RFC 791 says; options that are not copied become no-operations."""
    inner = frame[VXLAN].payload if VXLAN in frame else frame
    header = inner[IP].ihl * 4
    raw = bytes(inner[IP])
    body, room = raw[header:], limit - header & ~7
    pieces: list[bytes] = []
    for begin in range(0, len(body), room):
        packet = inner.copy()
        packet[IP].remove_payload()
        packet[IP].add_payload(Raw(body[begin : begin + room]))
        more = begin + room < len(body) or "MF" in inner[IP].flags
        packet[IP].flags = int(inner[IP].flags) & 2 | (1 if more else 0)
        packet[IP].frag = inner[IP].frag + begin // 8
        if begin:
            packet[IP].options = [
                option if option.copy_flag or bytes(option) == b"\0" else Raw(b"\1" * len(option))
                for option in inner[IP].options
            ]
        del packet[IP].len, packet[IP].chksum
        pieces.append(tunneled(packet, frame, len(pieces)))
    return pieces


@settings(max_examples=40)
@given(st.integers(0, 4000), st.integers(100, 1500), st.booleans(), st.booleans(), st.sampled_from([0, 1, 2]))
def test_a_packet_larger_than_the_path_is_fragmented(size, mtu, options, through_tunnel, flags):
    listed = [IPOption_RR(pointer=4, routers=["0.0.0.0"]), IPOption_Security(copy_flag=1)] if options else []
    inner = ETHER / v4(id=77, flags=flags, options=listed) / UDP(sport=4000, dport=53) / Raw(payload(size))
    frame = built(OUTER / inner if through_tunnel else inner)
    frames = sent(frame, mtu=mtu)
    fits = (frame[VXLAN].payload if through_tunnel else frame)[IP].len <= mtu
    assert frames == ([bytes(frame)] if fits else expected_fragments(frame, mtu))


def test_a_fragment_may_be_fragmented_again():
    frame = built(ETHER / v4(id=5, flags="MF", frag=100, proto=17) / Raw(payload(1400)))
    assert sent(frame, mtu=600) == expected_fragments(frame, 600)


def test_a_datagram_that_came_in_fragments_leaves_in_fragments_no_larger():
    frame = built(ETHER / v4(id=5) / UDP(sport=4000, dport=53) / Raw(payload(2500)))
    assert sent(frame, mtu=1500, max_fragment=576) == expected_fragments(frame, 576)
    assert sent(frame, max_fragment=1500) == expected_fragments(frame, 1500)
    assert sent(frame, mtu=1000, max_fragment=1500) == expected_fragments(frame, 1000)


def test_a_partial_checksum_is_finished_before_the_packet_is_fragmented():
    whole = built(ETHER / v4(id=5) / UDP(sport=4000, dport=53) / Raw(payload(2500)))
    data = bytearray(bytes(whole))
    data[40:42] = pseudo_sum(bytes(data)[34:], whole).to_bytes(2, "big")
    frames = sent(Ether(bytes(data)), Vnet(NEEDS_CSUM, csum_start=34, csum_offset=6), mtu=1500)
    assert frames == expected_fragments(whole, 1500)


def test_ethernet_padding_is_not_sent_in_fragments():
    whole = built(ETHER / v4(id=5) / UDP(sport=4000, dport=53) / Raw(payload(1000)))
    padded = Ether(bytes(whole) + b"\x5a" * 9)
    assert sent(padded, mtu=600) == expected_fragments(whole, 600)


def test_an_mtu_without_room_for_payload_is_an_error_not_a_loop():
    frame = built(ETHER / v4() / UDP() / Raw(payload(100)))
    assert sent(frame, mtu=27) == []
    assert BATCH.packets["reason"][0] == Reason.DEVICE_ERROR


def test_headers_that_do_not_fit_their_room_are_refused():
    frame = built(ETHER / v4() / UDP() / Raw(bytes(v4() / UDP() / Raw(payload(100))) * 20))
    load(BATCH, [bytes(frame)], 0)
    inner = 42 + 128 * 10
    assert sent(frame, mtu=68, l3=int(BATCH.packets["start"][0]) + inner) == []
    assert BATCH.packets["reason"][0] == Reason.DEVICE_ERROR


def test_ipv6_is_not_fragmented_by_routers():
    frame = built(ETHER / v6() / UDP() / Raw(payload(2000)))
    assert sent(frame, mtu=1280) == [bytes(frame)]


def test_the_outbox_refuses_what_it_cannot_hold():
    frame = built(ETHER / v4() / TCP() / Raw(payload(60000)))
    interfaces = np.zeros(2, INTERFACE)
    interfaces[1]["driver"], interfaces[1]["flags"] = Driver.MEMORY, UP
    count = load(BATCH, [bytes(frame)] * 5, iif=1, vnet=[gso(frame, 60)] * 5)
    rows = BATCH.packets[:count]
    rows["oif"], rows["l3"], rows["l4"] = 1, rows["start"] + 14, rows["start"] + 34
    assert transmit(BATCH.arrays, count, interfaces, IO.arrays) == 4
    assert rows["reason"].tolist() == [0, 0, 0, 0, Reason.OVERLOAD_TX_FULL]
    assert len(collect(BATCH, count, interfaces, IO)) == 4000


@settings(max_examples=150)
@given(st.binary(max_size=120), st.integers(0, 255), st.integers(0, 4000), st.data())
def test_any_bytes_and_any_record_are_sent_or_refused_without_reading_outside(frame, kind, size, draw):
    interfaces = np.zeros(2, INTERFACE)
    interfaces[1]["driver"], interfaces[1]["flags"] = Driver.MEMORY, UP
    flags, begin, offset = draw.draw(st.tuples(st.integers(0, 3), st.integers(0, 200), st.integers(0, 200)))
    load(BATCH, [frame], iif=1, vnet=[Vnet(flags, kind, 0, size, begin, offset)])
    record = BATCH.packets[:1]
    record["oif"], record["mtu"] = 1, draw.draw(st.integers(0, 200))
    record["l3"] = record["start"] + draw.draw(st.integers(0, 64))
    record["l4"] = record["l3"] + draw.draw(st.integers(0, 60))
    record["flags"] = draw.draw(st.sampled_from([0, ENCAPSULATED]))
    before = unload(BATCH, 0)
    transmit(BATCH.arrays, 1, interfaces, IO.arrays)
    assert record["verdict"][0] in (Verdict.ACCEPT, Verdict.DROP)
    assert len(before) == record["length"][0]
