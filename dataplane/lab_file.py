"""``cluster.toml`` becomes a plan; pure.

On the LAN the client, who is the router, too, has the first address, the switch (where etcd listens) the second, and
the nodes those from the eleventh on. The n-th node has the n-th block of the pods' range, and its pods have addresses
from the tenth on. What is said of services, pools and DNS goes into each node's own file as it stands; the first of
these files is checked as any node's is, and its errors are told at the keys that they come from.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from dataplane import config
from dataplane.config_checks import Problem, check, overlaps
from dataplane.config_lab import MAX_NODES, LabFile, LabService, NetworkSection, PodGroup
from dataplane.config_lines import KeyPath
from dataplane.control.state import Network
from dataplane.lab_plan import CLIENT, ETCD_PORT, LAN, RUN, LabNode, LabPod, Plan

DEFAULT = Path(__file__).with_name("cluster.toml")
_BARE = re.compile(r"[A-Za-z0-9_-]+")

_CLIENT, _SWITCH, _NODES, _PODS = 1, 2, 10, 10  # where addresses begin in their prefixes; nodes count from 1
# A node's keys, and the lab's that they are made from.
_ORIGINS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("services", "serviceCIDR"): ("network", "serviceCIDR"),
    ("services", "clusterCIDR"): ("network", "podCIDR"),
    ("services", "static"): ("services",),
    ("uplink", "mtu"): ("network", "mtu"),
    ("pods", "mtu"): ("network", "mtu"),
    ("pods",): ("network", "podCIDR"),
    ("peers",): ("network",),
    ("routes",): ("network", "lan"),
    ("node",): ("network", "lan"),
}


def load(path: Path | None = None, name: str = "") -> Plan:
    """Read and check a file, None is the built-in example, and return the plan; ``name`` replaces the lab's.

    Raises:
        config.ConfigError: With every problem of the file.
    """
    file = path or DEFAULT
    return parse(config.read(file), file, name)


def parse(source: str, file: Path | str, name: str = "") -> Plan:
    """Check a lab's file that is already text, and return the plan."""
    made: list[Plan] = []

    def sense(lab: LabFile, values: dict[str, Any]) -> Iterator[Problem]:
        problems = list(_own(lab))
        yield from problems
        if not problems:
            layout = _Layout(lab, values, name)
            made.append(layout.plan())
            yield from _of_a_node(layout)

    schema: config.Schema[LabFile] = config.Schema(lambda _: LabFile, lambda: LabFile)
    config.checked(source, file, schema, sense)
    return made[0]


# --- what must fit together ------------------------------------------------------------------------------------------


def _own(lab: LabFile) -> Iterator[Problem]:
    """Yield what is wrong with the lab itself; with the rest a node is asked."""
    network, count = lab.network, lab.cluster.nodes
    keys = {"lan": network.lan, "podCIDR": network.pod_cidr, "serviceCIDR": network.service_cidr}
    ranges: list[tuple[KeyPath, Network]] = [(("network", key), prefix) for key, prefix in keys.items()]
    if any(prefix.version == 6 for _, prefix in ranges):
        yield from (Problem(at, f"IPv6 is not supported yet (got {got})") for at, got in ranges if got.version == 6)
        return
    yield from overlaps(ranges)
    if network.lan.num_addresses < _NODES + count + 2:
        text = f"expected room for {count} nodes from the eleventh address on (got {network.lan})"
        yield Problem(("network", "lan"), text, ("cluster.nodes",))
    yield from _blocks(network, count)
    yield from _pods(lab)
    for index, service in enumerate(lab.services):
        if service.selector and service.endpoints:
            yield Problem(("services", index, "endpoints"), "has selector, too: give one of them")


def _blocks(network: NetworkSection, count: int) -> Iterator[Problem]:
    given = network.pod_cidr.prefixlen
    if given > network.block_size:
        text = f"expected a block inside podCIDR {network.pod_cidr} (got {network.block_size})"
        yield Problem(("network", "blockSize"), text, ("network.podCIDR",))
    elif 1 << (network.block_size - given) <= count:
        text = f"expected room for {count} blocks of /{network.block_size} beside the first (got {network.pod_cidr})"
        yield Problem(("network", "podCIDR"), text, ("network.blockSize", "cluster.nodes"))


