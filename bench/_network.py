"""Two pods and something between them: our node, a C loop, or the kernel's own forwarding.

    pod a 10.244.1.10 ── eth0 ═╗               ╔═ eth0 ── pod b 10.244.1.20
                               ╚═ forwarder ═══╝

Each pair is in namespaces of its own, with the same addresses, MTU and gateway. Everything has one prefix, and is gone
when the `Network` is closed: processes first, then namespaces.
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

from dataplane.jit import cache_home

A, B, GATEWAY, GATEWAY_MAC = "10.244.1.10", "10.244.1.20", "169.254.1.1", "ee:ee:ee:ee:ee:ee"
MTU = 1450
ROOT = Path(__file__).parent.parent
NAMESPACES = Path("/run/netns")
SENDER_CPU, FORWARDER_CPU = "0", "1"

NODE = """
[node]
name = "{name}"
[pods]
cidr = ["10.244.1.0/24"]
mtu = {mtu}
[[pods.static]]
name = "a"
netns = "{a}"
ip = ["{address_a}"]
[[pods.static]]
name = "b"
netns = "{b}"
ip = ["{address_b}"]
"""


def run(*command: str) -> str:
    """Run a command that has to succeed and return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def program(name: str) -> str:
    """Compile ``c/NAME.c`` and return the path of the program."""
    source = Path(__file__).with_name("c") / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    path = cache_home().parent / "bench" / f"{name}-{digest}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        run("gcc", "-O3", "-march=native", "-Wall", "-o", str(part), str(source))
        part.rename(path)
    return str(path)


def inside(namespace: str, *command: str, cpu: str = "") -> list[str]:
    """Return the command that runs another one in a namespace, on one core if given."""
    return ["nsenter", f"--net={NAMESPACES / namespace}", "--", *ahead(*command, cpu=cpu)]


def ahead(*command: str, cpu: str = "") -> list[str]:
    """Return the command that runs another one ahead of what else the machine does, on one core if given.

    Sessions share the processor before their processes do (sched(7), autogroup), so each command has its own.
    """
    pinned = ["taskset", "-c", cpu] if cpu else []
    first = 'echo -15 2>/dev/null > /proc/self/autogroup; exec "$@"'
    return ["setsid", "sh", "-c", first, "sh", *pinned, *command]


class Quiet:
    """Repeats what was measured while something else used the forwarder's core: the kernel's ksoftirqd has no priority.

    A forwarder's own user time is little: ours spends 19 of 20 ticks in system calls. What is above ``LIMIT`` of a core
    is somebody else's, and would make the kernel's figures worse than ours, which has priority.
    """

    LIMIT = 0.15

    def __init__(self, repetitions: int) -> None:
        self.left, self.turns, self.noisy = repetitions, 0, 0

    def __call__(self, measure: Callable[[], float]) -> float:
        """Return what ``measure`` returns when it is not disturbed, or, in the end, whatever it returns."""
        self.turns += 1
        while True:
            ticks, begin = _user_ticks(), time.monotonic()
            value = measure()
            share = (_user_ticks() - ticks) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begin)
            if share < self.LIMIT:
                return value
            if self.left == 0:
                self.noisy += 1
                return value
            self.left -= 1

    def warn(self) -> None:
        """Say on standard error if the machine was never quiet for some of the turns."""
        if self.noisy:
            print(
                f"not to be compared: others ran on core {FORWARDER_CPU} in {self.noisy} of {self.turns} turns",
                file=sys.stderr,
            )


def _user_ticks() -> int:
    lines = Path("/proc/stat").read_text().splitlines()
    fields = next(line.split() for line in lines if line.startswith(f"cpu{FORWARDER_CPU} "))
    return int(fields[1]) + int(fields[2])


class Pair:
    """Two pods; ``a`` and ``b`` are their namespaces."""

    def __init__(self, a: str, b: str) -> None:
        self.a, self.b = a, b


