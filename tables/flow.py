"""Flows: every tracked connection, found by the tuple of its original and of its reply direction (conntrack's model).

One flow is one record of 256 bytes: two *halves* of 128, one per direction, each beginning with that direction's
tuple as packets carry it when they come in. What a packet of one direction becomes is the other half's tuple,
inverted, so the stored rewrite needs no room of its own. ``tuples`` and ``flows`` are two views of the same memory:
``tuples[2 * row + direction]`` is a half, ``flows[row]`` is what both directions share.

The index (``tagged``) is open addressing with linear probing. A slot is one word: a *tag*, the low 32 bits of the keyed
hash, whose low bits are the home slot, and which half it leads to. A lookup compares tags and touches one record, a
wrong one once in 8000 lookups among 262144 flows. A delete shifts the entries behind it back, and finds their homes in
the tags. A flow has two entries, and one more if it keeps the mapping of its source for others; at most half of the
slots are in use then, and an entry farther than ``MAX_PROBE`` from its home is refused.

A lookup in a big table waits for memory twice, for a slot and for a record. Over a burst it is made in three passes:
``hash_tuple`` and ``prefetch_slot`` for each packet, ``candidate`` for each, then ``matches`` for each, so the waits of
many packets overlap. Rows never move and are found again until they are deleted; a row's number is used again.

A burst's packets refer to their flows until its last stage, and a flow may end with a later packet of the same burst: a
crowded table gives it up, or its client begins anew. As in the kernel, where a packet holds a reference, what the flow
said of the earlier packets still holds. So a deleted row keeps its tuples, though nobody finds it by them, and of the
free rows the one freed first is used first, and only while ``RESERVE`` others are free: more than one burst inserts.
"""

from enum import IntEnum
from typing import Any

import numpy as np

from dataplane.jit import Array, kernel, prefetch
from dataplane.tables import tagged
from dataplane.tables.flow_record import (
    ACTIVE,
    ASSURED,
    COUNTED,
    DST_NAT,
    FLOW,
    MASQUERADED,
    ORIGINAL,
    REPLY,
    SEEN_REPLY,
    SOURCE_KEPT,
    SRC_NAT,
    TIMEOUT_COUNT,
    TUPLE,
    LbState,
    TcpState,
    Timeout,
    make_timeouts,
)
from dataplane.tables.hash import Word, hash5, make_key
from dataplane.tables.memory import make_zeros
from dataplane.tables.result import FULL, MISS

__all__ = [
    "ACTIVE",
    "ASSURED",
    "CLASH",
    "COUNTED",
    "CROWDED",
    "DST_NAT",
    "END",
    "EVICTION_SLOTS",
    "FIRST_FREED",
    "FLOW",
    "FREE",
    "FREED",
    "FULL",
    "HAND",
    "MASQUERADED",
    "MISS",
    "ORIGINAL",
    "REPLY",
    "RESERVE",
    "SEEN_REPLY",
    "SOURCE_KEPT",
    "SRC_NAT",
    "STATE_COUNT",
    "TIMEOUT_COUNT",
    "TUPLE",
    "USED",
    "Count",
    "FlowTable",
    "LbState",
    "TcpState",
    "Timeout",
    "candidate",
    "copy_tuple",
    "delete",
    "early_drop",
    "find",
    "find_source",
    "hash_tuple",
    "insert",
    "is_crowded",
    "is_disposable",
    "is_expired",
    "is_used",
    "keep_source",
    "make_timeouts",
    "matches",
    "must_go",
    "next_due",
    "prefetch_flow",
    "prefetch_slot",
]

_NO_SIGN = 0x7FFF_FFFF  # a position that is never negative needs no check for counting from the end

# Indices of ``FlowTable.arrays``'s ``state``.
USED = 0  # rows in use
HAND = 1  # the next row that the clock hand looks at
END = 2  # rows from here on were never used: their memory is untouched
FREED = 3  # rows in the ring of those that were
FIRST_FREED = 4  # where in the ring the one is that was freed first


