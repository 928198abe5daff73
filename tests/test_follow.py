"""Following a store, without a node and without a store."""

import asyncio
import logging
from types import SimpleNamespace

from dataplane import follow
from dataplane.control.cluster import Cluster
from dataplane.follow import Follower
from tests.kube_items import eventually


class FailingNode:
    """A node that fails to become its first state, and becomes the next ones."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(state="given")
        self.wiring = SimpleNamespace(state="state")
        self.follower: Follower | None = None
        self.tried: list[int] = []

    def amend(self, _):
        pass

    def watch(self, _):
        pass

    async def refresh(self):
        assert self.follower is not None
        self.tried.append(self.follower.cluster.revision)
        if len(self.tried) == 1:
            raise RuntimeError("a bug")
        return {"applied": [], "errors": []}


class Source:
    """Hands out one state when it is run the first time, and no other."""

    def __init__(self) -> None:
        self.states = [Cluster(revision=7)]

    async def run(self, sink):
        while self.states:
            sink(self.states.pop())
        await asyncio.Event().wait()

    async def leave(self):
        pass

    def applied(self, *_):
        pass


def test_a_state_that_a_bug_kept_from_the_node_is_applied_all_the_same(caplog, monkeypatch):
    monkeypatch.setattr(follow, "_RETRY_SECONDS", 0)

    async def whole() -> None:
        node = FailingNode()
        node.follower = Follower(node, Source())  # type: ignore[arg-type]
        node.follower.start()
        await eventually(lambda: len(node.tried) == 2)
        assert node.tried == [7, 7]
        await node.caught_up()  # type: ignore[attr-defined]
        await node.follower.stop()

    asyncio.run(whole())
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "following the store failed" in caplog.text
