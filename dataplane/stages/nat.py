"""nat: a flow's translation, written into its packets (RFC 3022; RFC 5508 for ICMP errors; behaviour of B11, B12).

A flow holds the tuples that both directions *come in* with, and what a packet leaves as is the other direction's tuple,
inverted. So translation is four assignments, and nothing here decides anything: conntrack has found the flow and chosen
its tuples, and route has used the new destination already, out of the record. The frame is changed only now, so that
what was dropped on the way quotes the client's own packet in the ICMP error about it.

Checksums follow by equation 3 of RFC 1624: one sum of all that changes, old words complemented, brings header and
transport up to date. A checksum that was wrong stays wrong. UDP's 0 stays 0, for it means that there is none. One that
is left to a device (P3) is the pseudo header's sum, not complemented, and only the addresses are in it; the device sums
up the ports itself, for each segment of a super-frame.

An ICMP error about a flow carries a packet that went the other way, as this node had sent it: it is turned back into
what had come in, and the error into an answer to that (RFC 5508 4.2). The router that found the error shows its own
address unless that side of the flow is translated: then the error comes from the service, as in Linux.
"""

from typing import Any

import numpy as np

from dataplane.batch import FLOWS, IPV6, NEEDS_CSUM, RELATED
from dataplane.codecs import checksum, icmp, icmpv6, ipv4, ipv6, tcp, udp
from dataplane.codecs.checksum import LOW32
from dataplane.jit import kernel, load8, load16, load32, store16, store32
from dataplane.stages.quote import TRANSPORT, quoted_transport, request_type
from dataplane.tables.flow import DST_NAT, REPLY, SRC_NAT
from dataplane.verdict import Verdict

_ICMP_CHECKSUM = 2  # where the field is in the header
_ICMP_NAME = 4  # a query's identifier


@kernel
def nat(batch: Any, count: int, tables: Any, now: int) -> None:
    """Translate the accepted packets of rows [0, count) that belong to a translated flow; other rows are untouched.

    Mutates addresses, ports and checksums of the frame, and the addresses and ports of the record.
    """
    data, packets = batch
    tuples, flows = tables[FLOWS][2], tables[FLOWS][3]
    for i in range(count):
        packet = packets[i]
        half = int(packet["flow"])
        if half < 0 or packet["verdict"] != Verdict.ACCEPT:
            continue
        status = int(flows[half >> 1]["status"]) & (SRC_NAT | DST_NAT)
        if status == 0:
            continue
        other = tuples[half ^ 1]
        if int(packet["flags"]) & RELATED:
            _translate_error(data, packet, other, status & (DST_NAT if half & 1 == REPLY else SRC_NAT) != 0)
        else:
            _translate(data, packet, other)


@kernel
def _translate(data: Any, packet: Any, other: Any) -> None:
    """Make a packet the inverse of ``other``, the tuple that its answers come in with."""
    packet["src_hi"], packet["src_lo"] = other["dst_hi"], other["dst_lo"]
    packet["dst_hi"], packet["dst_lo"] = other["src_hi"], other["src_lo"]
    packet["sport"], packet["dport"] = other["dport"], other["sport"]
    change = _write_outer(data, packet)
    at, end = int(packet["l4"]), int(packet["start"]) + int(packet["length"])
    if at + TRANSPORT > end:
        return
    ports = (int(other["dport"]) << 16 | int(other["sport"])) & LOW32  # signed, as loads are: else sums are floats
    field = _unfinished(packet)
    if field < 0:
        _write_transport(data, at, end, int(packet["protocol"]), ports, change)
        return
    store16(data, field, checksum.fold(load16(data, field) + change))
    store32(data, at, ports)


@kernel
def _unfinished(packet: Any) -> int:
    """Return where TCP's or UDP's own checksum is if it is left to a device, else -1.

    In a tunnel it may be the inner packet's that is left: the outer one is complete (local checksum offload).
    """
    if not int(packet["vnet_flags"]) & NEEDS_CSUM:
        return -1
    protocol, at = int(packet["protocol"]), int(packet["l4"])
    if protocol == tcp.PROTOCOL:
        at += tcp.CHECKSUM_AT
    elif protocol == udp.PROTOCOL:
        at += udp.CHECKSUM_AT
    else:
        return -1
    return at if int(packet["start"]) + int(packet["csum_start"]) + int(packet["csum_offset"]) == at else -1


# --- addresses -------------------------------------------------------------------------------------------------------
# Each returns what it did to the sum of the address words, unfolded: the complements of the old ones and the new ones.


@kernel
def _write_outer(data: Any, packet: Any) -> int:
    """Write the record's addresses into the packet's IP header."""
    at = int(packet["l3"])
    if int(packet["flags"]) & IPV6:
        return _write6(data, at, packet["src_hi"], packet["src_lo"], packet["dst_hi"], packet["dst_lo"])
    return _write4(data, at, int(packet["src_lo"]) & LOW32, int(packet["dst_lo"]) & LOW32)


@kernel
def _write4(data: Any, at: int, source: int, destination: int) -> int:
    change = (~load32(data, at + 12) & LOW32) + (~load32(data, at + 16) & LOW32) + source + destination
    store16(data, at + 10, _update(load16(data, at + 10), change))
    store32(data, at + 12, source)
    store32(data, at + 16, destination)
    return change


