"""Giving out addresses by compare-and-swap, whatever the store.

**Why no address is given twice.** An address is in one block, and a block is changed only by a swap that names the
revision that was read. Of two nodes that read the same block one writes first, and the other one reads again.

A handle is not an index: what it holds is found in the node's own blocks, else by a look at all blocks. So there is
nothing beside the blocks that a crash could leave wrong.
"""

from dataclasses import replace

from dataplane.control.ipam import (
    TUNNEL,
    Allocation,
    Block,
    NoAddressError,
    TakenError,
    allocated,
    cooled,
    first_free,
    freed,
)
from dataplane.control.ipam_claims import Claims, Held, held_of, next_number
from dataplane.control.ipam_store import (
    RETRIES,
    Get,
    List,
    Steps,
    Swap,
    affinities_prefix,
    block_key,
    busy,
)
from dataplane.control.state import Address, Labels, Network


class Allocator(Claims):
    """What one node wants of the store."""

    def assign(self, handle: str, now: float, attributes: Labels = ()) -> Steps[Address]:
        """Take an address: out of an own block, else of a new one, else of another node's.

        Raises:
            NoAddressError: Nothing is free.
        """
        allocation = Allocation(handle, self.node, attributes=attributes)
        pools = list(self._pools())
        own = yield from self._own()
        for held in own:
            if any(pool.holds(held.block.cidr) for pool in pools):
                address = yield from self._take(held, allocation, now)
                if address is not None:
                    return address
        if len(own) < self.rules.max_blocks:
            fresh = yield from self._claim(next_number(own), now)
            address = (yield from self._take(fresh, allocation, now)) if fresh else None
            if address is not None:
                return address
        if not self.rules.strict_affinity:
            address = yield from self._borrow(allocation, now)
            if address is not None:
                return address
        raise NoAddressError(self._why(len(own)))

    def assign_requested(self, address: Address, handle: str, now: float, attributes: Labels = ()) -> Steps[Address]:
        """Take this address; the block around it is claimed if it does not exist.

        Raises:
            TakenError: It is somebody's, reserved, cooling down, or (with strict affinity) another node's.
            NoAddressError: No pool of this node has it, or the node may not claim its block.
        """
        pool = next((pool for pool in self._pools() if address in pool.cidr), None)
        if pool is None:
            raise NoAddressError(f"address {address} is in no pool of node {self.node}")
        if self.rules.reserved(address):
            raise TakenError(f"address {address} is reserved")
        allocation = Allocation(handle, self.node, attributes=attributes)
        cidr = pool.block_at(pool.index_of(address))
        for _ in range(RETRIES):
            held = yield from self._around(address)
            if held is None:
                yield from self._claim_around(address, cidr, now)
                continue
            if self.rules.strict_affinity and held.block.affinity != self.node:
                raise TakenError(f"address {address} is in a block of node {held.block.affinity or '(none)'}")
            block = cooled(held.block, now, self.rules.cooldown)
            block = allocated(block, block.ordinal(address), allocation)
            if (yield Swap(block_key(block.cidr), held.revision, block)):
                return address
        raise busy()

    def release(self, handle: str, now: float) -> Steps[tuple[Address, ...]]:
        """Take back whatever a handle has, wherever it is; return what that was."""
        own = yield from self._own()
        found = _places(own, handle)
        if not found:
            everything = yield from self._all()
            found = _places(everything, handle)
        released = []
        for address in found:  # no comprehension: those cannot yield
            if (yield from self.release_address(address, now, handle)):
                released.append(address)  # noqa: PERF401
        return tuple(released)

    def release_address(
        self, address: Address, now: float, handle: str = "", sequence: int | None = None
    ) -> Steps[Allocation | None]:
        """Take an address back; return whose it was, None if it was nobody's.

        With a handle only if that holds it; with a sequence only if it was given out at this one: not if it has had
        another use since.
        """
        for _ in range(RETRIES):
            held = yield from self._around(address)
            if held is None:
                return None
            block = cooled(held.block, now, self.rules.cooldown)
            allocation = block.allocations.get(block.ordinal(address))
            if allocation is None or (handle and allocation.handle != handle):
                return None
            if sequence is not None and allocation.sequence != sequence:
                return None
            if (yield Swap(block_key(block.cidr), held.revision, freed(block, block.ordinal(address), now))):
                return allocation
        raise busy()

    def held(self) -> Steps[dict[str, Address]]:
        """Return what handles of this node hold, here and borrowed, without its tunnel address."""
        everything = yield from self._all()
        return {
            allocation.handle: held.block.address(ordinal)
            for held in everything
            for ordinal, allocation in held.block.allocations.items()
            if allocation.node == self.node and not allocation.handle.startswith(TUNNEL)
        }

    def holds(self, handle: str, address: Address) -> Steps[bool]:
        """Return whether a handle still has an address: somebody may have released it by hand."""
        held = yield from self._around(address)
        return held is not None and held.block.find(handle) == held.block.ordinal(address)

    def own(self) -> Steps[tuple[Block, ...]]:
        """Return the node's blocks, the first with its tunnel address."""
        own = yield from self._own()
        return tuple(held.block for held in own)

    def blocks(self) -> Steps[tuple[Block, ...]]:
        """Return all blocks, whosever they are."""
        everything = yield from self._all()
        return tuple(held.block for held in everything)

    def forget(self, node: str, now: float) -> Steps[tuple[Address, ...]]:
        """Release all that a node has which will not come back, its tunnel address and its blocks too."""
        addresses: list[Address] = []
        everything = yield from self._all()
        for held in everything:
            for ordinal, allocation in held.block.allocations.items():
                address = held.block.address(ordinal)
                if allocation.node != node:
                    continue
                if (yield from self.release_address(address, now, allocation.handle, allocation.sequence)):
                    addresses.append(address)
        everything = yield from self._all()
        for held in everything:
            yield from self._disown(held, node, now)
        for stored in (yield List(affinities_prefix(node))):
            yield Swap(stored.key, stored.revision, None)
        return tuple(addresses)

    # --- what transactions are made of -------------------------------------------------------------------------------

    def _around(self, address: Address) -> Steps[Held | None]:
        """Return the block that has an address: where the pools say, else wherever it is."""
        keys = tuple(
            block_key(pool.block_at(pool.index_of(address))) for pool in self.rules.pools if address in pool.cidr
        )
        for found in (yield Get(keys)) if keys else ():
            held = held_of(found)
            if held is not None:
                return held
        everything = yield from self._all()
        return next((held for held in everything if address in held.block.cidr), None)

    def _disown(self, held: Held | None, node: str, now: float) -> Steps[None]:
        """Take a block from its node; one in which others have addresses is nobody's until somebody claims it."""
        for _ in range(RETRIES):
            if held is None or held.block.affinity != node:
                return
            block = cooled(held.block, now, self.rules.cooldown)
            left = None if block.empty else replace(block, affinity="", number=0, sequence=block.sequence + 1)
            if (yield Swap(block_key(block.cidr), held.revision, left)):
                return
            (found,) = yield Get((block_key(block.cidr),))
            held = held_of(found)
        raise busy()

    def _claim_around(self, address: Address, cidr: Network, now: float) -> Steps[None]:
        own = yield from self._own()
        if len(own) >= self.rules.max_blocks:
            raise NoAddressError(f"address {address} needs a new block, and {self._limit(len(own))}")
        existing = yield from self._existing()
        for other in existing:
            if other != cidr and other.version == cidr.version and other.overlaps(cidr):
                raise NoAddressError(f"address {address} needs block {cidr}, which {other} overlaps")
        yield from self._ensure(cidr, next_number(own), now)

    def _take(self, held: Held, allocation: Allocation, now: float) -> Steps[Address | None]:
        """Take the next free address of a block; None if it has none, or is another node's by now."""
        key, owner = block_key(held.block.cidr), held.block.affinity
        for _ in range(RETRIES):
            block = cooled(held.block, now, self.rules.cooldown)
            ordinal = first_free(block, self.rules)
            if ordinal is None:
                return None
            if (yield Swap(key, held.revision, allocated(block, ordinal, allocation))):
                return block.address(ordinal)
            (found,) = yield Get((key,))
            again = held_of(found)
            if again is None or again.block.affinity != owner:
                return None
            held = again
        raise busy()

    def _borrow(self, allocation: Allocation, now: float) -> Steps[Address | None]:
        """Take an address out of a block of another node."""
        everything = yield from self._all()
        for pool in self._pools():
            for held in self._in_order(pool, everything):
                if held.block.affinity == self.node:
                    continue
                address = yield from self._take(held, allocation, now)
                if address is not None:
                    return address
        return None

    def _why(self, own: int) -> str:
        if not any(self._pools()):
            return f"no address is free: node {self.node} has no pool"
        borrow = "it may not borrow" if self.rules.strict_affinity else "there is nothing to borrow"
        return f"no address is free: {self._limit(own)}, no other block is to be had, and {borrow}"

    def _limit(self, own: int) -> str:
        return f"node {self.node} has {own} of at most {self.rules.max_blocks} blocks"


def _places(blocks: list[Held], handle: str) -> list[Address]:
    found = ((held.block, held.block.find(handle)) for held in blocks)
    return [block.address(ordinal) for block, ordinal in found if ordinal is not None]
