"""guard: what may not come in by this interface.

A pod's link carries one MAC address and the pod's own addresses; everything else on it is spoofed. That is the kernel's
strict ``rp_filter`` plus Calico's workload rules: no VXLAN and no IP-in-IP from a pod, or it could speak as a node.
From the LAN and from the tunnel come only packets whose source is not here (B2, B4).

Steals: host.owned. Drops: l2.spoofed-src, ip.spoofed-src, ip.martian, ip.multicast, tunnel.from-pod.
"""

from typing import Any

from dataplane.batch import INJECTED, INTERFACE_TABLE, IPV6, ROUTES, SETTINGS, TUNNEL_PORT, TUNNELED
from dataplane.codecs import ethernet
from dataplane.jit import kernel, load8
from dataplane.tables import route
from dataplane.tables.interface import Role
from dataplane.tables.route import Kind
from dataplane.verdict import Reason, Verdict

_UDP = 17
_IPIP = 4


@kernel
def guard(batch: Any, count: int, tables: Any, now: int) -> None:
    """Drop the packets of rows [0, count) that their interface cannot have sent."""
    data, packets = batch
    verdict, reason, iif, flags = packets["verdict"], packets["reason"], packets["iif"], packets["flags"]
    role = tables[INTERFACE_TABLE]["role"]
    for i in range(count):
        if verdict[i] != Verdict.ACCEPT or flags[i] & INJECTED:
            continue
        why = _impossible(packets, i)
        if why == Reason.ACCEPTED and load8(data, packets["start"][i]) & 1:
            why = _to_many(packets, i, tables)
        if why == Reason.ACCEPTED:
            pod = role[iif[i]] == Role.POD
            why = _from_pod(data, packets, i, tables) if pod else _from_outside(packets, i, tables)
        if why == Reason.HOST_OWNED:
            verdict[i], reason[i] = Verdict.STOLEN, why
        elif why != Reason.ACCEPTED:
            verdict[i], reason[i] = Verdict.DROP, why


@kernel
def _impossible(packets: Any, i: int) -> int:
    """Return why no interface may carry these addresses: groups are not forwarded, martians exist nowhere."""
    if int(packets["flags"][i]) & IPV6:
        source_hi, source_lo = packets["src_hi"][i], packets["src_lo"][i]
        target_hi, target_lo = packets["dst_hi"][i], packets["dst_lo"][i]
        if target_hi >> 56 == 0xFF:
            return Reason.IP_MULTICAST
        if source_hi >> 56 == 0xFF or (source_hi == 0 and _not_on_a_wire(source_lo)):
            return Reason.IP_MARTIAN
        if target_hi == 0 and _not_on_a_wire(target_lo):
            return Reason.IP_MARTIAN
        return Reason.ACCEPTED
    source, target = int(packets["src_lo"][i]) & 0xFFFF_FFFF, int(packets["dst_lo"][i]) & 0xFFFF_FFFF
    if target >> 28 == 0xE or target == 0xFFFF_FFFF:
        return Reason.IP_MULTICAST
    if source >> 24 in (0, 127) or source >> 28 >= 0xE or target >> 24 in (0, 127) or target >> 28 == 0xF:
        return Reason.IP_MARTIAN
    return Reason.ACCEPTED


@kernel
def _not_on_a_wire(lo: Any) -> bool:
    """Tell whether ::lo is unspecified, loopback or IPv4-mapped.

    A mapped address stands for an IPv4 one in our tables: an IPv6 packet that carries one would take IPv4's routes and
    pass for an IPv4 pod (draft-itojun-v6ops-v4mapped-harmful; Linux drops it, too).
    """
    return bool(lo <= 1 or lo >> 32 == 0xFFFF)


@kernel
def _to_many(packets: Any, i: int, tables: Any) -> int:
    """Return what becomes of a packet to one station in a frame to many: only that station may take it.

    Each receiver of the frame would forward it otherwise (RFC 1122 3.3.6; ``ip_forward`` takes PACKET_HOST only).
    """
    routes = tables[ROUTES]
    found = route.lookup(routes, packets["dst_hi"][i], packets["dst_lo"][i])
    if found >= 0 and routes[-1]["kind"][found] == Kind.LOCAL:
        return Reason.ACCEPTED
    return Reason.IP_MULTICAST


@kernel
def _from_pod(data: Any, packets: Any, i: int, tables: Any) -> int:
    iif = int(packets["iif"][i])
    if ethernet.source(data, packets["start"][i]) != int(tables[INTERFACE_TABLE]["peer_mac"][iif]):
        return Reason.L2_SPOOFED_SRC
    routes = tables[ROUTES]
    table = routes[-1]
    back = route.lookup(routes, packets["src_hi"][i], packets["src_lo"][i])
    if back < 0 or table["kind"][back] != Kind.POD or table["oif"][back] != iif:
        return Reason.IP_SPOOFED_SRC
    protocol = int(packets["protocol"][i])
    if protocol == _IPIP or (protocol == _UDP and int(packets["dport"][i]) == int(tables[SETTINGS][TUNNEL_PORT])):
        return Reason.TUNNEL_FROM_POD
    return Reason.ACCEPTED


@kernel
def _from_outside(packets: Any, i: int, tables: Any) -> int:
    """Return what is wrong with a packet from LAN or tunnel: its source lives here, or it is meant for the host."""
    routes = tables[ROUTES]
    kind = routes[-1]["kind"]
    back = route.lookup(routes, packets["src_hi"][i], packets["src_lo"][i])
    if back >= 0 and (kind[back] == Kind.POD or kind[back] == Kind.LOCAL or kind[back] == Kind.BLACKHOLE):
        return Reason.IP_MARTIAN
    if int(packets["flags"][i]) & TUNNELED == 0:
        target = route.lookup(routes, packets["dst_hi"][i], packets["dst_lo"][i])
        # The node's own addresses belong to the host's stack, which gets its own copy from the shared uplink.
        if target >= 0 and kind[target] == Kind.LOCAL:
            return Reason.HOST_OWNED
    return Reason.ACCEPTED
