"""Cutting packets for devices that take them only whole: checksums, segments, fragments.

Three things are left undone in a packet that comes from an offloading sender, and are done here, at the last moment and
only when the device cannot: its checksum is finished, a super-frame is cut into segments (TCP and UDP over IPv4 and
IPv6), an IPv4 packet that is larger than the path allows into fragments. Payload is never copied: a piece is a copy of
the headers, changed, and a slice of the packet where it lies. Pieces of a tunneled packet repeat the outer headers too.

The packet at hand is described by the ``CUT_*`` words of the buffers (``devices/io.py``): offsets from its first byte.
"""

from typing import Any

from dataplane.batch import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4
from dataplane.codecs import ipv4, ipv6, tcp, udp, virtio
from dataplane.codecs.checksum import checksum, sum16, udp_wire
from dataplane.devices.io import (
    CUT_BODY,
    CUT_COUNT,
    CUT_EXTRA,
    CUT_FD,
    CUT_HEADERS,
    CUT_L3,
    CUT_L4,
    CUT_LIMIT,
    CUT_OIF,
    CUT_ROW,
    CUT_SIZE,
    FRAME,
    HEADERS,
    HEADERS_SIZE,
    IOV,
    IOV_WORDS,
    OUTBOX,
    OUTBOX_DATA,
    OUTBOX_FILLED,
    OUTBOX_PIECES,
    OUTBOX_SIZE,
    OUTBOX_USED,
    SPARE,
    TEMPLATE,
)
from dataplane.devices.messages import count_frame, describe_datagram, describe_message, enqueue, reject, reserve
from dataplane.devices.syscalls import EINVAL, EMSGSIZE, ENOBUFS, errno, writev
from dataplane.jit import Array, address, copy, kernel, load8, load16, load32, store8, store16, store32, store64
from dataplane.tables.interface import Driver
from dataplane.verdict import Verdict

ETHERNET = 14
OUTER = 42  # Ethernet 14, IPv4 20, UDP 8: what a tunnel's socket makes by itself
MAX_SEGMENTS = 2048  # of one packet: 32 bytes of payload each; smaller segments are an attack on our time

_TUNNEL = 50  # OUTER and the VXLAN header
_UDP_HEADER = 8
_UDP_CHECKSUM = 6


@kernel
def finish_checksum(data: Array, packets: Array, row: int) -> bool:
    """Complete the checksum that the sender left to its device (P3); False if it lies outside the frame.

    The field holds the pseudo header's sum, so the sum from ``csum_start`` to the end counts everything.
    """
    start = int(packets["start"][row])
    end = start + int(packets["length"][row])
    begin, offset = start + int(packets["csum_start"][row]), int(packets["csum_offset"][row])
    packets["vnet_flags"][row] = 0
    if begin + offset + 2 > end:
        return False
    value = checksum(data, begin, end - begin, 0)
    store16(data, begin + offset, udp_wire(value) if offset == _UDP_CHECKSUM else value)
    return True


@kernel
def fragment_limit(data: Array, packets: Array, row: int) -> int:
    """Return the size of the fragments that the packet in ``row`` must leave as, 0 if it may leave whole.

    A datagram that came in fragments leaves in fragments that are no larger: its sender knew the path.
    """
    limit, largest = int(packets["mtu"][row]), int(packets["max_fragment"][row])
    if largest > 0 and (limit == 0 or largest < limit):
        limit = largest
    l3 = int(packets["l3"][row])
    if limit == 0 or load8(data, l3) >> 4 != 4 or ipv4.total_length(data, l3) <= limit:
        return 0
    return limit


@kernel
def _begin(packets: Array, interfaces: Array, io: Any, row: int, oif: int, fd: int) -> None:
    words, _ = io
    words[CUT_ROW] = row
    words[CUT_OIF] = oif
    words[CUT_FD] = fd
    words[CUT_L3] = int(packets["l3"][row]) - int(packets["start"][row])
    words[CUT_L4] = int(packets["l4"][row]) - int(packets["start"][row])
    words[CUT_EXTRA] = 0
    words[CUT_COUNT] = 0
    words[CUT_LIMIT] = int(packets["mtu"][row])


