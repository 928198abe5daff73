"""An open-addressing index of tags: from a 64-bit hash to a number, without the keys.

A slot is one word: a *tag*, the low 32 bits of the hash, and a value + 1 (0: empty). The low bits of the tag are the
home slot, so nothing but the slots is read to move an entry, and all 32 tell entries apart: among half a million
entries a lookup in 8000 is led to a wrong one. The caller compares the keys.

Probing is linear, eight slots to a cache line. A delete shifts the entries behind it back, so there are no tombstones.
With half of the slots in use, the most there is, the farthest of 50 million entries was 50 slots from its home, and a
distance of ``MAX_PROBE`` is a matter of 1e-16 per entry. ``place`` refuses to go there, so no run of slots, however it
came to be, costs a lookup more.
"""

from typing import Any

from dataplane.jit import Array, kernel, prefetch
from dataplane.tables.hash import Word
from dataplane.tables.memory import make_zeros
from dataplane.tables.result import FULL, MISS

MAX_PROBE = 128
TAG = 0xFFFF_FFFF
_NO_SIGN = 0x7FFF_FFFF  # a position that is never negative needs no check for counting from the end


def make_slots(entries: int) -> Array:
    """Return the empty slots of an index for ``entries`` entries: a power of two, at most half of it in use."""
    return make_zeros(1 << max(6, (2 * entries - 1).bit_length()), "i8")


@kernel
def last(slots: Any) -> int:
    """Return the last position, a mask for all of them."""
    return (len(slots) - 1) & _NO_SIGN


@kernel
def ask(slots: Any, word: Word) -> None:
    """Ask for the cache line of the home slot of a hash."""
    prefetch(slots, int(word & TAG) & last(slots))


@kernel
def first(slots: Any, word: Word) -> int:
    """Return the value of the first entry with the tag of a hash, or ``MISS``."""
    tag, mask = int(word & TAG), last(slots)
    at = tag & mask
    for _ in range(MAX_PROBE):
        slot = int(slots[at])
        # An empty slot may match the tag 0: its value is a miss as well.
        if slot & TAG == tag or slot == 0:
            return (slot >> 32) - 1
        at = (at + 1) & mask
    return MISS


@kernel
def place(slots: Any, word: Word, value: int) -> int:
    """Enter a value under a hash and return it, or ``FULL``; the same tag may be in already."""
    tag, mask = int(word & TAG), last(slots)
    at = tag & mask
    for _ in range(MAX_PROBE):
        if int(slots[at]) == 0:
            slots[at] = (value + 1) << 32 | tag
            return value
        at = (at + 1) & mask
    return FULL


@kernel
def remove(slots: Any, word: Word, value: int) -> int:
    """Take out the entry of a value under this hash; return the value, or ``MISS`` if it was not in."""
    tag, mask = int(word & TAG), last(slots)
    entry = (value + 1) << 32 | tag
    hole = tag & mask
    while int(slots[hole]) != entry:
        if int(slots[hole]) == 0:
            return MISS
        hole = (hole + 1) & mask
    at = (hole + 1) & mask
    slot = int(slots[at])
    while slot != 0:
        # An entry may move back to the hole only if that is not in front of its home.
        if (at - slot) & mask >= (at - hole) & mask:
            slots[hole] = slot
            hole = at
        at = (at + 1) & mask
        slot = int(slots[at])
    slots[hole] = 0
    return value
