"""The resolver's service and its sockets: datagrams and connections on the loopback."""

import asyncio
import errno
import socket
from dataclasses import replace
from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dnslib import DNSRecord

from dataplane import dns_service, resolver
from dataplane.control.cluster import Cluster
from dataplane.control.state import PodNetwork
from dataplane.dns_service import DnsService
from dataplane.resolver import Resolver
from tests.dns_world import SERVICES, endpoint, question, service, summary
from tests.resolving import (
    HOME,
    PATIENCE,
    STATE,
    VIP,
    WEB,
    FakeNode,
    ask,
    ask_tcp,
    client,
    message,
    place,
    resolving,
    scenario,
)

# --- the service -----------------------------------------------------------------------------------------------------


@scenario
async def test_the_service_leads_to_sockets_that_are_bound():
    node = FakeNode(STATE)
    leading = DnsService(cast(Any, node))
    state = await node.become(STATE)
    own = state.services[0]
    assert (own.id, own.cluster_ips, own.origin) == ("kube-system/kube-dns", (VIP,), "node")
    assert [(each.port, each.protocol, each.name) for each in own.ports] == [(53, "UDP", "dns"), (53, "TCP", "dns-tcp")]
    assert [(each.address, each.node) for each in own.endpoints] == [(HOME, "node1")]
    assert state.services[1:] == SERVICES
    async with client(place(node, "UDP")) as early:
        early.transport.sendto(question(WEB))  # nobody answers yet, and nothing is lost
        made = Resolver(cast(Any, node), leading, Cluster)
        await made.start()
        assert summary(DNSRecord.parse(await early.next())) == "A 10.96.0.1"
    await made.stop()
    leading.close()


@scenario
async def test_a_state_that_did_not_change_has_the_same_services():
    async with resolving() as (_, node):
        first = node.wiring.state.services
        assert (await node.become(replace(STATE))).services is first
        changed = await node.become(replace(STATE, services=SERVICES[1:]))
        assert changed.services[0] is not first[0] or changed.services[0] == first[0]
        assert len(changed.services) == len(first) - 1


@scenario
async def test_the_clusters_own_dns_service_is_taken_over():
    theirs = service("kube-dns", str(VIP), namespace="kube-system", endpoints=["10.244.7.7"])
    async with resolving(replace(STATE, services=(*SERVICES, theirs))) as (_, node):
        found = [each for each in node.wiring.state.services if each.id == "kube-system/kube-dns"]
        assert [each.endpoints[0].address for each in found] == [HOME]


@scenario
async def test_a_dns_service_at_another_address_stays():
    theirs = service("kube-dns", "10.96.0.53", namespace="kube-system", endpoints=["10.244.7.7"])
    async with resolving(replace(STATE, services=(*SERVICES, theirs))) as (_, node):
        assert node.wiring.state.services[0].id == "kube-system/node-dns"
        assert theirs in node.wiring.state.services


@scenario
async def test_without_an_address_there_is_no_service():
    node = FakeNode(STATE)
    leading = DnsService(cast(Any, node))
    assert (await node.become(replace(STATE, pod_network=PodNetwork()))).services is SERVICES
    assert (await node.become(replace(STATE, dns=None))).services is SERVICES
    assert leading.listener is None


@scenario
async def test_what_cannot_be_bound_is_said_once(caplog, monkeypatch):
    def refuse(address):
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(dns_service, "_bound", refuse)
    node = FakeNode(STATE)
    DnsService(cast(Any, node))
    for _ in range(2):
        assert (await node.become(STATE)).services is SERVICES
    assert caplog.messages == [f"no cluster dns: cannot listen address={HOME}: No buffer space available"]


@scenario
async def test_a_new_address_gets_new_sockets_and_the_old_ones_go():
    async with resolving() as (_, node):
        old = place(node, "UDP"), place(node, "TCP")
        await node.become(replace(STATE, pod_network=PodNetwork((ip_network("127.9.1.2/32"),))))
        new = place(node, "UDP")
        assert new[0] == "127.9.1.2"
        assert summary((await ask(new, question(WEB)))[0]) == "A 10.96.0.1"
        assert summary((await ask_tcp(place(node, "TCP"), question(WEB)))[0]) == "A 10.96.0.1"
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*old[1])


@scenario
async def test_a_refused_move_keeps_the_sockets():
    async with resolving() as (made, node):
        before = place(node, "UDP")
        made._service.over(replace(STATE, pod_network=PodNetwork((ip_network("127.9.1.2/32"),))))
        assert (await node.become(STATE)).services[0].ports[0].target_port == before[1]
        assert summary((await ask(before, question(WEB)))[0]) == "A 10.96.0.1"


