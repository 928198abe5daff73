"""The tunnel's sockets against the kernel's own vxlan device, on a veth as the underlay.

namespace host                                   namespace lan
+----------------------------------+         +-----------------------------------------+
| up0  192.0.2.1/24                |-- veth -| lan0  192.0.2.9/24                      |
|      VxlanSocket 192.0.2.1:4789  |         | vx0   10.244.9.9/24  VNI 4096 over lan0 |
+----------------------------------+         +-----------------------------------------+
"""

import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network

import numpy as np
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from dataplane.batch import ENCAPSULATED, GSO_UDP_L4, NEEDS_CSUM, Batch, make_batch
from dataplane.codecs.partial import COMPLETE, UNFINISHED, partial_state
from dataplane.devices.device import DeviceError, interface_ioctl
from dataplane.devices.filter import prefix_filter
from dataplane.devices.memory import Vnet, load
from dataplane.devices.uplink import RECEIVE_BUFFER, SEND_BUFFER, Uplink
from dataplane.devices.vxlan_socket import VxlanSocket
from tests.spaces import (
    UDP_SEGMENT,
    Space,
    lan_of,
    opened_spaces,
    partial,
    read,
    send,
)

pytestmark = pytest.mark.netns

VTEP_MAC, VX_MAC = "66:00:00:00:00:01", "66:00:00:00:00:02"


@pytest.fixture
def spaces() -> Iterator[Callable[[str], Space]]:
    with opened_spaces() as space:
        yield space


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture
def host(spaces: Callable[[str], Space]) -> Space:
    return spaces("host")


@pytest.fixture
def lan(spaces: Callable[[str], Space], host: Space) -> Space:
    return lan_of(spaces, host)


@pytest.fixture
def tunnel(host: Space, lan: Space) -> VxlanSocket:
    """Our end of a tunnel whose other end is the kernel's vxlan device, on a veth that finishes no checksum."""
    ends = ("local", "192.0.2.9", "remote", "192.0.2.1", "dev", "lan0", "nolearning")
    lan.ip("link", "add", "vx0", "address", VX_MAC, "type", "vxlan", "id", "4096", "dstport", "4789", *ends)
    lan.ip("addr", "add", "10.244.9.9/24", "dev", "vx0")
    lan.ip("link", "set", "vx0", "up")
    lan.ip("neigh", "add", "10.244.9.1", "lladdr", VTEP_MAC, "dev", "vx0")
    return host.open(lambda: VxlanSocket("192.0.2.1"))


def no_checksum_offload(interface: str) -> None:
    """Do what ``ethtool -K <interface> tx off`` does."""
    request = np.array([0x17, 0], np.uint32)  # ETHTOOL_STXCSUM
    interface_ioctl(interface, 0x8946, struct.pack("P", request.ctypes.data))  # SIOCETHTOOL


OUTER = (
    Ether(src="00:00:00:00:00:00", dst="00:00:00:00:00:00")
    / IP(src="192.0.2.1", dst="192.0.2.9", tos=1)
    / UDP(sport=40000, dport=4789, chksum=0)
    / VXLAN(flags=8, vni=4096)
)


def test_p1_a_veth_underlay_hands_over_unfinished_inner_checksums(tunnel, lan, batch):
    lan.udp("10.244.9.9", 4000).sendto(b"x" * 500, ("10.244.9.1", 53))
    frames = read(tunnel, batch)
    outer = Ether(frames[0])
    assert (outer[IP].src, outer[IP].dst, outer[UDP].dport) == ("192.0.2.9", "192.0.2.1", 4789)
    inner = outer[VXLAN][Ether]
    assert (inner.src, inner.dst, inner[IP].src) == (VX_MAC, VTEP_MAC, "10.244.9.9")
    data = np.frombuffer(frames[0], np.uint8).copy()
    assert partial_state(data, 64, len(frames[0])) == UNFINISHED


