"""A lab's file and what is made of it, without making anything; and the server of its pods."""

import asyncio
import errno
import os
from contextlib import nullcontext
from ipaddress import IPv4Network, ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane import config, lab_machine
from dataplane.devices import journal
from dataplane.devices.namespace import NamespaceError
from dataplane.lab_enter import write_resolv_conf
from dataplane.lab_file import load, parse, toml
from dataplane.lab_look import lines_to_try, table
from dataplane.lab_machine import JOURNAL, is_there, take_away
from dataplane.lab_plan import CLIENT, LAN, Plan
from dataplane.lab_serve import response
from tests.fake_node import dataplane

FILE = """
[cluster]
nodes = 2
[network]
lan = "192.0.2.0/24"
podCIDR = "10.244.0.0/16"
[[pods]]
name = "web"
count = 3
labels = { app = "web", tier = "front" }
serve = 8080
[[pods]]
name = "app"
perNode = 2
labels = { app = "app" }
[[services]]
name = "web"
clusterIPs = ["10.96.0.20"]
ports = [{ port = 80, targetPort = 8080 }]
selector = { app = "web" }
"""


def errors(source: str) -> list[str]:
    """Return the errors of a file, ``line: key: text``; an empty list when it is right."""
    try:
        parse(source, "")
    except config.ConfigError as error:
        return [line.removeprefix(":") for line in error.errors]
    return []


# --- taking away and entering ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resists", ["lab-node1", "pod"])
def test_what_resists_stays_in_the_journals_and_the_next_down_takes_it_away(tmp_path, monkeypatch, resists):
    spaces = tmp_path / "netns"
    folder, nodes = tmp_path / "labs" / "lab", tmp_path / "nodes"
    for path in (spaces, folder, nodes):
        path.mkdir(parents=True)
    monkeypatch.setattr(lab_machine, "NODES", nodes)
    monkeypatch.setattr(lab_machine, "_identities", lambda spaces: nullcontext(frozenset()))
    book, _ = journal.claim(folder / JOURNAL)
    book.record(journal.Namespace(str(spaces / "lab-node1")))
    book.hand_over()
    book, _ = journal.claim(nodes / "lab-node1.journal")
    book.record(journal.Namespace(str(spaces / "pod")))
    book.hand_over()
    (nodes / "lab-node1.cni.json").touch()
    for file in (folder / JOURNAL, nodes / "lab-node1.journal"):  # nobody owns them any more
        file.write_text("".join(line for line in file.read_text().splitlines(True) if '"owner"' not in line))

    def undo(thing: journal.Namespace) -> str:
        if Path(thing.path).name == resists:
            raise NamespaceError(thing.path, "delete", errno.EBUSY)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(journal.Namespace, "undo", undo)
        for _ in range(2):
            assert [resists in line for line in take_away(folder)] == [True]
            assert is_there(folder)
    assert take_away(folder) == []
    assert not folder.exists()
    assert list(nodes.iterdir()) == []


def test_a_program_that_enters_a_pod_does_not_touch_what_an_earlier_one_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "folder", tmp_path)
    plan = parse(FILE, "")
    first = write_resolv_conf(plan, "default")
    with first.open() as mounted:
        os.utime(first, (0, 0))
        assert write_resolv_conf(plan, "default") == first
        assert os.fstat(mounted.fileno()).st_mtime == 0
        assert mounted.read() == first.read_text()
    assert list(tmp_path.iterdir()) == [first]


# --- the plan --------------------------------------------------------------------------------------------------------


def test_pods_are_dealt_out_or_there_are_some_on_each_node():
    plan = parse(FILE, "")
    where = {pod.name: (pod.node, pod.address) for pod in plan.pods}
    assert where == {
        "web-0": ("node1", "10.244.1.10"),
        "web-1": ("node2", "10.244.2.10"),
        "web-2": ("node1", "10.244.1.11"),
        "app-0": ("node1", "10.244.1.12"),
        "app-1": ("node2", "10.244.2.11"),
        "app-2": ("node1", "10.244.1.13"),
        "app-3": ("node2", "10.244.2.12"),
    }
    assert {pod.name for pod in plan.pods if pod.serve} == {"web-0", "web-1", "web-2"}


