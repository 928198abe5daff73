"""VTEP lookup: an outer address to a node, 1000 nodes; on receive also whether it is a node at all."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.harness import Case, batches, bind, compile_c, read_c
from dataplane.jit import kernel
from dataplane.tables import vtep
from dataplane.tables.address import to_address
from dataplane.tables.vtep import VtepTable

NODES = 1000
QUERIES = 16384


@kernel
def drive(arrays: Any, queries: Any, out: Any, batch: int) -> None:
    """Look up all queries, ``batch`` at a time."""
    highs, lows = queries
    for start in range(0, len(out), batch):
        for j in range(batch):
            i = np.uint64(start + j)  # unsigned, as in C: no check for counting from the end
            out[i] = vtep.find(arrays, highs[i], lows[i])


def in_dict(index: dict[int, int], queries: list[int]) -> list[int]:
    """Look up all queries in a dict."""
    return [index.get(query, -1) for query in queries]


def cases(quick: bool) -> Iterator[Case]:
    """Yield hits and misses at each batch size."""
    table = VtepTable(seed=1)
    for i in range(NODES):
        table.insert(to_address(0, 0xFFFF_C0A8_0000 + i), mac=0x66_0000_0000 + i, oif=1, mtu=1450)
    slots, key, records = table.arrays
    twin = compile_c(read_c("rows"), "rows")
    index = {lo: row for row, lo in enumerate(records["lo"][:NODES].tolist())}
    for name, offset in (("hit", 0), ("miss", 1 << 20)):
        lows = np.random.default_rng(1).integers(0, NODES, QUERIES).astype(np.uint64) + (0xFFFF_C0A8_0000 + offset)
        queries = np.zeros(QUERIES, np.uint64), lows
        out, expected = np.zeros(QUERIES, np.int32), np.zeros(QUERIES, np.int32)
        for batch in batches(quick):
            ours = partial(drive, table.arrays, queries, out, batch)
            in_c = bind(twin.vteps, slots, len(slots) - 1, key, *queries, expected, QUERIES, batch)
            ours(), in_c()
            assert (out == expected).all()
            yield Case(
                group=f"vtep {name}",
                batch=batch,
                what=f"find an outer address among {NODES} nodes",
                operations=QUERIES,
                ours=ours,
                references={"C": in_c, "dict": partial(in_dict, index, lows.tolist())},
                marks={"C": 1.15},
            )
