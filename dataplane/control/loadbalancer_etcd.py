"""Load balancer addresses in etcd: which services have which, written by one node of all.

    addresses/<address>   the services that have it, their sharing key and their ports
    allocator             who has written addresses last; every transaction that does compares its revision

Of the living nodes one writes, chosen by a hash of their names. That saves work and is not what makes it safe: two
nodes may both believe that they are the one. A transaction is carried out only if nobody has written addresses since
the state that it was made from, so no address goes to two services that do not share it, and no service gets two. Who
comes too late is told by its watch what has become of it, and thinks again.

Addresses that go are written before those that come: a node that dies half way leaves services without an address,
which its successor finds, and none with two.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping

from dataplane.control.assigner import edited
from dataplane.control.cluster import Cluster
from dataplane.control.etcd import Compare, Delete, Etcd, EtcdError, KeyValue, Put
from dataplane.control.loadbalancer import SHARED, Assignments, allocate, annotation, without_given
from dataplane.control.state import Address, Service

BATCH = 100  # operations of one transaction; etcd takes 128
_RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class AddressWriter:
    """Writes what the allocator says, as long as this node is the one to do it.

    Args:
        etcd: The connection.
        prefix: Of all keys, without a slash at its end.
        node: This node's name.
        revision: Returns the revision of a key as it is in the newest cluster, 0 without it.
    """

    def __init__(self, etcd: Etcd, prefix: str, node: str, revision: Callable[[str], int]) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._guard = f"{prefix}/allocator"
        self._node = node
        self._revision = revision
        self._texts: dict[str, str] = {}
        self._newest: tuple[Cluster, int] | None = None
        self._news = asyncio.Event()
        self._before: tuple[Service, ...] = ()
        self._done: tuple[object, ...] = ()

    def seen(self, item: KeyValue) -> None:
        """Take note of a key ``addresses/...``."""
        if item.deleted:
            self._texts.pop(item.key, None)
        else:
            self._texts[item.key] = item.value

    def follow(self, cluster: Cluster) -> None:
        """Take a new state of the cluster; it holds all that was seen up to now."""
        self._newest = cluster, self._revision(self._guard)
        self._news.set()

    async def run(self) -> None:
        """Write when there is something to write, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._settle()
            except EtcdError as error:
                log.debug("addresses cannot be written: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
                self._news.set()

    async def _settle(self) -> None:
        assert self._newest is not None
        cluster, guard = self._newest
        looked_at = (cluster.services, cluster.pools, cluster.assigned)
        if writer_of(cluster) != self._node:
            self._done = ()
            return
        if len(self._done) == len(looked_at) and all(a is b for a, b in zip(looked_at, self._done, strict=True)):
            return
        held = cluster.assigned or {}
        kept = without_given(held, cluster.services)
        outcome = allocate(cluster.services, cluster.pools, kept, edited(self._before, cluster.services))
        operations = list(self._operations(cluster.services, outcome.addresses))
        for start in range(0, len(operations), BATCH):
            batch = operations[start : start + BATCH]
            mark = Put(self._guard, json.dumps({"node": self._node}))
            done = await self._etcd.txn([Compare(self._guard, "mod_revision", guard)], [*batch, mark])
            if not done.succeeded:
                return  # somebody has written meanwhile, and what that was is on its way
            guard = done.revision
        for name in sorted(held.keys() | outcome.addresses.keys()):
            if held.get(name, ()) != outcome.addresses.get(name, ()):
                text = ",".join(map(str, outcome.addresses.get(name, ()))) or "none"
                log.info("load balancer addresses written service=%s addresses=%s", name, text)
        self._before, self._done = cluster.services, looked_at

    def _operations(self, services: tuple[Service, ...], assigned: Assignments) -> Iterator[Put | Delete]:
        """Yield what makes the keys say what they should, the deletions first."""
        wanted = {f"{self._prefix}/addresses/{address}": text for address, text in _records(services, assigned).items()}
        yield from (Delete(key) for key in sorted(self._texts.keys() - wanted.keys()))
        yield from (Put(key, text) for key, text in sorted(wanted.items()) if self._texts.get(key) != text)


def writer_of(cluster: Cluster) -> str | None:
    """Return the node that writes addresses; None while nobody is a member."""
    living = (name for name, node in cluster.nodes.items() if node.alive)
    return min(living, key=lambda name: hashlib.sha256(f"{name}#allocator".encode()).digest(), default=None)


def holders(values: Mapping[str, object]) -> tuple[str, ...]:
    """Return the services that an address's value names; raise ``ValueError`` if it is none."""
    services = values.get("services")
    if not isinstance(services, list) or not all(isinstance(each, str) and "/" in each for each in services):
        raise ValueError(f"services: expected a list of NAMESPACE/NAME (got {services!r})")
    return tuple(services)


def _records(services: tuple[Service, ...], assigned: Assignments) -> dict[Address, str]:
    users: dict[Address, list[Service]] = {}
    for service in services:
        for address in assigned.get(service.id, ()):
            users.setdefault(address, []).append(service)
    return {address: _record(sorted(having, key=lambda each: each.id)) for address, having in users.items()}


def _record(services: list[Service]) -> str:
    value = {
        "services": [service.id for service in services],
        "sharing": annotation(services[0], SHARED),
        "ports": sorted(f"{port.port}/{port.protocol}" for service in services for port in service.ports),
    }
    return json.dumps(value)