def test_every_node_can_read_its_file_and_knows_the_others():
    plan = parse(FILE, "", "mine")
    for node, other in zip(plan.nodes, reversed(plan.nodes), strict=True):
        parsed = config.parse(node.text, node.name)
        state = parsed.state
        assert state.node.name == f"mine-{node.name}"
        assert [str(address) for address in state.node.addresses] == [node.address]
        assert [(peer.name, str(peer.address)) for peer in state.peers] == [(f"mine-{other.name}", other.address)]
        assert {pod.netns for pod in state.pods} == {f"mine-{pod.name}" for pod in plan.pods if pod.node == node.name}
        assert parsed.socket == plan.socket(node.name)
        (service,) = state.services
        assert [(str(each.address), each.node, each.hostname) for each in service.endpoints] == [
            ("10.244.1.10", "mine-node1", "web-0"),
            ("10.244.2.10", "mine-node2", "web-1"),
            ("10.244.1.11", "mine-node1", "web-2"),
        ]


def test_a_node_of_etcd_has_neither_peers_nor_services_in_its_file():
    plan = parse(FILE.replace("nodes = 2", 'nodes = 2\nstate = "etcd"'), "")
    parsed = config.parse(plan.nodes[0].text, "")
    assert (parsed.state.peers, parsed.state.services) == ((), ())
    assert (parsed.store.source, parsed.store.endpoints) == ("etcd", (f"http://{plan.switch}:2379",))
    assert [service["name"] for service in plan.services] == ["web"]


POOL = '[[loadBalancer.ipAddressPools]]\nname = "lan"\naddresses = ["{addresses}"]\n'


@pytest.mark.parametrize(("state", "own"), [("static", 1), ("etcd", 0)])
def test_pools_are_in_the_nodes_files_or_for_etcd(state, own):
    source = FILE.replace("nodes = 2", f'nodes = 2\nstate = "{state}"') + POOL.format(
        addresses="192.0.2.200-192.0.2.210"
    )
    plan = parse(source, "")
    assert [pool["name"] for pool in plan.pools] == ["lan"]
    assert len(config.parse(plan.nodes[0].text, "").state.pools) == own
    (error,) = errors(source.replace("192.0.2.210", "192.0.2.20"))
    assert "loadBalancer.ipAddressPools[0].addresses[0]: expected a prefix or a range" in error


def test_a_selector_finds_the_pods_of_its_namespace_with_all_its_labels():
    def endpoints(selector: str, namespace: str = "default") -> int:
        source = FILE.replace('selector = { app = "web" }', f'selector = {selector}\nnamespace = "{namespace}"')
        return len(parse(source, "").services[0].get("endpoints", ()))

    assert endpoints('{ app = "web" }') == 3
    assert endpoints('{ app = "web", tier = "front" }') == 3
    assert endpoints('{ app = "web", tier = "back" }') == 0
    assert endpoints('{ app = "web" }', "other") == 0
    assert endpoints("{}") == 0


def test_the_built_in_example_is_the_one_of_the_page_and_right():
    plan = load()
    assert (plan.name, len(plan.nodes), len(plan.pods)) == ("lab", 3, 6)
    assert {pod.node for pod in plan.pods if pod.serve} == {"node1", "node2", "node3"}


def test_a_plan_survives_as_text():
    plan = load()
    assert Plan.from_json(plan.to_json()) == plan
    for broken in ("", "[]", "{}", '{"nodes": [1]}', '{"nodes": [], "pods": [], "services": [], "color": 1}'):
        with pytest.raises(ValueError, match=r"plan|Expecting"):
            Plan.from_json(broken)


