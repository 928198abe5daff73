"""What the commands share: options, questions to the node, drawing, failing.

Nothing here imports numba, numpy, aiohttp or rich before it is needed.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
Answer = TypeVar("Answer")

PATH = click.Path(readable=False, path_type=Path)  # what may not be read is ours to say, with our exit status


def socket_option(command: Command) -> Command:
    """Give a command ``--socket``, as its argument ``path``."""
    return click.option(
        "--socket",
        "path",
        type=PATH,
        envvar="DATAPLANE_SOCKET",
        help="The node's control socket; default: the only one in /run/dataplane.  [env: DATAPLANE_SOCKET]",
    )(command)


def output_option(*formats: str) -> Callable[[Command], Command]:
    """Give a command ``-o``."""
    return click.option("-o", "--output", type=click.Choice(formats), default="table", show_default=True)


def ask(request: Callable[[Path], Answer], path: Path | None) -> Answer:
    """Return what the node at ``path``, or the only one, answers; end the command if it does not."""
    from dataplane.control import client

    try:
        return request(path or client.find_socket())
    except client.ControlError as error:
        for line in error.errors:
            click.echo(line, err=True)
        fail(f"dataplane: {error}", error.exit_code)


def report(changes: dict[str, Any]) -> None:
    """Say what an edit has done."""
    for line in changes["applied"]:
        click.echo(line)
    click.echo(f"OK: {count(len(changes['applied']), 'change')}")


def print_json(value: Any) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2))


def print_table(table: Any) -> None:
    """Print a ``View``: drawn on a terminal, plain into a pipe."""
    from dataplane.control import views

    if sys.stdout.isatty():
        views.draw(table)
    else:
        click.echo(views.plain(table), nl=False)


def count(number: int, word: str) -> str:
    """Return ``1 pod``, ``2 pods``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def fail(message: str, code: int) -> NoReturn:
    """End the command with a line on stderr and an exit status."""
    click.echo(message, err=True)
    raise click.exceptions.Exit(code)


def fail_usage(errors: Iterable[str]) -> NoReturn:
    """End the command as one that was called wrongly."""
    fail("\n".join(errors), 2)
