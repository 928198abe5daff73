"""TCP connections per second, throughput and round trips through a ClusterIP, beside kube-proxy's rules in the kernel.

Two pods and a node between them, all on this machine: ours, a kernel with kube-proxy's iptables rules
(iptables-legacy: the nft variant of the program is slower) and one with its nftables rules; with 10, 1,000 and 10,000
services, of which the last is asked (``_services``). Client and server share core 0. The node has core 1: our process
is pinned to it, and the kernel forwards there too (receive packet steering), which serves it better than forwarding on
the sender's core: 15 instead of 11 thousand connections per second.

A connection is a handshake, a byte, a byte back, and the server's FIN; or the client's RST, which leaves three packets
out (``c/connect.c``). One client address has 64,512 ports, so after some seconds each connection is one whose ports
were used before.

The kernel leaves its forwarding to ksoftirqd under load, a thread without priority: a turn in which something else ran
on core 1 is measured again, as far as patience goes, and what is left of such turns is told at the end.
"""

import atexit
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from bench._network import SENDER_CPU, Network, Pair, Quiet, inside, program, run, stop
from bench._services import HTTP, IPERF, IPTABLES, NFTABLES, OURS, TARGET, make_pair, vip
from bench.harness import US, Case

COUNTS = (10, 1_000, 10_000)
USUAL = 1_000
PARALLEL = 64
ROUNDS = 5
TRIPS = 3_000
REPETITIONS = 40
FIN, RST = "fin", "rst"
_LOST = 1e-3  # of the connections may fail; more would be another bench


def rate(pair: Pair, count: int, end: str, seconds: float) -> float:
    """Return the connections per second to the last of ``count`` services."""
    load = ("load", vip(count), str(HTTP), str(PARALLEL), str(seconds), end)
    answer = run(*inside(pair.a, program("connect"), *load, cpu=SENDER_CPU))
    figure, failed = map(float, answer.split())
    if failed > figure * seconds * _LOST:
        raise RuntimeError(f"{failed:.0f} connections failed while {figure:.0f} per second did not")
    return figure


def trip(pair: Pair, count: int, part: int) -> float:
    """Return the median (0) or the 99th percentile (1) of the round trips on one connection, in microseconds."""
    answer = run(*inside(pair.a, program("connect"), "trips", vip(count), str(HTTP), str(TRIPS), cpu=SENDER_CPU))
    return float(answer.split()[part])


def throughput(pair: Pair, count: int, seconds: float) -> float:
    """Return the Gbit/s of one connection through the service."""
    server = subprocess.Popen(inside(pair.b, "iperf3", "-s", "-1", "--forceflush"), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        while "listening" not in server.stdout.readline():
            assert server.poll() is None, "iperf3 does not listen"
        client = ("iperf3", "-c", vip(count), "-p", str(IPERF), "-t", str(seconds), "-O", "0.5", "-J")
        report = json.loads(run(*inside(pair.a, *client)))
    finally:
        stop(server, patience=5)
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9


def _by_kind(
    quiet: Quiet, measure: Callable[..., float], pairs: Mapping[str, Pair], *rest: object
) -> dict[str, Callable[[], float]]:
    return {kind: partial(quiet, partial(measure, pair, *rest)) for kind, pair in pairs.items()}


def rate_cases(quiet: Quiet, pairs: Mapping[int, Mapping[str, Pair]], rounds: int, seconds: float) -> Iterator[Case]:
    """Yield connections per second at each number of services."""
    for count, end in [*((count, FIN) for count in COUNTS), (USUAL, RST)]:
        calls = _by_kind(quiet, rate, pairs[count], count, end, seconds)
        ours, marks = calls.pop(OURS), {IPTABLES: 1.0} if count == USUAL else {}
        if count == COUNTS[-1]:
            few = f"ours, {COUNTS[0]} services"
            calls[few] = partial(quiet, partial(rate, pairs[COUNTS[0]][OURS], COUNTS[0], end, seconds))
            marks[few] = 0.9
        yield Case(
            group=f"{count:,} services, {end.upper()}",
            what=f"{PARALLEL} connections at a time to the last service: connect, 1 byte, 1 byte back, {end.upper()}",
            operations=1,
            unit="conn/s",
            rounds=rounds,
            ours=ours,
            references=calls,
            marks=marks,
        )


def flow_cases(quiet: Quiet, pairs: Mapping[str, Pair], rounds: int, seconds: float) -> Iterator[Case]:
    """Yield what one connection that stays gets."""
    calls = _by_kind(quiet, throughput, pairs, USUAL, seconds)
    yield Case(
        group=f"one flow, {USUAL:,} services",
        what="one TCP connection through the service; the ends where the scheduler puts them",
        operations=1,
        unit="Gbit/s",
        rounds=rounds,
        ours=calls.pop(OURS),
        references=calls,
    )
    for part, name in enumerate(("p50", "p99")):
        calls = _by_kind(quiet, trip, pairs, USUAL, part)
        yield Case(
            group=f"request {name}, {USUAL:,} services",
            what=f"{TRIPS:,} requests of one byte on one connection through the service",
            operations=1,
            unit=US,
            rounds=rounds,
            ours=calls.pop(OURS),
            references=calls,
        )


def start(network: Network) -> dict[int, dict[str, Pair]]:
    """Start all nodes and a server behind each."""
    # 10,000 services take nft ten seconds; our nodes start meanwhile, one by one: the first may have to compile.
    with ThreadPoolExecutor(1) as kernels, ThreadPoolExecutor(1) as nodes:
        made = {
            count: {
                kind: (nodes if kind == OURS else kernels).submit(make_pair, network, kind, count)
                for kind in (OURS, IPTABLES, NFTABLES)
            }
            for count in COUNTS
        }
    pairs = {count: {kind: one.result() for kind, one in some.items()} for count, some in made.items()}
    for some in pairs.values():
        for pair in some.values():
            network.start(inside(pair.b, program("connect"), "serve", str(TARGET), cpu=SENDER_CPU), "ready")
    return pairs


def cases(quick: bool) -> Iterator[Case]:
    """Yield connections per second, throughput and round trips."""
    network = Network()
    atexit.register(network.close)  # also when the bench is given up half-way
    rounds, seconds = (2, 0.5) if quick else (ROUNDS, 1.0)
    quiet = Quiet(5 if quick else REPETITIONS)
    try:
        pairs = start(network)
        yield from rate_cases(quiet, pairs, rounds, seconds)
        yield from flow_cases(quiet, pairs[USUAL], rounds, 2 * seconds)
        quiet.warn()
    finally:
        network.close()
        atexit.unregister(network.close)
