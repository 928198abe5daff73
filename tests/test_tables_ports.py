"""ports: netfilter's choice of a source port, beside a dict of the reply tuples in use."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dataplane.jit import INTERPRETED, Array, kernel
from dataplane.tables import ports
from dataplane.tables.flow import ORIGINAL, REPLY, FlowTable, delete, insert, keep_source

VXLAN = 4789
ICMP, TCP, UDP, ICMPV6, OTHER = 1, 6, 17, 58, 253
CLIENTS, REMOTES, MASKS = (0x0A, 0x0B, 0x0C), (0x70, 0x71), (0xA0, 0xA1)


class Flow(NamedTuple):
    """A flow before its port is chosen; ``mask`` is the address that it is to leave with."""

    protocol: int
    src: int
    sport: int
    dst: int
    dport: int
    mask: int


def place(table: FlowTable, flow: Flow) -> None:
    """Make a flow the one that is about to be inserted."""
    original, reply = table.arrays[6][ORIGINAL], table.arrays[6][REPLY]
    original["src_lo"], original["dst_lo"] = flow.src, flow.dst
    reply["src_lo"], reply["dst_lo"] = flow.dst, flow.mask
    original["sport"], original["dport"], reply["sport"], reply["dport"] = flow.sport, flow.dport, flow.dport, 0
    original["protocol"] = reply["protocol"] = flow.protocol


class Chooser:
    """The table, and flows put into it."""

    def __init__(self, capacity: int = 4096, seed: int = 1) -> None:
        self.table = FlowTable(capacity, seed=seed)
        self.row = -1  # of the last flow put in

    def choose(self, flow: Flow, low: int = 0, high: int = 0, random: bool = False) -> int | None:
        """The port of a flow, which is not put in; None if there is none."""
        place(self.table, flow)
        found = ports.allocate(self.table.arrays, low, high, VXLAN, random)
        return int(self.table.arrays[6][REPLY]["dport"]) if found else None

    def add(self, flow: Flow, **how: Any) -> int | None:
        """Choose a port and put the flow in."""
        port = self.choose(flow, **how)
        if port is not None:
            self.row = insert(self.table.arrays, 0)
            assert self.row >= 0
            keep_source(self.table.arrays, self.row)
        return port


@pytest.fixture
def chooser():
    return Chooser()


WEB = Flow(TCP, CLIENTS[0], 40000, REMOTES[0], 443, MASKS[0])
DNS = Flow(UDP, CLIENTS[0], 40000, REMOTES[0], 53, MASKS[0])


# --- without a random start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [0, 1, 53, 511, 600, 1023, 1024, 40000, 65535])
def test_a_port_that_is_free_is_kept(chooser, port):
    assert chooser.add(DNS._replace(sport=port)) == port


def test_a_port_that_another_client_uses_towards_another_remote_is_kept(chooser):
    assert chooser.add(DNS) == 40000
    assert chooser.add(DNS._replace(src=CLIENTS[1], dst=REMOTES[1])) == 40000
    assert chooser.add(DNS._replace(src=CLIENTS[1], dport=5353)) == 40000


def test_a_port_that_another_client_uses_towards_this_remote_is_replaced(chooser):
    assert chooser.add(DNS) == 40000
    assert chooser.add(DNS._replace(src=CLIENTS[1])) not in (None, 40000)


def test_tcp_and_udp_do_not_share_ports(chooser):
    assert chooser.add(DNS) == 40000
    assert chooser.add(DNS._replace(protocol=TCP, src=CLIENTS[1])) == 40000


def test_a_clients_socket_has_one_port_towards_all_remotes(chooser):
    """Endpoint-independent mapping (RFC 4787 4.1), also where its own port would be free."""
    chooser.add(DNS)
    port = chooser.add(DNS._replace(src=CLIENTS[1]))
    assert chooser.add(DNS._replace(src=CLIENTS[1], dst=REMOTES[1])) == port


def test_the_mapping_is_not_used_where_it_is_taken(chooser):
    chooser.add(DNS)
    port = chooser.add(DNS._replace(src=CLIENTS[1]))
    assert chooser.add(Flow(UDP, CLIENTS[2], port, REMOTES[1], 53, MASKS[0])) == port
    assert chooser.add(DNS._replace(src=CLIENTS[1], dst=REMOTES[1])) == 40000


def test_a_mapping_to_another_address_is_not_used(chooser):
    chooser.add(DNS)
    chooser.add(DNS._replace(src=CLIENTS[1]))
    assert chooser.add(DNS._replace(src=CLIENTS[1], dst=REMOTES[1], mask=MASKS[1])) == 40000


def test_the_mapping_is_forgotten_with_its_flow(chooser):
    chooser.add(DNS)
    chooser.add(DNS._replace(src=CLIENTS[1]))
    delete(chooser.table.arrays, 1)
    assert chooser.add(DNS._replace(src=CLIENTS[1], dst=REMOTES[1])) == 40000


def test_what_has_the_address_already_keeps_its_port(chooser):
    """The node's own packets, whatever mapping another flow of that port has had to take."""
    own = DNS._replace(src=MASKS[0])
    chooser.add(DNS)
    assert chooser.add(own) not in (None, 40000)
    assert chooser.add(own._replace(dst=REMOTES[1])) == 40000


