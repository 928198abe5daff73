"""Longest prefix match over both address families; a value is a non-negative int32.

*IPv4*: a leaf-pushed trie (``trie``), two or three reads whatever the number of routes. *IPv6*: one hash table of all
prefixes (``prefixes``), probed for each length that is present, longest first. That table also holds the IPv4 prefixes,
where a delete finds the prefix that covers the hole; an IPv4 lookup never reads it. IPv4 prefixes are those of
::ffff:0:0/96 with 96 bits and more; ::/0 does not cover them, and 0.0.0.0/0 covers no IPv6 address.
"""

from typing import Any

import numpy as np

from dataplane.jit import Array, kernel, prefetch
from dataplane.tables import prefixes, trie
from dataplane.tables.hash import Word, make_key
from dataplane.tables.prefixes import PREFIX
from dataplane.tables.result import FULL, MISS, TableFullError
from dataplane.tables.trie import CHUNK, CHUNKS_PER_INSERT, EMPTY, ROOT

_V4 = 96  # length of the IPv4 default route
_V4_COUNTS = 129  # ``counts``: prefixes per IPv6 length, then per IPv4 length, then all
_ALL = 162
_POSITION = 0x7FFF_FFFF

LENGTH = np.dtype([("mask_hi", "u8"), ("mask_lo", "u8"), ("length", "i8")])
"""One IPv6 prefix length that is present; -1 ends the list."""


@kernel
def lookup6(arrays: Any, hi: Word, lo: Word) -> int:
    """Return the value for an IPv6 address, or -1; ``hi`` and ``lo`` are uint64."""
    table, lengths, key = arrays[1], arrays[2], arrays[3]
    masked_hi, masked_lo = hi & lengths[0]["mask_hi"], lo & lengths[0]["mask_lo"]
    at = prefixes.home(table, key, masked_hi, masked_lo, int(lengths[0]["length"]))
    for i in range(len(lengths) - 1):
        length = int(lengths[i]["length"])
        if length < 0:
            return MISS
        # The next length's memory is fetched while this one is looked at. The second hash also makes this function too
        # large to be inlined: in the loop of an IPv4 lookup it would crowd out registers (1.5 instead of 1.1 ns).
        following = lengths[i + 1]
        next_hi, next_lo = hi & following["mask_hi"], lo & following["mask_lo"]
        next_at = prefixes.home(table, key, next_hi, next_lo, int(following["length"]))
        prefetch(table, next_at)
        found = prefixes.find_from(table, at, masked_hi, masked_lo, length)
        if found >= 0:
            return int(table[found]["value"])
        masked_hi, masked_lo, at = next_hi, next_lo, next_at
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
        return trie.lookup4(arrays[0], lo)
    return lookup6(arrays, np.uint64(hi), np.uint64(lo))


@kernel
def lookup_many(arrays: Any, highs: Any, lows: Any, out: Any, count: int) -> None:
    """Write the value for each of ``count`` addresses to ``out`` (int32), -1 where there is none.

    Three passes, so that the memory of all packets is fetched at once: with a million routes 5 ns instead of 30.
    """
    nodes = arrays[0]
    others = 0
    for i in range(count):
        lo = lows[i]
        if highs[i] != 0 or (lo >> 32) != 0xFFFF:
            out[i] = 0  # no position of a chunk
            others += 1
            continue
        chunk = int(nodes[(lo >> 16) & 0xFFFF]) & _POSITION
        prefetch(nodes, chunk + int((lo >> 8) & 0xFF))
        out[i] = chunk
    for i in range(count):
        entry = int(nodes[(int(out[i]) & _POSITION) + int((lows[i] >> 8) & 0xFF)])
        if entry < 0:
            prefetch(nodes, (entry & _POSITION) + int(lows[i] & 0xFF))
        out[i] = entry
    for i in range(count):
        entry = int(out[i])
        if entry < 0:
            entry = int(nodes[(entry & _POSITION) + int(lows[i] & 0xFF)])
        out[i] = entry - 1
    if others == 0:
        return
    # After the others, because its registers would crowd out those of the first pass.
    for i in range(count):
        if highs[i] != 0 or (lows[i] >> 32) != 0xFFFF:
            out[i] = lookup6(arrays, highs[i], lows[i])


# --- edits -----------------------------------------------------------------------------------------------------------
# ``edit`` is (nodes, table, lengths, key, depths, free, spare, counts).


@kernel
def _is_v4(hi: Word, lo: Word, length: int) -> bool:
    return length >= _V4 and hi == 0 and (lo >> 32) == 0xFFFF


