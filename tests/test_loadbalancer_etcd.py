"""Load balancer addresses in a real etcd: written by one node, and right also when several believe to be the one."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from random import Random

import pytest

from dataplane.config import parse
from dataplane.config_objects import FileObjects
from dataplane.control import loadbalancer_etcd
from dataplane.control.cluster import Cluster, ClusterNode
from dataplane.control.etcd import Events
from dataplane.control.loadbalancer_etcd import holders, writer_of
from dataplane.control.process import Store
from dataplane.control.store_etcd import EtcdSource
from tests.etcd_server import EtcdServer

NODE = """
[node]
name = "node{0}"
addresses = ["192.0.2.1{0}"]
[uplink]
interface = "eth0"
[pods]
cidr = ["10.244.{0}.0/24"]
"""
POOL = {"addresses": ["192.0.2.200-192.0.2.203"]}
SHARED = {"metallb.io/allow-shared-ip": "key"}
MARK_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as started:
        yield started


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"/{request.node.name}"


class Watcher:
    """A node's source, and every state that it hands out: checked, the newest one kept."""

    def __init__(self, server: EtcdServer, prefix: str, number: int) -> None:
        settings = replace(parse(NODE.format(number), "F"), store=Store("etcd", (server.url,), prefix, 10))
        self.name = settings.state.node.name
        self.source, self._settings = EtcdSource(settings, FileObjects(settings.state)), settings
        self.cluster = Cluster()

    async def start(self) -> None:
        self.take(await self.source.join(self._settings))
        self.source.applied(self._settings.state, self._settings.state)
        self.task = asyncio.ensure_future(self.source.run(self.take))

    def take(self, cluster: Cluster) -> None:
        self.cluster = cluster
        users: dict[object, list[str]] = {}
        for name, addresses in (cluster.assigned or {}).items():
            assert len(addresses) == 1, (name, addresses)
            users.setdefault(addresses[0], []).append(name)
        # Only services called "shared..." share, and all of those by the same key.
        assert all(len(names) == 1 or all("/shared" in name for name in names) for names in users.values()), users

    @property
    def assigned(self) -> dict[str, str]:
        return {
            name.removeprefix("default/"): " ".join(map(str, each))
            for name, each in sorted((self.cluster.assigned or {}).items())
        }

    async def sees(self, expected: dict[str, str]) -> None:
        await self.until(lambda: self.assigned == expected)

    def be_late(self, random: Random) -> None:
        """Hear of everything a moment later, each time another one."""
        take = self.source._take

        async def late(events: Events) -> None:
            await asyncio.sleep(random.uniform(0, 0.03))
            await take(events)

        self.source._take = late  # type: ignore[method-assign]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(MARK_S):
            while not condition():
                assert not self.task.done(), self.task.result()
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        await self.source.leave()


@asynccontextmanager
async def nodes(server: EtcdServer, prefix: str, count: int) -> AsyncIterator[list[Watcher]]:
    watchers = [Watcher(server, prefix, number) for number in range(1, count + 1)]
    started = list[Watcher]()
    try:
        for watcher in watchers:
            await watcher.start()
            started.append(watcher)
        yield watchers
    finally:
        for watcher in started:
            await watcher.kill()


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 3 * MARK_S))


def service(port: int = 80, **keys: object) -> dict[str, object]:
    return {"type": "LoadBalancer", "ports": [{"port": port}], **keys}


async def put(server: EtcdServer, key: str, value: object) -> None:
    await asyncio.to_thread(server.put, key, value)


async def delete(server: EtcdServer, key: str) -> None:
    await asyncio.to_thread(server.delete, key)


def test_services_get_addresses_that_all_nodes_see(server, prefix):
    async def work() -> None:
        async with nodes(server, prefix, 3) as found:
            await put(server, f"{prefix}/pools/default", POOL)
            await put(server, f"{prefix}/services/default/shared1", service(annotations=SHARED))
            await put(server, f"{prefix}/services/default/shared2", service(port=81, annotations=SHARED))
            await put(server, f"{prefix}/services/default/web", service())
            expected = {"shared1": "192.0.2.200", "shared2": "192.0.2.200", "web": "192.0.2.201"}
            for node in found:
                await node.sees(expected)
            written = {key: json.loads(text) for key, text in server.range(f"{prefix}/addresses/").items()}
            assert written == {
                f"{prefix}/addresses/192.0.2.200": {
                    "services": ["default/shared1", "default/shared2"],
                    "sharing": "key",
                    "ports": ["80/TCP", "81/TCP"],
                },
                f"{prefix}/addresses/192.0.2.201": {"services": ["default/web"], "sharing": "", "ports": ["80/TCP"]},
            }

    run(work)


