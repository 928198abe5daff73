"""ownership: what a node writes into the store, and until when it answers; heartbeats are what the test says."""

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address

import pytest

from dataplane.control.heartbeat import Timing
from dataplane.control.ownership import GRACE_NS, Claim, Ownership, Trust, Write

MS = 1_000_000
SECOND = 1000 * MS
NOW = 100 * SECOND
ADDRESS, OTHER = IPv4Address("192.0.2.200"), IPv4Address("192.0.2.201")
LEASE, THEIRS = 7, 8
SLACK = GRACE_NS // 10


@dataclass
class Beats:
    """What heartbeats would say."""

    name: str = "me"
    silent: frozenset[str] = frozenset()
    strict_until: int = NOW + 1000 * SECOND
    until: int = 0
    others: list[int] = field(default_factory=list)
    convicted: bool = False
    runs: dict[str, int] = field(default_factory=lambda: {"other": 1})
    timing: Timing = field(default_factory=Timing)
    pursued: set[str] = field(default_factory=set)
    asked: list[set[str]] = field(default_factory=list)

    def promised(self, now):
        return self.until

    def promises(self):
        return sorted(self.others, reverse=True)

    def convicts(self, subject, since, now):
        return self.convicted

    def pursue(self, subjects):
        self.pursued = set(subjects)

    def ask(self, subjects, now):
        self.asked.append(set(subjects))
        return []

    def run_of(self, name):
        return self.runs.get(name, 0)


@pytest.fixture
def beats():
    return Beats()


@pytest.fixture
def own(beats):
    return Ownership(beats, LEASE, elected={ADDRESS: "me"})


def learn(own, claim, revision=5, address=ADDRESS):
    own.changed(address, claim, revision, NOW)


def carry_out(own, now, revision=9):
    """Have all writes succeed; return what they were."""
    found = own.writes(now)
    for write in found:
        own.done(write, True, revision, now)
    return found


MINE, FREE = Claim("me", lease=LEASE), Claim("")
OTHERS = Claim("other", lease=THEIRS)


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [None, FREE], ids=["nobody's", "given up"])
def test_what_is_free_is_taken_by_who_is_elected(own, claim):
    learn(own, claim)
    revision = 0 if claim is None else 5
    assert own.writes(NOW) == [Write(ADDRESS, revision, MINE, NOW)]
    assert own.writes(NOW) == [], "one at a time"


@pytest.mark.parametrize("claim", [None, FREE, OTHERS])
def test_what_another_should_have_is_left_alone(own, claim):
    own.elected = {ADDRESS: "other"}
    learn(own, claim)
    assert own.writes(NOW) == []


def test_a_write_that_failed_waits_for_the_next_beat(own):
    (write,) = own.writes(NOW)
    own.done(write, False, 0, NOW)
    assert own.writes(NOW) == []
    assert own.writes(NOW + 100 * MS) == [replace(write, began=NOW + 100 * MS)]


def test_without_a_lease_nothing_is_written(own):
    own.lease = 0
    assert own.writes(NOW) == []


def test_an_owner_that_is_heard_is_waited_for(own):
    learn(own, OTHERS)
    assert own.writes(NOW) == []


def test_a_silent_owner_is_asked_through_the_store_and_replaced_after_the_grace(own, beats):
    learn(own, OTHERS)
    beats.silent = frozenset({"other"})
    assert carry_out(own, NOW) == [Write(ADDRESS, 5, OTHERS._replace(successor="me", revision=5), NOW)]
    assert beats.asked == [{"other"}]
    beats.convicted = True
    assert own.writes(NOW + GRACE_NS - 1) == []
    assert beats.pursued == {"other"}
    assert own.writes(NOW + GRACE_NS) == [Write(ADDRESS, 9, MINE, NOW + GRACE_NS)]


def test_a_silent_owner_that_is_not_convicted_keeps_its_address(own, beats):
    learn(own, OTHERS)
    beats.silent = frozenset({"other"})
    carry_out(own, NOW)
    assert own.writes(NOW + 100 * GRACE_NS) == []


