"""Three nodes of a lab with etcd, and in etcd a hundred more with pods and services, as far as a node can tell."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

from bench._scale_traffic import RECORD
from dataplane import lab, lab_file, lab_plan
from dataplane.control.etcd import Etcd, Put
from dataplane.devices import journal
from dataplane.devices.namespace import in_namespace, namespace_path
from dataplane.lab_look import node_state
from dataplane.lab_machine import NODES as NODE_RUN
from dataplane.lab_machine import identity, processes, start, take_away, wait_for

FILE = """
[cluster]
nodes = 3
state = "etcd"
[network]
serviceCIDR = "10.96.0.0/12"
[[pods]]
name = "web"
count = 2
[[pods]]
name = "app"
perNode = 1
"""
PREFIX, EMPTY = "/dataplane/v1", "/empty/v1"
NODES, SERVICES, PODS, BACKENDS = 100, 10_000, 10_000, 10
PROBED, NODE_PORT, PORT = "10.96.0.20", 30081, 9000
RATE = 1000.0  # new flows per second: what "the last packet" is resolved to
_BATCH = 120  # operations of a transaction; etcd takes 128
_FIRST_BLOCK = IPv4Network("10.244.20.0/24")
_FIRST_SERVICE = IPv4Address("10.97.0.0")
_FIRST_NODE = IPv4Address("198.51.100.1")
_PROBE_SECONDS = 0.002
_PATIENCE = 60.0
_TRAFFIC = Path(__file__).with_name("_scale_traffic.py")

Result = TypeVar("Result")


def simulated(prefix: str, small: float = 1.0) -> Iterator[Put]:
    """Yield the keys of a hundred nodes with 10,000 pods and 10,000 services of 10 endpoints, or of a part of these."""
    choose = random.Random(1)
    nodes, services = int(NODES * small), int(SERVICES * small)
    pods = []
    for number in range(nodes):
        name, block = f"sim-{number}", IPv4Network((int(_FIRST_BLOCK.network_address) + (number << 8), 24))
        record = {"addresses": [str(_FIRST_NODE + number)], "podCIDR": [str(block)], "zone": f"z{number % 3}"}
        yield Put(f"{prefix}/nodes/{name}", json.dumps(record))
        yield Put(f"{prefix}/members/{name}", json.dumps({"since": time.time(), "pid": 1, "version": "0"}))
        for pod in range(PODS // NODES):
            pods.append((name, str(block[10 + pod])))
            yield Put(f"{prefix}/pods/{name}/default/pod-{number}-{pod}", json.dumps({"ip": [pods[-1][1]]}))
    for number in range(services):
        port = {"name": "http", "port": 80, "targetPort": 8080}
        keys = {"clusterIPs": [str(_FIRST_SERVICE + number)], "ports": [port]}
        yield Put(f"{prefix}/services/default/service-{number}", json.dumps(keys))
        chosen = choose.sample(pods, BACKENDS)
        yield Put(
            f"{prefix}/endpoints/default/service-{number}/a",
            json.dumps([{"ip": address, "node": node} for node, address in chosen]),
        )


@dataclass(frozen=True)
class Change:
    """One change of an endpoint, in nanoseconds since the put was sent.

    Attributes:
        last: When the last packet came to the old backend; 0 when none did.
        first: When the first came to the new one.
        seen: When a bare client's watch had the news.
    """

    last: int
    first: int
    seen: int


class World:
    """The lab. Use it in ``with``; nothing is left of it."""

    def __init__(self) -> None:
        self.plan = lab_file.parse(FILE, "scale", f"dpb{os.getpid()}")
        self._web = [pod.address for pod in self.plan.pods if pod.name.startswith("web")]
        self._spawned: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "World":
        lab.up(self.plan, lambda line: print(line, file=sys.stderr))
        for pid in (os.getpid(), *self._pids()):
            _put_ahead(pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take everything away; more than once is allowed."""
        for program in self._spawned:
            program.kill()
            program.wait()
        _put_ahead(os.getpid(), "0")
        take_away(self.plan.folder)

    # --- etcd --------------------------------------------------------------------------------------------------------

    def with_etcd(self, work: Callable[[Etcd], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine with a client of the lab's etcd."""

        async def run() -> Result:
            client = Etcd([f"http://{self.plan.switch}:{lab_plan.ETCD_PORT}"])
            try:
                return await work(client)
            finally:
                await client.close()

        with journal.opened(str(namespace_path(self.plan.netns(lab_plan.LAN)))) as handle:
            return in_namespace(handle, lambda: asyncio.run(run()))

    def fill(self, small: float = 1.0) -> int:
        """Write the simulated state, and beside it a prefix with nothing but what probing needs; return its keys."""
        probe = [*self._probe(PREFIX), *self._probe(EMPTY)]
        other = self.plan.nodes[1]
        known = {"addresses": [other.address], "podCIDR": [other.block]}
        probe.append(Put(f"{EMPTY}/nodes/{self.plan.netns(other.name)}", json.dumps(known)))
        keys = [*simulated(PREFIX, small), *probe]

        async def write(client: Etcd) -> int:
            for begin in range(0, len(keys), _BATCH):
                await client.txn([], keys[begin : begin + _BATCH])
            return len(keys)

        return self.with_etcd(write)

    def _probe(self, prefix: str) -> Iterator[Put]:
        port = {"name": "probe", "protocol": "UDP", "port": PORT, "targetPort": PORT}
        node_port = {"type": "NodePort", "clusterIPs": ["10.96.0.21"], "ports": [port | {"nodePort": NODE_PORT}]}
        yield Put(f"{prefix}/services/bench/probed", json.dumps({"clusterIPs": [PROBED], "ports": [port]}))
        yield Put(f"{prefix}/services/bench/started", json.dumps(node_port))
        yield Put(f"{prefix}/endpoints/bench/probed/a", self._backend(0))
        yield Put(f"{prefix}/endpoints/bench/started/a", self._backend(1))

    def _backend(self, which: int) -> str:
        return json.dumps([{"ip": self._web[which]}])

    # --- starting a node ---------------------------------------------------------------------------------------------

    def restart(self, prefix: str = PREFIX) -> float:
        """Start the first node anew; return the microseconds to the first answer through one of its services."""
        self._stop_node()
        text = self.plan.nodes[0].text.replace('2379"] }', f'2379"], prefix = "{prefix}" }}')
        assert prefix in text
        file = self.plan.folder / "node1.toml"
        file.write_text(text)
        echo = self._program("web-1", "echo", str(PORT))
        try:
            began = time.monotonic()
            command = [sys.executable, "-m", "dataplane", "run", "--config", str(file)]
            _put_ahead(start(self.plan.netns("node1"), self.plan.log("node1"), command).pid)
            answered = self._inside(lab_plan.CLIENT, lambda: _first_answer(self.plan.nodes[0].address))
        except TimeoutError:
            raise RuntimeError(f"no answer:\n{self.plan.log('node1').read_text()[-2000:]}") from None
        finally:
            self._end(echo)
        assert wait_for(lambda: node_state(self.plan, self.plan.nodes[0]) == "ready", _PATIENCE)
        return (answered - began) * 1e6

    def memory(self) -> float:
        """Return the resident memory of the first node in MiB."""
        lines = Path(f"/proc/{self._pid()}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    def _pid(self) -> int:
        owner, _ = journal.contents(NODE_RUN / f"{self.plan.netns('node1')}.journal")
        return owner.pid if owner is not None and owner.alive else 0

    def _pids(self) -> Iterator[int]:
        """Yield the nodes and etcd."""
        for short in ("lan", *(node.name for node in self.plan.nodes)):
            with journal.opened(str(namespace_path(self.plan.netns(short)))) as handle:
                yield from processes(frozenset({identity(handle.fd)}))

    def _stop_node(self) -> None:
        pid = self._pid()
        if pid:
            os.kill(pid, signal.SIGTERM)
            assert wait_for(lambda: not self._pid(), _PATIENCE)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    # --- changing an endpoint under traffic --------------------------------------------------------------------------

    def change(self, count: int, pause: float) -> tuple[list[Change], int, int]:
        """Move a service ``count`` times from one pod to another; return the changes, and flows sent and lost."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("web-0", "web-1")]
            receivers = [self._program(file.name, "receive", str(PORT), output=file) for file in files]
            sender = self._program("app-0", "send", PROBED, str(PORT), str(RATE))
            time.sleep(1)
            puts, seen = self.with_etcd(lambda client: self._change(client, count, pause, files))
            sender.send_signal(signal.SIGTERM)
            assert sender.stdout is not None
            sent = int(sender.stdout.read())
            time.sleep(0.2)
            for program in (sender, *receivers):
                self._end(program)
            arrivals = [list(RECORD.iter_unpack(file.read_bytes())) for file in files]
        lost = sent - len({number for arrived in arrivals for _, number in arrived})
        return list(_changes(puts, seen, arrivals)), sent, lost

    async def _change(
        self, client: Etcd, count: int, pause: float, files: Sequence[Path]
    ) -> tuple[list[int], list[int]]:
        """Make the changes, each when the one before has come through, and note when a watch tells of them."""
        key = f"{PREFIX}/endpoints/bench/probed/a"
        puts: list[int] = []
        seen: list[int] = []
        revision = await client.put(key, self._backend(0))

        async def look() -> None:
            async for events in client.watch(key, revision + 1):
                seen.extend(time.time_ns() for _ in events.events)

        looking = asyncio.ensure_future(look())
        await asyncio.sleep(pause)
        for number in range(1, count + 1):
            file = files[number % 2]
            size = file.stat().st_size
            puts.append(time.time_ns())
            await client.put(key, self._backend(number % 2))
            await asyncio.sleep(pause)
            deadline = time.monotonic() + _PATIENCE
            while file.stat().st_size == size:
                assert time.monotonic() < deadline, "no packet came to the new backend"
                await asyncio.sleep(pause / 10)
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        assert len(seen) == count, (len(seen), count)
        return puts, seen

    # --- programs in namespaces --------------------------------------------------------------------------------------

    def _inside(self, short: str, work: Callable[[], Result]) -> Result:
        with journal.opened(str(namespace_path(self.plan.netns(short)))) as handle:
            return in_namespace(handle, work)

    def _program(self, short: str, *arguments: str, output: Path | None = None) -> subprocess.Popen[bytes]:
        command = ["nsenter", f"--net={namespace_path(self.plan.netns(short))}", "--", sys.executable, str(_TRAFFIC)]
        with (output or Path(os.devnull)).open("wb") as file:
            program = subprocess.Popen(
                [*command, *arguments], stdout=file if output else subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        _put_ahead(program.pid)
        self._spawned.append(program)
        if arguments[0] != "send":
            assert program.stderr is not None
            assert b"ready" in program.stderr.readline()
        return program

    def _end(self, program: subprocess.Popen[bytes]) -> None:
        program.terminate()
        program.wait()
        for stream in (program.stdout, program.stderr):
            if stream is not None:
                stream.close()
        self._spawned.remove(program)


def _put_ahead(pid: int, nice: str = "-15") -> None:
    """Give a session the processor before what else the machine does (sched(7), autogroup), as the other benches do."""
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(nice)


def _first_answer(address: str) -> float:
    """Ask a node's port until it answers; return when it did."""
    done = Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.settimeout(_PATIENCE)

        def ask() -> None:
            while not done.wait(_PROBE_SECONDS):
                with suppress(OSError):
                    probe.sendto(b"probe", (address, NODE_PORT))

        asking = Thread(target=ask)
        asking.start()
        try:
            while True:
                with suppress(ConnectionRefusedError):
                    probe.recv(64)
                    return time.monotonic()
        finally:
            done.set()
            asking.join()


def _changes(
    puts: Sequence[int], seen: Sequence[int], arrivals: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[Change]:
    """Yield what became of each change; the n-th, from 1, moves the service to pod ``n % 2``."""
    ends = [*puts[1:], 1 << 62]
    for number, (put, end, noticed) in enumerate(zip(puts, ends, seen, strict=True), 1):
        old = [at for at, _ in arrivals[1 - number % 2] if put <= at < end]
        new = [at for at, _ in arrivals[number % 2] if put <= at < end]
        yield Change(max(old, default=put) - put, min(new) - put, noticed - put)
