"""ICMPv6 and neighbor discovery against dpkt and scapy."""

import ipaddress

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet6

from dataplane.codecs import icmpv6, ipv6
from dataplane.jit import Array
from tests.strategies import (
    bytes8,
    damaged,
    dirty,
    garbage,
    halves,
    ipv6_addresses,
    ipv6_transport_packets,
    macs,
    make_icmp,
    make_ipv6,
    offsets,
    payloads,
    place,
    pseudo_bytes,
    taken,
    words16,
    words32,
)

SOURCE = 0xFE80 << 112 | 0xECEE_EEFF_FEEE_EEEE
DESTINATION = 0x2001_0DB8 << 96 | 7
ERRORS = [icmpv6.UNREACHABLE, icmpv6.PACKET_TOO_BIG, icmpv6.TIME_EXCEEDED, icmpv6.PARAMETER_PROBLEM]
MAC = 0xEEEE_EEEE_EEEE


def message(kind: int, code: int, rest: int, payload: bytes) -> bytes:
    """A message between ``SOURCE`` and ``DESTINATION``."""
    return make_icmp(kind, code, rest, payload, pseudo=pseudo_bytes(SOURCE, DESTINATION, 58, 8 + len(payload)))


def behind_ip(at: int, body: bytes) -> Array:
    """An IPv6 header at ``at`` and a message at ``at + 40`` that ends the array."""
    return place(make_ipv6(SOURCE, DESTINATION, 58, body, hop_limit=255), at)


def with_room(at: int, payload: bytes) -> Array:
    return behind_ip(at, bytes(dirty(icmpv6.HEADER)) + payload)


@given(words16, words16, payloads, offsets)
def test_a_written_echo_reads_back(identifier, sequence, payload, at):
    data, l4 = with_room(at, payload), at + ipv6.HEADER
    icmpv6.emit_echo(data, l4, icmpv6.ECHO_REQUEST, identifier, sequence, len(payload))
    assert taken(data, l4) == message(128, 0, identifier << 16 | sequence, payload)
    assert icmpv6.valid(data, l4, len(data))
    assert icmpv6.checksum_ok(data, l4, len(data), at)
    read = (icmpv6.type(data, l4), icmpv6.code(data, l4), icmpv6.identifier(data, l4), icmpv6.sequence(data, l4))
    assert read == (128, 0, identifier, sequence)


@given(words16, words16, payloads)
def test_dpkt_and_scapy_write_the_same_echo(identifier, sequence, payload):
    data = with_room(0, payload)
    icmpv6.emit_echo(data, 40, icmpv6.ECHO_REQUEST, identifier, sequence, len(payload))
    packet = make_ipv6(SOURCE, DESTINATION, 58, b"")
    header = inet6.IPv6(src=inet6.IPv6(packet).src, dst=inet6.IPv6(packet).dst)
    assert taken(data, 40) == bytes(header / inet6.ICMPv6EchoRequest(id=identifier, seq=sequence, data=payload))[40:]
    # dpkt leaves an ICMPv6 checksum to its IP6 and computes it only from zero.
    echo = dpkt.icmp6.ICMP6.Echo(id=identifier, seq=sequence, data=payload)
    body = dpkt.icmp6.ICMP6(type=128, data=echo)
    addresses = {"src": SOURCE.to_bytes(16, "big"), "dst": DESTINATION.to_bytes(16, "big")}
    theirs = dpkt.ip6.IP6(nxt=58, hlim=255, plen=8 + len(payload), data=body, **addresses)
    theirs.extension_hdrs = {}
    assert taken(data, 40) == bytes(theirs)[40:]


@given(st.sampled_from(ERRORS), bytes8, words32, ipv6_transport_packets(), offsets)
def test_a_written_error_covers_its_quote(kind, code, rest, quote, at):
    data, l4 = with_room(at, quote), at + ipv6.HEADER
    icmpv6.emit_error(data, l4, kind, code, rest, len(quote))
    assert taken(data, l4) == message(kind, code, rest, quote)
    assert icmpv6.mtu(data, l4) == rest


@given(words32, payloads, offsets)
def test_a_reply_made_in_place_is_right_after_the_addresses_are_exchanged(rest, payload, at):
    data, l4 = behind_ip(at, message(128, 0, rest, payload)), at + ipv6.HEADER
    icmpv6.emit_echo_reply(data, l4)
    ipv6.set_addresses(data, at, *halves(DESTINATION), *halves(SOURCE))
    assert taken(data, l4) == message(129, 0, rest, payload)
    assert icmpv6.checksum_ok(data, l4, len(data), at)


@given(words32, words16, payloads)
def test_another_identifier_equals_computing_anew(rest, identifier, payload):
    data = behind_ip(0, message(128, 0, rest, payload))
    icmpv6.set_identifier(data, 40, identifier)
    assert taken(data, 40) == message(128, 0, identifier << 16 | rest & 0xFFFF, payload)


@given(words32, payloads, st.integers(8, 111), st.integers(1, 255))
def test_damage_to_message_or_address_is_noticed(rest, payload, place_of, flip):
    data = behind_ip(0, message(128, 0, rest, payload))
    data[8 + (place_of - 8) % (len(data) - 8)] ^= flip
    assert not icmpv6.checksum_ok(data, 40, len(data), 0)


def test_the_known_types_that_quote_a_packet_are_errors():
    assert [kind for kind in range(256) if icmpv6.is_error(kind)] == ERRORS


# --- neighbor discovery ----------------------------------------------------------------------------------------------


