"""Longest prefix match: 1000 routes of a cluster, 1k, 100k and 1M random ones, IPv6, and the cost of an update.

The random routes have the lengths of the Internet's table: 60 % /24, 2 % /32, the rest /8 to /23. Addresses lie in
random routes; with a batch of 1 they are looked up one by one, with larger ones in three passes. DIR-24-8 is given the
family check that a table for both families needs, and once more without it.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Case, batches, bind, compile_c, read_c
from dataplane.jit import Array, kernel
from dataplane.tables import lpm
from dataplane.tables.lpm import Lpm

V4 = np.uint64(0xFFFF_0000_0000)
ADDRESSES = {1000: 1 << 16, 100_000: 1 << 18, 1_000_000: 1 << 18}  # enough to reach past the caches
UPDATES = 500


@kernel
def one_by_one(arrays: Any, addresses: Any, out: Any) -> None:
    """Look up all addresses, each for itself."""
    highs, lows = addresses
    for i in range(len(out)):
        out[i] = lpm.lookup(arrays, highs[i], lows[i])


@kernel
def in_batches(arrays: Any, highs: Any, lows: Any, out: Any) -> None:
    """Look up all addresses; a row of each array is a batch."""
    for i in range(len(out)):
        lpm.lookup_many(arrays, highs[i], lows[i], out[i], out.shape[1])


def our_call(table: Lpm, addresses: tuple[Array, Array], out: Array, batch: int) -> Callable[[], object]:
    """Return the call that looks up all addresses, ``batch`` at a time."""
    if batch == 1:
        return partial(one_by_one, table.arrays, addresses, out)
    highs, lows = (words.reshape(-1, batch) for words in addresses)
    return partial(in_batches, table.arrays, highs, lows, out.reshape(-1, batch))


def cluster_routes(count: int) -> tuple[Array, Array]:
    """Return (prefixes, lengths of 32): a default route, a quarter pods (/32), the rest blocks of other nodes (/26)."""
    lengths = np.where(np.arange(count) < count // 4, 32, 26)
    prefixes = 0x0AF4_0000 + np.where(lengths == 32, np.arange(count) * 7, 65536 + 64 * np.arange(count))
    lengths[0], prefixes[0] = 0, 0
    return _sorted(prefixes, lengths)


def random_routes(count: int) -> tuple[Array, Array]:
    """Return (prefixes, lengths of 32) spread over all addresses."""
    random = np.random.default_rng(1)
    lengths = np.where(random.random(count) < 0.6, 24, random.integers(8, 24, count))
    lengths[::50] = 32
    return _sorted(random.integers(0, 1 << 32, count) >> (32 - lengths) << (32 - lengths), lengths)


def _sorted(prefixes: Array, lengths: Array) -> tuple[Array, Array]:
    order = np.argsort(lengths, kind="stable")
    return prefixes[order].astype(np.uint64), lengths[order]


def addresses_in(prefixes: Array, lengths: Array, count: int) -> tuple[Array, Array]:
    """Return (highs, lows) of random addresses, each in a random prefix that is not the default route."""
    random = np.random.default_rng(2)
    rows = random.integers(int(lengths[0] == 0), len(prefixes), count)
    hosts = random.integers(0, 1 << 32, count).astype(np.uint64) & ((1 << (32 - lengths[rows])) - 1).astype(np.uint64)
    return np.zeros(count, np.uint64), prefixes[rows] | hosts | V4


def make_lpm(prefixes: Array, lengths: Array) -> Lpm:
    """Return a table of IPv4 routes; the values are their numbers."""
    table = Lpm(seed=1)
    table.bulk(np.zeros(len(prefixes), np.uint64), prefixes | V4, lengths + 96, np.arange(len(prefixes)))
    return table


def make_ranges(table: Lpm, prefixes: Array, lengths: Array) -> tuple[Array, Array]:
    """Return (starts, values) of the disjoint ranges of equal value, for ``numpy.searchsorted``."""
    ends = prefixes + (1 << (32 - lengths)).astype(np.uint64)
    starts = np.unique(np.concatenate([np.zeros(1, np.uint64), prefixes, ends[ends < 1 << 32]])) | V4
    values = np.zeros(len(starts), np.int32)
    one_by_one(table.arrays, (np.zeros(len(starts), np.uint64), starts), values)
    return starts, values


def in_numpy(starts: Array, values: Array, lows: Array, out: Array) -> None:
    """Look up all addresses by binary search."""
    out[:] = values[np.searchsorted(starts, lows, "right") - 1]


def bind_lpm(function: Any, table: Lpm, addresses: tuple[Array, Array], out: Array, batch: int) -> Callable[[], object]:
    """Return the call of the C twin."""
    nodes, prefixes, lengths, key = table.arrays
    return bind(function, nodes, prefixes, len(prefixes) - 1, lengths, key, *addresses, out, len(out), batch)


def lookups(name: str, routes: tuple[Array, Array], quick: bool) -> Iterator[Case]:
    """Yield the lookups in one set of IPv4 routes."""
    prefixes, lengths = routes
    count, total = len(prefixes), ADDRESSES[len(prefixes)]
    table, addresses = make_lpm(prefixes, lengths), addresses_in(prefixes, lengths, total)
    twin = compile_c(read_c("lpm"), "lpm")
    twin.dir248_make.restype = ctypes.c_void_p
    columns = prefixes.astype(np.uint32), lengths.astype(np.int32), np.arange(count, dtype=np.int32)
    dir248 = int(bind(twin.dir248_make, *columns, count, count)())  # type: ignore[call-overload]
    out, expected = np.zeros(total, np.int32), np.zeros(total, np.int32)
    others: dict[str, Callable[[], object]] = {
        "C DIR-24-8": bind(twin.dir248_drive, dir248, *addresses, expected, total),
        "C DIR-24-8, IPv4 only": bind(twin.dir248_drive4, dir248, addresses[1], expected, total),
        "numpy": partial(in_numpy, *make_ranges(table, prefixes, lengths), addresses[1], expected),
    }
    for batch in batches(quick):
        ours = our_call(table, addresses, out, batch)
        references = {"C": bind_lpm(twin.drive, table, addresses, expected, batch), **others}
        for call in references.values():
            ours(), call()
            assert (out == expected).all()
        yield Case(
            group=f"lpm {name}",
            batch=batch,
            what=f"{count} routes, {total} addresses, {table.nbytes >> 10} KiB",
            operations=total,
            ours=ours,
            references=references,
            marks={"C": 1.15, "C DIR-24-8": 1.5} if count == 1000 and batch == 1 else {"C": 1.15},
        )
    bind(twin.dir248_free, dir248)()


def lookups6(quick: bool) -> Iterator[Case]:
    """Yield the lookups in 10 000 IPv6 routes of 7 lengths."""
    random, count, total = np.random.default_rng(3), 10_000, 1 << 16
    lengths = random.choice([32, 40, 44, 48, 56, 64], count)
    highs = (0x2001 << 48 | random.integers(0, 1 << 48, count)) >> (64 - lengths) << (64 - lengths)
    lows = np.zeros(count, np.uint64)
    lengths[:100] = 128
    table = Lpm(seed=1)
    table.bulk(highs.astype(np.uint64), lows, lengths, np.arange(count))
    rows = random.integers(0, count, total)
    hosts = np.where(lengths[rows] == 128, 0, random.integers(0, 1 << 60, total)).astype(np.uint64)
    addresses = highs[rows].astype(np.uint64), hosts
    twin = compile_c(read_c("lpm"), "lpm")
    out, expected = np.zeros(total, np.int32), np.zeros(total, np.int32)
    for batch in batches(quick):
        ours = our_call(table, addresses, out, batch)
        in_c = bind_lpm(twin.drive, table, addresses, expected, batch)
        ours(), in_c()
        assert (out == expected).all()
        yield Case(
            group="lpm IPv6 10k",
            batch=batch,
            what="10000 IPv6 routes of 7 lengths, one probe per length",
            operations=total,
            ours=ours,
            references={"C": in_c},
            marks={"C": 1.15},
        )


def update(table: Lpm, length: int) -> None:
    """Add and delete prefixes of one length, called from Python as the control plane does."""
    for i in range(UPDATES):
        table.insert(0, 0xFFFF_0AC8_0000 + (i << (128 - length)), length, i)
    for i in range(UPDATES):
        table.delete(0, 0xFFFF_0AC8_0000 + (i << (128 - length)), length)


def update_dict(table: dict[tuple[int, int], int], length: int) -> None:
    """Do the same to a dict, which cannot match prefixes."""
    for i in range(UPDATES):
        table[0xFFFF_0AC8_0000 + (i << (128 - length)), length] = i
    for i in range(UPDATES):
        del table[0xFFFF_0AC8_0000 + (i << (128 - length)), length]


def updates(name: str, routes: tuple[Array, Array]) -> Iterator[Case]:
    """Yield the cost of one insert or delete."""
    table = make_lpm(*routes)
    for length in (24, 32):
        yield Case(
            group=f"lpm update of a /{length}, {name}",
            what=f"one insert or delete from Python among {len(table)} routes",
            operations=2 * UPDATES,
            ours=partial(update, table, length + 96),
            references={"dict": partial(update_dict, {}, length + 96)},
        )


def cases(quick: bool) -> Iterator[Case]:
    """Yield lookups and updates at each size."""
    sets = {"1k cluster": cluster_routes(1000), "1k random": random_routes(1000)}
    if not quick:
        sets |= {"100k random": random_routes(100_000), "1M random": random_routes(1_000_000)}
    for name, routes in sets.items():
        yield from lookups(name, routes, quick)
        yield from updates(name, routes)
    yield from lookups6(quick)
