"""Asking upstreams that are slow, dead or lie; and what is asked again, or not."""

import asyncio
import socket
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import pytest
from dnslib import RR, A, DNSRecord

from dataplane import forward, resolver
from dataplane.forward import Upstreams, exchange
from tests.dns_world import question, summary
from tests.resolving import (
    OTHER,
    WEB,
    answered,
    ask,
    ask_tcp,
    by,
    client,
    failing,
    good,
    lying,
    message,
    place,
    resolving,
    scenario,
    serving,
    silent,
)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(forward, "TIMEOUT_S", 0.2)


@pytest.mark.parametrize("act", [good, lying])
@scenario
async def test_names_of_others_are_asked_for(act):
    async with serving(act) as (server,), resolving(by(server)) as (made, node):
        (found,) = await ask(place(node, "UDP"), question("WWW.Example.com", number=9, size=1232))
        assert (summary(found), found.header.ra, found.header.aa, found.header.id) == ("A 203.0.113.1", 1, 0, 9)
        assert str(found.q.qname) == "WWW.Example.com."
        assert made.responder.counters()[1] == {"NOERROR": 1}


@scenario
async def test_each_question_has_its_own_number_and_port():
    ports, numbers = set(), set()

    def note(server, asked, addr):
        ports.add(addr[1])
        numbers.add(asked.header.id)
        good(server, asked, addr)

    async with serving(note) as (server,), resolving(by(server)) as (_, node):
        await ask(place(node, "UDP"), *(question(f"n{number}.example.com", number=number) for number in range(40)))
    assert len(ports) > 30
    assert len(numbers) > 30


@scenario
async def test_a_dead_server_is_left_for_the_next_and_asked_last(hurried, caplog):
    async with serving(silent, good) as (dead, alive), resolving(by(dead, alive)) as (made, node):
        for number in range(6):
            (found,) = await ask(place(node, "UDP"), question(f"n{number}.example.com"))
            assert summary(found) == "A 203.0.113.1"
        assert len(alive.asked) == 6
        assert len(dead.asked) == 1
        assert made.upstreams.servers.failures == {dead.place: 1, alive.place: 0}
        address, port = dead.place
        lines = [line for line in caplog.messages if "upstream" in line]
        assert lines == [f"upstream does not answer server={address}:{port}: no answer in 0.2 s"]


@scenario
async def test_a_port_where_nobody_listens_costs_no_time():
    async with serving(good) as (alive,):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = ip_address("127.0.0.1"), closed.getsockname()[1]
        upstreams = Upstreams()
        upstreams.configure((nobody, alive.place))
        answer, _ = await upstreams.ask(b"\x01a\0", 1)
        assert answer is not None
        assert upstreams.servers.failures[nobody] == 1


@scenario
async def test_when_no_server_answers_the_client_hears_of_it(hurried):
    async with serving(silent, silent) as servers, resolving(by(*servers)) as (made, node):
        (found,) = await ask(place(node, "UDP"), question(OTHER))
        assert summary(found) == "SERVFAIL"
        assert made.responder.counters()[1] == {"SERVFAIL": 1}
        assert [len(server.asked) for server in servers] == [1, 1]


@scenario
async def test_a_server_that_fails_is_left_for_the_next():
    async with serving(failing, good) as (bad, alive), resolving(by(bad, alive)) as (_, node):
        (found,) = await ask(place(node, "UDP"), question(OTHER))
        assert summary(found) == "A 203.0.113.1"
    async with serving(failing) as (bad,), resolving(by(bad)) as (_, node):
        (found,) = await ask(place(node, "UDP"), question(OTHER))
        assert found.header.rcode == 2


@scenario
async def test_what_was_said_is_kept_and_equal_questions_are_asked_once():
    held: asyncio.Queue[Any] = asyncio.Queue()
    async with serving(lambda *call: held.put_nowait(call)) as (server,), resolving(by(server)) as (made, node):
        asked = [question("wWw.example.com" if number % 2 else OTHER, number=number) for number in range(10)]
        asking = asyncio.ensure_future(ask(place(node, "UDP"), *asked))
        call = await held.get()
        (last,) = await ask(place(node, "UDP"), question(WEB, number=11))  # it has come after all the others
        assert summary(last) == "A 10.96.0.1"
        good(*call)
        assert [summary(each) for each in await asking] == ["A 203.0.113.1"] * 10
        (again,) = await ask(place(node, "UDP"), question(OTHER))
        assert summary(again) == "A 203.0.113.1"
        assert len(server.asked) == 1
        assert made.upstreams.cache.hits == 1


@scenario
async def test_there_are_only_so_many_questions_at_once(monkeypatch, hurried):
    monkeypatch.setattr(forward, "_AT_ONCE", 3)
    async with serving(silent) as (server,), resolving(by(server)) as (made, node):
        asked = (question(f"n{number}.example.com", number=number) for number in range(8))
        assert {summary(each) for each in await ask(place(node, "UDP"), *asked)} == {"SERVFAIL"}
        assert (len(server.asked), made.upstreams.refused) == (3, 5)


