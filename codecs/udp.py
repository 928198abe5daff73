"""UDP (RFC 768). The pseudo header is passed as an unfolded sum, so one codec serves both families."""

from dataplane.codecs.checksum import checksum as compute
from dataplane.codecs.checksum import fold, sum16, udp_wire, update16
from dataplane.jit import Array, kernel, load16, store16

PROTOCOL = 17
HEADER = 8
CHECKSUM_AT = 6


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether header and length are possible and the datagram ends at or before ``end``."""
    if at + HEADER > end:
        return False
    size = load16(data, at + 4)
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
def length(data: Array, at: int) -> int:
    """Return the bytes of header and payload."""
    return load16(data, at + 4)


@kernel
def checksum(data: Array, at: int) -> int:
    """Return the checksum as it stands; 0 means that the sender gave none."""
    return load16(data, at + 6)


@kernel
def checksum_ok(data: Array, at: int, pseudo: int) -> bool:
    """Tell whether the datagram sums to zero or has no checksum.

    Over IPv6 a missing checksum is an error (RFC 8200, 8.1) but for tunnels (RFC 6935): the caller's decision.

    ``pseudo`` is ``pseudo_header(..., 17, length(data, at))``.
    """
    return load16(data, at + 6) == 0 or fold(sum16(data, at, length(data, at), pseudo)) == 0xFFFF


@kernel
def _set_port(data: Array, at: int, offset: int, value: int) -> None:
    old = load16(data, at + 6)
    if old != 0:
        store16(data, at + 6, udp_wire(update16(old, load16(data, at + offset), value)))
    store16(data, at + offset, value)


@kernel
def set_source_port(data: Array, at: int, value: int) -> None:
    """Write the source port; a complete checksum follows, an absent one stays absent."""
    _set_port(data, at, 0, value)


@kernel
def set_destination_port(data: Array, at: int, value: int) -> None:
    """Write the destination port; a complete checksum follows, an absent one stays absent."""
    _set_port(data, at, 2, value)


@kernel
def emit(data: Array, at: int, source_port: int, destination_port: int, length: int) -> None:
    """Write the 8 bytes of a header without checksum; ``length`` counts them."""
    store16(data, at, source_port)
    store16(data, at + 2, destination_port)
    store16(data, at + 4, length)
    store16(data, at + 6, 0)


@kernel
def finish(data: Array, at: int, pseudo: int) -> None:
    """Compute the checksum of the datagram, whatever it was."""
    store16(data, at + 6, 0)
    store16(data, at + 6, udp_wire(compute(data, at, length(data, at), pseudo)))
