"""conntrack: which flow a packet belongs to, and what that makes of it (B0, B9, B10, B12).

A new flow is classified once: service, backend, masquerading and port are decided and both its tuples entered before
the next packet is looked at, so two packets of one flow in one burst cannot become two (the kernel's race of parallel
DNS queries, k/k#56903). All later packets, and the ICMP errors about them, use what the flow has stored.

The record gets the translated destination, by which ``route`` sends the packet; the bytes are translated by ``nat``,
behind it. What ``route`` drops is therefore still the client's own packet when it is quoted in an ICMP error, and what
waits for a neighbor comes by here again: it is translated then, but has moved its flow on already.

Three passes: hash and prefetch the slot; find the candidate and prefetch its flow; compare and act. The third is in
order, row by row: what a packet does to its flow holds for the next one.

Steals: host.owned. Drops: ct.invalid-flags, ct.not-syn, ct.window, ct.bad-rst, ct.table-full, ct.clash,
lb.dest-deleted, svc.source-range, svc.no-local-endpoints, svc.no-endpoints, svc.vip-closed-port, icmp.unrelated,
icmp.bad-inner, nat.no-port, nat.masq-no-addr.
"""

from typing import Any

import numpy as np

from dataplane.batch import (
    FLOWS,
    FRAGMENT,
    HOST_INTERFACE,
    INJECTED,
    INTERFACE_TABLE,
    OWES_ERROR,
    RELATED,
    ROUTE_GENERATION,
    ROUTES,
    SERVICES,
    SETTINGS,
    TCP_LOOSE,
    TEMPLATES,
    TIMEOUTS,
    TUNNELED,
    UPLINK_OWN,
    WAITED,
)
from dataplane.codecs import ethernet, icmp, icmpv6
from dataplane.jit import kernel, load8
from dataplane.stages import masquerade, service, tcp
from dataplane.stages.quote import quoted_tuple, request_type
from dataplane.tables import flow as table
from dataplane.tables import persistence
from dataplane.tables import route as fib
from dataplane.tables.flow import (
    ASSURED,
    DST_NAT,
    MASQUERADED,
    ORIGINAL,
    REPLY,
    SEEN_REPLY,
    SRC_NAT,
    Count,
    Timeout,
)
from dataplane.tables.interface import Role
from dataplane.tables.result import FULL
from dataplane.tables.route import Kind
from dataplane.verdict import Reason, Verdict

_ICMP, _TCP, _UDP, _ICMPV6 = 1, 6, 17, 58
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_AGAIN = -1  # the flow is gone: look the packet up as a new one
_TEMPLATES = 1 << 15  # templates that one call of ``expire`` looks at: a full table of them in 8 seconds
_STREAM_NS = 2_000_000_000  # a UDP flow of this age that is answered is a stream


@kernel
def conntrack(batch: Any, count: int, tables: Any, now: int) -> None:
    """Find or make the flow of every accepted row of [0, count), and translate its destination in the record."""
    data, packets = batch
    flows = tables[FLOWS]
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] == Verdict.ACCEPT:
            word = table.hash_tuple(flows, packet)
            packet["next_lo"] = word  # route needs the field later
            table.prefetch_slot(flows, word)
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] == Verdict.ACCEPT:
            half = table.candidate(flows, packet["next_lo"])
            packet["flow"] = half
            table.prefetch_flow(flows, half)
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] != Verdict.ACCEPT:
            continue
        if packet["flags"] & FRAGMENT:
            packet["flow"] = -1  # a piece of an IPv6 datagram has no ports; IPv4's are whole by now
            continue
        why = _track(data, packet, tables, now)
        if why == Reason.ACCEPTED:
            continue
        packet["flow"] = -1
        packet["reason"] = why
        if why == Reason.HOST_OWNED:
            packet["verdict"] = Verdict.STOLEN
            continue
        packet["verdict"] = Verdict.DROP
        flows[5][Count.INVALID] += Reason.CT_INVALID_FLAGS <= why <= Reason.CT_BAD_RST or why >= Reason.ICMP_UNRELATED