class Count(IntEnum):
    """Indices of ``state`` too: what ``conntrack -S`` counts, in its order, and what it lacks.

    The stage counts what it decides. The names that nothing here stands for (one thread never searches again, and never
    finds that a clash was none) stay 0.
    """

    FOUND = 8
    INVALID = 9
    INSERT = 10
    INSERT_FAILED = 11
    DROP = 12
    EARLY_DROP = 13
    ERROR = 14
    SEARCH_RESTART = 15
    CLASH_RESOLVE = 16
    CHAINTOOLONG = 17
    OUT_OF_WINDOW = 18  # TCP segments, passed or not


STATE_COUNT = 24
CLASH = -3  # insert: one of the two tuples is in already; nothing was changed
FREE = 0x7FFF_FFFF_FFFF_FFFF  # ``expires_ns`` of a row that is not in use: the hand needs no other look at it
EVICTION_SLOTS = 64  # Linux looks at 8 buckets; a full table has 2 tuples in each, as these have
RESERVE = 256  # free rows that are never used: as many flows as begin in a burst at most (``batch.ROWS``)
CROWDED = 95  # percent of the rows in use, from which on the hand takes more than what has expired (Linux's gc)

_PROTOTYPE = 6  # scratch[6] and [7] are the halves of a new flow
_BY_SOURCE = 1  # a value in the slots is 2 * half; 4 * row + 1 is the by-source entry
_SOURCE = 1 << 40  # above protocol and ports: no tuple is hashed to a source's word but by chance
_NO_PROTOCOL = 255  # of a deleted flow (IANA: reserved)
_AHEAD = 64  # rows between the hand and what it asks for (a million rows in 2.8 ms; 16: 5.1, none: 6.9)


@kernel
def hash_tuple(arrays: Any, wanted: Any) -> Word:
    """Return the 64 bits by which a tuple is found.

    Args:
        arrays: ``FlowTable.arrays``.
        wanted: A record with the fields of a tuple: one of ``TUPLE`` or a packet's.
    """
    last_word = int(wanted["protocol"]) << 32 | int(wanted["sport"]) << 16 | int(wanted["dport"])
    return hash5(wanted["src_hi"], wanted["src_lo"], wanted["dst_hi"], wanted["dst_lo"], last_word, arrays[1])


@kernel
def prefetch_slot(arrays: Any, word: Word) -> None:
    """First pass: ask for the slot of a hash."""
    tagged.ask(arrays[0], word)


@kernel
def candidate(arrays: Any, word: Word) -> int:
    """Second pass: return the half (2 * row + direction) that a hash leads to and ask for it, or ``MISS``.

    ``MISS`` is final, until the next insert. A half is to be confirmed by ``matches``; if that fails, ``find`` has the
    answer.
    """
    half = tagged.first(arrays[0], word) >> 1  # MISS stays -1
    prefetch(arrays[2], half)
    return half


@kernel
def prefetch_flow(arrays: Any, half: int) -> None:
    """Second pass, for who will follow the flow: ask for the rest of it, three more cache lines.

    With a million flows a packet waits 131 ns for its flow without this and 47 with it (the conntrack stage, 256 at a
    time).
    """
    tuples = arrays[2]
    windows = tuples["seq_end"]
    prefetch(windows, half)
    prefetch(tuples, half ^ 1)
    prefetch(windows, half ^ 1)


@kernel
def _same(found: Any, wanted: Any) -> bool:
    same_addresses = (
        found["src_lo"] == wanted["src_lo"]
        and found["dst_lo"] == wanted["dst_lo"]
        and found["src_hi"] == wanted["src_hi"]
        and found["dst_hi"] == wanted["dst_hi"]
    )
    same_ports = int(found["sport"]) == int(wanted["sport"]) and int(found["dport"]) == int(wanted["dport"])
    return same_addresses and same_ports and int(found["protocol"]) == int(wanted["protocol"])


@kernel
def matches(arrays: Any, half: int, wanted: Any) -> bool:
    """Third pass: say whether ``half`` is that of this tuple.

    True only if the flow is in the table now, whatever became of the table since ``candidate``.
    """
    return _same(arrays[2][half & _NO_SIGN], wanted)


