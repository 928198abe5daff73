"""The pipeline, stage by stage and whole, in bursts of 1 to 256 packets: 250 pods, 1000 routes, mixed 64-byte traffic.

Every stage finds the records and frames as the stages before it have left them; they are made anew before each pass
over 256 packets, and only the stage is on the clock. The C twin works on the very same arrays, and has done the same to
every byte before anything is timed. A call from Python costs more than a packet and has a case of its own.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import dpkt
import numpy as np
from numba.core import types

from bench import _traffic
from bench.harness import Case, batches, bind, compile_c, read_c
from dataplane import batch as b
from dataplane import pipeline
from dataplane.batch import HEADROOM, PACKET, ROWS, SMALL_STRIDE
from dataplane.devices.io import IoBuffers
from dataplane.jit import Array, address, copy, kernel
from dataplane.stages.arp import arp
from dataplane.stages.defrag import defrag
from dataplane.stages.guard import guard
from dataplane.stages.parse import parse
from dataplane.stages.route import route
from dataplane.stages.vxlan import decapsulate, encapsulate
from dataplane.tables.interface import INTERFACE, Role
from dataplane.tables.neighbour import NEIGHBOUR, State
from dataplane.tables.route import ROUTE, Kind
from dataplane.tables.vtep import VTEP
from dataplane.verdict import Reason, Verdict

STAGES = ("parse", "decapsulate", "arp", "guard", "defrag", "route", "encapsulate", "tally")
WHOLE = len(STAGES)
PASSES = 32  # per sample: half a millisecond of packets
FIRST, KEPT = HEADROOM - 64, 256  # the bytes of a slot that a stage may change: [FIRST, FIRST + KEPT)
CLOCK_MONOTONIC = 1

_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))


# --- ours ------------------------------------------------------------------------------------------------------------


@kernel
def run(stage: int, batch: Any, count: int, tables: Any, now: int) -> None:
    """Run one stage, or all of them, over rows [0, count)."""
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
        route(batch, count, tables, now)
    elif stage == 6:
        encapsulate(batch, count, tables, now)
    elif stage == 7:
        pipeline.tally(batch, count, tables, now)
    else:
        pipeline.process(batch, count, tables, now)
        pipeline.tally(batch, count, tables, now)


@kernel
def _restore(data: Any, octets: Any, saved: Any) -> None:
    """Make frames and records as they were saved."""
    frames, records = saved
    copy(octets, 0, records, 0, len(records))
    for i in range(ROWS):
        copy(data, i * SMALL_STRIDE + FIRST, frames, i * KEPT, KEPT)


@kernel
def _read_clock(clock: Any) -> int:
    _clock_gettime(CLOCK_MONOTONIC, address(clock, 0))
    return int(clock[0]) * 1_000_000_000 + int(clock[1])


@kernel
def drive_stage(stage: int, batch: Any, saved: Any, tables: Any, now: int, clock: Any) -> int:
    """Return the nanoseconds in the stage alone over ``PASSES`` times ``ROWS`` packets.

    Args:
        stage: A number of ``STAGES``, or ``WHOLE``.
        batch: The arena, the records as ``(bursts, packets per burst)``, and the records' bytes.
        saved: What ``_restore`` writes.
        tables: ``Tables.arrays``.
        now: Nanoseconds.
        clock: ``(2,)`` int64: the room for a timespec.
    """
    data, bursts, octets = batch
    spent = 0
    for _ in range(PASSES):
        _restore(data, octets, saved)
        begin = _read_clock(clock)
        for k in range(len(bursts)):
            run(stage, (data, bursts[k]), bursts.shape[1], tables, now)
        spent += _read_clock(clock) - begin
    return spent


# --- the C twin ------------------------------------------------------------------------------------------------------

_C_TYPES = {"u1": "u8", "u2": "u16", "u4": "u32", "u8": "u64", "i4": "i32", "i8": "i64"}


def c_struct(name: str, dtype: np.dtype[Any]) -> str:
    """Return a record as a C struct, each field at its offset."""
    assert dtype.fields is not None
    lines, end = [], 0
    for field, (kind, offset, *_) in dtype.fields.items():
        if offset > end:
            lines.append(f"u8 spare{end}[{offset - end}];")
        lines.append(f"{_C_TYPES[kind.str[1:]]} {field};")
        end = offset + kind.itemsize
    if dtype.itemsize > end:
        lines.append(f"u8 spare{end}[{dtype.itemsize - end}];")
    size = f'_Static_assert(sizeof(struct {name}) == {dtype.itemsize}, "as in Python");'
    return f"struct {name} {{ {' '.join(lines)} }};\n{size}\n"


def c_source() -> str:
    """Return the twin's source: tables, records and names as the Python sources have them, stages."""
    records = {"packet": PACKET, "interface": INTERFACE, "route": ROUTE, "neighbour": NEIGHBOUR, "vtep": VTEP}
    numbers = {name: value for name, value in vars(b).items() if isinstance(value, int) and name.isupper()}
    numbers |= {reason.name: int(reason) for reason in Reason} | {verdict.name: int(verdict) for verdict in Verdict}
    for prefix, names in (("ROLE", Role), ("KIND", Kind), ("STATE", State)):
        numbers |= {f"{prefix}_{member.name}": int(member) for member in names}
    numbers |= {"FIRST": FIRST, "KEPT": KEPT}
    defines = "".join(f"#define {name} {value}\n" for name, value in numbers.items())
    structs = "".join(c_struct(name, dtype) for name, dtype in records.items())
    return read_c("lpm") + read_c("rows") + structs + defines + read_c("parse") + read_c("route")


