"""``dataplane dns``: what the node answers to names, and why."""

from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from dataplane.cli_base import ask, fail, output_option, print_json, socket_option
from dataplane.cli_show import show_snapshot

_NOT_FOUND = 4


@click.group()
def dns() -> None:
    """Ask the node for names of the cluster, as its pods do.

    \b
    Examples:
      dataplane dns query web
      dataplane dns query _http._tcp.web.default.svc.cluster.local. SRV
      dataplane dns status
    """  # noqa: D301 - click wants the backspace itself


@dns.command()
@output_option("table", "json")
@socket_option
def status(output: str, path: Path | None) -> None:
    """Count the questions and answers, and say how the upstreams are doing."""
    show_snapshot("dns", output, path)


@dns.command()
@click.argument("name")
@click.argument("kind", metavar="[TYPE]", default="A")
@click.option("-n", "--namespace", default="default", show_default=True, help="Of the pod that would ask.")
@output_option("table", "json")
@socket_option
def query(name: str, kind: str, namespace: str, output: str, path: Path | None) -> None:
    """Say what a pod that asks for NAME is answered, and why.

    A name without a last dot is searched for as in a pod: in its namespace, in svc, in the cluster's domain, and as it
    stands (ndots:5). Exits with 4 when there is no such name.

    \b
    Examples:
      dataplane dns query web
      dataplane dns query 20.0.96.10.in-addr.arpa. PTR
      dataplane dns query www.example.com AAAA -o json
    """  # noqa: D301 - click wants the backspace itself
    from dataplane.control import client

    target = f"dns/query?{urlencode({'name': name, 'type': kind, 'namespace': namespace})}"
    answer: dict[str, Any] = ask(lambda socket: client.get(socket, target), path)
    if output == "json":
        print_json(answer)
    else:
        for row in answer["records"]:
            click.echo(f"{row['name']}\t{row['ttl']}\tIN\t{row['type']}\t{row['data']}")
        for row in answer["tried"]:
            click.echo(f"; {row['name']} {row['rcode']}: {row['why']}")
    if answer["rcode"] != "NOERROR":
        fail(f"dataplane: {answer['rcode']}: {answer['why']}", _NOT_FOUND)
