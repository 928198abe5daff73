"""Cluster DNS: queries per second and the time of one, through the whole node, beside dnsmasq behind the kernel's DNAT.

    pod a ── the node: 10.96.0.10:53 ──▸ the resolver behind dp0          (ours: one process, one core)
    pod a ── the kernel: DNAT ──▸ dnsmasq in the host's namespace         (the same core for both)

A query is for the address of one of 1,000 services, at random; dnsperf asks from core 0, 20 sockets with 5 queries each
under way, and the node or the kernel with dnsmasq have core 1. dnsmasq stands for a resolver in C: the CoreDNS of most
clusters is not in Debian. The third of the cases leaves the network out: our responder alone, in this process, given
a query as bytes; beside it, what dnslib takes to read that query and to write its answer.
"""

import atexit
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from dnslib import RR, A, DNSRecord

from bench._network import FORWARDER_CPU, SENDER_CPU, Network, Pair, inside, run
from bench._services import make_services, toml, vip
from bench.harness import NS, US, Case
from dataplane.control.cluster import Cluster
from dataplane.control.dns import Responder
from dataplane.control.dns_zone import Zone
from dataplane.control.state import DesiredState, Dns, Node, Service, ServicePort

DNS, HOST = "10.96.0.10", "10.244.1.0"
COUNT = 1_000
ROUNDS = 7
_SOCKETS, _EACH = 20, 5
_DOMAIN = "default.svc.cluster.local"
_RATE = re.compile(r"Queries per second:\s+([\d.]+)")
_LATENCY = re.compile(r"Average Latency \(s\):\s+([\d.]+)")
_LOST = re.compile(r"Queries lost:\s+(\d+)")


def ask(pair: Pair, names: Path, seconds: float, sockets: int, each: int) -> str:
    """Return what dnsperf prints."""
    load = ("-s", DNS, "-d", str(names), "-l", str(seconds), "-c", str(sockets), "-q", str(sockets * each), "-T", "1")
    said = run(*inside(pair.a, "dnsperf", *load, cpu=SENDER_CPU))
    found = _LOST.search(said)
    if found is None or int(found[1]):
        raise RuntimeError(f"queries were lost: {said}")
    return said


def rate(pair: Pair, names: Path, seconds: float) -> float:
    """Return thousands of queries per second."""
    found = _RATE.search(ask(pair, names, seconds, _SOCKETS, _EACH))
    assert found
    return float(found[1]) / 1e3


def latency(pair: Pair, names: Path, seconds: float) -> float:
    """Return the mean time of a query, in microseconds, when there is one at a time."""
    found = _LATENCY.search(ask(pair, names, seconds, 1, 1))
    assert found
    return float(found[1]) * 1e6


def dnsmasq(network: Network, folder: Path) -> Pair:
    """Start the kernel's node with dnsmasq in its host's namespace."""
    pair = network.kernel()
    host = f"{network.prefix}kernel"
    run("ip", "-n", host, "address", "add", f"{HOST}/32", "dev", "lo")
    rule = ("-d", DNS, "-p", "udp", "--dport", "53", "-j", "DNAT", "--to-destination", f"{HOST}:53")
    run(*inside(host, "iptables-legacy", "-t", "nat", "-A", "PREROUTING", *rule))
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{vip(number)} service-{number - 1}.{_DOMAIN}\n" for number in range(1, COUNT + 1)))
    command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]
    command += ["--pid-file=", "--bind-interfaces", "--log-facility=-", f"--listen-address={HOST}"]
    network.start(inside(host, *command, f"--addn-hosts={hosts}", "--local-ttl=5", cpu=FORWARDER_CPU), "read")
    return pair


def responder() -> Responder:
    """Return our responder with the same services."""
    services = tuple(
        Service(f"service-{number - 1}", cluster_ips=(ip_address(vip(number)),), ports=(ServicePort(80, name="http"),))
        for number in range(1, COUNT + 1)
    )
    zone = Zone()
    zone.update(DesiredState(Node("node1"), services=services, dns=Dns(ip_address(DNS))), Cluster(), time.time())
    return Responder(zone)


def alone() -> Iterator[Case]:
    """Yield what an answer costs by itself."""
    data = [bytes(DNSRecord.question(f"service-{number}.{_DOMAIN}").pack()) for number in range(COUNT)]
    answering = responder()

    def kept() -> None:
        for query in data:
            answering.respond(query, "udp")

    def fresh() -> None:
        answering.forget()
        kept()

    def dnslib() -> None:
        for query in data:
            asked = DNSRecord.parse(query)
            reply = asked.reply(ra=0)
            reply.add_answer(RR(str(asked.q.qname), ttl=5, rdata=A("10.96.1.1")))
            reply.pack()

    calls: tuple[tuple[str, Callable[[], None]], ...] = (("given before", kept), ("fresh", fresh))
    for name, ours in calls:
        yield Case(
            group=f"an answer, {name}",
            what=f"one address of {COUNT:,} services, bytes to bytes",
            operations=COUNT,
            unit=NS,
            ours=ours,
            references={"dnslib": dnslib},
            rounds=11,
        )


def cases(quick: bool) -> Iterator[Case]:
    """Yield queries per second, the time of one, and what an answer costs."""
    yield from alone()
    network = Network()
    atexit.register(network.close)  # also when the bench is given up half-way
    rounds, seconds = (2, 1) if quick else (ROUNDS, 2)
    try:
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            names = folder / "names"
            chosen = random.Random(1).choices(range(COUNT - 1), k=10_000)
            names.write_text("".join(f"service-{number}.{_DOMAIN} A\n" for number in chosen))
            ours = network.ours(more=f'[dns]\nclusterIP = "{DNS}"\n' + toml(make_services(COUNT)))
            theirs = dnsmasq(network, folder)
            for group, what, unit, measure in (
                ("queries", f"{_SOCKETS * _EACH} queries at a time", "kq/s", rate),
                ("one query", "one query at a time, mean", US, latency),
            ):
                yield Case(
                    group=group,
                    what=f"{what}, for the address of one of {COUNT:,} services",
                    operations=1,
                    unit=unit,
                    rounds=rounds,
                    ours=partial(measure, ours, names, seconds),
                    references={"DNAT + dnsmasq": partial(measure, theirs, names, seconds)},
                )
    finally:
        network.close()
        atexit.unregister(network.close)
