"""Receive, with ordinary sockets in place of devices: one datagram is one frame there, too."""

import os
import socket
import struct

import numpy as np
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from dataplane.batch import HEADROOM, PACKET, ROWS, SMALL_SIZE, SUPER_BASE, SUPERS, make_batch
from dataplane.devices.io import IoBuffers
from dataplane.devices.memory import unload
from dataplane.devices.receive import OUTER, receive
from dataplane.devices.syscalls import EIO
from dataplane.devices.vxlan_socket import VxlanSocket
from dataplane.tables.interface import INTERFACE, Driver

NOTHING = bytes(10)
EBADF = 9


class Link:
    """A pair of sockets: the test writes into one, receive reads the other."""

    def __init__(self, driver: Driver) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        self.interfaces = np.zeros(3, INTERFACE)
        self.interfaces[2]["driver"], self.interfaces[2]["fd"] = driver, self.ours.fileno()
        self.batch, self.io = make_batch(), IoBuffers()

    def read(self, limit: int = ROWS) -> list[bytes]:
        count = receive(self.batch.arrays, self.interfaces, 2, self.io.arrays, limit)
        return [unload(self.batch, row) for row in range(count)]

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture(params=[Driver.TAP, Driver.PACKET], ids=["tap", "packet"])
def link(request):
    made = Link(request.param)
    yield made
    made.close()


def frames_of(*sizes: int) -> list[bytes]:
    return [bytes((k * 7 + i) & 0xFF for i in range(size)) for k, size in enumerate(sizes)]


def test_frames_of_every_size_arrive_whole(link):
    frames = frames_of(14, 60, SMALL_SIZE - 1, SMALL_SIZE, SMALL_SIZE + 1, 3000, 65549, 100)
    for frame in frames:
        link.theirs.send(NOTHING + frame)
    assert link.read() == frames
    assert link.interfaces["rx_packets"][2] == len(frames)
    assert link.interfaces["rx_bytes"][2] == sum(map(len, frames))


def test_a_frame_stays_inside_its_slot_behind_the_headroom(link):
    frames = frames_of(60, 60000, SMALL_SIZE)
    for frame in frames:
        link.theirs.send(NOTHING + frame)
    link.read()
    for record in link.batch.packets[:3]:
        assert record["start"] == record["slot"] + HEADROOM
        assert record["start"] + record["length"] <= record["slot"] + record["size"]
    assert (link.batch.packets["slot"][:3] >= SUPER_BASE).tolist() == [False, True, False]


def test_the_row_is_as_if_new(link):
    noise = np.frombuffer(b"\xa5" * PACKET.itemsize, PACKET)[0]
    link.batch.packets[:] = noise
    link.theirs.send(NOTHING + b"x" * 60)
    link.read()
    record = link.batch.packets[0]
    assert record["iif"] == 2
    assert [record[name] for name in ("flow", "route", "vtep")] == [-1, -1, -1]
    zero = "oif verdict reason flags mark vnet_flags gso_type hdr_len gso_size csum_start csum_offset max_fragment mtu"
    assert [record[name] for name in zero.split()] == [0] * len(zero.split())