@scenario
async def test_nothing_listens_after_the_end():
    async with resolving() as (_, node):
        udp, tcp = place(node, "UDP"), place(node, "TCP")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*tcp)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(udp)


# --- datagrams -------------------------------------------------------------------------------------------------------


@scenario
async def test_ten_thousand_queries_are_all_answered():
    async with resolving() as (made, node), client(place(node, "UDP")) as asking:
        seen = set()
        for first in range(0, 10_000, 50):  # what a socket's buffer holds
            for number in range(first, first + 50):
                asking.transport.sendto(question(WEB if number % 3 else f"x{number}.{WEB}", number=number))
            for _ in range(50):
                data = await asking.next()
                seen.add(int.from_bytes(data[:2]))
                assert data[3] & 15 == (0 if int.from_bytes(data[:2]) % 3 else 3)
        assert seen == set(range(10_000))
        requests, responses = made.responder.counters()
        assert (sum(requests.values()), responses["NXDOMAIN"]) == (10_000, 3334)
        assert sum(made.responder.durations) == 10_000


class Queue:
    """A socket with queries that wait."""

    def __init__(self, *queries: bytes) -> None:
        self.queries = [*queries]
        self.sent: list[bytes] = []

    def recvfrom(self, size: int) -> tuple[bytes, tuple[str, int]]:
        if not self.queries:
            raise BlockingIOError
        return self.queries.pop(), ("127.0.0.1", 1)

    def sendto(self, data: bytes, client: tuple[str, int]) -> None:
        self.sent.append(data)


@pytest.mark.parametrize(("cost", "answered"), [(0.0, 64), (0.0004, 3), (0.01, 1)])
@scenario
async def test_queries_leave_packets_their_turn(monkeypatch, cost, answered):
    """However long answers take, packets wait no longer than a millisecond and the last of them."""
    now = 0.0

    def respond(data, transport):
        nonlocal now
        now += cost
        return data

    async with resolving() as (made, _):
        monkeypatch.setattr(resolver, "time", SimpleNamespace(perf_counter=lambda: now))
        monkeypatch.setattr(made.responder, "respond", respond)
        waiting = Queue(*[question(WEB)] * 100)
        made._readable(cast(Any, waiting))
        assert len(waiting.sent) == answered


@scenario
async def test_nonsense_is_not_answered_and_harms_nobody():
    async with resolving() as (made, node), client(place(node, "UDP")) as asking:
        answer_itself = question(WEB)[:2] + b"\x81\x80" + question(WEB)[4:]
        for nonsense in (b"\0", b"\0" * 11, answer_itself):
            asking.transport.sendto(nonsense)
        asking.transport.sendto(question(WEB, number=1))
        assert DNSRecord.parse(await asking.next()).header.id == 1
        assert asking.received.empty()
        assert made.responder.dropped == 3


@scenario
async def test_a_changed_endpoint_is_answered_at_once():
    async with resolving() as (_, node):
        name = "hdlsprtls.testns.svc.cluster.local"
        for number in range(2, 12):
            new = service("hdlsprtls", ports=(), endpoints=[endpoint(f"10.244.1.{number}")])
            await node.become(replace(STATE, services=tuple(new if each.id == new.id else each for each in SERVICES)))
            assert summary((await ask(place(node, "UDP"), question(name)))[0]) == f"A 10.244.1.{number}"


# --- connections -----------------------------------------------------------------------------------------------------


@scenario
async def test_several_queries_on_one_connection():
    async with resolving() as (_, node):
        asked = [question(WEB, number=1), question("none." + WEB, number=2), question(WEB, "AAAA", number=3)]
        found = [summary(each).partition(";")[0] for each in await ask_tcp(place(node, "TCP"), *asked)]
        assert found == ["A 10.96.0.1", "NXDOMAIN", "NODATA"]


@scenario
async def test_queries_on_connections_leave_packets_their_turn(monkeypatch):
    """However many queries have come on however many connections, one is answered and then all else has its turn."""
    loop, turn = asyncio.get_running_loop(), 0
    answered: list[int] = []

    def take_turn():
        nonlocal turn
        turn += 1
        loop.call_soon(take_turn)

    async with resolving() as (made, node):
        respond = made.responder.respond

        def noted(*query):
            answered.append(turn)
            return respond(*query)

        monkeypatch.setattr(made.responder, "respond", noted)
        take_turn()
        asked = [question(WEB, number=number) for number in range(50)]
        await asyncio.gather(*(ask_tcp(place(node, "TCP"), *asked) for _ in range(3)))
        assert len(set(answered)) == len(answered) == 150


