"""IPv4 headers against dpkt and scapy; setters against computing anew; options."""

import struct
from collections.abc import Iterator

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.inet import IP

from dataplane.codecs import ipv4
from dataplane.jit import Array
from tests.strategies import (
    bytes8,
    damaged,
    dirty,
    garbage,
    ipv4_addresses,
    ipv4_fragments,
    ipv4_options,
    ipv4_packets,
    make_ipv4,
    naive_checksum,
    offsets,
    place,
    taken,
    words16,
    words32,
)

ACCESSORS = (
    ipv4.header_length,
    ipv4.tos,
    ipv4.total_length,
    ipv4.identification,
    ipv4.fragment_word,
    ipv4.ttl,
    ipv4.protocol,
    ipv4.checksum,
    ipv4.source,
    ipv4.destination,
)


def fields(data: Array, at: int = 0) -> tuple[int, ...]:
    return tuple(accessor(data, at) for accessor in ACCESSORS)


@given(ipv4_addresses(), ipv4_addresses(), bytes8, words16.filter(lambda length: length >= 20), offsets)
def test_a_written_header_reads_back(source, destination, protocol, length, at):
    data = dirty(at + ipv4.HEADER)
    ipv4.emit(data, at, source, destination, protocol, length)
    assert ipv4.checksum_ok(data, at)
    assert ipv4.valid(data, at, at + length)
    value = ipv4.checksum(data, at)
    assert fields(data, at) == (20, 0, length, 0, 0, 64, protocol, value, source, destination)


@given(ipv4_addresses(), bytes8, bytes8, words16, words16, offsets)
def test_delivery_fields_are_written_under_a_fresh_checksum(address, tos, ttl, identification, fragment, at):
    data = dirty(at + ipv4.HEADER)
    ipv4.emit(data, at, address, address, 17, 20)
    ipv4.set_delivery(data, at, tos, ttl, identification, fragment)
    options = {"tos": tos, "ttl": ttl, "identification": identification, "fragment": fragment}
    assert taken(data, at) == make_ipv4(address, address, 17, b"", **options)


@given(ipv4_packets(), offsets)
def test_dpkt_reads_the_same_fields(packet, at):
    data = place(packet, at)
    assert ipv4.valid(data, at, len(data))
    assert ipv4.checksum_ok(data, at)
    names = [name for name, *_ in dpkt.ip.IP.__hdr__]
    seen = dict(zip(names, struct.unpack("!BBHHHBBH4s4s", packet[:20]), strict=True))
    addresses = (int.from_bytes(seen["src"], "big"), int.from_bytes(seen["dst"], "big"))
    words = (seen["tos"], seen["len"], seen["id"], seen["_flags_offset"], seen["ttl"], seen["p"], seen["sum"])
    assert fields(data, at) == ((seen["_v_hl"] & 15) * 4, *words, *addresses)


@given(ipv4_packets(protocol=st.just(253)))
def test_dpkt_and_scapy_parse_what_we_accept(packet):
    data = place(packet)
    _, tos, length, identification, word, ttl, protocol, value, *_ = fields(data)
    one, two = dpkt.ip.IP(packet), IP(packet)
    seen = (one.tos, one.len, one.id, one._flags_offset, one.ttl, one.p, one.sum)
    assert seen == (tos, length, identification, word, ttl, protocol, value)
    assert (two.tos, two.len, two.id, two.ttl, two.proto, two.chksum) == (*seen[:3], *seen[4:])
    assert int(two.flags) << 13 | two.frag == word


@given(ipv4_addresses(), ipv4_addresses(), st.binary(max_size=30))
def test_dpkt_and_scapy_write_the_same_header(source, destination, payload):
    data = dirty(20)
    ipv4.emit(data, 0, source, destination, 253, 20 + len(payload))
    scapys = IP(src=dotted(source), dst=dotted(destination), id=0, ttl=64, proto=253) / payload
    assert taken(data) + payload == bytes(scapys)
    packed = {"src": source.to_bytes(4, "big"), "dst": destination.to_bytes(4, "big")}
    assert taken(data) + payload == bytes(dpkt.ip.IP(p=253, len=20 + len(payload), data=payload, **packed))


def dotted(address: int) -> str:
    return ".".join(str(byte) for byte in address.to_bytes(4, "big"))


SETTERS = [
    (ipv4.set_tos, ipv4.tos, bytes8),
    (ipv4.set_total_length, ipv4.total_length, words16),
    (ipv4.set_identification, ipv4.identification, words16),
    (ipv4.set_fragment_word, ipv4.fragment_word, words16),
    (ipv4.set_ttl, ipv4.ttl, bytes8),
    (ipv4.set_protocol, ipv4.protocol, bytes8),
    (ipv4.set_source, ipv4.source, words32),
    (ipv4.set_destination, ipv4.destination, words32),
]


