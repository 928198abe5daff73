"""Carrying out a plan: from edits of the desired state to rows of tables and open devices.

Three steps. *Prepare* makes what is new while packets flow: namespaces and TAPs in a thread, rows of virtual servers a
few at a time, not to be found yet. *Commit* edits the tables in one go between two bursts: a packet sees the old state
or the new one. *Clean up* closes what went. A failure to prepare leaves everything as it was.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from dataplane import settle, strays
from dataplane.balance import Balancer
from dataplane.batch import ROUTE_GENERATION
from dataplane.control import edits as plan
from dataplane.control.edits import Edit, RouteSpec
from dataplane.control.state import DesiredState, Network, Peer, Pod
from dataplane.devices import journal, namespace
from dataplane.devices.device import DeviceError
from dataplane.devices.journal import Journal
from dataplane.devices.namespace import NamespaceError, NamespaceHandle
from dataplane.devices.tap import Tap
from dataplane.engine import Engine
from dataplane.tables.interface import INTERFACES, OFFLOAD, UP, Driver, Role
from dataplane.tables.result import TableFullError
from dataplane.tables.route import ANNOUNCED, HOSTED, Kind, Route

_SLICE = 16  # virtual servers between two turns of the packets: 1 ms
NODE, UPLINK, UNDERLAY, HOST, FIRST_POD = 0, 1, 2, 3, 4  # interface rows

_KINDS = {
    "pod": Kind.POD,
    "local": Kind.LOCAL,
    "via": Kind.VIA,
    "tunnel": Kind.TUNNEL,
    "blackhole": Kind.BLACKHOLE,
    "unreachable": Kind.UNREACHABLE,
    "service": Kind.SERVICE,
}

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PodLink:
    """A pod's open TAP and the namespace it is in."""

    pod: Pod
    tap: Tap
    namespace: NamespaceHandle
    entry: int  # of the journal; 0 when the namespace was there before

    def close(self, log_book: Journal) -> None:
        """Close the TAP, which takes the pod's link away, and remove the namespace if the node had made it."""
        self.tap.close()
        namespace.remove_namespace(self.namespace)
        if self.entry:
            log_book.removed(self.entry)


