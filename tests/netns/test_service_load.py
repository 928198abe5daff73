"""Many connections through one service address, every byte of them checked.

client 10.244.1.10 ── [ node1 ] ── s1, s2, s3, s4 10.244.1.20, .30, .40, .50
"""

import json

import pytest

from tests.netns.harness import Network, Process
from tests.netns.ours import assert_balanced
from tests.netns.services import Cluster, Spot, make_cluster, port, service

pytestmark = pytest.mark.netns

SERVERS = {"s1": "10.244.1.20", "s2": "10.244.1.30", "s3": "10.244.1.40", "s4": "10.244.1.50"}
PARALLEL = 32
SIZES = [0, 1, 536, 1400, 1410, 4096, 20_000]  # bytes, in turn: in one segment, in two, in a super-frame
PATIENCE = 120.0  # two cores shared with whatever else runs on the machine; 20 s when nothing does


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    made = make_cluster(network, [{"client": "10.244.1.10", **SERVERS}])
    made.where("client").sysctl("net/ipv4/ip_local_port_range", "1024 65535")
    return made


def start(cluster: Cluster, spot: Spot, count: int) -> Process:
    client = cluster.where("client")
    return client.spawn(*client.tool("../netexec", "load", spot.vip, 80, count, PARALLEL, *SIZES))


def result(load: Process) -> dict[str, int]:
    """Return how many connections each server has had."""
    assert load.wait(PATIENCE) == 0, load.output
    served: dict[str, int] = json.loads(load.output)
    return served


@pytest.mark.conformance("rr: 20,000 connections are shared exactly, no byte is lost", source="Linux 6.1 ip_vs")
def test_twenty_thousand_connections_go_round_exactly(cluster, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [*SERVERS.values()])):
        assert result(start(cluster, spot, 20_000)) == dict.fromkeys(SERVERS, 5000)
        rows = [each for each in cluster.rows("services") if each["address"] == spot.vip]
        assert [each["connections"] for each in rows] == [20_000]
    assert_balanced(cluster.node)


def test_no_connection_fails_while_endpoints_come_and_go(cluster, spot):
    first, *others = SERVERS.values()
    with cluster.use(service("web", spot.vip, [port(80)], [first])):
        load, edits = start(cluster, spot, 3000), 0
        while load.running:
            cluster.set(service("web", spot.vip, [port(80)], [first, *others[: edits % 4]]))
            edits += 1
        served = result(load)
        assert sum(served.values()) == 3000
        assert set(served) == set(SERVERS)
        assert edits > 10
    assert_balanced(cluster.node)
