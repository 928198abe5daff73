"""Services in etcd that get their address out of a pool in etcd, as a client on the LAN finds them.

                  ┌── etcd 192.0.2.50
ext 192.0.2.100 ──┼── br0 ── eth0 192.0.2.11 [ node1 ] ── a1 10.244.1.10
                  └───────── eth0 192.0.2.12 [ node2 ] ── b1 10.244.2.10
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from dataplane.control import client
from tests.etcd_server import EtcdServer
from tests.netns.harness import Namespace, Network, Node, eventually
from tests.netns.ours import assert_balanced, config, member
from tests.netns.services import UDP_PORT, serve, with_services
from tests.netns.sockets import ASK

pytestmark = pytest.mark.netns

ETCD, PREFIX, FIRST, SECOND = "192.0.2.50", "/dataplane/v1", "192.0.2.200", "192.0.2.201"
PODS = {"a1": "10.244.1.10", "b1": "10.244.2.10"}
STATE = f'[state]\nsource = "etcd"\n[state.etcd]\nendpoints = ["http://{ETCD}:2379"]\nleaseTTL = "3s"\n'


class World(NamedTuple):
    server: EtcdServer
    nodes: list[Node]
    ext: Namespace


@pytest.fixture(scope="module")
def world(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    ext, store = network.namespace("ext"), network.namespace("etcd")
    hosts = [network.namespace(f"host{number}") for number in (1, 2)]
    network.lan(
        (ext, "192.0.2.100/24"), (store, f"{ETCD}/24"), (hosts[0], "192.0.2.11/24"), (hosts[1], "192.0.2.12/24")
    )
    balancing = {"clusterCIDR": ["10.244.0.0/16"], "serviceCIDR": ["10.96.0.0/12"]}
    with EtcdServer(tmp_path_factory.mktemp("etcd"), within=store.command(), host=ETCD) as server:
        nodes = []
        for number, (name, address) in enumerate(PODS.items(), 1):
            text = with_services(config(member(network, number), {name: address}), balancing=balancing)
            nodes.append(network.node(hosts[number - 1], f"node{number}", text + STATE).start())
            serve(network.pod(name), name, "tcp:8080", f"udp:{UDP_PORT}")
        yield World(server, nodes, ext)
        for node in nodes:
            assert_balanced(node)


def put(world: World, name: str, port: int = 80, **keys: Any) -> None:
    """Write a service with an endpoint on each node."""
    spec = {"type": "LoadBalancer", "ports": [{"port": port, "targetPort": 8080}], **keys}
    world.server.put(f"{PREFIX}/services/default/{name}", spec)
    world.server.put(f"{PREFIX}/endpoints/default/{name}/all", [{"ip": address} for address in PODS.values()])


def shown(node: Node) -> Any:
    return client.get(node.socket, "load_balancer")


def having(node: Node) -> dict[str, str]:
    rows = shown(node)["addresses"]
    return {name.removeprefix("default/"): row["address"] for row in rows for name in row["services"]}


def both_have(world: World, expected: dict[str, str]) -> bool:
    return [having(node) for node in world.nodes] == [expected] * 2


def answering(world: World, address: str) -> set[str]:
    output = world.ext.run("arping", "-i", "eth0", "-c", 3, "-W", 0.05, address, check=False)
    return set(re.findall(r"bytes from (\S+) ", output))


def mac(node: Node) -> str:
    (link,) = json.loads(node.namespace.ip("-j", "link", "show", "eth0"))
    return str(link["address"])


def test_a_service_in_etcd_gets_an_address_that_one_node_answers_for(world):
    put(world, "web")
    reason = "there is no address pool"
    eventually(lambda: shown(world.nodes[1])["pending"] == [{"service": "default/web", "reason": reason}], 20)
    world.server.put(f"{PREFIX}/pools/default", {"addresses": [f"{FIRST}-{SECOND}"]})
    eventually(lambda: both_have(world, {"web": FIRST}), 20)
    eventually(lambda: len(answering(world, FIRST)) == 1, 20)
    (row,) = shown(world.nodes[0])["addresses"]
    owner = next(node for node in world.nodes if node.name == row["owner"])
    assert answering(world, FIRST) == {mac(owner)}
    assert ASK["tcp"](world.ext, FIRST, 80).name in PODS


def test_the_control_api_of_either_node_sets_a_service_that_gets_an_address(world):
    endpoints = [word for address in PODS.values() for word in ("--endpoint", address)]
    world.nodes[1].cli("service", "set", "db", "--type", "LoadBalancer", "--port", "81:8080", *endpoints)
    eventually(lambda: both_have(world, {"web": FIRST, "db": SECOND}), 20)
    eventually(lambda: len(answering(world, SECOND)) == 1, 20)
    assert ASK["tcp"](world.ext, SECOND, 81).name in PODS
    put(world, "late", 82)
    reason = "no IPv4 address is free in pool default"
    eventually(lambda: shown(world.nodes[0])["pending"] == [{"service": "default/late", "reason": reason}], 20)
    world.nodes[0].cli("service", "delete", "db")
    eventually(lambda: both_have(world, {"web": FIRST, "late": SECOND}), 20)
    assert ASK["tcp"](world.ext, SECOND, 82).name in PODS


def test_addresses_stay_when_a_node_is_killed_and_comes_back(world):
    before = having(world.nodes[0])
    for node in world.nodes:
        node.kill()
        other = next(each for each in world.nodes if each is not node)
        assert having(other) == before
        node.start()
        eventually(lambda: both_have(world, before), 20)
