"""Networks of real namespaces, for tests that send real packets.

A `Network` makes everything under one prefix, ``dpt<pid>-<start time>-<number>-``, and takes it away when it is closed:
processes first, then namespaces, and with them their links. What a killed run left behind is swept by the next one,
which knows from pid and start time that the owner is dead. Commands run through nsenter(1) and not ``ip netns exec``,
which would hide the namespaces that a node makes from everybody else (see dataplane/devices/namespace.py).

Nothing sleeps: a process is waited for by the line it prints, a state of the network by `eventually`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Network
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from dataplane.control import client
from dataplane.control.snapshot import Kind
from dataplane.devices.journal import process
from dataplane.devices.namespace import DIRECTORY, delete_namespace
from dataplane.lab_machine import identity, processes

ROOT = Path(__file__).parent.parent.parent
TOOLS = Path(__file__).parent / "tools"
RUN = Path("/run/dataplane")
LABS = RUN / "lab"
NUMBERS = count(1)  # of this process's networks
OWNED = re.compile(r"dpt(\d+)-([0-9a-f]+)-\d+-")

READY_TIMEOUT = 300.0  # the first start compiles the kernels: minutes when the machine is busy
STOP_TIMEOUT = 10.0
TIMEOUT = 30.0

Argument = str | float | Path | IPv4Address | IPv4Network
Result = TypeVar("Result")


def ip(*arguments: Argument) -> str:
    """Run ip(8) and return what it prints."""
    return run(["ip", *map(str, arguments)])


def eventually(condition: Callable[[], Result], timeout: float = 5.0) -> Result:
    """Return the condition's first true value; fail with its last one when none comes in time."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {timeout:.0f} s"
        time.sleep(0.01)
    return value


