"""nat: ICMP errors about translated flows, inside and out, beside errors that scapy builds about what had come in.

    client ── router m1 ── [ this node ] ── router m2 ── backend or server

An error about a packet of one direction travels in the other one; it can come from the end of the way or from any
router on it.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
)
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane.batch import PACKET
from dataplane.stages.nat import nat
from dataplane.stages.parse import parse
from dataplane.tables.flow import ORIGINAL, REPLY
from dataplane.verdict import Verdict
from tests.strategies import (
    damaged,
    garbage,
    ipv4_packets,
    ipv4_transport_packets,
    ipv6_packets,
    ipv6_transport_packets,
    place,
)
from tests.translation import Translator, frame_of, packet, record_sides, way

TRANSLATOR = Translator()  # the arena is 40 MB: one is enough
ROUTER = {4: "203.0.113.99", 6: "2001:db8:99::1"}
ERRORS = {
    4: [(3, 0), (3, 1), (3, 3), (3, 4), (4, 0), (11, 0), (11, 1), (12, 0)],
    6: [(1, 0), (1, 4), (2, 0), (3, 0), (4, 1)],
}
_V6 = {1: ICMPv6DestUnreach, 2: ICMPv6PacketTooBig, 3: ICMPv6TimeExceeded, 4: ICMPv6ParamProblem}


@pytest.fixture
def translator():
    TRANSLATOR.rows = 0
    return TRANSLATOR


def error(src, dst, kind, code, quote):
    """An ICMP error with these bytes for a quote."""
    if ":" in src:
        return IPv6(src=src, dst=dst) / _V6[kind](code=code) / Raw(quote)
    header = ICMP(type=kind, code=code)
    if (kind, code) == (3, 4):
        header.nexthopmtu = 1280
    return IP(src=src, dst=dst, id=5) / header / Raw(quote)


FLOWS = {
    "masquerade": [
        (way("udp", "10.244.1.10:4000", "198.51.100.7:53"), way("udp", "198.51.100.7:53", "192.0.2.11:32768")),
        (way("tcp", "10.244.1.10:4000", "198.51.100.7:80"), way("tcp", "198.51.100.7:80", "192.0.2.11:4001")),
        (way("icmp", "10.244.1.10:7", "198.51.100.7"), way("icmp", "198.51.100.7", "192.0.2.11:9")),
        (way("other", "10.244.1.10", "198.51.100.7"), way("other", "198.51.100.7", "192.0.2.11")),
        (way("udp", "[fd00::10]:4000", "[2001:db8::7]:53"), way("udp", "[2001:db8::7]:53", "[2001:db8::11]:9")),
        (way("tcp", "[fd00::10]:4000", "[2001:db8::7]:80"), way("tcp", "[2001:db8::7]:80", "[2001:db8::11]:9")),
        (way("icmp6", "[fd00::10]:7", "[2001:db8::7]"), way("icmp6", "[2001:db8::7]", "[2001:db8::11]:9")),
    ],
    "service": [
        (way("udp", "10.244.1.10:4000", "10.96.0.10:53"), way("udp", "10.244.2.10:5353", "10.244.1.10:4000")),
        (way("tcp", "198.51.100.7:4000", "10.96.0.1:443"), way("tcp", "10.244.2.10:6443", "198.51.100.7:4000")),
        (way("tcp", "[fd00::10]:4000", "[fd00:96::1]:443"), way("tcp", "[fd00:2::10]:6443", "[fd00::10]:4000")),
    ],
    "both": [
        (way("udp", "198.51.100.7:4000", "192.0.2.11:30053"), way("udp", "10.244.1.10:53", "192.0.2.11:61000")),
        (way("tcp", "10.244.1.10:4000", "10.96.0.10:53"), way("tcp", "10.244.1.10:53", "192.0.2.11:4000")),
    ],
}
CASES = [
    pytest.param(name, ways, id=f"{name} {ways[0].src}-{ways[0].protocol}") for name in FLOWS for ways in FLOWS[name]
]


def both_ends(ways, direction, size):
    """The quote as the error's sender saw the packet, and as the packet had come in, cut to this size."""
    came = packet(ways[1 - direction], b"some payload that nobody quotes whole", reply=direction == ORIGINAL)
    went = packet(ways[direction].inverse, b"some payload that nobody quotes whole", reply=direction == ORIGINAL)
    return bytes(went)[:size], bytes(came)[:size]