def test_an_owner_that_objects_is_not_bothered_for_a_second(own, beats):
    learn(own, OTHERS)
    beats.silent, beats.convicted = frozenset({"other"}), True
    carry_out(own, NOW)
    learn(own, OTHERS, revision=10)
    assert own.writes(NOW + GRACE_NS) == []
    (write,) = own.writes(NOW + GRACE_NS + SECOND)
    assert write.claim.successor == "me"


def test_an_owner_strikes_a_successor_out(own):
    learn(own, MINE._replace(successor="other"))
    assert own.writes(NOW) == [Write(ADDRESS, 5, MINE, NOW)]


def test_a_claim_of_an_earlier_run_gets_this_ones_lease(own):
    learn(own, MINE._replace(lease=3))
    assert own.writes(NOW) == [Write(ADDRESS, 5, MINE, NOW)]


def test_an_owner_that_is_no_longer_elected_stops_to_answer_then_frees_the_address(own):
    learn(own, MINE)
    own.applied({ADDRESS})
    own.elected = {ADDRESS: "other"}
    assert own.writes(NOW) == []
    assert (ADDRESS, "me") not in own.owners
    own.applied(())
    assert own.writes(NOW) == [Write(ADDRESS, 5, FREE, NOW)]


def test_a_claim_to_an_address_that_no_service_has_is_deleted(own):
    learn(own, MINE)
    own.elected = {}
    assert carry_out(own, NOW) == [Write(ADDRESS, 5, None, NOW)]
    assert own.claims == {}


def test_who_leaves_gives_everything_up(own):
    learn(own, MINE)
    own.leave()
    assert not own.left
    assert carry_out(own, NOW) == [Write(ADDRESS, 5, FREE, NOW)]
    assert own.left


def test_an_address_whose_owner_lost_its_lease_but_is_heard_is_left_alone(own, beats):
    learn(own, OTHERS)
    learn(own, None, revision=6)
    assert own.writes(NOW) == []
    beats.silent = frozenset({"other"})
    assert own.writes(NOW) == []
    beats.convicted = True
    assert own.writes(NOW) == [Write(ADDRESS, 0, MINE, NOW)]


def test_an_address_whose_owner_was_started_anew_is_free(own, beats):
    learn(own, OTHERS)
    learn(own, None, revision=6)
    beats.runs["other"] = 2
    assert own.writes(NOW) == [Write(ADDRESS, 0, MINE, NOW)]


def test_older_news_is_ignored(own):
    learn(own, MINE, revision=9)
    learn(own, OTHERS, revision=8)
    learn(own, None, revision=8)
    own.read({}, 8, NOW, NOW)
    assert own.claims == {ADDRESS: MINE._replace(revision=9)}


# --- the fence -------------------------------------------------------------------------------------------------------


@pytest.fixture
def owner(own):
    learn(own, MINE)
    own.applied({ADDRESS})
    return own


def read(own, began, now=NOW, **claims):
    own.read({ADDRESS: MINE._replace(revision=5, **claims)}, 5, began, now)


def test_a_node_that_has_read_nothing_is_closed(owner, beats):
    beats.until = NOW + SECOND
    assert owner.fence(NOW) <= NOW


def test_a_read_opens_until_the_grace_after_its_beginning(owner):
    read(owner, NOW - 50 * MS)
    assert owner.fence(NOW) == NOW - 50 * MS + GRACE_NS - SLACK


def test_promises_go_on_where_a_read_has_begun(owner, beats):
    read(owner, NOW)
    beats.until = NOW + 400 * MS
    assert owner.fence(NOW) == NOW + 400 * MS
    beats.until = NOW + 700 * MS
    assert owner.fence(NOW + 399 * MS) == NOW + 700 * MS
    assert not owner.must_read(NOW + 399 * MS)


def test_promises_open_nothing_that_was_closed(owner, beats):
    read(owner, NOW)
    owner.fence(NOW)
    beats.until = NOW + 2 * SECOND
    assert owner.fence(NOW + SECOND) <= NOW + SECOND
    assert owner.must_read(NOW + SECOND)


