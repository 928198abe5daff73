"""Following a store: the states of the cluster that a source hands out become states of this node."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from dataplane.control.cluster import Cluster, over
from dataplane.control.source import Source
from dataplane.control.state import DesiredState, Settings
from dataplane.node import Node

_RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


def open_source(settings: Settings) -> Source | None:
    """Return the source that the settings name; None for a node that needs nothing but its file.

    Raises:
        SourceError: It can never work as the settings say.
    """
    source = settings.store.source
    if source == "static":
        return None
    if source == "kubernetes":
        from dataplane.control.store_kubernetes import KubernetesSource

        return KubernetesSource(settings)
    from dataplane.config_objects import FileObjects
    from dataplane.control.store_etcd import EtcdSource

    return EtcdSource(settings, FileObjects(settings.state))


class Follower:
    """Applies what a source hands out, the newest only: what comes meanwhile is applied together.

    A state that the node cannot become is refused with a line in the log, and the one before it stays.

    Args:
        node: Not started yet.
    """

    def __init__(self, node: Node, source: Source) -> None:
        self._node = node
        self._source = source
        self._cluster = Cluster()
        self._newest: Cluster | None = None
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        node.amend(self._over)
        node.source = source
        node.caught_up = self._caught_up

    @property
    def cluster(self) -> Cluster:
        """What the store knows, as far as it is applied."""
        return self._cluster

    def _over(self, state: DesiredState) -> DesiredState:
        return over(self._cluster, state)

    async def join(self) -> None:
        """Make the node known and take the first state, before it starts."""
        self._cluster = await self._source.join(self._node.settings)

    def start(self) -> None:
        """Follow from now on, beside the packets; the node has started."""
        assert self._node.wiring.state is not None
        self._source.applied(self._node.settings.state, self._node.wiring.state)
        self._node.watch(self._applied)
        self._task = asyncio.ensure_future(_forever(self._follow, "following the store failed"))

    async def stop(self) -> None:
        """Follow no more, and leave the cluster."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._source.leave()

    async def _follow(self) -> None:
        handing = asyncio.ensure_future(self._source.run(self._take))
        handing.add_done_callback(lambda _: self._news.set())
        if self._newest is not None:  # it was not applied before this loop failed
            self._news.set()
        try:
            while not handing.done():
                await self._news.wait()
                self._news.clear()
                cluster = self._newest
                if cluster is not None:
                    await self._apply(cluster)
                if self._newest is cluster:  # else more came meanwhile
                    self._newest = None
                    self._idle.set()
            handing.result()
        finally:
            handing.cancel()
            self._idle.set()

    async def _applied(self, state: DesiredState) -> None:
        self._source.applied(self._node.settings.state, state)

    async def _caught_up(self) -> None:
        await self._idle.wait()

    def _take(self, cluster: Cluster) -> None:
        self._newest = cluster
        self._idle.clear()
        self._news.set()

    async def _apply(self, cluster: Cluster) -> None:
        before, self._cluster = self._cluster, cluster
        result = await self._node.refresh()
        if result["errors"]:
            self._cluster = before
            for line in result["errors"]:
                log.error("state of the cluster refused revision=%d: %s", cluster.revision, line)


async def _forever(work: Callable[[], Awaitable[None]], failed: str) -> None:
    """Do the work again whenever it fails: a bug in following a store must not take the packets down."""
    while True:
        try:
            await work()
        except Exception:
            log.exception(failed)
        await asyncio.sleep(_RETRY_SECONDS)
