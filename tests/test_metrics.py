"""Prometheus' text, made of the snapshots of a node that is not there."""

import re

from prometheus_client.parser import text_string_to_metric_families

from dataplane.control import metrics
from tests.fake_node import FakeNode


def samples() -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.text(FakeNode().snapshot))
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_are_the_counters_of_the_snapshots():
    found = samples()
    pod = ("cali0d7763386da", "default/web-0", "pod")
    assert found["dataplane_interface_rx_packets_total", pod] == 1000
    assert found["dataplane_interface_tx_bytes_total", pod] == 420
    assert found["dataplane_drops_total", ("ip.ttl", "route")] == 12
    assert found["dataplane_drops_total", ("mtu.df", "route")] == 0
    assert found["dataplane_packets_total", ("accept",)] == 86
    assert found["dataplane_received_total", ()] == 100
    assert found["dataplane_balanced", ()] == 1
    assert found["dataplane_vtep_tx_bytes_total", ("node2",)] == 500
    assert found["dataplane_routes", ("via",)] == 3
    assert found["dataplane_neighbors", ("reachable",)] == 1
    assert found["dataplane_stage_packets_total", ("route",)] == 102


def test_pods_are_counted_under_calicos_name():
    found = samples()
    assert found["felix_active_local_endpoints", ()] == 2
    assert found["felix_resync_state", ()] == 3


def test_services_and_flows_are_metrics_under_kube_proxys_names_where_it_has_them():
    found = samples()
    assert found["kubeproxy_sync_proxy_rules_last_timestamp_seconds", ()] == 1_700_000_100
    assert found["kubeproxy_sync_proxy_rules_no_local_endpoints_total", ("external",)] == 1
    assert found["kubeproxy_sync_proxy_rules_no_local_endpoints_total", ("internal",)] == 0
    assert found["kubeproxy_iptables_ct_state_invalid_dropped_packets_total", ()] == 1
    assert found["dataplane_conntrack_entries", ()] == 4
    assert found["dataplane_conntrack_entries_limit", ()] == 262144
    assert found["dataplane_conntrack_stat_insert_total", ()] == 9
    assert found["dataplane_conntrack_stat_out_of_window_total", ()] == 7
    assert found["dataplane_virtual_services", ()] == 2
    assert found["dataplane_service_connections_total", ("http", "TCP", "default/web")] == 12
    assert found["dataplane_service_open_connections", ("", "UDP", "kube-system/dns", "inactive")] == 3


def test_pools_are_metrics_under_metallbs_names():
    found = samples()
    assert found["metallb_allocator_addresses_total", ("default",)] == 22
    assert found["metallb_allocator_addresses_in_use_total", ("default",)] == 1
    assert found["metallb_allocator_services_allocated_total", ("default",)] == 2
    assert found["dataplane_load_balancer_pending", ()] == 1


def test_the_cluster_and_its_store_are_metrics():
    found = samples()
    assert found["dataplane_cluster_nodes", ()] == 2
    assert found["dataplane_cluster_nodes_alive", ()] == 1
    assert found["dataplane_store_connected", ()] == 1
    assert found["dataplane_store_revision", ()] == 1234
    assert found["dataplane_store_lag_seconds", ()] == 0


def test_every_metric_has_a_help_line():
    text = metrics.text(FakeNode().snapshot)
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert names == set(re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE))