def check(translator, ways, direction, router, size, kinds):
    """Send an error through and compare it with one that scapy builds about the packet that had come in."""
    row = translator.flow(*ways)
    family = ways[0].family
    went, came = both_ends(ways, direction, size)
    for kind, code in kinds:
        src = ROUTER[family] if router else ways[direction].src.address
        outcome = translator.one(
            frame_of(error(src, ways[direction].dst.address, kind, code, went)), 2 * row + direction, related=True
        )
        new = ways[1 - direction].inverse
        translated = new.src.address != ways[direction].src.address
        expected = frame_of(
            error(new.src.address if translated or not router else src, new.dst.address, kind, code, came)
        )
        assert outcome.verdict == Verdict.ACCEPT
        assert outcome.frame == bytes(expected)
        assert record_sides(outcome.record) == record_sides(translator.parsed(outcome.frame))


@pytest.mark.parametrize("router", [False, True], ids=["from the end", "from a router"])
@pytest.mark.parametrize("direction", [ORIGINAL, REPLY], ids=["about a reply", "about a request"])
@pytest.mark.parametrize(("name", "ways"), CASES)
def test_an_error_becomes_one_about_what_had_come_in(translator, name, ways, direction, router):
    check(translator, ways, direction, router, 10_000, ERRORS[ways[0].family])


@pytest.mark.parametrize("direction", [ORIGINAL, REPLY], ids=["about a reply", "about a request"])
@pytest.mark.parametrize(("name", "ways"), CASES)
def test_a_quote_may_end_anywhere_behind_eight_bytes(translator, name, ways, direction):
    """TCP's checksum is beyond them: it is there whole or it stays as it is, of which the quote shows nothing."""
    header = 20 if ways[0].family == 4 else 40
    for size in (8, 9, 11, 12, 15, 16, 20, 21, 24, 25, 30):
        translator.rows = 0
        check(translator, ways, direction, True, header + size, ERRORS[ways[0].family][:1])


# Who an error seems to come from, and whom it reaches: only a hidden side's routers are hidden.
MASQUERADE, SERVICE = FLOWS["masquerade"][0], FLOWS["service"][0]
HOPS = [
    ("masquerade, about a request", MASQUERADE, REPLY, "203.0.113.99", "203.0.113.99", "10.244.1.10"),
    ("masquerade, about a reply", MASQUERADE, ORIGINAL, "203.0.113.99", "192.0.2.11", "198.51.100.7"),
    ("service, about a request", SERVICE, REPLY, "203.0.113.99", "10.96.0.10", "10.244.1.10"),
    ("service, about a reply", SERVICE, ORIGINAL, "203.0.113.99", "203.0.113.99", "10.244.2.10"),
]


@pytest.mark.parametrize(
    ("ways", "direction", "src", "new_src", "new_dst"), [c[1:] for c in HOPS], ids=[c[0] for c in HOPS]
)
def test_a_router_shows_its_address_unless_its_side_is_translated(translator, ways, direction, src, new_src, new_dst):
    row = translator.flow(*ways)
    went, _ = both_ends(ways, direction, 28)
    frame = frame_of(error(src, ways[direction].dst.address, 11, 0, went))
    outcome = translator.one(frame, 2 * row + direction, related=True)
    network = Ether(outcome.frame)[IP]
    assert (network.src, network.dst) == (new_src, new_dst)


def test_a_quoted_datagram_without_a_checksum_stays_without(translator):
    row = translator.flow(*MASQUERADE)
    quotes = []
    for of in (MASQUERADE[REPLY].inverse, MASQUERADE[ORIGINAL]):
        bare = packet(of)
        bare[UDP].chksum = 0
        quotes.append(bytes(bare))
    outcome = translator.one(
        frame_of(error("198.51.100.7", "192.0.2.11", 3, 3, quotes[0])), 2 * row + REPLY, related=True
    )
    assert outcome.frame == bytes(frame_of(error("198.51.100.7", "10.244.1.10", 3, 3, quotes[1])))


