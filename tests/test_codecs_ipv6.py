"""IPv6 headers against dpkt and scapy, and the walk over extension headers."""

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment

from dataplane.codecs import ipv6
from dataplane.jit import Array
from tests.strategies import (
    bytes8,
    damaged,
    dirty,
    garbage,
    halves,
    ipv6_addresses,
    ipv6_packets,
    make_extension,
    make_ipv6,
    offsets,
    place,
    taken,
    words16,
    words32,
)

labels = st.integers(0, 0xF_FFFF)


def addresses(data: Array, at: int) -> tuple[int, int]:
    source = int(ipv6.source_hi(data, at)) << 64 | int(ipv6.source_lo(data, at))
    return source, int(ipv6.destination_hi(data, at)) << 64 | int(ipv6.destination_lo(data, at))


def small_fields(data: Array, at: int) -> tuple[int, ...]:
    first = ipv6.traffic_class(data, at), ipv6.flow_label(data, at)
    return *first, ipv6.payload_length(data, at), ipv6.next_header(data, at), ipv6.hop_limit(data, at)


@given(ipv6_addresses(), ipv6_addresses(), bytes8, words16, bytes8, offsets)
def test_a_written_header_reads_back(source, destination, kind, length, hops, at):
    data = dirty(at + ipv6.HEADER)
    ipv6.emit(data, at, kind, length, hops)
    ipv6.set_addresses(data, at, *halves(source), *halves(destination))
    assert ipv6.valid(data, at, at + ipv6.HEADER + length)
    assert small_fields(data, at) == (0, 0, length, kind, hops)
    assert addresses(data, at) == (source, destination)


@given(ipv6_packets(), bytes8, labels, words16, bytes8, ipv6_addresses(), ipv6_addresses())
def test_setters_change_their_field_only(packet, traffic, label, length, hops, source, destination):
    data = place(packet.data, 3)
    kind = ipv6.next_header(data, 3)
    ipv6.set_traffic_class(data, 3, traffic)
    ipv6.set_flow_label(data, 3, label)
    ipv6.set_payload_length(data, 3, length)
    ipv6.set_hop_limit(data, 3, hops)
    ipv6.set_source(data, 3, *halves(source))
    ipv6.set_destination(data, 3, *halves(destination))
    fields = {"traffic_class": traffic, "flow_label": label, "hop_limit": hops}
    expected = bytearray(make_ipv6(source, destination, kind, packet.data[40:], **fields))
    expected[4:6] = length.to_bytes(2, "big")
    assert taken(data, 3) == expected


@given(ipv6_addresses(), ipv6_addresses(), bytes8, labels, bytes8, st.binary(max_size=20))
def test_dpkt_and_scapy_agree_on_a_header(source, destination, traffic, label, hops, payload):
    packet = make_ipv6(source, destination, 59, payload, traffic_class=traffic, flow_label=label, hop_limit=hops)
    data = place(packet)
    assert small_fields(data, 0) == (traffic, label, len(payload), 59, hops)
    packed = {"src": source.to_bytes(16, "big"), "dst": destination.to_bytes(16, "big")}
    one = dpkt.ip6.IP6(nxt=59, plen=len(payload), hlim=hops, **packed)
    one.fc, one.flow = traffic, label
    assert one.pack_hdr() == taken(data, 0, 40)
    two = IPv6(packet)
    assert (two.tc, two.fl, two.plen, two.nh, two.hlim) == small_fields(data, 0)


@given(ipv6_packets())
def test_a_packet_cut_anywhere_is_not_valid(packet):
    cuts = range(0, len(packet.data), 3)
    assert not any(ipv6.valid(place(packet.data[:length]), 0, length) for length in cuts)


@pytest.mark.parametrize("first", [0x00, 0x45, 0x50, 0x70, 0xF0])
def test_another_version_is_not_valid(first):
    data = place(bytes([first]) + make_ipv6(1, 2, 59, b"")[1:])
    assert not ipv6.valid(data, 0, len(data))


# --- extension headers -----------------------------------------------------------------------------------------------


