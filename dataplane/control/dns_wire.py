"""Messages of the domain name system (RFC 1035) as bytes: a gate for what comes, and records for what goes.

`read_query` is the gate: what passes it is one question of one name without compression, and everything behind it can
be read without looking at lengths again. What does not pass gets an error code, or no answer at all when an answer
could go round in circles. Nothing here raises for bytes that a stranger has sent.

Records are written with compression of owners only (RFC 1035 4.1.4), and only by pointers into the question: an owner
is some labels of its own and then a suffix of the name that was asked for. So a record of a given suffix length has the
same bytes in every answer, whatever its case, and names in RDATA stand in full (RFC 3597 4 wants that for new types).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

HEADER = 12
NAME_MAX, LABEL_MAX = 255, 63
UDP_MIN = 512  # what every client can take (RFC 1035 4.2.1)
UDP_MAX = 1232  # what passes every link unfragmented (DNS flag day 2020); more is asked for by TCP
TCP_MAX = 65535

QR, AA, TC, RD, RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
OPCODE = 0x7800
_POINTER = 0xC000
IN = 1

WORDS = Struct("!6H")
QUESTION = Struct("!2H")
RECORD = Struct("!HHIH")  # behind the owner: type, class, TTL, length


class Type(IntEnum):
    """Types of records and of questions."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    HINFO = 13
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    OPT = 41
    IXFR = 251
    AXFR = 252
    ANY = 255


class Rcode(IntEnum):
    """What became of a question; BADVERS needs EDNS to be told."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class Edns(NamedTuple):
    """A client's OPT record (RFC 6891): the datagrams that it takes, and the version that it speaks."""

    size: int
    version: int


@dataclass(frozen=True, slots=True)
class Query:
    """A question that has passed the gate.

    Attributes:
        id: The client's number for it.
        flags: The header's second word.
        name: The name as it was sent, in its own case, with the root's zero.
        labels: The same in lower case, without the root. One byte is one character: a label may hold any, dots too.
        type: ``Type``, or any other number.
        klass: Nearly always ``IN``.
        edns: None for a client that does not speak it.
    """

    id: int
    flags: int
    name: bytes
    labels: tuple[str, ...]
    type: int
    klass: int = IN
    edns: Edns | None = None

    @property
    def question(self) -> bytes:
        """The question section as it was sent."""
        return self.name + QUESTION.pack(self.type, self.klass)

    def limit(self, tcp: bool) -> int:
        """The length of the longest answer that the client takes this way."""
        if tcp:
            return TCP_MAX
        return min(max(self.edns.size, UDP_MIN), UDP_MAX) if self.edns else UDP_MIN


@dataclass(frozen=True, slots=True)
class Rejected:
    """What did not pass the gate, and the answer that it gets: the header alone, with this code."""

    reply: bytes
    rcode: Rcode


class Record(NamedTuple):
    """A record to be sent.

    Attributes:
        prefix: The owner's first labels.
        suffix: How many bytes at the end of the question's name are the rest of the owner; 0: all of it.
        data: RDATA.
    """

    prefix: bytes
    suffix: int
    type: int
    ttl: int
    data: bytes


# --- what comes ------------------------------------------------------------------------------------------------------


def read_query(data: bytes) -> Query | Rejected | None:
    """Return the question of a message, or the answer to what is none; None for what must not be answered."""
    if len(data) < HEADER:
        return None
    number, flags, questions, answers, authorities, extras = WORDS.unpack_from(data)
    if flags & QR:
        return None  # an answer to an answer would be answered in turn, for ever
    if flags & OPCODE:
        return _rejected(number, flags, Rcode.NOTIMP)
    if questions != 1 or answers or authorities > 1 or extras > 2:  # one authority: IXFR's SOA; two extras: OPT, TSIG
        return _rejected(number, flags, Rcode.FORMERR)
    end = _whole_name_end(data, HEADER)  # a pointer in the first name of all would point to nothing
    if end < 0 or end + 4 > len(data):
        return _rejected(number, flags, Rcode.FORMERR)
    kind, klass = QUESTION.unpack_from(data, end)
    edns = _edns(data, end + 4, authorities, extras)
    if kind == Type.OPT or isinstance(edns, Rcode):
        return _rejected(number, flags, Rcode.FORMERR)
    name = data[HEADER:end]
    return Query(number, flags, name, labels_of(name), kind, klass, edns)


def _rejected(number: int, flags: int, rcode: Rcode) -> Rejected:
    return Rejected(WORDS.pack(number, QR | flags & (OPCODE | RD) | rcode, 0, 0, 0, 0), rcode)


