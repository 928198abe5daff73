"""The TCP kernels as a tracker of ``tests.tcp_segments``: one row of a flow table, and one slot of an arena."""

from typing import Any

import numpy as np

from dataplane import batch as b
from dataplane.jit import Array
from dataplane.stages import tcp
from dataplane.stages.parse import parse_frame
from dataplane.tables.flow import ASSURED, SEEN_REPLY, Count, FlowTable, TcpState, Timeout, make_timeouts
from dataplane.verdict import Reason
from tests.tcp_segments import SERVER_MAC, Entry, Segment, Settings, Step

SECOND = 1_000_000_000
ROW = 1  # not 0, so that a wrong index is seen
AT = 100  # where the frame lies in the arena
DIRT = 0xA5


class Kernels:
    """What the stage does around them: one flow, begun, followed, restarted and forgotten.

    Attributes:
        reason: why the last segment was dropped, or ``ACCEPTED``.
        restarts: how often ``follow`` has said ``RESTART``.
    """

    def __init__(self) -> None:
        self.table = FlowTable(4, seed=7)
        self.settings: Array = np.zeros(b.SETTING_COUNT, np.uint64)
        self.timeouts = make_timeouts()
        nothing = np.zeros(1, np.int64)
        tables: list[Any] = [nothing] * (b.TIMEOUTS + 1)
        tables[b.SETTINGS], tables[b.FLOWS], tables[b.TIMEOUTS] = self.settings, self.table.arrays, self.timeouts
        self.tables = tuple(tables)
        self.packets: Array = np.zeros(1, b.PACKET)
        self.reason = Reason.ACCEPTED
        self.restarts = 0
        self.originator = -1
        self.now = 0
        self._clear()
        self.configure(Settings())

    @property
    def flow(self) -> Any:
        return self.table.flows[ROW]

    @property
    def out_of_window(self) -> int:
        return int(self.table.state[Count.OUT_OF_WINDOW])

    def half(self, direction: int) -> Any:
        return self.table.tuples[2 * ROW + direction]

    def configure(self, settings: Settings) -> None:
        self.settings[b.TCP_LIBERAL], self.settings[b.TCP_LOOSE] = settings.liberal, settings.loose
        indices = {"max_retrans": Timeout.RETRANS, "unacknowledged": Timeout.UNACK}
        for name, seconds in settings.timeouts.items():
            index = indices[name] if name in indices else Timeout.TCP + TcpState[name.upper()]
            self.timeouts[index] = seconds * SECOND

    def load(self, frame: bytes) -> tuple[Array, Any]:
        """Place a frame at the very end of an arena and parse it."""
        data = np.full(AT + len(frame), DIRT, np.uint8)
        data[AT:] = np.frombuffer(frame, np.uint8)
        packet = self.packets[0]
        packet["start"], packet["length"] = AT, len(frame)
        assert parse_frame(data, packet, SERVER_MAC) == Reason.ACCEPTED
        return data, packet

    def send(self, segment: Segment, now: int) -> Step:
        """Do as the stage does; ``now`` in seconds."""
        self.now = now * SECOND
        data, packet = self.load(segment.frame())
        self._forget_expired()
        why = self._enter(data, packet, segment.side)
        if why == tcp.RESTART:
            self.restarts += 1
            self._clear()
            why = self._enter(data, packet, segment.side)
        self.reason = Reason.of(why)
        self._forget_expired()
        return Step(self.reason == Reason.ACCEPTED, self._entry())

    def _enter(self, data: Array, packet: Any, side: int) -> int:
        if self.originator >= 0:
            return int(tcp.follow(data, packet, self.tables, 2 * ROW + (side ^ self.originator), self.now))
        why = int(tcp.may_begin(data, packet, int(self.settings[b.TCP_LOOSE])))
        if why == Reason.ACCEPTED:
            self.originator = side
            tcp.begin(data, packet, self.tables, ROW, self.now)
        return why

    def _clear(self) -> None:
        self.originator = -1
        self.table.flows[ROW : ROW + 1].view(np.uint8)[:] = 0

    def _forget_expired(self) -> None:
        if self.originator >= 0 and int(self.flow["expires_ns"]) <= self.now:
            self._clear()

    def _entry(self) -> Entry | None:
        if self.originator < 0:
            return None
        flow, halves = self.flow, [self.half(0), self.half(1)]
        flags, scales = [int(half["window_flags"]) for half in halves], [int(half["scale"]) for half in halves]
        return Entry(
            originator=self.originator,
            state=TcpState(int(flow["state"])).name,
            timeout=(int(flow["expires_ns"]) - self.now) // SECOND,
            replied=int(flow["status"]) & SEEN_REPLY != 0,
            assured=int(flow["status"]) & ASSURED != 0,
            flags=(flags[0], flags[1]),
            scales=(scales[0], scales[1]),
        )
