"""Containers come and go by the plugin, as a runtime calls it; the node is real, and so are the packets.

┌── c1 ─────────────┐  ┌── c2, c3 ... ─────┐  ┌── pod web ────────┐
│ eth0 10.244.1.x   │  │ eth0 10.244.1.y   │  │ eth0 10.244.1.5   │  10.96.0.20:80 -> 10.244.1.5:8080
└──────┬────────────┘  └──────┬────────────┘  └──────┬────────────┘
       └──────────────── dataplane ──────────────────┘
"""

import json
import os
import re
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import pytest

from dataplane.cni import (
    EXHAUSTED,
    EXISTS,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    IO_FAILURE,
    MISMATCH,
    TRY_AGAIN_LATER,
    UNKNOWN_CONTAINER,
)
from tests.netns import checks
from tests.netns.containers import CIDR, GATEWAY, SERVICE, WEB, PluginError, Runtime, address_of, container_node
from tests.netns.harness import RUN, Namespace, Network, Node, eventually
from tests.netns.ours import assert_balanced

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def shared(network: Network) -> Node:
    return container_node(network)


@pytest.fixture
def node(shared: Node):
    """A node that runs, and that has no container before and after the test."""
    if shared.process is None or not shared.process.running:
        shared.start()
    return shared


@pytest.fixture
def runtime(node: Node, tmp_path):
    made = Runtime(node, tmp_path)
    yield made
    left = attached(node)
    if left:
        made.collect()
    assert left == {}
    eventually(lambda: not files(node), timeout=20)


@pytest.fixture
def container(network: Network, node: Node):
    made = network.namespace("c1")
    yield made
    network.remove(made)


@pytest.fixture
def other(network: Network, node: Node):
    made = network.namespace("c2")
    yield made
    network.remove(made)


def attached(node: Node) -> dict[str, str]:
    """Return the node's pods but the one of its file, and their addresses."""
    found = [each for each in node.show("interfaces")["interfaces"] if each["role"] == "pod"]
    routes = {each["dev"]: each["prefix"].removesuffix("/32") for each in node.show("routes")["routes"]}
    return {each["pod"]: routes.get(each["name"], "") for each in found if each["pod"] != "default/web"}


def files(node: Node) -> list[str]:
    """Return what of the node's files only containers can cause."""
    return [path.name for path in RUN.glob(f"{node.name}*") if path not in (node.socket, node.journal)]


def interfaces(namespace: Namespace) -> list[str]:
    return re.findall(r"^\d+: ([^:@]+)", namespace.ip("-o", "link"), re.MULTILINE)


# --- ADD -------------------------------------------------------------------------------------------------------------


def test_an_added_container_is_a_pod(node, runtime, container):
    result = runtime.add(container, args="IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0")
    address = address_of(result)
    assert address.startswith(CIDR)
    assert attached(node) == {"shop/cart-0": address}
    [interface] = result["interfaces"]
    assert (interface["name"], interface["sandbox"], interface["mtu"]) == ("eth0", str(container.path), 1450)
    shown = container.ip("address", "show", "dev", "eth0")
    assert interface["mac"] in shown
    assert f"inet {address}/32" in shown
    assert result["ips"] == [{"address": f"{address}/32", "gateway": GATEWAY, "interface": 0}]
    assert result["routes"] == [{"dst": "0.0.0.0/0", "gw": GATEWAY}]
    checks.gateway_answers_arp(container)
    checks.ping(container, WEB)
    runtime.delete(container)
    assert interfaces(container) == ["lo"]
    assert_balanced(node)


def test_a_container_reaches_a_service_and_pods_reach_the_container(network, node, runtime, container):
    address = address_of(runtime.add(container))
    web = network.pod("web")
    server = web.spawn("python3", "-m", "http.server", "8080", "--directory", "/proc/self/net")
    eventually(lambda: "8080" in web.run("ss", "-ltn"))
    assert "Directory listing" in container.run("curl", "-sS", "--fail", f"http://{SERVICE}/")
    checks.ping(web, address)
    server.stop()
    runtime.delete(container)


def test_an_interface_may_have_any_name(node, runtime, container):
    address = address_of(runtime.add(container, ifname="net-7"))
    assert interfaces(container) == ["lo", "net-7"]
    assert address in container.ip("address", "show", "dev", "net-7")
    assert (
        address_of({"ips": [{"address": container.ip("-o", "-4", "address", "show", "net-7").split()[3]}]}) == address
    )
    runtime.delete(container, ifname="net-7")
    assert interfaces(container) == ["lo"]


def test_a_second_add_is_an_error_and_changes_nothing(node, runtime, container):
    before = attached(node)
    result = runtime.add(container)
    for keys in ({}, {"ifname": "eth1"}):
        with pytest.raises(PluginError) as caught:
            runtime.add(container, **keys)
        assert caught.value.code == EXISTS
    with pytest.raises(PluginError, match="eth0 already exists"):
        runtime.add(container, name="another-container")
    checks.ping(container, WEB, count=2)
    assert list(attached(node).values()) == [address_of(result)]
    runtime.delete(container)
    assert attached(node) == before


