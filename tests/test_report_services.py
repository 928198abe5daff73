"""Services, endpoints and templates as they are listed."""

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest

from dataplane.balance import Balancer
from dataplane.control import edits, query
from dataplane.control.query import Query
from dataplane.control.services import virtual_servers
from dataplane.control.state import DesiredState, Endpoint, Node, Pod, Service, ServicePort
from dataplane.report_services import PAGE, TOTALS, ServiceReport
from dataplane.tables import persistence, service
from dataplane.tables.address import halves
from dataplane.tables.persistence import TemplateTable
from dataplane.tables.policy import PolicyTable
from dataplane.tables.service import Destination, ServiceTable

NOW = 1_000_000_000_000
SECOND = 1_000_000_000
TCP, UDP = 6, 17
A, B, VIP, DNS = "10.244.1.10", "10.244.1.11", "10.96.0.20", "10.96.0.10"

WEB = Service(
    "web",
    cluster_ips=(ip_address(VIP),),
    type="NodePort",
    ports=(ServicePort(80, name="http", target_port=8080, node_port=30080),),
    endpoints=(Endpoint(ip_address(A), node="node1"), Endpoint(ip_address(B), weight=3)),
    affinity_seconds=300,
    scheduler="wrr",
)
NAMES = Service(
    "dns",
    "kube-system",
    cluster_ips=(ip_address(DNS),),
    ports=(ServicePort(53, "UDP"),),
    endpoints=(Endpoint(ip_address("10.244.2.2"), node="node2"),),
    internal_policy="Local",
    scheduler="mh",
    origin="api",
)


class World:
    """Tables that a balancer has filled from a desired state."""

    def __init__(self, *services: Service) -> None:
        self.services = ServiceTable(1024, seed=1)
        self.policies = PolicyTable(1024)
        self.templates = TemplateTable(64, seed=1)
        self.balancer = Balancer(self.services, self.policies)
        node = Node("node1", addresses=(ip_address("192.0.2.11"),))
        pod = Pod("web-1", "default", "web-1", (ip_address(B),), 0x02, 1450, "cali1")
        self.state = DesiredState(node, pods=(pod,), services=services)
        self.now = NOW
        self.report = ServiceReport(
            self.services, self.policies, self.templates, self.balancer, lambda: self.state, lambda: self.now
        )
        for server in virtual_servers(self.state).values():
            self.balancer.commit(edits.AddServer(server), self.now)

    def rows(self, kind: str, **words: str) -> list[Any]:
        return [row for page in getattr(self.report, kind)(query.parse(words, kind)) for row in page]

    def row(self, address: str = VIP, port: int = 80, protocol: int = TCP) -> int:
        return self.services.find(protocol, address, port)

    def backend(self, address: str) -> int:
        return self.services.find_backend(self.row(), ip_address(address), 8080)

    def stick(self, client: str) -> int:
        """Let a client of the web service connect; return its template."""
        hi, lo = (np.uint64(half) for half in halves(client))
        chosen, template = persistence.select(
            self.templates.arrays, self.services.arrays, self.row(), (hi, lo, 40000), self.now
        )
        service.connect(self.services.arrays, self.row(), int(chosen))
        return int(template)


@pytest.fixture
def world() -> World:
    return World(WEB, NAMES)


