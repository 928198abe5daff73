"""The packet that an ICMP error quotes: which flow it belonged to (RFC 792, RFC 4443 2.4, RFC 5508 4).

An error is about a packet that went the other way, so its flow is found by the *inverted* tuple of the quote: what a
packet of the error's own direction carries. A quote is whatever the network let through, from 8 bytes of the transport
header to a whole packet; its lengths and checksums prove nothing and are not looked at, as in Linux.
"""

from typing import Any

from dataplane.batch import IPV6, V4_PREFIX
from dataplane.codecs import icmp, icmpv6, ipv4, ipv6
from dataplane.jit import kernel, load8, load16, load32, load64

TRANSPORT = 8  # bytes of a transport header that an error quotes at least: ports and UDP's checksum, or a query's id

_TCP = 6
_UDP = 17
_ICMP = 1
_ICMPV6 = 58


@kernel
def request_type(protocol: int, kind: int) -> int:
    """Return the type of the request that an ICMP query message belongs to, its own or its reply's; -1: no query."""
    if protocol == _ICMP:
        if kind == icmp.ECHO_REPLY:
            return icmp.ECHO_REQUEST
        if 13 <= kind <= 18:  # timestamp, information, address mask: requests are odd (RFC 792, RFC 950)
            return kind - 1 | 1
        return kind if kind == icmp.ECHO_REQUEST else -1
    return icmpv6.ECHO_REQUEST if kind in (icmpv6.ECHO_REQUEST, icmpv6.ECHO_REPLY) else -1


@kernel
def quoted_transport(data: Any, at: int, end: int) -> int:
    """Find the transport header of the packet at ``at``, of which only ``data[at:end]`` is there.

    Returns:
        ``offset << 8 | protocol``, or -1 when a header is impossible or cut off, the packet is a later fragment, or
        fewer than ``TRANSPORT`` bytes follow where there are ports or an id.
    """
    if at + ipv4.HEADER > end:
        return -1
    version = load8(data, at) >> 4
    found = -1
    if version == 4:
        found = _transport4(data, at, end)
    elif version == 6:
        found = _transport6(data, at, end)
    if found < 0:
        return -1
    numbered = found & 0xFF in (_TCP, _UDP, _ICMP, _ICMPV6)
    return -1 if numbered and (found >> 8) + TRANSPORT > end else found


@kernel
def _transport4(data: Any, at: int, end: int) -> int:
    length = ipv4.header_length(data, at)
    if length < ipv4.HEADER or at + length > end or ipv4.fragment_word(data, at) & ipv4.OFFSET_MASK:
        return -1
    return at + length << 8 | ipv4.protocol(data, at)


@kernel
def _transport6(data: Any, at: int, end: int) -> int:
    if at + ipv6.HEADER > end:
        return -1
    found = ipv6.upper(data, at, end)
    return -1 if found < 0 or found & ipv6.UPPER_LATER else found >> 8


@kernel
def quoted_tuple(data: Any, packet: Any, out: Any) -> bool:
    """Fill ``out`` with the inverted tuple of the packet that an ICMP error quotes.

    Args:
        data: The arena.
        packet: A ``PACKET`` of ICMP or ICMPv6, its type that of an error.
        out: A ``TUPLE``: addresses, ports and protocol are written.

    Returns:
        Whether the quote names a flow; if not, ``out`` is not to be used. An error about an error never does.
    """
    at, end = int(packet["l4"]) + icmp.HEADER, int(packet["start"]) + int(packet["length"])
    wide = int(packet["flags"]) & IPV6 != 0
    found = quoted_transport(data, at, end)
    if found < 0 or wide != (load8(data, at) >> 4 == 6):
        return False
    if wide:
        out["src_hi"], out["src_lo"] = load64(data, at + 24), load64(data, at + 32)
        out["dst_hi"], out["dst_lo"] = load64(data, at + 8), load64(data, at + 16)
    else:
        out["src_hi"], out["src_lo"] = 0, V4_PREFIX | load32(data, at + 16)
        out["dst_hi"], out["dst_lo"] = 0, V4_PREFIX | load32(data, at + 12)
    return _quoted_ports(data, found >> 8, found & 0xFF, out)


@kernel
def _quoted_ports(data: Any, at: int, protocol: int, out: Any) -> bool:
    """Fill in protocol and ports, as ``parse`` would and then inverted, from the transport header at ``at``."""
    out["protocol"], out["sport"], out["dport"] = protocol, 0, 0
    if protocol in (_TCP, _UDP):
        out["sport"], out["dport"] = load16(data, at + 2), load16(data, at)
    elif protocol in (_ICMP, _ICMPV6):
        kind = load8(data, at)
        request, name = request_type(protocol, kind), load16(data, at + 4)
        if request < 0:
            return False
        out["sport"] = request << 8 if kind == request else name
        out["dport"] = name if kind == request else request << 8
    return True
