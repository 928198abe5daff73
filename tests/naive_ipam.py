"""What IPAM promises, said of single addresses: no queues, no ordinals, no retries.

The oracle sees every write that a store has accepted, and what the address and the block were before. It knows nothing
of how a write came about; it complains about those that must not be.
"""

from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

from dataplane.control.ipam import RECLAIM_SECONDS, Affinity, Block, Rules


@dataclass
class NaiveIpam:
    """Attributes:
    held: Who has which address: (handle, node).
    granted: What each handle was ever given.
    released: When each address was last released, and as which release of all.
    owner: Whose a block is.
    touched: When a block was last claimed or an address of it released.
    """

    rules: Rules
    held: dict[Any, Any] = field(default_factory=dict)
    granted: dict[Any, Any] = field(default_factory=dict)
    released: dict[Any, Any] = field(default_factory=dict)
    owner: dict[Any, Any] = field(default_factory=dict)
    touched: dict[Any, Any] = field(default_factory=dict)
    releases: int = 0

    def saw(self, node, began, now, before, after, requested=None, forgetting=False):
        """Look at a write by a node: ``before`` and ``after`` are blocks, or None.

        What it has begun at some time may be carried out later: it writes the one, the other is the truth.
        """
        if isinstance(before or after, Affinity):
            return
        cidr = (before or after).cidr
        if after is None:
            self._deleted(cidr, node, now, forgetting)
            return
        assert all(not cidr.overlaps(other) for other in self.owner if other != cidr)
        assert any(cidr.subnet_of(pool.cidr) for pool in self.rules.pools)
        self._owned(cidr, after, node, began, now, forgetting)
        was, now_held = _allocations(before), _allocations(after)
        for address in was.keys() - now_held.keys():
            assert self.held.pop(address) == was[address]
            self.releases += 1
            self.released[address] = (began, self.releases)
            self.touched[cidr] = began
        for address in now_held.keys() & was.keys():
            assert now_held[address] == was[address], "an address went from one holder to another without a release"
        for address in now_held.keys() - was.keys():
            self._taken(address, now_held[address], cidr, node, (began, now), requested)

    def _deleted(self, cidr, node, now, forgetting):
        assert self.owner[cidr] in (node, "") or forgetting
        for address in cidr:
            assert address not in self.held, f"a block was deleted with {address} in use"
            assert self._cool(address, now), f"a block was deleted while {address} cools down"
            self.released.pop(address, None)
        assert forgetting or now - self.touched[cidr] >= RECLAIM_SECONDS
        del self.owner[cidr], self.touched[cidr]

    def _owned(self, cidr, after, node, began, now, forgetting):
        former = self.owner.get(cidr)
        if former == after.affinity:
            return
        if after.affinity == "":
            assert forgetting, "a block was given up"
        else:
            assert after.affinity == node, "a block was given to another node"
            if former:
                assert all(address not in self.held and self._cool(address, now) for address in cidr)
                assert now - self.touched[cidr] >= RECLAIM_SECONDS, "a block was taken that had just been used"
            self.touched[cidr] = began
        self.owner[cidr] = after.affinity
        own = sum(owner == node for owner in self.owner.values())
        assert own <= self.rules.max_blocks, f"{node} has {own} blocks"

    def _taken(self, address, holder, cidr, node, times, requested):
        began, now = times
        assert holder[1] == node
        assert address not in self.held, "given twice"
        assert all(handle != holder[0] for handle, _ in self.held.values()), "a handle has two addresses"
        assert not self.rules.reserved(address)
        assert self._cool(address, now), f"{address} was given out while it cools down"
        if self.owner[cidr] != node:
            assert not self.rules.strict_affinity, "borrowed"
        if address != requested and not holder[0].startswith("vxlan-"):
            for other in cidr:
                assert not self._earlier(other, address, began), f"{address} was given out before {other}"
        self.held[address] = holder
        self.granted[holder[0]] = address

    def _cool(self, address, now):
        if not self.rules.cooldown or address not in self.released:
            return True
        return self.released[address][0] + self.rules.cooldown <= now

    def _earlier(self, one, other, now):
        """Whether ``one`` is free, and has been for longer than ``other``, whatever clocks of nodes said."""
        if one in self.held or self.rules.reserved(one) or not self._cool(one, now):
            return False
        (since, order), (later, last) = (
            self.released.get(each, (float("-inf"), int(each) - 2**32)) for each in (one, other)
        )
        return since <= later and order < last

    def available(self, node, now, borrow):
        """Return the addresses that a node could be given."""
        own = [cidr for cidr, owner in self.owner.items() if owner == node]
        found = set()
        for pool in self.rules.pools:
            for index in range(pool.blocks):
                cidr = ip_network((int(pool.cidr[0]) + index * 2 ** (32 - pool.block_size), pool.block_size))
                free = {a for a in cidr if a not in self.held and self._cool(a, now) and not self.rules.reserved(a)}
                owner = self.owner.get(cidr, "")
                idle = all(a not in self.held and self._cool(a, now) for a in cidr)
                idle = idle and now - self.touched.get(cidr, float("-inf")) >= RECLAIM_SECONDS
                claimable = len(own) < self.rules.max_blocks and (not owner or idle)
                if owner == node or claimable or (borrow and cidr in self.owner):
                    found |= free
        return found


def _allocations(block: Block | None):
    if block is None:
        return {}
    return {block.address(ordinal): (each.handle, each.node) for ordinal, each in block.allocations.items()}