class Process:
    """A program in a namespace, and the lines it has printed to either of its outputs."""

    def __init__(self, arguments: list[str], cwd: Path | None = None) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.pop("NUMBA_DISABLE_JIT", None)  # the program is tested as it is run, also when the rest is not
        self._popen = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=cwd, env=environment, errors="replace",
        )  # fmt: skip
        self.arguments = arguments
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def output(self) -> str:
        """All lines so far."""
        return "\n".join(self.lines)

    def expect(self, pattern: str, timeout: float = TIMEOUT, *, start: int = 0) -> str:
        """Wait for a line that the pattern matches somewhere, from line ``start`` on, and return it."""
        expression, seen = re.compile(pattern), start
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if expression.search(line):
                        return line
                seen = max(seen, len(self.lines))
                ended = not self._reader.is_alive()
                left = deadline - time.monotonic()
                if ended or left <= 0:
                    why = f"ended with {self._popen.poll()}" if ended else f"printed none in {timeout:.0f} s"
                    raise AssertionError(f"no line with {pattern!r}: {' '.join(self.arguments)} {why}:\n{self.output}")
                self._news.wait(min(left, 0.1))  # the reader's last notification may come before it is dead

    def send(self, number: int) -> None:
        """Send a signal."""
        self._popen.send_signal(number)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for the end and return the exit status."""
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {' '.join(self.arguments)}:\n{self.output}") from None
        self._reader.join(timeout)
        return code

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    def stop(self, number: int = signal.SIGTERM, timeout: float = STOP_TIMEOUT) -> int:
        """Send a signal, wait for the end and return the exit status; a process that ignores it is killed."""
        with suppress(ProcessLookupError):
            self._popen.send_signal(number)
        try:
            return self.wait(timeout)
        finally:
            self.close()

    def close(self) -> None:
        """Kill it if it runs; a second call does nothing."""
        if self.running:
            self._popen.kill()
        self._popen.wait()
        self._reader.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()


class Namespace:
    """A network namespace by name, and the commands that run in it."""

    def __init__(self, network: "Network", name: str) -> None:
        self.network, self.name = network, name
        self.path = DIRECTORY / name

    def command(self, *arguments: Argument) -> list[str]:
        """Return the command that runs another one in this namespace."""
        return ["nsenter", f"--net={self.path}", "--", *map(str, arguments)]

    def run(self, *arguments: Argument, check: bool = True, timeout: float = TIMEOUT) -> str:
        """Run a command and return what it prints (both outputs); with ``check`` it has to succeed."""
        return run(self.command(*arguments), check=check, timeout=timeout)

    def spawn(self, *arguments: Argument) -> Process:
        """Start a command that is stopped with the network at the latest."""
        return self.network.own(Process(self.command(*arguments)))

    def tool(self, name: str, *arguments: Argument) -> list[Argument]:
        """Return the command line of one of the scripts in tools/."""
        return [sys.executable, TOOLS / f"{name}.py", *arguments]

    def ip(self, *arguments: Argument) -> str:
        """Run ip(8) in here."""
        return ip("-n", self.name, *arguments)

    def sysctl(self, name: str, value: int | str) -> None:
        """Set a sysctl, given as ``net/ipv4/ip_forward``."""
        self.run("sh", "-c", f"echo {value} > /proc/sys/{name}")

    @contextmanager
    def capture(self, interface: str, expression: str = "") -> Iterator[Path]:
        """Capture an interface for the length of a ``with``; the file is complete afterwards."""
        path = self.network.directory / f"{self.name}-{interface}-{next(self.network.numbers)}.pcap"
        capture = self.spawn(
            "tcpdump", "-i", interface, "-U", "-s", 0, "-B", 16384, "-w", path, "-Z", "root", expression
        )
        capture.expect("listening on")
        try:
            yield path
            eventually(lambda: _all_written(capture))
        finally:
            capture.stop(signal.SIGINT)


def _all_written(tcpdump: Process) -> bool:
    """Ask tcpdump how it is doing: what still waits in its ring would be lost when it ends."""
    start = len(tcpdump.lines)
    tcpdump.send(signal.SIGUSR1)
    counts = re.findall(r"(\d+) packets?", tcpdump.expect("packets? captured", start=start))
    assert counts[2] == "0", f"the kernel dropped frames before tcpdump saw them: {counts}"
    return bool(counts[0] == counts[1])


class Node:
    """One of our nodes, run by the command line as a user runs it."""

    def __init__(self, network: "Network", namespace: Namespace, name: str, config: str) -> None:
        self.network, self.namespace = network, namespace
        self.name = name
        self.config = network.directory / f"{name}.toml"
        self.socket = RUN / f"{name}.sock"
        self.journal = RUN / f"{name}.journal"
        self.process: Process | None = None
        self.write(config)

    def write(self, config: str) -> None:
        """Write the node's file."""
        self.config.write_text(config)

    def launch(self, *prefix: str) -> Process:
        """Start the program, if given by way of another one (env, setpriv), without waiting for anything."""
        command = self.namespace.command(*prefix, sys.executable, "-m", "dataplane", "run", "--config", self.config)
        self.process = self.network.own(Process(command, cwd=ROOT))
        return self.process

    def start(self) -> "Node":
        """Start the program and wait until packets flow and, a moment later, the control socket answers."""
        self.launch().expect(r"\bready\b", READY_TIMEOUT)
        eventually(lambda: client.listens(self.socket), READY_TIMEOUT)
        return self

    @property
    def log(self) -> list[str]:
        """The lines of the program so far."""
        return self._running.lines

    @property
    def _running(self) -> Process:
        assert self.process is not None, f"{self.name} was not started"
        return self.process

    def stop(self) -> int:
        """End it by SIGTERM and return its exit status."""
        return self._running.stop()

    def kill(self) -> None:
        """End it as a crash does, by SIGKILL."""
        self._running.stop(signal.SIGKILL)

    def hang_up(self) -> None:
        """Send SIGHUP: read the configuration again."""
        self._running.send(signal.SIGHUP)

    def cli(self, *arguments: str, check: bool = True) -> str:
        """Run ``dataplane`` with this node's socket in the environment."""
        command = ["env", f"DATAPLANE_SOCKET={self.socket}", sys.executable, "-m", "dataplane", *arguments]
        return run(command, check=check)

    def fail(self, *arguments: str) -> tuple[str, int]:
        """Run ``dataplane`` where it is expected to fail; return what it says and its exit status."""
        command = ["env", f"DATAPLANE_SOCKET={self.socket}", sys.executable, "-m", "dataplane", *arguments]
        running = self.network.own(Process(command, cwd=ROOT))
        code = running.wait()
        return running.output, code

    def show(self, kind: Kind) -> Any:
        """Return what ``dataplane show KIND -o json`` prints, without starting a process for it."""
        return client.get(self.socket, kind)

    def status(self) -> Any:
        """Return ``dataplane status -o json``."""
        return json.loads(self.cli("status", "-o", "json"))


