"""election: who owns an address, checked against sums made by sha256sum(1), and who may."""

import hashlib
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.control.cluster import EXCLUDED
from dataplane.control.election import announced, elected, owner, owners, winner
from dataplane.control.state import (
    AddressPool,
    DesiredState,
    Endpoint,
    L2Advertisement,
    Labels,
    Selector,
    Service,
    Uplink,
)
from tests.announced import ADDRESS, HERE, NODE, THERE, UNNAMED, service, state

# The first six bytes of `printf 'NODE#ADDRESS' | sha256sum`; the smallest in a column wins.
#                192.0.2.200   192.0.2.201   192.0.2.202   192.0.2.203
#   node1        cbd3a6277c28  e027bd18e5d4  9711d4c3c672  3cdcc63adb2b
#   node2        9f4391046c89  da2e3e032f90  31fd0e026b39  89f2b787168e
#   node3        ad1fc5d49a66  04e7b3256f8e  86aca80c1783  a6a340e3645a
GOLDEN = [("192.0.2.200", "node2"), ("192.0.2.201", "node3"), ("192.0.2.202", "node2"), ("192.0.2.203", "node1")]


@pytest.mark.parametrize(("address", "node"), GOLDEN)
def test_the_winner_is_metallbs(address, node):
    assert winner(["node1", "node2", "node3"], IPv4Address(address)) == node


def test_without_nodes_there_is_no_winner():
    assert winner([], ADDRESS) is None


NODES = st.sets(st.text("abcdefgh0123456789-.", min_size=1, max_size=12), min_size=1, max_size=8)
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(NODES, ADDRESSES, st.data())
def test_removing_a_loser_never_moves_an_address(nodes, address, data):
    owned_by = winner(nodes, address)
    losers = sorted(nodes - {owned_by})
    gone = set(data.draw(st.lists(st.sampled_from(losers), unique=True))) if losers else set()
    assert winner(nodes - gone, address) == owned_by


@given(NODES, ADDRESSES, st.text("ijkl", min_size=1, max_size=4))
def test_a_new_node_takes_an_address_only_for_itself(nodes, address, new):
    assert winner(nodes | {new}, address) in {winner(nodes, address), new}


@given(st.permutations(["node1", "node2", "node3", "node4"]), ADDRESSES)
def test_the_order_of_the_nodes_does_not_matter(nodes, address):
    assert winner(nodes, address) == winner(sorted(nodes), address)


NOT_READY = replace(HERE, ready=False, serving=False)
WHO = [
    ("all nodes, by their name and the address", service(HERE, THERE), "node2"),
    ("all nodes, wherever the endpoints are", service(HERE), "node2"),
    ("nobody without endpoints", service(), None),
    ("nobody without an endpoint that serves", service(NOT_READY), None),
    ("nobody when all endpoints are being drained", service(replace(HERE, draining=True)), None),
    ("with an endpoint that terminates but serves", service(replace(HERE, ready=False, terminating=True)), "node2"),
    ("with an unready one that is to be published", service(NOT_READY, publish_not_ready=True), "node2"),
    ("local: nodes with an endpoint", service(HERE, external_policy="Local"), "node1"),
    ("local: of two nodes with an endpoint", service(HERE, UNNAMED, external_policy="Local"), "node3"),
    ("local: nodes with one that serves", service(NOT_READY, UNNAMED, external_policy="Local"), "node3"),
    ("local: not a node that is no peer", service(replace(THERE, node="node9"), external_policy="Local"), None),
    ("internal policy does not matter", service(HERE, internal_policy="Local"), "node2"),
]


@pytest.mark.parametrize(("wanted", "node"), [row[1:] for row in WHO], ids=[row[0] for row in WHO])
def test_the_owner_is(wanted, node):
    assert owner(ADDRESS, state(wanted)) == node


@pytest.mark.parametrize(("wanted", "node"), [row[1:] for row in WHO], ids=[row[0] for row in WHO])
def test_exactly_the_owner_announces(wanted, node):
    nodes = [1, 2, 3]
    found = [f"node{me}" for me in nodes if announced(state(wanted, me=me, peers=tuple(n for n in nodes if n != me)))]
    assert found == ([node] if node else [])


