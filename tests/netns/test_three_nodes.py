"""Three of our nodes with CrossSubnet: direct within a subnet, VXLAN across the router.

                   192.0.2.0/24                     203.0.113.0/24
pod a ── node1 .11 ──┐                                         ┌── .13 node3 ── pod c
                     ├── br0 ── .1 [ router ] .1 ──────────────┘
pod b ── node2 .12 ──┘            198.51.100.1 on lo

10.244.1.10 pod a, 10.244.1.30 the pod that moves; 10.244.2.10 pod b; 10.244.3.10 pod c
"""

import re
import signal
from typing import NamedTuple

import pytest

from tests.netns import checks
from tests.netns.harness import Namespace, Network, Node
from tests.netns.ours import assert_balanced, config, member
from tests.netns.peers import Member

pytestmark = pytest.mark.netns

A, B, C = "10.244.1.10", "10.244.2.10", "10.244.3.10"
MOVING, MOVED = "10.244.1.30", "10.244.1.31"
OUTSIDE, BEHIND_NOBODY = "198.51.100.1", "203.0.113.200"
ROUTES = {"198.51.100.0/24": "192.0.2.1", f"{BEHIND_NOBODY}/32": "192.0.2.77"}
GONE = "0 received, 100% packet loss"


class Topology(NamedTuple):
    members: list[Member]
    nodes: list[Node]
    hosts: list[Namespace]
    switch: Namespace
    router: Namespace
    a: Namespace
    b: Namespace
    c: Namespace

    def first(self, pods: dict[str, str] | None = None, peers: list[Member] | None = None) -> str:
        """Return a configuration of the first node."""
        _, second, third = self.members
        chosen = [second, third] if peers is None else peers
        text = config(
            self.members[0],
            pods or {"a": A, "m": MOVING},
            chosen,
            mode="CrossSubnet",
            routes=ROUTES,
        )
        return text.replace("{prefix}", self.a.network.prefix)


@pytest.fixture(scope="module")
def topology(network: Network) -> Topology:
    members = [member(network, 1), member(network, 2), member(network, 3, "203.0.113.13")]
    hosts = [network.namespace(f"host{number}") for number in (1, 2, 3)]
    router = network.namespace("router", forward=True)
    switch = network.lan((hosts[0], "192.0.2.11/24"), (hosts[1], "192.0.2.12/24"), (router, "192.0.2.1/24"))
    network.wire((router, "eth1"), (hosts[2], "eth0"))
    router.ip("address", "add", "203.0.113.1/24", "dev", "eth1")
    router.ip("address", "add", f"{OUTSIDE}/32", "dev", "lo")
    router.ip("route", "add", "10.244.1.0/24", "via", "192.0.2.11")
    hosts[2].ip("address", "add", "203.0.113.13/24", "dev", "eth0")
    for host, gateway in zip(hosts, ("192.0.2.1", "192.0.2.1", "203.0.113.1"), strict=True):
        host.ip("route", "add", "default", "via", gateway)
    pods = [network.pod(name) for name in "abc"]
    made = Topology(members, [], hosts, switch, router, *pods)
    texts = [
        made.first(),
        config(members[1], {"b": B}, [members[0], members[2]], mode="CrossSubnet"),
        config(members[2], {"c": C}, members[:2], mode="CrossSubnet"),
    ]
    for number, (host, text) in enumerate(zip(hosts, texts, strict=True), 1):
        made.nodes.append(network.node(host, f"node{number}", text).start())
    return made


@pytest.fixture(autouse=True)
def balanced(topology):
    yield
    for node in topology.nodes:
        assert_balanced(node)


def lost(pod: Namespace, target: str) -> bool:
    return GONE in pod.run("ping", "-n", "-c", 1, "-W", 0.3, target, check=False)


def test_every_pod_reaches_every_other(topology):
    for source in (topology.a, topology.b, topology.c):
        for target in (A, B, C):
            checks.ping(source, target)


def test_the_table_has_direct_routes_within_the_subnet_and_tunnels_beyond(topology):
    routes = {route["prefix"]: route for route in topology.nodes[0].show("routes")["routes"]}
    assert (routes["10.244.2.0/24"]["kind"], routes["10.244.2.0/24"]["via"]) == ("via", "192.0.2.12")
    assert routes["10.244.3.0/24"]["kind"] == "tunnel"
    assert topology.nodes[0].cli("show", "routes", "-o", "iproute").count("\n") == len(routes)


def test_packets_within_the_subnet_are_not_encapsulated(topology):
    features = [word for name in ("tx", "sg", "tso", "gso") for word in (name, "off")]
    for host in topology.hosts[:2]:
        host.run("ethtool", "-K", "eth0", *features)
    with topology.switch.capture("port1", f"host {B} or udp port 4789") as capture:
        checks.ping(topology.a, B)
        checks.tcp(topology.a, topology.b, B, 2_000_000)
        checks.udp(topology.a, topology.b, B)
    assert checks.fields(capture, "vxlan", "frame.number") == []
    checks.nothing_is_malformed(capture, at_least=1000, except_for=checks.OF_THE_KERNEL)


