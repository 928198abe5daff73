"""The flow table against dicts: both directions at once, full, deleted and added again; expiry; floods."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.batch import PACKET, ROWS
from dataplane.tables import flow, tagged
from dataplane.tables.flow import (
    ASSURED,
    CLASH,
    DST_NAT,
    FLOW,
    FREE,
    FULL,
    MISS,
    ORIGINAL,
    REPLY,
    RESERVE,
    SOURCE_KEPT,
    TUPLE,
    Count,
    FlowTable,
    LbState,
    TcpState,
    Timeout,
)
from tests import naive
from tests.flows import (
    CLIENT,
    NOW,
    POD,
    POD6,
    POD_2,
    TCP,
    UDP,
    VIP,
    filled,
    find,
    find_in_passes,
    hand,
    insert,
    record_of,
    service_flow,
    tuple_of,
)

TUPLES = st.builds(
    lambda src, dst, sport, dport, protocol: (src, dst, sport, dport, protocol),
    st.sampled_from([POD, POD_2, POD6]),
    st.sampled_from([POD, VIP, POD6]),
    st.sampled_from([53, 4000]),
    st.sampled_from([53, 4000]),
    st.sampled_from([TCP, UDP]),
)


class FlowMachine(RuleBasedStateMachine):
    """A table of five rows, often full; tuples that clash."""

    def __init__(self):
        super().__init__()
        self.table = FlowTable(5)
        self.model = naive.Flows(5)
        self.deadlines = {}

    @rule(original=TUPLES, reply=TUPLES)
    def insert(self, original, reply):
        before = [array.tobytes() for array in (self.table.arrays[0], self.table.flows)]
        row = insert(self.table, original, reply)
        refusal = self.model.refusal(original, reply)
        if refusal:
            assert row == refusal
            assert before == [array.tobytes() for array in (self.table.arrays[0], self.table.flows)]
            return
        assert row not in self.model.rows
        self.model.insert(row, original, reply)
        self.deadlines[row] = 0

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data())
    def delete(self, data):
        self._delete(data.draw(st.sampled_from(sorted(self.model.rows))))

    def _delete(self, row):
        flow.delete(self.table.arrays, row)
        self.model.delete(row)
        del self.deadlines[row]

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data(), deadline=st.integers(1, 9))
    def refresh(self, data, deadline):
        row = data.draw(st.sampled_from(sorted(self.model.rows)))
        self.table.flows[row]["expires_ns"] = self.deadlines[row] = deadline
        self.table.flows[row]["status"] |= ASSURED

    @rule(now=st.integers(0, 9))
    def expire(self, now):
        self.table.flows["status"] |= np.where(self.table.flows["expires_ns"] == FREE, 0, ASSURED).astype(np.uint16)
        over = hand(self.table, now, len(self.table.flows))
        assert sorted(over) == [row for row in sorted(self.deadlines) if self.deadlines[row] <= now]
        for row in over:
            self._delete(row)

    @precondition(lambda self: self.model.rows)
    @rule(data=st.data())
    def keep_source(self, data):
        row = data.draw(st.sampled_from(sorted(self.model.rows)))
        flow.keep_source(self.table.arrays, row)
        self.model.keep_source(row)

    @rule(wanted=TUPLES)
    def look_up(self, wanted):
        assert find(self.table, wanted) == find_in_passes(self.table, wanted) == self.model.find(wanted)
        assert flow.find_source(self.table.arrays, record_of(wanted)) == self.model.find_source(wanted)

    @invariant()
    def all_are_found(self):
        assert self.table.items() == sorted(self.model.rows)
        assert len(self.table) == len(self.model.rows)
        for wanted, half in self.model.halves.items():
            assert find(self.table, wanted) == half
            assert tuple_of(self.table.tuples[half]) == wanted

    @invariant()
    def the_slots_hold_nothing_else(self):
        assert np.count_nonzero(self.table.arrays[0]) == len(self.model.halves) + len(self.model.sources)


FlowMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestFlowMachine = FlowMachine.TestCase


# --- entering --------------------------------------------------------------------------------------------------------


def test_a_new_flow_is_zero_but_for_its_tuples():
    table = FlowTable(2)
    table.flows.view(np.uint8)[:] = 0xA5
    table.arrays[6][0]["packets"] = table.arrays[6][1]["shared"] = 7
    original, reply = service_flow(0)
    row = insert(table, original, reply)
    new = table.flows[row]
    assert {name: new[name] for name in places(FLOW) if new[name] != 0} == {
        "created_ns": NOW,
        "backend": -1,
        "service": -1,
        "template": -1,
    }
    for half, wanted in enumerate((original, reply)):
        assert tuple_of(table.tuples[half]) == wanted
        assert not any(table.tuples[half][name] for name in list(places(TUPLE))[7:-1])


def test_a_tuple_is_in_the_table_once():
    table = FlowTable(4)
    original, reply = service_flow(0)
    other, other_reply = service_flow(1)
    row = insert(table, original, reply)
    for pair in ((original, other), (other, original), (reply, other), (other, reply), (other, other)):
        assert insert(table, *pair) == CLASH
    assert (find(table, original), find(table, reply)) == (2 * row, 2 * row + 1)
    assert find(table, other) == MISS
    assert insert(table, other, other_reply) >= 0
    assert table.counters["insert"] == 2
    assert table.counters["insert_failed"] == 5


def test_addresses_of_both_families_and_their_halves_all_count():
    base = (POD6, POD6 + 1, 1, 2, TCP)
    variants = [base, (POD6 ^ 1 << 127, *base[1:]), (POD6, base[1] ^ 1 << 64, 1, 2, TCP), (POD6, POD6 + 2, 1, 2, TCP)]
    variants += [(*base[:2], 2, 1, TCP), (*base[:2], 1, 3, TCP), (*base[:4], UDP), (POD6 + 1, POD6, 1, 2, TCP)]
    table = FlowTable(8)
    rows = [insert(table, wanted, service_flow(number)[1]) for number, wanted in enumerate(variants)]
    assert [find(table, wanted) for wanted in variants] == [2 * row for row in rows]


def test_a_full_table_takes_a_flow_again_after_a_delete():
    table = filled(4)
    newcomer = service_flow(4)
    assert insert(table, *newcomer) == FULL
    flow.delete(table.arrays, 2)
    assert insert(table, *newcomer) == 4
    assert find(table, service_flow(2)[0]) == MISS


def test_a_row_is_not_used_again_within_a_burst():
    """What a packet's flow said of it still holds when a later packet of the burst has ended the flow."""
    table = filled(4)
    before, freed = table.tuples.copy(), []
    table.flows["status"] |= DST_NAT | SOURCE_KEPT
    for number in range(ROWS):
        freed.append(table.items()[0])
        flow.delete(table.arrays, freed[-1])
        assert insert(table, *service_flow(4 + number)) not in freed
    assert len(table) == 4
    assert (table.tuples["src_lo"][:8] == before["src_lo"][:8]).all()
    assert (table.tuples["sport"][:8] == before["sport"][:8]).all()
    assert set(table.flows["status"][:4]) == {DST_NAT}
    assert RESERVE == ROWS