class Network:
    """Everything that one run of the bench makes."""

    def __init__(self) -> None:
        self.prefix = f"dpb{os.getpid()}-"
        self._stack = ExitStack()

    def close(self) -> None:
        """Take everything away; more than once is allowed."""
        self._stack.close()

    def start(self, command: Sequence[str], ready: str) -> subprocess.Popen[str]:
        """Start a program that lives as long as the network and wait until it prints a line with ``ready``."""
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        self._stack.callback(stop, process)
        assert process.stdout is not None
        for line in process.stdout:
            if ready in line:
                # What else it says is read too, or it would wait for that at the end.
                Thread(target=process.stdout.read, daemon=True).start()
                return process
        raise RuntimeError(f"{' '.join(command)} ended before it was ready")

    def namespace(self, name: str) -> str:
        """Make a namespace and return its full name."""
        full = self.prefix + name
        run("ip", "netns", "add", full)
        self._stack.callback(subprocess.run, ["ip", "netns", "del", full], check=False, capture_output=True)
        run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    # --- the forwarders ----------------------------------------------------------------------------------------------

    def ours(self, name: str = "node", more: str = "") -> Pair:
        """Start our node, with ``more`` in its file; it makes the pods."""
        host = self.namespace(name)
        pair = Pair(f"{host}-a", f"{host}-b")
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        config = Path(folder, "node.toml")
        text = NODE.format(name=host, mtu=MTU, a=pair.a, b=pair.b, address_a=A, address_b=B)
        config.write_text(text + more, encoding="utf-8")
        command = (sys.executable, "-m", "dataplane", "run", "--config", str(config))
        self.start(inside(host, *command, cpu=FORWARDER_CPU), " ready ")
        return pair

    def loop(self, virtio: bool) -> Pair:
        """Start the C loop between two TAPs."""
        name = "loop" if virtio else "plain"
        pair = Pair(self.namespace(f"{name}-a"), self.namespace(f"{name}-b"))
        paths = [str(NAMESPACES / namespace) for namespace in (pair.a, pair.b)]
        self.start(ahead(program("tap_loop"), *paths, str(int(virtio)), cpu=FORWARDER_CPU), "ready")
        _address(pair)
        return pair

    def kernel(self, name: str = "kernel") -> Pair:
        """Let the kernel forward between two veth pairs."""
        host, pair = self.namespace(name), Pair(self.namespace(f"{name}-a"), self.namespace(f"{name}-b"))
        run(*inside(host, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"))
        for link, namespace in (("to-a", pair.a), ("to-b", pair.b)):
            ends = ("name", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            run("ip", "-n", host, "link", "add", *ends)
            run("ip", "-n", host, "link", "set", link, "address", GATEWAY_MAC, "mtu", str(MTU), "up")
        _address(pair)
        for link, namespace, address in (("to-a", pair.a, A), ("to-b", pair.b, B)):
            run("ip", "-n", host, "route", "add", address, "dev", link)
            run("ip", "-n", host, "neigh", "add", address, "lladdr", _mac(namespace), "dev", link)
        return pair

    def spread(self, cores: int, name: str = "kernel") -> None:
        """Say whether the kernel forwards on the sender's core (1) or on the other one (2: receive packet steering)."""
        mask = "0" if cores == 1 else f"{1 << int(FORWARDER_CPU):x}"
        for link in ("to-a", "to-b"):
            path = f"/sys/class/net/{link}/queues/rx-0/rps_cpus"
            run("ip", "netns", "exec", f"{self.prefix}{name}", "sh", "-c", f"echo {mask} > {path}")


def stop(process: subprocess.Popen[str], patience: float = 0.0) -> None:
    """End a program that has not ended by itself after ``patience`` seconds; one that ignores SIGTERM is killed."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _mac(namespace: str) -> str:
    return run("ip", "-n", namespace, "-br", "link", "show", "dev", "eth0").split()[2]


def _address(pair: Pair) -> None:
    """Configure both pods as our node does: a /32 address and a gateway that need not be asked for."""
    for namespace, address in ((pair.a, A), (pair.b, B)):
        run("ip", "-n", namespace, "link", "set", "eth0", "mtu", str(MTU), "up")
        run("ip", "-n", namespace, "address", "add", f"{address}/32", "dev", "eth0")
        run("ip", "-n", namespace, "neigh", "add", GATEWAY, "lladdr", GATEWAY_MAC, "dev", "eth0")
        run("ip", "-n", namespace, "route", "add", GATEWAY, "dev", "eth0", "scope", "link")
        run("ip", "-n", namespace, "route", "add", "default", "via", GATEWAY, "dev", "eth0")
