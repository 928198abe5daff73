"""Services that get their address out of a pool, as a client on the LAN finds them: two nodes with the same file.

    ext 192.0.2.100 ──┐
                      ├── br0 ── eth0 192.0.2.11 [ node1 ] ── a1 10.244.1.10
                      └───────── eth0 192.0.2.12 [ node2 ] ── b1 10.244.2.10

Nobody writes down which service has which address: both nodes come to the same, and one of them announces it.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from dataplane.control import client
from tests.netns.harness import Network, Node, eventually
from tests.netns.ours import assert_balanced
from tests.netns.services import Cluster, Spec, make_cluster, port, section, service
from tests.netns.sockets import ASK

pytestmark = pytest.mark.netns

A1, B1 = "10.244.1.10", "10.244.2.10"
FIRST, SECOND = "192.0.2.200", "192.0.2.201"
SHARED = {'"metallb.io/allow-shared-ip"': "names"}  # quoted, as TOML wants it


def balanced(name: str, vip: str, *ports: Spec, **keys: Any) -> Spec:
    return service(name, vip, ports or [port(80)], [A1, B1], type="LoadBalancer", **keys)


WEB, DB = balanced("web", "10.96.0.1"), balanced("db", "10.96.0.2", port(5432))
DNS_TCP, DNS_UDP = (
    balanced(f"dns-{word}", vip, port(53, protocol=word), annotations=SHARED)
    for word, vip in (("tcp", "10.96.0.3"), ("udp", "10.96.0.4"))
)
LATE = balanced("late", "10.96.0.5")
STATIC = [WEB, DB, DNS_TCP, DNS_UDP, LATE]
POOLS = '[[loadBalancer.ipAddressPools]]\nname = "default"\naddresses = ["192.0.2.200-192.0.2.202"]\n'
EDGE = """
[[loadBalancer.l2Advertisements]]
nodeSelectors = [{ matchLabels = { role = "edge" } }]
"""


def metallb(name: str, file: str = "assignment.go") -> pytest.MarkDecorator:
    """Mark a test as one of MetalLB's own, from e2etest/l2tests."""
    return pytest.mark.conformance(name, source=f"MetalLB e2e {file}")


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The nodes' files as they are at first."""
    return {}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]) -> Iterator[Cluster]:
    with Network(tmp_path_factory.mktemp("network")) as network:
        made = make_cluster(network, [{"a1": A1}, {"b1": B1}])
        for node in made.nodes:
            files[node.name] = node.config.read_text()
        yield made
        for node in made.nodes:
            assert_balanced(node)


@pytest.fixture(autouse=True)
def _pool(cluster: Cluster, files: dict[str, str]) -> Iterator[None]:
    """Both nodes have the pool and the services in their files."""
    have(cluster, files, *STATIC)
    yield
    for node in cluster.nodes:
        reload(node, files[node.name])


def have(cluster: Cluster, files: dict[str, str], *services: Spec) -> None:
    text = "".join(section("", "[services.static]", each) for each in services)
    for node in cluster.nodes:
        reload(node, files[node.name] + text + POOLS)


def reload(node: Node, text: str) -> None:
    node.write(text)
    node.cli("reload")


def shown(node: Node) -> Any:
    return client.get(node.socket, "load_balancer")


def having(node: Node) -> dict[str, str]:
    rows = shown(node)["addresses"]
    return {name.removeprefix("default/"): row["address"] for row in rows for name in row["services"]}


def answering(cluster: Cluster, address: str) -> set[str]:
    """Return the MACs that answer for an address."""
    output = cluster.ext.run("arping", "-i", "eth0", "-c", 3, "-W", 0.05, address, check=False)
    return set(re.findall(r"bytes from (\S+) ", output))


def mac(cluster: Cluster, node: str) -> str:
    number = next(at for at, each in enumerate(cluster.nodes) if each.name == node)
    (link,) = json.loads(cluster.hosts[number].ip("-j", "link", "show", "eth0"))
    return str(link["address"])


EVERYBODY = {"web": FIRST, "db": SECOND, "dns-tcp": "192.0.2.202", "dns-udp": "192.0.2.202"}


def test_both_nodes_give_the_same_addresses_and_one_of_them_answers(cluster):
    assert [having(node) for node in cluster.nodes] == [EVERYBODY] * 2
    for row in shown(cluster.node)["addresses"]:
        assert row in shown(cluster.nodes[1])["addresses"]
        assert answering(cluster, row["address"]) == {mac(cluster, row["owner"])}
    assert ASK["tcp"](cluster.ext, FIRST, 80).name in ("a1", "b1")
    assert ASK["tcp"](cluster.ext, SECOND, 5432).name in ("a1", "b1")


def test_services_with_the_same_key_share_an_address_by_their_ports(cluster):
    for protocol in ("tcp", "udp"):
        assert ASK[protocol](cluster.ext, EVERYBODY["dns-tcp"], 53).name in ("a1", "b1")


@metallb("should remove the ip from a service assign it to a free one when deleting the service")
def test_a_service_waits_while_the_pool_is_full_and_gets_what_becomes_free(cluster, files):
    reason = "no IPv4 address is free in pool default"
    assert shown(cluster.node)["pending"] == [{"service": "default/late", "reason": reason}]
    table = cluster.node.cli("show", "services").splitlines()
    assert any(line.startswith("default/late:tcp-80 ") and "<pending>:80/TCP" in line for line in table)
    assert table[-1] == f"default/late: {reason}"
    assert f"no load balancer address service=default/late: {reason}" in "\n".join(cluster.node.log)
    have(cluster, files, *(each for each in STATIC if each is not DB))
    others = {name: address for name, address in EVERYBODY.items() if name != "db"}
    assert [having(node) for node in cluster.nodes] == [others | {"late": SECOND}] * 2
    assert ASK["tcp"](cluster.ext, SECOND, 80).name in ("a1", "b1")
    have(cluster, files, *STATIC)
    assert [having(node) for node in cluster.nodes] == [others | {"late": SECOND}] * 2
    assert shown(cluster.node)["pending"] == [{"service": "default/db", "reason": reason}]