def test_all_addresses_of_a_service_have_the_owner_of_the_first():
    both = replace(service(HERE), load_balancer_ips=(ADDRESS, IPv6Address("2001:db8::200"), IPv4Address("192.0.2.203")))
    assert [owner(address, state(both)) for address in both.load_balancer_ips] == ["node2"] * 3
    assert announced(state(both, me=2, peers=(1, 3))) == {ADDRESS, IPv4Address("192.0.2.203")}
    assert announced(state(both)) == frozenset()


def test_a_service_without_a_load_balancer_has_no_owner():
    plain = replace(service(HERE), load_balancer_ips=())
    assert owner(ADDRESS, state(plain)) is None


def local(*endpoints: Endpoint) -> Service:
    return service(*endpoints, external_policy="Local")


OTHER = IPv4Address("192.0.2.203")
SHARED = [
    ("two that are everywhere", service(HERE), service(THERE), "node2"),
    ("one that is local", service(HERE), local(UNNAMED), "node3"),
    ("two that are local, with one node in common", local(HERE, UNNAMED), local(HERE), "node1"),
    ("two that are local on different nodes", local(HERE), local(UNNAMED), "node3"),
    ("one that has no endpoint", local(), local(HERE), "node1"),
    (
        "one for which it is the second",
        replace(service(HERE), load_balancer_ips=(OTHER, ADDRESS)),
        service(HERE),
        "node2",
    ),
]


@pytest.mark.parametrize(("one", "other", "node"), [row[1:] for row in SHARED], ids=[row[0] for row in SHARED])
def test_an_address_that_services_share_has_one_owner(one, other, node):
    services = replace(one, name="one"), replace(other, name="other")
    nodes = [1, 2, 3]
    states = {f"node{me}": state(*services, me=me, peers=tuple(n for n in nodes if n != me)) for me in nodes}
    assert [name for name, each in states.items() if ADDRESS in announced(each)] == [node]
    assert {owner(ADDRESS, each) for each in states.values()} == {node}


def test_the_nodes_own_address_is_announced_only_on_an_uplink_of_our_own():
    at_the_node = service(HERE, ip=NODE)
    assert announced(state(at_the_node, peers=())) == frozenset()
    assert announced(state(at_the_node, peers=(), shared=False)) == {NODE}
    assert announced(state(shared=False)) == {NODE}


@pytest.mark.parametrize("uplink", [None, Uplink("eth0", mode="udp", shared=False)])
def test_without_a_packet_socket_nothing_is_announced(uplink):
    assert announced(replace(state(service(HERE), peers=()), uplink=uplink)) == frozenset()


# --- who may ---------------------------------------------------------------------------------------------------------

# Of 192.0.2.200 node2 is the first, node3 the second and node1 the last; see above.
EDGE: Labels = (("role", "edge"),)
SELECTED, UNLABELLED = Selector(EDGE), Selector(expressions=(("role", "DoesNotExist", ()),))
POOL = AddressPool("lan", ((ADDRESS, ADDRESS),))
EXTERNAL = AddressPool("external", ((IPv4Address("203.0.113.1"), IPv4Address("203.0.113.9")),))


def labelled(wanted: DesiredState, **labels: Labels) -> DesiredState:
    """Return the state with labels at its nodes, by their names."""
    peers = tuple(replace(each, labels=labels.get(each.name, ())) for each in wanted.peers)
    own = replace(wanted.node, labels=labels.get(wanted.node.name, ()))
    return replace(wanted, node=own, peers=peers)


def lan(*advertisements: L2Advertisement, **labels: Labels) -> DesiredState:
    """Return three nodes, an address of the pool ``lan``, and who may announce it."""
    return labelled(replace(BASE, advertisements=advertisements, pools=(POOL, EXTERNAL)), **labels)


def without(name: str) -> DesiredState:
    return replace(BASE, peers=tuple(replace(peer, announces=peer.name != name) for peer in BASE.peers))