@given(ipv6_packets(), offsets, st.binary(max_size=8))
def test_the_walk_finds_the_upper_layer(packet, at, padding):
    data = place(packet.data + padding, at)
    flags = ipv6.UPPER_FRAGMENT * packet.is_fragment | ipv6.UPPER_LATER * packet.is_later
    assert ipv6.upper(data, at, len(data)) == (at + packet.upper) << 16 | packet.protocol << 8 | flags


@given(ipv6_packets())
def test_the_walk_finds_the_fragment_header_and_what_names_it(packet):
    data = place(packet.data, 5)
    header, link = ipv6.fragment_at(data, 5, len(data)), ipv6.fragment_link(data, 5, len(data))
    if not packet.is_fragment:
        assert (header, link) == (-1, -1)
        return
    assert data[link] == ipv6.FRAGMENT
    seen = IPv6ExtHdrFragment(packet.data[header - 5 :])
    assert ipv6.fragment_offset(data, header) == seen.offset * 8
    assert ipv6.fragment_more(data, header) == bool(seen.m)
    assert ipv6.fragment_identification(data, header) == seen.id
    assert ipv6.fragment_next_header(data, header) == seen.nh


@given(bytes8, st.integers(0, 8191), st.booleans(), words32)
def test_a_written_fragment_header_reads_back(kind, units, more, identification):
    data = dirty(ipv6.FRAGMENT_HEADER)
    ipv6.emit_fragment(data, 0, kind, units * 8, more, identification)
    expected = IPv6ExtHdrFragment(nh=kind, offset=units, m=int(more), id=identification)
    assert taken(data) == bytes(expected)


def chain(*kinds: int, last: int = 59) -> bytes:
    """A packet of extension headers of these kinds, each as short as it can be."""
    following = [*kinds, last][1:]
    headers = [make_extension(kind, after, b"") for kind, after in zip(kinds, following, strict=True)]
    return make_ipv6(1 << 100, 2 << 100, kinds[0] if kinds else last, b"".join(headers))


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ((), True),
        ((0, 60, 43, 44, 51, 60), True),
        ((60,) * ipv6.MAX_EXTENSIONS, True),
        ((60,) * (ipv6.MAX_EXTENSIONS + 1), False),
        ((0, 0), False),
        ((60, 0), False),
        ((44, 44), False),
        ((44, 60, 44), False),
    ],
)
def test_the_walk_is_bounded_and_refuses_headers_out_of_place(kinds, found):
    data = place(chain(*kinds))
    assert ipv6.valid(data, 0, len(data))
    assert (ipv6.upper(data, 0, len(data)) >= 0) == found


def test_the_search_for_a_fragment_header_is_bounded():
    behind_all = chain(*[60] * (ipv6.MAX_EXTENSIONS + 1), 44)
    data = place(behind_all)
    assert ipv6.fragment_at(data, 0, len(data)) == -1
    assert ipv6.fragment_link(data, 0, len(data)) == -1


@pytest.mark.parametrize("kind", [0, 43, 44, 51, 60])
def test_an_extension_header_that_leaves_the_payload_is_malformed(kind):
    whole = chain(kind)
    for length in range(40, len(whole)):
        packet = bytearray(whole)
        packet[4:6] = (length - 40).to_bytes(2, "big")
        assert ipv6.upper(place(packet[:length]), 0, length) == -1
        # Nor may the walk go on into what stands behind the payload in the array.
        assert ipv6.upper(place(packet + bytes(40)), 0, len(packet) + 40) == -1


def test_an_authentication_header_without_room_for_its_number_is_malformed():
    data = place(make_ipv6(1 << 100, 2 << 100, 51, b"\x3b\0" + bytes(20)))
    assert ipv6.upper(data, 0, len(data)) == -1


@given(st.one_of(garbage, damaged(ipv6_packets().map(lambda packet: packet.data))), offsets)
def test_any_bytes_stay_inside(packet, at):
    data = place(packet, at)
    end = len(data)
    if ipv6.valid(data, at, end):
        small_fields(data, at), addresses(data, at)
        found, header = ipv6.upper(data, at, end), ipv6.fragment_at(data, at, end)
        assert found == -1 or at + ipv6.HEADER <= found >> 16 <= end
        assert (header < 0) == (ipv6.fragment_link(data, at, end) < 0)
        if header >= 0:
            ipv6.fragment_identification(data, header)
