"""quote: the tuple of what an ICMP error quotes, inverted; and what is no quote of any flow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
)
from scapy.packet import Raw

from dataplane.batch import PACKET
from dataplane.stages.parse import parse
from dataplane.stages.quote import quoted_tuple, request_type
from dataplane.tables.flow import TUPLE
from tests import strategies
from tests.strategies import place
from tests.translation import frame_of, record_sides
from tests.world import World

WORLD = World()
A, B = "192.0.2.11", "198.51.100.7"
A6, B6 = "2001:db8::11", "2001:db8::7"


def parsed(network):
    """A packet at the end of its array, and its record."""
    frame = bytes(frame_of(network))
    data, packets = place(frame), np.zeros(1, PACKET)
    packets["length"] = len(frame)
    parse((data, packets), 1, WORLD.tables.arrays, 0)
    return data, packets[0]


def quoted(quote):
    """What the quote's flow is found by, None if nothing."""
    quote = bytes(quote)
    v6 = quote[:1] >= b"\x60"
    header = IPv6(src="2001:db8:99::1", dst=A6) / ICMPv6DestUnreach() if v6 else IP(src=B, dst=A) / ICMP(type=3)
    data, packet = parsed(header / Raw(quote))
    out = np.zeros(1, TUPLE)
    return (record_sides(out[0]), int(out[0]["protocol"])) if quoted_tuple(data, packet, out[0]) else None


QUOTES = [
    ("udp", IP(src=A, dst=B) / UDP(sport=4000, dport=53), ((B, 53, A, 4000), 17)),
    ("tcp", IP(src=A, dst=B) / TCP(sport=4000, dport=80), ((B, 80, A, 4000), 6)),
    ("eight bytes of tcp", bytes(IP(src=A, dst=B) / TCP(sport=4000, dport=80))[:28], ((B, 80, A, 4000), 6)),
    ("options", IP(src=A, dst=B, options=[IPOption_NOP()] * 4) / UDP(sport=4000, dport=53), ((B, 53, A, 4000), 17)),
    ("a first fragment", IP(src=A, dst=B, flags="MF") / UDP(sport=4000, dport=53), ((B, 53, A, 4000), 17)),
    ("an echo request", IP(src=A, dst=B) / ICMP(id=7), ((B, 8 << 8, A, 7), 1)),
    ("an echo reply", IP(src=A, dst=B) / ICMP(type=0, id=7), ((B, 7, A, 8 << 8), 1)),
    ("a timestamp", IP(src=A, dst=B) / ICMP(type=13, id=7), ((B, 13 << 8, A, 7), 1)),
    ("another protocol", IP(src=A, dst=B, proto=47) / Raw(b""), ((B, 0, A, 0), 47)),
    ("udp over ipv6", IPv6(src=A6, dst=B6) / UDP(sport=4000, dport=53), ((B6, 53, A6, 4000), 17)),
    (
        "behind an extension header",
        IPv6(src=A6, dst=B6) / IPv6ExtHdrDestOpt() / UDP(sport=4000, dport=53),
        ((B6, 53, A6, 4000), 17),
    ),
    ("an ipv6 echo request", IPv6(src=A6, dst=B6) / ICMPv6EchoRequest(id=7), ((B6, 128 << 8, A6, 7), 58)),
    ("an ipv6 echo reply", IPv6(src=A6, dst=B6) / ICMPv6EchoReply(id=7), ((B6, 7, A6, 128 << 8), 58)),
    ("nothing", b"", None),
    ("half a header", bytes(IP(src=A, dst=B) / UDP())[:19], None),
    ("seven bytes of udp", bytes(IP(src=A, dst=B) / UDP())[:27], None),
    ("options cut off", bytes(IP(src=A, dst=B, options=[IPOption_NOP()] * 4) / UDP())[:22], None),
    ("a header shorter than itself", b"\x44" + bytes(IP(src=A, dst=B) / UDP())[1:], None),
    ("neither version", b"\x55" + bytes(IP(src=A, dst=B) / UDP())[1:], None),
    ("a later fragment", IP(src=A, dst=B, frag=1) / UDP(), None),
    ("a later ipv6 fragment", IPv6(src=A6, dst=B6) / IPv6ExtHdrFragment(offset=1) / UDP(), None),
    ("half an ipv6 header", bytes(IPv6(src=A6, dst=B6) / UDP())[:39], None),
    ("an extension header cut off", bytes(IPv6(src=A6, dst=B6) / IPv6ExtHdrDestOpt() / UDP())[:45], None),
    ("an error about an error", IP(src=A, dst=B) / ICMP(type=3) / IP(src=B, dst=A) / UDP(), None),
    ("an ipv6 error about an error", IPv6(src=A6, dst=B6) / ICMPv6DestUnreach() / Raw(bytes(48)), None),
    ("neighbor discovery", IPv6(src=A6, dst=B6) / ICMPv6ND_NS(), None),
]


@pytest.mark.parametrize(("name", "quote", "expected"), QUOTES)
def test_a_quote_names_the_flow_of_its_packet(name, quote, expected):
    assert quoted(quote) == expected


def test_a_quote_of_the_other_family_names_no_flow():
    for header, quote in (
        (IP(src=B, dst=A) / ICMP(type=3), IPv6(src=A6, dst=B6) / UDP()),
        (IPv6(src=B6, dst=A6) / ICMPv6DestUnreach(), IP(src=A, dst=B) / UDP() / Raw(bytes(20))),
    ):
        data, packet = parsed(header / Raw(bytes(quote)))
        assert not quoted_tuple(data, packet, np.zeros(1, TUPLE)[0])


@given(
    st.one_of(
        strategies.ipv4_transport_packets(),
        strategies.ipv6_transport_packets(),
        strategies.ipv4_packets(),
        strategies.ipv6_packets().map(lambda made: made.data),
    )
)
@settings(max_examples=200)
def test_what_is_found_is_what_parse_finds_in_the_packet_itself_inverted(quote):
    found = quoted(quote)
    if found is None:
        return
    data = place(bytes(12) + (b"\x08\x00" if quote[0] >> 4 == 4 else b"\x86\xdd") + quote)
    packets = np.zeros(1, PACKET)
    packets["length"] = len(data)
    parse((data, packets), 1, WORLD.tables.arrays, 0)
    src, sport, dst, dport = record_sides(packets[0])
    assert found == ((dst, dport, src, sport), int(packets[0]["protocol"]))


@given(st.one_of(st.binary(max_size=100), strategies.damaged(strategies.ipv4_packets()), strategies.garbage))
@settings(max_examples=300)
def test_no_quote_is_read_behind_its_end(quote):
    """The packet is the end of its array: with bounds checks, a step behind it raises."""
    quoted(quote)


@pytest.mark.parametrize("kind", range(256))
def test_every_icmp_type_belongs_to_a_request_or_to_none(kind):
    v4 = {0: 8, 8: 8, 13: 13, 14: 13, 15: 15, 16: 15, 17: 17, 18: 17}
    assert request_type(1, kind) == v4.get(kind, -1)
    assert request_type(58, kind) == {128: 128, 129: 128}.get(kind, -1)
