"""parse: from bytes to a record.

Reads Ethernet, IPv4, IPv6 and the transport ports once, checks what can be checked without any table, and fills the
record that all later stages work on. After it, ``l3`` points to an IP header that lies wholly inside the frame and
the frame ends where the IP packet ends (an Ethernet frame shorter than 60 bytes is padded on the wire; the padding is
cut off).

Drops: l2.too-short, l2.other-mac, l2.bad-ethertype, ip.bad-hdr, ip.bad-csum.
"""

from typing import Any

import numpy as np

from dataplane.batch import DONT_FRAGMENT, FRAGMENT, INTERFACE_TABLE, IPV6, NEEDS_CSUM, V4_PREFIX
from dataplane.codecs import checksum, ethernet, ipv4, ipv6
from dataplane.jit import kernel, load8, load16, load32, load48, load64
from dataplane.stages.quote import request_type
from dataplane.tables.interface import Role
from dataplane.verdict import Reason, Verdict

_MORE_OR_OFFSET = 0x3FFF  # more-fragments flag and offset: zero for a whole datagram
_OFFSET = 0x1FFF
_TCP = 6
_TCP_CHECKSUM = 16  # where the field is in the header
_UDP = 17
_UDP_CHECKSUM = 6
_ICMP = 1
_ICMPV6 = 58
_GROUP = 1 << 40  # the bit of a MAC address that marks a group: multicast or broadcast


@kernel
def parse(batch: Any, count: int, tables: Any, now: int) -> None:
    """Fill the records of rows [0, count).

    Underlay rows carry outer headers, whose destination MAC is the interface's own.
    """
    data, packets = batch
    interfaces = tables[INTERFACE_TABLE]
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] != Verdict.ACCEPT:
            continue
        interface = interfaces[packet["iif"]]
        station = int(np.int64(interface["mac"]))
        if interface["role"] == Role.NODE:
            station = load48(data, packet["start"])  # what the slow path makes has no station to be sent to
        why = parse_frame(data, packet, station)
        if why != Reason.ACCEPTED:
            packet["verdict"], packet["reason"] = Verdict.DROP, why
        elif packet["vnet_flags"] & NEEDS_CSUM:
            _confine_checksum(packet)


@kernel
def _confine_checksum(packet: Any) -> None:
    """Ignore a virtio header that wants its checksum in front of where TCP or UDP has it.

    Who finishes the checksum writes it where the sender says, behind all checks: a pod could change the addresses and
    ports that they looked at. Farther back is allowed; a tunnel inside the pod has its transport header there.
    """
    field = int(packet["start"]) + int(packet["csum_start"]) + int(packet["csum_offset"])
    place = _TCP_CHECKSUM if packet["protocol"] == _TCP else _UDP_CHECKSUM
    if packet["l4"] == 0 or field < int(packet["l4"]) + place:
        packet["vnet_flags"] = 0


@kernel
def parse_frame(data: Any, packet: Any, station: int) -> int:
    """Fill a record from the frame at its ``start``; return the reason to drop it, or ``ACCEPTED``.

    Args:
        data: the arena.
        packet: one ``PACKET``.
        station: the MAC address of the receiver.
    """
    start, length = int(packet["start"]), int(packet["length"])
    if length < ethernet.HEADER:
        return Reason.L2_TOO_SHORT
    destination = load48(data, start)
    if destination != station and not destination & _GROUP:
        return Reason.L2_OTHER_MAC
    kind = load16(data, start + 12)
    packet["ethertype"] = kind
    packet["l3"] = start + ethernet.HEADER
    packet["l4"] = 0
    packet["sport"] = 0
    packet["dport"] = 0
    packet["tcp_flags"] = 0
    packet["fragment"] = 0
    if kind == ethernet.ETHERTYPE_IPV4:
        return _parse_ipv4(data, packet, start + length)
    if kind == ethernet.ETHERTYPE_IPV6:
        return _parse_ipv6(data, packet, start + length)
    if kind == ethernet.ETHERTYPE_ARP:
        return Reason.ACCEPTED
    return Reason.L2_BAD_ETHERTYPE