def _edns(data: bytes, at: int, authorities: int, extras: int) -> Edns | Rcode | None:
    found: Edns | None = None
    for index in range(authorities + extras):
        start, end = at, name_end(data, at)
        at = end + RECORD.size
        if end < 0 or at > len(data):
            return Rcode.FORMERR
        kind, size, more, length = RECORD.unpack_from(data, end)
        at += length
        if at > len(data):
            return Rcode.FORMERR
        if kind != Type.OPT:
            continue
        if found is not None or end - start != 1 or index < authorities:  # RFC 6891 6.1.1: one, of the root
            return Rcode.FORMERR
        found = Edns(size, more >> 16 & 0xFF)
    return found


def name_end(data: bytes, at: int) -> int:
    """Return where the name that begins at ``at`` ends in the message, pointer or root included; -1: it has no end.

    A pointer ends a name and is not followed.
    """
    last = _labels_end(data, at)
    if last >= 0 and data[last] >= 0xC0:
        return last + 2 if last + 2 <= len(data) else -1
    return last + 1 if last >= 0 and data[last] == 0 else -1


def _whole_name_end(data: bytes, at: int) -> int:
    """Return where a name without a pointer ends; -1: it has one, or no end."""
    last = _labels_end(data, at)
    return last + 1 if last >= 0 and data[last] == 0 else -1


def _labels_end(data: bytes, at: int) -> int:
    """Return where the labels of a name end: at the root, a pointer, or nonsense; -1: there are too many of them."""
    size, most = len(data), at + NAME_MAX
    while at < size and at < most:
        length = data[at]
        if length == 0 or length > LABEL_MAX:
            return at
        at += 1 + length
    return -1


def labels_of(name: bytes) -> tuple[str, ...]:
    """Return the labels of a whole name without compression, in lower case."""
    found = []
    at, text = 0, name.lower().decode("latin-1")  # of ASCII only (RFC 4343), as bytes do it; no length is a letter
    while length := name[at]:
        found.append(text[at + 1 : at + 1 + length])
        at += 1 + length
    return tuple(found)


def to_wire(labels: Iterable[str]) -> bytes:
    """Return a name as bytes.

    Raises:
        ValueError: A label is empty or too long, or the name is.
    """
    parts = []
    for label in labels:
        raw = label.encode("latin-1")
        if not 0 < len(raw) <= LABEL_MAX:
            raise ValueError(f"a label has 1 to {LABEL_MAX} bytes (got {label!r})")
        parts.append(bytes((len(raw),)) + raw)
    name = b"".join((*parts, b"\0"))
    if len(name) > NAME_MAX:
        raise ValueError(f"a name has at most {NAME_MAX} bytes (got {len(name)})")
    return name


def split(text: str) -> tuple[str, ...]:
    """Return the labels of a name that is written with dots; the last dot may be there or not."""
    return tuple(text.rstrip(".").split(".")) if text.rstrip(".") else ()


# --- what goes -------------------------------------------------------------------------------------------------------


class Sections(NamedTuple):
    """The records of an answer."""

    answers: Sequence[Record] = ()
    authorities: Sequence[Record] = ()
    extras: Sequence[Record] = ()


def write_reply(query: Query, rcode: Rcode, flags: int, sections: Sections, limit: int) -> bytes:
    """Return an answer of at most ``limit`` bytes.

    When not all of it fits, what is extra goes first and silently (RFC 2181 9); when answers or authorities are cut
    off, the answer says so (TC), and the client asks again by TCP.

    Args:
        query: What was asked.
        rcode: The outcome.
        flags: Of AA, RA, TC.
        sections: All records.
        limit: In bytes.
    """
    head = query.question
    end = opt(rcode) if query.edns else b""
    room = limit - HEADER - len(head) - len(end)
    counts, body = [], [head]
    for index, records in enumerate(sections):
        packed = 0
        for record in records:
            raw = _pack(record, len(query.name))
            if len(raw) > room:
                flags |= TC if index < 2 else 0
                room = -1  # nothing that comes later may stand before what is missing
                break
            body.append(raw)
            room -= len(raw)
            packed += 1
        counts.append(packed)
    words = WORDS.pack(
        query.id, QR | query.flags & RD | flags | rcode & 0xF, 1, counts[0], counts[1], counts[2] + bool(end)
    )
    return b"".join((words, *body, end))


def opt(rcode: int = 0) -> bytes:
    """Return our OPT record, which has the upper bits of the code."""
    return b"\0" + RECORD.pack(Type.OPT, UDP_MAX, rcode >> 4 << 24, 0)


def _pack(record: Record, length: int) -> bytes:
    pointer = _POINTER | (HEADER + length - (record.suffix or length))
    owner = record.prefix + pointer.to_bytes(2)
    return owner + RECORD.pack(record.type, IN, record.ttl, len(record.data)) + record.data


def write_question(number: int, name: bytes, kind: int) -> bytes:
    """Return a question as we ask it: recursion wanted, EDNS spoken."""
    return WORDS.pack(number, RD, 1, 0, 0, 1) + name + QUESTION.pack(kind, IN) + opt()
