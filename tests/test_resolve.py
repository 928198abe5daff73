"""resolve: the neighbor state machine, with a clock that tests turn by hand.

The rows follow Linux's neighbour.c and arp.c with their defaults; B1 lists the timers.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.l2 import ARP, Ether

from dataplane.devices.memory import Vnet
from dataplane.resolve import GC_START, PACKET_COST, PROBES, QUEUE_BYTES, SECOND, Outgoing, Resolver
from dataplane.tables.address import parse_mac
from dataplane.tables.neighbour import LOCK_NS, NeighbourTable, State
from dataplane.verdict import Reason
from tests import world as w
from tests.frames import BROADCAST, arp_request

LAN = 1
NEVER = "02:00:c0:00:02:77"


class Host:
    """A resolver, its clock, and what it has given up."""

    def __init__(self, capacity=1024):
        self.table = NeighbourTable(capacity, seed=3)
        self.dropped = []
        self.now = 1_000 * SECOND
        station = (parse_mac(w.UPLINK_MAC), 0xC000_020B)
        self.resolver = Resolver(self.table, lambda interface: station, self._drop, seed=5)

    def _drop(self, packet, reason):
        self.dropped.append((packet.frame, reason))

    def hold(self, address=w.LAN_GATEWAY, frame=b"packet"):
        return self.resolver.hold(Outgoing(frame, LAN), address, self.now)

    def hear(self, sender=w.LAN_GATEWAY, mac=w.LAN_MAC, op=2, target=w.NODE, to=w.UPLINK_MAC, tha=w.UPLINK_MAC):
        frame = Ether(src=mac, dst=to) / ARP(op=op, hwsrc=mac, psrc=sender, hwdst=tha, pdst=target)
        return self.resolver.learn(LAN, bytes(frame), self.now)

    def wait(self, seconds):
        """Let time pass as the engine does: a tick a second."""
        out = []
        for _ in range(seconds):
            self.now += SECOND
            out += self.resolver.tick(self.now)
        return out

    def entry(self, address=w.LAN_GATEWAY):
        return self.table.records[self.table.find(LAN, address)]

    def state(self, address=w.LAN_GATEWAY):
        return State(int(self.entry(address)["state"])) if self.table.find(LAN, address) >= 0 else None

    def use(self, address=w.LAN_GATEWAY):
        """What the route stage does for every packet to a neighbor."""
        self.entry(address)["used_ns"] = self.now

    def reach(self, state, address=w.LAN_GATEWAY):
        """Bring a neighbor into a state by the way that leads there."""
        self.hold(address)
        if state == State.INCOMPLETE:
            return
        if state == State.FAILED:
            self.wait(3)
            self.dropped.clear()
            return
        self.hear(sender=address)
        if state == State.REACHABLE:
            return
        self.wait(46)
        assert self.state(address) == State.STALE
        if state == State.STALE:
            return
        self.now += 1
        self.use(address)
        self.wait(1)
        assert self.state(address) == State.DELAY
        if state == State.PROBE:
            self.wait(5)


@pytest.fixture
def host():
    return Host()


def question(to=BROADCAST):
    return bytes(arp_request(w.LAN_GATEWAY, sender=w.NODE, mac=w.UPLINK_MAC, to=to))


# --- nobody known ----------------------------------------------------------------------------------------------------


def test_the_first_packet_asks_everybody(host):
    assert host.hold() == [Outgoing(question(), LAN)]
    assert host.state() == State.INCOMPLETE


def test_packets_that_follow_only_wait(host):
    host.hold()
    assert host.hold(frame=b"second") == []
    assert host.resolver.waiting == 2


def test_three_questions_a_second_apart_then_failure(host):
    asked = [(host.now, packet.frame) for packet in host.hold()]
    for _ in range(5):
        host.now += SECOND
        asked += [(host.now, packet.frame) for packet in host.resolver.tick(host.now)]
    start = asked[0][0]
    assert asked == [(start + k * SECOND, question()) for k in range(PROBES)]
    assert host.state() == State.FAILED


def test_failure_comes_three_seconds_after_the_first_question(host):
    host.hold()
    host.wait(2)
    assert (host.state(), host.dropped) == (State.INCOMPLETE, [])
    host.wait(1)
    assert (host.state(), host.dropped) == (State.FAILED, [(b"packet", Reason.NEIGH_UNRESOLVED)])


def test_a_tick_that_comes_a_little_early_loses_no_second(host):
    """A timer of the event loop counts milliseconds: by the engine's clock a second is 999.1 ms now and then."""
    host.hold()
    for _ in range(3):
        host.now += SECOND - 900_000
        host.resolver.tick(host.now)
    assert host.state() == State.FAILED


