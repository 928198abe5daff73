"""The resolver's service and its sockets: datagrams and connections on the loopback."""

import asyncio
import errno
import socket
from dataclasses import replace
from ipaddress import ip_network
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
