"""The route table against a dict of networks."""

from ipaddress import IPv4Network, ip_address, ip_network

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.tables import route
from dataplane.tables.address import halves
from dataplane.tables.result import TableFullError
from dataplane.tables.route import ROUTE, Kind, Route, RouteTable

PREFIXES = [
    ip_network(text)
    for text in (
        "10.244.0.0/16", "10.244.1.0/24", "10.244.1.64/26", "10.244.1.70/32", "10.0.0.0/8", "192.0.2.0/24",
        "::/0", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1::7/128", "fe80::/10",
    )
]  # fmt: skip
PREFIX = st.sampled_from(PREFIXES)
ROUTES = st.builds(
    Route,
    kind=st.sampled_from([kind for kind in Kind if kind != Kind.NONE]),
    oif=st.integers(0, 1023),
    gateway=st.none() | st.sampled_from([ip_address("192.0.2.254"), ip_address("fe80::1")]),
    vtep=st.integers(-1, 100),
    mtu=st.sampled_from([0, 1450]),
    origin=st.integers(0, 255),
    flags=st.integers(0, 65535),
)
PROBES = ["10.244.1.70", "10.244.1.71", "10.244.1.1", "10.244.9.9", "10.9.9.9", "192.0.2.1", "198.51.100.1"]
PROBES += ["2001:db8:1::7", "2001:db8:1::8", "2001:db8::1", "fe80::1", "2620::1"]


class RouteMachine(RuleBasedStateMachine):
    """Routes come, change and go; rows stay where they are."""

    def __init__(self):
        super().__init__()
        self.table = RouteTable()
        self.model = {}
        self.rows = {}

    @rule(prefix=PREFIX, entry=ROUTES)
    def set(self, prefix, entry):
        row = self.table.set(prefix, entry)
        self.model[prefix] = entry
        assert self.rows.setdefault(prefix, row) == row

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data):
        prefix = data.draw(st.sampled_from(list(self.model)))
        assert self.table.delete(prefix)
        assert not self.table.delete(prefix)
        assert self.table.routes[self.rows.pop(prefix)] == np.zeros((), ROUTE)
        del self.model[prefix]

    @rule(text=st.sampled_from(PROBES))
    def look_up(self, text):
        address = ip_address(text)
        holding = [p for p in self.model if p.version == address.version and address in p]
        best = max(holding, key=lambda prefix: prefix.prefixlen, default=None)
        assert self.table.lookup(address) == self.model.get(best)
        hi, lo = halves(address)
        assert route.lookup(self.table.arrays, np.uint64(hi), np.uint64(lo)) == self.rows.get(best, -1)

    @invariant()
    def items_agree(self):
        assert dict(self.table.items()) == self.model
        assert all(self.table.get(prefix) == self.model.get(prefix) for prefix in PREFIXES)
        assert all(self.table.row(prefix) == row for prefix, row in self.rows.items())
        assert len(set(self.rows.values())) == len(self.table)


RouteMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestRouteMachine = RouteMachine.TestCase


def test_the_rows_grow_and_keep_their_numbers():
    table = RouteTable()
    before = table.arrays[-1]
    rows = [table.set(IPv4Network((0x0AF40000 + i, 32)), Route(Kind.POD, oif=i)) for i in range(100)]
    assert rows == list(range(100))
    assert table.arrays[-1] is table.routes is not before
    assert table.routes["oif"][rows].tolist() == rows


def test_grown_rows_are_of_the_type_that_kernels_were_made_for():
    table = RouteTable(seed=1)
    for i in range(65):
        table.set(IPv4Network((0x0AF4_0000 + i, 32)), Route(Kind.POD, oif=i))
    assert table.routes.dtype == ROUTE
    assert table.routes.itemsize == 64


def test_a_row_is_used_again_only_after_its_prefix_is_gone():
    table = RouteTable()
    first = table.set(PREFIXES[0], Route(Kind.POD))
    second = table.set(PREFIXES[1], Route(Kind.POD))
    assert table.set(PREFIXES[0], Route(Kind.BLACKHOLE)) == first
    table.delete(PREFIXES[0])
    assert table.set(PREFIXES[2], Route(Kind.POD)) == first != second


def test_a_full_table_refuses_and_stays_as_it_was():
    table = RouteTable(limit=1)
    table.set(PREFIXES[0], Route(Kind.POD, oif=1))
    with pytest.raises(TableFullError):
        table.set(PREFIXES[1], Route(Kind.POD, oif=2))
    assert list(table.items()) == [(PREFIXES[0], Route(Kind.POD, oif=1))]
    assert table.lookup("10.244.1.1") == Route(Kind.POD, oif=1)


def test_a_route_is_one_cache_line():
    assert ROUTE.itemsize == 64