class Twin:
    """The compiled twin, bound to one set of tables."""

    def __init__(self, tables: pipeline.Tables) -> None:
        library = compile_c(c_source(), "pipeline")
        self._run, self._drive = library.run, library.drive_stage
        self._drive.restype = ctypes.c_int64
        nodes, prefixes, lengths, key, routes = tables.routes.arrays
        members: list[Array | int] = [tables.interfaces, tables.counters, tables.settings]
        members += [nodes, prefixes, len(prefixes) - 1, lengths, key, routes]
        for slots, secret, rows in (tables.neighbours.arrays, tables.vteps.arrays):
            members += [slots, len(slots) - 1, secret, rows]
        words = [member if isinstance(member, int) else member.ctypes.data for member in members]
        self._tables = np.array(words, np.int64)

    def run(self, stage: int, batch: b.Batch, now: int) -> None:
        """Run a stage over all rows."""
        bind(self._run, stage, batch.data, batch.packets, ROWS, self._tables, now)()

    def drive(self, stage: int, batch: b.Batch, saved: tuple[Array, Array], burst: int) -> Callable[[], object]:
        """Return the call that times a stage."""
        frames, records = saved
        return bind(
            self._drive, stage, batch.data, batch.packets, frames, records, self._tables, _traffic.NOW, burst, PASSES
        )


# --- both on the same packets ----------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What is measured: one batch, its tables, and the packets before each stage."""

    tables: pipeline.Tables
    batch: b.Batch
    twin: Twin
    saved: list[tuple[Array, Array]]


def save(batch: b.Batch) -> tuple[Array, Array]:
    """Return copies of the rows' frames and records."""
    slots = batch.data[: ROWS * SMALL_STRIDE].reshape(ROWS, SMALL_STRIDE)
    return slots[:, FIRST : FIRST + KEPT].reshape(-1).copy(), batch.packets.view(np.uint8).copy()


def restore(batch: b.Batch, saved: tuple[Array, Array]) -> None:
    """Undo what has been done since ``save``."""
    _restore(batch.data, batch.packets.view(np.uint8), saved)


def effects(batch: b.Batch, tables: pipeline.Tables) -> tuple[bytes, ...]:
    """Return every byte that a stage may have changed."""
    shared = tables.counters, tables.vteps.records, tables.neighbours.records
    return tuple(array.tobytes() for array in (*save(batch), *shared))


def undo(tables: pipeline.Tables) -> None:
    """Clear the counters."""
    tables.counters[:] = 0
    for column in ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes"):
        tables.vteps.records[column] = 0


def make_setting() -> Setting:
    """Set up, and make sure that both do the same to every byte, stage by stage and all at once."""
    tables, batch = _traffic.make_tables(), b.make_batch()
    twin = Twin(tables)
    saved: list[tuple[Array, Array]] = []
    _traffic.fill(batch)
    for stage in (*range(len(STAGES)), WHOLE):
        saved.append(save(batch) if stage != WHOLE else saved[0])
        done = []
        for call in (
            partial(twin.run, stage, batch, _traffic.NOW),
            partial(run, stage, batch.arrays, ROWS, tables.arrays, _traffic.NOW),
        ):
            restore(batch, saved[stage])
            undo(tables)
            call()
            done.append(effects(batch, tables))
        assert done[0] == done[1], f"stage {stage}: the C twin does something else"
    assert (batch.packets["verdict"] == Verdict.ACCEPT).all()
    return Setting(tables, batch, twin, saved)


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


def stage_cases(setting: Setting, stage: int, sizes: list[int]) -> Iterator[Case]:
    """Yield one stage at each burst size."""
    tables, batch, twin, saved = setting
    clock, octets = np.zeros(2, np.int64), batch.packets.view(np.uint8)
    name = "whole" if stage == WHOLE else STAGES[stage]
    for burst in sizes:
        ours = (batch.data, batch.packets.reshape(-1, burst), octets)
        references = {"C": twin.drive(stage, batch, saved[stage], burst)}
        marks = {"C": 1.3 if stage == WHOLE and burst == ROWS else 1.15}
        if stage == WHOLE and burst == ROWS:
            frames = [frame for _, frame in _traffic.make_frames()] * PASSES
            references["dpkt"] = partial(dpkt_route, frames, {}, {})
        yield Case(
            group=f"pipeline {name}",
            batch=burst,
            what="250 pods, 1000 routes, 64 B UDP and TCP: pod to pod, into the tunnel, out of it",
            operations=PASSES * ROWS,
            ours=partial(drive_stage, stage, ours, saved[stage], tables.arrays, _traffic.NOW, clock),
            references=references,
            marks=marks,
            self_timed=True,
        )


def call_cases(setting: Setting) -> Iterator[Case]:
    """Yield what a burst costs before its first packet: a call from Python."""
    tables, batch, _, _ = setting
    io = IoBuffers().arrays
    yield Case(
        group="pipeline call from Python",
        what="one burst of no packets, from Python",
        operations=1,
        ours=partial(pipeline.burst, batch.arrays, pipeline.LOADED, tables.arrays, io, _traffic.NOW, 0),
        references={},
    )


def cases(quick: bool) -> Iterator[Case]:
    """Yield every stage, the whole, and the call."""
    setting = make_setting()
    for stage in (*range(len(STAGES)), WHOLE):
        yield from stage_cases(setting, stage, list(batches(quick)))
    yield from call_cases(setting)
