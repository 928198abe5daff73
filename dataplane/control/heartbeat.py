"""Heartbeats: which other nodes are silent, and for how long those will not call this one so. Sans-IO, time passed in.

Every node sends a *beat* to its *watchers* ten times a second: all other nodes of a small cluster, in a large one those
five that follow it on a ring by the hashes of the names (a node's traffic does not grow with the cluster). A watcher
answers each beat. The answer is a *promise*: it will not call the sender silent before ``Timing.silence_ns`` have gone
by, which the sender counts from when it sent the beat, so no clock is compared with another.

A watcher that has heard nothing for so long calls the node silent, tells everybody, and asks the node's other
watchers. Only what more than half of them say counts, among those that can be heard: a loss in one direction moves
nothing. A node whose own loop stood still believes its ears only after it has listened anew.

*Convicting* a node is stricter, since it lets somebody take what the node may still use: more than half of all its
watchers must have said so in answer to a question that was asked after a given time, and each that has said so gives
no promise for ``Timing.hold_ns``. So a node that has the promises of half of its watchers at some moment cannot have
been convicted at that moment, whatever the network does (control/ownership.py builds on that). What has just started,
or has never heard the node, neither promises nor convicts: the others may not know of it yet.

A datagram has the sender's name, the time of its start and a number that grows, and with a secret HMAC-SHA-256 over all
of it. One that does not come from its node's address, repeats an older one, or makes no sense is counted and ignored.
"""

import hashlib
import hmac
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, TypeAlias

WATCHERS = 5  # two of them may die with the node that they watch, and three are still more than half
SECOND = 1_000_000_000
_MS = 1_000_000
_YOUTH_NS = 2 * SECOND  # until the others know of a node, however late their news from the store is
_START_NS = SECOND  # what a node may need to be heard for the first time
_SOON, _LATER = 5, SECOND  # a silent node is told of with each of the next beats, then once a second
_FORGET_NS = 3 * SECOND  # of what others say, unless they say it again
_REMEMBERED = 64  # beats whose answers are waited for

_MAGIC = b"dpb1"
_HEAD = struct.Struct("!4sBBBBQQ")  # magic, kind, flags, lengths of name and subject, start, number
_MAC_SIZE = 16
_PROMISE, _SILENT, _STRICT = 1, 2, 4

Datagram: TypeAlias = tuple[str, bytes]
"""Where to, and what."""


class Kind(IntEnum):
    """What a datagram is."""

    BEAT = 1  # I am here
    ACK = 2  # I have heard your beat of this number
    QUERY = 3  # is this node silent?
    VOTE = 4  # it is, or it is not; number 0: nobody has asked
    LEAVE = 5  # I am going, and use nothing any more


class Message(NamedTuple):
    """A datagram taken apart."""

    kind: Kind
    flags: int
    start: int
    number: int
    name: str
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """How often, and for how long.

    Attributes:
        interval_ns: Between two beats.
        silence_ns: After so long without a beat a node is silent.
        hold_ns: For so long a watcher that has called a node silent promises it nothing.
    """

    interval_ns: int = 100 * _MS
    silence_ns: int = 400 * _MS
    hold_ns: int = 400 * _MS

    @property
    def pause_ns(self) -> int:
        """How late a tick may be before this node must take itself for the one that was away."""
        return max(self.interval_ns, self.silence_ns - 2 * self.interval_ns)


def encode(message: Message, secret: bytes = b"") -> bytes:
    """Return the datagram of a message."""
    name, subject = message.name.encode(), message.subject.encode()
    head = _HEAD.pack(
        _MAGIC, message.kind, message.flags, len(name), len(subject), message.start, message.number
    )  # fmt: skip
    body = head + name + subject
    return body + (_sum(body, secret) if secret else b"")


def decode(datagram: bytes, secret: bytes = b"") -> Message | None:
    """Return the message of a datagram; None for anything else."""
    if secret:
        datagram, given = datagram[:-_MAC_SIZE], datagram[-_MAC_SIZE:]
        if not hmac.compare_digest(given, _sum(datagram, secret)):
            return None
    if len(datagram) < _HEAD.size:
        return None
    magic, kind, flags, name_size, subject_size, start, number = _HEAD.unpack_from(datagram)
    names = datagram[_HEAD.size :]
    if magic != _MAGIC or kind not in _KINDS or len(names) != name_size + subject_size or not name_size:
        return None
    try:
        return Message(Kind(kind), flags, start, number, names[:name_size].decode(), names[name_size:].decode())
    except UnicodeDecodeError:
        return None


_KINDS = frozenset(Kind)


def _sum(body: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, body, "sha256")[:_MAC_SIZE]


