"""The pipeline, stage by stage and whole, in bursts of 1 to 256 packets: 250 pods, 100 services, 10 k and 1 M flows.

The flows are established (``_flows``); a burst has packets of some of them, in both directions, at random. Every stage
finds the records and frames as the stages before it have left them; they are made anew before each pass over 256
packets, and only the stage is on the clock. The C twin works on the very same arrays, and has done the same to every
byte before anything is timed; the two take turns in going through the stored packets, so that neither finds a flow in
the caches because the other has just looked at it. A call from Python costs more than a packet and has its own case.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import dpkt
import numpy as np
from numba.core import types

from bench import _flows, _traffic
from bench.harness import Case, batches, bind, compile_c, read_c
from dataplane import batch as b
from dataplane import pipeline
from dataplane.batch import HEADROOM, PACKET, ROWS, SMALL_STRIDE
from dataplane.devices.io import IoBuffers
from dataplane.jit import Array, address, copy, kernel, load32, store32
from dataplane.stages import tcp
from dataplane.stages.arp import arp
from dataplane.stages.conntrack import conntrack
from dataplane.stages.defrag import defrag
from dataplane.stages.guard import guard
from dataplane.stages.nat import nat
from dataplane.stages.parse import parse
from dataplane.stages.route import route
from dataplane.stages.vxlan import decapsulate, encapsulate
from dataplane.tables import flow, policy
from dataplane.tables.backend import BACKEND
from dataplane.tables.flow import FLOW, TUPLE, LbState, TcpState, Timeout
from dataplane.tables.interface import INTERFACE, Role
from dataplane.tables.neighbour import NEIGHBOUR, State
from dataplane.tables.route import HOSTED, ROUTE, Kind
from dataplane.tables.service import SERVICE
from dataplane.tables.vtep import VTEP
from dataplane.verdict import Reason, Verdict

STAGES = ("parse", "decapsulate", "arp", "guard", "defrag", "conntrack", "route", "nat", "encapsulate", "tally")
WHOLE = len(STAGES)
SIZES = ((10_000, 64), (1_000_000, 512))  # flows, and the stored bursts of 256 packets
PASSES = 32  # per sample: half a millisecond of packets
FIRST, KEPT = HEADROOM - 64, 256  # the bytes of a slot that a stage may change: [FIRST, FIRST + KEPT)
CLOCK_MONOTONIC = 1

_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))


# --- ours ------------------------------------------------------------------------------------------------------------


@kernel
def run(first: int, last: int, batch: Any, count: int, tables: Any, now: int) -> None:
    """Run the stages [first, last) over rows [0, count): ``pipeline.process`` in pieces, compiled once."""
    for stage in range(first, last):
        if stage == 0:
            parse(batch, count, tables, now)
        elif stage == 1:
            decapsulate(batch, count, tables, now)
        elif stage == 2:
            arp(batch, count, tables, now)
        elif stage == 3:
            guard(batch, count, tables, now)
        elif stage == 4:
            defrag(batch, count, tables, now)
        elif stage == 5:
            conntrack(batch, count, tables, now)
        elif stage == 6:
            route(batch, count, tables, now)
        elif stage == 7:
            nat(batch, count, tables, now)
        elif stage == 8:
            encapsulate(batch, count, tables, now)
        else:
            pipeline.tally(batch, count, tables, now)


@kernel
def _restore(batch: Any, rounds: Any, cursor: Any) -> None:
    """Make the rows the next of the stored bursts; TCP moves on by one segment each time around."""
    data, _, octets = batch
    frames, records, segments = rounds
    first, size = int(cursor[0]) * ROWS, len(octets)
    copy(octets, 0, records, int(cursor[0]) * size, size)
    for i in range(ROWS):
        copy(data, i * SMALL_STRIDE + FIRST, frames, (first + i) * KEPT, KEPT)
        if int(segments[first + i]) != 0:
            at, moved = i * SMALL_STRIDE + int(segments[first + i]), _flows.SEGMENT * int(cursor[1])
            store32(data, at, load32(data, at) + moved)
            store32(data, at + 4, load32(data, at + 4) + moved)
    cursor[0] += 1
    if int(cursor[0]) * ROWS == len(segments):
        cursor[0] = 0
        cursor[1] += 1


@kernel
def _read_clock(cursor: Any) -> int:
    _clock_gettime(CLOCK_MONOTONIC, address(cursor, 2))
    return int(cursor[2]) * 1_000_000_000 + int(cursor[3])


@kernel
def drive(stages: Any, batch: Any, rounds: Any, cursor: Any, tables: Any) -> int:
    """Return the nanoseconds in the stages alone over ``PASSES`` times ``ROWS`` packets.

    Args:
        stages: The first of ``STAGES``, and the one behind the last.
        batch: The arena, the records as ``(bursts, packets per burst)``, and the records' bytes.
        rounds: ``_flows.Rounds``.
        cursor: ``(4,)`` int64: the next stored burst, how often all were used, and room for a timespec.
        tables: ``Tables.arrays``.
    """
    data, bursts, _ = batch
    first, last = stages
    spent = 0
    for _ in range(PASSES):
        _restore(batch, rounds, cursor)
        begin = _read_clock(cursor)
        for k in range(len(bursts)):
            run(first, last, (data, bursts[k]), bursts.shape[1], tables, _flows.NOW)
        spent += _read_clock(cursor) - begin
    return spent


# --- the C twin ------------------------------------------------------------------------------------------------------

_C_TYPES = {"i2": "int16_t", "u1": "u8", "u2": "u16", "u4": "u32", "u8": "u64", "i4": "i32", "i8": "i64"}


def c_struct(name: str, dtype: np.dtype[Any]) -> str:
    """Return a record as a C struct, each field at its offset."""
    assert dtype.fields is not None
    lines, end = [], 0
    for field, (kind, offset, *_) in dtype.fields.items():
        if kind.shape:
            continue  # room for another record's fields
        if offset > end:
            lines.append(f"u8 spare{end}[{offset - end}];")
        lines.append(f"{_C_TYPES[kind.str[1:]]} {field};")
        end = offset + kind.itemsize
    if dtype.itemsize > end:
        lines.append(f"u8 spare{end}[{dtype.itemsize - end}];")
    size = f'_Static_assert(sizeof(struct {name}) == {dtype.itemsize}, "as in Python");'
    return f"struct {name} {{ {' '.join(lines)} }};\n{size}\n"


def _c_row(name: str, values: list[int]) -> str:
    return f"static const u64 {name}[] = {{{', '.join(f'{value}ull' for value in values)}}};\n"


def c_source() -> str:
    """Return the twin's source: tables, records and names as the Python sources have them, stages."""
    records = {"packet": PACKET, "interface": INTERFACE, "route": ROUTE, "neighbour": NEIGHBOUR, "vtep": VTEP}
    records |= {"half": TUPLE, "flow": FLOW, "service": SERVICE, "backend": BACKEND}
    records |= {"policy": policy.POLICY, "range": policy.RANGE}
    numbers = {name: value for name, value in vars(b).items() if isinstance(value, int) and name.isupper()}
    numbers |= {reason.name: int(reason) for reason in Reason} | {verdict.name: int(verdict) for verdict in Verdict}
    enums = {"ROLE": Role, "KIND": Kind, "STATE": State, "TCP": TcpState, "LB": LbState, "TIMEOUT": Timeout}
    enums |= {"COUNT": flow.Count, "POOL": policy.Pool, "EXPOSURE": policy.Exposure}
    for prefix, names in enums.items():
        numbers |= {f"{prefix}_{member.name}": int(member) for member in names}
    for name in ("SEEN_REPLY", "ASSURED", "SRC_NAT", "DST_NAT", "COUNTED", "ACTIVE", "MASQUERADED"):
        numbers[name] = getattr(flow, name)
    for name in ("LOCAL", "NO_LOCAL", "RESTRICTED"):
        numbers[f"POLICY_{name}"] = getattr(policy, name)
    numbers |= {"POOLS": policy.POOLS, "FIRST": FIRST, "KEPT": KEPT, "HOSTED": HOSTED, "SEGMENT": _flows.SEGMENT}
    defines = "".join(f"#define {name} {value}\n" for name, value in numbers.items())
    structs = "".join(c_struct(name, dtype) for name, dtype in records.items())
    rows = _c_row("CONNTRACK_ROWS", vars(tcp)["_CONNTRACK_ROWS"]) + _c_row("LB_ROWS", vars(tcp)["_LB_ROWS"])
    stages = "".join(read_c(name) for name in ("parse", "track", "begin", "route"))
    return read_c("lpm") + read_c("rows") + structs + defines + rows + stages