def test_the_virtio_header_is_read(link):
    link.theirs.send(struct.pack("BBHHHH", 1, 1, 54, 1400, 34, 16) + b"x" * 3000)
    link.read()
    record = link.batch.packets[0]
    names = ("vnet_flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    assert [record[name] for name in names] == [1, 1, 54, 1400, 34, 16]


@pytest.mark.parametrize(
    "header",
    [(1, 0, 0, 0, 59, 0), (1, 0, 0, 0, 0xFFFF, 0xFFFF), (0, 1, 54, 0, 0, 0), (0, 1, 61, 1400, 0, 0)],
    ids=["checksum outside", "checksum far outside", "segments of nothing", "headers longer than the frame"],
)
def test_a_virtio_header_that_points_outside_is_taken_for_none(link, header):
    link.theirs.send(struct.pack("BBHHHH", *header) + b"x" * 60)
    assert link.read() == [b"x" * 60]
    assert link.batch.packets["vnet_flags"][0] == link.batch.packets["gso_type"][0] == 0


def test_no_more_than_the_limit_is_read_and_the_rest_waits(link):
    frames = frames_of(*range(60, 100))
    for frame in frames:
        link.theirs.send(NOTHING + frame)
    assert link.read(limit=7) == frames[:7]
    assert link.read(limit=10**6) == frames[7:]
    assert link.read(limit=0) == []


def test_reading_stops_when_no_super_slot_is_left(link):
    small, large = b"s" * 60, b"l" * 3000
    order = [large, small] * (SUPERS + 3)
    for frame in order:
        link.theirs.send(NOTHING + frame)
    first = link.read()
    assert first.count(large) == SUPERS
    assert first + link.read() == order


def test_an_empty_device_is_no_error(link):
    assert link.read() == []
    assert link.interfaces["rx_errors"][2] == link.interfaces["error"][2] == 0


def test_an_error_of_the_device_is_stored_and_counted(link):
    link.theirs.send(NOTHING + b"x" * 60)
    assert len(link.read(limit=1)) == 1
    link.interfaces["fd"][2] = 1 << 20
    assert link.read() == []
    assert link.interfaces["error"][2] == EBADF
    assert link.interfaces["rx_errors"][2] == 1
    assert link.interfaces["rx_packets"][2] == 1


def test_a_device_that_ends_is_an_error_not_a_loop():
    link = Link(Driver.TAP)
    link.close()
    reader, writer = os.pipe()
    os.close(writer)
    link.interfaces["fd"][2] = reader
    assert link.read() == []
    assert link.interfaces["error"][2] == EIO
    os.close(reader)


def test_a_message_without_a_whole_virtio_header_is_an_empty_frame():
    link = Link(Driver.PACKET)
    link.theirs.send(b"short")
    link.theirs.send(NOTHING + b"x" * 60)
    assert link.read() == [b"", b"x" * 60]
    link.close()


@pytest.mark.parametrize("driver", [Driver.NONE, Driver.MEMORY])
def test_interfaces_without_a_file_have_nothing_to_read(driver):
    link = Link(driver)
    link.theirs.send(NOTHING + b"x" * 60)
    assert link.read() == []
    link.close()


# --- the tunnel's socket ---


@pytest.fixture
def tunnel():
    device = VxlanSocket("127.0.0.1", port=0, buckets=0)
    yield device
    device.close()


@pytest.fixture
def sender():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        yield made


def read_tunnel(device: VxlanSocket, limit: int = ROWS) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    batch, io, interfaces = make_batch(), IoBuffers(), np.zeros(3, INTERFACE)
    device.equip(io)
    interfaces[2]["driver"], interfaces[2]["fd"] = Driver.VXLAN_SOCKET, device.fileno()
    interfaces[2]["mac"] = 0x66_0102030405
    count = receive(batch.arrays, interfaces, 2, io.arrays, limit)
    return [unload(batch, row) for row in range(count)], batch.packets, interfaces


@pytest.mark.parametrize("tos", [0, 1, 0xB8, 3])
def test_the_outer_headers_are_put_back(tunnel, sender, tos):
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    sender.sendto(b"\x08" + b"v" * 99, ("127.0.0.1", tunnel.port))
    frames, packets, interfaces = read_tunnel(tunnel)
    frame = Ether(frames[0])
    again = frame.copy()
    del again[IP].chksum, again[IP].len, again[UDP].len
    assert bytes(again) == frames[0]
    assert (frame.dst, frame.src) == ("66:01:02:03:04:05", "00:00:00:00:00:00")
    assert (frame[IP].src, frame[IP].dst, frame[IP].ttl, frame[IP].tos) == ("127.0.0.1", "127.0.0.1", 64, tos)
    assert (frame[UDP].sport, frame[UDP].dport) == (sender.getsockname()[1], tunnel.port)
    assert frame[UDP].chksum == 0
    assert bytes(frame[UDP].payload) == b"\x08" + b"v" * 99
    assert packets["iif"][0] == 2
    assert interfaces["rx_bytes"][2] == 100 + OUTER


def test_p2_a_super_frame_arrives_as_one_datagram(tunnel, sender):
    sizes = [100, 65507, SMALL_SIZE, SMALL_SIZE + 1]
    for size in sizes:
        sender.sendto(bytes(i * 7 & 0xFF for i in range(size)), ("127.0.0.1", tunnel.port))
    frames, packets, _ = read_tunnel(tunnel)
    assert [len(frame) - OUTER for frame in frames] == sizes
    assert [frame[OUTER:] for frame in frames] == [bytes(i * 7 & 0xFF for i in range(size)) for size in sizes]
    assert Ether(frames[1])[IP].len == 65535
    assert (packets["slot"][:4] >= SUPER_BASE).tolist() == [False, True, False, True]
    for record in packets[:4]:
        assert record["slot"] <= record["start"]
        assert record["start"] + record["length"] <= record["slot"] + record["size"]


def test_many_datagrams_are_read_in_groups_and_in_order(tunnel, sender):
    for k in range(100):
        sender.sendto(bytes([k]) * (3000 if k % 10 == 0 else 60), ("127.0.0.1", tunnel.port))
    frames, _, _ = read_tunnel(tunnel)
    assert [frame[OUTER] for frame in frames] == list(range(100))


def test_the_device_itself_receives(tunnel, sender):
    batch = make_batch()
    sender.sendto(b"hello", ("127.0.0.1", tunnel.port))
    assert tunnel.recv(batch) == 1
    assert unload(batch, 0)[OUTER:] == b"hello"
    assert tunnel.recv(batch) == 0
