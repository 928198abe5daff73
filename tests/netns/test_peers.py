"""The control experiment: the same checks between two nodes of the kernel. What fails here is not ours.

     pod a                                                            pod b
10.244.1.10 ── cali ── node1 ══ vxlan ══ br0 ══ vxlan ══ node2 ── cali ── 10.244.2.10
                    192.0.2.11                       192.0.2.12
"""

import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

import pytest

from dataplane.devices.journal import process
from tests.netns import checks
from tests.netns.harness import ROOT, Namespace, Network, eventually, ip, left_over, sweep
from tests.netns.peers import KernelNode, Member

pytestmark = pytest.mark.netns

FIRST = Member("kernel1", IPv4Address("192.0.2.11"), IPv4Network("10.244.1.0/24"))
SECOND = Member("kernel2", IPv4Address("192.0.2.12"), IPv4Network("10.244.2.0/24"))


class Topology(NamedTuple):
    switch: Namespace
    a: Namespace
    b: Namespace


@pytest.fixture(scope="module")
def topology(network: Network) -> Topology:
    hosts = [network.namespace(member.name, forward=True) for member in (FIRST, SECOND)]
    switch = network.lan((hosts[0], "192.0.2.11/24"), (hosts[1], "192.0.2.12/24"))
    nodes = [KernelNode(network, host, member) for host, member in zip(hosts, (FIRST, SECOND), strict=True)]
    nodes[0].join(SECOND)
    nodes[1].join(FIRST)
    return Topology(switch, nodes[0].pod("a", "10.244.1.10"), nodes[1].pod("b", "10.244.2.10"))


def test_the_kernel_passes_every_check(topology):
    checks.gateway_answers_arp(topology.a)
    checks.ping(topology.a, "10.244.2.10")
    checks.tcp(topology.a, topology.b, "10.244.2.10")
    checks.udp(topology.a, topology.b, "10.244.2.10")
    checks.too_big_is_reported(topology.a, "10.244.2.10", 1450, "192.0.2.11")
    assert checks.hops(topology.a, "10.244.2.10") == ["192.0.2.11", "10.244.2.0", "10.244.2.10"]


def test_the_kernels_frames_are_decoded_without_a_warning(topology):
    topology.a.run("ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off")
    topology.b.run("ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off")
    with topology.switch.capture("port1", "udp port 4789") as capture:
        checks.ping(topology.a, "10.244.2.10")
        checks.tcp(topology.a, topology.b, "10.244.2.10", 1_000_000)
    checks.nothing_is_malformed(capture, at_least=1000, except_for=checks.OF_THE_KERNEL)


def test_a_network_leaves_nothing(tmp_path):
    with Network(tmp_path) as network:
        network.namespace("left").spawn("sleep", "60")
        network.namespace("right").run("sh", "-c", "sleep 60 >/dev/null 2>&1 &")
        assert len(left_over(network.prefix)) >= 2
    assert left_over(network.prefix + "left") == left_over(network.prefix + "right") == []


KILLED = """
import time
from pathlib import Path
from tests.netns.harness import Network
network = Network(Path("/nowhere"))
sleeper = network.namespace("left").spawn("sleep", "600")
print(network.prefix, sleeper.pid, flush=True)
time.sleep(600)
"""


def test_a_sweep_removes_what_a_killed_run_has_left():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        assert run.stdout is not None
        prefix, sleeper = run.stdout.readline().split()
        eventually(lambda: ip("netns", "pids", f"{prefix}left"))
        run.kill()
    assert len(left_over(prefix)) == 1
    sweep()
    assert left_over(prefix) == []
    eventually(lambda: process(int(sleeper)) is None)


def test_a_sweep_leaves_the_living_alone(topology):
    sweep()
    checks.ping(topology.a, "10.244.2.10", count=1)
