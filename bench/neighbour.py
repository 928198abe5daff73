"""Neighbor lookup: (interface, address) to a row, 1024 neighbors, hits and misses."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Case, batches, bind, compile_c, read_c
from dataplane.jit import Array, kernel
from dataplane.tables import neighbour
from dataplane.tables.address import to_address
from dataplane.tables.neighbour import NeighbourTable

QUERIES = 16384


@kernel
def drive(arrays: Any, queries: Any, out: Any, batch: int) -> None:
    """Look up all queries, ``batch`` at a time."""
    interfaces, lows = queries
    for start in range(0, len(out), batch):
        for j in range(batch):
            i = np.uint64(start + j)  # unsigned, as in C: no check for counting from the end
            out[i] = neighbour.find(arrays, int(interfaces[i]), np.uint64(0), lows[i])


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
    """Yield hits and misses at each batch size."""
    table = NeighbourTable(1024, seed=1)
    for i in range(1024):
        table.insert(1 + i % 16, to_address(0, 0xFFFF_0AF4_0000 + i))
    slots, key, records = table.arrays
    twin = compile_c(read_c("rows"), "rows")
    keys = zip(records["interface"].tolist(), records["lo"].tolist(), strict=True)
    index = {key: row for row, key in enumerate(keys)}
    for name, hits in (("hit", 1.0), ("miss", 0.0)):
        queries = queries_for(table, hits)
        pairs = list(zip(queries[0].tolist(), queries[1].tolist(), strict=True))
        out, expected = np.zeros(QUERIES, np.int32), np.zeros(QUERIES, np.int32)
        for batch in batches(quick):
            ours = partial(drive, table.arrays, queries, out, batch)
            in_c = bind(twin.neighbours, slots, len(slots) - 1, key, *queries, expected, QUERIES, batch)
            ours(), in_c()
            assert (out == expected).all()
            yield Case(
                group=f"neighbour {name}",
                batch=batch,
                what="find (interface, address) among 1024 neighbors",
                operations=QUERIES,
                ours=ours,
                references={"C": in_c, "dict": partial(in_dict, index, pairs)},
                marks={"C": 1.15},
            )