@kernel
def _write6(data: Any, at: int, src_hi: int, src_lo: int, dst_hi: int, dst_lo: int) -> int:
    old = checksum.fold(checksum.sum16(data, at + 8, 32, 0))
    ipv6.set_addresses(data, at, src_hi, src_lo, dst_hi, dst_lo)
    return int(np.int64(checksum.pseudo_header(src_hi, src_lo, dst_hi, dst_lo, 0, 0))) + (old ^ 0xFFFF)


# --- transport -------------------------------------------------------------------------------------------------------


@kernel
def _update(value: int, change: int) -> int:
    """Return a checksum after the words under it have changed (RFC 1624, equation 3)."""
    return checksum.fold((~value & 0xFFFF) + change) ^ 0xFFFF


@kernel
def _write_transport(data: Any, at: int, end: int, protocol: int, ports: int, change: int) -> None:
    """Write ports or a query's identifier; a complete checksum follows them and the addresses.

    The caller has seen to ``TRANSPORT`` bytes; of a TCP header in a quote there may be no more.

    Args:
        data: The arena.
        at: Offset of the transport header.
        end: Where the packet ends.
        protocol: The header's number; others than TCP, UDP, ICMP and ICMPv6 are left alone.
        ports: The source port in the upper 16 bits, the destination port in the lower.
        change: What ``_write4`` or ``_write6`` has returned.
    """
    if protocol == tcp.PROTOCOL:
        change += (~load32(data, at) & LOW32) + ports
        store32(data, at, ports)
        if at + tcp.HEADER <= end:
            field = at + tcp.CHECKSUM_AT
            store16(data, field, _update(load16(data, field), change))
    elif protocol == udp.PROTOCOL:
        change += (~load32(data, at) & LOW32) + ports
        store32(data, at, ports)
        old = udp.checksum(data, at)
        if old != 0:
            store16(data, at + udp.CHECKSUM_AT, checksum.udp_wire(_update(old, change)))
    elif protocol == ipv4.PROTO_ICMP:
        _write_name(data, at, protocol, ports, 0)
    elif protocol == icmpv6.PROTOCOL:
        _write_name(data, at, protocol, ports, change)


@kernel
def _write_name(data: Any, at: int, protocol: int, ports: int, change: int) -> None:
    """Write a query's identifier: it is the request's source port and the reply's destination port."""
    kind, old = load8(data, at), load16(data, at + _ICMP_NAME)
    request = request_type(protocol, kind)
    name = old
    if request >= 0:
        name = ports >> 16 if kind == request else ports & 0xFFFF
    store16(data, at + _ICMP_NAME, name)
    value = _update(load16(data, at + _ICMP_CHECKSUM), change + (~old & 0xFFFF) + name)
    # The reply to an empty echo of identifier and sequence 0 is all zeros: equation 3 gives 0, but that sums to 0 too,
    # and receivers want 0xffff.
    if value == 0 and load16(data, at) == 0 and load32(data, at + _ICMP_NAME) == 0:
        value = 0xFFFF
    store16(data, at + _ICMP_CHECKSUM, value)


# --- ICMP errors -----------------------------------------------------------------------------------------------------


@kernel
def _translate_error(data: Any, packet: Any, other: Any, from_service: bool) -> None:
    """Turn the packet in an error back into what had come in with the tuple ``other``, and send the error there.

    ``from_service`` tells that the flow hides the address of the side that the error comes from (kernel:
    ``nf_nat_icmp_reply_translation``).
    """
    at = int(packet["l4"]) + icmp.HEADER
    end = int(packet["start"]) + int(packet["length"])
    found = quoted_transport(data, at, end)
    if found < 0:
        return
    # No more than this can change. The sum before and after is all that the error's own checksum has to know.
    size = min(end, (found >> 8) + tcp.HEADER) - at
    before = checksum.fold(checksum.sum16(data, at, size, 0))
    _translate_quote(data, at, end, found, other)
    change = checksum.sum16(data, at, size, before ^ 0xFFFF)
    if from_service:
        packet["src_hi"], packet["src_lo"] = other["dst_hi"], other["dst_lo"]
    packet["dst_hi"], packet["dst_lo"] = other["src_hi"], other["src_lo"]
    outer = _write_outer(data, packet)
    if int(packet["flags"]) & IPV6:
        change += outer
    field = int(packet["l4"]) + _ICMP_CHECKSUM
    store16(data, field, _update(load16(data, field), change))


@kernel
def _translate_quote(data: Any, at: int, end: int, found: int, other: Any) -> None:
    """Make the packet at ``at``, whose transport header is where ``found`` says, one of the tuple ``other``."""
    if load8(data, at) >> 4 == 6:
        change = _write6(data, at, other["src_hi"], other["src_lo"], other["dst_hi"], other["dst_lo"])
    else:
        change = _write4(data, at, int(other["src_lo"]) & LOW32, int(other["dst_lo"]) & LOW32)
    ports = (int(other["sport"]) << 16 | int(other["dport"])) & LOW32
    if (found >> 8) + TRANSPORT <= end:
        _write_transport(data, found >> 8, end, found & 0xFF, ports, change)
