"""assigner: services of a state get addresses, others stay the objects that they were, and a memo changes nothing."""

import logging
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, ip_address
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.control.assigner import Assigner, SourceName, report
from dataplane.control.state import Address, AddressPool, DesiredState, Endpoint, Node, Service, ServicePort

POOL = AddressPool("default", ((ip_address("192.0.2.1"), ip_address("192.0.2.2")),))
FIRST, SECOND = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")


def balanced(name: str, **more) -> Service:
    return Service(name, type="LoadBalancer", ports=(ServicePort(80),), **more)


def state(*services: Service, pools: tuple[AddressPool, ...] = (POOL,), **more) -> DesiredState:
    return DesiredState(Node("node1"), services=services, pools=pools, **more)


class Running:
    """A node that applies what its assigner makes of a state, unless it refuses."""

    def __init__(self, source: SourceName = "static") -> None:
        self.state: DesiredState | None = None
        self.assign = Assigner(source, lambda: self.state)

    def become(self, wanted: DesiredState) -> DesiredState:
        self.state = self.assign(wanted)
        return self.state


def having(made: DesiredState) -> dict[str, tuple[Address, ...]]:
    return {service.name: service.load_balancer_ips for service in made.services}


A, B, C, PLAIN = balanced("a"), balanced("b"), balanced("c"), Service("plain")


def test_services_get_addresses_and_the_state_says_who_and_who_not():
    made = Running().become(state(A, PLAIN, B, C))
    assert having(made) == {"a": (FIRST,), "plain": (), "b": (SECOND,), "c": ()}
    assert made.assigned == {"default/a": (FIRST,), "default/b": (SECOND,)}
    assert made.refused == {"default/c": "no IPv4 address is free in pool default"}
    assert made.services[1] is PLAIN


def test_what_does_not_change_stays_the_same_object():
    node = Running()
    first = node.become(state(A, PLAIN, B))
    assert node.become(state(A, PLAIN, B)).services == first.services
    more = replace(A, endpoints=(Endpoint(IPv4Address("10.244.1.10")),))
    second = node.become(state(more, PLAIN, B))
    assert having(second) == having(first)
    assert [a is b for a, b in zip(first.services, second.services, strict=True)] == [False, True, True]
    assert second.assigned is first.assigned
    third = node.become(state(more, B))
    assert [service is third.services[at] for at, service in ((0, second.services[0]), (1, second.services[2]))]
    assert third.services[1] is second.services[2]


def test_a_state_without_such_services_is_not_touched():
    node = Running()
    wanted = state(PLAIN, pools=())
    assert node.become(wanted) is wanted
    assert node.become(wanted) is wanted


def test_services_stay_the_same_tuple_while_nothing_is_assigned():
    node = Running()
    wanted = state(PLAIN, A, pools=())
    made = node.become(wanted)
    assert made.services is wanted.services
    assert made.refused == {"default/a": "there is no address pool"}


def test_an_address_is_free_again_only_when_the_node_has_given_it_up():
    node = Running()
    node.become(state(A, B))
    node.assign(state(C))  # refused for another reason: the node stays what it is
    assert having(node.become(state(A, B, C))) == {"a": (FIRST,), "b": (SECOND,), "c": ()}
    assert having(node.become(state(B, C))) == {"b": (SECOND,), "c": (FIRST,)}


def test_addresses_of_the_file_come_before_those_of_pools():
    node = Running()
    node.become(state(A))
    by_hand = replace(C, load_balancer_ips=(FIRST,))
    made = node.become(state(A, by_hand))
    assert having(made) == {"a": (SECOND,), "c": (FIRST,)}
    assert made.assigned == {"default/a": (SECOND,)}
    assert having(node.become(state(replace(A, load_balancer_ips=(SECOND,)), by_hand))) == {
        "a": (SECOND,),
        "c": (FIRST,),
    }


def test_an_address_that_is_given_by_hand_after_all_is_not_missed_when_the_pool_goes():
    node = Running()
    node.become(state(A))
    by_hand = state(replace(A, load_balancer_ips=(FIRST,)), pools=())
    made = node.become(by_hand)
    assert (having(made), made.assigned, made.refused) == ({"a": (FIRST,)}, {}, {})