def test_an_interface_of_somebody_else_is_an_error_and_nothing_is_left(network, node, runtime, container, other):
    network.wire((container, "eth0"), (other, "eth0"))
    with pytest.raises(PluginError) as caught:
        runtime.add(container)
    assert caught.value.code == EXISTS
    container.ip("link", "delete", "eth0")
    first, second = address_of(runtime.add(container)), address_of(runtime.add(other))
    assert first != second
    runtime.delete(container)
    runtime.delete(other)


@pytest.mark.parametrize(
    ("path", "code"),
    [("/run/netns/no-such-namespace", UNKNOWN_CONTAINER), ("/proc/self/ns/mnt", INVALID_ENVIRONMENT),
     ("/etc/passwd", INVALID_ENVIRONMENT), ("/proc/self/ns/user", INVALID_ENVIRONMENT)],
)  # fmt: skip
def test_what_is_no_namespace_is_refused_and_never_made(node, runtime, path, code):
    existed = os.path.exists(path)
    with pytest.raises(PluginError) as caught:
        runtime.call("ADD", "c1", path)
    assert caught.value.code == code
    assert os.path.exists(path) == existed


def test_the_nodes_own_namespace_is_refused(node, runtime):
    with pytest.raises(PluginError, match="the node's own namespace") as caught:
        runtime.call("ADD", "c1", node.namespace.path)
    assert caught.value.code == INVALID_ENVIRONMENT


def test_an_address_and_a_mac_can_be_asked_for(node, runtime, container, other):
    wish = {"ips": ["10.244.1.77/24"], "mac": "02:00:00:00:07:07"}
    result = runtime.add(container, runtimeConfig=wish)
    assert (address_of(result), result["interfaces"][0]["mac"]) == ("10.244.1.77", "02:00:00:00:07:07")
    checks.ping(container, WEB, count=2)
    for wanted, code in (("10.244.1.77", INVALID_CONFIG), (WEB, INVALID_CONFIG), ("10.9.9.9", EXHAUSTED)):
        with pytest.raises(PluginError) as caught:
            runtime.add(other, runtimeConfig={"ips": [wanted]})
        assert caught.value.code == code, wanted
    assert list(attached(node).values()) == ["10.244.1.77"]
    runtime.delete(container)
    assert address_of(runtime.add(other, runtimeConfig={"ips": ["10.244.1.77"]})) == "10.244.1.77"
    runtime.delete(other)


def test_a_new_sandbox_of_a_pod_takes_the_place_of_the_old_one(node, runtime, container, other):
    pod = {"args": "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db-0"}
    runtime.add(container, **pod)
    address = address_of(runtime.add(other, **pod))
    assert attached(node) == {"shop/db-0": address}
    assert interfaces(container) == ["lo"]
    runtime.delete(container, **pod)  # late, and no longer about this pod
    assert attached(node) == {"shop/db-0": address}
    checks.ping(other, WEB, count=2)
    runtime.delete(other, **pod)


def test_fifty_containers_at_once(network, node, runtime):
    made = [network.namespace(f"m{number}") for number in range(50)]
    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(runtime.add, made))
        addresses = [address_of(result) for result in results]
        assert len(set(addresses)) == 50
        assert WEB not in addresses
        assert sorted(attached(node).values()) == sorted(addresses)
        list(pool.map(lambda each: checks.ping(each, WEB, count=1), made[::7]))
        checks.ping(made[0], addresses[-1], count=2)
        list(pool.map(runtime.delete, [*made, *made]))  # each twice, at once
    assert all(interfaces(each) == ["lo"] for each in made)
    for each in made:
        network.remove(each)
    assert_balanced(node)


def test_one_bad_container_among_many_is_refused_alone(network, node, runtime):
    made = [network.namespace(f"b{number}") for number in range(8)]
    network.remove(made[3])
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(runtime.add, each) for each in made]
        failed = [number for number, future in enumerate(futures) if future.exception() is not None]
    assert failed == [3]
    assert len(attached(node)) == 7
    for number, each in enumerate(made):
        runtime.delete(each)
        if number != 3:
            network.remove(each)


# --- DEL, CHECK, GC, STATUS ------------------------------------------------------------------------------------------


def test_del_succeeds_whatever_is_left(network, node, runtime, container):
    runtime.call("DEL", "never-seen", "/run/netns/never-was")
    runtime.add(container)
    runtime.call("DEL", container.name)  # no namespace, no prevResult
    runtime.delete(container)
    assert interfaces(container) == ["lo"]
    gone = network.namespace("gone")
    runtime.add(gone)
    network.remove(gone)
    runtime.delete(gone)
    assert attached(node) == {}