def test_p1_an_underlay_that_finishes_checksums_hands_over_complete_ones(tunnel, lan, batch):
    for interface in ("lan0", "vx0"):
        lan.run(lambda name=interface: no_checksum_offload(name))
    lan.udp("10.244.9.9", 4000).sendto(b"x" * 500, ("10.244.9.1", 53))
    frames = read(tunnel, batch)
    assert partial_state(np.frombuffer(frames[0], np.uint8).copy(), 64, len(frames[0])) == COMPLETE


def test_p2_a_veth_underlay_hands_over_whole_super_frames(tunnel, lan, batch):
    sender = lan.udp("10.244.9.9", 4000)
    sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    body = bytes(i * 7 & 0xFF for i in range(20500))
    sender.sendto(body, ("10.244.9.1", 53))
    received = b""
    while len(received) < len(body):
        received += b"".join(bytes(Ether(frame)[VXLAN][UDP].payload) for frame in read(tunnel, batch))
    assert received == body


def test_the_kernel_takes_what_we_send_through_the_tunnel(tunnel, lan, batch):
    receiver = lan.udp("10.244.9.9", 53)
    watcher = lan.open(lambda: Uplink("lan0", prefix_filter([IPv4Network("192.0.2.9/32")])))
    inner = Ether(src=VTEP_MAC, dst=VX_MAC) / IP(src="10.244.9.1", dst="10.244.9.9") / UDP(sport=4000, dport=53)
    frame = partial(Ether(bytes(inner / Raw(b"x" * 500))))
    vnet = Vnet(NEEDS_CSUM, csum_start=84, csum_offset=6)
    assert send(tunnel, batch, bytes(OUTER) + frame, vnet, flags=ENCAPSULATED) == 1
    assert receiver.recv(1000) == b"x" * 500
    seen = Ether(read(watcher, batch)[0])
    assert (seen[UDP].chksum, seen[IP].ttl, seen[IP].flags.DF, seen[IP].tos) == (0, 64, 0, 1)
    assert min(tunnel.ports, key=lambda port: abs(port - 40000)) == seen[UDP].sport


def test_p5_a_tunneled_super_frame_is_taken_by_the_kernel_in_segments(tunnel, lan, batch):
    receiver = lan.udp("10.244.9.9", 53)
    body = bytes(i * 7 & 0xFF for i in range(60000))
    inner = Ether(src=VTEP_MAC, dst=VX_MAC) / IP(src="10.244.9.1", dst="10.244.9.9") / UDP(sport=4000, dport=53)
    frame = bytes(OUTER) + partial(Ether(bytes(inner / Raw(body))))
    load(batch, [frame], 0)
    start = int(batch.packets["start"][0])
    vnet = Vnet(NEEDS_CSUM, GSO_UDP_L4, 0, 1400, 84, 6)
    assert send(tunnel, batch, frame, vnet, flags=ENCAPSULATED, l3=start + 64, l4=start + 84) == 1
    assert b"".join(receiver.recv(2000) for _ in range(43)) == body


def test_a_port_that_is_taken_is_named(tunnel, host):
    def attempt() -> None:
        with pytest.raises(DeviceError, match=r"vxlan 192\.0\.2\.1:4789: bind: Address already in use"):
            VxlanSocket("192.0.2.1")

    host.run(attempt)


def test_the_sockets_have_room_for_bursts_of_super_frames(tunnel):
    """Whatever net.core.wmem_max says (it is smaller on every default); Linux reports twice what was asked for."""
    sizes = [sender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for sender in tunnel._sockets]
    assert min(sizes) == 2 * SEND_BUFFER
    assert tunnel._receiver.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * RECEIVE_BUFFER


def test_the_tunnel_counts_what_it_loses(tunnel, lan):
    assert tunnel.statistics() == 0
    tunnel._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sender = lan.udp("192.0.2.9", 0)
    for _ in range(50):
        sender.sendto(b"x" * 1000, ("192.0.2.1", 4789))
    assert tunnel.statistics() > 0
