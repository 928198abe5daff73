"""Session affinity: the backend of a client that is known, and of one that is new, among 10 k and 1 M clients."""

import ctypes
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Case, bind, compile_c, read_c
from bench.scheduler import make
from dataplane.jit import Array, kernel
from dataplane.tables import persistence
from dataplane.tables.persistence import TEMPLATE, TemplateTable
from dataplane.tables.scheduler import Scheduler

BACKENDS = 8
ASKED = 8192  # clients per call
SIZES = (10_000, 1_000_000)
NOW = 10**12


@kernel
def drive(table: Any, arrays: Any, rows: Any, lows: Any, out: Any) -> None:
    """Select a backend for each client of the service in its row."""
    for i in range(len(out)):
        j = np.uint64(i)
        out[j], _ = persistence.select(table, arrays, int(rows[j]), (np.uint64(0), lows[j], 0), NOW)


class Side:
    """One implementation's own copy of everything, with ``count`` clients in it."""

    def __init__(self, count: int) -> None:
        self.services, row = make(Scheduler.RR, [1] * BACKENDS)
        self.templates = TemplateTable(count + ASKED, seed=1)
        self.rows: Array = np.full(ASKED, row, np.int32)
        self.out: Array = np.zeros(ASKED, np.int32)
        self._saved: tuple[Array, ...] = ()

    def fill(self, lows: Array) -> None:
        """Enter clients, and remember the table with them."""
        for start in range(0, len(lows), ASKED):
            some = lows[start : start + ASKED]
            drive(self.templates.arrays, self.services.arrays, self.rows[: len(some)], some, self.out[: len(some)])
        self._saved = tuple(array.copy() for array in self._changing)

    @property
    def _changing(self) -> tuple[Array, ...]:
        slots, _, templates, _, state = self.templates.arrays
        return slots, templates.view(np.uint8), state, self.services.services.view(np.uint8)

    def restore(self) -> None:
        """Forget the clients that came after ``fill``."""
        for array, saved in zip(self._changing, self._saved, strict=True):
            array[:] = saved


def c_table(templates: TemplateTable) -> Array:
    """Return ``struct table``."""
    slots, key, records, free, state = templates.arrays
    words = [slots.ctypes.data, len(slots) - 1, key.ctypes.data, records.ctypes.data, len(records)]
    return np.array([*words, free.ctypes.data, state.ctypes.data], np.int64)


def bound(side: Side, lows: Array) -> Callable[[], object]:
    """Return the call of our kernel."""
    return partial(drive, side.templates.arrays, side.services.arrays, side.rows, lows, side.out)


def bound_c(twin: ctypes.CDLL, side: Side, lows: Array) -> Callable[[], object]:
    """Return the call of the twin."""
    _, _, services, backends, buckets = side.services.arrays
    table = c_table(side.templates)
    return bind(twin.drive_templates, table, services, side.rows, backends, buckets, lows, side.out, ASKED, NOW)


def timed(call: Callable[[], object], side: Side) -> float:
    """Return the nanoseconds of one call, on the table as it was filled."""
    side.restore()
    begin = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - begin


def _clients(count: int) -> Array:
    random = np.random.default_rng(3)
    lows: Array = random.choice(1 << 24, count, replace=False).astype(np.uint64)
    return lows + np.uint64(0xFFFF_CB00_0000)


def cases(quick: bool) -> Iterator[Case]:
    """Yield known and new clients in tables of each size."""
    twin = compile_c(read_c("scheduler") + read_c("persistence"), "persistence")
    assert TEMPLATE.itemsize == 64
    for count in SIZES[:1] if quick else SIZES:
        lows = _clients(count + ASKED)
        ours, theirs = Side(count), Side(count)
        for side in (ours, theirs):
            side.fill(lows[:count])
        known = np.random.default_rng(4).choice(lows[:count], ASKED)
        for name, asked in (("known", known), ("new", lows[count:])):
            calls = bound(ours, asked), bound_c(twin, theirs, asked)
            timed(calls[0], ours), timed(calls[1], theirs)
            assert (ours.out == theirs.out).all(), "the C twin chooses other backends"
            assert (ours.templates.templates == theirs.templates.templates).all()
            yield Case(
                group=f"affinity {name} {count // 1000} k",
                what=f"select a backend for a client that is {name}, {count} clients in the table",
                operations=ASKED,
                ours=partial(timed, calls[0], ours),
                references={"C": partial(timed, calls[1], theirs)},
                marks={"C": 1.15},
                self_timed=True,
            )
