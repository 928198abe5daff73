"""Edits by the control API: the same checks and words as in the file, and what is kept."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from dataplane import config_edit
from dataplane.config import ConfigError
from dataplane.control.api import MissingError
from dataplane.control.overlay import Overlay
from dataplane.control.state import Balancing, Endpoint, Peer, Service, ServicePort
from tests.service_states import endpoint, state, web

A, B = endpoint("10.244.1.10"), endpoint("10.244.2.10")
NODE_PORT = (ServicePort(80, node_port=30080),)
OTHER = replace(web(A, type="NodePort", cluster_ips=(IPv4Address("10.96.0.21"),), ports=NODE_PORT), name="other")
PEER = Peer("node2", IPv4Address("192.0.2.12"), (IPv4Network("10.244.2.0/24"),), 2)
STATE = state(web(A, B), OTHER, balancing=Balancing(service_cidrs=(IPv4Network("10.96.0.0/12"),)), peers=(PEER,))
WEB: dict[str, Any] = {"name": "web", "clusterIPs": ["10.96.0.20"], "ports": [{"port": 80, "targetPort": 9090}]}


def edited(edit: str, *values: Any) -> dict[str, Service]:
    overlay: Overlay = getattr(config_edit, edit)(*values, Overlay(), STATE)
    return {service.id: service for service in overlay.over(STATE.services)}


def refused(edit: str, *values: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        edited(edit, *values)
    return list(error.value.errors)


def test_a_service_is_set_whole_but_keeps_its_endpoints_if_none_are_given():
    found = edited("set_service", WEB)["default/web"]
    assert found == replace(web(A, B, ports=(ServicePort(80, target_port=9090),)), origin="api")


def test_endpoints_that_are_given_are_all_that_it_has():
    assert edited("set_service", WEB | {"endpoints": [{"ip": "10.244.1.11"}]})["default/web"].endpoints == (
        endpoint("10.244.1.11"),
    )
    assert edited("set_service", WEB | {"endpoints": []})["default/web"].endpoints == ()


def test_a_new_service_comes_with_its_namespace():
    new = {"name": "db", "namespace": "prod", "clusterIPs": ["10.96.0.30"], "ports": [{"port": 5432}]}
    assert edited("set_service", new)["prod/db"].cluster_ips == (IPv4Address("10.96.0.30"),)


ERRORS = [
    ({"ports": [{"port": "x"}]}, 'ports[0].port: expected a number from 1 to 65535 (got "x")'),
    ({"schedular": "rr"}, 'schedular: unknown key; did you mean "scheduler"?'),
    ({"loadBalancerClass": "x"}, 'loadBalancerClass: needs type = "LoadBalancer" (got "ClusterIP")'),
    ({"clusterIPs": ["192.0.2.50"]}, "clusterIPs[0]: expected an address inside services.serviceCIDR 10.96.0.0/12"),
    ({"externalIPs": ["10.244.1.77"]}, "externalIPs[0]: expected an address outside pods.cidr 10.244.1.0/24"),
    ({"externalIPs": ["10.244.2.77"]}, "externalIPs[0]: expected an address outside the block of node2 10.244.2.0/24"),
    ({"clusterIPs": ["10.96.0.21"]}, "ports[0].port: used twice: 10.96.0.21:80/TCP is also default/other"),
    (
        {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]},
        "ports[0].nodePort: used twice: 30080/TCP is also default/other",
    ),
    ({"externalIPs": ["10.96.0.20"]}, "externalIPs[0]: used twice: 10.96.0.20 is also clusterIPs[0]"),
    (
        {"ports": [{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]},
        "ports[1].port: used twice: 10.96.0.20:80/TCP is also ports[0].port",
    ),
    (
        {"ports": [{"port": 80, "targetPort": "http"}]},
        'endpoints[0].ports: the target port "http" is missing; expected ports = { http = 8080 }',
    ),
    ({"endpoints": [{"ip": "127.0.0.1"}]}, "endpoints[0].ip: expected the address of a pod or a node (got 127.0.0.1)"),
]


@pytest.mark.parametrize(("values", "expected"), ERRORS, ids=[expected.split(":")[0] for _, expected in ERRORS])
def test_a_service_is_refused_in_the_words_of_the_file(values, expected):
    found = refused("set_service", WEB | values)
    assert found[0].startswith(expected), found


def test_all_that_is_wrong_is_said_at_once_and_each_thing_once():
    values = WEB | {"externalTrafficPolicy": "Local", "healthCheckNodePort": 30080, "schedulerFlags": ["ops"]}
    assert [line.split(": ")[0] for line in refused("set_service", values)] == [
        "healthCheckNodePort",
        "externalTrafficPolicy",
        "schedulerFlags[0]",
        "healthCheckNodePort",
    ]


def test_a_service_may_stay_where_it_is():
    assert "default/web" in edited("set_service", WEB)


def test_a_service_is_deleted():
    assert list(edited("delete_service", "default/web")) == ["default/other"]


def test_an_endpoint_is_added_changed_drained_and_deleted():
    added = edited("add_endpoint", "default/web", {"ip": "10.244.1.11", "weight": 2})["default/web"]
    assert added.endpoints == (A, B, Endpoint(IPv4Address("10.244.1.11"), weight=2))
    changed = edited("add_endpoint", "default/web", {"ip": "10.244.1.10", "weight": 2})["default/web"]
    assert changed.endpoints == (replace(A, weight=2), B)
    drained = edited("drain_endpoint", "default/web", {"ip": "10.244.2.10"})["default/web"]
    assert drained.endpoints == (A, replace(B, draining=True))
    deleted = edited("delete_endpoint", "default/web", {"ip": "10.244.1.10"})["default/web"]
    assert deleted.endpoints == (B,)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "ip: missing; expected an IP address such as 192.0.2.11"),
        ({"ip": "1.2"}, 'ip: expected an IP address such as 192.0.2.11 (got "1.2")'),
        ({"ip": "fd00::1"}, "ip: IPv6 is not supported yet (got fd00::1)"),
        ({"ip": "10.244.1.11", "wieght": 1}, 'wieght: unknown key; did you mean "weight"?'),
    ],
    ids=["nothing", "no-address", "ipv6", "unknown"],
)
def test_an_endpoint_is_refused_in_the_words_of_the_file(values, expected):
    assert refused("add_endpoint", "default/web", values) == [expected]


@pytest.mark.parametrize(
    ("edit", "values", "expected"),
    [
        ("delete_service", ("default/db",), "no such service: default/db"),
        ("add_endpoint", ("default/db", {"ip": "10.244.1.10"}), "no such service: default/db"),
        ("drain_endpoint", ("default/web", {"ip": "10.244.1.99"}), "no such endpoint of default/web: 10.244.1.99"),
        ("delete_endpoint", ("default/web", {"ip": "10.244.1.99"}), "no such endpoint of default/web: 10.244.1.99"),
    ],
)
def test_what_is_not_there_is_named(edit, values, expected):
    with pytest.raises(MissingError, match=f"^{expected}$"):
        edited(edit, *values)
