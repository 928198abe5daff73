"""ICMPv6 (RFC 4443) and neighbor discovery (RFC 4861).

The checksum covers a pseudo header. What we *write* always stands directly behind its IPv6 header, so the ``emit``
functions read the addresses at ``at - 40``; what we *read* may follow extension headers, so ``checksum_ok`` is told
where the IPv6 header is.
"""

from dataplane.codecs import ipv6
from dataplane.codecs.checksum import checksum as compute
from dataplane.codecs.checksum import fold, pseudo_header, sum16, update16
from dataplane.jit import (
    Array,
    kernel,
    load8,
    load16,
    load32,
    load48,
    load64,
    store8,
    store16,
    store32,
    store48,
    store64,
)

PROTOCOL = 58
HEADER = 8
MIN_MTU = 1280

UNREACHABLE = 1
PACKET_TOO_BIG = 2
TIME_EXCEEDED = 3
PARAMETER_PROBLEM = 4
ECHO_REQUEST = 128
ECHO_REPLY = 129
ROUTER_SOLICITATION = 133
ROUTER_ADVERTISEMENT = 134
NEIGHBOR_SOLICITATION = 135
NEIGHBOR_ADVERTISEMENT = 136
NDP_REDIRECT = 137

NO_ROUTE = 0  # codes of UNREACHABLE
ADMIN_PROHIBITED = 1
ADDRESS_UNREACHABLE = 3
PORT_UNREACHABLE = 4

NEIGHBOR = 24  # bytes of a solicitation or advertisement without options
LINK_LAYER_OPTION = 8  # bytes
SOURCE_LINK_LAYER = 1  # kinds of option
TARGET_LINK_LAYER = 2
MAX_OPTIONS = 16  # walked; a discovery message in use has one or two

ROUTER = 0x8000_0000  # flags of an advertisement, in their place in the 32-bit word
SOLICITED = 0x4000_0000
OVERRIDE = 0x2000_0000


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether the 8-byte header, and for neighbor messages the target too, end at or before ``end``."""
    if at + HEADER > end:
        return False
    kind = load8(data, at)
    if kind in (NEIGHBOR_SOLICITATION, NEIGHBOR_ADVERTISEMENT):
        return at + NEIGHBOR <= end
    return True


@kernel
def type(data: Array, at: int) -> int:  # noqa: A001 - the RFC's name, always used as icmpv6.type
    """Return the type."""
    return load8(data, at)


@kernel
def code(data: Array, at: int) -> int:
    """Return the code."""
    return load8(data, at + 1)


@kernel
def checksum(data: Array, at: int) -> int:
    """Return the checksum as it stands."""
    return load16(data, at + 2)


@kernel
def identifier(data: Array, at: int) -> int:
    """Return an echo's identifier, which serves as its port."""
    return load16(data, at + 4)


@kernel
def sequence(data: Array, at: int) -> int:
    """Return an echo's sequence number."""
    return load16(data, at + 6)


@kernel
def mtu(data: Array, at: int) -> int:
    """Return the MTU from "packet too big", 32 bits."""
    return load32(data, at + 4)


@kernel
def is_error(kind: int) -> bool:
    """Tell whether messages of this type quote the packet that caused them and are known."""
    return 1 <= kind <= 4


@kernel
def target_hi(data: Array, at: int) -> int:
    """Return the upper half of a neighbor message's target, unsigned."""
    return load64(data, at + 8)


@kernel
def target_lo(data: Array, at: int) -> int:
    """Return the lower half of a neighbor message's target, unsigned."""
    return load64(data, at + 16)


@kernel
def flags(data: Array, at: int) -> int:
    """Return ``ROUTER | SOLICITED | OVERRIDE`` of an advertisement."""
    return load32(data, at + 4) & (ROUTER | SOLICITED | OVERRIDE)


@kernel
def link_layer_option(data: Array, at: int, end: int, kind: int) -> int:
    """Return the MAC in the first option of ``kind`` behind a neighbor message's target, or -1.

    The whole message is to be discarded when an option has length 0 (RFC 4861, 4.6), so that gives -1 too, even behind
    the option that was asked for; ``options_valid`` tells the two apart.
    """
    found = -1
    offset = at + NEIGHBOR
    for _ in range(MAX_OPTIONS):
        if offset + LINK_LAYER_OPTION > end:
            break
        length = load8(data, offset + 1) << 3
        if length == 0 or offset + length > end:
            return -1
        if found < 0 and load8(data, offset) == kind and length == LINK_LAYER_OPTION:
            found = load48(data, offset + 2)
        offset += length
    return found if offset == end else -1


