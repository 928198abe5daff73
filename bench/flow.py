"""Flows: lookup, insert, delete and the clock hand at 10k, 1M and 4M flows; lookups under a flood of crafted keys.

Tuples are those of clients of services; lookups are of random flows and directions, a million different ones where
there are as many, so that neither slots nor records are found in the caches. With a batch of 1 they are looked up one
by one, with larger ones in three passes. *C* is the same table in C. *C one by one* is a table as in a textbook: keys
and numbers in one array of cache lines, half full, so a lookup waits for memory once, but does nothing else meanwhile;
*C without passes* is our table looked up that way. Both use huge pages as ours does.

Insert and delete are of 4096 random flows that were deleted before, or are entered after. The crafted keys all have one
home under another key of the hash than the table's. A dict of 8 million tuples takes 2 GiB and is left out.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from bench.harness import Case, batches, bind, compile_c, read_c
from dataplane.jit import Array, kernel
from dataplane.tables import flow
from dataplane.tables.flow import ASSURED, MISS, FlowTable
from dataplane.tables.hash import hash5, make_key
from dataplane.tables.memory import make_zeros

V4 = 0xFFFF_0000_0000
WINDOW = 1 << 16  # lookups per call; the next call takes the next window
CHURN = 4096
CRAFTED = 8192
LARGEST_DICT = 2_000_000
NOW, LATER = 1, 1 << 60

# ``spare`` keeps numba from taking a half, which has all other fields at the same places, for a kind of this record.
KEY = np.dtype(
    {
        "names": ["src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "protocol", "spare"],
        "formats": ["u8", "u8", "u8", "u8", "u2", "u2", "u1", "u1"],
        "offsets": [0, 8, 16, 24, 32, 34, 36, 37],
        "itemsize": 40,
    }
)


@kernel
def enter(arrays: Any, originals: Any, replies: Any, rows: Any) -> None:
    """Insert flows."""
    scratch = arrays[6]
    for i in range(len(rows)):
        flow.copy_tuple(scratch[0], originals[i])
        flow.copy_tuple(scratch[1], replies[i])
        rows[i] = flow.insert(arrays, NOW)


@kernel
def leave(arrays: Any, rows: Any) -> None:
    """Delete flows."""
    for i in range(len(rows)):
        flow.delete(arrays, rows[i])


@kernel
def one_by_one(arrays: Any, wanted: Any, out: Any) -> None:
    """Look up all tuples, each for itself."""
    for j in range(len(out)):
        i = np.uint64(j)  # unsigned, as in C: no check for counting from the end
        out[i] = flow.find(arrays, wanted[i])


@kernel
def in_passes(arrays: Any, wanted: Any, words: Any, out: Any, batch: int) -> None:
    """Look up all tuples, ``batch`` at a time."""
    for start in range(0, len(out), batch):
        for j in range(batch):
            word = flow.hash_tuple(arrays, wanted[np.uint64(start + j)])
            words[np.uint64(j)] = word
            flow.prefetch_slot(arrays, word)
        for j in range(batch):
            out[np.uint64(start + j)] = flow.candidate(arrays, words[np.uint64(j)])
        for j in range(batch):
            i = np.uint64(start + j)
            half = int(out[i])
            if half >= 0 and not flow.matches(arrays, half, wanted[i]):
                out[i] = flow.find(arrays, wanted[i])


def tuples_of(count: int) -> tuple[Array, Array]:
    """Return ``(originals, replies)``: 64 connections of each client, 1000 services, 5000 backends."""
    numbers = np.arange(count)
    originals, replies = np.zeros(count, KEY), np.zeros(count, KEY)
    originals["protocol"], replies["protocol"] = 6, 6
    originals["src_lo"] = replies["dst_lo"] = V4 + 0x0AF4_0000 + numbers // 64
    originals["sport"] = replies["dport"] = 32768 + numbers % 64 * 7
    originals["dst_lo"], originals["dport"] = V4 + 0x0A60_0000 + numbers % 1000, 80
    replies["src_lo"], replies["sport"] = V4 + 0x0AF8_0000 + numbers % 5000, 8080
    return originals, replies


def make_table(originals: Array, replies: Array) -> FlowTable:
    """Return a table of these flows in the order of their rows; it is not crowded."""
    table = FlowTable(len(originals) * 9 // 8, seed=1)
    rows = np.zeros(len(originals), np.int64)
    enter(table.arrays, originals, replies, rows)
    assert (rows == np.arange(len(rows))).all()
    table.flows["expires_ns"][: len(rows)] = LATER
    return table


def in_c(table: FlowTable) -> Array:
    """Return the twin's ``struct table`` for a table, which must outlive it."""
    slots, key, _, flows, free, state, scratch = table.arrays
    words = (slots.ctypes.data, len(slots) - 1, key.ctypes.data, flows.ctypes.data, len(flows))
    return np.array([*words, free.ctypes.data, state.ctypes.data, scratch.ctypes.data], np.int64)


