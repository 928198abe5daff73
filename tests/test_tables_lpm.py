"""Longest prefix match against an oracle that looks at every prefix."""

from ipaddress import ip_network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.tables.address import halves, prefix_halves
from dataplane.tables.lpm import Lpm, lookup_many
from dataplane.tables.result import TableFullError
from tests import naive

V4 = 0xFFFF << 32
# Few distinct bytes, so that prefixes nest, neighbors share chunks and lookups hit.
BYTE = st.sampled_from([0, 1, 2, 127, 128, 255])
V4_ADDRESS = st.builds(lambda b, c, d: V4 | 10 << 24 | b << 16 | c << 8 | d, BYTE, BYTE, BYTE)
V6_ADDRESS = st.builds(lambda a, b, c: a << 120 | b << 64 | c, st.sampled_from([0x20, 0xFE]), BYTE, BYTE)
ADDRESS = V4_ADDRESS | V6_ADDRESS
# Interpreted, a /0 paints 65536 entries: it has tests of its own below.
V4_LENGTH = st.sampled_from([104, 110, 111, 112, 113, 116, 119, 120, 121, 124, 127, 128])
V4_PREFIX = st.tuples(V4_ADDRESS, V4_LENGTH)
V6_PREFIX = st.tuples(V6_ADDRESS, st.integers(0, 128))
PREFIX = (V4_PREFIX | V6_PREFIX).map(lambda pair: (pair[0] & naive.mask(pair[1]), pair[1]))
VALUE = st.integers(0, 1000) | st.just(2**31 - 2)


def split(address: int) -> tuple[int, int]:
    """Halves of 128 bits."""
    return address >> 64, address & naive.MASK64


def many(table: Lpm, addresses: list[int]) -> list[int]:
    """What ``lookup_many`` gives."""
    highs = np.array([address >> 64 for address in addresses], np.uint64)
    lows = np.array([address & naive.MASK64 for address in addresses], np.uint64)
    out = np.full(len(addresses), -9, np.int32)
    lookup_many(table.arrays, highs, lows, out, len(addresses))
    return [int(value) for value in out]


def edges(prefix: int, length: int) -> list[int]:
    """The addresses just inside and just outside a prefix."""
    last = prefix | ~naive.mask(length) & (1 << 128) - 1
    return [prefix, last, max(prefix - 1, 0), min(last + 1, (1 << 128) - 1)]


class LpmMachine(RuleBasedStateMachine):
    """Inserts, changes and deletes; every lookup agrees with the oracle."""

    def __init__(self):
        super().__init__()
        self.table = Lpm()
        self.model = naive.Lpm()

    @rule(prefix=PREFIX, value=VALUE)
    def insert(self, prefix, value):
        self.table.insert(*split(prefix[0]), prefix[1], value)
        self.model.prefixes[prefix] = value
        self.agree(edges(*prefix))

    @precondition(lambda self: self.model.prefixes)
    @rule(data=st.data())
    def delete(self, data):
        prefix = data.draw(st.sampled_from(sorted(self.model.prefixes)))
        assert self.table.delete(*split(prefix[0]), prefix[1])
        del self.model.prefixes[prefix]
        self.agree(edges(*prefix))

    @rule(prefix=PREFIX)
    def delete_what_may_be_absent(self, prefix):
        known = self.model.prefixes.pop(prefix, None)
        assert self.table.delete(*split(prefix[0]), prefix[1]) == (known is not None)

    @rule(prefix=PREFIX)
    def get(self, prefix):
        assert self.table.get(*split(prefix[0]), prefix[1]) == self.model.prefixes.get(prefix, -1)

    @rule(addresses=st.lists(ADDRESS, min_size=1, max_size=8))
    def agree(self, addresses):
        expected = [self.model.lookup(address) for address in addresses]
        assert [self.table.lookup(*split(address)) for address in addresses] == expected
        assert many(self.table, addresses) == expected

    @invariant()
    def the_number_of_prefixes_agrees(self):
        assert len(self.table) == len(self.model.prefixes)

    def teardown(self):
        for prefix, length in self.model.prefixes:
            assert self.table.delete(*split(prefix), length)
        assert len(self.table) == 0
        assert self.table.chunks == 1, "chunks leak"


LpmMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLpmMachine = LpmMachine.TestCase


def insert(table: Lpm, text: str, value: int) -> None:
    table.insert(*prefix_halves(ip_network(text)), value)


