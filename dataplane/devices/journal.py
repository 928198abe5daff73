"""A record of everything that a node has made on its host, so that the next start can undo what a killed one left.

One JSON object per line. The first names the owner; each further one is written, and is on disk, *before* the thing it
names is made, and a ``removed`` line follows when the thing is gone again:

    {"owner": 4711, "started": 123456, "boot": "8d0c..."}
    {"id": 1, "kind": "namespace", "path": "/run/netns/web-0"}
    {"made": 1, "cookie": 4108}
    {"id": 2, "kind": "sysctl", "name": "net/ipv4/conf/eth0/accept_local", "old": "0", "new": "1"}
    {"removed": 2}

Appending is enough for crash safety: a line that was cut short names something that was not made yet. An owner is alive
only if the process with its id was started at its time in this boot, since process ids are used again. Two nodes that
start at once are kept apart by a lock on the file, held only while one of them looks and claims.

Recovery is careful with what may belong to somebody else by now: a namespace is removed only when it has the cookie of
the one that was made, and a sysctl is put back only when it still has the value that was set.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dataplane.devices.namespace import (
    NamespaceError,
    NamespaceHandle,
    delete_namespace,
    open_namespace,
    remove_namespace,
    unplace,
)

PROC = Path("/proc")
SYSCTL = PROC / "sys"
START_TIME = 19  # the field of /proc/PID/stat, counted from the one after the command's name (proc_pid_stat(5): 22)


class AlreadyRunningError(Exception):
    """The node that owns the journal is alive.

    Attributes:
        pid: Its process id.
        path: The journal.
    """

    def __init__(self, pid: int, path: Path) -> None:
        super().__init__(f"already running as process {pid} ({path})")
        self.pid, self.path = pid, path


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this or an earlier boot; ``started`` in clock ticks since that boot."""

    pid: int
    started: int
    boot: str

    @property
    def alive(self) -> bool:
        """Whether it runs: a zombie, or another process with its id, does not count."""
        return self == process(self.pid)


def process(pid: int) -> Process | None:
    """Return the running process with this id."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name in parentheses may hold spaces and parentheses
    if fields[0] in ("Z", "X"):
        return None
    return Process(pid, int(fields[START_TIME]), (SYSCTL / "kernel/random/boot_id").read_text().strip())


@dataclass(frozen=True, slots=True)
class Namespace:
    """A named network namespace. ``cookie`` is 0 until it is known: it is announced before it exists."""

    path: str
    cookie: int = 0

    def undo(self) -> str:
        """Remove it, unless the name stands for another namespace by now; return what was done, if anything."""
        if not os.path.exists(self.path):
            return ""
        with suppress(NamespaceError), opened(self.path) as found:
            if self.cookie not in (0, found.cookie):
                return f"namespace {self.path} was left alone: it is not the one that was made"
        return f"namespace {self.path} removed" if delete_namespace(Path(self.path)) else ""


@dataclass(frozen=True, slots=True)
class Interface:
    """A persistent interface, in the namespace with the path ``netns``."""

    name: str
    netns: str

    def undo(self) -> str:
        """Remove it; return what was done, if anything."""
        if not os.path.exists(self.netns):
            return ""
        with opened(self.netns) as found:
            return f"interface {self.name} removed from {self.netns}" if unplace(found, self.name) else ""


@dataclass(frozen=True, slots=True)
class File:
    """A file, such as the one of a unix socket."""

    path: str

    def undo(self) -> str:
        """Remove it; return what was done, if anything."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)
            return f"file {self.path} removed"
        return ""


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A changed setting of the node's own namespace; ``name`` as below /proc/sys: ``net/ipv4/ip_forward``."""

    name: str
    old: str
    new: str

    @classmethod
    def to(cls, name: str, new: str) -> "Sysctl":
        """Return the change of a setting from what it is now."""
        return cls(name, (SYSCTL / name).read_text().strip(), new)

    def apply(self) -> None:
        """Make the change."""
        (SYSCTL / self.name).write_text(self.new)

    def undo(self) -> str:
        """Put the old value back, unless somebody has changed it since; return what was done, if anything."""
        file = SYSCTL / self.name
        if self.old == self.new or not file.exists() or file.read_text().strip() != self.new:
            return ""
        file.write_text(self.old)
        return f"sysctl {self.name} put back to {self.old}"


Thing = Namespace | Interface | File | Sysctl
KINDS: dict[str, type[Thing]] = {"namespace": Namespace, "interface": Interface, "file": File, "sysctl": Sysctl}


@contextmanager
def opened(path: str) -> Iterator[NamespaceHandle]:
    """Open the namespace with this path for the length of a ``with``."""
    handle = open_namespace(path)
    try:
        yield handle
    finally:
        remove_namespace(handle)


