"""IPv4 headers (RFC 791): the gate, accessors, setters that keep the checksum right, and options.

Setters change one 16- or 32-bit word and update the header checksum by RFC 1624, so a header that was wrong stays wrong
by the same amount: a corrupted packet is not laundered by forwarding it.
"""

from dataplane.codecs.checksum import LOW32, fold, sum16, update16, update32
from dataplane.codecs.checksum import checksum as compute
from dataplane.jit import Array, copy, kernel, load8, load16, load32, store8, store16, store32

HEADER = 20
MAX_HEADER = 60
DEFAULT_TTL = 64

PROTO_ICMP = 1
PROTO_IGMP = 2
PROTO_IPIP = 4
PROTO_TCP = 6
PROTO_UDP = 17
PROTO_IPV6 = 41
PROTO_GRE = 47
PROTO_ESP = 50
PROTO_AH = 51
PROTO_ICMPV6 = 58
PROTO_SCTP = 132

DF = 0x4000
MF = 0x2000
OFFSET_MASK = 0x1FFF  # of the fragment word, in units of 8 bytes

OPTION_END = 0
OPTION_NOP = 1
OPTION_COPIED = 0x80  # the bit of an option's type that puts it into every fragment


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether version, header length and total length are possible and the packet ends at or before ``end``."""
    if at + HEADER > end:
        return False
    first = load8(data, at)
    if first < 0x45 or first > 0x4F:
        return False
    total = load16(data, at + 2)
    return (first & 15) << 2 <= total and at + total <= end


@kernel
def checksum_ok(data: Array, at: int) -> bool:
    """Tell whether the header sums to zero."""
    return fold(sum16(data, at, header_length(data, at), 0)) == 0xFFFF


@kernel
def header_length(data: Array, at: int) -> int:
    """Return the bytes of the header, options included."""
    return (load8(data, at) & 15) << 2


@kernel
def tos(data: Array, at: int) -> int:
    """Return the DSCP (upper 6 bits) and ECN (lower 2)."""
    return load8(data, at + 1)


@kernel
def total_length(data: Array, at: int) -> int:
    """Return the bytes of the packet, header included."""
    return load16(data, at + 2)


@kernel
def identification(data: Array, at: int) -> int:
    """Return the datagram's number, the same in all its fragments."""
    return load16(data, at + 4)


@kernel
def fragment_word(data: Array, at: int) -> int:
    """Return ``DF``, ``MF`` and the offset in units of 8 bytes."""
    return load16(data, at + 6)


@kernel
def is_fragment(data: Array, at: int) -> bool:
    """Tell whether this is one piece of a larger datagram."""
    return (load16(data, at + 6) & (MF | OFFSET_MASK)) != 0


@kernel
def ttl(data: Array, at: int) -> int:
    """Return the time to live."""
    return load8(data, at + 8)


@kernel
def protocol(data: Array, at: int) -> int:
    """Return the upper layer's number."""
    return load8(data, at + 9)


@kernel
def checksum(data: Array, at: int) -> int:
    """Return the header checksum as it stands."""
    return load16(data, at + 10)


@kernel
def source(data: Array, at: int) -> int:
    """Return the source address, 32 bits."""
    return load32(data, at + 12)


@kernel
def destination(data: Array, at: int) -> int:
    """Return the destination address, 32 bits."""
    return load32(data, at + 16)


@kernel
def _set16(data: Array, at: int, offset: int, value: int) -> None:
    store16(data, at + 10, update16(load16(data, at + 10), load16(data, at + offset), value))
    store16(data, at + offset, value)


@kernel
def _set32(data: Array, at: int, offset: int, value: int) -> None:
    store16(data, at + 10, update32(load16(data, at + 10), load32(data, at + offset), value))
    store32(data, at + offset, value)


@kernel
def set_tos(data: Array, at: int, value: int) -> None:
    """Write DSCP and ECN; the checksum follows."""
    _set16(data, at, 0, load8(data, at) << 8 | (value & 0xFF))


@kernel
def set_total_length(data: Array, at: int, value: int) -> None:
    """Write the packet's length; the checksum follows."""
    _set16(data, at, 2, value)


@kernel
def set_identification(data: Array, at: int, value: int) -> None:
    """Write the datagram's number; the checksum follows."""
    _set16(data, at, 4, value)