# --- classes and ranges ----------------------------------------------------------------------------------------------

CLASSES = [(1, 1, 511), (511, 1, 511), (512, 600, 1023), (1023, 600, 1023), (1024, 1024, 65535), (65535, 1024, 65535)]


@pytest.mark.parametrize(("port", "first", "last"), CLASSES)
@pytest.mark.parametrize("random", [False, True])
def test_a_search_stays_in_the_ports_class(chooser, port, first, last, random):
    chosen = [chooser.add(DNS._replace(src=0x1000 + n, sport=port), random=random) for n in range(200)]
    found = [p for p in (chosen if random else chosen[1:]) if p is not None]
    assert len(set(found)) == len(found) > 190
    assert first <= min(found) <= max(found) <= last
    assert max(found) - min(found) > (last - first) // 2


@pytest.mark.parametrize("protocol", [ICMP, ICMPV6])
def test_an_identifier_may_be_anything(chooser, protocol):
    ping = Flow(protocol, CLIENTS[0], 7, REMOTES[0], 8 << 8, MASKS[0])
    assert chooser.add(ping) == 7
    found = [chooser.add(ping._replace(src=0x1000 + n), low=1, high=2) for n in range(300)]
    assert None not in found
    assert len(set(found)) == 300
    assert min(found) < 1024 < 60000 < max(found)


@pytest.mark.parametrize("random", [False, True])
def test_a_range_replaces_the_classes(chooser, random):
    found = [
        chooser.add(DNS._replace(src=0x1000 + n, sport=80), low=50000, high=50099, random=random) for n in range(100)
    ]
    assert sorted(found) == list(range(50000, 50100))
    assert chooser.add(DNS._replace(src=0x2000), low=50000, high=50099, random=random) is None


def test_a_port_in_the_range_is_kept(chooser):
    assert chooser.add(DNS, low=40000, high=40009) == 40000
    assert chooser.add(DNS._replace(src=CLIENTS[1]), low=39990, high=40000) in range(39990, 40000)


def test_a_range_of_one_port(chooser):
    assert chooser.add(DNS, low=50000) == 50000
    assert chooser.add(DNS._replace(src=CLIENTS[1]), low=50000) is None


def test_a_mapping_outside_the_range_is_not_used(chooser):
    chooser.add(DNS)
    chooser.add(DNS._replace(src=CLIENTS[1]))
    assert chooser.add(DNS._replace(src=CLIENTS[1], dst=REMOTES[1]), low=40000, high=40000) == 40000