@kernel
def _track(data: Any, packet: Any, tables: Any, now: int) -> int:
    flows = tables[FLOWS]
    protocol = int(packet["protocol"])
    if protocol in (_ICMP, _ICMPV6) and _is_error(data, packet):
        return _relate(data, packet, tables, now)
    e = int(packet["flow"])
    if e < 0 or not table.matches(flows, e, packet):
        # Not only a miss: the flow may have begun with an earlier packet of this burst.
        e = table.find(flows, packet)
    if e >= 0:
        if int(flows[3][e >> 1]["expires_ns"]) > now:
            why = _follow(data, packet, tables, e, now)
            if why != _AGAIN:
                return why
        end(tables, e >> 1, now)
    return _begin(data, packet, tables, now)


# --- packets of a known flow -----------------------------------------------------------------------------------------


@kernel
def _follow(data: Any, packet: Any, tables: Any, e: int, now: int) -> int:
    """Let a packet of tuple ``e`` change its flow; return ``ACCEPTED``, a reason to drop it, or ``_AGAIN``."""
    flow = tables[FLOWS][3][e >> 1]
    direction = e & 1
    protocol = int(packet["protocol"])
    if int(flow["backend"]) >= 0:
        if service.is_gone(tables, flow):
            if direction == ORIGINAL:
                return _AGAIN
            # The flow stays: without it the next answer would leave with the backend's own address.
            service.release(tables, flow, now)
            return Reason.LB_DEST_DELETED
        if direction == ORIGINAL and protocol == _TCP and _is_syn(packet) and service.is_quiesced(tables, flow):
            return _AGAIN
    # Only the client's own packets ask: an answer to the old address is begun again by nobody (nf_nat_oif_changed).
    if direction == ORIGINAL and int(flow["status"]) & MASQUERADED and _moved(tables, e >> 1):
        return _AGAIN
    if int(packet["flags"]) & WAITED:
        _aim(packet, tables, e)
        return Reason.ACCEPTED
    if protocol == _TCP:
        why = tcp.follow(data, packet, tables, e, now)
        if why == tcp.RESTART:
            return _AGAIN
        if why != Reason.ACCEPTED:
            return why
    else:
        _refresh(flow, protocol, direction, tables[TIMEOUTS], now)
    service.follow(packet, tables, e, now)
    _take(packet, tables, e)
    return Reason.ACCEPTED


@kernel
def _refresh(flow: Any, protocol: int, direction: int, timeouts: Any, now: int) -> None:
    """Let time begin anew for a flow without TCP's states."""
    status = int(flow["status"])
    kind = Timeout.GENERIC
    if protocol in (_ICMP, _ICMPV6):
        kind = Timeout.ICMP
    elif protocol == _UDP:
        kind = Timeout.UDP
        if status & SEEN_REPLY and now - int(flow["created_ns"]) > _STREAM_NS:
            kind = Timeout.UDP_STREAM
            status |= ASSURED
    if direction == REPLY:
        status |= SEEN_REPLY
    flow["status"] = status
    flow["expires_ns"] = now + int(timeouts[kind])


@kernel
def _take(packet: Any, tables: Any, e: int) -> None:
    """Put a packet into its flow: count it, and write the translated destination into its record."""
    half = tables[FLOWS][2][e]
    half["packets"] = int(half["packets"]) + 1
    half["bytes"] = int(half["bytes"]) + int(packet["length"]) - ethernet.HEADER
    _aim(packet, tables, e)


@kernel
def _aim(packet: Any, tables: Any, e: int) -> None:
    """Write a packet's flow and the translated destination into its record."""
    flows = tables[FLOWS]
    packet["flow"] = e
    flow = flows[3][e >> 1]
    packet["mark"] = flow["mark"]
    if int(flow["status"]) & (SRC_NAT | DST_NAT):
        other = flows[2][e ^ 1]
        packet["dst_hi"] = other["src_hi"]
        packet["dst_lo"] = other["src_lo"]
        packet["dport"] = other["sport"]