class Twin:
    """The compiled twin, bound to one set of tables."""

    def __init__(self, tables: pipeline.Tables) -> None:
        library = compile_c(c_source(), "pipeline")
        self._run, self._drive = library.run, library.drive_stages
        self._drive.restype = ctypes.c_int64
        nodes, prefixes, lengths, key, routes = tables.routes.arrays
        members: list[Array | int] = [tables.interfaces, tables.counters, tables.settings]
        members += [nodes, prefixes, len(prefixes) - 1, lengths, key, routes]
        for slots, secret, rows in (tables.neighbours.arrays, tables.vteps.arrays):
            members += [slots, len(slots) - 1, secret, rows]
        slots, secret, tuples, flows, free, state, scratch = tables.flows.arrays
        members += [slots, len(slots) - 1, secret, tuples, flows]
        members += [*tables.services.arrays[2:4], tables.timeouts, len(flows), free, state, scratch]
        slots, secret = tables.services.arrays[:2]
        members += [slots, len(slots) - 1, secret, tables.policies.policies, tables.policies.pools]
        words = [member if isinstance(member, int) else member.ctypes.data for member in members]
        self._tables = np.array(words, np.int64)

    def run(self, first: int, last: int, batch: b.Batch) -> None:
        """Run stages over all rows."""
        bind(self._run, first, last, batch.data, batch.packets, ROWS, self._tables, _flows.NOW)()

    def drive(self, stages: tuple[int, int], batch: b.Batch, rounds: _flows.Rounds, cursor: Array, burst: int) -> Any:
        """Return the call that times stages."""
        arrays = (batch.data, batch.packets, *rounds, cursor, self._tables)
        return bind(self._drive, *stages, *arrays, _flows.NOW, burst, PASSES, len(rounds.segments) // ROWS)


# --- both on the same packets ----------------------------------------------------------------------------------------


class Setting:
    """What is measured: tables with flows, a batch, and packets as they come in."""

    def __init__(self, count: int, bursts: int, spare: int = ROWS) -> None:
        self.flows = count
        self.tables = _traffic.make_tables(count + spare)
        self.batch = b.make_batch()
        self.arrays = self.tables.arrays
        rows = _flows.open_flows(self.tables, self.batch, count, partial(self.run, 0, WHOLE))
        self.halves = _flows.choose_halves(rows, bursts)
        self.twin = Twin(self.tables)
        self._records = self.tables.flows.flows.view(np.uint8).reshape(-1, FLOW.itemsize)
        self._touched = np.unique(self.halves[0] >> 1)

    def run(self, first: int, last: int, count: int = ROWS) -> None:
        """Run stages over rows [0, count)."""
        run(first, last, self.batch.arrays, count, self.arrays, _flows.NOW)

    def store(self, stage: int) -> _flows.Rounds:
        """Return the packets of all bursts as they come to a stage."""
        rounds = store(self.batch, self.tables.flows.tuples, self.halves, partial(self.run, 0, stage))
        assert (self.batch.packets["verdict"] == Verdict.ACCEPT).all()
        return rounds

    def check(self, first: int, last: int, rounds: _flows.Rounds) -> None:
        """Make sure that the twin does the same to every byte of a burst and of the tables."""
        done, before = [], self._save()
        for call in (partial(self.twin.run, first, last, self.batch), partial(self.run, first, last)):
            self._undo(before)
            restore(self.batch, rounds, np.zeros(4, np.int64))
            call()
            done.append([*save(self.batch), *self._save()])
        for ours, theirs in zip(*done, strict=True):
            assert (ours == theirs).all(), f"stages {first} to {last}: the C twin does something else"
        assert (self.batch.packets["verdict"] == Verdict.ACCEPT).all()

    @property
    def _changing(self) -> list[Array]:
        tables = self.tables
        records = [tables.vteps.records, tables.neighbours.records, tables.services.services, tables.services.backends]
        return [tables.counters, *(array.view(np.uint8) for array in records)]

    def _save(self) -> list[Array]:
        return [*(array.copy() for array in self._changing), self._records[self._touched]]

    def _undo(self, before: list[Array]) -> None:
        for array, saved in zip(self._changing, before[:-1], strict=True):
            array[:] = saved
        self._records[self._touched] = before[-1]


def store(batch: b.Batch, tuples: Array, bursts: Array, prepare: Callable[[], object]) -> _flows.Rounds:
    """Return the packets of tuples, given as ``(bursts, ROWS)`` rows of ``tuples``, each burst after ``prepare``."""
    frames = np.zeros(bursts.size * KEPT, np.uint8)
    records = np.zeros(bursts.size * PACKET.itemsize, np.uint8)
    segments = np.zeros(bursts.shape, np.int32)
    for k, halves in enumerate(bursts):
        _flows.write_burst(batch.arrays, tuples, halves, segments[k])
        prepare()
        frames[k * ROWS * KEPT : (k + 1) * ROWS * KEPT], kept = save(batch)
        records[k * len(kept) : (k + 1) * len(kept)] = kept
    return _flows.Rounds(frames, records, segments.reshape(-1))


def save(batch: b.Batch) -> tuple[Array, Array]:
    """Return copies of the rows' frames and records."""
    slots = batch.data[: ROWS * SMALL_STRIDE].reshape(ROWS, SMALL_STRIDE)
    return slots[:, FIRST : FIRST + KEPT].reshape(-1).copy(), batch.packets.view(np.uint8).copy()


def restore(batch: b.Batch, rounds: _flows.Rounds, cursor: Array) -> None:
    """Make the rows the next of the stored bursts."""
    _restore(as_bursts(batch, ROWS), tuple(rounds), cursor)


def as_bursts(batch: b.Batch, burst: int) -> tuple[Array, Array, Array]:
    """Return what ``drive`` takes as ``batch``."""
    return batch.data, batch.packets.reshape(-1, burst), batch.packets.view(np.uint8)


# --- Python, for scale -----------------------------------------------------------------------------------------------


def dpkt_route(frames: list[bytes], fib: dict[bytes, bytes], macs: dict[bytes, bytes]) -> int:
    """Parse, look up an exact address, decrement the TTL, rewrite the MAC, all with dpkt; return the nanoseconds."""
    begin = time.perf_counter_ns()
    for frame in frames:
        ethernet = dpkt.ethernet.Ethernet(frame)
        packet = ethernet.data
        ethernet.dst = macs.get(fib.get(packet.dst, packet.dst), ethernet.dst)
        packet.ttl -= 1
        packet.sum = 0
        bytes(ethernet)
    return time.perf_counter_ns() - begin


# --- cases -----------------------------------------------------------------------------------------------------------


def stage_cases(setting: Setting, first: int, last: int, sizes: list[int]) -> Iterator[Case]:
    """Yield stages [first, last) at each burst size."""
    batch, rounds = setting.batch, setting.store(first)
    setting.check(first, last, rounds)
    cursor = np.zeros(4, np.int64)
    name = "whole" if last - first == WHOLE else STAGES[first]
    for burst in sizes:
        last_whole = name == "whole" and burst == ROWS
        references = {"C": setting.twin.drive((first, last), batch, rounds, cursor, burst)}
        arrays = as_bursts(batch, burst), tuple(rounds), cursor
        yield Case(
            group=f"pipeline {name}, {setting.flows // 1000:,} k flows",
            batch=burst,
            what="64 B UDP and TCP of established flows: plain, to services, masqueraded, in and out of the tunnel",
            operations=PASSES * ROWS,
            ours=partial(drive, (first, last), *arrays, setting.arrays),
            references=references,
            marks={"C": 1.3 if last_whole else 1.15},
            self_timed=True,
        )


def dpkt_cases(setting: Setting) -> Iterator[Case]:
    """Yield a part of the work in Python; not beside C, which would find the caches full of something else."""
    rounds = setting.store(0)
    size, records = PASSES * ROWS, rounds.records.view(PACKET)
    starts = records["start"][:size] - np.tile(np.arange(ROWS) * SMALL_STRIDE, PASSES) - FIRST
    pairs = zip(starts.tolist(), records["length"][:size].tolist(), strict=True)
    kept = rounds.frames.reshape(-1, KEPT)
    frames = [kept[i, start : start + length].tobytes() for i, (start, length) in enumerate(pairs)]
    arrays = as_bursts(setting.batch, ROWS), tuple(rounds), np.zeros(4, np.int64)
    yield Case(
        group="pipeline whole beside Python",
        batch=ROWS,
        what="the whole pipeline; dpkt: parse, look up, decrement the TTL, rewrite the MAC, no more",
        operations=size,
        ours=partial(drive, (0, WHOLE), *arrays, setting.arrays),
        references={"dpkt": partial(dpkt_route, frames, {}, {})},
        rounds=5,
        self_timed=True,
    )


def call_cases(setting: Setting) -> Iterator[Case]:
    """Yield what a burst costs before its first packet: a call from Python."""
    io = IoBuffers().arrays
    yield Case(
        group="pipeline call from Python",
        what="one burst of no packets, from Python",
        operations=1,
        ours=partial(pipeline.burst, setting.batch.arrays, pipeline.LOADED, setting.arrays, io, _flows.NOW, 0),
        references={},
    )


def cases(quick: bool) -> Iterator[Case]:
    """Yield every stage and the whole with few flows; with many the whole, and conntrack, which looks them up."""
    sizes = list(batches(quick))
    setting = Setting(*SIZES[0])
    for stage in range(len(STAGES)):
        yield from stage_cases(setting, stage, stage + 1, sizes)
    yield from stage_cases(setting, 0, WHOLE, sizes)
    yield from dpkt_cases(setting)
    yield from call_cases(setting)
    setting = Setting(*SIZES[1])
    stage = STAGES.index("conntrack")
    yield from stage_cases(setting, stage, stage + 1, sizes)
    yield from stage_cases(setting, 0, WHOLE, sizes)
