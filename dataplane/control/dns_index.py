"""What cluster DNS looks names up in: services, pods and namespaces by name, and whose an address may be.

The index follows the node's state: one that differs in one service costs a look at each service's identity and the
work for that one (10,000 services: half a millisecond). It holds the services themselves and makes nothing of them;
what a service says in DNS is found out when somebody asks (``dns_zone``).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from dataplane.control.cluster import Cluster, ClusterPod
from dataplane.control.services import changed_services
from dataplane.control.state import Address, DesiredState, Network, Node, Pod, Service

ServiceId: TypeAlias = tuple[str, str]
"""Namespace and name."""

Key = TypeVar("Key")

_NOTHING = DesiredState(Node(""))
_NO_PODS: Mapping[str, Pod | ClusterPod] = MappingProxyType({})


class Index:
    """Everything that a name or an address is compared with.

    Attributes:
        networks: Whose reverse names are ours: services' and pods' prefixes, disjoint.
    """

    def __init__(self) -> None:
        self.networks: tuple[Network, ...] = ()
        self._services: dict[str, dict[str, Service]] = {}
        self._holders: dict[bytes, tuple[ServiceId, ...]] = {}
        self._pods: Counter[tuple[str, bytes]] = Counter()
        self._pod_namespaces: Counter[str] = Counter()
        self._namespaces: frozenset[str] = frozenset()
        self._state = _NOTHING
        self._own_pods = self._cluster_pods = _NO_PODS

    def update(self, state: DesiredState, cluster: Cluster) -> bool:
        """Take over a state; say whether anything that names depend on has changed."""
        old, self._state = self._state, state
        gone, come = changed_services(old, state)
        for service in gone:
            self._remove(service)
        for service in come:
            self._add(service)
        changed = self._follow_pods(state, cluster) or bool(gone or come)
        if cluster.namespaces != self._namespaces:
            self._namespaces, changed = cluster.namespaces, True
        if _reverse_of(old) != _reverse_of(state):
            self.networks, changed = _disjoint(_reverse_of(state)), True
        return changed

    # --- looking up --------------------------------------------------------------------------------------------------

    def service(self, namespace: str, name: str) -> Service | None:
        """Return a service."""
        return self._services.get(namespace, {}).get(name)

    def has_namespace(self, name: str) -> bool:
        """Say whether a namespace exists: a store may know, else it has to have something in it."""
        return name in self._services or name in self._namespaces or name in self._pod_namespaces

    def has_pod(self, namespace: str, address: Address) -> bool:
        """Say whether some pod of this namespace has this address."""
        return (namespace, address.packed) in self._pods

    def holders(self, address: Address) -> Iterator[Service]:
        """Yield the services that may have a name for this address."""
        for namespace, name in self._holders.get(address.packed, ()):
            yield self._services[namespace][name]

    def __len__(self) -> int:
        return sum(map(len, self._services.values()))

    # --- following ---------------------------------------------------------------------------------------------------

    def _add(self, service: Service) -> None:
        identity = (service.namespace, service.name)
        self._services.setdefault(service.namespace, {})[service.name] = service
        for address in _named(service):
            held = self._holders.get(address, ())
            if identity not in held:
                self._holders[address] = (*held, identity)

    def _remove(self, service: Service) -> None:
        identity = (service.namespace, service.name)
        held = self._services.get(service.namespace, {})
        if held.pop(service.name, None) is None:
            return
        if not held:
            del self._services[service.namespace]
        for address in _named(service):
            left = tuple(each for each in self._holders.get(address, ()) if each != identity)
            if left:
                self._holders[address] = left
            else:
                self._holders.pop(address, None)

    def _follow_pods(self, state: DesiredState, cluster: Cluster) -> bool:
        changed = False
        if len(state.pods) != len(self._own_pods) or any(self._own_pods.get(pod.id) is not pod for pod in state.pods):
            changed = self._compare(self._own_pods, own := {pod.id: pod for pod in state.pods})
            self._own_pods = own
        if cluster.pods is not self._cluster_pods:
            changed |= self._compare(self._cluster_pods, cluster.pods)
            self._cluster_pods = cluster.pods
        return changed

    def _compare(self, old: Mapping[str, Pod | ClusterPod], new: Mapping[str, Pod | ClusterPod]) -> bool:
        changed = False
        for name, pod in new.items():
            before = old.get(name)
            if before is pod or before == pod:
                continue
            changed = True
            self._count(pod, 1)
            if before is not None:
                self._count(before, -1)
        for name in old.keys() - new.keys():
            changed = True
            self._count(old[name], -1)
        return changed

    def _count(self, pod: Pod | ClusterPod, step: int) -> None:
        _step(self._pod_namespaces, pod.namespace, step)
        for address in pod.addresses:
            _step(self._pods, (pod.namespace, address.packed), step)


def _step(counter: Counter[Key], key: Key, step: int) -> None:
    counter[key] += step
    if not counter[key]:
        del counter[key]


def is_headless(service: Service) -> bool:
    """Say whether a service's name stands for its endpoints."""
    return not service.cluster_ips and service.type != "ExternalName"


def _named(service: Service) -> set[bytes]:
    """Return the addresses that this service may have a name for, ready or not, as bytes."""
    found = {address.packed for address in service.cluster_ips}
    if is_headless(service):
        return found | {endpoint.address.packed for endpoint in service.endpoints}
    return found | {endpoint.address.packed for endpoint in service.endpoints if endpoint.hostname}


def _reverse_of(state: DesiredState) -> tuple[tuple[Network, ...], ...]:
    balancing = state.balancing
    blocks = tuple(cidr for peer in state.peers for cidr in peer.pod_cidrs)
    return balancing.service_cidrs, balancing.cluster_cidrs, state.pod_network.cidrs, blocks


def _disjoint(prefixes: tuple[tuple[Network, ...], ...]) -> tuple[Network, ...]:
    every = [prefix for some in prefixes for prefix in some]
    four = collapse_addresses(prefix for prefix in every if isinstance(prefix, IPv4Network))
    six = collapse_addresses(prefix for prefix in every if isinstance(prefix, IPv6Network))
    return (*four, *six)
