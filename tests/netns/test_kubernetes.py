"""Two nodes that know each other, their services and their addresses from an API server, and from nothing else.

a 10.244.1.10 ── node1 .11 ─────┐
b 10.244.2.10, ─ node2 .12 ─────┼── br0, 192.0.2.0/24
c 10.244.2.20                   │
api server .5, HTTPS, a token ──┤
ext .100, no node ──────────────┘
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.kube_items import KIND, advertisement, endpoints, namespace, node, pool, service
from tests.kube_store import Object
from tests.netns import checks
from tests.netns.harness import READY_TIMEOUT, ROOT, Namespace, Network, Node, Process, eventually
from tests.netns.ours import assert_balanced
from tests.netns.services import HTTP, SERVED, serve
from tests.netns.sockets import ask_tcp, names

pytestmark = pytest.mark.netns

A, B, C, EXT, API = "10.244.1.10", "10.244.2.10", "10.244.2.20", "192.0.2.100", "192.0.2.5"
TOKEN = "secret"
LOAD = ["3000", "16", "0", "536", "4096"]
FILE = """
[node]
name = "{prefix}node%d"
[uplink]
interface = "eth0"
[services]
clusterCIDR = ["10.244.0.0/16"]
serviceCIDR = ["10.96.0.0/16"]
[state]
source = "kubernetes"
kubernetes = { kubeconfig = "%s" }
"""
POD = """
[[pods.static]]
name = "%s"
netns = "{prefix}%s"
ip = ["%s"]
"""


class Control:
    """The server's control socket: the same API, without a token, and a few words more."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, method: str, path: str, body: Object | None = None) -> tuple[int, Any]:
        """Send a request; return the status and what was answered."""
        connection = HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self._path))
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def put(self, item: Object) -> None:
        """Create an object, or replace it, its status too."""
        base, one = paths(item)
        status, answer = self.ask("POST", base, item)
        if status == 409:
            status, answer = self.ask("PUT", one, item)
            if status == 200 and "status" in item:
                status, answer = self.ask("PUT", f"{one}/status", item)
        assert status in (200, 201), answer

    def get(self, item: Object) -> Object:
        """Return an object as it is now."""
        status, answer = self.ask("GET", paths(item)[1])
        assert status == 200, answer
        return dict(answer)

    def do(self, what: str) -> None:
        """Have the server do something: ``compact``, ``cut``, ``restart?seconds=N``."""
        status, answer = self.ask("POST", f"/control/{what}")
        assert status == 200, answer


def paths(item: Object) -> tuple[str, str]:
    """Return the path of an object's collection, and its own."""
    kind, metadata = KIND[item["kind"]], item["metadata"]
    root = f"/apis/{kind.group}/{kind.versions[0]}" if kind.group else f"/api/{kind.versions[0]}"
    base = f"{root}/namespaces/{metadata['namespace']}" if metadata.get("namespace") else root
    return f"{base}/{kind.plural}", f"{base}/{kind.plural}/{metadata['name']}"


@dataclass
class World:
    """Everything that there is."""

    control: Control
    nodes: list[Node]
    hosts: list[Namespace]
    pods: dict[str, Namespace]
    ext: Namespace

    def load(self, address: str) -> Process:
        """Open many connections to a service, one after the other; all must succeed."""
        client = self.pods["a"]
        return client.spawn(*client.tool("../netexec", "load", address, 80, *LOAD))

    def wait_until_connected(self) -> None:
        """Wait until every node says that the server answers."""
        for each in self.nodes:
            eventually(lambda: each.show("cluster")["connected"], 60)  # noqa: B023

    def wait_for(self, addresses: list[str], name: str) -> None:
        """Wait until every node has these endpoints of a service."""
        for each in self.nodes:
            eventually(lambda: self._endpoints(each, name) == addresses, 30)  # noqa: B023

    def _endpoints(self, of: Node, name: str) -> list[str]:
        rows = json.loads(of.cli("show", "endpoints", "-o", "json"))["endpoints"]
        return sorted(row["address"] for row in rows if (row["service"], row["state"]) == (f"default/{name}", "ready"))


