"""How a block becomes a node's, by swaps of single keys, so that a crash after any of them loses nothing.

A claim goes *affinity pending* - *the block names the node* - *affinity confirmed*. Whose a block is, the block says;
the affinities only lead a node to its blocks. A pending affinity without a block of that node is given back by the
node's next transaction, one with it is confirmed. A block whose node has no affinity for it is found by ``recover``
when that node starts, and by any other node as soon as it is empty for a minute.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dataplane.control.ipam import (
    RECLAIM_SECONDS,
    TUNNEL,
    Affinity,
    Allocation,
    Block,
    Given,
    NoAddressError,
    Pool,
    Rules,
    allocated,
    claimed,
    cooled,
    first_free,
    new_block,
    reclaimable,
    walk_start,
)
from dataplane.control.ipam_store import (
    BLOCKS,
    NODES,
    RETRIES,
    Get,
    Keys,
    List,
    Steps,
    Stored,
    Swap,
    affinities_prefix,
    affinity_key,
    block_key,
    busy,
    cidr_of,
)
from dataplane.control.selector import matches
from dataplane.control.state import Labels, Network


@dataclass(frozen=True, slots=True)
class Held:
    """A block as it was read, and the revision that a swap has to name."""

    block: Block
    revision: int


class Claims:
    """The blocks of one node. It has one process that claims, and that has one transaction at a time.

    Args:
        node: Its name.
        labels: Its labels; pools may select by them.
    """

    def __init__(self, node: str, rules: Rules, labels: Labels = ()) -> None:
        self.node = node
        self.rules = rules
        self.labels = labels

    def claim_first_block(self, now: float) -> Steps[Network]:
        """Return the node's first block, a new one if it has none: its first address is the node's tunnel address.

        Raises:
            NoAddressError: No pool has a block left for this node.
        """
        yield from self.recover()
        own = yield from self._own()
        if own and self._tunnel_fits(own[0].block, now):
            found = yield from self._ensure(own[0].block.cidr, own[0].block.number, now, tunnel=True)
            if found is not None:
                return found.block.cidr
        number = own[0].block.number - 1 if own else 1
        fresh = yield from self._claim(number, now, tunnel=True)
        if fresh is None:
            raise NoAddressError(
                f"no block is left for node {self.node}{'' if any(self._pools()) else ': it has no pool'}"
            )
        return fresh.block.cidr

    def recover(self) -> Steps[None]:
        """Find the node's blocks for which it has no affinity, as it may be after a crash."""
        everything = yield from self._all()
        for held in everything:
            if held.block.affinity == self.node:
                affinity = Affinity(self.node, held.block.cidr, held.block.number, confirmed=True)
                yield Swap(affinity_key(self.node, held.block.cidr), 0, affinity)

    def give_back(self, now: float) -> Steps[tuple[Network, ...]]:
        """Give back the blocks of which nothing is used for a minute, but never the first; return which."""
        own = yield from self._own()
        given = []
        for held in own[1:]:
            block = cooled(held.block, now, self.rules.cooldown)
            if not block.empty or now - block.idle_since < RECLAIM_SECONDS:
                continue
            if (yield Swap(block_key(block.cidr), held.revision, None)):
                given.append(block.cidr)
        if given:
            yield from self._own()  # drops their affinities
        return tuple(given)

    # --- what transactions are made of -------------------------------------------------------------------------------

    def _own(self) -> Steps[list[Held]]:
        """Return the node's blocks, the first claimed first; settle what a crash left behind."""
        known: list[tuple[Stored, Affinity]] = [
            (stored, stored.value)
            for stored in (yield List(affinities_prefix(self.node)))
            if isinstance(stored.value, Affinity)
        ]
        if not known:
            return []
        blocks = yield Get(tuple(block_key(affinity.cidr) for _, affinity in known))
        own = []
        for (stored, affinity), found in zip(known, blocks, strict=True):
            held = held_of(found)
            if held is None or held.block.affinity != self.node:
                yield Swap(stored.key, stored.revision, None)
                continue
            if not affinity.confirmed:
                yield Swap(stored.key, stored.revision, replace(affinity, confirmed=True))
            own.append(held)
        return sorted(own, key=lambda held: (held.block.number, held.block.cidr.network_address.packed))

    def _all(self) -> Steps[list[Held]]:
        everything: Iterable[Stored] = yield List(BLOCKS)
        return [held for held in map(held_of, everything) if held is not None]

    def _existing(self) -> Steps[list[Network]]:
        """Return the blocks that there are, and those that nodes have by their files."""
        found: Iterable[Network | None] = map(cidr_of, (yield Keys(BLOCKS)))
        nodes: Iterable[Stored] = yield List(NODES)
        given = (cidr for stored in nodes if isinstance(stored.value, Given) for cidr in stored.value.cidrs)
        return [*(cidr for cidr in found if cidr is not None), *given]

    def _claim(self, number: int, now: float, tunnel: bool = False) -> Steps[Held | None]:
        """Make a block the node's: one that does not exist yet, else one that nobody uses; None if there is none."""
        existing = yield from self._existing()
        for pool in self._pools():
            for cidr in self._unclaimed(pool, existing):
                if self._useful(new_block(cidr), now, tunnel):
                    held = yield from self._ensure(cidr, number, now, tunnel)
                    if held is not None:
                        return held
        everything = yield from self._all()
        for pool in self._pools():
            for held in self._in_order(pool, everything):
                if held.block.affinity != self.node and self._useful(held.block, now, tunnel):
                    mine = yield from self._ensure(held.block.cidr, number, now, tunnel)
                    if mine is not None:
                        return mine
        return None

    def _ensure(self, cidr: Network, number: int, now: float, tunnel: bool = False) -> Steps[Held | None]:
        """Look, and take one step towards a block that is the node's, until it is; None: it is another's."""
        mine, key = affinity_key(self.node, cidr), block_key(cidr)
        former = ""
        for _ in range(RETRIES):
            affinity, found = yield Get((mine, key))
            held = held_of(found)
            claim = affinity.value if affinity is not None else None
            if found is not None and (held is None or not self._claimable(held.block, now, tunnel)):
                if affinity is not None and (held is None or held.block.affinity != self.node):
                    yield Swap(mine, affinity.revision, None)
                return None
            if not isinstance(claim, Affinity):
                yield Swap(mine, affinity.revision if affinity else 0, Affinity(self.node, cidr, number))
            elif held is None:
                block = claimed(new_block(cidr), claim, now)
                yield Swap(key, 0, self._with_tunnel(block) if tunnel else block)
            elif held.block.affinity != self.node:
                former = held.block.affinity
                block = claimed(cooled(held.block, now, self.rules.cooldown), claim, now)
                yield Swap(key, held.revision, self._with_tunnel(block) if tunnel else block)
            elif tunnel and not self._has_tunnel(held.block):
                yield Swap(key, held.revision, self._with_tunnel(cooled(held.block, now, self.rules.cooldown)))
            elif not claim.confirmed:
                yield Swap(mine, affinity.revision, replace(claim, confirmed=True))
            else:
                if former:
                    yield from self._drop_affinity(former, cidr)
                return held
        raise busy()

    def _drop_affinity(self, node: str, cidr: Network) -> Steps[None]:
        """Delete the affinity of a node whose block was taken over; it would do so itself when it looks."""
        (stored,) = yield Get((affinity_key(node, cidr),))
        if stored is not None:
            yield Swap(stored.key, stored.revision, None)

    def _useful(self, block: Block, now: float, tunnel: bool) -> bool:
        """Whether a claim would give the node an address."""
        if not self._claimable(block, now, tunnel):
            return False
        return tunnel or first_free(cooled(block, now, self.rules.cooldown), self.rules) is not None

    def _claimable(self, block: Block, now: float, tunnel: bool) -> bool:
        cool = cooled(block, now, self.rules.cooldown)
        if tunnel and not self._tunnel_fits(cool, now):
            return False
        return block.affinity == self.node or reclaimable(cool, now)

    def _tunnel_fits(self, block: Block, now: float) -> bool:
        """Whether the block's first address is the node's tunnel address or can become it."""
        if self._has_tunnel(block):
            return True
        free = 0 in cooled(block, now, self.rules.cooldown).unallocated
        return free and not self.rules.reserved(block.address(0))

    def _has_tunnel(self, block: Block) -> bool:
        return 0 in block.allocations and block.allocations[0].handle == TUNNEL + self.node

    def _with_tunnel(self, block: Block) -> Block:
        return block if self._has_tunnel(block) else allocated(block, 0, Allocation(TUNNEL + self.node, self.node))

    # --- pools -------------------------------------------------------------------------------------------------------

    def _pools(self) -> Iterator[Pool]:
        """Yield the pools that this node takes from."""
        for pool in self.rules.pools:
            if not pool.disabled and (pool.node_selector is None or matches(pool.node_selector, self.labels)):
                yield pool

    def _in_order(self, pool: Pool, everything: Sequence[Held]) -> list[Held]:
        """Return the existing blocks of a pool in the order of the node's walk through it."""
        start = walk_start(self.node, pool)

        def place(held: Held) -> int:
            return (pool.index_of(held.block.cidr.network_address) - start) % pool.blocks

        return sorted((held for held in everything if pool.holds(held.block.cidr)), key=place)

    def _unclaimed(self, pool: Pool, existing: Sequence[Network]) -> Iterator[Network]:
        """Yield the blocks of a pool that no existing one overlaps, in the order of the node's walk."""
        spans = [pool.span(cidr) for cidr in existing if pool.overlaps(cidr)]
        single = {first for first, last in spans if first == last}
        wide = [(first, last) for first, last in spans if first != last]
        start = walk_start(self.node, pool)
        for step in range(pool.blocks):
            index = (start + step) % pool.blocks
            if index not in single and not any(first <= index <= last for first, last in wide):
                yield pool.block_at(index)


def held_of(stored: Stored | None) -> Held | None:
    """Return what was read as a block; None if it is none."""
    if stored is None or not isinstance(stored.value, Block):
        return None
    return Held(stored.value, stored.revision)


def next_number(own: Sequence[Held]) -> int:
    """Return the number of a node's next claim."""
    return max((held.block.number for held in own), default=0) + 1
