"""Containers that come and go at once, and what fails meanwhile: the node, the books, the file, the runtime itself.

The node is a stand-in whose refresh takes a turn of the loop; namespaces are a table of paths and cookies.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataplane import attach
from dataplane.attach import Attacher
from dataplane.cni import (
    ATTACHMENTS,
    EXHAUSTED,
    EXISTS,
    INVALID_CONFIG,
    IO_FAILURE,
    NOT_AVAILABLE,
    REFUSED,
    TRY_AGAIN_LATER,
    UNKNOWN_CONTAINER,
    CniError,
)
from dataplane.config import ConfigError
from dataplane.control.ipam import IpamError, NoAddressError, TakenError
from dataplane.control.state import DesiredState, Node, Pod, PodNetwork, Settings

STATE = DesiredState(
    node=Node("node1"),
    pod_network=PodNetwork(cidrs=(IPv4Network("10.244.1.0/24"),)),
    pods=(Pod("web", "default", "web", (IPv4Address("10.244.1.5"),), 1, 1450, "cali1"),),
)


class FakeNode:
    """What an attacher sees of a node. ``refuses`` says why a state is refused, "" for one that is not."""

    def __init__(self) -> None:
        self.settings = Settings(STATE, cni=True)
        self.wiring = SimpleNamespace(state=STATE)
        self.report = SimpleNamespace(ready=True)
        self.stopping = asyncio.Event()
        self.refreshes = 0
        self.refuses: Callable[[DesiredState], str] = lambda state: ""
        self.turn = asyncio.Event()
        self.turn.set()
        self._amend: Callable[[DesiredState], DesiredState] = lambda state: state

    def amend(self, amendment: Callable[[DesiredState], DesiredState]) -> None:
        self._amend = amendment

    async def refresh(self) -> dict[str, list[str]]:
        self.refreshes += 1
        await self.turn.wait()
        await asyncio.sleep(0)
        state = self._amend(self.settings.state)
        if why := self.refuses(state):
            return {"applied": [], "errors": [why]}
        self.wiring.state = state
        return {"applied": [], "errors": []}

    @property
    def pods(self) -> set[str]:
        return {pod.name for pod in self.wiring.state.pods if pod.cookie}


@dataclass
class Books:
    """Addresses that are given out one after the other; ``failing`` is raised instead."""

    given: dict[str, IPv4Address] = field(default_factory=dict)
    failing: IpamError | None = None
    next: int = 10

    async def assign(self, handle, now, requested=None, attributes=None):
        await asyncio.sleep(0)
        if self.failing is not None:
            raise self.failing
        if handle not in self.given:
            self.next += 1
            self.given[handle] = requested or IPv4Address("10.244.1.0") + self.next
        return self.given[handle]

    async def release(self, handle, now):
        await asyncio.sleep(0)
        if self.failing is not None:
            raise self.failing
        self.given.pop(handle, None)

    async def held(self):
        if self.failing is not None:
            raise self.failing
        return dict(self.given)


@pytest.fixture(autouse=True)
def namespaces(monkeypatch):
    """The namespaces that are there: a cookie by path."""
    known = {f"/run/netns/c{number}": 100 + number for number in range(64)}

    def admit(path: str, interface: str) -> int:
        if path not in known:
            raise CniError(UNKNOWN_CONTAINER, path)
        return known[path]

    def examine(path: str, interface: str, cookie: int = 0) -> int:
        if known.get(path) != cookie:
            raise ValueError("it is another namespace by now")
        return cookie

    monkeypatch.setattr(attach, "admit", admit)
    monkeypatch.setattr(attach, "examine", examine)
    return known


class World:
    """An attacher with its stand-ins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.node, self.books = FakeNode(), Books()
        self.attacher = self.made()

    def made(self) -> Attacher:
        node: Any = self.node
        books: Any = self.books
        return Attacher(node, books, self.path)

    async def call(self, command: str, container: str = "c1", **keys: Any) -> Any:
        environment = {
            "CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_IFNAME": "eth0",
            "CNI_NETNS": keys.pop("netns", f"/run/netns/{container}"),
        }  # fmt: skip
        return await self.attacher.serve(environment, {"cniVersion": "1.1.0", "name": "net", **keys})

    async def code(self, command: str, container: str = "c1", **keys: Any) -> int:
        with pytest.raises(CniError) as caught:
            await self.call(command, container, **keys)
        return caught.value.code

    @property
    def written(self) -> set[str]:
        return (
            {row["container"] for row in json.loads(self.path.read_text())["attachments"]}
            if self.path.exists()
            else set()
        )

    def assert_attached(self, *containers: str) -> None:
        """The node, the books and the file agree."""
        assert self.node.pods == set(containers)
        assert self.written == set(containers)
        assert {handle.split("/")[3] for handle in self.books.given} == set(containers)


