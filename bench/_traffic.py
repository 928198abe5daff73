"""A node's tables and a burst of mixed traffic, for benches of the pipeline.

250 pods of this node, 1000 routes, 187 other nodes with 4 blocks each. Frames of 64 bytes, half UDP and half TCP, a
third each from pod to pod, from a pod into the tunnel, and out of the tunnel to a pod, in random order.
"""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from random import Random

import dpkt
from dpkt.ethernet import Ethernet
from dpkt.ip import IP

from dataplane import batch as b
from dataplane.batch import ROWS, Batch
from dataplane.codecs import vxlan
from dataplane.devices.memory import load
from dataplane.pipeline import Tables
from dataplane.tables.address import halves, parse_mac
from dataplane.tables.interface import OFFLOAD, UP, Driver, Role
from dataplane.tables.neighbour import State
from dataplane.tables.route import Kind, Route

UPLINK, UNDERLAY, FIRST_POD = 1, 2, 3
PODS = 250
NODES = 187
ROUTES = 1000
FRAME = 64  # bytes, without the frame check sequence
POD_MTU = 1450
NOW = 10**12
NODE_MAC, VTEP_MAC, GATEWAY_MAC = 0x0200_C000_020B, 0x6600_0000_0001, 0xEEEE_EEEE_EEEE
NODE, GATEWAY = "192.0.2.11", "192.0.2.1"


def pod_address(pod: int) -> IPv4Address:
    """Return the address of a pod of this node."""
    return IPv4Address("10.244.1.1") + pod


def pod_mac(pod: int) -> int:
    """Return its MAC address."""
    return 0x0200_0AF4_0101 + pod


def node_address(node: int) -> IPv4Address:
    """Return the address of another node."""
    return IPv4Address("192.0.2.20") + node


def block(node: int, part: int) -> IPv4Network:
    """Return one of the blocks of another node's pods."""
    return IPv4Network((int(IPv4Address("10.244.2.0")) + 64 * (4 * node + part), 26))


def make_tables() -> Tables:
    """Return the node's tables, as reconciliation would fill them."""
    tables = Tables(seed=1)
    settings = tables.settings
    settings[b.NODE_LO], settings[b.GATEWAY_LO] = halves(NODE)[1], halves("169.254.1.1")[1]
    settings[b.VTEP_MAC], settings[b.VNI], settings[b.TUNNEL_PORT] = VTEP_MAC, 4096, vxlan.PORT
    settings[b.TUNNEL_PORT_LOW], settings[b.TUNNEL_PORT_HIGH] = 32768, 60999
    settings[b.TUNNEL_INTERFACE], settings[b.POD_MTU], settings[b.PROXY_ARP] = UNDERLAY, POD_MTU, 1
    _interface(tables, UPLINK, Role.UPLINK, 1500, NODE_MAC)
    _interface(tables, UNDERLAY, Role.UNDERLAY, 1500, NODE_MAC)
    for pod in range(PODS):
        _interface(tables, FIRST_POD + pod, Role.POD, POD_MTU, GATEWAY_MAC, pod_mac(pod))
        tables.routes.set(IPv4Network(pod_address(pod)), Route(Kind.POD, FIRST_POD + pod))
    for node in range(NODES):
        vtep = tables.vteps.insert(node_address(node), VTEP_MAC + 1 + node, UNDERLAY, POD_MTU)
        for part in range(4):
            tables.routes.set(block(node, part), Route(Kind.TUNNEL, vtep=vtep))
    tables.routes.set(IPv4Network("10.244.1.0/24"), Route(Kind.BLACKHOLE))
    tables.routes.set(IPv4Network(NODE), Route(Kind.LOCAL))
    tables.routes.set(IPv4Network("192.0.2.0/24"), Route(Kind.VIA, UPLINK))
    gateway = tables.neighbours.records[tables.neighbours.insert(UPLINK, GATEWAY)]
    gateway["mac"], gateway["state"] = parse_mac("02:00:c0:00:02:01"), State.PERMANENT
    while len(tables.routes) < ROUTES:
        network = IPv4Network((int(IPv4Address("198.18.0.0")) + 256 * len(tables.routes), 24))
        tables.routes.set(network, Route(Kind.VIA, UPLINK, IPv4Address(GATEWAY)))
    return tables


