"""Who answers for an address, whatever is stopped, killed or cut off: explored in simulated time (failover_world)."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.control.election import winner
from tests.failover_world import ADDRESSES, MS, SECOND, World

NODES = ("n1", "n2", "n3", "n4")
ONE = st.sampled_from(NODES)
SOME = st.lists(ONE, unique=True, max_size=3).map(tuple)
PAUSE = st.one_of(st.integers(1, 700), st.integers(1, 12_000)).map(lambda milliseconds: milliseconds * MS)
ACTION = st.one_of(
    st.tuples(st.just("stop"), ONE),
    st.tuples(st.just("go_on"), ONE),
    st.tuples(st.just("kill"), ONE),
    st.tuples(st.just("start"), ONE),
    st.tuples(st.just("part"), ONE, SOME),
    st.tuples(st.just("deafen"), ONE, ONE),
    st.tuples(st.just("lose_store"), ONE),
    st.tuples(st.just("find_store"), ONE),
    st.tuples(st.just("hurry"), st.sampled_from([1, 10, 80])),
    st.tuples(st.just("heal")),
)
PLOT = st.lists(st.tuples(ACTION, PAUSE), max_size=30)


def never_two(world: World) -> None:
    """One node at most answers for an address, of those that are certain of it and those that reach the store."""
    for address in ADDRESSES:
        who = [name for name in world.answering(address) if world.is_certain(name) or world.reaches_store(name)]
        assert len(who) <= 1, f"{world.now / SECOND:.3f} {address} {who}"


def play(world: World, plot: list[tuple[Any, int]]) -> None:
    for (what, *details), pause in plot:
        if what == "hurry":
            world.slow = details[0]
        elif all(detail in world.names for detail in details if isinstance(detail, str)):
            getattr(world, what)(*details)
        world.run(pause)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 4), st.integers(0, 1 << 32), PLOT)
def test_never_two_nodes_answer_and_in_the_end_one_does(nodes, seed, plot):
    world = World(nodes, seed, never_two)
    world.run(3 * SECOND)
    play(world, plot)
    world.heal()
    world.run(12 * SECOND)
    for address in ADDRESSES:
        assert world.answering(address) == [winner(world.names, address)]


@settings(max_examples=25)
@given(st.integers(2, 4), st.integers(0, 1 << 32))
def test_a_killed_owner_is_replaced_within_a_second(nodes, seed):
    world = World(nodes, seed, never_two)
    world.run(4 * SECOND + world.random.randint(0, 100) * MS)
    (victim,) = world.answering(ADDRESSES[0])
    world.kill(victim)
    world.run(SECOND)
    for address in ADDRESSES:
        assert world.answering(address) == [winner(set(world.names) - {victim}, address)]


@settings(max_examples=10)
@given(st.integers(2, 4), st.integers(0, 1 << 32))
def test_while_nothing_fails_nothing_moves_and_nothing_is_interrupted(nodes, seed):
    world = World(nodes, seed)
    world.run(4 * SECOND)

    def all_answer(world: World) -> None:
        for address in ADDRESSES:
            assert world.answering(address) == [winner(world.names, address)]

    world.rule = all_answer
    world.run(20 * SECOND)
