"""A real etcd for tests: one member with a data directory of its own, on loopback or in a namespace.

    with EtcdServer(tmp_path) as server:
        client = Etcd([server.url])

In a namespace: ``EtcdServer(path, within=namespace.command(), host="192.0.2.100")``; its ports are then etcd's own.
It can be killed and started again with the same data, at the same URL. The kernel ends it with the process that started
it, also when that is killed.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0


class EtcdServer:
    """One etcd that runs from ``start`` to ``stop``.

    Args:
        directory: For its data and its log.
        within: The command that runs another one in a namespace; nothing: in this one, at free ports.
        host: The address to listen on.
    """

    def __init__(self, directory: Path, within: Sequence[str] = (), host: str = "127.0.0.1") -> None:
        self._directory = directory
        self._within = list(within)
        client, peer = (2379, 2380) if within else _free_ports()
        self.url = f"http://{host}:{client}"
        self._peer = f"http://{host}:{peer}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, with the data that it had, and wait until it answers."""
        program = shutil.which("etcd")
        assert program is not None, "no etcd: apt-get install etcd-server"
        command = [*self._within, "setpriv", "--pdeathsig", "KILL", program]
        command += ["--data-dir", str(self._directory / "etcd")]
        command += ["--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += ["--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer]
        command += ["--initial-cluster", f"default={self._peer}", "--log-level", "error"]
        command += ["--heartbeat-interval", "20", "--election-timeout", "200"]  # it starts sooner; leases: 1 s or more
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            assert self._process.poll() is None, (self._directory / "etcd.log").read_text()
            assert time.monotonic() < deadline, f"etcd does not answer at {self.url}"
            time.sleep(0.02)

    def stop(self) -> None:
        """End it by SIGTERM."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it by SIGKILL, if it runs."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Let it hang: connections stay open and nothing is answered, until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(STOP_TIMEOUT)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    # --- what a test may do behind everybody's back -------------------------------------------------------------------

    def put(self, key: str, value: Any) -> int:
        """Set a key to a text, or to anything else as JSON; return the revision."""
        text = value if isinstance(value, str) else json.dumps(value)
        return _revision(self.ask("kv/put", {"key": _encoded(key), "value": _encoded(text)}))

    def delete(self, key: str) -> int:
        """Delete a key; return the revision."""
        return _revision(self.ask("kv/deleterange", {"key": _encoded(key)}))

    def range(self, prefix: str) -> dict[str, str]:
        """Return all keys that begin with a prefix, and their values."""
        end = _encoded(prefix[:-1] + chr(ord(prefix[-1]) + 1))
        found = self.ask("kv/range", {"key": _encoded(prefix), "range_end": end}).get("kvs", ())
        return {b64decode(item["key"]).decode(): b64decode(item.get("value", "")).decode() for item in found}

    @property
    def revision(self) -> int:
        """The newest revision."""
        return _revision(self.ask("kv/range", {"key": _encoded("/")}))

    def compact(self, revision: int = 0) -> None:
        """Forget what was before a revision; 0: before the newest."""
        self.ask("kv/compaction", {"revision": revision or self.revision, "physical": True})

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request of the v3 API."""
        command = [*self._within, "curl", "-s", "--max-time", "10", f"{self.url}/v3/{path}", "-d", json.dumps(body)]
        answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert "error" not in answer, answer
        return answer

    def _answers(self) -> bool:
        command = [*self._within, "curl", "-s", "--max-time", "1", f"{self.url}/health"]
        return b'"true"' in subprocess.run(command, check=False, capture_output=True).stdout


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def _encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


def _revision(answer: dict[str, Any]) -> int:
    return int(answer["header"]["revision"])