class Network:
    """Everything one test module makes. Use it in ``with``; everything is gone afterwards, also when a test fails."""

    def __init__(self, directory: Path) -> None:
        me = process(os.getpid())
        assert me is not None
        self.prefix = f"dpt{me.pid}-{me.started:x}-{next(NUMBERS)}-"
        self.directory = directory
        self._processes: list[Process] = []
        self.numbers = count(1)

    def __enter__(self) -> "Network":
        sweep()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for running in reversed(self._processes):
                if running.running:
                    running.send(signal.SIGTERM)
            for running in reversed(self._processes):
                with suppress(AssertionError):
                    running.wait(STOP_TIMEOUT)
                running.close()
        finally:
            remove_all(self.prefix)

    def own(self, running: Process) -> Process:
        """Stop this process with the network."""
        self._processes.append(running)
        return running

    def pod(self, name: str) -> Namespace:
        """Return the namespace of this short name, whoever makes it."""
        return Namespace(self, self.prefix + name)

    def namespace(self, name: str, *, forward: bool = False) -> Namespace:
        """Make a namespace with lo up. Without ``forward`` its kernel does not route: only our node does."""
        found = self.pod(name)
        ip("netns", "add", found.name)
        found.ip("link", "set", "lo", "up")
        found.sysctl("net/ipv4/ip_forward", int(forward))
        for scope in ("all", "default"):
            found.sysctl(f"net/ipv6/conf/{scope}/disable_ipv6", 1)  # its neighbor discovery disturbs exact counters
            found.sysctl(f"net/ipv4/conf/{scope}/rp_filter", 0)
        return found

    def remove(self, namespace: Namespace) -> None:
        """Remove a namespace that the test itself has made."""
        delete_namespace(namespace.path)

    def wire(self, left: tuple[Namespace, str], right: tuple[Namespace, str], mtu: int = 1500) -> None:
        """Connect two namespaces by a veth pair, both ends up."""
        (here, here_name), (there, there_name) = left, right
        here.ip(
            "link",
            "add",
            here_name,
            "mtu",
            mtu,
            "type",
            "veth",
            "peer",
            "name",
            there_name,
            "mtu",
            mtu,
            "netns",
            there.name,
        )
        here.ip("link", "set", here_name, "up")
        there.ip("link", "set", there_name, "up")

    def lan(self, *hosts: tuple[Namespace, str], name: str = "lan", mtu: int = 1500) -> Namespace:
        """Make a bridge in its own namespace and give each host an ``eth0`` on it, with its address (192.0.2.1/24).

        The bridge's port to the n-th host, from 1, is called ``port<n>``.
        """
        switch = self.namespace(name)
        switch.ip("link", "add", "br0", "mtu", mtu, "type", "bridge")
        switch.ip("link", "set", "br0", "up")
        for number, (host, address) in enumerate(hosts, 1):
            self.wire((switch, f"port{number}"), (host, "eth0"), mtu)
            switch.ip("link", "set", f"port{number}", "master", "br0")
            host.ip("address", "add", address, "dev", "eth0")
        return switch

    def node(self, namespace: Namespace, name: str, config: str) -> Node:
        """Return one of our nodes, not started; ``{prefix}`` in the configuration stands for the network's prefix."""
        return Node(self, namespace, self.prefix + name, config.replace("{prefix}", self.prefix))


def sweep() -> None:
    """Remove what runs that were killed have left: their processes, namespaces and files."""
    names = [*os.listdir(DIRECTORY)] if DIRECTORY.is_dir() else []
    for folder in (RUN, LABS):
        names += [*os.listdir(folder)] if folder.is_dir() else []
    for prefix in {found[0] for name in names if (found := OWNED.match(name)) and not _owner_lives(found)}:
        remove_all(prefix)


def _owner_lives(found: re.Match[str]) -> bool:
    owner = process(int(found[1]))
    return owner is not None and owner.started == int(found[2], 16)


def remove_all(prefix: str) -> None:
    """Kill what runs in the namespaces with this prefix, and remove them and the nodes' files."""
    paths = list(DIRECTORY.glob(f"{prefix}*"))
    for pid in processes(frozenset(identity(path) for path in paths)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in paths:
        delete_namespace(path)
    for path in RUN.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)
    for path in LABS.glob(f"{prefix}*"):
        shutil.rmtree(path)


def left_over(prefix: str) -> list[str]:
    """Return the namespaces, files and labs with this prefix."""
    return sorted(str(path) for folder in (DIRECTORY, RUN, LABS) for path in folder.glob(f"{prefix}*"))


def run(command: list[str], *, check: bool = True, timeout: float = TIMEOUT) -> str:
    """Run a command and return what it prints to both outputs; with ``check`` it has to succeed."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout, cwd=ROOT, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout
