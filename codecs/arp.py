"""ARP for IPv4 over Ethernet (RFC 826); addresses are ints.

``valid`` accepts what the Linux kernel accepts on an Ethernet device: hardware type 1, or 6 (IEEE 802) of old stations.
Whether an *address* in the packet is possible is the ARP stage's question.
"""

from dataplane.jit import Array, kernel, load16, load32, load48, store16, store32, store48

HEADER = 28
HTYPE_ETHERNET = 1
HTYPE_IEEE802 = 6
PTYPE_IPV4 = 0x0800
LENGTHS = 0x0604  # hardware and protocol address lengths, one word
REQUEST = 1
REPLY = 2


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether this is an Ethernet/IPv4 request or reply that ends at or before ``end``."""
    if at + HEADER > end:
        return False
    htype = load16(data, at)
    if htype != HTYPE_ETHERNET and htype != HTYPE_IEEE802:
        return False
    if load16(data, at + 2) != PTYPE_IPV4 or load16(data, at + 4) != LENGTHS:
        return False
    code = load16(data, at + 6)
    return code in (REQUEST, REPLY)


@kernel
def operation(data: Array, at: int) -> int:
    """Return ``REQUEST`` or ``REPLY``."""
    return load16(data, at + 6)


@kernel
def sender_mac(data: Array, at: int) -> int:
    """Return the sender's MAC."""
    return load48(data, at + 8)


@kernel
def sender_ip(data: Array, at: int) -> int:
    """Return the sender's IPv4 address as 32 bits; 0 is a probe (RFC 5227)."""
    return load32(data, at + 14)


@kernel
def target_mac(data: Array, at: int) -> int:
    """Return the target's MAC; meaningless in a request."""
    return load48(data, at + 18)


@kernel
def target_ip(data: Array, at: int) -> int:
    """Return the IPv4 address that is asked for, 32 bits."""
    return load32(data, at + 24)


@kernel
def emit(
    data: Array, at: int, operation: int, sender_mac: int, sender_ip: int, target_mac: int, target_ip: int
) -> None:
    """Write the 28 bytes of a packet of hardware type 1."""
    store16(data, at, HTYPE_ETHERNET)
    store16(data, at + 2, PTYPE_IPV4)
    store16(data, at + 4, LENGTHS)
    store16(data, at + 6, operation)
    store48(data, at + 8, sender_mac)
    store32(data, at + 14, sender_ip)
    store48(data, at + 18, target_mac)
    store32(data, at + 24, target_ip)
