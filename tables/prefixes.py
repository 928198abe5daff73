"""A hash table of prefixes of all lengths, keyed by (prefix, length).

Open addressing with linear probing. The table doubles before it is more than half full, so a probe always ends at an
empty slot; a delete shifts back what was pushed past it, so there are no tombstones.
"""

from typing import Any

import numpy as np

from dataplane.jit import kernel
from dataplane.tables.hash import Word, hash3
from dataplane.tables.result import MISS

_NO_SIGN = 0x7FFF_FFFF  # a position that is never negative needs no check for counting from the end

PREFIX = np.dtype(
    {
        "names": ["hi", "lo", "value", "chunk", "length"],
        "formats": ["u8", "u8", "i4", "i4", "u2"],
        "offsets": [0, 8, 16, 20, 24],
        "itemsize": 32,
    }
)
"""One prefix, half a cache line. ``length`` is the length + 1, 0 an empty slot; ``chunk`` belongs to ``trie``."""


@kernel
def home(prefixes: Any, key: Any, hi: Word, lo: Word, length: int) -> int:
    """Return the slot where a search for a prefix begins."""
    return int(hash3(hi, lo, length, key) & _NO_SIGN) & (len(prefixes) - 1)


@kernel
def find_from(prefixes: Any, at: int, hi: Word, lo: Word, length: int) -> int:
    """Return the slot of a prefix whose home is ``at``, or ``MISS``; ``hi`` and ``lo`` are uint64."""
    mask = (len(prefixes) - 1) & _NO_SIGN
    while True:
        # The record first, then its field: the compiler knows the record's size, a column's stride it does not.
        prefix = prefixes[at]
        found = int(prefix["length"])
        if found == 0:
            return MISS
        if prefix["lo"] == lo and prefix["hi"] == hi and found == length + 1:
            return at
        at = (at + 1) & mask


@kernel
def find(prefixes: Any, key: Any, hi: Word, lo: Word, length: int) -> int:
    """Return the slot of a prefix, or ``MISS``; ``hi`` and ``lo`` are uint64, bits behind the length are 0."""
    return find_from(prefixes, home(prefixes, key, hi, lo, length), hi, lo, length)


@kernel
def add(prefixes: Any, key: Any, hi: Word, lo: Word, length: int) -> int:
    """Enter a prefix that is not in and return its slot; the caller has seen to it that there is room."""
    mask = len(prefixes) - 1
    at = home(prefixes, key, hi, lo, length)
    while int(prefixes["length"][at]) != 0:
        at = (at + 1) & mask
    prefixes["hi"][at] = hi
    prefixes["lo"][at] = lo
    prefixes["length"][at] = (length + 1) & 0xFFFF
    return at


@kernel
def remove(prefixes: Any, key: Any, hole: int) -> None:
    """Empty a slot. Other prefixes may change their slots."""
    mask = len(prefixes) - 1
    at = hole
    while True:
        at = (at + 1) & mask
        length = int(prefixes["length"][at]) - 1
        if length < 0:
            break
        first = home(prefixes, key, prefixes["hi"][at], prefixes["lo"][at], length)
        # It may move back to the hole only if that is not in front of its home.
        if ((at - first) & mask) >= ((at - hole) & mask):
            prefixes[hole] = prefixes[at]
            hole = at
    prefixes["length"][hole] = 0


@kernel
def rehash(prefixes: Any, key: Any, larger: Any) -> None:
    """Copy all prefixes into an empty, larger table."""
    for i in range(len(prefixes)):
        length = int(prefixes["length"][i]) - 1
        if length < 0:
            continue
        at = add(larger, key, prefixes["hi"][i], prefixes["lo"][i], length)
        larger["value"][at] = prefixes["value"][i]
        larger["chunk"][at] = prefixes["chunk"][i]