@kernel
def options_valid(data: Array, at: int, end: int) -> bool:
    """Tell whether whole options of non-zero length fill the space between a neighbor message's target and ``end``."""
    offset = at + NEIGHBOR
    for _ in range(MAX_OPTIONS):
        if offset + LINK_LAYER_OPTION > end:
            break
        length = load8(data, offset + 1) << 3
        if length == 0:
            return False
        offset += length
    return offset == end


@kernel
def _pseudo(data: Array, ip: int, length: int) -> int:
    source_hi, source_lo = ipv6.source_hi(data, ip), ipv6.source_lo(data, ip)
    return pseudo_header(
        source_hi, source_lo, ipv6.destination_hi(data, ip), ipv6.destination_lo(data, ip), PROTOCOL, length
    )


@kernel
def checksum_ok(data: Array, at: int, end: int, ip: int) -> bool:
    """Tell whether the message ``data[at:end]`` of the packet whose IPv6 header is at ``ip`` sums to zero."""
    return fold(sum16(data, at, end - at, _pseudo(data, ip, end - at))) == 0xFFFF


@kernel
def finish(data: Array, at: int, length: int) -> None:
    """Compute the checksum of a message of ``length`` bytes that stands directly behind its IPv6 header."""
    store16(data, at + 2, 0)
    store16(data, at + 2, compute(data, at, length, _pseudo(data, at - ipv6.HEADER, length)))


@kernel
def set_identifier(data: Array, at: int, value: int) -> None:
    """Write an echo's identifier; the checksum follows."""
    store16(data, at + 2, update16(load16(data, at + 2), load16(data, at + 4), value))
    store16(data, at + 4, value)


@kernel
def emit_echo(data: Array, at: int, kind: int, identifier: int, sequence: int, length: int) -> None:
    """Write an echo header before ``length`` bytes of payload, behind an IPv6 header; all are covered."""
    emit_error(data, at, kind, 0, (identifier & 0xFFFF) << 16 | (sequence & 0xFFFF), length)


@kernel
def emit_echo_reply(data: Array, at: int) -> None:
    """Turn the echo request at ``at`` into its reply, in place.

    The checksum follows by RFC 1624. Exchanging source and destination, which the caller does, leaves it as it is.
    """
    word = load16(data, at)
    store16(data, at + 2, update16(load16(data, at + 2), word, ECHO_REPLY << 8 | (word & 0xFF)))
    store8(data, at, ECHO_REPLY)


@kernel
def emit_error(data: Array, at: int, type_: int, code: int, rest: int, length: int) -> None:
    """Write a header before ``length`` bytes of quote, directly behind an IPv6 header; the checksum covers all.

    ``rest`` is the second 32-bit word: the MTU (2), the pointer (4), or 0.
    """
    store8(data, at, type_)
    store8(data, at + 1, code)
    store32(data, at + 4, rest)
    finish(data, at, HEADER + length)


@kernel
def _emit_neighbor(data: Array, at: int, rest: int, target_hi: int, target_lo: int) -> None:
    store32(data, at + 4, rest)
    store64(data, at + 8, target_hi)
    store64(data, at + 16, target_lo)


@kernel
def _emit_option(data: Array, at: int, kind: int, mac: int) -> None:
    store16(data, at, kind << 8 | 1)
    store48(data, at + 2, mac)


@kernel
def emit_solicitation(data: Array, at: int, target_hi: int, target_lo: int, mac: int) -> int:
    """Write a neighbor solicitation behind an IPv6 header and return its length.

    ``mac`` is ours, for the source link-layer option; -1 leaves it out, as duplicate address detection must.
    """
    store16(data, at, NEIGHBOR_SOLICITATION << 8)
    _emit_neighbor(data, at, 0, target_hi, target_lo)
    length = NEIGHBOR
    if mac >= 0:
        _emit_option(data, at + NEIGHBOR, SOURCE_LINK_LAYER, mac)
        length += LINK_LAYER_OPTION
    finish(data, at, length)
    return length


@kernel
def emit_advertisement(data: Array, at: int, target_hi: int, target_lo: int, flags: int, mac: int) -> int:
    """Write a neighbor advertisement with ``mac`` behind an IPv6 header and return its length, 32.

    ``flags`` are ``ROUTER | SOLICITED | OVERRIDE``.
    """
    store16(data, at, NEIGHBOR_ADVERTISEMENT << 8)
    _emit_neighbor(data, at, flags, target_hi, target_lo)
    _emit_option(data, at + NEIGHBOR, TARGET_LINK_LAYER, mac)
    finish(data, at, NEIGHBOR + LINK_LAYER_OPTION)
    return NEIGHBOR + LINK_LAYER_OPTION