@kernel
def _headers_end(data: Array, packets: Array, row: int) -> int:
    """Return where the payload of a super-frame begins, 0 if its headers are not what its type says."""
    start, l3, l4 = int(packets["start"][row]), int(packets["l3"][row]), int(packets["l4"][row])
    end = start + int(packets["length"][row])
    kind = int(packets["gso_type"][row]) & ~virtio.GSO_ECN
    version = load8(data, l3) >> 4
    if kind in (GSO_TCPV4, GSO_TCPV6):
        right = version == (4 if kind == GSO_TCPV4 else 6) and tcp.valid(data, l4, end)
        body = l4 + tcp.header_length(data, l4)
    else:
        right = kind == GSO_UDP_L4 and (version == 4 or version == 6) and l4 + _UDP_HEADER <= end
        body = l4 + _UDP_HEADER
    network = ipv4.header_length(data, l3) if version == 4 else ipv6.HEADER
    shape = l3 >= start + ETHERNET and l4 >= l3 + network and body - start <= HEADERS_SIZE - FRAME
    return body if right and shape else 0


@kernel
def segment(batch: Any, row: int, interfaces: Array, io: Any, oif: int, fd: int) -> None:
    """Send the super-frame in ``row`` as segments with complete checksums.

    TCP segments that the path cannot carry are made smaller: nothing is lost and no fragment is made. The boundaries of
    UDP datagrams mean something, so those are fragmented instead.
    """
    data, packets = batch
    words, octets = io
    start = int(packets["start"][row])
    end = start + int(packets["length"][row])
    body = _headers_end(data, packets, row)
    if body == 0:
        reject(packets, interfaces, row, oif, EINVAL)
        return
    _begin(packets, interfaces, io, row, oif, fd)
    headers, size, limit = body - int(packets["l3"][row]), int(packets["gso_size"][row]), int(words[CUT_LIMIT])
    is_udp = body - int(packets["l4"][row]) == _UDP_HEADER
    if not is_udp and limit > headers:
        size = min(size, limit - headers)
    if size < 1 or size * MAX_SEGMENTS < end - body:
        reject(packets, interfaces, row, oif, EINVAL)
        return
    words[CUT_BODY], words[CUT_SIZE] = body - start, size
    at = body
    for k in range(max((end - body + size - 1) // size, 1)):
        length = min(size, end - at)
        whole = limit == 0 or headers + length <= limit or load8(data, int(packets["l3"][row])) >> 4 != 4
        message = _next_message(batch, interfaces, io) if whole else TEMPLATE
        base = HEADERS + message * HEADERS_SIZE + FRAME
        copy(octets, base, data, start, body - start)
        _shape_segment(io, base, k, at + length == end, length, sum16(data, at, length, 0))
        if whole:
            _set_outer(io, base, headers + length)
            words[CUT_HEADERS] = body - start
            _send_piece(batch, interfaces, io, message, at, length)
        else:
            words[CUT_EXTRA] = body - start - int(words[CUT_L3]) - ipv4.header_length(data, int(packets["l3"][row]))
            _send_fragments(batch, interfaces, io, at, length)
        if packets["verdict"][row] == Verdict.DROP:
            return
        at += length


@kernel
def _shape_segment(io: Any, base: int, k: int, last: bool, length: int, payload: int) -> None:
    """Make the headers at ``base`` those of segment ``k`` with ``length`` bytes, whose unfolded sum is ``payload``."""
    words, octets = io
    l3, l4, body = base + int(words[CUT_L3]), base + int(words[CUT_L4]), base + int(words[CUT_BODY])
    size = body - l4 + length
    if load8(octets, l3) >> 4 == 4:
        store16(octets, l3 + 2, body - l3 + length)
        store16(octets, l3 + 4, load16(octets, l3 + 4) + k)
        _sum_header(octets, l3)
        pseudo = sum16(octets, l3 + 12, 8, payload + size)
    else:
        store16(octets, l3 + 4, body - l3 - ipv6.HEADER + length)
        pseudo = sum16(octets, l3 + 8, 32, payload + size)
    if body - l4 == _UDP_HEADER:
        store16(octets, l4 + 4, size)
        store16(octets, l4 + _UDP_CHECKSUM, 0)
        store16(octets, l4 + _UDP_CHECKSUM, udp_wire(checksum(octets, l4, _UDP_HEADER, pseudo + udp.PROTOCOL)))
        return
    store32(octets, l4 + 4, load32(octets, l4 + 4) + k * int(words[CUT_SIZE]))
    keep = 0xFF if last else ~(tcp.FIN | tcp.PSH)
    keep &= 0xFF if k == 0 else ~tcp.CWR
    store8(octets, l4 + 13, load8(octets, l4 + 13) & keep)
    store16(octets, l4 + tcp.CHECKSUM_AT, 0)
    store16(octets, l4 + tcp.CHECKSUM_AT, checksum(octets, l4, body - l4, pseudo + tcp.PROTOCOL))


@kernel
def _sum_header(octets: Array, l3: int) -> None:
    """Compute the IPv4 header checksum anew."""
    store16(octets, l3 + 10, 0)
    store16(octets, l3 + 10, checksum(octets, l3, ipv4.header_length(octets, l3), 0))


@kernel
def _set_outer(io: Any, base: int, size: int) -> None:
    """Make the outer headers at ``base``, if there are any, those of a piece with ``size`` bytes of inner packet."""
    words, octets = io
    if words[CUT_L3] < _TUNNEL + ETHERNET:
        return
    l3 = base + ETHERNET
    datagram = _UDP_HEADER + _UDP_HEADER + ETHERNET + size
    store16(octets, l3 + 2, ipv4.HEADER + datagram)
    store16(octets, l3 + 4, load16(octets, l3 + 4) + int(words[CUT_COUNT]))
    _sum_header(octets, l3)
    store16(octets, l3 + 24, datagram)


@kernel
def fragment(batch: Any, row: int, interfaces: Array, io: Any, oif: int, fd: int) -> None:
    """Send the IPv4 packet in ``row`` as fragments of at most ``fragment_limit`` bytes (RFC 791, 3.2)."""
    data, packets = batch
    words, octets = io
    start, l3 = int(packets["start"][row]), int(packets["l3"][row])
    end = start + int(packets["length"][row])
    deepest = start + HEADERS_SIZE - FRAME - ipv4.MAX_HEADER
    if l3 < start + ETHERNET or l3 > deepest or not ipv4.valid(data, l3, end):
        reject(packets, interfaces, row, oif, EINVAL)
        return
    _begin(packets, interfaces, io, row, oif, fd)
    words[CUT_LIMIT] = fragment_limit(data, packets, row)
    body = l3 + ipv4.header_length(data, l3)
    copy(octets, HEADERS + TEMPLATE * HEADERS_SIZE + FRAME, data, start, body - start)
    _send_fragments(batch, interfaces, io, body, l3 + ipv4.total_length(data, l3) - body)


@kernel
def _send_fragments(batch: Any, interfaces: Array, io: Any, at: int, length: int) -> None:
    """Send the headers in ``TEMPLATE`` with the ``length`` bytes at ``at`` in fragments."""
    _, packets = batch
    words, octets = io
    row = int(words[CUT_ROW])
    template = HEADERS + TEMPLATE * HEADERS_SIZE + FRAME
    l3, extra = int(words[CUT_L3]), int(words[CUT_EXTRA])
    header = ipv4.header_length(octets, template + l3)
    room = (int(words[CUT_LIMIT]) - header) & ~7
    if room < max(extra, 8):
        reject(packets, interfaces, row, int(words[CUT_OIF]), EMSGSIZE)
        return
    begin, total = 0, extra + length
    while begin < total and packets["verdict"][row] != Verdict.DROP:
        size = min(room, total - begin)
        own = extra if begin == 0 else 0  # what of it stands in the template, not in the packet
        message = _next_message(batch, interfaces, io)
        base = HEADERS + message * HEADERS_SIZE + FRAME
        words[CUT_HEADERS] = l3 + header + own
        copy(octets, base, octets, template, l3 + header + own)
        _shape_fragment(octets, base + l3, header + size, begin, begin + size < total)
        _set_outer(io, base, header + size)
        _send_piece(batch, interfaces, io, message, at + begin + own - extra, size - own)
        begin += size


@kernel
def _shape_fragment(octets: Array, l3: int, size: int, begin: int, more: bool) -> None:
    """Make the IPv4 header at ``l3`` that of the fragment from ``begin`` on; a fragment may be fragmented again."""
    word = load16(octets, l3 + 6)
    store16(octets, l3 + 2, size)
    store16(octets, l3 + 6, word + (begin >> 3) | (ipv4.MF if more else 0))
    if begin > 0:
        _blank_options(octets, l3 + ipv4.HEADER, l3 + ipv4.header_length(octets, l3))
    _sum_header(octets, l3)


@kernel
def _blank_options(octets: Array, at: int, end: int) -> None:
    """Overwrite the options that only the first fragment carries (RFC 791, 3.1: copied flag 0)."""
    while at < end:
        kind = load8(octets, at)
        if kind == ipv4.OPTION_END:
            return
        length = 1 if kind == ipv4.OPTION_NOP or at + 1 >= end else load8(octets, at + 1)
        if length < 1 or at + length > end:
            return
        if not kind & ipv4.OPTION_COPIED:
            for i in range(at, at + length):
                store8(octets, i, ipv4.OPTION_NOP)
        at += length


@kernel
def _next_message(batch: Any, interfaces: Array, io: Any) -> int:
    """Return the message whose buffers the next piece takes."""
    words, _ = io
    oif = int(words[CUT_OIF])
    driver = interfaces["driver"][oif]
    if driver == Driver.PACKET or driver == Driver.VXLAN_SOCKET:
        return reserve(batch, interfaces, io, oif, int(words[CUT_FD]))
    return SPARE


@kernel
def _send_piece(batch: Any, interfaces: Array, io: Any, message: int, at: int, length: int) -> None:
    """Send the headers of ``message`` and the ``length`` bytes at ``at``; the virtio header, if any, is empty."""
    data, packets = batch
    words, octets = io
    row, oif, headers = int(words[CUT_ROW]), int(words[CUT_OIF]), int(words[CUT_HEADERS])
    driver = interfaces["driver"][oif]
    base = HEADERS + message * HEADERS_SIZE + FRAME
    words[CUT_COUNT] += 1
    if driver == Driver.MEMORY:
        _keep_piece(batch, interfaces, io, base, at, length)
        return
    first = base + OUTER if driver == Driver.VXLAN_SOCKET else base - virtio.HEADER
    iov = IOV + message * IOV_WORDS
    words[iov] = address(octets, first)
    words[iov + 1] = base + headers - first
    words[iov + 2] = address(data, at)
    words[iov + 3] = length
    if driver == Driver.VXLAN_SOCKET:
        describe_datagram(io, message, 2, octets, base)
        enqueue(io, row, headers + length)
        return
    store64(octets, first, 0)
    store16(octets, first + 8, 0)
    if driver == Driver.PACKET:
        describe_message(io, message, 2)
        enqueue(io, row, headers + length)
        return
    if writev(int(words[CUT_FD]), address(words, iov), 2) < 0:
        reject(packets, interfaces, row, oif, errno())
        return
    count_frame(interfaces, oif, headers + length)


@kernel
def _keep_piece(batch: Any, interfaces: Array, io: Any, base: int, at: int, length: int) -> None:
    """Put a piece for a memory device into the outbox, as one frame."""
    data, packets = batch
    words, octets = io
    row, oif, headers = int(words[CUT_ROW]), int(words[CUT_OIF]), int(words[CUT_HEADERS])
    piece, filled = int(words[OUTBOX_USED]), int(words[OUTBOX_FILLED])
    if piece == OUTBOX_PIECES or filled + headers + length > OUTBOX_SIZE:
        reject(packets, interfaces, row, oif, ENOBUFS)
        return
    copy(octets, OUTBOX_DATA + filled, octets, base, headers)
    copy(octets, OUTBOX_DATA + filled + headers, data, at, length)
    entry = OUTBOX + piece * 4
    words[entry], words[entry + 1], words[entry + 2], words[entry + 3] = row, oif, filled, headers + length
    words[OUTBOX_USED] = piece + 1
    words[OUTBOX_FILLED] = filled + headers + length
    count_frame(interfaces, oif, headers + length)
