"""TCP headers and options against dpkt and scapy."""

import struct

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP

from dataplane.codecs import checksum, tcp
from dataplane.jit import Array
from tests.strategies import (
    bytes8,
    damaged,
    dirty,
    garbage,
    halves,
    make_ipv4,
    make_tcp,
    mapped,
    offsets,
    payloads,
    place,
    ports,
    taken,
    tcp_options,
    tcp_segments,
    words16,
    words32,
)

SOURCE, DESTINATION = 0x0AF4_0007, 0xCB00_7109


def pseudo(length: int) -> int:
    return checksum.pseudo_header(*halves(mapped(SOURCE)), *halves(mapped(DESTINATION)), tcp.PROTOCOL, length)


def fields(data: Array, at: int) -> tuple[int, ...]:
    both = tcp.source_port(data, at), tcp.destination_port(data, at)
    numbers = tcp.sequence(data, at), tcp.acknowledgment(data, at)
    return *both, *numbers, tcp.header_length(data, at), tcp.flags(data, at), tcp.window(data, at)


@given(ports, ports, words32, words32, bytes8, payloads, offsets)
def test_a_written_segment_reads_back(sport, dport, seq, ack, flags, payload, at):
    data = place(bytes(dirty(tcp.HEADER)) + payload, at)
    tcp.emit(data, at, sport << 16 | dport, seq, ack, flags)
    length = tcp.HEADER + len(payload)
    tcp.finish(data, at, length, pseudo(length))
    assert taken(data, at) == make_tcp(SOURCE, DESTINATION, sport, dport, payload, seq=seq, ack=ack, flags=flags)
    assert tcp.valid(data, at, len(data))
    assert tcp.checksum_ok(data, at, length, pseudo(length))
    assert fields(data, at) == (sport, dport, seq, ack, 20, flags, 0)


@given(tcp_segments())
def test_dpkt_and_scapy_read_the_same_fields(segment):
    data = place(segment)
    one, two = dpkt.tcp.TCP(segment), TCP(segment)
    read = (*fields(data, 0), tcp.checksum(data, 0))
    # dpkt 1.9.8 counts flags as one byte and leaves the reserved bits to the offset, as we do.
    assert read == (one.sport, one.dport, one.seq, one.ack, one.off * 4, one.flags & 0xFF, one.win, one.sum)
    flags = int(two.flags) & 0xFF
    assert read == (two.sport, two.dport, two.seq, two.ack, two.dataofs * 4, flags, two.window, two.chksum)


@given(ports, ports, words32, words32, bytes8, payloads)
def test_dpkt_and_scapy_write_the_same_segment(sport, dport, seq, ack, flags, payload):
    data = place(bytes(dirty(tcp.HEADER)) + payload)
    tcp.emit(data, 0, sport << 16 | dport, seq, ack, flags)
    tcp.finish(data, 0, len(data), pseudo(len(data)))
    packet = make_ipv4(SOURCE, DESTINATION, 6, taken(data))
    header = TCP(sport=sport, dport=dport, seq=seq, ack=ack, flags=flags, window=0)
    assert packet[20:] == bytes(IP(src="10.244.0.7", dst="203.0.113.9") / header / payload)[20:]
    theirs = dpkt.tcp.TCP(sport=sport, dport=dport, seq=seq, ack=ack, flags=flags, win=0, data=payload)
    addresses = {"src": SOURCE.to_bytes(4, "big"), "dst": DESTINATION.to_bytes(4, "big")}
    assert packet[20:] == bytes(dpkt.ip.IP(p=6, len=len(packet), data=theirs, **addresses))[20:]


@given(tcp_segments(), ports, ports, words16, offsets)
def test_setters_leave_the_checksum_that_computing_anew_gives(segment, sport, dport, window, at):
    data = place(segment, at)
    tcp.set_source_port(data, at, sport)
    tcp.set_destination_port(data, at, dport)
    tcp.set_window(data, at, window)
    assert fields(data, at)[:2] == (sport, dport)
    assert tcp.window(data, at) == window
    value = tcp.checksum(data, at)
    tcp.finish(data, at, len(segment), pseudo(len(segment)))
    assert tcp.checksum(data, at) == value


@given(tcp_segments(), st.integers(0, 200), st.integers(1, 255))
def test_damage_is_noticed(segment, place_of, flip):
    data = place(segment)
    data[place_of % len(data)] ^= flip
    assert not tcp.checksum_ok(data, 0, len(data), pseudo(len(data)))


@pytest.mark.parametrize(("units", "accepted"), [(0, False), (4, False), (5, True), (6, True), (7, False), (15, False)])
def test_the_data_offset_must_hold_the_header_and_fit(units, accepted):
    segment = bytearray(make_tcp(SOURCE, DESTINATION, 1, 2, options=bytes(4)))
    segment[12] = units << 4
    assert tcp.valid(place(segment), 0, len(segment)) == accepted


