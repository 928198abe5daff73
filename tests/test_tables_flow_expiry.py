"""Time and room in the flow table: the clock hand, what ip_vs forgets, a crowded and a full table."""

from dataplane.tables import flow
from dataplane.tables.flow import ASSURED, COUNTED, FREE, MISS, FlowTable, TcpState
from tests.flows import NOW, filled, hand, insert, record_of, service_flow


def test_a_flow_expires_at_its_time_and_not_before():
    table = filled(1, capacity=4)
    table.flows[0]["expires_ns"] = 100
    assert not flow.is_expired(table.flows[0], 99)
    assert flow.is_expired(table.flows[0], 100)
    assert hand(table, 99, 10) == []
    assert hand(table, 100, 1) == [0]


def test_the_hand_sees_every_row_once_in_a_round_in_budgets_of_any_size():
    table = filled(20, capacity=64)
    table.flows["expires_ns"][[3, 4, 11, 19]] = 5
    assert hand(table, 5, 4) == [3]
    assert hand(table, 5, 10) == [4, 11]
    assert hand(table, 5, 6) == [19]
    assert hand(table, 5, 1000) == [3, 4, 11, 19], "at most one round, whatever the budget"
    assert hand(FlowTable(4), 5, 1000) == []


def test_the_hand_passes_by_rows_that_are_free():
    table = filled(40)
    table.flows["status"] = ASSURED | COUNTED
    table.flows["lb_expires_ns"] = FREE - 1
    flow.delete(table.arrays, 1)
    table.flows[1]["lb_expires_ns"] = 0
    table.flows[2]["expires_ns"] = 5
    assert len(table) == 39  # crowded
    assert hand(table, 5, 40) == [2]


def test_the_hand_stops_at_what_ip_vs_forgets():
    table = filled(3, capacity=8)
    table.flows[1]["lb_expires_ns"] = 50
    assert hand(table, 60, 3) == []
    table.flows[1]["status"] |= COUNTED
    assert hand(table, 49, 3) == []
    assert hand(table, 50, 3) == [1]
    assert not flow.must_go(table.arrays, 1, 50)
    table.flows[1]["expires_ns"] = 50
    assert flow.must_go(table.arrays, 1, 50)


def test_a_crowded_table_loses_what_is_not_assured_or_closing():
    table = filled(20)
    table.flows["status"] |= ASSURED
    table.flows["state"] = TcpState.ESTABLISHED
    table.flows[4]["status"] = 0
    for row, state in enumerate((TcpState.FIN_WAIT, TcpState.TIME_WAIT, TcpState.CLOSE, TcpState.SYN_SENT2), start=6):
        table.flows[row]["state"] = state
    assert hand(table, NOW, 20) == [4, 6, 7, 8]
    assert flow.must_go(table.arrays, 4, NOW)
    flow.delete(table.arrays, 19)  # 95 percent
    assert hand(table, NOW, 20) == []
    assert not flow.must_go(table.arrays, 4, NOW)


def test_early_drop_gives_up_a_flow_that_is_not_assured():
    table = filled(64)
    table.flows["status"] = ASSURED
    wanted = record_of(service_flow(99)[0])
    assert flow.early_drop(table.arrays, wanted) == MISS
    table.flows["status"] = 0
    victim = int(flow.early_drop(table.arrays, wanted))
    flow.delete(table.arrays, victim)
    assert insert(table, *service_flow(99)) == 64


def test_early_drop_looks_only_nearby():
    table = filled(1, capacity=4096)
    home = flow.hash_tuple(table.arrays, record_of(service_flow(0)[0]))
    reply_home = flow.hash_tuple(table.arrays, record_of(service_flow(0)[1]))
    slots = len(table.arrays[0])
    for number in range(1, 200):
        wanted = record_of(service_flow(number)[0])
        start = int(flow.hash_tuple(table.arrays, wanted))
        near = any((int(at) - start) % slots < flow.EVICTION_SLOTS for at in (home, reply_home))
        assert flow.early_drop(table.arrays, wanted) == (0 if near else MISS)
