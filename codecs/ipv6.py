"""IPv6 headers (RFC 8200) and the walk over extension headers.

Addresses are two unsigned 64-bit halves. ``upper`` finds the transport header behind at most ``MAX_EXTENSIONS``
extension headers: the bound makes its cost a constant, and nothing in use comes near it.
"""

from dataplane.jit import Array, kernel, load8, load16, load32, load64, store8, store16, store32, store64

HEADER = 40
FRAGMENT_HEADER = 8
MAX_EXTENSIONS = 8
DEFAULT_HOP_LIMIT = 64

HOP_BY_HOP = 0
ROUTING = 43
FRAGMENT = 44
ESP = 50
AUTHENTICATION = 51
NO_NEXT_HEADER = 59
DESTINATION_OPTIONS = 60

UPPER_FRAGMENT = 1  # flag of ``upper``: a fragment header was passed
UPPER_LATER = 2  # flag of ``upper``: not the first fragment, so no transport header follows


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether the version is 6 and header and payload end at or before ``end``.

    A jumbogram (payload length 0 and a hop-by-hop option, RFC 2675) reads as an empty packet.
    """
    if at + HEADER > end or load8(data, at) >> 4 != 6:
        return False
    return at + HEADER + load16(data, at + 4) <= end


@kernel
def traffic_class(data: Array, at: int) -> int:
    """Return the DSCP (upper 6 bits) and ECN (lower 2)."""
    return load16(data, at) >> 4 & 0xFF


@kernel
def flow_label(data: Array, at: int) -> int:
    """Return the 20-bit flow label."""
    return load32(data, at) & 0xF_FFFF


@kernel
def payload_length(data: Array, at: int) -> int:
    """Return the bytes behind the 40-byte header, extension headers included."""
    return load16(data, at + 4)


@kernel
def next_header(data: Array, at: int) -> int:
    """Return the number of the header that follows directly."""
    return load8(data, at + 6)


@kernel
def hop_limit(data: Array, at: int) -> int:
    """Return the hop limit."""
    return load8(data, at + 7)


@kernel
def source_hi(data: Array, at: int) -> int:
    """Return the upper half of the source address, unsigned."""
    return load64(data, at + 8)


@kernel
def source_lo(data: Array, at: int) -> int:
    """Return the lower half of the source address, unsigned."""
    return load64(data, at + 16)


@kernel
def destination_hi(data: Array, at: int) -> int:
    """Return the upper half of the destination address, unsigned."""
    return load64(data, at + 24)


@kernel
def destination_lo(data: Array, at: int) -> int:
    """Return the lower half of the destination address, unsigned."""
    return load64(data, at + 32)


@kernel
def set_traffic_class(data: Array, at: int, value: int) -> None:
    """Write DSCP and ECN."""
    store16(data, at, (load16(data, at) & 0xF00F) | (value & 0xFF) << 4)


@kernel
def set_flow_label(data: Array, at: int, value: int) -> None:
    """Write the 20-bit flow label."""
    store32(data, at, (load32(data, at) & 0xFFF0_0000) | (value & 0xF_FFFF))


@kernel
def set_payload_length(data: Array, at: int, value: int) -> None:
    """Write the bytes behind the header."""
    store16(data, at + 4, value)


@kernel
def set_hop_limit(data: Array, at: int, value: int) -> None:
    """Write the hop limit."""
    store8(data, at + 7, value)


@kernel
def set_source(data: Array, at: int, hi: int, lo: int) -> None:
    """Write the source address; the transport's checksum does not follow."""
    store64(data, at + 8, hi)
    store64(data, at + 16, lo)


@kernel
def set_destination(data: Array, at: int, hi: int, lo: int) -> None:
    """Write the destination address; the transport's checksum does not follow."""
    store64(data, at + 24, hi)
    store64(data, at + 32, lo)


@kernel
def set_addresses(data: Array, at: int, src_hi: int, src_lo: int, dst_hi: int, dst_lo: int) -> None:
    """Write both addresses."""
    set_source(data, at, src_hi, src_lo)
    set_destination(data, at, dst_hi, dst_lo)


@kernel
def emit(data: Array, at: int, next_header: int, payload_length: int, hop_limit: int) -> None:
    """Write the first 8 bytes, traffic class and flow label 0; the addresses are written by ``set_addresses``."""
    store32(data, at, 0x6000_0000)
    store16(data, at + 4, payload_length)
    store8(data, at + 6, next_header)
    store8(data, at + 7, hop_limit)


