"""Cables and switches between namespaces: what our rtnetlink makes, ip(8) must see."""

import errno
import json
import os
import subprocess
from typing import Any

import pytest

from dataplane.devices.namespace import in_namespace, open_namespace, remove_namespace
from dataplane.devices.netlink import Netlink, NetlinkError
from dataplane.devices.veth import add_bridge, add_veth, enslave

pytestmark = pytest.mark.netns


@pytest.fixture
def pair():
    handles = [open_namespace(f"dptveth{os.getpid()}{end}") for end in "ab"]
    yield handles
    for handle in handles:
        remove_namespace(handle)


def links(handle) -> dict[str, dict[str, Any]]:
    output = subprocess.run(
        ["ip", "-n", handle.path.name, "-json", "-details", "link"], check=True, capture_output=True
    ).stdout
    return {link["ifname"]: link for link in json.loads(output)}


def test_a_cable_ends_in_two_namespaces_and_is_plugged_into_a_switch(pair):
    here, there = pair
    with in_namespace(here, Netlink) as netlink:
        bridge = add_bridge(netlink, "br0", 1400)
        port = add_veth(netlink, "port1", "eth0", there.fd, 1300)
        enslave(netlink, port, bridge)
    ours, theirs = links(here), links(there)["eth0"]
    assert (ours["br0"]["linkinfo"]["info_kind"], ours["br0"]["mtu"]) == ("bridge", 1300)  # a bridge takes the least
    assert "UP" in ours["br0"]["flags"]
    assert (ours["port1"]["linkinfo"]["info_kind"], ours["port1"]["master"]) == ("veth", "br0")
    assert "UP" in ours["port1"]["flags"]
    assert (theirs["linkinfo"]["info_kind"], theirs["mtu"], "UP" in theirs["flags"]) == ("veth", 1300, False)


def test_a_name_is_given_once(pair):
    with in_namespace(pair[0], Netlink) as netlink:
        add_bridge(netlink, "br0", 1500)
        with pytest.raises(NetlinkError) as refused:
            add_bridge(netlink, "br0", 1500)
    assert refused.value.errno == errno.EEXIST
