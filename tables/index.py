"""An open-addressing index from a 128-bit address within a scope to a row of some record array.

A slot holds the whole key and a row + 1 (0: empty), half a cache line, so a lookup touches nothing else. (With 32-bit
tags in the slots and the keys in the records, a lookup had to be given three more arrays, 34 words on the stack where
it is not inlined: 10 instead of 4 ns.) Probing is linear; a delete shifts the entries behind it back, so there are no
tombstones and a lookup stops at the first empty slot. At a quarter load an entry farther than ``MAX_PROBE`` from home
is a matter of 1e-9; insert refuses to go there.
"""

from typing import Any

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables.hash import Word, hash3
from dataplane.tables.result import FULL, MISS

MAX_PROBE = 32
_SPARE = 4  # slots per row
_NO_SIGN = 0x7FFF_FFFF  # a position that is never negative needs no check for counting from the end

SLOT = np.dtype(
    {
        "names": ["hi", "lo", "scope", "row"],
        "formats": ["u8", "u8", "i4", "u4"],
        "offsets": [0, 8, 16, 20],
        "itemsize": 32,
    }
)


def make_slots(rows: int) -> Array:
    """Return the empty slots of an index for ``rows`` rows: a power of two, at most a quarter of it in use."""
    return np.zeros(1 << max(6, (rows * _SPARE - 1).bit_length()), SLOT)


@kernel
def find(slots: Any, key: Any, scope: int, hi: Word, lo: Word) -> int:
    """Return the row of ``(scope, hi, lo)``, or ``MISS``.

    Args:
        slots: ``(2**k,)`` of ``SLOT``.
        key: The secret of the hash.
        scope: What the address is relative to, such as an interface; 0 when there is nothing.
        hi: Upper half of the address.
        lo: Lower half.
    """
    mask = (len(slots) - 1) & _NO_SIGN
    at = int(hash3(hi, lo, scope, key) & _NO_SIGN) & mask
    for _ in range(MAX_PROBE):
        # The record first, then its field: the compiler knows the record's size, a column's stride it does not.
        slot = slots[at]
        row = int(slot["row"]) - 1
        # The key of an empty slot is zeros and may match: its row is a miss as well.
        if slot["lo"] == np.uint64(lo) and slot["hi"] == np.uint64(hi) and int(slot["scope"]) == scope:
            return row
        if row < 0:
            return MISS
        at = (at + 1) & mask
    return MISS


@kernel
def insert(slots: Any, key: Any, scope: int, hi: Word, lo: Word, row: int) -> int:
    """Enter ``row`` under a key that is not in yet; return ``row`` or ``FULL``."""
    mask = (len(slots) - 1) & _NO_SIGN
    at = int(hash3(hi, lo, scope, key) & _NO_SIGN) & mask
    for _ in range(MAX_PROBE):
        if int(slots["row"][at]) == 0:
            slots["hi"][at] = hi
            slots["lo"][at] = lo
            slots["scope"][at] = scope
            slots["row"][at] = (row + 1) & 0xFFFF_FFFF
            return row
        at = (at + 1) & mask
    return FULL


@kernel
def delete(slots: Any, key: Any, scope: int, hi: Word, lo: Word, row: int) -> int:
    """Take the key of ``row`` out; return ``row``, or ``MISS`` if it was not in."""
    mask = (len(slots) - 1) & _NO_SIGN
    hole = int(hash3(hi, lo, scope, key) & _NO_SIGN) & mask
    while int(slots["row"][hole]) != row + 1:
        if int(slots["row"][hole]) == 0:
            return MISS
        hole = (hole + 1) & mask
    at = (hole + 1) & mask
    while int(slots["row"][at]) != 0:
        home = int(hash3(slots["hi"][at], slots["lo"][at], int(slots["scope"][at]), key) & _NO_SIGN) & mask
        # An entry may move back to the hole only if that is not in front of its home.
        if ((at - home) & mask) >= ((at - hole) & mask):
            slots[hole] = slots[at]
            hole = at
        at = (at + 1) & mask
    slots["hi"][hole] = 0
    slots["lo"][hole] = 0
    slots["scope"][hole] = 0
    slots["row"][hole] = 0
    return row