@kernel
def _search(arrays: Any, word: Word, wanted: Any) -> int:
    slots = arrays[0]
    tag, mask = int(word & tagged.TAG), tagged.last(slots)
    at = tag & mask
    for _ in range(tagged.MAX_PROBE):
        slot = int(slots[at])
        if slot == 0:
            return MISS
        # A by-source entry that has this tag leads to its flow's original tuple: if that matches, it is the answer too.
        if slot & tagged.TAG == tag:
            half = ((slot >> 32) - 1) >> 1
            if matches(arrays, half, wanted):
                return half
        at = (at + 1) & mask
    return MISS


@kernel
def find(arrays: Any, wanted: Any) -> int:
    """Return 2 * row + direction of the flow that has this tuple in that direction, or ``MISS``."""
    return _search(arrays, hash_tuple(arrays, wanted), wanted)


@kernel
def copy_tuple(target: Any, source: Any) -> None:
    """Give a record the addresses, ports and protocol of another."""
    target["src_hi"] = source["src_hi"]
    target["src_lo"] = source["src_lo"]
    target["dst_hi"] = source["dst_hi"]
    target["dst_lo"] = source["dst_lo"]
    target["sport"] = source["sport"]
    target["dport"] = source["dport"]
    target["protocol"] = source["protocol"]


@kernel
def _next_row(arrays: Any) -> int:
    """Return the row that the next flow gets, the one freed first or else one never used; or ``FULL``."""
    flows, free, state = arrays[3], arrays[4], arrays[5]
    if int(state[USED]) >= len(flows) - RESERVE:
        return FULL
    return int(free[int(state[FIRST_FREED]) & _NO_SIGN]) if int(state[FREED]) > RESERVE else int(state[END])


@kernel
def _take_row(arrays: Any) -> None:
    """Take the row that ``_next_row`` named."""
    free, state = arrays[4], arrays[5]
    state[USED] += 1
    if int(state[FREED]) > RESERVE:
        state[FREED] -= 1
        following = int(state[FIRST_FREED]) + 1
        state[FIRST_FREED] = following if following < len(free) else 0
    else:
        state[END] += 1


@kernel
def insert(arrays: Any, now_ns: int) -> int:
    """Enter the flow whose tuples are ``scratch[0]`` (original) and ``scratch[1]`` (reply), both or none.

    Returns its row, ``FULL`` (no row, or none of the slots near home) or ``CLASH`` (a tuple is in already, or the two
    are one). Of the record only the tuples and ``created_ns`` are set: ``backend``, ``service`` and ``template`` are
    -1, all else is 0, the time of expiry too.
    """
    slots, _, tuples, flows, _, state, scratch = arrays
    original, reply = scratch[ORIGINAL], scratch[REPLY]
    word, reply_word = hash_tuple(arrays, original), hash_tuple(arrays, reply)
    tagged.ask(slots, reply_word)
    row = _next_row(arrays)
    is_in = _search(arrays, word, original) >= 0 or _search(arrays, reply_word, reply) >= 0
    if is_in or _same(original, reply):
        state[Count.INSERT_FAILED] += 1
        return CLASH
    if row < 0:
        return FULL
    if tagged.place(slots, word, 4 * row) < 0:
        state[Count.CHAINTOOLONG] += 1
        return FULL
    if tagged.place(slots, reply_word, 4 * row + 2) < 0:
        tagged.remove(slots, word, 4 * row)
        state[Count.CHAINTOOLONG] += 1
        return FULL
    _take_row(arrays)
    tuples[2 * row] = scratch[_PROTOTYPE]
    tuples[2 * row + 1] = scratch[_PROTOTYPE + 1]
    copy_tuple(tuples[2 * row], original)
    copy_tuple(tuples[2 * row + 1], reply)
    flows[row]["created_ns"] = now_ns
    state[Count.INSERT] += 1
    return row