def test_the_row_that_was_freed_first_is_used_first():
    table = filled(4)
    rows = list(range(4))
    for number in range(3 * (RESERVE + 4)):
        flow.delete(table.arrays, rows[number])
        rows.append(insert(table, *service_flow(4 + number)))
    assert rows == [number % (RESERVE + 4) for number in range(len(rows))]


def test_a_clash_is_told_from_a_full_table():
    table = filled(4)
    assert insert(table, service_flow(4)[0], service_flow(0)[1]) == CLASH


def test_an_insert_without_a_slot_for_the_reply_leaves_none_for_the_original():
    table = FlowTable(128, seed=1)
    original, reply = service_flow(0)
    word = np.uint64(flow.hash_tuple(table.arrays, record_of(reply)))
    for value in range(tagged.MAX_PROBE):
        tagged.place(table.arrays[0], np.uint64(int(word) ^ 1 << 31), 4 * value)
    before = table.arrays[0].copy()
    assert insert(table, original, reply) == FULL
    assert (table.arrays[0] == before).all()
    assert len(table) == 0
    assert table.counters["chaintoolong"] == 1


# --- looking up ------------------------------------------------------------------------------------------------------


def test_a_packet_of_either_direction_finds_its_flow():
    table = filled(300)
    for number in range(0, 300, 7):
        halves = [find_in_passes(table, wanted) for wanted in service_flow(number)]
        assert halves == [2 * number, 2 * number + 1]
        assert halves == [int(flow.find(table.arrays, record_of(wanted, PACKET))) for wanted in service_flow(number)]
    assert find_in_passes(table, service_flow(300)[0]) == MISS