class Journal:
    """The journal of this process, made by `claim`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._last = 0

    def record(self, thing: Thing) -> int:
        """Announce a thing, before it is made; return the entry's number."""
        self._last += 1
        self._append({"id": self._last, "kind": type(thing).__name__.lower()} | asdict(thing))
        return self._last

    def made(self, entry: int, cookie: int) -> None:
        """Tell which namespace came of an announced one: recovery removes no other."""
        self._append({"made": entry, "cookie": cookie})

    def removed(self, entry: int) -> None:
        """Tell that the thing is gone again."""
        self._append({"removed": entry})

    def close(self) -> None:
        """Remove the file, as everything that was announced is gone. A second call does nothing."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def hand_over(self) -> None:
        """Leave the file to whoever comes next: what it names stays, and nobody owns it once this process ends."""
        os.close(self._fd)
        self._fd = -1

    def _append(self, line: dict[str, Any]) -> None:
        _write(self._fd, [line])


def claim(path: Path) -> tuple[Journal, list[str]]:
    """Undo what a dead owner left and make the journal this process's own.

    Returns:
        The journal, and a line for each thing that was undone or could not be; the latter stay in the journal.

    Raises:
        AlreadyRunningError: The owner is alive.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as fd:
        left, report = _recover(path, fd)
        owner = process(os.getpid())
        assert owner is not None
        os.ftruncate(fd, 0)
        journal = Journal(path, os.dup(fd))
        journal._append({"owner": owner.pid, "started": owner.started, "boot": owner.boot})
        for thing in left:
            journal.record(thing)
    return journal, report


def recover(path: Path) -> list[str]:
    """Undo what a dead owner left behind and remove its journal; return a line for each thing.

    What could not be undone stays in the journal for the next attempt. Without a journal there is nothing to do.

    Raises:
        AlreadyRunningError: The owner is alive.
    """
    if not path.exists():
        return []
    with _locked(path) as fd:
        left, report = _recover(path, fd)
        os.ftruncate(fd, 0)
        for number, thing in enumerate(left, 1):
            _write(fd, [{"id": number, "kind": type(thing).__name__.lower()} | asdict(thing)])
        if not left:
            path.unlink()
    return report


def contents(path: Path) -> tuple[Process | None, list[Thing]]:
    """Return who owns a journal and what it names, oldest first; None and nothing when there is no journal."""
    try:
        owner, things, _ = _read(path.read_bytes())
    except FileNotFoundError:
        return None, []
    return owner, things


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open and lock the file that the path names, also when another process removes it meanwhile."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is(path, fd):
                yield fd
                return
        finally:
            fcntl.flock(
                fd, fcntl.LOCK_UN
            )  # closing is not enough: the journal keeps a duplicate, which shares the lock
            os.close(fd)


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _write(fd: int, lines: list[dict[str, Any]]) -> None:
    os.write(fd, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    os.fsync(fd)


def _recover(path: Path, fd: int) -> tuple[list[Thing], list[str]]:
    """Undo what a journal names, newest first; return the things that resisted, oldest first, and the report."""
    owner, things, report = _read(os.pread(fd, os.fstat(fd).st_size, 0))
    if owner is not None and owner.alive:
        raise AlreadyRunningError(owner.pid, path)
    left: list[Thing] = []
    for thing in reversed(things):
        try:
            report.append(thing.undo())
        except (OSError, NamespaceError) as error:
            report.append(f"could not undo {thing}: {error}")
            left.insert(0, thing)
    return left, [line for line in report if line]


def _thing(found: dict[str, Any]) -> Thing:
    thing = KINDS[found["kind"]](**{key: value for key, value in found.items() if key not in ("id", "kind")})
    if not all(isinstance(value, int if key == "cookie" else str) for key, value in asdict(thing).items()):
        raise ValueError(found)
    return thing


def _read(text: bytes) -> tuple[Process | None, list[Thing], list[str]]:
    """Return the owner, the things that were not removed, oldest first, and a line for each unreadable line."""
    owner: Process | None = None
    things: dict[int, Thing] = {}
    report = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = json.loads(line)
            if "owner" in found:
                owner = Process(int(found["owner"]), int(found["started"]), str(found["boot"]))
            elif "made" in found:
                if isinstance(made := things[found["made"]], Namespace):
                    things[found["made"]] = replace(made, cookie=int(found["cookie"]))
            elif "removed" in found:
                del things[found["removed"]]
            else:
                things[found["id"]] = _thing(found)
        except (ValueError, TypeError, LookupError, AttributeError):
            report.append(f"line {number} is unreadable")
    return owner, list(things.values()), report
