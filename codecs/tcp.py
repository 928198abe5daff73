"""TCP headers and options (RFC 9293, RFC 7323, RFC 2018).

The pseudo header is passed as an unfolded sum, so one codec serves both families. Option walks are bounded by the data
offset that ``valid`` has checked, and by the packet's end once more: they may be called on any header.
"""

from dataplane.codecs.checksum import checksum as compute
from dataplane.codecs.checksum import fold, sum16, update16
from dataplane.jit import Array, kernel, load8, load16, load32, store16, store32

PROTOCOL = 6
HEADER = 20
MAX_HEADER = 60
CHECKSUM_AT = 16

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10
URG = 0x20
ECE = 0x40
CWR = 0x80

OPTION_END = 0
OPTION_NOP = 1
OPTION_MSS = 2
OPTION_WINDOW_SCALE = 3
OPTION_SACK_PERMITTED = 4
OPTION_SACK = 5
OPTION_TIMESTAMPS = 8
MAX_WINDOW_SCALE = 14


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether the header, options included, is possible and ends at or before ``end``."""
    if at + HEADER > end:
        return False
    size = load8(data, at + 12) >> 4 << 2
    return size >= HEADER and at + size <= end


@kernel
def source_port(data: Array, at: int) -> int:
    """Return the source port."""
    return load16(data, at)


@kernel
def destination_port(data: Array, at: int) -> int:
    """Return the destination port."""
    return load16(data, at + 2)


@kernel
def sequence(data: Array, at: int) -> int:
    """Return the sequence number, 32 bits."""
    return load32(data, at + 4)


@kernel
def acknowledgment(data: Array, at: int) -> int:
    """Return the acknowledgment number, 32 bits."""
    return load32(data, at + 8)


@kernel
def header_length(data: Array, at: int) -> int:
    """Return the data offset in bytes."""
    return load8(data, at + 12) >> 4 << 2


@kernel
def flags(data: Array, at: int) -> int:
    """Return the eight flags from CWR to FIN."""
    return load8(data, at + 13)


@kernel
def window(data: Array, at: int) -> int:
    """Return the window, unscaled."""
    return load16(data, at + 14)


@kernel
def checksum(data: Array, at: int) -> int:
    """Return the checksum as it stands."""
    return load16(data, at + 16)


@kernel
def checksum_ok(data: Array, at: int, length: int, pseudo: int) -> bool:
    """Tell whether the segment of ``length`` bytes sums to zero with ``pseudo_header(..., 6, length)``."""
    return fold(sum16(data, at, length, pseudo)) == 0xFFFF


@kernel
def _set16(data: Array, at: int, offset: int, value: int) -> None:
    store16(data, at + 16, update16(load16(data, at + 16), load16(data, at + offset), value))
    store16(data, at + offset, value)


@kernel
def set_source_port(data: Array, at: int, value: int) -> None:
    """Write the source port; a complete checksum follows."""
    _set16(data, at, 0, value)


@kernel
def set_destination_port(data: Array, at: int, value: int) -> None:
    """Write the destination port; a complete checksum follows."""
    _set16(data, at, 2, value)


@kernel
def set_window(data: Array, at: int, value: int) -> None:
    """Write the window; a complete checksum follows."""
    _set16(data, at, 14, value)


@kernel
def emit(data: Array, at: int, ports: int, sequence: int, acknowledgment: int, flags: int) -> None:
    """Write a 20-byte header with window 0, urgent pointer 0 and no checksum yet.

    ``ports`` holds the source port in its upper 16 bits, the destination port in the lower.
    """
    store32(data, at, ports)
    store32(data, at + 4, sequence)
    store32(data, at + 8, acknowledgment)
    store16(data, at + 12, HEADER << 10 | (flags & 0xFF))
    store16(data, at + 14, 0)
    store32(data, at + 16, 0)


@kernel
def finish(data: Array, at: int, length: int, pseudo: int) -> None:
    """Compute the checksum of the segment of ``length`` bytes, whatever it was."""
    store16(data, at + 16, 0)
    store16(data, at + 16, compute(data, at, length, pseudo))


# --- options (RFC 9293, 3.2) -----------------------------------------------------------------------------------------


@kernel
def option(data: Array, at: int, end: int, kind: int) -> int:
    """Return the offset of the first option of ``kind``, all of it inside the header, or -1.

    A malformed option ends the walk, as does End of Option List: what follows is never found.
    """
    offset, limit = at + HEADER, min(end, at + header_length(data, at))
    while offset < limit:
        found = load8(data, offset)
        if found == OPTION_END:
            return -1
        if found == OPTION_NOP:
            offset += 1
            continue
        if offset + 2 > limit:
            return -1
        length = load8(data, offset + 1)
        if length < 2 or offset + length > limit:
            return -1
        if found == kind:
            return offset
        offset += length
    return -1


@kernel
def _sized_option(data: Array, at: int, end: int, kind: int, length: int) -> int:
    """Return the offset of an option whose length must be ``length``, or -1."""
    offset = option(data, at, end, kind)
    return offset if offset >= 0 and load8(data, offset + 1) == length else -1


@kernel
def mss(data: Array, at: int, end: int) -> int:
    """Return the maximum segment size, or -1 when the option is absent."""
    offset = _sized_option(data, at, end, OPTION_MSS, 4)
    return load16(data, offset + 2) if offset >= 0 else -1


@kernel
def window_scale(data: Array, at: int, end: int) -> int:
    """Return the shift of the window, at most 14 (RFC 7323, 2.3), or -1 when the option is absent."""
    offset = _sized_option(data, at, end, OPTION_WINDOW_SCALE, 3)
    return min(load8(data, offset + 2), MAX_WINDOW_SCALE) if offset >= 0 else -1


@kernel
def sack_permitted(data: Array, at: int, end: int) -> bool:
    """Tell whether selective acknowledgments are allowed."""
    return _sized_option(data, at, end, OPTION_SACK_PERMITTED, 2) >= 0


@kernel
def timestamp_value(data: Array, at: int, end: int) -> int:
    """Return TSval, 32 bits, or -1 when the option is absent."""
    offset = _sized_option(data, at, end, OPTION_TIMESTAMPS, 10)
    return load32(data, offset + 2) if offset >= 0 else -1


@kernel
def timestamp_echo(data: Array, at: int, end: int) -> int:
    """Return TSecr, 32 bits, or -1 when the option is absent."""
    offset = _sized_option(data, at, end, OPTION_TIMESTAMPS, 10)
    return load32(data, offset + 6) if offset >= 0 else -1


@kernel
def sack_end(data: Array, at: int, end: int) -> int:
    """Return the highest right edge of the SACK blocks, in sequence order behind the ACK number, or -1 without any."""
    offset = option(data, at, end, OPTION_SACK)
    if offset < 0:
        return -1
    base, reach, edge = acknowledgment(data, at), -1, -1
    for block in range((load8(data, offset + 1) - 2) >> 3):
        right = load32(data, offset + 2 + (block << 3) + 4)
        # Distance modulo 2**32; the upper half of the circle lies before the ACK (a duplicate SACK, RFC 2883).
        distance = (right - base) & 0xFFFF_FFFF
        if distance < 0x8000_0000 and distance > reach:
            reach, edge = distance, right
    return edge
