"""Who answers for a load balancer's address when a store decides it: never two nodes, and soon another one. Sans-IO.

Each address has a *claim* in the store: the node that answers for it, with that node's lease. The elected node takes a
free one. An owner that is no longer elected stops to answer, then frees its claim. When the owner is silent, the
elected one writes itself into the claim as *successor*, waits ``GRACE_NS``, and takes it if the claim is still as it
wrote it and the owner is *convicted* (control/heartbeat.py) by answers to questions asked after the successor was
written. An owner that lives sees a successor and strikes it out. All writes compare the claim's revision, so of two
that meet one fails.

What a node answers for, it answers for until its *fence* closes (``batch.ANNOUNCE_UNTIL``, read by stages/arp.py with
each request): a node that was stopped, or lost its store and its peers, is quiet before anybody can have taken over,
without doing anything. The fence is pushed forward by what the node knows:

==================================  ====================================================================
half of its watchers promise        open as long as they do, if it was open before
a read of all claims shows its own  open until ``GRACE_NS`` after the read was begun: a successor would have been
and no successor                    written before that, and would have been seen
neither                             closed; the claims are read again and again
store away, half of the watchers    open as long as they do, if it was open before: the last owner stays it. When its
that are heard promise              lease ends the others leave the address alone, since they hear its owner
store away for a second, no         open: it is all that is left, or cut off from all that could take over
watcher is heard
==================================  ====================================================================

In the first two rows the node is *certain*, up to the end of its lease; the other two are for a store that is away.

Why two nodes never answer for one address while both reach the store. Let B take A's claim, having decided so at the
moment k. More than half of A's watchers gave no promise at k, so A's fence was not open by the first row then. Nor by
the second: B wrote itself in at least ``GRACE_NS`` before k, so a read that still covered k had begun later and showed
it. So the fence was closed at k, and the first row opens no fence that was closed. A read that begins after k shows B
as owner or as successor; in the second case A strikes it out, or B has taken the claim: the store lets one of the two
succeed. B begins to answer when it knows that it was the one.

Nothing here compares clocks of two machines; they only have to run equally fast, within a part in ten.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from dataplane.control.heartbeat import SECOND, Datagram, Heartbeats
from dataplane.control.state import Address

GRACE_NS = 200_000_000
_SLACK_NS = 20_000_000  # of the grace, for clocks that do not run equally fast
_AWAY_NS = SECOND  # without an answer, and the store counts as away
_CONFIRM_NS = 150_000_000  # promises that last less are not waited for
_RETRY_NS = SECOND  # after an owner has objected
_PAUSE_NS = 80_000_000  # after a write that failed; less than a beat's interval, so that the next tick tries again


class Claim(NamedTuple):
    """What the store says of an address; ``node`` is "" when its owner has freed it."""

    node: str
    successor: str = ""
    revision: int = 0
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Write:
    """One transaction: if the claim still has this revision (0: does not exist), it becomes the given one.

    Attributes:
        claim: What to write, with the lease to write it with; None: delete it.
        began: When it was decided on, ns.
    """

    address: Address
    revision: int
    claim: Claim | None
    began: int


class _Last(NamedTuple):
    """The last owner that was seen: its name, which run of it that was, and when its claim was found to be gone."""

    node: str
    run: int
    gone: int = 0


@dataclass(slots=True)
class _Challenge:
    revision: int
    written: int  # when that was known


Owners: TypeAlias = frozenset[tuple[Address, str]]


@dataclass(slots=True)
class Ownership:
    """One node's side of it.

    Attributes:
        lease: This node's; 0: it has none now, and writes nothing.
        claims: What the store says, as far as is known.
        leaving: It gives everything up.
        elected: Who should answer for each address; "" is nobody.
    """

    beats: Heartbeats
    lease: int = 0
    claims: dict[Address, Claim] = field(default_factory=dict)
    elected: Mapping[Address, str] = field(default_factory=dict)
    _applied: frozenset[Address] = frozenset()
    _busy: set[Address] = field(default_factory=set)
    _challenges: dict[Address, _Challenge] = field(default_factory=dict)
    _last: dict[Address, _Last] = field(default_factory=dict)
    _retry: dict[Address, int] = field(default_factory=dict)
    _paused: dict[Address, int] = field(default_factory=dict)
    _asked: tuple[str, int] = ("", 0)
    _until: int = 1
    _certain: int = 0
    _confirmed: int | None = None
    _failing: int | None = None
    leaving: bool = False

    @property
    def name(self) -> str:
        """This node's name."""
        return self.beats.name

    # --- what the store says -----------------------------------------------------------------------------------------

    def read(self, claims: Mapping[Address, Claim], revision: int, began: int, now: int) -> None:
        """Take over all claims, as they were at a revision, found by a read that was begun at this time."""
        for address in self.claims.keys() - claims.keys():
            self.changed(address, None, revision, now)
        for address, claim in claims.items():
            self.changed(address, claim, claim.revision, now)
        self._failing = None
        if self._is_ours(self._applied):
            self._confirmed = max(began, self._confirmed or 0)

    def changed(self, address: Address, claim: Claim | None, revision: int, now: int) -> None:
        """Take over one claim, as a watch or a transaction's answer tells it; older news than is known is ignored."""
        known = self.claims.get(address)
        if known is not None and known.revision > revision:
            return
        if claim is None:
            if self.claims.pop(address, None) is not None and (last := self._last.get(address)) is not None:
                run = last.run or self.beats.run_of(last.node)  # it may not have been heard when the claim was
                self._last[address] = _Last(last.node, run, now)
            return
        self.claims[address] = claim._replace(revision=revision)
        if claim.node:
            self._last[address] = _Last(claim.node, self.beats.run_of(claim.node))
        else:
            self._last.pop(address, None)

    def failed(self, now: int) -> None:
        """Note that the store did not answer."""
        if self._failing is None:
            self._failing = now

    def done(self, write: Write, succeeded: bool, revision: int, now: int) -> list[Datagram]:
        """Take over what became of a transaction; return what to send. One whose fate is unknown has failed."""
        self._busy.discard(write.address)
        if not succeeded:
            self._paused[write.address] = now + _PAUSE_NS  # a store that refuses at once must not be asked at once
            return []
        self._failing = None
        self._paused.pop(write.address, None)
        claim, before = write.claim, self._mine()
        self.changed(write.address, claim, revision, now)
        if claim is None:
            return []
        if claim.node == self.name:
            self._challenges.pop(write.address, None)
            if not self.is_certain(now) and not (before | self._applied) - {write.address}:
                self._confirmed = max(write.began, self._confirmed or 0)
        elif claim.successor == self.name:
            self._challenges[write.address] = _Challenge(revision, now)
            if self._asked != (claim.node, now):  # many addresses of one node are written together
                self._asked = claim.node, now
                return self.beats.ask({claim.node}, now)
        return []

    # --- what is to be done ------------------------------------------------------------------------------------------

    def writes(self, now: int) -> list[Write]:
        """Return the transactions to begin now; each must be reported to `done`."""
        pursued: set[str] = set()
        found = [
            write
            for address in sorted(self.claims.keys() | self.elected.keys() | self._last.keys(), key=int)
            if address not in self._busy
            and now >= self._paused.get(address, 0)
            and (write := self._write(address, now, pursued)) is not None
        ]
        self.beats.pursue(pursued)
        if not self.lease:
            return []
        self._busy.update(write.address for write in found)
        return found

    def _write(self, address: Address, now: int, pursued: set[str]) -> Write | None:
        claim = self.claims.get(address)
        elected = "" if self.leaving else self.elected.get(address, "")
        if claim is None:
            return self._without_a_claim(address, elected, now, pursued)
        if claim.node == self.name:
            return self._own(address, claim, elected, now)
        if claim.node == "":
            if elected == self.name:
                return self._take(address, claim.revision, now)
            return None if address in self.elected else Write(address, claim.revision, None, now)
        if elected != self.name or claim.node not in self.beats.silent:
            self._challenges.pop(address, None)
            return None
        pursued.add(claim.node)
        return self._take_over(address, claim, now)

    def _without_a_claim(self, address: Address, elected: str, now: int, pursued: set[str]) -> Write | None:
        """Take what has no owner: since none was seen, or since its lease has ended and it does not live on without."""
        last = self._last.get(address)
        if last is None or elected != self.name:
            ours = last is not None and last.node == self.name and address not in self._applied
            if ours and address in self.elected:
                return Write(address, 0, Claim(""), now)  # only we can say that we do not answer any more
            return self._take(address, 0, now) if elected == self.name else None
        if last.node != self.name and last.run != 0 and self.beats.run_of(last.node) == last.run:
            if last.node not in self.beats.silent:
                return None
            pursued.add(last.node)
            if not self.beats.convicts(last.node, last.gone, now):
                return None
        return self._take(address, 0, now)

    def _own(self, address: Address, claim: Claim, elected: str, now: int) -> Write | None:
        if elected != self.name:
            if address in self._applied:
                return None  # `owners` is without it already
            return Write(address, claim.revision, Claim("") if address in self.elected else None, now)
        if claim.successor or claim.lease != self.lease:
            return self._take(address, claim.revision, now)
        return None

    def _take(self, address: Address, revision: int, now: int) -> Write:
        return Write(address, revision, Claim(self.name, lease=self.lease), now)

    def _take_over(self, address: Address, claim: Claim, now: int) -> Write | None:
        challenge = self._challenges.get(address)
        if challenge is not None and claim.revision == challenge.revision:
            ripe = now >= challenge.written + GRACE_NS
            if ripe and self.beats.convicts(claim.node, challenge.written, now):
                return self._take(address, claim.revision, now)
            return None
        if challenge is not None and claim.revision > challenge.revision:
            del self._challenges[address]  # struck out, or another's
            self._retry[address] = now + _RETRY_NS
        if now < self._retry.get(address, 0):
            return None
        return Write(address, claim.revision, claim._replace(successor=self.name), now)

    # --- what this node answers for ----------------------------------------------------------------------------------

    @property
    def owners(self) -> Owners:
        """Who announces which address, for all that should be announced; nobody is ""."""
        return frozenset((address, self._owner(address)) for address in self.claims.keys() | self.elected.keys())

    def _owner(self, address: Address) -> str:
        claim = self.claims.get(address)
        if claim is None or (claim.node == self.name and (self.leaving or self.elected.get(address) != self.name)):
            return ""
        return claim.node

    def applied(self, addresses: Iterable[Address]) -> None:
        """Say which addresses this node answers for from now on, where its fence is open."""
        self._applied = frozenset(addresses)

    def leave(self) -> None:
        """Give everything up."""
        self.leaving = True

    @property
    def left(self) -> bool:
        """Whether nothing is this node's any more."""
        return not self._mine() and not self._busy

    def _mine(self) -> frozenset[Address]:
        return frozenset(address for address, claim in self.claims.items() if claim.node == self.name)

    def _is_ours(self, addresses: Iterable[Address]) -> bool:
        claims = (self.claims.get(address) for address in addresses)
        return all(claim is not None and claim.node == self.name and not claim.successor for claim in claims)

    # --- the fence ---------------------------------------------------------------------------------------------------

    def is_certain(self, now: int) -> bool:
        """Tell whether nobody else can have taken what is this node's."""
        return now < min(self._certain, self.beats.strict_until)

    def fence(self, now: int) -> int:
        """Return until when this node may answer, ns."""
        if self._is_ours(self._applied):
            self._push(now)
        elif self._failing is None and not self.is_certain(now):
            self._until = min(self._until, now)
        return self._until

    def _push(self, now: int) -> None:
        lease = self.beats.strict_until  # when it ends, so may the claims
        read = (self._confirmed or -GRACE_NS) + GRACE_NS - _SLACK_NS
        if now < min(read, lease):
            self._certain = max(self._certain, min(read, lease))
        if self.is_certain(now):
            self._certain = max(self._certain, min(self.beats.promised(now), lease))
        kept = self._kept(now) if self._failing is not None else 0
        self._until = max(min(self._certain, lease), kept)

    def _kept(self, now: int) -> int:
        """Return until when to go on although the store is away, so that others may know better."""
        assert self._failing is not None
        promises = self.beats.promises()
        if not promises:
            return now + self.beats.timing.silence_ns if now - self._failing >= _AWAY_NS else 0
        return promises[(len(promises) + 1) // 2 - 1] if now < self._until else 0

    def must_read(self, now: int) -> bool:
        """Tell whether all claims should be read now, since promises do not suffice."""
        if not self._mine() and not self._applied:
            return False
        return not self.is_certain(now) or self.beats.promised(now) < now + _CONFIRM_NS


_SETTLE_NS = SECOND  # for the slowest of those that have taken over to hear that the node is back


@dataclass(slots=True)
class Trust:
    """The fence of a node without a store, where each node elects the owners by itself.

    It is open while half of the watchers that can be heard do not call the node silent; alone, while the node runs. One
    that was closed opens when all of them say so, or half of them have said so for ``_SETTLE_NS``. In two halves of a
    LAN that do not hear each other there are two owners, as MetalLB's; when they do again, one is left within a beat.
    """

    beats: Heartbeats
    _until: int = 1
    _half: int | None = None
    _alone: bool = False

    def fence(self, now: int) -> int:
        """Return until when this node may answer, ns."""
        promises = self.beats.promises()
        if not promises:
            self._alone, self._half = True, None
            self._until = now + self.beats.timing.silence_ns
            return self._until
        if self._alone:
            self._alone, self._until = False, min(self._until, now)
        until = promises[(len(promises) + 1) // 2 - 1]
        if until <= now:
            self._half = None
        elif self._half is None:
            self._half = now
        settled = self._half is not None and (promises[-1] > now or now - self._half >= _SETTLE_NS)
        if now < self._until or settled:
            self._until = max(self._until, until)
        return self._until
