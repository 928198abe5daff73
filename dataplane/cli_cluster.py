"""``dataplane cluster``: what the node knows of the others, and of the store that it knows them from."""

from pathlib import Path

import click

from dataplane.cli_base import output_option, socket_option
from dataplane.cli_show import show_snapshot


@click.group()
def cluster() -> None:
    """Look at the cluster as the running node sees it.

    \b
    Example:
      dataplane cluster status
    """  # noqa: D301 - click wants the backspace itself


@cluster.command()
@output_option("table", "json")
@socket_option
def status(output: str, path: Path | None) -> None:
    """List the nodes, since when and whether they are in; and say how the store is doing.

    \b
    Example:
      dataplane cluster status -o json | jq '.nodes[] | select(.alive | not) | .name'
    """  # noqa: D301 - click wants the backspace itself
    show_snapshot("cluster", output, path)
