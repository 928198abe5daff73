"""heartbeat: datagrams, who watches whom, who is silent, and what a promise is worth; time is a number."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.control.heartbeat import WATCHERS, Heartbeats, Kind, Message, Timing, decode, encode, watchers

MS = 1_000_000
SECOND = 1000 * MS
TIMING = Timing()
BIRTH = 100 * SECOND

NAMES = st.text("abcdefgh0123456789-.", min_size=1, max_size=30)
MESSAGES = st.builds(
    Message,
    st.sampled_from(Kind),
    st.integers(0, 255),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    NAMES,
    st.one_of(st.just(""), NAMES),
)


# --- datagrams -------------------------------------------------------------------------------------------------------


@given(MESSAGES, st.binary(max_size=20))
def test_a_message_survives_its_datagram(message, secret):
    assert decode(encode(message, secret), secret) == message


@given(st.binary(max_size=120), st.sampled_from([b"", b"secret"]))
def test_any_bytes_are_no_message_or_one_that_encodes_to_them(data, secret):
    found = decode(data, secret)
    assert found is None or encode(found, secret) == data


@given(MESSAGES, st.data())
def test_a_datagram_that_was_changed_is_none_with_a_secret(message, data):
    given = bytearray(encode(message, b"secret"))
    given[data.draw(st.integers(0, len(given) - 1))] ^= data.draw(st.integers(1, 255))
    assert decode(bytes(given), b"secret") is None


def test_who_has_no_secret_or_another_one_is_not_understood():
    message = Message(Kind.BEAT, 0, 1, 2, "a")
    assert decode(encode(message), b"secret") is None
    assert decode(encode(message, b"other"), b"secret") is None
    assert decode(encode(message, b"secret")) is None


# --- who watches whom ------------------------------------------------------------------------------------------------


@given(st.sets(NAMES, min_size=1, max_size=20), st.data())
def test_a_node_has_five_watchers_or_all_others_and_is_not_one_itself(names, data):
    members, name = frozenset(names), data.draw(st.sampled_from(sorted(names)))
    found = watchers(name, members)
    assert len(found) == len(set(found)) == min(WATCHERS, len(members) - 1)
    assert set(found) <= members - {name}


def test_with_a_hundred_nodes_each_watches_a_few():
    members = frozenset(f"node{number}" for number in range(100))
    watched = [sum(name in watchers(other, members) for other in members) for name in members]
    assert set(watched) == {WATCHERS}


# --- a cluster without a loop ----------------------------------------------------------------------------------------


class Lan:
    """Nodes that hear each other at once, but for what is cut."""

    def __init__(self, *names: str, secret: bytes = b"") -> None:
        self.now = BIRTH
        self.nodes = {name: Heartbeats(name, BIRTH, BIRTH, secret=secret) for name in names}
        self.cut: set[tuple[str, str]] = set()
        self.dead: set[str] = set()
        for name in names:
            self.meet(name)

    def meet(self, name: str) -> None:
        others = {other: other for other in self.nodes if other != name}
        self.nodes[name].follow(others, others, self.now)

    def restart(self, name: str) -> Heartbeats:
        self.dead.discard(name)
        self.nodes[name] = Heartbeats(name, self.now, self.now)
        self.meet(name)
        return self.nodes[name]

    def carry(self, source: str, datagrams: list[tuple[str, bytes]]) -> None:
        for target, data in datagrams:
            if (source, target) not in self.cut and target not in self.dead:
                self.carry(target, self.nodes[target].received(data, source, self.now))

    def run(self, duration: int, step: int = 10 * MS) -> None:
        for _ in range(duration // step):
            self.now += step
            for name, node in self.nodes.items():
                if name not in self.dead and self.now >= node.next_at:
                    self.carry(name, node.tick(self.now))

    def silent(self) -> dict[str, set[str]]:
        return {name: set(node.silent) for name, node in self.nodes.items() if name not in self.dead}


@pytest.fixture
def lan() -> Lan:
    made = Lan("a", "b", "c")
    made.run(3 * SECOND)
    return made


def test_nodes_that_live_are_not_silent_and_beat_ten_times_a_second(lan):
    assert lan.silent() == {"a": set(), "b": set(), "c": set()}
    before = lan.nodes["a"].counts.sent
    lan.run(SECOND)
    assert lan.nodes["a"].counts.sent - before == pytest.approx(2 * 10 + 2 * 10, abs=4)  # beats, and answers


def test_a_dead_node_is_silent_everywhere_after_four_beats_and_no_sooner(lan):
    lan.dead.add("a")
    lan.run(290 * MS)
    assert lan.silent() == {"b": set(), "c": set()}
    lan.run(130 * MS)
    assert lan.silent() == {"b": {"a"}, "c": {"a"}}


def test_a_node_that_was_never_there_is_silent_after_a_second():
    lan = Lan("a", "b", "c")
    lan.dead.add("c")
    lan.run(900 * MS)
    assert lan.silent() == {"a": set(), "b": set()}
    lan.run(300 * MS)
    assert lan.silent() == {"a": {"c"}, "b": {"c"}}


def test_a_loss_in_one_direction_makes_nobody_silent(lan):
    lan.cut.add(("a", "b"))  # b does not hear a; c does
    lan.run(3 * SECOND)
    assert lan.silent() == {"a": set(), "b": set(), "c": set()}


def test_a_node_that_nobody_hears_is_silent_though_it_hears(lan):
    lan.cut |= {("a", "b"), ("a", "c")}
    lan.run(SECOND)
    assert lan.silent()["b"] == lan.silent()["c"] == {"a"}


def test_of_two_that_are_cut_off_from_each_other_each_takes_the_other_for_dead():
    lan = Lan("a", "b")
    lan.run(3 * SECOND)
    lan.cut |= {("a", "b"), ("b", "a")}
    lan.run(SECOND)
    assert lan.silent() == {"a": {"b"}, "b": {"a"}}
    lan.cut.clear()
    lan.run(SECOND)
    assert lan.silent() == {"a": set(), "b": set()}


def test_two_that_die_together_are_silent_for_the_one_that_is_left(lan):
    lan.dead |= {"a", "b"}
    lan.run(SECOND)
    assert lan.silent() == {"c": {"a", "b"}}


def test_a_farewell_counts_at_once(lan):
    lan.carry("a", lan.nodes["a"].leave())
    assert lan.nodes["b"].silent == lan.nodes["c"].silent == {"a"}


def test_a_node_that_starts_again_is_heard_again(lan):
    lan.carry("a", lan.nodes["a"].leave())
    lan.dead.add("a")
    lan.run(SECOND)
    lan.restart("a")
    lan.run(SECOND)
    assert lan.silent() == {"a": set(), "b": set(), "c": set()}


def test_whoever_was_away_itself_calls_nobody_silent_before_it_has_listened(lan):
    lan.dead.add("a")
    lan.run(5 * SECOND)
    lan.dead.discard("a")  # stopped, not dead: its next tick comes before anything that waits in its socket
    assert "b" not in lan.nodes["a"].silent
    lan.nodes["a"].tick(lan.now)
    assert lan.nodes["a"].silent == frozenset()
    lan.run(SECOND)
    assert lan.silent() == {"a": set(), "b": set(), "c": set()}


def test_with_a_hundred_nodes_all_know_of_a_dead_one_though_five_watch_it():
    lan = Lan(*(f"node{number}" for number in range(100)))
    lan.run(SECOND, 50 * MS)
    lan.dead.add("node7")
    lan.run(SECOND, 50 * MS)
    assert all(silent == {"node7"} for silent in lan.silent().values())
    sent = {name: node.counts.sent for name, node in lan.nodes.items() if name not in lan.dead}
    lan.run(SECOND, 50 * MS)
    rates = [node.counts.sent - sent[name] for name, node in lan.nodes.items() if name in sent]
    assert sorted(rates)[50] < 150, "datagrams a second"


# --- what is not believed --------------------------------------------------------------------------------------------


def beat(number: int, start: int = BIRTH, name: str = "a") -> bytes:
    return encode(Message(Kind.BEAT, 0, start, number, name))


UNBELIEVABLE = [
    ("from another address", beat(10**18), "z"),
    ("from nobody we know", beat(10**18, name="z"), "a"),
    ("repeated", beat(1), "a"),
    ("of an earlier run", beat(10**18, BIRTH - 1), "a"),
    ("garbage", b"\xa5" * 50, "a"),
    ("nothing", b"", "a"),
]


@pytest.mark.parametrize(("data", "source"), [row[1:] for row in UNBELIEVABLE], ids=[row[0] for row in UNBELIEVABLE])
def test_a_beat_is_ignored_and_counted(lan, data, source):
    node = lan.nodes["b"]
    before = node.counts.ignored
    assert node.received(data, source, lan.now) == []
    assert node.counts.ignored == before + 1


@given(st.lists(st.tuples(st.binary(max_size=80), st.sampled_from(["a", "b", "z"])), max_size=20))
def test_no_bytes_from_anybody_disturb(datagrams):
    lan = Lan("a", "b", "c")
    lan.run(2 * SECOND, 50 * MS)
    for data, source in datagrams:
        lan.nodes["c"].received(data, source, lan.now)
    lan.run(SECOND, 50 * MS)
    assert lan.silent() == {"a": set(), "b": set(), "c": set()}


# --- promises --------------------------------------------------------------------------------------------------------


def test_half_of_the_watchers_promise_until_four_beats_after_the_last(lan):
    until = lan.nodes["a"].promised(lan.now)
    assert 300 * MS <= until - lan.now <= TIMING.silence_ns
    lan.dead.add("b")
    lan.run(SECOND)
    assert lan.nodes["a"].promised(lan.now) > lan.now, "c alone is half"
    lan.dead.add("c")
    lan.run(SECOND)
    assert lan.nodes["a"].promised(lan.now) < lan.now


def test_a_node_alone_needs_no_promise():
    node = Heartbeats("a", BIRTH, BIRTH)
    assert node.promised(BIRTH) == BIRTH + TIMING.silence_ns


def test_who_has_just_started_does_not_count_yet(lan):
    lan.dead.add("c")
    fresh = lan.restart("b")
    lan.run(SECOND)
    assert lan.nodes["a"].promised(lan.now) < lan.now
    assert lan.nodes["a"].promises()[0] > lan.now
    lan.run(2 * SECOND)
    assert lan.nodes["a"].promised(lan.now) > lan.now
    assert fresh.silent == {"c"}


def test_who_is_not_sure_to_be_a_member_does_not_count(lan):
    for name in ("b", "c"):
        lan.nodes[name].strict_until = lan.now
    lan.run(SECOND)
    assert lan.nodes["a"].promised(lan.now) < lan.now


def test_who_is_taken_for_silent_by_the_node_itself_gets_no_promise(lan):
    for name in ("b", "c"):
        lan.nodes[name].applied(frozenset({"a"}))
    lan.run(SECOND)
    assert lan.nodes["a"].promises()[0] < lan.now


def convicted(lan: Lan, by: str, subject: str, since: int) -> bool:
    lan.carry(by, lan.nodes[by].ask({subject}, lan.now))
    return lan.nodes[by].convicts(subject, since, lan.now)


def test_a_dead_node_is_convicted_by_answers_to_questions_asked_since(lan):
    lan.dead.add("a")
    lan.run(SECOND)
    assert convicted(lan, "b", "a", lan.now)
    assert not lan.nodes["b"].convicts("a", lan.now + 1, lan.now)
    lan.now += TIMING.hold_ns
    assert not lan.nodes["b"].convicts("a", 0, lan.now), "the answers are too old"


def test_a_node_that_one_of_two_hears_is_not_convicted(lan):
    lan.cut.add(("a", "b"))
    lan.run(SECOND)
    assert not convicted(lan, "b", "a", lan.now)


def test_whoever_has_convicted_a_node_promises_it_nothing_for_a_while(lan):
    lan.dead.add("a")
    lan.run(SECOND)
    assert convicted(lan, "b", "a", lan.now)
    lan.dead.discard("a")
    began = lan.now
    while lan.nodes["a"].promised(lan.now) <= lan.now:
        lan.run(10 * MS)
    assert lan.now >= began + TIMING.hold_ns


@given(st.integers(0, 1 << 32))
def test_a_node_that_is_promised_by_half_is_never_convicted(seed):
    """The two sides of one thing, whatever is lost: if b can take over from a now, then a knows that it may not."""
    lan, dice = Lan("a", "b", "c", "d"), random.Random(seed)
    lan.run(3 * SECOND, 50 * MS)
    pairs = [(one, two) for one in lan.nodes for two in lan.nodes if one != two]
    for _ in range(12):
        lan.cut = {pair for pair in pairs if dice.random() < 0.4}
        for _ in range(dice.randint(1, 12)):
            lan.run(50 * MS, 50 * MS)
            if convicted(lan, "b", "a", lan.now):
                assert lan.nodes["a"].promised(lan.now) <= lan.now


def test_of_nodes_that_nobody_knows_nothing_is_kept(lan):
    node = lan.nodes["a"]
    for number in range(100):
        lan.carry("b", [("a", encode(Message(Kind.VOTE, 2, BIRTH, 0, "b", f"invented{number}")))])
    assert node.counts.ignored == 0
    assert node._votes.keys() <= {"b", "c"}
