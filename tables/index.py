"""An open-addressing index from a 128-bit address within a scope to a row of some record array.

``slots`` holds a 32-bit tag and a row + 1 (0: empty); the keys themselves stay in the records, so a slot is 8 bytes
and eight slots share a cache line. Probing is linear; a delete shifts the entries behind it back, so there are no
tombstones and a lookup stops at the first empty slot. The home slot is the low bits of the tag: moving an entry needs
no rehash. At a quarter load an entry farther than ``MAX_PROBE`` from home is a matter of 1e-9; insert refuses to go
there.
"""

from typing import Any

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables.hash import Word, hash3
from dataplane.tables.result import FULL, MISS

MAX_PROBE = 32
_SPARE = 4  # slots per row

SLOT = np.dtype([("tag", "u4"), ("row", "u4")])


def make_slots(rows: int) -> Array:
    """Return the empty slots of an index for ``rows`` rows: a power of two, at most a quarter of it in use."""
    return np.zeros(1 << max(6, (rows * _SPARE - 1).bit_length()), SLOT)


@kernel
def find(slots: Any, key: Any, columns: Any, scope: int, hi: Word, lo: Word) -> int:
    """Return the row whose key is ``(scope, hi, lo)``, or ``MISS``.

    Args:
        slots: ``(2**k,)`` of ``SLOT``.
        key: The secret of the hash.
        columns: The records' columns ``(scope, hi, lo)``.
        scope: What the address is relative to, such as an interface; 0 when there is nothing.
        hi: Upper half of the address.
        lo: Lower half.
    """
    scopes, highs, lows = columns
    mask = len(slots) - 1
    tag = int(hash3(hi, lo, scope, key) & 0xFFFF_FFFF)
    for distance in range(MAX_PROBE):
        at = (tag + distance) & mask
        row = int(slots["row"][at]) - 1
        if row < 0:
            return MISS
        if int(slots["tag"][at]) != tag:
            continue
        if lows[row] == np.uint64(lo) and highs[row] == np.uint64(hi) and int(scopes[row]) == int(scope):
            return row
    return MISS


@kernel
def insert(slots: Any, key: Any, columns: Any, row: int) -> int:
    """Enter ``row`` under the key that its record holds; return ``row`` or ``FULL``. The key must not be in yet."""
    scopes, highs, lows = columns
    mask = len(slots) - 1
    tag = int(hash3(highs[row], lows[row], int(scopes[row]), key) & 0xFFFF_FFFF)
    for distance in range(MAX_PROBE):
        at = (tag + distance) & mask
        if int(slots["row"][at]) == 0:
            slots["tag"][at] = tag & 0xFFFF_FFFF
            slots["row"][at] = (row + 1) & 0xFFFF_FFFF
            return row
    return FULL


@kernel
def delete(slots: Any, key: Any, columns: Any, row: int) -> int:
    """Take ``row`` out while its record still holds its key; return ``row``, or ``MISS`` if it was not in."""
    scopes, highs, lows = columns
    mask = len(slots) - 1
    hole = int(hash3(highs[row], lows[row], int(scopes[row]), key) & 0xFFFF_FFFF) & mask
    while int(slots["row"][hole]) != row + 1:
        if int(slots["row"][hole]) == 0:
            return MISS
        hole = (hole + 1) & mask
    at = hole
    while True:
        at = (at + 1) & mask
        if int(slots["row"][at]) == 0:
            break
        home = int(slots["tag"][at]) & mask
        # An entry may move back to the hole only if that is not in front of its home.
        if ((at - home) & mask) >= ((at - hole) & mask):
            slots["tag"][hole] = slots["tag"][at]
            slots["row"][hole] = slots["row"][at]
            hole = at
    slots["tag"][hole] = 0
    slots["row"][hole] = 0
    return row
