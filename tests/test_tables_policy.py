"""Source ranges and pools beside ``ipaddress``."""

from ipaddress import ip_address, ip_network

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.tables import policy
from dataplane.tables.address import halves
from dataplane.tables.policy import Exposure, PolicyTable, Pool
from dataplane.tables.result import TableFullError

OUTSIDE = "203.0.113.7"


def words(address):
    hi, lo = halves(ip_address(address))
    return np.uint64(hi), np.uint64(lo)


def allowed(table, row, address):
    return bool(policy.is_allowed(table.arrays, row, *words(address)))


def in_pool(table, pool, address):
    return bool(policy.is_in_pool(table.arrays, pool, *words(address)))


NETWORKS = st.lists(
    st.sampled_from(
        ["0.0.0.0/0", "10.0.0.0/8", "203.0.113.0/24", "203.0.113.7/32", "203.0.113.8/29", "2001:db8::/32", "::/0",
         "2001:db8::1/128"]
    ).map(ip_network),
    max_size=4,
)  # fmt: skip
ADDRESSES = st.sampled_from(
    ["10.255.255.255", "11.0.0.0", "203.0.113.6", "203.0.113.7", "203.0.113.8", "203.0.113.15", "203.0.113.16",
     "203.0.114.0", "2001:db8::1", "2001:db9::", "::1", "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff"]
).map(ip_address)  # fmt: skip


@settings(max_examples=200)
@given(NETWORKS, ADDRESSES)
def test_a_client_is_allowed_if_a_range_holds_it(networks, address):
    table = PolicyTable(8)
    table.set(3, Exposure.LOAD_BALANCER, 0, networks)
    assert allowed(table, 3, address) == any(address in network for network in networks)


def test_without_ranges_everybody_may_come():
    table = PolicyTable(8)
    table.set(3, Exposure.LOAD_BALANCER)
    assert allowed(table, 3, OUTSIDE)
    table.set(3, Exposure.LOAD_BALANCER, 0, [])
    assert not allowed(table, 3, OUTSIDE)


def test_ranges_of_several_services_do_not_mix():
    table = PolicyTable(8)
    table.set(1, Exposure.LOAD_BALANCER, 0, [ip_network("10.0.0.0/8")])
    table.set(2, Exposure.LOAD_BALANCER, 0, [ip_network("203.0.113.0/24")])
    table.set(3, Exposure.LOAD_BALANCER, 0, [ip_network(f"198.51.100.{k}/32") for k in range(100)])
    assert [allowed(table, row, OUTSIDE) for row in (1, 2, 3)] == [False, True, False]
    table.clear(1)
    assert [allowed(table, row, OUTSIDE) for row in (1, 2, 3)] == [True, True, False]
    assert allowed(table, 3, "198.51.100.99")
    assert table.ranges(2) == (ip_network("203.0.113.0/24"),)


def test_ranges_that_are_given_again_and_again_take_no_more_room():
    table = PolicyTable(8)
    for turn in range(200):
        for row in range(8):
            table.set(row, Exposure.LOAD_BALANCER, 0, [ip_network(f"10.{row}.{turn}.0/24")] * (turn % 3))
    assert len(table.arrays[1]) == 64
    assert [allowed(table, row, f"10.{row}.199.1") for row in range(8)] == [True] * 8
    assert [allowed(table, row, f"10.{row + 1}.199.1") for row in range(8)] == [False] * 8


def test_ranges_of_another_service_move_only_when_there_is_no_room():
    table, moves = PolicyTable(1 << 12), 0
    for row in range(1 << 12):
        before = table.arrays[1]
        table.set(row, Exposure.LOAD_BALANCER, 0, [ip_network(f"10.{row >> 8}.{row & 0xFF}.0/24")])
        moves += table.arrays[1] is not before
    assert moves <= 12
    assert all(allowed(table, row, f"10.{row >> 8}.{row & 0xFF}.1") for row in range(0, 1 << 12, 97))


def test_a_prefix_is_in_the_pool_it_is_listed_for():
    table = PolicyTable(8)
    assert not policy.has_pool(table.arrays, Pool.CLUSTER)
    table.set_pools([(Pool.CLUSTER, ip_network("10.244.0.0/16")), (Pool.OUTGOING, ip_network("10.0.0.0/8"))])
    assert in_pool(table, Pool.CLUSTER, "10.244.255.255")
    assert not in_pool(table, Pool.CLUSTER, "10.245.0.0")
    assert in_pool(table, Pool.OUTGOING, "10.245.0.0")
    assert policy.has_pool(table.arrays, Pool.OUTGOING)
    table.set_pools([])
    assert not in_pool(table, Pool.CLUSTER, "10.244.0.1")


def test_too_many_pools_change_nothing():
    table = PolicyTable(8)
    table.set_pools([(Pool.CLUSTER, ip_network("10.244.0.0/16"))])
    with pytest.raises(TableFullError):
        table.set_pools([(Pool.CLUSTER, ip_network(f"10.{k}.0.0/16")) for k in range(policy.POOLS)])
    assert in_pool(table, Pool.CLUSTER, "10.244.0.1")
