"""Sources against a real etcd: nodes that know of one another, and what becomes of them when etcd is away."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Network, ip_address

import pytest

from dataplane.config import parse
from dataplane.config_objects import FileObjects
from dataplane.control import store_etcd
from dataplane.control.api import MissingError
from dataplane.control.cluster import Cluster, over
from dataplane.control.etcd import Events, KeyValue
from dataplane.control.ipam import Pool, Rules
from dataplane.control.process import Store
from dataplane.control.state import DesiredState, Settings, pod_mac
from dataplane.control.store_etcd import EtcdSource
from tests.etcd_server import EtcdServer

WEB = {"clusterIPs": ["10.96.0.20"], "ports": [{"port": 80, "targetPort": 8080}]}
NODE = """
[node]
name = "node{0}"
addresses = ["192.0.2.1{0}"]
[uplink]
interface = "eth0"
[pods]
cidr = ["10.244.{0}.0/24"]
[[pods.static]]
name = "web-{0}"
ip = ["10.244.{0}.10"]
[services]
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as started:
        yield started


@pytest.fixture
def own(tmp_path) -> Iterator[EtcdServer]:
    """An etcd that the test may kill."""
    with EtcdServer(tmp_path) as started:
        yield started


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"/{request.node.name}"


def settings_of(server: EtcdServer, prefix: str, number: int = 1, extra: str = "", *, ttl: float = 10.0) -> Settings:
    made = parse(NODE.format(number) + extra, "node.toml")
    return replace(made, store=Store("etcd", (server.url,), prefix, ttl))


