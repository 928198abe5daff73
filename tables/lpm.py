"""Longest prefix match over both address families; a value is a non-negative int32.

*IPv4*: a leaf-pushed trie with strides 16, 8 and 8. ``nodes`` is one int32 array: the first 65536 entries are the
root, then come chunks of 256. An entry is a value + 1 (0: no route) or, with the sign bit, the position of a chunk. A
lookup reads at most three entries. ``depths`` says for each entry how long the prefix is that painted it, so an insert
repaints what is shorter and a delete what is its own; only the range of the prefix is touched. A chunk that holds
nothing longer than its parent's bits is given back.

*IPv6*: one hash table keyed by (prefix, length), probed for each length that is present, longest first. It also holds
the IPv4 prefixes, where a delete finds the prefix that covers the hole; an IPv4 lookup never reads it. IPv4 prefixes
are those of ::ffff:0:0/96 with 96 bits and more; ::/0 does not cover them, and 0.0.0.0/0 covers no IPv6 address.
"""

from typing import Any

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables.hash import Word, hash3, make_key
from dataplane.tables.result import FULL, MISS, TableFullError

ROOT = 65536
CHUNK = 256
_POINTER = 0x8000_0000  # in ``nodes``: the rest is the position of a chunk
_POSITION = 0x7FFF_FFFF
_IS_CHUNK = 255  # in ``depths``: this entry is a pointer; otherwise length + 1, 0: no route
_V4 = 96  # length of the IPv4 default route
_V4_COUNTS = 129  # ``counters``: prefixes per IPv6 length, then per IPv4 length, then the two below
_FREE, _RULES, _COUNTERS = 162, 163, 164
_CHUNKS_PER_INSERT = 2

RULE = np.dtype([("hi", "u8"), ("lo", "u8"), ("value", "i4"), ("length", "u2"), ("spare", "u2")])
"""One prefix; ``length`` is the length + 1, 0 an empty slot."""

LENGTH = np.dtype([("mask_hi", "u8"), ("mask_lo", "u8"), ("length", "i8")])
"""One IPv6 prefix length that is present; -1 ends the list."""


@kernel
def lookup4(nodes: Any, lo: Word) -> int:
    """Return the value for the IPv4 address in the low 32 bits of ``lo``, or -1."""
    entry = int(nodes[(lo >> 16) & 0xFFFF])
    if entry < 0:
        entry = int(nodes[(entry & _POSITION) + int((lo >> 8) & 0xFF)])
        if entry < 0:
            entry = int(nodes[(entry & _POSITION) + int(lo & 0xFF)])
    return entry - 1


@kernel
def find_rule(rules: Any, key: Any, hi: Word, lo: Word, length: int) -> int:
    """Return the slot of a prefix, or ``MISS``; ``hi`` and ``lo`` are uint64."""
    mask = len(rules) - 1
    at = int(hash3(hi, lo, length, key) & 0xFFFF_FFFF) & mask
    while True:
        found = int(rules["length"][at])
        if found == 0:
            return MISS
        if rules["lo"][at] == lo and rules["hi"][at] == hi and found == length + 1:
            return at
        at = (at + 1) & mask


@kernel
def lookup6(arrays: Any, hi: Word, lo: Word) -> int:
    """Return the value for an IPv6 address, or -1; ``hi`` and ``lo`` are uint64."""
    rules, lengths, key = arrays[1], arrays[2], arrays[3]
    for i in range(len(lengths)):
        length = int(lengths["length"][i])
        if length < 0:
            return MISS
        at = find_rule(rules, key, hi & lengths["mask_hi"][i], lo & lengths["mask_lo"][i], length)
        if at >= 0:
            return int(rules["value"][at])
    return MISS


@kernel
def lookup(arrays: Any, hi: Word, lo: Word) -> int:
    """Return the value of the longest prefix that holds an address, or -1.

    Args:
        arrays: ``Lpm.arrays``, or a tuple that begins so.
        hi: Upper half of the address.
        lo: Lower half.
    """
    if hi == 0 and (lo >> 32) == 0xFFFF:
        return lookup4(arrays[0], lo)
    return lookup6(arrays, np.uint64(hi), np.uint64(lo))


@kernel
def lookup_many(arrays: Any, highs: Any, lows: Any, out: Any, count: int) -> None:
    """Write the value for each of ``count`` addresses to ``out`` (int32), -1 where there is none."""
    for i in range(count):
        out[i] = lookup(arrays, highs[i], lows[i])


