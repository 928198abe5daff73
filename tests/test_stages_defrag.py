"""defrag: datagrams made whole, whatever order and form their pieces come in, and attacks that are not."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.stages import defrag as stage
from dataplane.stages.defrag import PER_SOURCE, TIMEOUT_NS, Phase, defrag
from dataplane.verdict import Reason, Verdict
from tests import world as w
from tests.frames import fragments, patched, pod_frame, recomputed, tcp, udp
from tests.world import World

IP_FLAGS_MF = 1


@pytest.fixture
def world():
    return World()


def feed(world, pieces, iif=w.POD_A):
    """Run the stage over IP packets; datagrams leave with the burst, so their slots are free again."""
    outcomes = world.stage(defrag, [pod_frame(piece) for piece in pieces], iif)
    stage.reclaim(world.tables.arrays)
    return outcomes


def datagrams(outcomes):
    return [outcome.frame[14:] for outcome in outcomes if outcome.verdict == Verdict.ACCEPT]


def piece(payload, offset, more, **fields):
    """A fragment as it is given, however wrong."""
    flags = IP_FLAGS_MF if more else 0
    fields = {"src": w.IP_A, "dst": w.IP_B, "id": 7, "proto": 17, "flags": flags, "frag": offset // 8} | fields
    return IP(bytes(IP(**fields) / Raw(payload)))


def collecting(world):
    return int(np.count_nonzero(world.tables.assembly[0]["phase"] == Phase.COLLECTING))


WHOLE = udp(w.IP_B, size=3000, id=77)
PIECES = fragments(WHOLE, 1424)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_three_fragments_in_any_order_make_the_datagram(world, order):
    outcomes = feed(world, [PIECES[k] for k in order])
    assert [outcome.reason for outcome in outcomes] == [Reason.FRAGMENT_HELD] * 2 + [Reason.ACCEPTED]
    assert outcomes[-1].frame == bytes(pod_frame(WHOLE))
    assert recomputed(outcomes[-1].frame) == outcomes[-1].frame


def test_fragments_of_different_bursts_meet(world):
    assert datagrams(feed(world, PIECES[:1])) == []
    assert datagrams(feed(world, PIECES[2:])) == []
    assert datagrams(feed(world, PIECES[1:2])) == [bytes(WHOLE)]
    assert collecting(world) == 0


def test_the_record_describes_the_datagram(world):
    record = feed(world, PIECES)[-1].record
    assert (record["sport"], record["dport"], record["protocol"]) == (4000, 53, 17)
    assert record["flags"] == b.REASSEMBLED
    assert record["max_fragment"] == 1444
    assert (record["l4"] - record["l3"], record["l3"] - record["start"]) == (20, 14)
    assert record["slot"] <= record["start"] - b.HEADROOM
    assert record["start"] + record["length"] <= record["slot"] + record["size"]
    assert (record["fragment"], record["iif"]) == (0, w.POD_A)


def test_tcp_flags_are_known_after_reassembly(world):
    record = feed(world, fragments(tcp(w.IP_B, size=64, flags="FPA"), 8))[-1].record
    assert (record["sport"], record["dport"], record["tcp_flags"]) == (4000, 80, 0x19)


def test_whole_packets_pass_untouched(world):
    outcome = feed(world, [udp(w.IP_B, flags="DF")])[0]
    assert (outcome.verdict, outcome.frame) == (Verdict.ACCEPT, bytes(pod_frame(udp(w.IP_B, flags="DF"))))


# --- any fragmentation, any order ------------------------------------------------------------------------------------


@st.composite
def fragmentations(draw):
    """A datagram, perhaps with options, and its fragments in any order, some of them twice."""
    options = draw(st.sampled_from([[], [IPOption_NOP()], [IPOption_RR(routers=["0.0.0.0"] * 9)]]))
    payload = draw(st.binary(min_size=9, max_size=600))
    whole = IP(
        src=w.IP_A,
        dst=w.IP_B,
        id=draw(st.integers(0, 0xFFFF)),
        tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(2, 255)),
        proto=draw(st.sampled_from([17, 6, 1, 50])),
        options=options,
    ) / Raw(payload)
    whole = IP(bytes(whole))
    units = (len(payload) - 1) // 8
    cuts = [0, *sorted(draw(st.sets(st.integers(1, units), min_size=1, max_size=min(units, 12)))), units + 1]
    pieces = []
    for begin, end in pairwise(cuts):
        part = whole.copy()
        part.remove_payload()
        part.len = part.chksum = None
        part.frag, part.flags = begin, IP_FLAGS_MF if end <= units else 0
        if begin and options and options[0].option != 7:
            part.options, part.ihl = [], None
        pieces.append(IP(bytes(part / Raw(payload[begin * 8 : end * 8]))))
    order = draw(st.permutations(range(len(pieces))))
    # What comes after the last missing piece would begin another datagram.
    again = draw(st.lists(st.sampled_from(order[:-1]), max_size=3))
    return whole, [pieces[k] for k in [*order[:-1], *again, order[-1]]]


@settings(max_examples=100)
@given(fragmentations())
def test_any_permutation_of_any_fragmentation_gives_the_original(case):
    whole, pieces = case
    outcomes = feed(WORLD, pieces)
    assert datagrams(outcomes) == [bytes(whole)]
    assert outcomes[-1].record["max_fragment"] == max(len(each) for each in pieces)
    assert collecting(WORLD) == 0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 48), st.booleans(), st.binary(min_size=48, max_size=48)),
        max_size=30,
    )
)
def test_fragments_at_random_make_only_datagrams_without_holes(parts):
    """A model that remembers bytes: a datagram that comes out is exactly what its fragments said."""
    world = WORLD
    for offset, length, more, payload in parts:
        outcomes = feed(world, [piece(payload[:length], offset * 8, more)])
        for whole in datagrams(outcomes):
            assert recomputed(bytes(pod_frame(IP(whole))), (IP,)) == bytes(pod_frame(IP(whole)))
            if outcomes[0].record["flags"] & b.REASSEMBLED:
                assert set(whole[20:]) <= {octet for part in parts for octet in part[3]}
    stage.expire(world.tables.arrays, world.now + 2 * TIMEOUT_NS)
    assert collecting(world) == 0


# --- attacks ---------------------------------------------------------------------------------------------------------


def test_an_exact_duplicate_costs_nothing(world):
    outcomes = feed(world, [PIECES[0], PIECES[0], PIECES[1], PIECES[1], PIECES[0], PIECES[2]])
    assert datagrams(outcomes) == [bytes(WHOLE)]
    assert [outcome.reason for outcome in outcomes[:-1]] == [Reason.FRAGMENT_HELD] * 5


def test_a_duplicate_cannot_change_what_came_first(world):
    forged = piece(b"\xee" * 1424, 0, True, id=77)
    assert datagrams(feed(world, [PIECES[0], forged, PIECES[1], PIECES[2]])) == [bytes(WHOLE)]


A64, B64 = b"a" * 64, b"b" * 64
OVERLAPS = [
    ("the end of another", [piece(A64, 0, True), piece(B64, 56, True)]),
    ("the beginning of another", [piece(A64, 64, True), piece(B64, 8, True)]),
    ("all of another", [piece(A64, 64, True), piece(b"b" * 192, 0, True)]),
    (
        "what lies between two and both of them",
        [piece(A64, 0, True), piece(A64, 128, True), piece(b"b" * 80, 56, True)],
    ),
    ("the last one", [piece(A64, 64, False), piece(b"b" * 80, 56, True)]),
]


@pytest.mark.parametrize("pieces", [row[1] for row in OVERLAPS], ids=[row[0] for row in OVERLAPS])
def test_a_fragment_that_overlaps(world, pieces):
    outcomes = feed(world, pieces)
    assert outcomes[-1].reason == Reason.IP_FRAG_OVERLAP
    assert collecting(world) == 0
    assert world.count(Reason.IP_FRAG_OVERLAP) == len(pieces) - 1  # what was held; the row itself is counted by tally


ENDS = [
    ("a last fragment in front of what has come", [piece(A64, 128, True), piece(A64, 64, False)]),
    ("a fragment behind the last one", [piece(A64, 64, False), piece(A64, 192, True)]),
    ("a second last fragment", [piece(A64, 64, False), piece(A64, 192, False)]),
    ("a second last fragment in front", [piece(A64, 192, False), piece(A64, 64, False)]),
]


@pytest.mark.parametrize("pieces", [row[1] for row in ENDS], ids=[row[0] for row in ENDS])
def test_fragments_that_disagree_about_the_end(world, pieces):
    outcomes = feed(world, pieces)
    assert outcomes[-1].reason == Reason.IP_FRAG_OVERLAP
    assert collecting(world) == 0


IMPOSSIBLE = [
    ("no payload", piece(b"", 8, True)),
    ("no payload, at the end", piece(b"", 8, False)),
    ("a middle that is no multiple of 8", piece(b"x" * 13, 8, True)),
    ("an end behind 65535 (ping of death)", piece(b"x" * 64, 65528, False)),
    ("an end behind 65535 with the header", piece(b"x" * 8, 65512, False)),
]


@pytest.mark.parametrize("fragment", [row[1] for row in IMPOSSIBLE], ids=[row[0] for row in IMPOSSIBLE])
def test_a_fragment_with(world, fragment):
    assert feed(world, [fragment])[0].reason == Reason.IP_BAD_HDR
    assert collecting(world) == 0


def test_teardrop(world):
    """The second fragment ends inside the first: its length came out negative in old kernels."""
    outcomes = feed(world, [piece(b"x" * 40, 0, True), piece(b"y" * 4, 24, False)])
    assert datagrams(outcomes) == []
    outcomes = feed(world, [piece(b"x" * 40, 0, True, id=8), piece(b"y" * 28, 24, False, id=8)])
    assert outcomes[-1].reason == Reason.IP_FRAG_OVERLAP


def test_a_datagram_that_only_its_options_make_too_long(world):
    pieces = fragments(udp(w.IP_B, size=65480, id=7), 1424)
    pieces[0] = piece(bytes(pieces[0].payload), 0, True, options=[IPOption_RR(routers=["0.0.0.0"] * 9)])
    outcomes = feed(world, pieces)
    assert (outcomes[-1].verdict, collecting(world)) == (Verdict.DROP, 0)


def test_tiny_fragments_cannot_hide_the_ports_from_the_guard(world):
    """A tunnel's datagram in pieces of 8 bytes is still a tunnel's datagram: the first piece has the ports."""
    outcomes = world.run([pod_frame(each) for each in fragments(udp(w.PEER, dport=4789, size=64), 8)], w.POD_A)
    assert outcomes[0].reason == Reason.TUNNEL_FROM_POD
    assert {outcome.reason for outcome in outcomes[1:]} == {Reason.FRAGMENT_HELD}


def test_the_smallest_fragments_make_a_datagram(world):
    whole = udp(w.IP_B, size=1000, id=9)
    pieces = fragments(whole, 8)
    assert datagrams(feed(world, pieces[::2])) == []
    assert datagrams(feed(world, pieces[1::2])) == [bytes(whole)]


@pytest.mark.parametrize(
    "field", [{"id": 78}, {"src": w.IP_B}, {"dst": w.IP_REMOTE}, {"proto": 6}], ids=lambda field: next(iter(field))
)
def test_fragments_of_different_datagrams_do_not_mix(world, field):
    one = IP(bytes(udp(w.IP_B, size=64, id=77)))
    other = one.copy()
    for name, value in field.items():
        setattr(other, name, value)
    del other.chksum
    other[IP].payload = Raw(bytes(one.payload)[::-1])
    other = IP(bytes(other))
    pairs = zip(fragments(one, 32), fragments(other, 32), strict=True)
    outcomes = feed(world, [each for pair in pairs for each in pair])
    assert datagrams(outcomes) == [bytes(one), bytes(other)]


def test_the_largest_udp_datagram(world):
    whole = udp(w.IP_B, size=65507, id=5)
    outcomes = feed(world, fragments(whole, 1424))
    assert datagrams(outcomes) == [bytes(whole)]
    assert len(outcomes[-1].frame) == 65535 + 14


# --- limits and time -------------------------------------------------------------------------------------------------


def test_a_source_has_so_many_datagrams_in_pieces_and_no_more(world):
    first = [fragments(udp(w.IP_B, size=64, id=k), 32)[0] for k in range(PER_SOURCE + 1)]
    outcomes = feed(world, first)
    assert [outcome.reason for outcome in outcomes[:-1]] == [Reason.FRAGMENT_HELD] * PER_SOURCE
    assert outcomes[-1].reason == Reason.IP_FRAG_LIMIT
    other = fragments(udp(w.IP_A, src=w.IP_B, size=64), 32)
    assert len(datagrams(feed(world, other))) == 1
    rest = fragments(udp(w.IP_B, size=64, id=0), 32)[1:]
    assert len(datagrams(feed(world, rest))) == 1
    assert feed(world, [first[-1]])[0].reason == Reason.FRAGMENT_HELD


def test_the_table_of_datagrams_in_pieces_is_bounded(world):
    reasons = []
    for source in range(5):
        first = [fragments(udp(w.IP_B, src=f"10.244.1.{source}", size=64, id=k), 32)[0] for k in range(PER_SOURCE)]
        reasons += [outcome.reason for outcome in feed(world, first)]
    assert reasons == [Reason.FRAGMENT_HELD] * b.ASSEMBLIES + [Reason.IP_FRAG_LIMIT] * PER_SOURCE
    assert len(datagrams(feed(world, [udp(w.IP_B)]))) == 1


def test_a_datagram_is_given_up_after_thirty_seconds(world):
    feed(world, PIECES[:2])
    world.now += TIMEOUT_NS - 1
    assert stage.expire(world.tables.arrays, world.now) == 0
    world.now += 1
    assert stage.expire(world.tables.arrays, world.now) == 2
    assert world.count(Reason.IP_FRAG_TIMEOUT) == 2
    assert collecting(world) == 0
    assert datagrams(feed(world, PIECES[2:])) == []


def test_a_late_fragment_begins_anew_even_before_the_timer_has_run(world):
    feed(world, PIECES[:2])
    world.now += TIMEOUT_NS
    assert datagrams(feed(world, PIECES[2:])) == []
    assert world.count(Reason.IP_FRAG_TIMEOUT) == 2
    assert datagrams(feed(world, PIECES[:2])) == [bytes(WHOLE)]


def test_the_time_counts_from_the_first_fragment(world):
    feed(world, PIECES[:1])
    world.now += TIMEOUT_NS // 2
    feed(world, PIECES[1:2])
    assert stage.expire(world.tables.arrays, world.now + TIMEOUT_NS // 2) == 2


# --- what the whole inherits from its pieces -------------------------------------------------------------------------


def with_fields(pieces, **columns):
    changed = []
    for k, original in enumerate(pieces):
        changing = original.copy()
        for name, values in columns.items():
            setattr(changing, name, values[k])
        del changing.chksum
        changed.append(IP(bytes(changing)))
    return changed


NOT_ECT, ECT1, ECT0, CE = range(4)
ECN = [
    ([NOT_ECT] * 3, NOT_ECT),
    ([ECT0] * 3, ECT0),
    ([ECT1] * 3, ECT1),
    ([CE] * 3, CE),
    ([ECT0, CE, ECT0], CE),
    ([CE, ECT0, ECT0], CE),
    ([ECT1, ECT1, CE], CE),
    ([ECT0, ECT1, CE], CE),
    ([ECT0, ECT1, ECT1], ECT0),
    ([ECT1, ECT0, ECT0], ECT1),
    ([NOT_ECT, CE, NOT_ECT], None),
    ([CE, NOT_ECT, ECT0], None),
    ([NOT_ECT, ECT0, ECT0], None),
    ([ECT1, ECT1, NOT_ECT], None),
]


@pytest.mark.parametrize(("marks", "expected"), ECN, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["in order", "reversed"])
def test_congestion_marks_of_fragments_are_merged(world, marks, expected, order):
    """As in Linux (ip_frag_ecn_table): Not-ECT beside anything else is nonsense and drops."""
    pieces = with_fields(PIECES, tos=[0xB8 | mark for mark in marks])
    outcomes = feed(world, [pieces[k] for k in order])
    if expected is None:
        assert outcomes[-1].verdict == Verdict.DROP
        assert collecting(world) == 0
        return
    assert IP(datagrams(outcomes)[0]).tos == 0xB8 | expected == outcomes[-1].record["tos"]


def test_the_first_fragment_decides_ttl_and_tos(world):
    pieces = with_fields(PIECES, ttl=[9, 64, 65], tos=[0x20, 0x40, 0x60])
    outcomes = feed(world, pieces[::-1])
    assert (IP(outcomes[-1].frame[14:]).ttl, IP(outcomes[-1].frame[14:]).tos) == (9, 0x20)
    assert (outcomes[-1].record["ttl"], outcomes[-1].record["tos"]) == (9, 0x20)


def test_the_first_fragments_options_stay(world):
    options = [IPOption_RR(routers=["0.0.0.0"] * 9)]
    whole = IP(bytes(IP(src=w.IP_A, dst=w.IP_B, id=3, options=options) / UDP(sport=1, dport=2) / Raw(b"x" * 100)))
    pieces = fragments(whole, 32)
    for later in pieces[1:]:
        later.options, later.ihl, later.len, later.chksum = [], None, None, None
    pieces = [pieces[0], *(IP(bytes(later)) for later in pieces[1:])]
    outcomes = feed(world, pieces[::-1])
    assert datagrams(outcomes) == [bytes(whole)]
    assert outcomes[-1].record["l4"] - outcomes[-1].record["l3"] == 60


DF, MF = 2, 1
DONT = [
    ("all", [DF | MF, DF | MF, DF], True),
    ("none", [MF, MF, 0], False),
    ("the largest", [DF | MF, DF | MF, 0], True),
    ("only a small one", [MF, MF, DF], False),
]


@pytest.mark.parametrize(("flags", "dont"), [row[1:] for row in DONT], ids=[row[0] for row in DONT])
def test_the_datagram_has_df_when_its_largest_fragment_had_it(world, flags, dont):
    outcome = feed(world, with_fields(PIECES, flags=flags))[-1]
    assert bool(IP(outcome.frame[14:]).flags.DF) is dont
    assert bool(outcome.record["flags"] & b.DONT_FRAGMENT) is dont


def test_the_last_arrival_gives_the_link_header(world):
    frames = [Ether(src=w.MAC_A, dst=w.GATEWAY_MAC) / each for each in PIECES]
    outcome = world.stage(defrag, frames, w.POD_A)[-1]
    assert outcome.frame[:14] == bytes(frames[-1])[:14]


def test_a_fragment_is_never_left_half_checked(world):
    """The virtio header of a fragment says nothing about its datagram."""
    record = feed(world, PIECES)[-1].record
    assert (record["vnet_flags"], record["gso_type"]) == (0, 0)


def test_tcp_fragments_keep_their_checksum(world):
    whole = IP(src=w.IP_A, dst=w.IP_B) / TCP(sport=1, dport=2) / Raw(b"z" * 777)
    frame = feed(world, fragments(whole, 64))[-1].frame
    assert recomputed(frame) == frame


def test_a_slot_is_free_again_when_its_datagram_has_left(world):
    for number in range(b.ASSEMBLIES + 1):
        outcomes = feed(world, fragments(udp(w.IP_B, size=40, id=number), 24))
        assert outcomes[-1].reason == Reason.ACCEPTED, number
    assert not np.any(world.tables.assembly[0]["phase"])


def test_a_flipped_header_bit_is_no_fragment(world):
    frame = patched(pod_frame(PIECES[0]), 20, b"\x20\x01")
    assert world.stage(defrag, [frame], w.POD_A)[0].reason == Reason.IP_BAD_CSUM


WORLD = World()  # every test that uses it leaves no datagram behind
