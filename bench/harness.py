"""Measures our code beside its references, in the same process and the same minute.

A bench is a module in this folder with a docstring (its first line is what ``python -m bench list`` prints) and one
generator::

    def cases(quick: bool) -> Iterator[Case]:
        table = ...                                   # set up; freed when the generator ends
        twin = compile_c(read_c("lpm"), "lpm")        # gcc -O3 -march=native, cached outside the tree
        for batch in BATCHES:
            yield Case(
                group="lpm 1k routes", batch=batch, what="longest prefix match, 64 k random addresses",
                operations=65536,                     # what one call of each callable does
                ours=partial(drive, table.arrays, addresses, out, batch),
                references={"C": bind(twin.drive, nodes, addresses, out, batch), "dict": ...},
                marks={"C": 1.15},                    # ratio ours / reference that must not be exceeded
            )

Every round gives ours and each reference a turn, in random order: a neighbor's noise hits all of them, and none always
finds the caches as a certain other left them. The ratio is the median of the rounds' ratios, not the ratio of medians.
Each turn begins with a call that is not counted.

A case may also measure itself. With ``self_timed`` each callable returns the nanoseconds that it spent on its
``operations``, so that it can restore its data between them. With another ``unit`` ("Gbit/s", "kpps") it returns its
figure, more is better, and a mark is a ratio that must be reached; with ``US`` it returns a latency.

Bind loop variables with ``functools.partial``, not in a lambda.
"""

import ctypes
import hashlib
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.jit import cache_home

BATCHES = (1, 16, 64, 256)
NS = "ns"  # the unit of a timed case: nanoseconds per operation, less is better
US = "us"  # a latency that the callables return, less is better
MIB = "MiB"  # memory that the callables return, less is better
OURS = "ours"
_ROUND_NS = 2_000_000  # a round's share of each callable: long against the clock, short against a time slice
_ROUNDS = 41
_QUICK_ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        group: What cases of different batch sizes have in common; one plot each.
        what: What one operation is, on what data.
        operations: Operations that one call of each callable does.
        ours: Our callable.
        references: Name to callable; each does the same work on the same data.
        batch: Packets per burst.
        marks: Reference to the ratio that the project has promised.
        unit: ``NS``, or the unit of what the callables return.
        rounds: How often; 0 is the default.
        self_timed: The callables return their nanoseconds.
    """

    group: str
    what: str
    operations: int
    ours: Callable[[], object]
    references: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    batch: int = 1
    marks: Mapping[str, float] = field(default_factory=dict)
    unit: str = NS
    rounds: int = 0
    self_timed: bool = False

    @property
    def less_is_better(self) -> bool:
        """Whether figures are times; a mark is then the largest ratio, else the smallest."""
        return self.unit in (NS, US, MIB)

    @property
    def name(self) -> str:
        """The group and the batch size."""
        return f"{self.group} x{self.batch}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What one callable came to: median and the 10th and 90th percentile of the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Result:
    """A measured case. ``figures`` has ``OURS`` and each reference; ``ratios`` is ours / reference."""

    case: Case
    figures: dict[str, Figure]
    ratios: dict[str, Figure]

    def holds(self, reference: str) -> bool | None:
        """Return whether the mark against ``reference`` is kept; None if there is none."""
        mark = self.case.marks.get(reference)
        if mark is None:
            return None
        ratio = self.ratios[reference].median
        return ratio <= mark if self.case.less_is_better else ratio >= mark

    @property
    def mpps(self) -> float | None:
        """Million operations per second and core, for a timed case."""
        return 1e3 / self.figures[OURS].median if self.case.unit == NS else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "group": self.case.group,
            "batch": self.case.batch,
            "what": self.case.what,
            "unit": self.case.unit,
            "figures": {name: _plain(figure) for name, figure in self.figures.items()},
            "ratios": {name: _plain(figure) for name, figure in self.ratios.items()},
            "mpps_per_core": self.mpps,
            "marks": {name: {"mark": mark, "holds": self.holds(name)} for name, mark in self.case.marks.items()},
        }


def measure(case: Case, quick: bool = False) -> Result:
    """Run a case: warm up, calibrate, then rounds in which ours and each reference have a turn."""
    callables = {OURS: case.ours, **case.references}
    if case.unit != NS or case.self_timed:
        sample = {name: _returned(call, case.operations if case.unit == NS else 1) for name, call in callables.items()}
    else:
        calls = {name: _calls_per_round(call) for name, call in callables.items()}
        sample = {name: _timer(call, calls[name], case.operations) for name, call in callables.items()}
    samples: dict[str, list[float]] = {name: [] for name in callables}
    shuffle = random.Random(1)
    for _ in range(case.rounds or (_QUICK_ROUNDS if quick else _ROUNDS)):
        for name in shuffle.sample(list(sample), len(sample)):
            samples[name].append(sample[name]())
    ratios = {
        name: _figure([a / b for a, b in zip(samples[OURS], samples[name], strict=True)]) for name in case.references
    }
    return Result(case, {name: _figure(values) for name, values in samples.items()}, ratios)


def _calls_per_round(call: Callable[[], object]) -> int:
    call()  # compiles, faults pages in, fills caches
    begin = time.perf_counter_ns()
    call()
    return max(1, _ROUND_NS // max(1, time.perf_counter_ns() - begin))


def _timer(call: Callable[[], object], calls: int, operations: int) -> Callable[[], float]:
    def take() -> float:
        call()  # to find its own data in the caches, not its predecessor's
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - begin) / (calls * operations)

    return take


def _returned(call: Callable[[], object], operations: int) -> Callable[[], float]:
    def take() -> float:
        value = call()
        assert isinstance(value, int | float), "a case that measures itself must return its figure"
        return value / operations

    return take


def _figure(values: list[float]) -> Figure:
    low, high = np.percentile(values, [10, 90])
    return Figure(statistics.median(values), float(low), float(high))


def _plain(figure: Figure) -> dict[str, float]:
    return {"median": figure.median, "p10": figure.low, "p90": figure.high}


# --- C twins ---------------------------------------------------------------------------------------------------------


def compile_c(source: str, name: str) -> ctypes.CDLL:
    """Compile C for this machine (numba does that too) and load it; the library is kept beside the kernels' cache."""
    headers = Path(__file__).with_name("c")
    command = ["gcc", "-O3", "-march=native", "-shared", "-fPIC", "-Wall", f"-I{headers}", "-x", "c", "-"]
    folder = cache_home().parent / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [*command, source, *(path.read_text() for path in sorted(headers.glob("*.h")))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = folder / f"{name}-{digest}.so"
    if not library.exists():
        part = library.with_suffix(".part")
        subprocess.run([*command, "-o", str(part)], input=source.encode(), check=True)
        part.rename(library)
    return ctypes.CDLL(str(library))


def read_c(name: str) -> str:
    """Return the text of ``c/NAME.c`` in this folder."""
    return Path(__file__).with_name("c").joinpath(f"{name}.c").read_text()


def bind(function: Any, *arguments: Any) -> Callable[[], object]:
    """Return a call of a C function: arrays go as pointers, ints as int64; the arrays are kept alive."""
    words = [
        ctypes.c_void_p(value.ctypes.data) if isinstance(value, np.ndarray) else ctypes.c_int64(value)
        for value in arguments
    ]

    def call(_alive: tuple[Any, ...] = arguments) -> object:
        return function(*words)

    return call


def batches(quick: bool) -> Iterator[int]:
    """Yield the batch sizes to measure."""
    yield from (BATCHES[0], BATCHES[-1]) if quick else BATCHES
