"""ICMP for IPv4 (RFC 792): echo, and the errors that quote a packet."""

from dataplane.codecs.checksum import checksum as compute
from dataplane.codecs.checksum import fold, sum16, update16
from dataplane.jit import Array, kernel, load8, load16, store8, store16, store32

HEADER = 8

ECHO_REPLY = 0
UNREACHABLE = 3
SOURCE_QUENCH = 4
REDIRECT = 5
ECHO_REQUEST = 8
TIME_EXCEEDED = 11
PARAMETER_PROBLEM = 12
TIMESTAMP_REQUEST = 13
TIMESTAMP_REPLY = 14

NET_UNREACHABLE = 0  # codes of UNREACHABLE
HOST_UNREACHABLE = 1
PROTOCOL_UNREACHABLE = 2
PORT_UNREACHABLE = 3
FRAGMENTATION_NEEDED = 4
ADMIN_PROHIBITED = 13
TTL_EXCEEDED = 0  # codes of TIME_EXCEEDED
REASSEMBLY_EXCEEDED = 1


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether the 8-byte header ends at or before ``end``."""
    return at + HEADER <= end


@kernel
def type(data: Array, at: int) -> int:  # noqa: A001 - the RFC's name, always used as icmp.type
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
    """Return a query's identifier, which serves as its port."""
    return load16(data, at + 4)


@kernel
def sequence(data: Array, at: int) -> int:
    """Return a query's sequence number."""
    return load16(data, at + 6)


@kernel
def mtu(data: Array, at: int) -> int:
    """Return the next hop's MTU from "fragmentation needed"; 0 from a router older than RFC 1191."""
    return load16(data, at + 6)


@kernel
def is_error(kind: int) -> bool:
    """Tell whether messages of this type quote the packet that caused them."""
    return 3 <= kind <= 5 or kind in (TIME_EXCEEDED, PARAMETER_PROBLEM)


@kernel
def checksum_ok(data: Array, at: int, end: int) -> bool:
    """Tell whether the message ``data[at:end]`` sums to zero."""
    return fold(sum16(data, at, end - at, 0)) == 0xFFFF


@kernel
def _update(data: Array, at: int, old: int, new: int) -> None:
    """Let the checksum follow the change of one word.

    Alone among the protocols here, ICMP has messages that become all zeros: the reply to an empty echo of identifier 0
    and sequence 0. RFC 1624 gives 0 for them and receivers reject that; 0xffff is right for them and is the same number
    as 0 for every other message.
    """
    value = update16(load16(data, at + 2), old, new)
    store16(data, at + 2, 0xFFFF if value == 0 else value)


@kernel
def set_identifier(data: Array, at: int, value: int) -> None:
    """Write a query's identifier; the checksum follows."""
    _update(data, at, load16(data, at + 4), value)
    store16(data, at + 4, value)


@kernel
def emit_echo(data: Array, at: int, kind: int, identifier: int, sequence: int, length: int) -> None:
    """Write an echo header before ``length`` bytes of payload that are in place; the checksum covers both."""
    emit_error(data, at, kind, 0, (identifier & 0xFFFF) << 16 | (sequence & 0xFFFF), length)


@kernel
def emit_echo_reply(data: Array, at: int) -> None:
    """Turn the echo request at ``at`` into its reply, in place; the checksum follows by RFC 1624."""
    word = load16(data, at)
    _update(data, at, word, word & 0xFF)
    store8(data, at, ECHO_REPLY)


@kernel
def emit_error(data: Array, at: int, type_: int, code: int, rest: int, length: int) -> None:
    """Write a header before ``length`` bytes of quote that are in place; the checksum covers both.

    ``rest`` is the second 32-bit word: the MTU (3/4), the gateway (5), the pointer in its top byte (12), or 0.
    """
    store8(data, at, type_)
    store8(data, at + 1, code)
    store16(data, at + 2, 0)
    store32(data, at + 4, rest)
    store16(data, at + 2, compute(data, at, HEADER + length, 0))
