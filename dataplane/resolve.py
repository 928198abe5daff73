"""Neighbor resolution on the uplink: ARP with the kernel's states and timers, sans-IO (RFC 826, RFC 4861 7.3, B1).

``Resolver`` decides whom to ask, what to believe and when to give up; it is told the time and hands back frames.
Packets whose next hop is not known wait here, at most ``QUEUE_BYTES`` per neighbor; the oldest make room. A neighbor
that stays silent loses its packets with the reason neigh.unresolved, and their senders hear ICMP host unreachable.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address

import dpkt

from dataplane.devices.memory import Vnet
from dataplane.tables.address import Address
from dataplane.tables.neighbour import LOCK_NS, NeighbourTable, State
from dataplane.tables.result import TableFullError
from dataplane.verdict import Reason

SECOND = 1_000_000_000
REACHABLE_NS = 30 * SECOND  # base_reachable_time; times 0.5 to 1.5, so that the nodes of a LAN do not ask in step
DELAY_NS = 5 * SECOND  # delay_first_probe_time: a stale address serves this long before it is asked again
RETRANS_NS = SECOND  # retrans_time
PROBES = 3  # ucast_solicit, and mcast_solicit
STALE_NS = 60 * SECOND  # gc_stale_time
EARLY_NS = SECOND // 10  # a tick may come early: the event loop's timers count milliseconds, by a clock of their own
QUEUE_BYTES = 212_992  # unres_qlen_bytes
PACKET_COST = 512  # what it costs to keep a packet besides its bytes; the kernel counts memory (truesize), too
BROADCAST = 0xFFFF_FFFF_FFFF
GC_START = 128  # gc_thresh1: with fewer entries nothing is collected


NO_OFFLOAD = Vnet()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame that the slow path sends: by interface ``oif`` as it is, or, with ``oif`` 0, routed as any packet."""

    frame: bytes
    oif: int = 0
    vnet: Vnet = NO_OFFLOAD
    max_fragment: int = 0  # of a datagram that came in fragments: the largest one's IP length
    waited: bool = False  # it was received, and not made here


@dataclass(slots=True)
class _Waiting:
    """The packets that wait for one neighbor."""

    frames: deque[Outgoing] = field(default_factory=deque)
    size: int = 0


def arp_request(mac: int, sender: int, target: int, to: int = BROADCAST) -> bytes:
    """Return an Ethernet frame that asks who has ``target``; addresses are 32-bit and 48-bit integers."""
    question = dpkt.arp.ARP(sha=mac.to_bytes(6), spa=sender.to_bytes(4), tha=bytes(6), tpa=target.to_bytes(4))
    ethernet = dpkt.ethernet.Ethernet(dst=to.to_bytes(6), src=mac.to_bytes(6), type=dpkt.ethernet.ETH_TYPE_ARP)
    ethernet.data = question
    return bytes(ethernet)


