"""Containers of two nodes that get their addresses out of etcd.

┌── c1, c2 ────────┐        ┌── c3 ────────────┐
│ eth0 10.244.x.y  │        │ eth0 10.244.z.w  │      blocks of 10.244.0.0/16, a /26 for each node
└──────┬───────────┘        └──────┬───────────┘
     node1 192.0.2.11 ── LAN ── node2 192.0.2.12      etcd 192.0.2.100
"""

import json
from ipaddress import ip_address, ip_network

import pytest

from dataplane.cni import NOT_AVAILABLE, TRY_AGAIN_LATER
from tests.etcd_server import EtcdServer
from tests.netns import checks
from tests.netns.containers import PluginError, Runtime, address_of
from tests.netns.harness import RUN, Namespace, Network, Node, eventually

pytestmark = pytest.mark.netns

CONFIG = """
apiVersion = "dataplane/v1"
kind = "Node"
[node]
name = "{name}"
addresses = ["{address}"]
[uplink]
interface = "eth0"
mode = "af_packet"
[pods]
mtu = 1450
[state]
source = "etcd"
[state.etcd]
endpoints = ["{url}"]
prefix = "/{name}"
[ipam]
cooldown = "0s"
[[ipam.pools]]
cidr = "10.244.0.0/16"
[services]
clusterCIDR = ["10.244.0.0/16"]
serviceCIDR = ["10.96.0.0/16"]
[api]
cni = true
"""


@pytest.fixture(scope="module")
def hosts(network: Network) -> list[Namespace]:
    made = [network.namespace(name) for name in ("host1", "host2", "store")]
    network.lan(*zip(made, ("192.0.2.11/24", "192.0.2.12/24", "192.0.2.100/24"), strict=True))
    return made


@pytest.fixture(scope="module")
def etcd(network: Network, hosts):
    with EtcdServer(network.directory, hosts[2].command(), "192.0.2.100") as server:
        yield server


@pytest.fixture(scope="module")
def nodes(network: Network, hosts, etcd) -> list[Node]:
    made = []
    for number in (1, 2):
        text = CONFIG.format(name=f"{network.prefix}node{number}", address=f"192.0.2.1{number}", url=etcd.url)
        text = text.replace(f'prefix = "/{network.prefix}node{number}"', f'prefix = "/{network.prefix}"')
        made.append(network.node(hosts[number - 1], f"node{number}", text).start())
    return made


@pytest.fixture
def runtimes(nodes, tmp_path) -> list[Runtime]:
    return [Runtime(node, tmp_path / node.name) for node in nodes]


@pytest.fixture
def containers(network: Network):
    made = [network.namespace(f"c{number}") for number in (1, 2, 3)]
    yield made
    for each in made:
        if each.path.exists():
            network.remove(each)


def held(node: Node) -> set[str]:
    """Return the containers that hold an address, by the books in etcd."""
    shown = json.dumps(json.loads(node.cli("ipam", "show", "-o", "json")))
    return {word.split("/")[3] for word in shown.split('"') if word.startswith("cni/")}


def published(network: Network, etcd: EtcdServer) -> set[str]:
    """Return the pods that everybody may know of."""
    return {key.rpartition("/")[2] for key in etcd.range(f"/{network.prefix}/pods/")}


def test_containers_of_two_nodes_reach_each_other(network, nodes, runtimes, containers, etcd):
    (one, two), (c1, c2, c3) = runtimes, containers
    addresses = [address_of(runtime.add(each)) for runtime, each in ((one, c1), (one, c2), (two, c3))]
    first, second, third = (ip_network(f"{address}/26", strict=False) for address in addresses)
    assert first == second != third
    assert all(ip_address(address) != first.network_address for address in addresses)  # the tunnel's
    checks.ping(c1, addresses[1])
    eventually(lambda: c1.run("ping", "-c", 1, "-W", 1, addresses[2], check=False).count("1 received"), 20)
    checks.ping(c1, addresses[2])
    checks.ping(c3, addresses[0])
    assert held(nodes[0]) == {each.name for each in containers}
    eventually(lambda: published(network, etcd) == {each.name for each in containers})
    for runtime, each in ((one, c1), (one, c2), (two, c3)):
        runtime.delete(each)
    assert held(nodes[0]) == set()
    eventually(lambda: published(network, etcd) == set())


def test_without_etcd_containers_stay_and_go_but_none_comes(nodes, runtimes, containers, etcd):
    (node, _), (runtime, _), (c1, c2, c3) = nodes, runtimes, containers
    runtime.add(c1)
    address = address_of(runtime.add(c2))
    etcd.stop()
    try:
        checks.ping(c1, address)
        for command, arguments, code in (("ADD", (c3.name, c3.path), TRY_AGAIN_LATER), ("STATUS", (), NOT_AVAILABLE)):
            with pytest.raises(PluginError) as caught:
                runtime.call(command, *arguments)
            assert caught.value.code == code
        assert c3.ip("-o", "link").count("\n") == 1
        runtime.delete(c2)
        assert c2.ip("-o", "link").count("\n") == 1
    finally:
        etcd.start()
    eventually(lambda: held(node) == {c1.name}, timeout=30)
    runtime.add(c3)
    assert held(node) == {c1.name, c3.name}
    runtime.delete(c3)
    runtime.delete(c1)


def test_a_killed_node_keeps_its_containers_and_gives_back_what_went_meanwhile(network, nodes, runtimes, containers):
    (node, _), (runtime, _), (c1, c2, _) = nodes, runtimes, containers
    address = address_of(runtime.add(c1))
    runtime.add(c2)
    node.kill()
    network.remove(c2)
    node.start()
    assert address in c1.ip("address", "show", "dev", "eth0")
    checks.gateway_answers_arp(c1)
    eventually(lambda: held(node) == {c1.name}, timeout=30)
    runtime.delete(c2)
    runtime.delete(c1)
    assert held(node) == set()
    eventually(lambda: not list(RUN.glob(f"{node.name}.cni*")))
