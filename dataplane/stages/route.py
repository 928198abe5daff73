"""route: where a packet goes, and whether it may (B2).

Longest prefix match on the destination, then the kernel's order of ``ip_forward``: blackhole and unreachable, TTL,
MTU, then the next hop's link address. What the node owes to the sender (time exceeded, fragmentation needed,
unreachable) is marked on the dropped row and made by the slow path.

A pod is reached over its own link, so its next hop is known by construction; a remote pod through its node's VTEP,
which is configured; only the LAN needs neighbor resolution, and a packet whose neighbor is not known yet waits in the
slow path.

Queues: neigh.resolve, local.delivery. Drops: route.none, route.blackhole, route.unreachable, ip.ttl, mtu.df,
tunnel.no-vtep.
"""

from typing import Any

from dataplane.batch import (
    DONT_FRAGMENT,
    GSO_NONE,
    GSO_UDP_L4,
    HOST_INTERFACE,
    INJECTED,
    INTERFACE_TABLE,
    IPV6,
    NEIGHBOURS,
    OWES_ERROR,
    REASSEMBLED,
    ROUTES,
    SETTINGS,
    VTEPS,
)
from dataplane.codecs import checksum, ethernet
from dataplane.jit import kernel, load8, load16, prefetch, store8, store16
from dataplane.tables import neighbour
from dataplane.tables import route as fib
from dataplane.tables.neighbour import State
from dataplane.tables.route import HOSTED, Kind
from dataplane.verdict import Reason, Verdict

_TCP = 6


@kernel
def route(batch: Any, count: int, tables: Any, now: int) -> None:
    """Give every accepted row of [0, count) its egress interface and link addresses, or the reason it goes nowhere."""
    data, packets = batch
    routes = tables[ROUTES]
    table = routes[-1]
    # Two passes: the lookup's cache misses of all packets overlap instead of adding up.
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] == Verdict.ACCEPT:
            row = fib.lookup(routes, packet["dst_hi"], packet["dst_lo"])
            packet["route"] = row
            prefetch(table, max(row, 0))
            prefetch(data, packet["l3"])
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] != Verdict.ACCEPT:
            continue
        why = _forward(data, packet, tables, now)
        if why == Reason.ACCEPTED:
            continue
        packet["reason"] = why
        if why in (Reason.NEIGH_RESOLVE, Reason.LOCAL_DELIVERY):
            packet["verdict"] = Verdict.QUEUE
            continue
        packet["verdict"] = Verdict.DROP
        if why in (Reason.IP_TTL, Reason.MTU_DF, Reason.ROUTE_NONE, Reason.ROUTE_UNREACHABLE):
            packet["flags"] = (int(packet["flags"]) | OWES_ERROR) & 0xFFFF


@kernel
def _forward(data: Any, packet: Any, tables: Any, now: int) -> int:
    row = int(packet["route"])
    if row < 0:
        return Reason.ROUTE_NONE
    routes = tables[ROUTES]
    hop = routes[-1][row]
    kind = int(hop["kind"])
    if kind == Kind.BLACKHOLE:
        return Reason.ROUTE_BLACKHOLE
    if kind == Kind.UNREACHABLE:
        return Reason.ROUTE_UNREACHABLE
    if kind == Kind.SERVICE:
        return Reason.LOCAL_DELIVERY
    if kind == Kind.LOCAL:
        return _to_host(data, packet, tables, int(hop["flags"]))
    injected = int(packet["flags"]) & INJECTED
    if not injected and int(packet["ttl"]) <= 1:
        return Reason.IP_TTL
    oif, mtu = int(hop["oif"]), int(hop["mtu"])
    if kind == Kind.TUNNEL:
        peer = int(hop["vtep"])
        if peer < 0:
            return Reason.TUNNEL_NO_VTEP
        vteps = tables[VTEPS]
        vtep = vteps[-1][peer]
        oif, mtu = int(vtep["oif"]), int(vtep["mtu"])
        packet["vtep"] = peer
    interface = tables[INTERFACE_TABLE][oif]
    if mtu == 0:
        mtu = int(interface["mtu"])
    packet["oif"] = oif
    if not _fits(data, packet, mtu):
        packet["oif"] = 0
        packet["vtep"] = -1
        return Reason.MTU_DF
    if not injected:
        _decrement_ttl(data, packet)
    if kind == Kind.TUNNEL:
        return Reason.ACCEPTED
    frame = int(packet["l3"]) - ethernet.HEADER
    ethertype = int(packet["ethertype"])
    if kind == Kind.POD:
        ethernet.emit(data, frame, int(interface["peer_mac"]), int(interface["mac"]), ethertype)
        return Reason.ACCEPTED
    on_link = hop["gateway_hi"] == 0 and hop["gateway_lo"] == 0
    packet["next_hi"] = packet["dst_hi"] if on_link else hop["gateway_hi"]
    packet["next_lo"] = packet["dst_lo"] if on_link else hop["gateway_lo"]
    return _resolve(data, packet, tables, now)


