"""Two nodes that run out of addresses: what one borrows from the other is reached through the tunnel.

┌── c1..c4 on node1 ──┐     ┌── c5 on node2 ─────┐
│ a block of four,    │     │ a block of four,   │      pool 10.244.0.0/29, one block for each node
│ one borrowed        │     │                    │
└─────────┬───────────┘     └─────────┬──────────┘
     node1 192.0.2.11 ──── LAN ──── node2 192.0.2.12      etcd 192.0.2.100
"""

import json
from ipaddress import ip_address, ip_network

import pytest

from dataplane.cni import EXHAUSTED
from tests.etcd_server import EtcdServer
from tests.netns import checks
from tests.netns.containers import PluginError, Runtime, address_of
from tests.netns.harness import Namespace, Network, Node, eventually

pytestmark = pytest.mark.netns

CONFIG = """
[node]
name = "{name}"
addresses = ["{address}"]
[uplink]
interface = "eth0"
[pods]
mtu = 1450
[state]
source = "etcd"
[state.etcd]
endpoints = ["http://192.0.2.100:2379"]
leaseTTL = "2s"
[ipam]
maxBlocksPerHost = 1
[[ipam.pools]]
cidr = "10.244.0.0/29"
blockSize = 30
[services]
clusterCIDR = ["10.244.0.0/16"]
[api]
cni = true
"""


@pytest.fixture(scope="module")
def hosts(network: Network) -> list[Namespace]:
    made = [network.namespace(name) for name in ("host1", "host2", "store")]
    network.lan(*zip(made, ("192.0.2.11/24", "192.0.2.12/24", "192.0.2.100/24"), strict=True))
    return made


@pytest.fixture(scope="module")
def nodes(network: Network, hosts):
    with EtcdServer(network.directory, hosts[2].command(), "192.0.2.100"):
        made = []
        for number in (1, 2):
            text = CONFIG.format(name=f"{network.prefix}node{number}", address=f"192.0.2.1{number}")
            made.append(network.node(hosts[number - 1], f"node{number}", text).start())
        yield made
        for node in made:
            node.stop()


def books(node: Node):
    return json.loads(node.cli("ipam", "show", "-o", "json"))


def test_borrowed_addresses_are_reached_and_a_lost_node_is_forgotten(network, nodes, tmp_path):
    first, second = (Runtime(node, tmp_path / node.name) for node in nodes)
    containers = [network.namespace(f"c{number}") for number in range(1, 6)]
    *here, there = containers
    addresses = [address_of(first.add(each)) for each in here]
    other = address_of(second.add(there))
    blocks = [ip_network(f"{address}/30", strict=False) for address in addresses]
    assert len(set(blocks[:3])) == 1
    assert blocks[3] != blocks[0]
    assert ip_address(other) in blocks[3]
    borrowed = [each for block in books(nodes[1])["blocks"] for each in block["allocations"] if each["borrowed"]]
    assert [each["address"] for each in borrowed] == [addresses[3]]

    # The route of the borrowed address is in the other node's own block.
    eventually(lambda: there.run("ping", "-c", 1, "-W", 1, addresses[3], check=False).count("1 received"), 20)
    checks.ping(there, addresses[3])
    checks.ping(here[3], other)
    checks.ping(here[3], addresses[0])
    checks.ping(there, addresses[0])

    late = network.namespace("late")
    second.add(late)
    full = network.namespace("full")
    for runtime in (first, second):
        with pytest.raises(PluginError) as caught:
            runtime.add(full)
        assert caught.value.code == EXHAUSTED

    name = f"{network.prefix}node2"
    refused = nodes[0].cli("ipam", "release", "--node", name, check=False)
    assert "is there" in refused
    nodes[1].kill()
    eventually(lambda: nodes[0].cli("ipam", "release", "--node", name, check=False).endswith("OK: 3 changes\n"), 30)
    left = {each["address"] for block in books(nodes[0])["blocks"] for each in block["allocations"]}
    assert left >= set(addresses)
    checks.ping(here[3], addresses[0])
    assert ip_address(address_of(first.add(full))) in blocks[3]
    for each in (*here, full):
        first.delete(each)
