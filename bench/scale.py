"""A node among a hundred: start, memory, and how long an endpoint that was taken away still gets packets.

Three real nodes in namespaces and an etcd between them (``dataplane lab``), all on the machine's two cores. In etcd
there are 100 nodes more with 10,000 pods, and 10,000 services with 10 endpoints each; all three real nodes follow all
of it. The first one is started anew, and has the figures.

*Start* is from the process's begin to the first answer through a node port, whose pod is on another node; beside it,
the same node with a prefix of etcd that holds this one service. *Memory* is what is resident then.

*Endpoint change*: a pod opens 1000 UDP flows per second to a service with one endpoint, and that is moved from a pod
to another, 120 times per round. A change begins when the put is sent to etcd and ends when the last packet has come to
the old pod's interface, by the kernel's clock. The reference is a bare client of etcd, which only waits for its watch
to tell of the same change, in the same round. No flow may be lost: each one has a number.
"""

import atexit
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bench._scale import EMPTY, World
from bench.harness import MIB, US, Case

MARK_US = 100_000.0  # the promise: p99 of the time to the last packet to the old endpoint
_PAUSE = 0.2  # seconds between changes
_STARTED = "one service"
_WATCH, _PROMISE = "a bare watch", "the promised 100 ms"


def _each(values: Sequence[float]) -> Callable[[], float]:
    """Return a callable that hands out what was measured before, one by one."""
    return iter(values).__next__


def start_cases(world: World, rounds: int) -> Iterator[Case]:
    """Yield start and memory, the large and the small one in turn."""
    large, small, resident, little = [], [], [], []
    for _ in range(rounds):
        small.append(world.restart(EMPTY))
        little.append(world.memory())
        large.append(world.restart())
        resident.append(world.memory())
    yield Case(
        group="start to first packet",
        what="a node with 10,000 services, 100,000 endpoints and 10,000 pods out of etcd",
        operations=1,
        unit=US,
        rounds=rounds,
        ours=_each(large),
        references={_STARTED: _each(small)},
    )
    yield Case(
        group="resident memory",
        what="the same nodes, when they are ready",
        operations=1,
        unit=MIB,
        rounds=rounds,
        ours=_each(resident),
        references={_STARTED: _each(little)},
    )


def change_cases(world: World, rounds: int, count: int) -> Iterator[Case]:
    """Yield percentiles of the time that an endpoint's change takes."""
    runs = []
    for _ in range(rounds):
        changes, sent, lost = world.change(count, _PAUSE)
        if lost:
            print(f"lost {lost} of {sent} flows", file=sys.stderr)
        runs.append(changes)
    for name, part in (("p50", 50), ("p99", 99), ("max", 100)):
        ours = [float(np.percentile([change.last / 1e3 for change in run], part)) for run in runs]
        bare = [float(np.percentile([change.seen / 1e3 for change in run], part)) for run in runs]
        promised = part == 99
        yield Case(
            group=f"endpoint change to last packet, {name}",
            what=f"{count} changes of one endpoint among 100,000, under 1000 new flows per second",
            operations=1,
            unit=US,
            rounds=rounds,
            ours=_each(ours),
            references={_WATCH: _each(bare)} | ({_PROMISE: _each([MARK_US] * rounds)} if promised else {}),
            marks={_PROMISE: 1.0} if promised else {},
        )


def cases(quick: bool) -> Iterator[Case]:
    """Yield start, memory and changes."""
    world = World()
    atexit.register(world.close)  # also when the bench is given up half-way
    try:
        with world:
            world.fill()
            yield from start_cases(world, 2 if quick else 5)
            yield from change_cases(world, 1 if quick else 3, 40 if quick else 120)
    finally:
        atexit.unregister(world.close)
