"""Addresses of pods: pools, blocks of them that belong to nodes, and what becomes of an address, as immutable values.

A pool (Calico's ``IPPool``) is cut into blocks of equal size. A node claims blocks and takes addresses out of its own
ones, so that one route per block leads to all its pods. In a block every address is in one of three places: allocated,
*unallocated*, which is a queue that gives the address that was free for the longest time, or *released*, where it waits
until its cool-down is over and then goes to the queue's tail. An address is known in its block by its ordinal.

What is here has no store, no clock and no retries: transitions return a new block. ``ipam_engine`` carries them out
with compare-and-swap.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from types import MappingProxyType

from dataplane.control.state import Address, Labels, Network, Selector

MAX_BLOCKS = 20  # per node, Calico's default
MAX_COOLDOWN = 1200.0  # seconds, Calico's limit of IPCooldownSeconds
RECLAIM_SECONDS = 60.0  # Calico's EmptyBlockMinReclaimAge: a block that was just claimed is about to be used
BLOCK_SIZES = {4: (20, 32), 6: (116, 128)}  # prefix lengths, Calico's limits
DEFAULT_BLOCK_SIZE = {4: 26, 6: 122}
TUNNEL = "vxlan-tunnel-addr-"  # Calico's handle of a node's tunnel address, before the node's name


class IpamError(Exception):
    """An address that cannot be given out or taken back; the text says why."""


class NoAddressError(IpamError):
    """Nothing is free for this node."""


class TakenError(IpamError):
    """The requested address is somebody's, is reserved, or is cooling down."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Addresses for pods (``IPPool`` of projectcalico.org/v3).

    Attributes:
        block_size: The prefix length of its blocks.
        disabled: Nothing new is taken out of it.
        node_selector: Only nodes that it matches take from it; None: all.
    """

    name: str
    cidr: Network
    block_size: int = 26
    disabled: bool = False
    node_selector: Selector | None = None

    @property
    def blocks(self) -> int:
        """How many blocks it has."""
        return 1 << (self.block_size - self.cidr.prefixlen)

    def block_at(self, index: int) -> Network:
        """Return the prefix of a block by its place in the pool."""
        bits = self.cidr.max_prefixlen - self.block_size
        return ip_network((int(self.cidr.network_address) + (index << bits), self.block_size))

    def index_of(self, address: Address) -> int:
        """Return the place of the block that holds an address of the pool."""
        return (int(address) - int(self.cidr.network_address)) >> (self.cidr.max_prefixlen - self.block_size)

    def holds(self, cidr: Network) -> bool:
        """Whether a block is part of the pool, whatever its size."""
        return cidr.prefixlen >= self.cidr.prefixlen and self.overlaps(cidr)

    def overlaps(self, cidr: Network) -> bool:
        """Whether a prefix has addresses of the pool."""
        return cidr.version == self.cidr.version and cidr.overlaps(self.cidr)

    def span(self, cidr: Network) -> tuple[int, int]:
        """Return the places of the first and the last block that share addresses with a prefix that overlaps."""
        first = max(int(cidr.network_address), int(self.cidr.network_address))
        last = min(int(cidr.broadcast_address), int(self.cidr.broadcast_address))
        bits = self.cidr.max_prefixlen - self.block_size
        base = int(self.cidr.network_address)
        return (first - base) >> bits, (last - base) >> bits


@dataclass(frozen=True, slots=True)
class Rules:
    """How addresses are given out (``IPAMConfiguration`` of projectcalico.org/v3), the same on all nodes.

    Attributes:
        reservations: Never assigned, also not on request (``IPReservation``).
        strict_affinity: No node takes addresses out of blocks of others.
        cooldown: Seconds before a released address is given out again.
    """

    pools: tuple[Pool, ...] = ()
    reservations: tuple[Network, ...] = ()
    strict_affinity: bool = False
    max_blocks: int = MAX_BLOCKS
    cooldown: float = 0.0

    def reserved(self, address: Address) -> bool:
        """Whether an address is never given out."""
        return any(address in prefix for prefix in self.reservations)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Whose an address is.

    Attributes:
        handle: Says what holds it; unique in the cluster, such as the network's and the container's id.
        node: Where its holder is, which need not be the block's node.
        sequence: The block's when it was given out: tells two uses of one address apart.
        attributes: For people: namespace, pod. Sorted pairs.
    """

    handle: str
    node: str
    sequence: int = 0
    attributes: Labels = ()


