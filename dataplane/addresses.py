"""Where a node's pods get addresses that no file names: from the store, if that keeps the books, else from a file."""

from collections.abc import Mapping
from pathlib import Path

from dataplane.control.cluster import Cluster, ClusterPod
from dataplane.control.ipam import Rules
from dataplane.control.ipam_addresses import Books
from dataplane.control.ipam_static import StaticAddresses
from dataplane.control.state import Address, Pod
from dataplane.node import Node


class FileAddresses(StaticAddresses):
    """Addresses out of the blocks that the node has at the time, without those of its file's pods."""

    def __init__(self, node: Node, path: Path) -> None:
        rules = node.settings.ipam or Rules()
        super().__init__(path, node.settings.state, rules.reservations, rules.cooldown)
        self._node = node

    async def assign(
        self, handle: str, now: float, requested: Address | None = None, attributes: Mapping[str, str] | None = None
    ) -> Address:
        """Return the handle's address, a new one if it has none (``Addresses.assign``)."""
        self.follow(self._node.wiring.state or self._node.settings.state)
        return await super().assign(handle, now, requested, attributes)


def open_addresses(node: Node, run: Path) -> Books:
    """Return the books; a file of theirs is in the folder ``run``. A node must not have two of them."""
    kept = node.source.addresses if node.source is not None else None
    return kept if kept is not None else FileAddresses(node, run / f"{node.settings.state.node.name}.ipam.json")


def holders(node: Node, cluster: Cluster) -> dict[Address, str]:
    """Return the pods that are known, this node's and all others', by their addresses."""
    pods: list[Pod | ClusterPod] = [*cluster.pods.values(), *(node.wiring.state.pods if node.wiring.state else ())]
    return {address: f"{pod.namespace}/{pod.name}" for pod in pods for address in pod.addresses}


def nodes_alive(node: Node, cluster: Cluster) -> frozenset[str]:
    """Return the names of the nodes that are there."""
    return frozenset(each.name for each in cluster.nodes.values() if each.alive) | {node.settings.state.node.name}