def test_the_tunnels_port_is_never_given_to_udp(chooser):
    assert chooser.choose(DNS._replace(sport=VXLAN)) not in (None, VXLAN)
    assert chooser.choose(DNS._replace(sport=VXLAN), low=VXLAN, high=VXLAN) is None
    found = {chooser.add(DNS._replace(src=0x1000 + n), low=4780, high=4800, random=True) for n in range(21)}
    assert found == set(range(4780, 4801)) - {VXLAN} | {None}
    assert chooser.choose(WEB._replace(sport=VXLAN)) == VXLAN


def test_a_source_port_of_zero_is_one_like_others(chooser):
    """As in Linux 6.18 (tests/netns/test_kernel_nat.py)."""
    assert chooser.add(DNS._replace(sport=0)) == 0
    assert chooser.add(DNS._replace(sport=0, src=CLIENTS[1])) in range(1, 512)
    assert chooser.add(DNS._replace(sport=0, src=CLIENTS[2]), random=True) in range(1, 512)


def test_a_protocol_without_ports_has_one_flow_to_each_remote(chooser):
    gre = Flow(OTHER, CLIENTS[0], 0, REMOTES[0], 0, MASKS[0])
    assert chooser.add(gre, random=True) == 0
    assert chooser.add(gre._replace(src=CLIENTS[1]), random=True) is None
    assert chooser.add(gre._replace(src=CLIENTS[1], dst=REMOTES[1]), random=True) == 0


# --- random ports ----------------------------------------------------------------------------------------------------


def test_a_random_port_says_nothing_about_the_sources(chooser):
    found = [chooser.choose(DNS._replace(dport=n), random=True) for n in range(1, 2001)]
    assert len(set(found)) > 1900
    assert abs(np.mean(found) - (1024 + 65535) / 2) < 2000
    assert found[:50] != [Chooser(seed=2).choose(DNS._replace(dport=n), random=True) for n in range(1, 51)]


