"""Service schedulers: one pick of 8, 100 and 1000 backends, and the building of a Maglev table.

"C walk" is weighted round robin as ip_vs does it, over the whole list. The heavy backend's weight is 100, the others'
is 1.
"""

from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import ip_address
from typing import Any

import numpy as np

from bench.harness import Case, bind, compile_c, read_c
from dataplane.jit import Array, kernel
from dataplane.tables import maglev, scheduler
from dataplane.tables.scheduler import Scheduler
from dataplane.tables.service import Destination, Service, ServiceTable

VIP = ip_address("10.96.0.10")
FIRST_POD = 0x0AF4_0000
PICKS = 4096
SIZES = (8, 100, 1000)


@kernel
def drive(arrays: Any, rows: Any, lows: Any, sports: Any, out: Any) -> None:
    """Pick a backend for each client of the service in its row."""
    for i in range(len(out)):
        j = np.uint64(i)  # unsigned, as in C: no check for counting from the end
        out[j] = scheduler.pick(arrays, int(rows[j]), np.uint64(0), lows[j], int(sports[j]))


@kernel
def build(arrays: Any, row: int) -> None:
    """Build a service's Maglev table."""
    service = arrays[2][row]
    maglev.build(arrays[3], int(service["head"]), arrays[4], int(service["buckets"]))


def make(kind: Scheduler, weights: list[int]) -> tuple[ServiceTable, int]:
    """Return a table and the row of its service; connections are random."""
    table = ServiceTable(capacity=16, seed=1)
    row = table.set(6, VIP, 80, Service(Scheduler.RR))
    for i, weight in enumerate(weights):
        table.add(row, ip_address(FIRST_POD + i), 8080, Destination(weight))
    table.set(6, VIP, 80, Service(kind))  # once at the end: mh would build a table for each backend
    random = np.random.default_rng(1)
    table.backends["active"] = random.integers(1, 100, len(table.backends))
    table.backends["inactive"] = random.integers(0, 1000, len(table.backends))
    return table, row


def pick_case(name: str, kind: Scheduler, weights: list[int], clients: tuple[Array, Array]) -> Case:
    """Return the case of one scheduler on one list of weights."""
    table, row = make(kind, weights)
    twin = compile_c(read_c("scheduler"), "scheduler")
    out, expected = np.zeros(PICKS, np.int32), np.zeros(PICKS, np.int32)
    _, _, services, backends, buckets = table.arrays
    own = [services.copy(), backends.copy(), services.copy()]
    rows = np.full(PICKS, row, np.int32)  # or the compiler would know before the loop which scheduler it is
    ours = partial(drive, table.arrays, rows, *clients, out)
    references: dict[str, Callable[[], object]] = {
        "C": bind(twin.drive, own[0], rows, own[1], buckets, *clients, expected, PICKS)
    }
    if kind == Scheduler.WRR:
        references["C walk"] = bind(twin.drive_walk, own[2], row, backends, expected, PICKS)
    ours()
    for reference in references.values():
        reference()
        assert (out == expected).all()
    return Case(
        group=f"{kind.name.lower()} {name}",
        what=f"pick of {len(weights)} backends",
        operations=PICKS,
        ours=ours,
        references=references,
    )


def build_case(count: int) -> Case:
    """Return the case of a Maglev table for backends of equal weight."""
    table, row = make(Scheduler.MH, [1] * count)
    _, _, services, backends, buckets = table.arrays
    twin = compile_c(read_c("scheduler"), "scheduler")
    expected, copied = np.zeros(maglev.BUCKETS, np.int32), backends.copy()
    base = int(services[row]["buckets"])
    ours = partial(build, table.arrays, row)
    in_c = bind(twin.build, copied, int(services[row]["head"]), expected)
    ours(), in_c()
    assert (buckets[base : base + maglev.BUCKETS] == expected).all()
    return Case(
        group=f"maglev build {count}",
        what=f"fill {maglev.BUCKETS} buckets from {count} backends",
        operations=1,
        ours=ours,
        references={"C": in_c},
        marks={"C": 1.15},
    )


def cases(quick: bool) -> Iterator[Case]:
    """Yield each scheduler with each number of backends."""
    random = np.random.default_rng(2)
    lows = random.integers(0xFFFF_0000_0000, 0xFFFF_FFFF_FFFF, PICKS, np.uint64)
    clients = lows, random.integers(1024, 65536, PICKS).astype(np.int32)
    for count in SIZES[:2] if quick else SIZES:
        weights = random.integers(1, 11, count).tolist()
        for kind in Scheduler:
            yield pick_case(str(count), kind, weights, clients)
        yield pick_case(f"{count}, one heavy", Scheduler.WRR, [1] * (count - 1) + [100], clients)
        yield build_case(count)
