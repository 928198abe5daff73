"""State from etcd: a list, then what changes; membership by a lease; this node's own part written back.

Three loops run beside the packets. One *follows*: it lists the prefix once, watches from there on, and lists again only
when etcd has forgotten the revision; what the node has already stays the same objects. One keeps the *lease* alive, a
third of its time ahead; when it is gone the node joins again. One *publishes* what the node says of itself and its
pods. When etcd is away all three try again, the node goes on with what it knows, and the log says so once; a second
line says when etcd is back.

Two processes with one node's name would take turns for ever: whoever joins last is the node, and the other one finds
somebody else's value under its member key, says so, and is no member any more.
"""

import asyncio
import json
import logging
import os
import time
from contextlib import aclosing, suppress
from typing import Any

from dataplane import __version__
from dataplane.control.cluster import Cluster
from dataplane.control.etcd import CompactedError, Etcd, EtcdError, Events, KeyValue, Put, UnavailableError
from dataplane.control.etcd_contents import Contents, Objects
from dataplane.control.etcd_edits import Edits
from dataplane.control.etcd_published import Published
from dataplane.control.ipam import IpamError, Rules
from dataplane.control.ipam_etcd import EtcdAddresses
from dataplane.control.ipam_store import BLOCKS
from dataplane.control.loadbalancer_etcd import AddressWriter
from dataplane.control.snapshot import ClusterStatus, Reload
from dataplane.control.source import Health, Sink, cluster_status
from dataplane.control.state import DesiredState, Settings

_GATHER_SECONDS = 0.002  # what comes within is handed out together
_RETRY_SECONDS = (0.1, 2.0)  # the first time, and at most
_TIDY_SECONDS = 60.0
_LEAVE_SECONDS = 1.0
_CHUNK = 64  # events; then packets have their turn

log = logging.getLogger(__name__)


