"""The slow path: what happens once in a while, in Python, sans-IO.

The compiled pipeline hands over the rows that it queued, and the dropped rows whose sender is owed an ICMP error.
Here they become frames to send: errors (RFC 792, RFC 1812 4.3), echo replies for the node's own addresses, ARP
questions. Frames go back into the pipeline as injected packets and are routed, encapsulated and counted like any
other.

Every row that comes in is accounted for: answered, learned from, held for its neighbor, or dropped with a reason.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataplane.batch import (
    COUNTERS,
    GATEWAY_LO,
    INJECTED_TOTAL,
    INTERFACE_TABLE,
    IPV6,
    NODE_LO,
    OWES_ERROR,
    SETTINGS,
    V4_PREFIX,
    Batch,
)
from dataplane.codecs import ethernet, icmp, ipv4
from dataplane.devices.memory import Vnet, unload
from dataplane.jit import Array
from dataplane.resolve import SECOND, Outgoing, Resolver
from dataplane.tables.address import to_address
from dataplane.tables.neighbour import NeighbourTable
from dataplane.tables.route import Kind, RouteTable
from dataplane.verdict import Reason, Verdict

QUOTE = 576 - ipv4.HEADER - icmp.HEADER  # RFC 1812 4.3.2.3: as much of the packet as fits into 576 bytes
ERROR_BURST = 6  # XRLIM_BURST_FACTOR: errors to one destination at once, then one a second
_DESTINATIONS = 4096  # remembered for that limit
BUDGET = 128  # rows per burst: at some 20 us each the fast path waits 3 ms at most
_TOS = 0xC0  # RFC 1812 4.3.2.5: errors carry the precedence "internetwork control"

ERRORS: dict[Reason, tuple[int, int]] = {
    Reason.IP_TTL: (icmp.TIME_EXCEEDED, icmp.TTL_EXCEEDED),
    Reason.MTU_DF: (icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED),
    Reason.ROUTE_NONE: (icmp.UNREACHABLE, icmp.NET_UNREACHABLE),
    Reason.ROUTE_UNREACHABLE: (icmp.UNREACHABLE, icmp.HOST_UNREACHABLE),
    Reason.NEIGH_UNRESOLVED: (icmp.UNREACHABLE, icmp.HOST_UNREACHABLE),
    Reason.LOCAL_NO_LISTENER: (icmp.UNREACHABLE, icmp.PORT_UNREACHABLE),
}
"""The ICMP type and code that a dropped packet's sender is told."""


@dataclass(slots=True)
class _Budget:
    """Errors that one destination may still get."""

    tokens: float
    refilled: int


@dataclass(slots=True)
class ErrorLimit:
    """At most ``ERROR_BURST`` errors to a destination at once, then one a second (``net.ipv4.icmp_ratelimit``)."""

    budgets: OrderedDict[int, _Budget] = field(default_factory=OrderedDict)

    def allows(self, destination: int, now: int) -> bool:
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
        self.tunnel_address = 0  # 32 bits; the source of errors that go back through a tunnel
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
        return out + self._take_late()

    def tick(self, now: int) -> list[Outgoing]:
        """Let time pass: neighbors are asked again or given up."""
        self._now = now
        return self.resolver.tick(now) + self._take_late()

    def _handle(self, batch: Batch, row: int, now: int) -> Iterator[Outgoing]:
        packet = batch.packets[row]
        reason = Reason(int(packet["reason"]))
        if reason == Reason.ARP_LEARN:
            self.answered["learned"] += 1
            yield from self.resolver.learn(int(packet["iif"]), unload(batch, row), now)
        elif reason == Reason.NEIGH_RESOLVE:
            self.answered["held"] += 1
            next_hop = to_address(int(packet["next_hi"]), int(packet["next_lo"]))
            yield from self.resolver.hold(_snapshot(batch, row), next_hop, now)
        elif reason == Reason.LOCAL_DELIVERY:
            yield from self._deliver(batch, row, now)
        else:
            yield from self._error(_ip_bytes(batch, row), reason, int(packet["mtu"]), now)

    # --- the node's own addresses ------------------------------------------------------------------------------------

    def _deliver(self, batch: Batch, row: int, now: int) -> Iterator[Outgoing]:
        """Answer an echo request; anything else finds nobody at home."""
        if int(batch.packets["flags"][row]) & IPV6:
            self.drop(Reason.LOCAL_NO_LISTENER)
            return
        quoted = _ip_bytes(batch, row)
        data = np.frombuffer(bytes(ethernet.HEADER) + quoted, np.uint8).copy()
        ip = ethernet.HEADER
        at, end = ip + ipv4.header_length(data, ip), len(data)
        ours = ipv4.protocol(data, ip) == ipv4.PROTO_ICMP and icmp.valid(data, at, end)
        if ours and icmp.type(data, at) == icmp.ECHO_REQUEST and icmp.checksum_ok(data, at, end):
            self.answered["answered"] += 1
            yield Outgoing(_echo_reply(data, ip, at))
            return
        self.drop(Reason.LOCAL_NO_LISTENER)
        if not ours:
            yield from self._error(quoted, Reason.LOCAL_NO_LISTENER, 0, now)

    # --- errors ------------------------------------------------------------------------------------------------------

    def _error(self, packet: bytes, reason: Reason, mtu: int, now: int) -> Iterator[Outgoing]:
        """Yield the ICMP error that the sender of ``packet`` (from its IP header on) is owed, if it may be sent."""
        kind, code = ERRORS[reason]
        if not may_answer(packet):
            return
        data = np.frombuffer(packet, np.uint8)
        sender = ipv4.source(data, 0)
        # Path MTU discovery depends on 3/4, so Linux never limits it per destination.
        if reason != Reason.MTU_DF and not self._limit.allows(sender, now):
            self.answered["errors limited"] += 1
            return
        self.answered["errors sent"] += 1
        rest = mtu if reason == Reason.MTU_DF else 0
        yield Outgoing(icmp_error(packet, self._source(sender), kind, code, rest))

    def _source(self, destination: int) -> int:
        """Return the address that errors come from: the tunnel's when they go back through it, else the node's."""
        route = self._routes.lookup(to_address(0, V4_PREFIX | destination))
        if route is not None and route.kind == Kind.TUNNEL and self.tunnel_address:
            return self.tunnel_address
        return int(self._settings[NODE_LO] or self._settings[GATEWAY_LO]) & 0xFFFF_FFFF

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def drop(self, reason: Reason) -> None:
        """Count a packet that was queued before and is dropped now: it comes back, and is dropped, so sums balance."""
        self._counters[INJECTED_TOTAL] += 1
        self._counters[reason] += 1

    def _drop_held(self, packet: Outgoing, reason: Reason) -> None:
        self.drop(reason)
        if reason in ERRORS:
            self._late.extend(self._error(packet.frame[ethernet.HEADER :], reason, 0, self._now))

    def _take_late(self) -> list[Outgoing]:
        late, self._late = self._late, []
        return late

    def _station(self, interface: int) -> tuple[int, int]:
        return int(self._interfaces["mac"][interface]), int(self._settings[NODE_LO]) & 0xFFFF_FFFF