@scenario
async def test_questions_that_wait_are_bounded(monkeypatch, hurried):
    monkeypatch.setattr(resolver, "_UNDER_WAY", 3)
    async with serving(silent) as (server,), resolving(by(server)) as (made, node):
        async with client(place(node, "UDP")) as asking:
            for number in range(8):
                asking.transport.sendto(question(OTHER, number=number))
            numbers = {DNSRecord.parse(await asking.next()).header.id for _ in range(3)}
            assert numbers == {0, 1, 2}
        assert made.responder.dropped == 5
        assert len(server.asked) == 1


@scenario
async def test_a_connection_is_read_on_when_there_are_answers(monkeypatch, hurried):
    monkeypatch.setattr(resolver, "_PIPELINED", 2)
    async with serving(silent) as (server,), resolving(by(server)) as (_, node):
        asked = [question(f"n{number}.example.com", number=number) for number in range(5)]
        assert {summary(each) for each in await ask_tcp(place(node, "TCP"), *asked)} == {"SERVFAIL"}
        assert len(server.asked) == 5


@scenario
async def test_a_truncated_answer_is_asked_for_by_tcp():
    def truncated(server, asked, addr):
        server.transport.sendto(answered(asked, tc=1), addr)

    async def whole(reader, writer):
        asked = DNSRecord.parse(await message(reader))
        reply = asked.reply(ra=1, aa=0)
        for number in range(100):
            reply.add_answer(RR(str(asked.q.qname), ttl=60, rdata=A(f"203.0.113.{number}")))
        data = bytes(reply.pack())
        writer.write(len(data).to_bytes(2) + data)
        writer.close()

    async with serving(truncated) as (server,):
        listener = await asyncio.start_server(whole, *map(str, server.place))
        async with resolving(by(server)) as (_, node):
            (found,) = await ask_tcp(place(node, "TCP"), question(OTHER))
            assert (len(found.rr), found.header.tc) == (100, 0)
            (cut,) = await ask(place(node, "UDP"), question(OTHER))
            assert (len(cut.rr), cut.header.tc) == (0, 1)
            assert len(server.asked) == 1
        listener.close()
        await listener.wait_closed()
        answer = await exchange(server.place, b"\x01a\0", 1)
        assert answer.truncated  # nobody listens there any more: what came is better than nothing


@scenario
async def test_answers_from_upstreams_and_from_the_cluster_share_a_connection():
    async with serving(good) as (server,), resolving(by(server)) as (_, node):
        asked = [
            question(OTHER, number=1),
            question(WEB, number=2),
            question("external.testns.svc.cluster.local", number=3),
        ]
        found = [summary(each) for each in await ask_tcp(place(node, "TCP"), *asked)]
        assert found == [
            "A 203.0.113.1",
            "A 10.96.0.1",
            "CNAME ext.interwebs.test.; ext.interwebs.test. A 203.0.113.1",
        ]


@scenario
async def test_new_upstreams_are_asked_instead_and_nothing_old_is_kept():
    def other(server, asked, addr):
        server.transport.sendto(answered(asked, "203.0.113.2"), addr)

    async with serving(good, other) as (first, second), resolving(by(first)) as (_, node):
        assert summary((await ask(place(node, "UDP"), question(OTHER)))[0]) == "A 203.0.113.1"
        await node.become(by(second))
        assert summary((await ask(place(node, "UDP"), question(OTHER)))[0]) == "A 203.0.113.2"


@scenario
async def test_what_comes_by_tcp_must_answer_the_question_too():
    async def other(reader, writer):
        await message(reader)
        data = answered(DNSRecord.question("www.example.org"), "203.0.113.66")
        writer.write(len(data).to_bytes(2) + data)
        writer.close()

    def truncated(server, asked, addr):
        server.transport.sendto(answered(asked, tc=1), addr)

    async with serving(truncated) as (server,), await asyncio.start_server(other, *map(str, server.place)):
        answer = await exchange(server.place, b"\x01a\0", 1)
        assert answer.truncated  # as it came by UDP


@scenario
async def test_the_end_does_not_wait_for_upstreams():
    asked: asyncio.Queue[Any] = asyncio.Queue()
    async with serving(lambda *call: asked.put_nowait(call)) as (server,), resolving(by(server)) as (_, node):
        reader, writer = await asyncio.open_connection(*place(node, "TCP"))
        writer.write(len(question(OTHER)).to_bytes(2) + question(OTHER))
        async with client(place(node, "UDP")) as asking:
            asking.transport.sendto(question(f"a.{OTHER}"))
            for _ in range(2):
                await asked.get()
    with suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
