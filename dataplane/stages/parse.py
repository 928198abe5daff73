"""parse: from bytes to a record.

Reads Ethernet, IPv4, IPv6 and the transport ports once, checks what can be checked without any table, and fills the
record that all later stages work on. After it, ``l3`` points to an IP header that lies wholly inside the frame and
the frame ends where the IP packet ends (an Ethernet frame shorter than 60 bytes is padded on the wire; the padding is
cut off).

Drops: l2.too-short, l2.other-mac, l2.bad-ethertype, ip.bad-hdr, ip.bad-csum.
"""

from typing import Any

from dataplane.batch import DONT_FRAGMENT, FRAGMENT, INTERFACE_TABLE, IPV6, V4_PREFIX
from dataplane.codecs import checksum, ethernet, ipv4, ipv6
from dataplane.jit import kernel, load8, load16, load32, load48, load64
from dataplane.tables.interface import Role
from dataplane.verdict import Reason, Verdict

_MORE_OR_OFFSET = 0x3FFF  # more-fragments flag and offset: zero for a whole datagram
_OFFSET = 0x1FFF
_TCP = 6
_UDP = 17
_ICMP = 1
_ICMPV6 = 58
_GROUP = 1 << 40  # the bit of a MAC address that marks a group: multicast or broadcast


@kernel
def parse(batch: Any, count: int, tables: Any, now: int) -> None:
    """Fill the records of rows [0, count).

    Underlay rows carry outer headers, whose destination MAC is the interface's own.
    """
    data, packets = batch
    verdict, reason, iif = packets["verdict"], packets["reason"], packets["iif"]
    mac = tables[INTERFACE_TABLE]["mac"]
    role = tables[INTERFACE_TABLE]["role"]
    for i in range(count):
        if verdict[i] != Verdict.ACCEPT:
            continue
        station = int(mac[iif[i]])
        if role[iif[i]] == Role.NODE:
            station = load48(data, packets["start"][i])  # what the slow path makes has no station to be sent to
        why = parse_frame(data, packets, i, station)
        if why != Reason.ACCEPTED:
            verdict[i], reason[i] = Verdict.DROP, why


@kernel
def parse_frame(data: Any, packets: Any, i: int, station: int) -> int:
    """Fill row ``i`` from the frame at its ``start``; return the reason to drop it, or ``ACCEPTED``.

    Args:
        data: the arena.
        packets: ``(n,)`` of ``PACKET``.
        i: the row.
        station: the MAC address of the receiver.
    """
    start, length = int(packets["start"][i]), int(packets["length"][i])
    if length < ethernet.HEADER:
        return Reason.L2_TOO_SHORT
    destination = load48(data, start)
    if destination != station and not destination & _GROUP:
        return Reason.L2_OTHER_MAC
    kind = load16(data, start + 12)
    packets["ethertype"][i] = kind
    packets["l3"][i] = start + ethernet.HEADER
    packets["l4"][i] = 0
    packets["sport"][i] = 0
    packets["dport"][i] = 0
    packets["tcp_flags"][i] = 0
    packets["fragment"][i] = 0
    if kind == ethernet.ETHERTYPE_IPV4:
        return _parse_ipv4(data, packets, i, start + length)
    if kind == ethernet.ETHERTYPE_IPV6:
        return _parse_ipv6(data, packets, i, start + length)
    if kind == ethernet.ETHERTYPE_ARP:
        return Reason.ACCEPTED
    return Reason.L2_BAD_ETHERTYPE


@kernel
def _parse_ipv4(data: Any, packets: Any, i: int, end: int) -> int:
    l3 = int(packets["l3"][i])
    if not ipv4.valid(data, l3, end):
        return Reason.IP_BAD_HDR
    header = (load8(data, l3) & 15) * 4
    if checksum.fold(checksum.sum16(data, l3, header, 0)) != 0xFFFF:
        return Reason.IP_BAD_CSUM
    total = load16(data, l3 + 2)
    packets["length"][i] = ethernet.HEADER + total
    packets["tos"][i] = load8(data, l3 + 1)
    packets["ttl"][i] = load8(data, l3 + 8)
    packets["protocol"][i] = load8(data, l3 + 9)
    packets["ip_id"][i] = load16(data, l3 + 4)
    packets["src_hi"][i] = 0
    packets["dst_hi"][i] = 0
    packets["src_lo"][i] = V4_PREFIX | load32(data, l3 + 12)
    packets["dst_lo"][i] = V4_PREFIX | load32(data, l3 + 16)
    packets["l4"][i] = l3 + header
    word = load16(data, l3 + 6)
    packets["fragment"][i] = word
    flags = int(packets["flags"][i]) & ~(IPV6 | FRAGMENT | DONT_FRAGMENT)
    if word & _MORE_OR_OFFSET:
        flags |= FRAGMENT
    if word & 0x4000:
        flags |= DONT_FRAGMENT
    packets["flags"][i] = flags & 0xFFFF
    if word & _OFFSET == 0:
        parse_transport(data, packets, i, l3 + total)
    return Reason.ACCEPTED


@kernel
def _parse_ipv6(data: Any, packets: Any, i: int, end: int) -> int:
    l3 = int(packets["l3"][i])
    if not ipv6.valid(data, l3, end):
        return Reason.IP_BAD_HDR
    total = ipv6.HEADER + load16(data, l3 + 4)
    packets["length"][i] = ethernet.HEADER + total
    packets["tos"][i] = load16(data, l3) >> 4 & 0xFF
    packets["ttl"][i] = load8(data, l3 + 7)
    packets["src_hi"][i] = load64(data, l3 + 8)
    packets["src_lo"][i] = load64(data, l3 + 16)
    packets["dst_hi"][i] = load64(data, l3 + 24)
    packets["dst_lo"][i] = load64(data, l3 + 32)
    upper = ipv6.upper(data, l3, l3 + total)
    if upper < 0:
        return Reason.IP_BAD_HDR
    packets["protocol"][i] = upper >> 8 & 0xFF
    packets["l4"][i] = upper >> 16
    flags = int(packets["flags"][i]) & ~FRAGMENT | IPV6 | DONT_FRAGMENT
    if upper & 1:
        flags |= FRAGMENT
    packets["flags"][i] = flags & 0xFFFF
    if upper & 2 == 0:
        parse_transport(data, packets, i, l3 + total)
    return Reason.ACCEPTED


@kernel
def parse_transport(data: Any, packets: Any, i: int, end: int) -> None:
    """Fill ports and TCP flags of row ``i``; a transport header that is cut off leaves them 0.

    A router forwards what it cannot read; conntrack is the one that calls a torn transport header invalid.
    """
    l4, protocol = int(packets["l4"][i]), int(packets["protocol"][i])
    if protocol in (_TCP, _UDP) and l4 + 8 <= end:
        packets["sport"][i] = load16(data, l4)
        packets["dport"][i] = load16(data, l4 + 2)
        if protocol == _TCP and l4 + 14 <= end:
            packets["tcp_flags"][i] = load8(data, l4 + 13)
    elif protocol in (_ICMP, _ICMPV6) and l4 + 8 <= end:
        echo = load8(data, l4)
        if echo in (0, 8, 128, 129):
            packets["sport"][i] = load16(data, l4 + 4)
            packets["dport"][i] = load16(data, l4 + 4)
