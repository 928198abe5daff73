"""A keyed hash of a few 64-bit words: wyhash's mixing step with all constants secret.

``fold`` multiplies two words to 128 bits and XORs the halves of the product; on x86 and ARM that is one or two
instructions. Two folds mix three words. The key is drawn when a table is made: with a fixed hash anybody can compute
8192 flows that share one home slot and raise a lookup from 11 to 4693 ns.

The key must stay secret and ``key[0] == a`` (or any operand that becomes 0) loses the other operand of that fold; with
a random key that has probability 2**-64 per word, and an attacker cannot test for it without seeing hashes.
"""

import secrets
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import lower_builtin, type_callable

from dataplane.jit import MASK64, Array, kernel

KEY_WORDS = 4

Word: TypeAlias = "int | np.uint64"
"""An unsigned 64-bit word: an int of Python's, or numpy's. A kernel's caller outside makes it ``np.uint64``, or an
address with the top bit set would be a second type and compile the kernel again.
"""


def make_key(seed: int | None = None) -> Array:
    """Return ``(KEY_WORDS,)`` uint64: random, or reproducible from ``seed`` (tests and benches only)."""
    if seed is None:
        return np.frombuffer(bytearray(secrets.token_bytes(8 * KEY_WORDS)), np.uint64)
    return np.random.default_rng(seed).integers(0, MASK64, KEY_WORDS, np.uint64, endpoint=True)


def fold(a: Word, b: Word) -> int:
    """Return the upper XOR the lower half of the 128-bit product of two words, unsigned."""
    product = (int(a) & MASK64) * (int(b) & MASK64)
    return product >> 64 ^ product & MASK64


def _type_fold(context: Any) -> Any:
    return lambda a, b: types.uint64


def _lower_fold(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    # numba has no 128-bit integers, LLVM has: the product is one machine instruction instead of four multiplications.
    i64, i128 = ir.IntType(64), ir.IntType(128)
    words = [
        builder.zext(context.cast(builder, value, kind, types.uint64), i128)
        for value, kind in zip(arguments, signature.args, strict=True)
    ]
    product = builder.mul(*words)
    high = builder.trunc(builder.lshr(product, ir.Constant(i128, 64)), i64)
    return builder.xor(high, builder.trunc(product, i64))


def _register(type_callable: Any = type_callable, lower_builtin: Any = lower_builtin) -> None:
    type_callable(fold)(_type_fold)
    lower_builtin(fold, types.Integer, types.Integer)(_lower_fold)


_register()


@kernel
def hash3(a: Word, b: Word, c: Word, key: Any) -> int:
    """Return 64 bits that depend on three words and ``key``, as ``make_key`` made it."""
    mixed = fold(int(a) ^ int(key[0]), int(b) ^ int(key[1]))
    return fold(mixed ^ int(key[2]), int(c) ^ int(key[3]))


@kernel
def hash5(a: Word, b: Word, c: Word, d: Word, e: Word, key: Any) -> int:
    """Return 64 bits that depend on five words and ``key``: a flow's addresses, ports and protocol."""
    mixed = fold(int(a) ^ int(key[0]), int(b) ^ int(key[1])) ^ fold(int(c) ^ int(key[2]), int(d) ^ int(key[3]))
    return fold(mixed ^ int(key[1]), int(e) ^ int(key[2]))