class EtcdSource:
    """A ``Source`` in etcd.

    Attributes:
        etcd: The client, for whoever keeps something of his own under the prefix.
        prefix: Of all keys, without a slash at its end.
        lease: The membership's; 0 while this node is no member. What is put with it goes when the node does.
        addresses: Where addresses of pods come from; None when the file gives the node's blocks.
        contents: What the watch has seen; ``contents.listen`` tells of every key of a kind.

    Args:
        settings: The node's.
        objects: How services and pools are read.
    """

    def __init__(self, settings: Settings, objects: Objects) -> None:
        state, store = settings.state, settings.store
        self._node = state.node.name
        self._ttl = store.lease_ttl
        self.prefix = store.prefix
        self.etcd = Etcd(store.endpoints, timeout=max(1.0, min(5.0, self._ttl / 3)))
        self.lease = 0
        self.contents = Contents(self.prefix, objects, state)
        self.addresses: EtcdAddresses | None = None
        if not state.pod_network.cidrs:
            rules = settings.ipam or Rules()
            self.addresses = EtcdAddresses(self.etcd, self.prefix, self._node, rules, state.node.labels)
        self._published = Published(self.prefix, state, self.contents)
        self._edits = Edits(self.etcd, self.prefix, objects)
        self._since = time.time()
        self._replaced = False
        self._member_since = 0  # the revision
        self._revision = 0  # of the contents
        self._shown = 0  # of what was handed out last
        self._taking = False
        self._loaded = False
        self._sink: Sink | None = None
        self._handing: asyncio.TimerHandle | None = None
        self._handed = asyncio.Event()
        self._link = _Link(store.endpoints, self._ttl)
        self.contents.listen("members", self._member_seen)
        self._writer = AddressWriter(self.etcd, self.prefix, self._node, self.contents.revision_of)
        self.contents.listen("addresses", self._writer.seen)

    @property
    def health(self) -> Health:
        """How the source is doing now."""
        return self._link.health(self._shown)

    def status(self) -> ClusterStatus:
        """Return what ``dataplane cluster status`` shows."""
        cluster = self.contents.last
        return cluster_status("etcd", self.etcd.endpoint, self.health, self._node, cluster.nodes.values())

    # --- joining and leaving -----------------------------------------------------------------------------------------

    async def join(self, settings: Settings) -> Cluster:
        """Become a member with a block of addresses, and list everything; wait while etcd is away."""
        pause = _Pause()
        while True:
            try:
                await self._ensure_member()
                if self.addresses is not None:
                    await self.addresses.claim_first_block(time.time())
                await self._list()
            except (EtcdError, IpamError) as error:
                self._link.joining(str(error))
                await pause.wait()
            else:
                log.info("joined the cluster node=%s revision=%d", self._node, self._revision)
                self._shown = self._revision
                return self.contents.cluster(self._revision)

    async def _ensure_member(self) -> None:
        """Keep the lease, or take a new one and say who this node is."""
        if self.lease and await self.etcd.keep_alive(self.lease):
            return
        if self.lease:
            log.warning("membership has ended, joining again node=%s", self._node)
        self.lease = 0
        lease = await self.etcd.grant(self._ttl)
        member = {"since": self._since, "pid": os.getpid(), "version": __version__}
        record = self._published.record
        puts = [Put(f"{self.prefix}/members/{self._node}", json.dumps(member), lease)]
        known = await self.etcd.get(record.key)
        if known is None or known.value != record.value:
            puts.append(record)
        self._member_since = (await self.etcd.txn([], puts)).revision
        self.lease = lease

    async def leave(self) -> None:
        """Be a member no more; do not wait for an etcd that is away."""
        if self.lease:
            with suppress(EtcdError, TimeoutError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await self.etcd.revoke(self.lease)
        await self.etcd.close()

    # --- the loops ---------------------------------------------------------------------------------------------------

    async def run(self, sink: Sink) -> None:
        """Hand out states of the cluster until cancelled."""
        self._sink = sink
        self._writer.follow(self.contents.last)
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._follow())
                loops.create_task(self._stay_member())
                loops.create_task(self._publish())
                loops.create_task(self._tidy())
                loops.create_task(self._writer.run())
        finally:
            self._sink = None

    async def _follow(self) -> None:
        pause = _Pause()
        while True:
            try:
                if not self._loaded:
                    await self._list()
                    self._hand_out_soon()
                async with aclosing(self.etcd.watch(f"{self.prefix}/", self._revision + 1)) as watch:
                    async for events in watch:
                        self._link.watching("")
                        pause.reset()
                        await self._take(events)
            except CompactedError as error:
                log.info("etcd has forgotten revision %d: listing anew: %s", self._revision, error)
                self._loaded = False
            except EtcdError as error:
                self._link.watching(str(error))
                await pause.wait()

    async def _list(self) -> None:
        found = await self.etcd.range(f"{self.prefix}/", heavy=f"{self.prefix}/{BLOCKS}")
        self._taking = True
        for _ in self.contents.load(found.items, found.revision):
            await asyncio.sleep(0)
        self._taking = False
        self._revision = found.revision
        self._loaded = True

    async def _take(self, events: Events) -> None:
        self._taking = True
        for number, item in enumerate(events.events, 1):
            self.contents.take(item)
            if number % _CHUNK == 0:
                await asyncio.sleep(0)
        self._taking = False
        news = events.revision != self._revision
        self._revision = events.revision
        if news:
            self._hand_out_soon()

    def _hand_out_soon(self) -> None:
        if self._handing is None:
            self._handing = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._hand_out)

    def _hand_out(self) -> None:
        self._handing = None
        if self._sink is None or self._taking:  # half of a revision is nobody's business; it is handed out at its end
            return
        self._shown = self._revision
        changed = self.contents.changed  # or it was a key that has a reader of its own
        cluster = self.contents.cluster(self._revision)
        self._writer.follow(cluster)
        if changed:
            self._sink(cluster)
        self._handed.set()
        self._handed = asyncio.Event()

    async def _stay_member(self) -> None:
        pause = _Pause()
        while not self._replaced:
            try:
                await self._ensure_member()
                self._link.leased("")
                pause.reset()
            except EtcdError as error:
                self._link.leased(str(error))
                await pause.wait()
                continue
            await asyncio.sleep(self._ttl / 3)

    def _member_seen(self, item: KeyValue) -> None:
        """Find out whether another process is this node now, or somebody has deleted its key."""
        if item.key.removeprefix(f"{self.prefix}/members/") != self._node:
            return
        ours = item.lease == self.lease or f'"since": {self._since}' in item.value
        if item.deleted:
            if item.mod_revision > self._member_since:
                self.lease = 0
        elif self.lease and not ours:
            self._replaced, self.lease = True, 0
            log.error("another process is node %s now; this one is no member any more: %s", self._node, item.value)

    async def _publish(self) -> None:
        said = ""
        while True:
            await self._published.wanted()
            if self._replaced:
                return
            try:
                while operations := self._published.missing():
                    await self.etcd.txn([], operations)
                    self._published.done(operations)
                said = ""
            except EtcdError as error:
                if not isinstance(error, UnavailableError) and str(error) != said:  # the watch says when etcd is away
                    said = str(error)
                    log.warning("etcd refuses what this node says of itself, trying again: %s", said)
                await asyncio.sleep(_RETRY_SECONDS[1])
                self._published.again()

    async def _tidy(self) -> None:
        while self.addresses is not None:
            await asyncio.sleep(_TIDY_SECONDS)
            with suppress(IpamError):
                for cidr in await self.addresses.tidy(time.time()):
                    log.info("block given back cidr=%s", cidr)

    # --- the node's side ---------------------------------------------------------------------------------------------

    def applied(self, given: DesiredState, state: DesiredState) -> None:
        """Take note of the node's file, and of the pods that the node has now: the others shall know."""
        self._published.want(given, state.pods)

    async def edit(self, name: str, values: tuple[Any, ...], state: DesiredState) -> Reload | None:
        """Carry out an edit of the control API as a transaction; None: it is about a service of the node's file."""
        if self._edits.concern(name, values, state) and not self.health.connected:
            return {"applied": [], "errors": [f"etcd is away, edits have to wait: {self.health.error}"]}
        done = await self._edits.carry_out(name, values, state)
        if done is None or done.errors:
            return None if done is None else {"applied": [], "errors": list(done.errors)}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._ttl):
                while self._sink is not None and self._shown < done.revision:
                    await self._handed.wait()
        return {"applied": list(done.applied), "errors": []}


