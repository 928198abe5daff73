"""What a lab makes on this machine, and how all of it goes again: namespaces, wires, processes.

The journal in the lab's folder names every namespace before it is made; those of pods stand in the journals of the
nodes that make them. Nothing else needs to be written down, since every process of the lab runs in one of these
namespaces and is found there, whoever has started it: nodes, etcd, the pods' servers, a shell somebody has left open.
So it does not matter who was killed, and when. A namespace counts only while it is the one that was made (its cookie):
what has taken its name since belongs to somebody else.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from dataplane.devices import journal
from dataplane.devices.journal import Journal, Process, opened, process
from dataplane.devices.namespace import (
    EVERYWHERE,
    LOOPBACK,
    NamespaceError,
    NamespaceHandle,
    in_namespace,
    namespace_path,
    open_namespace,
)
from dataplane.devices.netlink import Netlink
from dataplane.devices.veth import add_bridge, add_veth, enslave
from dataplane.lab_plan import CLIENT, LAN, Plan

NODES = Path("/run/dataplane")  # where a node's journal is, after its name
JOURNAL = "journal"
BRIDGE, NIC = "br0", "eth0"
_ROOT = Path(__file__).parent.parent

_PROC = Path("/proc")
_SERVERS_PATIENCE, _NODES_PATIENCE, _KILLED_PATIENCE = 1.0, 15.0, 5.0
_LOOK = 0.01


class LabError(Exception):
    """A lab could not be made, found or taken away.

    Attributes:
        exit_code: What the command exits with.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# --- making ----------------------------------------------------------------------------------------------------------


class Machine:
    """The namespaces of one lab while it is being set up; use it in ``with``, it holds them open."""

    def __init__(self, plan: Plan, book: Journal) -> None:
        self._plan = plan
        self._book = book
        self._stack = ExitStack()
        self._handles: dict[str, NamespaceHandle] = {}

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self) -> None:
        """Make the LAN, the nodes' namespaces and the client's, and connect them; the nodes make those of their pods.

        Raises:
            LabError: A name is taken.
        """
        for short in self._plan.places:
            path = namespace_path(self._plan.netns(short))
            if path.exists():
                raise LabError(f"namespace {path.name} exists already, and is not this lab's (--name gives it another)")
        hosts = {node.name: node.address for node in self._plan.nodes} | {CLIENT: self._plan.client}
        for short in (LAN, *hosts):
            self._namespace(short)
        with in_namespace(self._handles[LAN], Netlink) as switch:
            bridge = add_bridge(switch, BRIDGE, self._plan.mtu)
            switch.add_address(bridge, self._on_lan(self._plan.switch))
            for short, address in hosts.items():
                port = add_veth(switch, short, NIC, self._handles[short].fd, self._plan.mtu)
                enslave(switch, port, bridge)
                self._connect(short, address)

    def _namespace(self, short: str) -> None:
        path = namespace_path(self._plan.netns(short))
        entry = self._book.record(journal.Namespace(str(path)))
        handle = open_namespace(path.name)
        self._stack.callback(os.close, handle.fd)
        self._book.made(entry, handle.cookie)
        self._handles[short] = handle
        in_namespace(handle, lambda: _settle(forward=short == CLIENT))
        with in_namespace(handle, Netlink) as netlink:
            netlink.set_link(LOOPBACK, up=True)

    def _connect(self, short: str, address: str) -> None:
        with in_namespace(self._handles[short], Netlink) as netlink:
            index = netlink.link(NIC).index
            netlink.set_link(index, up=True)
            netlink.add_address(index, self._on_lan(address))
            if short != CLIENT:
                netlink.add_route(index, EVERYWHERE, IPv4Address(self._plan.client))

    def _on_lan(self, address: str) -> IPv4Interface:
        return IPv4Interface(f"{address}/{IPv4Network(self._plan.lan).prefixlen}")


def _settle(forward: bool) -> None:
    """Quieten the kernel of a namespace: no IPv6, and only the router forwards by itself."""
    settings = Path("/proc/sys/net")
    (settings / "ipv4/ip_forward").write_text(str(int(forward)))
    for scope in ("all", "default"):
        (settings / "ipv4/conf" / scope / "rp_filter").write_text("0")
        if (settings / "ipv6").is_dir():
            (settings / "ipv6/conf" / scope / "disable_ipv6").write_text("1")