def test_packets_across_the_router_are_encapsulated(topology):
    with topology.switch.capture("port1", f"host {C} or udp port 4789") as capture:
        checks.ping(topology.a, C)
    sources = {source for (source,) in checks.fields(capture, "vxlan", "ip.src")}
    assert sources == {f"192.0.2.11,{A}", f"203.0.113.13,{C}"}
    assert checks.fields(capture, "!vxlan", "frame.number") == []


@pytest.mark.parametrize("target", ["b", "c"], ids=["direct", "tunneled"])
def test_a_hundred_megabytes_of_tcp_arrive_unchanged_both_ways(topology, target):
    server, address = {"b": (topology.b, B), "c": (topology.c, C)}[target]
    checks.tcp(topology.a, server, address)


@pytest.mark.parametrize("target", ["b", "c"], ids=["direct", "tunneled"])
def test_udp_of_every_size_arrives_unchanged(topology, target):
    server, address = {"b": (topology.b, B), "c": (topology.c, C)}[target]
    checks.udp(topology.a, server, address)


def test_traceroute_shows_the_nodes_on_the_direct_way(topology):
    assert checks.hops(topology.a, B, "--icmp") == ["192.0.2.11", "192.0.2.12", B]


def test_a_static_route_leads_outside_and_back(topology):
    checks.ping(topology.a, OUTSIDE)
    checks.ping(topology.router, A)
    checks.tcp(topology.a, topology.router, OUTSIDE, 10_000_000)
    checks.udp(topology.router, topology.a, A, [1, 1422, 1473, 4000, 65507])  # of 1500 bytes, cut again to 1450


def test_a_host_outside_learns_the_smaller_mtu_of_the_pods(topology):
    listener = topology.a.spawn(*topology.a.tool("udp", "listen", checks.PORT))
    listener.expect("ready")
    output = topology.router.run(*topology.router.tool("udp", "connect", A, checks.PORT, 1423, 1423))
    assert output == "1423 failed: Message too long\n1423 ok\n"
    assert "mtu 1450" in topology.router.ip("route", "get", A)
    topology.router.ip("route", "flush", "cache")


def test_a_silent_next_hop_makes_the_destination_unreachable(topology):
    output = topology.a.run("ping", "-n", "-c", 1, "-W", 5, BEHIND_NOBODY, check=False)
    assert "From 192.0.2.11 icmp_seq=1 Destination Host Unreachable" in output, output


@pytest.mark.parametrize("leave", ["stop", "kill"])
@pytest.mark.parametrize("number", [1, 2], ids=["direct", "tunneled"])
def test_a_node_leaves_and_comes_back_while_the_others_go_on(topology, leave, number):
    target = {1: B, 2: C}[number]
    its_address = {1: C, 2: B}[number]
    flood = topology.a.spawn("ping", "-n", "-i", 0.002, "-W", 2, its_address)
    flood.expect("bytes from")
    getattr(topology.nodes[number], leave)()
    assert lost(topology.a, target)
    topology.nodes[number].start()
    checks.ping(topology.a, target)
    flood.stop(signal.SIGINT)
    sent, received = re.findall(r"(\d+) packets transmitted, (\d+) received", flood.output)[0]
    assert int(received) >= int(sent) - 1, flood.lines[-3:]  # the last one may still be on its way


def test_a_peer_is_forgotten_and_learned_again_by_reload(topology):
    node = topology.nodes[0]
    node.write(topology.first(peers=[topology.members[1]]))
    assert "peer" in node.cli("reload")
    output = topology.a.run("ping", "-n", "-c", 1, "-W", 1, C, check=False)
    assert "Destination Net Unreachable" in output, output
    checks.ping(topology.a, B)
    node.write(topology.first())
    node.cli("reload")
    checks.ping(topology.a, C)


def test_a_pod_moves_under_a_running_transfer_of_another(topology, network):
    node = topology.nodes[0]
    checks.ping(topology.c, MOVING, count=1)
    flood = topology.a.spawn("ping", "-n", "-i", 0.002, "-c", 2000, "-W", 2, C)
    listener = topology.b.spawn(*topology.b.tool("tcp", "listen", checks.PORT, checks.MEGABYTES))
    listener.expect("ready")
    transfer = topology.a.spawn(*topology.a.tool("tcp", "connect", B, checks.PORT, checks.MEGABYTES))
    for round_trip in range(6):
        name, address = (("m", MOVING), ("n", MOVED))[(round_trip + 1) % 2]
        text = topology.first({"a": A, "m": address})
        node.write(text.replace(f'netns = "{network.prefix}m"', f'netns = "{network.prefix}{name}"'))
        node.cli("reload")
        checks.ping(topology.c, address, count=1)
        assert lost(topology.c, {MOVING: MOVED, MOVED: MOVING}[address])
    assert (transfer.wait(60), listener.wait()) == (0, 0), (transfer.output, listener.output)
    assert sorted(line.split()[1] for line in transfer.lines) == sorted(line.split()[1] for line in listener.lines[1:])
    assert flood.wait() == 0
    assert "2000 packets transmitted, 2000 received, 0% packet loss" in flood.output, flood.output
