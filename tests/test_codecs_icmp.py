"""ICMP against dpkt and scapy."""

import dpkt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP

from dataplane.codecs import icmp
from dataplane.jit import Array
from tests.strategies import (
    bytes8,
    damaged,
    dirty,
    garbage,
    ipv4_transport_packets,
    make_icmp,
    offsets,
    payloads,
    place,
    taken,
    words16,
    words32,
)

ERRORS = [icmp.UNREACHABLE, icmp.SOURCE_QUENCH, icmp.REDIRECT, icmp.TIME_EXCEEDED, icmp.PARAMETER_PROBLEM]


def with_room(at: int, payload: bytes) -> Array:
    """A dirty header at ``at``, and a payload behind it that ends the array."""
    return place(bytes(dirty(icmp.HEADER)) + payload, at)


def same_message(one: bytes, two: bytes) -> bool:
    """Whether two messages are equal; in a checksum 0 and 0xffff are the same number."""
    return one[:2] + one[2:4].replace(b"\xff\xff", b"\0\0") + one[4:] == (
        two[:2] + two[2:4].replace(b"\xff\xff", b"\0\0") + two[4:]
    )


@given(words16, words16, payloads, offsets)
def test_a_written_echo_reads_back(identifier, sequence, payload, at):
    data = with_room(at, payload)
    icmp.emit_echo(data, at, icmp.ECHO_REQUEST, identifier, sequence, len(payload))
    assert taken(data, at) == make_icmp(8, 0, identifier << 16 | sequence, payload)
    assert icmp.valid(data, at, len(data))
    assert icmp.checksum_ok(data, at, len(data))
    read = (icmp.type(data, at), icmp.code(data, at), icmp.identifier(data, at), icmp.sequence(data, at))
    assert read == (icmp.ECHO_REQUEST, 0, identifier, sequence)


@given(words16, words16, payloads)
def test_dpkt_and_scapy_write_the_same_echo(identifier, sequence, payload):
    data = with_room(0, payload)
    icmp.emit_echo(data, 0, icmp.ECHO_REQUEST, identifier, sequence, len(payload))
    echo = dpkt.icmp.ICMP.Echo(id=identifier, seq=sequence, data=payload)
    assert taken(data) == bytes(dpkt.icmp.ICMP(type=8, data=echo))
    assert taken(data) == bytes(ICMP(type=8, id=identifier, seq=sequence) / payload)


@given(st.sampled_from(ERRORS), bytes8, words32, ipv4_transport_packets(), offsets)
def test_a_written_error_covers_its_quote(kind, code, rest, quote, at):
    data = with_room(at, quote)
    icmp.emit_error(data, at, kind, code, rest, len(quote))
    assert taken(data, at) == make_icmp(kind, code, rest, quote)
    assert icmp.checksum_ok(data, at, len(data))


@given(words16, ipv4_transport_packets())
def test_scapy_reads_the_mtu_of_fragmentation_needed(mtu, quote):
    data = with_room(0, quote)
    icmp.emit_error(data, 0, icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, mtu, len(quote))
    seen = ICMP(taken(data))
    assert (seen.type, seen.code, seen.nexthopmtu) == (3, 4, mtu)
    assert icmp.mtu(data, 0) == mtu


@given(words32, payloads, offsets)
@example(0, b"", 0)
@example(0, bytes(9), 1)
@example(0xFFFF, b"", 0)
def test_a_reply_made_in_place_equals_one_computed_anew(rest, payload, at):
    data = place(make_icmp(8, 0, rest, payload), at)
    icmp.emit_echo_reply(data, at)
    assert icmp.checksum_ok(data, at, len(data))
    assert same_message(taken(data, at), make_icmp(0, 0, rest, payload))


@given(st.sampled_from([0, 8]), words32, words16, payloads)
@example(0, 0x1234_0000, 0, b"")
def test_another_identifier_equals_computing_anew(kind, rest, identifier, payload):
    data = place(make_icmp(kind, 0, rest, payload))
    icmp.set_identifier(data, 0, identifier)
    assert icmp.checksum_ok(data, 0, len(data))
    assert same_message(taken(data), make_icmp(kind, 0, identifier << 16 | rest & 0xFFFF, payload))


@given(words32, payloads, st.integers(0, 71), st.integers(1, 255))
def test_damage_is_noticed(rest, payload, place_of, flip):
    data = place(make_icmp(8, 0, rest, payload))
    data[place_of % len(data)] ^= flip
    assert not icmp.checksum_ok(data, 0, len(data))


def test_the_types_that_quote_a_packet_are_errors():
    assert [kind for kind in range(256) if icmp.is_error(kind)] == ERRORS


@pytest.mark.parametrize("length", range(8))
def test_a_message_shorter_than_its_header_is_not_valid(length):
    assert not icmp.valid(place(make_icmp(8)[:length]), 0, length)


@given(st.one_of(garbage, damaged(st.builds(make_icmp, bytes8, bytes8, words32, payloads))), offsets)
def test_any_bytes_stay_inside(message, at):
    data = place(message, at)
    if icmp.valid(data, at, len(data)):
        icmp.type(data, at), icmp.code(data, at), icmp.checksum(data, at)
        icmp.identifier(data, at), icmp.sequence(data, at), icmp.mtu(data, at)
        icmp.checksum_ok(data, at, len(data))