def _pods(lab: LabFile) -> Iterator[Problem]:
    room = (1 << (32 - lab.network.block_size)) - _PODS - 1
    for index, group in enumerate(lab.pods):
        if bool(group.count) == bool(group.per_node):
            yield Problem(("pods", index), "expected count or perNode", ("pods.count", "pods.perNode"))
    names = {f"node{number}" for number in range(1, MAX_NODES + 1)} | {CLIENT, LAN}
    on: Counter[int] = Counter()
    twice: set[int] = set()
    for index, name, _, number in _dealt(lab):
        on[number] += 1
        if name in names and index not in twice:
            yield Problem(("pods", index, "name"), f"used twice: {name}")
            twice.add(index)
        if on[number] == room + 1:
            text = f"more pods on node{number} than the {room} that a block of /{lab.network.block_size} has room for"
            yield Problem(("pods", index), text, ("network.blockSize", "cluster.nodes"))
        names.add(name)


def _of_a_node(layout: "_Layout") -> Iterator[Problem]:
    """Yield what the first node's file would be refused for, at the keys that it is made from."""
    node = layout.node_values(1)
    layout.share(node)
    node.pop("state", None)  # what etcd would be told is checked as a file's
    file, problems = config.shape(node)
    assert file is not None, problems  # the lab's models are the node's
    for problem in (*problems, *check(file, node)):
        yield Problem(_origin(problem.path), problem.text, tuple(map(_used, problem.uses)))


def _origin(path: KeyPath) -> KeyPath:
    for ours, theirs in _ORIGINS.items():
        if path[: len(ours)] == ours:
            return (*theirs, *path[len(ours) :])
    return path


def _used(key: str) -> str:
    for ours, theirs in _ORIGINS.items():
        if key.startswith(".".join(ours)):
            return key.replace(".".join(ours), ".".join(theirs), 1)
    return key


# --- the plan --------------------------------------------------------------------------------------------------------


