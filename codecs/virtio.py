"""The 10-byte virtio network header (virtio 1.2, 5.1.6) that precedes a frame on a TAP or packet socket.

All words are in host order. ``csum_start`` counts from the first byte of the frame, not of this header.
"""

from dataplane.jit import Array, kernel, load8, load16n, store8, store16n

HEADER = 10

NEEDS_CSUM = 1  # flags
DATA_VALID = 2

GSO_NONE = 0
GSO_TCPV4 = 1
GSO_UDP = 3
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80


@kernel
def valid(data: Array, at: int, length_of_frame: int) -> bool:
    """Tell whether every offset lies inside a frame of that many bytes, and segmentation names a size.

    The header itself must be inside ``data``: it has a fixed place before the frame.
    """
    if flags(data, at) & NEEDS_CSUM and csum_start(data, at) + csum_offset(data, at) + 2 > length_of_frame:
        return False
    kind = gso_type(data, at)
    if kind == GSO_NONE:
        return True
    return kind != GSO_ECN and gso_size(data, at) > 0 and hdr_len(data, at) <= length_of_frame


@kernel
def flags(data: Array, at: int) -> int:
    """Return ``NEEDS_CSUM | DATA_VALID``."""
    return load8(data, at)


@kernel
def gso_type(data: Array, at: int) -> int:
    """Return the kind of super-frame, perhaps with ``GSO_ECN``."""
    return load8(data, at + 1)


@kernel
def hdr_len(data: Array, at: int) -> int:
    """Return the bytes of headers to repeat before each segment; a hint."""
    return load16n(data, at + 2)


@kernel
def gso_size(data: Array, at: int) -> int:
    """Return the payload bytes of each segment."""
    return load16n(data, at + 4)


@kernel
def csum_start(data: Array, at: int) -> int:
    """Return where in the frame the checksummed part begins."""
    return load16n(data, at + 6)


@kernel
def csum_offset(data: Array, at: int) -> int:
    """Return where behind ``csum_start`` the checksum goes."""
    return load16n(data, at + 8)


@kernel
def emit(data: Array, at: int, flags: int, csum_start: int, csum_offset: int) -> None:
    """Write the header of a frame that is not to be segmented."""
    store8(data, at, flags)
    set_gso(data, at, GSO_NONE, 0, 0)
    store16n(data, at + 6, csum_start)
    store16n(data, at + 8, csum_offset)


@kernel
def set_gso(data: Array, at: int, gso_type: int, hdr_len: int, gso_size: int) -> None:
    """Write the fields that tell how to cut a super-frame."""
    store8(data, at + 1, gso_type)
    store16n(data, at + 2, hdr_len)
    store16n(data, at + 4, gso_size)
