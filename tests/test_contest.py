"""Who may have what nobody else can have."""

from hypothesis import given
from hypothesis import strategies as st

from dataplane.control.contest import Contest

ENTRIES = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.integers(0, 2), st.lists(st.sampled_from("xyz"), unique=True)), max_size=4
)
Moves = list[tuple[str, tuple[int, list[str]] | None]]


def outcome(contest: Contest[str], names: set[str]) -> dict[str, bool]:
    return {name: contest.lost(name) is None for name in names}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), ENTRIES.map(lambda each: each.get("a"))))))
def test_the_first_by_rank_and_name_has_it_and_rivals_are_told(moves: Moves):
    contest: Contest[str] = Contest()
    entries: dict[str, tuple[int, list[str]]] = {}
    known: dict[str, bool] = {}
    for name, entry in moves:
        if entry is None:
            rivals = contest.leave(name)
            entries.pop(name, None)
        else:
            rivals = contest.enter(name, (entry[0],), entry[1])
            entries[name] = entry
        found = outcome(contest, set(entries))
        for each, (rank, tokens) in entries.items():
            before = (other for other, (o_rank, _) in entries.items() if (o_rank, other) < (rank, each))
            assert found[each] == (not any(set(tokens) & set(entries[other][1]) for other in before))
        changed = {each for each in found if each in known and known[each] != found[each]}
        assert changed - {name} <= rivals
        known = found


def test_a_loser_is_told_what_and_to_whom():
    contest: Contest[str] = Contest()
    contest.enter("old", (1,), ["x", "y"])
    contest.enter("new", (2,), ["z", "y"])
    assert contest.lost("old") is None
    assert contest.lost("new") == ("y", "old")