class Wiring:
    """What is behind the rows: devices by name, VTEPs by node.

    Attributes:
        interfaces: Row by name; a pod's is ``cali...``.
        links: The pods' TAPs by the same name.
        vteps: Row by the peer's name.
        specs: The routes as the plan gave them, for ``show routes``.
        balancer: The virtual servers.
    """

    def __init__(self, engine: Engine, log_book: Journal) -> None:
        self.engine = engine
        self.tables = engine.tables
        self.journal = log_book
        self.interfaces: dict[str, int] = {}
        self.links: dict[str, PodLink] = {}
        self.vteps: dict[str, int] = {}
        self.specs: dict[Network, RouteSpec] = {}
        self.state: DesiredState | None = None
        self.balancer = Balancer(engine.tables.services, engine.tables.policies)
        engine.every_tick(self.balancer.tick)
        self._free = list(range(INTERFACES - 1, FIRST_POD - 1, -1))

    async def apply(self, edits: Sequence[Edit], state: DesiredState) -> None:
        """Carry out a plan that leads to ``state``.

        Raises:
            NamespaceError, DeviceError: Something new could not be opened; nothing was changed.
            TableFullError: There is more than a table holds; nothing was changed.
        """
        self.balancer.require_room(edits)
        self._require_room(edits)
        try:
            await self._stage(edits)
            opened, closed = await self._prepare(edits, state)
        except BaseException:
            self.balancer.discard()
            raise
        self.state = state
        now = time.monotonic_ns()
        for edit in edits:
            if not self.balancer.commit(edit, now):
                self._commit(edit, opened, closed)
        if any(isinstance(edit, plan.SetRoute | plan.DeleteRoute | plan.ChangeVtep) for edit in edits):
            settings = self.tables.settings
            settings[ROUTE_GENERATION] = (int(settings[ROUTE_GENERATION]) + 1) & 0x7FFF_FFFF
        self.engine.refresh()
        # The kernel makes each wait for a grace period, and lets several wait for one.
        await asyncio.gather(*(asyncio.to_thread(link.close, self.journal) for link in closed))
        for number, _ in enumerate(self.balancer.news(), 1):
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        await strays.end(self.tables.flows, strays.claimed(edits), now)

    def _require_room(self, edits: Sequence[Edit]) -> None:
        pods = vteps = 0
        for edit in edits:
            pods += isinstance(edit, plan.AddPod) - isinstance(edit, plan.RemovePod)
            # A peer with a new address needs a second row until the routes lead there.
            vteps += isinstance(edit, plan.AddVtep | plan.ChangeVtep) - isinstance(edit, plan.RemoveVtep)
        if pods > len(self._free):
            raise TableFullError("interface", len(self.interfaces), INTERFACES)
        if len(self.vteps) + vteps > self.tables.vteps.capacity:
            raise TableFullError("vtep", len(self.vteps), self.tables.vteps.capacity)

    # --- prepare -----------------------------------------------------------------------------------------------------

    async def _stage(self, edits: Sequence[Edit]) -> None:
        """Make new virtual servers, some at a time: packets find them when the plan is committed."""
        added = (edit.server for edit in edits if isinstance(edit, plan.AddServer))
        for number, server in enumerate(added, 1):
            self.balancer.stage(server)
            if number % _SLICE == 0:
                self.engine.refresh()
                await asyncio.sleep(0)
        self.engine.refresh()

    async def _prepare(self, edits: Sequence[Edit], state: DesiredState) -> tuple[dict[str, PodLink], list[PodLink]]:
        """Open the links of new and moved pods; return them by name, and those that are to be closed afterwards.

        A namespace has one link of a name, so one that is made anew in its own namespace, or in one that another pod is
        leaving, goes first: that pod alone is cut off for some milliseconds.
        """
        wanted = {edit.pod.netns for edit in edits if isinstance(edit, plan.AddPod)}
        wanted |= {edit.new.netns for edit in edits if isinstance(edit, plan.ChangePod) if _relinked(edit)}
        opened: dict[str, PodLink] = {}
        closed: list[PodLink] = []
        for edit in edits:
            gone = edit.pod if isinstance(edit, plan.RemovePod) else None
            if isinstance(edit, plan.ChangePod) and _relinked(edit):
                gone = edit.old
            if gone is None:
                continue
            link = self.links[gone.interface]
            if gone.netns in wanted:
                self._down(gone.interface)
                link.tap.close()
            closed.append(link)
        try:
            for edit in edits:
                pod = edit.pod if isinstance(edit, plan.AddPod) else None
                if isinstance(edit, plan.ChangePod) and _relinked(edit):
                    pod = edit.new
                if pod is not None:
                    opened[pod.interface] = await asyncio.to_thread(self._open, pod, state)
        except BaseException:
            for link in opened.values():
                link.close(self.journal)
            for link in closed:
                if link.tap.fileno() < 0:
                    await self._put_back(link.pod)
            raise
        return opened, closed

    async def _put_back(self, pod: Pod) -> None:
        """Restore a pod's link if that can be: what made the plan fail is what is told, and others wait for theirs."""
        try:
            await self.restore(pod.interface)
        except (NamespaceError, DeviceError) as error:
            log.warning("pod cannot be restored name=%s: %s", pod.id, error)

    async def restore(self, interface: str) -> None:
        """Make a pod's link anew, in its namespace, when it has vanished (somebody deleted it).

        Raises:
            NamespaceError, DeviceError: It cannot be made now.
        """
        assert self.state is not None
        link = self.links[interface]
        self._down(interface)
        link.tap.close()
        fresh = await asyncio.to_thread(self._open, link.pod, self.state)
        if fresh.entry:
            self.journal.removed(link.entry)
        else:
            fresh.entry, fresh.namespace = link.entry, replace(fresh.namespace, created=link.namespace.created)
        os.close(link.namespace.fd)
        self._connect(self.interfaces[interface], fresh)

    def _open(self, pod: Pod, state: DesiredState) -> PodLink:
        """Make the pod's namespace if need be and may be, and its link in it. Runs in a thread."""
        path = namespace.namespace_path(pod.netns)
        entry = 0
        if pod.cookie:
            handle = namespace.known_namespace(pod.netns, pod.cookie)
        else:
            if not path.exists():
                entry = self.journal.record(journal.Namespace(str(path)))
            handle = namespace.open_namespace(pod.netns)
        try:
            if entry:
                self.journal.made(entry, handle.cookie)
            namespace.require_free(handle, pod.ifname)
            tap = namespace.in_namespace(handle, partial(Tap, pod.ifname, offload=state.pod_network.offload))
            try:
                namespace.place(
                    handle,
                    pod.ifname,
                    mac=pod.mac,
                    addresses=pod.addresses,
                    mtu=pod.mtu,
                    gateway=state.pod_network.gateway,
                )
            except BaseException:
                tap.close()
                raise
        except BaseException:
            namespace.remove_namespace(handle)
            if entry:
                self.journal.removed(entry)
            raise
        return PodLink(pod, tap, handle, entry)

    # --- commit ------------------------------------------------------------------------------------------------------

    def _commit(self, edit: Edit, opened: dict[str, PodLink], closed: list[PodLink]) -> None:
        match edit:
            case plan.AddPod(pod):
                row = self._free.pop()
                self.interfaces[pod.interface] = row
                self._connect(row, opened[pod.interface])
                log.info("pod added name=%s address=%s netns=%s", pod.id, _addresses(pod), pod.netns)
            case plan.ChangePod(old, new):
                if new.interface in opened:
                    self._down(old.interface)
                    self._connect(self.interfaces[new.interface], opened[new.interface])
                self.links[new.interface].pod = new
                log.info("pod changed name=%s address=%s netns=%s", new.id, _addresses(new), new.netns)
            case plan.RemovePod(pod):
                self._down(pod.interface)
                row = self.interfaces.pop(pod.interface)
                del self.links[pod.interface]
                self.tables.interfaces[row] = 0
                self._free.append(row)
                log.info("pod removed name=%s", pod.id)
            case plan.AddVtep(peer):
                self._add_vtep(peer)
                log.info("peer added name=%s address=%s", peer.name, peer.address)
            case plan.ChangeVtep(old, new):
                self._change_vtep(old, new)
                log.info("peer changed name=%s address=%s", new.name, new.address)
            case plan.RemoveVtep(peer):
                self.tables.vteps.delete(self.vteps.pop(peer.name))
                log.info("peer removed name=%s", peer.name)
            case plan.SetRoute(prefix, spec):
                self.specs[prefix] = spec
                self.tables.routes.set(prefix, self._route(spec))
            case plan.DeleteRoute(prefix):
                del self.specs[prefix]
                self.tables.routes.delete(prefix)
            case plan.ChangeSettings():
                settle.change(self.tables.settings, self.tables.timeouts, self.tables.policies, edit)
            case plan.NeedsRestart():
                raise ValueError(str(edit))

    def _connect(self, row: int, link: PodLink) -> None:
        """Put a pod's open link behind an interface row."""
        assert self.state is not None
        pod, record = link.pod, self.tables.interfaces[row]
        record["role"], record["driver"], record["flags"] = Role.POD, Driver.TAP, UP | OFFLOAD
        record["fd"], record["mtu"], record["error"] = link.tap.fileno(), pod.mtu, 0
        record["mac"], record["peer_mac"] = self.state.pod_network.gateway_mac, pod.mac
        self.links[pod.interface] = link
        self.engine.attach(row, link.tap.fileno(), pod.id)

    def _down(self, interface: str) -> None:
        """Stop using a pod's TAP; its row stays, and drops what is still sent to it."""
        row = self.interfaces[interface]
        self.engine.detach(row)
        self.tables.interfaces["flags"][row] = 0
        self.tables.interfaces["fd"][row] = -1

    def _route(self, spec: RouteSpec) -> Route:
        kind = _KINDS[spec.kind]
        oif = self.interfaces[spec.target] if kind in (Kind.POD, Kind.VIA) else 0
        vtep = self.vteps.get(spec.target, -1) if kind == Kind.TUNNEL else -1
        gateway = spec.gateway if kind == Kind.VIA else None
        flags = ANNOUNCED * spec.announced | HOSTED * spec.hosted
        return Route(kind, oif, gateway, vtep, origin=spec.source, flags=flags)

    def _add_vtep(self, peer: Peer) -> None:
        assert self.state is not None
        self.vteps[peer.name] = self.tables.vteps.insert(peer.address, peer.vtep_mac, UNDERLAY, self.state.tunnel_mtu)

    def _change_vtep(self, old: Peer, new: Peer) -> None:
        """Change a peer's MAC in its row; a new address needs a new row, and every route to it a new target."""
        if old.address == new.address:
            self.tables.vteps.records["mac"][self.vteps[new.name]] = new.vtep_mac
            return
        stale = self.vteps[old.name]
        self._add_vtep(new)
        for prefix, spec in self.specs.items():
            if spec.kind == "tunnel" and spec.target == new.name:
                self.tables.routes.set(prefix, self._route(spec))
        self.tables.vteps.delete(stale)


def _relinked(edit: plan.ChangePod) -> bool:
    """Say whether the change needs a new link: labels do not."""
    return replace(edit.old, labels=()) != replace(edit.new, labels=())


def _addresses(pod: Pod) -> str:
    return ",".join(str(address) for address in pod.addresses)
