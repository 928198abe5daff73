"""One of our nodes against the kernel's vxlan device, set up as Calico does: whoever speaks to it speaks to Calico.

     pod a                                                               pod b
10.244.1.10 ── dataplane ══ vxlan ══ br0 ══ vxlan.calico ── kernel ── 10.244.2.10
               node1, eth0                  node2, eth0     cali
               192.0.2.11                   192.0.2.12
"""

import pytest

from tests.netns import checks
from tests.netns.harness import Network, eventually
from tests.netns.ours import Pair, config, drops, member
from tests.netns.pairs import PairChecks, _balanced, offloads  # noqa: F401 - fixtures
from tests.netns.peers import KernelNode

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def pair(network: Network) -> Pair:
    ours, theirs = member(network, 1), member(network, 2)
    hosts = network.namespace("host1"), network.namespace("host2", forward=True)
    switch = network.lan((hosts[0], f"{ours.address}/24"), (hosts[1], f"{theirs.address}/24"))
    kernel = KernelNode(network, hosts[1], theirs)
    kernel.join(ours)
    pod = kernel.pod("b", Pair.B)
    node = network.node(hosts[0], "node1", config(ours, {"a": Pair.A}, [theirs])).start()
    return Pair(network.pod("a"), pod, (node,), hosts, switch)


class TestKernelPeer(PairChecks):
    def test_a_packet_over_the_tunnels_mtu_with_df_is_answered_with_the_mtu(self, pair):
        checks.too_big_is_reported(pair.a, pair.B, 1450, "192.0.2.11")
        checks.too_big_is_reported(pair.b, pair.A, 1450, "192.0.2.12")

    @pytest.mark.parametrize("probes", [["--icmp"], ["--udp"], ["-T", "-p", "80"]], ids=["icmp", "udp", "tcp"])
    def test_traceroute_shows_both_nodes(self, pair, probes):
        assert checks.hops(pair.a, pair.B, *probes) == ["192.0.2.11", "10.244.2.0", pair.B]
        assert checks.hops(pair.b, pair.A, *probes) == ["192.0.2.12", "10.244.1.0", pair.A]


def test_nothing_was_dropped_for_its_headers(pair):
    """Runs after the transfers of the class above and before the tests below, which send what is wrong."""
    suspicious = ("tunnel.", "ip.bad", "l2.", "overload.", "device.")
    assert {label for label in drops(pair.nodes[0]) if label.startswith(suspicious)} == set()


def test_the_kernel_reaches_the_pod_from_the_node_itself(pair):
    checks.ping(pair.hosts[1], pair.A)


def test_the_kernels_tunnel_end_is_pinged_by_our_pod(pair):
    checks.ping(pair.a, "10.244.2.0")


def test_our_tunnel_end_is_pinged_by_the_kernels_pod(pair):
    checks.ping(pair.b, "10.244.1.0")


VXLAN = """
import socket, sys
echo = "4500001c00000000400100000af402630af4010a0800f7ff00000000"
frame = bytes.fromhex(sys.argv[2].replace(":", "") + "0200000000010800" + echo)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.sendto(bytes.fromhex(sys.argv[1]) + frame, ("192.0.2.11", 4789))
"""


@pytest.mark.parametrize(
    ("sender", "header", "reason"),
    [
        ("stranger", "0800000000100000", "tunnel.src-not-node"),
        ("node", "0000000000100000", "tunnel.bad-flags"),
        ("node", "0800000100100000", "tunnel.reserved"),
        ("node", "0800000000100001", "tunnel.reserved"),
        ("node", "0800000000100100", "tunnel.vni"),
    ],
)
def test_vxlan_that_is_not_from_a_node_or_not_calicos_is_dropped(pair, network, sender, header, reason):
    node, before = pair.nodes[0], drops(pair.nodes[0]).get(reason, 0)
    source = pair.hosts[1]
    if sender == "stranger":
        source = network.namespace("stranger")
        network.wire((pair.switch, "port3"), (source, "eth0"))
        pair.switch.ip("link", "set", "port3", "master", "br0")
        source.ip("address", "add", "192.0.2.99/24", "dev", "eth0")
    source.run("python3", "-c", VXLAN, header, member(network, 1).mac)
    eventually(lambda: drops(node).get(reason, 0) == before + 1)
