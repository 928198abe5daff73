"""Nodes that give out addresses at once, interleaved at every step of what they do, and killed between any two."""

from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.control.ipam import TUNNEL, Block, NoAddressError, Pool, Rules, TakenError
from dataplane.control.ipam_engine import Allocator
from dataplane.control.ipam_json import dump, load
from dataplane.control.ipam_store import MemoryStore, Swap
from tests.naive_ipam import NaiveIpam

NODES = ("a", "b", "c")
POOL = ip_network("10.244.0.0/28")
ADDRESSES = [ip_address("10.244.0.0") + offset for offset in range(17)]
nodes = st.sampled_from(NODES)


class Running:
    """A transaction under way: ``answer`` is what the store said last, which the node has not seen yet."""

    def __init__(self, what, steps, now, revision, **about):
        self.what, self.steps, self.now, self.revision = what, steps, now, revision
        self.about = about
        self.answer = None
        self.alone = True


class Races(RuleBasedStateMachine):
    @initialize(
        size=st.sampled_from([29, 30, 30, 30, 31, 32]),
        strict=st.booleans(),
        cooldown=st.sampled_from([0.0, 30.0]),
        blocks=st.integers(1, 3),
        reserved=st.sets(st.sampled_from(ADDRESSES), max_size=3),
        early=st.sets(nodes),
    )
    def begin(self, size, strict, cooldown, blocks, reserved, early):
        self.given = Rules((Pool("default", POOL, size),), tuple(map(ip_network, reserved)), strict, blocks, cooldown)
        self.store = MemoryStore()
        self.oracle = NaiveIpam(self.given)
        self.now = 1000.0
        self.running = {}
        self.handles = 0
        self.known: dict[str, dict[str, object]] = {node: {} for node in NODES}
        self.joined = set()
        self.sound = True  # what has failed once fails in the end in other ways
        for node in sorted(early):
            self.join(node)
            self.to_the_end(node)

    def allocator(self, node):
        return Allocator(node, self.given)

    def start(self, node, what, steps, **about):
        self.running[node] = Running(what, steps, self.now, self.store.revision, **about)

    # --- what nodes do -----------------------------------------------------------------------------------------------

    def idle(self, node, joined=True):
        """Whether a node can begin something; one that was killed has to join first."""
        return node not in self.running and (node in self.joined) == joined

    @rule(node=nodes)
    def join(self, node):
        if self.idle(node, joined=False):
            self.start(node, "join", self.allocator(node).claim_first_block(self.now))

    @rule(wanting=st.lists(nodes, min_size=1, max_size=3, unique=True))
    def assign(self, wanting):
        for node in filter(self.idle, wanting):
            self.handles += 1
            handle = f"pod{self.handles}"
            self.start(node, "assign", self.allocator(node).assign(handle, self.now), handle=handle)

    @rule(node=nodes, count=st.integers(1, 8))
    def fill(self, node, count):
        """Take some addresses without a competitor."""
        for _ in range(count):
            if self.idle(node):
                self.assign([node])
                self.to_the_end(node)

    @rule(order=st.lists(nodes, min_size=5, max_size=60), fresh=st.booleans())
    def race(self, order, fresh):
        """Let nodes take addresses at once, one after the other."""
        for node in order:
            if self.idle(node, joined=False):
                self.join(node)
            elif fresh:
                self.assign([node])
            if node in self.running:
                self.one_step(node)

    @rule(wanting=st.lists(nodes, min_size=1, max_size=2, unique=True), address=st.sampled_from(ADDRESSES))
    def assign_requested(self, wanting, address):
        for node in filter(self.idle, wanting):
            self.handles += 1
            handle = f"pod{self.handles}"
            steps = self.allocator(node).assign_requested(address, handle, self.now)
            self.start(node, "request", steps, handle=handle, requested=address)

    @rule(choice=st.integers(0, 99))
    def release(self, choice):
        for node in filter(self.idle, NODES):
            if self.known[node]:
                handle = sorted(self.known[node])[choice % len(self.known[node])]
                self.start(node, "release", self.allocator(node).release(handle, self.now), handle=handle)

    @rule(node=nodes, choice=st.integers(0, 99))
    def release_somebodys_address(self, node, choice):
        held = sorted((a, holder) for a, (holder, _) in self.oracle.held.items() if not holder.startswith(TUNNEL))
        if self.idle(node) and held:
            address, holder = held[choice % len(held)]
            steps = self.allocator(node).release_address(address, self.now, holder)
            self.start(node, "release", steps, handle=holder)

    @rule(node=nodes)
    def give_back(self, node):
        if self.idle(node):
            self.start(node, "tidy", self.allocator(node).give_back(self.now))

    @rule(node=nodes)
    def release_all_of_a_node(self, node):
        if self.idle(node):
            for handle in tuple(self.known[node]):
                self.start(node, "release", self.allocator(node).release(handle, self.now), handle=handle)
                self.to_the_end(node)

    @rule(quiet=st.lists(nodes, min_size=1, max_size=2, unique=True), node=nodes, count=st.integers(1, 12))
    def take_over(self, quiet, node, count):
        """Let nodes use nothing for a minute, while another one wants more."""
        for each in quiet:
            self.release_all_of_a_node(each)
        self.wait(61.0 + self.given.cooldown)
        self.fill(node, count)

    @rule(node=nodes, other=nodes)
    def forget_a_dead_node(self, node, other):
        if self.idle(node) and self.idle(other, joined=False):
            self.start(node, "forget", self.allocator(node).forget(other, self.now), of=other)
            self.to_the_end(node)

    @rule(seconds=st.sampled_from([1.0, 29.0, 31.0, 61.0]))
    def wait(self, seconds):
        self.now += seconds

    # --- steps and crashes -------------------------------------------------------------------------------------------

    @rule(order=st.lists(nodes, min_size=1, max_size=40))
    def interleave(self, order):
        for node in order:
            if node in self.running:
                self.one_step(node)

    @rule()
    def go_on(self):
        for node in sorted(self.running):
            self.to_the_end(node)

    @precondition(lambda self: self.running)
    @rule(node=nodes)
    def crash(self, node):
        if self.running.pop(node, None):
            self.joined.discard(node)

    def to_the_end(self, node):
        while node in self.running:
            self.one_step(node)

    def one_step(self, node):
        run = self.running[node]
        try:
            operation = run.steps.send(run.answer)
        except StopIteration as done:
            del self.running[node]
            self.finished(node, run, done.value)
            return
        except (TakenError, NoAddressError) as error:
            del self.running[node]
            self.refused(node, run, error)
            return
        before = self.value(operation.key) if isinstance(operation, Swap) else None
        run.answer = self.store.answer(operation)
        if isinstance(operation, Swap) and run.answer:
            for other in self.running.values():
                other.alone = other.alone and other is run
            self.check_text(operation)
            forgetting = run.what == "forget"
            requested, self.sound = run.about.get("requested"), False
            self.oracle.saw(node, run.now, self.now, before, operation.value, requested, forgetting)
            self.sound = True

    def value(self, key):
        return self.store.entries().get(key)

    def check_text(self, operation):
        """What is written can be read again."""
        if operation.value is not None:
            assert load(operation.key, dump(operation.value)) == operation.value

    # --- outcomes ----------------------------------------------------------------------------------------------------

    def finished(self, node, run, result):
        if run.what == "join":
            self.joined.add(node)
            tunnel = result.network_address
            assert self.oracle.held[tunnel] == (TUNNEL + node, node)
            self.adopt(node)
        elif run.what in ("assign", "request"):
            assert self.oracle.granted[run.about["handle"]] == result
            assert run.about.get("requested") in (None, result)
            self.known[node][run.about["handle"]] = result
        elif run.what == "release":
            assert all(holder[0] != run.about["handle"] for holder in self.oracle.held.values())
            for known in self.known.values():
                known.pop(run.about["handle"], None)
        elif run.what == "tidy":
            assert all(self.oracle.owner.get(cidr) != node for cidr in result or ())
        elif run.what == "forget":
            self.known[run.about["of"]] = {}

    def adopt(self, node):
        """A node that starts again asks the books what it holds."""
        self.known[node] = self.finish(self.allocator(node).held())

    def refused(self, node, run, error):
        if run.what == "assign" and run.alone:
            left = self.oracle.available(node, run.now, borrow=not self.given.strict_affinity)
            assert not left, f"{left} could be had: {error}"
        if run.what == "request" and run.alone:
            address = run.about["requested"]
            left = self.oracle.available(node, run.now, borrow=not self.given.strict_affinity)
            owner = next((owner for cidr, owner in self.oracle.owner.items() if address in cidr), "")
            foreign = self.given.strict_affinity and owner not in ("", node)
            assert address not in left or foreign or owner == "", f"{address} could be had: {error}"

    def finish(self, steps):
        return self.store.carry_out(steps)

    # --- always, and in the end --------------------------------------------------------------------------------------

    @invariant()
    def the_books_say_what_was_given_out(self):
        if hasattr(self, "store"):
            held = {}
            for value in self.store.entries().values():
                if isinstance(value, Block):
                    for ordinal, each in value.allocations.items():
                        held[value.address(ordinal)] = (each.handle, each.node)
            assert held == self.oracle.held

    def teardown(self):
        if not hasattr(self, "store") or not self.sound:
            return
        for node in sorted(self.running):
            self.to_the_end(node)
        for node in NODES:
            self.finish_checked(node, "tidy", self.allocator(node).recover())
            for handle in self.finish(self.allocator(node).held()):
                self.finish_checked(node, "release", self.allocator(node).release(handle, self.now), handle=handle)
        self.now += 2000
        for node in NODES:
            self.joined.add(node)
            self.finish_checked(node, "forget", self.allocator(node).forget(node, self.now), of=node)
        self.now += 2000
        for node in NODES:
            self.finish_checked(node, "forget", self.allocator(node).forget("", self.now), of=node)
        assert not self.oracle.held
        blocks = [value for value in self.store.entries().values() if isinstance(value, Block)]
        assert len(blocks) == len(self.store.entries()), "an affinity was left"

    def finish_checked(self, node, what, steps, **about):
        self.start(node, what, steps, **about)
        self.to_the_end(node)


Races.TestCase.settings = settings(max_examples=300, stateful_step_count=50)
TestRaces = Races.TestCase


def test_a_block_that_is_used_while_its_node_is_forgotten_is_taken_from_it_all_the_same():
    store, rules = MemoryStore(), Rules((Pool("default", POOL, 30),), max_blocks=1)
    gone, guest = Allocator("a", rules), Allocator("b", replace(rules, max_blocks=0))
    store.carry_out(gone.claim_first_block(1000.0))
    forgetting = guest.forget("a", 1000.0)
    operation = next(forgetting)
    while not (isinstance(operation, Swap) and operation.value is None):  # the block is empty now, and would go
        operation = forgetting.send(store.answer(operation))
    borrowed = store.carry_out(guest.assign("guest", 1000.0))
    with suppress(StopIteration):
        while True:
            operation = forgetting.send(store.answer(operation))
    (block,) = store.carry_out(guest.blocks())
    assert (block.affinity, borrowed in block.cidr) == ("", True)
    assert store.carry_out(guest.held()) == {"guest": borrowed}
