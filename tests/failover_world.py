"""Several nodes, a store and a LAN in simulated time, for tests of who answers for an address.

Everything a real node waits for takes a random time here: datagrams, the store's answers, its news, and until a new
state is applied. Nodes can be stopped, killed and started again, and cut off from the LAN and from the store. A node
that is stopped does nothing, but it goes on to answer as its last tables say as soon as it runs again: `answering` is
asked before it has had any turn.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from itertools import count

from dataplane.control.election import winner
from dataplane.control.heartbeat import Heartbeats
from dataplane.control.ownership import Claim, Ownership, Write
from dataplane.control.state import Address

MS = 1_000_000
SECOND = 1000 * MS
TTL = 3 * SECOND
TIMEOUT = SECOND
ADDRESSES = tuple(IPv4Address(f"192.0.2.{200 + number}") for number in range(3))


@dataclass
class Store:
    """What etcd holds: claims, members, leases."""

    revision: int = 1
    claims: dict[Address, Claim] = field(default_factory=dict)
    members: dict[str, int] = field(default_factory=dict)  # name to lease
    leases: dict[int, int] = field(default_factory=dict)  # to when it ends
    numbers: "count[int]" = field(default_factory=lambda: count(100))
    log: list[tuple[int, Address | None, Claim | None, frozenset[str]]] = field(default_factory=list)

    def note(self, address: Address | None = None) -> int:
        """Begin a new revision, in which a claim or the members have changed."""
        self.revision += 1
        if address is not None and address in self.claims:
            self.claims[address] = self.claims[address]._replace(revision=self.revision)
        claim = self.claims.get(address) if address is not None else None
        self.log.append((self.revision, address, claim, frozenset(self.members)))
        return self.revision


class Site:
    """One node. What it does, it does in `World.later` callbacks, which wait while it is stopped."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.beats = Heartbeats(name, 1 + world.now, world.now)
        self.own = Ownership(self.beats)
        self.fence = 1
        self.answers: frozenset[Address] = frozenset()
        self.alive, self.stopped = True, False
        self.waiting: list[Callable[[], None]] = []
        self.applying = self.reading = False
        self.owners: object = None
        self.members: frozenset[str] = frozenset({name})
        self.watching, self.seen = False, 0
        self.join()
        self.tick()

    # --- the node's loop ---------------------------------------------------------------------------------------------

    def turn(self) -> None:
        now = self.world.now
        candidates = (self.members | {self.name}) - self.beats.silent
        self.own.elected = {address: winner(candidates, address) or "" for address in ADDRESSES}
        for write in self.own.writes(now):
            self.world.ask(self, self.carry_out(write), self.done(write))
        if self.own.must_read(now) and not self.reading:
            self.read()
        self.fence = self.own.fence(now)
        if self.own.owners != self.owners and not self.applying:
            self.apply()

    def tick(self) -> None:
        self.send(self.beats.tick(self.world.now))
        self.turn()
        self.world.later(self, max(self.beats.next_at - self.world.now, MS), self.tick)

    def send(self, datagrams: list[tuple[str, bytes]]) -> None:
        for target, data in datagrams:
            self.world.carry(self.name, target, data)

    def hear(self, data: bytes, source: str) -> None:
        self.send(self.beats.received(data, source, self.world.now))
        self.turn()

    def apply(self) -> None:
        self.applying, self.owners = True, self.own.owners
        wanted = frozenset(address for address, node in self.own.owners if node == self.name)
        self.own.applied(self.answers | wanted)

        def commit() -> None:
            self.answers = wanted
            self.world.later(self, self.world.between(0, 20), finish)

        def finish() -> None:
            self.own.applied(wanted)
            self.applying = False
            self.turn()

        self.world.later(self, self.world.between(0, 20), commit)

    # --- the store ---------------------------------------------------------------------------------------------------

    def join(self) -> None:
        def grant(store: Store) -> object:
            lease = next(store.numbers)
            store.leases[lease] = self.world.now + TTL
            store.members[self.name] = lease
            store.note()
            self.world.news()
            return lease, dict(store.claims), store.revision, frozenset(store.members)

        began = self.world.now

        def joined(answer) -> None:
            if answer is None:
                self.world.later(self, 300 * MS, self.join)
                return
            self.own.lease, claims, revision, members = answer
            self.beats.strict_until = began + TTL
            self.own.read(claims, revision, began, self.world.now)
            self.watching, self.seen = True, revision
            self.meet(members)
            self.catch_up()
            self.world.later(self, SECOND, self.keep_alive)

        self.world.ask(self, grant, joined)

    def keep_alive(self) -> None:
        lease, began = self.own.lease, self.world.now

        def renew(store: Store) -> object:
            if lease in store.leases:
                store.leases[lease] = self.world.now + TTL
            return lease in store.leases

        def renewed(answer) -> None:
            if answer is False:
                self.own.lease, self.beats.strict_until = 0, 0
                self.join()
                return
            if answer is None:
                self.own.failed(self.world.now)
            else:
                self.beats.strict_until = began + TTL
                if not self.watching:
                    self.watching = True
                    self.catch_up()
            self.world.later(self, SECOND, self.keep_alive)

        self.world.ask(self, renew, renewed)

    def read(self) -> None:
        began, self.reading = self.world.now, True

        def answered(answer) -> None:
            self.reading = False
            if answer is None:
                self.own.failed(self.world.now)
            else:
                claims, revision = answer
                self.own.read(claims, revision, began, self.world.now)
            self.turn()

        self.world.ask(self, lambda store: (dict(store.claims), store.revision), answered)

    def carry_out(self, write: Write) -> Callable[[Store], object]:
        def execute(store: Store) -> object:
            held = store.claims.get(write.address)
            lease = write.claim.lease if write.claim is not None else 0
            if (held.revision if held else 0) != write.revision or (lease and lease not in store.leases):
                return False, 0
            if write.claim is None:
                store.claims.pop(write.address, None)
            else:
                store.claims[write.address] = write.claim
            self.world.news()
            return True, store.note(write.address)

        return execute

    def done(self, write: Write) -> Callable[[object], None]:
        def answered(answer) -> None:
            succeeded, revision = answer or (False, 0)
            if answer is None:
                self.own.failed(self.world.now)
            self.send(self.own.done(write, succeeded, revision, self.world.now))
            self.turn()

        return answered

    def catch_up(self) -> None:
        """Hear what has happened in the store since, in order."""
        for revision, address, claim, members in self.world.store.log:
            if revision > self.seen:
                self.seen = revision
                if address is None:
                    self.meet(members)
                else:
                    self.own.changed(address, claim, revision, self.world.now)
        self.turn()

    def meet(self, members: frozenset[str]) -> None:
        self.members = members
        self.beats.follow({name: name for name in self.world.names if name != self.name}, members, self.world.now)
        self.turn()


