"""The command line.

Nothing here imports numba, numpy, aiohttp or rich before it is needed: ``--help``, ``check`` and ``show`` start in a
tenth of a second. Exit status: 0; 1 failed; 2 usage or configuration; 3 not running; 4 not found; 5 no permission.
"""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dataplane import __version__
from dataplane.cli_base import PATH, ask, count, fail, output_option, report, socket_option
from dataplane.cli_cluster import cluster
from dataplane.cli_cni import cni
from dataplane.cli_dns import dns
from dataplane.cli_edit import conntrack, endpoint, service
from dataplane.cli_ipam import ipam
from dataplane.cli_lab import lab
from dataplane.cli_loadbalancer import loadbalancer
from dataplane.cli_show import show, show_snapshot

if TYPE_CHECKING:
    from dataplane.control.state import Settings

FAILED, NO_PERMISSION, INTERRUPTED = 1, 5, 130
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
    """A Kubernetes node's network in one process: pods, services, VXLAN, and a reason for every lost packet.

    \b
    Start here:
      dataplane run                         a node with three pods and a service (as root)
      dataplane check node.toml             is this file right?
      dataplane show drops                  what was dropped, and why
      dataplane show services               where services are, and who answers
    """  # noqa: D301 - click wants the backspace itself


# --- run, check, reload ----------------------------------------------------------------------------------------------


@cli.command()
@click.option("--config", "-c", type=PATH, help="The node's file; default: a built-in example.")
def run(config: Path | None) -> int:
    """Be the node until Ctrl-C or SIGTERM; SIGHUP reads the file again.

    \b
    Examples:
      dataplane run                         one node, three pods, a service, no uplink
      dataplane run --config node.toml
    """  # noqa: D301 - click wants the backspace itself
    settings = _load(config)
    missing = missing_capabilities(settings)
    if missing:
        fail(f"no permission: needs {' and '.join(missing)}; run as root", NO_PERMISSION)
    # What a start makes stays: to look through it for garbage again and again takes a tenth of the time.
    gc.disable()
    from dataplane import daemon

    try:
        return daemon.run(settings)
    except PermissionError as error:
        fail(f"no permission: {error.filename or ''} {error.strerror or error}".replace(":  ", ": "), NO_PERMISSION)


@cli.command()
@click.argument("file", type=PATH)
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
    pods, peers = count(len(state.pods), "pod"), count(len(state.peers), "peer")
    click.echo(
        f"OK {file}: node {state.node.name}, {pods}, {peers}, {count(len(state.routes), 'static route')}, {uplink}"
    )


@cli.command()
@socket_option
def reload(path: Path | None) -> None:
    """Make the node read its configuration again: all of it, or nothing.

    A file with errors is refused whole and listed; so is a change that needs a restart.

    \b
    Example:
      dataplane reload --socket /run/dataplane/node1.sock
    """  # noqa: D301 - click wants the backspace itself
    from dataplane.control import client

    report(ask(client.reload, path))


# --- status, show, edit ----------------------------------------------------------------------------------------------


@cli.command()
@output_option("table", "json")
@socket_option
def status(output: str, path: Path | None) -> None:
    """Say whether the node runs, since when, and with what.

    Exits with 3 when no node is running.
    """
    show_snapshot("status", output, path)


cli.add_command(show)
cli.add_command(service)
cli.add_command(endpoint)
cli.add_command(conntrack)
cli.add_command(cni)
cli.add_command(lab)
cli.add_command(cluster)
cli.add_command(dns)
cli.add_command(ipam)
cli.add_command(loadbalancer)


# --- failing ---------------------------------------------------------------------------------------------------------


def _load(path: Path | None) -> "Settings":
    from dataplane.config import ConfigError, load

    try:
        return load(path)
    except ConfigError as error:
        fail(str(error), error.exit_code)


def missing_capabilities(settings: "Settings") -> list[str]:
    """Name what the process may not do but the configuration needs: devices, namespaces, raw frames."""
    needed = []
    if settings.state.pods or settings.cni:
        needed += ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]
    if settings.state.uplink and settings.state.uplink.mode == "af_packet":
        needed += ["CAP_NET_RAW"]
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return [name for name in needed if not effective >> _CAPABILITIES[name] & 1]
