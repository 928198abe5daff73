"""guard: what may not come in by this interface.

A pod's link carries one MAC address and the pod's own addresses; everything else on it is spoofed. That is the kernel's
strict ``rp_filter`` plus Calico's workload rules: no VXLAN and no IP-in-IP from a pod, or it could speak as a node.
From the LAN and from the tunnel come only packets whose source is not here, from the host's own device only the node's
(B2, B4).

Drops: l2.spoofed-src, ip.spoofed-src, ip.martian, ip.multicast, tunnel.from-pod.
"""

from typing import Any

import numpy as np

from dataplane.batch import INJECTED, INTERFACE_TABLE, IPV6, ROUTES, SETTINGS, TUNNEL_PORT
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
    interfaces = tables[INTERFACE_TABLE]
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] != Verdict.ACCEPT or packet["flags"] & INJECTED:
            continue
        why = _impossible(packet)
        if why == Reason.ACCEPTED and load8(data, packet["start"]) & 1:
            why = _to_many(packet, tables)
        if why == Reason.ACCEPTED:
            role = int(interfaces[packet["iif"]]["role"])
            if role == Role.POD:
                why = _from_pod(data, packet, tables)
            elif role == Role.HOST:
                why = _from_host(packet, tables)
            else:
                why = _from_outside(packet, tables)
        if why != Reason.ACCEPTED:
            packet["verdict"], packet["reason"] = Verdict.DROP, why


@kernel
def _impossible(packet: Any) -> int:
    """Return why no interface may carry these addresses: groups are not forwarded, martians exist nowhere."""
    if int(packet["flags"]) & IPV6:
        source_hi, source_lo = packet["src_hi"], packet["src_lo"]
        target_hi, target_lo = packet["dst_hi"], packet["dst_lo"]
        if target_hi >> 56 == 0xFF:
            return Reason.IP_MULTICAST
        if source_hi >> 56 == 0xFF or (source_hi == 0 and _not_on_a_wire(source_lo)):
            return Reason.IP_MARTIAN
        if target_hi == 0 and _not_on_a_wire(target_lo):
            return Reason.IP_MARTIAN
        return Reason.ACCEPTED
    source, target = int(packet["src_lo"]) >> 24 & 0xFF, int(packet["dst_lo"]) >> 24 & 0xFF
    if target >= 224:
        many = target < 240 or int(packet["dst_lo"]) & 0xFFFF_FFFF == 0xFFFF_FFFF
        return Reason.IP_MULTICAST if many else Reason.IP_MARTIAN
    if source >= 224 or source in (0, 127) or target in (0, 127):
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
def _to_many(packet: Any, tables: Any) -> int:
    """Return what becomes of a packet to one station in a frame to many: only that station may take it.

    Each receiver of the frame would forward it otherwise (RFC 1122 3.3.6; ``ip_forward`` takes PACKET_HOST only).
    """
    routes = tables[ROUTES]
    found = route.lookup(routes, packet["dst_hi"], packet["dst_lo"])
    if found >= 0 and routes[-1][found]["kind"] == Kind.LOCAL:
        return Reason.ACCEPTED
    return Reason.IP_MULTICAST


@kernel
def _from_pod(data: Any, packet: Any, tables: Any) -> int:
    iif = int(packet["iif"])
    if ethernet.source(data, packet["start"]) != np.int64(tables[INTERFACE_TABLE][iif]["peer_mac"]):
        return Reason.L2_SPOOFED_SRC
    routes = tables[ROUTES]
    back = route.lookup(routes, packet["src_hi"], packet["src_lo"])
    if back < 0 or routes[-1][back]["kind"] != Kind.POD or routes[-1][back]["oif"] != iif:
        return Reason.IP_SPOOFED_SRC
    protocol = int(packet["protocol"])
    if protocol == _IPIP or (protocol == _UDP and int(packet["dport"]) == int(tables[SETTINGS][TUNNEL_PORT])):
        return Reason.TUNNEL_FROM_POD
    return Reason.ACCEPTED


@kernel
def _from_host(packet: Any, tables: Any) -> int:
    """Return what is wrong with a packet from the host's own device: only the node itself is behind it."""
    routes = tables[ROUTES]
    back = route.lookup(routes, packet["src_hi"], packet["src_lo"])
    if back < 0 or routes[-1][back]["kind"] != Kind.LOCAL:
        return Reason.IP_SPOOFED_SRC
    return Reason.ACCEPTED


@kernel
def _from_outside(packet: Any, tables: Any) -> int:
    """Return what is wrong with a packet from LAN or tunnel: its source lives here."""
    routes = tables[ROUTES]
    back = route.lookup(routes, packet["src_hi"], packet["src_lo"])
    if back >= 0 and routes[-1][back]["kind"] in (Kind.POD, Kind.LOCAL, Kind.BLACKHOLE, Kind.SERVICE):
        return Reason.IP_MARTIAN
    return Reason.ACCEPTED