class Follower:
    """What a node does with a source, without a node: it keeps the newest state, and counts how many there were."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.source = EtcdSource(settings, FileObjects(settings.state))
        self.cluster = Cluster()
        self.handed = 0
        self.task: asyncio.Task[None] | None = None

    @property
    def state(self) -> DesiredState:
        return over(self.cluster, self.settings.state)

    def take(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.handed += 1

    async def start(self) -> None:
        self.cluster = await self.source.join(self.settings)
        self.source.applied(self.settings.state, self.state)
        self.task = asyncio.ensure_future(self.source.run(self.take))
        await self.until(lambda: self.source.health.connected)

    async def kill(self) -> None:
        await self.stop()
        await self.source.etcd.close()

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
            self.task = None

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                assert self.task is None or not self.task.done(), self.task.result()
                await asyncio.sleep(0.01)

    def endpoints(self, name: str = "default/web") -> list[str]:
        found = next((service for service in self.cluster.services if service.id == name), None)
        return [str(endpoint.address) for endpoint in found.endpoints] if found else []

    async def edit(self, name: str, *values: object) -> object:
        return await self.source.edit(name, values, self.state)


@asynccontextmanager
async def following(*settings: Settings) -> AsyncIterator[list[Follower]]:
    followers = [Follower(each) for each in settings]
    try:
        for follower in followers:
            await follower.start()
        yield followers
    finally:
        for follower in followers:
            await follower.kill()


def has_pods(node: Follower, count: int) -> bool:
    return len(node.cluster.pods) == count


def has_services(node: Follower) -> bool:
    return bool(node.cluster.services)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work(), 90)

    asyncio.run(limited())


# --- joining ---------------------------------------------------------------------------------------------------------


def test_nodes_that_join_become_peers_and_know_each_others_pods(shared, prefix):
    async def work() -> None:
        async with following(*(settings_of(shared, prefix, number) for number in (1, 2, 3))) as nodes:
            for node in nodes:
                await node.until(partial(has_pods, node, 3))
                assert all(each.alive and each.since for each in node.cluster.nodes.values())
            peers = {peer.name: peer for peer in nodes[0].state.peers}
            assert [(str(peer.address), str(peer.pod_cidrs[0])) for peer in peers.values()] == [
                ("192.0.2.12", "10.244.2.0/24"),
                ("192.0.2.13", "10.244.3.0/24"),
            ]
            assert str(nodes[2].cluster.pods["default/web-1"].addresses[0]) == "10.244.1.10"
            status = nodes[1].source.status()
            assert (status["source"], status["connected"], status["where"]) == ("etcd", True, shared.url)
            assert [(row["name"], row["alive"], row["here"]) for row in status["nodes"]] == [
                ("node1", True, False),
                ("node2", True, True),
                ("node3", True, False),
            ]

    run(work)


def test_a_node_that_leaves_is_no_member_any_more_and_stays_a_peer(shared, prefix):
    async def work() -> None:
        async with following(*(settings_of(shared, prefix, number) for number in (1, 2))) as (first, second):
            await first.until(lambda: "node2" in first.cluster.nodes)
            await second.stop()
            await second.source.leave()
            await first.until(lambda: not first.cluster.nodes["node2"].alive)
            assert [peer.name for peer in first.state.peers] == ["node2"]
            assert list(shared.range(f"{prefix}/members/")) == [f"{prefix}/members/node1"]

    run(work)


def test_a_killed_nodes_lease_ends_and_it_is_away(shared, prefix):
    async def work() -> None:
        settings = [settings_of(shared, prefix, number, ttl=1) for number in (1, 2)]
        async with following(*settings) as (first, second):
            await first.until(lambda: "node2" in first.cluster.nodes)
            await second.kill()
            await first.until(lambda: not first.cluster.nodes["node2"].alive)
            assert first.cluster.nodes["node1"].alive

    run(work)


def test_a_node_without_blocks_in_its_file_claims_one_and_finds_it_again(shared, prefix):
    pool = Pool("default", IPv4Network("10.244.0.0/16"))
    bare = NODE.partition("[pods]")[0]

    def settings(number: int) -> Settings:
        made = parse(bare.format(number), "node.toml")
        return replace(made, store=Store("etcd", (shared.url,), prefix), ipam=Rules(pools=(pool,)))

    async def work() -> None:
        async with following(settings(1), settings(2)) as (first, second):
            blocks = [node.state.pod_network.cidrs for node in (first, second)]
            assert all(len(cidrs) == 1 and pool.holds(cidrs[0]) for cidrs in blocks)
            assert not blocks[0][0].overlaps(blocks[1][0])
            await first.until(lambda: first.state.peers)
            assert first.state.peers[0].pod_cidrs == blocks[1]
            assert first.source.addresses is not None
            address = await first.source.addresses.assign("one", 0.0)
            assert address in blocks[0][0]
            assert address != blocks[0][0].network_address
        async with following(settings(1)) as (again,):
            assert again.state.pod_network.cidrs == blocks[0]

    run(work)


def test_joining_waits_while_etcd_is_away_and_says_why_once(own, prefix, caplog):
    own.stop()

    async def work() -> None:
        node = Follower(settings_of(own, prefix))
        joining = asyncio.ensure_future(node.start())
        await node.until(lambda: caplog.records)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(own.start)
        await joining
        await node.kill()

    run(work)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == [f"cannot join the cluster yet, waiting etcd={own.url}: {own.url}: connection refused"]


def test_a_file_that_changes_changes_what_others_know(shared, prefix):
    async def work() -> None:
        async with following(*(settings_of(shared, prefix, number) for number in (1, 2))) as (first, second):
            given = second.settings.state
            pod = replace(given.pods[0], name="new", addresses=(ip_address("10.244.2.77"),), mac=pod_mac("a", "b"))
            given = replace(given, node=replace(given.node, labels=(("rack", "7"),)), pods=(pod,))
            second.source.applied(given, given)
            await first.until(lambda: (("rack", "7"),) in [node.labels for node in first.cluster.nodes.values()])
            await first.until(lambda: set(first.cluster.pods) == {"default/web-1", "default/new"})
            shared.delete(f"{prefix}/pods/node2/default/new")
            revision = shared.put(f"{prefix}/pods/node2/default/stray", {"ip": []})
            await first.until(lambda: first.source.health.revision >= revision)
            await first.until(lambda: set(first.cluster.pods) == {"default/web-1", "default/new"})

    run(work)


def test_a_second_process_with_the_nodes_name_takes_its_place_and_the_first_says_so(shared, prefix, caplog):
    async def work() -> None:
        async with following(settings_of(shared, prefix, ttl=1)) as (first,):
            async with following(settings_of(shared, prefix, ttl=1)) as (second,):
                await first.until(lambda: not first.source.lease)
                assert second.source.lease
            await first.until(lambda: not first.cluster.nodes["node1"].alive)  # the second one's lease has ended
            assert "another process is node node1 now" in caplog.text
            assert "joining again" not in caplog.text

    run(work)


# --- following -------------------------------------------------------------------------------------------------------


def test_services_and_endpoints_arrive_and_go(shared, prefix):
    async def work() -> None:
        async with following(settings_of(shared, prefix)) as (node,):
            shared.put(f"{prefix}/services/default/web", WEB)
            shared.put(f"{prefix}/endpoints/default/web/a", [{"ip": "10.244.1.10"}])
            await node.until(lambda: node.endpoints() == ["10.244.1.10"])
            shared.put(f"{prefix}/services/default/broken", "{")
            shared.put(f"{prefix}/endpoints/default/web/a", [{"ip": "10.244.1.11"}])
            await node.until(lambda: node.endpoints() == ["10.244.1.11"])
            revision = shared.delete(f"{prefix}/services/default/web")
            await node.until(lambda: not node.cluster.services)
            assert node.source.health.revision == revision

    run(work)


def test_what_comes_in_a_burst_is_handed_out_in_few_pieces_and_whole(shared, prefix):
    async def work() -> None:
        async with following(settings_of(shared, prefix)) as (node,):
            shared.put(f"{prefix}/services/default/web", WEB)
            before = node.handed
            client = node.source.etcd
            for number in range(200):
                await client.put(f"{prefix}/endpoints/default/web/{number:03}", f'[{{"ip": "10.244.9.{number}"}}]')
            await node.until(lambda: len(node.endpoints()) == 200)
            assert node.handed - before < 200

    run(work)


def test_half_of_a_transaction_is_never_handed_out(shared, prefix, monkeypatch):
    monkeypatch.setattr(store_etcd, "_CHUNK", 1)
    monkeypatch.setattr(store_etcd, "_GATHER_SECONDS", 0.0)

    async def work() -> None:
        async with following(settings_of(shared, prefix)) as (node,):
            shared.put(f"{prefix}/services/default/web", WEB)
            await node.until(lambda: node.cluster.services)
            await node.stop()
            sizes: list[int] = []
            node.source._sink = lambda cluster: sizes.append(len(cluster.services[0].endpoints))
            node.source._hand_out_soon()  # one is due
            key = f"{prefix}/endpoints/default/web"
            items = [KeyValue(f"{key}/{n}", json.dumps([{"ip": f"10.244.9.{n}"}]), 9, 9, 1, 0) for n in range(100)]
            await node.source._take(Events(9, tuple(items)))
            await node.until(lambda: sizes)
            assert sizes == [100]

    run(work)


def test_after_a_compaction_the_list_is_taken_anew_and_what_is_unchanged_stays_the_same_object(own, prefix):
    async def work() -> None:
        async with following(settings_of(own, prefix)) as (node,):
            for name in ("web", "other"):
                own.put(f"{prefix}/services/default/{name}", WEB | {"clusterIPs": [f"10.96.0.{len(name)}"]})
            await node.until(lambda: len(node.cluster.services) == 2)
            kept = next(service for service in node.cluster.services if service.name == "other")
            revision = node.cluster.revision
            async with _cut_off(node):
                await asyncio.to_thread(own.restart)
                await node.until(lambda: not node.source.health.connected)
                await asyncio.to_thread(own.delete, f"{prefix}/services/default/web")
                await asyncio.to_thread(own.put, f"{prefix}/services/default/new", WEB)
                await asyncio.to_thread(own.compact)
            await node.until(lambda: {service.name for service in node.cluster.services} == {"other", "new"})
            assert node.cluster.services[0] is kept
            assert node.cluster.revision > revision

    run(work)


@asynccontextmanager
async def _cut_off(node: Follower) -> AsyncIterator[None]:
    """Let a node not reach its etcd for a while."""
    endpoints = node.source.etcd.endpoints
    node.source.etcd.endpoints = tuple("http://127.0.0.1:9" for _ in endpoints)
    try:
        yield
    finally:
        node.source.etcd.endpoints = endpoints


# --- etcd away -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_without_etcd_the_node_keeps_what_it_knows_says_so_once_and_catches_up(own, prefix, caplog, how, monkeypatch):
    monkeypatch.setattr("dataplane.control.etcd._SILENT_SECONDS", 0.2)

    async def work() -> None:
        async with following(settings_of(own, prefix, ttl=3)) as (node,):
            own.put(f"{prefix}/services/default/web", WEB)
            await node.until(lambda: node.cluster.services)
            before = node.cluster
            own.pause() if how == "hung" else own.kill()
            await node.until(lambda: not node.source.health.connected)
            health = node.source.health
            assert health.error
            assert health.revision == before.revision
            assert node.cluster is before
            refused = await node.edit("add_endpoint", "default/web", {"ip": "10.244.1.9"})
            assert isinstance(refused, dict)
            assert refused["errors"]
            assert refused["errors"][0].startswith("etcd is away, edits have to wait: ")
            await node.until(lambda: node.source.health.lag > 0)
            own.resume() if how == "hung" else await asyncio.to_thread(own.start)
            await asyncio.to_thread(own.put, f"{prefix}/endpoints/default/web/a", [{"ip": "10.244.1.10"}])
            await node.until(lambda: "10.244.1.10" in node.endpoints())
            await node.until(lambda: node.source.health.connected)
            assert node.source.health.lag == 0
            assert node.cluster.nodes["node1"].alive

    run(work)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("etcd is away" in line for line in lines) == 1
    assert sum("etcd is back" in line for line in lines) == 1


def test_a_membership_that_was_lost_is_taken_again(shared, prefix):
    async def work() -> None:
        async with following(settings_of(shared, prefix, ttl=1)) as (node,):
            lost = node.source.lease
            await node.source.etcd.revoke(lost)
            await node.until(lambda: not node.cluster.nodes["node1"].alive)
            await node.until(lambda: node.cluster.nodes["node1"].alive)
            await node.until(lambda: node.source.lease not in (0, lost))
            revision = shared.delete(f"{prefix}/members/node1")
            await node.until(lambda: node.source.health.revision >= revision)
            await node.until(lambda: node.cluster.nodes["node1"].alive)

    run(work)


# --- edits -----------------------------------------------------------------------------------------------------------


def test_edits_are_seen_by_every_node_and_have_been_handed_out_when_they_return(shared, prefix):
    async def work() -> None:
        async with following(*(settings_of(shared, prefix, number) for number in (1, 2))) as (first, second):
            service = {"name": "web", "namespace": "default", **WEB, "endpoints": [{"ip": "10.244.1.10", "weight": 3}]}
            done = await first.edit("set_service", service)
            assert isinstance(done, dict)
            assert done["applied"][0].startswith("set service default/web in etcd revision=")
            assert first.endpoints() == ["10.244.1.10"]
            await second.until(lambda: second.endpoints() == ["10.244.1.10"])
            assert second.cluster.services[0].origin == "etcd"
            await second.edit("add_endpoint", "default/web", {"ip": "10.244.2.10"})
            assert second.endpoints() == ["10.244.1.10", "10.244.2.10"]
            await first.until(lambda: len(first.endpoints()) == 2)
            await first.edit("drain_endpoint", "default/web", {"ip": "10.244.1.10"})
            drained = first.cluster.services[0].endpoints
            assert {str(each.address): (each.draining, each.weight) for each in drained} == {
                "10.244.1.10": (True, 3),
                "10.244.2.10": (False, 1),
            }
            await first.edit("delete_endpoint", "default/web", {"ip": "10.244.1.10"})
            assert first.endpoints() == ["10.244.2.10"]
            await first.edit("set_service", {"name": "web", "namespace": "default", **WEB, "scheduler": "sh"})
            assert (first.endpoints(), first.cluster.services[0].scheduler) == (["10.244.2.10"], "sh")
            await first.edit("delete_service", "default/web")
            assert first.cluster.services == ()
            assert shared.range(f"{prefix}/services/") == shared.range(f"{prefix}/endpoints/") == {}

    run(work)


def test_an_endpoint_is_edited_in_the_slice_that_has_it_and_new_ones_come_into_their_own(shared, prefix):
    async def work() -> None:
        async with following(settings_of(shared, prefix)) as (node,):
            shared.put(f"{prefix}/services/default/web", WEB)
            shared.put(f"{prefix}/endpoints/default/web/runtime", [{"ip": "10.244.1.10"}, {"ip": "10.244.1.11"}])
            await node.until(lambda: len(node.endpoints()) == 2)
            await node.edit("drain_endpoint", "default/web", {"ip": "10.244.1.11"})
            await node.edit("add_endpoint", "default/web", {"ip": "10.244.1.12", "weight": 2})
            await node.edit("delete_endpoint", "default/web", {"ip": "10.244.1.10"})
            slices = {
                key.rpartition("/")[2]: json.loads(text) for key, text in shared.range(f"{prefix}/endpoints/").items()
            }
            assert slices == {
                "runtime": [{"ip": "10.244.1.11", "draining": True}],
                "api": [{"ip": "10.244.1.12", "weight": 2}],
            }
            await node.edit("set_service", {"name": "web", "namespace": "default", **WEB, "endpoints": []})
            assert shared.range(f"{prefix}/endpoints/") == {}

    run(work)


def test_edits_at_once_on_two_nodes_lose_nothing(shared, prefix):
    async def work() -> None:
        async with following(*(settings_of(shared, prefix, number) for number in (1, 2))) as nodes:
            shared.put(f"{prefix}/services/default/web", WEB)
            for node in nodes:
                await node.until(partial(has_services, node))
            edits = [
                nodes[number % 2].edit("add_endpoint", "default/web", {"ip": f"10.244.9.{number}"})
                for number in range(8)
            ]
            assert all(not done["errors"] for done in await asyncio.gather(*edits) if isinstance(done, dict))
            await nodes[0].until(lambda: len(nodes[0].endpoints()) == 8)

    run(work)


def test_what_is_wrong_is_refused_with_the_files_words_and_nothing_is_written(shared, prefix):
    async def work() -> None:
        async with following(settings_of(shared, prefix)) as (node,):
            shared.put(f"{prefix}/services/default/web", WEB)
            await node.until(lambda: node.cluster.services)
            written = shared.range(prefix)
            bad = await node.edit("set_service", {"name": "bad", "namespace": "default", "ports": [{"port": "x"}]})
            assert bad == {"applied": [], "errors": ['ports[0].port: expected a number from 1 to 65535 (got "x")']}
            twice = await node.edit("set_service", {"name": "b", "namespace": "default", **WEB})
            assert isinstance(twice, dict)
            assert "is also default/web" in twice["errors"][0]
            with pytest.raises(MissingError):
                await node.edit("delete_service", "default/none")
            with pytest.raises(MissingError):
                await node.edit("drain_endpoint", "default/web", {"ip": "10.9.9.9"})
            assert shared.range(prefix) == written | shared.range(f"{prefix}/pods/")

    run(work)


def test_services_of_the_file_are_the_nodes_own_business(shared, prefix):
    file = '[[services.static]]\nname = "mine"\nclusterIPs = ["10.96.0.5"]\nports = [{ port = 80 }]\n'

    async def work() -> None:
        async with following(settings_of(shared, prefix, extra=file)) as (node,):
            assert await node.edit("delete_service", "default/mine") is None
            assert await node.edit("add_endpoint", "default/mine", {"ip": "10.244.1.10"}) is None

    run(work)
