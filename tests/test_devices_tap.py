"""A TAP against the kernel's network stack at its other end.

namespace pod                     this process
+--------------------+         +--------------+
| dt0  10.244.0.7/24 |== TAP ==| Tap          |
+--------------------+         +--------------+
"""

import errno
import fcntl
import gc
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from dataplane.batch import GSO_UDP_L4, NEEDS_CSUM, Batch, make_batch
from dataplane.codecs.partial import UNFINISHED, partial_state
from dataplane.devices.device import DeviceError
from dataplane.devices.filter import prefix_filter
from dataplane.devices.memory import Vnet
from dataplane.devices.tap import OFFLOADS, TUNSETOFFLOAD, Tap
from dataplane.devices.uplink import Uplink
from dataplane.verdict import Reason
from tests.spaces import (
    OUR_MAC,
    POD_MAC,
    UDP_SEGMENT,
    Space,
    as_nobody,
    opened_spaces,
    partial,
    read,
    send,
)

pytestmark = pytest.mark.netns

ETHER = Ether(src=OUR_MAC, dst=POD_MAC)


@pytest.fixture
def spaces() -> Iterator[Callable[[str], Space]]:
    with opened_spaces() as space:
        yield space


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture
def pod(spaces: Callable[[str], Space]) -> Space:
    return spaces("pod")


@pytest.fixture
def tap(pod: Space) -> Tap:
    device = pod.open(lambda: Tap("dt0", mac=int(POD_MAC.replace(":", ""), 16), mtu=1450))
    pod.run(device.up)
    pod.ip("addr", "add", "10.244.0.7/24", "dev", "dt0")
    pod.ip("neigh", "add", "10.244.0.8", "lladdr", OUR_MAC, "dev", "dt0")
    return device


def datagram(size: int = 100, **fields: Any) -> Packet:
    body = Raw(bytes(i * 7 & 0xFF for i in range(size)))
    return Ether(bytes(ETHER / IP(src="10.244.0.8", dst="10.244.0.7") / UDP(sport=4000, dport=53, **fields) / body))


def test_a_pod_answers_an_echo_request(tap, batch):
    request = ETHER / IP(src="10.244.0.8", dst="10.244.0.7") / bytes.fromhex("0800 f7fd 0001 0001")
    request[IP].proto = 1
    assert send(tap, batch, request) == 1
    reply = Ether(read(tap, batch)[0])
    assert (reply.src, reply.dst, reply[IP].src) == (POD_MAC, OUR_MAC, "10.244.0.7")
    assert bytes(reply[IP].payload)[0] == 0


def test_a_pod_asks_for_its_neighbor(tap, pod, batch):
    sender = pod.udp("10.244.0.7", 0)
    sender.sendto(b"hello", ("10.244.0.99", 53))
    request = Ether(read(tap, batch)[0])
    assert (request.dst, request[ARP].pdst) == ("ff:ff:ff:ff:ff:ff", "10.244.0.99")


def test_the_pod_end_has_the_mac_and_mtu_given(tap, pod):
    assert pod.run(lambda: (tap.mac, tap.mtu)) == (0x02_0000_0000_07, 1450)
    assert tap.offloads == OFFLOADS[0]
    assert not os.get_blocking(tap.fileno())


def test_p1_a_wrong_checksum_with_an_empty_header_is_left_to_the_pod_to_find(tap, pod, batch):
    receiver = pod.udp("10.244.0.7", 53)
    damaged = bytearray(bytes(datagram()))
    damaged[-1] ^= 1
    assert send(tap, batch, bytes(damaged)) == 1
    assert send(tap, batch, datagram(size=5)) == 1
    assert len(receiver.recv(2000)) == 5


def test_p3_an_unfinished_checksum_is_taken_when_marked_and_only_then(tap, pod, batch):
    receiver = pod.udp("10.244.0.7", 53)
    frame = partial(datagram())
    assert partial_state(np.frombuffer(frame, np.uint8).copy(), 14, len(frame)) == UNFINISHED
    assert send(tap, batch, frame) == 1
    assert send(tap, batch, partial(datagram(size=7)), Vnet(NEEDS_CSUM, csum_start=34, csum_offset=6)) == 1
    assert len(receiver.recv(2000)) == 7


def test_p4_super_frames_may_be_written_whatever_was_negotiated_for_reading(tap, pod, batch):
    fcntl.ioctl(tap.fileno(), TUNSETOFFLOAD, 0)
    receiver = pod.udp("10.244.0.7", 53)
    frame = datagram(size=10000)
    assert send(tap, batch, partial(frame), Vnet(NEEDS_CSUM, GSO_UDP_L4, 0, 1000, 34, 6)) == 1
    assert b"".join(receiver.recv(2000) for _ in range(10)) == bytes(frame[UDP].payload)


