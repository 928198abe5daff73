"""Cluster DNS for Prometheus, by CoreDNS' names: dashboards for it show this node's as well."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from dataplane.control.snapshot_dns import Dns

_WHERE = ("server", "zone", "view")


def dns(snapshot: Dns) -> Iterator[Metric]:
    """Yield the metrics of a node that answers names; none of another."""
    if not snapshot["domain"]:
        return
    where = ("dns://:53", f"{snapshot['domain']}.", "")
    requests = CounterMetricFamily("coredns_dns_requests", "Questions.", labels=(*_WHERE, "proto", "family", "type"))
    for row in snapshot["requests"]:
        requests.add_metric((*where, row["transport"], "1", row["type"]), row["count"])  # family 1: IPv4
    yield requests
    responses = CounterMetricFamily("coredns_dns_responses", "Answers by code.", labels=(*_WHERE, "rcode"))
    for rcode, count in sorted(snapshot["responses"].items()):
        responses.add_metric((*where, rcode), count)
    yield responses
    durations = HistogramMetricFamily("coredns_dns_request_duration_seconds", "Time to an answer.", labels=_WHERE)
    edges = [*(str(edge) for edge in snapshot["buckets"]), "+Inf"]
    counts = accumulate(snapshot["durations"])
    durations.add_metric(where, list(zip(edges, counts, strict=True)), snapshot["duration_sum"])
    yield durations
    entries = GaugeMetricFamily("coredns_cache_entries", "Answers of upstreams that are kept.", labels=_WHERE)
    entries.add_metric(where, snapshot["cache_entries"])
    yield entries
    for name, text, count in (
        ("coredns_cache_hits", "Questions that a kept answer of an upstream was for.", snapshot["cache_hits"]),
        ("coredns_cache_misses", "Questions that an upstream was asked.", snapshot["cache_misses"]),
    ):
        family = CounterMetricFamily(name, text, labels=_WHERE)
        family.add_metric(where, count)
        yield family
    yield from _upstreams(snapshot)


def _upstreams(snapshot: Dns) -> Iterator[Metric]:
    asked = CounterMetricFamily("coredns_proxy_requests", "Questions to an upstream.", labels=("to",))
    failed = CounterMetricFamily("coredns_proxy_failures", "Questions that it did not answer.", labels=("to",))
    for row in snapshot["upstreams"]:
        asked.add_metric((row["server"],), row["asked"])
        failed.add_metric((row["server"],), row["failures"])
    yield asked
    yield failed