@kernel
def _to_host(data: Any, packet: Any, tables: Any, flags: int) -> int:
    """Hand a packet for the node to the host's own stack, or leave it to the slow path, which answers pings.

    It has arrived: its TTL stays, and what came whole stays whole.
    """
    host = int(tables[SETTINGS][HOST_INTERFACE])
    if host == 0 or flags & HOSTED == 0:
        return Reason.LOCAL_DELIVERY
    interface = tables[INTERFACE_TABLE][host]
    packet["oif"] = host
    packet["mtu"] = interface["mtu"]
    ethernet.emit(
        data,
        int(packet["l3"]) - ethernet.HEADER,
        int(interface["peer_mac"]),
        int(interface["mac"]),
        int(packet["ethertype"]),
    )
    return Reason.ACCEPTED


@kernel
def _resolve(data: Any, packet: Any, tables: Any, now: int) -> int:
    """Write the link addresses of the packet's next hop, or leave it to neighbor resolution."""
    neighbours = tables[NEIGHBOURS]
    oif = int(packet["oif"])
    found = neighbour.find(neighbours, oif, packet["next_hi"], packet["next_lo"])
    if found < 0:
        return Reason.NEIGH_RESOLVE
    entry = neighbours[-1][found]
    state = int(entry["state"])
    if state < State.REACHABLE or state == State.FAILED:
        return Reason.NEIGH_RESOLVE
    entry["used_ns"] = now
    frame = int(packet["l3"]) - ethernet.HEADER
    ours = int(tables[INTERFACE_TABLE][oif]["mac"])
    ethernet.emit(data, frame, int(entry["mac"]), ours, int(packet["ethertype"]))
    return Reason.ACCEPTED


@kernel
def _fits(data: Any, packet: Any, mtu: int) -> bool:
    """Say whether a packet can leave by a link of this MTU, in pieces if it may be cut; note the MTU in the record.

    A super-frame counts as the segments it will become. Larger TCP segments without DF are cut smaller rather than
    fragmented: the result on the wire is what the peer would see from a sender with a smaller MSS.
    """
    packet["mtu"] = mtu
    l3, l4 = int(packet["l3"]), int(packet["l4"])
    size = int(packet["start"]) + int(packet["length"]) - l3
    flags, gso = int(packet["flags"]), int(packet["gso_type"])
    whole = flags & DONT_FRAGMENT
    # A datagram that came in pieces may be cut again into pieces of that size.
    if flags & REASSEMBLED and int(packet["max_fragment"]) <= mtu:
        whole = 0
    if gso == GSO_NONE:
        return size <= mtu or whole == 0
    headers = l4 - l3 + (8 if gso == GSO_UDP_L4 else (load8(data, l4 + 12) >> 4) * 4)
    if headers + int(packet["gso_size"]) <= mtu:
        return True
    if whole or headers >= mtu:
        return False
    if gso == GSO_UDP_L4:
        return True  # the boundaries of datagrams mean something: transmit makes fragments of each
    packet["gso_size"] = (mtu - headers) & 0xFFFF
    return True


@kernel
def _decrement_ttl(data: Any, packet: Any) -> None:
    l3, ttl = int(packet["l3"]), int(packet["ttl"]) - 1
    packet["ttl"] = ttl & 0xFF
    if int(packet["flags"]) & IPV6:
        store8(data, l3 + 7, ttl)
        return
    # The word that changes is TTL and protocol, so one RFC 1624 update is enough. It is not read back after the byte
    # is written: the wider load would wait for the store (3 ns).
    old = load16(data, l3 + 8)
    new = ttl << 8 | old & 0xFF
    store16(data, l3 + 8, new)
    store16(data, l3 + 10, checksum.update16(load16(data, l3 + 10), old, new))