class _Link:
    """Whether etcd answers: the watch stands, and the lease can be kept. Says once when that changes."""

    def __init__(self, endpoints: tuple[str, ...], ttl: float) -> None:
        self._where = ",".join(endpoints)
        self._late = ttl
        self._errors = {"watch": "not asked yet", "lease": "not asked yet"}
        self._changed = time.time()
        self._heard = self._changed
        self._connected = self._ever = False
        self._joining = ""

    def health(self, revision: int) -> Health:
        """Return the health with this revision as the newest that was handed out."""
        error = "" if self._connected else next(filter(None, self._errors.values()), "")
        lag = 0.0 if self._connected else time.time() - self._heard
        return Health(self._connected, error, self._changed, revision, lag)

    def joining(self, error: str) -> None:
        """Note why the node cannot join yet."""
        if error != self._joining:
            log.warning("cannot join the cluster yet, waiting etcd=%s: %s", self._where, error)
            self._joining = error

    def watching(self, error: str) -> None:
        """Note that the watch stands, or why it does not."""
        self._note("watch", error)

    def leased(self, error: str) -> None:
        """Note that the lease was kept, or why it could not."""
        self._note("lease", error)

    def _note(self, what: str, error: str) -> None:
        self._errors[what] = error
        connected = not any(self._errors.values())
        if connected == self._connected:
            self._heard = time.time() if connected else self._heard
            return
        now = time.time()
        if not connected:
            log.warning("etcd is away, going on with what is known etcd=%s: %s", self._where, error)
        elif self._ever:
            log.warning("etcd is back etcd=%s after=%.1fs", self._where, now - self._changed)
        self._connected, self._changed, self._heard = connected, now, now
        self._ever = True


class _Pause:
    """Waits longer each time until something succeeds."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin with the shortest pause again."""
        self._seconds = _RETRY_SECONDS[0]

    async def wait(self) -> None:
        """Wait, and wait longer the next time."""
        await asyncio.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, _RETRY_SECONDS[1])