@kernel
def _moved(tables: Any, row: int) -> bool:
    """Say whether a masqueraded flow would now leave with another address (nf_nat_masquerade: the flow is void)."""
    flows, settings = tables[FLOWS], tables[SETTINGS]
    flow, reply = flows[3][row], flows[2][2 * row + 1]
    generation = int(np.int64(settings[ROUTE_GENERATION])) & 0x7FFF_FFFF
    if int(flow["route_generation"]) == generation:
        return False
    flow["route_generation"] = generation
    kind = _kind(tables, reply["src_hi"], reply["src_lo"])
    return bool(masquerade.address(tables, kind) != reply["dst_lo"])


@kernel
def _kind(tables: Any, hi: Any, lo: Any) -> int:
    routes = tables[ROUTES]
    found = fib.lookup(routes, hi, lo)
    if found < 0:
        return 0  # Kind.NONE
    return int(np.int64(routes[-1][found]["kind"]))


@kernel
def end(tables: Any, row: int, now: int) -> None:
    """End a flow: its backend and its template let go of it, and its tuples are free."""
    flows = tables[FLOWS]
    service.release(tables, flows[3][row], now)
    table.delete(flows, row)


# --- ICMP errors -----------------------------------------------------------------------------------------------------


@kernel
def _is_error(data: Any, packet: Any) -> bool:
    l4 = int(packet["l4"])
    if l4 == 0 or l4 + icmp.HEADER > int(packet["start"]) + int(packet["length"]):
        return False
    kind = load8(data, l4)
    if int(packet["protocol"]) == _ICMP:
        return bool(icmp.is_error(kind))
    return bool(icmpv6.is_error(kind))


@kernel
def _relate(data: Any, packet: Any, tables: Any, now: int) -> int:
    """Find the flow that an ICMP error is about by the packet that it quotes (nf_conntrack_inet_error)."""
    packet["flow"] = -1
    if _is_own(packet):
        return Reason.ACCEPTED  # it quotes a packet as that came in, not as it would have left: nothing is to be undone
    flows = tables[FLOWS]
    inner = flows[6][2]
    if not quoted_tuple(data, packet, inner):
        return _unclaimed(packet, tables, Reason.ICMP_BAD_INNER)
    e = table.find(flows, inner)
    if e < 0 or int(flows[3][e >> 1]["expires_ns"]) <= now:
        return _unclaimed(packet, tables, Reason.ICMP_UNRELATED)
    if packet["dst_lo"] != inner["dst_lo"] or packet["dst_hi"] != inner["dst_hi"]:
        return _unclaimed(packet, tables, Reason.ICMP_BAD_INNER)
    packet["flow"] = e
    packet["flags"] = (int(packet["flags"]) | RELATED) & 0xFFFF
    if int(flows[3][e >> 1]["status"]) & (SRC_NAT | DST_NAT):
        # A redirect tells of a next hop on the link of the one who translates.
        if int(packet["protocol"]) == _ICMP and load8(data, packet["l4"]) == icmp.REDIRECT:
            return Reason.ICMP_UNRELATED
        other = flows[2][e ^ 1]
        packet["dst_hi"] = other["src_hi"]
        packet["dst_lo"] = other["src_lo"]
    return Reason.ACCEPTED


@kernel
def _is_own(packet: Any) -> bool:
    """Say whether the slow path has made a packet; what it had held for a neighbor is not its own."""
    return int(packet["flags"]) & (INJECTED | WAITED) == INJECTED


@kernel
def _unclaimed(packet: Any, tables: Any, why: int) -> int:
    """Return what becomes of a packet that is no flow's: the host's own is left to it, the node's own goes on."""
    kind = _kind(tables, packet["dst_hi"], packet["dst_lo"])
    if kind != Kind.LOCAL:
        return why
    return Reason.HOST_OWNED if _is_hosts(packet, tables) else Reason.ACCEPTED


@kernel
def _is_hosts(packet: Any, tables: Any) -> bool:
    """Say whether the host's own stack gets its own copy of a packet to a node's address: from the shared uplink."""
    role = int(tables[INTERFACE_TABLE][packet["iif"]]["role"])
    tunneled = int(packet["flags"]) & TUNNELED
    return role in (Role.UPLINK, Role.UNDERLAY) and not tunneled and tables[SETTINGS][UPLINK_OWN] == 0


# --- new flows -------------------------------------------------------------------------------------------------------


