"""Rows of the fake node's snapshots: what a device, a route and a cluster look like."""

from typing import Any

_NODE1 = {"name": "node1", "address": "192.0.2.11", "blocks": ["10.244.1.0/26"], "zone": "", "since": 1_700_000_000.0}
_NODE2 = _NODE1 | {"name": "node2", "address": "192.0.2.12", "blocks": ["10.244.2.0/26"], "since": 0}
CLUSTER = {
    **{"source": "etcd", "where": "http://192.0.2.100:2379", "connected": True, "changed": 1_700_000_000.0},
    **{"error": "", "revision": 1234, "lag_s": 0.0},
    "nodes": [_NODE1 | {"alive": True, "here": True}, _NODE2 | {"alive": False, "here": False}],
}

LOAD_BALANCER: dict[str, Any] = {
    "pools": [
        {
            "name": "default",
            "ranges": ["192.0.2.200-192.0.2.220", "198.51.100.7"],
            "auto_assign": True,
            "addresses": 22,
            "in_use": 1,
            "services": 2,
        }
    ],
    "addresses": [
        {"address": "192.0.2.200", "pool": "default", "services": ["default/dns", "default/web"], "owner": "node1"},
        {"address": "203.0.113.1", "pool": "", "services": ["default/db"], "owner": ""},
    ],
    "pending": [{"service": "shop/web", "reason": "no IPv4 address is free in pool default"}],
}

DNS: dict[str, Any] = {
    **{"domain": "cluster.local", "address": "10.96.0.10", "ttl": 5, "pods": "disabled", "services": 12},
    **{"listening": ["10.244.1.0:40053/UDP", "10.244.1.0:40054/TCP"], "serial": 1_700_000_000, "connections": 1},
    "requests": [{"transport": "tcp", "type": "A", "count": 1}, {"transport": "udp", "type": "AAAA", "count": 9}],
    **{"responses": {"NXDOMAIN": 4, "NOERROR": 6}, "dropped": 2, "refused": 0},
    **{"buckets": [0.001, 0.002], "durations": [7, 2, 1], "duration_sum": 0.5},
    "upstreams": [
        {"server": "192.0.2.53:53", "asked": 5, "failures": 2, "aloof": True},
        {"server": "192.0.2.54:53", "asked": 3, "failures": 0, "aloof": False},
    ],
    **{"cache_entries": 3, "cache_hits": 40, "cache_misses": 8},
}


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
