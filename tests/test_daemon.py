"""daemon: in which order everything ends, and that nothing keeps the rest from ending."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from dataplane import daemon
from dataplane.control.state import DesiredState, Node, Settings

SETTINGS = Settings(DesiredState(node=Node("node1")))
ORDER = ["attacher", "failover", "follower", "node", "resolver", "service"]


class Companion:
    """Notes its end, and fails in it if the test says so."""

    def __init__(self, name: str, ended: list[str], failing: str) -> None:
        self.name, self.ended, self.failing = name, ended, failing
        self.stopping = asyncio.Event()
        self.request_reload = self.close

    def close(self) -> None:
        self.ended.append(self.name)
        if self.name == self.failing:
            raise OSError(28, self.name)

    async def stop(self) -> None:
        self.close()


class Node1(Companion):
    async def start(self) -> None:
        pass


class Beside(Companion):
    async def join(self) -> None:
        pass

    async def restore(self) -> None:
        pass

    def start(self) -> None:
        pass


async def live(monkeypatch, failing: str) -> list[str]:
    """Live until told to stop, which is at once; return what has ended, in order."""
    ended: list[str] = []
    made = {name: Beside(name, ended, failing) for name in ORDER}

    async def resolver(*_: object) -> Beside:
        return made["resolver"]

    async def serve(*_: object) -> None:
        pass

    monkeypatch.setattr(daemon, "gc", SimpleNamespace(freeze=lambda: None, enable=lambda: None))
    monkeypatch.setattr(daemon, "Follower", lambda *_: made["follower"])
    monkeypatch.setattr(daemon, "_attacher", lambda _: made["attacher"])
    monkeypatch.setattr(daemon, "_dns_service", lambda _: made["service"])
    monkeypatch.setattr(daemon, "open_failover", lambda *_: made["failover"])
    monkeypatch.setattr(daemon, "_resolver", resolver)
    monkeypatch.setattr(daemon, "_serve", serve)
    node: Any = Node1("node", ended, failing)
    nothing: Any = object()
    with pytest.raises(OSError, match=failing) if failing else nullcontext():
        await daemon._live(node, SETTINGS, nothing, nothing)
    return ended


@pytest.mark.parametrize("failing", ["", *ORDER])
def test_everything_ends_in_order_also_if_one_cannot(monkeypatch, failing):
    assert asyncio.run(live(monkeypatch, failing)) == ORDER
