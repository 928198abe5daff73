"""The slow path: what happens once in a while, in Python, sans-IO.

The compiled pipeline hands over the rows that it queued, and the dropped rows whose sender is owed an ICMP error.
Here they become frames to send: errors (RFC 792, RFC 1812 4.3), echo replies for the node's own addresses, ARP
questions. Frames go back into the pipeline as injected packets and are routed, encapsulated and counted like any
other.

Every row that comes in is accounted for: answered, learned from, held for its neighbor, or dropped with a reason.
"""

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

import dpkt
import numpy as np
from dpkt import icmp

from dataplane.batch import (
    COUNTERS,
    ERRORS_LIMITED,
    GATEWAY_LO,
    INJECTED,
    INJECTED_TOTAL,
    INTERFACE_TABLE,
    NODE_LO,
    OWES_ERROR,
    SETTINGS,
    WAITED,
    Batch,
)
from dataplane.devices.memory import Vnet, unload
from dataplane.jit import Array
from dataplane.resolve import SECOND, Outgoing, Resolver
from dataplane.tables.address import to_address
from dataplane.tables.neighbour import NeighbourTable
from dataplane.tables.route import Kind, RouteTable
from dataplane.verdict import Reason, Verdict

QUOTE = 576 - 20 - 8  # RFC 1812 4.3.2.3: as much of the packet as fits into 576 bytes
ERROR_BURST = 6  # XRLIM_BURST_FACTOR: errors to one destination at once, then one a second
_DESTINATIONS = 4096  # remembered for that limit
BUDGET = 128  # rows per burst: at some 20 us each the fast path waits 3 ms at most
ICMP_ERRORS = (3, 4, 5, 11, 12)  # types: unreachable, source quench, redirect, time exceeded, parameter problem
ICMP_LAST = 18  # Linux's NR_ICMP_TYPES
_CONTROL = 0xC0  # RFC 1812 4.3.2.5: the precedence "internetwork control", and the packet's own type of service
_TOS = 0x1C  # of the octet, without precedence and ECN

ERRORS: dict[Reason, tuple[int, int]] = {
    Reason.IP_TTL: (icmp.ICMP_TIMEXCEED, icmp.ICMP_TIMEXCEED_INTRANS),
    Reason.MTU_DF: (icmp.ICMP_UNREACH, icmp.ICMP_UNREACH_NEEDFRAG),
    Reason.ROUTE_NONE: (icmp.ICMP_UNREACH, icmp.ICMP_UNREACH_NET),
    Reason.ROUTE_UNREACHABLE: (icmp.ICMP_UNREACH, icmp.ICMP_UNREACH_HOST),
    Reason.NEIGH_UNRESOLVED: (icmp.ICMP_UNREACH, icmp.ICMP_UNREACH_HOST),
    Reason.LOCAL_NO_LISTENER: (icmp.ICMP_UNREACH, icmp.ICMP_UNREACH_PORT),
    Reason.SVC_NO_ENDPOINTS: (icmp.ICMP_UNREACH, icmp.ICMP_UNREACH_PORT),
    Reason.SVC_VIP_CLOSED_PORT: (icmp.ICMP_UNREACH, icmp.ICMP_UNREACH_PORT),
}
"""The ICMP type and code that a dropped packet's sender is told."""

_AT_OURS = frozenset({Reason.LOCAL_NO_LISTENER, Reason.SVC_NO_ENDPOINTS, Reason.SVC_VIP_CLOSED_PORT})


@dataclass(slots=True)
class _Budget:
    """Errors that one destination may still get."""

    tokens: float
    refilled: int


@dataclass(slots=True)
class ErrorLimit:
    """At most ``ERROR_BURST`` errors to a destination at once, then one a second (``net.ipv4.icmp_ratelimit``)."""

    budgets: OrderedDict[bytes, _Budget] = field(default_factory=OrderedDict)

    def allows(self, destination: bytes, now: int) -> bool:
        """Take one error from the destination's budget, if there is one."""
        budget = self.budgets.pop(destination, None) or _Budget(ERROR_BURST, now)
        budget.tokens = min(ERROR_BURST, budget.tokens + (now - budget.refilled) / SECOND)
        budget.refilled = now
        allowed = budget.tokens >= 1
        budget.tokens -= allowed
        self.budgets[destination] = budget
        if len(self.budgets) > _DESTINATIONS:
            self.budgets.popitem(last=False)
        return allowed


