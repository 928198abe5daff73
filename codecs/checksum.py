"""The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

A sum is kept *unfolded*: a non-negative 64-bit int whose value modulo 0xffff is all that counts. Since 2**16 is 1
modulo 0xffff, words of any width may be added without splitting them first, and one 64-bit load replaces four 16-bit
ones. A sum of 64 KiB stays below 2**47, so thousands of them chain without overflow.

The same congruence makes one pseudo header serve both families: ::ffff:a.b.c.d differs from a.b.c.d by the word 0xffff,
which is zero here.
"""

from dataplane.jit import Array, kernel, load8, load16, load32, load64

LOW32 = 0xFFFF_FFFF


@kernel
def sum16(data: Array, at: int, length: int, initial: int) -> int:
    """Return ``initial`` plus the big-endian 16-bit words of ``data[at:at + length]``, unfolded.

    Any alignment is allowed. An odd length is padded with a zero byte, so only the last piece of a chain may be odd.
    """
    total = int(initial)
    for i in range(length >> 3):
        word = load64(data, at + (i << 3))
        total += (word & LOW32) + (word >> 32)
    tail = at + (length & ~7)
    if length & 4:
        total += load32(data, tail)
        tail += 4
    if length & 2:
        total += load16(data, tail)
        tail += 2
    if length & 1:
        total += load8(data, tail) << 8
    return total


@kernel
def fold(total: int) -> int:
    """Return the 16-bit ones-complement sum of an unfolded one; 0 only when ``total`` is 0."""
    total = (total & LOW32) + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@kernel
def checksum(data: Array, at: int, length: int, initial: int) -> int:
    """Return what the checksum field must hold, when it counts as zero in ``data[at:at + length]``.

    Over a region whose field is already filled in, 0 means that it is right.
    """
    return fold(sum16(data, at, length, initial)) ^ 0xFFFF


@kernel
def update16(checksum: int, old: int, new: int) -> int:
    """Return the checksum after one 16-bit word has changed from ``old`` to ``new``.

    Equation 3 of RFC 1624, not 4: the older form turns 0xffff into 0.
    """
    return fold((~int(checksum) & 0xFFFF) + (~int(old) & 0xFFFF) + (int(new) & 0xFFFF)) ^ 0xFFFF


@kernel
def update32(checksum: int, old: int, new: int) -> int:
    """Return the checksum after a 32-bit word at an even offset has changed (RFC 1624, equation 3)."""
    return fold((~int(checksum) & 0xFFFF) + (~int(old) & LOW32) + (int(new) & LOW32)) ^ 0xFFFF


@kernel
def update128(checksum: int, old_hi: int, old_lo: int, new_hi: int, new_lo: int) -> int:
    """Return the checksum after an address of either family has changed (RFC 1624, equation 3)."""
    removed = (~int(old_hi) & LOW32) + (~(int(old_hi) >> 32) & LOW32) + (~int(old_lo) & LOW32)
    removed += ~(int(old_lo) >> 32) & LOW32
    added = (int(new_hi) & LOW32) + (int(new_hi) >> 32) + (int(new_lo) & LOW32) + (int(new_lo) >> 32)
    return fold((~int(checksum) & 0xFFFF) + removed + added) ^ 0xFFFF


@kernel
def pseudo_header(src_hi: int, src_lo: int, dst_hi: int, dst_lo: int, protocol: int, length: int) -> int:
    """Return the unfolded sum of the pseudo header (RFC 9293 3.1, RFC 8200 8.1).

    Args:
        src_hi: Upper half of the 128-bit source address, unsigned; IPv4 is ::ffff:a.b.c.d.
        src_lo: Lower half.
        dst_hi: Upper half of the destination address.
        dst_lo: Lower half.
        protocol: The upper layer's number, never 0.
        length: Bytes of the transport header and its payload.
    """
    total = (int(src_hi) & LOW32) + (int(src_hi) >> 32) + (int(src_lo) & LOW32) + (int(src_lo) >> 32)
    total += (int(dst_hi) & LOW32) + (int(dst_hi) >> 32) + (int(dst_lo) & LOW32) + (int(dst_lo) >> 32)
    return total + int(protocol) + int(length)


@kernel
def udp_wire(checksum: int) -> int:
    """Return the checksum as UDP sends it: 0 means "none", so a computed 0 goes out as 0xffff (RFC 768)."""
    return 0xFFFF if checksum == 0 else checksum