def test_options_and_extension_headers_of_a_quote_are_stepped_over(translator):
    row = translator.flow(*MASQUERADE)
    went, came = (
        bytes(packet(of, options=[IPOption_NOP()] * 4)) for of in (MASQUERADE[REPLY].inverse, MASQUERADE[ORIGINAL])
    )
    outcome = translator.one(frame_of(error("198.51.100.7", "192.0.2.11", 3, 3, went)), 2 * row + REPLY, related=True)
    assert outcome.frame == bytes(frame_of(error("198.51.100.7", "10.244.1.10", 3, 3, came)))
    ways = next(ways for ways in FLOWS["masquerade"] if ways[0].family == 6 and ways[0].protocol == 17)
    row = translator.flow(*ways)
    went, came = (
        bytes(IPv6(src=of.src.address, dst=of.dst.address) / IPv6ExtHdrDestOpt() / packet(of).payload)
        for of in (ways[REPLY].inverse, ways[ORIGINAL])
    )
    frame = frame_of(error("2001:db8::7", "2001:db8::11", 1, 4, went))
    outcome = translator.one(frame, 2 * row + REPLY, related=True)
    assert outcome.frame == bytes(frame_of(error("2001:db8::7", "fd00::10", 1, 4, came)))


def test_an_error_with_a_wrong_checksum_stays_wrong(translator):
    row = translator.flow(*MASQUERADE)
    went, _ = both_ends(MASQUERADE, REPLY, 60)
    sound = bytes(frame_of(error("198.51.100.7", "192.0.2.11", 3, 3, went)))
    damaged = sound[:-1] + bytes([sound[-1] ^ 1])
    outcome, expected = (translator.one(frame, 2 * row + REPLY, related=True).frame for frame in (damaged, sound))
    assert outcome == expected[:-1] + bytes([expected[-1] ^ 1])


def test_a_later_fragment_in_a_quote_is_not_touched(translator):
    row = translator.flow(*MASQUERADE)
    later = bytes(IP(src="192.0.2.11", dst="198.51.100.7", proto=17, frag=10) / Raw(b"middle of a datagram"))
    frame = bytes(frame_of(error("198.51.100.7", "192.0.2.11", 3, 3, later)))
    outcome = translator.one(frame, 2 * row + REPLY, related=True)
    assert outcome.frame == frame


# --- quotes that nobody should send ----------------------------------------------------------------------------------

hostile = st.one_of(
    damaged(ipv4_packets()),
    damaged(ipv4_transport_packets()),
    damaged(ipv6_packets().map(lambda made: made.data)),
    damaged(ipv6_transport_packets()),
    garbage,
)


@given(quote=hostile, family=st.sampled_from([4, 6]))
@settings(max_examples=300)
def test_no_quote_makes_nat_read_or_write_outside_the_packet(quote, family):
    """The packet is the end of its array: with bounds checks, a step behind it raises."""
    translator = TRANSLATOR
    translator.rows = 0
    ways = next(ways for ways in FLOWS["masquerade"] if ways[0].family == family)
    half = 2 * translator.flow(*ways) + REPLY
    src, dst = ways[REPLY].src.address, ways[REPLY].dst.address
    frame = bytes(frame_of(error(src, dst, 3 if family == 4 else 1, 0, quote)))
    data, packets = place(frame), np.zeros(1, PACKET)
    packets["length"] = len(frame)
    parse((data, packets), 1, translator.world.tables.arrays, 0)
    translator.mark(packets[0], half, related=True)
    nat((data, packets), 1, translator.tables, 0)
    after = data.tobytes()
    header = 14 + (20 if family == 4 else 40)
    assert after[:14] == frame[:14]
    assert after[header : header + 2] == frame[header : header + 2]
    assert after[header + 4 : header + 8] == frame[header + 4 : header + 8]
    assert packets[0]["verdict"] == Verdict.ACCEPT
