"""Asking other name servers: a socket of its own for each question, so that only who saw it can answer it.

The kernel gives each socket a random port, the question has a random number, and the socket is connected: an answer
from elsewhere never arrives, one that does not fit is waited over. A server has two seconds; a truncated answer is
asked for by TCP. Equal questions at the same time are asked once.
"""

import asyncio
import logging
import secrets
import time

from dataplane.control.dns_answer import Answer, read_answer
from dataplane.control.dns_upstream import Cache, Server, Servers
from dataplane.control.dns_wire import Rcode, write_question

TIMEOUT_S = 2.0
_AT_ONCE = 1000  # questions under way; as by CoreDNS' example, more are not asked
_UNABLE = frozenset({Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED})  # another server may do better

log = logging.getLogger(__name__)


class Upstreams:
    """The servers that are asked about names of others.

    Attributes:
        servers: How they are doing.
        cache: What they have said lately.
        refused: Questions that were not asked because so many others were under way.
    """

    def __init__(self) -> None:
        self.servers = Servers()
        self.cache = Cache()
        self.refused = 0
        self._asking: dict[tuple[bytes, int], asyncio.Task[Answer | None]] = {}

    def configure(self, servers: tuple[Server, ...]) -> None:
        """Ask these from now on."""
        if self.servers.configure(servers):
            self.cache.clear()

    async def ask(self, name: bytes, kind: int) -> tuple[Answer | None, int]:
        """Return what some server says about a name, and how many seconds ago; None: none of them says anything."""
        kept = self.cache.get(name, kind, time.monotonic())
        if kept is not None:
            return kept
        key = (name.lower(), kind)
        task = self._asking.get(key)
        if task is None:
            if len(self._asking) >= _AT_ONCE:
                self.refused += 1
                return None, 0
            task = asyncio.ensure_future(self._ask(name, kind))
            self._asking[key] = task
            task.add_done_callback(lambda _: self._asking.pop(key))
        return await asyncio.shield(task), 0  # whoever else waits for it should not lose it

    def close(self) -> None:
        """Ask no more."""
        for task in self._asking.values():
            task.cancel()

    async def _ask(self, name: bytes, kind: int) -> Answer | None:
        unable = None
        for server in self.servers.order(time.monotonic()):
            try:
                answer = await exchange(server, name, kind)
            except OSError as error:  # a time-out is one, too
                self._failed(server, error)
                continue
            self.servers.answered(server)
            if answer.rcode not in _UNABLE:
                self.cache.put(name, kind, answer, time.monotonic())
                return answer
            unable = answer
        return unable

    def _failed(self, server: Server, error: OSError) -> None:
        now = time.monotonic()
        if not self.servers.is_aloof(server, now):
            text = f"no answer in {TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
            log.warning("upstream does not answer server=%s:%d: %s", *server, text)
        self.servers.failed(server, now)


async def exchange(server: Server, name: bytes, kind: int) -> Answer:
    """Return a server's answer to a question, if need be by TCP.

    Raises:
        OSError: There is none, in time; or it cannot be asked.
    """
    number = secrets.randbelow(1 << 16)
    async with asyncio.timeout(TIMEOUT_S):
        answer = await _by_udp(server, number, name, kind)
    if not answer.truncated:
        return answer
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await _by_tcp(server, number, name, kind)
    except (OSError, EOFError):
        return answer  # the client finds out by itself that there is more


class _Waiting(asyncio.DatagramProtocol):
    """Waits for the one datagram that answers."""

    def __init__(self, number: int, name: bytes, kind: int) -> None:
        self._question = number, name, kind
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        """Take the answer; let all else pass."""
        answer = read_answer(data, *self._question)
        if answer is not None and not self.answer.done():
            self.answer.set_result(answer)

    def error_received(self, exc: Exception) -> None:
        """Stop to wait: nobody listens there."""
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _by_udp(server: Server, number: int, name: bytes, kind: int) -> Answer:
    loop = asyncio.get_running_loop()
    address = (str(server[0]), server[1])
    transport, waiting = await loop.create_datagram_endpoint(lambda: _Waiting(number, name, kind), remote_addr=address)
    try:
        transport.sendto(write_question(number, name, kind))
        return await waiting.answer
    finally:
        transport.close()


async def _by_tcp(server: Server, number: int, name: bytes, kind: int) -> Answer:
    reader, writer = await asyncio.open_connection(str(server[0]), server[1])
    try:
        question = write_question(number, name, kind)
        writer.write(len(question).to_bytes(2) + question)
        answer = read_answer(await reader.readexactly(int.from_bytes(await reader.readexactly(2))), number, name, kind)
    finally:
        writer.close()
    if answer is None:
        raise ConnectionError("an answer to something else")
    return answer