def test_a_service_is_listed_at_each_of_its_addresses(world):
    world.stick("10.244.1.20")
    rows = {(row["kind"], row["address"], row["port"], row["protocol"]): row for row in world.rows("services")}
    assert list(rows) == [
        ("cluster-ip", VIP, 80, "TCP"),
        ("node-port", "192.0.2.11", 30080, "TCP"),
        ("cluster-ip", DNS, 53, "UDP"),
    ]
    assert rows["cluster-ip", VIP, 80, "TCP"] == {
        "service": "default/web",
        "port_name": "http",
        "type": "NodePort",
        "kind": "cluster-ip",
        "address": VIP,
        "port": 80,
        "protocol": "TCP",
        "scheduler": "wrr",
        "scheduler_flags": [],
        "affinity_s": 300,
        "mask_bits": 32,
        "ready": 2,
        "total": 2,
        "active": 0,
        "inactive": 1,
        "origin": "file",
        "connections": 1,
        "in_packets": 0,
        "in_bytes": 0,
        "out_packets": 0,
        "out_bytes": 0,
        "reason": "",
    }
    dns = rows["cluster-ip", DNS, 53, "UDP"]
    assert (dns["scheduler"], dns["scheduler_flags"], dns["origin"], dns["port_name"]) == ("mh", ["mh-port"], "api", "")


def test_a_service_that_waits_for_an_address_has_a_row_for_each_port(world):
    ports = (ServicePort(80, name="http"), ServicePort(53, "UDP", "dns"))
    late = Service("late", type="LoadBalancer", ports=ports, scheduler="mh")
    world.state = replace(world.state, services=(WEB, NAMES, late), refused={"default/late": "it is full"})
    rows = world.rows("services", service="default/late")
    assert [(row["address"], row["port"], row["protocol"], row["scheduler"]) for row in rows] == [
        ("", 80, "TCP", "mh"),
        ("", 53, "UDP", "mh"),
    ]
    assert {row["reason"] for row in rows} == {"it is full"}
    assert rows[0].keys() == world.rows("services")[0].keys()
    assert [row["port"] for row in world.rows("services", protocol="udp") if not row["address"]] == [53]
    assert [row["port"] for row in world.rows("services", dport="80") if not row["address"]] == [80]
    assert not [row for row in world.rows("services", dst="10.96.0.0/12") if not row["address"]]


def test_endpoints_stand_in_the_order_of_the_schedulers_list(world):
    rows = [row for row in world.rows("endpoints") if row["kind"] == "cluster-ip"]
    assert [(row["address"], row["port"], row["weight"], row["node"]) for row in rows] == [
        (B, 8080, 3, "node1"),  # a pod of this node's
        (A, 8080, 1, "node1"),
    ]
    assert {(row["virtual_address"], row["virtual_port"], row["protocol"]) for row in rows} == {(VIP, 80, "TCP")}


def test_an_endpoint_of_weight_0_drains_and_one_at_its_threshold_is_overloaded(world):
    world.services.add(world.row(), ip_address(A), 8080, Destination(0))
    world.services.add(world.row(), ip_address(B), 8080, Destination(1, u_threshold=1))
    world.stick("10.244.1.20")
    rows = world.rows("endpoints", dst=VIP)
    assert {row["address"]: row["state"] for row in rows} == {A: "draining", B: "overloaded"}
    (found,) = world.rows("services", dst=VIP)
    assert (found["ready"], found["total"]) == (1, 2)


@pytest.mark.parametrize(
    ("words", "ports"),
    [
        ({}, [80, 30080, 53]),
        ({"protocol": "udp"}, [53]),
        ({"service": "web"}, [80, 30080]),
        ({"service": "kube-system/dns"}, [53]),
        ({"dst": "10.96.0.0/16"}, [80, 53]),
        ({"dport": "30080"}, [30080]),
        ({"limit": "1"}, [80]),
        ({"service": "none"}, []),
    ],
)
def test_services_are_filtered(words, ports, world):
    assert [row["port"] for row in world.rows("services", **words)] == ports


def test_a_filter_that_a_listing_does_not_have_is_refused():
    with pytest.raises(query.QueryError, match="state: no filter of services; expected one of dport, dst, limit"):
        query.parse({"state": "CLOSE"}, "services")


def test_many_services_come_in_small_pages_and_are_counted():
    many = tuple(
        replace(NAMES, name=f"dns-{number}", cluster_ips=(ip_address("10.96.1.0") + number,)) for number in range(150)
    )
    world = World(*many)
    listing = world.report.services(Query(limit=100))
    pages = [len(page) for page in listing]
    assert (sum(pages), max(pages), listing.matched) == (100, PAGE, 150)