# --- edits -----------------------------------------------------------------------------------------------------------
# ``edit`` is (nodes, rules, lengths, key, depths, free, counters); ``free`` is the stack of unused chunks.


@kernel
def _split(edit: Any, at: int) -> int:
    """Turn the leaf ``at`` into a chunk of 256 such leaves, if it is none yet; return the chunk's position."""
    nodes, depths, free, counters = edit[0], edit[4], edit[5], edit[6]
    if int(depths[at]) == _IS_CHUNK:
        return int(nodes[at]) & _POSITION
    counters[_FREE] -= 1
    base = int(free[counters[_FREE]])
    for i in range(base, base + CHUNK):
        nodes[i] = nodes[at]
        depths[i] = depths[at]
    nodes[at] = base - _POINTER
    depths[at] = _IS_CHUNK
    return base


@kernel
def _merge(edit: Any, at: int, bits: int) -> None:
    """Give back the chunk below ``at`` if nothing in it is longer than the ``bits`` of its position."""
    nodes, depths, free, counters = edit[0], edit[4], edit[5], edit[6]
    if int(depths[at]) != _IS_CHUNK:
        return
    base = int(nodes[at]) & _POSITION
    deepest = 0
    for i in range(base, base + CHUNK):
        deepest = max(deepest, int(depths[i]))
    if deepest > bits + 1:
        return
    nodes[at] = nodes[base]
    depths[at] = depths[base]
    free[counters[_FREE]] = base
    counters[_FREE] += 1


@kernel
def _paint_leaves(nodes: Any, depths: Any, start: int, stop: int, paint: Any) -> None:
    """Give the entries [start, stop) whose depth is in [low, high] a new entry and depth."""
    low, high, entry, depth = paint
    for i in range(start, stop):
        if low <= int(depths[i]) <= high:
            nodes[i] = entry
            depths[i] = depth


@kernel
def _paint_chunks(nodes: Any, depths: Any, start: int, stop: int, paint: Any) -> None:
    """Paint the entries [start, stop) of a chunk and the chunks below it."""
    for i in range(start, stop):
        if int(depths[i]) == _IS_CHUNK:
            base = int(nodes[i]) & _POSITION
            _paint_leaves(nodes, depths, base, base + CHUNK, paint)
    _paint_leaves(nodes, depths, start, stop, paint)


@kernel
def _paint_root(nodes: Any, depths: Any, start: int, stop: int, paint: Any) -> None:
    """Paint the entries [start, stop) of the root and everything below them."""
    for i in range(start, stop):
        if int(depths[i]) == _IS_CHUNK:
            base = int(nodes[i]) & _POSITION
            _paint_chunks(nodes, depths, base, base + CHUNK, paint)
    _paint_leaves(nodes, depths, start, stop, paint)


@kernel
def _repaint(edit: Any, address: int, length: int, paint: Any) -> None:
    """Paint the range of an IPv4 prefix (``length`` of 32), making chunks on the way down."""
    nodes, depths = edit[0], edit[4]
    at = (address >> 16) & 0xFFFF
    if length <= 16:
        _paint_root(nodes, depths, at, at + (1 << (16 - length)), paint)
        return
    at = _split(edit, at) + ((address >> 8) & 0xFF)
    if length <= 24:
        _paint_chunks(nodes, depths, at, at + (1 << (24 - length)), paint)
        return
    at = _split(edit, at) + (address & 0xFF)
    _paint_leaves(nodes, depths, at, at + (1 << (32 - length)), paint)


@kernel
def _is_v4(hi: Word, lo: Word, length: int) -> bool:
    return length >= _V4 and hi == 0 and (lo >> 32) == 0xFFFF


@kernel
def _insert(edit: Any, hi: Word, lo: Word, length: int, value: int) -> int:
    """Add a prefix or change its value; return 1 if it is new, 0 if it was there, ``FULL`` before any change."""
    rules, key, counters = edit[1], edit[3], edit[6]
    if counters[_FREE] < _CHUNKS_PER_INSERT or 2 * (counters[_RULES] + 1) > len(rules):
        return FULL
    mask = len(rules) - 1
    at = find_rule(rules, key, hi, lo, length)
    new = 0
    if at < 0:
        new = 1
        at = int(hash3(hi, lo, length, key) & 0xFFFF_FFFF) & mask
        while int(rules["length"][at]) != 0:
            at = (at + 1) & mask
        rules["hi"][at] = hi
        rules["lo"][at] = lo
        rules["length"][at] = length + 1
        counters[_RULES] += 1
        counters[length + (_V4_COUNTS - _V4 if _is_v4(hi, lo, length) else 0)] += 1
    rules["value"][at] = value
    if _is_v4(hi, lo, length):
        depth = length - _V4 + 1
        _repaint(edit, int(lo & 0xFFFF_FFFF), length - _V4, (0, depth, value + 1, depth))
    return new


