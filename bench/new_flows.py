"""New flows through a service: the whole pipeline for the first packet of each, with 10 k and 1 M others in the table.

UDP from pods to services with eight endpoints, round robin; half of the endpoints are behind the tunnel. A packet is
looked for among the flows, classified (service, policy, backend, route, masquerading), entered with both its tuples,
translated and sent. The figure is time per flow, so its inverse, the column Mpps/core, is million flows per second.
What a turn has entered is taken out again before the next one, off the clock.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bench import _flows, pipeline
from bench.harness import Case
from bench.pipeline import PASSES, SIZES, WHOLE, Setting, as_bursts
from dataplane.batch import ROWS
from dataplane.jit import Array, kernel
from dataplane.stages import conntrack
from dataplane.tables.flow import END, FIRST_FREED
from dataplane.verdict import Verdict

STORED = 2 * PASSES  # bursts: a turn uses half of them
BURSTS = (16, 256)


@kernel
def end(tables: Any, rows: Any, now: int) -> None:
    """End these flows."""
    for i in range(len(rows)):
        conntrack.end(tables, int(rows[i]), now)


class Fresh:
    """Packets of new flows, and the means to forget them."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.cursor = setting, np.zeros(4, np.int64)
        tuples, bursts = _flows.make_new(STORED * ROWS), np.arange(STORED * ROWS).reshape(STORED, ROWS)
        self.rounds = pipeline.store(setting.batch, tuples, bursts, lambda: None)

    def timed(self, call: Callable[[], int]) -> int:
        """Return what ``call`` returns; the flows that it enters are gone afterwards."""
        table = self.setting.tables.flows
        first, used = int(table.state[FIRST_FREED]), int(table.state[END])
        spent = call()
        free = np.roll(table.arrays[4], -first)  # a ring
        again = (int(table.state[FIRST_FREED]) - first) % len(free)
        rows = np.concatenate([free[:again], np.arange(used, int(table.state[END]))])
        assert len(rows) == PASSES * ROWS, f"{len(rows)} new flows"
        end(self.setting.arrays, rows.astype(np.int64), _flows.NOW)
        return spent

    def check(self) -> None:
        """Make sure that the twin does the same to every byte of the first burst and of the tables."""
        setting, tables = self.setting, self.setting.tables
        slots, _, _, flows, free, state, scratch = tables.flows.arrays
        shared = (slots, flows, free, state, scratch, tables.services.services, tables.services.backends)
        arrays = [array.view(np.uint8).reshape(-1) for array in (*shared, tables.counters, tables.vteps.records)]
        before, done = [array.copy() for array in arrays], []
        for call in (partial(setting.twin.run, 0, WHOLE, setting.batch), partial(setting.run, 0, WHOLE)):
            pipeline.restore(setting.batch, self.rounds, np.zeros(4, np.int64))
            call()
            done.append([*pipeline.save(setting.batch), *(array.copy() for array in arrays)])
            for array, saved in zip(arrays, before, strict=True):
                array[:] = saved
        for ours, theirs in zip(*done, strict=True):
            assert (ours == theirs).all(), "the C twin does something else"
        assert (setting.batch.packets["verdict"] == Verdict.ACCEPT).all()


def cases(quick: bool) -> Iterator[Case]:
    """Yield new flows in tables of both sizes."""
    for count, _ in SIZES:
        setting = Setting(count, 2, spare=PASSES * ROWS)
        fresh = Fresh(setting)
        if count == SIZES[0][0]:
            fresh.check()
        for burst in BURSTS[-1:] if quick else BURSTS:
            arrays: tuple[Array, ...] = as_bursts(setting.batch, burst)
            ours = partial(pipeline.drive, (0, WHOLE), arrays, tuple(fresh.rounds), fresh.cursor, setting.arrays)
            twin = setting.twin.drive((0, WHOLE), setting.batch, fresh.rounds, fresh.cursor, burst)
            yield Case(
                group=f"new flows, {count // 1000:,} k others",
                batch=burst,
                what="first packets of UDP flows from pods to services, 64 B, through the whole pipeline",
                operations=PASSES * ROWS,
                ours=partial(fresh.timed, ours),
                references={"C": partial(fresh.timed, twin)},
                marks={"C": 1.3},
                self_timed=True,
            )
