"""tcp: the two state machines, against their tables, written conversations, and a model in plain Python."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane import batch as b
from dataplane.stages import tcp
from dataplane.stages import tcp_window as w
from dataplane.tables.flow import ASSURED, FLOW, LbState, TcpState
from dataplane.verdict import Reason
from tests.naive_conntrack import NAMES, NEXT, Naive, is_valid, kind_of
from tests.strategies import make_ethernet, make_ipv4, make_ipv6, make_tcp
from tests.tcp_kernels import SECOND, Kernels
from tests.tcp_segments import CLIENT, SERVER, SERVER_MAC, WORD, Segment, Settings, conversations, play
from tests.tcp_walks import SEEDS, STEPS, Walk

CONVERSATIONS = conversations()
INITIAL = [(1000, 5000), (WORD - 1501, WORD - 3), (WORD // 2 - 2, WORD // 2 - 200)]

# --- the tables ------------------------------------------------------------------------------------------------------

KINDS = ["syn", "synack", "fin", "ack", "rst", "none"]
ROWS = [(direction, kind) for direction in (0, 1) for kind in KINDS]


@pytest.mark.parametrize(("direction", "kind"), ROWS)
def test_each_row_of_conntracks_table_is_as_linux_documents_it(direction, kind):
    names = {**{name: state for state, name in enumerate(NAMES)}, "IV": 10, "IG": 11}
    written = [names[NEXT.get((direction, kind, before), "IV")] for before in NAMES]
    assert [tcp.transition(direction, KINDS.index(kind), state) for state in TcpState] == written


LB_NAMES = ["NO", "ES", "SS", "SR", "FW", "TW", "CL", "CW", "LA", "LI", "SA"]
LB_TABLE = """
INPUT  syn SR ES ES SR SR SR SR SR SR SR SR | fin CL CW SS TW TW TW CL CW LA LI TW \
     | ack ES ES SS ES FW TW CL CW CL LI ES | rst CL CL CL SR CL CL CL CL LA LI SR
OUTPUT syn SS ES SS SR SS SS SS SS SS LI SR | fin TW FW SS TW FW TW CL TW LA LI TW \
     | ack ES ES SS ES FW TW CL CW LA ES ES | rst CL CL SS CL CL TW CL CL CL CL CL
