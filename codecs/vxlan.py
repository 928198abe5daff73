"""VXLAN (RFC 7348): 8 bytes of flags and network identifier between UDP and the inner Ethernet frame."""

from dataplane.jit import Array, kernel, load8, load32, store32

HEADER = 8
PORT = 4789
FLAG_I = 0x0800_0000  # "the VNI is valid", in the first 32-bit word


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether the header ends at or before ``end``; ``flags_ok`` and ``reserved_ok`` judge what it says."""
    return at + HEADER <= end


@kernel
def flags_ok(data: Array, at: int) -> bool:
    """Tell whether the I flag is set."""
    return (load32(data, at) & FLAG_I) != 0


@kernel
def reserved_ok(data: Array, at: int) -> bool:
    """Tell whether every reserved bit is 0: stricter than the RFC, as Linux is without extensions."""
    return (load32(data, at) & ~FLAG_I) == 0 and load8(data, at + 7) == 0


@kernel
def vni(data: Array, at: int) -> int:
    """Return the 24-bit network identifier."""
    return load32(data, at + 4) >> 8


@kernel
def emit(data: Array, at: int, vni: int) -> None:
    """Write the 8 bytes."""
    store32(data, at, FLAG_I)
    store32(data, at + 4, (vni & 0xFF_FFFF) << 8)


@kernel
def source_port(flow_hash: int, low: int, high: int) -> int:
    """Return the outer source port in [low, high) for the inner flow's hash, as Linux's ``udp_flow_src_port`` gives it.

    The upper half is folded into the lower before scaling, since the scaling uses the top bits and hardware hashes have
    their entropy anywhere.
    """
    word = int(flow_hash) & 0xFFFF_FFFF
    word = (word ^ word << 16) & 0xFFFF_FFFF
    return (word * (high - low) >> 32) + low
