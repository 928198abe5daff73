"""The node: one process from start to end.

Start: take over the journal (and undo what a killed node left), open the devices, carry out the plan from nothing to
the desired state, say *ready*; only then load the control API, which packets need not wait for. Run: bursts, edits,
one tick a second. End: forward what is already queued, carry out the plan to nothing, close the journal.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

from dataplane import config
from dataplane.apply import UNDERLAY, Wiring
from dataplane.batch import GATEWAY_LO, NODE_HI, NODE_LO, TUNNEL_INTERFACE, TUNNEL_PORT, VNI, VTEP_MAC
from dataplane.control import edits, reconcile
from dataplane.control.edits import Edit, NeedsRestart
from dataplane.control.snapshot import Kind, Reload
from dataplane.control.state import DesiredState, Settings
from dataplane.devices.device import DeviceError
from dataplane.devices.journal import Journal
from dataplane.devices.namespace import NamespaceError
from dataplane.engine import Engine
from dataplane.pipeline import Tables
from dataplane.report import Report
from dataplane.slowpath import SlowPath
from dataplane.tables.address import halves
from dataplane.underlay import Underlay

log = logging.getLogger(__name__)


class Node:
    """Everything that is alive in the process hangs from here; two nodes can live in one process.

    Args:
        settings: The configuration, checked.
        log_book: The journal, claimed.
    """

    def __init__(self, settings: Settings, log_book: Journal) -> None:
        self.settings = settings
        self.tables = Tables()
        self.slow = SlowPath(self.tables.arrays, self.tables.routes, self.tables.neighbours)
        self.engine = Engine(self.tables, self.slow, settings.engine.batch)
        self.wiring = Wiring(self.engine, log_book)
        self.report = Report(settings, self.wiring, self.slow)
        self.stopping = asyncio.Event()
        self._journal = log_book
        self.underlay: Underlay | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    # --- start -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the node to its desired state; packets flow when this returns."""
        state = self.settings.state
        self._configure(state)
        if state.uplink is not None:
            self.underlay = Underlay(self.engine, state)
            state = replace(state, on_link=self.underlay.on_link)
            self.wiring.interfaces.update(self.underlay.names)
        await self.wiring.apply(reconcile.plan(None, state), state)
        if self.underlay is not None:
            self.underlay.attach()
        self.engine.on_failure = self._device_failed
        self.engine.start()
        self.report.ready = True

    def _configure(self, state: DesiredState) -> None:
        """Write down what stays as it is while the node runs."""
        settings = self.tables.settings
        if state.node.addresses:
            settings[NODE_HI], settings[NODE_LO] = halves(state.node.addresses[0])
        settings[GATEWAY_LO] = halves(state.pod_network.gateway)[1]
        settings[VTEP_MAC] = state.node.vtep_mac
        settings[VNI], settings[TUNNEL_PORT] = state.vxlan.vni, state.vxlan.port
        settings[TUNNEL_INTERFACE] = UNDERLAY
        if state.tunnel_address is not None:
            self.slow.tunnel_address = state.tunnel_address.packed

    # --- what may happen to a device ---------------------------------------------------------------------------------

    def _device_failed(self, index: int) -> None:
        """A pod's TAP that reports an error has been deleted: make it anew."""
        for name, row in self.wiring.interfaces.items():
            if row == index and name in self.wiring.links:
                self._spawn(self._restore(name))

    async def _restore(self, interface: str) -> None:
        async with self._changing:
            if interface not in self.wiring.links:
                return
            pod = self.wiring.links[interface].pod
            try:
                await self.wiring.restore(interface)
            except (NamespaceError, DeviceError) as error:
                log.warning("pod cannot be restored name=%s: %s", pod.id, error)
            else:
                log.info("pod restored name=%s", pod.id)

    # --- the control API's backend -----------------------------------------------------------------------------------

    def snapshot(self, kind: Kind) -> Mapping[str, Any]:
        """Return the snapshot of this kind."""
        return self.report.snapshot(kind)

    def metrics_text(self) -> str:
        """Return Prometheus' text format."""
        from dataplane.control import metrics

        return metrics.text(self.report.snapshot)

    async def reload(self) -> Reload:
        """Read the configuration again: apply all of it, or nothing."""
        async with self._changing:
            try:
                fresh = config.load(self.settings.path)
            except config.ConfigError as error:
                return {"applied": [], "errors": list(error.errors)}
            old = self.wiring.state
            assert old is not None
            state = replace(fresh.state, on_link=old.on_link)
            edits = reconcile.plan(old, state)
            keys = reconcile.process_keys(self.settings, fresh)
            if keys:
                edits = (*edits, NeedsRestart(keys))
            refused = [str(edit) for edit in edits if isinstance(edit, NeedsRestart)]
            if refused:
                return {"applied": [], "errors": refused}
            try:
                await self.wiring.apply(edits, state)
            except (NamespaceError, DeviceError) as error:
                return {"applied": [], "errors": [str(error)]}
            self.settings = replace(self.settings, state=state)
            if self.underlay is not None:
                self.underlay.follow(state)
            log.info("configuration reloaded changes=%d", len(edits))
            return {"applied": [describe(edit) for edit in edits], "errors": []}

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
        self.engine.drain()
        async with self._changing:
            if self.wiring.state is not None:
                await self.wiring.apply(reconcile.plan(self.wiring.state, None), self.wiring.state)
        self.engine.stop()
        if self.underlay is not None:
            self.underlay.close()
        self._journal.close()


def describe(edit: Edit) -> str:
    """Return one line about an edit, for the one who asked for the reload."""
    match edit:
        case edits.AddPod(pod) | edits.RemovePod(pod):
            verb = "added" if isinstance(edit, edits.AddPod) else "removed"
            return f"pod {pod.id} {verb}"
        case edits.ChangePod(_, pod):
            return f"pod {pod.id} changed"
        case edits.AddVtep(peer) | edits.RemoveVtep(peer):
            verb = "added" if isinstance(edit, edits.AddVtep) else "removed"
            return f"peer {peer.name} {verb}"
        case edits.ChangeVtep(_, peer):
            return f"peer {peer.name} changed"
        case edits.SetRoute(prefix, spec):
            return f"route {prefix} {spec.kind} {spec.target}".rstrip()
        case edits.DeleteRoute(prefix):
            return f"route {prefix} deleted"
    return "settings changed"
