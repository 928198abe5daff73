"""Claims to load balancer addresses in etcd: ``owners/<address>``, and the leases of ``members/<name>``.

A claim is ``{"node": "node1"}``, with its owner's lease; while somebody wants to take it, also ``"successor"``. A claim
without a node and without a lease was given up. The lease is the one that the node's own member key has, whoever keeps
it: here it is only asked how long it lasts, and kept a little more often, since a node that is not sure of its lease is
not sure of its addresses.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from ipaddress import ip_address
from typing import Protocol

from dataplane.control.etcd import (
    CompactedError,
    Compare,
    Delete,
    Etcd,
    EtcdError,
    KeyValue,
    LeaseGoneError,
    Operation,
    Put,
)
from dataplane.control.ownership import Claim, Write
from dataplane.control.state import Address

TIMEOUT = 1.0  # of a request: what takes longer is no answer
_RETRY_SECONDS = 0.2
_KEEP_PART = 5  # of a lease's time, between two times that it is kept

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told what etcd says."""

    def claims_read(self, claims: dict[Address, Claim], revision: int, began: int) -> None:
        """All claims, as a read found them that was begun at this time, ns."""

    def claim_changed(self, address: Address, claim: Claim | None, revision: int) -> None:
        """One claim has changed."""

    def members_changed(self, members: frozenset[str]) -> None:
        """These nodes are members now."""

    def lease_kept(self, lease: int, until: int) -> None:
        """The node's lease lasts until then at least; with lease 0 it has none."""

    def store_failed(self) -> None:
        """A request was not answered."""


class Claims:
    """The claims, followed.

    Args:
        etcd: A client with short time-outs.
        prefix: Of all keys.
        name: This node's.
        clock: Nanoseconds of the clock that the listener uses.
    """

    def __init__(self, etcd: Etcd, prefix: str, name: str, clock: Callable[[], int]) -> None:
        self._etcd = etcd
        self._owners, self._members = f"{prefix}/owners/", f"{prefix}/members/"
        self._name = name
        self._clock = clock
        self._leases: dict[str, int] = {}
        self._broken: set[str] = set()
        self._met = asyncio.Event()

    async def run(self, listener: Listener) -> None:
        """Follow claims, members and the lease until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(lambda: self._follow_claims(listener), listener))
            group.create_task(self._again(lambda: self._follow_members(listener), listener))
            group.create_task(self._again(lambda: self._keep_lease(listener), listener))

    async def _again(self, work: Callable[[], Awaitable[None]], listener: Listener) -> None:
        """Do the work anew whenever etcd has failed or forgotten."""
        while True:
            try:
                await work()
            except CompactedError:
                continue
            except EtcdError as error:
                log.debug("claims cannot be followed: %s", error)
                listener.store_failed()
                await asyncio.sleep(_RETRY_SECONDS)

    async def read(self, listener: Listener) -> int:
        """Read all claims; return the revision that they are of.

        Raises:
            EtcdError: They cannot be read.
        """
        began = self._clock()
        found = await self._etcd.range(self._owners)
        claims = dict(pair for item in found.items if (pair := self._claim(item)) is not None)
        listener.claims_read({address: claim for address, claim in claims.items() if claim}, found.revision, began)
        return found.revision

    async def _follow_claims(self, listener: Listener) -> None:
        revision = await self.read(listener)
        async with aclosing(self._etcd.watch(self._owners, revision + 1)) as watch:
            async for news in watch:
                for item in news.events:
                    if (pair := self._claim(item)) is not None:
                        listener.claim_changed(*pair, item.mod_revision)

    async def _follow_members(self, listener: Listener) -> None:
        found = await self._etcd.range(self._members)
        self._leases.clear()
        self._meet(found.items, listener)
        async with aclosing(self._etcd.watch(self._members, found.revision + 1)) as watch:
            async for news in watch:
                if news.events:
                    self._meet(news.events, listener)

    def _meet(self, items: Iterable[KeyValue], listener: Listener) -> None:
        for item in items:
            name = item.key.removeprefix(self._members)
            self._leases.pop(name, None)
            if not item.deleted:
                self._leases[name] = item.lease
        self._met.set()
        listener.members_changed(frozenset(self._leases))

    async def _keep_lease(self, listener: Listener) -> None:
        """Keep the lease that the member's key has, each time that it is due or is another."""
        while True:
            lease = self._leases.get(self._name, 0)
            began = self._clock()
            left = await self._keep(lease) if lease else 0
            listener.lease_kept(lease if left else 0, began + left * 1_000_000_000 if left else 0)
            self._met.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left / _KEEP_PART or _RETRY_SECONDS):
                    while self._leases.get(self._name, 0) == lease:
                        await self._met.wait()
                        self._met.clear()

    async def _keep(self, lease: int) -> int:
        try:
            return await self._etcd.keep_alive(lease)
        except LeaseGoneError:
            return 0

    def _claim(self, item: KeyValue) -> tuple[Address, Claim | None] | None:
        """Return what a key says; None for one that makes no sense, which is named once."""
        try:
            address = ip_address(item.key.removeprefix(self._owners))
            if item.deleted:
                return address, None
            value = json.loads(item.value)
            node, successor = value["node"], value.get("successor", "")
            if not isinstance(node, str) or not isinstance(successor, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            if item.key not in self._broken:
                self._broken.add(item.key)
                log.error("skipped, since it is no claim to an address: key=%s", item.key)
            return None
        return address, Claim(node, successor, item.mod_revision, item.lease)

    async def write(self, writes: Sequence[Write]) -> tuple[bool, int]:
        """Carry out all of these in one transaction, or none; return whether it was done, and its revision.

        Raises:
            EtcdError: Whether it was done is not known.
        """
        operations = [self._operation(write) for write in writes]
        compares = [Compare(self._key(write), "mod_revision", write.revision) for write in writes]
        try:
            done = await self._etcd.txn(compares, operations)
        except LeaseGoneError:
            return False, 0
        return done.succeeded, done.revision

    def _key(self, write: Write) -> str:
        return f"{self._owners}{write.address}"

    def _operation(self, write: Write) -> Operation:
        claim = write.claim
        if claim is None:
            return Delete(self._key(write))
        value = {"node": claim.node} | ({"successor": claim.successor} if claim.successor else {})
        return Put(self._key(write), json.dumps(value), claim.lease)
