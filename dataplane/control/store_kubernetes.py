"""The cluster's state from a Kubernetes API server.

Every collection has a task of its own that lists and watches it (`Reflector`); what they see becomes one `Cluster`
after another (`View`), handed out when the events that have come are all taken over. The node joins when every
collection was seen whole once and its own Node object says where it is: addresses and blocks, as far as its file does
not.

When the server is away the node keeps what it knows. Services belong to the server: edits of the control API are
refused. One node of all writes the addresses of load balancers into the status of services (`kube_status`).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from dataplane.control.cluster import Cluster, ClusterNode
from dataplane.control.ipam_addresses import Books
from dataplane.control.kube_api import KubeApi, Resource
from dataplane.control.kube_config import Access, load
from dataplane.control.kube_status import Writer
from dataplane.control.kube_view import View
from dataplane.control.kube_watch import Link, Reflector
from dataplane.control.snapshot import ClusterStatus, Reload
from dataplane.control.source import Health, Sink, cluster_status
from dataplane.control.state import DesiredState, Settings

NODES, SERVICES, PODS, NAMESPACES = (Resource(name) for name in ("nodes", "services", "pods", "namespaces"))
SLICES = tuple(Resource("endpointslices", version, "discovery.k8s.io") for version in ("v1", "v1beta1"))
POOLS, ADVERTISEMENTS = (Resource(name, "v1beta1", "metallb.io") for name in ("ipaddresspools", "l2advertisements"))

_LEAVE_SECONDS = 1.0
_NOT_ASKED = "not asked yet"

log = logging.getLogger(__name__)


class KubernetesSource:
    """Follows an API server.

    Attributes:
        addresses: None: the API server gives each node a block, and the node the addresses in it.

    Args:
        settings: The node's.
        access: How the server is reached; None: as the settings say.

    Raises:
        KubeconfigError: It cannot be reached as the settings say.
    """

    def __init__(self, settings: Settings, access: Access | None = None) -> None:
        self.addresses: Books | None = None
        self._settings = settings
        self._access = access or load(settings.store.kubeconfig)
        self._api = KubeApi(self._access)
        self._name = settings.state.node.name
        self.view = View(self._name)
        self._news = asyncio.Event()
        self._handed: Cluster | None = None
        self._link = Link()
        self._answered = 0
        self._reflectors = self._made()
        self._writer = Writer(self._api, self.view, self._name, self._access.namespace)
        self._tasks: dict[Callable[[], Any], asyncio.Task[Any]] = {}

    def _made(self) -> tuple[Reflector[Any], ...]:
        view, dns = self.view, self._settings.state.dns
        # Names of pods by their address need all pods; else only the node's own are of interest.
        everywhere = dns is not None and dns.pods == "verified"
        own = {} if everywhere else {"fieldSelector": f"spec.nodeName={self._name}"}

        def made(shelf: Any, *versions: Resource, optional: bool = False, **more: Any) -> Reflector[Any]:
            return Reflector(self._api, versions, shelf, optional=optional, news=self._news.set, **more)

        return (
            made(view.nodes, NODES),
            made(view.services, SERVICES),
            made(view.slices, *SLICES),
            made(view.namespaces, NAMESPACES, optional=True),
            made(view.pods, PODS, optional=True, parameters=own),
            made(view.pools, POOLS, optional=True),
            made(view.advertisements, ADVERTISEMENTS, optional=True),
        )

    # --- the source --------------------------------------------------------------------------------------------------

    @property
    def health(self) -> Health:
        """How the source is doing now."""
        link = self._link
        return Health(link.connected, link.error, link.since, self.view.revision, self._lag())

    def _lag(self) -> float:
        """Nothing is known of a server that is away; one that answers sends every change at once."""
        return 0.0 if self._link.connected else time.time() - self._link.since

    async def join(self, settings: Settings) -> Cluster:
        """Return the first state, once everything was seen and the node's own Node object says where it is.

        Waits, with a line in the log, for the server and for the Node object.
        """
        self._settings = settings
        said = ""
        while True:
            self._start()
            await self._next()
            waiting = self._waits_for()
            if not waiting:
                break
            line = waiting if self._link.error in ("", _NOT_ASKED) else f"{waiting}: {self._link.error}"
            if line != said:
                log.info("joining the cluster server=%s: waiting for %s", self._access.server, line)
                said = line
        entry = self.view.nodes.entries.get(self._name)
        own = entry.value if entry is not None and entry.value is not None else ClusterNode(self._name)
        given = settings.state
        self.view.pin(
            replace(
                own,
                addresses=given.node.addresses or own.addresses,
                pod_cidrs=own.pod_cidrs or given.pod_network.cidrs,
            )
        )
        self._handed = self.view.cluster()
        log.info(
            "joined the cluster server=%s nodes=%d services=%d revision=%d",
            self._access.server, len(self._handed.nodes), len(self._handed.services), self._handed.revision,
        )  # fmt: skip
        return self._handed

    def _waits_for(self) -> str:
        """Say what must be known before the node can start; "" when all of it is."""
        if not self.view.synced:
            return "the api server's objects"
        given, entry = self._settings.state, self.view.nodes.entries.get(self._name)
        own = entry.value if entry is not None else None
        if not given.node.addresses and given.uplink is not None and not (own and own.addresses):
            return f"an InternalIP of the Node {self._name}"
        if not given.pod_network.cidrs and not (own and own.pod_cidrs):
            return f"a podCIDR of the Node {self._name}"
        return ""

    async def run(self, sink: Sink) -> None:
        """Hand out states of the cluster until cancelled."""
        while True:
            self._start()
            await self._next()
            cluster = self.view.cluster()
            if cluster is not self._handed:
                self._handed = cluster
                sink(cluster)

    async def leave(self) -> None:
        """End all connections; give up the writer's office, if the server takes that at once."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self._writer.resign()
        await self._api.close()

    async def edit(self, name: str, values: tuple[Any, ...], state: DesiredState) -> Reload | None:
        """Refuse: the services are the API server's."""
        text = f"services are kept by the api server {self._access.server}: change them with kubectl"
        return {"applied": [], "errors": [text]}

    def applied(self, given: DesiredState, state: DesiredState) -> None:
        """Nothing is written about this node: its pods are the API server's already."""

    def status(self) -> ClusterStatus:
        """Return what ``dataplane cluster status`` shows (`snapshot.ClusterStatus`)."""
        return cluster_status(
            "kubernetes", self._access.server, self.health, self._name, self.view.cluster().nodes.values()
        )

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Have a task for each collection, and one for the writer; one that ended by a bug is begun anew."""
        for work in (*(reflector.run for reflector in self._reflectors), self._writer.run):
            if work not in self._tasks:
                self._tasks[work] = asyncio.ensure_future(work())

    async def _next(self) -> None:
        """Wait for news, and take note of how the connections are doing.

        Raises:
            Exception: A task has failed: a bug.
        """
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait({news, *self._tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        self._news.clear()
        for work, task in [*self._tasks.items()]:
            if task.done():
                del self._tasks[work]
                task.result()
        self._look()
        self._writer.wake()

    def _look(self) -> None:
        """Note how the connections are doing, and say when that changes."""
        answered = sum(reflector.link.connected for reflector in self._reflectors)
        if answered > self._answered:
            for reflector in self._reflectors:
                reflector.hurry()
        self._answered = answered
        errors = [reflector.link.error for reflector in self._reflectors if not reflector.link.connected]
        error = next(filter(None, errors), _NOT_ASKED) if errors else ""
        connected = self._link.connected
        self._link.set(error)
        if connected and not self._link.connected:
            log.warning("api server away, the node goes on with what it knows: %s", error)
        elif self._link.connected and not connected and self._handed is not None:
            log.info("api server answers again server=%s", self._access.server)