@kernel
def delete(arrays: Any, row: int) -> None:
    """Take a flow out, its by-source entry too; nothing if the row is not in use.

    The row keeps addresses, ports and whether they are translated, for the packets of this burst that have its number.
    """
    slots, _, tuples, flows, free, state, _ = arrays
    original, reply, flow = tuples[2 * row], tuples[2 * row + 1], flows[row]
    word, reply_word = hash_tuple(arrays, original), hash_tuple(arrays, reply)
    tagged.ask(slots, reply_word)
    if tagged.remove(slots, word, 4 * row) < 0:
        return
    tagged.remove(slots, reply_word, 4 * row + 2)
    if int(flow["status"]) & SOURCE_KEPT:
        tagged.remove(slots, _hash_source(arrays, original), 4 * row + _BY_SOURCE)
    # Or a candidate of earlier in the burst would still match; its tag was that of the true protocol.
    original["protocol"] = reply["protocol"] = _NO_PROTOCOL
    flow["expires_ns"] = FREE
    flow["status"] = int(flow["status"]) & (SRC_NAT | DST_NAT)
    at = int(state[FIRST_FREED]) + int(state[FREED])
    free[(at if at < len(free) else at - len(free)) & _NO_SIGN] = row
    state[FREED] += 1
    state[USED] -= 1


@kernel
def early_drop(arrays: Any, wanted: Any) -> int:
    """Return the row of an unassured flow near a tuple's home that may be given up for it, or ``MISS``."""
    slots, flows = arrays[0], arrays[3]
    mask = tagged.last(slots)
    at = int(hash_tuple(arrays, wanted) & tagged.TAG) & mask
    for _ in range(EVICTION_SLOTS):
        slot = int(slots[at])
        row = ((slot >> 32) - 1) >> 2
        if slot != 0 and not int(flows[row & _NO_SIGN]["status"]) & ASSURED:
            return row
        at = (at + 1) & mask
    return MISS


# --- by source -------------------------------------------------------------------------------------------------------


@kernel
def _hash_source(arrays: Any, wanted: Any) -> Word:
    """Return the hash of a tuple's protocol, source address and source port."""
    source = _SOURCE | int(wanted["protocol"]) << 32 | int(wanted["sport"]) << 16
    return hash5(wanted["src_hi"], wanted["src_lo"], 0, 0, source, arrays[1])


@kernel
def find_source(arrays: Any, wanted: Any) -> int:
    """Return the row of the flow that keeps the mapping of a tuple's source, or ``MISS``."""
    slots, _, tuples, _, _, _, _ = arrays
    word = _hash_source(arrays, wanted)
    tag, mask = int(word & tagged.TAG), tagged.last(slots)
    at = tag & mask
    for _ in range(tagged.MAX_PROBE):
        slot = int(slots[at])
        if slot == 0:
            return MISS
        value = (slot >> 32) - 1
        if slot & tagged.TAG == tag and value & 3 == _BY_SOURCE:
            row = value >> 2
            found = tuples[2 * row & _NO_SIGN]
            same_address = found["src_lo"] == wanted["src_lo"] and found["src_hi"] == wanted["src_hi"]
            same_port = int(found["sport"]) == int(wanted["sport"])
            if same_address and same_port and int(found["protocol"]) == int(wanted["protocol"]):
                return row
        at = (at + 1) & mask
    return MISS


@kernel
def keep_source(arrays: Any, row: int) -> None:
    """Make a flow the one that ``find_source`` finds for the source of its original tuple, unless there is one.

    Sets ``SOURCE_KEPT`` in ``status``; nobody else may change that flag while the flow is in.
    """
    slots, _, tuples, flows, _, _, _ = arrays
    original, flow = tuples[2 * row], flows[row]
    if find_source(arrays, original) >= 0:
        return
    if tagged.place(slots, _hash_source(arrays, original), 4 * row + _BY_SOURCE) >= 0:
        flow["status"] = int(flow["status"]) | SOURCE_KEPT


# --- expiry ----------------------------------------------------------------------------------------------------------


@kernel
def is_expired(flow: Any, now_ns: int) -> bool:
    """Say whether a flow's time is over; it is in the table until the hand comes by, or a packet."""
    return int(flow["expires_ns"]) <= now_ns


@kernel
def is_used(flow: Any) -> bool:
    """Say whether a row below ``state[END]`` holds a flow."""
    return int(flow["expires_ns"]) != FREE


