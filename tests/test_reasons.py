"""Every reason can be reached: one scenario for each, and a test that fails for a reason without one."""

from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from dataplane import batch as b
from dataplane import pipeline
from dataplane.batch import ROWS
from dataplane.resolve import QUEUE_BYTES, SECOND
from dataplane.slowpath import SlowPath
from dataplane.stages import defrag
from dataplane.tables.flow import ASSURED
from dataplane.tables.interface import Driver
from dataplane.tables.policy import LOCAL, NO_LOCAL
from dataplane.verdict import Reason
from tests import world as w
from tests.frames import arp_request, fragments, inner_frame, lan_frame, ping, pod_frame, tcp, tunnel, udp
from tests.world import World

Scenario = Callable[[World], object]
SCENARIOS: dict[Reason, Scenario] = {}


def reaches(reason: Reason) -> Callable[[Scenario], Scenario]:
    def register(scenario: Scenario) -> Scenario:
        assert reason not in SCENARIOS
        SCENARIOS[reason] = scenario
        return scenario

    return register


def from_pod(frame: object) -> Scenario:
    return lambda world: world.one(frame, w.POD_A)


def from_lan(frame: object) -> Scenario:
    return lambda world: world.one(frame, w.UPLINK)


def from_tunnel(frame: object) -> Scenario:
    return lambda world: world.one(frame, w.UNDERLAY)


def slow_path(world: World) -> SlowPath:
    return SlowPath(world.tables.arrays, world.tables.routes, world.tables.neighbours, seed=1)


def send(world: World, count: int) -> None:
    burst = pipeline.burst
    burst(world.batch.arrays, pipeline.LOADED, world.tables.arrays, world.io.arrays, world.now, count)


def send_one(world: World, frame: object) -> None:
    """Run a frame from pod a through everything, including the device it leaves by."""
    count = world.load([frame], w.POD_A)
    send(world, count)


INNER = inner_frame(udp(w.IP_A, src=w.IP_REMOTE))
BAD_CSUM = bytes(pod_frame(udp(w.IP_B)))[:24] + b"\xde\xad" + bytes(pod_frame(udp(w.IP_B)))[26:]
PIECES = fragments(udp(w.IP_B, size=3000), 1424)

