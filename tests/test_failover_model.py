"""Who answers for an address, whatever is stopped, killed or cut off: explored in simulated time (failover_world).

The stories are made by a generator with a seed and not by hypothesis, whose short ones hardly ever do harm: of the
40, eight show a successor that does not wait, and fifteen a fence that never closes.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.control.election import winner
from tests.failover_world import ADDRESSES, MS, SECOND, World

SITES = ("stop", "go_on", "go_on", "kill", "start", "start", "lose_store", "find_store")  # what one node may do
WHAT = (*SITES, "part", "deafen", "slow", "heal")


def never_two(world: World) -> None:
    """One node at most answers for an address, of those that are certain of it and those that reach the store."""
    for address in ADDRESSES:
        who = [name for name in world.answering(address) if world.is_certain(name) or world.reaches_store(name)]
        assert len(who) <= 1, f"{world.now / SECOND:.3f} {address} {who}"


def tell(world: World, dice: random.Random) -> None:
    """Have something happen to some node, and let some time go by."""
    what, name = dice.choice(WHAT), dice.choice(world.names)
    if what == "part":
        world.part(name, tuple(dice.sample(world.names, dice.randint(0, len(world.names)))))
    elif what == "deafen":
        world.deafen(name, dice.choice(world.names))
    elif what == "slow":
        world.slow = dice.choice([1, 10, 80])
    elif what == "heal":
        world.heal()
    else:
        getattr(world, what)(name)
    world.run(dice.choice([dice.randint(1, 700), dice.randint(1, 6000)]) * MS)


@pytest.mark.parametrize("seed", range(40))
def test_never_two_nodes_answer_and_in_the_end_one_does(seed):
    dice = random.Random(seed)
    world = World(dice.randint(2, 4), seed, never_two)
    world.run(3 * SECOND)
    for _ in range(dice.randint(5, 25)):
        tell(world, dice)
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
