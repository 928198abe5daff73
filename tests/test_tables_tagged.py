"""The index of tags against a list, under collisions; the memory of large tables."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.tables import tagged
from dataplane.tables.memory import make_zeros
from dataplane.tables.result import FULL, MISS

SLOTS = 64
# Homes near the end, so that runs wrap around; a few different tags for each.
WORD = st.builds(
    lambda home, above: np.uint64(above << 6 | home), st.sampled_from([0, 1, 60, 62, 63]), st.integers(0, 3)
)


def entries(slots):
    """Every entry as (tag, value), and how far it is from its home."""
    found = {}
    for at in np.flatnonzero(slots).tolist():
        tag = int(slots[at]) & tagged.TAG
        found[tag, (int(slots[at]) >> 32) - 1] = (at - tag) % len(slots)
    return found


def assert_no_hole(slots):
    """Every entry can be reached from its home."""
    for (tag, _), distance in entries(slots).items():
        assert all(slots[(tag + step) % len(slots)] for step in range(distance))


@given(st.lists(st.tuples(st.booleans(), WORD), max_size=60))
@settings(max_examples=150)
def test_what_was_placed_and_not_removed_is_reachable(steps):
    slots = tagged.make_slots(SLOTS // 2)
    model: list[tuple[int, int]] = []
    for value, (add, word) in enumerate(steps):
        if add and len(model) < SLOTS // 2:
            assert tagged.place(slots, word, value) == value
            model.append((int(word), value))
        elif model:
            tag, gone = model.pop(int(word) % len(model))
            assert tagged.remove(slots, np.uint64(tag), gone) == gone
            assert tagged.remove(slots, np.uint64(tag), gone) == MISS
        assert set(entries(slots)) == set(model)
        assert_no_hole(slots)


@given(st.lists(WORD, min_size=1, max_size=30))
@settings(max_examples=60)
def test_first_leads_to_an_entry_of_the_tag_or_nowhere(words):
    slots = tagged.make_slots(SLOTS // 2)
    for value, word in enumerate(words):
        tagged.place(slots, word, value)
    for tag in range(256):
        same = [value for value, word in enumerate(words) if int(word) == tag]
        found = tagged.first(slots, np.uint64(tag))
        assert found == (same[0] if same else MISS)


def test_only_the_low_half_of_a_hash_counts():
    slots = tagged.make_slots(8)
    tagged.place(slots, np.uint64(0xDEAD_BEEF_0000_0007), 5)
    assert tagged.first(slots, np.uint64(7)) == 5
    assert tagged.remove(slots, np.uint64(1 << 63 | 7), 5) == 5


def test_the_largest_value_and_tag_fit():
    slots = tagged.make_slots(8)
    value, word = (1 << 30) - 1, np.uint64(0xFFFF_FFFF)
    assert tagged.place(slots, word, value) == value
    assert tagged.first(slots, word) == value


def test_an_entry_is_refused_that_would_be_too_far_from_home():
    slots = tagged.make_slots(tagged.MAX_PROBE)
    word = np.uint64(len(slots) - 3)
    for value in range(tagged.MAX_PROBE):
        assert tagged.place(slots, word, value) == value
    before = slots.copy()
    assert tagged.place(slots, word, 999) == FULL
    assert (slots == before).all()
    assert tagged.first(slots, np.uint64(int(word) + 2 * len(slots))) == MISS, "a lookup stops there as well"


def test_at_most_half_of_the_slots_are_for_entries():
    assert [len(tagged.make_slots(entries)) for entries in (1, 32, 33, 3 << 10)] == [64, 64, 128, 8192]


def test_memory_begins_with_a_page_and_is_zero():
    for count in (3, 1 << 15):
        array = make_zeros(count, np.dtype("V128"))
        assert array.ctypes.data % 4096 == 0
        assert array.nbytes == 128 * count
        assert not array.tobytes().strip(b"\0")


def test_a_forked_child_writes_into_its_own_copy():
    array = make_zeros(1 << 10, np.int64)
    array[0] = 1
    child = os.fork()
    if child == 0:
        array[:] = 2
        os._exit(int(array.sum()) & 0x7F)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2048 & 0x7F
    assert array.sum() == 1
