"""Nodes with services for the conformance tests, and services as the control API takes them.

A `Cluster` is one node or three, pods with netexec servers, and ``ext``, a machine on the LAN that is no node:

        ext .100, .101 ───┐
                          ├── br0, 192.0.2.0/24
    pods ── node1 .11 ────┤
    pods ── node2 .12 ────┤      pods have 10.244.<node>.<10, 20, ...>
    pods ── node3 .13 ────┘

Each test takes a `Spot`: addresses and a node port that no other test of its module has used, so that no flow and no
template of an earlier test can decide what it sees. Services are set on all nodes through the control API and deleted
when the test ends.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dataplane.control import client
from dataplane.control.query import parse
from dataplane.control.snapshot import ListKind
from tests.netns import ours
from tests.netns.harness import READY_TIMEOUT, Namespace, Network, Node, Process, eventually
from tests.netns.peers import Member

NETEXEC = Path(__file__).with_name("netexec.py")
HTTP, UDP_PORT, ALIAS = 8080, 8081, 8082  # netexec: tcp, udp, and both once more
LAN = "192.0.2.0/24"
EXT, EXT2 = "192.0.2.100", "192.0.2.101"
SERVED = (f"tcp:{HTTP}", f"udp:{UDP_PORT}", f"tcp:{ALIAS}", f"udp:{ALIAS}")
VIPS = ("10.96.0.0/12", "203.0.113.0/24")  # reached through the first node
BALANCING: Mapping[str, Any] = {"clusterCIDR": ["10.244.0.0/16"], "serviceCIDR": ["10.96.0.0/12"]}

Spec = dict[str, Any]


def e2e(name: str, file: str = "service.go") -> pytest.MarkDecorator:
    """Mark a test as one of Kubernetes' own, from test/e2e/network."""
    return pytest.mark.conformance(name, source=f"Kubernetes e2e {file}")


def selftest(name: str, file: str) -> pytest.MarkDecorator:
    """Mark a test as one of the kernel's own, from tools/testing/selftests/net/netfilter."""
    return pytest.mark.conformance(name, source=f"Linux selftest {file}")


# --- services --------------------------------------------------------------------------------------------------------


def port(number: int, target: int | str | None = None, protocol: str = "tcp", *, node: int = 0, name: str = "") -> Spec:
    """Return one port of a service."""
    made = {"name": name or f"{protocol}-{number}", "protocol": protocol.upper(), "port": number}
    default = {"tcp": HTTP, "udp": UDP_PORT}[protocol]
    return made | {"targetPort": target or default} | ({"nodePort": node} if node else {})


def both(number: int, node: int = 0) -> list[Spec]:
    """Return a TCP and a UDP port of the same number."""
    return [port(number, node=node), port(number, protocol="udp", node=node)]


def terminating(address: str, *, serving: bool = True) -> Spec:
    """Return an endpoint whose pod is being deleted."""
    return {"ip": address, "ready": False, "serving": serving, "terminating": True}


def unready(address: str) -> Spec:
    """Return an endpoint whose pod does not pass its probe."""
    return {"ip": address, "ready": False, "serving": False}


def service(name: str, vip: str, ports: Sequence[Spec], endpoints: Sequence[str | Spec], **keys: Any) -> Spec:
    """Return a service with the keys of ``[[services.static]]``; its type follows from what it has."""
    node_ports = any("nodePort" in each for each in ports)
    kind = "LoadBalancer" if "loadBalancerIPs" in keys else "NodePort" if node_ports else "ClusterIP"
    backends = [{"ip": each} if isinstance(each, str) else each for each in endpoints]
    return {"name": name, "type": kind, "clusterIPs": [vip], "ports": [*ports], "endpoints": backends, **keys}


def toml(value: Any) -> str:
    """Return a value as TOML writes it in one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def section(text: str, name: str, keys: Mapping[str, Any]) -> str:
    """Return a configuration with keys added to a section, which is made when it is missing."""
    lines = "".join(f"{key} = {toml(value)}\n" for key, value in keys.items())
    head = f"[{name}]\n"
    return text.replace(head, head + lines, 1) if head in text else f"{text}{head}{lines}"


def with_services(text: str, *, balancing: Mapping[str, Any], static: Sequence[Spec] = (), shared: bool = True) -> str:
    """Return a node's configuration with a host interface, an uplink mode, kube-proxy's settings and services."""
    text = section(text, "node", {"hostInterface": "dp0"})
    text = section(text, "uplink", {"shared": shared})
    text = section(text, "pods", {"natOutgoing": True})
    text = section(text, "services", balancing)
    return text + "".join(section("", "[services.static]", each) for each in static)


# --- nodes, pods and machines ----------------------------------------------------------------------------------------


class Spot(NamedTuple):
    """Addresses and a node port of one test's own."""

    vip: str
    node_port: int
    external: str


class Pod(NamedTuple):
    """A pod with a netexec server, which answers as ``name``."""

    name: str
    address: str
    namespace: Namespace
    server: Process