SCENARIOS |= {
    Reason.ACCEPTED: from_pod(pod_frame(udp(w.IP_B))),
    Reason.ARP_ANSWERED: from_pod(arp_request("169.254.1.1")),
    Reason.FRAGMENT_HELD: from_pod(pod_frame(PIECES[0])),
    Reason.HOST_OWNED: from_lan(lan_frame(tcp(w.NODE, src=w.LAN_GATEWAY))),
    Reason.ARP_LEARN: from_lan(arp_request(w.NODE, sender=w.LAN_GATEWAY, mac=w.LAN_MAC)),
    Reason.NEIGH_RESOLVE: from_pod(pod_frame(udp(w.OUTSIDE))),
    Reason.LOCAL_DELIVERY: from_pod(pod_frame(ping(w.NODE))),
    Reason.L2_TOO_SHORT: from_pod(b"\xee" * 13),
    Reason.L2_OTHER_MAC: from_pod(pod_frame(udp(w.IP_B), to="02:00:00:00:00:99")),
    Reason.L2_BAD_ETHERTYPE: from_pod(Ether(src=w.MAC_A, dst=w.GATEWAY_MAC, type=0x88CC) / Raw(b"lldp" * 10)),
    Reason.L2_SPOOFED_SRC: from_pod(pod_frame(udp(w.IP_B), source="02:00:00:00:00:99")),
    Reason.ARP_MALFORMED: from_pod(arp_request("169.254.1.1", hwlen=8)),
    Reason.ARP_NOT_OWNER: from_pod(arp_request(w.IP_FREE)),
    Reason.ARP_OWN_IP: from_pod(arp_request(w.IP_A, sender="0.0.0.0")),
    Reason.ARP_PROBE: from_pod(arp_request(w.IP_B, sender="0.0.0.0")),
    Reason.IP_BAD_HDR: from_pod(pod_frame(udp(w.IP_B, len=2000))),
    Reason.IP_BAD_CSUM: from_pod(BAD_CSUM),
    Reason.IP_TTL: from_pod(pod_frame(udp(w.IP_B, ttl=1))),
    Reason.IP_MARTIAN: from_pod(pod_frame(udp("127.0.0.1"))),
    Reason.IP_SPOOFED_SRC: from_pod(pod_frame(udp(w.IP_B, src="10.244.1.77"))),
    Reason.IP_MULTICAST: from_pod(pod_frame(udp("224.0.0.251"), to="01:00:5e:00:00:fb")),
    Reason.ROUTE_NONE: from_pod(pod_frame(udp("8.8.8.8"))),
    Reason.ROUTE_BLACKHOLE: from_pod(pod_frame(udp(w.IP_FREE))),
    Reason.ROUTE_UNREACHABLE: from_pod(pod_frame(udp("203.0.113.9"))),
    Reason.MTU_DF: from_pod(pod_frame(udp(w.IP_B, size=1500, flags="DF"))),
    Reason.TUNNEL_BAD_FLAGS: from_tunnel(tunnel(INNER, flags=0)),
    Reason.TUNNEL_RESERVED: from_tunnel(tunnel(INNER, reserved2=1)),
    Reason.TUNNEL_VNI: from_tunnel(tunnel(INNER, vni=4097)),
    Reason.TUNNEL_SRC_NOT_NODE: from_tunnel(tunnel(INNER, source=w.STRANGER)),
    Reason.TUNNEL_OWN_MAC: from_tunnel(tunnel(inner_frame(udp(w.IP_A, src=w.IP_REMOTE), source=w.VTEP))),
    Reason.TUNNEL_INNER_MAC: from_tunnel(tunnel(inner_frame(udp(w.IP_A, src=w.IP_REMOTE), to=w.PEER_VTEP))),
    Reason.TUNNEL_ECN: from_tunnel(tunnel(INNER, tos=3)),
    Reason.TUNNEL_CSUM: from_tunnel(tunnel(INNER, chksum=0x1234)),
    Reason.TUNNEL_NO_VTEP: from_pod(pod_frame(udp(w.IP_LOST))),
    Reason.TUNNEL_FROM_POD: from_pod(pod_frame(udp(w.PEER, dport=4789))),
    Reason.TUNNEL_TRUNCATED: from_tunnel(
        Ether(dst=w.UPLINK_MAC) / IP(src=w.PEER, dst=w.NODE) / UDP(sport=1, dport=4789, chksum=0) / Raw(b"\x08\0\0")
    ),
}


@reaches(Reason.IP_FRAG_TIMEOUT)
def _(world: World) -> None:
    world.one(pod_frame(PIECES[0]), w.POD_A)
    defrag.expire(world.tables.arrays, world.now + 31 * SECOND)


@reaches(Reason.IP_FRAG_LIMIT)
def _(world: World) -> None:
    world.run([pod_frame(fragments(udp(w.IP_B, size=3000, id=k), 1424)[0]) for k in range(65)], w.POD_A)


@reaches(Reason.IP_FRAG_OVERLAP)
def _(world: World) -> None:
    torn = PIECES[1].copy()
    torn.frag -= 1
    torn.chksum = None
    world.run([pod_frame(PIECES[0]), pod_frame(torn)], w.POD_A)


@reaches(Reason.NEIGH_UNRESOLVED)
def _(world: World) -> None:
    slow = slow_path(world)
    world.one(pod_frame(udp(w.OUTSIDE)), w.POD_A)
    slow.handle(world.batch, 1, world.now)
    for second in range(1, 5):
        slow.tick(world.now + second * SECOND)


