"""The node: one process from start to end.

Start: take over the journal (and undo what a killed node left), open the devices, carry out the plan from nothing to
the desired state, say *ready*; only then load the control API, which packets need not wait for. Run: bursts, edits,
one tick a second. End: forward what is already queued, carry out the plan to nothing, close the journal.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from dataplane import config, settle
from dataplane.apply import HOST, Wiring
from dataplane.control import assigner, claims, reconcile
from dataplane.control.api import Listing
from dataplane.control.edits import AddDestination, ChangeDestination, NeedsRestart, RemoveDestination, describe
from dataplane.control.health import HealthServer
from dataplane.control.overlay import Overlay
from dataplane.control.query import Query
from dataplane.control.snapshot import Kind, ListKind, Reload
from dataplane.control.source import Source
from dataplane.control.state import DesiredState, Settings
from dataplane.devices.device import DeviceError
from dataplane.devices.journal import Journal
from dataplane.devices.namespace import NamespaceError
from dataplane.devices.netlink import NetlinkError
from dataplane.engine import Engine
from dataplane.host import Host
from dataplane.pipeline import Tables
from dataplane.report import Report
from dataplane.slowpath import SlowPath
from dataplane.tables.result import TableFullError
from dataplane.underlay import Underlay

Amendment: TypeAlias = Callable[[DesiredState], DesiredState]
Watcher: TypeAlias = Callable[[DesiredState], Awaitable[None]]

log = logging.getLogger(__name__)


class Node:
    """Everything that is alive in the process hangs from here; two nodes can live in one process.

    Attributes:
        source: Where the state of the cluster comes from; None: from the file alone.
        names: Returns the snapshot of cluster DNS; None: the node answers no names.
        caught_up: Returns when everything that the source has handed out is applied.

    Args:
        settings: The configuration, checked.
        log_book: The journal, claimed.
    """

    def __init__(self, settings: Settings, log_book: Journal) -> None:
        self.settings = settings
        self.tables = Tables(flows=settings.state.balancing.conntrack_max)
        self.slow = SlowPath(self.tables.arrays, self.tables.routes, self.tables.neighbours)
        self.engine = Engine(self.tables, self.slow, settings.engine.batch)
        self.wiring = Wiring(self.engine, log_book)
        self.report = Report(settings, self.wiring, self.slow)
        self.stopping = asyncio.Event()
        self._journal = log_book
        self.underlay: Underlay | None = None
        self.host = Host(self.engine, settings.state)
        self._ours = claims.of(settings.state)
        self._overlay = Overlay()
        self._amendments: list[Amendment] = []
        self._watchers: list[Watcher] = []
        self._assign = assigner.Assigner(settings.store.source, lambda: self.wiring.state)
        self.source: Source | None = None
        self.names: Callable[[], Mapping[str, Any]] | None = None
        self.caught_up: Callable[[], Awaitable[None]] = _at_once
        self._health = HealthServer()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    # --- start -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the node to its desired state; packets flow when this returns."""
        state = self._assign(self._amended(self.settings.state))
        assigner.report(None, state)
        self._ours = claims.of(state)
        self._configure(state)
        await self.host.open(state, self._ours)  # first: on an uplink of our own the tunnel's address is there
        self.wiring.interfaces.update(self.host.names)
        if state.uplink is not None:
            self.underlay = Underlay(self.engine, state, self._ours)
            state = replace(state, on_link=self.underlay.on_link)
            self.wiring.interfaces.update(self.underlay.names)
        await self.wiring.apply(reconcile.plan(None, state), state)
        if self.underlay is not None:
            self.underlay.attach()
        self.host.attach()
        self.engine.on_failure = self._device_failed
        self.engine.start()
        await self._health.update(state)
        self.report.ready = True

    def amend(self, amendment: Amendment) -> None:
        """Let a function change what the file says, each time before it is applied; the functions run in this order.

        It must be pure, fast, and return the same objects for what it does not change: `refresh` after each change of
        what it depends on.
        """
        self._amendments.append(amendment)

    def watch(self, watcher: Watcher) -> None:
        """Have a function called with each state that the node has become from now on, before an edit is done."""
        self._watchers.append(watcher)

    def _amended(self, state: DesiredState) -> DesiredState:
        for amendment in self._amendments:
            state = amendment(state)
        return state

    def _configure(self, state: DesiredState) -> None:
        """Write down what stays as it is while the node runs."""
        settle.fix(self.tables.settings, state)
        if state.tunnel_address is not None:
            self.slow.tunnel_address = state.tunnel_address.packed

    # --- what may happen to a device ---------------------------------------------------------------------------------

    def _device_failed(self, index: int) -> None:
        """A TAP that reports an error has been deleted: make it anew."""
        if index == HOST:
            self._spawn(self._restore_host())
        for name, row in self.wiring.interfaces.items():
            if row == index and name in self.wiring.links:
                self._spawn(self._restore(name))

    async def _restore(self, interface: str) -> None:
        async with self._changing:
            if interface not in self.wiring.links or self.stopping.is_set():
                return
            pod = self.wiring.links[interface].pod
            try:
                await self.wiring.restore(interface)
            except (NamespaceError, DeviceError) as error:
                log.warning("pod cannot be restored name=%s: %s", pod.id, error)
            else:
                log.info("pod restored name=%s", pod.id)

    async def _restore_host(self) -> None:
        async with self._changing:
            state = self.wiring.state
            if state is None or self.stopping.is_set():
                return
            try:
                await self.host.restore(state, self._ours)
            except (NetlinkError, DeviceError) as error:
                log.warning("the host's link cannot be restored: %s", error)
            else:
                log.info("the host's link was restored name=%s", state.node.host_interface)

    # --- the control API's backend -----------------------------------------------------------------------------------

    def snapshot(self, kind: Kind) -> Mapping[str, Any]:
        """Return the snapshot of this kind."""
        if kind == "cluster" and self.source is not None:
            return self.source.status()
        if kind == "dns" and self.names is not None:
            return self.names()
        return self.report.snapshot(kind)

    def listing(self, kind: ListKind, query: Query) -> Listing:
        """Return the rows of this kind that pass a query, in pages."""
        return self.report.listing(kind, query)

    async def delete_flows(self, query: Query) -> int:
        """Forget the flows that pass a query; packets have their turn all the while."""
        deleted = 0
        for count in self.report.deletion(query):
            deleted += count
            await asyncio.sleep(0)
        return deleted

    def metrics_text(self) -> str:
        """Return Prometheus' text format."""
        from dataplane.control import metrics

        return metrics.text(self.snapshot)

    async def reload(self) -> Reload:
        """Read the configuration again: apply all of it, or nothing. What the API has changed stays."""
        async with self._changing:
            if self.stopping.is_set():
                return _STOPPING
            try:
                fresh, overlay = await asyncio.to_thread(self._load)
            except config.ConfigError as error:
                return _refused(*error.errors)
            keys = reconcile.process_keys(self.settings, fresh)
            result = await self._become(fresh.state, overlay, (NeedsRestart(keys),) if keys else ())
            if not result["errors"]:
                log.info("configuration reloaded changes=%d", len(result["applied"]))
            return result

    def _load(self) -> tuple[Settings, Overlay]:
        """Read the file, and keep of the API's changes what still has something to change."""
        fresh = config.load(self.settings.path)
        state = self._amended(fresh.state)
        kept = self._overlay.without_strays(state.services)
        if kept.services:
            from dataplane import config_edit

            config_edit.check_overlay(kept, state)
        return fresh, kept

    async def refresh(self) -> Reload:
        """Apply the state anew, since an amendment has changed."""
        async with self._changing:
            if self.stopping.is_set():
                return _STOPPING
            return await self._become(self.settings.state, self._overlay)

    async def _become(self, given: DesiredState, overlay: Overlay, refusals: tuple[NeedsRestart, ...] = ()) -> Reload:
        """Carry out what leads to the file's state, amended, with the API's changes over it."""
        old = self.wiring.state
        assert old is not None
        state = self._amended(given)
        state = self._assign(replace(state, on_link=old.on_link, services=overlay.over(state.services)))
        edits = (*await asyncio.to_thread(reconcile.plan, old, state), *refusals)
        refused = [str(edit) for edit in edits if isinstance(edit, NeedsRestart)]
        if refused:
            return _refused(*refused)
        try:
            await self.wiring.apply(edits, state)
        except (NamespaceError, DeviceError, TableFullError) as error:
            return _refused(str(error))
        self.settings, self._overlay = replace(self.settings, state=given), overlay
        assigner.report(old, state)
        # An endpoint that comes or goes is the most frequent edit, and changes nothing that the kernel is told.
        if not all(isinstance(edit, AddDestination | RemoveDestination | ChangeDestination) for edit in edits):
            self._ours = await asyncio.to_thread(claims.of, state)
            await self.host.follow(state, self._ours)
        if self.underlay is not None:
            self.underlay.follow(state, self._ours)
        await self._health.update(state)
        for watcher in self._watchers:
            await watcher(state)
        return {"applied": await asyncio.to_thread(lambda: [describe(edit) for edit in edits]), "errors": []}

    async def set_service(self, values: Mapping[str, Any]) -> Reload:
        """Add a service, or replace one whole; the keys are those of ``[[services.static]]``."""
        return await self._edit("set_service", values)

    async def delete_service(self, namespace: str, name: str) -> Reload:
        """Delete a service, the file's too, until the node stops."""
        return await self._edit("delete_service", f"{namespace}/{name}")

    async def add_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        """Add an endpoint to a service, or change the one at its address."""
        return await self._edit("add_endpoint", f"{namespace}/{name}", values)

    async def drain_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        """Give an endpoint no new connections."""
        return await self._edit("drain_endpoint", f"{namespace}/{name}", values)

    async def delete_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        """Delete an endpoint from a service."""
        return await self._edit("delete_endpoint", f"{namespace}/{name}", values)

    async def _edit(self, name: str, *values: Any) -> Reload:
        """Carry out an edit of ``config_edit``, which is made in a thread: its models take 50 ms the first time."""
        state = self.wiring.state
        if self.source is not None and state is not None and not self.stopping.is_set():
            done = await self.source.edit(name, values, state)
            if done is not None:
                await self.caught_up()
                return done
        async with self._changing:
            if self.stopping.is_set():
                return _STOPPING
            assert self.wiring.state is not None
            try:
                overlay = await asyncio.to_thread(_edited, name, values, self._overlay, self.wiring.state)
            except config.ConfigError as error:
                return _refused(*error.errors)
            return await self._become(self.settings.state, overlay)

    def request_reload(self) -> None:
        """Reload soon, with the outcome in the log (SIGHUP)."""
        self._spawn(self._reload_and_log())

    async def _reload_and_log(self) -> None:
        for line in (await self.reload())["errors"]:
            log.error("reload refused: %s", line)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background and keep it from being collected."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- end ---------------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Forward what is queued, then take everything away that the node has made."""
        self.report.ready = False
        self.stopping.set()
        self.engine.drain()
        async with self._changing:  # an edit that is under way comes first, and those behind it are refused
            await self._health.close()
            if self.wiring.state is not None:
                await self.wiring.apply(reconcile.plan(self.wiring.state, None), self.wiring.state)
        self.engine.stop()
        if self.underlay is not None:
            self.underlay.close()
        await asyncio.to_thread(self.host.close)
        self._journal.close()


async def _at_once() -> None:
    """There is nothing to wait for."""


def _refused(*errors: str) -> Reload:
    return {"applied": [], "errors": list(errors)}


_STOPPING = _refused("the node is stopping")


def _edited(name: str, values: tuple[Any, ...], overlay: Overlay, state: DesiredState) -> Overlay:
    from dataplane import config_edit

    edit: Callable[..., Overlay] = getattr(config_edit, name)
    return edit(*values, overlay, state)