def _interface(tables: Tables, index: int, role: Role, mtu: int, mac: int, peer: int = 0) -> None:
    row = tables.interfaces[index]
    row["role"], row["driver"], row["flags"], row["mtu"], row["fd"] = role, Driver.MEMORY, UP | OFFLOAD, mtu, -1
    row["mac"], row["peer_mac"] = mac, peer


def _frame(macs: tuple[int, int], addresses: tuple[IPv4Address, IPv4Address], udp: bool, random: Random) -> bytes:
    """Return a frame of ``FRAME`` bytes; ``macs`` and ``addresses`` are (source, destination)."""
    ports = {"sport": random.randrange(32768, 61000), "dport": random.choice((53, 80, 443, 8080))}
    transport = dpkt.udp.UDP(**ports, ulen=FRAME - 34) if udp else dpkt.tcp.TCP(**ports, flags=dpkt.tcp.TH_ACK)
    transport.data = bytes(FRAME - 34 - len(bytes(transport)))
    source, target = addresses
    packet = IP(src=source.packed, dst=target.packed, p=17 if udp else 6, id=random.randrange(65536), df=1)
    packet.data, packet.len = transport, FRAME - 14
    return bytes(Ethernet(src=macs[0].to_bytes(6, "big"), dst=macs[1].to_bytes(6, "big"), data=packet))


def _wrapped(inner: bytes, node: int, random: Random) -> bytes:
    """Return a frame as another node sends it: 50 bytes of outer headers in front."""
    header = b"\x08\0\0\0" + (4096 << 8).to_bytes(4, "big")
    outer = dpkt.udp.UDP(sport=random.randrange(32768, 61000), dport=vxlan.PORT, data=header + inner)
    outer.ulen = len(outer)
    packet = IP(src=node_address(node).packed, dst=IPv4Address(NODE).packed, p=17, ttl=64, data=outer)
    packet.len = len(packet)
    frame = bytearray(bytes(Ethernet(src=bytes(6), dst=NODE_MAC.to_bytes(6, "big"), data=packet)))
    frame[40:42] = b"\0\0"  # Calico's tunnels have no outer UDP checksum
    return bytes(frame)


def make_frames() -> list[tuple[int, bytes]]:
    """Return ``ROWS`` frames, each with the interface that it comes in by."""
    random = Random(1)

    def local(udp: bool) -> tuple[int, bytes]:
        pod, other = random.sample(range(PODS), 2)
        addresses = pod_address(pod), pod_address(other)
        return FIRST_POD + pod, _frame((pod_mac(pod), GATEWAY_MAC), addresses, udp, random)

    def remote(node: int) -> IPv4Address:
        return block(node, random.randrange(4))[random.randrange(1, 63)]

    def outgoing(udp: bool) -> tuple[int, bytes]:
        pod = random.randrange(PODS)
        addresses = pod_address(pod), remote(random.randrange(NODES))
        return FIRST_POD + pod, _frame((pod_mac(pod), GATEWAY_MAC), addresses, udp, random)

    def incoming(udp: bool) -> tuple[int, bytes]:
        node = random.randrange(NODES)
        addresses = remote(node), pod_address(random.randrange(PODS))
        inner = _frame((VTEP_MAC + 1 + node, VTEP_MAC), addresses, udp, random)
        return UNDERLAY, _wrapped(inner, node, random)

    kinds: tuple[Callable[[bool], tuple[int, bytes]], ...] = (local, outgoing, incoming)
    frames = [kinds[row % 3](row % 2 == 0) for row in range(ROWS)]
    random.shuffle(frames)
    return frames


def fill(batch: Batch) -> None:
    """Load the frames into the batch, as if they had just been received."""
    frames = make_frames()
    assert load(batch, [frame for _, frame in frames], 0) == ROWS
    batch.packets["iif"] = [iif for iif, _ in frames]
