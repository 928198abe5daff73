"""Failover of an address: from kill -9 of its owner to the first answer that a client has from elsewhere.

Three nodes and a client are on one LAN, in namespaces; the client asks a UDP service every 10 ms and is told where its
address went by gratuitous ARP alone. The owner is killed, started again when the others have taken over, and so on:
once with static peers, where each node elects the owner by itself, and once with etcd, where a successor must have
been in the store for a while before it may take over (control/ownership.py).

The reference is not measured but what memberlist's defaults come to, which MetalLB takes as they are: each survivor
probes one member a second, a probe fails when its second is over, and a suspect is dead 4 s later (SuspicionMult 4, the
scale is 1 up to ten nodes; what shortens that needs four nodes at least). From then on MetalLB is as fast as we are.
"""

import atexit
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.harness import US, Case
from tests.netns.failing import Site
from tests.netns.harness import Network, eventually

MARK = 1e6  # us
KILLS, QUICK_KILLS = 40, 6
_PROBE, _SUSPICION = 1.0, 4.0  # seconds


def outages(site: Site, kills: int) -> list[float]:
    """Kill the owner so often; return what the client has missed each time, in microseconds."""
    found = []
    for _ in range(kills):
        pause(
            2.5 + random.random() * 0.2
        )  # until it counts as a watcher; and at no particular moment between two beats
        found.append(site.outage(partial(site.signal, 0, signal.SIGKILL)) * 1e6)
        site.nodes[0].kill()
        site.back(0)
    return found


def pause(seconds: float) -> None:
    """Let a running cluster run."""
    until = time.monotonic() + seconds
    eventually(lambda: time.monotonic() > until, seconds + 5)


def memberlist() -> float:
    """Return how long two survivors of three take to find out, by memberlist's defaults, in microseconds."""
    probed = min(random.uniform(0, 2 * _PROBE) for _ in range(2))  # each probes its two others in turn
    return (probed + _PROBE + _SUSPICION) * 1e6


def quantile(values: list[float], part: float) -> Callable[[], float]:
    """Return a callable that returns a quantile; the largest for 1."""
    ordered = sorted(values)
    at = ordered[-1] if part == 1 else statistics.quantiles(ordered, n=100, method="inclusive")[int(part * 100) - 1]
    return lambda: at


def cases(quick: bool) -> Iterator[Case]:
    """Yield three quantiles for each way to decide about owners."""
    kills = QUICK_KILLS if quick else KILLS
    for source in ("static", "etcd"):
        directory = Path(tempfile.mkdtemp())
        with Network(directory) as network:
            site = Site(network, etcd=directory if source == "etcd" else None)
            atexit.register(site.close)
            try:
                site.start()
                site.ask()
                found = outages(site, kills)
            finally:
                site.close()
                atexit.unregister(site.close)
        reference = [memberlist() for _ in range(10_000)]
        for name, part in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            yield Case(
                group=f"failover, {source}, {name}",
                what=f"kill -9 of the owner, {kills} times, to the first answer from elsewhere",
                operations=1,
                unit=US,
                rounds=1,
                ours=quantile(found, part),
                references={"mark 1 s": lambda: MARK, "memberlist, detection": quantile(reference, part)},
                marks={"mark 1 s": 1.0},
            )
