"""Our rtnetlink beside pyroute2's: what one of them sets, the other must read."""

import os
from ipaddress import IPv4Address

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from dataplane.devices.namespace import NamespaceHandle, in_namespace, open_namespace, place, remove_namespace
from dataplane.devices.netlink import AddressEvent, LinkEvent, Monitor
from dataplane.devices.tap import Tap

pytestmark = pytest.mark.netns
MAC = 0x02_00_0A_F4_01_0A


@pytest.fixture
def namespace():
    handle = open_namespace(f"dptnl{os.getpid()}")
    yield handle
    remove_namespace(handle)


@pytest.fixture
def tap(namespace):
    device = in_namespace(namespace, lambda: Tap("eth0"))
    yield device
    device.close()


def seen_by_pyroute2(namespace: NamespaceHandle):
    """Links, addresses and routes of the main table, read by pyroute2 inside the namespace."""

    def read():
        with IPRoute() as ip:
            links = {link.get("IFLA_IFNAME"): link for link in ip.get_links()}
            addresses = {(item.get("IFA_ADDRESS"), item["prefixlen"]) for item in ip.get_addr(label="eth0")}
            routes = {
                (item.get("RTA_DST"), item["dst_len"], item.get("RTA_GATEWAY"), item["scope"])
                for item in ip.get_routes(family=2, table=254)
            }
            return links, addresses, routes

    return in_namespace(namespace, read)


def test_pyroute2_reads_what_place_has_set(namespace, tap):
    place(namespace, "eth0", mac=MAC, addresses=[IPv4Address("10.244.1.10")], mtu=1450)
    links, addresses, routes = seen_by_pyroute2(namespace)
    assert links["eth0"].get("IFLA_ADDRESS") == "02:00:0a:f4:01:0a"
    assert links["eth0"].get("IFLA_MTU") == 1450
    assert links["eth0"]["flags"] & 1
    assert links["lo"]["flags"] & 1
    assert addresses == {("10.244.1.10", 32)}
    assert routes == {("169.254.1.1", 32, None, 253), (None, 0, "169.254.1.1", 0)}


def test_our_monitor_hears_what_pyroute2_does(namespace, tap):
    monitor = in_namespace(namespace, Monitor)

    def change():
        with IPRoute() as ip:
            index = ip.link_lookup(ifname="eth0")[0]
            ip.link("set", index=index, mtu=1400, state="up")
            ip.addr("add", index=index, address="10.244.1.77", prefixlen=32)
            return index

    try:
        index = in_namespace(namespace, change)
        heard = []
        while events := monitor.read():
            heard += events
    finally:
        monitor.close()
    links = [event.link for event in heard if isinstance(event, LinkEvent)]
    assert (links[-1].index, links[-1].name, links[-1].mtu, links[-1].up) == (index, "eth0", 1400, True)
    addresses = [event for event in heard if isinstance(event, AddressEvent) and event.address.version == 4]
    assert [(event.index, str(event.address), event.gone) for event in addresses] == [(index, "10.244.1.77/32", False)]


def test_our_monitor_and_pyroute2_parse_the_same_bytes(namespace, tap):
    monitor = in_namespace(namespace, Monitor)
    try:
        in_namespace(namespace, lambda: place(namespace, "eth0", mac=MAC, addresses=[], mtu=1300))
        raw = monitor._socket.recv(1 << 16)
    finally:
        monitor.close()
    from dataplane.devices import netlink

    ours = [event.link for event in netlink.events(raw) if isinstance(event, LinkEvent)]
    theirs = [message for message in MarshalRtnl().parse(raw) if message["event"] == "RTM_NEWLINK"]
    assert [(link.index, link.name, link.mtu) for link in ours] == [
        (message["index"], message.get("IFLA_IFNAME"), message.get("IFLA_MTU")) for message in theirs
    ]
    assert ours
