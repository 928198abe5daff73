"""Every reason can be reached: one scenario for each, and a test that fails for a reason without one."""

from collections.abc import Callable

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import pipeline
from dataplane.batch import ROWS
from dataplane.resolve import QUEUE_BYTES, SECOND
from dataplane.slowpath import SlowPath
from dataplane.stages import defrag
from dataplane.tables.interface import Driver
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


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.label)
def test_every_reason_can_be_reached_and_the_sums_still_balance(reason):
    assert reason in SCENARIOS, f"no scenario reaches {reason.label}"
    world = World()
    SCENARIOS[reason](world)
    assert world.tables.counters[reason] > 0
    assert world.balanced()


def test_labels_and_texts_are_unique():
    assert len({reason.label for reason in Reason}) == len({reason.text for reason in Reason}) == len(Reason)
