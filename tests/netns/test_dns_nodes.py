"""Cluster DNS on two nodes whose uplinks are their own: each answers its own pods, about the pods of both.

ext 192.0.2.100 ── br0 ─┬─ eth0 192.0.2.11 [ node1 ] ── client 10.244.1.10
 dnsmasq                └─ eth0 192.0.2.12 [ node2 ] ── db     10.244.2.10
"""

import pytest

from tests.netns.harness import Network
from tests.netns.services import EXT, Cluster, make_cluster, port, service
from tests.netns.test_dns import DNS, DNSMASQ, DOMAIN, short

pytestmark = pytest.mark.netns

DB = "10.244.2.10"
STATIC = [service("db", "None", [port(5432, name="pg")], [{"ip": DB, "hostname": "db-0"}])]


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    sections = {"dns": {"clusterIP": DNS, "upstreams": [EXT]}}
    pods = [{"client": "10.244.1.10"}, {"db": DB}]
    made = make_cluster(network, pods, static=STATIC, shared=False, sections=sections)
    made.ext.spawn(*DNSMASQ, f"--listen-address={EXT}", "--address=/example.com/203.0.113.1").expect("started")
    return made


@pytest.mark.parametrize("how", ["+notcp", "+tcp"])
@pytest.mark.parametrize("where", ["client", "db", "node1", "node2", "ext"])
def test_every_node_answers_about_all_pods(cluster, where, how):
    asking = cluster.where(where)
    assert short(asking, how, f"db-0.db.{DOMAIN}") == [DB]
    assert short(asking, how, f"_pg._tcp.db.{DOMAIN}", "SRV") == [f"0 100 8080 db-0.db.{DOMAIN}."]
    assert short(asking, how, "-x", DB) == [f"db-0.db.{DOMAIN}."]
    assert short(asking, how, "www.example.com") == ["203.0.113.1"]


def test_a_pod_is_answered_by_its_own_node(cluster):
    counted = {}
    for node in cluster.nodes:
        counted[node.name] = sum(row["count"] for row in node.show("dns")["requests"])
    for _ in range(10):
        assert short(cluster.where("db"), f"db.{DOMAIN}") == [DB]
    more = [sum(row["count"] for row in node.show("dns")["requests"]) - counted[node.name] for node in cluster.nodes]
    assert more == [0, 10]
