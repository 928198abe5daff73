"""What virtual servers a service has, and which endpoints stand behind them."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.control.services import (
    Destination,
    ServerKey,
    Surroundings,
    build,
    changes,
    local_ready,
    virtual_addresses,
    virtual_servers,
)
from dataplane.control.state import Balancing, DesiredState, Node, ServicePort
from tests.service_states import NODE_ADDRESS, endpoint, state, states, web

VIP = IPv4Address("10.96.0.20")
EXTERNAL, BALANCED = IPv4Address("198.51.100.20"), IPv4Address("192.0.2.200")
WEB = ServerKey("TCP", VIP, 80)


def destinations(desired: DesiredState, key: ServerKey = WEB) -> dict[str, int]:
    """Weight by address of the virtual server's destinations."""
    return {str(each.address): each.weight for each in virtual_servers(desired)[key].destinations}


# --- which virtual servers -------------------------------------------------------------------------------------------


def test_each_port_has_a_virtual_server_at_each_address_of_the_service():
    ports = (ServicePort(80, "TCP", "http", 8080, 30080), ServicePort(53, "UDP", "dns"))
    service = web(
        endpoint("10.244.1.10"),
        type="LoadBalancer",
        ports=ports,
        external_ips=(EXTERNAL,),
        load_balancer_ips=(BALANCED,),
    )
    found = {str(key): (server.kind, server.port_name) for key, server in virtual_servers(state(service)).items()}
    assert found == {
        "10.96.0.20:80/TCP": ("cluster-ip", "http"),
        "198.51.100.20:80/TCP": ("external-ip", "http"),
        "192.0.2.200:80/TCP": ("load-balancer-ip", "http"),
        "192.0.2.11:30080/TCP": ("node-port", "http"),
        "10.96.0.20:53/UDP": ("cluster-ip", "dns"),
        "198.51.100.20:53/UDP": ("external-ip", "dns"),
        "192.0.2.200:53/UDP": ("load-balancer-ip", "dns"),
    }
    assert virtual_addresses(service) == (VIP, EXTERNAL, BALANCED)


def test_a_port_number_may_be_tcp_and_udp():
    service = web(endpoint("10.244.1.10"), ports=(ServicePort(53, "TCP", "a"), ServicePort(53, "UDP", "b")))
    assert [str(key) for key in virtual_servers(state(service))] == ["10.96.0.20:53/TCP", "10.96.0.20:53/UDP"]


def test_headless_and_external_names_have_none():
    assert virtual_servers(state(web(endpoint("10.244.1.10"), cluster_ips=()))) == {}
    assert virtual_servers(state(web(type="ExternalName"))) == {}


def test_node_ports_are_answered_on_the_nodes_addresses_but_not_on_loopback():
    service = web(type="NodePort", cluster_ips=(), ports=(ServicePort(80, node_port=30080),))
    addresses = (NODE_ADDRESS, IPv4Address("198.51.100.11"), IPv4Address("127.0.0.1"))
    desired = state(service, node=Node("node1", addresses=addresses))
    assert [str(key) for key in virtual_servers(desired)] == ["192.0.2.11:30080/TCP", "198.51.100.11:30080/TCP"]
    few = replace(desired, balancing=Balancing(node_port_addresses=(IPv4Network("198.51.100.0/24"),)))
    assert [str(key) for key in virtual_servers(few)] == ["198.51.100.11:30080/TCP"]


def test_of_two_services_at_one_address_and_port_the_first_has_it():
    first, second = web(), replace(web(), name="other")
    assert virtual_servers(state(first, second))[WEB].service == "default/web"


@given(states())
def test_virtual_servers_are_unique_and_belong_to_a_service(desired: DesiredState):
    names = {service.id for service in desired.services}
    around = Surroundings.of(desired)
    for key, server in virtual_servers(desired).items():
        assert server.key == key
        assert server.service in names
        assert server.no_local <= server.local
        assert len({(each.address, each.port) for each in server.destinations}) == len(server.destinations)
        assert not (server.no_local and any(each.weight for each in server.destinations))
    assert sum(len(build(service, around)) for service in desired.services) == len(virtual_servers(desired))