def delete(table: Lpm, text: str) -> bool:
    return table.delete(*prefix_halves(ip_network(text)))


def test_the_families_do_not_see_each_other():
    table = Lpm()
    insert(table, "::/0", 1)
    assert table.lookup(*halves("192.0.2.1")) == -1
    insert(table, "0.0.0.0/0", 2)
    assert table.lookup(*halves("192.0.2.1")) == 2
    assert table.lookup(*halves("2001:db8::1")) == 1
    assert delete(table, "::/0")
    assert table.lookup(*halves("2001:db8::1")) == -1
    assert table.lookup(*halves("::fffe:192.0.2.1")) == -1


def test_a_default_route_appears_below_longer_prefixes_and_goes_again():
    table = Lpm()
    insert(table, "10.244.1.2/32", 32)
    insert(table, "10.244.1.0/24", 24)
    insert(table, "10.0.0.0/8", 8)
    insert(table, "0.0.0.0/0", 0)
    probes = ["10.244.1.2", "10.244.1.3", "10.1.1.1", "192.0.2.1", "255.255.255.255", "0.0.0.0"]
    assert [table.lookup(*halves(probe)) for probe in probes] == [32, 24, 8, 0, 0, 0]
    assert delete(table, "0.0.0.0/0")
    assert [table.lookup(*halves(probe)) for probe in probes] == [32, 24, 8, -1, -1, -1]
    assert delete(table, "10.244.1.0/24")
    assert [table.lookup(*halves(probe)) for probe in probes] == [32, 8, 8, -1, -1, -1]


def test_an_emptied_chunk_is_given_back():
    table = Lpm()
    insert(table, "10.0.0.0/8", 8)
    before = table.chunks
    insert(table, "10.244.1.2/32", 32)
    assert table.chunks == before + 2
    assert delete(table, "10.244.1.2/32")
    assert table.chunks == before


def test_two_halves_hide_a_prefix_and_give_it_back():
    table = Lpm()
    insert(table, "10.244.1.0/24", 24)
    insert(table, "10.244.1.0/25", 1)
    insert(table, "10.244.1.128/25", 2)
    assert delete(table, "10.244.1.0/25")
    assert delete(table, "10.244.1.128/25")
    assert [table.lookup(*halves(f"10.244.1.{host}")) for host in (0, 127, 128, 255)] == [24] * 4


def test_the_table_grows_past_its_first_arrays():
    table = Lpm(seed=1)
    before = table.arrays
    for i in range(200):
        table.insert(0, V4 | i << 16 | 1 << 8 | 1, 128, i)
    assert table.arrays[0] is not before[0]
    assert [table.lookup(0, V4 | i << 16 | 1 << 8 | 1) for i in range(200)] == list(range(200))


def test_a_full_table_refuses_a_new_prefix_and_changes_an_old_one():
    table = Lpm(limit=2)
    table.insert(0, V4 | 1, 128, 1)
    table.insert(0, V4 | 2, 128, 2)
    with pytest.raises(TableFullError, match="2 of 2") as refused:
        table.insert(0, V4 | 3, 128, 3)
    assert (refused.value.used, refused.value.capacity) == (2, 2)
    table.insert(0, V4 | 1, 128, 7)
    assert [table.lookup(0, V4 | i) for i in (1, 2, 3)] == [7, 2, -1]
    table.delete(0, V4 | 2, 128)
    table.insert(0, V4 | 3, 128, 3)
    assert [table.lookup(0, V4 | i) for i in (1, 2, 3)] == [7, -1, 3]


@given(st.lists(st.tuples(PREFIX, VALUE), max_size=40), st.lists(ADDRESS, min_size=1, max_size=10))
@settings(max_examples=25)
def test_bulk_is_the_same_as_one_by_one(entries, addresses):
    table, model = Lpm(), naive.Lpm()
    keys = [prefix for (prefix, _), _ in entries]
    table.bulk(
        np.array([key >> 64 for key in keys], np.uint64),
        np.array([key & naive.MASK64 for key in keys], np.uint64),
        np.array([length for (_, length), _ in entries], np.int64),
        np.array([value for _, value in entries], np.int64),
    )
    model.prefixes.update(entries)
    assert len(table) == len(model.prefixes)
    assert many(table, addresses) == [model.lookup(address) for address in addresses]


def test_bulk_refuses_more_than_the_limit():
    zeros = np.zeros(3, np.uint64)
    with pytest.raises(TableFullError):
        Lpm(limit=2).bulk(zeros, zeros, zeros, zeros)
