"""``dataplane lab``: a cluster on this machine, in network namespaces."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dataplane.cli_base import PATH, Command, fail, output_option, print_json, print_table

if TYPE_CHECKING:
    from dataplane.lab_plan import Plan

_NO_PERMISSION, _NOT_EXECUTABLE, _NO_COMMAND = 5, 126, 127  # the last two as a shell has them


def _name_option(command: Command) -> Command:
    return click.option(
        "--name", envvar="DATAPLANE_LAB", help="The lab's name; default: the only one.  [env: DATAPLANE_LAB]"
    )(command)


@click.group()
def lab() -> None:
    """Make a cluster on this machine, in network namespaces.

    Nodes, their pods, a LAN, and a client outside.

    \b
    Examples:
      dataplane lab up                              three nodes, six pods, a service (as root)
      dataplane lab up examples/cluster.toml
      dataplane lab exec client -- curl -s 192.0.2.200
      dataplane lab exec node1 -- dataplane show services
      dataplane lab down
    """  # noqa: D301 - click wants the backspace itself


@lab.command("up")
@click.argument("file", type=PATH, required=False)
@click.option("--name", help="In place of the file's cluster.name: two labs run side by side.")
def up_(file: Path | None, name: str | None) -> None:
    """Set up a lab, and return when all of it is ready.

    The FILE is a cluster.toml; without one it is a built-in example. The lab goes on running until "dataplane lab
    down". What a crash has left of a lab with this name is taken away first.
    """
    from dataplane import config, lab, lab_file, lab_look

    try:
        plan = lab_file.load(file, name or "")
    except config.ConfigError as error:
        fail(str(error), error.exit_code)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # to clean up, as on Ctrl-C
    _guarded(lab.up, plan, click.echo)
    found = lab_look.status(plan)
    click.echo()
    print_table(lab_look.table(found))
    click.echo("\nTry:")
    lines = [line.partition("   # ") for line in lab_look.lines_to_try(plan, found, _program())]
    width = max(len(command) for command, *_ in lines)
    for command, mark, comment in lines:
        click.echo(f"  {command:<{width}}{mark}{comment}".rstrip())


@lab.command("status")
@output_option("table", "json")
@_name_option
def status_(output: str, name: str | None) -> None:
    """List nodes, pods and services, and how they are.

    Exits with 3 when no lab is up, with 1 when not all of it is ready.
    """
    from dataplane import lab_look

    found = lab_look.status(_find(name))
    if output == "json":
        print_json(found)
        raise click.exceptions.Exit(0 if found["ready"] else 1)
    print_table(lab_look.table(found))
    if not found["ready"]:
        dead = ", ".join(each["name"] for each in found["nodes"] if each["state"] != "ready")
        fail(f"not all of it is ready{': ' * bool(dead)}{dead}", 1)


@lab.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_name_option
@click.argument("place")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def exec_(name: str | None, place: str, command: tuple[str, ...]) -> NoReturn:
    """Run a COMMAND in a node, a pod, "client" or "lan".

    Without a COMMAND it is a shell. Its exit status is passed on. In a node "dataplane" talks to that node; in a pod
    names are looked up in cluster DNS.

    \b
    Examples:
      dataplane lab exec web-0 -- ip addr
      dataplane lab exec node2 -- dataplane show conntrack --state ESTABLISHED
      dataplane lab exec client
    """  # noqa: D301 - click wants the backspace itself
    from dataplane import lab_enter

    plan = _find(name)
    words = command[1:] if command[:1] == ("--",) else command
    words = words or (os.environ.get("SHELL") or "/bin/sh",)
    _guarded(lab_enter.enter, plan, place)
    try:
        os.execvp(words[0], words)
    except FileNotFoundError:
        fail(f"{words[0]}: command not found", _NO_COMMAND)
    except OSError as error:
        fail(f"{words[0]}: {(error.strerror or str(error)).lower()}", _NOT_EXECUTABLE)


@lab.command("logs")
@click.argument("what")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added, until Ctrl-C.")
@_name_option
def logs_(what: str, follow: bool, name: str | None) -> None:
    """Print the log of a node, of a pod's server, or of etcd."""
    plan = _find(name)
    path = plan.log(what)
    if "/" in what or not path.exists():
        there = ", ".join(sorted(log.stem for log in plan.folder.glob("*.log")))
        fail(f"no log of {what} in lab {plan.name}; there are {there}", 4)
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-f", str(path)])
    with path.open(errors="replace") as log:
        shutil.copyfileobj(log, sys.stdout)


@lab.command("down")
@_name_option
def down_(name: str | None) -> None:
    """Take everything away: processes, namespaces, files. Also what a crash has left of it."""
    from dataplane import lab

    left = _guarded(lab.down, name or "")
    for line in left:
        click.echo(line, err=True)
    if left:
        fail("not everything could be taken away", 1)


def _find(name: str | None) -> "Plan":
    from dataplane import lab_look

    found: Plan = _guarded(lab_look.find, name or "")
    return found


def _guarded(work: Any, *arguments: Any) -> Any:
    """Return what a function of the lab returns; end the command if it fails."""
    from dataplane.devices.namespace import NamespaceError
    from dataplane.devices.netlink import NetlinkError
    from dataplane.lab_machine import LabError

    try:
        return work(*arguments)
    except LabError as error:
        fail(f"dataplane: {error}", error.exit_code)
    except (NamespaceError, NetlinkError) as error:
        denied = error.errno in (errno.EPERM, errno.EACCES)
        fail(f"dataplane: {error}{'; run as root' if denied else ''}", _NO_PERMISSION if denied else 1)
    except PermissionError as error:
        fail(f"dataplane: no permission: {error.filename or ''} {error.strerror}; run as root", _NO_PERMISSION)


def _program() -> str:
    """Return how this program was called, in a form that works when it is pasted."""
    called = sys.argv[0]
    if os.path.basename(called) == "__main__.py":
        return f"{sys.executable} -m dataplane"
    found = shutil.which("dataplane")
    return "dataplane" if found and os.path.samefile(found, called) else called
