"""Writing load balancer addresses into the status of services, by one node of all.

The node that the election chose asks the allocator (``loadbalancer``) what each service should have, and patches
``status.loadBalancer.ingress`` where that is something else. A patch names the version that it was made from, so what
somebody else has changed meanwhile is never overwritten: the watch brings the change, and the allocator is asked again.
Why a service gets nothing it is told by an Event.

Without pools there is nothing to hand out, and no election. A ``loadBalancerClass`` is somebody else's business, and so
is an address that lies in no pool.
"""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from dataplane.control.kube_api import ApiError, KubeApi, KubeError, Resource, parsed
from dataplane.control.kube_lease import SECONDS, Election
from dataplane.control.kube_objects import KubeService
from dataplane.control.kube_view import View
from dataplane.control.kube_watch import Backoff, ObjectError
from dataplane.control.loadbalancer import allocate
from dataplane.control.pools import contains
from dataplane.control.state import Address, AddressPool, Service

LEASES = Resource("leases", group="coordination.k8s.io")
SERVICES, EVENTS = Resource("services"), Resource("events")
LEASE_NAME, NAMESPACE = "dataplane-loadbalancer", "kube-system"

log = logging.getLogger(__name__)


class Writer:
    """The candidate for the office, and its work when it has it.

    Attributes:
        election: Who has the office.

    Args:
        view: What the API server has.
        node: This node's name.
        namespace: Of the Lease; "" is kube-system.
    """

    def __init__(self, api: KubeApi, view: View, node: str, namespace: str) -> None:
        self._api, self._view, self._node = api, view, node
        self._namespace = namespace or NAMESPACE
        self._path = LEASES.path(self._namespace, LEASE_NAME)
        self._seconds = SECONDS
        self.election = Election(f"{node}_{uuid.uuid4()}", LEASE_NAME, self._namespace, SECONDS)
        self._news = asyncio.Event()
        self._backoff = Backoff()
        self._done: object = None
        self._told: dict[str, str] = {}
        self._error = ""

    def wake(self) -> None:
        """There may be something to do."""
        self._news.set()

    async def run(self) -> None:
        """Stand for election and write until cancelled."""
        while True:
            try:
                pause = await self._turn()
            except KubeError as error:
                if str(error) != self._error:
                    log.warning("load balancer addresses cannot be written: %s", error)
                self._error = str(error)
                pause = self._backoff.failed(error.retry_after if isinstance(error, ApiError) else 0)
                await asyncio.sleep(pause)
                continue
            self._error = ""
            self._backoff.succeeded()
            await self._rest(pause)

    async def _rest(self, seconds: float | None) -> None:
        """Wait this long, None: for ever, or, for who leads or has nothing to do, until there is news."""
        if seconds is not None and not self.election.leads(time.monotonic()):
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    async def _turn(self) -> float | None:
        """Do what is to be done now; return how long to wait for the next turn."""
        if not self._view.synced or not self._has_work():
            return None
        now = time.monotonic()
        if not self.election.leads(now + self._seconds / 3) and not await self._campaign():
            return self._seconds / 3 * (1 + random.random() / 2)
        await self._write()
        return self._seconds / 3

    def _has_work(self) -> bool:
        return bool(self._view.cluster().pools) and self._view.balanced > 0

    # --- the office --------------------------------------------------------------------------------------------------

    async def _campaign(self) -> bool:
        """Try to have the office, or to keep it; return whether that is so."""
        led, election = self.election.leads(time.monotonic()), self.election
        try:
            lease = parsed(await self._api.get(self._path))
        except ApiError as error:
            if error.status != 404:
                raise
            lease = None
        election.saw(lease, time.monotonic())
        wish = election.wish(time.monotonic(), time.time())
        if wish is None:
            return False
        try:
            if lease is None:
                answer = await self._api.create(LEASES.path(self._namespace), wish)
            else:
                answer = await self._api.replace(self._path, wish)
        except ApiError as error:
            if error.status != 409:
                raise
            return False  # another one was faster
        election.won(answer, time.monotonic())
        if not led:
            log.info("this node hands out load balancer addresses lease=%s/%s", self._namespace, LEASE_NAME)
            self._done = None
        return True

    async def resign(self) -> None:
        """Give the office up, if this node has it; a server that is away is not waited for."""
        farewell = self.election.farewell()
        if farewell is None:
            return
        try:
            await self._api.replace(self._path, farewell)
        except KubeError as error:
            log.info("the office ends by itself: %s", error)

    # --- the work ----------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        pools = self._view.cluster().pools
        if self._done == (self._view.balanced, pools):
            return
        before = self._view.balanced, pools
        services = [each for each in self._view.cluster().services if each.type == "LoadBalancer"]
        entries = self._view.services.entries
        wanting = {each.id: found for each in services if (found := entries[each.id].value) is not None}
        held = {key: each.held for key, each in wanting.items() if _in_pools(each.held, pools)}
        outcome = allocate(services, pools, held)
        whole = True
        for key, each in wanting.items():
            if key in outcome.addresses and outcome.addresses[key] != each.held:
                whole &= await self._assign(each, outcome.addresses[key])
            elif key in outcome.refusals and key in held:
                whole &= await self._assign(each, ())
            if key in outcome.refusals:
                await self._tell(each, outcome.refusals[key])
            else:
                self._told.pop(key, None)
        if whole:
            self._done = before

    async def _assign(self, each: KubeService, addresses: tuple[Address, ...]) -> bool:
        """Write a service's addresses; return False when it is no longer ``each``, or this node leads no more."""
        if not self.election.leads(time.monotonic()):
            return False
        service = each.service
        ingress = [{"ip": str(address)} for address in addresses] or None
        body = {"metadata": {"resourceVersion": each.version}, "status": {"loadBalancer": {"ingress": ingress}}}
        try:
            fresh = await self._api.patch(SERVICES.path(service.namespace, service.name, "status"), body)
        except ApiError as error:
            if error.status in (404, 409):
                return False
            raise
        log.info("load balancer address service=%s address=%s", service.id, ",".join(map(str, addresses)) or "none")
        held = self._view.services.entries.get(service.id)
        if held is None or held.value is not each:
            return True  # the watch was faster, and may know of what came after the patch: a deletion, say
        try:
            self._view.services.put(*self._view.services.read(fresh))  # before the watch says so
        except ObjectError:
            return False
        return True

    async def _tell(self, each: KubeService, why: str) -> None:
        """Say once, in the log and by an Event, why a service has no address."""
        service = each.service
        if self._told.get(service.id) == why:
            return
        self._told[service.id] = why
        log.warning("no load balancer address service=%s: %s", service.id, why)
        try:
            await self._api.create(EVENTS.path(service.namespace), _event(each, self._node, why, time.time()))
        except KubeError as error:
            log.info("no event for service=%s: %s", service.id, error)


def _in_pools(addresses: Iterable[Address], pools: Sequence[AddressPool]) -> bool:
    found = tuple(addresses)
    return bool(found) and all(any(contains(pool, address) for pool in pools) for address in found)


def _event(each: KubeService, node: str, why: str, wall: float) -> Mapping[str, Any]:
    """Return an Event of core/v1 about a service."""
    service: Service = each.service
    now = datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{service.name}.{uuid.uuid4().hex[:16]}", "namespace": service.namespace},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Service",
            "namespace": service.namespace,
            "name": service.name,
            "uid": each.uid,
        },
        "type": "Warning",
        "reason": "AllocationFailed",
        "message": why,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": "dataplane", "host": node},
    }