BASE = state(service(HERE))
ME = replace(BASE, silent=frozenset({"node2", "node3"}))
MAY = [
    ("a silent node is not", replace(BASE, silent=frozenset({"node2"})), "node3"),
    ("nor a peer whose network is unavailable", without("node2"), "node3"),
    ("nor an excluded one, whatever the value", labelled(BASE, node2=((EXCLUDED, "false"),)), "node3"),
    ("nor this node with its network unavailable", replace(ME, node=replace(ME.node, announces=False)), None),
    ("nor this node when it is excluded", labelled(ME, node1=((EXCLUDED, ""),)), None),
    ("one alone is", ME, "node1"),
    ("an advertisement for all", lan(L2Advertisement()), "node2"),
    ("no advertisement that is for the pool", lan(L2Advertisement(pools=frozenset({"external"}))), None),
    ("no advertisement at all, where there might be some", lan(), None),
    ("an advertisement for the pool", lan(L2Advertisement(pools=frozenset({"lan"}))), "node2"),
    ("a selected node", lan(L2Advertisement(node_selectors=(SELECTED,)), node1=EDGE, node3=EDGE), "node3"),
    ("nobody selected", lan(L2Advertisement(node_selectors=(SELECTED,))), None),
    (
        "one that either of two selects",
        lan(L2Advertisement(node_selectors=(SELECTED,)), L2Advertisement(node_selectors=(Selector(),)), node1=EDGE),
        "node2",
    ),
    (
        "not one that another pool's selects",
        lan(
            L2Advertisement(pools=frozenset({"lan"}), node_selectors=(SELECTED,)),
            L2Advertisement(pools=frozenset({"external"})),
            node1=EDGE,
        ),
        "node1",
    ),
    ("a preferred node first", lan(L2Advertisement(preferences=((1, SELECTED),)), node1=EDGE), "node1"),
    (
        "of two preferred the first by the hash",
        lan(L2Advertisement(preferences=((1, SELECTED),)), node1=EDGE, node3=EDGE),
        "node3",
    ),
    (
        "the heavier preference",
        lan(
            L2Advertisement(preferences=((60, SELECTED), (50, Selector((("zone", "z"),))))),
            node3=EDGE,
            node1=(("zone", "z"),),
        ),
        "node3",
    ),
    (
        "the sum of preferences",
        lan(
            L2Advertisement(preferences=((60, SELECTED),)),
            L2Advertisement(preferences=((50, Selector((("zone", "z"),))), (20, Selector((("rack", "r"),))))),
            node3=EDGE,
            node1=(("rack", "r"), ("zone", "z")),
        ),
        "node1",
    ),
    (
        "no preference of an advertisement that does not select the node",
        lan(
            L2Advertisement(node_selectors=(Selector((("rack", "r"),)),), preferences=((9, SELECTED),)),
            L2Advertisement(),
            node1=EDGE,
            node3=(*EDGE, ("rack", "s")),
        ),
        "node2",
    ),
    (
        "no preferred one that is not selected",
        lan(
            L2Advertisement(node_selectors=(UNLABELLED,), preferences=((9, SELECTED),)),
            node1=EDGE,
        ),
        "node2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "node"), [row[1:] for row in MAY], ids=[row[0] for row in MAY])
def test_the_elected_is(wanted, node):
    assert owner(ADDRESS, wanted) == node
    assert announced(wanted) == ({ADDRESS} if node == "node1" else frozenset())


def test_a_preferred_node_is_no_owner_of_a_local_service_without_an_endpoint_there():
    local_service = service(UNNAMED, external_policy="Local")
    preferring = replace(
        BASE, services=(local_service,), advertisements=(L2Advertisement(preferences=((9, SELECTED),)),)
    )
    assert owner(ADDRESS, labelled(preferring, node1=EDGE)) == "node3"


def test_an_address_of_no_pool_is_announced_by_what_names_none():
    for pools, node in ((frozenset[str](), "node2"), (frozenset({"lan"}), None)):
        elsewhere = replace(lan(L2Advertisement(pools=pools)), pools=(EXTERNAL,))
        assert owner(ADDRESS, elsewhere) == node


@pytest.mark.parametrize(
    ("interfaces", "here"), [((), True), (("eth0",), True), (("eth1",), False), (("eth1", "eth0"), True)]
)
def test_an_owner_without_a_named_interface_is_silent_and_stays_the_owner(interfaces, here):
    only = replace(lan(L2Advertisement(interfaces=frozenset(interfaces))), silent=ME.silent)
    assert owner(ADDRESS, only) == "node1"
    assert announced(only) == ({ADDRESS} if here else frozenset())


def test_interfaces_are_those_of_all_advertisements_that_select_the_node():
    by_eth1 = L2Advertisement(interfaces=frozenset({"eth1"}))
    everywhere = L2Advertisement(node_selectors=(SELECTED,))
    found = replace(lan(by_eth1, everywhere, node1=EDGE), silent=ME.silent)
    assert announced(found) == {ADDRESS}
    assert announced(labelled(found)) == frozenset()


def test_a_stores_owners_decide_and_who_is_not_named_is_nobody():
    named = replace(BASE, owners=frozenset({(ADDRESS, "node1")}))
    assert (owner(ADDRESS, named), elected(named)) == ("node1", {ADDRESS: "node2"})
    assert announced(named) == {ADDRESS}
    nobody = replace(ME, owners=frozenset())
    assert (owners(nobody), elected(nobody), announced(nobody)) == ({}, {ADDRESS: "node1"}, frozenset())
    foreign = replace(BASE, owners=frozenset({(IPv4Address("192.0.2.250"), "node1")}))
    assert announced(foreign) == frozenset()  # no service has it


def test_addresses_of_another_class_are_not_announced_unless_one_of_ours_has_them_too():
    theirs = service(HERE, load_balancer_class="example.com/lb")
    assert announced(replace(ME, services=(theirs,))) == frozenset()
    assert announced(replace(ME, services=(theirs, replace(service(HERE), name="ours")))) == {ADDRESS}


@given(NODES, ADDRESSES, st.data())
def test_the_winner_has_the_highest_preference_and_then_the_smallest_sum(nodes, address, data):
    scores = data.draw(st.dictionaries(st.sampled_from(sorted(nodes)), st.integers(0, 3)))
    ranked = sorted((-scores.get(node, 0), hashlib.sha256(f"{node}#{address}".encode()).hexdigest()) for node in nodes)
    found = winner(nodes, address, scores)
    assert found in nodes
    assert (-scores.get(found, 0), hashlib.sha256(f"{found}#{address}".encode()).hexdigest()) == ranked[0]


SELECTORS = st.sampled_from([(), (SELECTED,), (UNLABELLED,), (Selector((("zone", "a"),)), SELECTED)])
ADVERTISEMENTS = st.builds(
    L2Advertisement,
    pools=st.sampled_from([frozenset[str](), frozenset({"lan"}), frozenset({"external"})]),
    node_selectors=SELECTORS,
    preferences=st.lists(st.tuples(st.integers(1, 100), st.sampled_from([SELECTED, UNLABELLED])), max_size=2).map(
        tuple
    ),
)
NODE_LABELS = st.sampled_from([(), EDGE, (("zone", "a"),), ((EXCLUDED, ""),)])
ENDPOINTS = st.lists(st.sampled_from([HERE, THERE, UNNAMED, NOT_READY]), max_size=3).map(tuple)


@given(
    st.none() | st.lists(ADVERTISEMENTS, max_size=3).map(tuple),
    st.tuples(NODE_LABELS, NODE_LABELS, NODE_LABELS),
    st.sets(st.sampled_from(["node1", "node2", "node3"]), max_size=2),
    ENDPOINTS,
    st.sampled_from(["Cluster", "Local"]),
)
def test_nodes_that_know_the_same_agree_and_one_at_most_announces(advertisements, labels, dead, endpoints, policy):
    named = dict(zip(("node1", "node2", "node3"), labels, strict=True))
    wanted = service(*endpoints, external_policy=policy)
    views = {}
    for me in (1, 2, 3):
        made = labelled(state(wanted, me=me, peers=tuple(each for each in (1, 2, 3) if each != me)), **named)
        views[f"node{me}"] = replace(
            made, advertisements=advertisements, pools=(POOL, EXTERNAL), silent=frozenset(dead), owners=None
        )
    assert len({owner(ADDRESS, view) for view in views.values()}) == 1
    found = owner(ADDRESS, views["node1"])
    assert [name for name, view in views.items() if announced(view)] == ([found] if found else [])
    assert found not in dead
    assert found is None or all(key != EXCLUDED for key, _ in named[found])
