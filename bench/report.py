"""Shows results: a table on the terminal, JSON, Markdown, plots; always with machine and date."""

import json
import platform
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.harness import NS, OURS, Result

_COLUMNS = ("case", "unit", "ours", "p10-p90", "Mpps/core", "reference", "its figure", "ratio", "mark")
_WIDTH = 140  # columns; a table that is cut says nothing


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gcc = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": f"{models[0] if models else platform.machine()} ({len(models)} logical)",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "numpy": np.__version__,
        "gcc": gcc,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def print_table(title: str, results: Sequence[Result]) -> None:
    """Print one bench's results."""
    table = Table(*_COLUMNS[:2], title=title, title_justify="left")
    for column in _COLUMNS[2:]:
        table.add_column(column, justify="left" if column == "reference" else "right")
    for result in results:
        for row in _rows(result):
            table.add_row(*row)
    console = Console()
    Console(width=max(console.width, _WIDTH)).print(table)


def write_json(path: Path, results: dict[str, list[Result]]) -> None:
    """Write all results with the machine they were measured on."""
    benches = {name: [result.to_json() for result in some] for name, some in results.items()}
    path.write_text(json.dumps({"machine": machine(), "benches": benches}, indent=1) + "\n")


def write_markdown(path: Path, results: dict[str, list[Result]]) -> None:
    """Write tables for a README."""
    about = machine()
    lines = [f"{about['cpu']}, Linux {about['kernel']}, numba {about['numba']}, gcc {about['gcc']}, {about['date']}"]
    for name, some in results.items():
        lines += ["", f"**{name}**", "", f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
        lines += [f"| {' | '.join(row)} |" for result in some for row in _rows(result)]
    path.write_text("\n".join(lines) + "\n")


def write_summary(path: Path, results: dict[str, list[Result]]) -> None:
    """Write one short table for a README: what has a mark, at the largest batch that has it."""
    about = machine()
    lines = ["| measured | ours | beside | ratio | mark |", "| --- | ---: | ---: | ---: | --- |"]
    for some in results.values():
        last = {(result.case.group, name): result for result in some for name in result.case.marks}
        lines += [_summary_row(result, name) for (_, name), result in last.items()]
    lines += [
        "",
        f"{about['cpu']}, Linux {about['kernel']}, numba {about['numba']}, gcc {about['gcc']}, {about['date']}.",
    ]
    path.write_text("\n".join(lines) + "\n")


def _summary_row(result: Result, name: str) -> str:
    unit, ours, other = result.case.unit, result.figures[OURS].median, result.figures[name].median
    speed = "" if result.mpps is None else f" ({_number(result.mpps)} M/s)"
    batch = f", {result.case.batch} at a time" if result.case.batch > 1 else ""
    kept = "" if result.holds(name) else " missed"
    figures = f"{_number(ours)} {unit}{speed} | {name}: {_number(other)} {unit} | {result.ratios[name].median:.2f}"
    return f"| {result.case.group}{batch} | {figures} | {_mark(result, name)}{kept} |"


def _mark(result: Result, reference: str) -> str:
    return f"{'<=' if result.case.less_is_better else '>='} {result.case.marks[reference]:g}"


def write_plots(folder: Path, results: dict[str, list[Result]]) -> None:
    """Write one SVG per group: cost against batch size, or bars where there is one size only."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for name, some in results.items():
        groups: dict[str, list[Result]] = defaultdict(list)
        for result in some:
            groups[result.case.group].append(result)
        for group, members in groups.items():
            figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
            _plot(axes, members)
            axes.set_title(group)
            figure.savefig(folder / f"{name}-{group.replace(' ', '-').replace('/', '-')}.svg")
            pyplot.close(figure)


def _plot(axes: Any, results: list[Result]) -> None:
    unit = results[0].case.unit
    label = "ns per operation" if unit == NS else unit
    if len(results) == 1:
        figures = results[0].figures
        axes.barh(list(figures), [figure.median for figure in figures.values()])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        return
    sizes = [result.case.batch for result in results]
    for name in results[0].figures:
        figures_of = [result.figures[name] for result in results]
        axes.plot(sizes, [figure.median for figure in figures_of], marker="o", label=name)
        axes.fill_between(sizes, [f.low for f in figures_of], [f.high for f in figures_of], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("packets per batch")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend()


def _rows(result: Result) -> list[list[str]]:
    ours = result.figures[OURS]
    mpps = "" if result.mpps is None else f"{result.mpps:.3g}"
    head = [result.case.name, result.case.unit, _number(ours.median), f"{_number(ours.low)}-{_number(ours.high)}", mpps]
    rows = []
    for name, ratio in result.ratios.items():
        verdict = ""
        if name in result.case.marks:
            verdict = f"{_mark(result, name)} {'holds' if result.holds(name) else 'MISSED'}"
        rows.append([*head, name, _number(result.figures[name].median), f"{ratio.median:.2f}", verdict])
        head = [""] * len(head)
    return rows or [[*head, "", "", "", ""]]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