# --- how they schedule -----------------------------------------------------------------------------------------------


def test_a_scheduler_of_its_own_goes_before_the_nodes():
    desired = state(
        web(scheduler="wlc"), replace(web(cluster_ips=(EXTERNAL,)), name="b"), balancing=Balancing(scheduler="sed")
    )
    assert [server.scheduler for server in virtual_servers(desired).values()] == ["wlc", "sed"]


def test_maglev_looks_at_the_clients_port_as_kube_proxy_asks_for():
    desired = state(web(), balancing=Balancing(scheduler="mh"))
    assert virtual_servers(desired)[WEB].flags == {"mh-port"}
    assert virtual_servers(state(web(scheduler="sh", scheduler_flags=frozenset({"sh-fallback"}))))[WEB].flags == {
        "sh-fallback"
    }


RANGE = IPv4Network("203.0.113.0/24")
LAN = IPv4Network("192.0.2.0/24")


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [((), ()), ((RANGE,), (RANGE,)), ((LAN,), (LAN, IPv4Network("192.0.2.200/32")))],
    ids=["none", "outside", "with-the-node"],
)
def test_source_ranges_are_for_load_balancer_addresses_and_let_the_node_in_if_it_is_in_one(ranges, expected):
    service = web(type="LoadBalancer", load_balancer_ips=(BALANCED,), source_ranges=ranges)
    servers = virtual_servers(state(service))
    assert servers[ServerKey("TCP", BALANCED, 80)].ranges == expected
    assert servers[WEB].ranges == ()


# --- who is behind them ----------------------------------------------------------------------------------------------

# r ready, s serving, t terminating, d draining, - nothing of it. The pod .1.10 is here, the others are elsewhere.
CATEGORIES = """
# 10.244.1.10  10.244.2.10  10.244.2.11   Cluster                               Local
rs             rs           -             1.10 2.10                             1.10
-              rs           s             2.10                                  no-local
st             rs           -             2.10                                  1.10
st             st           -             1.10 2.10                             1.10
t              t            -             none                                  none
t              st           -             2.10                                  no-local
rst            st           -             1.10 2.10                             1.10
rst            rs           -             2.10                                  1.10
rsd            rs           -             2.10 1.10=0                           no-local 1.10=0
rsd            st           -             2.10 1.10=0                           no-local 1.10=0
rsd            -            -             1.10=0                                1.10=0
-              -            -             none                                  none
"""


def conditions(letters: str) -> dict[str, bool]:
    words = {"r": "ready", "s": "serving", "t": "terminating", "d": "draining"}
    return {word: letter in letters for letter, word in words.items()}


@pytest.mark.parametrize("row", [line.split(maxsplit=3) for line in CATEGORIES.splitlines() if line and line[0] != "#"])
def test_ready_endpoints_are_used_else_those_that_terminate_and_serve(row):
    addresses = ("10.244.1.10", "10.244.2.10", "10.244.2.11")
    given = [endpoint(address, **conditions(letters)) for address, letters in zip(addresses, row, strict=False)]
    columns = [column.split() for column in row[3].split("  ") if column.strip()]
    for policy, expected in zip(("Cluster", "Local"), columns, strict=True):
        server = virtual_servers(state(web(*given, internal_policy=policy)))[WEB]
        found = {str(each.address).removeprefix("10.244."): each.weight for each in server.destinations}
        wanted = [word for word in expected if word not in ("none", "no-local")]
        assert found == {word.removesuffix("=0"): 0 if word.endswith("=0") else 1 for word in wanted}, policy
        assert server.no_local == ("no-local" in expected), policy


def test_all_endpoints_are_ready_where_not_ready_addresses_are_published():
    given = endpoint("10.244.2.10", ready=False, terminating=True)
    assert destinations(state(web(given))) == {"10.244.2.10": 1}  # the last that still serves
    assert destinations(state(web(given, endpoint("10.244.2.11"), publish_not_ready=True))) == {
        "10.244.2.10": 1,
        "10.244.2.11": 1,
    }