@kernel
def _begin(data: Any, packet: Any, tables: Any, now: int) -> int:
    """Classify the first packet of a flow and enter the flow, or say why not."""
    packet["flow"], packet["mark"] = -1, 0
    row = service.find(packet, tables)
    kind = _kind(tables, packet["dst_hi"], packet["dst_lo"])
    if row < 0 and kind == Kind.LOCAL and _is_hosts(packet, tables):
        return Reason.HOST_OWNED
    why = _may_begin(data, packet, tables)
    if why == Reason.ACCEPTED and row < 0 and kind == Kind.SERVICE:
        return _to_closed_port(packet)
    if row >= 0 and (why == Reason.CT_NOT_SYN or (why == Reason.ACCEPTED and not _schedules(packet))):
        # The connection is lost, and its client should know at once: it gets a RST.
        return _owing(packet, Reason.CT_NOT_SYN)
    if why != Reason.ACCEPTED:
        # The slow path's own packets are answers, not the beginning of anything.
        return Reason.ACCEPTED if _is_own(packet) else why
    if row >= 0:
        return _to_service(data, packet, tables, row, now)
    if not _is_deliverable(tables, kind):
        return Reason.ACCEPTED  # route says what is wrong; or the slow path answers for the node
    _draft(packet, tables[FLOWS][6])
    return _enter(data, packet, tables, kind, False, now)


@kernel
def _may_begin(data: Any, packet: Any, tables: Any) -> int:
    """Return why a packet cannot be the first of a flow, or ``ACCEPTED``."""
    protocol, l4 = int(packet["protocol"]), int(packet["l4"])
    end_ = int(packet["start"]) + int(packet["length"])
    if protocol == _TCP:
        return tcp.may_begin(data, packet, int(tables[SETTINGS][TCP_LOOSE]))
    if protocol in (_UDP, _ICMP, _ICMPV6) and (l4 == 0 or l4 + 8 > end_):
        return Reason.CT_INVALID_FLAGS
    if protocol in (_ICMP, _ICMPV6) and request_type(protocol, load8(data, l4)) != load8(data, l4):
        return Reason.CT_NOT_SYN
    return Reason.ACCEPTED


@kernel
def _is_syn(packet: Any) -> bool:
    return int(packet["tcp_flags"]) & (_SYN | _RST | _ACK) == _SYN


@kernel
def _schedules(packet: Any) -> bool:
    """Say whether a packet may be given a backend: of TCP only a SYN (``sloppy_tcp`` = 0)."""
    return int(packet["protocol"]) != _TCP or _is_syn(packet)


@kernel
def _to_closed_port(packet: Any) -> int:
    """Return what becomes of a packet to a service's address but to none of its ports: pings are answered."""
    protocol = int(packet["protocol"])
    if protocol in (_ICMP, _ICMPV6):
        return Reason.ACCEPTED
    return _owing(packet, Reason.SVC_VIP_CLOSED_PORT)


@kernel
def _owing(packet: Any, why: int) -> int:
    packet["flags"] = (int(packet["flags"]) | OWES_ERROR) & 0xFFFF
    return why


@kernel
def _is_deliverable(tables: Any, kind: int) -> bool:
    if kind == Kind.LOCAL:
        return bool(tables[SETTINGS][HOST_INTERFACE] != 0)
    return kind in (Kind.POD, Kind.VIA, Kind.TUNNEL)


@kernel
def _draft(packet: Any, scratch: Any) -> None:
    """Write the tuples of a flow without translation: what came, and its answer."""
    original, reply = scratch[0], scratch[1]
    original["src_hi"] = reply["dst_hi"] = packet["src_hi"]
    original["src_lo"] = reply["dst_lo"] = packet["src_lo"]
    original["dst_hi"] = reply["src_hi"] = packet["dst_hi"]
    original["dst_lo"] = reply["src_lo"] = packet["dst_lo"]
    original["sport"] = reply["dport"] = packet["sport"]
    original["dport"] = reply["sport"] = packet["dport"]
    original["protocol"] = reply["protocol"] = packet["protocol"]


