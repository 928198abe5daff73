"""What a node writes into etcd about itself: its record, and its pods. What is there and should not be is deleted."""

import asyncio
import json

from dataplane.control.etcd import Delete, KeyValue, Operation, Put
from dataplane.control.etcd_contents import Contents
from dataplane.control.state import DesiredState, Pod

_MOST = 100  # operations of one transaction; etcd takes 128


class Published:
    """The keys of one node: what they should be, and what they are as far as the watch has seen.

    Pods are left alone until `want` is called the first time: those of a runtime are known when the node has started.
    """

    def __init__(self, prefix: str, state: DesiredState, contents: Contents) -> None:
        self._prefix = f"{prefix}/"
        self._node = state.node.name
        self._pods = f"{self._prefix}pods/{self._node}/"
        self.record = self._record(state)
        self._should: dict[str, str] | None = None
        self._is: dict[str, str] = {}
        self._news = asyncio.Event()
        contents.listen("nodes", self._seen)
        contents.listen("pods", self._seen)

    def want(self, given: DesiredState, pods: tuple[Pod, ...]) -> None:
        """Say what should be published."""
        self.record = self._record(given)
        should = {f"{self._pods}{pod.id}": json.dumps(_pod(pod)) for pod in pods}
        should[self.record.key] = self.record.value
        if should != self._should:
            self._should = should
            self._news.set()

    async def wanted(self) -> None:
        """Wait until there may be something to do."""
        await self._news.wait()
        self._news.clear()

    def again(self) -> None:
        """Let `wanted` return at once."""
        self._news.set()

    def missing(self) -> list[Operation]:
        """Return what brings etcd nearer to what should be there, as much as fits into a transaction."""
        if self._should is None:
            return []
        operations: list[Operation] = [
            Put(key, value) for key, value in self._should.items() if self._is.get(key) != value
        ]
        operations += [Delete(key) for key in self._is if key not in self._should]
        return operations[:_MOST]

    def done(self, operations: list[Operation]) -> None:
        """Take note of what was written; the watch brings it later."""
        for operation in operations:
            if isinstance(operation, Put):
                self._is[operation.key] = operation.value
            else:
                self._is.pop(operation.key, None)

    def _seen(self, item: KeyValue) -> None:
        if item.key != self.record.key and not item.key.startswith(self._pods):
            return
        if item.deleted:
            self._is.pop(item.key, None)
        else:
            self._is[item.key] = item.value
        if self._should is not None and self._should.get(item.key) != self._is.get(item.key):
            self._news.set()

    def _record(self, state: DesiredState) -> Put:
        node = state.node
        values = {
            "addresses": [str(address) for address in node.addresses],
            "podCIDR": [str(cidr) for cidr in state.pod_network.cidrs],
            "vtepMAC": node.vtep_mac.to_bytes(6, "big").hex(":"),
            "zone": node.zone,
            "labels": dict(node.labels),
            "uplinkMTU": state.uplink.mtu if state.uplink else 0,
        }
        return Put(f"{self._prefix}nodes/{node.name}", json.dumps(values))


def _pod(pod: Pod) -> dict[str, object]:
    return {"ip": [str(address) for address in pod.addresses], "labels": dict(pod.labels)}
