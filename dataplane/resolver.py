"""Cluster DNS on this node: reads the sockets behind its service, and answers what comes there.

Datagrams are answered as many at a time as there are, up to a limit, since packets want their turn; connections by a
task each, and so are names of others, for which an upstream has to be asked. Names follow the node's state: an answer
that was sent after an edit was done knows of it.
"""

import asyncio
import importlib
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from dataplane.control.cluster import Cluster
from dataplane.control.dns import BUCKETS, Forward, Responder, answer, judge, rcode_name
from dataplane.control.dns_text import candidates, lines, read_name, read_type
from dataplane.control.dns_upstream import finish
from dataplane.control.dns_wire import TCP_MAX, Query, Type, read_query, write_question
from dataplane.control.dns_zone import Found, Zone
from dataplane.control.snapshot import endpoint_text
from dataplane.control.snapshot_dns import OFF, Dns, DnsAnswer, DnsTry
from dataplane.control.state import DesiredState
from dataplane.dns_service import DnsService
from dataplane.forward import Upstreams
from dataplane.node import Node

_QUERY_MAX = 4096
_AT_ONCE, _TURN_S = 64, 0.001  # queries, and seconds, until packets have their turn again
_CONNECTIONS, _FROM_ONE = 512, 64  # of all clients, and of one address
_UNDER_WAY, _PIPELINED = 4096, 64  # names of others, by UDP in all and on one connection: more are not taken
_IDLE_S = 10.0  # for the next query on a connection (RFC 7766 6.2.3)

log = logging.getLogger(__name__)


