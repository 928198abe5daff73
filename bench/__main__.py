"""``python -m bench list | NAME... | all``: run benchmarks and show every figure beside its references."""

import importlib
from pathlib import Path
from types import ModuleType

import click
from rich.console import Console

from bench import report
from bench.harness import Result, measure

_NOT_BENCHES = {"__main__", "harness", "report"}


def names() -> list[str]:
    """Return the benches: every module in this folder that is not the framework."""
    found = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in found if name not in _NOT_BENCHES and not name.startswith("_"))


def load(name: str) -> ModuleType:
    """Import one bench."""
    return importlib.import_module(f"bench.{name}")


def run(name: str, quick: bool) -> list[Result]:
    """Measure all cases of a bench."""
    console = Console(stderr=True)
    results = []
    with console.status(name) as status:
        for case in load(name).cases(quick):
            status.update(f"{name}: {case.name}")
            results.append(measure(case, quick))
    return results


@click.command()
@click.argument("benches", nargs=-1, required=True, metavar="list | all | NAME...")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write tables for a README here.")
@click.option("--summary", type=click.Path(path_type=Path), help="Write one short table here: what has a mark.")
@click.option("--plots", type=click.Path(path_type=Path), help="Write one SVG per group into this folder.")
@click.option("--quick", is_flag=True, help="Fewer rounds, sizes and batch sizes.")
def main(
    benches: tuple[str, ...],
    json_file: Path | None,
    markdown: Path | None,
    summary: Path | None,
    plots: Path | None,
    quick: bool,
) -> None:
    """Measure our kernels beside C, numpy and Python."""
    if benches == ("list",):
        for name in names():
            click.echo(f"{name:<12} {(load(name).__doc__ or '').splitlines()[0]}")
        return
    wanted = names() if benches == ("all",) else list(benches)
    unknown = sorted(set(wanted) - set(names()))
    if unknown:
        raise click.UsageError(f"no bench {', '.join(unknown)}; there are {', '.join(names())}")
    results = {}
    for name in wanted:
        results[name] = run(name, quick)
        report.print_table(f"{name}: {(load(name).__doc__ or '').splitlines()[0]}", results[name])
    click.echo("  ".join(f"{key} {value}" for key, value in report.machine().items()))
    if json_file:
        report.write_json(json_file, results)
    if markdown:
        report.write_markdown(markdown, results)
    if summary:
        report.write_summary(summary, results)
    if plots:
        report.write_plots(plots, results)


main(prog_name="python -m bench")