@pytest.mark.parametrize("ends", [False, True], ids=["answers wait", "the client says no more"])
@scenario
async def test_a_client_that_does_not_read_is_left(monkeypatch, ends):
    monkeypatch.setattr(resolver, "_IDLE_S", 0.1)
    many = service("many", endpoints=[f"10.244.{number >> 8}.{number & 255}" for number in range(3000)])
    data = question("many.testns.svc.cluster.local")
    data = len(data).to_bytes(2) + data
    loop = asyncio.get_running_loop()
    async with resolving(replace(STATE, services=(many,))) as (made, node):
        with socket.create_connection(place(node, "TCP")) as asking:
            asking.setblocking(False)
            await loop.sock_sendall(asking, data)
            await loop.sock_recv(asking, 2)
            ((task, writer),) = made._connections.items()
            if ends:
                writer.transport.set_write_buffer_limits(1 << 30)
            await loop.sock_sendall(asking, data * 300)  # for 14 MB of answers
            if ends:
                asking.shutdown(socket.SHUT_WR)
            await asyncio.wait([task])
            assert not made._connections
            assert writer.transport.get_write_buffer_size() == 0  # not held until the client has read it all


@scenario
async def test_a_query_may_come_in_pieces():
    async with resolving() as (_, node):
        reader, writer = await asyncio.open_connection(*place(node, "TCP"))
        data = question(WEB)
        for byte in len(data).to_bytes(2) + data:
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0)
        assert await reader.readexactly(2)
        writer.close()


@pytest.mark.parametrize(
    "sent", [b"\0\0", b"\0\x05hello", b"\0\x1d" + b"\xff" * 29], ids=["nothing", "short", "answer"]
)
@scenario
async def test_nonsense_ends_a_connection(sent):
    async with resolving() as (_, node):
        reader, writer = await asyncio.open_connection(*place(node, "TCP"))
        writer.write(sent)
        async with asyncio.timeout(PATIENCE):
            assert await reader.read() == b""
        writer.close()


@scenario
async def test_a_silent_connection_is_closed(monkeypatch):
    monkeypatch.setattr(resolver, "_IDLE_S", 0.1)
    async with resolving() as (made, node):
        reader, writer = await asyncio.open_connection(*place(node, "TCP"))
        writer.write(b"\0\x20half of it")
        async with asyncio.timeout(PATIENCE):
            assert await reader.read() == b""
        writer.close()
        assert not made._connections


@pytest.mark.parametrize("limit", ["_CONNECTIONS", "_FROM_ONE"])
@scenario
async def test_there_are_only_so_many_connections(monkeypatch, limit):
    monkeypatch.setattr(resolver, limit, 3)
    async with resolving() as (_, node):
        where = place(node, "TCP")
        held = [await asyncio.open_connection(*where) for _ in range(3)]
        for reader, writer in held:
            writer.write(len(question(WEB)).to_bytes(2) + question(WEB))
            await reader.readexactly(2)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await ask_tcp(where, question(WEB))
        for _, writer in held:
            writer.close()
        for reader, _ in held:
            await reader.read()
        async with asyncio.timeout(PATIENCE):
            while True:  # the server's side of the closing may still be under way
                try:
                    assert summary((await ask_tcp(where, question(WEB)))[0]) == "A 10.96.0.1"
                except (ConnectionResetError, asyncio.IncompleteReadError):
                    continue
                break


@scenario
async def test_one_client_leaves_connections_to_others(monkeypatch):
    monkeypatch.setattr(resolver, "_FROM_ONE", 2)
    async with resolving() as (_, node):
        where = place(node, "TCP")
        held = [await asyncio.open_connection(*where) for _ in range(2)]
        for reader, writer in held:
            writer.write(len(question(WEB)).to_bytes(2) + question(WEB))
            await message(reader)
        reader, writer = await asyncio.open_connection(*where, local_addr=("127.0.0.2", 0))
        writer.write(len(question(WEB)).to_bytes(2) + question(WEB))
        async with asyncio.timeout(PATIENCE):
            assert summary(DNSRecord.parse(await message(reader))) == "A 10.96.0.1"
        for _, each in (*held, (reader, writer)):
            each.close()
