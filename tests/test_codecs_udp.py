"""UDP against dpkt and scapy, and the rules of its optional checksum."""

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP

from dataplane.codecs import checksum, udp
from dataplane.jit import Array
from tests.strategies import (
    damaged,
    dirty,
    garbage,
    halves,
    make_ipv4,
    make_udp,
    mapped,
    offsets,
    payloads,
    place,
    ports,
    taken,
    udp_datagrams,
)

SOURCE, DESTINATION = 0x0AF4_0007, 0xCB00_7109
SOURCE6, DESTINATION6 = 0x2001_0DB8 << 96 | 7, 0x2001_0DB8 << 96 | 9


def pseudo(length: int) -> int:
    return checksum.pseudo_header(*halves(mapped(SOURCE)), *halves(mapped(DESTINATION)), udp.PROTOCOL, length)


def emitted(at: int, sport: int, dport: int, payload: bytes) -> Array:
    data = place(bytes(dirty(udp.HEADER)) + payload, at)
    udp.emit(data, at, sport, dport, udp.HEADER + len(payload))
    return data


@given(ports, ports, payloads, offsets)
def test_a_written_datagram_reads_back(sport, dport, payload, at):
    data = emitted(at, sport, dport, payload)
    size = udp.HEADER + len(payload)
    assert udp.valid(data, at, len(data))
    assert (udp.source_port(data, at), udp.destination_port(data, at), udp.length(data, at)) == (sport, dport, size)
    assert udp.checksum(data, at) == 0
    assert udp.checksum_ok(data, at, pseudo(size))
    udp.finish(data, at, pseudo(size))
    assert taken(data, at) == make_udp(SOURCE, DESTINATION, sport, dport, payload)
    assert udp.checksum_ok(data, at, pseudo(size))


@given(ports, ports, payloads)
def test_an_ipv6_datagram_is_finished_with_its_own_pseudo_header(sport, dport, payload):
    data = emitted(0, sport, dport, payload)
    total = checksum.pseudo_header(*halves(SOURCE6), *halves(DESTINATION6), udp.PROTOCOL, len(data))
    udp.finish(data, 0, total)
    assert taken(data) == make_udp(SOURCE6, DESTINATION6, sport, dport, payload)
    datagram = dpkt.udp.UDP(sport=sport, dport=dport, ulen=len(data), data=payload)
    addresses = {"src": SOURCE6.to_bytes(16, "big"), "dst": DESTINATION6.to_bytes(16, "big")}
    theirs = dpkt.ip6.IP6(nxt=17, plen=len(data), data=datagram, **addresses)
    theirs.extension_hdrs = {}
    if udp.checksum(data, 0) != 0xFFFF:  # dpkt sends a computed 0 over IPv6 as it is
        assert bytes(theirs)[40:] == taken(data)


@given(ports, ports, payloads)
def test_dpkt_and_scapy_write_the_same_datagram(sport, dport, payload):
    data = emitted(0, sport, dport, payload)
    udp.finish(data, 0, pseudo(len(data)))
    packet = make_ipv4(SOURCE, DESTINATION, 17, taken(data))
    assert packet[20:] == bytes(IP(src="10.244.0.7", dst="203.0.113.9") / UDP(sport=sport, dport=dport) / payload)[20:]
    datagram = dpkt.udp.UDP(sport=sport, dport=dport, ulen=len(data), data=payload)
    addresses = {"src": SOURCE.to_bytes(4, "big"), "dst": DESTINATION.to_bytes(4, "big")}
    assert packet[20:] == bytes(dpkt.ip.IP(p=17, len=len(packet), data=datagram, **addresses))[20:]


@given(udp_datagrams(), ports, ports, offsets)
def test_other_ports_leave_the_checksum_that_computing_anew_gives(datagram, sport, dport, at):
    data = place(datagram, at)
    udp.set_source_port(data, at, sport)
    udp.set_destination_port(data, at, dport)
    assert taken(data, at) == make_udp(SOURCE, DESTINATION, sport, dport, datagram[8:])


@given(udp_datagrams(), ports, ports)
def test_a_datagram_without_checksum_stays_without(datagram, sport, dport):
    data = place(datagram[:6] + b"\0\0" + datagram[8:])
    udp.set_source_port(data, 0, sport)
    udp.set_destination_port(data, 0, dport)
    assert udp.checksum(data, 0) == 0


def test_a_checksum_that_comes_out_as_zero_is_sent_as_all_ones():
    found = 0
    for word in range(0x10000):
        data = emitted(0, 4000, 53, word.to_bytes(2, "big"))
        udp.finish(data, 0, pseudo(len(data)))
        if udp.checksum(data, 0) == 0xFFFF:
            found += 1
            assert udp.checksum_ok(data, 0, pseudo(len(data)))
        assert udp.checksum(data, 0) != 0
    assert found == 1


@given(udp_datagrams(), st.integers(0, 71), st.integers(1, 255))
def test_damage_is_noticed(datagram, place_of, flip):
    data = place(datagram)
    place_of %= len(data)
    data[place_of] ^= flip
    if udp.valid(data, 0, len(data)) and udp.length(data, 0) == len(data) and udp.checksum(data, 0):
        assert not udp.checksum_ok(data, 0, pseudo(len(data)))


LENGTHS = [(0, False), (7, False), (8, True), (11, True), (12, True), (13, False), (0xFFFF, False)]


@pytest.mark.parametrize(("length", "accepted"), LENGTHS)
def test_the_length_must_hold_the_header_and_fit(length, accepted):
    data = emitted(0, 1, 2, bytes(4))
    data[4:6] = length >> 8, length & 0xFF
    assert udp.valid(data, 0, len(data)) == accepted


@given(st.one_of(garbage, damaged(udp_datagrams())), offsets)
def test_any_bytes_stay_inside(datagram, at):
    data = place(datagram, at)
    if udp.valid(data, at, len(data)):
        udp.source_port(data, at), udp.destination_port(data, at), udp.checksum(data, at)
        udp.checksum_ok(data, at, pseudo(udp.length(data, at)))
        udp.finish(data, at, pseudo(udp.length(data, at)))
        assert udp.checksum_ok(data, at, pseudo(udp.length(data, at)))