def test_what_is_full_recovers_and_what_shrinks_is_taken_back(server, prefix):
    async def work() -> None:
        await put(server, f"{prefix}/pools/default", {"addresses": ["192.0.2.200-192.0.2.201"]})
        for name in "abc":
            await put(server, f"{prefix}/services/default/{name}", service())
        async with nodes(server, prefix, 2) as (node, _):
            await node.until(lambda: node.assigned == {"a": "192.0.2.200", "b": "192.0.2.201"})
            await delete(server, f"{prefix}/services/default/a")
            await node.until(lambda: node.assigned == {"b": "192.0.2.201", "c": "192.0.2.200"})
            await put(server, f"{prefix}/services/default/b", service(type="ClusterIP", clusterIPs=["10.96.0.1"]))
            await node.until(lambda: node.assigned == {"c": "192.0.2.200"})
            await put(server, f"{prefix}/pools/default", {"addresses": ["192.0.2.201-192.0.2.202"]})
            await node.until(lambda: node.assigned == {"c": "192.0.2.201"})
            await delete(server, f"{prefix}/pools/default")
            await node.until(lambda: node.assigned == {})
            assert server.range(f"{prefix}/addresses/") == {}

    run(work)


def test_nodes_that_all_believe_to_be_the_writer_never_give_an_address_twice(server, prefix, monkeypatch):
    async def work() -> None:
        async with nodes(server, prefix, 4) as found:
            for number, node in enumerate(found):
                node.be_late(Random(number))
                monkeypatch.setattr(node.source._writer, "_node", "everybody")
            monkeypatch.setattr(loadbalancer_etcd, "writer_of", lambda _: "everybody")
            await put(server, f"{prefix}/pools/default", POOL)
            for number in range(24):
                name = f"shared{number}" if number % 3 == 0 else f"s{number}"
                notes = SHARED if number % 3 == 0 else {}
                key = f"{prefix}/services/default/{name}"
                await put(server, key, service(port=80 + number, annotations=notes))
                await delete(server, f"{prefix}/services/default/s{number - 4}")
            left = {*(f"shared{number}" for number in range(0, 24, 3)), "s20", "s22", "s23"}
            for node in found:
                await node.until(lambda node=node: node.assigned.keys() == left)  # type: ignore[misc]
            assert len({tuple(node.assigned.items()) for node in found}) == 1

    run(work)


def test_a_writer_that_dies_half_way_is_followed_by_another(server, prefix, monkeypatch):
    monkeypatch.setattr(loadbalancer_etcd, "BATCH", 1)

    async def work() -> None:
        async with nodes(server, prefix, 2) as found:
            await found[0].until(lambda: len(found[0].cluster.nodes) == 2)
            first = next(node for node in found if node.name == writer_of(found[0].cluster))
            other = next(node for node in found if node is not first)
            transact, done = first.source.etcd.txn, list[object]()

            async def dies(*arguments, **keywords):
                if done:
                    await asyncio.Event().wait()
                done.append(await transact(*arguments, **keywords))
                return done[-1]

            await other.until(lambda: writer_of(other.cluster) == first.name)
            for name in "abc":
                await put(server, f"{prefix}/services/default/{name}", service())
            await first.until(lambda: len(first.cluster.services) == 3)
            monkeypatch.setattr(first.source.etcd, "txn", dies)
            await put(server, f"{prefix}/pools/default", POOL)
            await other.until(lambda: len(other.assigned) == 1)
            await first.kill()
            await other.until(lambda: len(other.assigned) == 3)
            first.task = other.task  # it is killed once more at the end

    run(work)


def test_a_value_that_is_not_right_is_named_and_written_anew(server, prefix, caplog):
    async def work() -> None:
        await put(server, f"{prefix}/pools/default", POOL)
        await put(server, f"{prefix}/services/default/web", service())
        await put(server, f"{prefix}/addresses/192.0.2.200", {"services": "web"})
        await put(server, f"{prefix}/addresses/nowhere", "{")
        async with nodes(server, prefix, 1) as (node,):
            await node.until(lambda: node.assigned == {"web": "192.0.2.200"})
            assert list(server.range(f"{prefix}/addresses/")) == [f"{prefix}/addresses/192.0.2.200"]

    run(work)
    complaints = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert complaints == [
        f"etcd: skipped key={prefix}/addresses/192.0.2.200: services: expected a list of NAMESPACE/NAME (got 'web')",
        f"etcd: skipped key={prefix}/addresses/nowhere: expected an IPv4 address (got 'nowhere')",
    ]


def test_only_living_nodes_write():
    found = {name: ClusterNode(name, (ip_address("192.0.2.1"),)) for name in ("a", "b", "c")}
    first = writer_of(Cluster(nodes=found))
    assert first is not None
    assert writer_of(Cluster(nodes=found | {first: replace(found[first], alive=False)})) not in (first, None)
    assert writer_of(Cluster()) is None


@pytest.mark.parametrize("value", [{}, {"services": None}, {"services": ["web"]}, {"services": [1]}])
def test_a_value_names_its_services(value):
    with pytest.raises(ValueError, match="expected a list of NAMESPACE/NAME"):
        holders(value)
