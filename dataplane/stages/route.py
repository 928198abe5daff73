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
    INJECTED,
    INTERFACE_TABLE,
    IPV6,
    NEIGHBOURS,
    OWES_ERROR,
    REASSEMBLED,
    ROUTES,
    VTEPS,
)
from dataplane.codecs import checksum, ethernet
from dataplane.jit import kernel, load8, load16, prefetch, store8, store16
from dataplane.tables import neighbour
from dataplane.tables import route as fib
from dataplane.tables.neighbour import State
from dataplane.tables.route import Kind
from dataplane.verdict import Reason, Verdict

_TCP = 6


@kernel
def route(batch: Any, count: int, tables: Any, now: int) -> None:
    """Give every accepted row of [0, count) its egress interface and link addresses, or the reason it goes nowhere."""
    data, packets = batch
    verdict, reason, row = packets["verdict"], packets["reason"], packets["route"]
    routes = tables[ROUTES]
    table = routes[-1]
    # Two passes: the lookup's cache misses of all packets overlap instead of adding up.
    for i in range(count):
        if verdict[i] == Verdict.ACCEPT:
            row[i] = fib.lookup(routes, packets["dst_hi"][i], packets["dst_lo"][i])
            prefetch(table, int(row[i]) if row[i] > 0 else 0)
            prefetch(data, packets["l3"][i])
    for i in range(count):
        if verdict[i] != Verdict.ACCEPT:
            continue
        why = _forward(data, packets, i, tables, now)
        if why == Reason.ACCEPTED:
            continue
        reason[i] = why
        if why in (Reason.NEIGH_RESOLVE, Reason.LOCAL_DELIVERY):
            verdict[i] = Verdict.QUEUE
            continue
        verdict[i] = Verdict.DROP
        if why in (Reason.IP_TTL, Reason.MTU_DF, Reason.ROUTE_NONE, Reason.ROUTE_UNREACHABLE):
            packets["flags"][i] = (int(packets["flags"][i]) | OWES_ERROR) & 0xFFFF


@kernel
def _forward(data: Any, packets: Any, i: int, tables: Any, now: int) -> int:
    row = int(packets["route"][i])
    if row < 0:
        return Reason.ROUTE_NONE
    routes = tables[ROUTES]
    hop = routes[-1][row]
    kind = int(hop["kind"])
    if kind == Kind.BLACKHOLE:
        return Reason.ROUTE_BLACKHOLE
    if kind == Kind.UNREACHABLE:
        return Reason.ROUTE_UNREACHABLE
    if kind == Kind.LOCAL:
        return Reason.LOCAL_DELIVERY
    injected = int(packets["flags"][i]) & INJECTED
    if not injected and int(packets["ttl"][i]) <= 1:
        return Reason.IP_TTL
    oif, mtu = int(hop["oif"]), int(hop["mtu"])
    if kind == Kind.TUNNEL:
        peer = int(hop["vtep"])
        if peer < 0:
            return Reason.TUNNEL_NO_VTEP
        vteps = tables[VTEPS]
        vtep = vteps[-1][peer]
        oif, mtu = int(vtep["oif"]), int(vtep["mtu"])
        packets["vtep"][i] = peer
    interface = tables[INTERFACE_TABLE][oif]
    if mtu == 0:
        mtu = int(interface["mtu"])
    packets["oif"][i] = oif
    if not _fits(data, packets, i, mtu):
        packets["oif"][i] = 0
        packets["vtep"][i] = -1
        return Reason.MTU_DF
    if not injected:
        _decrement_ttl(data, packets, i)
    if kind == Kind.TUNNEL:
        return Reason.ACCEPTED
    frame = int(packets["l3"][i]) - ethernet.HEADER
    ethertype = int(packets["ethertype"][i])
    if kind == Kind.POD:
        ethernet.emit(data, frame, int(interface["peer_mac"]), int(interface["mac"]), ethertype)
        return Reason.ACCEPTED
    on_link = hop["gateway_hi"] == 0 and hop["gateway_lo"] == 0
    packets["next_hi"][i] = packets["dst_hi"][i] if on_link else hop["gateway_hi"]
    packets["next_lo"][i] = packets["dst_lo"][i] if on_link else hop["gateway_lo"]
    return _resolve(data, packets, i, tables, now)


@kernel
def _resolve(data: Any, packets: Any, i: int, tables: Any, now: int) -> int:
    """Write the link addresses of row ``i``'s next hop, or leave the row to neighbor resolution."""
    neighbours = tables[NEIGHBOURS]
    oif = int(packets["oif"][i])
    found = neighbour.find(neighbours, oif, packets["next_hi"][i], packets["next_lo"][i])
    if found < 0:
        return Reason.NEIGH_RESOLVE
    entry = neighbours[-1][found]
    state = int(entry["state"])
    if state < State.REACHABLE or state == State.FAILED:
        return Reason.NEIGH_RESOLVE
    entry["used_ns"] = now
    frame = int(packets["l3"][i]) - ethernet.HEADER
    ours = int(tables[INTERFACE_TABLE]["mac"][oif])
    ethernet.emit(data, frame, int(entry["mac"]), ours, int(packets["ethertype"][i]))
    return Reason.ACCEPTED


@kernel
def _fits(data: Any, packets: Any, i: int, mtu: int) -> bool:
    """Say whether row ``i`` can leave by a link of this MTU, in pieces if it may be cut; note the MTU in the record.

    A super-frame counts as the segments it will become. Larger TCP segments without DF are cut smaller rather than
    fragmented: the result on the wire is what the peer would see from a sender with a smaller MSS.
    """
    packets["mtu"][i] = mtu
    l3, l4 = int(packets["l3"][i]), int(packets["l4"][i])
    size = int(packets["start"][i]) + int(packets["length"][i]) - l3
    flags, gso = int(packets["flags"][i]), int(packets["gso_type"][i])
    whole = flags & DONT_FRAGMENT
    # A datagram that came in pieces may be cut again into pieces of that size.
    if flags & REASSEMBLED and int(packets["max_fragment"][i]) <= mtu:
        whole = 0
    if gso == GSO_NONE:
        return size <= mtu or whole == 0
    headers = l4 - l3 + (8 if gso == GSO_UDP_L4 else (load8(data, l4 + 12) >> 4) * 4)
    if headers + int(packets["gso_size"][i]) <= mtu:
        return True
    if whole or gso == GSO_UDP_L4 or headers >= mtu:
        return False
    packets["gso_size"][i] = (mtu - headers) & 0xFFFF
    return True


@kernel
def _decrement_ttl(data: Any, packets: Any, i: int) -> None:
    l3, ttl = int(packets["l3"][i]), int(packets["ttl"][i]) - 1
    packets["ttl"][i] = ttl & 0xFF
    if int(packets["flags"][i]) & IPV6:
        store8(data, l3 + 7, ttl)
        return
    # The word that changes is TTL and protocol, so one RFC 1624 update is enough.
    old = load16(data, l3 + 8)
    store8(data, l3 + 8, ttl)
    store16(data, l3 + 10, checksum.update16(load16(data, l3 + 10), old, load16(data, l3 + 8)))