class Resolver:
    """Answers pods' questions for as long as the node runs.

    Attributes:
        responder: Has the names, and the answers.
        upstreams: Are asked about names of others.

    Args:
        node: Started.
        service: Leads here.
        cluster: Returns what the store knows; an empty cluster without one.
    """

    def __init__(self, node: Node, service: DnsService, cluster: Callable[[], Cluster]) -> None:
        self.responder = Responder(Zone())
        self.upstreams = Upstreams()
        self._node = node
        self._service = service
        self._cluster = cluster
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        node.names = self.snapshot

    # --- start and end -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the names and answer, beside the packets."""
        zone, state = self.responder.zone, None
        while state is not self._node.wiring.state:
            state = self._node.wiring.state
            assert state is not None
            await asyncio.to_thread(zone.update, state, self._cluster(), time.time())
        self._node.watch(self.follow)
        await self._settle()

    async def follow(self, state: DesiredState) -> None:
        """Take over what the node has become."""
        if self.responder.zone.update(state, self._cluster(), time.time()):
            self.responder.forget()
        await self._settle()

    async def _settle(self) -> None:
        """Answer at the sockets that the state wants, and by the servers that it wants."""
        settings = self.responder.zone.settings
        if settings is not None:
            self.upstreams.configure(settings.upstreams)
        service = self._service
        if service.listener is service.answering:
            return
        self._close()
        service.answering = listener = service.listener
        if listener is not None:
            self._server = await asyncio.start_server(self._connected, sock=listener.tcp)
            asyncio.get_running_loop().add_reader(listener.udp.fileno(), self._readable, listener.udp)
            log.info("cluster dns listening address=%s", listener.address)

    async def stop(self) -> None:
        """Answer no more. Comes after the node's end: its service is gone by then."""
        self._close()
        self.upstreams.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._connections.values():
            writer.transport.abort()  # not its task: asyncio would complain about the end of that
        await asyncio.gather(*self._tasks, *self._connections, return_exceptions=True)

    def _close(self) -> None:
        listener = self._service.answering
        if listener is None:
            return
        asyncio.get_running_loop().remove_reader(listener.udp.fileno())
        if self._server is not None:
            self._server.close()
            self._server = None
        listener.close()
        self._service.answering = None
        if self._service.listener is listener:
            self._service.listener = None

    # --- for people --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Dns:
        """Return the counters, and how the upstreams are doing."""
        settings, responder, upstreams = self.responder.zone.settings, self.responder, self.upstreams
        if settings is None:
            return OFF
        requests, responses = responder.counters()
        servers, now = upstreams.servers, time.monotonic()
        sockets = self._service.answering
        places = () if sockets is None else tuple((str(sockets.address), each) for each in sockets.ports)
        return {
            "domain": settings.domain,
            "address": str(settings.address),
            "listening": [f"{address}:{each.target_port}/{each.protocol}" for address, each in places],
            "ttl": settings.ttl,
            "pods": settings.pods,
            "services": len(responder.zone.index),
            "serial": responder.zone.serial,
            "requests": [
                {"transport": asked.transport, "type": asked.type, "count": count}
                for asked, count in sorted(requests.items())
            ],
            "responses": dict(responses),
            "buckets": list(BUCKETS),
            "durations": list(responder.durations),
            "duration_sum": responder.duration_sum,
            "dropped": responder.dropped,
            "connections": len(self._connections),
            "upstreams": [
                {
                    "server": endpoint_text(str(server[0]), server[1]),
                    "asked": servers.asked.get(server, 0),
                    "failures": servers.failures.get(server, 0),
                    "aloof": servers.is_aloof(server, now),
                }
                for server in settings.upstreams
            ],
            "cache_entries": len(upstreams.cache),
            "cache_hits": upstreams.cache.hits,
            "cache_misses": upstreams.cache.misses,
            "refused": upstreams.refused,
        }

    async def explain(self, name: str, kind: str, namespace: str) -> DnsAnswer:
        """Ask as a pod's resolver would: for one name after another, until one has such records.

        Raises:
            ValueError: That is no name, or no type.
        """
        settings = self.responder.zone.settings
        await asyncio.to_thread(importlib.import_module, "dnslib")
        number = read_type(kind)
        names = {each: read_name(each) for each in candidates(name, namespace, settings.domain if settings else "")}
        tried: list[DnsTry] = []
        answers: list[DnsAnswer] = []
        for each, wire in names.items():
            reply, why = await self._explained(wire, number)
            records, rcode, word = lines(reply), rcode_name(reply), kind.upper()
            tried.append({"name": each, "rcode": rcode, "why": why})
            answers.append({"name": each, "type": word, "rcode": rcode, "why": why, "records": records, "tried": tried})
            if rcode == "NOERROR" and any(record["section"] == "answer" for record in records):
                return answers[-1]
        return next((each for each in answers if each["rcode"] == "NOERROR"), answers[-1])  # no data is news, too

    async def _explained(self, name: bytes, kind: int) -> tuple[bytes, str]:
        zone = self.responder.zone
        query = read_query(write_question(0, name, kind))
        assert isinstance(query, Query)
        verdict = judge(query, zone)
        reply = answer(query, zone, "tcp")
        why = verdict.why if isinstance(verdict, Found) else "no name of the cluster, and there are no upstreams"
        if kind in (Type.AXFR, Type.IXFR):
            why = "nobody gets the whole zone"
        if isinstance(reply, Forward):
            said, age = await self.upstreams.ask(reply.name, kind)
            reply = finish(reply, said, age)
            here = f"{why}; " if isinstance(verdict, Found) else ""
            why = f"{here}no upstream answers" if said is None else f"{here}an upstream's answer"
        return reply, why

    # --- UDP ---------------------------------------------------------------------------------------------------------

    def _readable(self, udp: socket.socket) -> None:
        """Answer what has come, as far as that needs nobody else."""
        began, count = time.perf_counter(), 0
        respond = self.responder.respond
        with suppress(BlockingIOError):  # nothing left to read; or no room for an answer, which is then lost
            while count < _AT_ONCE and (not count or time.perf_counter() - began < _TURN_S):
                data, client = udp.recvfrom(_QUERY_MAX)
                count += 1
                reply = respond(data, "udp")
                if isinstance(reply, bytes):
                    with suppress(OSError):  # whoever asked may have gone
                        udp.sendto(reply, client)
                elif reply is not None and len(self._tasks) < _UNDER_WAY:
                    self._spawn(self._forward(reply, partial(_send, udp, client)))
                elif reply is not None:
                    self.responder.dropped += 1  # its client asks again
        if count:
            self.responder.took((time.perf_counter() - began) / count, count)

    async def _forward(self, forward: Forward, send: Callable[[bytes], None]) -> None:
        began = time.perf_counter()
        said, age = await self.upstreams.ask(forward.name, forward.query.type)
        reply = finish(forward, said, age)
        self.responder.forwarded(reply)
        self.responder.took(time.perf_counter() - began)
        send(reply)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- TCP ---------------------------------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= _CONNECTIONS or self._count_from(_client(writer)) >= _FROM_ONE:
            writer.transport.abort()
            return
        self._connections[task] = writer
        try:
            with suppress(OSError):  # gone, silent for too long, or it does not read its answers
                with suppress(EOFError):  # no more queries, or half of one
                    await self._converse(reader, writer)
                writer.close()
                async with asyncio.timeout(_IDLE_S):
                    await writer.wait_closed()
        finally:
            writer.transport.abort()  # closing alone would wait for a client that does not read, for ever
            del self._connections[task]

    def _count_from(self, client: str) -> int:
        return sum(_client(writer) == client for writer in self._connections.values())

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the queries of a connection, in their order; those for upstreams when they are answered."""
        waiting: set[asyncio.Task[None]] = set()
        try:
            while True:
                async with asyncio.timeout(_IDLE_S):
                    length = int.from_bytes(await reader.readexactly(2))
                    data = await reader.readexactly(length)
                reply = await self._respond(data)
                if reply is None:
                    return
                if isinstance(reply, bytes):
                    _write(writer, reply)
                else:
                    task = asyncio.ensure_future(self._forward(reply, partial(_write, writer)))
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)
                if len(waiting) >= _PIPELINED:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                async with asyncio.timeout(_IDLE_S):
                    await writer.drain()
        finally:
            if waiting and not writer.is_closing():
                await asyncio.wait(waiting)

    async def _respond(self, data: bytes) -> bytes | Forward | None:
        """Answer one query of all connections, then let packets have their turn: nothing that is buffered waits."""
        async with self._turn:
            began = time.perf_counter()
            reply = self.responder.respond(data, "tcp")
            if isinstance(reply, bytes):
                self.responder.took(time.perf_counter() - began)
            await asyncio.sleep(0)
            return reply


def _client(writer: asyncio.StreamWriter) -> str:
    return str((writer.get_extra_info("peername") or ("",))[0])


def _send(udp: socket.socket, client: Any, reply: bytes) -> None:
    with suppress(OSError):
        udp.sendto(reply, client)


def _write(writer: asyncio.StreamWriter, reply: bytes) -> None:
    assert len(reply) <= TCP_MAX
    writer.write(len(reply).to_bytes(2) + reply)