def may_answer(packet: bytes) -> bool:
    """Say whether an ICMP error about this IPv4 packet is allowed (RFC 1122 3.2.2).

    Never about an error, a later fragment, a group or broadcast destination, or a source that is no single host.
    """
    data = np.frombuffer(packet, np.uint8)
    if len(packet) < ipv4.HEADER or packet[0] >> 4 != 4 or ipv4.fragment_word(data, 0) & ipv4.OFFSET_MASK:
        return False
    source, target = ipv4.source(data, 0), ipv4.destination(data, 0)
    if source >> 24 in (0, 127) or source >> 28 >= 0xE or target >> 28 == 0xE or target == 0xFFFF_FFFF:
        return False
    if ipv4.protocol(data, 0) != ipv4.PROTO_ICMP:
        return True
    at = ipv4.header_length(data, 0)
    return len(packet) > at and not icmp.is_error(icmp.type(data, at))


def icmp_error(packet: bytes, source: int, kind: int, code: int, rest: int) -> bytes:
    """Return an Ethernet frame (without addresses) with the ICMP error about an IPv4 packet.

    Args:
        packet: The packet from its IP header on.
        source: Our address, 32 bits.
        kind: ICMP type.
        code: ICMP code.
        rest: The second word: the MTU for 3/4.
    """
    quote = packet[:QUOTE]
    ip, at = ethernet.HEADER, ethernet.HEADER + ipv4.HEADER
    data = np.zeros(at + icmp.HEADER + len(quote), np.uint8)
    data[at + icmp.HEADER :] = np.frombuffer(quote, np.uint8)
    target = ipv4.source(np.frombuffer(packet, np.uint8), 0)
    ethernet.emit(data, 0, 0, 0, ethernet.ETHERTYPE_IPV4)
    ipv4.emit(data, ip, source, target, ipv4.PROTO_ICMP, len(data) - ip)
    ipv4.set_tos(data, ip, _TOS)
    icmp.emit_error(data, at, kind, code, rest, len(quote))
    return data.tobytes()


def _echo_reply(data: Array, ip: int, at: int) -> bytes:
    """Turn the frame with an echo request into its reply, in place (RFC 1122 3.2.2.6); options are not reflected."""
    source, target = ipv4.source(data, ip), ipv4.destination(data, ip)
    icmp.emit_echo_reply(data, at)
    ipv4.set_source(data, ip, target)
    ipv4.set_destination(data, ip, source)
    ipv4.set_ttl(data, ip, ipv4.DEFAULT_TTL)
    ipv4.set_fragment_word(data, ip, 0)
    ethernet.emit(data, 0, 0, 0, ethernet.ETHERTYPE_IPV4)
    return data.tobytes()


def _ip_bytes(batch: Batch, row: int) -> bytes:
    """Return the packet of a row from its IP header on."""
    start, length = int(batch.packets["start"][row]), int(batch.packets["length"][row])
    return batch.data[int(batch.packets["l3"][row]) : start + length].tobytes()


def _snapshot(batch: Batch, row: int) -> Outgoing:
    """Copy a row out of the batch with its virtio header, to be sent later by the interface it was routed to."""
    packet = batch.packets[row]
    fields = ("vnet_flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    return Outgoing(unload(batch, row), int(packet["oif"]), Vnet(*(int(packet[name]) for name in fields)))