@given(ipv6_addresses(), macs, offsets)
def test_scapy_reads_a_written_solicitation(target, mac, at):
    data, l4 = behind_ip(at, bytes(dirty(32))), at + ipv6.HEADER
    assert icmpv6.emit_solicitation(data, l4, *halves(target), mac) == 32
    assert icmpv6.checksum_ok(data, l4, len(data), at)
    assert (icmpv6.target_hi(data, l4), icmpv6.target_lo(data, l4)) == halves(target)
    assert icmpv6.link_layer_option(data, l4, len(data), icmpv6.SOURCE_LINK_LAYER) == mac
    assert icmpv6.link_layer_option(data, l4, len(data), icmpv6.TARGET_LINK_LAYER) == -1
    seen = inet6.ICMPv6ND_NS(taken(data, l4))
    option = seen[inet6.ICMPv6NDOptSrcLLAddr]
    assert (seen.type, seen.code, seen.res) == (135, 0, 0)
    assert int(ipaddress.IPv6Address(seen.tgt)) == target
    assert (int(option.lladdr.replace(":", ""), 16), option.type, option.len) == (mac, 1, 1)


@given(ipv6_addresses())
def test_a_solicitation_for_duplicate_address_detection_has_no_option(target):
    data = behind_ip(0, bytes(dirty(24)))
    assert icmpv6.emit_solicitation(data, 40, *halves(target), -1) == 24
    assert icmpv6.checksum_ok(data, 40, len(data), 0)
    assert icmpv6.options_valid(data, 40, len(data))
    assert icmpv6.link_layer_option(data, 40, len(data), icmpv6.SOURCE_LINK_LAYER) == -1


FLAGS = [icmpv6.ROUTER, icmpv6.SOLICITED, icmpv6.OVERRIDE]


@given(ipv6_addresses(), st.sets(st.sampled_from(FLAGS)), macs, offsets)
def test_scapy_reads_a_written_advertisement(target, flags, mac, at):
    data, l4 = behind_ip(at, bytes(dirty(32))), at + ipv6.HEADER
    assert icmpv6.emit_advertisement(data, l4, *halves(target), sum(flags), mac) == 32
    assert icmpv6.checksum_ok(data, l4, len(data), at)
    assert icmpv6.flags(data, l4) == sum(flags)
    assert icmpv6.link_layer_option(data, l4, len(data), icmpv6.TARGET_LINK_LAYER) == mac
    seen = inet6.ICMPv6ND_NA(taken(data, l4))
    assert {flag for flag, bit in zip(FLAGS, [seen.R, seen.S, seen.O], strict=True) if bit} == flags
    assert int(ipaddress.IPv6Address(seen.tgt)) == target
    assert int(seen[inet6.ICMPv6NDOptDstLLAddr].lladdr.replace(":", ""), 16) == mac


SLLA = "0101eeeeeeeeeeee"
OPTIONS = {
    "none": ("", True, -1),
    "one": (SLLA, True, MAC),
    "the first of two": (SLLA + "0101020000000001", True, MAC),
    "behind a longer one": ("0e02" + "00" * 14 + SLLA, True, MAC),
    "another kind": ("0201eeeeeeeeeeee", True, -1),
    "of a length that Ethernet has not": ("0102eeeeeeeeeeee" + "00" * 8, True, -1),
    "length zero": ("0100eeeeeeeeeeee", False, -1),
    "length zero behind it": (SLLA + "0e00000000000000", False, -1),
    "length zero before it": ("0e00000000000000" + SLLA, False, -1),
    "longer than the message": ("0102eeeeeeeeeeee", False, -1),
    "longer behind it": (SLLA + "0e02000000000000", False, -1),
    "cut": (SLLA[:-2], False, -1),
    "a byte too many": (SLLA + "00", False, -1),
    "more than a discovery message has": (SLLA * (icmpv6.MAX_OPTIONS + 1), False, -1),
}


@pytest.mark.parametrize(("options", "sound", "mac"), OPTIONS.values(), ids=OPTIONS)
def test_one_bad_option_spoils_the_message(options, sound, mac):
    data = behind_ip(0, message(135, 0, 0, bytes(16) + bytes.fromhex(options)))
    assert icmpv6.valid(data, 40, len(data))
    assert icmpv6.options_valid(data, 40, len(data)) == sound
    assert icmpv6.link_layer_option(data, 40, len(data), icmpv6.SOURCE_LINK_LAYER) == mac


@pytest.mark.parametrize(("kind", "least"), [(1, 8), (128, 8), (133, 8), (135, 24), (136, 24)])
def test_a_message_shorter_than_its_header_is_not_valid(kind, least):
    whole = message(kind, 0, 0, bytes(20))
    accepted = [length for length in range(len(whole)) if icmpv6.valid(place(whole[:length]), 0, length)]
    assert accepted == list(range(least, len(whole)))


messages = st.builds(message, st.sampled_from([1, 2, 128, 135, 136]), bytes8, words32, st.binary(max_size=70))


@given(st.one_of(garbage, damaged(messages)), st.sampled_from([1, 2]))
def test_any_bytes_stay_inside(body, kind):
    data = behind_ip(0, body)
    if not icmpv6.valid(data, 40, len(data)):
        return
    icmpv6.code(data, 40), icmpv6.checksum(data, 40), icmpv6.identifier(data, 40), icmpv6.sequence(data, 40)
    icmpv6.checksum_ok(data, 40, len(data), 0)
    if icmpv6.type(data, 40) in (135, 136):
        icmpv6.target_hi(data, 40), icmpv6.target_lo(data, 40), icmpv6.flags(data, 40)
        found = icmpv6.link_layer_option(data, 40, len(data), kind)
        assert found == -1 or icmpv6.options_valid(data, 40, len(data))