class Cluster:
    """Running nodes, their pods by name, and a client outside."""

    def __init__(self, network: Network, members: Sequence[Member], ext: Namespace) -> None:
        self.network, self.members, self.ext = network, members, ext
        self.hosts: list[Namespace] = []
        self.nodes: list[Node] = []
        self.pods: dict[str, Pod] = {}
        self._numbers = count(1)

    @property
    def node(self) -> Node:
        """The first node."""
        return self.nodes[0]

    @property
    def host(self) -> Namespace:
        """Its namespace."""
        return self.hosts[0]

    @property
    def address(self) -> str:
        """Its address."""
        return str(self.members[0].address)

    def spot(self) -> Spot:
        """Return addresses that were not used before."""
        number = next(self._numbers)
        return Spot(f"10.96.0.{number}", 30100 + number, f"203.0.113.{number}")

    def where(self, name: str) -> Namespace:
        """Return the namespace of a pod, of ``ext``, of ``node`` (the first) or of ``node2``."""
        if name in self.pods:
            return self.pods[name].namespace
        places = {"ext": self.ext, "node": self.host}
        return places[name] if name in places else self.hosts[int(name.removeprefix("node")) - 1]

    def start_pod(self, name: str, address: str) -> Pod:
        """Start a server in a pod that a node has made."""
        namespace = self.network.pod(name)
        self.pods[name] = Pod(name, address, namespace, serve(namespace, name, *SERVED))
        return self.pods[name]

    # What the control API offers, on every node.

    def set(self, *services: Spec) -> None:
        """Set services whole."""
        for each in services:
            keys = {key: value for key, value in each.items() if key != "name"}
            for node in self.nodes:
                client.set_service(node.socket, "default", each["name"], keys)

    def delete(self, name: str) -> None:
        """Delete a service."""
        for node in self.nodes:
            client.delete_service(node.socket, "default", name)

    def rows(self, kind: ListKind, **words: str) -> list[dict[str, Any]]:
        """Return a listing of the first node, filtered."""
        found: list[dict[str, Any]] = client.listing(self.node.socket, kind, parse(words, kind))[kind]
        return found

    def forget(self, address: str) -> None:
        """Have the first node forget the flows to an address."""
        client.delete_flows(self.node.socket, parse({"dst": address}))

    @contextmanager
    def use(self, *services: Spec) -> Iterator[None]:
        """Have these services, and none of them afterwards, whatever they have become meanwhile."""
        with ExitStack() as stack:
            for each in services:
                self.set(each)
                stack.callback(self.delete, each["name"])
            yield


def serve(namespace: Namespace, name: str, *sockets: str) -> Process:
    """Start a netexec server and wait until it listens."""
    running = namespace.spawn(sys.executable, NETEXEC, "serve", name, *sockets)
    running.expect("ready")
    return running


def make_cluster(
    network: Network,
    pods: Sequence[Mapping[str, str]],
    *,
    balancing: Mapping[str, Any] | None = None,
    static: Sequence[Spec] = (),
    shared: bool = True,
    others: Sequence[tuple[Namespace, str]] = (),
    gateway: str = EXT,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> Cluster:
    """Start as many nodes as ``pods`` has elements, each with these pods (address by name).

    ``others`` are on the LAN, too; ``gateway`` is where the nodes send what they have no route for; ``sections`` are
    more ones of their files.
    """
    members = [ours.member(network, number) for number in range(1, len(pods) + 1)]
    made = Cluster(network, members, network.namespace("ext"))
    made.hosts += [network.namespace(f"host{number}") for number in range(1, len(pods) + 1)]
    network.lan(
        (made.ext, f"{EXT}/24"),
        *[(host, f"{each.address}/24") for host, each in zip(made.hosts, members, strict=True)],
        *others,
    )
    made.ext.ip("address", "add", f"{EXT2}/24", "dev", "eth0")
    for prefix in VIPS:
        made.ext.ip("route", "add", prefix, "via", made.address)
    for host, me, own in zip(made.hosts, members, pods, strict=True):
        host.ip("route", "add", "default", "via", gateway)
        if not shared:
            host.ip("address", "flush", "dev", "eth0")
        text = ours.config(me, own, [each for each in members if each is not me], routes={"0.0.0.0/0": gateway})
        text = with_services(text, balancing=balancing or BALANCING, static=static, shared=shared)
        if not shared:
            text += f'[[routes]]\ndst = "{LAN}"\n'  # no address of an interface tells it
        text += "".join(section("", name, keys) for name, keys in (sections or {}).items())
        made.nodes.append(network.node(host, me.name.removeprefix(network.prefix), text))
    for process in [node.launch() for node in made.nodes]:
        process.expect(r"\bready\b", READY_TIMEOUT)
    for node in made.nodes:
        eventually(partial(client.listens, node.socket), READY_TIMEOUT)
    for own in pods:
        for name, address in own.items():
            made.start_pod(name, address)
    return made
