"""loadbalancer: MetalLB's rules, one by one."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from dataplane.control.loadbalancer import Outcome, allocate
from dataplane.control.pools import contains, size, usage
from dataplane.control.state import Endpoint, Selector, Service, ServicePort
from tests.balanced import addresses, pool, service


def given(outcome: Outcome) -> dict[str, str]:
    """Return what services have by their short names; a reason in brackets where they have nothing."""
    found = {name: " ".join(map(str, each)) for name, each in outcome.addresses.items()}
    found |= {name: f"({why})" for name, why in outcome.refusals.items()}
    return {name.removeprefix("default/"): text for name, text in sorted(found.items())}


SMALL = pool("192.0.2.1-192.0.2.3")
SHARE = {"allow-shared-ip": "key"}


# --- assignment ------------------------------------------------------------------------------------------------------


def test_services_get_the_first_free_addresses_in_their_order():
    found = allocate([service("b"), service("a"), Service("c", type="NodePort")], [SMALL], {})
    assert given(found) == {"b": "192.0.2.1", "a": "192.0.2.2"}


def test_ranges_are_searched_in_the_order_of_the_file_and_pools_too():
    pools = [pool("192.0.2.9 192.0.2.1", "one"), pool("192.0.2.5", "two")]
    found = allocate([service(name) for name in "abc"], pools, {})
    assert given(found) == {"a": "192.0.2.9", "b": "192.0.2.1", "c": "192.0.2.5"}


def test_what_is_held_stays_whatever_comes_and_goes():
    held = {"default/b": addresses("192.0.2.2")}
    found = allocate([service("a"), service("b"), service("c")], [SMALL], held)
    assert given(found) == {"a": "192.0.2.1", "b": "192.0.2.2", "c": "192.0.2.3"}


def test_a_full_pool_refuses_and_gives_again_what_is_released():
    services = [service(name) for name in "abcd"]
    full = allocate(services, [SMALL], {})
    assert given(full)["d"] == "(no IPv4 address is free in pool default)"
    after = allocate([services[0], *services[2:]], [SMALL], full.addresses)
    assert given(after) == {"a": "192.0.2.1", "c": "192.0.2.3", "d": "192.0.2.2"}


def test_a_service_of_another_type_gives_its_address_back():
    held = {"default/a": addresses("192.0.2.1")}
    found = allocate([replace(service("a"), type="ClusterIP"), service("b")], [SMALL], held)
    assert given(found) == {"b": "192.0.2.1"}


def test_a_pool_that_shrinks_or_vanishes_takes_its_addresses_back():
    held = {"default/a": addresses("192.0.2.3")}
    assert given(allocate([service("a")], [pool("192.0.2.1-192.0.2.2")], held)) == {"a": "192.0.2.1"}
    assert given(allocate([service("a")], [], held)) == {"a": "(there is no address pool)"}


def test_a_pool_that_is_renamed_or_no_more_automatic_takes_nothing_back():
    held = {"default/a": addresses("192.0.2.2")}
    assert given(allocate([service("a")], [replace(SMALL, name="other", auto_assign=False)], held)) == {
        "a": "192.0.2.2"
    }


def test_a_pool_without_auto_assign_gives_only_to_those_who_ask():
    manual = replace(SMALL, auto_assign=False)
    by_name, by_address = {"address-pool": "default"}, {"loadBalancerIPs": "192.0.2.3"}
    found = allocate([service("a"), service("b", notes=by_name), service("c", notes=by_address)], [manual], {})
    assert given(found) == {
        "a": "(no pool gives addresses to this service by itself (autoAssign, serviceAllocation))",
        "b": "192.0.2.1",
        "c": "192.0.2.3",
    }


def test_buggy_addresses_are_avoided_where_the_pool_says_so():
    buggy = pool("192.0.2.255-198.51.100.1", avoid_buggy_ips=True)
    found = allocate([service("a"), service("b", notes={"loadBalancerIPs": "192.0.2.255"})], [buggy], {})
    assert given(found) == {"a": "192.0.3.1", "b": "(192.0.2.255 is in no pool)"}
    held = {"default/a": addresses("192.0.2.255")}
    assert given(allocate([service("a")], [buggy], held)) == {"a": "192.0.3.1"}


def test_a_huge_pool_is_not_listed():
    huge = pool("10.0.0.0-10.255.255.255", avoid_buggy_ips=True)
    assert size(huge) == (1 << 24) - 2 * (1 << 16)
    found = allocate([service(f"s{number}") for number in range(1000)], [huge], {})
    assert found.addresses["default/s999"] == addresses("10.0.3.238")  # 254 of each 256


def test_services_of_a_class_are_somebody_elses_and_their_addresses_nobodys():
    theirs = service("a", load_balancer_class="example.com/lb", load_balancer_ips=addresses("192.0.2.1"))
    waiting = service("b", load_balancer_class="example.com/lb")
    assert given(allocate([service("c"), theirs, waiting], [SMALL], {})) == {"c": "192.0.2.2"}
    held = {"default/b": addresses("192.0.2.1")}
    assert given(allocate([service("c"), waiting], [SMALL], held)) == {"c": "192.0.2.1"}


def test_addresses_that_are_given_by_hand_are_left_alone_and_given_to_nobody_else():
    by_hand = service("a", load_balancer_ips=addresses("192.0.2.1"))
    assert given(allocate([service("b"), by_hand], [SMALL], {})) == {"b": "192.0.2.2"}
    held = {"default/b": addresses("192.0.2.1")}
    assert given(allocate([service("b"), by_hand], [SMALL], held)) == {"b": "192.0.2.2"}


# --- what is asked for -----------------------------------------------------------------------------------------------

ASKING = [
    ("an address", {"loadBalancerIPs": "192.0.2.2"}, "192.0.2.2"),
    ("an address that another has", {"loadBalancerIPs": "192.0.2.1"}, "(192.0.2.1 is in use by default/first)"),
    ("an address of no pool", {"loadBalancerIPs": "198.51.100.1"}, "(198.51.100.1 is in no pool)"),
    ("no address", {"loadBalancerIPs": "any"}, "(annotation loadBalancerIPs: expected addresses (got 'any'))"),
    (
        "two of a family",
        {"loadBalancerIPs": "192.0.2.1,192.0.2.2"},
        "(annotation loadBalancerIPs: expected one address of a family (got '192.0.2.1,192.0.2.2'))",
    ),
    ("another family", {"loadBalancerIPs": "2001:db8::1"}, "(2001:db8::1: not of the families that the service has)"),
    ("a pool", {"address-pool": "manual"}, "192.0.2.10"),
    ("a pool that is not there", {"address-pool": "none"}, "(pool none is asked for and does not exist)"),
    ("a pool of others", {"address-pool": "pinned"}, "(pool pinned is asked for and is for other services)"),
    (
        "an address of others",
        {"loadBalancerIPs": "192.0.2.20"},
        "(192.0.2.20 is in pool pinned, which is for other services)",
    ),
    ("an address and its pool", {"loadBalancerIPs": "192.0.2.10", "address-pool": "manual"}, "192.0.2.10"),
    (
        "an address and another pool",
        {"loadBalancerIPs": "192.0.2.2", "address-pool": "manual"},
        "(192.0.2.2 is not in pool manual, which is asked for)",
    ),
]
POOLS = [
    SMALL,
    pool("192.0.2.10", "manual", auto_assign=False),
    pool("192.0.2.20", "pinned", namespaces=frozenset({"other"})),
]


@pytest.mark.parametrize(("notes", "expected"), [row[1:] for row in ASKING], ids=[row[0] for row in ASKING])
def test_who_asks_for_something_gets_that_or_a_reason(notes, expected):
    first = service("first", notes={"loadBalancerIPs": "192.0.2.1"})
    assert given(allocate([first, service("a", notes=notes)], POOLS, {}))["a"] == expected


def test_the_old_names_of_annotations_and_the_field_of_the_specification_count_too():
    old = replace(service("a"), annotations=(("metallb.universe.tf/loadBalancerIPs", "192.0.2.3"),))
    field = service("b", requested_ip=IPv4Address("192.0.2.2"))
    both = service("c", notes={"loadBalancerIPs": "192.0.2.1"}, requested_ip=IPv4Address("192.0.2.1"))
    assert given(allocate([old, field, both], [SMALL], {})) == {
        "a": "192.0.2.3",
        "b": "192.0.2.2",
        "c": "(asks twice: by the annotation loadBalancerIPs and by loadBalancerIP)",
    }


def test_who_asks_for_an_address_comes_before_those_who_take_any():
    asking = service("z", notes={"loadBalancerIPs": "192.0.2.1"})
    assert given(allocate([service("a"), asking], [SMALL], {})) == {"z": "192.0.2.1", "a": "192.0.2.2"}


def test_who_asks_for_something_else_than_it_holds_gets_that():
    held = {"default/a": addresses("192.0.2.1")}
    for notes, expected in (
        ({"loadBalancerIPs": "192.0.2.3"}, "192.0.2.3"),
        ({"address-pool": "manual"}, "192.0.2.10"),
    ):
        assert given(allocate([service("a", notes=notes)], POOLS, held)) == {"a": expected}


# --- pools for some --------------------------------------------------------------------------------------------------


def test_pools_by_namespace_come_before_the_others():
    pools = [SMALL, pool("192.0.2.30", "shop", namespaces=frozenset({"shop"}))]
    services = [service("a"), service("b", namespace="shop"), service("c", namespace="shop")]
    assert given(allocate(services, pools, {})) == {"a": "192.0.2.1", "shop/b": "192.0.2.30", "shop/c": "192.0.2.2"}


def test_pools_by_selector_come_before_the_others():
    selectors = (Selector((("app", "web"),)), Selector((("app", "db"),)))
    pools = [SMALL, pool("192.0.2.30-192.0.2.31", "labelled", service_selectors=selectors)]
    services = [service("a"), service("b", labels=(("app", "db"),)), service("c", labels=(("app", "web"),))]
    assert given(allocate(services, pools, {})) == {"a": "192.0.2.1", "b": "192.0.2.30", "c": "192.0.2.31"}


def test_a_pool_by_namespace_and_selector_wants_both():
    both = pool(
        "192.0.2.30",
        "both",
        namespaces=frozenset({"shop"}),
        service_selectors=(Selector((("app", "web"),)),),
    )
    labels = (("app", "web"),)
    services = [service("a", labels=labels), service("b", namespace="shop")]
    reason = "(no pool gives addresses to this service by itself (autoAssign, serviceAllocation))"
    assert given(allocate(services, [both], {})) == {"a": reason, "shop/b": reason}
    assert given(allocate([service("c", namespace="shop", labels=labels)], [both], {})) == {"shop/c": "192.0.2.30"}


def test_the_lowest_priority_is_first_and_none_is_last():
    shop = frozenset({"shop"})
    pools = [
        pool("192.0.2.30", "none", namespaces=shop),
        pool("192.0.2.31", "second", namespaces=shop, priority=20),
        pool("192.0.2.32", "first", namespaces=shop, priority=10),
        pool("192.0.2.33", "also second", namespaces=shop, priority=20),
    ]
    found = allocate([service(name, namespace="shop") for name in "abcd"], pools, {})
    assert [str(each[0]) for each in found.addresses.values()] == [
        "192.0.2.32",
        "192.0.2.31",
        "192.0.2.33",
        "192.0.2.30",
    ]


def test_a_namespace_that_a_pool_no_more_is_for_loses_its_addresses():
    held = {"default/a": addresses("192.0.2.30")}
    pools = [SMALL, pool("192.0.2.30", "shop", namespaces=frozenset({"shop"}))]
    assert given(allocate([service("a")], pools, held)) == {"a": "192.0.2.1"}


# --- sharing ---------------------------------------------------------------------------------------------------------

LOCAL = {"external_policy": "Local", "selector": (("app", "web"),)}
ONE = pool("192.0.2.1")
SHARING = [
    ("the same key and other ports", service("b", port=443, notes=SHARE), "192.0.2.1"),
    ("the same port of another protocol", service("b", notes=SHARE, ports=(ServicePort(80, "UDP"),)), "192.0.2.1"),
    ("no key", service("b", port=443), "(192.0.2.1 is in use by default/a)"),
    (
        "another key",
        service("b", port=443, notes={"allow-shared-ip": "other"}),
        "(192.0.2.1 is in use by default/a with another sharing key ('key'))",
    ),
    ("the same port", service("b", notes=SHARE), "(port 80/TCP of 192.0.2.1 is in use by default/a)"),
    (
        "one of the same ports",
        service("b", notes=SHARE, ports=(ServicePort(81), ServicePort(80))),
        "(port 80/TCP of 192.0.2.1 is in use by default/a)",
    ),
    (
        "local pods",
        service("b", port=443, notes=SHARE, **LOCAL),
        "(192.0.2.1 is in use by default/a, whose pods may be on other nodes)",
    ),
]


@pytest.mark.parametrize(("other", "expected"), [row[1:] for row in SHARING], ids=[row[0] for row in SHARING])
def test_an_address_is_shared_with_one_that_has(other, expected):
    first = service("a", notes=SHARE | {"loadBalancerIPs": "192.0.2.1"})
    asking = replace(other, annotations=(*other.annotations, ("metallb.io/loadBalancerIPs", "192.0.2.1")))
    assert given(allocate([first, asking], [ONE], {}))["b"] == expected
    without = "192.0.2.1" if expected[0] != "(" else "(no IPv4 address is free in pool default)"
    assert given(allocate([first, other], [ONE], {}))["b"] == without


def test_a_port_of_udp_is_taken_for_udp():
    udp: dict[str, Any] = {"notes": SHARE, "ports": (ServicePort(53, "UDP"),)}
    found = allocate([service("a", **udp), service("b", **udp), service("c", port=53, notes=SHARE)], [SMALL], {})
    assert given(found) == {"a": "192.0.2.1", "b": "192.0.2.2", "c": "192.0.2.1"}


def test_two_local_services_share_an_address_if_they_have_the_same_pods():
    one, other = (service(name, port=port, notes=SHARE, **LOCAL) for name, port in (("a", 80), ("b", 81)))
    elsewhere = replace(other, selector=(("app", "db"),))
    assert given(allocate([one, other], [SMALL], {})) == {"a": "192.0.2.1", "b": "192.0.2.1"}
    assert given(allocate([one, elsewhere], [SMALL], {})) == {"a": "192.0.2.1", "b": "192.0.2.2"}


def test_without_a_selector_the_endpoints_tell_when_an_address_is_given_and_no_more_later():
    first, second = (Endpoint(ip_address(f"10.244.1.{number}")) for number in (10, 11))
    one = service("a", notes=SHARE, external_policy="Local", endpoints=(first, second))
    other = service("b", port=81, notes=SHARE, external_policy="Local", endpoints=(second, first))
    shared = allocate([one, other], [SMALL], {})
    assert given(shared) == {"a": "192.0.2.1", "b": "192.0.2.1"}
    fewer = replace(other, endpoints=(second,))
    assert given(allocate([one, fewer], [SMALL], {})) == {"a": "192.0.2.1", "b": "192.0.2.2"}
    assert allocate([one, fewer], [SMALL], shared.addresses).addresses == shared.addresses


def test_a_shared_address_that_comes_first_is_taken_before_a_free_one_and_the_other_way_round():
    early = service("a", notes=SHARE | {"loadBalancerIPs": "192.0.2.1"})
    late = service("a", notes=SHARE | {"loadBalancerIPs": "192.0.2.2"})
    assert given(allocate([early, service("b", port=81, notes=SHARE)], [SMALL], {}))["b"] == "192.0.2.1"
    assert given(allocate([late, service("b", port=81, notes=SHARE)], [SMALL], {}))["b"] == "192.0.2.1"


def test_of_two_that_cannot_share_any_more_the_one_that_was_edited_moves():
    held = {f"default/{name}": addresses("192.0.2.1") for name in "ab"}
    edited, other = service("a", notes={"allow-shared-ip": "new"}), service("b", port=81, notes=SHARE)
    found = allocate([edited, other], [SMALL], held, changed={"default/a"})
    assert given(found) == {"a": "192.0.2.2", "b": "192.0.2.1"}


def test_a_service_alone_on_its_address_may_change_its_key():
    held = {"default/a": addresses("192.0.2.2")}
    found = allocate([service("a", notes={"allow-shared-ip": "new"})], [SMALL], held, changed={"default/a"})
    assert given(found) == {"a": "192.0.2.2"}


# --- two families ----------------------------------------------------------------------------------------------------

BOTH = addresses("10.96.0.1", "2001:db8:96::1")
FOUR, SIX, DUAL = pool("192.0.2.1", "4"), pool("2001:db8::1", "6"), pool("2001:db8::2 192.0.2.2", "46")
FAMILIES = [
    ("single stack takes the first", "SingleStack", BOTH, [DUAL], "192.0.2.2"),
    ("single stack of version 6", "SingleStack", BOTH[::-1], [FOUR, DUAL], "2001:db8::2"),
    ("both of one pool", "RequireDualStack", BOTH, [FOUR, SIX, DUAL], "192.0.2.2 2001:db8::2"),
    ("both, the second family first", "RequireDualStack", BOTH[::-1], [DUAL], "2001:db8::2 192.0.2.2"),
    ("never of two pools", "RequireDualStack", BOTH, [FOUR, SIX], "(no IPv4 and IPv6 address is free in pools 4, 6)"),
    ("both preferred: a pool with both", "PreferDualStack", BOTH, [FOUR, DUAL], "192.0.2.2 2001:db8::2"),
    ("both preferred: else the first family", "PreferDualStack", BOTH, [SIX, FOUR], "192.0.2.1"),
    ("both preferred: else the other", "PreferDualStack", BOTH, [SIX], "2001:db8::1"),
    (
        "both, with one cluster IP",
        "RequireDualStack",
        BOTH[:1],
        [DUAL],
        "(wants addresses of both families, but its cluster IPs are of one)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "cluster_ips", "pools", "expected"), [row[1:] for row in FAMILIES], ids=[row[0] for row in FAMILIES]
)
def test_families(policy, cluster_ips, pools, expected):
    wanting = service("a", family_policy=policy, cluster_ips=cluster_ips)
    assert given(allocate([wanting], pools, {})) == {"a": expected}


def test_a_service_that_prefers_both_gets_the_other_when_its_pool_has_one():
    wanting = service("a", family_policy="PreferDualStack", cluster_ips=BOTH)
    held = {"default/a": addresses("192.0.2.2")}
    assert given(allocate([wanting], [DUAL], held)) == {"a": "192.0.2.2 2001:db8::2"}
    assert given(allocate([replace(wanting, family_policy="RequireDualStack")], [SIX], held)) == {
        "a": "(no IPv4 and IPv6 address is free in pool 6)"
    }


def test_an_additional_address_is_not_one_that_another_holds():
    one, other = (service(name, family_policy="PreferDualStack", cluster_ips=BOTH) for name in "ab")
    held = {"default/a": addresses("192.0.2.2"), "default/b": addresses("2001:db8::2")}
    assert given(allocate([one, other], [DUAL], held)) == {"a": "192.0.2.2", "b": "2001:db8::2"}


# --- how full pools are ----------------------------------------------------------------------------------------------


def test_use_is_counted_by_pool_and_a_shared_address_once():
    ips = addresses("192.0.2.2")
    services = [service("a", load_balancer_ips=ips), service("b", load_balancer_ips=ips)]
    services += [service("c", load_balancer_ips=addresses("198.51.100.1"))]
    found = usage([SMALL, pool("192.0.2.10", "other")], services)
    assert [(use.pool.name, use.total, use.in_use, use.services) for use in found] == [
        ("default", 3, 1, 2),
        ("other", 1, 0, 0),
    ]


@pytest.mark.parametrize(
    "text", ["192.0.1.254-192.0.4.1", "192.0.2.0-192.0.2.0", "192.0.2.1-192.0.2.254", "0.0.0.0-0.0.3.2"]
)
def test_the_size_of_a_pool_is_the_number_of_addresses_that_are_in_it(text):
    for avoid in (False, True):
        counted = pool(text, avoid_buggy_ips=avoid)
        (first, last), *_ = counted.ranges
        every = [IPv4Address(number) for number in range(int(first), int(last) + 1)]
        assert size(counted) == sum(contains(counted, address) for address in every)
