"""What is said of pools and addresses: the snapshot of a state, its tables, the command, the rows of who waits."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dataplane.control import views, views_services
from dataplane.control.loadbalancer_report import snapshot
from tests import announced
from tests.balanced import addresses, pool, service
from tests.fake_node import FakeNode, dataplane, listings, serving
from tests.fake_rows import LOAD_BALANCER

WAITING = {
    "service": "shop/web",
    "address": "",
    "type": "LoadBalancer",
    "kind": "load-balancer-ip",
    "reason": "it is full",
}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    node = FakeNode()
    node.rows["services"].append(node.rows["services"][0] | WAITING)
    with serving(node, tmp_path / "node1.sock"):
        yield tmp_path / "node1.sock"


def test_a_state_says_who_has_what_who_announces_it_and_who_waits():
    here = (announced.HERE,)
    services = (
        service("web", load_balancer_ips=addresses("192.0.2.200"), endpoints=here),
        service("dns", port=53, load_balancer_ips=addresses("192.0.2.200"), endpoints=here),
        service("db", load_balancer_ips=addresses("203.0.113.1")),
        service("late"),
    )
    state = replace(
        announced.state(*services, peers=()),
        pools=(pool("192.0.2.200-192.0.2.201 192.0.2.210"),),
        refused={"default/late": "it is full"},
    )
    assert snapshot(state) == {
        "pools": [
            {
                "name": "default",
                "ranges": ["192.0.2.200-192.0.2.201", "192.0.2.210"],
                "auto_assign": True,
                "addresses": 3,
                "in_use": 1,
                "services": 2,
            }
        ],
        "addresses": [
            {"address": "192.0.2.200", "pool": "default", "services": ["default/web", "default/dns"], "owner": "node1"},
            {"address": "203.0.113.1", "pool": "", "services": ["default/db"], "owner": ""},
        ],
        "pending": [{"service": "default/late", "reason": "it is full"}],
    }


def test_the_command_draws_pools_and_addresses(path):
    result = dataplane("loadbalancer", "show", "--socket", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["POOL", "RANGES", "AUTO", "ADDRESSES", "IN", "USE", "SERVICES"],
        ["default", "192.0.2.200-192.0.2.220,198.51.100.7", "yes", "22", "1", "2"],
        [],
        ["ADDRESS", "POOL", "SERVICES", "ANNOUNCED", "BY"],
        ["192.0.2.200", "default", "default/dns,default/web", "node1"],
        ["203.0.113.1", "-", "default/db", "-"],
        ["<pending>", "-", "shop/web", "-"],
        ["shop/web:", "no", "IPv4", "address", "is", "free", "in", "pool", "default"],
    ]


def test_the_command_prints_json(path):
    assert json.loads(dataplane("loadbalancer", "show", "-o", "json", "--socket", path).stdout) == LOAD_BALANCER


def test_without_pools_the_table_says_so():
    assert views.pools({"pools": [], "addresses": [], "pending": []}).notes == ("there is no address pool",)


def test_services_that_wait_are_pending_with_the_reason_below_and_ipvsadm_does_not_know_them(path):
    lines = dataplane("show", "services", "--socket", path).stdout.splitlines()
    assert lines[-2].split()[:3] == ["shop/web:http", "LoadBalancer", "<pending>:80/TCP"]
    assert lines[-1] == "shop/web: it is full"
    assert "pending" not in dataplane("show", "services", "-o", "ipvsadm", "--socket", path).stdout
    rows = json.loads(dataplane("show", "services", "-o", "json", "--socket", path).stdout)["services"]
    assert (rows[-1]["address"], rows[-1]["reason"]) == ("", "it is full")


def test_a_reason_stands_below_the_table_once():
    rows = [listings()["services"][0] | WAITING | {"port": port} for port in (80, 443)]
    for draw in (views_services.services, views_services.services_wide):
        assert draw(rows).notes == ("shop/web: it is full",)  # type: ignore[arg-type]
