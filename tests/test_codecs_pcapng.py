"""Capture files against scapy and dpkt, every classic variant, and damage."""

import contextlib
import io
import struct
from typing import Any

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import RawPcapNgReader

from dataplane.codecs import pcapng
from dataplane.codecs.pcapng import Capture, PcapError

times = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
packet_lists = st.lists(st.tuples(st.integers(0, 1), times, st.binary(max_size=70), texts), max_size=6)
INTERFACES = ("cali1234", "eth0")


def written(packets) -> bytes:
    file = pcapng.section_header() + b"".join(pcapng.interface_description(name) for name in INTERFACES)
    return file + b"".join(pcapng.enhanced_packet(*packet) for packet in packets)


@given(packet_lists)
def test_a_written_file_reads_back(packets):
    expected = [Capture(time, number, 1, data, len(data), text) for number, time, data, text in packets]
    assert list(pcapng.read(written(packets))) == expected


@given(packet_lists)
def test_scapy_reads_times_interfaces_and_comments(packets):
    scapy_reader: Any = RawPcapNgReader  # its annotations know neither streams nor its own metadata
    with scapy_reader(io.BytesIO(written(packets))) as reader:
        for number, time, data, text in packets:
            seen, about = reader._read_packet()
            assert seen == data
            assert (about.tshigh << 32 | about.tslow, about.tsresol) == (time, 10**9)
            assert (about.linktype, about.wirelen) == (1, len(data))
            assert about.ifname == INTERFACES[number].encode()
            assert about.comments == ([text.encode()] if text else None)


@given(st.lists(st.tuples(st.just(0), times, st.binary(min_size=1, max_size=70), texts), max_size=6))
def test_dpkt_reads_the_same_bytes(packets):
    reader = dpkt.pcapng.Reader(io.BytesIO(written(packets)))
    assert [data for _, data in reader] == [data for _, _, data, _ in packets]


def test_a_cut_packet_keeps_its_length_on_the_wire():
    file = written([]) + pcapng.enhanced_packet(0, 1, b"abc", length=1500)
    assert list(pcapng.read(file)) == [Capture(1, 0, 1, b"abc", 1500)]


def test_a_long_comment_is_cut_between_characters():
    file = written([]) + pcapng.enhanced_packet(0, 1, b"", "é" * 40000)
    assert [len(packet.comment) for packet in pcapng.read(file)] == [0xFFFF // 2]


# --- classic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("magic", "unit_ns"), [(pcapng.MICROSECOND_MAGIC, 1000), (pcapng.NANOSECOND_MAGIC, 1)])
def test_a_classic_file_is_read_in_both_orders_and_units(order, magic, unit_ns):
    file = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, 0x1000_0001)
    file += struct.pack(order + "IIII", 7, 5, 3, 60) + b"abc" + struct.pack(order + "IIII", 0xFFFF_FFFF, 0, 0, 0)
    first, second = pcapng.read(file)
    assert first == Capture(7_000_000_000 + 5 * unit_ns, 0, 1, b"abc", 60)
    assert second == Capture(0xFFFF_FFFF * 10**9, 0, 1, b"", 0)


@given(st.lists(st.binary(min_size=1, max_size=70), max_size=5), st.booleans())
def test_what_dpkt_writes_is_read(packets, nano):
    file = io.BytesIO()
    writer = dpkt.pcap.Writer(file, nano=nano)
    for packet in packets:
        writer.writepkt(packet, ts=5)
    assert [(packet.data, packet.time_ns) for packet in pcapng.read(file.getvalue())] == [
        (packet, 5 * 10**9) for packet in packets
    ]


# --- pcapng of others ------------------------------------------------------------------------------------------------


def block(order: str, kind: int, body: bytes) -> bytes:
    total = len(body) + 12
    return struct.pack(order + "II", kind, total) + body + struct.pack(order + "I", total)


def section(order: str = ">", major: int = 1) -> bytes:
    return block(order, pcapng.SECTION_HEADER, struct.pack(order + "IHHq", pcapng.BYTE_ORDER_MAGIC, major, 2, -1))


def interface(order: str = ">", options: bytes = b"", snaplen: int = 0, linktype: int = 1) -> bytes:
    return block(order, pcapng.INTERFACE_DESCRIPTION, struct.pack(order + "HHI", linktype, 0, snaplen) + options)


def packet(order: str = ">", time: int = 0, data: bytes = b"abcd", options: bytes = b"", number: int = 0) -> bytes:
    head = struct.pack(order + "IIIII", number, time >> 32, time & 0xFFFF_FFFF, len(data), len(data))
    return block(order, pcapng.ENHANCED_PACKET, head + data + bytes(-len(data) % 4) + options)


def option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


@pytest.mark.parametrize(
    ("options", "ticks", "time_ns"),
    [
        (b"", 1_500_000, 1_500_000_000),  # microseconds unless said otherwise
        (option(">", 9, b"\x03"), 1500, 1_500_000_000),
        (option(">", 9, b"\x0c"), 1_500_999, 1500),
        (option(">", 9, b"\x8a"), 1536, 1_500_000_000),
        (option(">", 9, b"\x09") + option(">", 14, struct.pack(">q", 100)), 5, 100_000_000_005),
        (option(">", 9, b"\x09") + option(">", 14, struct.pack(">q", -1)), 5, -999_999_995),
        (option(">", 2, b"eth0") + option(">", 0, b"") + option(">", 9, b"\x00"), 5, 5000),
    ],
)
def test_times_follow_the_resolution_and_offset_of_their_interface(options, ticks, time_ns):
    file = section() + interface(options=options) + packet(time=ticks)
    assert [read.time_ns for read in pcapng.read(file)] == [time_ns]