@dataclass(frozen=True, slots=True)
class Affinity:
    """A node's claim of a block. While it is pending the block need not exist, nor be the node's.

    Attributes:
        number: Orders the blocks of a node. The one with its tunnel address is the first.
    """

    node: str
    cidr: Network
    number: int
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """A block of addresses. ``unallocated``, ``released`` and ``allocations`` hold every ordinal exactly once.

    Attributes:
        affinity: The node that it belongs to; "" is none.
        number: That of the node's claim.
        idle_since: When it was claimed or an address was released; only an empty one is looked at.
        sequence: Of its writes.
        unallocated: The queue of what is free, its head first.
        released: What cools down, and since when, the oldest first.
    """

    cidr: Network
    affinity: str = ""
    number: int = 0
    idle_since: float = 0.0
    sequence: int = 0
    unallocated: tuple[int, ...] = ()
    released: tuple[tuple[int, float], ...] = ()
    allocations: Mapping[int, Allocation] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def empty(self) -> bool:
        """Whether nobody has an address of it and none cools down."""
        return not self.allocations and not self.released

    def address(self, ordinal: int) -> Address:
        """Return the address with this ordinal."""
        return self.cidr.network_address + ordinal

    def ordinal(self, address: Address) -> int:
        """Return the ordinal of an address of the block."""
        return int(address) - int(self.cidr.network_address)

    def find(self, handle: str) -> int | None:
        """Return the ordinal that a handle has."""
        return next((ordinal for ordinal, each in self.allocations.items() if each.handle == handle), None)


@dataclass(frozen=True, slots=True)
class Given:
    """Blocks that a node has by its own file: nobody claims what overlaps them."""

    cidrs: tuple[Network, ...] = ()


def new_block(cidr: Network) -> Block:
    """Return a block that is nobody's, its addresses in their order."""
    return Block(cidr, unallocated=tuple(range(cidr.num_addresses)))


def claimed(block: Block, affinity: Affinity, now: float) -> Block:
    """Return the block as that of a node."""
    return replace(block, affinity=affinity.node, number=affinity.number, idle_since=now, sequence=block.sequence + 1)


def cooled(block: Block, now: float, cooldown: float) -> Block:
    """Return the block with what has waited long enough at the tail of its queue.

    A time that lies further ahead than clocks of nodes differ is over: it comes from a clock that was put back since.
    """
    waiting = tuple(
        (ordinal, since)
        for ordinal, since in block.released
        if cooldown and since + cooldown > now >= since - MAX_COOLDOWN
    )
    if len(waiting) == len(block.released):
        return block
    ready = tuple(ordinal for ordinal, since in block.released if (ordinal, since) not in waiting)
    return replace(block, unallocated=(*block.unallocated, *ready), released=waiting)


def first_free(block: Block, rules: Rules) -> int | None:
    """Return the first ordinal of the queue that is not reserved."""
    near = replace(rules, reservations=tuple(each for each in rules.reservations if _touches(each, block.cidr)))
    return next((each for each in block.unallocated if not near.reserved(block.address(each))), None)


def _touches(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def allocated(block: Block, ordinal: int, allocation: Allocation) -> Block:
    """Return the block with a free ordinal given to somebody.

    Raises:
        TakenError: It is not free.
    """
    if ordinal not in block.unallocated:
        holder = block.allocations.get(ordinal)
        why = f"held by {holder.handle}" if holder else "cooling down"
        raise TakenError(f"address {block.address(ordinal)} is {why}")
    sequence = block.sequence + 1
    allocations = {**block.allocations, ordinal: replace(allocation, sequence=sequence)}
    return replace(
        block,
        sequence=sequence,
        unallocated=tuple(each for each in block.unallocated if each != ordinal),
        allocations=MappingProxyType(allocations),
    )


def freed(block: Block, ordinal: int, now: float) -> Block:
    """Return the block with an allocated ordinal released: it cools down before it is free."""
    allocations = {each: allocation for each, allocation in block.allocations.items() if each != ordinal}
    return replace(
        block,
        idle_since=now,
        sequence=block.sequence + 1,
        released=(*block.released, (ordinal, now)),
        allocations=MappingProxyType(allocations),
    )


def reclaimable(block: Block, now: float) -> bool:
    """Whether another node may take the block: it is nobody's, or nothing of it is used for a minute."""
    return not block.affinity or (block.empty and now - block.idle_since >= RECLAIM_SECONDS)


def walk_start(node: str, pool: Pool) -> int:
    """Return where a node begins its walk through the blocks of a pool.

    It follows from the name, so that nodes that look for a block at once look at different ones, and a node that
    looks again looks at the same.
    """
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:8]) % pool.blocks


def walk(node: str, pool: Pool) -> Iterator[Network]:
    """Yield the blocks of a pool in the order in which a node tries them."""
    start = walk_start(node, pool)
    return (pool.block_at((start + step) % pool.blocks) for step in range(pool.blocks))


def prefixes_of(node: str, blocks: Mapping[Network, Block]) -> tuple[Network, ...]:
    """Return what is behind a node: its blocks in the order of their claims, and what it borrowed, as /32s (/128s)."""
    own = sorted(
        (block.number, block.cidr.network_address.packed, block.cidr)
        for block in blocks.values()
        if block.affinity == node
    )
    borrowed = sorted(
        (address.packed, ip_network(address))
        for block in blocks.values()
        if block.affinity != node
        for ordinal, allocation in block.allocations.items()
        if allocation.node == node
        for address in (block.address(ordinal),)
    )
    return (*(cidr for _, _, cidr in own), *(cidr for _, cidr in borrowed))
