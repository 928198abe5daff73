"""Ethernet headers against dpkt and scapy."""

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.l2 import Dot1Q, Ether

from dataplane.codecs import ethernet
from tests.strategies import dirty, garbage, macs, make_ethernet, offsets, payloads, place, taken, words16

VLAN, QINQ = ethernet.ETHERTYPE_VLAN, ethernet.ETHERTYPE_QINQ
plain_types = words16.filter(lambda word: word not in (VLAN, QINQ))
tag_lists = st.lists(st.tuples(st.sampled_from([VLAN, QINQ]), words16), max_size=2)


@given(macs, macs, plain_types, offsets)
def test_a_written_header_reads_back(destination, source, kind, at):
    data = dirty(at + ethernet.HEADER)
    ethernet.emit(data, at, destination, source, kind)
    assert taken(data, at) == make_ethernet(destination, source, kind, b"")
    assert ethernet.valid(data, at, len(data))
    assert ethernet.destination(data, at) == destination
    assert ethernet.source(data, at) == source
    assert ethernet.ethertype(data, at) == kind
    assert ethernet.payload(data, at) == at + ethernet.HEADER
    assert ethernet.vlan(data, at) == -1


@given(macs, macs, st.integers(0, 0xFFF), plain_types, offsets)
def test_a_written_tag_reads_back(destination, source, vid, kind, at):
    data = dirty(at + ethernet.HEADER + ethernet.TAG)
    ethernet.emit_tagged(data, at, destination, source, vid, kind)
    assert taken(data, at) == make_ethernet(destination, source, kind, b"", [(VLAN, vid)])
    assert (ethernet.vlan(data, at), ethernet.ethertype(data, at)) == (vid, kind)


@given(macs, macs, plain_types, tag_lists, payloads, offsets)
def test_tags_are_stepped_over(destination, source, kind, tags, payload, at):
    data = place(make_ethernet(destination, source, kind, payload, tags), at)
    assert ethernet.valid(data, at, len(data))
    assert ethernet.ethertype(data, at) == kind
    assert taken(data, ethernet.payload(data, at)) == payload
    assert ethernet.vlan(data, at) == (tags[0][1] & 0xFFF if tags else -1)


@given(macs, macs, plain_types.filter(lambda kind: kind > 1500), tag_lists)
def test_scapy_reads_the_same_header(destination, source, kind, tags):
    frame = make_ethernet(destination, source, kind, bytes(46), tags)
    data = place(frame)
    seen = Ether(frame)
    assert int(seen.dst.replace(":", ""), 16) == ethernet.destination(data, 0)
    assert int(seen.src.replace(":", ""), 16) == ethernet.source(data, 0)
    layers = [layer for layer in seen.iterpayloads() if isinstance(layer, (Ether, Dot1Q))]
    assert [layer.vlan for layer in layers[1:]] == [word & 0xFFF for _, word in tags]
    assert layers[-1].type == ethernet.ethertype(data, 0)


@given(macs, macs, plain_types)
def test_dpkt_writes_the_same_header(destination, source, kind):
    data = dirty(ethernet.HEADER)
    ethernet.emit(data, 0, destination, source, kind)
    # Only the header: dpkt's parser of what follows raises IndexError on some types.
    theirs = dpkt.ethernet.Ethernet(dst=destination.to_bytes(6, "big"), src=source.to_bytes(6, "big"), type=kind)
    assert taken(data) == theirs.pack_hdr()


def test_a_third_tag_is_left_as_the_ethertype():
    data = place(make_ethernet(1, 2, 0x0800, b"", [(QINQ, 1), (VLAN, 2), (VLAN, 3)]))
    assert ethernet.valid(data, 0, len(data))
    assert ethernet.ethertype(data, 0) == VLAN


@pytest.mark.parametrize("tags", [[], [(VLAN, 5)], [(QINQ, 5), (VLAN, 6)]])
def test_a_header_cut_anywhere_is_not_valid(tags):
    frame = make_ethernet(1, 2, 0x0800, b"", tags)
    assert not any(ethernet.valid(place(frame[:length]), 0, length) for length in range(len(frame)))


@given(garbage, offsets)
def test_any_bytes_stay_inside(frame, at):
    data = place(frame, at)
    if ethernet.valid(data, at, len(data)):
        ethernet.destination(data, at), ethernet.source(data, at), ethernet.vlan(data, at)
        assert ethernet.ethertype(data, at) <= 0xFFFF
        assert ethernet.payload(data, at) <= len(data)


def test_groups_are_told_from_stations():
    assert ethernet.is_group(ethernet.BROADCAST)
    assert ethernet.is_group(0x3333_0000_0001)
    assert not ethernet.is_group(0xEEEE_EEEE_EEEE)