class Resolver:
    """The state machine over a ``NeighbourTable``.

    Args:
        table: The neighbors; the route stage reads it and notes in ``used_ns`` when an entry was used.
        station: Gives the MAC and the IPv4 address (32 bits, 0: none) that an interface asks with.
        drop: Called for a packet that is given up, with its reason.
        seed: Of the random share of the reachable time.
    """

    def __init__(
        self,
        table: NeighbourTable,
        station: Callable[[int], tuple[int, int]],
        drop: Callable[[Outgoing, Reason], None],
        seed: int | None = None,
    ) -> None:
        self.table = table
        self._station = station
        self._drop = drop
        self._waiting: dict[int, _Waiting] = {}
        self._reachable_until: dict[int, int] = {}
        self._random = random.Random(seed)

    @property
    def waiting(self) -> int:
        """How many packets wait."""
        return sum(len(waiting.frames) for waiting in self._waiting.values())

    def hold(self, packet: Outgoing, address: Address, now: int) -> list[Outgoing]:
        """Keep a packet until the neighbor at ``address`` on its ``oif`` is known; return the question to send.

        A packet whose neighbor has become known since it was routed comes back, to be routed again.
        """
        try:
            row = self._row(packet.oif, address)
        except TableFullError:
            self._drop(packet, Reason.NEIGH_QUEUE_FULL)
            return []
        state = int(self.table.records[row]["state"])
        if state >= State.REACHABLE and state != State.FAILED:
            return [replace(packet, oif=0)]
        waiting = self._waiting.setdefault(row, _Waiting())
        waiting.frames.append(packet)
        waiting.size += len(packet.frame) + PACKET_COST
        while waiting.size > QUEUE_BYTES:
            oldest = waiting.frames.popleft()
            waiting.size -= len(oldest.frame) + PACKET_COST
            self._drop(oldest, Reason.NEIGH_QUEUE_FULL)
        if state == State.INCOMPLETE:
            return []
        return [self._ask(row, State.INCOMPLETE, now)]

    def learn(self, interface: int, frame: bytes, now: int) -> list[Outgoing]:
        """Believe an ARP packet as far as the kernel would; return the packets that waited for what it says."""
        arp = dpkt.arp.ARP(frame[14:])  # the ARP stage has checked it
        request, mac = arp.op == dpkt.arp.ARP_OP_REQUEST, int.from_bytes(arp.sha)
        gratuitous = arp.spa == arp.tpa and (request or arp.tha == arp.sha)
        row = self._known_or_asking(interface, IPv4Address(arp.spa), request and not gratuitous)
        if row < 0:
            return []
        entry = self.table.records[row]
        if entry["state"] == State.PERMANENT:
            return []
        known = State.REACHABLE <= entry["state"] <= State.PROBE
        changed = not known or int(entry["mac"]) != mac
        if known and changed and not gratuitous and now - int(entry["updated_ns"]) < LOCK_NS:
            return []
        entry["mac"] = mac
        if not request and not frame[0] & 1:
            # A reply to us alone: the only proof that the neighbor hears us.
            self._confirm(row, changed, now)
        elif changed:
            self._set(row, State.STALE, now)
        return self._release(row)

    def _known_or_asking(self, interface: int, address: Address, asks: bool) -> int:
        """Return the row of who sent an ARP packet, or -1; a request for us makes one, since an answer follows."""
        row = self.table.find(interface, address)
        if row >= 0 or not asks:
            return row
        try:
            return self._row(interface, address)
        except TableFullError:
            return -1

    def _confirm(self, row: int, changed: bool, now: int) -> None:
        """Note that a neighbor is reachable. The lock on its address does not begin anew if that stays the same."""
        entry = self.table.records[row]
        if changed or entry["state"] != State.REACHABLE:
            self._set(row, State.REACHABLE, now)
        entry["confirmed_ns"] = now
        self._reachable_until[row] = now + int(REACHABLE_NS * (0.5 + self._random.random()))

    def tick(self, now: int) -> list[Outgoing]:
        """Let time pass; return the questions that are due. Call it about once a second."""
        out: list[Outgoing] = []
        for row, _, _ in list(self.table.items()):
            entry = self.table.records[row]
            state, age = int(entry["state"]), now - int(entry["updated_ns"])
            if state == State.REACHABLE and now >= self._reachable_until.get(row, 0):
                self._set(row, State.STALE, now)
            elif state == State.STALE:
                if int(entry["used_ns"]) > int(entry["updated_ns"]):
                    self._set(row, State.DELAY, now)
                elif age > STALE_NS and len(self.table) > GC_START:
                    self._forget(row)
            elif state == State.DELAY and age >= DELAY_NS - EARLY_NS:
                out.append(self._ask(row, State.PROBE, now))
            elif state in (State.INCOMPLETE, State.PROBE) and age >= RETRANS_NS - EARLY_NS:
                if int(entry["probes"]) < PROBES:
                    out.append(self._ask(row, State(state), now))
                else:
                    self._fail(row, now)
            elif state == State.FAILED and age > STALE_NS:
                self._forget(row)
        return out

    def _row(self, interface: int, address: Address) -> int:
        """Return the neighbor's row, made if need be; a full table loses its oldest entry that nobody waits for."""
        row = self.table.find(interface, address)
        if row >= 0:
            return row
        try:
            return self.table.insert(interface, address)
        except TableFullError:
            records = self.table.records
            idle = [row for row, _, _ in self.table.items() if records[row]["state"] in (State.STALE, State.FAILED)]
            if not idle:
                raise
            self._forget(min(idle, key=lambda row: int(records[row]["updated_ns"])))
            return self.table.insert(interface, address)

    def _ask(self, row: int, state: State, now: int) -> Outgoing:
        """Send one more question: to everybody while the MAC is unknown, to the neighbor alone to confirm it."""
        entry = self.table.records[row]
        probes = int(entry["probes"]) + 1 if entry["state"] == state else 1
        self._set(row, state, now)
        entry["probes"] = probes
        interface = int(entry["interface"])
        mac, sender = self._station(interface)
        to = int(entry["mac"]) if state == State.PROBE else BROADCAST
        return Outgoing(arp_request(mac, sender, int(entry["lo"]) & 0xFFFF_FFFF, to), interface)

    def _set(self, row: int, state: State, now: int) -> None:
        entry = self.table.records[row]
        entry["state"], entry["probes"], entry["updated_ns"] = state, 0, now

    def _release(self, row: int) -> list[Outgoing]:
        """Return the packets that waited, to be routed again: by now the route may be another."""
        waiting = self._waiting.pop(row, _Waiting())
        return [replace(packet, oif=0) for packet in waiting.frames]

    def _fail(self, row: int, now: int) -> None:
        self._set(row, State.FAILED, now)
        waiting = self._waiting.pop(row, _Waiting())
        for packet in waiting.frames:
            self._drop(packet, Reason.NEIGH_UNRESOLVED)

    def _forget(self, row: int) -> None:
        self._reachable_until.pop(row, None)
        self.table.delete(row)