def test_all_that_waited_is_dropped_in_order(host):
    for k in range(5):
        host.hold(frame=bytes([k]))
    host.wait(3)
    assert host.dropped == [(bytes([k]), Reason.NEIGH_UNRESOLVED) for k in range(5)]
    assert host.resolver.waiting == 0


def test_a_failed_neighbor_is_asked_again_at_once(host):
    host.reach(State.FAILED)
    assert host.hold() == [Outgoing(question(), LAN)]
    assert host.state() == State.INCOMPLETE
    host.wait(3)
    assert host.state() == State.FAILED


def test_a_failed_neighbor_is_forgotten_after_a_minute(host):
    host.reach(State.FAILED)
    host.wait(60)
    assert host.state() == State.FAILED
    host.wait(1)
    assert host.state() is None


def test_an_answer_releases_what_waited_in_order_and_to_be_routed_again(host):
    vnet = Vnet(1, 0, 0, 0, 34, 6)
    host.resolver.hold(Outgoing(b"one", LAN, vnet), w.LAN_GATEWAY, host.now)
    host.hold(frame=b"two")
    assert host.hear() == [Outgoing(b"one", 0, vnet), Outgoing(b"two", 0)]
    assert host.state() == State.REACHABLE
    assert host.entry()["mac"] == parse_mac(w.LAN_MAC)
    assert (host.resolver.waiting, host.hear()) == (0, [])


def test_a_packet_whose_neighbor_has_become_known_meanwhile_does_not_wait(host):
    host.reach(State.REACHABLE)
    assert host.hold() == [Outgoing(b"packet", 0)]
    assert (host.state(), host.resolver.waiting) == (State.REACHABLE, 0)


def test_an_answer_to_all_is_believed_but_not_trusted(host):
    """Only a reply to us alone shows that the neighbor hears us."""
    host.hold()
    assert len(host.hear(to=BROADCAST)) == 1
    assert host.state() == State.STALE


def test_an_answer_to_a_group_is_an_answer_to_many(host):
    host.hold()
    host.hear(to="01:00:5e:00:00:01")
    assert host.state() == State.STALE


# --- known ----------------------------------------------------------------------------------------------------------


