"""One node without an uplink: pods that reach each other through our TAPs and through nothing else.

┌── pod a ────────┐      ┌── pod b ────────┐      ┌── pod c ────────┐
│ eth0            │      │ eth0            │      │ eth0            │
│ 10.244.1.10/32  │      │ 10.244.1.20/32  │      │ 10.244.1.30/32  │
└──────┬──────────┘      └───────┬─────────┘      └───────┬─────────┘
       └─────────────────── dataplane ────────────────────┘   (in the namespace "host", which has only lo)
"""

import re
from typing import NamedTuple

import pytest

from tests.netns import checks
from tests.netns.harness import Namespace, Network, Node, eventually
from tests.netns.ours import assert_balanced, config, drops, member

pytestmark = pytest.mark.netns

A, B, C = "10.244.1.10", "10.244.1.20", "10.244.1.30"
UNUSED = "10.244.1.99"
OUTSIDE = "198.51.100.1"


class Topology(NamedTuple):
    node: Node
    a: Namespace
    b: Namespace
    c: Namespace


@pytest.fixture(scope="module")
def topology(network: Network) -> Topology:
    text = config(member(network, 1), {"a": A, "b": B, "c": C}, uplink=False)
    node = network.node(network.namespace("host"), "node1", text).start()
    return Topology(node, network.pod("a"), network.pod("b"), network.pod("c"))


@pytest.fixture(autouse=True)
def balanced(topology):
    yield
    assert_balanced(topology.node)


def arping(pod: Namespace, *arguments: str | float) -> str:
    return pod.run("arping", "-i", "eth0", "-c", 2, "-W", 0.05, *arguments, check=False)


def test_a_pod_has_its_address_routes_and_mtu(topology):
    assert re.search(rf"inet {A}/32 .*eth0", topology.a.ip("address", "show", "dev", "eth0"))
    assert "mtu 1450" in topology.a.ip("link", "show", "dev", "eth0")
    assert [line.strip() for line in topology.a.ip("route").splitlines()] == [
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0 scope link",
    ]


def test_the_gateway_that_does_not_exist_answers_arp(topology):
    for pod in (topology.a, topology.b, topology.c):
        checks.gateway_answers_arp(pod)


def test_arp_is_answered_for_other_pods_without_delay(topology):
    output = arping(topology.a, B)
    assert output.count(f"from {checks.GATEWAY_MAC} ({B})") == 2, output
    slowest = max(float(value) * {"usec": 1e-6, "msec": 1e-3}[unit] for value, unit in TIMES.findall(output))
    assert slowest < 0.05, output  # the kernel's proxy_delay alone is up to 0.8 s


TIMES = re.compile(r"time=([\d.]+) (usec|msec)")


@pytest.mark.parametrize(
    ("asked", "options", "reason"),
    [(A, ["-S", A], "arp.own-ip"), (UNUSED, [], "arp.not-owner"), (B, ["-0"], "arp.probe")],
    ids=["own address", "unused address of the block", "probe for a proxied address"],
)
def test_arp_is_not_answered(topology, asked, options, reason):
    before = drops(topology.node).get(reason, 0)
    output = arping(topology.a, *options, asked)
    assert "2 packets transmitted, 0 packets received" in output, output
    assert drops(topology.node).get(reason, 0) == before + 2, drops(topology.node)


def test_every_pod_reaches_every_other(topology):
    for source in (topology.a, topology.b, topology.c):
        for target in (A, B, C):
            checks.ping(source, target, count=5)


@pytest.mark.parametrize("size", [0, 1, 1421, 1422])
def test_a_ping_of_up_to_the_mtu_is_not_fragmented(topology, size):
    checks.ping(topology.a, B, count=3, size=size)


@pytest.mark.parametrize("size", [1423, 4000, 65507])
def test_a_ping_over_the_mtu_travels_in_fragments(topology, size):
    checks.ping(topology.a, B, count=3, size=size)


def test_a_hundred_megabytes_of_tcp_arrive_unchanged_both_ways(topology):
    checks.tcp(topology.a, topology.b, B)


def test_udp_of_every_size_arrives_unchanged(topology):
    checks.udp(topology.b, topology.a, A)


def test_super_frames_pass_whole(topology):
    with topology.b.capture("eth0", f"tcp and dst host {B}") as capture:
        checks.tcp(topology.a, topology.b, B, 10_000_000)
    lengths = [int(length) for (length,) in checks.fields(capture, "tcp.len > 0", "frame.len")]
    assert max(lengths) > 16_000, max(lengths)