class Turns:
    """Does one of some calls after the other, for ever."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self._calls = itertools.cycle(calls)

    def __call__(self) -> object:
        """Do the next call."""
        return next(self._calls)()


Key: TypeAlias = tuple[int, int, int]


def keys_of(tuples: Array) -> list[Key]:
    """Return what a dict has as keys; addresses and ports as packed as Python can."""
    ports = tuples["sport"].astype(np.int64) << 16 | tuples["dport"]
    return list(zip(tuples["src_lo"].tolist(), tuples["dst_lo"].tolist(), ports.tolist(), strict=True))


def in_dict(index: dict[Key, int], keys: list[Key]) -> list[int]:
    """Look up keys in a dict."""
    return [index.get(key, -1) for key in keys]


def lookups(name: str, table: FlowTable, both: Array, quick: bool) -> Iterator[Case]:
    """Yield lookups of random halves; ``both`` has the key of each half."""
    random, total = np.random.default_rng(2), min(1 << 20, max(WINDOW, 1 << len(both).bit_length() - 1))
    halves = random.integers(0, len(both), total).reshape(-1, WINDOW)
    windows, out, words = [both[some] for some in halves], np.zeros(WINDOW, np.int64), np.zeros(256, np.uint64)
    twin, struct = compile_c(read_c("flow"), "flow"), in_c(table)
    plain = make_zeros(1 << (2 * len(both) - 1).bit_length(), "V64")
    bind(twin.plain_fill, plain, len(plain) - 1, struct)()
    alone: dict[str, Callable[[Array], Callable[[], object]]] = {
        "C one by one": lambda some: bind(twin.plain_drive, plain, len(plain) - 1, struct, some, out, WINDOW),
        "C without passes": lambda some: bind(twin.one_by_one, struct, some, out, WINDOW),
    }
    for batch in batches(quick):
        calls = {name: [make(some) for some in windows] for name, make in alone.items()}
        calls["C"] = [bind(twin.drive, struct, some, words, out, WINDOW, batch) for some in windows]
        calls["ours"] = [partial(in_passes, table.arrays, some, words, out, batch) for some in windows]
        if batch == 1:
            calls["ours"] = [partial(one_by_one, table.arrays, some, out) for some in windows]
        for some in calls.values():
            out[:] = -9
            some[0]()
            assert (out == halves[0]).all()
        yield Case(
            group=f"flow lookup {name}",
            batch=batch,
            what=f"find one of {len(both) // 2} flows by a tuple of either direction",
            operations=WINDOW,
            ours=Turns(calls["ours"]),
            references={name: Turns(calls[name]) for name in ("C", *alone)},
            marks={"C": 1.15} | ({"C one by one": 0.5} if len(both) >= 2_000_000 and batch > 1 else {}),
        )
    if len(both) > LARGEST_DICT:
        return
    index = dict(zip(keys_of(both), range(len(both)), strict=True))
    yield Case(
        group=f"flow lookup {name}, dict",
        batch=256,
        what="the same beside a dict of tuples of three ints",
        operations=WINDOW,
        ours=Turns(calls["ours"]),
        references={"dict": Turns([partial(in_dict, index, keys_of(some)) for some in windows])},
        rounds=9,
    )


class Churn:
    """Deletes random flows and enters them again, and takes the time of one of the two."""

    def __init__(self, both: Array, drop: Callable[..., object], add: Callable[..., object]) -> None:
        self._both, self._drop, self._add = both, drop, add
        self._random = np.random.default_rng(3)
        self._rows = np.arange(len(both) // 2)

    def turn(self, timed: str) -> int:
        """Return the nanoseconds of ``"insert"`` or ``"delete"``."""
        some = self._random.choice(len(self._rows), CHURN, replace=False)
        rows, originals, replies = self._rows[some], self._both[2 * some], self._both[2 * some + 1]
        begin = time.perf_counter_ns()
        self._drop(rows)
        middle = time.perf_counter_ns()
        self._add(originals, replies, rows)
        end = time.perf_counter_ns()
        assert rows.min() >= 0
        self._rows[some] = rows
        return end - middle if timed == "insert" else middle - begin


class DictChurn:
    """The same with a dict that has a key for each direction; the keys are made before."""

    def __init__(self, both: Array) -> None:
        self._keys = keys_of(both)
        self._index = dict(zip(self._keys, range(len(both)), strict=True))
        self._random = np.random.default_rng(3)

    def turn(self, timed: str) -> int:
        """Return the nanoseconds of ``"insert"`` or ``"delete"``."""
        rows = self._random.choice(len(self._keys) // 2, CHURN, replace=False).tolist()
        some = [(half, self._keys[half]) for row in rows for half in (2 * row, 2 * row + 1)]
        begin = time.perf_counter_ns()
        for _, key in some:
            del self._index[key]
        middle = time.perf_counter_ns()
        for half, key in some:
            self._index[key] = half
        end = time.perf_counter_ns()
        return end - middle if timed == "insert" else middle - begin


def changes(name: str, table: FlowTable, copy: FlowTable, both: Array) -> Iterator[Case]:
    """Yield insert, delete and the hand; ``copy`` is the twin's."""
    twin, struct = compile_c(read_c("flow"), "flow"), in_c(copy)
    ours = Churn(both, partial(leave, table.arrays), partial(enter, table.arrays))
    theirs = Churn(
        both,
        lambda rows: bind(twin.leave, struct, rows, CHURN)(),
        lambda originals, replies, rows: bind(twin.enter, struct, originals, replies, rows, CHURN)(),
    )
    others: dict[str, Any] = {"C": theirs} | ({"dict": DictChurn(both)} if len(both) <= LARGEST_DICT else {})
    for what in ("insert", "delete"):
        yield Case(
            group=f"flow {what} {name}",
            what=f"{what} both tuples of one of {len(both) // 2} flows",
            operations=CHURN,
            ours=partial(ours.turn, what),
            references={other: partial(churn.turn, what) for other, churn in others.items()},
            self_timed=True,
        )
    # A table as full as these loses what is not assured; the hand must find nothing and look at every row.
    for each in (table, copy):
        rows = each.items()
        each.flows["expires_ns"][rows], each.flows["status"][rows] = LATER, ASSURED
    assert flow.next_due(table.arrays, NOW, 2 * len(table)) == (MISS, 0)
    times = dict.fromkeys(range(len(table)), LATER)
    yield Case(
        group=f"flow hand {name}",
        what=f"look for what has expired among {len(table)} flows; 4 ns each are promised",
        operations=len(table),
        ours=partial(flow.next_due, table.arrays, NOW, len(table)),
        references={
            "C": bind(twin.sweep, struct, NOW),
            "dict": lambda: [row for row, expires in times.items() if expires <= NOW],
        },
        marks={"C": 1.15},
    )


