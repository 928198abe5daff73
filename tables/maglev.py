"""Maglev hashing as ip_vs's ``mh``: a table of 4093 buckets in which each backend has its share.

Each backend visits the buckets in an order of its own, a start and a step that its address decides, and the backends
take turns in taking the next free one (Eisenbud et al., NSDI 2016, 3.4). So the table depends little on which backends
there are, and nodes that know the same backends send a client to the same one. The hash is SipHash-1-3 with ip_vs's
public keys: whoever chooses many client addresses can aim at one backend, here as there.

More backends than buckets: the oldest ones have none.
"""

from typing import Any

import numpy as np

from dataplane.jit import MASK64, kernel
from dataplane.tables.backend import NONE, gcd, is_usable
from dataplane.tables.hash import Word

BUCKETS = 4093  # CONFIG_IP_VS_MH_TAB_INDEX=12
_SHARE_BITS = 6  # a backend takes less than 2**6 buckets in one turn
_KEY_BUCKET = 2654435761  # both words of the key of a client's bucket and a backend's start
_KEY_STEP = 2654446892
_NO_SIGN = 0x7FFF_FFFF
_LENGTH = 4 << 56  # SipHash's last word ends with the length of the input


@kernel
def _add(a: Word, b: Word) -> Word:
    return np.uint64((int(a) + int(b)) & MASK64)


@kernel
def _rotate(word: Word, bits: int) -> Word:
    word = np.uint64(word)
    return np.uint64((int(word) << bits) & MASK64) | (word >> np.uint64(64 - bits))


@kernel
def _round(state: Any) -> Any:
    """Return the four words of SipHash's state after one round."""
    v0, v1, v2, v3 = state
    v0 = _add(v0, v1)
    v1 = _rotate(v1, 13) ^ v0
    v0 = _rotate(v0, 32)
    v2 = _add(v2, v3)
    v3 = _rotate(v3, 16) ^ v2
    v0 = _add(v0, v3)
    v3 = _rotate(v3, 21) ^ v0
    v2 = _add(v2, v1)
    v1 = _rotate(v1, 17) ^ v2
    v2 = _rotate(v2, 32)
    return v0, v1, v2, v3


@kernel
def siphash(word: int, key: int) -> int:
    """Return the low 32 bits of SipHash-1-3 of a little-endian 32-bit word; both words of the key are ``key``."""
    secret = np.uint64(key)
    message = np.uint64(_LENGTH | (word & 0xFFFF_FFFF))
    v0, v1 = secret ^ np.uint64(0x736F6D6570736575), secret ^ np.uint64(0x646F72616E646F6D)
    v2, v3 = secret ^ np.uint64(0x6C7967656E657261), secret ^ np.uint64(0x7465646279746573)
    v0, v1, v2, v3 = _round((v0, v1, v2, v3 ^ message))
    v0, v1, v2, v3 = _round((v0 ^ message, v1, v2 ^ np.uint64(0xFF), v3))
    v0, v1, v2, v3 = _round((v0, v1, v2, v3))
    v0, v1, v2, v3 = _round((v0, v1, v2, v3))
    return int((v0 ^ v1 ^ v2 ^ v3) & np.uint64(0xFFFF_FFFF))


@kernel
def fold(hi: Word, lo: Word) -> int:
    """Return the 32 bits of an address that ip_vs hashes: IPv4 itself, the four words of IPv6 xored."""
    hi, lo = np.uint64(hi), np.uint64(lo)
    if hi == 0 and (lo >> np.uint64(32)) == 0xFFFF:
        return int(lo & np.uint64(0xFFFF_FFFF))
    both = hi ^ lo
    return int((both ^ (both >> np.uint64(32))) & np.uint64(0xFFFF_FFFF))


@kernel
def pick(backends: Any, buckets: Any, base: int, word: int, fallback: bool) -> int:
    """Return the row of the backend in a client's bucket, or -1.

    Args:
        backends: ``(n,)`` of ``BACKEND``.
        buckets: Rows, int32; this service's begin at ``base``.
        base: Where they begin.
        word: The client's folded address plus its port, if ports count.
        fallback: Whether to try further buckets when the backend cannot be used.
    """
    home = siphash(word, _KEY_BUCKET) % BUCKETS
    row = int(buckets[(base + home) & _NO_SIGN])
    if row < 0 or is_usable(backends[row]):
        return row
    if not fallback:
        return NONE
    for offset in range(BUCKETS):
        at = siphash(word + (offset + home) % BUCKETS, _KEY_BUCKET) % BUCKETS
        row = int(buckets[(base + at) & _NO_SIGN])
        if row < 0 or is_usable(backends[row]):
            return row
    return NONE


@kernel
def _prepare(backends: Any, head: int) -> int:
    """Give each backend of a list its start, step and buckets per turn; return whether any has a share."""
    divisor, heaviest = 0, 0
    row = head
    while row >= 0:
        weight = int(backends[row]["last_weight"])
        divisor = gcd(weight, divisor)
        heaviest = max(heaviest, weight)
        row = int(backends[row]["next"])
    if divisor == 0:
        return 0
    shift = 0
    while (heaviest // divisor) >> shift >= 1 << _SHARE_BITS:
        shift += 1
    row = head
    while row >= 0:
        backend = backends[row]
        word = fold(backend["hi"], backend["lo"]) + int(backend["port"])
        backend["place"] = siphash(word, _KEY_BUCKET) % BUCKETS
        backend["skip"] = siphash(word, _KEY_STEP) % (BUCKETS - 1) + 1
        weight = int(backend["last_weight"])
        backend["turns"] = max((weight // divisor) >> shift, int(weight > 0))
        row = int(backend["next"])
    return 1


@kernel
def build(backends: Any, head: int, buckets: Any, base: int) -> None:
    """Fill the ``BUCKETS`` buckets from ``base`` on from the list of backends that begins at ``head``.

    ``turns``, ``place`` and ``skip`` of the backends are overwritten.
    """
    for bucket in range(base, base + BUCKETS):
        buckets[bucket] = NONE
    if _prepare(backends, head) == 0:
        return
    # Unsigned, so that there is no check for counting from the end.
    first, end, size = np.uint64(base), np.uint64(base + BUCKETS), np.uint64(BUCKETS)
    at: Word = first
    row, left, turns, skip = NONE, BUCKETS, 0, size
    while left > 0:
        if turns == 0:
            if row >= 0:
                backends[row]["place"] = int(at - first)
                row = int(backends[row]["next"])
            if row < 0:
                row = head
            backend = backends[row]
            at, skip = first + np.uint64(int(backend["place"])), np.uint64(int(backend["skip"]))
            turns = int(backend["turns"])
            continue
        # Two loops make the end a branch, which the processor runs ahead of; a conditional move takes 1.4 times longer.
        while True:
            while at < end and int(buckets[at]) >= 0:
                at += skip
            if at < end:
                break
            at -= size
        buckets[at] = row
        turns -= 1
        left -= 1
