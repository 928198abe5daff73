"""What a Kubernetes API server knows, as one ``Cluster`` after another; no I/O.

Each collection has its shelf of values. A change of one object makes only that anew which depends on it: one endpoint
slice among 10,000 services touches one service, and every other service stays the same object.
"""

import logging
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from dataplane.control import kube_objects as objects
from dataplane.control.cluster import Cluster, ClusterNode, ClusterPod
from dataplane.control.kube_objects import KubeAdvertisement, KubePool, KubeService, KubeSlice
from dataplane.control.kube_watch import Shelf
from dataplane.control.selector import any_matches
from dataplane.control.state import Address, AddressPool, Endpoint, L2Advertisement, Labels, Network, Selector, Service

NOWHERE = ""  # no namespace has this name: a pool for namespaces of which there are none is for no service

T = TypeVar("T")

log = logging.getLogger(__name__)


class View:
    """The shelves, and the cluster that they come to.

    Attributes:
        balanced: Grows with every change of a service that wants a load balancer's address.

    Args:
        name: This node's.
    """

    def __init__(self, name: str) -> None:
        self.nodes = Shelf("nodes", objects.node_of, self._node_changed)
        self.services = Shelf("services", objects.service_of, self._service_changed)
        self.slices = Shelf("endpointslices", objects.slice_of, self._slice_changed)
        self.pods = Shelf("pods", objects.pod_of, self._pod_changed)
        self.namespaces = Shelf("namespaces", objects.namespace_of, self._namespace_changed)
        self.pools = Shelf("ipaddresspools", objects.pool_of, self._pool_changed)
        self.advertisements = Shelf("l2advertisements", objects.advertisement_of, self._pool_changed)
        self.balanced = 0
        self._own: ClusterNode | None = None
        self._name = name
        self._clashes: frozenset[str] = frozenset()
        self._slices: dict[str, dict[str, tuple[Endpoint, ...]]] = {}
        self._built: dict[str, Service] = {}
        self._order: list[str] = []
        self._dirty: set[str] = set()
        self._stale = {"nodes", "pods", "namespaces", "pools"}
        self._cluster = Cluster()

    @property
    def shelves(self) -> tuple[Shelf[object], ...]:
        """All of them."""
        found = self.nodes, self.services, self.slices, self.pods, self.namespaces, self.pools, self.advertisements
        return found  # type: ignore[return-value]

    @property
    def synced(self) -> bool:
        """Every collection was seen whole."""
        return all(shelf.synced for shelf in self.shelves)

    @property
    def revision(self) -> int:
        """The highest resource version seen, where those are numbers; they are for people only."""
        versions = (shelf.version for shelf in self.shelves)
        return max((int(version) for version in versions if version.isdecimal()), default=0)

    @property
    def own(self) -> ClusterNode | None:
        """This node as it was when it joined; None before."""
        return self._own

    def pin(self, own: ClusterNode) -> None:
        """Have this node keep its addresses and blocks from now on: they are fixed while it runs."""
        self._own = own
        self._stale.add("nodes")

    def cluster(self) -> Cluster:
        """Return the cluster as it is known now; the same object if nothing has changed."""
        old = self._cluster
        if self.advertisements.installed != (old.advertisements is not None):
            self._stale.add("pools")
        parts = {
            "nodes": self._nodes() if "nodes" in self._stale else old.nodes,
            "services": self._services() if self._dirty else old.services,
            "pods": _values(self.pods) if "pods" in self._stale else old.pods,
            "namespaces": frozenset(self.namespaces.entries) if "namespaces" in self._stale else old.namespaces,
            "pools": self._pools() if "pools" in self._stale else old.pools,
            "advertisements": self._advertisements() if "pools" in self._stale else old.advertisements,
        }
        self._stale.clear()
        self._dirty.clear()
        kept = {name: _same(getattr(old, name), part) for name, part in parts.items()}
        if any(kept[name] is not getattr(old, name) for name in kept):
            self._cluster = replace(old, revision=self.revision, **kept)
        return self._cluster

    # --- what changes ------------------------------------------------------------------------------------------------

    def _node_changed(self, _: str, __: ClusterNode | None, ___: ClusterNode | None) -> None:
        self._stale.add("nodes")

    def _pod_changed(self, _: str, __: ClusterPod | None, ___: ClusterPod | None) -> None:
        self._stale.add("pods")

    def _namespace_changed(self, _: str, __: Labels | None, ___: Labels | None) -> None:
        self._stale |= {"namespaces", "pools"}

    def _pool_changed(self, _: str, __: object, ___: object) -> None:
        self._stale.add("pools")

    def _service_changed(self, key: str, before: KubeService | None, after: KubeService | None) -> None:
        self._dirty.add(key)
        self.balanced += any(each is not None and each.service.type == "LoadBalancer" for each in (before, after))

    def _slice_changed(self, key: str, before: KubeSlice | None, after: KubeSlice | None) -> None:
        if before is not None and before.service:
            held = self._slices.get(before.service, {})
            held.pop(key, None)
            if not held:
                self._slices.pop(before.service, None)
            self._dirty.add(before.service)
        if after is not None and after.service:
            self._slices.setdefault(after.service, {})[key] = after.endpoints
            self._dirty.add(after.service)

    # --- services ----------------------------------------------------------------------------------------------------

    def _services(self) -> tuple[Service, ...]:
        for key in self._dirty:
            entry = self.services.entries.get(key)
            held = self._built.get(key)
            if entry is None or entry.value is None:
                if held is not None:
                    del self._built[key]
                    self._order.remove(key)
                continue
            slices = self._slices.get(key, {})
            made = replace(entry.value.service, endpoints=objects.merged(slices[name] for name in sorted(slices)))
            if held is None:
                insort(self._order, key)
            if held != made:
                self._built[key] = made
        return tuple(self._built[key] for key in self._order)

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _nodes(self) -> Mapping[str, ClusterNode]:
        """Return the nodes; of two that claim one address or one block the one with the first name has it.

        This node stays what it was when it joined, also while its Node object is away.
        """
        known = {name: entry.value for name, entry in self.nodes.entries.items() if entry.value is not None}
        if self._own is not None:
            known[self._name] = _pinned(known.get(self._name), self._own)
        addresses: dict[Address, str] = {}
        blocks: dict[Network, str] = {}
        found: dict[str, ClusterNode] = {}
        clashes = set()
        for name in sorted(known, key=lambda each: (each != self._name, each)):
            node = known[name]
            taken = {addresses[each] for each in node.addresses[:1] if each in addresses}
            taken |= {blocks[each] for each in node.pod_cidrs if each in blocks}
            if taken:
                clashes.add(name)
                if name not in self._clashes:
                    log.warning("node left out name=%s: has an address or block of %s", name, ", ".join(sorted(taken)))
                continue
            found[name] = node
            addresses.update(dict.fromkeys(node.addresses[:1], name))
            blocks.update(dict.fromkeys(node.pod_cidrs, name))
        self._clashes = frozenset(clashes)
        return MappingProxyType({name: found[name] for name in sorted(found)})

    # --- load balancer addresses -------------------------------------------------------------------------------------

    def _pools(self) -> tuple[AddressPool, ...]:
        return tuple(self._pool(pool) for _, pool in sorted(_values(self.pools).items()))

    def _pool(self, given: KubePool) -> AddressPool:
        """Return a pool with the names of the namespaces that its selectors choose."""
        if not given.namespace_selectors:
            return given.pool
        chosen = _names(self.namespaces, given.namespace_selectors)
        return replace(given.pool, namespaces=given.pool.namespaces | chosen or frozenset({NOWHERE}))

    def _advertisements(self) -> tuple[L2Advertisement, ...] | None:
        """Return the advertisements; None where the server has no such objects."""
        if not self.advertisements.installed:
            return None
        found = (self._advertisement(given) for _, given in sorted(_values(self.advertisements).items()))
        return tuple(each for each in found if each is not None)

    def _advertisement(self, given: KubeAdvertisement) -> L2Advertisement | None:
        """Return an advertisement with the names of the pools that its selectors choose; None if there are none."""
        if not given.pool_selectors:
            return given.advertisement
        pools = _values(self.pools).values()
        chosen = {each.pool.name for each in pools if any_matches(given.pool_selectors, each.labels)}
        names = given.advertisement.pools | chosen
        return replace(given.advertisement, pools=names) if names else None


def _pinned(now: ClusterNode | None, own: ClusterNode) -> ClusterNode:
    """What a running node cannot change it keeps; a Node object that is away is no member that announces."""
    if now is None:
        return replace(own, alive=False)
    return replace(now, addresses=own.addresses, pod_cidrs=own.pod_cidrs)


def _values(shelf: Shelf[T]) -> Mapping[str, T]:
    return MappingProxyType({key: entry.value for key, entry in shelf.entries.items() if entry.value is not None})


def _names(shelf: Shelf[Labels], selectors: Iterable[Selector]) -> frozenset[str]:
    chosen = tuple(selectors)
    return frozenset(name for name, labels in _values(shelf).items() if any_matches(chosen, labels))


def _same(old: T, new: T) -> T:
    """Return the old one if they are equal, so that what depends on it can tell by identity."""
    return old if old == new else new
