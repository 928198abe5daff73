"""The books of addresses as ``dataplane ipam show`` prints them: pools, their blocks, and who has what."""

from collections.abc import Iterable
from typing import TypedDict

from dataplane.control.ipam import Block, Pool, Rules
from dataplane.control.state import Network


class Use(TypedDict):
    """How many addresses there are, and what becomes of them. They add up."""

    total: int
    in_use: int
    cooling: int
    reserved: int
    free: int


class AllocationReport(TypedDict):
    """One address that is held. ``borrowed``: by another node than the block's."""

    address: str
    handle: str
    node: str
    borrowed: bool
    attributes: dict[str, str]


class BlockReport(TypedDict):
    """One block; ``node`` is "" for one that is nobody's, ``pool`` for one that is in none any more."""

    cidr: str
    node: str
    pool: str
    use: Use
    allocations: list[AllocationReport]


class PoolReport(TypedDict):
    """One pool; its use includes blocks that nobody has claimed."""

    name: str
    cidr: str
    block_size: int
    disabled: bool
    blocks: int
    use: Use


class IpamReport(TypedDict):
    """``GET /v1/ipam``."""

    strict_affinity: bool
    max_blocks_per_host: int
    cooldown_s: float
    reservations: list[str]
    pools: list[PoolReport]
    blocks: list[BlockReport]


def report(rules: Rules, blocks: Iterable[Block]) -> IpamReport:
    """Return the books; blocks in the order of their addresses."""
    ordered = sorted(blocks, key=lambda block: (block.cidr.version, block.cidr.network_address.packed))
    return {
        "strict_affinity": rules.strict_affinity,
        "max_blocks_per_host": rules.max_blocks,
        "cooldown_s": rules.cooldown,
        "reservations": [str(prefix) for prefix in rules.reservations],
        "pools": [_pool(pool, ordered, rules) for pool in rules.pools],
        "blocks": [_block(block, rules) for block in ordered],
    }


def _pool(pool: Pool, blocks: list[Block], rules: Rules) -> PoolReport:
    inside = [block for block in blocks if pool.holds(block.cidr)]
    uses = [_use(block, rules) for block in inside]
    claimed = sum(use["total"] for use in uses)
    reserved = _reserved(pool.cidr, rules) - sum(_reserved(block.cidr, rules) for block in inside)
    total = pool.cidr.num_addresses
    return {
        "name": pool.name,
        "cidr": str(pool.cidr),
        "block_size": pool.block_size,
        "disabled": pool.disabled,
        "blocks": len(inside),
        "use": {
            "total": total,
            "in_use": sum(use["in_use"] for use in uses),
            "cooling": sum(use["cooling"] for use in uses),
            "reserved": reserved + sum(use["reserved"] for use in uses),
            "free": total - claimed - reserved + sum(use["free"] for use in uses),
        },
    }


def _block(block: Block, rules: Rules) -> BlockReport:
    return {
        "cidr": str(block.cidr),
        "node": block.affinity,
        "pool": next((pool.name for pool in rules.pools if pool.holds(block.cidr)), ""),
        "use": _use(block, rules),
        "allocations": [
            {
                "address": str(block.address(ordinal)),
                "handle": each.handle,
                "node": each.node,
                "borrowed": each.node != block.affinity,
                "attributes": dict(each.attributes),
            }
            for ordinal, each in sorted(block.allocations.items())
        ],
    }


def _use(block: Block, rules: Rules) -> Use:
    free = sum(not rules.reserved(block.address(ordinal)) for ordinal in block.unallocated)
    return {
        "total": block.cidr.num_addresses,
        "in_use": len(block.allocations),
        "cooling": len(block.released),
        "reserved": len(block.unallocated) - free,
        "free": free,
    }


def _reserved(cidr: Network, rules: Rules) -> int:
    """Return how many addresses of a prefix are reserved; reservations may overlap each other."""
    spans = sorted(
        (max(int(each[0]), int(cidr[0])), min(int(each[-1]), int(cidr[-1])))
        for each in rules.reservations
        if each.version == cidr.version and each.overlaps(cidr)
    )
    count, end = 0, -1
    for first, last in spans:
        count += max(0, last - max(first, end + 1) + 1)
        end = max(end, last)
    return count