def play(path: Path, scene: Callable[[World], Awaitable[None]]) -> None:
    """Run a scene with an attacher that has been restored and started."""

    async def act() -> None:
        world = World(path / "node1.cni.json")
        await world.attacher.restore()
        world.attacher.start()
        try:
            await scene(world)
        finally:
            await world.attacher.stop()

    asyncio.run(asyncio.wait_for(act(), 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of events
        await asyncio.sleep(0.001)


# --- at once ---------------------------------------------------------------------------------------------------------


def test_containers_that_come_at_once_share_a_few_plans(tmp_path):
    async def scene(world: World) -> None:
        world.node.turn.clear()
        names = [f"c{number}" for number in range(50)]
        adding = [asyncio.ensure_future(world.call("ADD", name)) for name in names]
        await until(lambda: len(world.books.given) == 50)
        world.node.turn.set()
        results = await asyncio.gather(*adding)
        assert len({result["result"]["ips"][0]["address"] for result in results}) == 50
        assert world.node.refreshes <= 5
        world.assert_attached(*names)
        await asyncio.gather(*(world.call("DEL", name) for name in [*names, *names]))
        world.assert_attached()

    play(tmp_path, scene)


def test_one_that_is_refused_does_not_keep_the_others_out(tmp_path):
    async def scene(world: World) -> None:
        world.node.refuses = lambda state: "no c3" if any(pod.name == "c3" for pod in state.pods) else ""
        world.node.turn.clear()
        adding = [asyncio.ensure_future(world.call("ADD", f"c{number}")) for number in range(8)]
        await until(lambda: len(world.books.given) == 8)
        world.node.turn.set()
        done = await asyncio.gather(*adding, return_exceptions=True)
        failed = {number: each for number, each in enumerate(done) if isinstance(each, CniError)}
        assert {number: (each.code, str(each)) for number, each in failed.items()} == {3: (REFUSED, "no c3")}
        world.assert_attached(*(f"c{number}" for number in range(8) if number != 3))

    play(tmp_path, scene)


def test_a_del_that_overtakes_its_add_waits_for_it(tmp_path):
    async def scene(world: World) -> None:
        world.node.turn.clear()
        adding = asyncio.ensure_future(world.call("ADD"))
        await until(lambda: world.node.refreshes == 1)
        deleting = asyncio.ensure_future(world.call("DEL"))
        await asyncio.sleep(0)
        assert not deleting.done()
        world.node.turn.set()
        await asyncio.gather(adding, deleting)
        world.assert_attached()

    play(tmp_path, scene)


def test_two_containers_cannot_be_the_same_pod_at_once(tmp_path):
    async def scene(world: World) -> None:
        done = await asyncio.gather(world.call("ADD"), world.call("ADD", "c1"), return_exceptions=True)
        assert [each.code for each in done if isinstance(each, CniError)] == [EXISTS]
        world.assert_attached("c1")

    play(tmp_path, scene)


def test_a_runtime_that_hangs_up_leaves_no_half_a_container(tmp_path):
    async def scene(world: World) -> None:
        world.node.turn.clear()
        adding = asyncio.ensure_future(world.call("ADD"))
        await until(lambda: world.node.refreshes == 1)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        world.node.turn.set()
        await until(lambda: world.node.pods == {"c1"})
        world.assert_attached("c1")
        await world.call("DEL")
        world.assert_attached()

    play(tmp_path, scene)


# --- failing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "code"),
    [(NoAddressError("full"), EXHAUSTED), (TakenError("taken"), INVALID_CONFIG), (IpamError("away"), TRY_AGAIN_LATER)],
)
def test_an_add_without_an_address_leaves_nothing(tmp_path, failure, code):
    async def scene(world: World) -> None:
        world.books.failing = failure
        assert await world.code("ADD") == code
        assert world.node.refreshes == 0
        world.books.failing = None
        world.assert_attached()
        await world.call("ADD")
        world.assert_attached("c1")

    play(tmp_path, scene)


def test_a_namespace_that_is_not_there_costs_no_address(tmp_path):
    async def scene(world: World) -> None:
        assert await world.code("ADD", netns="/run/netns/none") == UNKNOWN_CONTAINER
        assert world.books.next == 10
        world.assert_attached()

    play(tmp_path, scene)


def test_a_refused_add_leaves_nothing(tmp_path):
    async def scene(world: World) -> None:
        world.node.refuses = lambda state: "the table is full"
        assert await world.code("ADD") == REFUSED
        world.assert_attached()
        world.node.stopping.set()
        assert await world.code("ADD") == TRY_AGAIN_LATER
        world.assert_attached()

    play(tmp_path, scene)


def test_a_bug_of_the_node_is_told_and_the_next_container_comes_through(tmp_path):
    async def scene(world: World) -> None:
        def broken(state: DesiredState) -> str:
            raise ZeroDivisionError

        world.node.refuses = broken
        with pytest.raises(ZeroDivisionError):
            await world.call("ADD")
        world.node.refuses = lambda state: ""
        await world.call("ADD", "c2")
        world.assert_attached("c2")

    play(tmp_path, scene)


def test_a_file_that_cannot_be_written_refuses_before_anything_is_made(tmp_path):
    async def scene(world: World) -> None:
        world.path = tmp_path / "no-such-folder" / "file"
        world.attacher = world.made()
        assert await world.code("ADD") == IO_FAILURE
        assert world.node.refreshes == 0
        assert world.books.given == {}

    play(tmp_path, scene)


def test_what_cannot_be_released_is_released_later(tmp_path, monkeypatch):
    monkeypatch.setattr(attach, "_RETRY_SECONDS", 0.01)

    async def scene(world: World) -> None:
        await world.call("ADD")
        world.books.failing = IpamError("away")
        assert await world.call("DEL") == {}
        assert world.node.pods == world.written == set()
        assert len(world.books.given) == 1
        world.books.failing = None
        await until(lambda: not world.books.given)

    play(tmp_path, scene)


def test_an_address_that_is_owed_stays_with_a_container_that_comes_again(tmp_path):
    async def scene(world: World) -> None:
        await world.call("ADD")
        world.books.failing = IpamError("away")
        await world.call("DEL")
        world.books.failing = None
        await world.call("ADD")
        await world.attacher._pay(("net", "c1", "eth0"))
        await world.call("ADD", "c2")
        world.assert_attached("c1", "c2")

    play(tmp_path, scene)


def test_what_is_being_attached_is_not_taken_for_left_over(tmp_path):
    async def scene(world: World) -> None:
        world.node.turn.clear()
        adding = asyncio.ensure_future(world.call("ADD"))
        await until(lambda: world.node.refreshes == 1)
        await world.attacher._sweep()
        paying = asyncio.ensure_future(world.attacher._pay(("net", "c1", "eth0")))
        world.node.turn.set()
        await asyncio.gather(adding, paying)
        world.assert_attached("c1")

    play(tmp_path, scene)


def test_an_address_that_a_pod_of_the_file_has_is_refused_and_no_plan_is_made(tmp_path, caplog):
    async def scene(world: World) -> None:
        assert await world.code("ADD", runtimeConfig={"ips": ["10.244.1.5/32"]}) == REFUSED
        assert world.node.refreshes == 0
        world.assert_attached()

    play(tmp_path, scene)
    assert "Traceback" not in caplog.text


def test_a_pod_of_the_file_that_comes_while_a_container_is_connected_refuses_it(tmp_path, caplog):
    async def scene(world: World) -> None:
        world.node.turn.clear()
        adding = asyncio.ensure_future(world.code("ADD"))
        await until(lambda: world.node.refreshes == 1)
        world.node.settings = Settings(replace(STATE, pods=(replace(STATE.pods[0], name="c1"),)), cni=True)
        world.node.turn.set()
        assert await adding == REFUSED
        world.assert_attached()

    play(tmp_path, scene)
    assert "Traceback" not in caplog.text


# --- the next start --------------------------------------------------------------------------------------------------


def test_the_next_start_has_what_is_still_there_and_releases_the_rest(tmp_path, namespaces):
    others = ("cni/node1/net/lost/eth0", "cni/node2/net/c9/eth0", "vxlan-tunnel-addr-node1")
    books = {handle: IPv4Address("10.244.1.99") for handle in others}

    async def before(world: World) -> None:
        await asyncio.gather(*(world.call("ADD", name) for name in ("c1", "c2", "c3")))
        books.update(world.books.given)

    async def after(world: World) -> None:
        world.books.given = books
        await world.node.refresh()
        assert world.node.pods == {"c1", "c3"}
        assert world.written == {"c1", "c3"}
        await until(lambda: len(world.books.given) == 4)
        assert not {handle for handle in world.books.given if "c2" in handle or "lost" in handle}

    play(tmp_path, before)
    namespaces["/run/netns/c2"] += 1000
    play(tmp_path, after)


def test_a_start_with_a_file_that_is_broken_goes_on_without_it(tmp_path, caplog):
    (tmp_path / "node1.cni.json").write_text("{")

    async def scene(world: World) -> None:
        await world.call("ADD")
        world.assert_attached("c1")

    play(tmp_path, scene)
    assert "unreadable" in caplog.text


def test_a_pod_of_the_file_comes_before_a_container_of_an_earlier_start(tmp_path):
    async def before(world: World) -> None:
        await world.call("ADD")

    async def after(world: World) -> None:
        assert world.node.pods == world.written == set()

    play(tmp_path, before)
    content = json.loads((tmp_path / "node1.cni.json").read_text())
    content["attachments"][0]["address"] = "10.244.1.5"
    (tmp_path / "node1.cni.json").write_text(json.dumps(content))
    play(tmp_path, after)


def test_a_reload_cannot_give_a_containers_name_or_address_to_a_pod(tmp_path):
    async def scene(world: World) -> None:
        await world.call("ADD")
        address = next(iter(world.books.given.values()))
        web = STATE.pods[0]
        for pod in (replace(web, addresses=(address,)), replace(web, name="c1")):
            with pytest.raises(ConfigError, match="container c1"):
                world.node._amend(replace(STATE, pods=(pod,)))

    play(tmp_path, scene)


# --- GC and STATUS ---------------------------------------------------------------------------------------------------


def test_gc_takes_what_is_not_listed_and_gives_back_its_addresses(tmp_path):
    async def scene(world: World) -> None:
        await asyncio.gather(*(world.call("ADD", name) for name in ("c1", "c2", "c3")))
        listed: dict[str, Any] = {ATTACHMENTS: [{"containerID": "c2", "ifname": "eth0"}]}
        await world.call("GC", **listed)
        world.assert_attached("c2")

    play(tmp_path, scene)


def test_gc_spares_a_container_that_came_again_while_it_waited(tmp_path):
    async def scene(world: World) -> None:
        await world.call("ADD")
        (key,) = world.attacher._attached
        collecting: dict[str, Any] = {ATTACHMENTS: []}
        async with world.attacher._alone(key):
            waiting = asyncio.ensure_future(world.call("GC", **collecting))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            world.attacher._attached = {key: replace(world.attacher._attached[key])}  # as DEL and ADD leave it
        await waiting
        world.assert_attached("c1")
        await world.call("GC", **collecting)
        world.assert_attached()

    play(tmp_path, scene)


def test_status_is_50_when_no_container_can_be_added(tmp_path):
    async def scene(world: World) -> None:
        assert await world.call("STATUS") == {}
        world.books.failing = IpamError("away")
        assert await world.code("STATUS") == NOT_AVAILABLE
        world.books.failing = None
        world.node.wiring.state = replace(STATE, pod_network=PodNetwork())
        assert await world.code("STATUS") == NOT_AVAILABLE
        world.node.report.ready = False
        assert await world.code("STATUS") == NOT_AVAILABLE

    play(tmp_path, scene)