# --- extension headers -----------------------------------------------------------------------------------------------


@kernel
def extension_length(data: Array, at: int, end: int, kind: int) -> int:
    """Return the bytes of the extension header at ``at``, 0 when ``kind`` is none, -1 when it ends behind ``end``."""
    length = 0
    if kind == FRAGMENT:
        length = FRAGMENT_HEADER
    elif kind in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, AUTHENTICATION):
        if at + 8 > end:
            return -1
        units = load8(data, at + 1)
        length = (units + 2) << 2 if kind == AUTHENTICATION else (units + 1) << 3
    # An authentication header of 8 bytes has no room for its sequence number (RFC 4302, 2.2).
    if at + length > end or (kind == AUTHENTICATION and length < 12):
        return -1
    return length


@kernel
def upper(data: Array, at: int, end: int) -> int:
    """Find what follows the extension headers of a packet that passed ``valid``.

    Returns:
        ``offset << 16 | protocol << 8 | flags`` with ``UPPER_FRAGMENT`` and ``UPPER_LATER``, or -1 when a header is cut
        off, repeated where it may not be (a second fragment header, hop-by-hop options not in first place) or there are
        more than ``MAX_EXTENSIONS``. Behind a later fragment's header stands payload, and ``protocol`` is what the
        fragment header names. ESP and "no next header" end the walk like a transport.
    """
    end = min(end, at + HEADER + load16(data, at + 4))
    kind, offset, flags = load8(data, at + 6), at + HEADER, 0
    for i in range(MAX_EXTENSIONS + 1):
        length = extension_length(data, offset, end, kind)
        if length == 0:
            return offset << 16 | kind << 8 | flags
        if length < 0 or (kind == HOP_BY_HOP and i > 0) or (kind == FRAGMENT and flags != 0):
            return -1
        is_fragment = kind == FRAGMENT
        kind = load8(data, offset)
        offset += length
        if is_fragment:
            flags = UPPER_FRAGMENT
            if fragment_offset(data, offset - length) > 0:
                return offset << 16 | kind << 8 | UPPER_FRAGMENT | UPPER_LATER
    return -1


@kernel
def fragment_link(data: Array, at: int, end: int) -> int:
    """Return the offset of the byte that names the fragment header, or -1 when the packet has none.

    Reassembly writes the fragment header's own next header there when it takes the header out (RFC 8200, 4.5).
    """
    end = min(end, at + HEADER + load16(data, at + 4))
    link, offset = at + 6, at + HEADER
    for _ in range(MAX_EXTENSIONS + 1):
        kind = load8(data, link)
        length = extension_length(data, offset, end, kind)
        if length <= 0:
            return -1
        if kind == FRAGMENT:
            return link
        link, offset = offset, offset + length
    return -1


@kernel
def fragment_at(data: Array, at: int, end: int) -> int:
    """Return the offset of the fragment header, or -1 when the packet has none."""
    end = min(end, at + HEADER + load16(data, at + 4))
    kind, offset = load8(data, at + 6), at + HEADER
    for _ in range(MAX_EXTENSIONS + 1):
        length = extension_length(data, offset, end, kind)
        if length <= 0:
            return -1
        if kind == FRAGMENT:
            return offset
        kind, offset = load8(data, offset), offset + length
    return -1


@kernel
def fragment_next_header(data: Array, at: int) -> int:
    """Return the number of the first header of the fragmentable part."""
    return load8(data, at)


@kernel
def fragment_offset(data: Array, at: int) -> int:
    """Return the fragment's place in the fragmentable part, in bytes."""
    return load16(data, at + 2) & 0xFFF8


@kernel
def fragment_more(data: Array, at: int) -> bool:
    """Tell whether more fragments follow."""
    return (load16(data, at + 2) & 1) != 0


@kernel
def fragment_identification(data: Array, at: int) -> int:
    """Return the 32-bit number that all fragments of a packet share."""
    return load32(data, at + 4)


@kernel
def emit_fragment(data: Array, at: int, next_header: int, offset: int, more: bool, identification: int) -> None:
    """Write the 8 bytes of a fragment header; ``offset`` is in bytes, a multiple of 8."""
    store8(data, at, next_header)
    store8(data, at + 1, 0)
    store16(data, at + 2, (offset & 0xFFF8) | (1 if more else 0))
    store32(data, at + 4, identification)