def test_the_same_seed_gives_the_same_ports():
    runs = [[Chooser().add(DNS._replace(src=n), random=True) for n in range(50)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_same_flow_gets_another_port_the_next_time(chooser):
    first = chooser.add(DNS, random=True)
    delete(chooser.table.arrays, 0)
    assert chooser.add(DNS, random=True) != first


# --- many ------------------------------------------------------------------------------------------------------------

MANY = 4_000 if INTERPRETED else 60_000
RANGE = 4_300 if INTERPRETED else 64_512  # of 93 % used ports


@kernel
def fill(arrays: Any, count: int, low: int, high: int, random: bool, chosen: Array) -> None:
    """Masquerade flows of many clients to one destination; ``chosen`` gets their ports, -1 where none was found."""
    original, reply = arrays[6][0], arrays[6][1]
    for k in range(count):
        original["src_lo"], original["sport"] = k % 300, 32768 + k // 300
        original["dst_lo"], original["dport"], original["protocol"] = 0x70, 443, 6
        reply["src_lo"], reply["sport"], reply["dst_lo"], reply["protocol"] = 0x70, 443, 0xA0, 6
        chosen[k] = -1
        if ports.allocate(arrays, low, high, 0, random):
            chosen[k] = int(reply["dport"])
            insert(arrays, 0)


@pytest.mark.parametrize("random", [False, True])
def test_nearly_all_ports_towards_one_destination_are_found(random):
    """Runs of used ports form as in any linear probing, so a few searches fail before the last port is taken."""
    table, chosen = FlowTable(65536, seed=1), np.zeros(MANY, np.int64)
    fill(table.arrays, MANY, 1024, 1023 + RANGE, random, chosen)
    found = chosen[chosen >= 0]
    assert len(np.unique(found)) == len(found) == len(table)
    assert found.min() >= 1024
    assert found.max() <= 1023 + RANGE
    assert len(found) > 0.998 * MANY


def test_a_search_among_used_ports_ends():
    """After 128 + 64 + 32 + 16 + 8 of them, in a table that holds every port of the class."""
    chooser = Chooser(capacity=1024)
    for n in range(800):
        chooser.add(DNS._replace(src=0x1000 + n, sport=1), random=True)
    used = {int(record["dport"]) for record in chooser.table.tuples[1 : 2 * len(chooser.table) : 2]}
    assert used == set(range(1, 512))
    assert chooser.choose(DNS._replace(src=0x9999, sport=1)) is None


def port_class(flow):
    if flow.protocol == ICMP:
        return range(65536)
    if flow.sport < 512:
        return range(1, 512)
    return range(600, 1024) if flow.sport < 1024 else range(1024, 65536)


class Ports(RuleBasedStateMachine):
    """Few clients, remotes and ports, so that they clash."""

    def __init__(self):
        super().__init__()
        self.chooser = Chooser(capacity=256)
        self.flows: dict[int, tuple[Flow, int]] = {}  # by row
        self.keepers: dict[tuple[int, int, int], int] = {}  # the row that keeps a source's mapping

    def is_free(self, flow, port):
        replies = {(f.protocol, f.dst, f.dport, f.mask, p) for f, p in self.flows.values()}
        return (flow.protocol, flow.dst, flow.dport, flow.mask, port) not in replies

    def kept(self, flow, allowed):
        """The port that is taken without a search, or None."""
        source = self.keepers.get(flow[:3])
        if source is not None and not (flow.src == flow.mask and flow.sport in allowed):
            other, port = self.flows[source]
            if other.mask == flow.mask and port in allowed and self.is_free(flow, port):
                return port
        return flow.sport if flow.sport in allowed and self.is_free(flow, flow.sport) else None

    @rule(
        flow=st.builds(
            Flow,
            st.sampled_from([TCP, UDP, ICMP]),
            st.sampled_from([*CLIENTS, MASKS[0]]),
            st.sampled_from([0, 80, 600, 4787, VXLAN, 40000]),
            st.sampled_from(REMOTES),
            st.sampled_from([53, 443]),
            st.sampled_from(MASKS),
        ),
        limits=st.sampled_from([(0, 0), (0, 0), (4787, 4790), (80, 80)]),
        random=st.booleans(),
    )
    def add(self, flow, limits, random):
        if any(other[:5] == flow[:5] for other, _ in self.flows.values()):
            return  # a packet of a known flow
        ranged = limits[0] > 0 and flow.protocol != ICMP
        space = range(limits[0], limits[1] + 1) if ranged else port_class(flow)
        avoided = {VXLAN} if flow.protocol == UDP else set()
        expected = None if random else self.kept(flow, set(space if ranged else range(65536)) - avoided)
        port = self.chooser.add(flow, low=limits[0], high=limits[1], random=random)
        if expected is not None:
            assert port == expected
        elif port is None:
            assert ranged
            assert not any(self.is_free(flow, p) for p in set(space) - avoided)
        else:
            assert port in set(space) - avoided
            assert self.is_free(flow, port)
        if port is not None:
            self.flows[self.chooser.row] = (flow, port)
            self.keepers.setdefault(flow[:3], self.chooser.row)

    @rule(data=st.data())
    def close(self, data):
        if not self.flows:
            return
        row = data.draw(st.sampled_from(sorted(self.flows)))
        flow, _ = self.flows.pop(row)
        if self.keepers.get(flow[:3]) == row:
            del self.keepers[flow[:3]]
        delete(self.chooser.table.arrays, row)

    @invariant()
    def every_reply_belongs_to_one_flow(self):
        replies = [(f.protocol, f.dst, f.dport, f.mask, p) for f, p in self.flows.values()]
        assert len(set(replies)) == len(replies) == len(self.chooser.table)


TestPorts = Ports.TestCase
TestPorts.settings = settings(max_examples=40, stateful_step_count=40)
