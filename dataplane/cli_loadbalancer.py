"""``dataplane loadbalancer``: pools, the addresses that services got out of them, and who announces those."""

from pathlib import Path
from typing import Any

import click

from dataplane.cli_base import ask, output_option, print_json, print_table, socket_option


@click.group()
def loadbalancer() -> None:
    """Look at load balancer addresses.

    \b
    Example:
      dataplane loadbalancer show
    """  # noqa: D301 - click wants the backspace itself


@loadbalancer.command()
@output_option("table", "json")
@socket_option
def show(output: str, path: Path | None) -> None:
    """List the pools, and the addresses with their services and the node that announces them.

    A service that waits for an address is listed as <pending>, with the reason.

    \b
    Example:
      dataplane loadbalancer show -o json | jq '.pending'
    """  # noqa: D301 - click wants the backspace itself
    from dataplane.control import client

    snapshot: Any = ask(lambda socket: client.get(socket, "load_balancer"), path)
    if output == "json":
        print_json(snapshot)
        return
    from dataplane.control import views

    print_table(views.pools(snapshot))
    click.echo()
    print_table(views.load_balancer(snapshot))