def test_tcp_works_without_offloads_in_the_pods(topology):
    features = [word for name in ("tx", "sg", "tso", "gso") for word in (name, "off")]
    for pod in (topology.a, topology.b):
        pod.run("ethtool", "-K", "eth0", *features)
    try:
        checks.tcp(topology.a, topology.b, B, 10_000_000)
    finally:
        for pod in (topology.a, topology.b):
            pod.run("ethtool", "-K", "eth0", *[word.replace("off", "on") for word in features])


def test_a_packet_over_the_mtu_with_df_is_answered_with_the_mtu(topology):
    checks.too_big_is_reported(topology.a, B, 1450, checks.GATEWAY)


@pytest.mark.parametrize("probes", [["--icmp"], ["--udp"], ["-T", "-p", "80"]], ids=["icmp", "udp", "tcp"])
def test_traceroute_shows_the_node_as_the_only_hop(topology, probes):
    assert checks.hops(topology.a, B, *probes) == [checks.GATEWAY, B]


def test_an_address_without_a_route_is_unreachable(topology):
    output = topology.a.run("ping", "-n", "-c", 1, "-W", 2, OUTSIDE, check=False)
    assert f"From {checks.GATEWAY} icmp_seq=1 Destination Net Unreachable" in output, output


def test_an_unused_address_of_the_own_block_is_a_black_hole(topology):
    before = drops(topology.node).get("route.blackhole", 0)
    output = topology.a.run("ping", "-n", "-c", 1, "-W", 0.3, UNUSED, check=False)
    assert "1 packets transmitted, 0 received, 100% packet loss" in output, output
    assert drops(topology.node).get("route.blackhole", 0) == before + 1


def test_a_pod_cannot_use_the_address_of_another(topology):
    before = drops(topology.node).get("ip.spoofed-src", 0)
    topology.a.ip("address", "add", f"{C}/32", "dev", "lo")
    try:
        output = topology.a.run("ping", "-n", "-c", 3, "-i", 0.01, "-W", 0.3, "-I", C, B, check=False)
    finally:
        topology.a.ip("address", "del", f"{C}/32", "dev", "lo")
    assert "3 packets transmitted, 0 received" in output, output
    assert drops(topology.node).get("ip.spoofed-src", 0) == before + 3


def test_a_pod_cannot_use_another_mac_address(topology):
    original = topology.b.run("cat", "/sys/class/net/eth0/address", check=False).strip()
    before = drops(topology.node).get("l2.spoofed-src", 0)
    mac = re.findall(r"link/ether ([0-9a-f:]+)", topology.b.ip("link", "show", "dev", "eth0"))[0]
    topology.b.ip("link", "set", "eth0", "address", "02:00:00:00:00:99")
    try:
        output = topology.b.run("ping", "-n", "-c", 1, "-W", 0.3, A, check=False)
    finally:
        topology.b.ip("link", "set", "eth0", "address", mac)
    assert "0 received" in output, (output, original)
    assert drops(topology.node).get("l2.spoofed-src", 0) > before
    checks.ping(topology.b, A, count=1)


def test_a_web_server_and_curl_agree(topology, tmp_path):
    content = bytes(range(256)) * 4096
    (tmp_path / "file").write_bytes(content)
    server = topology.b.spawn("python3", "-m", "http.server", "8080", "--bind", B, "--directory", tmp_path)
    server.expect("Serving HTTP")
    try:
        topology.a.run("curl", "-sS", "--fail", "-o", tmp_path / "copy", f"http://{B}:8080/file")
    finally:
        server.stop()
    assert (tmp_path / "copy").read_bytes() == content


def test_many_connections_at_once_in_both_directions(topology):
    server = topology.b.spawn("iperf3", "-s", "-1", "-p", 5201, "--forceflush")
    server.expect("listening")
    output = topology.a.run("iperf3", "-c", B, "-p", 5201, "-P", 8, "--bidir", "-t", 1, timeout=30)
    assert "iperf Done." in output, output
    assert server.wait() == 0


def test_an_interface_that_is_deleted_comes_back(topology):
    topology.c.ip("link", "del", "eth0")
    eventually(lambda: "eth0" in topology.c.ip("link"))
    eventually(lambda: "default via" in topology.c.ip("route"))
    checks.ping(topology.a, C)
    checks.ping(topology.a, B)