def test_a_super_frame_of_the_pod_arrives_whole_and_leaves_a_raw_device_in_segments(tap, pod, batch):
    sender = pod.udp("10.244.0.7", 4000)
    sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    body = bytes(i * 7 & 0xFF for i in range(20500))
    sender.sendto(body, ("10.244.0.8", 53))
    frames = read(tap, batch)
    record = batch.packets[0]
    assert [len(frame) for frame in frames] == [42 + 20500]
    assert (record["vnet_flags"], record["gso_type"], record["gso_size"]) == (NEEDS_CSUM, GSO_UDP_L4, 1000)
    assert (record["csum_start"], record["csum_offset"]) == (34, 6)


def test_a_pod_without_offloads_gets_finished_segments(tap, pod, batch):
    receiver = pod.udp("10.244.0.7", 53)
    tap.offload = False
    frame = datagram(size=3500)
    assert send(tap, batch, partial(frame), Vnet(NEEDS_CSUM, GSO_UDP_L4, 0, 1000, 34, 6)) == 1
    assert [len(receiver.recv(2000)) for _ in range(4)] == [1000, 1000, 1000, 500]


def test_fragments_are_put_together_by_the_pod(tap, pod, batch):
    receiver = pod.udp("10.244.0.7", 53)
    frame = datagram(size=5000)
    assert send(tap, batch, frame, mtu=1450) == 1
    assert receiver.recv(6000) == bytes(frame[UDP].payload)


def test_a_pod_end_that_is_down_is_an_error_of_the_device(tap, pod, batch):
    pod.ip("link", "set", "dt0", "down")
    assert send(tap, batch, datagram()) == 0
    assert batch.packets["reason"][0] == Reason.DEVICE_ERROR


def test_a_persistent_tap_stays_and_can_be_opened_again(pod):
    pod.run(lambda: Tap("dt1", persist=True).close())
    again = pod.open(lambda: Tap("dt1"))
    again.close()
    with pytest.raises(subprocess.CalledProcessError):
        pod.ip("link", "show", "dt1")


def test_an_older_kernel_is_asked_for_fewer_offloads(pod, monkeypatch):
    asked: list[int] = []

    def ioctl(fd: int, number: int, value: Any) -> Any:
        if number != TUNSETOFFLOAD:
            return fcntl_ioctl(fd, number, value)
        asked.append(value)
        if value != OFFLOADS[-2]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    fcntl_ioctl = fcntl.ioctl
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert pod.open(lambda: Tap("dt2")).offloads == OFFLOADS[-2]
    assert asked == list(OFFLOADS[:-1])


def test_the_mac_mtu_and_persistence_can_be_changed(tap, pod):
    def change() -> tuple[int, int]:
        tap.mac, tap.mtu = 0x02_0000_0000_42, 1400
        tap.persist(True)
        tap.persist(False)
        return tap.mac, tap.mtu

    assert pod.run(change) == (0x02_0000_0000_42, 1400)


def test_the_kernel_may_choose_the_name(pod):
    assert pod.open(Tap).name == "tap0"


def test_a_tap_in_use_is_refused_and_no_other_file_is_closed(pod, tap):
    def attempt() -> None:
        with pytest.raises(DeviceError, match="dt0: open /dev/net/tun") as caught:
            Tap("dt0")
        assert caught.value.device == "dt0"

    pod.run(attempt)
    reader, writer = os.pipe()  # takes the number that the failed attempt has freed
    gc.collect()
    os.write(writer, b"x")
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("open_device", "capability"),
    [(lambda: Tap("dt9"), "CAP_NET_ADMIN"), (lambda: Uplink("lo", prefix_filter([])), "CAP_NET_RAW")],
    ids=["tap", "uplink"],
)
def test_without_permission_the_error_names_the_capability(pod, open_device, capability):
    assert f"needs {capability}" in pod.run(lambda: as_nobody(open_device))


def test_a_virtio_header_that_the_kernel_refuses_costs_one_packet(tap, batch):
    unknown_kind = 2
    assert send(tap, batch, datagram(), Vnet(NEEDS_CSUM, unknown_kind, 0, 100, 34, 6)) == 0
    assert batch.packets["reason"][0] == Reason.DEVICE_ERROR
    assert tap._interfaces["error"][1] == errno.EINVAL
    assert send(tap, batch, ETHER / IP(src="10.244.0.8", dst="10.244.0.7") / TCP()) == 1


def test_only_the_offloads_that_were_wanted_are_asked_for(pod):
    assert pod.open(lambda: Tap("dt3", offload={"csum", "tso4"})).offloads == 0x03
    assert pod.open(lambda: Tap("dt4", offload=())).offloads == 0
