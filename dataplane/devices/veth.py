"""Cables and switches between namespaces: veth pairs and bridges by rtnetlink, for networks that we make ourselves.

The peer of a veth pair is made where it belongs: nothing is moved, so nothing is ever seen in a namespace in between.
"""

from dataplane.devices.netlink import (
    CREATE_NEW,
    IFINFO,
    IFLA_IFNAME,
    IFLA_MTU,
    NEWLINK,
    Netlink,
    pack,
)

IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_FD = 10, 18, 28
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
VETH_INFO_PEER = 1


def add_bridge(netlink: Netlink, name: str, mtu: int) -> int:
    """Make a bridge, set it up, and return its index."""
    body = _named(name, mtu) + pack(IFLA_LINKINFO, pack(IFLA_INFO_KIND, b"bridge"))
    netlink.request(f"add bridge {name}", NEWLINK, CREATE_NEW, body)
    return _up(netlink, name)


def add_veth(netlink: Netlink, name: str, peer: str, peer_netns: int, mtu: int) -> int:
    """Make a veth pair whose other end is in the namespace with this descriptor; set our end up, return its index."""
    there = _named(peer, mtu) + pack(IFLA_NET_NS_FD, peer_netns.to_bytes(4, "little"))
    info = pack(IFLA_INFO_KIND, b"veth") + pack(IFLA_INFO_DATA, pack(VETH_INFO_PEER, there))
    netlink.request(f"add veth {name}", NEWLINK, CREATE_NEW, _named(name, mtu) + pack(IFLA_LINKINFO, info))
    return _up(netlink, name)


def enslave(netlink: Netlink, index: int, bridge: int) -> None:
    """Plug a link into a bridge."""
    body = IFINFO.pack(0, 0, index, 0, 0) + pack(IFLA_MASTER, bridge.to_bytes(4, "little"))
    netlink.request(f"plug link {index} into {bridge}", NEWLINK, 0, body)


def _named(name: str, mtu: int) -> bytes:
    return (
        IFINFO.pack(0, 0, 0, 0, 0)
        + pack(IFLA_IFNAME, name.encode() + b"\0")
        + pack(IFLA_MTU, mtu.to_bytes(4, "little"))
    )


def _up(netlink: Netlink, name: str) -> int:
    index = netlink.link(name).index
    netlink.set_link(index, up=True)
    return index
