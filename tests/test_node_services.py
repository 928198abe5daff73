"""The services of a whole node: the file, edits by the API over it, and reloads between them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from dataplane.batch import ROUTE_GENERATION, SERVICES
from dataplane.config import load
from dataplane.control.api import MissingError
from dataplane.devices import journal
from dataplane.devices.device import DeviceError
from dataplane.node import Node
from dataplane.tables.route import Kind

FILE = """
[node]
name = "node1"
hostInterface = ""
[pods]
cidr = ["10.244.1.0/24"]
[services]
serviceCIDR = ["10.96.0.0/12"]
[[services.static]]
name = "web"
clusterIPs = ["10.96.0.20"]
ports = [{ port = 80, targetPort = 8080 }]
endpoints = [{ ip = "10.244.1.10" }, { ip = "10.244.2.10" }]
"""
DB = {"name": "db", "namespace": "prod", "clusterIPs": ["10.96.0.30"], "ports": [{"port": 5432}]}
VIP = IPv4Address("10.96.0.20")


@pytest.fixture
def run(tmp_path) -> Callable[[Callable[[Node, Path], Coroutine[Any, Any, None]]], None]:
    """Run a test with a node that has this file, started, until it ends."""
    path = tmp_path / "node.toml"
    path.write_text(FILE)

    @asynccontextmanager
    async def started() -> AsyncIterator[Node]:
        log_book, _ = journal.claim(tmp_path / "node1.journal")
        node = Node(load(path), log_book)
        await node.start()
        try:
            yield node
        finally:
            if not node.stopping.is_set():
                await node.stop()

    async def whole(body: Callable[[Node, Path], Coroutine[Any, Any, None]]) -> None:
        async with started() as node:
            await body(node, path)

    return lambda body: asyncio.run(whole(body))


def rewrite(path: Path, text: str) -> None:
    path.write_text(text)


def weights(node: Node, address: IPv4Address = VIP, port: int = 80) -> dict[str, int]:
    services = node.tables.services
    row = services.find(6, address, port)
    return {str(each): services.destination(at).weight for at, each, _ in services.members(row)} if row >= 0 else {}


def test_the_files_services_are_there_when_the_node_has_started(run):
    async def body(node: Node, _: Path) -> None:
        assert weights(node) == {"10.244.2.10": 1, "10.244.1.10": 1}
        found = [node.tables.routes.lookup(address) for address in ("10.96.0.20", "10.96.0.21")]
        assert [each.kind for each in found if each] == [Kind.SERVICE, Kind.BLACKHOLE]

    run(body)


def test_edits_by_the_api_change_the_tables_and_say_what_was_done(run):
    async def body(node: Node, _: Path) -> None:
        assert await node.set_service(DB) == {
            "applied": ["route 10.96.0.30/32 service", "service prod/db added at 10.96.0.30:5432/TCP"],
            "errors": [],
        }
        await node.add_endpoint("prod", "db", {"ip": "10.244.1.20", "weight": 3})
        assert weights(node, IPv4Address("10.96.0.30"), 5432) == {"10.244.1.20": 3}
        await node.drain_endpoint("default", "web", {"ip": "10.244.1.10"})
        await node.delete_endpoint("default", "web", {"ip": "10.244.2.10"})
        assert weights(node) == {"10.244.1.10": 0}
        assert await node.delete_service("prod", "db") == {
            "applied": ["service prod/db removed at 10.96.0.30:5432/TCP", "route 10.96.0.30/32 deleted"],
            "errors": [],
        }

    run(body)


def test_what_is_refused_changes_nothing(run):
    async def body(node: Node, _: Path) -> None:
        before = node.wiring.state
        refused = await node.set_service(DB | {"clusterIPs": ["10.96.0.20"], "ports": [{"port": 80}]})
        assert refused == {
            "applied": [],
            "errors": ["ports[0].port: used twice: 10.96.0.20:80/TCP is also default/web"],
        }
        with pytest.raises(MissingError):
            await node.delete_service("default", "db")
        assert node.wiring.state is before
        assert (await node.reload())["applied"] == []

    run(body)


def test_a_reload_keeps_what_the_api_has_changed_and_takes_what_the_file_has(run):
    async def body(node: Node, path: Path) -> None:
        await node.set_service(DB)
        await node.drain_endpoint("default", "web", {"ip": "10.244.1.10"})
        rewrite(path, FILE.replace("10.244.2.10", "10.244.3.10"))
        assert (await node.reload())["errors"] == []
        assert weights(node) == {"10.244.3.10": 1, "10.244.1.10": 0}
        assert node.tables.services.find(6, "10.96.0.30", 5432) >= 0

    run(body)


def test_a_reload_with_an_error_leaves_everything(run):
    async def body(node: Node, path: Path) -> None:
        await node.set_service(DB)
        rewrite(path, FILE + 'healthCheckNodePort = 1\nports = "x"')
        assert (await node.reload())["errors"]
        rewrite(path, FILE + "[services.conntrack]\nmax = 4096\n")
        errors = (await node.reload())["errors"]
        assert errors == ["cannot be changed while running: services.conntrack.max; restart the node to apply"]
        assert node.tables.services.find(6, "10.96.0.30", 5432) >= 0

    run(body)


def test_a_file_that_takes_what_the_api_has_given_away_is_refused(run):
    async def body(node: Node, path: Path) -> None:
        await node.set_service(DB)
        other = '[[services.static]]\nname = "x"\nclusterIPs = ["10.96.0.30"]\nports = [{ port = 5432 }]\n'
        rewrite(path, FILE + other)
        errors = (await node.reload())["errors"]
        assert errors == ["prod/db.ports[0].port: used twice: 10.96.0.30:5432/TCP is also default/x.ports[0].port"]
        await node.delete_service("prod", "db")
        assert (await node.reload())["errors"] == []

    run(body)


def test_a_file_whose_ranges_do_not_hold_what_the_api_has_given_is_refused(run):
    async def body(node: Node, path: Path) -> None:
        await node.set_service(DB)
        rewrite(path, FILE.replace("10.96.0.0/12", "10.96.0.0/28").replace("10.96.0.20", "10.96.0.2"))
        errors = (await node.reload())["errors"]
        expected = (
            "prod/db.clusterIPs[0]: expected an address inside services.serviceCIDR 10.96.0.0/28 (got 10.96.0.30)"
        )
        assert errors == [expected]
        assert weights(node) != {}

    run(body)


def test_a_service_of_the_file_may_be_replaced_deleted_and_set_again(run):
    async def body(node: Node, _: Path) -> None:
        web = {
            "name": "web",
            "clusterIPs": ["10.96.0.20"],
            "ports": [{"port": 80, "targetPort": 9090}],
            "scheduler": "mh",
        }
        await node.set_service(web)
        row = node.tables.services.find(6, VIP, 80)
        assert {port for _, _, port in node.tables.services.members(row)} == {9090}
        assert node.wiring.balancer.names[row] == ("default/web", "", "cluster-ip", "api")
        await node.delete_service("default", "web")
        assert (await node.reload())["applied"] == []
        assert weights(node) == {}
        await node.set_service(web | {"endpoints": [{"ip": "10.244.1.10"}]})
        assert weights(node) == {"10.244.1.10": 1}

    run(body)


def test_edits_at_the_same_time_are_carried_out_one_after_the_other(run):
    async def body(node: Node, _: Path) -> None:
        edits = [node.add_endpoint("default", "web", {"ip": f"10.244.1.{host}"}) for host in range(20, 40)]
        results = await asyncio.gather(*edits, node.reload())
        assert not any(result["errors"] for result in results)
        assert len(weights(node)) == 22

    run(body)


def test_every_edit_of_routes_is_another_generation(run):
    async def body(node: Node, _: Path) -> None:
        before = int(node.tables.settings[ROUTE_GENERATION])
        await node.add_endpoint("default", "web", {"ip": "10.244.1.20"})
        assert int(node.tables.settings[ROUTE_GENERATION]) == before
        await node.set_service(DB)
        assert int(node.tables.settings[ROUTE_GENERATION]) == before + 1

    run(body)


def test_a_node_that_stops_takes_no_more_edits(run):
    async def body(node: Node, _: Path) -> None:
        edits = [asyncio.ensure_future(node.add_endpoint("default", "web", {"ip": "10.244.1.20"})) for _ in range(3)]
        await asyncio.sleep(0)  # the first of them has the lock
        stopping = asyncio.ensure_future(node.stop())
        late = asyncio.ensure_future(node.reload())
        results = [result["errors"] for result in await asyncio.gather(*edits, late)]
        await stopping
        assert results == [[], *[["the node is stopping"]] * 3]
        assert len(node.tables.services) == 0

    run(body)


def many(count: int) -> str:
    return "".join(
        f'[[services.static]]\nname = "s{number}"\nclusterIPs = ["10.97.{number >> 8}.{number & 255}"]\n'
        f'ports = [{{ port = 80 }}]\nendpoints = [{{ ip = "10.244.2.{host}" }}, {{ ip = "10.244.3.{host}" }}]\n'
        for number in range(count)
        for host in [number % 200 + 1]
    )


def test_many_services_come_at_once_though_packets_flow_meanwhile(run):
    async def body(node: Node, path: Path) -> None:
        seen: set[tuple[bool, bool, Kind | None]] = set()

        async def look() -> None:
            while True:
                found = [node.tables.services.find(6, f"10.97.{place}", 80) >= 0 for place in ("0.0", "0.199")]
                pairs = zip(node.engine._arrays[SERVICES], node.tables.services.arrays, strict=True)
                assert all(used is there for used, there in pairs)  # or packets would be counted in the old ones
                route = node.tables.routes.lookup("10.97.0.100")
                seen.add((found[0], found[1], route.kind if route else None))
                await asyncio.sleep(0)

        looking = asyncio.ensure_future(look())
        rewrite(path, FILE + many(200))
        assert len((await node.reload())["applied"]) == 400
        await asyncio.sleep(0)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        assert seen == {(False, False, Kind.BLACKHOLE), (True, True, Kind.SERVICE)}

    run(body)


def test_nothing_is_left_of_services_whose_plan_is_not_carried_out(run, monkeypatch):
    async def body(node: Node, path: Path) -> None:
        async def fails(*_: object) -> None:
            raise DeviceError("eth0", "cannot be opened", OSError("no device"))

        rewrite(path, FILE + many(50))
        with monkeypatch.context() as patch:
            patch.setattr(node.wiring, "_prepare", fails)
            assert (await node.reload())["errors"] == ["eth0: cannot be opened: no device"]
        assert len(node.tables.services) == 1
        assert node.tables.services.backends["flags"].sum() == 2
        assert (await node.reload())["errors"] == []
        assert len(node.tables.services) == 51

    run(body)