@kernel
def _remove_rule(rules: Any, key: Any, hole: int) -> None:
    """Empty a slot and shift back what was pushed past it."""
    mask = len(rules) - 1
    at = hole
    while True:
        at = (at + 1) & mask
        length = int(rules["length"][at]) - 1
        if length < 0:
            break
        home = int(hash3(rules["hi"][at], rules["lo"][at], length, key) & 0xFFFF_FFFF) & mask
        if ((at - home) & mask) >= ((at - hole) & mask):
            rules[hole] = rules[at]
            hole = at
    rules["length"][hole] = 0


@kernel
def _cover(edit: Any, address: int, length: int) -> int:
    """Return the slot of the longest IPv4 prefix shorter than ``length`` (of 32) that holds ``address``, or -1."""
    rules, key, counters = edit[1], edit[3], edit[6]
    for shorter in range(length - 1, -1, -1):
        if counters[_V4_COUNTS + shorter] == 0:
            continue
        masked = (address >> (32 - shorter)) << (32 - shorter)
        at = find_rule(rules, key, np.uint64(0), np.uint64(0xFFFF_0000_0000 | masked), shorter + _V4)
        if at >= 0:
            return at
    return MISS


@kernel
def _delete(edit: Any, hi: Word, lo: Word, length: int) -> int:
    """Take a prefix out; return 1, or 0 if it was not there."""
    nodes, rules, key, counters = edit[0], edit[1], edit[3], edit[6]
    at = find_rule(rules, key, hi, lo, length)
    if at < 0:
        return 0
    _remove_rule(rules, key, at)
    counters[_RULES] -= 1
    if not _is_v4(hi, lo, length):
        counters[length] -= 1
        return 1
    bits = length - _V4
    counters[_V4_COUNTS + bits] -= 1
    address = int(lo & 0xFFFF_FFFF)
    cover = _cover(edit, address, bits)
    entry, depth = 0, 0
    if cover >= 0:
        entry, depth = int(rules["value"][cover]) + 1, int(rules["length"][cover]) - _V4
    _repaint(edit, address, bits, (bits + 1, bits + 1, entry, depth))
    if bits > 24:
        _merge(edit, (int(nodes[address >> 16]) & _POSITION) + ((address >> 8) & 0xFF), 24)
    if bits > 16:
        _merge(edit, address >> 16, 16)
    return 1


@kernel
def _insert_many(edit: Any, prefixes: Any, start: int) -> int:
    """Add ``prefixes`` (highs, lows, lengths, values) from ``start``; return how far it came before ``FULL``."""
    highs, lows, lengths, values = prefixes
    for i in range(start, len(highs)):
        if _insert(edit, highs[i], lows[i], int(lengths[i]), int(values[i])) == FULL:
            return i
    return len(highs)


@kernel
def _rehash(rules: Any, key: Any, larger: Any) -> None:
    """Copy all prefixes into an empty, larger table."""
    mask = len(larger) - 1
    for i in range(len(rules)):
        if int(rules["length"][i]) == 0:
            continue
        at = int(hash3(rules["hi"][i], rules["lo"][i], int(rules["length"][i]) - 1, key) & 0xFFFF_FFFF) & mask
        while int(larger["length"][at]) != 0:
            at = (at + 1) & mask
        larger[at] = rules[i]