def test_check_finds_what_is_missing(node, runtime, container):
    result = runtime.add(container)
    assert runtime.call("CHECK", container.name, container.path, prevResult=result) == {}

    def differs(words: str) -> None:
        with pytest.raises(PluginError, match=words) as caught:
            runtime.call("CHECK", container.name, container.path, prevResult=result)
        assert caught.value.code == MISMATCH

    container.ip("route", "delete", "default")
    differs(f"no default route by {GATEWAY}")
    container.ip("route", "add", "default", "via", GATEWAY)
    container.ip("address", "delete", f"{address_of(result)}/32", "dev", "eth0")
    differs("no address")
    container.ip("link", "set", "eth0", "mtu", 1400, "down")
    differs("it is down; its MTU is 1400")
    with pytest.raises(PluginError, match=r"prevResult\.ips"):
        runtime.call("CHECK", container.name, container.path, prevResult=result | {"ips": []})
    with pytest.raises(PluginError) as caught:
        runtime.call("CHECK", "another", container.path, prevResult=result)
    assert caught.value.code == UNKNOWN_CONTAINER
    runtime.delete(container)


def test_gc_removes_what_is_not_listed(node, runtime, container, other):
    kept = address_of(runtime.add(container))
    runtime.add(other)
    runtime.collect(container, name="another-network")
    assert len(attached(node)) == 2
    runtime.collect(container)
    assert list(attached(node).values()) == [kept]
    assert interfaces(other) == ["lo"]
    runtime.collect()
    assert attached(node) == {}


def test_status_says_whether_containers_can_be_added(node, runtime):
    assert runtime.call("STATUS") == {}
    node.stop()
    with pytest.raises(PluginError) as caught:
        runtime.call("STATUS")
    assert caught.value.code == 51
    node.start()


# --- the node ends and starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_containers_keep_their_addresses_when_the_node_starts_again(network, node, runtime, container, other, how):
    gone = network.namespace("gone")
    first, second = runtime.add(container), runtime.add(other, args="K8S_POD_NAME=second")
    runtime.add(gone)
    before = attached(node)
    node.stop() if how == "stop" else node.kill()
    assert interfaces(container) == ["lo"]
    network.remove(gone)
    node.start()
    assert attached(node) == {pod: address for pod, address in before.items() if not pod.endswith("gone")}
    checks.ping(container, WEB)
    checks.ping(other, address_of(first))
    runtime.call("CHECK", container.name, container.path, prevResult=first)
    runtime.call("CHECK", other.name, other.path, prevResult=second)
    books = RUN / f"{node.name}.ipam.json"
    eventually(lambda: json.dumps(json.loads(books.read_text())).count("cni/") == 2, timeout=20)
    runtime.delete(container)
    runtime.delete(other)


def test_a_node_that_is_killed_among_adds_loses_none_that_it_has_confirmed(network, node, runtime):
    made = [network.namespace(f"k{number}") for number in range(24)]
    with ThreadPoolExecutor(len(made)) as pool:
        adding = {each.name: pool.submit(runtime.add, each) for each in made}
        wait(adding.values(), return_when=FIRST_COMPLETED)
        node.kill()
    confirmed = {name: address_of(each.result()) for name, each in adding.items() if each.exception() is None}
    assert confirmed
    failures = [failure for each in adding.values() if (failure := each.exception()) is not None]
    assert all(isinstance(each, PluginError) and each.code in (TRY_AGAIN_LATER, IO_FAILURE) for each in failures)
    node.start()
    there = {pod.partition("/")[2]: address for pod, address in attached(node).items()}
    assert there.items() >= confirmed.items()
    assert len(set(there.values())) == len(there)
    for each in made:
        if each.name in confirmed:
            checks.ping(each, WEB, count=1)
        runtime.delete(each)
        assert interfaces(each) == ["lo"]
        network.remove(each)


def test_a_namespace_at_the_path_of_another_is_not_touched(network, node, runtime):
    made = network.namespace("again")
    runtime.add(made)
    node.kill()
    network.remove(made)
    made = network.namespace("again")
    node.start()
    assert attached(node) == {}
    assert interfaces(made) == ["lo"]
    runtime.delete(made)
    network.remove(made)
    eventually(lambda: not files(node), timeout=20)


def test_a_reload_keeps_containers_and_refuses_a_pod_with_their_address(node, runtime, container):
    address = address_of(runtime.add(container))
    node.cli("reload")
    checks.ping(container, WEB, count=2)
    node.write(node.config.read_text().replace('ip = ["10.244.1.5"]', f'ip = ["{address}"]'))
    output, code = node.fail("reload")
    assert code == 2
    assert address in output
    node.write(node.config.read_text().replace(f'ip = ["{address}"]', 'ip = ["10.244.1.5"]'))
    node.cli("reload")
    checks.ping(container, WEB, count=2)
    runtime.delete(container)


def test_an_interface_that_somebody_deletes_comes_back(node, runtime, container):
    runtime.add(container)
    container.ip("link", "delete", "eth0")
    node.process.expect("pod restored")
    checks.ping(container, WEB, count=2)
    runtime.delete(container)
