"""UDP flows that a service takes over which comes after them."""

import asyncio
from ipaddress import ip_address

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from dataplane import strays
from dataplane.control.edits import AddServer, RemoveServer
from dataplane.control.services import ServerKey, VirtualServer
from tests import world as w

KEY = ServerKey("UDP", ip_address(w.OUTSIDE), 53)


@pytest.fixture
def world() -> w.World:
    world = w.World()
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    return world


def query(world: w.World, sport: int, dport: int = 53) -> str:
    """Send a datagram from pod a to a server outside; return who gets it."""
    packet = IP(src=w.IP_A, dst=w.OUTSIDE) / UDP(sport=sport, dport=dport)
    outcome = world.one(Ether(src=w.MAC_A, dst=w.GATEWAY_MAC) / packet, w.POD_A)
    return str(Ether(outcome.frame)[IP].dst)


def end(world: w.World, *keys: ServerKey) -> int:
    return asyncio.run(strays.end(world.tables.flows, keys, world.now))


def test_a_flow_that_began_before_its_service_goes_to_a_backend_with_the_next_datagram(world):
    assert query(world, 4000) == w.OUTSIDE
    world.service(w.OUTSIDE, 53, (w.IP_B, 5353), protocol="udp")
    assert query(world, 4000) == w.OUTSIDE
    assert end(world, KEY) == 1
    assert query(world, 4000) == w.IP_B
    assert world.flows == 1


def test_flows_to_other_ports_and_those_that_have_a_backend_go_on(world):
    assert query(world, 4000, dport=54) == w.OUTSIDE
    world.service(w.OUTSIDE, 53, (w.IP_B, 5353), protocol="udp")
    assert query(world, 4001) == w.IP_B
    assert end(world, KEY, ServerKey("UDP", ip_address(w.STRANGER), 54)) == 0
    assert end(world) == 0


def test_new_udp_services_claim_flows_and_no_others():
    servers = [VirtualServer(KEY._replace(protocol=each), "default/dns", "", "external-ip") for each in ("TCP", "UDP")]
    assert strays.claimed([*map(AddServer, servers), *map(RemoveServer, servers)]) == {KEY}
