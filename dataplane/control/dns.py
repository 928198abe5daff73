"""Cluster DNS without sockets: bytes in, bytes out, and what is to be asked elsewhere.

`answer` says what becomes of one question. `Responder` does the same for many: it keeps the answers that the cluster
gave as bytes, until something changes, since clients ask for the same few names again and again. An answer with several
addresses is kept in several orders, one after the other in turn, so that clients which take the first are spread.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from dataplane.control.dns_wire import (
    AA,
    IN,
    RA,
    RD,
    Query,
    Rcode,
    Record,
    Rejected,
    Sections,
    Type,
    read_query,
    to_wire,
    write_reply,
)
from dataplane.control.dns_zone import Found, Zone

Transport: TypeAlias = Literal["udp", "tcp"]

BUCKETS = tuple(0.00025 * 2**step for step in range(16))
"""Of the histogram of durations, in seconds; CoreDNS' own."""

_KEPT = 8192  # answers as bytes, for each way to ask; when there are more, all go
_BYTES = 16 << 20  # of those
_ORDERS = 16  # of one answer


@dataclass(frozen=True, slots=True)
class Forward:
    """A question that somebody else has to be asked.

    Attributes:
        query: The client's.
        name: What is to be asked: the client's own name, or the one that an ExternalName leads to.
        chain: The CNAMEs that lead there.
        transport: How the client has asked.
    """

    query: Query
    name: bytes
    chain: tuple[Record, ...]
    transport: Transport


def answer(query: Query, zone: Zone, transport: Transport, turn: int = 0) -> bytes | Forward:
    """Return the answer to a question, or whom else to ask.

    Args:
        query: What has passed the gate.
        zone: The cluster's names.
        transport: How it was asked.
        turn: Which of several addresses is to be the first.
    """
    verdict = judge(query, zone)
    if isinstance(verdict, Found):
        return _pack(query, verdict, zone, transport, turn)
    return Forward(query, query.name, (), transport) if verdict is None else refusal(query, verdict)


def judge(query: Query, zone: Zone) -> Found | Rcode | None:
    """Return what the cluster says to a question, or why it says nothing; None: somebody else has to be asked."""
    if query.edns is not None and query.edns.version:
        return Rcode.BADVERS
    if query.klass != IN or query.type in (Type.AXFR, Type.IXFR):
        return Rcode.REFUSED
    if not zone.synced:
        return Rcode.SERVFAIL
    found = zone.find(query.labels, query.type)
    if found is not None:
        return found
    if zone.settings is None or not zone.settings.upstreams or not query.flags & RD:
        return Rcode.REFUSED
    return None


def refusal(query: Query, rcode: Rcode) -> bytes:
    """Return an answer that has nothing but a code."""
    return write_reply(query, rcode, 0, Sections(), query.limit(tcp=False))


def _pack(query: Query, found: Found, zone: Zone, transport: Transport, turn: int) -> bytes | Forward:
    upstreams = bool(zone.settings and zone.settings.upstreams)
    if found.onward and upstreams and query.flags & RD and query.type != Type.CNAME:
        return Forward(query, to_wire(found.onward), found.answers, transport)
    answers = _turned(found.answers, turn)
    flags = AA | (RA if upstreams else 0)
    sections = Sections(answers, found.authorities, found.extras)
    return write_reply(query, found.rcode, flags, sections, query.limit(transport == "tcp"))


def _addresses(records: tuple[Record, ...]) -> int:
    """Count the addresses at the end of an answer; what leads to them stands in front."""
    if not records or records[-1].type not in (Type.A, Type.AAAA):
        return 0
    return len(records) - next(at for at, record in enumerate(records) if record.type in (Type.A, Type.AAAA))


def _turned(records: tuple[Record, ...], turn: int) -> tuple[Record, ...]:
    count = _addresses(records)
    if count < 2:
        return records
    lead, turn = len(records) - count, turn % count
    return (*records[:lead], *records[lead + turn :], *records[lead : lead + turn])


# --- many questions --------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What requests are counted by; the label ``type`` is "other" for what nobody asks seriously."""

    transport: Transport
    type: str


class _Kept:
    """The answer to one question, as bytes without the number, in as many orders as were wanted; how often it was."""

    __slots__ = ("asked", "found", "given", "orders", "query", "turn")

    def __init__(self, query: Query, found: Found, asked: Asked) -> None:
        self.query, self.found, self.asked = query, found, asked
        self.orders = [b""] * _orders(found)
        self.given = self.turn = 0


def _orders(found: Found) -> int:
    """Return in how many orders an answer is kept."""
    return min(max(_addresses(found.answers), 1), _ORDERS)


