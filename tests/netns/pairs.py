"""The list of checks between two pods on two nodes; the modules that import it say which nodes these are.

Their fixture ``pair`` gives an ``ours.Pair``. Every test runs with the offloads of the underlay on and off, since these
decide whether checksums arrive finished and whether packets arrive one by one.
"""

import pytest

from tests.netns import checks
from tests.netns.ours import Pair, assert_balanced, set_offloads


@pytest.fixture(scope="module", params=["on", "off"], ids=["offloads", "no-offloads"])
def offloads(pair: Pair, request: pytest.FixtureRequest) -> str:
    """Set the underlay's offloads."""
    set_offloads(pair, request.param)
    state: str = request.param
    return state


@pytest.fixture(autouse=True)
def _balanced(pair: Pair):
    yield
    for node in pair.nodes:
        assert_balanced(node)


@pytest.mark.usefixtures("offloads")
class PairChecks:
    def test_the_gateway_answers_arp(self, pair):
        checks.gateway_answers_arp(pair.a)
        checks.gateway_answers_arp(pair.b)

    @pytest.mark.parametrize("size", [0, 56, 1422, 1423, 4000, 65507])
    def test_pings_of_every_size_return(self, pair, size):
        checks.ping(pair.a, pair.B, size=size)
        checks.ping(pair.b, pair.A, size=size)

    def test_tcp_from_the_first_node_arrives_unchanged_both_ways(self, pair):
        checks.tcp(pair.a, pair.b, pair.B)

    def test_tcp_from_the_second_node_arrives_unchanged_both_ways(self, pair):
        checks.tcp(pair.b, pair.a, pair.A, checks.MEGABYTES // 4)

    def test_udp_of_every_size_arrives_unchanged(self, pair):
        checks.udp(pair.a, pair.b, pair.B)
        checks.udp(pair.b, pair.a, pair.A)

    def test_many_connections_at_once_in_both_directions(self, pair):
        server = pair.b.spawn("iperf3", "-s", "-1", "-p", 5201, "--forceflush")
        server.expect("listening")
        output = pair.a.run("iperf3", "-c", pair.B, "-p", 5201, "-P", 8, "--bidir", "-t", 1, timeout=30)
        assert "iperf Done." in output, output
        assert server.wait() == 0