def test_who_waits_for_an_address_to_share_gets_it_when_the_endpoints_are_the_same():
    notes = (("metallb.io/allow-shared-ip", "key"),)
    one, other = (Endpoint(IPv4Address(f"10.244.1.{number}")) for number in (10, 11))
    first = balanced("a", annotations=notes, external_policy="Local", endpoints=(one,))
    second = replace(first, name="b", ports=(ServicePort(81),), endpoints=(other,))
    node, small = Running(), (AddressPool("small", ((FIRST, FIRST),)),)
    assert having(node.become(state(first, second, pools=small))) == {"a": (FIRST,), "b": ()}
    made = node.become(state(first, replace(second, endpoints=(one,)), pools=small))
    assert having(made) == {"a": (FIRST,), "b": (FIRST,)}


def test_in_etcd_addresses_are_handed_out_as_they_are_written():
    node = Running("etcd")
    services = [replace(each, origin="etcd") for each in (A, B)]
    made = node.become(state(*services, C, assigned={"default/b": (FIRST,)}))
    assert having(made) == {"a": (), "b": (FIRST,), "c": ()}
    assert made.assigned == {"default/b": (FIRST,)}
    assert made.refused == {
        "default/c": "a service of this node alone gets no address by itself while state.source is etcd"
    }
    plain = replace(services[1], type="ClusterIP")
    assert having(node.become(state(plain, assigned={"default/b": (FIRST,)}))) == {"b": ()}
    full = node.become(state(services[0], pools=(), assigned={}))
    assert full.refused == {"default/a": "there is no address pool"}


def test_kubernetes_services_say_themselves_what_they_have():
    services = [replace(each, origin="kubernetes") for each in (replace(A, load_balancer_ips=(FIRST,)), B, C)]
    made = Running("kubernetes").become(state(*services, pools=(replace(POOL, auto_assign=False),)))
    assert having(made) == {"a": (FIRST,), "b": (), "c": ()}
    assert not made.assigned
    assert made.refused.keys() == {"default/b", "default/c"}
    by_others = replace(services[0], load_balancer_ips=(IPv4Address("198.51.100.1"),))
    assert Running("kubernetes").become(state(by_others, pools=())).refused == {}


NAMES = st.sampled_from("abcd")
ENDPOINTS = st.sampled_from([(), (Endpoint(IPv4Address("10.244.1.10")),), (Endpoint(IPv4Address("10.244.1.11")),)])
SERVICES = st.builds(
    lambda name, kind, port, endpoints, policy, notes, given: Service(
        name,
        type=kind,
        ports=(ServicePort(port),),
        endpoints=endpoints,
        external_policy=policy,
        annotations=notes,
        load_balancer_ips=given,
    ),
    NAMES,
    st.sampled_from(["LoadBalancer", "LoadBalancer", "ClusterIP"]),
    st.sampled_from([80, 81]),
    ENDPOINTS,
    st.sampled_from(["Cluster", "Local"]),
    st.sampled_from([(), (("metallb.io/allow-shared-ip", "k"),)]),
    st.sampled_from([(), (), (FIRST,)]),
)
STEPS = st.lists(st.tuples(SERVICES, st.booleans(), st.sampled_from([(), (POOL,), (POOL,)])), max_size=12)


def _itself(state: DesiredState | None) -> DesiredState | None:
    return state


@settings(max_examples=300)
@given(STEPS)
def test_a_memo_changes_nothing(steps):
    node, services = Running(), dict[str, Service]()
    for new, applied, pools in steps:
        services[new.name] = new
        wanted = state(*services.values(), pools=pools)
        held, old = node.state, node.assign._memo.services
        made = node.assign(wanted)
        fresh = Assigner("static", partial(_itself, held))
        # All that is to be remembered is who was edited: of two services in conflict that one moves.
        fresh._memo = replace(fresh._memo, services=old, held={"": ()}, assigned={"": ()})
        again = fresh(wanted)
        assert (made.services, made.assigned, made.refused) == (again.services, again.assigned, again.refused)
        if applied:
            node.state = made


def test_changes_are_logged_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    node = Running()
    states = [
        None,
        node.become(state(A, B, C)),
        node.become(state(replace(A, source_ranges=()), B, C)),
        node.become(state(B, C)),
    ]
    lines = []
    for before, after in pairwise(states):
        assert after is not None
        report(before, after)
        lines.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    assert lines == [
        [
            "load balancer addresses service=default/a addresses=192.0.2.1",
            "load balancer addresses service=default/b addresses=192.0.2.2",
            "no load balancer address service=default/c: no IPv4 address is free in pool default",
        ],
        [],
        [
            "load balancer addresses service=default/a addresses=none instead of 192.0.2.1",
            "load balancer addresses service=default/c addresses=192.0.2.1",
        ],
    ]
