"""The keyed hash: the same numbers in every mode, unpredictable without the key."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.tables.hash import hash3, hash5, make_key
from tests import naive

WORD = st.integers(0, naive.MASK64)


def hash_of(words: Sequence[int], key: Any) -> int:
    """Call ``hash3`` as a table's owner does."""
    a, b, c = (np.uint64(word) for word in words)
    return int(hash3(a, b, c, key))


@given(st.lists(WORD, min_size=3, max_size=3), st.integers(0, 1000))
@settings(max_examples=200)
def test_hash3_equals_the_reference(words, seed):
    key = make_key(seed)
    assert hash_of(words, key) == naive.keyed_hash(words, key.tolist())


@given(st.lists(WORD, min_size=5, max_size=5), st.integers(0, 1000))
@settings(max_examples=100)
def test_hash5_equals_the_reference(words, seed):
    key = make_key(seed)
    a, b, c, d, e = (np.uint64(word) for word in words)
    assert int(hash5(a, b, c, d, e, key)) == naive.keyed_hash(words, key.tolist())


def test_a_negative_word_is_its_two_s_complement():
    key = make_key(1)
    assert int(hash3(np.uint64(1), np.uint64(2), -1, key)) == naive.keyed_hash([1, 2, naive.MASK64], key.tolist())


def test_a_seed_makes_the_key_reproducible():
    assert make_key(7).tolist() == make_key(7).tolist() != make_key(8).tolist()


def test_without_a_seed_two_keys_differ():
    assert make_key().tolist() != make_key().tolist()


def test_one_input_bit_flips_half_of_the_output_bits():
    draw, key = random.Random(1), make_key(1)
    flips = [0] * 64
    samples = 0
    for _ in range(40):
        words = [draw.getrandbits(64) for _ in range(3)]
        before = hash_of(words, key)
        for bit in range(192):
            changed = list(words)
            changed[bit // 64] ^= 1 << bit % 64
            difference = before ^ hash_of(changed, key)
            samples += 1
            for i in range(64):
                flips[i] += difference >> i & 1
    assert all(0.45 < count / samples < 0.55 for count in flips)


def test_neighbouring_addresses_spread_evenly():
    key = make_key(2)
    slots = [hash_of((0, 0xFFFF_0AF4_0000 + i, 1), key) % 64 for i in range(6400)]
    counts = [slots.count(slot) for slot in range(64)]
    assert 60 < min(counts) <= max(counts) < 150


def test_flows_crafted_against_one_key_do_not_collide_under_another():
    known, secret = make_key(1), make_key(2)
    crafted = [lo for lo in range(64 * 512) if hash_of((0, lo, 0), known) % 512 == 0]
    assert len(crafted) > 40
    homes = {hash_of((0, lo, 0), secret) % 512 for lo in crafted}
    assert len(homes) > 0.85 * len(crafted)