@kernel
def set_fragment_word(data: Array, at: int, value: int) -> None:
    """Write ``DF | MF | offset / 8``; the checksum follows."""
    _set16(data, at, 6, value)


@kernel
def set_ttl(data: Array, at: int, value: int) -> None:
    """Write the time to live; the checksum follows."""
    _set16(data, at, 8, (value & 0xFF) << 8 | load8(data, at + 9))


@kernel
def set_protocol(data: Array, at: int, value: int) -> None:
    """Write the upper layer's number; the checksum follows."""
    _set16(data, at, 8, load8(data, at + 8) << 8 | (value & 0xFF))


@kernel
def set_source(data: Array, at: int, value: int) -> None:
    """Write the source address; the header's checksum follows, the transport's does not."""
    _set32(data, at, 12, value)


@kernel
def set_destination(data: Array, at: int, value: int) -> None:
    """Write the destination address; the header's checksum follows, the transport's does not."""
    _set32(data, at, 16, value)


@kernel
def emit(data: Array, at: int, source: int, destination: int, protocol: int, total_length: int) -> None:
    """Write a 20-byte header: TTL 64, TOS 0, identification 0, no DF, checksum complete."""
    fourth = DEFAULT_TTL << 8 | (protocol & 0xFF)
    store16(data, at, 0x4500)
    store16(data, at + 2, total_length)
    store32(data, at + 4, 0)
    store16(data, at + 8, fourth)
    store32(data, at + 12, source)
    store32(data, at + 16, destination)
    # The sum of the arguments, not of the bytes: loading what was just stored in narrower pieces stalls (7 ns).
    total = 0x4500 + (total_length & 0xFFFF) + fourth + (source & LOW32) + (destination & LOW32)
    store16(data, at + 10, fold(total) ^ 0xFFFF)


@kernel
def set_delivery(data: Array, at: int, tos: int, ttl: int, identification: int, fragment_word: int) -> None:
    """Write the fields that ``emit`` leaves at their defaults; the checksum is computed anew."""
    store8(data, at + 1, tos)
    store16(data, at + 4, identification)
    store16(data, at + 6, fragment_word)
    store8(data, at + 8, ttl)
    finish(data, at)


@kernel
def finish(data: Array, at: int) -> None:
    """Compute the header checksum anew, whatever it was."""
    store16(data, at + 10, 0)
    store16(data, at + 10, compute(data, at, header_length(data, at), 0))


# --- options (RFC 791, 3.1) ------------------------------------------------------------------------------------------


@kernel
def option_length(data: Array, at: int, end: int) -> int:
    """Return the bytes of the option at ``at < end``, or -1 when it leaves the header, which stops at ``end``."""
    if load8(data, at) <= OPTION_NOP:
        return 1
    if at + 2 > end:
        return -1
    length = load8(data, at + 1)
    return length if length >= 2 and at + length <= end else -1


@kernel
def options_valid(data: Array, at: int) -> bool:
    """Tell whether the options are a sequence of whole options up to End of Option List or the end of the header."""
    offset, end = at + HEADER, at + header_length(data, at)
    while offset < end:
        if load8(data, offset) == OPTION_END:
            return True
        length = option_length(data, offset, end)
        if length < 0:
            return False
        offset += length
    return True


@kernel
def fragment_header(data: Array, at: int, source_at: int) -> int:
    """Write the header of a non-first fragment at ``at`` and return its length.

    It is the header at ``source_at`` with only those options that have the copied bit, padded with End of Option List
    to a multiple of 4 bytes. A malformed option ends the walk: what follows it is not copied. Total length and fragment
    word are still those of the source; the checksum is right for what was written. The two must not overlap.
    """
    copy(data, at, data, source_at, HEADER)
    offset, end, to = source_at + HEADER, source_at + header_length(data, source_at), at + HEADER
    while offset < end and load8(data, offset) != OPTION_END:
        length = option_length(data, offset, end)
        if length < 0:
            break
        if load8(data, offset) & OPTION_COPIED:
            copy(data, to, data, offset, length)
            to += length
        offset += length
    while (to - at) & 3:
        store8(data, to, OPTION_END)
        to += 1
    store8(data, at, 0x40 | (to - at) >> 2)
    finish(data, at)
    return to - at
