"""A node made by the Linux kernel alone, set up as Calico sets up one: what ours has to work with.

        ┌────────────────────────────────────── the node's namespace ─┐
        │ eth0 192.0.2.x ── vxlan.calico (vni 4096, nolearning)       │
        │                       │ 10.244.x.0/32, 66:...               │
        │ caliweb (ee:ee:ee:ee:ee:ee, proxy_arp)                      │
        └────┼────────────────────────────────────────────────────────┘
        ┌────┼────────────┐
        │ eth0            │  10.244.x.10/32, default via 169.254.1.1
        └─────────────────┘

A remote node is three entries: a route to its block via its tunnel address, a neighbor entry for that address, and a
forwarding entry for that neighbor's MAC (felix/dataplane/linux/vxlan_mgr.go). The kernel answers ARP for 169.254.1.1
only when it has a default route, which here leads to a router that does not exist.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from dataplane.control.state import vtep_mac
from tests.netns.harness import Namespace, Network

DEVICE = "vxlan.calico"
VNI, PORT = 4096, 4789
POD_MTU = 1450
ROUTER = "192.0.2.254"
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"


def colons(mac: int) -> str:
    """Return a MAC address as text."""
    return mac.to_bytes(6, "big").hex(":")


@dataclass(frozen=True)
class Member:
    """What a node of the cluster tells the others."""

    name: str
    address: IPv4Address
    block: IPv4Network

    @property
    def tunnel(self) -> IPv4Address:
        """The address of its end of the tunnel: the first of its block."""
        return self.block.network_address

    @property
    def mac(self) -> str:
        """The MAC of its VTEP, derived from its name as Calico does."""
        return colons(vtep_mac(self.name))


class KernelNode:
    """A kernel node in a namespace that has its uplink ``eth0`` already."""

    def __init__(self, network: Network, namespace: Namespace, me: Member) -> None:
        self.network, self.namespace, self.me = network, namespace, me
        namespace.sysctl("net/ipv4/ip_forward", 1)
        namespace.ip(
            "link", "add", DEVICE, "address", me.mac, "mtu", POD_MTU, "type", "vxlan", "id", VNI, "dstport", PORT,
            "local", me.address, "dev", "eth0", "nolearning", "noudpcsum",
        )  # fmt: skip
        namespace.ip("address", "add", f"{me.tunnel}/32", "dev", DEVICE)
        namespace.ip("link", "set", DEVICE, "up")
        namespace.ip("route", "add", "blackhole", me.block, "proto", 80)
        namespace.ip("route", "replace", "default", "via", ROUTER, "dev", "eth0", "onlink")

    def join(self, peer: Member) -> None:
        """Learn of another node."""
        namespace = self.namespace
        tunnel, mac = peer.tunnel, peer.mac
        namespace.ip("neigh", "add", tunnel, "lladdr", mac, "dev", DEVICE, "nud", "permanent")
        namespace.run("bridge", "fdb", "append", mac, "dev", DEVICE, "dst", peer.address)
        namespace.ip("route", "add", peer.block, "via", tunnel, "dev", DEVICE, "onlink", "mtu", POD_MTU)

    def leave(self, peer: Member) -> None:
        """Forget another node."""
        tunnel, mac = peer.tunnel, peer.mac
        self.namespace.ip("route", "del", peer.block, "via", tunnel, "dev", DEVICE, "onlink")
        self.namespace.run("bridge", "fdb", "del", mac, "dev", DEVICE, "dst", peer.address)
        self.namespace.ip("neigh", "del", tunnel, "dev", DEVICE)

    def direct(self, peer: Member) -> None:
        """Reach another node's block through the uplink instead, as CrossSubnet does on one subnet."""
        self.namespace.ip("route", "replace", peer.block, "via", peer.address, "dev", "eth0", "proto", 80)

    def pod(self, name: str, address: str) -> Namespace:
        """Make a pod behind a ``cali`` interface."""
        pod, node, host = self.network.namespace(name), self.namespace, f"cali{name}"[:15]
        self.network.wire((node, host), (pod, "eth0"), POD_MTU)
        node.ip("link", "set", host, "address", GATEWAY_MAC)
        node.sysctl(f"net/ipv4/conf/{host}/proxy_arp", 1)
        node.sysctl(f"net/ipv4/neigh/{host}/proxy_delay", 0)
        node.ip("route", "add", f"{address}/32", "dev", host, "scope", "link")
        pod.ip("address", "add", f"{address}/32", "dev", "eth0")
        pod.ip("route", "add", "169.254.1.1", "dev", "eth0", "scope", "link")
        pod.ip("route", "add", "default", "via", "169.254.1.1")
        return pod