def test_reachable_lasts_between_half_and_one_and_a_half_of_thirty_seconds():
    lasted = set()
    host = Host()
    for k in range(20):
        address = f"192.0.2.{100 + k}"
        host.hold(address)
        host.hear(sender=address)
        before = host.now
        while host.state(address) == State.REACHABLE:
            host.wait(1)
        lasted.add((host.now - before) // SECOND)
    assert min(lasted) >= 15
    assert max(lasted) <= 46
    assert len(lasted) > 5


def test_stale_stays_while_nobody_uses_it(host):
    host.reach(State.STALE)
    assert host.wait(3600) == []
    assert host.state() == State.STALE


def test_a_used_stale_neighbor_is_asked_alone_after_five_seconds(host):
    host.reach(State.DELAY)
    assert host.wait(4) == []
    assert host.state() == State.DELAY
    assert host.wait(1) == [Outgoing(question(to=w.LAN_MAC), LAN)]
    assert host.state() == State.PROBE


def test_an_answer_to_the_probe_makes_it_reachable(host):
    host.reach(State.PROBE)
    host.hear()
    assert host.state() == State.REACHABLE


def test_three_probes_to_it_alone_then_failure(host):
    host.reach(State.DELAY)
    asked = host.wait(5 + 2)
    assert asked == [Outgoing(question(to=w.LAN_MAC), LAN)] * 3
    assert host.state() == State.PROBE
    assert host.wait(1) == []
    assert host.state() == State.FAILED


def test_an_answer_in_delay_spares_the_probe(host):
    host.reach(State.DELAY)
    host.hear()
    assert host.state() == State.REACHABLE


KNOWN = [State.REACHABLE, State.STALE, State.DELAY, State.PROBE]


@pytest.mark.parametrize("state", KNOWN, ids=lambda state: state.name)
def test_a_request_that_says_nothing_new_changes_nothing(host, state):
    """neigh_update: STALE for an address that is known already keeps the state; it proves no reachability."""
    host.reach(state)
    before = host.entry().copy()
    host.now += 10
    host.hear(op=1, to=BROADCAST)
    assert host.entry() == before


def test_requests_alone_do_not_keep_a_neighbor_reachable(host):
    host.reach(State.REACHABLE)
    for _ in range(46):
        host.hear(op=1, to=BROADCAST)
        host.wait(1)
    assert host.state() == State.STALE


@pytest.mark.parametrize("state", KNOWN, ids=lambda state: state.name)
def test_within_a_second_the_first_answer_wins(host, state):
    host.reach(state)
    host.hear()
    host.now += LOCK_NS - 1
    host.hear(mac=NEVER)
    assert host.entry()["mac"] == parse_mac(w.LAN_MAC)
    assert host.state() == State.REACHABLE


def test_after_a_second_another_answer_wins(host):
    host.reach(State.REACHABLE)
    host.now += LOCK_NS
    host.hear(mac=NEVER)
    assert (host.entry()["mac"], host.state()) == (parse_mac(NEVER), State.REACHABLE)


def test_after_a_second_a_request_with_another_address_is_believed_but_not_trusted(host):
    host.reach(State.REACHABLE)
    host.now += LOCK_NS
    host.hear(mac=NEVER, op=1, to=BROADCAST)
    assert (host.entry()["mac"], host.state()) == (parse_mac(NEVER), State.STALE)


GRATUITOUS = [
    ("request", {"op": 1, "tha": "00:00:00:00:00:00"}, True),
    ("reply", {"op": 2, "tha": NEVER}, True),
    ("reply that names another station", {"op": 2, "tha": w.UPLINK_MAC}, False),
]


@pytest.mark.parametrize(("fields", "believed"), [row[1:] for row in GRATUITOUS], ids=[row[0] for row in GRATUITOUS])
def test_at_once_believed_is_a_gratuitous(host, fields, believed):
    """A virtual address that moves announces itself so; arp_is_garp wants a reply's target to be its sender."""
    host.reach(State.REACHABLE)
    host.hear(mac=NEVER, target=w.LAN_GATEWAY, to=BROADCAST, **fields)
    assert bool(host.entry()["mac"] == parse_mac(NEVER)) is believed
    assert host.state() == (State.STALE if believed else State.REACHABLE)


@pytest.mark.parametrize(
    "fields", [{"op": 2}, {"op": 1, "target": w.LAN_GATEWAY}, {"op": 2, "target": w.LAN_GATEWAY}], ids=str
)
def test_only_a_request_for_us_makes_a_new_entry(host, fields):
    assert host.hear(**fields) == []
    assert host.state() is None


def test_who_asks_for_us_is_known_but_not_trusted(host):
    assert host.hear(op=1, to=BROADCAST) == []
    assert (host.state(), host.entry()["mac"]) == (State.STALE, parse_mac(w.LAN_MAC))


@pytest.mark.parametrize("op", [1, 2])
def test_a_permanent_neighbor_is_what_the_operator_said(host, op):
    row = host.table.insert(LAN, w.LAN_GATEWAY)
    entry = host.table.records[row]
    entry["state"], entry["mac"] = State.PERMANENT, parse_mac(w.LAN_MAC)
    host.hear(mac=NEVER, op=op)
    host.wait(100)
    assert (host.state(), host.entry()["mac"]) == (State.PERMANENT, parse_mac(w.LAN_MAC))


def test_interfaces_have_neighbors_of_their_own(host):
    host.hold()
    frame = Ether(src=w.LAN_MAC, dst=w.UPLINK_MAC) / ARP(op=2, hwsrc=w.LAN_MAC, psrc=w.LAN_GATEWAY, pdst=w.NODE)
    assert host.resolver.learn(2, bytes(frame), host.now) == []
    assert host.state() == State.INCOMPLETE


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_queue_of_a_neighbor_is_bounded_and_the_oldest_make_room(host):
    size = 1000
    fit = QUEUE_BYTES // (size + PACKET_COST)
    for k in range(fit + 3):
        host.hold(frame=k.to_bytes(4) + bytes(size - 4))
    assert [int.from_bytes(frame[:4]) for frame, _ in host.dropped] == [0, 1, 2]
    assert {reason for _, reason in host.dropped} == {Reason.NEIGH_QUEUE_FULL}
    assert len(host.hear()) == fit


def test_small_packets_count_with_what_it_costs_to_keep_them(host):
    """Linux counts the memory of a packet, not its bytes; or 200 kB of empty frames would be 15000 objects."""
    for _ in range(2000):
        host.hold(frame=bytes(14))
    assert host.resolver.waiting < 500


def fill(host, count, state):
    for k in range(count):
        address = f"198.51.{100 + k // 250}.{k % 250 + 1}"
        host.now += 1
        if state == State.STALE:
            host.hear(sender=address, op=1, to=BROADCAST)
        else:
            host.hold(address, frame=b"x")


def test_a_full_table_loses_its_oldest_entry_that_nobody_waits_for():
    host = Host(capacity=8)
    fill(host, 8, State.STALE)
    host.hold()
    assert (host.state(), len(host.table)) == (State.INCOMPLETE, 8)
    assert host.state("198.51.100.1") is None
    assert host.state("198.51.100.2") == State.STALE


def test_a_table_full_of_questions_takes_no_more():
    host = Host(capacity=8)
    fill(host, 8, State.INCOMPLETE)
    assert host.hold(frame=b"one too many") == []
    assert host.dropped == [(b"one too many", Reason.NEIGH_QUEUE_FULL)]
    assert host.hear(op=1, to=BROADCAST) == []
    host.wait(3)
    assert len(host.hold()) == 1


def test_few_stale_entries_are_kept(host):
    fill(host, GC_START, State.STALE)
    host.wait(120)
    assert len(host.table) == GC_START


def test_many_stale_entries_are_collected_after_a_minute(host):
    fill(host, GC_START + 30, State.STALE)
    host.wait(59)
    assert len(host.table) == GC_START + 30
    host.wait(2)
    assert len(host.table) == GC_START


def test_a_row_that_is_used_again_remembers_nothing():
    host = Host(capacity=1)
    host.reach(State.STALE)
    host.hold("198.51.100.9")
    assert host.entry("198.51.100.9")["mac"] == 0
    host.hear(sender="198.51.100.9")
    assert host.state("198.51.100.9") == State.REACHABLE


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(0, 5), st.integers(1, 3000)),
        st.tuples(st.just("hear"), st.integers(0, 5), st.integers(0, 15)),
        st.tuples(st.just("use"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 40), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(STEPS)
def test_no_packet_is_lost_and_none_waits_without_a_question(steps):
    host = Host(capacity=4)
    held = released = 0
    for kind, which, value in steps:
        address = f"198.51.100.{which + 1}"
        if kind == "hold":
            held += 1
            released += sum(not packet.oif for packet in host.hold(address, frame=bytes(value)))
        elif kind == "hear":
            mac = w.LAN_MAC if value & 1 else NEVER
            to = BROADCAST if value & 2 else w.UPLINK_MAC
            target = address if value & 4 else w.NODE
            released += len(host.hear(address, mac, 1 + (value >> 3), target, to))
        elif kind == "use" and host.table.find(LAN, address) >= 0:
            host.use(address)
        elif kind == "wait":
            host.wait(which)
        assert held == released + host.resolver.waiting + len(host.dropped)
        states = [int(host.table.records["state"][row]) for row, _, _ in host.table.items()]
        assert host.resolver.waiting == 0 or State.INCOMPLETE in states
        assert State.NONE not in states
    host.wait(4)
    assert host.resolver.waiting == 0