def test_a_flow_behind_another_of_the_same_tag_is_found():
    table = filled(1, capacity=4)
    wanted, reply = service_flow(1)
    word = np.uint64(flow.hash_tuple(table.arrays, record_of(wanted)))
    tagged.place(table.arrays[0], word, 0)  # the tag leads to row 0
    assert insert(table, wanted, reply) == 1
    assert flow.candidate(table.arrays, word) == 0
    assert not flow.matches(table.arrays, 0, record_of(wanted))
    assert find_in_passes(table, wanted) == find(table, wanted) == 2


@pytest.mark.parametrize("field", ["src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "protocol"])
def test_a_half_matches_only_if_every_field_does(field):
    table = FlowTable(4)
    wanted = record_of((POD6, POD6 + 1, 4000, 53, UDP))
    insert(table, (POD6, POD6 + 1, 4000, 53, UDP), service_flow(0)[1])
    assert flow.matches(table.arrays, 0, wanted)
    wanted[field] ^= 1
    assert not flow.matches(table.arrays, 0, wanted)


@pytest.mark.parametrize("direction", [ORIGINAL, REPLY])
def test_a_candidate_of_before_a_delete_does_not_match(direction):
    table = filled(2)
    wanted = record_of(service_flow(0)[direction])
    half = int(flow.candidate(table.arrays, np.uint64(flow.hash_tuple(table.arrays, wanted))))
    assert half == direction
    assert flow.matches(table.arrays, half, wanted)
    flow.delete(table.arrays, 0)
    assert not flow.matches(table.arrays, half, wanted)
    assert insert(table, *service_flow(9)) == 2
    assert not flow.matches(table.arrays, half, wanted)


def test_deleting_a_row_that_is_not_in_use_does_nothing():
    table = filled(2, capacity=4)
    flow.delete(table.arrays, 0)
    for row in (0, 3):
        flow.delete(table.arrays, row)
    assert table.items() == [1]
    assert [insert(table, *service_flow(number)) for number in range(4, 7)] == [2, 3, 4]


# --- by source -------------------------------------------------------------------------------------------------------


def test_one_flow_of_a_source_keeps_its_mapping():
    table = FlowTable(4)
    first = insert(table, (POD, CLIENT, 4000, 53, UDP), (CLIENT, VIP, 53, 4000, UDP))
    second = insert(table, (POD, CLIENT, 4000, 54, UDP), (CLIENT, VIP, 54, 4000, UDP))
    same_source = record_of((POD, VIP, 4000, 99, UDP), PACKET)
    assert flow.find_source(table.arrays, same_source) == MISS
    flow.keep_source(table.arrays, first)
    flow.keep_source(table.arrays, second)
    assert flow.find_source(table.arrays, same_source) == first
    assert [int(table.flows[row]["status"]) & SOURCE_KEPT for row in (first, second)] == [SOURCE_KEPT, 0]
    for other in ((POD, VIP, 4001, 99, UDP), (POD, VIP, 4000, 99, TCP), (POD_2, VIP, 4000, 99, UDP)):
        assert flow.find_source(table.arrays, record_of(other)) == MISS
    flow.delete(table.arrays, second)
    assert flow.find_source(table.arrays, same_source) == first
    flow.delete(table.arrays, first)
    assert flow.find_source(table.arrays, same_source) == MISS
    assert not table.arrays[0].any()


def test_only_a_by_source_entry_leads_to_a_kept_mapping():
    table, source = filled(1, capacity=4), service_flow(0)[0]
    word = flow._hash_source(table.arrays, record_of(source))
    tagged.place(table.arrays[0], np.uint64(word), 0)  # an original tuple that has this tag by chance
    assert flow.find_source(table.arrays, record_of(source)) == MISS
    flow.keep_source(table.arrays, 0)
    assert flow.find_source(table.arrays, record_of(source)) == 0


# --- floods ----------------------------------------------------------------------------------------------------------


def distances(table):
    """How far each entry is from its home."""
    slots = table.arrays[0]
    at = np.flatnonzero(slots)
    return (at - (slots[at] & tagged.TAG)) % len(slots)


def test_flows_crafted_against_another_key_lengthen_no_probe():
    assumed = FlowTable(512, seed=2).arrays[1].tolist()
    crafted = []
    for number in range(1 << 20):
        client, ports = CLIENT + (number >> 12), 1024 + (number & 0xFFF)
        words = [0, client, 0, VIP, TCP << 32 | ports << 16 | 80]
        if naive.keyed_hash(words, assumed) & 0x7F == 0:
            crafted.append((client, VIP, ports, 80, TCP))
        if len(crafted) == 256:
            break
    victim, table = FlowTable(512, seed=2), FlowTable(512, seed=1)
    for number, wanted in enumerate(crafted):
        insert(victim, wanted, service_flow(number)[1])
        assert insert(table, wanted, service_flow(number)[1]) == number
    assert distances(victim).mean() > 2
    assert distances(table).mean() < 0.3
    assert distances(table).max() < 10


def test_the_key_is_random_unless_a_seed_is_given():
    assert FlowTable(4).arrays[1].tolist() != FlowTable(4).arrays[1].tolist()
    assert FlowTable(4, seed=3).arrays[1].tolist() == FlowTable(4, seed=3).arrays[1].tolist()


# --- records and memory ----------------------------------------------------------------------------------------------


def places(dtype):
    """Name to (offset, bytes) of each field."""
    assert dtype.fields
    return {name: (field[1], field[0].itemsize) for name, field in dtype.fields.items()}


def test_no_field_lies_in_another():
    taken: dict[int, str] = {}
    half = [(name, *place) for name, place in places(TUPLE).items() if name != "shared"]
    fields = half + [(name, 128 + at, size) for name, at, size in half]
    for name, at, size in fields + [(name, *place) for name, place in places(FLOW).items()]:
        for byte in range(at, at + size):
            assert taken.setdefault(byte, name) is name
            assert byte < 256
    assert (2 * TUPLE.itemsize, FLOW.itemsize) == (256, 256)


def test_what_packets_write_and_the_hand_reads_is_one_cache_line():
    hot = ("state", "lb_state", "status", "expires_ns", "lb_expires_ns", "last_window")
    assert {places(FLOW)[name][0] // 64 for name in hot} == {1}
    assert FlowTable(4).flows.ctypes.data % 256 == 0


def test_flows_and_tuples_are_the_same_memory():
    table = filled(2)
    table.tuples[3]["packets"] = 9
    assert table.arrays[2] is table.tuples
    assert table.arrays[3] is table.flows
    assert table.flows[1:].view(TUPLE)[1]["packets"] == 9


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_table_for_four_million_flows_uses_memory_as_flows_come():
    before = resident()
    table = FlowTable(4_000_000)
    assert table.flows.nbytes > 1e9
    assert insert(table, *service_flow(0)) == 0
    assert hand(table, FREE - 1, 1 << 30) == [0]
    assert table.items() == [0]
    assert resident() - before < 64 << 20


def test_the_counters_have_conntracks_names_in_its_order_and_then_our_own():
    names = "found invalid insert insert_failed drop early_drop error search_restart clash_resolve chaintoolong"
    assert list(FlowTable(4).counters) == [*names.split(), "out_of_window"]
    table = filled(3)
    table.state[Count.DROP] += 2
    assert (table.counters["insert"], table.counters["drop"]) == (3, 2)


@pytest.mark.parametrize(
    ("index", "seconds"),
    [
        (Timeout.TCP + TcpState.ESTABLISHED, 86400),
        (Timeout.TCP + TcpState.CLOSE_WAIT, 3600),
        (Timeout.TCP + TcpState.TIME_WAIT, 120),
        (Timeout.TCP + TcpState.SYN_SENT2, 120),
        (Timeout.UDP, 30),
        (Timeout.UDP_STREAM, 120),
        (Timeout.GENERIC, 600),
        (Timeout.LB + LbState.ESTABLISHED, 900),
        (Timeout.LB + LbState.UDP, 300),
    ],
)
def test_timeouts_begin_with_those_of_linux_and_kube_proxy(index, seconds):
    assert flow.make_timeouts()[index] == seconds * 1_000_000_000
