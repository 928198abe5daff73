"""failover: that it goes on whatever fails beside it, with a node and a store that do as the test says."""

import asyncio
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from dataplane import failover
from dataplane.control import ownership_etcd
from dataplane.control.etcd import EtcdError
from dataplane.control.ownership import Claim
from dataplane.control.process import Heartbeat, Store
from dataplane.control.state import DesiredState, Node, Settings
from dataplane.failover import Failover

SECOND = 1_000_000_000
ADDRESS = IPv4Address("192.0.2.200")
MINE, OTHERS = Claim("node1", lease=7), Claim("node2", lease=8)
STATE = DesiredState(node=Node("node1"))


class Clock:
    """The time, which stands still unless the test moves it."""

    def __init__(self) -> None:
        self.now = 100 * SECOND

    def __call__(self) -> int:
        return self.now


class OneNode:
    """A node that applies nothing; ``results`` are what its next refreshes do."""

    def __init__(self) -> None:
        self.tables = SimpleNamespace(settings={})
        self.wiring = SimpleNamespace(state=STATE)
        self.underlay = None
        self.results: list[Exception | list[str]] = []
        self.refreshed: list[Any] = []

    def amend(self, amendment) -> None:
        self.amended = amendment

    async def refresh(self):
        self.refreshed.append(self.amended(STATE).owners)
        result = self.results.pop(0) if self.results else []
        if isinstance(result, Exception):
            raise result
        return {"applied": [], "errors": result}


class Refusing:
    """A store that refuses at once, whatever is asked."""

    def __init__(self, *_: object) -> None:
        self.reads = self.writes = 0

    async def run(self, listener) -> None:
        raise ValueError("a bug")

    async def read(self, listener) -> int:
        self.reads += 1
        raise EtcdError("refused")

    async def write(self, writes) -> tuple[bool, int]:
        self.writes += 1
        raise EtcdError("refused")


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(failover, "_now", made)
    return made


def opened(node: Any, source: Literal["static", "etcd"] = "etcd") -> Failover:
    heartbeat = Heartbeat(port=0, interval=0.001)
    store = Store(source, endpoints=("http://127.0.0.1:1",))
    return Failover(node, Settings(STATE, store=store, heartbeat=heartbeat))


async def settled() -> None:
    """Give everything its turns that does not wait for the clock."""
    for _ in range(50):
        await asyncio.sleep(0)


# --- a state that cannot be applied ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError(28, "no space"), ["veth0: no"]], ids=["raised", "refused"])
def test_what_could_not_be_applied_is_tried_again_a_second_later(clock, failure):
    async def scenario() -> None:
        node = OneNode()
        node.results = [failure]
        made = opened(node)
        made.claims_read({ADDRESS: OTHERS}, 5, clock.now)
        await settled()
        assert len(node.refreshed) == 1
        assert node.amended(STATE).owners == frozenset(), "another's change of the state does not bring it in"
        clock.now += SECOND
        made.lease_kept(0, 0)
        await settled()
        assert node.refreshed[1:] == [frozenset({(ADDRESS, "node2")})]
        assert node.amended(STATE).owners == node.refreshed[1]

    asyncio.run(scenario())


def test_what_may_be_half_applied_counts_as_answered_for_until_a_state_is_applied(clock):
    async def scenario() -> None:
        node = OneNode()
        node.results = [OSError(28, "no space"), OSError(28, "no space")]
        made = opened(node)
        assert made.own is not None
        made.own.elected = {ADDRESS: "node1"}
        made._elected_without, made._seen = made.beats.silent, STATE
        made.claims_read({ADDRESS: MINE._replace(revision=5)}, 5, clock.now)
        await settled()
        made.own.elected = {}
        for may_answer in (True, False):
            clock.now += SECOND
            made.claims_read({}, 6, clock.now)
            await settled()
            assert made.own.must_read(clock.now) == may_answer
        assert len(node.refreshed) == 3, "also when what is wanted is what was before"

    asyncio.run(scenario())


# --- a store that refuses --------------------------------------------------------------------------------------------


def test_a_store_that_refuses_is_not_asked_again_at_once(clock):
    async def scenario() -> None:
        store: Any = Refusing()
        made = opened(OneNode())
        made._claims = store
        made.claims_read({ADDRESS: MINE._replace(revision=5)}, 5, clock.now)  # to be deleted: it is not elected
        made.lease_kept(7, clock.now + SECOND)
        await settled()
        assert (store.reads, store.writes) == (1, 1)
        clock.now += SECOND // 10
        made.store_failed()
        await settled()
        assert (store.reads, store.writes) == (2, 2), "but with the next beat"

    asyncio.run(scenario())


# --- start and end ---------------------------------------------------------------------------------------------------


def test_it_stops_although_what_ran_beside_has_failed_and_does_nothing_afterwards(monkeypatch, caplog):
    monkeypatch.setattr(ownership_etcd, "Claims", Refusing)

    async def scenario() -> None:
        node = OneNode()
        made = opened(node)
        made.start()
        await settled()
        await made.stop()
        made.lease_kept(7, 1 << 62)
        made.claims_read({ADDRESS: MINE._replace(revision=5)}, 5, 0)
        for _ in range(5):
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
        assert node.refreshed == []

    asyncio.run(scenario())
    assert "a task of failover has failed" in caplog.text


def test_beats_go_on_after_one_that_has_failed():
    class Fence(dict[int, int]):
        def __init__(self) -> None:
            super().__init__()
            self.set, self.again = 0, asyncio.Event()

        def __setitem__(self, key: int, value: int) -> None:
            self.set += 1
            if self.set == 2:
                raise RuntimeError("a bug")
            if self.set > 2:
                self.again.set()

    async def scenario() -> None:
        node = OneNode()
        node.tables.settings = fence = Fence()
        made = opened(node, "static")
        with pytest.raises(RuntimeError):
            made.start()
        async with asyncio.timeout(10):
            await fence.again.wait()
        await made.stop()

    asyncio.run(scenario())
