"""Where the state of the cluster comes from: one interface for etcd and for a Kubernetes API server.

The node runs a source beside its packets. The source hands out every state of the cluster that is worth applying, the
newest only: what comes while one is being applied is applied together. When the store is away the node keeps what it
knows; the source says so, tries again, and hands out whatever has changed meanwhile.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from dataplane.control.cluster import Cluster, ClusterNode
from dataplane.control.ipam_addresses import Books
from dataplane.control.snapshot import ClusterStatus, Reload
from dataplane.control.state import DesiredState, Settings

Sink: TypeAlias = Callable[[Cluster], None]


class SourceError(Exception):
    """A store that the configuration describes and that can never work so; one line, with the key or file."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a source is doing.

    Attributes:
        connected: The store answered the last time.
        error: What it said, or why it could not be asked; "" while connected.
        changed: When ``connected`` last changed, seconds since the epoch.
        revision: The newest that was handed out.
        lag: Seconds by which that is behind the store, as far as the node can know; 0 while it is up to date.
    """

    connected: bool = False
    error: str = ""
    changed: float = 0
    revision: int = 0
    lag: float = 0


def cluster_status(
    source: Literal["static", "etcd", "kubernetes"], where: str, health: Health, here: str, nodes: Iterable[ClusterNode]
) -> ClusterStatus:
    """Return what ``dataplane cluster status`` shows of a source, at ``where``, and its nodes."""
    return {
        "source": source,
        "where": where,
        "connected": health.connected,
        "changed": health.changed,
        "error": health.error,
        "revision": health.revision,
        "lag_s": round(health.lag, 3),
        "nodes": [
            {
                "name": node.name,
                "address": str(node.addresses[0]) if node.addresses else "",
                "blocks": [str(cidr) for cidr in node.pod_cidrs],
                "zone": node.zone,
                "since": node.since,
                "alive": node.alive,
                "here": node.name == here,
            }
            for node in sorted(nodes, key=lambda node: node.name)
        ],
    }


class Source(Protocol):
    """A store of the cluster's state."""

    @property
    def health(self) -> Health:
        """How the source is doing now."""
        ...

    @property
    def addresses(self) -> Books | None:
        """Where pods of this node get addresses; None: out of the blocks that the node has."""
        ...

    async def join(self, settings: Settings) -> Cluster:
        """Make this node known, before it starts; return the first state, in which it has its pod blocks.

        Waits, with a line in the log, while the store cannot be reached.
        """
        ...

    async def run(self, sink: Sink) -> None:
        """Hand out states of the cluster until cancelled. Never ends by itself."""
        ...

    async def leave(self) -> None:
        """Take back what only a living node has, membership and ownership; do not wait for a store that is away."""
        ...

    def applied(self, given: DesiredState, state: DesiredState) -> None:
        """Take note of what the node has become; ``given`` is its file. Called when it has started, and ever after."""
        ...

    async def edit(self, name: str, values: tuple[Any, ...], state: DesiredState) -> Reload | None:
        """Carry out an edit of the control API (``config_edit``) in the store; None: the node keeps it for itself.

        ``state`` is the node's, to check the edit against. When this returns, what came of it has been handed out.
        """
        ...

    def status(self) -> ClusterStatus:
        """Return what ``dataplane cluster status`` shows; ``cluster_status`` makes it."""
        ...
