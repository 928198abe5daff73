"""A resolver without a node around it, its clients on the loopback, and upstreams that do what a test wants."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial, wraps
from ipaddress import ip_address, ip_network
from types import SimpleNamespace
from typing import Any, cast

from dnslib import EDNS0, RR, A, DNSRecord

from dataplane.control.cluster import Cluster
from dataplane.control.state import DesiredState, Dns, Node, PodNetwork
from dataplane.dns_service import DnsService
from dataplane.resolver import Resolver
from tests.dns_world import SERVICES

HOME = ip_address("127.9.1.1")
VIP = ip_address("10.96.0.10")
WEB = "svc1.testns.svc.cluster.local"
OTHER = "www.example.com"
STATE = DesiredState(
    Node("node1", host_interface="dp0"),
    PodNetwork((ip_network(f"{HOME}/32"),)),
    services=SERVICES,
    dns=Dns(VIP),
)
PATIENCE = 10.0


class FakeNode:
    """What the resolver wants of a node."""

    def __init__(self, state: DesiredState) -> None:
        self.given = state
        self.wiring = SimpleNamespace(state=None)
        self.names: Callable[[], Any] = dict
        self._watchers: list[Callable[[DesiredState], Awaitable[None]]] = []

    def amend(self, amendment) -> None:
        self._amendment = amendment

    def watch(self, watcher) -> None:
        self._watchers.append(watcher)

    async def become(self, state: DesiredState) -> DesiredState:
        become: DesiredState = self._amendment(state)
        self.wiring.state = become
        for watcher in self._watchers:
            await watcher(become)
        return become


@asynccontextmanager
async def resolving(state: DesiredState = STATE):
    """Run a resolver; give it and its node."""
    node = FakeNode(state)
    leading = DnsService(cast(Any, node))
    await node.become(state)
    made = Resolver(cast(Any, node), leading, Cluster)
    await made.start()
    try:
        yield made, node
    finally:
        await made.stop()
        leading.close()


def place(node: FakeNode, protocol: str) -> tuple[str, int]:
    """Return the socket that the service leads to."""
    own = node.wiring.state.services[0]
    port = next(each for each in own.ports if each.protocol == protocol)
    return str(own.endpoints[0].address), port.target_port


class Datagrams(asyncio.DatagramProtocol):
    """Sends, and waits for as many answers as a test wants."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport: Any = None

    def connection_made(self, transport) -> None:
        self.transport = transport

    def datagram_received(self, data, addr) -> None:
        self.received.put_nowait(data)

    async def next(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.received.get()


@asynccontextmanager
async def client(where: tuple[str, int]):
    loop = asyncio.get_running_loop()
    transport, made = await loop.create_datagram_endpoint(Datagrams, remote_addr=where)
    try:
        yield made
    finally:
        transport.close()


async def ask(where: tuple[str, int], *data: bytes) -> list[DNSRecord]:
    """Send datagrams and return the answers in the order of their numbers."""
    async with client(where) as asking:
        for each in data:
            asking.transport.sendto(each)
        answers = [DNSRecord.parse(await asking.next()) for _ in data]
    return sorted(answers, key=lambda each: each.header.id)


async def ask_tcp(where: tuple[str, int], *data: bytes) -> list[DNSRecord]:
    reader, writer = await asyncio.open_connection(*where)
    try:
        writer.write(b"".join(len(each).to_bytes(2) + each for each in data))
        async with asyncio.timeout(PATIENCE):
            found = [DNSRecord.parse(await message(reader)) for _ in data]
    finally:
        writer.close()
    return sorted(found, key=lambda each: each.header.id)


async def message(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))


def scenario(test):
    """Run an asynchronous test; whatever it waits for in vain ends it."""

    @wraps(test)
    def run(*args, **keys):
        async def limited():
            async with asyncio.timeout(6 * PATIENCE):
                await test(*args, **keys)

        asyncio.run(limited())

    return run


# --- upstreams --------------------------------------------------------------------------------------------------------


class Server(asyncio.DatagramProtocol):
    """An upstream that does with a question what a test wants: ``act(server, question, client)``."""

    def __init__(self, act) -> None:
        self.act = act
        self.asked: list[DNSRecord] = []
        self.transport: Any = None

    def connection_made(self, transport) -> None:
        self.transport = transport

    def datagram_received(self, data, addr) -> None:
        self.asked.append(DNSRecord.parse(data))
        self.act(self, self.asked[-1], addr)

    @property
    def place(self) -> tuple[Any, int]:
        address, port = self.transport.get_extra_info("sockname")
        return ip_address(address), port


@asynccontextmanager
async def serving(*acts):
    loop = asyncio.get_running_loop()
    place = ("127.9.3.1", 0)  # where nobody has taken the TCP port of the same number
    made = [await loop.create_datagram_endpoint(partial(Server, act), local_addr=place) for act in acts]
    try:
        yield [server for _, server in made]
    finally:
        for transport, _ in made:
            transport.close()


def answered(asked: DNSRecord, address: str = "203.0.113.1", ttl: int = 60, **header) -> bytes:
    reply = asked.reply(ra=1, aa=0)
    reply.add_answer(RR(str(asked.q.qname), ttl=ttl, rdata=A(address)))
    reply.add_ar(EDNS0(udp_len=4096))
    for name, value in header.items():
        setattr(reply.header, name, value)
    return bytes(reply.pack())


def good(server, asked, addr):
    server.transport.sendto(answered(asked), addr)


def silent(server, asked, addr):
    pass


def failing(server, asked, addr):
    server.transport.sendto(answered(asked, rcode=2), addr)


def lying(server, asked, addr):
    """Everything but the answer comes first: from elsewhere, with another number, about another name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(answered(asked, "203.0.113.66"), addr)
    other = DNSRecord.question("www.example.org")
    other.header.id = asked.header.id
    server.transport.sendto(answered(other, "203.0.113.66"), addr)
    server.transport.sendto(answered(asked, "203.0.113.66", id=asked.header.id ^ 1), addr)
    server.transport.sendto(answered(asked, "203.0.113.66", qr=0), addr)
    server.transport.sendto(b"\xff", addr)
    good(server, asked, addr)


def by(*servers: Server) -> DesiredState:
    assert STATE.dns is not None
    return replace(STATE, dns=replace(STATE.dns, upstreams=tuple(server.place for server in servers)))
