"""Other servers, without sockets: whom to ask next, what to keep of what they said, and what the client gets of it.

Servers are asked in turn. One that did not answer comes last for ten seconds. What was said is kept as long as its
shortest TTL, 30 seconds at most, as by CoreDNS' ``cache 30``; failures are not kept.
"""

from collections import OrderedDict
from typing import TypeAlias

from dataplane.control.dns import Forward
from dataplane.control.dns_answer import Answer, adopt, records
from dataplane.control.dns_wire import AA, RA, TC, Rcode, Sections, write_reply
from dataplane.control.state import Address

Server: TypeAlias = tuple[Address, int]
"""Address and port."""

ALOOF_S = 10.0  # how long a server that did not answer is asked last
KEPT_S = 30
_KEPT = 10_000  # answers; CoreDNS keeps 9984
_BYTES = 16 << 20  # of all answers that are kept
_LARGEST = 4096  # what is longer comes by TCP and rarely


class Servers:
    """The upstreams of the configuration, and how they have done."""

    def __init__(self) -> None:
        self.failures: dict[Server, int] = {}
        self.asked: dict[Server, int] = {}
        self._given: tuple[Server, ...] = ()
        self._aloof: dict[Server, float] = {}
        self._turn = 0

    def configure(self, servers: tuple[Server, ...]) -> bool:
        """Use these from now on; say whether they are others than before."""
        if servers == self._given:
            return False
        self._given = servers
        self._aloof = {server: until for server, until in self._aloof.items() if server in servers}
        self.failures = {server: self.failures.get(server, 0) for server in servers}
        self.asked = {server: self.asked.get(server, 0) for server in servers}
        return True

    def order(self, now: float) -> list[Server]:
        """Return them in the order in which to ask them this time; ``now`` is in seconds."""
        if not self._given:
            return []
        start = self._turn % len(self._given)
        self._turn += 1
        turned = (*self._given[start:], *self._given[:start])
        return sorted(turned, key=lambda server: self._aloof.get(server, 0) > now)

    def is_aloof(self, server: Server, now: float) -> bool:
        """Say whether a server did not answer lately."""
        return self._aloof.get(server, 0) > now

    def answered(self, server: Server) -> None:
        """Take note that a server has answered."""
        self.asked[server] = self.asked.get(server, 0) + 1
        self._aloof.pop(server, None)

    def failed(self, server: Server, now: float) -> None:
        """Take note that a server has not."""
        self.asked[server] = self.asked.get(server, 0) + 1
        self.failures[server] = self.failures.get(server, 0) + 1
        self._aloof[server] = now + ALOOF_S


class Cache:
    """Answers by name and type, the oldest first.

    Attributes:
        hits: How often one was found.
        misses: How often none was.
    """

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self._held: OrderedDict[tuple[bytes, int], tuple[Answer, float, float]] = OrderedDict()
        self._bytes = 0

    def get(self, name: bytes, kind: int, now: float) -> tuple[Answer, int] | None:
        """Return an answer and its age in seconds."""
        held = self._held.get((name.lower(), kind))
        if held is None or held[2] <= now:
            self.misses += 1
            return None
        self.hits += 1
        return held[0], int(now - held[1])

    def put(self, name: bytes, kind: int, answer: Answer, now: float) -> None:
        """Keep an answer, if it may be kept."""
        lifetime = min(answer.lifetime, KEPT_S)
        wanted = answer.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN) and not answer.truncated
        if not wanted or lifetime <= 0 or len(answer.message) > _LARGEST:
            return
        self._drop((name.lower(), kind))
        self._held[name.lower(), kind] = answer, now, now + lifetime
        self._bytes += len(answer.message)
        while len(self._held) > _KEPT or self._bytes > _BYTES:
            self._drop(next(iter(self._held)))

    def _drop(self, key: tuple[bytes, int]) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= len(held[0].message)

    def clear(self) -> None:
        """Keep nothing: others are asked from now on."""
        self._held.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)


def finish(forward: Forward, answer: Answer | None, age: int) -> bytes:
    """Return the client's answer, made of what an upstream said ``age`` seconds ago; None: none of them did."""
    query = forward.query
    limit = query.limit(forward.transport == "tcp")
    if answer is None:
        return write_reply(query, Rcode.SERVFAIL, RA, Sections(), limit)
    if not forward.chain:
        return adopt(query, answer, age, limit)
    found = [*records(answer, age)]
    answers, authorities = found[: answer.counts[0]], found[answer.counts[0] :]
    # Authorities are worth sending where they say that there is nothing; elsewhere they name servers.
    sections = Sections((*forward.chain, *answers), () if answers else authorities)
    flags = AA | RA | (TC if answer.truncated else 0)
    return write_reply(query, _rcode(answer), flags, sections, limit)


def _rcode(answer: Answer) -> Rcode:
    known = [code for code in Rcode if code == answer.rcode]
    return known[0] if known else Rcode.SERVFAIL