def start(netns: str, log: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a program in a namespace that outlives us, with its own session and its output in a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            ["nsenter", f"--net={namespace_path(netns)}", "--", *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=_ROOT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


# --- taking away -----------------------------------------------------------------------------------------------------


def is_there(folder: Path) -> bool:
    """Whether a lab, or what a dead one has left, has this folder."""
    return (folder / JOURNAL).exists()


def owner_of(folder: Path) -> Process | None:
    """Return the process that is setting the lab up at this moment."""
    owner, _ = journal.contents(folder / JOURNAL)
    return owner if owner is not None and owner.alive and owner.pid != os.getpid() else None


def take_away(folder: Path) -> list[str]:
    """End every process of a lab and remove everything it has made; return a line for each thing that resisted.

    Raises:
        LabError: Somebody is setting it up at this moment.
    """
    path = folder / JOURNAL
    if (owner := owner_of(folder)) is not None:
        raise LabError(f"lab {folder.name} is being set up by process {owner.pid}")
    own = [thing for thing in journal.contents(path)[1] if isinstance(thing, journal.Namespace)]
    nodes = [NODES / f"{Path(thing.path).name}.journal" for thing in own]
    pods = [
        thing for node in nodes for thing in journal.contents(node)[1] if isinstance(thing, journal.Namespace)
    ]  # fmt: skip
    with _identities(pods) as inner, _identities(own) as outer:
        end(inner, _SERVERS_PATIENCE)
        end(outer, _NODES_PATIENCE)
        report = [line for node in nodes for line in _recover_node(node)]
        # Only the lab's journal leads to the nodes', so the next attempt needs it as long as one of theirs is there.
        whole = not any(map(_is_owed, nodes))
        own_report = _recover(path) if whole else []
    if whole and not _resisted(own_report):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()  # of the last lab
    return _resisted(report + own_report)


def _resisted(report: Iterable[str]) -> list[str]:
    return [line for line in report if line.startswith("could not")]


def _is_owed(path: Path) -> bool:
    """Whether a journal still names something, and no living process will undo it."""
    owner, things = journal.contents(path)
    return bool(things) and (owner is None or not owner.alive)


def _recover_node(path: Path) -> list[str]:
    """Undo what a node has left, and remove the files that are named after it; what resisted keeps its journal."""
    # A process that was killed closes its files when it is in no namespace any more: it may not have ended yet.
    wait_for(lambda: (owner := journal.contents(path)[0]) is None or not owner.alive, _KILLED_PATIENCE)
    try:
        report = journal.recover(path)
    except journal.AlreadyRunningError as error:
        return [f"could not undo what a node has made: {error}, elsewhere"]
    for left in path.parent.glob(f"{path.stem}.*"):
        if left != path:
            left.unlink(missing_ok=True)
    return report


def _recover(path: Path) -> list[str]:
    """Undo what the journal names; it may be this process's own, when setting up has failed."""
    owner, things = journal.contents(path)
    if owner != process(os.getpid()):
        return journal.recover(path)
    report = []
    for thing in reversed(things):
        try:
            report.append(thing.undo())
        except (OSError, NamespaceError) as error:
            report.append(f"could not undo {thing}: {error}")
    return report


@contextmanager
def _identities(spaces: Iterable[journal.Namespace]) -> Iterator[frozenset[tuple[int, int]]]:
    """Hold open those namespaces that are still the ones that were made; they are told by device and inode."""
    with ExitStack() as stack:
        found = set()
        for space in spaces:
            if os.path.exists(space.path):
                with suppress(NamespaceError):
                    handle = stack.enter_context(opened(space.path))
                    if space.cookie in (0, handle.cookie):
                        found.add(identity(handle.fd))
        yield frozenset(found)


def identity(namespace: Path | int) -> tuple[int, int]:
    """Return what tells a namespace, given by a file or a descriptor, from all others that are there now."""
    status = os.stat(namespace)
    return status.st_dev, status.st_ino


def processes(spaces: frozenset[tuple[int, int]]) -> Iterator[int]:
    """Yield the processes in these namespaces, but not ourselves. One that has ended has no namespace any more."""
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if identity(entry / "ns/net") in spaces:
                    yield int(entry.name)


def end(spaces: frozenset[tuple[int, int]], patience: float) -> None:
    """End all processes in these namespaces; those that have not ended in time are killed."""
    if not spaces:
        return
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, _KILLED_PATIENCE)):
        for pid in processes(spaces):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if wait_for(lambda: next(processes(spaces), None) is None, seconds):
            return


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK)
    return True