class SlowPath:
    """Answers what the pipeline punts.

    Attributes:
        resolver: Neighbor resolution for the uplink.
        answered: What became of queued rows, by name; ``show counters`` prints it.
    """

    def __init__(
        self, tables: tuple[Any, ...], routes: RouteTable, neighbours: NeighbourTable, seed: int | None = None
    ) -> None:
        self._counters: Array = tables[COUNTERS]
        self._settings: Array = tables[SETTINGS]
        self._interfaces: Array = tables[INTERFACE_TABLE]
        self._routes = routes
        self._limit = ErrorLimit()
        self._late: list[Outgoing] = []
        self._now = 0
        self.tunnel_address = b""  # 4 bytes: the source of errors that go back through a tunnel
        self.answered: Counter[str] = Counter()
        self.resolver = Resolver(neighbours, self._station, self._drop_held, seed)

    def handle(self, batch: Batch, count: int, now: int) -> list[Outgoing]:
        """Return the frames that follow from the punted rows among [0, count)."""
        self._now = now
        verdict, flags = batch.packets["verdict"][:count], batch.packets["flags"][:count]
        out: list[Outgoing] = []
        punted = np.nonzero((verdict == Verdict.QUEUE) | (flags & OWES_ERROR != 0))[0]
        for row in punted[:BUDGET]:
            out.extend(self._handle(batch, int(row), now))
        for row in punted[BUDGET:]:
            if verdict[row] == Verdict.QUEUE:
                self.drop(Reason.OVERLOAD_SLOW_PATH)
            else:
                self._counters[ERRORS_LIMITED] += 1
        return out + self._take_late()

    def tick(self, now: int) -> list[Outgoing]:
        """Let time pass: neighbors are asked again or given up."""
        self._now = now
        return self.resolver.tick(now) + self._take_late()

    def _handle(self, batch: Batch, row: int, now: int) -> Iterator[Outgoing]:
        packet = batch.packets[row]
        reason = Reason.of(int(packet["reason"]))
        if reason == Reason.ARP_LEARN:
            self.answered["learned"] += 1
            yield from self.resolver.learn(int(packet["iif"]), unload(batch, row), now)
        elif reason == Reason.NEIGH_RESOLVE:
            self.answered["held"] += 1
            next_hop = to_address(int(packet["next_hi"]), int(packet["next_lo"]))
            yield from self.resolver.hold(_snapshot(batch, row), next_hop, now)
        elif reason == Reason.LOCAL_DELIVERY:
            yield from self._deliver(batch, row)
        elif reason == Reason.CT_NOT_SYN:
            yield from self._reset(_ip_bytes(batch, row))
        else:
            yield from self._error(_ip_bytes(batch, row), reason, int(packet["mtu"]))

    # --- the node's own addresses ------------------------------------------------------------------------------------

    def _deliver(self, batch: Batch, row: int) -> Iterator[Outgoing]:
        """Answer an echo request; anything else finds nobody at home."""
        packet = _ip_bytes(batch, row)
        reply = echo_reply(packet) if packet[0] >> 4 == 4 else None
        if reply is not None:
            self.answered["answered"] += 1
            yield Outgoing(reply)
            return
        self.drop(Reason.LOCAL_NO_LISTENER)
        to_many = batch.data[int(batch.packets["start"][row])] & 1
        if packet[9] != dpkt.ip.IP_PROTO_ICMP and not to_many:
            yield from self._error(packet, Reason.LOCAL_NO_LISTENER)

    # --- errors ------------------------------------------------------------------------------------------------------

    def _error(self, packet: bytes, reason: Reason, mtu: int = 0) -> Iterator[Outgoing]:
        """Yield the ICMP error that the sender of ``packet`` (from its IP header on) is owed, if it may be sent."""
        if not may_answer(packet):
            return
        kind, code = ERRORS[reason]
        # Path MTU discovery depends on 3/4, so Linux never limits it.
        if reason != Reason.MTU_DF and not self._limit.allows(packet[12:16], self._now):
            self.answered["errors limited"] += 1
            return
        self.answered["errors sent"] += 1
        # What was sent to one of our addresses is answered from there.
        source = packet[16:20] if reason in _AT_OURS else self._source(packet[12:16])
        yield Outgoing(icmp_error(packet, source, kind, code, mtu if reason == Reason.MTU_DF else 0))

    def _reset(self, packet: bytes) -> Iterator[Outgoing]:
        """Yield the RST for a TCP segment to a service whose connection is not known (any more)."""
        frame = tcp_reset(packet)
        if frame is None or not self._limit.allows(packet[12:16], self._now):
            self.answered["errors limited"] += frame is not None
            return
        self.answered["resets sent"] += 1
        yield Outgoing(frame)

    def _source(self, destination: bytes) -> bytes:
        """Return the address that errors come from: the tunnel's when they go back through it, else the node's."""
        route = self._routes.lookup(IPv4Address(destination))
        if route is not None and route.kind == Kind.TUNNEL and self.tunnel_address:
            return self.tunnel_address
        own = int(self._settings[NODE_LO] or self._settings[GATEWAY_LO]) & 0xFFFF_FFFF
        return own.to_bytes(4)

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def drop(self, reason: Reason) -> None:
        """Count a packet that was queued before and is dropped now: it comes back, and is dropped, so sums balance."""
        self._counters[INJECTED_TOTAL] += 1
        self._counters[reason] += 1

    def _drop_held(self, packet: Outgoing, reason: Reason) -> None:
        self.drop(reason)
        if reason in ERRORS:
            self._late.extend(self._error(packet.frame[14:], reason))

    def _take_late(self) -> list[Outgoing]:
        late, self._late = self._late, []
        return late

    def _station(self, interface: int) -> tuple[int, int]:
        return int(self._interfaces["mac"][interface]), int(self._settings[NODE_LO]) & 0xFFFF_FFFF


