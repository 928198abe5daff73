"""A node from start to end: what it says, what it takes, what it gives back, and what it refuses.

┌── pod a ──────────┐     ┌── pod b ──────────┐
│ eth0 10.244.1.10  │     │ eth0 10.244.1.20  │
└──────┬────────────┘     └──────┬────────────┘
       └──────── dataplane ──────┘
                     │ eth0 192.0.2.11     (in the namespace "host"; its other end is "far")
"""

import json
import os
import re
import signal
import socket
import stat

import pytest

from tests.netns import checks
from tests.netns.harness import RUN, Namespace, Network, Node, eventually, left_over
from tests.netns.ours import assert_balanced, config, member

pytestmark = pytest.mark.netns

A, B, C = "10.244.1.10", "10.244.1.20", "10.244.1.30"
PODS = {"a": A, "b": B}
PATIENCE = 120.0  # a start that has to compile the kernels first


@pytest.fixture(scope="module")
def host(network: Network) -> Namespace:
    made, far = network.namespace("host"), network.namespace("far")
    network.wire((made, "eth0"), (far, "eth0"))
    made.ip("address", "add", "192.0.2.11/24", "dev", "eth0")
    return made


@pytest.fixture
def node(network: Network, host: Namespace):
    """A node that is not running, before and after the test."""
    made = network.node(host, "node1", text(network, PODS))
    yield made
    if made.process is not None and made.process.running:
        made.stop()
    assert made_by_nodes(network) == []


def text(network: Network, pods: dict[str, str]) -> str:
    return config(member(network, 1), pods).replace("{prefix}", network.prefix)


def made_by_nodes(network: Network) -> list[str]:
    """Return the files and namespaces of our prefix that are not the test's own."""
    mine = {str(network.pod(name).path) for name in ("host", "far")}
    return [path for path in left_over(network.prefix) if path not in mine]


def look(namespace: Namespace) -> list[str]:
    """Return everything that a node could have changed in a namespace."""
    views = [
        namespace.ip("-details", *words)
        for words in (("link",), ("address",), ("route", "show", "table", "all"), ("rule",))
    ]
    settings = namespace.run(
        "sh", "-c", "cd /proc/sys/net && grep -r . ipv4/conf ipv4/ip_forward ipv6/conf core 2>/dev/null; true"
    )
    return [*views, *sorted(settings.splitlines())]


def routes(node: Node) -> list[str]:
    return sorted(node.cli("show", "routes", "-o", "iproute").splitlines())


# --- start and stop --------------------------------------------------------------------------------------------------


def test_ready_is_said_once_and_then_packets_flow(node, network):
    node.launch().expect(r"\bready\b", PATIENCE)
    checks.ping(network.pod("a"), B)
    assert sum("ready" in line for line in node.log) == 1, node.log


