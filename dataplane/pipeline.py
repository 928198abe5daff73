"""The stages in order, as one compiled call per burst.

receive ▸ parse ▸ decapsulate ▸ arp ▸ guard ▸ defrag ▸ conntrack ▸ route ▸ nat ▸ encapsulate ▸ transmit ▸ tally

Stage by stage over the whole batch, never one fused loop per packet: the fused loop is 3-5 times slower once tables
outgrow the L2 cache. A call from Python costs about 1 us, so a burst is one call whatever it does.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import numpy as np

from dataplane.batch import (
    COUNTER_COUNT,
    COUNTERS,
    ERROR_REFILLED,
    ERROR_TOKENS,
    ERRORS_LIMITED,
    INJECTED,
    INJECTED_TOTAL,
    INTERFACE_TABLE,
    OWES_ERROR,
    RECEIVED,
    SETTING_COUNT,
    TCP_LIBERAL,
    TCP_LOOSE,
)
from dataplane.devices.receive import receive
from dataplane.devices.transmit import transmit
from dataplane.jit import Array, kernel
from dataplane.stages.arp import arp
from dataplane.stages.conntrack import conntrack
from dataplane.stages.defrag import defrag, make_assembly, reclaim
from dataplane.stages.guard import guard
from dataplane.stages.nat import nat
from dataplane.stages.parse import parse
from dataplane.stages.route import route
from dataplane.stages.vxlan import decapsulate, encapsulate
from dataplane.tables.flow import FlowTable, make_timeouts
from dataplane.tables.interface import INTERFACE, INTERFACES
from dataplane.tables.neighbour import NeighbourTable
from dataplane.tables.persistence import TemplateTable
from dataplane.tables.policy import PolicyTable
from dataplane.tables.route import Kind, Route, RouteTable
from dataplane.tables.scheduler import Scheduler
from dataplane.tables.service import Destination, Service, ServiceTable
from dataplane.tables.vtep import VtepTable
from dataplane.verdict import Reason, Verdict

ERROR_INTERVAL_NS = 1_000_000  # net.ipv4.icmp_msgs_per_sec = 1000
ERROR_BURST = 50  # net.ipv4.icmp_msgs_burst


class Tables:
    """Owns every table that the stages read; the node edits them between bursts.

    Attributes:
        interfaces: ``(INTERFACES,)`` of ``INTERFACE``; row 0 is the node itself.
        counters: ``(COUNTER_COUNT,)`` uint64.
        settings: ``(SETTING_COUNT,)`` uint64, indexed by the names in ``batch``.
        assembly: what ``defrag`` holds.
        timeouts: ``(TIMEOUT_COUNT,)`` int64 ns, indexed by ``tables.flow.Timeout``.
    """

    def __init__(self, seed: int | None = None, flows: int = 1 << 18) -> None:
        self.interfaces: Array = np.zeros(INTERFACES, INTERFACE)
        self.counters: Array = np.zeros(COUNTER_COUNT, np.uint64)
        self.settings: Array = np.zeros(SETTING_COUNT, np.uint64)
        self.routes = RouteTable(seed=seed)
        self.neighbours = NeighbourTable(seed=seed)
        self.vteps = VtepTable(seed=seed)
        self.assembly = make_assembly()
        self.flows = FlowTable(flows, seed=seed)
        self.services = ServiceTable(seed=seed)
        self.policies = PolicyTable()
        self.templates = TemplateTable(seed=seed)
        self.timeouts: Array = make_timeouts()
        self.settings[TCP_LIBERAL] = self.settings[TCP_LOOSE] = 1
        self.counters[ERROR_TOKENS] = ERROR_BURST

    def warm_up(self) -> None:
        """Run every kernel that edits a table once, and leave the tables as they were."""
        for network in (IPv4Network("192.0.2.1/32"), IPv6Network("2001:db8::1/128")):
            self.routes.set(network, Route(Kind.BLACKHOLE))
            self.routes.lookup(network.network_address)
            self.routes.delete(network)
        self.neighbours.delete(self.neighbours.insert(0, "192.0.2.1"))
        self.vteps.delete(self.vteps.insert("192.0.2.1", 0, 0, 0))
        for scheduler in (Scheduler.RR, Scheduler.WRR, Scheduler.SH, Scheduler.MH):
            address = IPv4Address("192.0.2.1")
            row = self.services.set(6, address, 1, Service(scheduler))
            self.services.add(row, address, 1, Destination())
            self.services.remove(row, address, 1)
            self.services.delete(row)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What a stage takes as ``tables``; to be read again after an edit, which may have moved an array."""
        return (
            self.interfaces,
            self.counters,
            self.settings,
            self.routes.arrays,
            self.neighbours.arrays,
            self.vteps.arrays,
            self.assembly,
            self.flows.arrays,
            self.services.arrays,
            self.policies.arrays,
            self.templates.arrays,
            self.timeouts,
        )


