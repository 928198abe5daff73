"""``dataplane cni``: putting the plugin where container runtimes look for it, and taking it away again."""

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import click

from dataplane import cni as plugin
from dataplane.cli_base import PATH, fail

PLUGIN, CONFIGURATION = "dataplane-cni", "10-dataplane.conflist"
_NETWORK = "dataplane"
_FAILED, _USAGE, _NO_PERMISSION = 1, 2, 5
Command = TypeVar("Command", bound=Callable[..., None])


def _folders(command: Command) -> Command:
    """Give a command the options that say where runtimes look."""
    for name, default, text in (
        ("--conf-dir", "/etc/cni/net.d", "Where runtimes read networks."),
        ("--bin-dir", "/opt/cni/bin", "Where runtimes find plugins."),
    ):
        command = click.option(name, type=PATH, default=default, show_default=True, help=text)(command)
    return command


@click.group("cni")
def cni() -> None:
    """Be the network of a container runtime: containerd, CRI-O, podman.

    The node's file needs api.cni = true.

    \b
    Examples:
      dataplane cni install
      dataplane cni uninstall
    """  # noqa: D301 - click wants the backspace itself


@cni.command()
@_folders
@click.option("--socket", type=PATH, help="The node's control socket; default: the only one in /run/dataplane.")
@click.option("--network", metavar="NAME", default=_NETWORK, show_default=True, help="What the network is called.")
def install(bin_dir: Path, conf_dir: Path, socket: Path | None, network: str) -> None:
    """Write the plugin, and a network that uses it.

    Both files are replaced whole, so this may be done while a runtime is running. The plugin needs this Python and
    nothing that was installed with it.

    \b
    Example:
      dataplane cni install --bin-dir /usr/lib/cni --socket /run/dataplane/node1.sock
    """  # noqa: D301 - click wants the backspace itself
    if not plugin.IDENTIFIER.fullmatch(network):
        fail(f"dataplane: --network {network!r}: expected letters, digits and _ . -", _USAGE)
    _write(bin_dir / PLUGIN, _program(), 0o755)
    _write(conf_dir / CONFIGURATION, _configuration(network, socket), 0o644)


@cni.command()
@_folders
def uninstall(bin_dir: Path, conf_dir: Path) -> None:
    """Remove what install wrote; the network first, so that no runtime starts a container meanwhile."""
    for path in (conf_dir / CONFIGURATION, bin_dir / PLUGIN):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            _fail(path, error)
        click.echo(f"removed {path}")


def _program() -> str:
    """Return the plugin as a program that starts in any environment: no user's and no site's packages."""
    source = Path(plugin.__file__).read_text()
    return f"#!{_interpreter()} -IS\n{source}"


def _interpreter() -> str:
    """Return the Python that outlives our environment; one in a venv is a link to it."""
    path = os.path.realpath(sys.executable)
    if any(character.isspace() for character in path):
        fail(f"dataplane: {path}: a program cannot name an interpreter whose path has spaces", _FAILED)
    return path


def _configuration(network: str, socket: Path | None) -> str:
    """Return the network: ``cniVersion`` is for runtimes that do not know ``cniVersions``."""
    entry: dict[str, object] = {"type": PLUGIN, "capabilities": {"ips": True, "mac": True}}
    if socket is not None:
        entry["socket"] = str(socket.absolute())
    versions = [version for version in plugin.VERSIONS if version >= "0.4.0"]
    content = {"cniVersion": "1.0.0", "cniVersions": versions, "name": network, "plugins": [entry]}
    return json.dumps(content, indent=2) + "\n"


def _write(path: Path, content: str, mode: int) -> None:
    """Write a file whole or not at all; the draft has a name that no runtime reads."""
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(content)
            os.chmod(draft, mode)
            os.replace(draft, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(draft)
            raise
    except OSError as error:
        _fail(path, error)
    click.echo(f"wrote {path}")


def _fail(path: Path, error: OSError) -> None:
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    fail(f"dataplane: {path}: {error.strerror}", _NO_PERMISSION if denied else _FAILED)