def owners(asking: Namespace, address: str) -> set[str]:
    """Return the MACs that answer an ARP request."""
    answers = asking.run("arping", "-c", 2, "-W", 0.2, "-i", "eth0", address, check=False)
    return {line.split()[3] for line in answers.splitlines() if "bytes from" in line}


def certificate(folder: Path) -> tuple[Path, str]:
    """Make a certificate for the server; return the file with its key, and the certificate alone."""
    made, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kubernetes",
         "-addext", f"subjectAltName=IP:{API}", "-keyout", key, "-out", made],
        check=True, capture_output=True,
    )  # fmt: skip
    both = folder / "both.pem"
    both.write_text(made.read_text() + key.read_text())
    return both, made.read_text()


def kubeconfig(folder: Path, authority: str) -> Path:
    """Write the file that the nodes are given."""
    (folder / "ca.pem").write_text(authority)
    path = folder / "kubeconfig"
    path.write_text(f"""
apiVersion: v1
kind: Config
current-context: test
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
clusters: [{{name: test, cluster: {{server: "https://{API}:6443", certificate-authority: ca.pem}}}}]
users: [{{name: test, user: {{token: {TOKEN}}}}}]
""")
    return path


@pytest.fixture(scope="module")
def world(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("kubernetes")
    both, authority = certificate(folder)
    ext, api = network.namespace("ext"), network.namespace("api")
    hosts = [network.namespace("host1"), network.namespace("host2")]
    network.lan((ext, f"{EXT}/24"), (api, f"{API}/24"), (hosts[0], "192.0.2.11/24"), (hosts[1], "192.0.2.12/24"))
    control = Control(folder / "control.sock")
    command = network.own(
        Process(
            api.command(
                *(
                    sys.executable,
                    "-m",
                    "tests.kube_server",
                    "--listen",
                    f"{API}:6443",
                    "--control",
                    folder / "control.sock",
                ),
                *("--token", TOKEN, "--certificate", both),
            ),
            cwd=ROOT,
        )
    )
    command.expect("ready")
    config = kubeconfig(folder, authority)
    pods = {1: POD % ("a", "a", A), 2: POD % ("b", "b", B) + POD % ("c", "c", C)}
    nodes = [network.node(host, f"node{n}", FILE % (n, config) + pods[n]) for n, host in enumerate(hosts, 1)]
    control.put(namespace())
    control.put(node(nodes[0].name, 1))
    for each in nodes:
        each.launch()
    assert nodes[1].process is not None
    nodes[1].process.expect(f"waiting for an InternalIP of the Node {nodes[1].name}", READY_TIMEOUT)
    control.put(node(nodes[1].name, 2))
    for each in nodes:
        assert each.process is not None
        each.process.expect(r"\bready\b", READY_TIMEOUT)
        eventually(each.socket.exists, 30)
    spaces = {name: network.pod(name) for name in ("a", "b", "c")}
    for name in ("b", "c"):
        serve(spaces[name], name, *SERVED)
    yield World(control, nodes, hosts, spaces, ext)
    for each in nodes:
        assert_balanced(each)


def test_pods_talk_across_nodes_that_know_each_other_from_their_node_objects(world):
    checks.ping(world.pods["a"], B)
    assert ask_tcp(world.pods["a"], B, HTTP).seen[0] == A
    for each in world.nodes:
        status = json.loads(each.cli("cluster", "status", "-o", "json"))
        assert (status["source"], status["where"], status["connected"]) == ("kubernetes", f"https://{API}:6443", True)
        assert [(one["name"], one["alive"]) for one in status["nodes"]] == [(node.name, True) for node in world.nodes]


def test_a_service_works_from_a_pod_and_from_a_node(world):
    world.control.put(service("web", "10.96.0.20"))
    world.control.put(endpoints("web-1", "web", [B, C], HTTP))
    world.wait_for([B, C], "web")
    assert set(names(world.pods["a"], "tcp", ("10.96.0.20", 80), 4)) == {"b", "c"}
    assert set(names(world.hosts[0], "tcp", ("10.96.0.20", 80), 4)) == {"b", "c"}


def test_an_edit_is_refused_with_the_tool_to_use(world):
    text, code = world.nodes[0].fail("service", "delete", "web")
    assert "change them with kubectl" in text
    assert code != 0


def test_no_connection_fails_while_endpoints_change_and_the_server_cuts_and_forgets(world):
    world.control.put(service("busy", "10.96.0.21"))
    world.control.put(endpoints("busy-1", "busy", [B], HTTP))
    world.wait_for([B], "busy")
    load, edits = world.load("10.96.0.21"), 0
    while load.running:
        world.control.put(endpoints("busy-1", "busy", [B, C][: 1 + edits % 2], HTTP))
        if edits % 5 == 0:
            world.control.do("compact")
            world.control.do("cut")
        edits += 1
    assert load.wait(120) == 0, load.output
    served = json.loads(load.output)
    assert sum(served.values()) == 3000
    assert served["c"] > 0
    assert edits > 5
    world.control.put(endpoints("busy-1", "busy", [C], HTTP))
    world.wait_for([C], "busy")


def test_a_server_that_is_away_disturbs_no_flow_and_is_followed_again_when_it_is_back(world):
    world.control.put(service("calm", "10.96.0.22"))
    world.control.put(endpoints("calm-1", "calm", [B, C], HTTP))
    world.wait_for([B, C], "calm")
    world.wait_until_connected()
    start = [len(each.log) for each in world.nodes]
    load = world.load("10.96.0.22")
    world.control.do("restart?seconds=2")
    for each, line in zip(world.nodes, start, strict=True):
        assert each.process is not None
        each.process.expect("api server away, the node goes on with what it knows", start=line)
    world.control.do("compact")
    assert load.wait(120) == 0, load.output
    assert sum(json.loads(load.output).values()) == 3000
    world.control.put(endpoints("calm-1", "calm", [C], HTTP))
    world.wait_for([C], "calm")
    for each, line in zip(world.nodes, start, strict=True):
        assert each.process is not None
        each.process.expect("api server answers again", start=line)
    assert set(names(world.pods["a"], "tcp", ("10.96.0.22", 80), 2)) == {"c"}


def test_a_load_balancer_gets_its_address_into_its_status_and_is_reached_from_the_lan(world):
    world.control.put(pool("public", "192.0.2.200-192.0.2.209"))
    world.control.put(advertisement("l2"))
    asked = service("shop", "10.96.0.23", type="LoadBalancer")
    world.control.put(asked)
    world.control.put(endpoints("shop-1", "shop", [B, C], HTTP))

    def given() -> list[str]:
        found = (world.control.get(asked).get("status") or {}).get("loadBalancer") or {}
        return [each["ip"] for each in found.get("ingress") or []]

    assert eventually(given, 60) == ["192.0.2.200"]
    assert len(eventually(lambda: owners(world.ext, "192.0.2.200"), 30)) == 1
    assert set(names(world.ext, "tcp", ("192.0.2.200", 80), 4)) == {"b", "c"}
    assert len(owners(world.ext, "192.0.2.200")) == 1


def test_a_node_that_can_never_reach_a_server_says_why_and_ends(network):
    lost = network.node(network.namespace("lost"), "node9", FILE % (9, "/nowhere/kubeconfig"))
    process = lost.launch()
    assert process.wait(60) == 1
    assert "/nowhere/kubeconfig: the kubeconfig cannot be read: No such file" in process.output
    assert not lost.journal.exists()


def test_a_node_that_ends_leaves_nothing_and_the_other_takes_the_writing_over(world):
    assert world.nodes[0].stop() == 0
    late = service("late", "10.96.0.24", type="LoadBalancer")
    world.control.put(late)
    eventually(lambda: (world.control.get(late).get("status") or {}).get("loadBalancer"), 60)
    assert not world.nodes[0].socket.exists()
    world.nodes[0].start()
    checks.ping(world.pods["a"], B)
