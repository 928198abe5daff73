"""config: pools of load balancer addresses, who announces them, and services that wait for one."""

import re
from ipaddress import IPv4Address

import pytest

from dataplane.config import DEFAULT, parse
from dataplane.control.state import AddressPool, L2Advertisement, Selector
from tests.node_file import NODE, errors

POOL = """
[[loadBalancer.ipAddressPools]]
name = "default"
addresses = ["192.0.2.200-192.0.2.220"]
"""
WAITING = """
[[services.static]]
name = "web"
type = "LoadBalancer"
ports = [{ port = 80 }]
"""


def test_pools_advertisements_and_labels_of_peers_are_read():
    text = (
        NODE
        + 'labels = { role = "edge" }\n'
        + POOL.replace('"192.0.2.200-192.0.2.220"', '"192.0.2.200", "198.51.100.0/30"')
        + "autoAssign = false\navoidBuggyIPs = true\n[loadBalancer.ipAddressPools.serviceAllocation]\npriority = 5\n"
        + 'namespaces = ["shop"]\nserviceSelectors = [{ matchLabels = { app = "web" } }]\n'
        + '[[loadBalancer.l2Advertisements]]\nname = "edge"\nipAddressPools = ["default"]\ninterfaces = ["eth0"]\n'
        + 'nodeSelectors = [{ matchExpressions = [{ key = "role", operator = "Exists" }] }]\n'
        + 'preferredNodeSelectors = [{ weight = 7, preference = { matchLabels = { role = "edge" } } }]\n'
    )
    state = parse(text, "F").state
    web, edge = Selector((("app", "web"),)), Selector((("role", "edge"),))
    one, first, last = (IPv4Address(text) for text in ("192.0.2.200", "198.51.100.0", "198.51.100.3"))
    assert state.pools == (
        AddressPool("default", ((one, one), (first, last)), False, True, 5, frozenset({"shop"}), (web,)),
    )
    exists = Selector((), (("role", "Exists", ()),))
    assert state.advertisements == (
        L2Advertisement("edge", frozenset({"default"}), (exists,), frozenset({"eth0"}), ((7, edge),)),
    )
    assert state.peers[0].labels == (("role", "edge"),)


def test_a_service_may_wait_for_an_address_and_ask_for_one():
    (service,) = parse(NODE + WAITING + 'loadBalancerIP = "192.0.2.201"\n', "F").state.services
    assert (service.load_balancer_ips, service.requested_ip) == ((), IPv4Address("192.0.2.201"))
    refused = errors(NODE + WAITING.replace("LoadBalancer", "ClusterIP"))
    assert [line.split(": ", 1)[1] for line in refused] == [
        'services.static[0].clusterIPs: missing; expected an address, or ["None"] for a headless service'
    ]
    assert errors(NODE + WAITING + 'loadBalancerClass = "example.com/lb"\n')  # nobody here would give it one


def test_the_commented_example_is_right():
    comment = DEFAULT.read_text().split("# [[loadBalancer.ipAddressPools]]")[1].split("#\n# A node among others")[0]
    text = "[[loadBalancer.ipAddressPools]]" + re.sub(r"^# ?", "", comment, flags=re.MULTILINE)
    state = parse(NODE + text, "F").state
    assert state.pools[0].name == "default"
    assert state.advertisements is not None


RANGE = "192.0.2.200-192.0.2.220"
HERE = "loadBalancer.ipAddressPools[0].addresses[0]"
WRONG = [
    ('["192.0.2.200-192.0.2.220"]', "[]", "loadBalancer.ipAddressPools[0].addresses: expected at least one range"),
    (RANGE, "192.0.2.9-192.0.2.11", f"{HERE}: 192.0.2.9-192.0.2.11 has addresses of node.addresses (192.0.2.11)"),
    (RANGE, "192.0.2.12/32", f"{HERE}: 192.0.2.12-192.0.2.12 has addresses of peers[0].address (192.0.2.12)"),
    (
        RANGE,
        "10.244.1.128/25",
        f"{HERE}: 10.244.1.128-10.244.1.255 has addresses of pods.cidr (10.244.1.0-10.244.1.255)",
    ),
    (
        RANGE,
        "10.244.0.0-10.244.2.0",
        f"{HERE}: 10.244.0.0-10.244.2.0 has addresses of peers[0].podCIDR (10.244.2.0-10.244.2.255)",
    ),
    (RANGE, "2001:db8::/64", f"{HERE}: IPv6 is not supported yet"),
    (RANGE, "192.0.2.9-192.0.2.1", f"{HERE}: expected a prefix or a range"),
    (
        "addresses =",
        'addresses = ["192.0.2.210"]\n[[loadBalancer.ipAddressPools]]\nname = "other"\naddresses =',
        f"loadBalancer.ipAddressPools[1].addresses[0]: {RANGE} overlaps 192.0.2.210-192.0.2.210 of pool default",
    ),
    (
        '220"]',
        '220"]\n[[loadBalancer.ipAddressPools]]\nname = "default"\naddresses = ["192.0.2.221"]',
        "loadBalancer.ipAddressPools[1].name: used twice",
    ),
    (
        '220"]',
        '220"]\n[[loadBalancer.l2Advertisements]]\nipAddressPools = ["none"]',
        "loadBalancer.l2Advertisements[0].ipAddressPools[0]: no such pool (got none)",
    ),
    (
        '220"]',
        '220"]\n[[loadBalancer.l2Advertisements]]\npreferredNodeSelectors = [{ weight = 101, preference = {} }]',
        "loadBalancer.l2Advertisements[0].preferredNodeSelectors[0].weight: expected a number from 1 to 100",
    ),
    (
        '220"]',
        '220"]\n[[loadBalancer.l2Advertisements]]\npreferredNodeSelectors = [{ weight = 3 }]',
        "loadBalancer.l2Advertisements[0].preferredNodeSelectors[0].preference: missing; expected a table",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), WRONG)
def test_what_is_wrong_with_pools_is_said_with_its_key(old, new, expected):
    assert any(line.split(": ", 1)[1].startswith(expected) for line in errors(NODE + POOL.replace(old, new)))
    assert errors(NODE + POOL) == []


@pytest.mark.parametrize(
    ("store", "pools", "advertisements"),
    [
        ('"etcd"\netcd.prefix = "/x"', "keys /x/pools/NAME", "keys /x/advertisements/NAME"),
        ('"kubernetes"', "objects of kind IPAddressPool", "objects of kind L2Advertisement"),
    ],
)
def test_pools_are_the_stores_where_there_is_one(store, pools, advertisements):
    found = errors(f"{NODE}{POOL}[[loadBalancer.l2Advertisements]]\n[state]\nsource = {store}")
    source = store.split("\n")[0]
    assert [line.split(": ", 1)[1] for line in found] == [
        f"loadBalancer.ipAddressPools: with state.source = {source} these are {pools}",
        f"loadBalancer.l2Advertisements: with state.source = {source} these are {advertisements}",
    ]
