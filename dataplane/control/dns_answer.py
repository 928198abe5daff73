"""What upstreams answer (RFC 1035): another gate, and two ways to hand the contents on.

`read_answer` takes only what answers the question that was asked, and finds out where each record is. `adopt` makes it
the client's own answer: the records stay the bytes that they are, and their pointers stay right, as the question in
front of them is as long as before. `records` takes them out, for an answer to another name.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dataplane.control.dns_wire import (
    HEADER,
    IN,
    NAME_MAX,
    OPCODE,
    QR,
    QUESTION,
    RA,
    RD,
    RECORD,
    TC,
    WORDS,
    Query,
    Record,
    Type,
    name_end,
    opt,
)

_NAMES = {Type.NS: (0, 1), Type.CNAME: (0, 1), Type.PTR: (0, 1), Type.MX: (2, 1), Type.SRV: (6, 1), Type.SOA: (0, 2)}
"""Types with names in RDATA that may be pointers: bytes before them, and how many there are (RFC 3597 4)."""

_SOA_MIN = 22  # bytes of RDATA: two roots, five numbers


@dataclass(frozen=True, slots=True)
class Answer:
    """An upstream's message, whose parts have been found to be where they should.

    Attributes:
        message: As it came, but that an SOA lives no longer than what it says about (RFC 2308 5).
        flags: The header's second word.
        counts: Of answers, authorities and extras, without OPT and what follows that.
        start: Where the records begin.
        end: Where OPT begins, or the message ends.
        places: Where each record begins, and where its type is.
    """

    message: bytes
    flags: int
    counts: tuple[int, int, int]
    start: int
    end: int
    places: tuple[tuple[int, int], ...]

    @property
    def rcode(self) -> int:
        """The outcome, without EDNS's upper bits: those of a resolver are not for its clients."""
        return self.flags & 0xF

    @property
    def lifetime(self) -> int:
        """For how many seconds all of it is true; 0: it says nothing that could be kept.

        That there is nothing is only said by an SOA: without one it is a referral (RFC 2308 2.2).
        """
        told: list[tuple[int, int, int, int]] = [RECORD.unpack_from(self.message, at) for _, at in self.places]
        if not self.counts[0] and all(kind != Type.SOA for kind, *_ in told[: self.counts[1]]):
            return 0
        return min(ttl for _, _, ttl, _ in told)

    @property
    def truncated(self) -> bool:
        """Whether it wants to be asked by TCP."""
        return bool(self.flags & TC)


def read_answer(message: bytes, number: int, name: bytes, kind: int) -> Answer | None:
    """Return an upstream's answer to this question; None for anything else, whoever has sent it."""
    if len(message) < HEADER:
        return None
    own, flags, questions, *counts = WORDS.unpack_from(message)
    end = name_end(message, HEADER)
    if own != number or not flags & QR or flags & OPCODE or questions != 1 or end < 0 or end + 4 > len(message):
        return None
    if message[HEADER:end].lower() != name.lower() or QUESTION.unpack_from(message, end) != (kind, IN):
        return None
    return _records(message, flags, counts, end + 4)


def _records(message: bytes, flags: int, counts: list[int], start: int) -> Answer | None:
    at, found, ttls = start, [0, 0, 0], {}
    places: list[tuple[int, int]] = []
    sections = [section for section in range(3) for _ in range(counts[section])]
    for section in sections:
        end = name_end(message, at)
        if end < 0 or end + RECORD.size > len(message):
            return None
        kind, _, ttl, length = RECORD.unpack_from(message, end)
        if kind == Type.OPT:
            if section < 2:
                return None
            break
        places.append((at, end))
        at = end + RECORD.size + length
        if at > len(message):
            return None
        if kind == Type.SOA and section == 1 and length >= _SOA_MIN:
            ttls[end + 4] = min(ttl, int.from_bytes(message[at - 4 : at]))  # MINIMUM comes last
        found[section] += 1
    return Answer(_with_ttls(message, ttls), flags, (found[0], found[1], found[2]), start, at, tuple(places))


def _with_ttls(message: bytes, ttls: dict[int, int]) -> bytes:
    changed = bytearray(message)
    for at, ttl in ttls.items():
        changed[at : at + 4] = ttl.to_bytes(4)
    return bytes(changed)


def adopt(query: Query, answer: Answer, age: int, limit: int) -> bytes:
    """Return an upstream's answer as the client's: with its number, its case, its EDNS; not longer than it takes.

    The records' own pointers stay right, since the question is as long as before.

    Args:
        query: What the client asked; the same name, whatever its case.
        answer: What the upstream said.
        age: Seconds since then, by which each TTL is shorter now.
        limit: In bytes; what does not fit leaves nothing but TC.
    """
    end = opt() if query.edns else b""
    flags = QR | query.flags & RD | RA | answer.rcode
    body = _aged(answer, age)
    if HEADER + len(query.question) + len(body) + len(end) > limit or answer.truncated:
        return WORDS.pack(query.id, flags | TC, 1, 0, 0, bool(end)) + query.question + end
    answers, authorities, extras = answer.counts
    words = WORDS.pack(query.id, flags, 1, answers, authorities, extras + bool(end))
    return words + query.question + body + end


def _aged(answer: Answer, age: int) -> bytes:
    if not age:
        return answer.message[answer.start : answer.end]
    places = [kind + 4 for _, kind in answer.places]
    ttls = {at: max(0, int.from_bytes(answer.message[at : at + 4]) - age) for at in places}
    return _with_ttls(answer.message, ttls)[answer.start : answer.end]


def records(answer: Answer, age: int) -> Iterator[Record]:
    """Yield the answers and authorities as records of their own: no pointer of theirs leads out of them.

    What cannot be read is left out.
    """
    message = answer.message
    for start, at in answer.places[: answer.counts[0] + answer.counts[1]]:
        kind, klass, ttl, length = RECORD.unpack_from(message, at)
        owner = read_name(message, start)
        data = _expanded(message, kind, at + RECORD.size, length)
        if klass == IN and owner is not None and data is not None:
            yield Record(owner[:-1], 1, kind, max(0, ttl - age), data)  # the question's last byte is the root


def _expanded(message: bytes, kind: int, at: int, length: int) -> bytes | None:
    """Return RDATA with all names in full."""
    end = at + length
    if kind not in _NAMES:
        return message[at:end]
    before, names = _NAMES[Type(kind)]
    parts = [message[at : at + before]]
    at += before
    for _ in range(names):
        name = read_name(message, at)
        if name is None:
            return None
        parts.append(name)
        at = name_end(message, at)
    return b"".join((*parts, message[at:end])) if at <= end else None


def read_name(message: bytes, at: int) -> bytes | None:
    """Return a name in full; None for one that goes round in circles, is too long, or leads out of the message.

    A pointer may only lead back: so each comes by once at most.
    """
    parts: list[bytes] = []
    size, limit = 1, at
    while at < len(message):
        length = message[at]
        if length >= 0xC0:
            pointer = int.from_bytes(message[at : at + 2]) & 0x3FFF
            if pointer >= limit or at + 2 > len(message):
                return None
            at = limit = pointer
            continue
        size += length + 1
        if length == 0:
            return b"".join((*parts, b"\0"))
        if length > 63 or size > NAME_MAX + 1 or at + 1 + length > len(message):
            return None
        parts.append(message[at : at + 1 + length])
        at += 1 + length
    return None
