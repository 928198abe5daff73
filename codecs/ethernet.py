"""Ethernet II frames with up to two 802.1Q tags.

The header is variable in one way only: tags stand between the source address and the EtherType. ``valid`` walks at most
``MAX_TAGS`` of them; a third leaves a tag's number as the EtherType, which no stage knows.
"""

from dataplane.jit import Array, kernel, load16, load48, store16, store48

HEADER = 14
TAG = 4
MAX_TAGS = 2

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_VLAN = 0x8100
ETHERTYPE_IPV6 = 0x86DD
ETHERTYPE_QINQ = 0x88A8

BROADCAST = 0xFFFF_FFFF_FFFF
GROUP_BIT = 0x0100_0000_0000  # of a destination: multicast or broadcast


@kernel
def _type_at(data: Array, at: int, end: int) -> int:
    """Return the offset of the inner EtherType, or -1 when the frame ends before it."""
    offset = at + 12
    if offset + 2 > end:
        return -1
    for _ in range(MAX_TAGS):
        word = load16(data, offset)
        if word != ETHERTYPE_VLAN and word != ETHERTYPE_QINQ:
            return offset
        offset += TAG
        if offset + 2 > end:
            return -1
    return offset


@kernel
def valid(data: Array, at: int, end: int) -> bool:
    """Tell whether the addresses, every tag and the EtherType lie before ``end``."""
    return _type_at(data, at, end) >= 0


@kernel
def destination(data: Array, at: int) -> int:
    """Return the destination MAC."""
    return load48(data, at)


@kernel
def source(data: Array, at: int) -> int:
    """Return the source MAC."""
    return load48(data, at + 6)


@kernel
def ethertype(data: Array, at: int) -> int:
    """Return the EtherType behind the tags; below 0x600 it is the length of an 802.3 frame."""
    return load16(data, payload(data, at) - 2)


@kernel
def payload(data: Array, at: int) -> int:
    """Return the offset of the first byte behind the tags and the EtherType."""
    offset = at + 12
    for _ in range(MAX_TAGS):
        word = load16(data, offset)
        if word != ETHERTYPE_VLAN and word != ETHERTYPE_QINQ:
            break
        offset += TAG
    return offset + 2


@kernel
def vlan(data: Array, at: int) -> int:
    """Return the VLAN number of the outer tag (0: priority only), or -1 for an untagged frame."""
    word = load16(data, at + 12)
    if word != ETHERTYPE_VLAN and word != ETHERTYPE_QINQ:
        return -1
    return load16(data, at + 14) & 0x0FFF


@kernel
def is_group(address: int) -> bool:
    """Tell whether a MAC names a group of stations (broadcast included)."""
    return (int(address) & GROUP_BIT) != 0


@kernel
def emit(data: Array, at: int, destination: int, source: int, ethertype: int) -> None:
    """Write the 14 bytes of an untagged header."""
    store48(data, at, destination)
    store48(data, at + 6, source)
    store16(data, at + 12, ethertype)


@kernel
def emit_tagged(data: Array, at: int, destination: int, source: int, vid: int, ethertype: int) -> None:
    """Write the 18 bytes of a header with one 802.1Q tag of priority 0."""
    emit(data, at, destination, source, ETHERTYPE_VLAN)
    store16(data, at + 14, vid & 0x0FFF)
    store16(data, at + 16, ethertype)
