"""Hypothesis strategies for packets, and the few helpers that place them in arrays.

Packets are built with ``struct`` alone, from the RFCs' pictures: they are an oracle for the codecs, so they share no
code with them. Every strategy yields ``bytes`` with right checksums unless it says otherwise.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
from hypothesis import strategies as st

from dataplane.jit import Array

DIRT = 0xA5

Draw: TypeAlias = st.DrawFn
Bytes: TypeAlias = st.SearchStrategy[bytes]
Ints: TypeAlias = st.SearchStrategy[int]

# --- placing ---------------------------------------------------------------------------------------------------------


def dirty(length: int) -> Array:
    """A buffer whose every byte must be overwritten."""
    return np.full(length, DIRT, np.uint8)


def place(packet: Sequence[int], at: int = 0) -> Array:
    """Put a packet at offset ``at``, at the very end of its array, so that a read behind it is a read outside."""
    data = dirty(at + len(packet))
    data[at:] = np.frombuffer(bytes(packet), np.uint8)
    return data


def taken(data: Array, at: int = 0, end: int | None = None) -> bytes:
    """The bytes in ``data[at:end]``."""
    return bytes(data[at:end].tobytes())


def halves(address: int) -> tuple[int, int]:
    """A 128-bit address as two unsigned words, as kernels take it from Python."""
    high, low = np.uint64(address >> 64), np.uint64(address & 0xFFFF_FFFF_FFFF_FFFF)
    return cast(int, high), cast(int, low)


def mapped(address: int) -> int:
    """An IPv4 address as ::ffff:a.b.c.d."""
    return 0xFFFF_0000_0000 | address


# --- oracles ---------------------------------------------------------------------------------------------------------


def naive_sum(data: Sequence[int], total: int = 0) -> int:
    """RFC 1071, as its text has it: one 16-bit word after the other, each carry at once. 0 and 0xffff both occur."""
    data = bytes(data) + bytes(len(data) % 2)
    for i in range(0, len(data), 2):
        total += data[i] << 8 | data[i + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


def naive_checksum(data: Sequence[int]) -> int:
    return naive_sum(data) ^ 0xFFFF


def pseudo_bytes(source: int, destination: int, protocol: int, length: int) -> bytes:
    """The pseudo header: 12 bytes when both addresses are below 2**32, else 40."""
    if source < 2**32 and destination < 2**32:
        return struct.pack("!IIBBH", source, destination, 0, protocol, length)
    return source.to_bytes(16, "big") + destination.to_bytes(16, "big") + struct.pack("!II", length, protocol)


def with_checksum(segment: bytes, offset: int, pseudo: bytes = b"", udp: bool = False) -> bytes:
    """Fill in the checksum at ``offset`` of a segment that has zeros there."""
    value = naive_checksum(pseudo + segment)
    if udp and value == 0:
        value = 0xFFFF
    return segment[:offset] + struct.pack("!H", value) + segment[offset + 2 :]


# --- small things ----------------------------------------------------------------------------------------------------

bytes8 = st.integers(0, 0xFF)
words16 = st.integers(0, 0xFFFF)
words32 = st.integers(0, 0xFFFF_FFFF)
offsets = st.integers(0, 33)  # of a header in its array: every alignment
ports = words16
payloads = st.binary(max_size=64)
garbage = st.binary(max_size=120)


@st.composite
def ipv4_addresses(draw: Draw) -> int:
    """32-bit ints: pods, services, outside (RFC 5737), now and then anything."""
    low = draw(st.integers(0, 0xFFFF))
    return draw(
        st.sampled_from([0x0AF4_0000 | low, 0x0A60_0000 | low & 0xFFF, 0xCB00_7100 | low & 0xFF, draw(words32)])
    )


@st.composite
def ipv6_addresses(draw: Draw) -> int:
    """128-bit ints: documentation, link-local, unique local, now and then anything. Never below 2**32."""
    low = draw(st.integers(0, 2**64 - 1))
    prefix = draw(st.sampled_from([0x2001_0DB8 << 32, 0xFE80 << 48, 0xFD00 << 48, draw(st.integers(1, 2**64 - 1))]))
    return prefix << 64 | low


macs = st.integers(0, 2**48 - 1)

# --- IPv4 ------------------------------------------------------------------------------------------------------------


def _padded(options: bytes) -> bytes:
    return options + bytes(-len(options) % 4)


@st.composite
def ipv4_options(draw: Draw) -> bytes:
    """At most 40 bytes of whole options, padded with End of Option List."""
    options = b""
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            option = b"\x01"
        else:
            body = draw(st.binary(max_size=10))
            option = bytes([draw(st.integers(2, 255)), len(body) + 2]) + body
        if len(options) + len(option) <= 40:
            options += option
    return _padded(options)


def make_ipv4(
    source: int,
    destination: int,
    protocol: int,
    payload: bytes,
    *,
    options: bytes = b"",
    tos: int = 0,
    identification: int = 0,
    fragment: int = 0,
    ttl: int = 64,
) -> bytes:
    """An IPv4 packet."""
    length = 20 + len(options)
    header = struct.pack("!BBHHH", 0x40 | length // 4, tos, length + len(payload), identification, fragment)
    header += struct.pack("!BBHII", ttl, protocol, 0, source, destination) + options
    return with_checksum(header, 10) + payload


@st.composite
def ipv4_packets(draw: Draw, payload: Bytes = payloads, protocol: Ints = bytes8) -> bytes:
    """Any IPv4 packet, options and fragments included; the payload means nothing."""
    return make_ipv4(
        draw(ipv4_addresses()),
        draw(ipv4_addresses()),
        draw(protocol),
        draw(payload),
        options=draw(ipv4_options()),
        tos=draw(bytes8),
        identification=draw(words16),
        fragment=draw(st.one_of(st.sampled_from([0, 0x4000]), st.integers(0, 0x7FFF))),
        ttl=draw(bytes8),
    )


@st.composite
def ipv4_fragments(draw: Draw, max_size: int = 400) -> tuple[list[bytes], bytes]:
    """The fragments of one datagram, in order, and the datagram's payload."""
    payload = draw(st.binary(min_size=9, max_size=max_size))
    cuts = sorted({8 * cut for cut in draw(st.lists(st.integers(1, (len(payload) - 1) // 8), min_size=1, max_size=6))})
    source, destination, identification = draw(ipv4_addresses()), draw(ipv4_addresses()), draw(words16)
    fragments = []
    for start, stop in zip([0, *cuts], [*cuts, len(payload)], strict=True):
        word = start // 8 | (0x2000 if stop < len(payload) else 0)
        piece = payload[start:stop]
        fragments.append(make_ipv4(source, destination, 17, piece, identification=identification, fragment=word))
    return fragments, payload


# --- IPv6 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ipv6Packet:
    """What a walk over ``data`` must find; ``upper`` counts from the packet's first byte."""

    data: bytes
    upper: int
    protocol: int
    is_fragment: bool
    is_later: bool


EXTENSIONS = (0, 43, 44, 51, 60)


def make_ipv6(
    source: int,
    destination: int,
    protocol: int,
    payload: bytes,
    *,
    traffic_class: int = 0,
    flow_label: int = 0,
    hop_limit: int = 64,
) -> bytes:
    """An IPv6 packet; ``payload`` begins with the header that ``protocol`` names."""
    header = struct.pack("!IHBB", 6 << 28 | traffic_class << 20 | flow_label, len(payload), protocol, hop_limit)
    return header + source.to_bytes(16, "big") + destination.to_bytes(16, "big") + payload


def make_extension(
    kind: int, next_header: int, body: bytes, *, offset: int = 0, more: bool = False, identification: int = 0
) -> bytes:
    """One extension header; ``body`` is padded to the unit that ``kind`` has, and not used by a fragment header."""
    if kind == 44:
        return struct.pack("!BBHI", next_header, 0, offset | more, identification)
    unit, least = (4, 10) if kind == 51 else (8, 6)
    body = body.ljust(least, b"\0")
    body += bytes(-(len(body) + 2) % unit)
    units = (len(body) + 2) // unit
    return bytes([next_header, units - 2 if kind == 51 else units - 1]) + body


@st.composite
def ipv6_packets(draw: Draw, payload: Bytes = payloads) -> Ipv6Packet:
    """An IPv6 packet with up to five extension headers in an order that the RFC allows."""
    kinds = draw(st.lists(st.sampled_from([43, 51, 60]), max_size=3))
    if draw(st.booleans()):
        kinds.insert(draw(st.integers(0, len(kinds))), 44)
    if draw(st.booleans()):
        kinds.insert(0, 0)
    protocol = draw(bytes8.filter(lambda kind: kind not in EXTENSIONS))
    offset = draw(st.sampled_from([0, 8, 1232])) if 44 in kinds else 0
    upper_protocol, upper = protocol, 40
    chain = b""
    for place_in_chain, kind in enumerate(kinds):
        following = kinds[place_in_chain + 1] if place_in_chain + 1 < len(kinds) else protocol
        chain += make_extension(kind, following, draw(st.binary(max_size=20)), offset=offset, more=draw(st.booleans()))
        upper, upper_protocol = 40 + len(chain), following
        if kind == 44 and offset:
            break
    packet = make_ipv6(
        draw(ipv6_addresses()),
        draw(ipv6_addresses()),
        kinds[0] if kinds else protocol,
        chain + draw(payload),
        traffic_class=draw(bytes8),
        flow_label=draw(st.integers(0, 0xF_FFFF)),
        hop_limit=draw(bytes8),
    )
    return Ipv6Packet(packet, upper, upper_protocol, 44 in kinds, offset > 0)


# --- transport -------------------------------------------------------------------------------------------------------


@st.composite
def tcp_options(draw: Draw) -> tuple[list[tuple[int, bytes]], bytes]:
    """``(kind, value)`` pairs in a random order, and their bytes (at most 40, padded)."""
    possible = [
        (2, struct.pack("!H", draw(words16))),
        (3, bytes([draw(bytes8)])),
        (4, b""),
        (5, struct.pack("!II", draw(words32), draw(words32)) * draw(st.integers(1, 2))),
        (8, struct.pack("!II", draw(words32), draw(words32))),
        (254, draw(st.binary(max_size=6))),
    ]
    chosen = draw(st.lists(st.sampled_from(possible), max_size=5, unique_by=lambda option: option[0]))
    options, kept = b"", []
    for kind, value in chosen:
        encoded = b"\x01" * draw(st.integers(0, 2)) + bytes([kind, len(value) + 2]) + value
        if len(options) + len(encoded) <= 40:
            options += encoded
            kept.append((kind, value))
    return kept, _padded(options)


def make_tcp(
    source: int,
    destination: int,
    sport: int,
    dport: int,
    payload: bytes = b"",
    *,
    seq: int = 0,
    ack: int = 0,
    flags: int = 0x10,
    window: int = 0,
    options: bytes = b"",
) -> bytes:
    """A TCP segment between two addresses of one family."""
    length = 20 + len(options)
    header = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, length // 4 << 4, flags, window, 0, 0)
    segment = header + options + payload
    return with_checksum(segment, 16, pseudo_bytes(source, destination, 6, len(segment)))


def make_udp(source: int, destination: int, sport: int, dport: int, payload: bytes = b"") -> bytes:
    """A UDP datagram between two addresses of one family."""
    datagram = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload
    return with_checksum(datagram, 6, pseudo_bytes(source, destination, 17, len(datagram)), udp=True)


@st.composite
def tcp_segments(draw: Draw, source: int = 0x0AF4_0007, destination: int = 0xCB00_7109) -> bytes:
    """A TCP segment, checksummed for ``source`` and ``destination``."""
    fields = {"seq": draw(words32), "ack": draw(words32), "flags": draw(bytes8), "window": draw(words16)}
    _, options = draw(tcp_options())
    return make_tcp(source, destination, draw(ports), draw(ports), draw(payloads), options=options, **fields)


@st.composite
def udp_datagrams(draw: Draw, source: int = 0x0AF4_0007, destination: int = 0xCB00_7109) -> bytes:
    """A UDP datagram, checksummed for ``source`` and ``destination``."""
    return make_udp(source, destination, draw(ports), draw(ports), draw(payloads))


def make_icmp(kind: int, code: int = 0, rest: int = 0, payload: bytes = b"", *, pseudo: bytes = b"") -> bytes:
    """An ICMP message; with a pseudo header, an ICMPv6 one."""
    return with_checksum(struct.pack("!BBHI", kind, code, 0, rest) + payload, 2, pseudo)


def make_ethernet(
    destination: int, source: int, ethertype: int, payload: bytes, tags: Iterable[tuple[int, int]] = ()
) -> bytes:
    """An Ethernet frame; ``tags`` are ``(EtherType, tag word)`` pairs, outermost first."""
    header = destination.to_bytes(6, "big") + source.to_bytes(6, "big")
    for tag_type, word in tags:
        header += struct.pack("!HH", tag_type, word)
    return header + struct.pack("!H", ethertype) + payload


# --- whole packets and damaged ones ----------------------------------------------------------------------------------


@st.composite
def ipv4_transport_packets(draw: Draw) -> bytes:
    """An IPv4 packet that carries a right TCP, UDP or ICMP message and is no fragment."""
    source, destination = draw(ipv4_addresses()), draw(ipv4_addresses())
    kind = draw(st.sampled_from([1, 6, 17]))
    if kind == 1:
        payload = make_icmp(draw(st.sampled_from([0, 8])), 0, draw(words32), draw(payloads))
    else:
        payload = draw((tcp_segments if kind == 6 else udp_datagrams)(source, destination))
    return make_ipv4(source, destination, kind, payload, tos=draw(bytes8), ttl=draw(bytes8))


@st.composite
def ipv6_transport_packets(draw: Draw) -> bytes:
    """An IPv6 packet without extension headers that carries a right TCP, UDP or ICMPv6 message."""
    source, destination = draw(ipv6_addresses()), draw(ipv6_addresses())
    kind = draw(st.sampled_from([6, 17, 58]))
    if kind == 58:
        body = draw(payloads)
        pseudo = pseudo_bytes(source, destination, 58, 8 + len(body))
        payload = make_icmp(draw(st.sampled_from([128, 129])), 0, draw(words32), body, pseudo=pseudo)
    else:
        payload = draw((tcp_segments if kind == 6 else udp_datagrams)(source, destination))
    return make_ipv6(source, destination, kind, payload, traffic_class=draw(bytes8), hop_limit=draw(bytes8))


@st.composite
def damaged(draw: Draw, packets: Bytes) -> bytes:
    """A packet cut short, or with bytes overwritten, or both, or neither."""
    packet = bytearray(draw(packets))
    for _ in range(draw(st.integers(0, 3))):
        if packet:
            packet[draw(st.integers(0, len(packet) - 1))] = draw(bytes8)
    return bytes(packet[: draw(st.integers(0, len(packet)))]) if draw(st.booleans()) else bytes(packet)


def frames(packets: st.SearchStrategy[tuple[int, bytes]] | None = None) -> Bytes:
    """Ethernet frames with sound and damaged packets of both families, and with noise."""
    chosen = packets or st.one_of(
        ipv4_transport_packets().map(lambda packet: (0x0800, packet)),
        ipv6_transport_packets().map(lambda packet: (0x86DD, packet)),
        damaged(ipv4_packets()).map(lambda packet: (0x0800, packet)),
        damaged(ipv6_packets().map(lambda packet: packet.data)).map(lambda packet: (0x86DD, packet)),
        st.tuples(words16, garbage),
    )
    return st.builds(lambda to, by, pair: make_ethernet(to, by, *pair), macs, macs, chosen)