class World:
    """The nodes ``n1``..; after every event `rule` is asked who answers."""

    def __init__(self, nodes: int, seed: int, rule: Callable[["World"], None] = lambda world: None) -> None:
        self.now = 10 * SECOND
        self.random = random.Random(seed)
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.store = Store()
        self.cut: set[tuple[str, str]] = set()  # datagrams from, to
        self.away: dict[str, int] = {}  # nodes that do not reach the store, since when
        self.slow = 1
        self.back: dict[str, int] = {}
        self.rule = rule
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self.sites: dict[str, Site] = {}
        for name in self.names:
            self.start(name)
        self._expire()

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low * MS, high * MS)

    # --- events ------------------------------------------------------------------------------------------------------

    def at(self, when: int, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), call))

    def later(self, site: Site, delay: int, call: Callable[[], None]) -> None:
        def event() -> None:
            if site.alive and site.stopped:
                site.waiting.append(call)
            elif site.alive:
                call()

        self.at(self.now + delay, event)

    def run(self, duration: int) -> None:
        end = self.now + duration
        while self._queue and self._queue[0][0] <= end:
            self.now, _, call = heapq.heappop(self._queue)
            call()
            self.rule(self)
        self.now = end

    # --- what happens ------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        if name not in self.sites or not self.sites[name].alive:
            self.sites[name] = Site(self, name)

    def kill(self, name: str) -> None:
        self.sites[name].alive = False

    def stop(self, name: str) -> None:
        self.sites[name].stopped = True

    def go_on(self, name: str) -> None:
        site = self.sites[name]
        if not site.stopped:
            return
        site.stopped = False
        self.rule(self)
        waiting, site.waiting = site.waiting, []
        for call in waiting:
            self.later(site, 0, call)

    def part(self, name: str, others: tuple[str, ...]) -> None:
        for other in others:
            self.cut |= {(name, other), (other, name)}

    def deafen(self, name: str, other: str) -> None:
        """Lose what goes from the other to the one, in this direction only."""
        self.cut.add((other, name))

    def lose_store(self, name: str) -> None:
        self.away.setdefault(name, self.now)

    def find_store(self, name: str) -> None:
        if self.away.pop(name, None) is not None:
            self.back[name] = self.now

    def heal(self) -> None:
        self.cut.clear()
        for name in self.names:
            self.find_store(name)
            self.go_on(name)
            self.start(name)
        self.slow = 1

    # --- the LAN and the store ---------------------------------------------------------------------------------------

    def carry(self, source: str, target: str, data: bytes) -> None:
        def arrive() -> None:
            if (source, target) not in self.cut and self.sites[target].alive:
                site = self.sites[target]
                self.later(site, 0, lambda: site.hear(data, source))

        if (source, target) not in self.cut and self.random.random() > 0.01:
            self.at(self.now + self.random.randint(MS // 10, 5 * MS), arrive)

    def ask(self, site: Site, execute: Callable[[Store], object], answered: Callable[[object], None]) -> None:
        """Have the store do something; the answer is None when it could not be had, whether it was done or not."""
        answer: list[object] = []
        finished = [False]

        def finish() -> None:
            if not finished[0]:
                finished[0] = True
                answered(answer[0] if answer else None)

        def arrive() -> None:
            if site.name in self.away:
                return
            value = execute(self.store)

            def back() -> None:
                if site.name not in self.away:
                    answer.append(value)
                    self.later(site, 0, finish)

            self.at(self.now + self.between(1, 5) * self.slow, back)

        self.at(self.now + self.between(1, 5) * self.slow, arrive)
        self.later(site, TIMEOUT, finish)

    def news(self) -> None:
        """Tell all nodes that watch that something has happened."""
        for site in self.sites.values():
            self.at(self.now + self.between(1, 8) * self.slow, partial(self._tell, site))

    def _tell(self, site: Site) -> None:
        if site.name in self.away:
            site.watching = False
        elif site.watching:
            self.later(site, 0, site.catch_up)

    def _expire(self) -> None:
        for lease, end in list(self.store.leases.items()):
            if end <= self.now:
                del self.store.leases[lease]
                for address in [address for address, claim in self.store.claims.items() if claim.lease == lease]:
                    del self.store.claims[address]
                    self.store.note(address)
                for name in [name for name, held in self.store.members.items() if held == lease]:
                    del self.store.members[name]
                    self.store.note()
                self.news()
        self.at(self.now + 100 * MS, self._expire)

    # --- what is looked at -------------------------------------------------------------------------------------------

    def answering(self, address: IPv4Address) -> list[str]:
        """The nodes that would answer a request for an address now."""
        return [
            site.name
            for site in self.sites.values()
            if site.alive and not site.stopped and address in site.answers and self.now < site.fence
        ]

    def reaches_store(self, name: str) -> bool:
        """Whether a node has reached the store long enough to know what it says."""
        return name not in self.away and self.now - self.back.get(name, 0) > 2 * SECOND

    def is_certain(self, name: str) -> bool:
        """Whether a node believes that nobody else can have taken what it has."""
        return self.sites[name].own.is_certain(self.now)
