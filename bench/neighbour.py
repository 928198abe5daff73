"""Neighbor lookup: (interface, address) to a row, 1024 neighbors, hits and misses."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Case, batches, bind, compile_c
from dataplane.jit import Array, kernel
from dataplane.tables import neighbour
from dataplane.tables.address import to_address
from dataplane.tables.neighbour import NeighbourTable

QUERIES = 16384
HASH = """
#include <stdint.h>
typedef uint64_t u64; typedef uint32_t u32; typedef int64_t i64; typedef int32_t i32;
static inline u64 fold(u64 a, u64 b) { unsigned __int128 p = (unsigned __int128)a * b; return (u64)(p >> 64) ^ (u64)p; }
static inline u64 hash3(u64 a, u64 b, u64 c, const u64 *k) {
    return fold(fold(a ^ k[0], b ^ k[1]) ^ k[2], c ^ k[3]);
}
struct slot { u32 tag, row; };
"""
SOURCE = (
    HASH
    + """
struct neighbour { i32 interface; uint8_t state, probes; u64 mac, hi, lo; i64 confirmed, used, updated, spare; };
static inline i64 find(const struct slot *slots, i64 mask, const u64 *key, const struct neighbour *rows,
                       i64 interface, u64 hi, u64 lo) {
    u32 tag = (u32)hash3(hi, lo, interface, key);
    for (i64 distance = 0; distance < 32; distance++) {
        i64 at = (tag + distance) & mask;
        i64 row = (i64)slots[at].row - 1;
        if (row < 0) return -1;
        if (slots[at].tag == tag && rows[row].lo == lo && rows[row].hi == hi && rows[row].interface == interface)
            return row;
    }
    return -1;
}
static void burst(const struct slot *slots, i64 mask, const u64 *key,
        const struct neighbour *rows, const i32 *interfaces, const u64 *los, i32 *out, i64 count) {
    for (i64 i = 0; i < count; i++) out[i] = find(slots, mask, key, rows, interfaces[i], 0, los[i]);
}
void drive(const struct slot *slots, i64 mask, const u64 *key, const struct neighbour *rows,
           const i32 *interfaces, const u64 *los, i32 *out, i64 total, i64 batch) {
    for (i64 i = 0; i < total; i += batch) burst(slots, mask, key, rows, interfaces + i, los + i, out + i, batch);
}
"""
)


@kernel
def burst(arrays: Any, queries: Any, out: Any, start: int, stop: int) -> None:
    """Look up one burst."""
    interfaces, lows = queries
    for i in range(start, stop):
        out[i] = neighbour.find(arrays, int(interfaces[i]), np.uint64(0), lows[i])


@kernel
def drive(arrays: Any, queries: Any, out: Any, batch: int) -> None:
    """Look up all queries, ``batch`` at a time."""
    for start in range(0, len(out), batch):
        burst(arrays, queries, out, start, start + batch)


def queries_for(table: NeighbourTable, hits: float) -> tuple[Array, Array]:
    """Return random (interfaces, lower halves), a share ``hits`` of them in the table."""
    random = np.random.default_rng(1)
    rows = random.integers(0, len(table), QUERIES)
    missing = random.random(QUERIES) >= hits
    lows = table.records["lo"][rows] + np.where(missing, 1 << 24, 0).astype(np.uint64)
    return table.records["interface"][rows].copy(), lows


def in_dict(index: dict[tuple[int, int], int], pairs: list[tuple[int, int]]) -> list[int]:
    """Look up all queries in a dict."""
    return [index.get(pair, -1) for pair in pairs]


def cases(quick: bool) -> Iterator[Case]:
    """Yield the lookups."""
    table = NeighbourTable(1024, seed=1)
    for i in range(1024):
        table.insert(1 + i % 16, to_address(0, 0xFFFF_0AF4_0000 + i))
    slots, key, records = table.arrays
    twin = compile_c(SOURCE, "neighbour")
    index = {(i, int(lo)): row for row, (i, lo) in enumerate(zip(records["interface"], records["lo"], strict=True))}
    for hits in (1.0, 0.0):
        queries = queries_for(table, hits)
        pairs = list(zip(queries[0].tolist(), queries[1].tolist(), strict=True))
        out, expected = np.zeros(QUERIES, np.int32), np.zeros(QUERIES, np.int32)
        for batch in batches(quick):
            in_c = bind(twin.drive, slots, len(slots) - 1, key, records, *queries, expected, QUERIES, batch)
            drive(table.arrays, queries, out, batch)
            in_c()
            assert (out == expected).all()
            yield Case(
                group=f"neighbour {'hit' if hits else 'miss'}",
                what="find one of 1024 neighbors",
                batch=batch,
                operations=QUERIES,
                ours=partial(drive, table.arrays, queries, out, batch),
                references={"C": in_c, "dict": partial(in_dict, index, pairs)},
                marks={"C": 1.15},
            )