def may_answer(packet: bytes) -> bool:
    """Say whether an ICMP error about this IPv4 packet is allowed (RFC 1122 3.2.2).

    Never about an error, a later fragment, a group or broadcast destination, or a source that is no single host. An
    ICMP type that is not known might be an error's.
    """
    if packet[0] >> 4 != 4 or int.from_bytes(packet[6:8]) & dpkt.ip.IP_OFFMASK:
        return False
    source, target = packet[12], packet[16]
    if source in (0, 127) or source >= 0xE0 or target >> 4 == 0xE or packet[16:20] == b"\xff" * 4:
        return False
    message = packet[(packet[0] & 15) * 4 :]
    if packet[9] != dpkt.ip.IP_PROTO_ICMP:
        return True
    return len(message) > 0 and message[0] <= ICMP_LAST and message[0] not in ICMP_ERRORS


def icmp_error(packet: bytes, source: bytes, kind: int, code: int, mtu: int) -> bytes:
    """Return an Ethernet frame (without addresses) with the ICMP error about an IPv4 packet.

    Args:
        packet: The packet from its IP header on.
        source: Our address, 4 bytes.
        kind: ICMP type.
        code: ICMP code.
        mtu: What fits, for 3/4; else 0.
    """
    message = _with_checksum(struct.pack("!BBHHH", kind, code, 0, 0, mtu) + packet[:QUOTE])
    tos = _CONTROL | packet[1] & _TOS
    return _frame(dpkt.ip.IP(src=source, dst=packet[12:16], p=dpkt.ip.IP_PROTO_ICMP, tos=tos, data=message))


def echo_reply(packet: bytes) -> bytes | None:
    """Return the frame that answers an echo request, or None if it is none (RFC 1122 3.2.2.6).

    IP options are not reflected, and an echo with a wrong checksum is not answered. The reply takes the request's
    identification: unique for that pair of hosts, so fragments of several replies do not mix (RFC 6864).
    """
    message = packet[(packet[0] & 15) * 4 :]
    if packet[9] != dpkt.ip.IP_PROTO_ICMP or len(message) < 8 or message[0] != dpkt.icmp.ICMP_ECHO:
        return None
    if dpkt.in_cksum(message):
        return None
    message = _with_checksum(bytes(4) + message[4:])
    name = int.from_bytes(packet[4:6])
    ip = dpkt.ip.IP(src=packet[16:20], dst=packet[12:16], p=packet[9], tos=packet[1], id=name, data=message)
    return _frame(ip)


def tcp_reset(packet: bytes) -> bytes | None:
    """Return the frame that answers a TCP segment of no connection (RFC 9293 3.10.7.1); None for a RST."""
    if packet[0] >> 4 != 4 or packet[9] != dpkt.ip.IP_PROTO_TCP:
        return None
    segment = packet[(packet[0] & 15) * 4 :]
    if len(segment) < 20 or segment[13] & dpkt.tcp.TH_RST:
        return None
    sport, dport, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", segment)
    if flags & dpkt.tcp.TH_ACK:
        answer = dpkt.tcp.TCP(sport=dport, dport=sport, seq=ack, flags=dpkt.tcp.TH_RST, win=0)
    else:
        length = len(segment) - (offset >> 4) * 4 + bool(flags & dpkt.tcp.TH_SYN) + bool(flags & dpkt.tcp.TH_FIN)
        both = dpkt.tcp.TH_RST | dpkt.tcp.TH_ACK
        answer = dpkt.tcp.TCP(sport=dport, dport=sport, seq=0, ack=(seq + length) & 0xFFFF_FFFF, flags=both, win=0)
    return _frame(dpkt.ip.IP(src=packet[16:20], dst=packet[12:16], p=dpkt.ip.IP_PROTO_TCP, data=answer))


def _with_checksum(message: bytes) -> bytes:
    """Fill in the checksum of an ICMP message whose checksum field is zero."""
    return message[:2] + struct.pack("!H", dpkt.in_cksum(message)) + message[4:]


def _frame(ip: dpkt.ip.IP) -> bytes:
    """Return an Ethernet frame whose addresses the route stage will write."""
    ip.len = len(ip)  # dpkt makes a header checksum that is 0, but never a length
    return bytes(12) + struct.pack("!H", dpkt.ethernet.ETH_TYPE_IP) + bytes(ip)


def _ip_bytes(batch: Batch, row: int) -> bytes:
    """Return the packet of a row from its IP header on."""
    start, length = int(batch.packets["start"][row]), int(batch.packets["length"][row])
    return batch.data[int(batch.packets["l3"][row]) : start + length].tobytes()


def _snapshot(batch: Batch, row: int) -> Outgoing:
    """Copy a row out of the batch with its virtio header, to be sent later by the interface it was routed to."""
    packet = batch.packets[row]
    fields = ("vnet_flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    vnet = Vnet(*(int(packet[name]) for name in fields))
    waited = int(packet["flags"]) & (INJECTED | WAITED) != INJECTED
    return Outgoing(unload(batch, row), int(packet["oif"]), vnet, int(packet["max_fragment"]), waited)
