"""The command line.

Nothing here imports numba, numpy, aiohttp or rich before it is needed: ``--help``, ``check`` and ``show`` start in a
tenth of a second. Exit status: 0; 1 failed; 2 usage or configuration; 3 not running; 4 not found; 5 no permission.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from dataplane import __version__

if TYPE_CHECKING:
    from dataplane.control.snapshot import Kind
    from dataplane.control.state import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

FAILED, NO_PERMISSION, INTERRUPTED = 1, 5, 130
_PATH = click.Path(readable=False, path_type=Path)  # what may not be read is ours to say, with our exit status
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21}  # linux/capability.h


def main() -> NoReturn:
    """Run the command line; quiet when a pipe closes or Ctrl-C is pressed."""
    try:
        code = cli.main(prog_name="dataplane", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        code = FAILED
    sys.exit(code if isinstance(code, int) else 0)


class _Quiet(click.Group):
    """A group that says nothing on Ctrl-C; click would print an empty line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(
    cls=_Quiet,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 failed, 2 usage or configuration, 3 not running, 4 not found, 5 no permission.",
)
@click.version_option(__version__, prog_name="dataplane", message="%(prog)s %(version)s")
def cli() -> None:
    """A Kubernetes node's network in one process: pod links, routes, VXLAN, and a reason for every lost packet.

    \b
    Start here:
      dataplane run                         a node with two pods (as root)
      dataplane check node.toml             is this file right?
      dataplane show drops                  what was dropped, and why
    """  # noqa: D301 - click wants the backspace itself


# --- run, check, reload ----------------------------------------------------------------------------------------------


@cli.command()
@click.option("--config", "-c", type=_PATH, help="The node's file; default: a built-in example.")
def run(config: Path | None) -> int:
    """Be the node until Ctrl-C or SIGTERM; SIGHUP reads the file again.

    \b
    Examples:
      dataplane run                         one node, two pods, no uplink
      dataplane run --config node.toml
    """  # noqa: D301 - click wants the backspace itself
    settings = _load(config)
    missing = missing_capabilities(settings)
    if missing:
        _fail(f"no permission: needs {' and '.join(missing)}; run as root", NO_PERMISSION)
    from dataplane import daemon

    try:
        return daemon.run(settings)
    except PermissionError as error:
        _fail(f"no permission: {error.filename or ''} {error.strerror or error}".replace(":  ", ": "), NO_PERMISSION)


@cli.command()
@click.argument("file", type=_PATH)
def check(file: Path) -> None:
    """Check a configuration FILE without starting anything.

    Prints one line when it is right, else every error with its line, and exits with 2.

    \b
    Example:
      dataplane check node.toml && dataplane reload
    """  # noqa: D301 - click wants the backspace itself
    settings = _load(file)
    state = settings.state
    uplink = f"uplink {state.uplink.interface}" if state.uplink else "no uplink"
    pods, peers = _count(len(state.pods), "pod"), _count(len(state.peers), "peer")
    click.echo(
        f"OK {file}: node {state.node.name}, {pods}, {peers}, {_count(len(state.routes), 'static route')}, {uplink}"
    )


def _socket_option(command: Command) -> Command:
    return click.option(
        "--socket",
        "path",
        type=_PATH,
        envvar="DATAPLANE_SOCKET",
        help="The node's control socket; default: the only one in /run/dataplane.  [env: DATAPLANE_SOCKET]",
    )(command)


@cli.command()
@_socket_option
def reload(path: Path | None) -> None:
    """Make the node read its configuration again: all of it, or nothing.

    A file with errors is refused whole and listed; so is a change that needs a restart.

    \b
    Example:
      dataplane reload --socket /run/dataplane/node1.sock
    """  # noqa: D301 - click wants the backspace itself
    from dataplane.control import client

    result = _ask(lambda: client.reload(path or client.find_socket()))
    for line in result["applied"]:
        click.echo(line)
    click.echo(f"OK: {_count(len(result['applied']), 'change')}")


