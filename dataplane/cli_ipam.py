"""``dataplane ipam``: which addresses of pods are taken, by whom, and how to take back one that is leaked."""

from pathlib import Path

import click

from dataplane.cli_base import ask, fail_usage, output_option, print_json, print_table, report, socket_option


@click.group()
def ipam() -> None:
    """Look at the books of addresses, and put them right.

    \b
    Examples:
      dataplane ipam show --show-blocks
      dataplane ipam release 10.244.3.17
    """  # noqa: D301 - click wants the backspace itself


@ipam.command()
@click.option("--show-blocks", "blocks", is_flag=True, help="Each pool's blocks, and whose they are.")
@click.option("--show-addresses", "addresses", is_flag=True, help="Who has which address.")
@output_option("table", "json")
@socket_option
def show(blocks: bool, addresses: bool, output: str, path: Path | None) -> None:
    """List the pools of addresses, and how much of them is in use.

    Cooling are addresses that were released and may not be given out yet; reserved ones never are.

    \b
    Example:
      dataplane ipam show -o json | jq '.blocks[] | select(.node == "node1") | .cidr'
    """  # noqa: D301 - click wants the backspace itself
    if blocks and addresses:
        fail_usage(["dataplane: --show-blocks and --show-addresses: choose one"])
    from dataplane.control import client

    books = ask(client.ipam, path)
    if output == "json":
        print_json(books)
        return
    from dataplane.control import views_ipam

    view = views_ipam.holders if addresses else views_ipam.with_blocks if blocks else views_ipam.summary
    print_table(view(books))


@ipam.command()
@click.argument("address", required=False)
@click.option("--node", metavar="NAME", help="All that this node has; it will not come back.")
@socket_option
def release(address: str | None, node: str | None, path: Path | None) -> None:
    """Take back an ADDRESS that no pod has any more, or all that a lost node has left.

    The address of a pod that the cluster knows, and what a node has that is there, is not taken.

    \b
    Examples:
      dataplane ipam release 10.244.3.17
      dataplane ipam release --node node7
    """  # noqa: D301 - click wants the backspace itself
    if (address is None) == (node is None):
        fail_usage(["dataplane: expected an ADDRESS or --node NAME"])
    from dataplane.control import client

    if node is not None:
        report(ask(lambda socket: client.forget_node(socket, node), path))
    elif address is not None:
        report(ask(lambda socket: client.release_address(socket, address), path))
