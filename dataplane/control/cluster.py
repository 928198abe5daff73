"""What a store knows of the whole cluster, as one immutable value, and what it makes of a node's own file.

A source (``source.Source``) hands out one ``Cluster`` after another, each whole. Parts that did not change are the
same objects as before: a plan looks only at services that differ, which it finds out by identity, so one endpoint that
changes among 10,000 services costs a millisecond.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from dataplane.control.state import (
    Address,
    AddressPool,
    DesiredState,
    L2Advertisement,
    Labels,
    Network,
    Peer,
    Service,
    vtep_mac,
)

EXCLUDED = "node.kubernetes.io/exclude-from-external-load-balancers"  # a label; its value does not matter


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node of the cluster, this one included.

    Attributes:
        addresses: Its InternalIPs; the first is where its VXLAN datagrams come from and go to.
        pod_cidrs: Its blocks, the one with its tunnel address first, and the /32s that it borrowed from others.
        vtep_mac: 0: derived from the name.
        network_unavailable: It has the condition ``NetworkUnavailable``: it announces nothing.
        since: When it joined, in seconds since the epoch; 0: unknown.
        alive: It is a member now: its lease has not ended, or its Node object is ready.
    """

    name: str
    addresses: tuple[Address, ...] = ()
    pod_cidrs: tuple[Network, ...] = ()
    vtep_mac: int = 0
    zone: str = ""
    labels: Labels = ()
    network_unavailable: bool = False
    since: float = 0
    alive: bool = True

    @property
    def announces(self) -> bool:
        """Whether it may own load balancer addresses."""
        return not self.network_unavailable and all(key != EXCLUDED for key, _ in self.labels)


@dataclass(frozen=True, slots=True)
class ClusterPod:
    """A pod anywhere in the cluster, as far as cluster DNS and people want to know it."""

    name: str
    namespace: str
    node: str
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Cluster:
    """One state of the whole cluster.

    Attributes:
        nodes: By name.
        pods: By ``namespace/name``.
        namespaces: That exist; services and pods may have others as well where a store knows no namespaces.
        advertisements: None: no such objects are known, and every address is announced by any node.
        owners: Who announces which load balancer address; None: the nodes elect them.
        assigned: The load balancer addresses that the store's services got from pools, by the service's id; None: the
            services say that themselves (``status.loadBalancer``).
        revision: Of the store: etcd's, or the highest ``resourceVersion`` seen.
    """

    nodes: Mapping[str, ClusterNode] = field(default_factory=lambda: MappingProxyType({}))
    services: tuple[Service, ...] = ()
    pods: Mapping[str, ClusterPod] = field(default_factory=lambda: MappingProxyType({}))
    namespaces: frozenset[str] = frozenset()
    pools: tuple[AddressPool, ...] = ()
    advertisements: tuple[L2Advertisement, ...] | None = None
    owners: frozenset[tuple[Address, str]] | None = None
    assigned: Mapping[str, tuple[Address, ...]] | None = None
    revision: int = 0


def over(cluster: Cluster, state: DesiredState) -> DesiredState:
    """Return the state of this node's file with the cluster around it.

    What the file says of peers and services comes first: of two peers with one name, or two services with one, the
    file's is used. The node's blocks are those that the store gave it, if it did.
    """
    given = {peer.name for peer in state.peers} | {state.node.name}
    others = (cluster.nodes[name] for name in sorted(cluster.nodes.keys() - given))
    own = cluster.nodes.get(state.node.name, ClusterNode(state.node.name))
    return replace(
        state,
        node=replace(
            state.node,
            labels=state.node.labels or own.labels,
            zone=state.node.zone or own.zone,
            addresses=state.node.addresses or own.addresses,
            announces=own.announces and own.alive,
        ),
        pod_network=replace(state.pod_network, cidrs=own.pod_cidrs or state.pod_network.cidrs),
        peers=(*state.peers, *(peer for node in others for peer in _peer(node))),
        services=_services(state.services, cluster.services),
        pools=(*state.pools, *cluster.pools),
        advertisements=_advertisements(state.advertisements, cluster.advertisements),
        owners=cluster.owners,
        assigned=cluster.assigned or {},
    )


def _peer(node: ClusterNode) -> Iterator[Peer]:
    """Yield the peer that a node is; nothing for one that cannot be reached (yet)."""
    if node.addresses and node.pod_cidrs:
        yield Peer(
            node.name,
            node.addresses[0],
            node.pod_cidrs,
            node.vtep_mac or vtep_mac(node.name),
            zone=node.zone,
            labels=node.labels,
            announces=node.announces and node.alive,
        )


def _services(own: tuple[Service, ...], clusters: tuple[Service, ...]) -> tuple[Service, ...]:
    if not own:
        return clusters
    names = {service.id for service in own}
    return (*own, *(service for service in clusters if service.id not in names))


def _advertisements(
    own: tuple[L2Advertisement, ...] | None, clusters: tuple[L2Advertisement, ...] | None
) -> tuple[L2Advertisement, ...] | None:
    return own if clusters is None else (*(own or ()), *clusters)
