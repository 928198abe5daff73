"""A node that carries no packets but answers the control API: a fake backend behind a real unix socket."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataplane.control import api, metrics
from dataplane.control.snapshot import Kind, Reload
from dataplane.verdict import Reason

COUNTS = {Reason.ROUTE_NONE: 3, Reason.IP_TTL: 12, Reason.ARP_ANSWERED: 2, Reason.NEIGH_RESOLVE: 1}


def interface(index: int, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "name": name,
        "role": "pod",
        "driver": "tap",
        "state": "up",
        "mtu": 1450,
        "mac": "ee:ee:ee:ee:ee:ee",
        "peer_mac": "02:00:0a:f4:01:0a",
        "pod": "default/web-0",
        "rx_packets": 1000,
        "rx_bytes": 1_500_000,
        "rx_errors": 0,
        "rx_dropped": 0,
        "tx_packets": 7,
        "tx_bytes": 420,
        "tx_errors": 1,
        "tx_frames": 8,
        "error": "",
    } | changes


def route(prefix: str, kind: str, **changes: Any) -> dict[str, Any]:
    return {"prefix": prefix, "kind": kind, "dev": "", "via": "", "mtu": 0, "vtep": "", "origin": ""} | changes


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
    }


class FakeNode:
    """A backend whose answers a test may change before it asks."""

    def __init__(self) -> None:
        self.answers = snapshots()
        self.result: Reload = {"applied": ["pod added name=default/web-0"], "errors": []}
        self.failure: Exception | None = None
        self.reloading = 0
        self.most_at_once = 0

    def snapshot(self, kind: Kind) -> Mapping[str, Any]:
        if self.failure:
            raise self.failure
        answer: Mapping[str, Any] = self.answers[kind]
        return answer

    async def reload(self) -> Reload:
        self.reloading += 1
        self.most_at_once = max(self.most_at_once, self.reloading)
        await asyncio.sleep(0)
        self.reloading -= 1
        return self.result

    def metrics_text(self) -> str:
        return metrics.text(self.snapshot)


@contextmanager
def serving(node: FakeNode, path: Path, listen: tuple[str, int] | None = None) -> Iterator[api.Server]:
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
        server = wait(api.start(node, path, listen))
        try:
            yield server
        finally:
            wait(settle())
            wait(server.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
