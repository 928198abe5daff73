"""Objects of the Kubernetes API for tests, and a server with short words to change what it has."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dataplane.config import parse
from dataplane.control.cluster import Cluster
from dataplane.control.kube_config import Access
from dataplane.control.state import Settings
from dataplane.control.store_kubernetes import KubernetesSource
from tests.kube_server import KubeServer
from tests.kube_store import KINDS, Object, key_of

KIND = {kind.kind: kind for kind in KINDS}
FILE = """
[node]
name = "node1"
[uplink]
interface = "eth0"
[state]
source = "kubernetes"
"""


def settings(text: str = FILE) -> Settings:
    """Return the settings of a node that follows an API server."""
    return parse(text, "node.toml")


def node(name: str, number: int = 1, **more: Any) -> Object:
    """Return a Node that is ready: 192.0.2.1<number>, 10.244.<number>.0/24."""
    status = {
        "addresses": [
            {"type": "InternalIP", "address": f"192.0.2.{10 + number}"},
            {"type": "Hostname", "address": name},
        ],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    block = f"10.244.{number}.0/24"
    return {
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDR": block, "podCIDRs": [block]},
        "status": status,
    } | more


def namespace(name: str = "default", **labels: str) -> Object:
    """Return a Namespace."""
    return {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def service(name: str, ip: str = "10.96.0.20", **spec: Any) -> Object:
    """Return a Service with the port http, 80."""
    ports = [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]
    given = {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ports": ports} | spec
    return {"kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": given}


def endpoints(name: str, of: str, addresses: Sequence[str], port: int = 8080, **conditions: bool) -> Object:
    """Return an EndpointSlice of a service."""
    metadata = {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": of}}
    made = [
        {"addresses": [each], "conditions": {"ready": True} | conditions, "nodeName": "node1"} for each in addresses
    ]
    ports = [{"name": "http", "protocol": "TCP", "port": port}]
    return {"kind": "EndpointSlice", "metadata": metadata, "addressType": "IPv4", "ports": ports, "endpoints": made}


def pod(name: str, ip: str, on: str = "node1", **status: Any) -> Object:
    """Return a Pod that runs."""
    given = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]} | status
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": on},
        "status": given,
    }


def pool(name: str, *addresses: str, **spec: Any) -> Object:
    """Return an IPAddressPool."""
    metadata = {"name": name, "namespace": "metallb-system"}
    return {"kind": "IPAddressPool", "metadata": metadata, "spec": {"addresses": list(addresses)} | spec}


def advertisement(name: str, **spec: Any) -> Object:
    """Return an L2Advertisement."""
    return {"kind": "L2Advertisement", "metadata": {"name": name, "namespace": "metallb-system"}, "spec": spec}


def put(server: KubeServer, *items: Object) -> None:
    """Create objects, or replace those that there are, with their status."""
    for item in items:
        kind, store = KIND[item["kind"]], server.store
        version = store.version
        if key_of(item) in store.objects[kind.plural]:
            store.replace(kind, key_of(item), item)
            _publish(server, version)
            version = store.version
            if "status" in item:
                store.replace(kind, key_of(item), item, status=True)
        else:
            store.create(kind, item["metadata"].get("namespace", ""), item)
        _publish(server, version)


def drop(server: KubeServer, item: Object) -> None:
    """Delete an object."""
    server.store.delete(KIND[item["kind"]], key_of(item))
    server.publish()


def _publish(server: KubeServer, version: int) -> None:
    if server.store.version != version:
        server.publish()


async def eventually(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"not in {seconds:g} s: {condition()!r}")


class Following:
    """A source that follows a server, and the newest that it has handed out."""

    def __init__(self, source: KubernetesSource, cluster: Cluster) -> None:
        self.source, self.cluster = source, cluster
        self.handed: list[Cluster] = []

    def take(self, cluster: Cluster) -> None:
        """Be the sink."""
        self.cluster = cluster
        self.handed.append(cluster)

    def endpoints(self, name: str) -> list[str]:
        """Return the addresses behind a service."""
        found = [each for each in self.cluster.services if each.id == f"default/{name}"]
        return [str(endpoint.address) for each in found for endpoint in each.endpoints]


@asynccontextmanager
async def following(server: KubeServer, text: str = FILE, access: Access | None = None) -> AsyncIterator[Following]:
    """Join a server's cluster, and follow it for the length of the ``with``."""
    source = KubernetesSource(settings(text), access or Access(server.url, token=server.token))
    try:
        async with asyncio.timeout(60):
            found = Following(source, await source.join(settings(text)))
        task = asyncio.ensure_future(source.run(found.take))
        try:
            yield found
        finally:
            task.cancel()
    finally:
        await source.leave()


@asynccontextmanager
async def serving(*items: Object, **options: Any) -> AsyncIterator[KubeServer]:
    """Have a server with some objects."""
    server = KubeServer(**options)
    for item in items:
        server.store.create(KIND[item["kind"]], item["metadata"].get("namespace", ""), item)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