@kernel
def _insert(edit: Any, hi: Word, lo: Word, length: int, value: int) -> int:
    """Add a prefix or change its value; return 1 if its IPv6 length is new, else 0, or ``FULL`` before any change."""
    table, key, spare, counts = edit[1], edit[3], edit[6], edit[7]
    if spare[0] < CHUNKS_PER_INSERT or 2 * (counts[_ALL] + 1) > len(table):
        return FULL
    v4 = _is_v4(hi, lo, length)
    at = prefixes.find(table, key, hi, lo, length)
    new = at < 0
    if new:
        at = prefixes.add(table, key, hi, lo, length)
        counts[_ALL] += 1
        counts[length - _V4 + _V4_COUNTS if v4 else length] += 1
    table["value"][at] = value
    if not v4:
        return int(new and counts[length] == 1)
    nodes = (edit[0], edit[4], edit[5], edit[6])
    address, bits = int(lo & 0xFFFF_FFFF), length - _V4
    paint = (0, bits + 1, value + 1, bits + 1)
    if bits > 16:
        trie.paint_below(nodes, address, bits, paint)
        return 0
    if new:
        table["chunk"][at] = trie.take_uniform(nodes, value)
    else:
        trie.fill(nodes, int(table["chunk"][at]), value)
    trie.paint_root(nodes, address, bits, int(table["chunk"][at]), paint)
    return 0


@kernel
def _cover(edit: Any, address: int, length: int) -> int:
    """Return the slot of the longest IPv4 prefix shorter than ``length`` (of 32) that holds ``address``, or -1."""
    table, key, counts = edit[1], edit[3], edit[7]
    zero = np.uint64(0)
    for bits in range(length - 1, -1, -1):
        if counts[_V4_COUNTS + bits]:
            masked = np.uint64(0xFFFF_0000_0000 | address >> (32 - bits) << (32 - bits))
            prefetch(table, prefixes.home(table, key, zero, masked, bits + _V4))
    for bits in range(length - 1, -1, -1):
        if counts[_V4_COUNTS + bits]:
            masked = np.uint64(0xFFFF_0000_0000 | address >> (32 - bits) << (32 - bits))
            at = prefixes.find(table, key, zero, masked, bits + _V4)
            if at >= 0:
                return at
    return MISS


@kernel
def _uncover(edit: Any, address: int, bits: int, chunk: int) -> None:
    """Paint the range of a deleted IPv4 prefix with what covers it, and give back chunks that are no longer needed."""
    table = edit[1]
    nodes = (edit[0], edit[4], edit[5], edit[6])
    entry, depth, uniform = 0, 0, EMPTY
    cover = _cover(edit, address, bits)
    if cover >= 0:
        entry = int(table["value"][cover]) + 1
        depth = int(table["length"][cover]) - _V4
        uniform = int(table["chunk"][cover])
    paint = (bits + 1, bits + 1, entry, depth)
    if bits <= 16:
        trie.paint_root(nodes, address, bits, uniform, paint)
        trie.give_back(nodes, chunk)
        return
    trie.paint_below(nodes, address, bits, paint)
    if bits > 24:
        trie.merge_third(nodes, address)
    if trie.can_merge_second(nodes, address):
        cover = _cover(edit, address, 17)
        trie.merge_second(nodes, address, int(table["chunk"][cover]) if cover >= 0 else EMPTY)


@kernel
def _delete(edit: Any, hi: Word, lo: Word, length: int) -> int:
    """Take a prefix out; return 1 if no other has its IPv6 length, else 0, or ``MISS`` if it was not there."""
    table, key, counts = edit[1], edit[3], edit[7]
    at = prefixes.find(table, key, hi, lo, length)
    if at < 0:
        return MISS
    chunk = int(table["chunk"][at])
    prefixes.remove(table, key, at)
    counts[_ALL] -= 1
    if not _is_v4(hi, lo, length):
        counts[length] -= 1
        return int(counts[length] == 0)
    counts[_V4_COUNTS + length - _V4] -= 1
    _uncover(edit, int(lo & 0xFFFF_FFFF), length - _V4, chunk)
    return 0


@kernel
def _insert_many(edit: Any, columns: Any, start: int) -> int:
    """Add the prefixes of ``columns`` (highs, lows, lengths, values) from ``start``; return how far there was room."""
    highs, lows, lengths, values = columns
    for i in range(start, len(highs)):
        if _insert(edit, highs[i], lows[i], int(lengths[i]), int(values[i])) == FULL:
            return i
    return len(highs)


