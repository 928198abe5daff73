"""Heartbeats and ownership on the event loop: their datagrams, their timers, their store, and the fence in the tables.

What is decided is in control/heartbeat.py and control/ownership.py. Here a UDP socket at the node's address carries the
datagrams (as VXLAN's does: on a shared uplink it is the host's, on one of our own it is behind ``dp0``), one timer
ticks, and whatever has changed becomes a state of the node: `Node.amend` puts in who is silent and who owns what.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dataplane.batch import ANNOUNCE_UNTIL
from dataplane.control.election import elected
from dataplane.control.heartbeat import Datagram, Heartbeats, Timing
from dataplane.control.ownership import Claim, Owners, Ownership, Trust, Write
from dataplane.control.state import Address, DesiredState, Settings
from dataplane.node import Node

if TYPE_CHECKING:
    from dataplane.control.ownership_etcd import Claims

_DATAGRAM = 1024
_PER_TURN = 256  # datagrams that are read before packets have their turn again
_TOGETHER = 60  # writes in a transaction: etcd takes 128 operations
_FAREWELL_SECONDS = 0.5  # that a stopping node waits for others to take over
_AGAIN_NS = 1_000_000_000
_REREAD_NS = 80_000_000  # after a read that failed; less than a beat's interval, so that the next tick tries again
_UNSURE_SECONDS = 0.1  # until the next tick after one that failed, or without heartbeats
_URGENT = 0xC0  # class selector 6 (RFC 4594): what keeps the network going

log = logging.getLogger(__name__)


def open_failover(node: Node, settings: Settings) -> "Failover | None":
    """Return what makes others take over when a node dies; None where there are no others."""
    state = settings.state
    alone = settings.store.source == "static" and not state.peers
    if alone or state.uplink is None or (settings.store.source != "etcd" and not settings.heartbeat.port):
        return None
    return Failover(node, settings)


class Failover:
    """Beside the node: who is silent, who owns which address, and until when this node may answer.

    Args:
        node: Not started yet.
    """

    def __init__(self, node: Node, settings: Settings) -> None:
        given = settings.heartbeat
        interval = int(given.interval * 1e9)
        timing = Timing(interval, interval * given.misses, interval * given.misses)
        self._node = node
        self._port = given.port
        self.beats = Heartbeats(
            settings.state.node.name, time.time_ns(), _now(), timing, given.secret.encode(), strict_until=0
        )
        self.trust = Trust(self.beats)
        self.own: Ownership | None = None
        self._claims: Claims | None = None
        if settings.store.source == "etcd":
            self.own = Ownership(self.beats)
            self._store = settings.store
        self._value: tuple[frozenset[str], Owners | None] = (frozenset(), self.own.owners if self.own else None)
        self._seen: DesiredState | None = None
        self._elected_without: frozenset[str] | None = None
        self._members: frozenset[str] = frozenset()
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._following: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry_at = 0
        self._read_at = 0
        self._answers: frozenset[Address] = frozenset()  # what the tables may answer for
        self._owed = False  # a state was not applied, or not all of it
        self._due = False
        self._leaving = False
        self._ended = False
        self._reading = False
        self._open = False
        self._left = asyncio.Event()
        self._set_fence(1)
        node.amend(self._amended)

    # --- what the node becomes ---------------------------------------------------------------------------------------

    def _amended(self, state: DesiredState) -> DesiredState:
        silent, owners = self._value
        return replace(state, silent=silent, owners=state.owners if owners is None else owners)

    def _set_fence(self, until: int) -> None:
        self._node.tables.settings[ANNOUNCE_UNTIL] = max(until, 1)

    # --- start and end -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, after the node has started."""
        state = self._node.wiring.state
        assert state is not None
        if self._port and state.node.addresses:
            self._open_socket(str(state.node.addresses[0]))
        if self.own is not None:
            self._following = asyncio.ensure_future(self._follow_store())
        self._tick()

    def _open_socket(self, address: str) -> None:
        """Without a socket nobody promises this node anything: it answers only for what a store confirms each time."""
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _URGENT)
            made.bind((address, self._port))
        except OSError as error:
            made.close()
            log.error("no heartbeats: udp %s:%d: %s", address, self._port, os.strerror(error.errno or 0))
            return
        self._socket = made
        asyncio.get_running_loop().add_reader(made.fileno(), self._readable)

    async def stop(self) -> None:
        """Give up what this node owns, wait a moment until others have it, and be silent."""
        if self._timer is None:
            return  # it has not begun
        self._leaving = True
        self._set_fence(1)
        if self.own is not None:
            self.own.leave()
            self.own.applied(())
            self._turn()
            with suppress(TimeoutError):
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await self._left.wait()
        for _ in range(2):  # it may be lost; and packets that come by the old way are still forwarded meanwhile
            self._send(self.beats.leave())
            await asyncio.sleep(self.beats.timing.interval_ns / 1e9)
        self._ended = True
        self._timer.cancel()
        await self._end_tasks()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    async def _end_tasks(self) -> None:
        """End what runs beside; only a state that is being applied is waited for."""
        ending = [task for task in (self._following, *self._tasks) if task is not None]
        for task in ending:
            task.cancel()
        if self._refreshing is not None:
            ending.append(self._refreshing)
        for result in await asyncio.gather(*ending, return_exceptions=True):
            if isinstance(result, Exception):
                log.error("a task of failover has failed", exc_info=result)

    # --- heartbeats --------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        assert self._socket is not None
        silent = self.beats.silent
        for _ in range(_PER_TURN):
            try:
                data, source = self._socket.recvfrom(_DATAGRAM)
            except OSError:  # nothing more, or an ICMP error about something we sent
                break
            self._send(self.beats.received(data, source[0], _now()))
        if self.beats.silent != silent or self.beats.pursued:
            self._turn()
        else:
            self._guard(_now())  # a beat only lets us go on

    def _send(self, datagrams: list[Datagram]) -> None:
        if self._socket is None:
            return
        for address, data in datagrams:
            with suppress(OSError):  # a datagram that cannot be sent is one that is lost
                self._socket.sendto(data, (address, self._port))

    def _tick(self) -> None:
        due = _UNSURE_SECONDS
        try:
            if self._socket is not None:
                self._send(self.beats.tick(_now()))
            self._turn()
            if self._socket is not None:
                due = (self.beats.next_at - _now()) / 1e9
        finally:  # whatever has failed, beats go on: without them the others take over
            self._timer = asyncio.get_running_loop().call_later(max(due, 0.001), self._tick)

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Look at what has changed, decide, act."""
        now, state = _now(), self._node.wiring.state
        if state is None or self._ended:
            return
        if state is not self._seen:
            self._meet(state, now)
        if self.own is not None:
            self._elect(state)
            self._own(self.own, now)
        self._guard(now)
        if self.own is not None and self.own.leaving and self.own.left:
            self._left.set()
        if self._refreshing is None and now >= self._retry_at and (self._owed or self._wanted() != self._value):
            self._refreshing = asyncio.ensure_future(self._refresh())

    def _guard(self, now: int) -> None:
        """Move the fence, and announce everything anew when it has opened: others may have been believed meanwhile."""
        if self._leaving:
            return
        until = self.own.fence(now) if self.own is not None else self.trust.fence(now)
        self._set_fence(until)
        was, self._open = self._open, now < until
        if self._open and not was and self._node.underlay is not None:
            self._node.underlay.announce()

    def _meet(self, state: DesiredState, now: int) -> None:
        """Take over who is there."""
        self._seen, self._elected_without = state, None
        addresses = {peer.name: str(peer.address) for peer in state.peers} if self._port else {}
        members = self._members if self.own is not None and self._port else addresses
        self.beats.follow(addresses, members, now)

    def _elect(self, state: DesiredState) -> None:
        assert self.own is not None
        if self._elected_without != self.beats.silent:
            self._elected_without = self.beats.silent
            self.own.elected = elected(replace(state, silent=self.beats.silent))

    def _own(self, own: Ownership, now: int) -> None:
        writes = own.writes(now)
        for first in range(0, len(writes), _TOGETHER):
            self._spawn(self._write(own, writes[first : first + _TOGETHER]))
        if own.must_read(now) and not self._reading and now >= self._read_at and self._claims is not None:
            self._reading = True
            self._spawn(self._read())

    async def _refresh(self) -> None:
        """Make the node what is wanted now; what it answers for is said before it does, and after it no longer does."""
        before = self._value
        self._value = silent, owners = self._wanted()
        ours = _of(self.beats.name, owners)
        self._answer(self._answers | ours)
        try:
            errors = (await self._node.refresh())["errors"]
        except Exception as error:  # of whatever takes part in a state: others would never be replaced again
            log.exception("the node's state cannot be applied")
            errors = [repr(error)]
        if errors:
            log.warning("who is silent, and who owns what, is not applied: %s", "; ".join(errors))
            self._value, self._owed, self._retry_at = before, True, _now() + _AGAIN_NS
        else:
            self._owed = False
            self.beats.applied(silent)
            self._answer(ours)
            for peer in sorted(silent ^ before[0]):
                log.warning("node is %s name=%s", "silent" if peer in silent else "heard again", peer)
        self._refreshing = None
        asyncio.get_running_loop().call_soon(self._turn)

    def _answer(self, addresses: frozenset[Address]) -> None:
        """Note what the tables may answer for; what a leaving node has in them counts no more, its fence is closed."""
        self._answers = addresses
        if self.own is not None and not self.own.leaving:
            self.own.applied(addresses)

    def _wanted(self) -> tuple[frozenset[str], Owners | None]:
        return self.beats.silent, self.own.owners if self.own is not None else None

    # --- the store ---------------------------------------------------------------------------------------------------

    async def _follow_store(self) -> None:
        from dataplane.control.etcd import Etcd
        from dataplane.control.ownership_etcd import TIMEOUT, Claims

        etcd = Etcd(self._store.endpoints, TIMEOUT)
        self._claims = Claims(etcd, self._store.prefix, self.beats.name, _now)
        try:
            await self._claims.run(self)
        finally:
            self._claims = None
            await etcd.close()

    async def _write(self, own: Ownership, writes: Sequence[Write]) -> None:
        """Carry out writes together; if one of them cannot be, each alone."""
        from dataplane.control.etcd import EtcdError

        succeeded, revision = False, 0
        try:
            if self._claims is not None:
                succeeded, revision = await self._claims.write(writes)
                if not succeeded and len(writes) > 1:
                    for write in writes:
                        await self._write(own, [write])
                    return
        except EtcdError:
            own.failed(_now())
        now = _now()
        for write in writes:
            self._send(own.done(write, succeeded, revision, now))
        self._turn()

    async def _read(self) -> None:
        from dataplane.control.etcd import EtcdError

        try:
            if self._claims is not None:
                await self._claims.read(self)
        except EtcdError:
            self._read_at = _now() + _REREAD_NS
            self.store_failed()
        finally:
            self._reading = False
        self._turn()

    def claims_read(self, claims: dict[Address, Claim], revision: int, began: int) -> None:
        """Take over all claims."""
        assert self.own is not None
        self.own.read(claims, revision, began, _now())
        self._soon()

    def claim_changed(self, address: Address, claim: Claim | None, revision: int) -> None:
        """Take over one claim."""
        assert self.own is not None
        self.own.changed(address, claim, revision, _now())
        self._soon()

    def members_changed(self, members: frozenset[str]) -> None:
        """Take over who is a member."""
        self._members, self._seen = members, None
        self._soon()

    def lease_kept(self, lease: int, until: int) -> None:
        """Take over the node's lease."""
        assert self.own is not None
        self.own.lease, self.beats.strict_until = lease, until
        self._soon()

    def store_failed(self) -> None:
        """Note that the store did not answer."""
        assert self.own is not None
        self.own.failed(_now())
        self._soon()

    def _soon(self) -> None:
        """Decide when everything has been taken over that has come at once: a hundred claims make one decision."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._decide)

    def _decide(self) -> None:
        self._due = False
        self._turn()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _of(name: str, owners: Owners | None) -> frozenset[Address]:
    return frozenset(address for address, node in owners or () if node == name)


def _now() -> int:
    return time.monotonic_ns()
