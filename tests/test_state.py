"""The names and addresses that follow from a node's or a pod's name."""

from dataclasses import FrozenInstanceError
from ipaddress import IPv4Address, IPv4Network

import pytest

from dataplane.control.state import (
    DesiredState,
    Node,
    Peer,
    PodNetwork,
    Settings,
    Uplink,
    Vxlan,
    host_interface,
    pod_mac,
    vtep_mac,
)


def test_a_vteps_mac_is_0x66_and_five_bytes_of_sha1_of_the_node_name():
    # printf node2 | sha1sum -> 2dbf44a68b...
    assert vtep_mac("node2") == 0x66_2D_BF_44_A6_8B == Node("node2").vtep_mac


def test_a_pods_default_mac_is_unicast_and_locally_administered_and_stays():
    mac = pod_mac("default", "web-0")
    assert mac >> 40 == 0x02
    assert mac == pod_mac("default", "web-0") != pod_mac("default", "web-1")


def test_namespace_and_name_are_not_confused():
    assert pod_mac("a", "b") != pod_mac("b", "a")
    assert host_interface("cali", "a", "b") != host_interface("cali", "b", "a")


def test_a_pods_link_has_calicos_name_and_fits_the_kernels_limit():
    # printf default.web-0 | sha1sum
    assert host_interface("cali", "default", "web-0") == "cali0d7763386da"
    assert len(host_interface("cali", "default", "web-0")) == 15


def test_a_state_is_frozen_and_hashable():
    state = DesiredState(Node("node1"))
    assert hash(Settings(state)) == hash(Settings(DesiredState(Node("node1"))))
    with pytest.raises(FrozenInstanceError):
        state.node = Node("node2")  # type: ignore[misc]


def test_the_tunnel_address_is_the_first_of_the_block():
    network = PodNetwork(cidrs=(IPv4Network("10.244.1.0/24"),))
    assert DesiredState(Node("node1"), network, uplink=Uplink("eth0")).tunnel_address == IPv4Address("10.244.1.0")
    assert Peer("node2", IPv4Address("192.0.2.12"), (IPv4Network("10.244.2.0/24"),), 2).tunnel_address == IPv4Address(
        "10.244.2.0"
    )


def test_a_node_alone_has_no_tunnel():
    network = PodNetwork(cidrs=(IPv4Network("10.244.1.0/24"),))
    assert DesiredState(Node("node1"), network).tunnel_address is None
    assert not DesiredState(Node("node1"), network, uplink=Uplink("eth0"), vxlan=Vxlan("Never")).tunnels
    assert DesiredState(Node("node1"), uplink=Uplink("eth0", mtu=9000)).tunnel_mtu == 8950