class Lpm:
    """Owns the arrays and edits them between bursts.

    A growing table moves to larger arrays: take ``arrays`` anew after every edit. ``limit`` bounds the prefixes.

    Attributes:
        arrays: ``(nodes, table, lengths, key)`` for ``lookup``.
    """

    def __init__(self, limit: int = 1 << 22, seed: int | None = None) -> None:
        self.limit = limit
        self._counts = np.zeros(_ALL + 1, np.int64)
        self._nodes = np.zeros(ROOT + CHUNK, np.int32)
        self._nodes[:ROOT] = EMPTY
        self._depths = np.zeros(ROOT + CHUNK, np.uint8)
        self._free = np.zeros(0, np.int32)
        self._spare = np.zeros(1, np.int64)
        self._table = np.zeros(256, PREFIX)
        self._lengths = np.zeros(130, LENGTH)
        self._lengths["length"] = -1
        self._key = make_key(seed)
        self._grow_chunks(16)

    def __len__(self) -> int:
        return int(self._counts[_ALL])

    @property
    def chunks(self) -> int:
        """How many chunks of 256 entries are in use, the empty one included."""
        return (len(self._nodes) - ROOT) // CHUNK - int(self._spare[0])

    @property
    def nbytes(self) -> int:
        """The memory of all arrays, in bytes."""
        return sum(array.nbytes for array in self._edit)

    def insert(self, hi: int, lo: int, length: int, value: int) -> None:
        """Add a prefix or change its value. ``length`` counts of 128: an IPv4 /24 is 120.

        Raises:
            TableFullError: The table holds ``limit`` prefixes; nothing was changed.
        """
        if len(self) >= self.limit and self.get(hi, lo, length) == MISS:
            raise TableFullError("lpm", len(self), self.limit)
        done = _insert(self._edit, np.uint64(hi), np.uint64(lo), length, value)
        if done == FULL:
            self._grow(1)
            done = _insert(self._edit, np.uint64(hi), np.uint64(lo), length, value)
        if done == 1:
            self._list_lengths()

    def delete(self, hi: int, lo: int, length: int) -> bool:
        """Take a prefix out; return whether it was there."""
        gone = _delete(self._edit, np.uint64(hi), np.uint64(lo), length)
        if gone == 1:
            self._list_lengths()
        return gone != MISS

    def get(self, hi: int, lo: int, length: int) -> int:
        """Return the value of exactly this prefix, or -1."""
        at = prefixes.find(self._table, self._key, np.uint64(hi), np.uint64(lo), length)
        return int(self._table["value"][at]) if at >= 0 else MISS

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
        # Shortest first: a short prefix paints a wide range, and that is cheap only while there is little below it.
        order = np.argsort(lengths, kind="stable")
        columns = (
            highs[order].astype(np.uint64),
            lows[order].astype(np.uint64),
            lengths[order].astype(np.int64),
            values[order].astype(np.int64),
        )
        self._grow_table(len(self) + len(highs))
        done = _insert_many(self._edit, columns, 0)
        while done < len(highs):
            self._grow(1)
            done = _insert_many(self._edit, columns, done)
        self._list_lengths()

    def _bind(self) -> None:
        self.arrays = (self._nodes, self._table, self._lengths, self._key)
        self._edit = (*self.arrays, self._depths, self._free, self._spare, self._counts)

    def _grow(self, more: int) -> None:
        if self._spare[0] < CHUNKS_PER_INSERT:
            self._grow_chunks((len(self._nodes) - ROOT) // CHUNK)
        self._grow_table(len(self) + more)

    def _grow_chunks(self, more: int) -> None:
        old = len(self._nodes)
        new = old + more * CHUNK
        self._nodes = np.concatenate([self._nodes, np.zeros(new - old, np.int32)])
        self._depths = np.concatenate([self._depths, np.zeros(new - old, np.uint8)])
        free = np.zeros((new - ROOT) // CHUNK, np.int32)
        unused = int(self._spare[0])
        free[:unused] = self._free[:unused]
        free[unused : unused + more] = np.arange(new - CHUNK, old - CHUNK, -CHUNK)  # the lowest is taken first
        self._free = free
        self._spare[0] += more
        self._bind()

    def _grow_table(self, count: int) -> None:
        size = len(self._table)
        while 2 * count > size:
            size *= 2
        if size == len(self._table):
            return
        larger = np.zeros(size, PREFIX)
        prefixes.rehash(self._table, self._key, larger)
        self._table = larger
        self._bind()

    def _list_lengths(self) -> None:
        """Rewrite the list of IPv6 lengths, longest first, in place."""
        present = [length for length in range(128, -1, -1) if self._counts[length]]
        for i, length in enumerate(present):
            mask = (1 << 128) - (1 << (128 - length))
            self._lengths[i] = (mask >> 64, mask & 0xFFFF_FFFF_FFFF_FFFF, length)
        self._lengths["length"][len(present)] = -1