def test_a_service_that_goes_while_endpoints_are_listed_is_left_out(world):
    pages = iter(world.report.endpoints(Query()))
    next(pages)
    found = list(next(pages))
    for row in world.services.rows():
        world.services.delete(row)
    rest = [row for page in pages for row in page]
    assert len(found) == 2
    assert rest == []


# --- templates -------------------------------------------------------------------------------------------------------


def test_a_template_says_who_stays_where_and_for_how_long(world):
    world.stick("10.244.1.20")
    world.now += 10 * SECOND
    (row,) = world.rows("persistence")
    backend = row.pop("backend")
    assert backend in (f"{A}:8080", f"{B}:8080")
    assert row == {
        "client": "10.244.1.20",
        "service": "default/web",
        "port_name": "http",
        "protocol": "TCP",
        "virtual_address": VIP,
        "virtual_port": 80,
        "timeout_s": 290,
        "controls": 1,
    }


def test_a_template_without_connections_whose_time_is_over_is_not_listed(world):
    template = world.stick("10.244.1.20")
    generation = int(world.templates.templates[template]["generation"])
    world.now += 301 * SECOND
    assert [row["timeout_s"] for row in world.rows("persistence")] == [0]  # a connection holds it
    world.templates.templates[template]["controls"] = 0
    assert world.rows("persistence") == []
    assert generation == 0


def test_the_backend_of_a_template_that_is_gone_is_a_dash(world):
    template = world.stick("10.244.1.20")
    world.templates.templates[template]["backend_generation"] += 1
    assert [row["backend"] for row in world.rows("persistence")] == ["-"]


@pytest.mark.parametrize(
    ("words", "found"),
    [({"src": "10.244.1.0/24"}, 2), ({"src": "10.244.1.21"}, 1), ({"dport": "81"}, 0), ({"service": "web"}, 2)],
)
def test_templates_are_filtered(words, found, world):
    for client in ("10.244.1.20", "10.244.1.21"):
        world.stick(client)
    assert len(world.rows("persistence", **words)) == found


# --- as a whole ------------------------------------------------------------------------------------------------------


def test_services_without_a_backend_here_are_counted_by_traffic_policy():
    external = replace(WEB, external_policy="Local", endpoints=(Endpoint(ip_address("10.244.2.9"), node="node2"),))
    found = World(external, NAMES).report.balancing()
    assert found["no_local_endpoints"] == {"internal": 1, "external": 1}
    assert (found["services"], found["endpoints"], found["templates"]) == (3, 1, 0)
    assert found["last_sync"] > 1.6e9


def test_totals_are_of_a_port_at_all_its_addresses(world):
    world.stick("10.244.1.20")
    world.services.services["in_bytes"][world.row()] = 100
    world.services.services["in_bytes"][world.row("192.0.2.11", 30080)] = 11
    found = world.report.balancing()
    assert [(row["service"], row["port_name"], row["protocol"]) for row in found["totals"]] == [
        ("default/web", "http", "TCP"),
        ("kube-system/dns", "", "UDP"),
    ]
    assert [(row["connections"], row["inactive"], row["in_bytes"]) for row in found["totals"]] == [
        (1, 1, 111),
        (0, 0, 0),
    ]
    assert found["left_off"] == 0


def test_totals_are_bounded():
    many = tuple(
        replace(NAMES, name=f"dns-{number}", cluster_ips=(ip_address("10.96.1.0") + number,), scheduler="rr")
        for number in range(TOTALS + 7)
    )
    found = World(*many).report.balancing()
    assert (len(found["totals"]), found["left_off"]) == (TOTALS, 7)
    assert found["totals"][0]["service"] == "kube-system/dns-0"