POLICIES = """
# internal  external   cluster-ip  external-ip  load-balancer-ip  node-port
Cluster     Cluster    all         all          all               all
Local       Cluster    here        all          all               all
Cluster     Local      all         here         here              here
Local       Local      here        here         here              here
"""


@pytest.mark.parametrize("row", [line.split() for line in POLICIES.splitlines() if line and line[0] != "#"])
def test_traffic_policies_are_about_cluster_addresses_and_all_others(row):
    service = web(
        endpoint("10.244.1.10"), endpoint("10.244.2.10"),
        type="LoadBalancer", external_ips=(EXTERNAL,), load_balancer_ips=(BALANCED,),
        ports=(ServicePort(80, node_port=30080),), internal_policy=row[0], external_policy=row[1],
    )  # fmt: skip
    servers = virtual_servers(state(service)).values()
    kinds = ("cluster-ip", "external-ip", "load-balancer-ip", "node-port")
    found = {server.kind: "here" if server.local else "all" for server in servers}
    assert found == dict(zip(kinds, row[2:], strict=True))
    assert {server.kind: len(server.destinations) for server in servers} == {
        kind: 1 if where == "here" else 2 for kind, where in found.items()
    }


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (endpoint("10.244.1.10", node="node2"), 1),  # the address of one of our pods
        (endpoint("10.244.9.9", node="node1"), 1),
        (endpoint("192.0.2.11"), 1),  # in the host's network
        (endpoint("10.244.1.99"), 0),
        (endpoint("10.244.1.10", ready=False), 0),
        (endpoint("10.244.1.10", terminating=True), 0),
        (endpoint("10.244.1.10", draining=True), 0),
    ],
)
def test_a_health_check_counts_the_ready_endpoints_of_this_node(given, count):
    assert local_ready(web(given), Surroundings.of(state())) == count


def test_a_named_target_port_is_each_endpoints_own():
    given = (endpoint("10.244.1.10", ports=(("http", 8080),)), endpoint("10.244.2.10", ports=(("http", 9090),)))
    service = web(
        *given, endpoint("10.244.2.11"), ports=(ServicePort(80, target_port="http"), ServicePort(81, name="b"))
    )
    servers = virtual_servers(state(service))
    assert [each.port for each in servers[WEB].destinations] == [8080, 9090]
    assert [each.port for each in servers[ServerKey("TCP", VIP, 81)].destinations] == [81, 81, 81]


def test_destinations_are_in_kube_proxys_order_that_of_their_text():
    given = [endpoint(address) for address in ("10.244.2.9", "10.244.10.2", "10.244.2.10")]
    expected = [Destination(IPv4Address(each), 8080) for each in ("10.244.10.2", "10.244.2.10", "10.244.2.9")]
    assert list(virtual_servers(state(web(*given)))[WEB].destinations) == expected


# --- what changes ----------------------------------------------------------------------------------------------------


@given(st.none() | states(), st.none() | states(), st.booleans())
def test_changes_lead_from_the_old_virtual_servers_to_the_new_ones(old, new, share):
    if share and old and new:  # as an edit of one service by the API leaves it
        new = replace(new, services=(*old.services[:-1], *new.services[-1:]))
        if len({service.name for service in new.services}) < len(new.services):
            return
    servers = virtual_servers(old) if old else {}
    found = changes(old, new)
    for server in found.gone:
        assert servers.pop(server.key) == server
    for before, after in found.kept:
        assert servers[before.key] == before != after
        servers[after.key] = after
    for server in found.added:
        assert server.key not in servers
        servers[server.key] = server
    assert servers == (virtual_servers(new) if new else {})


def test_a_pod_that_comes_changes_services_with_a_local_policy_only():
    given = (endpoint("10.244.1.10"), endpoint("10.244.1.11"))
    desired = state(web(*given), replace(web(*given, cluster_ips=(EXTERNAL,), internal_policy="Local"), name="local"))
    found = changes(replace(desired, pods=()), desired)
    assert [(before.service, len(before.destinations), len(after.destinations)) for before, after in found.kept] == [
        ("default/local", 0, 1)
    ]
    assert (found.gone, found.added) == ((), ())