def test_each_section_has_its_own_byte_order_and_interfaces():
    file = b""
    for order, linktype in (("<", 1), (">", 101), ("<", 113)):
        file += section(order) + interface(order, linktype=linktype) + packet(order)
    assert [read.linktype for read in pcapng.read(file)] == [1, 101, 113]


def test_simple_packets_are_cut_at_the_snap_length():
    file = section() + interface(snaplen=6) + block(">", pcapng.SIMPLE_PACKET, struct.pack(">I", 60) + b"abcdef\0\0")
    assert list(pcapng.read(file)) == [Capture(0, 0, 1, b"abcdef", 60)]


def test_unknown_blocks_and_options_are_passed_over():
    options = option(">", 0x8001, b"xyz") + option(">", 1, b"one") + option(">", 1, b"two") + option(">", 0, b"")
    file = section() + block(">", 0xBAD, b"1234") + interface() + packet(options=options)
    assert [read.comment for read in pcapng.read(file)] == ["one\ntwo"]


# --- damage ----------------------------------------------------------------------------------------------------------

HEAD = section() + interface()  # 28 + 20 bytes
CLASSIC = struct.pack("<IHHiIII", pcapng.MICROSECOND_MAGIC, 2, 4, 0, 0, 65535, 1)
DAMAGE = {
    "empty": (b"", 0, "shorter than any"),
    "no capture": (b"GIF89a", 0, "magic 47494638"),
    "classic header cut": (CLASSIC[:20], 0, "cut to 20"),
    "classic version": (CLASSIC[:4] + b"\3" + CLASSIC[5:], 4, "version 3.4"),
    "classic packet header cut": (CLASSIC + bytes(15), 24, "packet header cut off"),
    "classic packet cut": (CLASSIC + struct.pack("<IIII", 0, 0, 4, 4) + b"abc", 32, "4 bytes cut to 3"),
    "classic packet huge": (CLASSIC + struct.pack("<IIII", 0, 0, 1 << 30, 4), 32, "packet of 1073741824"),
    "byte order": (section()[:8] + bytes(4) + section()[12:], 8, "byte-order magic 00000000"),
    "version": (section(major=2), 12, "version 2"),
    "section too short": (block(">", pcapng.SECTION_HEADER, bytes.fromhex("1a2b3c4d")), 4, "too short"),
    "block header cut": (HEAD + bytes(8), 48, "block header cut off"),
    "block of length 0": (HEAD + bytes(12), 52, "block length 0"),
    "block length not in words": (HEAD + struct.pack(">III", 6, 13, 13), 52, "block length 13"),
    "block huge": (HEAD + struct.pack(">III", 6, 1 << 30, 13), 52, "block length 1073741824"),
    "block cut": (HEAD + packet()[:-4], 52, "cut to 32"),
    "lengths differ": (HEAD + packet()[:-4] + struct.pack(">I", 40), 80, "36 is repeated as 40"),
    "interface too short": (section() + block(">", 1, bytes(4)), 36, "too short"),
    "interface unknown": (HEAD + packet(number=1), 56, "interface 1 is not described"),
    "no interface": (section() + block(">", 3, bytes(4)), 36, "interface 0 is not described"),
    "simple too short": (HEAD + block(">", 3, b""), 56, "too short"),
    "simple cut": (HEAD + block(">", 3, struct.pack(">I", 9)), 56, "9 bytes in a block with room for 0"),
    "packet too short": (HEAD + block(">", 6, bytes(16)), 56, "too short"),
    "packet leaves its block": (
        HEAD + block(">", 6, struct.pack(">IIIII", 0, 0, 0, 5, 5) + bytes(4)),
        68,
        "room for 4",
    ),
    "option leaves its block": (HEAD + packet(options=struct.pack(">HH", 1, 9)), 80, "option 1 of 9 bytes"),
    "resolution": (section() + interface(options=option(">", 9, b"12")), 44, "if_tsresol of 2"),
    "time offset": (section() + interface(options=option(">", 14, b"12")), 44, "if_tsoffset of 2"),
}


@pytest.mark.parametrize(("file", "offset", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_reported_with_its_offset(file, offset, problem):
    with pytest.raises(PcapError) as caught:
        list(pcapng.read(file))
    assert caught.value.offset == offset
    assert problem in caught.value.problem
    assert str(caught.value).startswith(f"offset {offset}: ")


def test_the_packets_before_the_damage_are_read():
    packets = pcapng.read(HEAD + packet(data=b"one!") + bytes(12))
    assert next(packets).data == b"one!"
    with pytest.raises(PcapError):
        next(packets)


SOUND = HEAD + packet(options=option(">", 1, b"text") + option(">", 0, b""))


@given(
    st.sampled_from([SOUND, CLASSIC + struct.pack("<IIII", 0, 0, 4, 4) + b"abcd"]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.integers(0, 200),
)
def test_a_damaged_file_raises_nothing_else(file, changes, length):
    damaged = bytearray(file)
    for place_of, value in changes:
        damaged[place_of % len(damaged)] = value
    with contextlib.suppress(PcapError):
        list(pcapng.read(memoryview(damaged)[:length]))
