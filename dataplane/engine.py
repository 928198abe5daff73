"""The engine: device fds on the event loop, one compiled call per readiness, the only clock.

``add_reader`` per device; when a device is readable, one burst is received, processed and sent by one compiled call,
and the loop gets its turn again. Only rows that need it (queued ones, dropped ones that are owed an ICMP error) reach
Python. A device that reports an error is taken off the loop, logged once, and tried again after a pause: the node
lives.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataplane import jit, pipeline
from dataplane.batch import INJECTED, REASSEMBLED, ROWS, WAITED, make_batch
from dataplane.devices.io import IoBuffers
from dataplane.devices.memory import load
from dataplane.pipeline import Tables
from dataplane.resolve import Outgoing
from dataplane.slowpath import SlowPath
from dataplane.stages import conntrack, defrag
from dataplane.verdict import Reason

RETRY_SECONDS = 1.0
TICK_SECONDS = 1.0
SWEEP_ROWS = 1 << 18  # flows that a tick looks at: 1 ms
_ROUNDS = 4  # an injected frame may be punted again (an error about an error has no error): bounded all the same

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Attached:
    """A device on the loop."""

    name: str
    fd: int
    errors: int  # of receive, as far as they were seen
    failing: bool = False  # and that was logged
    paused: bool = False


class Engine:
    """Runs bursts. Tables may be edited between any two of its callbacks, which all run in one thread.

    Args:
        tables: What the stages read.
        slow: Answers what they punt.
        limit: Packets per burst, at most ``ROWS``.
        clock: Nanoseconds; a parameter for tests.
    """

    def __init__(
        self,
        tables: Tables,
        slow: SlowPath,
        limit: int = ROWS,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.tables = tables
        self.slow = slow
        self.io = IoBuffers()
        self.batch = make_batch()
        self._batch = self.batch.arrays
        self._io = self.io.arrays
        self._clock = clock
        self._limit = min(limit, ROWS)
        self._attached: dict[int, _Attached] = {}
        self._watchers: list[Callable[[int], None]] = []
        self._ticking: asyncio.TimerHandle | None = None
        self.on_failure: Callable[[int], None] = lambda index: None
        self.refresh()

    def refresh(self) -> None:
        """Take over the tables' arrays again; to be called after an edit, which may have moved one."""
        self._arrays = self.tables.arrays

    # --- devices -----------------------------------------------------------------------------------------------------

    def attach(self, index: int, fd: int, name: str) -> None:
        """Read interface ``index`` whenever its fd is readable."""
        self._attached[index] = _Attached(name, fd, int(self.tables.interfaces["rx_errors"][index]))
        asyncio.get_running_loop().add_reader(fd, self._readable, index)

    def detach(self, index: int) -> None:
        """Stop reading interface ``index``; its fd may be closed afterwards."""
        device = self._attached.pop(index, None)
        if device is not None:
            asyncio.get_running_loop().remove_reader(device.fd)

    def _readable(self, index: int) -> None:
        now = self._clock()
        result = pipeline.burst(self._batch, index, self._arrays, self._io, now, self._limit)
        if result & 0xFFFF:
            self._punt(result >> 16, now)
        if result == 0:
            self._nothing_came(index)

    def _nothing_came(self, index: int) -> None:
        """Find out whether reading failed; a packet that the device refused earlier is no reason to stop reading it."""
        device, errors = self._attached[index], int(self.tables.interfaces["rx_errors"][index])
        if errors != device.errors:
            device.errors = errors
            self._pause(index, device)

    def _pause(self, index: int, device: _Attached) -> None:
        """Take a failing device off the loop for a while: its fd would be readable for ever."""
        if not device.failing:
            error = int(self.tables.interfaces["error"][index])
            log.warning("device failed name=%s error=%s", device.name, os.strerror(error))
        device.failing = device.paused = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(device.fd)
        loop.call_later(RETRY_SECONDS, self._resume, index, device)
        self.on_failure(index)

    def _resume(self, index: int, device: _Attached) -> None:
        if self._attached.get(index) is not device:
            return
        device.paused = False
        self.tables.interfaces["error"][index] = 0
        asyncio.get_running_loop().add_reader(device.fd, self._readable, index)
        asyncio.get_running_loop().call_later(RETRY_SECONDS, self._recovered, index, device)

    def _recovered(self, index: int, device: _Attached) -> None:
        if self._attached.get(index) is device and device.failing and not device.paused:
            log.info("device is back name=%s", device.name)
            device.failing = False

    def warm_up(self) -> None:
        """Compile all that the loop will call, or load it from the cache, before the first packet."""
        if jit.is_cold():
            with jit.compiled_beside(self._warm_edits):
                self._warm_burst()
        self._warm_burst()
        self._warm_edits()

    def _warm_edits(self) -> None:
        """Run all that is compiled besides a burst: edits of tables, and the hands that go over them."""
        self.tables.warm_up()
        defrag.expire(self._arrays, self._clock())
        conntrack.expire(self._arrays, self._clock(), 0)

    def _warm_burst(self) -> None:
        pipeline.burst(self._batch, pipeline.LOADED, self._arrays, self._io, self._clock(), 0)

    # --- the slow path -----------------------------------------------------------------------------------------------

    def _punt(self, count: int, now: int) -> None:
        self.inject(self.slow.handle(self.batch, count, now))

    def inject(self, outgoing: Sequence[Outgoing]) -> None:
        """Send frames that the slow path made: by their interface, or routed like any packet."""
        now = self._clock()
        for _ in range(_ROUNDS):
            if not outgoing:
                return
            routed = [frame for frame in outgoing if not frame.oif]
            direct = [frame for frame in outgoing if frame.oif]
            outgoing = [*self._send(routed, now), *self._send(direct, now)]
        for _ in outgoing:
            self.slow.drop(Reason.OVERLOAD_SLOW_PATH)

    def _send(self, frames: Sequence[Outgoing], now: int) -> list[Outgoing]:
        """Run frames, all routed or all direct, through the pipeline; return what the slow path makes of the rest."""
        follow: list[Outgoing] = []
        packets = self.batch.packets
        while frames:
            count = load(self.batch, [item.frame for item in frames], 0, [item.vnet for item in frames])
            largest = [item.max_fragment for item in frames[:count]]
            waited = [WAITED if item.waited else 0 for item in frames[:count]]
            packets["flags"][:count] = [
                INJECTED | flag | (REASSEMBLED if size else 0) for flag, size in zip(waited, largest, strict=True)
            ]
            packets["max_fragment"][:count] = largest
            index = pipeline.LOADED
            if frames[0].oif:
                packets["oif"][:count] = [item.oif for item in frames[:count]]
                index = pipeline.DIRECT
            if pipeline.burst(self._batch, index, self._arrays, self._io, now, count) & 0xFFFF:
                follow.extend(self.slow.handle(self.batch, count, now))
            frames = frames[count:]
        return follow

    # --- time --------------------------------------------------------------------------------------------------------

    def every_tick(self, watcher: Callable[[int], None]) -> None:
        """Call ``watcher(now)`` once a second, between bursts."""
        self._watchers.append(watcher)

    def start(self) -> None:
        """Begin to age tables; devices are read as soon as they are attached."""
        self._ticking = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def stop(self) -> None:
        """Read no device any more and stop the timers."""
        for index in list(self._attached):
            self.detach(index)
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def drain(self) -> None:
        """Forward what is already waiting in the devices' queues, up to one burst each."""
        for index in list(self._attached):
            self._readable(index)

    def _tick(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
        now = self._clock()
        defrag.expire(self._arrays, now)
        conntrack.expire(self._arrays, now, SWEEP_ROWS)
        self.inject(self.slow.tick(now))
        for watcher in self._watchers:
            watcher(now)
