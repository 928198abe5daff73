"""The neighbor and the VTEP table against a dict; the index under collisions."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.tables import index, neighbour, vtep
from dataplane.tables.address import halves, to_address
from dataplane.tables.hash import make_key
from dataplane.tables.neighbour import NEIGHBOUR, NeighbourTable, State
from dataplane.tables.result import FULL, MISS, TableFullError
from dataplane.tables.vtep import VTEP, VtepTable
from tests import naive

CAPACITY = 6
INTERFACE = st.integers(1, 3)
ADDRESS = st.sampled_from(
    [to_address(0, 0xFFFF_0AF4_0000 + i) for i in range(4)] + [to_address(0xFE80 << 48, i) for i in range(3)]
)


def find(table: NeighbourTable, interface: int, address: Any) -> int:
    """Call the kernel as a stage does."""
    hi, lo = halves(address)
    return int(neighbour.find(table.arrays, interface, np.uint64(hi), np.uint64(lo)))


class NeighbourMachine(RuleBasedStateMachine):
    """A table of six rows, often full."""

    def __init__(self):
        super().__init__()
        self.table = NeighbourTable(CAPACITY)
        self.model = {}

    @rule(interface=INTERFACE, address=ADDRESS)
    def insert(self, interface, address):
        key = interface, address
        if key not in self.model and len(self.model) == CAPACITY:
            with pytest.raises(TableFullError, match="neighbour: full, 6 of 6"):
                self.table.insert(interface, address)
            return
        row = self.table.insert(interface, address)
        assert self.model.setdefault(key, row) == row
        self.table.records["mac"][row] = 1 + row

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data):
        key = data.draw(st.sampled_from(list(self.model)))
        row = self.model.pop(key)
        self.table.delete(row)
        assert find(self.table, *key) == MISS
        assert self.table.records[row] == np.zeros((), NEIGHBOUR)

    @rule(interface=INTERFACE, address=ADDRESS)
    def look_up(self, interface, address):
        expected = self.model.get((interface, address), MISS)
        assert find(self.table, interface, address) == self.table.find(interface, address) == expected

    @invariant()
    def entries_and_rows_agree(self):
        assert {(interface, address): row for row, interface, address in self.table.items()} == self.model
        assert len(set(self.model.values())) == len(self.model) == len(self.table)
        assert all(self.table.records["mac"][row] == 1 + row for row in self.model.values())


NeighbourMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestNeighbourMachine = NeighbourMachine.TestCase


def test_the_same_address_on_two_interfaces_is_two_neighbours():
    table = NeighbourTable()
    rows = {table.insert(interface, "fe80::1") for interface in (1, 2)}
    assert len(rows) == 2
    assert rows == {find(table, 1, "fe80::1"), find(table, 2, "fe80::1")}


def test_a_new_neighbour_has_no_state():
    table = NeighbourTable()
    assert table.records["state"][table.insert(1, "192.0.2.1")] == State.NONE


def test_all_rows_of_a_full_table_are_found():
    table = NeighbourTable(1024)
    rows = [table.insert(1, to_address(0, 0xFFFF_0AF4_0000 + i)) for i in range(1024)]
    assert [find(table, 1, to_address(0, 0xFFFF_0AF4_0000 + i)) for i in range(1024)] == rows


def test_a_vtep_is_found_by_its_outer_address_of_either_family():
    table = VtepTable()
    first = table.insert("192.0.2.1", 0x66_0000_0001, oif=3, mtu=1450)
    second = table.insert("2001:db8::1", 0x66_0000_0002, oif=3, mtu=1430)
    assert [table.find(text) for text in ("192.0.2.1", "2001:db8::1", "192.0.2.2")] == [first, second, MISS]
    hi, lo = halves("2001:db8::1")
    assert vtep.find(table.arrays, np.uint64(hi), np.uint64(lo)) == second


def test_changing_a_vtep_keeps_its_row_and_counters():
    table = VtepTable()
    row = table.insert("192.0.2.1", 1, oif=3, mtu=1450)
    table.records["tx_packets"][row] = 9
    assert table.insert("192.0.2.1", 2, oif=4, mtu=1400) == row
    assert table.records[["mac", "oif", "mtu", "tx_packets"]][row].tolist() == (2, 4, 1400, 9)
    assert [(row, to_address(*halves("192.0.2.1")))] == list(table.items())


def test_a_deleted_vtep_is_no_node_any_more():
    table = VtepTable(capacity=1)
    table.delete(table.insert("192.0.2.1", 1, oif=3, mtu=1450))
    assert table.find("192.0.2.1") == MISS
    with pytest.raises(KeyError):
        table.delete(0)
    assert table.insert("192.0.2.2", 1, oif=3, mtu=1450) == 0
    with pytest.raises(TableFullError):
        table.insert("192.0.2.1", 1, oif=3, mtu=1450)


def test_records_fill_whole_cache_lines():
    assert (NEIGHBOUR.itemsize, VTEP.itemsize, index.SLOT.itemsize) == (64, 128, 32)


class Collisions:
    """An index whose entries all have the home slot ``home``."""

    def __init__(self, home: int, count: int) -> None:
        self.slots, self.key = index.make_slots(16), make_key(3)
        mask = len(self.slots) - 1
        words = (lo for lo in range(1, 1 << 16) if naive.keyed_hash([0, lo, 0], self.key.tolist()) & mask == home)
        self.crafted = [np.uint64(lo) for lo in islice(words, count)]

    def insert(self, row: int) -> int:
        return int(index.insert(self.slots, self.key, 0, np.uint64(0), self.crafted[row], row))

    def delete(self, row: int) -> int:
        return int(index.delete(self.slots, self.key, 0, np.uint64(0), self.crafted[row], row))

    def find(self, row: int) -> int:
        return int(index.find(self.slots, self.key, 0, np.uint64(0), self.crafted[row]))


def test_an_index_refuses_what_would_be_too_far_from_home():
    collisions = Collisions(home=50, count=index.MAX_PROBE + 1)  # the run wraps around the end of the 64 slots
    rows = range(index.MAX_PROBE)
    assert [collisions.insert(row) for row in rows] == list(rows)
    assert collisions.insert(index.MAX_PROBE) == FULL
    assert [collisions.find(row) for row in rows] == list(rows)
    assert collisions.find(index.MAX_PROBE) == MISS


def test_a_delete_leaves_no_hole_before_those_it_had_pushed_away():
    collisions = Collisions(home=60, count=8)
    rows = range(8)
    for row in rows:
        collisions.insert(row)
    for gone in (0, 5, 3):
        assert collisions.delete(gone) == gone
        assert collisions.delete(gone) == MISS
        assert collisions.find(gone) == MISS
    assert [collisions.find(row) for row in (1, 2, 4, 6, 7)] == [1, 2, 4, 6, 7]
    assert collisions.insert(5) == 5
    assert np.count_nonzero(collisions.slots["row"]) == 6


def test_the_zero_address_is_a_key_like_any_other():
    table = NeighbourTable(4)
    assert find(table, 0, "::") == MISS
    row = table.insert(0, "::")
    assert find(table, 0, "::") == row
    table.delete(row)
    assert find(table, 0, "::") == MISS