@kernel
def is_disposable(flow: Any) -> bool:
    """Say whether a crowded table may lose a flow: one not assured, or a TCP connection that is closing."""
    status, state = int(flow["status"]), int(flow["state"])
    return not status & ASSURED or TcpState.FIN_WAIT <= state <= TcpState.CLOSE


@kernel
def is_crowded(arrays: Any) -> bool:
    """Say whether more than ``CROWDED`` percent of the rows are in use."""
    return 100 * int(arrays[5][USED]) > CROWDED * (len(arrays[3]) - RESERVE)


@kernel
def must_go(arrays: Any, row: int, now_ns: int) -> bool:
    """Say whether the flow that the hand stopped at is to be closed, or only ip_vs forgets it."""
    flow = arrays[3][row]
    return is_expired(flow, now_ns) or (is_crowded(arrays) and is_disposable(flow))


@kernel
def next_due(arrays: Any, now_ns: int, budget: int) -> tuple[int, int]:
    """Let the hand go on to the next flow whose time is over, within ``budget`` rows; return ``(row, budget left)``.

    That is a flow that has expired, in a crowded table one that is disposable, or one that ip_vs would forget
    (``COUNTED`` and ``lb_expires_ns``). The row is ``MISS`` when the budget is spent::

        row, left = next_due(arrays, now_ns, 1024)
        while row >= 0:
            if must_go(arrays, row, now_ns):  # close it, and delete
            else:                             # take it from its backend's counters, and COUNTED from its status
            row, left = next_due(arrays, now_ns, left)
    """
    flows, state = arrays[3], arrays[5]
    expires, end = flows["expires_ns"], int(state[END]) & _NO_SIGN
    crowded = is_crowded(arrays)
    row, left = int(state[HAND]) & _NO_SIGN, min(budget, end)
    while left > 0:
        at = row if row < end else 0
        row, left = at + 1, left - 1
        prefetch(expires, at + _AHEAD)
        flow = flows[at]
        forgotten = int(flow["lb_expires_ns"]) <= now_ns and int(flow["status"]) & COUNTED
        if is_expired(flow, now_ns) or forgotten or (crowded and is_used(flow) and is_disposable(flow)):
            state[HAND] = row
            return at, left
    state[HAND] = row
    return MISS, 0


class FlowTable:
    """Owns the flows. The arrays never move, and memory is used as rows are: 256 bytes each, and 64 of slots.

    Attributes:
        flows: ``(capacity + RESERVE,)`` of ``FLOW``.
        tuples: ``(2 * (capacity + RESERVE),)`` of ``TUPLE``, the same memory.
        state: ``(STATE_COUNT,)`` int64, see ``USED`` and ``Count``.
        arrays: ``(slots, key, tuples, flows, free, state, scratch)``, what the kernels take. ``scratch`` is ``(8,)`` of
            ``TUPLE``; the last two are the halves of a new flow, the first six are the stages' own.
    """

    def __init__(self, capacity: int = 262_144, seed: int | None = None) -> None:
        self.capacity = capacity
        self.flows: Array = make_zeros(capacity + RESERVE, FLOW)
        self.tuples: Array = self.flows.view(TUPLE)
        self.state: Array = np.zeros(STATE_COUNT, np.int64)
        scratch = make_zeros(8, TUPLE)
        for column in ("backend", "service", "template"):
            scratch[_PROTOTYPE:].view(FLOW)[column] = -1
        slots, free = tagged.make_slots(3 * capacity), make_zeros(capacity + RESERVE, np.int32)
        self.arrays = (slots, make_key(seed), self.tuples, self.flows, free, self.state, scratch)

    def __len__(self) -> int:
        return int(self.state[USED])

    def items(self) -> list[int]:
        """Return the rows in use: those whose ``expires_ns`` is not ``FREE``."""
        used = self.flows["expires_ns"][: int(self.state[END])] != FREE
        rows: list[int] = np.flatnonzero(used).tolist()
        return rows

    @property
    def counters(self) -> dict[str, int]:
        """What was counted since the start, by the names of ``Count`` in lower case."""
        return {count.name.lower(): int(self.state[count]) for count in Count}