@kernel
def _craft(found: Any, key: Any, mask: int) -> None:
    """Make all of ``found`` tuples with the home 0, as one who knows ``key``."""
    number = 0
    for i in range(len(found)):
        low, last = 0, 0
        while True:
            number += 1
            low, last = V4 + 0xC633_6400 + (number & 0xFF), 6 << 32 | (number >> 8 & 0xFFFF) << 16 | number >> 24
            if int(hash5(0, low, 0, V4 + 0x0A60_000A, last, key) & mask) == 0:
                break
        found[i]["src_lo"] = low
        found[i]["dst_lo"] = V4 + 0x0A60_000A
        found[i]["sport"] = last >> 16 & 0xFFFF
        found[i]["dport"] = last & 0xFFFF
        found[i]["protocol"] = 6


def flood() -> Iterator[Case]:
    """Yield lookups of crafted keys beside those of random ones, in tables with the same key."""
    random, rows = np.random.default_rng(4), np.zeros(CRAFTED, np.int64)
    calls = []
    for crafted in (True, False):
        table = FlowTable(CRAFTED, seed=1)
        originals, replies = tuples_of(CRAFTED)
        if crafted:
            _craft(originals, make_key(2), len(table.arrays[0]) - 1)
        enter(table.arrays, originals, replies, rows)
        assert (np.sort(rows) == np.arange(CRAFTED)).all()
        wanted = originals[random.integers(0, CRAFTED, WINDOW)]
        words, out = np.zeros(256, np.uint64), np.zeros(WINDOW, np.int64)
        calls.append(partial(in_passes, table.arrays, wanted, words, out, 256))
    yield Case(
        group="flow flood",
        batch=256,
        what=f"find one of {CRAFTED} flows whose tuples were crafted to share one slot under another key",
        operations=WINDOW,
        ours=calls[0],
        references={"random keys": calls[1]},
        marks={"random keys": 1.15},
    )


def cases(quick: bool) -> Iterator[Case]:
    """Yield all of it at each size."""
    for name, count in {"10k": 10_000, "1M": 1_000_000, "4M": 4_000_000}.items():
        if quick and count > 1_000_000:
            continue
        originals, replies = tuples_of(count)
        both = np.empty(2 * count, KEY)
        both[0::2], both[1::2] = originals, replies
        table = make_table(originals, replies)
        yield from lookups(name, table, both, quick)
        yield from changes(name, table, make_table(originals, replies), both)
    yield from flood()