def _start(found: Found, turn: int) -> int:
    """Return which address comes first in one of these orders; they begin as far from one another as can be."""
    orders = _orders(found)
    return turn % orders * _addresses(found.answers) // orders


class Responder:
    """Answers with what it has answered before, as long as it is true, and counts.

    Attributes:
        zone: The cluster's names; `forget` what was kept when they change.
        durations: How many answers took at most the time of each bucket, but longer than the one before; the last
            number counts those that took longer than all.
        duration_sum: Seconds, of all answers.
        dropped: Messages that were not answered: no question, or an answer.
    """

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.dropped = 0
        self.durations = [0] * (len(BUCKETS) + 1)
        self.duration_sum = 0.0
        self._kept: dict[Transport, dict[bytes, _Kept]] = {"udp": {}, "tcp": {}}
        self._bytes = self._turn = 0
        self._requests: Counter[Asked] = Counter()
        self._responses: Counter[str] = Counter()

    def forget(self) -> None:
        """Keep no answer any longer."""
        for kept in self._kept.values():
            self._count(kept.values())
            kept.clear()
        self._bytes = 0

    def respond(self, data: bytes, transport: Transport) -> bytes | Forward | None:
        """Return the answer to a message; None: there is none."""
        kept = self._kept[transport].get(data[2:])
        if kept is None:
            return self._respond(data, transport)
        kept.given += 1
        kept.turn = turn = (kept.turn + 1) % len(kept.orders)
        return data[:2] + (kept.orders[turn] or self._order(kept, turn, transport))

    def _order(self, kept: _Kept, turn: int, transport: Transport) -> bytes:
        made = _pack(kept.query, kept.found, self.zone, transport, _start(kept.found, turn))
        assert isinstance(made, bytes)
        kept.orders[turn] = made[2:]
        return made[2:]

    def _respond(self, data: bytes, transport: Transport) -> bytes | Forward | None:
        query = read_query(data)
        if query is None:
            self.dropped += 1
            return None
        if isinstance(query, Rejected):
            self._requests[Asked(transport, "other")] += 1
            self._responses[query.rcode.name] += 1
            return query.reply
        asked = Asked(transport, type_name(query.type))
        verdict = judge(query, self.zone)
        made: bytes | Forward
        if isinstance(verdict, Found):
            # Not always the first: a client's cookie (RFC 7873) makes each of its questions a new one.
            self._turn += 1
            made = _pack(query, verdict, self.zone, transport, _start(verdict, self._turn))
            if isinstance(made, bytes):
                self._keep(data[2:], _Kept(query, verdict, asked), made, transport)
                return made
        elif verdict is None:
            made = Forward(query, query.name, (), transport)
        else:
            self._responses[verdict.name] += 1
            made = refusal(query, verdict)
        self._requests[asked] += 1
        return made

    def _keep(self, key: bytes, kept: _Kept, made: bytes, transport: Transport) -> None:
        kept.given, kept.turn = 1, self._turn % len(kept.orders)
        kept.orders[kept.turn] = made[2:]
        size = len(kept.orders) * len(made) + 2 * len(key)  # the question is in there, too
        if self._bytes + size > _BYTES or len(self._kept[transport]) >= _KEPT:
            self.forget()
        self._bytes += size
        self._kept[transport][key] = kept

    def took(self, seconds: float, count: int = 1) -> None:
        """Count answers that took so long each."""
        self.durations[bisect_left(BUCKETS, seconds)] += count
        self.duration_sum += seconds * count

    def forwarded(self, reply: bytes) -> None:
        """Count an answer that came from elsewhere."""
        self._responses[rcode_name(reply)] += 1

    # --- counters ----------------------------------------------------------------------------------------------------

    def _count(self, kept: Iterable[_Kept]) -> None:
        for each in kept:
            self._requests[each.asked] += each.given
            self._responses[each.found.rcode.name] += each.given
            each.given = 0

    def counters(self) -> tuple[Counter[Asked], Counter[str]]:
        """Return how many were asked, and how many were answered by code."""
        for kept in self._kept.values():
            self._count(kept.values())
        return self._requests, self._responses


def type_name(kind: int) -> str:
    """Return a type's name for people and counters."""
    return Type(kind).name if kind in _TYPES else "other"


_TYPES = frozenset(int(kind) for kind in Type)


def rcode_name(reply: bytes) -> str:
    """Return the code of an answer by name."""
    code = reply[3] & 0xF
    return Rcode(code).name if code in _CODES else str(code)


_CODES = frozenset(int(code) for code in Rcode)
