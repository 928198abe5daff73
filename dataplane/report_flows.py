"""The flow table as ``show conntrack`` and ``show nat`` list it, and as ``conntrack delete`` empties it.

A table of a million flows is 256 MB: no burst may wait until it is copied, and it must not change under a thread that
reads it. So it is walked in the loop's own thread, in steps of a millisecond with bursts between them: ``CHUNK`` rows
are filtered column by column and those that pass are copied, then they are made into text ``PAGE`` rows at a time. A
flow that is listed is consistent; the listing as a whole is no more so than the kernel's.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from dataplane.control.query import PROTOCOLS, Network, Query
from dataplane.control.snapshot import FlowRow, Half, IcmpQuery, Translation, endpoint_text
from dataplane.jit import Array
from dataplane.tables import flow
from dataplane.tables.address import prefix_halves, to_address
from dataplane.tables.flow import (
    ASSURED,
    COUNTED,
    DST_NAT,
    END,
    FREE,
    MASQUERADED,
    SEEN_REPLY,
    SRC_NAT,
    FlowTable,
    LbState,
    TcpState,
)
from dataplane.tables.service import ServiceTable

CHUNK = 8192  # rows that are filtered in one step: 8 columns of a cache line each
PAGE = 64  # rows that are made into text in one step, at 10 us each
SWEPT = 1 << 14  # rows that the hand looks at in one step; flows end at 100 ns each

Names: TypeAlias = Mapping[int, tuple[str, str, str, str]]
"""What stands in a row of the service table: the service's id, the port's name, the address's kind, the origin."""

_BITS = {"SEEN_REPLY": SEEN_REPLY, "ASSURED": ASSURED, "SRC_NAT": SRC_NAT, "DST_NAT": DST_NAT}
_BITS |= {"MASQUERADED": MASQUERADED}
_ANY_OF = {**_BITS, "ANY_NAT": SRC_NAT | DST_NAT, "BALANCED": COUNTED}
_WORDS = {number: name for name, number in PROTOCOLS.items()}
_TCP, _ICMP = 6, (1, 58)
_ANSWERS = {8: 0, 13: 14, 15: 16, 17: 18, 128: 129}  # the type of an ICMP query, and of what answers it
_ALL = (1 << 128) - 1
_LOW64 = (1 << 64) - 1
_SECOND = 1_000_000_000