@kernel
def _to_service(data: Any, packet: Any, tables: Any, row: int, now: int) -> int:
    """Send a new flow to a backend of the service in ``row``."""
    why = service.admit(packet, tables, row)
    if why != Reason.ACCEPTED:
        return why
    marked = service.is_marked(packet, tables, row)
    chosen, template = service.choose(packet, tables, row, now)
    if chosen < 0:
        return _owing(packet, Reason.SVC_NO_ENDPOINTS)
    scratch = tables[FLOWS][6]
    _draft(packet, scratch)
    record = service.backend_of(tables, chosen)
    scratch[1]["src_hi"] = packet["dst_hi"] = record["hi"]
    scratch[1]["src_lo"] = packet["dst_lo"] = record["lo"]
    scratch[1]["sport"] = packet["dport"] = record["port"]
    packet["mark"] = service.MARK if marked else 0
    kind = _kind(tables, record["hi"], record["lo"])
    if not _is_deliverable(tables, kind):
        service.give_back(tables, template, now)
        return Reason.ACCEPTED
    why = _enter(data, packet, tables, kind, True, now)
    if why != Reason.ACCEPTED:
        service.give_back(tables, template, now)
        return why
    e = int(packet["flow"])
    service.bind(tables, tables[FLOWS][3][e >> 1], row, chosen, template)
    service.follow(packet, tables, e, now)
    return Reason.ACCEPTED


@kernel
def _enter(data: Any, packet: Any, tables: Any, kind: int, translated: bool, now: int) -> int:
    """Masquerade a drafted flow if need be, enter it into the table, and put its first packet into it.

    The packet's record has the translated destination by now.
    """
    flows = tables[FLOWS]
    how = masquerade.decide(packet, tables, int(packet["mark"]) != 0, translated, kind)
    why = masquerade.apply(packet, tables, how, kind)
    if why != Reason.ACCEPTED:
        return why
    row = table.insert(flows, now)
    if row == FULL:
        victim = table.early_drop(flows, flows[6][0])
        if victim >= 0:
            flows[5][Count.EARLY_DROP] += 1
            end(tables, victim, now)
            row = table.insert(flows, now)
    if row < 0:
        flows[5][Count.DROP] += 1
        return Reason.CT_TABLE_FULL if row == FULL else Reason.CT_CLASH
    flow, original, reply = flows[3][row], flows[2][2 * row], flows[2][2 * row + 1]
    status = 0
    if translated:
        status |= DST_NAT
    if how != masquerade.LEFT:
        status |= MASQUERADED
    if (
        reply["dst_lo"] != original["src_lo"]
        or reply["dst_hi"] != original["src_hi"]
        or (reply["dport"] != original["sport"])
    ):
        status |= SRC_NAT
    flow["status"] = status
    flow["mark"] = packet["mark"]
    flow["route_generation"] = int(np.int64(tables[SETTINGS][ROUTE_GENERATION])) & 0x7FFF_FFFF
    if status & SRC_NAT:
        table.keep_source(flows, row)
    if int(packet["protocol"]) == _TCP:
        tcp.begin(data, packet, tables, row, now)
    else:
        _refresh(flow, int(packet["protocol"]), ORIGINAL, tables[TIMEOUTS], now)
    _take(packet, tables, 2 * row)
    return Reason.ACCEPTED


# --- time ------------------------------------------------------------------------------------------------------------


@kernel
def expire(tables: Any, now: int, count: int) -> int:
    """End the flows whose time is up among the next ``count`` rows of the table; return how many.

    A flow that lives on, but that ip_vs would have forgotten, leaves its backend's counters: ip_vs gives an established
    connection 15 minutes, conntrack a day. Persistence templates go after the flows that they control; one that stayed
    would hold its backend's row for ever.
    """
    flows = tables[FLOWS]
    ended = 0
    row, left = table.next_due(flows, now, count)
    while row >= 0:
        if table.must_go(flows, row, now):
            end(tables, row, now)
            ended += 1
        else:
            service.release(tables, flows[3][row], now)
        row, left = table.next_due(flows, now, left)
    templates = tables[TEMPLATES]
    persistence.sweep(templates, tables[SERVICES][3], now, min(count, _TEMPLATES, len(templates[2])))
    return ended