"""
LB_FLAGS = {"syn": ["S", "SA", "SF"], "fin": ["F", "FA"], "ack": ["A", "PA"], "rst": ["R", "RA", "RSFA"]}
LB_ROWS = [
    (direction, *cell.split(maxsplit=1))
    for direction, line in enumerate(LB_TABLE.strip().splitlines())
    for cell in line.split(maxsplit=1)[1].split("|")
]


def lb_after(direction, flags, before):
    packets, flows = np.zeros(1, b.PACKET), np.zeros(1, FLOW)
    packets[0]["tcp_flags"], flows[0]["lb_state"] = Segment(0, flags, 0).bits, before
    return LbState(tcp.lb_follow(packets[0], flows[0], direction))


@pytest.mark.parametrize(("direction", "kind", "row"), LB_ROWS)
def test_each_row_of_ip_vss_table_is_as_documented(direction, kind, row):
    for flags in LB_FLAGS[kind]:
        after = [lb_after(direction, flags, state) for state in list(LbState)[: len(LB_NAMES)]]
        assert [LB_NAMES[state] for state in after] == row.split()


def test_ip_vs_takes_a_segment_without_flags_for_the_end():
    assert lb_after(0, "P", LbState.ESTABLISHED) == LbState.CLOSE


def test_ip_vs_counts_opening_and_open_connections_as_active():
    active = {LbState.ESTABLISHED, LbState.SYN_SENT, LbState.SYN_RECV, LbState.SYNACK}
    assert {state for state in LbState if tcp.is_lb_active(state)} == active


# --- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", INITIAL, ids=["small", "wrapping", "half-way"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_kernels_answer_as_written(name, initial):
    written, found = play(Kernels(), CONVERSATIONS[name], initial)
    assert found == written


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_model_answers_as_written(name):
    written, found = play(Naive(), CONVERSATIONS[name])
    assert found == written


def windows(kernels):
    """What is compared beside the visible entry: every number that a later check uses."""
    if kernels.originator < 0:
        return None
    columns = ("seq_end", "max_end", "max_window", "max_ack")
    halves = [tuple(int(kernels.half(direction)[column]) for column in columns) for direction in (0, 1)]
    flow = kernels.flow
    return halves, KINDS[int(flow["last_index"])], int(flow["last_direction"]), int(flow["retrans"])


def model_windows(naive):
    flow = naive.flow
    if flow is None:
        return None
    halves = [(side.end, side.limit % WORD, side.window % WORD, side.acked) for side in flow.sides]
    return halves, flow.last.kind, flow.last.direction, min(flow.repeats, 255)


@settings(max_examples=300)
@given(st.randoms(use_true_random=False))
def test_the_kernels_and_the_model_agree_on_any_conversation(random):
    walk, kernels, naive = Walk(random), Kernels(), Naive()
    for now in range(1000, 1030):
        segment = next(walk)
        for tracker in (kernels, naive):
            tracker.configure(walk.settings)
        assert kernels.send(segment, now) == naive.send(segment, now)
        assert windows(kernels) == model_windows(naive)


def test_the_walks_reach_every_cell_of_the_table():
    """Those of tests/netns/test_kernel_conntrack.py, which plays the same ones to Linux."""
    reached = set()
    for seed in range(SEEDS):
        walk = Walk(Random(seed))
        for _ in range(STEPS):
            flow = walk.model.flow
            before, originator = (flow.state, flow.originator) if flow else ("NO", None)
            segment = next(walk)
            direction = 0 if originator is None else segment.side ^ originator
            if is_valid(segment):
                reached.add((direction, kind_of(segment), before))
    assert reached == {cell for cell in NEXT if (cell[0], cell[2]) != (1, "NO")}


# --- reasons ---------------------------------------------------------------------------------------------------------

OPENED = [Segment(0, "S", 0), Segment(1, "SA", 0, 1), Segment(0, "A", 1, 1), Segment(1, "PA", 1, 1, length=9)]
OPENED.append(Segment(0, "A", 1, 10))
NO_FLOW = [
    ("a SYN", Segment(0, "S", 1), Reason.ACCEPTED),
    ("an ACK", Segment(0, "A", 1, 1), Reason.ACCEPTED),
    ("a SYN-ACK", Segment(0, "SA", 1, 1), Reason.CT_NOT_SYN),
    ("a FIN", Segment(0, "FA", 1, 1), Reason.CT_NOT_SYN),
    ("a RST", Segment(0, "R", 1), Reason.CT_NOT_SYN),
    ("no flags", Segment(0, "", 1), Reason.CT_INVALID_FLAGS),
    ("SYN and FIN", Segment(0, "SF", 1), Reason.CT_INVALID_FLAGS),
    ("a torn header", Segment(0, "S", 1, torn=True), Reason.CT_INVALID_FLAGS),
    ("a data offset beyond the packet", Segment(0, "S", 1, offset=6), Reason.CT_INVALID_FLAGS),
]
IN_FLOW = [
    ("a SYN of the server", Segment(1, "S", 90), Reason.CT_NOT_SYN),
    ("a SYN-ACK of the client", Segment(0, "SA", 1, 10), Reason.CT_NOT_SYN),
    ("data beyond the window", Segment(0, "A", 99999, 10), Reason.CT_WINDOW),
    ("an acknowledgment of nothing", Segment(0, "A", 1, 11), Reason.CT_WINDOW),
    ("an old RST", Segment(1, "R", 9), Reason.CT_BAD_RST),
    ("FIN without ACK", Segment(0, "F", 1), Reason.CT_INVALID_FLAGS),
    ("a torn header", Segment(0, "A", 1, 10, torn=True), Reason.CT_INVALID_FLAGS),
]


def reason_after(before, segment, **options):
    kernels = Kernels()
    kernels.configure(Settings(**options))
    for each in before:
        assert kernels.send(each, 1).passed
    kernels.send(segment, 1)
    return kernels.reason


@pytest.mark.parametrize(("segment", "reason"), [row[1:] for row in NO_FLOW], ids=[row[0] for row in NO_FLOW])
def test_a_segment_of_no_flow(segment, reason):
    assert reason_after([], segment) == reason


@pytest.mark.parametrize(("segment", "reason"), [row[1:] for row in IN_FLOW], ids=[row[0] for row in IN_FLOW])
def test_a_segment_of_an_open_flow(segment, reason):
    assert reason_after(OPENED, segment) == reason


def test_without_loose_an_ack_begins_nothing():
    assert reason_after([], Segment(0, "A", 1, 1), loose=0) == Reason.CT_NOT_SYN


@pytest.mark.parametrize("liberal", [0, 1])
def test_segments_outside_the_window_are_counted_dropped_or_not(liberal):
    kernels = Kernels()
    kernels.configure(Settings(liberal=liberal))
    for segment in OPENED:
        kernels.send(segment, 1)
    assert kernels.out_of_window == 0
    passed = [kernels.send(Segment(0, "A", seq, 10), 1).passed for seq in (99999, 88888, 1)]
    assert passed == [bool(liberal), bool(liberal), True]
    assert kernels.out_of_window == 2


def test_a_flow_that_was_picked_up_counts_nothing_as_outside():
    kernels = Kernels()
    for seq in (1, 777777, 55):
        assert kernels.send(Segment(0, "A", seq, 1), 1).passed
    assert kernels.out_of_window == 0


def test_a_reset_without_a_reply_ends_the_flow_at_once():
    """Not with RESTART: the reset itself still has to reach the client."""
    kernels = Kernels()
    kernels.send(OPENED[0], 5)
    data, packet = kernels.load(Segment(1, "RA", 0, 1).frame())
    assert tcp.follow(data, packet, kernels.tables, 2 * 1 + 1, 5 * SECOND) == Reason.ACCEPTED
    assert kernels.flow["expires_ns"] == 5 * SECOND


def test_a_restart_changes_nothing():
    """The stage deletes the flow, and has to find its counters as they were."""
    kernels = Kernels()
    for segment in [*OPENED[:3], Segment(0, "FA", 1, 1), Segment(1, "FA", 1, 2), Segment(0, "A", 2, 2)]:
        kernels.send(segment, 1)
    before = kernels.table.flows.view(np.uint8).copy()
    data, packet = kernels.load(Segment(0, "S", 90000).frame())
    assert tcp.follow(data, packet, kernels.tables, 2 * 1, SECOND) == tcp.RESTART
    np.testing.assert_array_equal(kernels.table.flows.view(np.uint8), before)


def test_what_is_not_tcps_stays_as_it_is():
    """Backend, service and counters share the record."""
    kernels = Kernels()
    kernels.send(OPENED[0], 1)
    kernels.flow["backend"], kernels.flow["mark"], kernels.half(0)["packets"] = 17, 0x4000, 3
    kernels.flow["status"] |= 0x0130
    for segment in OPENED[1:]:
        kernels.send(segment, 1)
    assert (kernels.flow["backend"], kernels.flow["mark"], kernels.half(0)["packets"]) == (17, 0x4000, 3)
    assert kernels.flow["status"] & 0x0130 == 0x0130
    assert kernels.flow["status"] & ASSURED


# --- frames ----------------------------------------------------------------------------------------------------------


def test_a_super_frame_is_one_long_segment():
    kernels = Kernels()
    for segment in OPENED:
        kernels.send(segment, 1)
    assert kernels.send(Segment(1, "PA", 10, 1, length=8000), 1).passed
    assert kernels.half(1)["seq_end"] == 8010
    assert kernels.send(Segment(0, "A", 1, 8010, window=65535), 1).passed
    assert kernels.send(Segment(1, "PA", 8010, 1, length=65_000), 1).passed
    assert kernels.half(1)["seq_end"] == 73_010


def test_padding_behind_the_packet_is_no_payload():
    """Ethernet frames are at least 60 bytes long on the wire."""
    kernels = Kernels()
    for segment in OPENED[:2]:
        kernels.send(segment, 1)
    data, packet = kernels.load(OPENED[2].frame() + bytes(6))
    assert tcp.follow(data, packet, kernels.tables, 2 * 1, SECOND) == Reason.ACCEPTED
    assert kernels.half(0)["seq_end"] == 1


def test_an_ipv6_segment_begins_a_flow():
    segment = make_tcp(1, 2 << 64, 4000, 80, b"abc", seq=7, flags=2, window=100, options=b"\x03\x03\x05\x00")
    frame = make_ethernet(SERVER_MAC, 1, 0x86DD, bytes(make_ipv6(1, 2 << 64, 6, segment)))
    kernels = Kernels()
    data, packet = kernels.load(frame)
    assert tcp.may_begin(data, packet, 0) == Reason.ACCEPTED
    tcp.begin(data, packet, kernels.tables, 1, 0)
    half = kernels.half(0)
    assert (half["seq_end"], half["max_window"], half["scale"], half["window_flags"]) == (11, 100, 5, w.SCALED)


headers = st.tuples(st.binary(max_size=20), st.binary(max_size=70)).map(b"".join)


@settings(max_examples=200)
@given(first=headers, second=headers, side=st.integers(0, 1), flags=st.sampled_from([0x02, 0x10, 0x12, 0x11, 0x14]))
def test_no_bytes_are_read_outside_the_packet(first, second, side, flags):
    """Torn headers, offsets beyond the packet, options without end: whatever the flags say."""
    kernels = Kernels()
    kernels.send(OPENED[0], 1)
    for drawn in (first, second):
        octets = drawn[:13] + bytes([flags]) + drawn[14:] if len(drawn) > 13 else drawn
        frame = make_ethernet(SERVER_MAC, 1, 0x0800, make_ipv4(CLIENT, SERVER, 6, octets))
        data, packet = kernels.load(frame)
        known = {Reason.ACCEPTED, Reason.CT_INVALID_FLAGS, Reason.CT_NOT_SYN, Reason.CT_WINDOW, Reason.CT_BAD_RST}
        assert tcp.may_begin(data, packet, 1) in known
        assert tcp.follow(data, packet, kernels.tables, 2 * 1 + side, SECOND) in {*known, tcp.RESTART}
