"""What a store knows of the cluster, laid over a node's own file."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network

import pytest

from dataplane.config import parse
from dataplane.control.cluster import EXCLUDED, Cluster, ClusterNode, over
from dataplane.control.state import L2Advertisement, Service, vtep_mac
from tests.node_file import NODE

FILE = parse(NODE, "node.toml").state
THIRD = ClusterNode("node3", (ip_address("192.0.2.13"),), (ip_network("10.244.3.0/26"), ip_network("10.244.1.77/32")))


def cluster(*nodes: ClusterNode, **more) -> Cluster:
    return Cluster(nodes={node.name: node for node in nodes}, **more)


def test_nodes_become_peers_beside_those_of_the_file():
    state = over(cluster(THIRD, ClusterNode("node1"), ClusterNode("node2", (ip_address("192.0.2.99"),))), FILE)
    assert [f"{peer.name} {peer.address}" for peer in state.peers] == ["node2 192.0.2.12", "node3 192.0.2.13"]
    assert state.peers[1].vtep_mac == vtep_mac("node3")
    assert state.peers[1].pod_cidrs == THIRD.pod_cidrs


UNREACHABLE = [replace(THIRD, addresses=()), replace(THIRD, pod_cidrs=())]


@pytest.mark.parametrize("node", UNREACHABLE, ids=["no address", "no block"])
def test_a_node_that_cannot_be_reached_yet_is_no_peer(node):
    assert over(cluster(node), FILE).peers == FILE.peers


SILENT = [
    replace(THIRD, alive=False),
    replace(THIRD, network_unavailable=True),
    replace(THIRD, labels=((EXCLUDED, ""),)),
]


@pytest.mark.parametrize("node", SILENT, ids=["away", "unavailable", "excluded"])
def test_a_node_that_is_away_or_excluded_stays_a_peer_and_announces_nothing(node):
    assert over(cluster(THIRD), FILE).peers[-1].announces
    state = over(cluster(node), FILE)
    assert state.peers[-1].name == "node3"
    assert not state.peers[-1].announces


@pytest.mark.parametrize("node", SILENT, ids=["away", "unavailable", "excluded"])
def test_this_node_knows_of_itself_what_the_others_know_of_it(node):
    own = replace(node, name="node1")
    assert over(cluster(replace(THIRD, name="node1")), FILE).node.announces
    assert not over(cluster(own), FILE).node.announces


def test_the_node_has_the_blocks_that_the_store_gave_it():
    block = ip_network("10.244.9.0/26")
    own = ClusterNode("node1", (ip_address("192.0.2.99"),), (block,), zone="z1", labels=(("a", "b"),))
    state = over(cluster(own), FILE)
    assert state.pod_network.cidrs == (block,)
    assert (state.node.zone, state.node.labels) == ("z1", (("a", "b"),))
    assert state.node.addresses == FILE.node.addresses  # the file's come first
    assert over(cluster(replace(own, pod_cidrs=())), FILE).pod_network == FILE.pod_network


def test_of_two_services_with_one_name_the_files_is_used_and_others_stay_the_same_objects():
    mine, other, third = Service("web"), Service("web", cluster_ips=(IPv4Address("10.96.0.9"),)), Service("third")
    state = over(cluster(services=(other, third)), replace(FILE, services=(mine,)))
    assert [id(service) for service in state.services] == [id(mine), id(third)]
    services = (other, third)
    assert over(cluster(services=services), FILE).services is services


@pytest.mark.parametrize(("own", "given"), [(None, None), (None, ()), ((), None)])
def test_without_advertisements_everything_is_announced_unless_the_store_knows_of_such(own, given):
    state = over(cluster(advertisements=given), replace(FILE, advertisements=own))
    assert state.advertisements == (None if own is None and given is None else ())


def test_advertisements_of_both_count():
    first, second = L2Advertisement("a"), L2Advertisement("b")
    state = over(cluster(advertisements=(second,)), replace(FILE, advertisements=(first,)))
    assert state.advertisements == (first, second)
