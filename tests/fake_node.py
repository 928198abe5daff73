"""A node that carries no packets but answers the control API: a fake backend behind a real unix socket."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dataplane.config import DEFAULT
from dataplane.control import api, metrics
from dataplane.control.query import Query
from dataplane.control.snapshot import Kind, ListKind, Reload
from dataplane.verdict import Reason
from tests.fake_rows import CLUSTER, DNS, LOAD_BALANCER, interface, route

COUNTS = {Reason.ROUTE_NONE: 3, Reason.IP_TTL: 12, Reason.ARP_ANSWERED: 2, Reason.NEIGH_RESOLVE: 1}


def service(address: str, port: int, **changes: Any) -> dict[str, Any]:
    return {
        "service": "default/web",
        "port_name": "http",
        "type": "ClusterIP",
        "kind": "cluster-ip",
        "address": address,
        "port": port,
        "protocol": "TCP",
        "scheduler": "rr",
        "scheduler_flags": [],
        "affinity_s": 0,
        "mask_bits": 32,
        "ready": 2,
        "total": 2,
        "active": 1,
        "inactive": 3,
        "origin": "file",
        "connections": 12,
        "in_packets": 120,
        "in_bytes": 12_000,
        "out_packets": 100,
        "out_bytes": 100_000_000,
        "reason": "",
    } | changes


def endpoint(virtual: str, virtual_port: int, address: str, port: int, **changes: Any) -> dict[str, Any]:
    return {
        "service": "default/web",
        "port_name": "http",
        "kind": "cluster-ip",
        "protocol": "TCP",
        "virtual_address": virtual,
        "virtual_port": virtual_port,
        "address": address,
        "port": port,
        "weight": 1,
        "state": "ready",
        "node": "node1",
        "active": 1,
        "inactive": 0,
        "persistent": 0,
        "connections": 6,
        "in_packets": 60,
        "in_bytes": 6000,
        "out_packets": 50,
        "out_bytes": 50_000_000,
    } | changes


def half(src: str, sport: int, dst: str, dport: int, packets: int = 5) -> dict[str, Any]:
    return {"src": src, "dst": dst, "sport": sport, "dport": dport, "packets": packets, "bytes": packets * 60}


def flow(original: dict[str, Any], reply: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "protocol": "tcp",
        "protocol_number": 6,
        "family": "ipv4",
        "state": "ESTABLISHED",
        "timeout_s": 86399,
        "age_s": 1.5,
        "original": original,
        "reply": reply,
        "icmp": None,
        "status": ["SEEN_REPLY", "ASSURED"],
        "mark": 0,
        "service": "",
        "backend": "",
        "lb_state": "",
        "lb_timeout_s": 0,
    } | changes


def flows() -> list[dict[str, Any]]:
    """A balanced connection, an unanswered datagram, a masqueraded ping and a GRE tunnel."""
    return [
        flow(
            half("10.244.1.11", 40000, "10.96.0.20", 80),
            half("10.244.1.10", 8080, "10.244.1.11", 40000, 4),
            status=["SEEN_REPLY", "ASSURED", "DST_NAT"],
            service="default/web",
            backend="10.244.1.10:8080",
            lb_state="ESTABLISHED",
            lb_timeout_s=899,
        ),
        flow(
            half("10.244.1.11", 5353, "203.0.113.9", 53, 1),
            half("203.0.113.9", 53, "10.244.1.11", 5353, 0),
            protocol="udp",
            protocol_number=17,
            state="",
            timeout_s=29,
            status=[],
        ),
        flow(
            half("10.244.1.11", 0, "203.0.113.9", 0),
            half("203.0.113.9", 0, "192.0.2.11", 0),
            protocol="icmp",
            protocol_number=1,
            state="",
            timeout_s=30,
            icmp={"type": 8, "code": 0, "id": 77, "reply_type": 0, "reply_id": 1024},
            status=["SEEN_REPLY", "SRC_NAT", "MASQUERADED"],
        ),
        flow(
            half("10.244.1.11", 0, "203.0.113.9", 0, 1),
            half("203.0.113.9", 0, "10.244.1.11", 0, 0),
            protocol="gre",
            protocol_number=47,
            state="",
            timeout_s=600,
            status=[],
        ),
    ]


def totals(service: str, port_name: str, protocol: str) -> dict[str, Any]:
    counts = {"connections": 12, "active": 1, "inactive": 3, "in_packets": 120, "in_bytes": 12_000}
    counts |= {"out_packets": 100, "out_bytes": 100_000_000}
    return {"service": service, "port_name": port_name, "protocol": protocol, **counts}


def translation(**changes: Any) -> dict[str, Any]:
    return {
        "protocol": "tcp",
        "state": "ESTABLISHED",
        "timeout_s": 86399,
        "src": "10.244.1.11",
        "dst": "10.96.0.20",
        "sport": 40000,
        "dport": 80,
        "new_src": "10.244.1.11",
        "new_dst": "10.244.1.10",
        "new_sport": 40000,
        "new_dport": 8080,
        "why": ["service"],
        "service": "default/web",
    } | changes


def listings() -> dict[str, list[dict[str, Any]]]:
    return {
        "services": [
            service("10.96.0.20", 80, affinity_s=10800),
            service("10.96.0.10", 53, service="kube-system/dns", port_name="dns", protocol="UDP", ready=0, total=1),
        ],
        "endpoints": [
            endpoint("10.96.0.20", 80, "10.244.1.11", 8080, weight=0, state="draining"),
            endpoint("10.96.0.20", 80, "10.244.1.10", 8080),
            endpoint(
                "10.96.0.10",
                53,
                "10.244.2.2",
                53,
                service="kube-system/dns",
                port_name="dns",
                protocol="UDP",
                node="node2",
            ),
        ],
        "conntrack": flows(),
        "nat": [
            translation(),
            translation(
                protocol="icmp",
                state="",
                timeout_s=30,
                dst="203.0.113.9",
                sport=77,
                dport=0,
                new_src="192.0.2.11",
                new_dst="203.0.113.9",
                new_sport=1024,
                new_dport=0,
                why=["outgoing"],
                service="",
            ),
        ],
        "persistence": [
            {
                "client": "10.244.1.11",
                "service": "default/web",
                "port_name": "http",
                "protocol": "TCP",
                "virtual_address": "10.96.0.20",
                "virtual_port": 80,
                "backend": "10.244.1.10:8080",
                "timeout_s": 10799,
                "controls": 1,
            }
        ],
    }


def snapshots() -> dict[str, Any]:
    return {
        "status": {
            "name": "node1",
            "version": "0.1.0",
            "pid": 4711,
            "since": 1_700_000_000.0,
            "ready": True,
            "config": "node.toml",
            "socket": "/run/dataplane/node1.sock",
            "uplink": "",
            "pods": 2,
            "peers": 1,
            "routes": 7,
        },
        "cluster": CLUSTER,
        "load_balancer": LOAD_BALANCER,
        "dns": DNS,
        **_whereabouts(),
        **_counts(),
    }


def _whereabouts() -> dict[str, Any]:
    return {
        "interfaces": {
            "interfaces": [
                interface(1, "cali0d7763386da"),
                interface(2, "eth0", role="uplink", driver="packet", pod="", mtu=1500, error="Network is down"),
            ]
        },
        "routes": {
            "routes": [
                route("0.0.0.0/0", "via", dev="eth0", via="192.0.2.1", mtu=1500, origin="Static"),
                route("10.244.1.0/24", "blackhole", origin="Blackhole"),
                route("10.244.1.10/32", "pod", dev="cali0d7763386da", mtu=1450, origin="LocalWorkload"),
                route(
                    "10.244.2.0/24",
                    "tunnel",
                    dev="vxlan.calico",
                    via="10.244.2.0",
                    mtu=1450,
                    vtep="node2",
                    origin="VxlanTunnel",
                ),
                route("10.244.3.0/24", "via", dev="eth0", via="192.0.2.13", mtu=1500, origin="VxlanSameSubnet"),
                route("192.0.2.0/24", "via", dev="eth0", mtu=1500, origin="OnLink"),
                route("192.0.2.11/32", "local", origin="LocalHost"),
                route("203.0.113.0/24", "unreachable", origin="Static"),
            ]
        },
        "arp": {
            "arp": [
                {
                    "interface": "eth0",
                    "address": "192.0.2.1",
                    "mac": "02:00:00:00:00:01",
                    "state": "reachable",
                    "age_s": 12.4,
                }
            ]
        },
        "vteps": {
            "vteps": [
                {
                    "node": "node2",
                    "address": "192.0.2.12",
                    "mac": "66:2d:bf:44:a6:8b",
                    "mtu": 1450,
                    "tx_packets": 5,
                    "tx_bytes": 500,
                    "rx_packets": 6,
                    "rx_bytes": 600,
                }
            ]
        },
    }


def _counts() -> dict[str, Any]:
    return {
        "drops": {
            "reasons": [
                {
                    "label": reason.label,
                    "verdict": reason.verdict.name.lower(),
                    "stage": reason.stage,
                    "text": reason.text,
                    "count": COUNTS.get(reason, 0),
                }
                for reason in Reason
            ]
        },
        "counters": {
            "received": 100,
            "injected": 4,
            "accepted": 86,
            "stolen": 2,
            "queued": 1,
            "dropped": 15,
            "balanced": True,
            "queue": {"answered": 1},
        },
        "pipeline": {
            "pipeline": [
                {"stage": "parse", "entered": 104, "stolen": 0, "queued": 0, "dropped": 0},
                {"stage": "arp", "entered": 104, "stolen": 2, "queued": 0, "dropped": 0},
                {"stage": "route", "entered": 102, "stolen": 0, "queued": 1, "dropped": 15},
            ]
        },
        "conntrack_stats": {
            "flows": 4,
            "limit": 262144,
            "found": 96,
            "invalid": 1,
            "insert": 9,
            "insert_failed": 0,
            "drop": 0,
            "early_drop": 0,
            "error": 0,
            "search_restart": 0,
            "clash_resolve": 0,
            "chaintoolong": 0,
            "out_of_window": 7,
        },
        "balancing": {
            "services": 2,
            "endpoints": 3,
            "templates": 1,
            "templates_limit": 262144,
            "templates_refused": 0,
            "no_local_endpoints": {"internal": 0, "external": 1},
            "last_sync": 1_700_000_100.0,
            "totals": [totals("default/web", "http", "TCP"), totals("kube-system/dns", "", "UDP")],
            "left_off": 0,
        },
    }


class FakeListing:
    """Rows in pages of one, so that every seam shows."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], limit: int) -> None:
        self._rows = rows[: limit or None]
        self.matched = len(rows)

    def __iter__(self) -> Iterator[Sequence[Mapping[str, Any]]]:
        yield []
        for row in self._rows:
            yield [row]