def test_systemd_is_told(node, network, tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(PATIENCE)
        node.launch("env", f"NOTIFY_SOCKET={path}")
        assert b"READY=1" in systemd.recv(4096).splitlines()
        checks.ping(network.pod("a"), B)
        assert node.stop() == 0
        assert b"STOPPING=1" in systemd.recv(4096).splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stopped_node_leaves_nothing(node, network, host, number):
    before = look(host)
    node.start()
    checks.ping(network.pod("a"), B)
    assert made_by_nodes(network) != []
    node.process.send(number)
    assert node.process.wait(10) == 0
    assert made_by_nodes(network) == []
    assert look(host) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_first_start_can_be_interrupted_while_it_compiles(node, network, tmp_path, number):
    started = node.launch("env", f"XDG_CACHE_HOME={tmp_path}")
    started.expect("compiling kernels")
    started.send(number)
    assert started.wait(5) == 0, started.output
    assert "Traceback" not in started.output, started.output
    assert made_by_nodes(network) == []


def test_a_node_that_was_stopped_starts_again(node, network):
    for _ in range(3):
        node.start()
        checks.ping(network.pod("a"), B, count=3)
        assert node.stop() == 0


def test_the_node_says_what_it_is(node, host):
    node.start()
    status = node.status()
    assert (status["name"], status["pid"] > 0, status["ready"], status["pods"]) == (node.name, True, True, 2)
    assert stat.S_IMODE(os.stat(node.socket).st_mode) == 0o660
    names = [interface["name"] for interface in node.show("interfaces")["interfaces"]]
    assert "eth0" in names
    assert sum(name.startswith("cali") for name in names) == 2
    for view in ("interfaces", "routes", "arp", "vteps", "drops", "counters", "pipeline"):
        assert node.cli("show", view)
        json.loads(node.cli("show", view, "-o", "json"))
    assert_balanced(node)


def test_metrics_are_served_to_prometheus_in_the_nodes_namespace(node, network, host):
    node.write(text(network, PODS) + '[metrics]\nlisten = "127.0.0.1:9091"\n')
    node.start()
    checks.ping(network.pod("a"), B)
    scraped = host.run("curl", "-sS", "--fail", "http://127.0.0.1:9091/metrics")
    assert re.search(r"^# TYPE \w+ counter$", scraped, re.MULTILINE), scraped
    asked = node.namespace.run("curl", "-sS", "--fail", "--unix-socket", node.socket, "http://localhost/metrics")
    assert {line.split("{")[0].split(" ")[0] for line in asked.splitlines()} == {
        line.split("{")[0].split(" ")[0] for line in scraped.splitlines()
    }


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_what_a_killed_node_left_is_cleaned_up_by_the_next_start(node, network, host):
    before = look(host)
    node.start()
    network.pod("a").ip("route", "add", "blackhole", "198.51.100.0/24")
    node.kill()
    assert network.pod("a").path.exists()
    assert node.journal.exists()
    node.start()
    assert "198.51.100.0" not in network.pod("a").ip("route")  # the namespace is a new one
    checks.ping(network.pod("a"), B)
    assert node.stop() == 0
    assert made_by_nodes(network) == []
    assert look(host) == before


def test_a_node_that_is_killed_again_and_again_comes_back(node, network):
    for _ in range(3):
        node.start()
        node.kill()
    node.start()
    checks.ping(network.pod("a"), B)


def test_a_node_that_is_killed_while_it_starts_is_cleaned_up(node, network):
    for _ in range(3):
        node.launch()
        eventually(network.pod("a").path.exists, PATIENCE)
        node.kill()
    node.start()
    checks.ping(network.pod("a"), B)


def test_a_pod_that_is_gone_from_the_configuration_is_cleaned_up_after_a_crash(node, network):
    node.start()
    node.kill()
    node.write(text(network, {"a": A}))
    node.start()
    assert not network.pod("b").path.exists()


# --- namespaces ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lived_in(network: Network):
    """A namespace that was there before the node."""
    made = network.namespace("a")
    made.ip("route", "add", "blackhole", "198.51.100.0/24")
    yield made
    assert made.path.exists()
    network.remove(made)


@pytest.mark.parametrize("how", ["name", "path"])
def test_a_namespace_that_exists_is_used_and_left_as_it_was(node, network, lived_in, how):
    before = look(lived_in)
    if how == "path":
        node.write(text(network, PODS).replace(f'"{lived_in.name}"', f'"{lived_in.path}"'))
    node.start()
    checks.ping(lived_in, B)
    assert node.stop() == 0
    assert look(lived_in) == before
    assert not network.pod("b").path.exists()
    assert made_by_nodes(network) == [str(lived_in.path)]


def test_a_namespace_that_exists_survives_a_crash_of_the_node(node, network, lived_in):
    node.start()
    node.kill()
    node.start()
    checks.ping(lived_in, B)
    assert "blackhole 198.51.100.0/24" in lived_in.ip("route")
    assert node.stop() == 0


# --- reload ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["SIGHUP", "reload"])
def test_a_reload_adds_and_removes_pods(node, network, way):
    node.start()
    before = routes(node)

    def apply(pods: dict[str, str]) -> None:
        start = len(node.log)
        node.write(text(network, pods))
        if way == "reload":
            assert "OK" in node.cli("reload")
        else:
            node.hang_up()
            node.process.expect("configuration reloaded", start=start)

    apply(PODS | {"c": C})
    checks.ping(network.pod("c"), A)
    checks.ping(network.pod("a"), C)
    apply(PODS)
    assert not network.pod("c").path.exists()
    assert routes(node) == before
    checks.ping(network.pod("a"), B)


BAD = """
apiVersion = "dataplane/v1"
kind = "Node"
[node]
name = "{name}"
adresses = ["192.0.2.11"]
[pods]
cidr = ["10.244.1.0/24"]
[[pods.static]]
name = "a"
netns = "{prefix}a"
ip = ["10.244.9.10"]
"""


def test_a_bad_file_is_refused_whole_with_every_error(node, network):
    node.start()
    before = routes(node), node.show("interfaces")["interfaces"]
    node.write(BAD.format(name=node.name, prefix=network.prefix))
    output, code = node.fail("reload")
    assert code == 2
    assert re.search(rf"{re.escape(str(node.config))}:6: node\.adresses", output), output
    assert "addresses" in output  # the nearest key
    assert "10.244.9.10" in output
    start = len(node.log)
    node.hang_up()
    node.process.expect("refused", start=start)
    after = routes(node), node.show("interfaces")["interfaces"]
    assert after[0] == before[0]
    assert [each["name"] for each in after[1]] == [each["name"] for each in before[1]]
    checks.ping(network.pod("a"), B)


def test_a_change_that_needs_a_restart_is_refused_whole(node, network):
    node.start()
    before = routes(node)
    node.write(text(network, PODS | {"c": C}) + "\n")
    changed = node.config.read_text().replace('mode = "Always"', 'mode = "Always"\nvni = 4097')
    node.write(changed)
    output, code = node.fail("reload")
    assert code == 2, output
    assert "vni" in output, output
    assert routes(node) == before
    assert not network.pod("c").path.exists()


def test_a_pod_that_cannot_be_made_refuses_the_reload_whole(node, network):
    node.start()
    before = routes(node)
    node.write(
        text(network, PODS | {"c": C, "d": "10.244.1.40"}).replace(f'"{network.prefix}d"', '"/no-such-folder/pod"')
    )
    output, code = node.fail("reload")
    assert code == 2, output
    assert "/no-such-folder/pod" in output, output
    assert routes(node) == before
    assert not network.pod("c").path.exists()
    checks.ping(network.pod("a"), B)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_second_node_of_the_same_name_is_refused(node, network):
    node.start()
    second = network.node(node.namespace, "node1", text(network, PODS)).launch()
    second.expect(rf"already running as process {node.status()['pid']}")
    assert second.wait() == 1
    checks.ping(network.pod("a"), B)


def test_a_bad_file_ends_the_start_with_2(node, network):
    node.write(BAD.format(name=node.name, prefix=network.prefix))
    assert node.launch().wait() == 2
    assert "node.adresses" in node.process.output
    assert made_by_nodes(network) == []


def test_asking_a_node_that_does_not_run_ends_with_3(node):
    for command in (["status"], ["show", "drops"], ["reload"]):
        output, code = node.fail(*command)
        assert code == 3, output


@pytest.mark.parametrize("capability", ["net_admin", "sys_admin", "net_raw"])
def test_a_start_without_permission_ends_with_5_and_names_the_capability(node, network, capability):
    started = node.launch("setpriv", f"--bounding-set=-{capability}")
    assert started.wait(PATIENCE) == 5, started.output
    assert f"CAP_{capability.upper()}" in started.output
    assert made_by_nodes(network) == []


def test_a_pod_namespace_that_has_an_eth0_already_fails_the_start_and_leaves_nothing(node, network, host):
    taken = network.namespace("b")
    try:
        network.wire((taken, "eth0"), (network.pod("far"), "spare"))
        before = look(host)
        started = node.launch()
        assert started.wait(PATIENCE) == 1
        assert f"namespace {taken.path}: add eth0: an interface eth0 already exists in it" in started.output
        assert made_by_nodes(network) == [str(taken.path)]
        assert look(host) == before
    finally:
        network.remove(taken)


def test_an_uplink_that_does_not_exist_fails_the_start_and_leaves_nothing(node, network):
    node.write(text(network, PODS).replace('interface = "eth0"', 'interface = "eth7"'))
    started = node.launch()
    assert started.wait(PATIENCE) == 1, started.output
    assert "eth7" in started.output
    assert made_by_nodes(network) == []
    assert not list(RUN.glob(f"{network.prefix}*"))