def test_the_control_api_gives_addresses_too_and_takes_them_back(cluster, files):
    have(cluster, files, WEB)
    with cluster.use(balanced("set", "10.96.0.9"), service("plain", "10.96.0.6", [port(80)], [A1])):
        assert [having(node) for node in cluster.nodes] == [{"web": FIRST, "set": SECOND}] * 2
        assert ASK["tcp"](cluster.ext, SECOND, 80).name in ("a1", "b1")
    assert [having(node) for node in cluster.nodes] == [{"web": FIRST}] * 2
    assert answering(cluster, SECOND) == set()


def test_an_endpoint_that_comes_or_goes_moves_no_address(cluster):
    for verb in ("delete", "add"):
        for node in cluster.nodes:
            node.cli("endpoint", verb, "default/web", B1)
        assert [having(node) for node in cluster.nodes] == [EVERYBODY] * 2


@metallb("should remove the ip from a service assign it to a free one when changing the service type to clusterIP")
def test_a_service_of_another_type_leaves_its_address_to_who_waits(cluster, files):
    changed = {key: value for key, value in DB.items() if key != "type"}
    have(cluster, files, *(changed if each is DB else each for each in STATIC))
    expected = {name: address for name, address in EVERYBODY.items() if name != "db"} | {"late": SECOND}
    assert [having(node) for node in cluster.nodes] == [expected] * 2


@metallb("should preseve the same external ip after controller restart")
def test_a_node_that_is_killed_and_comes_back_gives_the_same_addresses(cluster):
    cluster.node.kill()
    cluster.node.start()
    assert [having(node) for node in cluster.nodes] == [EVERYBODY] * 2


@metallb("IPV4 removing pools removes all pools")
def test_a_pool_that_is_gone_takes_its_addresses_back(cluster, files):
    assert answering(cluster, FIRST)
    for node in cluster.nodes:
        reload(node, files[node.name] + section("", "[services.static]", WEB))
    assert shown(cluster.node)["addresses"] == []
    assert shown(cluster.node)["pending"] == [{"service": "default/web", "reason": "there is no address pool"}]
    eventually(lambda: not answering(cluster, FIRST))


PINNED = """
[[loadBalancer.ipAddressPools]]
name = "{0}"
addresses = ["{1}"]
serviceAllocation = {{ namespaces = ["default"], priority = {2} }}
"""


@metallb("IPV4 - Validate service allocation in address pools with namespace")
@metallb("IPV4 removing pools reallocates svc after deleting a pool")
def test_pools_for_a_namespace_are_first_by_priority_and_one_that_goes_moves_its_service(cluster, files):
    text = "".join(section("", "[services.static]", each) for each in (WEB, DB, LATE))
    for node in cluster.nodes:
        reload(node, files[node.name])
    pinned = [PINNED.format("none", "192.0.2.230", 0), PINNED.format("b", "192.0.2.231", 20)]
    pinned += [PINNED.format("a", "192.0.2.232", 10)]
    for node in cluster.nodes:
        reload(node, files[node.name] + text + POOLS + "".join(pinned))
    before = {"web": "192.0.2.232", "db": "192.0.2.231", "late": "192.0.2.230"}
    assert [having(node) for node in cluster.nodes] == [before] * 2
    for node in cluster.nodes:
        reload(node, files[node.name] + text + POOLS + "".join(pinned[:2]))
    assert [having(node) for node in cluster.nodes] == [before | {"web": FIRST}] * 2


@metallb("A service with loadbalancer class should not get an ip", "loadbalancer_class.go")
def test_a_service_of_a_class_gets_no_address_and_is_not_announced(cluster, files):
    others = {"loadBalancerClass": "example.com/lb"}
    waiting = balanced("theirs", "10.96.0.7", **others)
    by_hand = balanced("given", "10.96.0.8", port(81), loadBalancerIPs=[SECOND], **others)
    have(cluster, files, waiting, by_hand, WEB)
    assert having(cluster.node) == {"web": FIRST}
    assert shown(cluster.node)["pending"] == []
    assert len(answering(cluster, FIRST)) == 1
    assert answering(cluster, SECOND) == set()


def test_only_a_node_that_an_advertisement_selects_announces(cluster, files):
    services = section("", "[services.static]", WEB)
    first, other = cluster.nodes
    for chosen in (first, other):
        for node in cluster.nodes:
            own, peer = ("edge", "core") if node is chosen else ("core", "edge")
            text = section(files[node.name], "node", {"labels": {"role": own}})
            text = text.replace("[[peers]]\n", f'[[peers]]\nlabels = {{ role = "{peer}" }}\n')
            reload(node, text + services + POOLS + EDGE)
        assert [row["owner"] for row in shown(first)["addresses"]] == [chosen.name]
        eventually(partial(_answers_only, cluster, chosen.name))


def _answers_only(cluster: Cluster, node: str) -> bool:
    return answering(cluster, FIRST) == {mac(cluster, node)}
