"""Configurations of our nodes, in the terms of ``peers.Member``, and two nodes that make a cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from tests.netns.harness import Namespace, Network, Node
from tests.netns.peers import POD_MTU, Member


def member(network: Network, number: int, address: str = "") -> Member:
    """Return the n-th node of a cluster: 192.0.2.1n with the pods 10.244.n.0/24."""
    return Member(
        f"{network.prefix}node{number}",
        IPv4Address(address or f"192.0.2.{10 + number}"),
        IPv4Network(f"10.244.{number}.0/24"),
    )


def config(
    me: Member, pods: Mapping[str, str], peers: Sequence[Member] = (), *, mode: str = "Always", uplink: bool = True,
    routes: Mapping[str, str] | None = None, heartbeats: int = 0,
) -> str:  # fmt: skip
    """Return the file of a node with these pods (address by short name), peers and routes (gateway by prefix).

    ``heartbeats`` is their port; without, a peer that does not run counts as one that does.
    """
    lines = ['apiVersion = "dataplane/v1"', 'kind = "Node"', "[node]", f'name = "{me.name}"']
    if uplink:
        lines += [f'addresses = ["{me.address}"]', "[uplink]", 'interface = "eth0"', 'mode = "af_packet"']
        lines += ["[vxlan]", f'mode = "{mode}"']
    lines += ["[pods]", f'cidr = ["{me.block}"]', f"mtu = {POD_MTU}"]
    for name, address in pods.items():
        lines += ["[[pods.static]]", f'name = "{name}"', f'netns = "{{prefix}}{name}"', f'ip = ["{address}"]']
    for peer in peers:
        lines += ["[[peers]]", f'name = "{peer.name}"', f'address = "{peer.address}"', f'podCIDR = ["{peer.block}"]']
    if peers:
        lines += ["[cluster]", f"heartbeatPort = {heartbeats}"]
    for destination, gateway in (routes or {}).items():
        lines += ["[[routes]]", f'dst = "{destination}"', f'via = "{gateway}"']
    return "\n".join([*lines, ""])


def drops(node: Node) -> dict[str, int]:
    """Return how many packets each reason has dropped, without those that dropped none."""
    reasons = node.show("drops")["reasons"]
    return {each["label"]: each["count"] for each in reasons if each["verdict"] == "drop" and each["count"]}


def assert_balanced(node: Node) -> Mapping[str, Any]:
    """Every packet is accounted for; return the counters."""
    counters: Mapping[str, Any] = node.show("counters")
    assert counters["balanced"], counters
    return counters


@dataclass(frozen=True)
class Pair:
    """Two pods on two nodes, and the switch between these: its ``port1`` leads to the first node."""

    a: Namespace
    b: Namespace
    nodes: tuple[Node, ...]
    hosts: tuple[Namespace, ...]
    switch: Namespace

    A: ClassVar[str] = "10.244.1.10"
    B: ClassVar[str] = "10.244.2.10"


def set_offloads(pair: Pair, state: str) -> None:
    """Switch the offloads of the underlay on or off, on both ends of each wire."""
    features = [word for name in ("tx", "rx", "sg", "tso", "gso", "gro") for word in (name, state)]
    for host in pair.hosts:
        host.run("ethtool", "-K", "eth0", *features)
    for port in ("port1", "port2"):
        pair.switch.run("ethtool", "-K", port, *features)