class _Layout:
    """The file, and what of it every node needs."""

    def __init__(self, lab: LabFile, values: dict[str, Any], name: str) -> None:
        self._lab, self._values, self._network = lab, values, lab.network
        self.name = name or lab.cluster.name
        self.numbers = range(1, lab.cluster.nodes + 1)
        self.pods = list(self._pods())
        self.services = list(self._services())
        self.balancer: dict[str, Any] = values.get("loadBalancer", {})

    def plan(self) -> Plan:
        """Return the plan."""
        network, dns = self._network, self._lab.dns
        return Plan(
            name=self.name,
            state=self._lab.cluster.state,
            lan=str(network.lan),
            mtu=network.mtu,
            client=str(network.lan[_CLIENT]),
            switch=str(network.lan[_SWITCH]),
            nodes=tuple(
                LabNode(f"node{n}", self._address(n), str(self._block(n)), toml(self.node_values(n)))
                for n in self.numbers
            ),
            pods=tuple(pod for _, pod in self.pods),
            services=tuple(self.services),
            pools=tuple(self.balancer.get("ipAddressPools", ())),
            advertisements=tuple(self.balancer.get("l2Advertisements", ())),
            dns=str(dns.cluster_ip) if dns else "",
            domain=dns.cluster_domain if dns else "",
        )

    def _address(self, number: int) -> str:
        return str(self._network.lan[_NODES + number])

    def _block(self, number: int) -> IPv4Network:
        cidr, size = self._network.pod_cidr, self._network.block_size
        assert isinstance(cidr, IPv4Network)  # the checks refuse another
        return IPv4Network((int(cidr.network_address) + (number << 32 - size), size))

    def _pods(self) -> Iterator[tuple[PodGroup, LabPod]]:
        blocks = {number: self._block(number) for number in self.numbers}
        on: Counter[int] = Counter()
        for _, name, group, number in _dealt(self._lab):
            address = str(blocks[number][_PODS + on[number]])
            on[number] += 1
            yield group, LabPod(name, group.namespace, f"node{number}", address, group.serve or 0)

    def _services(self) -> Iterator[dict[str, Any]]:
        """Yield the services with the endpoints that their selectors find."""
        for service, given in zip(self._lab.services, self._values.get("services", ()), strict=True):
            keys = {key: value for key, value in given.items() if key != "selector"}
            if service.selector:
                keys["endpoints"] = [
                    {"ip": pod.address, "node": f"{self.name}-{pod.node}", "hostname": pod.name}
                    for group, pod in self.pods
                    if _selects(service, group)
                ]
            yield keys

    def node_values(self, number: int) -> dict[str, Any]:
        """Return the file of the n-th node."""
        network = self._network
        made: dict[str, Any] = {
            "apiVersion": "dataplane/v1",
            "kind": "Node",
            "node": {"name": f"{self.name}-node{number}", "addresses": [self._address(number)]},
            "uplink": {"interface": "eth0", "mtu": network.mtu},
            "vxlan": self._values.get("vxlan", {}),
            "pods": {
                "cidr": [str(self._block(number))],
                "natOutgoing": True,
                "static": [self._pod(group, pod) for group, pod in self.pods if pod.node == f"node{number}"],
            },
            "routes": [{"dst": "0.0.0.0/0", "via": str(network.lan[_CLIENT])}],
            "services": {"clusterCIDR": [str(network.pod_cidr)], "serviceCIDR": [str(network.service_cidr)]},
            "api": {"socket": str(RUN / self.name / f"node{number}.sock")},
        }
        if "dns" in self._values:
            made["dns"] = self._values["dns"]
        if self._lab.cluster.state == "etcd":
            url = f"http://{network.lan[_SWITCH]}:{ETCD_PORT}"
            return made | {"state": {"source": "etcd", "etcd": {"endpoints": [url]}}}
        self.share(made)
        return made | {"peers": [self._peer(other) for other in self.numbers if other != number]}

    def share(self, node: dict[str, Any]) -> None:
        """Put into a node's file what all nodes have in common, and etcd would tell them."""
        node["services"]["static"] = self.services
        if self.balancer:
            node["loadBalancer"] = self.balancer

    def _pod(self, group: PodGroup, pod: LabPod) -> dict[str, Any]:
        named = {"name": pod.name, "namespace": pod.namespace, "netns": f"{self.name}-{pod.name}"}
        return named | {"ip": [pod.address], "labels": dict(group.labels)}

    def _peer(self, number: int) -> dict[str, Any]:
        name, block = f"{self.name}-node{number}", str(self._block(number))
        return {"name": name, "address": self._address(number), "podCIDR": [block]}


def _dealt(lab: LabFile) -> Iterator[tuple[int, str, PodGroup, int]]:
    """Yield each pod: the index of its group, its name, its group and the number of its node."""
    for index, group in enumerate(lab.pods):
        for number in range(group.count or group.per_node * lab.cluster.nodes):
            yield index, f"{group.name}-{number}", group, number % lab.cluster.nodes + 1


def _selects(service: LabService, group: PodGroup) -> bool:
    return service.namespace == group.namespace and service.selector.items() <= group.labels.items()


# --- text ------------------------------------------------------------------------------------------------------------


def toml(values: Mapping[str, Any]) -> str:
    """Return values as a TOML file: tables and arrays of tables two deep with headers, what is deeper in one line."""
    lines = [f"{_key(key)} = {_inline(value)}" for key, value in values.items() if not _is_table(value)]
    for key, value in values.items():
        lines += _section(_key(key), value) if _is_table(value) else ()
    return "\n".join([*lines, ""])


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_tables(value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _section(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping):
        for each in value:
            yield f"\n[[{name}]]"
            yield from _pairs(each, lambda _: True)
        return
    yield f"\n[{name}]"
    yield from _pairs(value, lambda inner: not _is_tables(inner))
    for key, inner in value.items():
        if _is_tables(inner):
            yield from _section(f"{name}.{_key(key)}", inner)


def _pairs(value: Mapping[str, Any], wanted: Callable[[Any], bool]) -> Iterator[str]:
    return (f"{_key(key)} = {_inline(inner)}" for key, inner in value.items() if wanted(inner))


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_inline(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # as JSON has it, but for DEL
