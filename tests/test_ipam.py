"""Blocks, claims and assignments of one node or of two that take turns; races are in test_ipam_races."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from dataplane.control.ipam import (
    TUNNEL,
    Allocation,
    Given,
    NoAddressError,
    Pool,
    Rules,
    TakenError,
    allocated,
    cooled,
    freed,
    new_block,
    prefixes_of,
    walk,
)
from dataplane.control.ipam_engine import Allocator
from dataplane.control.ipam_json import BookError, check_block_size, dump, dump_pool, load, load_pool
from dataplane.control.ipam_store import Get, MemoryStore, Swap, affinity_key, block_key
from dataplane.control.state import Selector

POOL = Pool("default", ip_network("10.244.0.0/26"), 28)
RULES = Rules((POOL,))
NOW = 1_000_000.0


class Node:
    """An allocator on a store, one transaction after the other."""

    def __init__(self, store=None, name="node1", rules=RULES, labels=()):
        self.store = store or MemoryStore()
        self.allocator = Allocator(name, rules, labels)

    def assign(self, handle, now=NOW):
        return str(self.store.carry_out(self.allocator.assign(handle, now)))

    def request(self, address, handle, now=NOW):
        return str(self.store.carry_out(self.allocator.assign_requested(ip_address(address), handle, now)))

    def release(self, handle, now=NOW):
        return [str(address) for address in self.store.carry_out(self.allocator.release(handle, now))]

    def join(self, now=NOW):
        return str(self.store.carry_out(self.allocator.claim_first_block(now)))

    def give_back(self, now):
        return [str(cidr) for cidr in self.store.carry_out(self.allocator.give_back(now))]

    def held(self):
        return {handle: str(address) for handle, address in self.store.carry_out(self.allocator.held()).items()}

    def blocks(self):
        return {block.cidr: block for block in self.store.carry_out(self.allocator.blocks())}

    def prefixes(self):
        return [str(prefix) for prefix in prefixes_of(self.allocator.node, self.blocks())]

    def other(self, name, **rules):
        return Node(self.store, name, replace(self.allocator.rules, **rules))


def finish(store, steps, answer):
    """Carry out the rest of a transaction that waits for an answer."""
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration as done:
            return done.value
        answer = store.answer(operation)


def first_of(cidr, count, offset=0):
    start = ip_network(cidr).network_address
    return [str(start + offset + each) for each in range(count)]


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_a_block_gives_its_addresses_in_order_and_freed_ones_last():
    node = Node()
    given = [node.assign(f"pod{number}") for number in range(4)]
    (cidr,) = node.prefixes()
    assert given == first_of(cidr, 4)
    node.release("pod1")
    node.release("pod0")
    rest = [node.assign(f"late{number}") for number in range(14)]
    assert rest == [*first_of(cidr, 12, offset=4), given[1], given[0]]


def test_a_released_address_cools_down():
    node = Node(rules=replace(RULES, pools=(Pool("tiny", ip_network("10.244.0.0/31"), 31),), cooldown=30.0))
    assert {node.assign("a"), node.assign("b")} == {"10.244.0.0", "10.244.0.1"}
    address = node.held()["a"]
    node.release("a", NOW)
    with pytest.raises(NoAddressError):
        node.assign("c", NOW + 29.9)
    with pytest.raises(TakenError, match="cooling down"):
        node.request(address, "c", NOW + 29.9)
    assert node.assign("c", NOW + 30.0) == address


def test_what_was_released_in_the_future_of_a_clock_that_was_put_back_is_not_locked_up():
    block = freed(allocated(new_block(POOL.cidr), 3, Allocation("a", "n")), 3, NOW + 10_000)
    assert cooled(block, NOW, 30.0).unallocated[-1] == 3
    soon = freed(allocated(new_block(POOL.cidr), 3, Allocation("a", "n")), 3, NOW + 5)
    assert cooled(soon, NOW, 30.0).released == ((3, NOW + 5),)


def test_reserved_addresses_are_never_given_out():
    reserved = (ip_network("10.244.0.0/30"), ip_network("10.244.0.9/32"), ip_network("fd00::/64"))
    node = Node(rules=replace(RULES, reservations=reserved, pools=(Pool("one", ip_network("10.244.0.0/28"), 28),)))
    given = [node.assign(f"pod{number}") for number in range(11)]
    assert given == [f"10.244.0.{last}" for last in (4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15)]
    with pytest.raises(NoAddressError):
        node.assign("late")
    with pytest.raises(TakenError, match="reserved"):
        node.request("10.244.0.9", "late")


def test_a_block_that_is_reserved_whole_is_not_claimed():
    first = next(walk("node1", POOL))
    node = Node(rules=replace(RULES, reservations=(first,)))
    assert ip_address(node.assign("a")) not in first
    assert first not in node.blocks()


def test_a_requested_address_is_given_once():
    node = Node()
    assert node.request("10.244.0.37", "a") == "10.244.0.37"
    assert node.prefixes() == ["10.244.0.32/28"]
    with pytest.raises(TakenError, match=r"10\.244\.0\.37 is held by a"):
        node.request("10.244.0.37", "b")
    with pytest.raises(NoAddressError, match=r"10\.245\.0\.1 is in no pool of node node1"):
        node.request("10.245.0.1", "b")


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_nodes_first_address_is_its_tunnels():
    node = Node()
    cidr = node.join()
    assert node.prefixes() == [cidr]
    assert node.blocks()[ip_network(cidr)].allocations[0].handle == TUNNEL + "node1"
    assert node.assign("a") == first_of(cidr, 1, offset=1)[0]
    assert node.join() == cidr
    assert node.held() == {"a": first_of(cidr, 1, offset=1)[0]}


def test_a_first_block_whose_first_address_is_taken_is_put_behind_another():
    node = Node()
    taken = node.assign("a")
    cidr = node.join()
    assert ip_address(taken) not in ip_network(cidr)
    assert node.prefixes()[0] == cidr
    assert len(node.prefixes()) == 2


def test_a_first_block_that_has_no_tunnel_address_yet_gets_one():
    node = Node()
    assert node.request("10.244.0.37", "a") == "10.244.0.37"
    assert node.join() == "10.244.0.32/28"
    assert node.blocks()[ip_network("10.244.0.32/28")].allocations[0].handle == TUNNEL + "node1"


def test_a_first_address_that_is_borrowed_meanwhile_leaves_the_node_its_block():
    node = Node()
    other = node.other("node2", max_blocks=0)
    node.request("10.244.0.37", "a")
    steps, answer = node.allocator.claim_first_block(NOW), None
    key = affinity_key("node1", ip_network("10.244.0.32/28"))
    while not (isinstance(operation := steps.send(answer), Get) and operation.keys[0] == key):
        answer = node.store.answer(operation)
    assert other.request("10.244.0.32", "thief") == "10.244.0.32"
    assert str(finish(node.store, steps, node.store.answer(operation))) != "10.244.0.32/28"
    assert node.prefixes()[1:] == ["10.244.0.32/28"]
    assert key in node.store.entries()


def test_a_block_of_the_nodes_that_no_affinity_leads_to_is_found():
    node = Node()
    cidr = node.join()
    node.assign("a")
    key = affinity_key("node1", ip_network(cidr))
    before = node.store.entries()[key]
    (stored,) = node.store.answer(Get((key,)))
    assert node.store.answer(Swap(key, stored.revision, None))
    assert node.join() == cidr
    assert node.store.entries()[key] == before


def test_nodes_look_for_blocks_in_different_places():
    starts = {next(walk(f"node{number}", Pool("big", ip_network("10.244.0.0/16"), 26))) for number in range(100)}
    assert len(starts) > 90
    wanted = list(walk("node1", POOL))
    assert sorted(wanted) == list(POOL.cidr.subnets(new_prefix=28))
    assert list(walk("node1", POOL)) == wanted


def test_a_full_node_claims_another_block_up_to_its_limit_and_then_borrows():
    rules = replace(RULES, max_blocks=2)
    node, other = Node(rules=rules), None
    for number in range(32):
        node.assign(f"pod{number}")
    assert len(node.prefixes()) == 2
    with pytest.raises(
        NoAddressError, match="node1 has 2 of at most 2 blocks, no other block is to be had, and there is"
    ):
        node.assign("pod32")
    other = node.other("node2")
    cidr = other.join()
    assert node.assign("pod32") in first_of(cidr, 1, offset=1)
    assert node.prefixes()[2:] == [f"{node.held()['pod32']}/32"]
    assert other.prefixes() == [cidr]
    assert other.assign("theirs") == first_of(cidr, 1, offset=2)[0]


def test_with_strict_affinity_nobody_borrows():
    node = Node(rules=replace(RULES, max_blocks=1, strict_affinity=True))
    node.other("node2").join()
    for number in range(16):
        node.assign(f"pod{number}")
    with pytest.raises(NoAddressError, match="it may not borrow"):
        node.assign("pod16")
    theirs = ip_network(node.other("node2").prefixes()[0])
    with pytest.raises(TakenError, match="in a block of node node2"):
        node.request(str(theirs[5]), "pod16")


def test_an_empty_block_of_another_node_is_taken_after_a_minute():
    pool = Pool("two", ip_network("10.244.0.0/27"), 28)
    quiet = Node(rules=Rules((pool,), strict_affinity=True))
    quiet.join()
    for number in range(16):
        quiet.assign(f"pod{number}")
    assert len(quiet.prefixes()) == 2
    quiet.release("pod15", NOW + 100)
    busy = quiet.other("node2")
    for moment in (0, 59):
        with pytest.raises(NoAddressError):
            busy.assign("a", NOW + 100 + moment)
    address = busy.assign("a", NOW + 160)
    assert busy.prefixes() == [str(next(cidr for cidr in busy.blocks() if ip_address(address) in cidr))]
    assert len(quiet.prefixes()) == 1
    assert affinity_key("node1", ip_network(busy.prefixes()[0])) not in quiet.store.entries()
    with pytest.raises(NoAddressError):
        quiet.assign("b", NOW + 10_000)


def test_empty_blocks_are_given_back_after_a_minute_but_never_the_first():
    node = Node()
    first = node.join()
    for number in range(16):
        node.assign(f"pod{number}")
    second = node.prefixes()[1]
    node.release("pod15", NOW)
    assert node.give_back(NOW + 59) == []
    assert node.give_back(NOW + 60) == [second]
    for number in range(15):
        node.release(f"pod{number}", NOW)
    assert node.give_back(NOW + 1000) == []
    assert node.prefixes() == [first]
    assert set(node.store.entries()) == {block_key(ip_network(first)), affinity_key("node1", ip_network(first))}


def test_a_block_that_is_used_meanwhile_is_not_given_back():
    node = Node()
    node.join()
    for number in range(16):
        node.assign(f"pod{number}")
    address = node.held()["pod15"]
    node.release("pod15", NOW)
    steps, answer = node.allocator.give_back(NOW + 60), None
    while not isinstance(operation := steps.send(answer), Swap):
        answer = node.store.answer(operation)
    assert node.request(address, "late", NOW + 60) == address
    assert finish(node.store, steps, node.store.answer(operation)) == ()
    assert len(node.prefixes()) == 2


def test_the_first_block_is_kept_also_without_a_tunnel_address():
    node = Node()
    node.assign("a")
    node.release("a")
    assert node.give_back(NOW + 1000) == []
    assert len(node.prefixes()) == 1


def test_what_cools_down_keeps_its_block():
    node = Node(rules=replace(RULES, cooldown=600.0))
    node.join()
    for number in range(16):
        node.assign(f"pod{number}")
    node.release("pod15", NOW)
    assert node.give_back(NOW + 599) == []
    assert len(node.give_back(NOW + 600)) == 1


def test_pools_are_for_some_nodes_and_may_be_disabled():
    west = Pool("west", ip_network("10.1.0.0/26"), 28, node_selector=Selector((("zone", "west"),)))
    old = Pool("old", ip_network("10.2.0.0/26"), 28)
    node = Node(rules=Rules((west, old)))
    assert node.assign("a") in map(str, old.cidr)
    east = Node(node.store, "node2", Rules((west, replace(old, disabled=True))))
    with pytest.raises(NoAddressError, match="node node2 has no pool"):
        east.assign("b")
    westerly = Node(node.store, "node3", Rules((west, old)), labels=(("zone", "west"),))
    assert westerly.assign("c") in map(str, west.cidr)
    node.allocator.rules = Rules((replace(old, disabled=True),))
    with pytest.raises(NoAddressError):
        node.assign("d")
    assert len(node.release("a")) == 1, "what is held in a disabled pool can be released"


def test_a_block_that_a_nodes_file_gives_is_nobody_elses():
    store = MemoryStore([("nodes/other", Given((ip_network("10.244.0.0/27"),)))])
    node = Node(store)
    assert node.join() in ("10.244.0.32/28", "10.244.0.48/28")
    with pytest.raises(NoAddressError, match=r"which 10\.244\.0\.0/27 overlaps"):
        node.request("10.244.0.1", "a")


def test_blocks_of_another_size_are_gone_around():
    small = Node(rules=Rules((Pool("p", ip_network("10.244.0.0/26"), 30),)))
    addresses = {small.request("10.244.0.1", "a"), small.request("10.244.0.33", "b")}
    large = Node(small.store, "node2", Rules((Pool("p", ip_network("10.244.0.0/26"), 28),), strict_affinity=True))
    given = {large.assign(f"pod{number}") for number in range(32)}
    assert not given & addresses
    assert {str(cidr) for cidr in large.blocks() if cidr.prefixlen == 28} == {"10.244.0.16/28", "10.244.0.48/28"}
    with pytest.raises(NoAddressError):
        large.assign("more")
    with pytest.raises(NoAddressError, match=r"needs block 10\.244\.0\.0/28, which 10\.244\.0\.0/30 overlaps"):
        large.request("10.244.0.9", "more")


# --- releasing -------------------------------------------------------------------------------------------------------


def test_a_release_is_of_the_holder_and_of_the_use_that_was_seen():
    node = Node()
    address = ip_address(node.assign("a"))
    seen = next(iter(node.blocks().values())).allocations[0]
    take = node.allocator.release_address
    assert node.store.carry_out(take(address, NOW, "somebody else")) is None
    node.release("a")
    assert node.request(str(address), "a") == str(address)
    assert node.store.carry_out(take(address, NOW, "a", seen.sequence)) is None
    assert node.held() == {"a": str(address)}
    assert getattr(node.store.carry_out(take(address, NOW)), "handle", "") == "a"
    assert node.store.carry_out(take(address, NOW)) is None
    assert node.release("a") == []


def test_a_borrowed_address_is_found_by_its_handle():
    owner = Node(rules=replace(RULES, pools=(Pool("one", ip_network("10.244.0.0/28"), 28),)))
    owner.join()
    borrower = owner.other("node2")
    address = borrower.assign("a")
    assert borrower.prefixes() == [f"{address}/32"]
    assert borrower.release("a") == [address]
    assert borrower.prefixes() == []


def test_a_node_that_is_gone_is_forgotten():
    gone = Node(rules=replace(RULES, max_blocks=1))
    gone.join()
    guest = gone.other("node2", max_blocks=0)
    theirs = guest.assign("guest")
    gone.assign("a")
    released = guest.store.carry_out(guest.allocator.forget("node1", NOW))
    assert len(released) == 2
    assert gone.prefixes() == []
    assert guest.held() == {"guest": theirs}
    heir = gone.other("node3")
    heir.join()
    assert set(heir.prefixes()) <= {str(cidr) for cidr in POOL.cidr.subnets(new_prefix=28)}
    guest.release("guest")


# --- crashes ---------------------------------------------------------------------------------------------------------


def swaps_of(store, steps, limit):
    """Carry out a transaction until it has made so many swaps; return whether it came to its end before."""
    answer, count = None, 0
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration:
            return True
        if isinstance(operation, Swap):
            if count == limit:
                return False
            count += 1
        answer = store.answer(operation)


ACTIONS = {
    "join": lambda node: node.allocator.claim_first_block(NOW),
    "assign": lambda node: node.allocator.assign("crash", NOW),
    "take over": lambda node: node.allocator.assign("crash", NOW + 1000),
    "request": lambda node: node.allocator.assign_requested(ip_address("10.244.0.33"), "crash", NOW),
    "release": lambda node: node.allocator.release("pod3", NOW),
    "give back": lambda node: node.allocator.give_back(NOW + 1000),
    "forget": lambda node: node.allocator.forget("node2", NOW),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_crash_between_any_two_swaps_loses_nothing(action):
    limit, finished = 0, False
    while not finished:
        node = Node()
        if action != "join":
            node.join()
            for number in range(16 if action == "give back" else 15):
                node.assign(f"pod{number}")
        if action == "take over":
            for other in ("node2", "node3", "node4"):
                node.other(other).store.carry_out(node.other(other).allocator.assign(other, NOW))
                node.other(other).release(other)
        if action == "give back":
            node.release("pod15")
        if action == "forget":
            node.other("node2").join()
            node.other("node2").assign("x")
        finished = swaps_of(node.store, ACTIONS[action](node), limit)
        limit += 1
        again = Node(node.store)
        again.join(NOW + 2000)
        for other in ("node2", "node3", "node4"):
            node.store.carry_out(again.allocator.forget(other, NOW + 2000))
        for handle in again.held():
            again.release(handle)
        assert again.held() == {}
        # All addresses but the tunnel's can be had: nothing is lost, and nothing there twice.
        given = {again.assign(f"new{number}", NOW + 3000) for number in range(63)}
        assert len(given) == 63
        with pytest.raises(NoAddressError):
            again.assign("more", NOW + 3000)
    assert limit > 1


# --- text ------------------------------------------------------------------------------------------------------------


def test_entries_can_be_written_and_read_again():
    node = Node(rules=replace(RULES, cooldown=30.0))
    node.join()
    node.assign("a")
    node.release("a")
    for key, value in node.store.entries().items():
        assert load(key, dump(value)) == value
    six = new_block(ip_network("fd00::/122"))
    assert load("blocks/fd00::-122", dump(six)) == six
    pool = Pool("west", ip_network("10.1.0.0/24"), 26, True, Selector((("a", "b"),), (("z", "In", ("x", "y")),)))
    assert load_pool("west", dump_pool(pool)) == pool


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("blocks/10.0.0.0-31", "nonsense"),
        ("blocks/10.0.0.0-31", "[]"),
        ("blocks/10.0.0.0-31", "{}"),
        ("blocks/10.0.0.2-31", dump(new_block(ip_network("10.0.0.0/31")))),
        ("blocks/10.0.0.0-31", dump(new_block(ip_network("10.0.0.0/31"))).replace("[0, 1]", "[0]")),
        ("blocks/10.0.0.0-31", dump(new_block(ip_network("10.0.0.0/31"))).replace("[0, 1]", "[0, 0]")),
        ("blocks/10.0.0.0-31", dump(new_block(ip_network("10.0.0.0/31"))).replace("[0, 1]", "[0, 2]")),
        ("blocks/10.0.0.0-31", dump(new_block(ip_network("10.0.0.0/31"))).replace("/31", "/8")),
        ("blocks/10.0.0.0-31", dump(new_block(ip_network("10.0.0.0/31"))).replace('"number": 0', '"number": "x"')),
        ("affinities/n/10.0.0.0-31", '{"node": "n", "cidr": "10.0.0.0/31", "number": 1, "state": "maybe"}'),
    ],
)
def test_broken_entries_are_named(key, text):
    with pytest.raises(BookError):
        load(key, text)


def test_block_sizes_have_limits():
    for cidr, size in (("10.0.0.0/16", 19), ("10.0.0.0/24", 23), ("10.0.0.0/24", 33), ("fd00::/64", 115)):
        with pytest.raises(BookError):
            check_block_size(ip_network(cidr), size)
    check_block_size(ip_network("fd00::/64"), 116)
    check_block_size(ip_network("10.0.0.0/16"), 20)
