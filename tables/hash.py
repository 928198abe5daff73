"""A keyed hash of a few 64-bit words: NH, the universal hash of UMAC, and a finisher.

*NH* (Black et al., CRYPTO 1999; RFC 4418 5.2.2) adds a secret to each 32-bit half, multiplies the halves of a word, and
sums the products modulo 2**64. Two different inputs collide with probability 2**-32 over the keys, whoever chose them.
Tables use the low bits, and those of NH alone are poor; two rounds of shift and multiplication spread all 64.

The key is drawn when a table is made: with a fixed hash anybody can compute 8192 flows that share one home slot and
raise a lookup from 11 to 4693 ns. The products fit in 64 bits, so this is plain arithmetic in every mode.
"""

import secrets
from typing import Any, TypeAlias

import numpy as np

from dataplane.jit import MASK64, Array, kernel

KEY_WORDS = 6  # one for each word, and the finisher's multiplier

Word: TypeAlias = "int | np.uint64"
"""An unsigned 64-bit word: an int of Python's, or numpy's. A kernel's caller outside makes it ``np.uint64``, or an
address with the top bit set would be a second type and compile the kernel again.
"""


def make_key(seed: int | None = None) -> Array:
    """Return ``(KEY_WORDS,)`` uint64: random, or reproducible from ``seed`` (tests and benches only)."""
    if seed is None:
        key = np.frombuffer(bytearray(secrets.token_bytes(8 * KEY_WORDS)), np.uint64)
    else:
        key = np.random.default_rng(seed).integers(0, MASK64, KEY_WORDS, np.uint64, endpoint=True)
    key[-1] |= np.uint64(1)  # an even multiplier would lose bits
    return key


@kernel
def _product(word: Word, secret: Word) -> Word:
    """Return the product of the two halves of a word, a secret added to each."""
    low32, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
    bits = np.uint64(int(word) & MASK64)
    low = ((bits & low32) + (np.uint64(secret) & low32)) & low32
    high = ((bits >> half) + (np.uint64(secret) >> half)) & low32
    return low * high


@kernel
def _add(a: Word, b: Word) -> Word:
    """Return the sum modulo 2**64; numpy's own would warn where it wraps."""
    return np.uint64((int(a) + int(b)) & MASK64)


@kernel
def _finish(word: Word, multiplier: Word) -> Word:
    """Return a word of whose bits each depends on all bits of ``word``."""
    word = np.uint64(word) ^ (np.uint64(word) >> np.uint64(32))
    word = np.uint64((int(word) * int(multiplier)) & MASK64)
    word = word ^ (word >> np.uint64(29))
    word = np.uint64((int(word) * int(multiplier)) & MASK64)
    return word ^ (word >> np.uint64(32))


@kernel
def hash3(a: Word, b: Word, c: Word, key: Any) -> Word:
    """Return 64 bits that depend on three words and ``key``, as ``make_key`` made it."""
    total = _add(_add(_product(a, key[0]), _product(b, key[1])), _product(c, key[2]))
    return _finish(total, key[5])


@kernel
def hash5(a: Word, b: Word, c: Word, d: Word, e: Word, key: Any) -> Word:
    """Return 64 bits that depend on five words and ``key``: a flow's addresses, ports and protocol."""
    total = _add(_add(_product(a, key[0]), _product(b, key[1])), _product(c, key[2]))
    return _finish(_add(_add(total, _product(d, key[3])), _product(e, key[4])), key[5])