class FakeNode:
    """A backend whose answers a test may change before it asks."""

    def __init__(self) -> None:
        self.answers = snapshots()
        self.rows = listings()
        self.queries: list[Query] = []
        self.edits: list[tuple[Any, ...]] = []
        self.missing: Exception | None = None
        self.result: Reload = {"applied": ["pod added name=default/web-0"], "errors": []}
        self.failure: Exception | None = None
        self.reloading = 0
        self.most_at_once = 0

    def snapshot(self, kind: Kind) -> Mapping[str, Any]:
        if self.failure:
            raise self.failure
        answer: Mapping[str, Any] = self.answers[kind]
        return answer

    def listing(self, kind: ListKind, query: Query) -> FakeListing:
        if self.failure:
            raise self.failure
        self.queries.append(query)
        return FakeListing(self.rows[kind], query.limit)

    async def delete_flows(self, query: Query) -> int:
        self.queries.append(query)
        return len(self.rows["conntrack"])

    async def reload(self) -> Reload:
        return await self._edit()

    async def set_service(self, values: Mapping[str, Any]) -> Reload:
        return await self._edit("set_service", dict(values))

    async def delete_service(self, namespace: str, name: str) -> Reload:
        return await self._edit("delete_service", namespace, name)

    async def add_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        return await self._edit("add_endpoint", namespace, name, dict(values))

    async def drain_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        return await self._edit("drain_endpoint", namespace, name, dict(values))

    async def delete_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        return await self._edit("delete_endpoint", namespace, name, dict(values))

    async def _edit(self, *words: Any) -> Reload:
        if self.missing:
            raise self.missing
        self.edits.append(words)
        self.reloading += 1
        self.most_at_once = max(self.most_at_once, self.reloading)
        await asyncio.sleep(0)
        self.reloading -= 1
        return self.result

    def metrics_text(self) -> str:
        return metrics.text(self.snapshot)


@contextmanager
def serving(
    node: FakeNode, path: Path, listen: tuple[str, int] | None = None, extensions: Sequence[Callable[..., None]] = ()
) -> Iterator[api.Server]:
    """Serve ``node`` on ``path`` from a thread of its own while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(timeout=30)

    async def settle() -> None:
        # asyncio leaks a connection whose server closes between accept() and the transport (Python 3.11): a client
        # that only looked whether somebody listens gets a few turns of the loop to be accepted and closed.
        for _ in range(10):
            await asyncio.sleep(0)

    try:
        server = wait(api.start(node, path, listen, extensions))
        try:
            yield server
        finally:
            wait(settle())
            wait(server.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def dataplane(
    *arguments: object, prefix: tuple[str, ...] = (), stdin: IO[str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [*prefix, sys.executable, "-m", "dataplane", *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if name != "DATAPLANE_SOCKET"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean | environment,
        check=False,
        cwd=DEFAULT.parent,
        stdin=stdin,
    )