STAGES = (parse, decapsulate, arp, guard, defrag, conntrack, route, nat, encapsulate)
"""Every stage has the signature ``stage(batch, count, tables, now)``."""


LOADED = 0  # in place of an interface: the rows are in the batch already
DIRECT = -1  # and they are to be sent as they are


@kernel
def burst(batch: Any, index: int, tables: Any, io: Any, now: int, limit: int) -> int:
    """Read up to ``limit`` frames from interface ``index``, run the stages, send; return ``rows << 16 | punted``.

    Punted rows are those for the slow path: queued, or dropped and owing an ICMP error. They are found again by their
    verdict and flags. With ``LOADED`` for an interface the first ``limit`` rows are taken as they are, with ``DIRECT``
    they skip the stages too: one entry point, because a second one would cost seconds of compilation.
    """
    count = limit
    if index > LOADED:
        count = receive(batch, tables[INTERFACE_TABLE], index, io, limit)
    if count == 0:
        return 0
    if index >= LOADED:
        process(batch, count, tables, now)
    transmit(batch, count, tables[INTERFACE_TABLE], io)
    reclaim(tables)
    return count << 16 | tally(batch, count, tables, now)


@kernel
def process(batch: Any, count: int, tables: Any, now: int) -> None:
    """Run the ``STAGES`` over rows [0, count), in order."""
    parse(batch, count, tables, now)
    decapsulate(batch, count, tables, now)
    arp(batch, count, tables, now)
    guard(batch, count, tables, now)
    defrag(batch, count, tables, now)
    conntrack(batch, count, tables, now)
    route(batch, count, tables, now)
    nat(batch, count, tables, now)
    encapsulate(batch, count, tables, now)


@kernel
def tally(batch: Any, count: int, tables: Any, now: int) -> int:
    """Count rows [0, count) by their reason and take away the ICMP errors that the rate limit forbids."""
    _, packets = batch
    counters = tables[COUNTERS]
    punted, injected = 0, 0
    for i in range(count):
        packet = packets[i]
        counters[packet["reason"]] += 1
        flags = int(packet["flags"])
        injected += flags & INJECTED != 0
        if packet["verdict"] == Verdict.QUEUE:
            punted += 1
        elif flags & OWES_ERROR:
            # Path MTU discovery depends on 3/4: as in Linux it has no limit here, only the slow path's per burst.
            if packet["reason"] == Reason.MTU_DF or _may_answer(counters, now):
                punted += 1
            else:
                packet["flags"] = flags & ~OWES_ERROR & 0xFFFF
    counters[INJECTED_TOTAL] += np.uint64(injected)
    counters[RECEIVED] += np.uint64(count - injected)
    return punted


@kernel
def _may_answer(counters: Any, now: int) -> bool:
    """Take one ICMP error from the node's budget: a flood of bad packets must not become a flood of Python."""
    tokens = int(np.int64(counters[ERROR_TOKENS]))
    elapsed = now - int(np.int64(counters[ERROR_REFILLED]))
    # Divide only: nanoseconds since boot, multiplied, leave 64 bits after 106 days.
    fresh = elapsed // ERROR_INTERVAL_NS
    if fresh > 0:
        tokens = min(tokens + fresh, ERROR_BURST)
        counters[ERROR_REFILLED] = now - elapsed % ERROR_INTERVAL_NS
    if tokens <= 0:
        counters[ERRORS_LIMITED] += 1
        counters[ERROR_TOKENS] = 0
        return False
    counters[ERROR_TOKENS] = tokens - 1
    return True


def count_lost(counters: Array, packets: int) -> None:
    """Count packets that the operating system lost before they could be read: they came, and were dropped."""
    counters[RECEIVED] += np.uint64(packets)
    counters[Reason.OVERLOAD_RX_RING] += np.uint64(packets)


def balance(counters: Any) -> tuple[int, dict[Verdict, int]]:
    """Return how many packets came, received or injected, and how many got each verdict: the sums are equal."""
    by_verdict = dict.fromkeys(Verdict, 0)
    for reason in Reason:
        by_verdict[reason.verdict] += int(counters[reason])
    return int(counters[RECEIVED]) + int(counters[INJECTED_TOTAL]), by_verdict