class Lpm:
    """Owns the arrays and edits them between bursts.

    A growing table moves to larger arrays: take ``arrays`` anew after every edit. ``limit`` bounds the prefixes.

    Attributes:
        arrays: ``(nodes, rules, lengths, key)`` for ``lookup``.
    """

    def __init__(self, limit: int = 1 << 22, seed: int | None = None) -> None:
        self.limit = limit
        self._counters = np.zeros(_COUNTERS, np.int64)
        self._nodes = np.zeros(ROOT, np.int32)
        self._depths = np.zeros(ROOT, np.uint8)
        self._free = np.zeros(0, np.int32)
        self._rules = np.zeros(256, RULE)
        self._lengths = np.zeros(130, LENGTH)
        self._lengths["length"] = -1
        self._key = make_key(seed)
        self._bind()
        self._grow_chunks(16)

    def __len__(self) -> int:
        return int(self._counters[_RULES])

    @property
    def chunks(self) -> int:
        """How many chunks of 256 entries are in use."""
        return (len(self._nodes) - ROOT) // CHUNK - int(self._counters[_FREE])

    def insert(self, hi: int, lo: int, length: int, value: int) -> None:
        """Add a prefix or change its value. ``length`` counts of 128: an IPv4 /24 is 120.

        Raises:
            TableFullError: The table holds ``limit`` prefixes.
        """
        if len(self) >= self.limit and self.get(hi, lo, length) == MISS:
            raise TableFullError("lpm", len(self), self.limit)
        new = _insert(self._edit, np.uint64(hi), np.uint64(lo), length, value)
        if new == FULL:
            self._grow(1)
            new = _insert(self._edit, np.uint64(hi), np.uint64(lo), length, value)
        if new and self._counters[length] == 1:
            self._list_lengths()

    def delete(self, hi: int, lo: int, length: int) -> bool:
        """Take a prefix out; return whether it was there."""
        gone = _delete(self._edit, np.uint64(hi), np.uint64(lo), length)
        if gone and self._counters[length] == 0:
            self._list_lengths()
        return bool(gone)

    def get(self, hi: int, lo: int, length: int) -> int:
        """Return the value of exactly this prefix, or -1."""
        at = find_rule(self._rules, self._key, np.uint64(hi), np.uint64(lo), length)
        return int(self._rules["value"][at]) if at >= 0 else MISS

    def lookup(self, hi: int, lo: int) -> int:
        """Return the value of the longest prefix that holds an address, or -1."""
        return int(lookup(self.arrays, np.uint64(hi), np.uint64(lo)))

    def bulk(self, highs: Array, lows: Array, lengths: Array, values: Array) -> None:
        """Add many prefixes at once; of equal ones the last wins. A million take about a second.

        Args:
            highs: ``(n,)`` upper halves; bits behind the length must be 0.
            lows: ``(n,)`` lower halves.
            lengths: ``(n,)`` lengths of 128.
            values: ``(n,)`` values.

        Raises:
            TableFullError: They may not fit; nothing was added.
        """
        if len(self) + len(highs) > self.limit:
            raise TableFullError("lpm", len(self) + len(highs), self.limit)
        # Shortest first: a short prefix paints a wide range, and it is cheap only while there is little below it.
        order = np.argsort(lengths, kind="stable")
        prefixes = (
            highs[order].astype(np.uint64),
            lows[order].astype(np.uint64),
            lengths[order].astype(np.int64),
            values[order].astype(np.int64),
        )
        self._grow_rules(len(self) + len(highs))
        done = _insert_many(self._edit, prefixes, 0)
        while done < len(highs):
            self._grow(1)
            done = _insert_many(self._edit, prefixes, done)
        self._list_lengths()

    def _bind(self) -> None:
        self.arrays = (self._nodes, self._rules, self._lengths, self._key)
        self._edit = (*self.arrays, self._depths, self._free, self._counters)

    def _grow(self, more: int) -> None:
        if self._counters[_FREE] < _CHUNKS_PER_INSERT:
            self._grow_chunks((len(self._nodes) - ROOT) // CHUNK)
        self._grow_rules(len(self) + more)

    def _grow_chunks(self, more: int) -> None:
        old = len(self._nodes)
        new = old + more * CHUNK
        self._nodes = np.concatenate([self._nodes, np.zeros(new - old, np.int32)])
        self._depths = np.concatenate([self._depths, np.zeros(new - old, np.uint8)])
        free = np.zeros((new - ROOT) // CHUNK, np.int32)
        used = int(self._counters[_FREE])
        free[:used] = self._free[:used]
        free[used : used + more] = np.arange(new - CHUNK, old - CHUNK, -CHUNK)  # the lowest is taken first
        self._free = free
        self._counters[_FREE] += more
        self._bind()

    def _grow_rules(self, count: int) -> None:
        size = len(self._rules)
        while 2 * count > size:
            size *= 2
        if size == len(self._rules):
            return
        larger = np.zeros(size, RULE)
        _rehash(self._rules, self._key, larger)
        self._rules = larger
        self._bind()

    def _list_lengths(self) -> None:
        """Rewrite the list of IPv6 lengths, longest first, in place."""
        present = [length for length in range(128, -1, -1) if self._counters[length]]
        for i, length in enumerate(present):
            mask = (1 << 128) - (1 << (128 - length))
            self._lengths[i] = (mask >> 64, mask & 0xFFFF_FFFF_FFFF_FFFF, length)
        self._lengths["length"][len(present)] = -1