@settings(max_examples=25)
@given(
    st.integers(1, 100), st.integers(0, 300), st.integers(0, 20), st.integers(14, 26),
    st.sampled_from(["192.0.2.0/24", "198.51.100.0/25"]),
)  # fmt: skip
def test_no_two_things_have_one_address_and_all_are_in_their_ranges(nodes, count, per_node, size, lan):
    source = f"""
[cluster]
nodes = {nodes}
[network]
lan = "{lan}"
podCIDR = "10.0.0.0/12"
blockSize = {size}
[[pods]]
name = "a"
count = {count or 1}
[[pods]]
name = "b"
perNode = {per_node or 1}
"""
    wrong = errors(source)
    assert all("room" in line for line in wrong), wrong  # the only thing that may be wrong
    if wrong:
        return
    plan = parse(source, "")
    on_lan = [node.address for node in plan.nodes] + [plan.client, plan.switch]
    assert len(set(on_lan)) == len(on_lan)
    assert all(ip_address(address) in IPv4Network(lan) for address in on_lan)
    addresses = [pod.address for pod in plan.pods]
    assert len(set(addresses)) == len(addresses) == (count or 1) + (per_node or 1) * nodes
    blocks = {node.name: IPv4Network(node.block) for node in plan.nodes}
    assert all(ip_address(pod.address) in blocks[pod.node] for pod in plan.pods)
    assert all(block.subnet_of(IPv4Network("10.0.0.0/12")) for block in blocks.values())
    for node in plan.nodes[:2]:
        config.parse(node.text, node.name)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("nodes = 2", "nodes = 0", "3: cluster.nodes: expected a number from 1 to 100 (got 0)"),
        ("nodes = 2", "node = 2", '3: cluster.node: unknown key; did you mean "nodes"?'),
        ("nodes = 2", 'name = "Lab"', "3: cluster.name: expected a name of up to 31 lower-case letters"),
        ("nodes = 2", 'state = "zk"', '3: cluster.state: expected "static" or "etcd" (got "zk")'),
        ("192.0.2.0/24", "192.0.2.0/29", "5: network.lan: expected room for 2 nodes from the eleventh address on"),
        ("192.0.2.0/24", "2001:db8::/64", "5: network.lan: IPv6 is not supported yet (got 2001:db8::/64)"),
        ("10.244.0.0/16", "10.244.0.0/23", "6: network.podCIDR: expected room for 2 blocks of /24 beside the first"),
        ("10.244.0.0/16", "10.244.0.0/25", "4: network.blockSize: expected a block inside podCIDR 10.244.0.0/25"),
        ("10.244.0.0/16", "192.0.0.0/16", "6: network.podCIDR: 192.0.0.0/16 overlaps 192.0.2.0/24 of network.lan"),
        ("count = 3", "count = 3\nperNode = 1", "7: pods[0]: expected count or perNode"),
        ("count = 3", "count = 0", "7: pods[0]: expected count or perNode"),
        ("count = 3", "count = 1000", "7: pods[0]: more pods on node1 than the 245 that a block of /24 has room for"),
        ('name = "app"', 'name = "web"', "13: pods[1].name: used twice: web-0"),
        ('name = "app"', 'name = "App"', "13: pods[1].name: expected a name of up to 31"),
        ("10.96.0.20", "10.97.0.20", "18: services[0].clusterIPs[0]: expected an address inside services.serviceCIDR"),
        ("clusterIPs", "clusterIP", '18: services[0].clusterIP: unknown key; did you mean "clusterIPs"?'),
        ("port = 80,", "port = 0,", "19: services[0].ports[0].port: expected a number from 1 to 65535 (got 0)"),
        ("selector", 'endpoints = [{ ip = "10.244.1.10" }]\nselector', "20: services[0].endpoints: has selector, too"),
        (
            "[[services]]",
            '[dns]\nclusterIP = "10.244.1.1"\n[[services]]',
            "17: dns.clusterIP: expected an address outs",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_the_files_own_key(old, new, expected):
    assert old in FILE
    assert not errors(FILE)
    found = errors(FILE.replace(old, new, 1))
    assert any(line.startswith(expected) for line in found), found
    assert len(found) <= 2, found


def test_a_file_with_errors_is_refused_before_anything_is_made(tmp_path):
    file = tmp_path / "cluster.toml"
    file.write_text(FILE.replace("nodes = 2", "nodes = 0"))
    result = dataplane("lab", "up", str(file))
    assert (result.returncode, result.stderr) == (
        2,
        f"{file}:3: cluster.nodes: expected a number from 1 to 100 (got 0)\n",
    )


def test_a_lab_that_is_not_there_is_said_so():
    for command in (["status"], ["exec", "web-0"], ["logs", "node1"], ["down"]):
        result = dataplane("lab", *command, "--name", "nowhere")
        if command[0] == "exec":  # what follows the place is the command's
            result = dataplane("lab", "exec", "--name", "nowhere", "web-0")
        assert (result.returncode, result.stderr) == (3, "dataplane: no lab nowhere is up\n")


# --- text ------------------------------------------------------------------------------------------------------------

KEYS = st.text("abcXYZ-_./ é\"'=", min_size=1, max_size=5)
PLAIN = st.booleans() | st.integers(-(2**40), 2**40) | st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_toml_reads_what_is_written(values):
    import tomllib

    assert tomllib.loads(toml(values)) == values


def test_the_table_and_the_lines_name_what_there_is():
    plan = load()
    services = [
        {"service": "default/web", "type": "LoadBalancer", "kind": kind, "address": address, "port": port,
         "protocol": "tcp", "ready": 3, "total": 3}
        for kind, address, port in (
            ("cluster-ip", "10.96.0.20", 80),
            ("load-balancer-ip", "192.0.2.200", 8080),
            ("node-port", "192.0.2.11", 30080),
        )
    ]  # fmt: skip
    found = {
        "nodes": [{"name": "node1", "address": "192.0.2.11", "netns": "lab-node1", "state": "dead"}],
        "pods": [],
        "client": {"name": CLIENT, "address": plan.client, "netns": "lab-client"},
        "services": services,
    }
    rows = table(found).rows
    assert rows[0] == ("node1", "node", "", "192.0.2.11", "lab-node1", "dead")
    assert rows[-1][1:4] == ("load-balancer-ip", "", "192.0.2.200:8080/tcp")
    lines = list(lines_to_try(plan, found, "dataplane"))
    assert any("exec" in line and f"{CLIENT} -- " in line and "http://192.0.2.200:8080" in line for line in lines)
    assert any("app-0 -- ping -c 3 10.244.2.10" in line for line in lines)
    assert {LAN, CLIENT, "web-0", "node3"} <= set(plan.places)


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status", "body"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"200 OK", True),
        (b"HEAD / HTTP/1.1\r\n\r\n", b"200 OK", False),
        (b"POST / HTTP/1.1\r\n\r\n", b"405 Method Not Allowed", True),
    ],
)
def test_the_server_answers_as_http_wants_it(head, status, body):
    answer = response(head, b"web-0\n")
    assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert b"Content-Length: 6\r\n" in answer
    assert answer.endswith(b"\r\n\r\nweb-0\n" if body else b"\r\n\r\n")


def test_the_server_says_who_answers_whom_as_often_as_it_is_asked():
    from dataplane.lab_serve import answer

    async def ask() -> tuple[str, str, str]:
        server = await asyncio.start_server(lambda r, w: answer("web-0", r, w), "127.0.0.1")
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        me = "{}:{}".format(*writer.get_extra_info("sockname"))
        found = []
        for last in ("", "", "Connection: close\r\n"):
            writer.write(f"GET / HTTP/1.1\r\n{last}\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            found.append((await reader.readline()).decode())
        assert await reader.read() == b""
        writer.close()
        server.close()
        assert all(line.startswith("web-0 (127.0.0.1:") and line.endswith(f" answers {me}\n") for line in found), found
        return found[0], found[1], found[2]

    assert len(set(asyncio.run(ask()))) == 1
