"""Flows for tests of the flow table: tuples as ``(src, dst, sport, dport, protocol)``, and the kernels as functions."""

import numpy as np

from dataplane.batch import PACKET
from dataplane.tables import flow
from dataplane.tables.flow import FREE, TUPLE, FlowTable
from tests import naive

V4 = 0xFFFF_0000_0000
POD, POD_2, VIP, CLIENT = V4 + 0x0AF4_0007, V4 + 0x0AF4_0008, V4 + 0x0A60_000A, V4 + 0xC633_6409
POD6 = 0xFD00 << 112 | 7
MASK64 = naive.MASK64
TCP, UDP = 6, 17
NOW = 1_000_000_000


def fill(record, wanted):
    """Write a tuple into a record that has its fields."""
    src, dst, sport, dport, protocol = wanted
    record["src_hi"], record["src_lo"] = src >> 64, src & MASK64
    record["dst_hi"], record["dst_lo"] = dst >> 64, dst & MASK64
    record["sport"], record["dport"], record["protocol"] = sport, dport, protocol
    return record


def record_of(wanted, dtype=TUPLE):
    """A tuple, or a packet, as a kernel takes it."""
    return fill(np.zeros(1, dtype)[0], wanted)


def tuple_of(record):
    """What ``fill`` wrote."""
    src = int(record["src_hi"]) << 64 | int(record["src_lo"])
    dst = int(record["dst_hi"]) << 64 | int(record["dst_lo"])
    return src, dst, int(record["sport"]), int(record["dport"]), int(record["protocol"])


def insert(table, original, reply, now_ns=NOW):
    """Enter a flow; its row, or why not."""
    scratch = table.arrays[6]
    fill(scratch[0], original)
    fill(scratch[1], reply)
    return int(flow.insert(table.arrays, now_ns))


def find(table, wanted):
    """2 * row + direction, or ``MISS``."""
    return int(flow.find(table.arrays, record_of(wanted)))


def find_in_passes(table, wanted):
    """Look up as a stage does: three passes over one packet."""
    packet = record_of(wanted, PACKET)
    word = np.uint64(flow.hash_tuple(table.arrays, packet))
    flow.prefetch_slot(table.arrays, word)
    half = int(flow.candidate(table.arrays, word))
    if half >= 0 and not flow.matches(table.arrays, half, packet):
        half = int(flow.find(table.arrays, packet))
    return half


def service_flow(number):
    """A client's connection to a service: the tuples of its two directions."""
    client, port = POD + (number >> 8), 1024 + (number & 0xFF)
    return (client, VIP, port, 80, TCP), (POD_2 + 99, client, 8080, port, TCP)


def filled(count, capacity=None, seed=1):
    """A table of so many flows in the rows 0, 1, 2 ... that live for ever."""
    table = FlowTable(capacity or count, seed=seed)
    assert [insert(table, *service_flow(number)) for number in range(count)] == list(range(count))
    table.flows["expires_ns"][:count] = FREE - 1
    return table


def hand(table, now_ns, budget):
    """The rows at which the hand stops."""
    rows = []
    row, left = flow.next_due(table.arrays, now_ns, budget)
    while row >= 0:
        rows.append(int(row))
        row, left = flow.next_due(table.arrays, now_ns, left)
    assert left == 0
    return rows