def test_a_read_that_shows_a_successor_opens_nothing(owner):
    read(owner, NOW, successor="other")
    assert owner.fence(NOW) <= NOW


def test_a_read_that_shows_another_owner_opens_nothing(owner):
    owner.read({ADDRESS: OTHERS._replace(revision=6)}, 6, NOW, NOW)
    assert owner.fence(NOW) <= NOW


def test_a_fence_does_not_outlast_the_lease_for_certain(owner, beats):
    beats.strict_until = NOW + 100 * MS
    read(owner, NOW)
    beats.until = NOW + 400 * MS
    assert owner.fence(NOW) == NOW + 100 * MS


def test_with_the_store_away_the_promises_of_those_that_are_heard_suffice(owner, beats):
    read(owner, NOW)
    owner.fence(NOW)
    owner.failed(NOW + 50 * MS)
    beats.strict_until, beats.others = NOW + 60 * MS, [NOW + 500 * MS, 0]
    assert owner.fence(NOW + 100 * MS) == NOW + 500 * MS
    assert not owner.is_certain(NOW + 100 * MS)


def test_with_the_store_away_nothing_that_was_closed_is_opened_by_promises(owner, beats):
    owner.failed(NOW - 10 * SECOND)
    beats.others = [NOW + SECOND]
    assert owner.fence(NOW) <= NOW


def test_with_the_store_away_and_nobody_heard_a_node_goes_on_after_a_second(owner):
    owner.failed(NOW)
    assert owner.fence(NOW + SECOND - 1) <= NOW
    assert owner.fence(NOW + SECOND) == NOW + SECOND + Timing().silence_ns
    owner.read({ADDRESS: OTHERS._replace(revision=6)}, 6, NOW + SECOND, NOW + SECOND)
    assert owner.fence(NOW + SECOND) == NOW + SECOND, "and what it reads then counts at once"


def test_what_was_taken_just_now_is_answered_for(own):
    (write,) = own.writes(NOW)
    own.done(write, True, 9, NOW + 5 * MS)
    own.applied({ADDRESS})
    assert own.fence(NOW + 5 * MS) == NOW + GRACE_NS - SLACK


def test_what_is_taken_says_nothing_about_what_was_owned_before(owner):
    owner.elected = {ADDRESS: "me", OTHER: "me"}
    (write,) = owner.writes(NOW)
    owner.done(write, True, 9, NOW)
    assert owner.fence(NOW) <= NOW
    assert owner.must_read(NOW)


# --- without a store -------------------------------------------------------------------------------------------------


def test_trust_alone_lasts_while_the_node_runs(beats):
    assert Trust(beats).fence(NOW) == NOW + Timing().silence_ns


def test_trust_ends_with_the_first_that_is_heard(beats):
    trust = Trust(beats)
    trust.fence(NOW)
    beats.others = [0]
    assert trust.fence(NOW + MS) == NOW + MS


def test_trust_is_kept_by_half_and_regained_by_all(beats):
    trust = Trust(beats)
    beats.others = [NOW + 300 * MS, 0, 0]
    assert trust.fence(NOW) <= NOW
    beats.others = [NOW + 300 * MS] * 3
    assert trust.fence(NOW) == NOW + 300 * MS
    beats.others = [NOW + 500 * MS] * 2 + [0]
    assert trust.fence(NOW + 200 * MS) == NOW + 500 * MS


def test_trust_is_regained_by_half_that_has_lasted(beats):
    trust = Trust(beats)
    for tenth in range(12):
        now = NOW + tenth * 100 * MS
        beats.others = [now + 300 * MS, now + 300 * MS, 0]
        until = trust.fence(now)
        assert (until > now) == (tenth >= 10)


def test_a_write_is_a_value():
    write = Write(ADDRESS, 0, MINE, NOW)
    assert replace(write, claim=None) == Write(ADDRESS, 0, None, NOW)
