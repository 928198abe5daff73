"""Prometheus' view of the snapshots.

Nothing is counted twice: the collector reads the counters that the node has anyway when somebody asks. Names that
operators have dashboards for are Calico's (``felix_*``) and kube-proxy's (``kubeproxy_*``), the rest begin with
``dataplane_``. Time series by service are for the oldest services only, so that their number is bounded.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from dataplane.control.metrics_dns import dns
from dataplane.control.snapshot import (
    Arp,
    Balancing,
    ClusterStatus,
    ConntrackStats,
    Counters,
    Drops,
    Interfaces,
    Kind,
    LoadBalancer,
    Pipeline,
    Routes,
    Status,
    Vteps,
)

Snapshot = Callable[[Kind], Mapping[str, Any]]
_IN_SYNC = 3  # felix: 1 wait-for-ready, 2 resync, 3 in-sync


def text(snapshot: Snapshot) -> str:
    """Return all metrics of the node whose snapshots the function gives."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Node(snapshot))
    return generate_latest(registry).decode()


class _Node(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot: Callable[[Kind], Any] = snapshot

    def collect(self) -> Iterator[Metric]:
        yield from _status(self.snapshot("status"))
        yield from _interfaces(self.snapshot("interfaces"))
        yield from _packets(self.snapshot("counters"))
        yield from _drops(self.snapshot("drops"))
        yield from _pipeline(self.snapshot("pipeline"))
        yield from _vteps(self.snapshot("vteps"))
        yield from _tables(self.snapshot("routes"), self.snapshot("arp"))
        yield from _conntrack(self.snapshot("conntrack_stats"))
        yield from _balancing(self.snapshot("balancing"))
        yield from _cluster(self.snapshot("cluster"))
        yield from _pools(self.snapshot("load_balancer"))
        yield from dns(self.snapshot("dns"))

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _counter(name: str, text: str, labels: tuple[str, ...], rows: Iterator[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in rows:
        family.add_metric(values, count)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _status(status: Status) -> Iterator[Metric]:
    info = {"node": status["name"], "version": status["version"]}
    yield InfoMetricFamily("dataplane_build", "The node and its version.", value=info)
    yield _gauge("dataplane_start_time_seconds", "Start of the process, seconds since the epoch.", status["since"])
    yield _gauge("dataplane_ready", "Whether packets flow.", status["ready"])
    yield _gauge("dataplane_peers", "Other nodes that are known.", status["peers"])
    yield _gauge("felix_active_local_endpoints", "Pods of this node.", status["pods"])
    yield _gauge("felix_resync_state", "3: in sync with the desired state.", _IN_SYNC if status["ready"] else 1)


def _interfaces(snapshot: Interfaces) -> Iterator[Metric]:
    fields = {
        "rx_packets": "Packets received.",
        "rx_bytes": "Bytes received.",
        "rx_errors": "Failed reads.",
        "rx_dropped": "Packets that the kernel lost before they were read.",
        "tx_packets": "Packets sent.",
        "tx_bytes": "Bytes sent.",
        "tx_errors": "Failed writes.",
        "tx_frames": "Frames sent, after segmentation and fragmentation.",
    }
    rows: list[dict[str, Any]] = [dict(item) for item in snapshot["interfaces"]]
    for field, text in fields.items():
        values = (((row["name"], row["role"], row["pod"]), row[field]) for row in rows)
        yield _counter(f"dataplane_interface_{field}", text, ("interface", "role", "pod"), values)
    up = GaugeMetricFamily("dataplane_interface_up", "Whether frames may be sent.", labels=("interface", "role", "pod"))
    for row in rows:
        up.add_metric((row["name"], row["role"], row["pod"]), row["state"] == "up")
    yield up


def _packets(counters: Counters) -> Iterator[Metric]:
    yield _counter("dataplane_received", "Packets read from devices.", (), iter([((), counters["received"])]))
    yield _counter("dataplane_injected", "Packets made by the slow path.", (), iter([((), counters["injected"])]))
    verdicts = {"accept": "accepted", "stolen": "stolen", "queue": "queued", "drop": "dropped"}
    rows: dict[str, Any] = dict(counters)
    values = (((verdict,), rows[name]) for verdict, name in verdicts.items())
    yield _counter("dataplane_packets", "Packets by verdict.", ("verdict",), values)
    yield _gauge("dataplane_balanced", "Whether every packet is accounted for.", counters["balanced"])


def _drops(snapshot: Drops) -> Iterator[Metric]:
    dropped = [reason for reason in snapshot["reasons"] if reason["verdict"] == "drop"]
    values = (((reason["label"], reason["stage"]), reason["count"]) for reason in dropped)
    yield _counter("dataplane_drops", "Dropped packets by reason.", ("reason", "stage"), values)


def _pipeline(snapshot: Pipeline) -> Iterator[Metric]:
    values = (((stage["stage"],), stage["entered"]) for stage in snapshot["pipeline"])
    yield _counter("dataplane_stage_packets", "Packets that came to a stage.", ("stage",), values)


def _vteps(snapshot: Vteps) -> Iterator[Metric]:
    fields = {
        "rx_packets": "Packets from a node's tunnel.",
        "rx_bytes": "Bytes from a node's tunnel.",
        "tx_packets": "Packets to a node's tunnel.",
        "tx_bytes": "Bytes to a node's tunnel.",
    }
    rows: list[dict[str, Any]] = [dict(item) for item in snapshot["vteps"]]
    for field, text in fields.items():
        yield _counter(f"dataplane_vtep_{field}", text, ("node",), (((row["node"],), row[field]) for row in rows))


def _tables(routes: Routes, arp: Arp) -> Iterator[Metric]:
    kinds = Tally(route["kind"] for route in routes["routes"])
    family = GaugeMetricFamily("dataplane_routes", "Routes by kind.", labels=("kind",))
    for kind, count in sorted(kinds.items()):
        family.add_metric((kind,), count)
    yield family
    states = Tally(entry["state"].lower() for entry in arp["arp"])
    family = GaugeMetricFamily("dataplane_neighbors", "Neighbors on the uplink by state.", labels=("state",))
    for state, count in sorted(states.items()):
        family.add_metric((state,), count)
    yield family


def _conntrack(stats: ConntrackStats) -> Iterator[Metric]:
    texts = {
        "found": "Lookups that had to be repeated and found an entry.",
        "invalid": "Packets that are of no connection and cannot begin one.",
        "insert": "Flows entered.",
        "insert_failed": "Flows that could not be entered, because one of their tuples was in.",
        "drop": "Packets dropped for want of an entry.",
        "early_drop": "Flows given up for new ones.",
        "error": "Errors about flows that make no sense.",
        "search_restart": "Lookups that were begun again.",
        "clash_resolve": "Clashing flows that became one.",
        "chaintoolong": "Flows not entered because their slots' neighborhood is full.",
        "out_of_window": "TCP segments outside the window, dropped or let pass.",
    }
    rows: dict[str, Any] = dict(stats)
    yield _gauge("dataplane_conntrack_entries", "Flows that are tracked.", stats["flows"])
    yield _gauge("dataplane_conntrack_entries_limit", "Flows that can be tracked.", stats["limit"])
    for name, text in texts.items():
        yield _counter(f"dataplane_conntrack_stat_{name}", text, (), iter([((), rows[name])]))
    invalid = iter([((), stats["invalid"])])
    text = "Packets dropped as invalid, so that none leaves untranslated."
    yield _counter("kubeproxy_iptables_ct_state_invalid_dropped_packets", text, (), invalid)


def _balancing(snapshot: Balancing) -> Iterator[Metric]:
    yield _gauge("dataplane_virtual_services", "Virtual services: address, port and protocol.", snapshot["services"])
    yield _gauge("dataplane_endpoints", "Endpoints of all virtual services.", snapshot["endpoints"])
    yield _gauge("dataplane_persistence_templates", "Clients that stay with an endpoint.", snapshot["templates"])
    refused = iter([((), snapshot["templates_refused"])])
    yield _counter("dataplane_persistence_refused", "Connections that got no template: no room.", (), refused)
    text = "When services were last changed, seconds since the epoch."
    yield _gauge("kubeproxy_sync_proxy_rules_last_timestamp_seconds", text, snapshot["last_sync"])
    lacking = GaugeMetricFamily(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Services of traffic policy Local without an endpoint on this node.",
        labels=("traffic_policy",),
    )
    for policy, count in snapshot["no_local_endpoints"].items():
        lacking.add_metric((policy,), count)
    yield lacking
    yield from _services(snapshot)


def _pools(snapshot: LoadBalancer) -> Iterator[Metric]:
    fields = {
        "addresses_total": ("addresses", "Addresses that a pool can give."),
        "addresses_in_use_total": ("in_use", "Addresses of a pool that services have."),
        "services_allocated_total": ("services", "Services that have an address of a pool."),
    }
    rows: list[dict[str, Any]] = [dict(row) for row in snapshot["pools"]]
    for name, (field, text) in fields.items():
        family = GaugeMetricFamily(f"metallb_allocator_{name}", text, labels=("pool",))
        for row in rows:
            family.add_metric((row["name"],), row[field])
        yield family
    text = "Services that wait for a load balancer's address."
    yield _gauge("dataplane_load_balancer_pending", text, len(snapshot["pending"]))


def _cluster(snapshot: ClusterStatus) -> Iterator[Metric]:
    alive = sum(node["alive"] for node in snapshot["nodes"])
    yield _gauge("dataplane_cluster_nodes", "Nodes of the cluster, this one included.", len(snapshot["nodes"]))
    yield _gauge("dataplane_cluster_nodes_alive", "Those that are members now.", alive)
    if snapshot["source"] != "static":
        text = "Whether the store of the cluster's state answered the last time."
        yield _gauge("dataplane_store_connected", text, int(snapshot["connected"]))
        yield _gauge("dataplane_store_revision", "The newest revision that the node has.", snapshot["revision"])
        yield _gauge("dataplane_store_lag_seconds", "By how much it may be behind the store.", snapshot["lag_s"])


def _services(snapshot: Balancing) -> Iterator[Metric]:
    labels = ("service", "port", "protocol")
    rows: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        ((row["service"], row["port_name"], row["protocol"]), dict(row)) for row in snapshot["totals"]
    ]
    fields = {
        "connections": "Connections to a port of a service.",
        "in_packets": "Packets to a port of a service.",
        "in_bytes": "Bytes to a port of a service.",
        "out_packets": "Packets from a port of a service.",
        "out_bytes": "Bytes from a port of a service.",
    }
    for field, text in fields.items():
        yield _counter(f"dataplane_service_{field}", text, labels, ((key, row[field]) for key, row in rows))
    text = "Open connections by ip_vs's count; UDP is inactive."
    family = GaugeMetricFamily("dataplane_service_open_connections", text, labels=(*labels, "state"))
    for key, row in rows:
        for state in ("active", "inactive"):
            family.add_metric((*key, state), row[state])
    yield family
    yield _gauge("dataplane_service_left_off", "Virtual services without metrics of their own.", snapshot["left_off"])
