"""The client against a real etcd."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, closing
from typing import TypeVar

import pytest

from dataplane.control import etcd
from dataplane.control.etcd import (
    CompactedError,
    Compare,
    Delete,
    Etcd,
    EtcdError,
    Events,
    Get,
    LeaseGoneError,
    Put,
    UnavailableError,
)
from tests.etcd_server import EtcdServer

Result = TypeVar("Result")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as started:
        yield started


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"/{request.node.name}/"


@pytest.fixture
def run(server: EtcdServer) -> Callable[[Callable[[Etcd], Awaitable[Result]]], Result]:
    def carry_out(work: Callable[[Etcd], Awaitable[Result]]) -> Result:
        return use([server.url], work)

    return carry_out


def use(endpoints: list[str], work: Callable[[Etcd], Awaitable[Result]], timeout: float = 5.0) -> Result:
    async def whole() -> Result:
        client = Etcd(endpoints, timeout)
        try:
            return await asyncio.wait_for(work(client), 60)
        finally:
            await client.close()

    return asyncio.run(whole())


def closed_port() -> str:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_comes_back_as_it_was_put(run, prefix):
    async def work(client: Etcd) -> None:
        first = await client.put(prefix + "a", "ä value")
        second = await client.put(prefix + "a", "another")
        item = await client.get(prefix + "a")
        assert item == etcd.KeyValue(prefix + "a", "another", first, second, 2, 0)

    run(work)


def test_a_missing_key_is_none_and_deleting_it_does_nothing(run, prefix):
    async def work(client: Etcd) -> None:
        assert await client.get(prefix + "a") is None
        assert not await client.delete(prefix + "a")
        await client.put(prefix + "a", "")
        assert await client.delete(prefix + "a")
        assert await client.get(prefix + "a") is None

    run(work)


def test_a_range_has_all_keys_of_the_prefix_and_no_others_over_many_pages(run, prefix, monkeypatch):
    monkeypatch.setattr(etcd, "PAGE", 7)

    async def work(client: Etcd) -> None:
        for name in range(50):
            await client.put(f"{prefix}{name:03}", str(name))
        newest = await client.put(prefix[:-1] + "0", "behind the prefix")  # 0 is the character after /
        found = await client.range(prefix)
        assert [item.value for item in found.items] == [str(name) for name in range(50)]
        assert found.revision == newest

    run(work)


def test_keys_with_large_values_come_in_smaller_pages(run, prefix, monkeypatch):
    monkeypatch.setattr(etcd, "PAGE", 7)
    monkeypatch.setattr(etcd, "HEAVY_PAGE", 2)

    async def work(client: Etcd) -> None:
        names = [f"{prefix}{kind}/{number}" for kind in "abc" for number in range(5)]
        for name in names:
            await client.put(name, "")
        ask, sizes = client._ask, list[int]()

        async def counted(endpoint, path, body):
            answer = await ask(endpoint, path, body)
            sizes.append(len(answer["kvs"]))
            return answer

        monkeypatch.setattr(client, "_ask", counted)
        assert [item.key for item in (await client.range(prefix, heavy=f"{prefix}b/")).items] == names
        assert [item.key for item in (await client.range(f"{prefix}b/", heavy=f"{prefix}b/")).items] == names[5:10]
        assert sizes == [5, 2, 2, 1, 5, 2, 2, 1]

    run(work)


def test_a_range_is_of_one_revision_however_many_pages_it_takes(run, prefix, monkeypatch):
    monkeypatch.setattr(etcd, "PAGE", 2)

    async def work(client: Etcd) -> None:
        for name in "abcd":
            await client.put(prefix + name, "old")
        reading = asyncio.ensure_future(client.range(prefix))
        ask = client._ask

        async def after_first(endpoint, path, body):
            monkeypatch.setattr(client, "_ask", ask)
            page = await ask(endpoint, path, body)
            await client.put(prefix + "d", "new")
            return page

        monkeypatch.setattr(client, "_ask", after_first)
        assert [item.value for item in (await reading).items] == ["old"] * 4

    run(work)


def test_a_compaction_between_two_pages_begins_the_range_anew(run, prefix, server, monkeypatch):
    monkeypatch.setattr(etcd, "PAGE", 2)

    async def work(client: Etcd) -> None:
        for name in "abcd":
            await client.put(prefix + name, "old")
        ask = client._ask

        async def after_first(endpoint, path, body):
            monkeypatch.setattr(client, "_ask", ask)
            page = await ask(endpoint, path, body)
            server.compact(await client.put(prefix + "a", "new"))
            return page

        monkeypatch.setattr(client, "_ask", after_first)
        assert [item.value for item in (await client.range(prefix)).items] == ["new", "old", "old", "old"]

    run(work)


def test_bytes_that_are_no_text_do_no_harm(run, prefix, server):
    server.ask("kv/put", {"key": etcd._encoded(prefix)[:-4] + "////", "value": "/wD+"})  # 0xFF 0xFF 0xFF

    async def work(client: Etcd) -> None:
        found = await client.range(prefix[:-4])
        assert [item.value for item in found.items] == ["\\xff\x00\\xfe"]

    run(work)


# --- transactions ----------------------------------------------------------------------------------------------------


def test_a_transaction_does_the_one_or_the_other(run, prefix):
    key = prefix + "a"

    async def work(client: Etcd) -> None:
        made = await client.txn([Compare(key, "version", 0)], [Put(key, "one"), Put(prefix + "b", "")])
        assert made.succeeded
        again = await client.txn([Compare(key, "version", 0)], [Put(key, "two")], [Get(key), Get(prefix + "none")])
        assert not again.succeeded
        assert again.responses == (await client.get(key), None)
        holds = [
            Compare(key, "mod_revision", made.revision),
            Compare(key, "create_revision", made.revision),
            Compare(key, "value", "one"),
        ]
        gone = await client.txn(holds, [Delete(prefix, prefix=True)])
        assert gone.succeeded
        nothing = await client.txn([], [Delete(prefix, prefix=True), Get(key)])
        assert [made.wrote, again.wrote, gone.wrote, nothing.wrote] == [True, False, True, False]
        assert (await client.range(prefix)).items == ()

    run(work)


@pytest.mark.parametrize(
    "compare",
    [
        Compare("/missing", "version", 1),
        Compare("/missing", "mod_revision", 5),
        Compare("/missing", "create_revision", 5),
        Compare("/missing", "value", "x"),
    ],
)
def test_a_comparison_that_does_not_hold_fails(run, compare):
    assert not run(lambda client: client.txn([compare], [Put("/never", "")])).succeeded


def test_what_etcd_refuses_is_an_error_with_its_words(run):
    with pytest.raises(EtcdError, match="duplicate key") as refused:
        run(lambda client: client.txn([], [Put("/twice", ""), Put("/twice", "")]))
    assert not isinstance(refused.value, UnavailableError)


# --- leases ----------------------------------------------------------------------------------------------------------


def test_keys_go_with_their_lease(run, prefix):
    async def work(client: Etcd) -> None:
        lease = await client.grant(9.5)
        await client.put(prefix + "a", "", lease)
        item = await client.get(prefix + "a")
        assert item is not None
        assert item.lease == lease
        assert await client.keep_alive(lease) == 10
        await client.revoke(lease)
        assert await client.get(prefix + "a") is None
        await client.revoke(lease)
        assert await client.keep_alive(lease) == 0
        with pytest.raises(LeaseGoneError):
            await client.put(prefix + "a", "", lease)
        with pytest.raises(LeaseGoneError):
            await client.txn([], [Put(prefix + "a", "", lease)])

    run(work)


# --- watching --------------------------------------------------------------------------------------------------------


def changes(events: Events) -> list[tuple[str, str | None]]:
    return [(item.key.rpartition("/")[2], None if item.deleted else item.value) for item in events.events]


async def seen(client: Etcd, prefix: str, start: int, count: int) -> list[Events]:
    """Return the first answers of a watch that have something in them."""
    found: list[Events] = []
    async with aclosing(client.watch(prefix, start)) as watch:
        async for events in watch:
            found += [events] if events.events else []
            if sum(len(each.events) for each in found) >= count:
                break
    return found


def test_a_watch_says_first_that_it_stands(run, prefix):
    async def work(client: Etcd) -> None:
        revision = await client.put("/elsewhere", "")
        async with aclosing(client.watch(prefix, revision + 1)) as watch:
            assert await anext(watch) == Events(revision, ())

    run(work)


def test_a_watch_goes_on_where_another_ended_and_misses_nothing(run, prefix):
    async def work(client: Etcd) -> None:
        start = await client.put(prefix + "a", "1")
        await client.put(prefix + "b", "2")
        last = await client.delete(prefix + "a")
        assert last
        found = await seen(client, prefix, start, 2)
        assert changes(found[0])[:2] == [("a", "1"), ("b", "2")]
        later = await seen(client, prefix, start + 2, 1)
        assert changes(later[0]) == [("a", None)]
        assert later[0].revision == start + 2

    run(work)


def test_what_one_transaction_did_is_seen_at_once(run, prefix):
    async def work(client: Etcd) -> None:
        start = await client.put(prefix + "a", "")
        watching = asyncio.ensure_future(seen(client, prefix, start + 1, 100))
        await client.txn([], [Put(f"{prefix}{name}", "x") for name in range(100)])
        (found,) = await watching
        assert len(found.events) == 100
        assert found.revision == start + 1

    run(work)


def test_a_burst_that_fits_into_no_message_comes_whole_and_in_order(run, prefix):
    async def work(client: Etcd) -> None:
        start = await client.put(prefix + "a", "")
        for name in range(50):
            await client.put(f"{prefix}{name}", "x" * 100_000)  # 5 MB; a message has 1.5
        found = await seen(client, prefix, start + 1, 50)
        revisions = [item.mod_revision for events in found for item in events.events]
        assert revisions == list(range(start + 1, start + 51))
        assert found[-1].revision == start + 50

    run(work)


def test_a_watch_of_what_is_compacted_says_from_where_it_can_go_on(run, prefix, server):
    async def work(client: Etcd) -> None:
        await client.put(prefix + "a", "1")
        newest = await client.put(prefix + "a", "2")
        server.compact(newest)
        with pytest.raises(CompactedError) as compacted:
            await seen(client, prefix, 1, 1)
        assert compacted.value.revision == newest

    run(work)


def test_a_watch_of_a_store_that_was_put_back_is_told_to_list_anew(run, prefix):
    async def work(client: Etcd) -> None:
        newest = await client.put(prefix + "a", "1")
        with pytest.raises(CompactedError, match="not there"):
            await seen(client, prefix, newest + 1000, 1)

    run(work)


def test_a_silent_watch_asks_whether_etcd_is_there(run, prefix, monkeypatch):
    monkeypatch.setattr(etcd, "_SILENT_SECONDS", 0.05)

    async def work(client: Etcd) -> None:
        revision = await client.put("/elsewhere", "")
        async with aclosing(client.watch(prefix, revision + 1)) as watch:
            signs = [await anext(watch) for _ in range(3)]
            assert signs == [Events(revision, ())] * 3

    run(work)


async def last(watch: AsyncIterator[Events], found: list[Events] | None = None) -> None:
    """Read a watch to its end."""
    async for events in watch:
        if found is not None:
            found.append(events)


# --- etcd away -------------------------------------------------------------------------------------------------------


def test_nobody_there_is_an_error_that_names_the_endpoint():
    url = closed_port()
    with pytest.raises(UnavailableError, match=f"{url}: connection refused"):
        use([url], lambda client: client.get("/a"))
    with pytest.raises(UnavailableError, match="connection refused"):
        use([url], lambda client: seen(client, "/", 1, 1))


def test_the_next_endpoint_is_asked_and_remembered(server):
    async def work(client: Etcd) -> None:
        await client.put("/failover", "x")
        assert client.endpoint == server.url

    use([closed_port(), server.url], work)


def test_two_calls_that_fail_at_once_turn_to_the_next_endpoint_once(server):
    async def work(client: Etcd) -> None:
        await asyncio.gather(client.put("/one", "x"), client.put("/other", "x"))
        assert client.endpoint == server.url

    use([closed_port(), server.url], work)


def test_a_watch_asks_the_member_that_it_is_connected_to(tmp_path, server, monkeypatch):
    monkeypatch.setattr(etcd, "_SILENT_SECONDS", 0.05)
    with EtcdServer(tmp_path) as own:

        async def work(client: Etcd) -> None:
            async with aclosing(client.watch("/", 1)) as watch:
                await anext(watch)
                client._turn(own.url)  # as a call does that failed there
                own.pause()
                with pytest.raises(UnavailableError, match=f"{own.url}: no answer in time"):
                    await asyncio.wait_for(last(watch), 10)
            assert client.endpoint == server.url

        use([own.url, server.url], work, timeout=0.5)


def test_a_hung_etcd_is_noticed_and_a_killed_one_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(etcd, "_SILENT_SECONDS", 0.05)
    with EtcdServer(tmp_path) as own:

        async def work(client: Etcd) -> None:
            start = await client.put("/a", "1")
            async with aclosing(client.watch("/", start + 1)) as watch:
                assert await anext(watch) == Events(start, ())
                own.pause()
                with pytest.raises(UnavailableError, match="no answer in time"):
                    await last(watch)
            with pytest.raises(UnavailableError, match="no answer in time"):
                await client.get("/a")
            own.restart()
            assert changes((await seen(client, "/", start, 1))[0]) == [("a", "1")]
            async with aclosing(client.watch("/", start + 1)) as watch:
                await anext(watch)
                own.kill()
                with pytest.raises(UnavailableError):
                    await last(watch)

        use([own.url], work, timeout=0.5)


def against(content: bytes, work: Callable[[Etcd], Awaitable[None]]) -> None:
    """Talk to a server that answers every request with the same."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(content), content))
        await writer.drain()
        writer.close()

    async def whole() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        client = Etcd([f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
        try:
            await work(client)
        finally:
            await client.close()
            server.close()

    asyncio.run(whole())


def test_somebody_else_at_the_port_is_an_error():
    async def work(client: Etcd) -> None:
        with pytest.raises(EtcdError, match="no JSON; is this etcd"):
            await client.get("/a")
        with pytest.raises(EtcdError, match="no JSON; is this etcd"):
            await seen(client, "/", 1, 1)

    against(b"hi", work)


def test_an_error_with_words_for_its_code_is_an_error():
    async def work(client: Etcd) -> None:
        with pytest.raises(EtcdError, match="go away"):
            await client.get("/a")

    against(b'{"error": "go away", "code": "PERMISSION_DENIED"}', work)


def test_a_member_that_lags_behind_the_others_is_no_backup():
    async def work(client: Etcd) -> None:
        found: list[Events] = []
        with pytest.raises(UnavailableError):
            await last(client.watch("/", 11), found)
        assert found == [Events(10, ())]

    created = {"created": True, "header": {"revision": "5"}}  # as far as the member is; the leader is at 10
    against(json.dumps({"result": created, "header": {"revision": "10"}}).encode(), work)


def test_a_revision_in_fragments_is_one_and_the_header_is_not_believed_beyond_it():
    def message(**keys: object) -> bytes:
        return json.dumps({"result": {"header": {"revision": "50"}, **keys}}).encode() + b"\n"

    def event(key: str) -> dict[str, object]:
        return {"kv": {"key": etcd._encoded(key), "mod_revision": "11", "version": "1"}}

    async def work(client: Etcd) -> None:
        found: list[Events] = []
        with pytest.raises(UnavailableError):
            await last(client.watch("/", 11), found)
        assert [(each.revision, [item.key for item in each.events]) for each in found] == [
            (10, []),
            (11, ["/a", "/b"]),
            (50, []),  # a progress notification
        ]

    stream = message(created=True) + message(events=[event("/a")], fragment=True) + message(events=[event("/b")])
    against(stream + message(), work)