@given(tcp_segments())
def test_a_header_cut_anywhere_is_not_valid(segment):
    header = segment[: segment[12] >> 4 << 2]
    assert not any(tcp.valid(place(header[:length]), 0, length) for length in range(len(header)))


# --- options ---------------------------------------------------------------------------------------------------------


def read_options(data: Array, at: int) -> dict[int, object]:
    end = len(data)
    return {
        2: tcp.mss(data, at, end),
        3: tcp.window_scale(data, at, end),
        4: tcp.sack_permitted(data, at, end),
        8: (tcp.timestamp_value(data, at, end), tcp.timestamp_echo(data, at, end)),
    }


@given(tcp_options(), payloads, offsets)
def test_every_option_is_found_with_its_value(options, payload, at):
    pairs, encoded = options
    data = place(make_tcp(SOURCE, DESTINATION, 1, 2, payload, options=encoded), at)
    expected = {2: -1, 3: -1, 4: False, 8: (-1, -1)}
    for kind, value in pairs:
        offset = tcp.option(data, at, len(data), kind)
        assert taken(data, offset, offset + len(value) + 2) == bytes([kind, len(value) + 2]) + value
        if kind == 2:
            expected[2] = int.from_bytes(value, "big")
        elif kind == 3:
            expected[3] = min(value[0], 14)
        elif kind == 4:
            expected[4] = True
        elif kind == 8:
            expected[8] = struct.unpack("!II", value)
    assert read_options(data, at) == expected


@given(tcp_options())
def test_dpkt_finds_the_same_options(options):
    pairs, encoded = options
    data = place(make_tcp(SOURCE, DESTINATION, 1, 2, options=encoded))
    theirs = dpkt.tcp.parse_opts(encoded)
    for kind, value in [option for option in theirs if option and option[0] > 1]:
        offset = tcp.option(data, 0, len(data), kind)
        assert taken(data, offset + 2, offset + 2 + len(value)) == value
    assert sorted(kind for kind, _ in pairs) == sorted(kind for kind, _ in theirs if kind > 1)


@pytest.mark.parametrize(
    ("options", "mss"),
    [
        ("020405b4", 1460),
        ("01010101020405b4", 1460),
        ("0303070100000000020405b4", -1),  # behind End of Option List
        ("0203050000000000", -1),  # MSS of a wrong length
        ("fd00000002040500", -1),  # a length of 0 would never end
        ("fd010000020405b4", -1),
        ("fd09000002040500", -1),  # leaves the header
        ("0101010202020202", -1),
        ("01010102", -1),  # a kind without a length
        ("01010204", -1),
        ("010204b4", -1),
    ],
)
def test_a_malformed_option_ends_the_walk(options, mss):
    data = place(make_tcp(SOURCE, DESTINATION, 1, 2, bytes.fromhex("020405b4"), options=bytes.fromhex(options)))
    assert tcp.mss(data, 0, len(data)) == mss


SACK_TABLE = """
# ACK       right edges          highest
  1000      1400                 1400
  1000      1400,1900            1900
  1000      1900,1400            1900
  1000      900                  none
  1000      900,1100             1100
  ffffff00  00000010             00000010
  ffffff00  fffffff0,00000010    00000010
"""


@pytest.mark.parametrize("row", [row.split() for row in SACK_TABLE.splitlines() if row[:1] == " "], ids="-".join)
def test_the_highest_selective_acknowledgment_follows_the_sequence(row):
    ack, edges, highest = row
    rights = [int(edge, 16) for edge in edges.split(",")]
    blocks = b"".join(struct.pack("!II", (right - 16) & 0xFFFF_FFFF, right) for right in rights)
    options = b"\1\1" + bytes([5, 2 + len(blocks)]) + blocks
    data = place(make_tcp(SOURCE, DESTINATION, 1, 2, ack=int(ack, 16), options=options))
    assert tcp.sack_end(data, 0, len(data)) == (-1 if highest == "none" else int(highest, 16))


def test_without_selective_acknowledgments_there_is_no_highest():
    data = place(make_tcp(SOURCE, DESTINATION, 1, 2))
    assert tcp.sack_end(data, 0, len(data)) == -1


@given(st.one_of(garbage, damaged(tcp_segments())), bytes8, offsets)
@example(bytes(12) + b"\xf0" + bytes(7) + b"\x05\x29" + b"\x01" * 38, 5, 0)
@example(bytes(12) + b"\xf0" + bytes(7) + b"\x01" * 39 + b"\x05", 5, 0)
def test_any_bytes_stay_inside(segment, kind, at):
    data = place(segment, at)
    if tcp.valid(data, at, len(data)):
        fields(data, at), read_options(data, at), tcp.sack_end(data, at, len(data))
        assert tcp.option(data, at, len(data), kind) < at + tcp.header_length(data, at)