class FlowReport:
    """Reads and deletes flows.

    Args:
        flows: The flow table.
        services: The service table, whose rows the flows name.
        names: What is in the service table's rows.
        clock: Nanoseconds, the engine's.
    """

    def __init__(
        self,
        flows: FlowTable,
        services: ServiceTable,
        names: Names,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._flows = flows
        self._services = services
        self._names = names
        self._clock = clock

    def conntrack(self, query: Query) -> "FlowListing":
        """Return the flows that pass a query."""
        return FlowListing(self._flows, self._selection(query), query.limit, self._flow_rows)

    def nat(self, query: Query) -> "FlowListing":
        """Return the translations of the flows that pass a query."""
        selection = self._selection(query, SRC_NAT | DST_NAT)
        return FlowListing(self._flows, selection, query.limit, self._translations)

    def deletion(self, query: Query, sweep: Callable[[int, int], int]) -> Iterator[int]:
        """End the flows that pass a query, some at each step; yield how many those were.

        Their time is made to be over, and then the table's hand goes once around: ``sweep(now, rows)`` lets it go on by
        so many rows and end what it finds (``stages.conntrack.expire``).
        """
        selection = self._selection(query)
        for start in range(0, int(self._flows.state[END]), CHUNK):
            rows = selection.rows(self._flows.flows, start, CHUNK)
            self._flows.flows["expires_ns"][rows] = selection.now
            yield len(rows)
        for _ in range(0, int(self._flows.state[END]), SWEPT):
            sweep(self._clock(), SWEPT)
            yield 0

    def _selection(self, query: Query, status: int = 0) -> "_Selection":
        named: dict[int, int] | None = None
        if query.service:
            generations = self._services.services["generation"]
            named = {row: int(generations[row]) for row, name in self._names.items() if name[0] == query.service}
        return _Selection(query, status, self._clock(), named)

    def _flow_rows(self, flows: Array) -> list[FlowRow]:
        now = self._clock()
        columns = _Columns(flows)
        return [columns.flow(i, now, self._service(columns, i)) for i in range(len(flows))]

    def _translations(self, flows: Array) -> list[Translation]:
        now = self._clock()
        columns = _Columns(flows)
        return [columns.translation(i, now, self._service(columns, i)) for i in range(len(flows))]

    def _service(self, columns: "_Columns", i: int) -> str:
        """Return the id of a flow's service; of a service that is gone, ""."""
        row = columns.of["service"][i]
        if row < 0 or int(self._services.services[row]["generation"]) != columns.of["service_generation"][i]:
            return ""
        return self._names[row][0] if row in self._names else ""


class FlowListing:
    """Flows in pages; see ``control.api.Listing``."""

    def __init__(
        self, table: FlowTable, selection: "_Selection", limit: int, rows: Callable[[Array], Sequence[Any]]
    ) -> None:
        self._table = table
        self._selection = selection
        self._room = limit or table.capacity
        self._rows = rows
        self.matched = 0

    def __iter__(self) -> Iterator[Sequence[Any]]:
        for start in range(0, int(self._table.state[END]), CHUNK):
            found = self._selection.rows(self._table.flows, start, CHUNK)
            self.matched += len(found)
            copies = _copy(self._table.flows, found[: self._room])
            self._room -= len(copies)
            yield []
            for at in range(0, len(copies), PAGE):
                yield self._rows(copies[at : at + PAGE])


def _copy(flows: Array, rows: Array) -> Array:
    """Return copies of whole records: numpy copies the fields of a record only, and here the tuples are none."""
    words = flows.view(np.uint64).reshape(len(flows), -1)
    copies: Array = words[rows].view(flows.dtype).reshape(-1)
    return copies


# --- filters ---------------------------------------------------------------------------------------------------------


class _Selection:
    """A query as comparisons of columns; ``services`` are rows with their generations, which tell who had a row."""

    def __init__(self, query: Query, status: int, now: int, services: dict[int, int] | None) -> None:
        self._query = query
        self._status = status
        self.now = now
        self._services = None if services is None else _pairs(list(services), list(services.values()))

    def rows(self, flows: Array, start: int, size: int) -> Array:
        """Return the rows in [start, start + size) that pass, in order."""
        query, chunk = self._query, flows[start : start + size]
        expires = chunk["expires_ns"]
        rows = np.flatnonzero((expires > self.now) & (expires != FREE))
        if not len(rows):
            return rows
        keep = np.ones(len(chunk), np.bool_)
        halves = chunk.view(flow.TUPLE)
        original, reply = halves[0::2], halves[1::2]
        if query.protocol is not None:
            keep &= original["protocol"] == query.protocol
        for half, side, network in (
            (original, "src", query.src),
            (original, "dst", query.dst),
            (reply, "src", query.reply_src),
            (reply, "dst", query.reply_dst),
        ):
            if network is not None:
                keep &= _inside(half, side, network)
        for half, side, port in (
            (original, "sport", query.sport),
            (original, "dport", query.dport),
            (reply, "sport", query.reply_sport),
            (reply, "dport", query.reply_dport),
        ):
            if port is not None:
                keep &= (half[side] == port) & ~np.isin(half["protocol"], _ICMP)
        self._filter_state(chunk, original, keep)
        return rows[keep[rows]] + start

    def _filter_state(self, chunk: Array, original: Array, keep: Array) -> None:
        query, status = self._query, chunk["status"]
        if self._status:
            keep &= (status & self._status) != 0
        if query.status == "UNREPLIED":
            keep &= (status & SEEN_REPLY) == 0
        elif query.status:
            keep &= (status & _ANY_OF[query.status]) != 0
        if query.state:
            keep &= (original["protocol"] == _TCP) & (chunk["state"] == TcpState[query.state])
        if self._services is not None:
            keep &= np.isin(_pairs(chunk["service"], chunk["service_generation"]), self._services)


def _pairs(rows: Any, generations: Any) -> Array:
    """Return rows with their generations as one word each."""
    words: Array = np.asarray(rows, np.int64) << 32 | np.asarray(generations, np.int64)
    return words


def _inside(half: Array, side: str, network: Network) -> Array:
    hi, lo, length = prefix_halves(network)
    mask = _ALL ^ (_ALL >> length)
    inside_hi = (half[f"{side}_hi"] & np.uint64(mask >> 64)) == np.uint64(hi)
    inside: Array = inside_hi & ((half[f"{side}_lo"] & np.uint64(mask & _LOW64)) == np.uint64(lo))
    return inside


# --- rows ------------------------------------------------------------------------------------------------------------


class _Columns:
    """Copies of some flows, as lists: a field of a numpy record costs ten times as much as an item of a list."""

    def __init__(self, flows: Array) -> None:
        halves = flows.view(flow.TUPLE)
        self.of: dict[str, list[int]] = {name: flows[name].tolist() for name in _FLOW_COLUMNS}
        self.halves = [{name: halves[side::2][name].tolist() for name in _HALF_COLUMNS} for side in (0, 1)]

    def flow(self, i: int, now: int, service: str) -> FlowRow:
        """Return flow ``i`` as ``show conntrack`` has it."""
        of, (original, reply) = self.of, self.halves
        protocol, status = original["protocol"][i], of["status"][i]
        half, answer = _half(original, i), _half(reply, i)
        icmp = _icmp(half, answer) if protocol in _ICMP else None
        counted = bool(status & COUNTED)
        return {
            "protocol": _word(protocol),
            "protocol_number": protocol,
            "family": "ipv6" if ":" in half["src"] else "ipv4",
            "state": TcpState(of["state"][i]).name if protocol == _TCP else "",
            "timeout_s": max(0, of["expires_ns"][i] - now) // _SECOND,
            "age_s": round((now - of["created_ns"][i]) / _SECOND, 1),
            "original": half,
            "reply": answer,
            "icmp": icmp,
            "status": [name for name, bit in _BITS.items() if status & bit],
            "mark": of["mark"][i],
            "service": service,
            "backend": endpoint_text(answer["src"], answer["sport"]) if of["backend"][i] >= 0 else "",
            "lb_state": LbState(of["lb_state"][i]).name if counted else "",
            "lb_timeout_s": max(0, of["lb_expires_ns"][i] - now) // _SECOND if counted else 0,
        }

    def translation(self, i: int, now: int, service: str) -> Translation:
        """Return what becomes of the packets of flow ``i``: they leave with the reply's tuple, inverted."""
        row = self.flow(i, now, service)
        original, reply, icmp = row["original"], row["reply"], row["icmp"]
        why = ["service"] if "DST_NAT" in row["status"] else []
        if "SRC_NAT" in row["status"]:
            hairpin = original["src"] == reply["src"]
            why.append("hairpin" if hairpin else "masquerade" if why else "outgoing")
        return {
            "protocol": row["protocol"],
            "state": row["state"],
            "timeout_s": row["timeout_s"],
            "src": original["src"],
            "dst": original["dst"],
            "sport": original["sport"] if icmp is None else icmp["id"],
            "dport": original["dport"],
            "new_src": reply["dst"],
            "new_dst": reply["src"],
            "new_sport": reply["dport"] if icmp is None else icmp["reply_id"],
            "new_dport": reply["sport"],
            "why": why,
            "service": service,
        }


_FLOW_COLUMNS = (
    *("state", "lb_state", "status", "expires_ns", "created_ns", "backend", "service", "service_generation"),
    *("lb_expires_ns", "mark"),
)
_HALF_COLUMNS = ("src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "protocol", "packets", "bytes")


def _half(columns: dict[str, list[int]], i: int) -> Half:
    return {
        "src": _text(columns["src_hi"][i], columns["src_lo"][i]),
        "dst": _text(columns["dst_hi"][i], columns["dst_lo"][i]),
        "sport": columns["sport"][i],
        "dport": columns["dport"][i],
        "packets": columns["packets"][i],
        "bytes": columns["bytes"][i],
    }


def _icmp(original: Half, reply: Half) -> IcmpQuery:
    """Return what ``stages.parse`` made ports of, and take the ports away."""
    kind = original["dport"] >> 8
    query: IcmpQuery = {
        "type": kind,
        "code": original["dport"] & 0xFF,
        "id": original["sport"],
        "reply_type": _ANSWERS.get(kind, kind),
        "reply_id": reply["dport"],
    }
    for half in (original, reply):
        half["sport"] = half["dport"] = 0
    return query


def _word(protocol: int) -> str:
    return _WORDS.get(protocol, str(protocol))


@lru_cache(maxsize=1 << 14)
def _text(hi: int, lo: int) -> str:
    return str(to_address(hi, lo))
