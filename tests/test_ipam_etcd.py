"""The books of addresses in a real etcd: several processes that are killed, an etcd that is killed, broken entries."""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from dataplane.control.etcd import Etcd, UnavailableError
from dataplane.control.ipam import IpamError, NoAddressError, Pool, Rules, TakenError
from dataplane.control.ipam_etcd import EtcdAddresses
from tests import ipam_worker
from tests.etcd_server import EtcdServer

POOL = Pool("default", ip_network("10.244.0.0/24"), 26)
NOW = 1_000_000.0
START_TIMEOUT = 60.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as started:
        yield started


@pytest.fixture
def own(tmp_path) -> Iterator[EtcdServer]:
    """An etcd that the test may kill."""
    with EtcdServer(tmp_path) as started:
        yield started


class World:
    """Nodes on one etcd, each test under its own prefix."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self.etcd, self.prefix = etcd, prefix

    def node(self, name: str = "node1", rules: Rules | None = None) -> EtcdAddresses:
        return EtcdAddresses(self.etcd, self.prefix, name, rules or Rules((POOL,)))

    async def keys(self, prefix: str) -> list[str]:
        return [item.key.removeprefix(self.prefix) for item in (await self.etcd.range(self.prefix + prefix)).items]


@asynccontextmanager
async def world(server: EtcdServer, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    etcd = Etcd([server.url])
    try:
        yield World(etcd, f"/{request.node.name}")
    finally:
        await etcd.close()


# --- one node, or two ------------------------------------------------------------------------------------------------


async def fifty_at_once(server, request):
    async with world(server, request) as here:
        node = here.node()
        block = await node.claim_first_block(NOW)
        given = await asyncio.gather(*(node.assign(f"pod{number}", NOW) for number in range(50)))
        assert sorted(given) == [block[number] for number in range(1, 51)]
        assert await here.node().held() == {f"pod{number}": given[number] for number in range(50)}
        assert len(await here.keys("/blocks/")) == 1
        again = await asyncio.gather(*(node.assign(f"pod{number}", NOW) for number in range(50)))
        assert again == given
        await asyncio.gather(*(node.release(f"pod{number}", NOW) for number in range(50)))
        await node.release("never heard of", NOW)
        assert await node.held() == {}
        twins = await asyncio.gather(*(node.assign("twin", NOW) for _ in range(3)))
        assert await node.held() == {"twin": twins[0]}
        assert len(set(twins)) == 1


def test_fifty_pods_at_once_fill_one_block(shared, request):
    asyncio.run(fifty_at_once(shared, request))


async def what_requests_get(server, request):
    async with world(server, request) as here:
        node, other = here.node(), here.node("node2")
        wanted = ip_address("10.244.0.77")
        assert await node.assign("a", NOW, wanted, {"pod": "web-0"}) == wanted
        assert await node.assign("a", NOW, wanted) == wanted
        with pytest.raises(TakenError, match="already"):
            await node.assign("a", NOW, ip_address("10.244.0.78"))
        with pytest.raises(TakenError, match="held by a"):
            await other.assign("b", NOW, wanted)
        _, blocks = await other.look()
        seen = blocks[0].allocations[blocks[0].ordinal(wanted)]
        assert dict(seen.attributes) == {"pod": "web-0"}
        assert await other.release_address(wanted, seen, NOW)
        assert not await other.release_address(wanted, seen, NOW)
        assert await other.assign("b", NOW, wanted) == wanted
        # The first node remembers the address; the books know better.
        assert await node.assign("a", NOW) != wanted


def test_a_requested_address_is_given_once_and_what_was_released_by_hand_is_not_believed(shared, request):
    asyncio.run(what_requests_get(shared, request))


async def whose_pools(server, request):
    async with world(server, request) as here:
        first = here.node()
        await first.claim_first_block(NOW)
        second = here.node("node2", Rules((Pool("mine", ip_network("10.99.0.0/24"), 26),)))
        assert str(await second.claim_first_block(NOW)).startswith("10.244.0.")
        assert await here.keys("/ippools/") == ["/ippools/default"]
        record = {"cidr": "10.7.0.0/24", "blockSize": 26, "disabled": False}
        await here.etcd.put(f"{here.prefix}/ippools/more", json.dumps(record))
        disabled = {"cidr": str(POOL.cidr), "blockSize": 26, "disabled": True}
        await here.etcd.put(f"{here.prefix}/ippools/default", json.dumps(disabled))
        await second.tidy(NOW)
        assert await second.assign("a", NOW) in ip_network("10.7.0.0/24")


def test_pools_are_the_stores_and_the_first_nodes_file_fills_them(shared, request):
    asyncio.run(whose_pools(shared, request))


async def broken_entries(server, request, caplog):
    async with world(server, request) as here:
        node = here.node()
        for cidr in ("10.244.0.0-26", "10.244.0.64-26", "10.244.0.128-26"):
            await here.etcd.put(f"{here.prefix}/blocks/{cidr}", '{"cidr": "10.244.0.0/26"}')
        await here.etcd.put(f"{here.prefix}/affinities/node1/10.244.0.0-26", "[")
        await here.etcd.put(f"{here.prefix}/ippools/broken", '{"cidr": "10.8.0.0/24", "blockSize": 33}')
        await here.etcd.put(f"{here.prefix}/ippools/good", '{"cidr": "10.244.0.0/24", "blockSize": 26}')
        assert str(await node.claim_first_block(NOW)) == "10.244.0.192/26"
        for number in range(63):
            assert await node.assign(f"pod{number}", NOW) in ip_network("10.244.0.192/26")
        with pytest.raises(NoAddressError):
            await node.assign("late", NOW)
        lines = [record.getMessage() for record in caplog.records]
        for key in (
            "blocks/10.244.0.0-26",
            "blocks/10.244.0.64-26",
            "affinities/node1/10.244.0.0-26",
            "ippools/broken",
        ):
            assert sum(f"{here.prefix}/{key}: " in line for line in lines) == 1, key


def test_broken_entries_are_left_alone_and_named_once(shared, request, caplog):
    asyncio.run(broken_entries(shared, request, caplog))


# --- an etcd that is away --------------------------------------------------------------------------------------------


async def lost_answers(server, request, monkeypatch):
    async with world(server, request) as here:
        node = here.node()
        await node.claim_first_block(NOW)
        carry_out = here.etcd.txn

        async def lose(compare, success, failure=()):
            done = await carry_out(compare, success, failure)
            if compare:
                raise UnavailableError("the answer was lost")
            return done

        with monkeypatch.context() as patch:
            patch.setattr(here.etcd, "txn", lose)
            for handle in ("a", "b"):
                with pytest.raises(IpamError, match="etcd: the answer was lost"):
                    await node.assign(handle, NOW)
        held = await here.node().held()
        assert set(held) == {"a", "b"}
        assert await node.assign("a", NOW) == held["a"]
        await node.tidy(NOW)
        assert await node.held() == {"a": held["a"]}, "nobody came back for the other one"


def test_an_assignment_whose_answer_was_lost_is_found_again_or_given_back(shared, request, monkeypatch):
    asyncio.run(lost_answers(shared, request, monkeypatch))


async def silent_etcd(server, request, monkeypatch):
    async with world(server, request) as here:
        node = here.node()
        await node.claim_first_block(NOW)
        await node.assign("before", NOW)
        asked = 0

        async def silence(*_, **__):
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.01)  # what would be seconds
            raise UnavailableError("no answer")

        with monkeypatch.context() as patch:
            for name in ("txn", "range"):
                patch.setattr(here.etcd, name, silence)
            asking = (*(node.assign(f"pod{number}", NOW) for number in range(20)), node.release("before", NOW))
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert {str(outcome) for outcome in outcomes} == {"etcd: no answer"}
        assert asked == 1
        await node.release("before", NOW)
        assert await node.held() == {}


def test_those_who_wait_for_an_etcd_that_is_silent_are_told_together(shared, request, monkeypatch):
    asyncio.run(silent_etcd(shared, request, monkeypatch))


async def etcd_killed(server, request):
    async with world(server, request) as here:
        node = here.node()
        await node.claim_first_block(NOW)
        address = await node.assign("a", NOW)
        server.kill()
        for asking in (node.assign("b", NOW), node.release("a", NOW), node.held(), node.tidy(NOW), node.look()):
            with pytest.raises(IpamError, match="etcd: "):
                await asking
        server.start()
        assert await node.held() == {"a": address}
        assert await node.assign("b", NOW) != address
        await node.release("a", NOW)
        assert set(await node.held()) == {"b"}


def test_an_etcd_that_is_away_is_an_error_and_nothing_is_lost(own, request):
    asyncio.run(etcd_killed(own, request))


# --- processes -------------------------------------------------------------------------------------------------------

NODES = ("node1", "node2", "node3", "node4")
ENTRIES = 2400
KILLS = 12


class Workers:
    """One process per node; any of them can be killed and started again."""

    def __init__(self, url: str, diary) -> None:
        self._url, self._diary = url, diary
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, node: str, seed: int) -> None:
        command = [sys.executable, "-m", "tests.ipam_worker", self._url, node, str(self._diary), str(seed)]
        self._running[node] = subprocess.Popen(command, stderr=subprocess.PIPE)

    def kill(self, node: str) -> None:
        process = self._running.pop(node)
        process.kill()
        _, errors = process.communicate()
        assert not errors, errors.decode()

    def kill_all(self) -> None:
        for node in list(self._running):
            self.kill(node)

    def wait_for(self, entries: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self._diary.read_bytes().count(b"\n") < entries:
            for node, process in self._running.items():
                assert process.poll() is None, f"{node} ended"
            assert time.monotonic() < deadline, "the workers are stuck"
            time.sleep(0.01)


def check(diary: str) -> tuple[int, int]:
    """Check that no address is given twice; return how many were given, and how many are still held."""
    held: dict[str, str] = {}
    given = 0
    for line in diary.splitlines():
        sign, address, handle = line.split()
        if sign == "+":
            assert address not in held, f"{address} is given to {handle} and held by {held[address]}"
            held[address] = handle
            given += 1
        elif held.get(address) == handle:
            del held[address]
    return given, len(held)


async def put_in_order(url: str) -> None:
    """Release what killed processes have left; nothing may stay, and everything can be given out again."""
    etcd = Etcd([url])
    late = time.time() * 60 + 10_000
    for name in NODES:
        node = EtcdAddresses(etcd, ipam_worker.PREFIX, name, ipam_worker.RULES)
        await node.claim_first_block(late)
        for handle in await node.held():
            await node.release(handle, late)
    for name in NODES:
        node = EtcdAddresses(etcd, ipam_worker.PREFIX, name, ipam_worker.RULES)
        assert len(await node.forget(name, late)) == 1, "only the tunnel's own address is left"
    for kind in ("blocks", "affinities"):
        assert (await etcd.range(f"{ipam_worker.PREFIX}/{kind}/")).items == ()
    heir = EtcdAddresses(etcd, ipam_worker.PREFIX, "heir", replace(ipam_worker.RULES, max_blocks=8))
    given = {await heir.assign(f"pod{number}", late) for number in range(64)}
    assert given == set(ipam_worker.POOL.cidr)
    await etcd.close()


def test_processes_that_are_killed_never_give_an_address_twice_and_lose_none(own, tmp_path):
    diary = tmp_path / "diary"
    diary.touch()
    chance = random.Random(1)
    workers = Workers(own.url, diary)
    try:
        for number, node in enumerate(NODES):
            workers.start(node, number)
        for number in range(KILLS):
            workers.wait_for((number + 1) * ENTRIES // KILLS)
            victim = chance.choice(NODES)
            workers.kill(victim)
            workers.start(victim, 100 + number)
    finally:
        workers.kill_all()
    given, left = check(diary.read_text())
    assert given > ENTRIES // 3
    assert left > 0, "nobody was killed while it held something"
    asyncio.run(put_in_order(own.url))
