"""Pod to pod through a node that runs: small packets, TCP, round trips, beside a C loop and the kernel's forwarding.

Two cores are what there is. Small packets: sender and receiver share core 0, the forwarder has core 1; the kernel is
measured forwarding on the sender's core (as it does by default) and on core 1 (receive packet steering, as our node
has it). TCP: the node and the C loop stay on core 1, the scheduler places the ends, and the kernel forwards in the
softirq of whoever sends. Round trips: ping is on the forwarder's core, or on the other one; then each of the two
packets wakes a core that sleeps, which costs any forwarder that is a process some 15 us on this machine. Left to the
scheduler, ping has one or the other by chance.
"""

import atexit
import json
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

from bench._network import FORWARDER_CPU, SENDER_CPU, A, B, Network, Pair, inside, program, run, stop
from bench.harness import US, Case

PORT = 5001
PAYLOAD = 22  # makes frames of 64 bytes, without the frame check sequence
ROUNDS = 5
PING_INTERVAL = 0.001


def small_packets(pair: Pair, seconds: float, before: Callable[[], object] = lambda: None) -> float:
    """Return the thousand datagrams per second that reach pod b."""
    before()
    count = inside(pair.b, program("udp"), "count", str(PORT), str(seconds), cpu=SENDER_CPU)
    receiver = subprocess.Popen(count, stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    try:
        receiver.stdout.readline()
        run(*inside(pair.a, program("udp"), "send", B, str(PORT), str(PAYLOAD), str(seconds + 0.3), cpu=SENDER_CPU))
        rate = float(receiver.stdout.readline())
    finally:
        stop(receiver)
    return rate / 1e3


def tcp(pair: Pair, seconds: float, before: Callable[[], object] = lambda: None) -> float:
    """Return the Gbit/s of one connection from pod a to pod b."""
    before()
    server = subprocess.Popen(inside(pair.b, "iperf3", "-s", "-1", "--forceflush"), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        while "listening" not in server.stdout.readline():
            assert server.poll() is None, "iperf3 does not listen"
        report = json.loads(run(*inside(pair.a, "iperf3", "-c", B, "-t", str(seconds), "-O", "0.5", "-J")))
    finally:
        stop(server, patience=5)
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9


def round_trip(pair: Pair, cpu: str, count: int, part: float, plus: float = 0.0) -> float:
    """Return a quantile of the round-trip times of ``count`` pings, in microseconds, ``plus`` some."""
    output = run(*inside(pair.a, "ping", "-n", "-i", str(PING_INTERVAL), "-c", str(count), "-I", A, B, cpu=cpu))
    times = [float(text) * 1e3 for text in re.findall(r"time=([0-9.]+) ms", output)]
    assert len(times) >= count * 0.99, f"{len(times)} of {count} pings came back"
    return statistics.quantiles(times, n=1000)[int(part * 1000) - 1] + plus


def cases(quick: bool) -> Iterator[Case]:
    """Yield the three measurements."""
    network = Network()
    atexit.register(network.close)  # also when the bench is given up half-way
    rounds, seconds, pings = (2, 1.0, 500) if quick else (ROUNDS, 2.0, 1000)
    try:
        ours, kernel = network.ours(), network.kernel()
        loop, plain = network.loop(virtio=True), network.loop(virtio=False)
        one_core, two_cores = partial(network.spread, 1), partial(network.spread, 2)
        yield Case(
            group="TAP to TAP 64 B",
            what="one UDP stream from pod to pod; sender and receiver on core 0, forwarder on core 1",
            operations=1,
            unit="kpps",
            rounds=rounds,
            ours=partial(small_packets, ours, seconds),
            references={
                "C loop": partial(small_packets, loop, seconds),
                "C loop, no virtio header": partial(small_packets, plain, seconds),
                "kernel, sender's core": partial(small_packets, kernel, seconds, one_core),
                "kernel, core 1": partial(small_packets, kernel, seconds, two_cores),
            },
            marks={"C loop": 0.8, "C loop, no virtio header": 0.8},
        )
        one_core()
        yield Case(
            group="TCP pod to pod",
            what="one connection, super-frames; forwarder on core 1, ends where the scheduler puts them",
            operations=1,
            unit="Gbit/s",
            rounds=rounds,
            ours=partial(tcp, ours, seconds),
            references={"kernel": partial(tcp, kernel, seconds), "C loop": partial(tcp, loop, seconds)},
            marks={"kernel": 0.75},
        )
        for cpu in (FORWARDER_CPU, SENDER_CPU):
            for part, plus in ((0.5, 40.0), (0.99, 0.0)):
                trip = partial(round_trip, cpu=cpu, count=pings, part=part)
                limit = {f"kernel + {plus:.0f} us": partial(trip, kernel, plus=plus)} if plus else {}
                yield Case(
                    group=f"RTT p{part * 100:.0f}, ping on core {cpu}",
                    what=f"{pings} pings from pod to pod, one per millisecond; forwarder on core {FORWARDER_CPU}",
                    operations=1,
                    unit=US,
                    rounds=rounds,
                    ours=partial(trip, ours),
                    references={"kernel": partial(trip, kernel), **limit, "C loop": partial(trip, loop)},
                    marks=dict.fromkeys(limit, 1.0),
                )
    finally:
        network.close()
        atexit.unregister(network.close)