@kernel
def _parse_ipv4(data: Any, packet: Any, end: int) -> int:
    l3 = int(packet["l3"])
    if not ipv4.valid(data, l3, end):
        return Reason.IP_BAD_HDR
    header = (load8(data, l3) & 15) * 4
    if checksum.fold(checksum.sum16(data, l3, header, 0)) != 0xFFFF:
        return Reason.IP_BAD_CSUM
    total = load16(data, l3 + 2)
    packet["length"] = ethernet.HEADER + total
    packet["tos"] = load8(data, l3 + 1)
    packet["ttl"] = load8(data, l3 + 8)
    packet["protocol"] = load8(data, l3 + 9)
    packet["src_hi"] = 0
    packet["dst_hi"] = 0
    packet["src_lo"] = V4_PREFIX | load32(data, l3 + 12)
    packet["dst_lo"] = V4_PREFIX | load32(data, l3 + 16)
    packet["l4"] = l3 + header
    word = load16(data, l3 + 6)
    packet["fragment"] = word
    flags = int(packet["flags"]) & ~(IPV6 | FRAGMENT | DONT_FRAGMENT)
    if word & _MORE_OR_OFFSET:
        flags |= FRAGMENT
    if word & 0x4000:
        flags |= DONT_FRAGMENT
    packet["flags"] = flags & 0xFFFF
    if word & _OFFSET == 0:
        parse_transport(data, packet, l3 + total)
    return Reason.ACCEPTED


@kernel
def _parse_ipv6(data: Any, packet: Any, end: int) -> int:
    l3 = int(packet["l3"])
    if not ipv6.valid(data, l3, end):
        return Reason.IP_BAD_HDR
    total = ipv6.HEADER + load16(data, l3 + 4)
    packet["length"] = ethernet.HEADER + total
    packet["tos"] = load16(data, l3) >> 4 & 0xFF
    packet["ttl"] = load8(data, l3 + 7)
    packet["src_hi"] = load64(data, l3 + 8)
    packet["src_lo"] = load64(data, l3 + 16)
    packet["dst_hi"] = load64(data, l3 + 24)
    packet["dst_lo"] = load64(data, l3 + 32)
    upper = ipv6.upper(data, l3, l3 + total)
    if upper < 0:
        return Reason.IP_BAD_HDR
    packet["protocol"] = upper >> 8 & 0xFF
    packet["l4"] = upper >> 16
    flags = int(packet["flags"]) & ~FRAGMENT | IPV6 | DONT_FRAGMENT
    if upper & 1:
        flags |= FRAGMENT
    packet["flags"] = flags & 0xFFFF
    if upper & 2 == 0:
        parse_transport(data, packet, l3 + total)
    return Reason.ACCEPTED


@kernel
def parse_transport(data: Any, packet: Any, end: int) -> None:
    """Fill ports and TCP flags of a record; a transport header that is cut off leaves them 0.

    A router forwards what it cannot read; conntrack is the one that calls a torn transport header invalid.
    """
    l4, protocol = int(packet["l4"]), int(packet["protocol"])
    if protocol in (_TCP, _UDP) and l4 + 8 <= end:
        packet["sport"] = load16(data, l4)
        packet["dport"] = load16(data, l4 + 2)
        if protocol == _TCP and l4 + 14 <= end:
            packet["tcp_flags"] = load8(data, l4 + 13)
    elif protocol in (_ICMP, _ICMPV6) and l4 + 8 <= end:
        _parse_query(packet, load8(data, l4), load16(data, l4 + 4))


@kernel
def _parse_query(packet: Any, kind: int, name: int) -> None:
    """Give an ICMP query ports, so that a reply's tuple is its request's, inverted (RFC 792; RFC 4443 4).

    A request goes from "port" identifier to "port" request type << 8. With the identifier in both, the pings of two
    hosts that ping each other with the same one would be one flow; the kernel keeps type and code in its tuple as well.
    """
    request = request_type(int(packet["protocol"]), kind)
    if request < 0:
        return
    packet["sport"] = name if kind == request else request << 8
    packet["dport"] = request << 8 if kind == request else name
