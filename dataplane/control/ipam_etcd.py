"""The books of addresses in etcd: blocks, affinities and pools of all nodes, under the prefix of the cluster's state.

One object is one node's allocator. It does one thing at a time, so that fifty pods that come at once fill a block and
do not claim fifty. What its handles hold it remembers; after an error, when it is not known whether etcd has carried
out the last swap, it reads the books again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from dataplane.control.etcd import Compare, Delete, Etcd, EtcdError, KeyValue, Put, UnavailableError
from dataplane.control.etcd import Get as EtcdGet
from dataplane.control.ipam import Allocation, Block, IpamError, NoAddressError, Pool, Rules, TakenError
from dataplane.control.ipam_engine import Allocator
from dataplane.control.ipam_json import BookError, dump, dump_pool, load, load_pool
from dataplane.control.ipam_store import Get, Keys, List, Operation, Result, Steps, Stored
from dataplane.control.state import Address, Labels, Network

POOLS = "ippools/"
_CHUNK = 8  # blocks: together 3 ms

log = logging.getLogger(__name__)


class EtcdAddresses:
    """``Addresses`` out of blocks in etcd.

    Args:
        etcd: The cluster; it stays the caller's.
        prefix: Of all keys, without a slash at its end.
        node: This node's name.
        rules: Those of the node's file. Its pools are written to etcd where that has none; else etcd's are used.
    """

    def __init__(self, etcd: Etcd, prefix: str, node: str, rules: Rules, labels: Labels = ()) -> None:
        self._etcd = etcd
        self._prefix = f"{prefix}/"
        self._allocator = Allocator(node, replace(rules, pools=()), labels)
        self._file_pools = rules.pools
        self._pools_known = False
        self._held: dict[str, Address] | None = None
        self._doubtful: set[str] = set()
        self._complained: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._silent = (0.0, "")  # when etcd did not answer the last time, and what there is to say

    @property
    def rules(self) -> Rules:
        """The rules in force, with etcd's pools."""
        return self._allocator.rules

    # --- addresses ---------------------------------------------------------------------------------------------------

    async def assign(
        self, handle: str, now: float, requested: Address | None = None, attributes: Mapping[str, str] | None = None
    ) -> Address:
        """Return the handle's address, a new one if it has none (``Addresses.assign``)."""
        async with self._alone():
            mine = (await self._known()).get(handle)
            if mine is not None and await self._carry_out(self._allocator.holds(handle, mine)):
                if requested not in (None, mine):
                    raise TakenError(f"{handle} has address {mine} already (asked for {requested})")
                self._doubtful.discard(handle)
                return mine
            labels = tuple(sorted((attributes or {}).items()))
            try:
                address = await self._take(handle, now, requested, labels)
            except IpamError:
                if self._held is None:  # etcd may have carried it out
                    self._doubtful.add(handle)
                raise
            assert self._held is not None
            self._held[handle] = address
            self._doubtful.discard(handle)
            return address

    async def _take(self, handle: str, now: float, requested: Address | None, labels: Labels) -> Address:
        """Take an address; where there is none look whether the pools have changed."""
        await self._read_pools(only_once=True)
        try:
            return await self._carry_out(self._assignment(handle, now, requested, labels))
        except NoAddressError:
            before = self.rules
            await self._read_pools()
            if self.rules == before:
                raise
        return await self._carry_out(self._assignment(handle, now, requested, labels))

    def _assignment(self, handle: str, now: float, requested: Address | None, labels: Labels) -> Steps[Address]:
        if requested is None:
            return self._allocator.assign(handle, now, labels)
        return self._allocator.assign_requested(requested, handle, now, labels)

    async def release(self, handle: str, now: float) -> None:
        """Take back what the handle holds (``Addresses.release``)."""
        async with self._alone():
            await self._release(handle, now)

    async def _release(self, handle: str, now: float) -> None:
        address = (await self._known()).get(handle)
        if address is not None:
            await self._carry_out(self._allocator.release_address(address, now, handle))
            assert self._held is not None
            del self._held[handle]
        self._doubtful.discard(handle)

    async def held(self) -> Mapping[str, Address]:
        """Return what is held (``Addresses.held``); once it is known, etcd is only asked whether it is there."""
        async with self._alone():
            if self._held is not None:
                await self._carry_out(self._allocator.own())
            return dict(await self._known())

    async def _known(self) -> dict[str, Address]:
        if self._held is None:
            self._held = await self._carry_out(self._allocator.held())
        return self._held

    # --- blocks ------------------------------------------------------------------------------------------------------

    async def claim_first_block(self, now: float) -> Network:
        """Return the node's first block, whose first address is its tunnel address; claim one if it has none.

        Raises:
            IpamError: No pool has a block for this node, or etcd cannot be reached.
        """
        async with self._alone():
            await self._read_pools()
            return await self._carry_out(self._allocator.claim_first_block(now))

    async def tidy(self, now: float) -> tuple[Network, ...]:
        """Give back blocks that are not used, and addresses of which it was not known that they were given out.

        Returns:
            The blocks that were given back.
        """
        async with self._alone():
            await self._read_pools()
            for handle in tuple(self._doubtful):
                await self._release(handle, now)
            return await self._carry_out(self._allocator.give_back(now))

    async def release_address(self, address: Address, seen: Allocation, now: float) -> bool:
        """Take back an address (``Books.release_address``)."""
        async with self._alone():
            steps = self._allocator.release_address(address, now, seen.handle, seen.sequence)
            released = await self._carry_out(steps) is not None
            self._held = None
            return released

    async def forget(self, node: str, now: float) -> tuple[Address, ...]:
        """Take back what a node has (``Books.forget``)."""
        async with self._alone():
            addresses = await self._carry_out(self._allocator.forget(node, now))
            self._held = None
            return addresses

    async def look(self) -> tuple[Rules, tuple[Block, ...]]:
        """Return the rules in force and all blocks of the cluster (``Books.look``)."""
        async with self._alone():
            await self._read_pools()
            return self.rules, await self._carry_out(self._allocator.blocks())

    # --- etcd --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Wait for one's turn; whoever waited while etcd did not answer need not ask it once more."""
        began = asyncio.get_running_loop().time()
        async with self._turn:
            if self._silent[0] > began:
                raise IpamError(self._silent[1])
            yield

    def _failure(self, error: EtcdError) -> IpamError:
        failure = IpamError(f"etcd: {error}")
        if isinstance(error, UnavailableError):
            self._silent = asyncio.get_running_loop().time(), str(failure)
        return failure

    async def _read_pools(self, only_once: bool = False) -> None:
        """Take the pools from etcd; where it has none, those of the file are written first."""
        if only_once and self._pools_known:
            return
        try:
            found = (await self._etcd.range(self._prefix + POOLS)).items
            if not found and self._file_pools:
                keys = {f"{self._prefix}{POOLS}{pool.name}": pool for pool in self._file_pools}
                await self._etcd.txn(
                    [Compare(key, "create_revision", 0) for key in keys],
                    [Put(key, dump_pool(pool)) for key, pool in keys.items()],
                )
                found = (await self._etcd.range(self._prefix + POOLS)).items
        except EtcdError as error:
            raise self._failure(error) from None
        pools = [pool for item in found for pool in self._pool(item)]
        self._allocator.rules = replace(self._allocator.rules, pools=tuple(pools))
        self._pools_known = True

    def _pool(self, item: KeyValue) -> Sequence[Pool]:
        try:
            return [load_pool(item.key.removeprefix(self._prefix + POOLS), item.value)]
        except BookError as error:
            self._complain(item, error)
            return []

    async def _carry_out(self, steps: Steps[Result]) -> Result:
        """Carry out a transaction; after an error nothing is known of what is held."""
        answer: Any = None
        try:
            while True:
                try:
                    operation = steps.send(answer)
                except StopIteration as done:
                    result: Result = done.value
                    return result
                answer = await self._answer(operation)
        except EtcdError as error:
            self._held = None
            raise self._failure(error) from None
        except asyncio.CancelledError:
            self._held = None
            raise

    async def _answer(self, operation: Operation) -> Any:
        if isinstance(operation, Get):
            txn = await self._etcd.txn([], [EtcdGet(self._prefix + key) for key in operation.keys])
            return tuple(self._stored(item) if item else None for item in txn.responses)
        if isinstance(operation, List):
            return await self._list(self._prefix + operation.prefix)
        if isinstance(operation, Keys):
            found = await self._etcd.range(self._prefix + operation.prefix, keys_only=True)
            return tuple(item.key.removeprefix(self._prefix) for item in found.items)
        key = self._prefix + operation.key
        write = Put(key, dump(operation.value)) if operation.value is not None else Delete(key)
        return (await self._etcd.txn([Compare(key, "mod_revision", operation.revision)], [write])).succeeded

    async def _list(self, prefix: str) -> tuple[Stored, ...]:
        """Return what is there; packets have their turn while hundreds of blocks are read."""
        listed = []
        for number, item in enumerate((await self._etcd.range(prefix, heavy=prefix)).items, 1):
            listed.append(self._stored(item))
            if number % _CHUNK == 0:
                await asyncio.sleep(0)
        return tuple(listed)

    def _stored(self, item: KeyValue) -> Stored:
        key = item.key.removeprefix(self._prefix)
        try:
            return Stored(key, load(key, item.value), item.mod_revision)
        except BookError as error:
            self._complain(item, error)
            return Stored(key, None, item.mod_revision)

    def _complain(self, item: KeyValue, error: BookError) -> None:
        """Say once of each broken entry that it is left alone."""
        if self._complained.get(item.key) != item.mod_revision:
            self._complained[item.key] = item.mod_revision
            log.error("ipam: left alone: %s: %s", item.key, error)