@pytest.mark.parametrize(("setter", "getter", "values"), SETTERS, ids=lambda item: getattr(item, "__name__", ""))
@given(content=st.data())
def test_a_setter_leaves_the_checksum_that_computing_anew_gives(setter, getter, values, content):
    packet, value = content.draw(ipv4_packets()), content.draw(values)
    data = place(packet, 1)
    before = dict(zip(ACCESSORS, fields(data, 1), strict=True))
    setter(data, 1, value)
    length = ipv4.header_length(data, 1)
    header = bytearray(taken(data, 1, 1 + length))
    header[10:12] = b"\0\0"
    expected = before | {getter: value, ipv4.checksum: naive_checksum(header)}
    assert dict(zip(ACCESSORS, fields(data, 1), strict=True)) == expected
    assert taken(data, 1 + length) == packet[length:]


@given(ipv4_packets(), st.integers(1, 0xFFFE), bytes8)
def test_forwarding_does_not_launder_a_wrong_checksum(packet, error, ttl):
    data = place(packet)
    wrong = (ipv4.checksum(data, 0) + error) % 0xFFFF
    data[10:12] = wrong >> 8, wrong & 0xFF
    ipv4.set_ttl(data, 0, ttl)
    assert not ipv4.checksum_ok(data, 0)


@pytest.mark.parametrize("first", [0x00, 0x35, 0x44, 0x40, 0x55, 0x65, 0xF5])
def test_another_version_or_a_header_too_short_is_not_valid(first):
    data = place(bytes([first]) + make_ipv4(1, 2, 6, b"")[1:])
    assert not ipv4.valid(data, 0, len(data))


@given(ipv4_packets())
def test_a_packet_cut_anywhere_is_not_valid(packet):
    assert not any(ipv4.valid(place(packet[:length]), 0, length) for length in range(len(packet)))


@given(ipv4_packets(), st.integers(1, 20))
def test_link_padding_behind_the_packet_is_allowed(packet, padding):
    data = place(packet + bytes(padding))
    assert ipv4.valid(data, 0, len(data))
    assert ipv4.total_length(data, 0) == len(packet)


def test_a_total_length_inside_the_header_is_not_valid():
    packet = bytearray(make_ipv4(1, 2, 6, b"", options=b"\1\1\1\1"))
    packet[3] = 23
    assert not ipv4.valid(place(packet), 0, len(packet))


@given(st.one_of(garbage, damaged(ipv4_packets())), offsets)
@example(b"\x4f" * 60, 0)
def test_any_bytes_stay_inside(packet, at):
    data = place(packet, at)
    if ipv4.valid(data, at, len(data)):
        fields(data, at), ipv4.checksum_ok(data, at), ipv4.options_valid(data, at)
        room = dirty(len(data) + ipv4.MAX_HEADER)
        room[: len(data)] = data
        assert 20 <= ipv4.fragment_header(room, len(data), at) <= ipv4.header_length(data, at)


# --- options and fragments -------------------------------------------------------------------------------------------


@given(ipv4_options())
def test_whole_options_are_valid(options):
    data = place(make_ipv4(1, 2, 6, b"", options=options))
    assert ipv4.options_valid(data, 0)


@pytest.mark.parametrize(
    ("options", "sound"),
    [
        ("00000000", True),
        ("00ff0000", True),  # behind End of Option List anything goes
        ("01010101", True),
        ("94040000", True),
        ("01940300", True),
        ("94000000", False),
        ("94010000", False),
        ("94050000", False),
        ("01010194", False),
        ("8308040a000001000bff0000", False),
    ],
)
def test_an_option_must_end_inside_the_header(options, sound):
    packet = place(make_ipv4(1, 2, 6, b"\xff" * 8, options=bytes.fromhex(options)))
    assert ipv4.options_valid(packet, 0) == sound


def walk(options: bytes) -> Iterator[bytes]:
    """The options before End of Option List, one by one."""
    while options and options[0]:
        length = 1 if options[0] == 1 else options[1]
        yield options[:length]
        options = options[length:]


@given(ipv4_packets(), offsets)
def test_a_later_fragment_carries_only_the_options_to_be_copied(packet, at):
    data = dirty(len(packet) + at + ipv4.MAX_HEADER)
    data[at : at + len(packet)] = list(packet)
    to = at + len(packet)
    length = ipv4.fragment_header(data, to, at)
    options = packet[20 : ipv4.header_length(data, at)]
    copied = b"".join(option for option in walk(options) if option[0] & 0x80)
    assert taken(data, to + 20, to + length) == copied + bytes(-len(copied) % 4)
    assert ipv4.checksum_ok(data, to)
    assert ipv4.header_length(data, to) == length
    assert fields(data, to)[1:7] == fields(data, at)[1:7]
    assert taken(data, to + length) == bytes([0xA5]) * (ipv4.MAX_HEADER - length)


@given(ipv4_fragments())
def test_the_fragments_of_a_datagram_say_where_they_belong(example_of):
    fragments, payload = example_of
    whole = bytearray(len(payload))
    for fragment in fragments:
        data = place(fragment)
        word = ipv4.fragment_word(data, 0)
        start = (word & ipv4.OFFSET_MASK) * 8
        whole[start : start + len(fragment) - 20] = fragment[20:]
        assert ipv4.is_fragment(data, 0)
        assert bool(word & ipv4.MF) == (start + len(fragment) - 20 < len(payload))
    assert whole == payload