@reaches(Reason.NEIGH_QUEUE_FULL)
def _(world: World) -> None:
    slow = slow_path(world)
    for _ in range(QUEUE_BYTES // (1400 * 200) + 2):
        count = len(world.run([pod_frame(udp(w.OUTSIDE, size=1400))] * 200, w.POD_A))
        slow.handle(world.batch, count, world.now)


@reaches(Reason.LOCAL_NO_LISTENER)
def _(world: World) -> None:
    slow = slow_path(world)
    world.one(pod_frame(udp(w.NODE)), w.POD_A)
    slow.handle(world.batch, 1, world.now)


@reaches(Reason.OVERLOAD_SLOW_PATH)
def _(world: World) -> None:
    slow = slow_path(world)
    count = len(world.run([pod_frame(ping(w.NODE))] * ROWS, w.POD_A))
    slow.handle(world.batch, count, world.now)


@reaches(Reason.DEVICE_DOWN)
def _(world: World) -> None:
    world.tables.interfaces["flags"][w.POD_B] = 0
    send_one(world, pod_frame(udp(w.IP_B)))


@reaches(Reason.DEVICE_ERROR)
def _(world: World) -> None:
    world.tables.interfaces["driver"][w.POD_B] = Driver.TAP  # its fd is -1: EBADF
    send_one(world, pod_frame(udp(w.IP_B)))


@reaches(Reason.OVERLOAD_TX_FULL)
def _(world: World) -> None:
    import socket

    # A datagram socket whose peer does not read stands for a TAP whose queue is full: EAGAIN is EAGAIN.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        world.tables.interfaces["driver"][w.POD_B] = Driver.TAP
        world.tables.interfaces["fd"][w.POD_B] = ours.fileno()
        for _ in range(4):
            count = world.load([pod_frame(udp(w.IP_B, size=1400))] * ROWS, w.POD_A)
            send(world, count)


@reaches(Reason.OVERLOAD_RX_RING)
def _(world: World) -> None:
    pipeline.count_lost(world.tables.counters, 3)


def service(*packets: object, backends: int = 1, **fields: Any) -> Scenario:
    """A service at the VIP's port 80, and packets from pod a."""

    def run(world: World) -> None:
        world.service(w.VIP, 80, *[(w.IP_B, 8080 + k) for k in range(backends)], **fields)
        for packet in packets:
            world.one(pod_frame(packet), w.POD_A)

    return run


SYN = tcp(w.VIP, flags="S", size=0)
SCENARIOS |= {
    Reason.SVC_NO_ENDPOINTS: service(SYN, backends=0),
    Reason.SVC_NO_LOCAL_ENDPOINTS: service(SYN, flags=LOCAL | NO_LOCAL),
    Reason.SVC_SOURCE_RANGE: service(SYN, ranges=[]),
    Reason.SVC_VIP_CLOSED_PORT: service(udp(w.VIP, dport=81)),
    Reason.CT_NOT_SYN: from_pod(pod_frame(tcp(w.IP_B, flags="FA"))),
    Reason.CT_INVALID_FLAGS: from_pod(pod_frame(tcp(w.IP_B, flags="FSRPAU"))),
    Reason.ICMP_BAD_INNER: from_pod(pod_frame(IP(src=w.IP_A, dst=w.IP_B) / ICMP(type=3) / Raw(b"E" * 12))),
    Reason.ICMP_UNRELATED: from_pod(
        pod_frame(IP(src=w.IP_A, dst=w.IP_B) / ICMP(type=3, code=1) / udp(w.IP_A, src=w.IP_B))
    ),
}


@reaches(Reason.LB_DEST_DELETED)
def _from_a_deleted_backend(world: World) -> None:
    row = world.service(w.VIP, 53, (w.IP_B, 5353), protocol="udp")
    world.one(pod_frame(udp(w.VIP)), w.POD_A)
    world.tables.services.remove(row, ip_address(w.IP_B), 5353)
    world.one(pod_frame(udp(w.IP_A, src=w.IP_B, sport=5353, dport=4000), source=w.MAC_B), w.POD_B)


@reaches(Reason.CT_BAD_RST)
def _a_blind_reset(world: World) -> None:
    handshake(world)
    world.one(pod_frame(segment("R", seq=7)), w.POD_A)


@reaches(Reason.CT_WINDOW)
def _a_segment_out_of_the_window(world: World) -> None:
    world.tables.settings[b.TCP_LIBERAL] = 0
    handshake(world)
    world.one(pod_frame(segment("A", seq=1 << 30, ack=2001)), w.POD_A)


def segment(flags: str, seq: int, ack: int = 0, reply: bool = False) -> Packet:
    source, target, ports = (w.IP_B, w.IP_A, (80, 4000)) if reply else (w.IP_A, w.IP_B, (4000, 80))
    return IP(src=source, dst=target) / TCP(sport=ports[0], dport=ports[1], flags=flags, seq=seq, ack=ack)


def handshake(world: World) -> None:
    world.one(pod_frame(segment("S", seq=1000)), w.POD_A)
    world.one(pod_frame(segment("SA", seq=2000, ack=1001, reply=True), source=w.MAC_B), w.POD_B)
    world.one(pod_frame(segment("A", seq=1001, ack=2001)), w.POD_A)


@reaches(Reason.CT_TABLE_FULL)
def _every_flow_is_assured(world: World) -> None:
    fill(world)
    world.one(pod_frame(udp(w.IP_B)), w.POD_A)


def fill(world: World) -> None:
    for port in range(1, 1 + w.FLOWS):
        world.one(pod_frame(udp(w.IP_B, sport=port, dport=9)), w.POD_A)
    world.tables.flows.flows["status"][: w.FLOWS] |= np.uint16(ASSURED)


@reaches(Reason.CT_CLASH)
def _no_port_tells_two_replies_apart(world: World) -> None:
    """A client that has all ports of the class in use towards a backend, and comes once more through its service."""
    world.service(w.VIP, 9, (w.IP_B, 9), protocol="udp")
    for port in range(1, 512):
        world.one(pod_frame(udp(w.IP_B, sport=port, dport=9)), w.POD_A)
    world.one(pod_frame(udp(w.VIP, sport=1, dport=9)), w.POD_A)


@reaches(Reason.NAT_NO_PORT)
def _the_only_port_is_taken(world: World) -> None:
    settings = world.tables.settings
    settings[b.NAT_OUTGOING], settings[b.MASQUERADE_LOW], settings[b.MASQUERADE_HIGH] = 1, 50000, 50000
    for port in (1, 2):
        world.one(pod_frame(udp(w.OUTSIDE, sport=port)), w.POD_A)


@reaches(Reason.NAT_MASQ_NO_ADDR)
def _a_node_without_any_address(world: World) -> None:
    for setting in (b.NODE_LO, b.GATEWAY_LO, b.TUNNEL_LO):
        world.tables.settings[setting] = 0
    world.service(w.VIP, 80, (w.IP_A, 8080))
    world.one(pod_frame(SYN), w.POD_A)


# What Linux' conntrack calls INVALID; a full table, a clash and a lack of ports have counters of their own there.
INVALID = (
    *(Reason.CT_INVALID_FLAGS, Reason.CT_NOT_SYN, Reason.CT_WINDOW, Reason.CT_BAD_RST),
    *(Reason.ICMP_UNRELATED, Reason.ICMP_BAD_INNER),
)


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.label)
def test_every_reason_can_be_reached_and_the_sums_still_balance(reason):
    assert reason in SCENARIOS, f"no scenario reaches {reason.label}"
    world = World()
    SCENARIOS[reason](world)
    assert world.tables.counters[reason] > 0
    assert world.balanced()
    assert world.tables.flows.counters["invalid"] == sum(world.tables.counters[each] for each in INVALID)


def test_labels_and_texts_are_unique():
    assert len({reason.label for reason in Reason}) == len({reason.text for reason in Reason}) == len(Reason)
