"""Three of our nodes that know of one another from etcd alone.

                    192.0.2.0/24
pod a ── node1 .11 ──┐
pod b ── node2 .12 ──┼── br0 ── .100 etcd
         node3 .13 ──┘

10.244.1.10 pod a, 10.244.2.10 pod b; node3 has no block in its file and claims one.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests.etcd_server import EtcdServer
from tests.netns import checks
from tests.netns.harness import Namespace, Network, Node, eventually
from tests.netns.ours import assert_balanced, config, member

pytestmark = pytest.mark.netns

A, B = "10.244.1.10", "10.244.2.10"
ETCD = "192.0.2.100"
PREFIX = "/dataplane/v1"
STATE = f"""
[state]
source = "etcd"
[state.etcd]
endpoints = ["http://{ETCD}:2379"]
leaseTTL = "3s"
[services]
clusterCIDR = ["10.244.0.0/16"]
serviceCIDR = ["10.96.0.0/16"]
"""
POOL = """
[[ipam.pools]]
cidr = "10.244.128.0/17"
"""
ALL = {"node1": True, "node2": True, "node3": True}
BIG = 400_000_000  # seconds of transfer, during which etcd dies and comes back


class World(NamedTuple):
    server: EtcdServer
    nodes: list[Node]
    hosts: list[Namespace]
    store: Namespace
    a: Namespace
    b: Namespace


@pytest.fixture(scope="module")
def world(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    members = [member(network, number) for number in (1, 2, 3)]
    hosts = [network.namespace(f"host{number}") for number in (1, 2, 3)]
    store = network.namespace("etcd")
    network.lan(*((host, f"192.0.2.1{number}/24") for number, host in enumerate(hosts, 1)), (store, f"{ETCD}/24"))
    third = re.sub(r"\[pods\]\ncidr = .*\n", "[pods]\n", config(members[2], {}))
    texts = [config(members[0], {"a": A}), config(members[1], {"b": B}), third + POOL]
    with EtcdServer(tmp_path_factory.mktemp("etcd"), within=store.command(), host=ETCD) as server:
        nodes = [
            network.node(host, f"node{number}", text + STATE).start()
            for number, (host, text) in enumerate(zip(hosts, texts, strict=True), 1)
        ]
        yield World(server, nodes, hosts, store, network.pod("a"), network.pod("b"))


@pytest.fixture(autouse=True)
def balanced(world):
    yield
    for node in world.nodes:
        assert_balanced(node)


def status(node: Node) -> Any:
    return json.loads(node.cli("cluster", "status", "-o", "json"))


def members(node: Node) -> dict[str, bool]:
    return {row["name"].rpartition("-")[2]: row["alive"] for row in node.show("cluster")["nodes"]}


def everywhere(nodes: Sequence[Node], condition: Callable[[Node], bool]) -> None:
    """Wait until a condition holds on all of some nodes; it may take a lease and a few attempts to connect."""
    for node in nodes:
        eventually(partial(condition, node), 20)


def vips(node: Node) -> set[str]:
    return {route["prefix"] for route in node.show("routes")["routes"] if route["kind"] == "service"}


def set_service(node: Node, name: str, vip: str, *endpoints: str) -> str:
    command = ["service", "set", name, "--cluster-ip", vip, "--port", "80:8080"]
    return node.cli(*command, *(word for endpoint in endpoints for word in ("--endpoint", endpoint)))


def test_nodes_become_peers_and_their_pods_reach_each_other(world):
    everywhere(world.nodes, lambda node: members(node) == ALL)
    checks.ping(world.a, B)
    checks.ping(world.b, A)
    checks.tcp(world.a, world.b, B)
    shown = status(world.nodes[0])
    assert (shown["source"], shown["connected"], shown["lag_s"]) == ("etcd", True, 0)
    assert [row["here"] for row in shown["nodes"]] == [True, False, False]
    table = world.nodes[1].cli("cluster", "status")
    assert re.search(r"node2 +192\.0\.2\.12 +10\.244\.2\.0/24 .* alive +\*$", table, re.MULTILINE), table
    assert f"etcd http://{ETCD}:2379: connected since" in table


def test_a_node_without_a_block_claims_one_that_the_others_have_a_route_to(world):
    third = next(row for row in status(world.nodes[2])["nodes"] if row["here"])
    (block,) = third["blocks"]
    assert block.startswith("10.244.")
    assert block.endswith("/26")
    for node in world.nodes[:2]:
        found = {route["prefix"]: route for route in node.show("routes")["routes"]}[block]
        assert (found["kind"], found["vtep"]) == ("tunnel", third["name"])


def test_a_service_that_is_set_on_one_node_is_reached_from_all(world):
    server = world.b.spawn(sys.executable, "-u", "-m", "http.server", 8080)
    server.expect("Serving HTTP")
    node1, node2, node3 = world.nodes
    assert "set service default/web in etcd" in set_service(node2, "web", "10.96.0.20", B)
    assert "10.96.0.20" in node2.cli("show", "services")
    everywhere([node1, node3], lambda node: "10.96.0.20/32" in vips(node))
    for place in (world.a, world.b, *world.hosts):
        assert "Directory listing" in place.run("curl", "-s", "--max-time", 5, "10.96.0.20")
    node1.cli("service", "delete", "web")
    everywhere(world.nodes, lambda node: "10.96.0.20/32" not in vips(node))
    assert world.server.range(f"{PREFIX}/services/") == {}
    server.stop()


def test_a_killed_node_is_away_and_routes_to_it_stay(world):
    first, second, third = world.nodes
    routes = {route["prefix"]: route["kind"] for route in first.show("routes")["routes"]}
    third.kill()
    everywhere([first, second], lambda node: members(node) == ALL | {"node3": False})
    assert {route["prefix"]: route["kind"] for route in first.show("routes")["routes"]} == routes
    assert re.search(r"node3 .* away$", first.cli("cluster", "status"), re.MULTILINE)
    third.start()
    everywhere(world.nodes, lambda node: members(node) == ALL)
    assert {route["prefix"]: route["kind"] for route in first.show("routes")["routes"]} == routes


def test_etcd_dies_and_comes_back_under_a_transfer_that_loses_nothing(world):
    first, second, _ = world.nodes
    listener = world.b.spawn(*world.b.tool("tcp", "listen", 5001, BIG))
    listener.expect("ready")
    client = world.a.spawn(*world.a.tool("tcp", "connect", B, 5001, BIG))
    before = len(first.log)
    world.server.kill()
    everywhere([first, second], lambda node: not node.show("cluster")["connected"])
    output, code = first.fail("endpoint", "add", "web", A)
    assert code != 0, output
    checks.ping(world.a, B)
    assert client.running, client.output
    world.server.start()
    world.server.put(f"{PREFIX}/services/default/meanwhile", {"clusterIPs": ["10.96.0.30"], "ports": [{"port": 80}]})
    everywhere([first, second], lambda node: "10.96.0.30/32" in vips(node) and node.show("cluster")["connected"])
    assert client.wait(120) == listener.wait(120) == 0, client.output + listener.output
    assert checks._digests(client.output)["sent"] == checks._digests(listener.output)["received"]
    said = "\n".join(first.log[before:])
    assert (said.count("etcd is away"), said.count("etcd is back")) == (1, 1), said
    assert world.server.delete(f"{PREFIX}/services/default/meanwhile")


def test_a_node_that_was_cut_off_during_a_compaction_lists_anew(world):
    first, second, _ = world.nodes
    ways = [(world.hosts[0], ETCD), (world.store, "192.0.2.11")]
    for host, address in ways:
        host.ip("route", "add", "blackhole", address)
    try:
        eventually(lambda: members(second)["node1"] is False, 15)
        eventually(lambda: "ESTAB" not in world.hosts[0].run("ss", "-Htn", "dst", ETCD), 30)
        assert not first.show("cluster")["connected"]
        checks.ping(world.a, B)
        world.server.put(f"{PREFIX}/services/default/late", {"clusterIPs": ["10.96.0.40"], "ports": [{"port": 80}]})
        world.server.compact()
    finally:
        for host, address in ways:
            host.ip("route", "del", "blackhole", address)
    eventually(lambda: "10.96.0.40/32" in vips(first), 30)
    eventually(lambda: members(second)["node1"], 30)
    eventually(lambda: any("listing anew" in line for line in first.log))
    checks.ping(world.b, A)
    world.server.delete(f"{PREFIX}/services/default/late")


def test_a_broken_object_is_named_and_skipped(world):
    before = [len(node.log) for node in world.nodes]
    world.server.put(f"{PREFIX}/services/default/broken", {"ports": [{"port": 99999}]})
    world.server.put(f"{PREFIX}/services/default/whole", {"clusterIPs": ["10.96.0.50"], "ports": [{"port": 80}]})
    everywhere(world.nodes, lambda node: "10.96.0.50/32" in vips(node))
    for node, start in zip(world.nodes, before, strict=True):
        lines = [line for line in node.log[start:] if "ERROR" in line]
        assert len(lines) == 1, lines
        assert f"skipped key={PREFIX}/services/default/broken: ports[0].port: expected a number" in lines[0]


def test_a_node_that_is_stopped_leaves_at_once(world):
    first, _, third = world.nodes
    assert third.stop() == 0
    eventually(lambda: members(first)["node3"] is False, 2)
    third.start()
    eventually(lambda: members(first)["node3"] is True)