@lru_cache(1024)
def watchers(name: str, members: frozenset[str]) -> tuple[str, ...]:
    """Return who watches a node: the next ones on the ring of all members by the hashes of their names."""
    ring = sorted(members | {name}, key=_place)
    at = ring.index(name)
    return tuple([*ring[at + 1 :], *ring[:at]][:WATCHERS])


@lru_cache(4096)
def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@dataclass(slots=True)
class _Peer:
    """What is known of another node. Times are ns; ``heard`` is None until the first beat or answer of this start."""

    address: str
    known_at: int
    start: int = 0
    number: int = 0
    heard: int | None = None
    heard_ever: bool = False
    silent: bool = False  # in our own ears
    left: bool = False
    voted: int = -(1 << 62)  # when we last called it silent, to anybody
    told: int = 0  # how often that was told to all
    tell_at: int = 0
    promised: int = 0  # its promise to us, by our clock
    strict: int = 0  # the same, of one that is old enough to convict


@dataclass(slots=True)
class _Vote:
    silent: bool
    strict: bool
    asked: int  # when; 0: not in answer to a question of ours
    at: int


@dataclass(slots=True)
class Counts:
    """Datagrams, for metrics."""

    sent: int = 0
    received: int = 0
    ignored: int = 0


@dataclass(slots=True)
class Heartbeats:
    """One node's side of it.

    Attributes:
        name: Of this node.
        start: What tells this run of it from others before: nanoseconds since the epoch.
        strict_until: Until when it is sure to be a member of the store, and may count as a watcher that convicts.
        silent: Nodes that do not answer, by more than half of those that should know.
        members: The nodes that count, this one among them.
        pursued: Nodes whose watchers are asked with every tick.

    Args:
        now: Nanoseconds of any monotonic clock, as everywhere here.
    """

    name: str
    start: int
    now: int
    timing: Timing = Timing()
    secret: bytes = b""
    strict_until: int = 1 << 62
    counts: Counts = field(default_factory=Counts)
    silent: frozenset[str] = frozenset()
    members: frozenset[str] = frozenset()
    pursued: frozenset[str] = frozenset()
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _votes: dict[str, dict[str, _Vote]] = field(default_factory=dict)
    _sent: dict[int, int] = field(default_factory=dict)
    _asked: dict[int, tuple[str, int]] = field(default_factory=dict)
    _applied: frozenset[str] = frozenset()
    _number: int = 0
    _ticked: int = 0
    _born: int = 0
    _next: int = 0

    def __post_init__(self) -> None:
        self._ticked = self._born = self._next = self.now
        self._number = self.start // 1000  # an answer to an earlier run's beat has a smaller number

    # --- who is there ------------------------------------------------------------------------------------------------

    def follow(self, addresses: Mapping[str, str], members: Iterable[str], now: int) -> None:
        """Take over the other nodes, addresses by name, and the names of those that count (this one always does)."""
        for name in self._peers.keys() - addresses.keys():
            del self._peers[name]
            self._votes.pop(name, None)
        for name, address in addresses.items():
            peer = self._peers.get(name)
            if peer is None or peer.address != address:
                self._peers[name] = _Peer(address, now)
        self.members = frozenset(members) | {self.name}
        self._judge(now)

    def applied(self, silent: frozenset[str]) -> None:
        """Say that the node acts on this value of ``silent`` now: who is in it gets no promise."""
        self._applied = silent

    def pursue(self, subjects: Iterable[str]) -> None:
        """Ask the watchers of these nodes with every tick, since they may have to be convicted."""
        self.pursued = frozenset(subjects)

    def _watches(self, watcher: str, subject: str) -> bool:
        return watcher in watchers(subject, self.members)

    def _related(self, name: str) -> bool:
        """Whether there is regular traffic with a node: one of the two watches the other."""
        return self._watches(self.name, name) or self._watches(name, self.name)

    # --- what others say ---------------------------------------------------------------------------------------------

    def received(self, datagram: bytes, source: str, now: int) -> list[Datagram]:
        """Take a datagram from an address; return what to send."""
        message = decode(datagram, self.secret)
        peer = self._peers.get(message.name) if message is not None else None
        if message is None or peer is None or peer.address != source or not self._is_news(peer, message):
            self.counts.ignored += 1
            return []
        self.counts.received += 1
        if message.kind == Kind.BEAT:
            return self._beat(peer, message, now)
        if message.kind == Kind.ACK:
            self._answered(peer, message, now)
        elif message.kind == Kind.QUERY:
            return self._asked_about(peer, message, now)
        elif message.kind == Kind.VOTE:
            self._told(message, now)
        else:
            peer.left = True
            self._judge(now)
        return []

    def _is_news(self, peer: _Peer, message: Message) -> bool:
        """Tell whether a message is no repetition; one of an earlier start is news only of a node thought silent."""
        if message.start != peer.start:
            if message.start < peer.start and not self._calls_silent(peer):
                return False
            if message.kind != Kind.BEAT and peer.start:
                return False  # a run begins with a beat
            fresh = _Peer(peer.address, peer.known_at, message.start, voted=peer.voted, silent=peer.silent)
            for name in _Peer.__slots__:
                setattr(peer, name, getattr(fresh, name))
        if message.kind == Kind.BEAT:
            if message.number <= peer.number:
                return False
            peer.number = message.number
        return not peer.left

    def _beat(self, peer: _Peer, message: Message, now: int) -> list[Datagram]:
        flags = 0
        if now >= peer.voted + self.timing.hold_ns and message.name not in self._applied:
            flags = _PROMISE | (_STRICT if self._is_strict(now) else 0)
        sent = self._heard(message.name, peer, now)
        return [*sent, self._message(peer, Kind.ACK, flags, message.number)]

    def _heard(self, name: str, peer: _Peer, now: int) -> list[Datagram]:
        peer.heard, peer.heard_ever = now, True
        if not peer.silent:
            return []
        peer.silent, peer.told = False, 0
        self._judge(now)
        return self._tell_all(name, 0) if self._watches(self.name, name) else []

    def _answered(self, peer: _Peer, message: Message, now: int) -> None:
        at = self._sent.get(message.number)
        if at is None:
            return
        self._heard(message.name, peer, now)
        if message.flags & _PROMISE:
            peer.promised = max(peer.promised, at + self.timing.silence_ns)
            if message.flags & _STRICT:
                peer.strict = max(peer.strict, at + self.timing.silence_ns)

    def _asked_about(self, peer: _Peer, message: Message, now: int) -> list[Datagram]:
        subject = self._peers.get(message.subject)
        if subject is None:
            return []
        flags = 0
        if self._calls_silent(subject):
            subject.voted = now
            flags = _SILENT | (_STRICT if self._may_convict(subject, now) else 0)
        return [self._message(peer, Kind.VOTE, flags, message.number, message.subject)]

    def _told(self, message: Message, now: int) -> None:
        about, asked = self._asked.get(message.number, ("", 0))
        if message.subject not in self._peers or (message.number and about != message.subject):
            return  # of an unknown node nothing is kept: names can be invented without end
        silent, strict = bool(message.flags & _SILENT), bool(message.flags & _STRICT)
        votes = self._votes.setdefault(message.subject, {})
        held = votes.get(message.name)
        if asked or held is None or held.silent != silent:
            votes[message.name] = _Vote(silent, strict and bool(asked), asked, now)
        else:
            held.at = now
        self._judge(now)

    def _calls_silent(self, peer: _Peer) -> bool:
        return peer.silent or peer.left

    def _is_strict(self, now: int) -> bool:
        return now >= self._born + _YOUTH_NS and now + self.timing.silence_ns < self.strict_until

    def _may_convict(self, peer: _Peer, now: int) -> bool:
        return (peer.heard_ever or peer.left) and self._is_strict(now)

    # --- time --------------------------------------------------------------------------------------------------------

    @property
    def next_at(self) -> int:
        """When `tick` has something to do: the next beat is due, or a node becomes silent if it is not heard before."""
        overdue = (
            peer.heard + self.timing.silence_ns
            for name, peer in self._peers.items()
            if peer.heard is not None and not self._calls_silent(peer) and self._related(name)
        )
        return min(self._next, min(overdue, default=self._next))

    def tick(self, now: int) -> list[Datagram]:
        """Return what is due: beats, questions, news of who is silent."""
        if now - self._ticked > self.timing.pause_ns:
            self._was_away(now)
        self._ticked = now
        sends: list[Datagram] = []
        for name, peer in self._peers.items():
            if self._is_overdue(name, peer, now):
                peer.silent, peer.told, peer.tell_at = True, 0, now
        self._judge(now)
        if now >= self._next - self.timing.interval_ns // 10:
            sends += self._beats(now)
            self._next = max(self._next + self.timing.interval_ns, now + self.timing.interval_ns // 2)
        for name, peer in self._peers.items():
            if peer.silent and peer.tell_at <= now and self._watches(self.name, name):
                sends += self._tell_all(name, _SILENT)
                peer.voted, peer.told = now, peer.told + 1
                peer.tell_at = now + (self.timing.interval_ns if peer.told < _SOON else _LATER)
        doubted = {name for name, peer in self._peers.items() if peer.silent and name not in self.silent}
        return sends + self.ask(self.pursued | doubted, now)

    def _is_overdue(self, name: str, peer: _Peer, now: int) -> bool:
        if self._calls_silent(peer) or not self._related(name):
            return False
        if peer.heard is None:
            return now - max(peer.known_at, self._born) >= _START_NS
        return now - peer.heard >= self.timing.silence_ns

    def _was_away(self, now: int) -> None:
        """Begin to listen anew: what came meanwhile is still unread."""
        for peer in self._peers.values():
            if peer.heard is not None:
                peer.heard = now
            peer.known_at = now

    def _beats(self, now: int) -> list[Datagram]:
        self._number += 1
        self._sent[self._number] = now
        if len(self._sent) > _REMEMBERED:
            del self._sent[next(iter(self._sent))]
        mine = watchers(self.name, self.members)
        return [self._message(self._peers[name], Kind.BEAT, 0, self._number) for name in mine if name in self._peers]

    def ask(self, subjects: Iterable[str], now: int) -> list[Datagram]:
        """Return the questions to the watchers of these nodes."""
        sends = []
        for subject in sorted(subjects):
            self._number += 1
            self._asked[self._number] = subject, now
            asked = [self._peers[name] for name in watchers(subject, self.members) if name in self._peers]
            sends += [self._message(peer, Kind.QUERY, 0, self._number, subject) for peer in asked]
        while len(self._asked) > _REMEMBERED:
            del self._asked[next(iter(self._asked))]
        return sends

    def leave(self) -> list[Datagram]:
        """Return the farewell; this node must have stopped to use what others may take."""
        return [self._message(peer, Kind.LEAVE, 0, 0) for peer in self._peers.values()]

    def _tell_all(self, subject: str, flags: int) -> list[Datagram]:
        others = (peer for name, peer in self._peers.items() if name != subject)
        return [self._message(peer, Kind.VOTE, flags, 0, subject) for peer in others]

    def _message(self, peer: _Peer, kind: Kind, flags: int, number: int, subject: str = "") -> Datagram:
        self.counts.sent += 1
        return peer.address, encode(Message(kind, flags, self.start, number, self.name, subject), self.secret)

    # --- judgement ---------------------------------------------------------------------------------------------------

    def _judge(self, now: int) -> None:
        """Find out who is silent. Who cannot be heard has no vote; a node that takes its leave needs none."""
        self.silent = frozenset(name for name, peer in self._peers.items() if peer.left or self._is_silent(name, now))

    def _is_silent(self, subject: str, now: int) -> bool:
        own, said, votes = self._peers[subject], 0, self._votes.get(subject, {})
        heard = [name for name in watchers(subject, self.members) if self._has_a_vote(name)]
        for name in heard:
            vote = votes.get(name)
            if name == self.name:
                said += own.silent
            elif vote is not None and now - vote.at < _FORGET_NS:
                said += vote.silent
        return 2 * said > len(heard)

    def _has_a_vote(self, name: str) -> bool:
        peer = self._peers.get(name)
        return name == self.name or (peer is not None and not self._calls_silent(peer) and name not in self.silent)

    def convicts(self, subject: str, since: int, now: int) -> bool:
        """Tell whether more than half of all watchers of a node say that it is silent, asked after ``since``.

        This node's own voice binds it, too.
        """
        said, votes, peer = 0, self._votes.get(subject, {}), self._peers.get(subject)
        electorate = watchers(subject, self.members)
        for name in electorate:
            if name == self.name:
                if peer is not None and self._calls_silent(peer) and self._may_convict(peer, now):
                    peer.voted = now
                    said += 1
                continue
            vote = votes.get(name)
            fresh = vote is not None and vote.asked >= since and now < vote.asked + self.timing.hold_ns
            said += vote is not None and fresh and vote.silent and vote.strict
        return 2 * said > len(electorate)

    def promised(self, now: int) -> int:
        """Return until when this node cannot be convicted, by the promises of half of all its watchers, ns."""
        mine = watchers(self.name, self.members)
        until = sorted((self._peers[name].strict if name in self._peers else 0 for name in mine), reverse=True)
        return until[(len(until) + 1) // 2 - 1] if until else now + self.timing.silence_ns

    def promises(self) -> list[int]:
        """Return until when each watcher that can be heard will not call this node silent, ns, the longest first."""
        mine = (self._peers.get(name) for name in watchers(self.name, self.members))
        heard = (peer for peer in mine if peer is not None and not self._calls_silent(peer))
        return sorted((peer.promised for peer in heard), reverse=True)

    def run_of(self, name: str) -> int:
        """Return the start of the run of a node that was heard last; 0: none."""
        peer = self._peers.get(name)
        return peer.start if peer is not None else 0