# --- status and show -------------------------------------------------------------------------------------------------


def _output_option(*formats: str) -> Callable[[Command], Command]:
    return click.option("-o", "--output", type=click.Choice(formats), default="table", show_default=True)


@cli.command()
@_output_option("table", "json")
@_socket_option
def status(output: str, path: Path | None) -> None:
    """Say whether the node runs, since when, and with what.

    Exits with 3 when no node is running.
    """
    _show("status", output, path)


@cli.group()
def show() -> None:
    """Look into the running node.

    \b
    Examples:
      dataplane show interfaces
      dataplane show drops --all
      dataplane show routes -o iproute
      dataplane show counters -o json | jq .dropped
    """  # noqa: D301 - click wants the backspace itself


@show.command()
@_output_option("table", "json")
@_socket_option
def interfaces(output: str, path: Path | None) -> None:
    """List the devices, with their counters."""
    _show("interfaces", output, path)


@show.command()
@_output_option("table", "json", "iproute")
@_socket_option
def routes(output: str, path: Path | None) -> None:
    """List the routing table; "-o iproute" as "ip route" prints it."""
    _show("routes", output, path)


@show.command()
@_output_option("table", "json")
@_socket_option
def arp(output: str, path: Path | None) -> None:
    """List the neighbors on the uplink."""
    _show("arp", output, path)


@show.command()
@_output_option("table", "json")
@_socket_option
def vteps(output: str, path: Path | None) -> None:
    """List the other nodes' ends of the tunnel."""
    _show("vteps", output, path)


@show.command()
@click.option("--all", "every", is_flag=True, help="Also reasons that no packet has met.")
@_output_option("table", "json")
@_socket_option
def drops(every: bool, output: str, path: Path | None) -> None:
    """List why packets were dropped, the most frequent reason first."""
    _show("drops", output, path, "all_drops" if every else "drops")


@show.command()
@_output_option("table", "json")
@_socket_option
def counters(output: str, path: Path | None) -> None:
    """Show the totals, and that every packet is accounted for."""
    _show("counters", output, path)


@show.command()
@_output_option("table", "json")
@_socket_option
def pipeline(output: str, path: Path | None) -> None:
    """List the stages, and how many packets each took out."""
    _show("pipeline", output, path)


def _show(kind: "Kind", output: str, path: Path | None, view: str = "") -> None:
    from dataplane.control import client

    snapshot: Any = _ask(lambda: client.get(path or client.find_socket(), kind))
    if output == "json":
        click.echo(json.dumps(snapshot, indent=2))
        return
    from dataplane.control import views

    if output == "iproute":
        click.echo(views.iproute(snapshot), nl=False)
        return
    table = getattr(views, view or kind)(snapshot)
    if sys.stdout.isatty():
        views.draw(table)
    else:
        click.echo(views.plain(table), nl=False)


# --- failing ---------------------------------------------------------------------------------------------------------


def _load(path: Path | None) -> "Settings":
    from dataplane.config import ConfigError, load

    try:
        return load(path)
    except ConfigError as error:
        _fail(str(error), error.exit_code)


def _ask(request: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from dataplane.control.client import ControlError

    try:
        return request()
    except ControlError as error:
        for line in error.errors:
            click.echo(line, err=True)
        _fail(f"dataplane: {error}", error.exit_code)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _fail(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    raise click.exceptions.Exit(code)


def missing_capabilities(settings: "Settings") -> list[str]:
    """Name what the process may not do but the configuration needs: devices, namespaces, raw frames."""
    needed = []
    if settings.state.pods:
        needed += ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]
    if settings.state.uplink and settings.state.uplink.mode == "af_packet":
        needed += ["CAP_NET_RAW"]
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return [name for name in needed if not effective >> _CAPABILITIES[name] & 1]
