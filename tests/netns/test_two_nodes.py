"""Two of our nodes over a veth underlay.

     pod a                                                            pod b
10.244.1.10 ── dataplane ══ vxlan ══ br0 ══ vxlan ══ dataplane ── 10.244.2.10
               node1, eth0                  node2, eth0
               192.0.2.11                   192.0.2.12
"""

import pytest

from tests.netns import checks
from tests.netns.harness import Network, eventually
from tests.netns.ours import Pair, config, drops, member
from tests.netns.pairs import PairChecks, _balanced, offloads  # noqa: F401 - fixtures

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def pair(network: Network) -> Pair:
    first, second = member(network, 1), member(network, 2)
    hosts = network.namespace("host1"), network.namespace("host2")
    switch = network.lan((hosts[0], f"{first.address}/24"), (hosts[1], f"{second.address}/24"))
    texts = config(first, {"a": Pair.A}, [second]), config(second, {"b": Pair.B}, [first])
    nodes = [
        network.node(host, f"node{number}", text)
        for number, (host, text) in enumerate(zip(hosts, texts, strict=True), 1)
    ]
    for node in nodes:
        node.start()
    return Pair(network.pod("a"), network.pod("b"), tuple(nodes), hosts, switch)


class TestTwoNodes(PairChecks):
    def test_a_packet_over_the_tunnels_mtu_with_df_is_answered_with_the_mtu(self, pair):
        checks.too_big_is_reported(pair.a, pair.B, 1450, "192.0.2.11")

    @pytest.mark.parametrize("probes", [["--icmp"], ["--udp"], ["-T", "-p", "80"]], ids=["icmp", "udp", "tcp"])
    def test_traceroute_shows_both_nodes(self, pair, probes):
        assert checks.hops(pair.a, pair.B, *probes) == ["192.0.2.11", "10.244.2.0", pair.B]
        assert checks.hops(pair.b, pair.A, *probes) == ["192.0.2.12", "10.244.1.0", pair.A]


def test_an_unused_address_of_the_other_block_is_a_black_hole(pair):
    before = drops(pair.nodes[1]).get("route.blackhole", 0)
    output = pair.a.run("ping", "-n", "-c", 1, "-W", 0.3, "10.244.2.99", check=False)
    assert "1 packets transmitted, 0 received, 100% packet loss" in output, output
    assert drops(pair.nodes[1]).get("route.blackhole", 0) == before + 1


def test_a_node_answers_pings_to_its_own_addresses(pair):
    for address in ("169.254.1.1", "192.0.2.11", "10.244.1.0", "10.244.2.0"):
        checks.ping(pair.a, address, count=5)


def test_the_hosts_own_traffic_on_the_uplink_is_left_alone(pair):
    checks.ping(pair.hosts[0], "192.0.2.12")
    checks.tcp(pair.hosts[0], pair.hosts[1], "192.0.2.12", 10_000_000)
    checks.udp(pair.hosts[1], pair.hosts[0], "192.0.2.11")


def test_each_node_counts_what_the_other_sent(pair):
    def totals() -> list[tuple[int, int]]:
        sent, received = (node.show("vteps")["vteps"][0] for node in pair.nodes)
        return [(sent["tx_packets"], sent["tx_bytes"]), (received["rx_packets"], received["rx_bytes"])]

    before = totals()
    checks.ping(pair.a, pair.B, count=7)  # small packets: of larger ones, we count super-frames before they are cut
    sent, received = ((now[0] - then[0], now[1] - then[1]) for now, then in zip(totals(), before, strict=True))
    assert sent == received
    assert sent[0] == 7


def test_the_underlay_going_down_and_up_is_survived(pair):
    host, node = pair.hosts[0], pair.nodes[0]
    host.ip("link", "set", "eth0", "down")
    eventually(lambda: "down" in [each["state"] for each in node.show("interfaces")["interfaces"]])
    output = pair.a.run("ping", "-n", "-c", 2, "-i", 0.01, "-W", 0.3, pair.B, check=False)
    assert "2 packets transmitted, 0 received" in output, output
    assert drops(node).get("device.down", 0) >= 2
    host.ip("link", "set", "eth0", "up")
    eventually(lambda: {each["state"] for each in node.show("interfaces")["interfaces"]} == {"up"})
    checks.ping(pair.a, pair.B)
