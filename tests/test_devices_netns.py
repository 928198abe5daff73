"""Devices against the kernel's own network stack, in namespaces made for the test.

namespace pod                     this process                    namespace lan
+--------------------+         +------------------+         +---------------------------+
| dt0  10.244.0.7/24 |== TAP ==| Tap              |         | lan0  192.0.2.9/24        |
+--------------------+         | Uplink on up0  --|-- veth -| vx0   10.244.9.9/24       |
                               | VxlanSocket    --|--------+|       VNI 4096 to 192.0.2.1 |
                               +------------------+         +---------------------------+
                                 namespace host: up0 192.0.2.1/24
"""

import errno
import fcntl
import gc
import os
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from itertools import count
from typing import Any, TypeVar

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from dataplane.batch import ENCAPSULATED, GSO_UDP_L4, NEEDS_CSUM, Batch, make_batch
from dataplane.codecs.partial import COMPLETE, UNFINISHED, partial_state
from dataplane.devices.device import Device, DeviceError, interface_ioctl
from dataplane.devices.memory import Vnet, load, unload
from dataplane.devices.namespace import NamespaceHandle, in_namespace, open_namespace, remove_namespace
from dataplane.devices.tap import OFFLOADS, TUNSETOFFLOAD, Tap
from dataplane.devices.uplink import Uplink
from dataplane.devices.vxlan_socket import VxlanSocket
from dataplane.verdict import Reason

pytestmark = pytest.mark.netns

OUR_MAC, POD_MAC, LAN_MAC, UP_MAC = "ee:ee:ee:ee:ee:ee", "02:00:00:00:00:07", "02:00:00:00:00:09", "02:00:00:00:00:01"
VTEP_MAC, VX_MAC = "66:00:00:00:00:01", "66:00:00:00:00:02"
ETHER = Ether(src=OUR_MAC, dst=POD_MAC)
UDP_SEGMENT = 103
Result = TypeVar("Result")
numbers = count()


class Space:
    """A namespace of our own, and what was opened in it."""

    def __init__(self, label: str) -> None:
        self.name = f"dptest-{os.getpid()}-{next(numbers)}-{label}"
        self.handle: NamespaceHandle = open_namespace(self.name)
        self._opened: list[Any] = []
        self.write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
        self.ip("link", "set", "lo", "up")

    def run(self, function: Callable[[], Result]) -> Result:
        return in_namespace(self.handle, function)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True, capture_output=True)

    def write(self, path: str, text: str) -> None:
        def put() -> None:
            with open(path, "w") as file:
                file.write(text)

        self.run(put)

    def open(self, function: Callable[[], Result]) -> Result:
        made = self.run(function)
        self._opened.append(made)
        return made

    def udp(self, address: str, port: int) -> socket.socket:
        made = self.open(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        made.bind((address, port))
        made.settimeout(5)
        return made

    def close(self) -> None:
        for each in self._opened:
            each.close()
        remove_namespace(self.handle)


@pytest.fixture
def spaces() -> Iterator[Callable[[str], Space]]:
    made: list[Space] = []

    def space(label: str) -> Space:
        made.append(Space(label))
        return made[-1]

    yield space
    for each in made:
        each.close()


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


def wait(device: Device) -> None:
    assert select.select([device.fileno()], [], [], 5)[0], "nothing to read within 5 s"


def read(device: Device, batch: Batch) -> list[bytes]:
    wait(device)
    return [unload(batch, row) for row in range(device.recv(batch))]


def send(device: Device, batch: Batch, frame: Packet | bytes, vnet: Vnet = Vnet(), **fields: int) -> int:  # noqa: B008
    load(batch, [bytes(frame)], 0, [vnet])
    record = batch.packets[:1]
    record["l3"], record["l4"] = record["start"] + 14, record["start"] + 34
    for name, value in fields.items():
        record[name] = value
    return device.send(batch, [0])


def datagram(size: int = 100, **fields: Any) -> Packet:
    body = Raw(bytes(i * 7 & 0xFF for i in range(size)))
    return Ether(bytes(ETHER / IP(src="10.244.0.8", dst="10.244.0.7") / UDP(sport=4000, dport=53, **fields) / body))


def partial(frame: Packet, at: int = 34, offset: int = 6) -> bytes:
    """Replace the checksum by the folded pseudo-header sum."""
    data = bytearray(bytes(frame))
    words = [int.from_bytes(data[i : i + 2], "big") for i in range(at - 8, at, 2)]
    total = sum(words) + data[at - 11] + len(data) - at
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    data[at + offset : at + offset + 2] = total.to_bytes(2, "big")
    return bytes(data)


# --- TAP ---


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
    [(lambda: Tap("dt9"), "CAP_NET_ADMIN"), (lambda: Uplink("lo", []), "CAP_NET_RAW")],
    ids=["tap", "uplink"],
)
def test_without_permission_the_error_names_the_capability(pod, open_device, capability):
    assert f"needs {capability}" in pod.run(lambda: as_nobody(open_device))


def as_nobody(function: Callable[[], Any]) -> str:
    """Return what the DeviceError says that ``function`` raises in a child without privileges."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setuid(65534)
            function()
        except DeviceError as error:
            os.write(writer, f"{error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


# --- uplink ---


@pytest.fixture
def host(spaces: Callable[[str], Space]) -> Space:
    return spaces("host")


@pytest.fixture
def lan(spaces: Callable[[str], Space], host: Space) -> Space:
    space = spaces("lan")
    host.ip(
        "link", "add", "up0", "address", UP_MAC, "type", "veth", "peer", "lan0", "address", LAN_MAC, "netns", space.name
    )
    host.ip("addr", "add", "192.0.2.1/24", "dev", "up0")
    space.ip("addr", "add", "192.0.2.9/24", "dev", "lan0")
    host.ip("link", "set", "up0", "up")
    space.ip("link", "set", "lan0", "up")
    host.ip("neigh", "add", "192.0.2.9", "lladdr", LAN_MAC, "dev", "up0")
    space.ip("neigh", "add", "192.0.2.1", "lladdr", UP_MAC, "dev", "lan0")
    space.ip("neigh", "add", "192.0.2.50", "lladdr", UP_MAC, "dev", "lan0")
    return space


LB = [IPv4Network("192.0.2.48/28")]


@pytest.fixture
def uplink(host: Space, lan: Space) -> Uplink:
    return host.open(lambda: Uplink("up0", LB))


def test_the_uplink_takes_what_is_for_its_prefixes_and_leaves_the_rest_to_the_host(uplink, lan, batch):
    sender = lan.udp("192.0.2.9", 4000)
    for address in ("192.0.2.1", "192.0.2.50", "192.0.2.1", "192.0.2.50"):
        sender.sendto(b"hello", (address, 53))
    frames = [Ether(frame) for frame in read(uplink, batch)]
    assert [(frame[IP].dst, frame.dst) for frame in frames] == [("192.0.2.50", UP_MAC)] * 2
    assert batch.packets["vnet_flags"][0] & NEEDS_CSUM
    assert uplink.recv(batch) == 0


def test_the_prefixes_can_be_replaced(uplink, lan, batch):
    sender = lan.udp("192.0.2.9", 4000)
    uplink.set_prefixes([IPv4Network("192.0.2.1/32")])
    sender.sendto(b"no", ("192.0.2.50", 53))
    sender.sendto(b"yes", ("192.0.2.1", 53))
    assert [bytes(Ether(frame)[UDP].payload) for frame in read(uplink, batch)] == [b"yes"]


def test_the_uplink_hears_arp_but_not_what_the_host_itself_sends(uplink, host, lan, batch):
    uplink.set_prefixes([IPv4Network("0.0.0.0/0")])
    host.udp("192.0.2.1", 4000).sendto(b"own", ("192.0.2.9", 4001))
    lan.ip("neigh", "del", "192.0.2.50", "dev", "lan0")
    lan.udp("192.0.2.9", 4000).sendto(b"who has", ("192.0.2.50", 53))
    frames = [Ether(frame) for frame in read(uplink, batch)]
    assert [frame.src for frame in frames] == [LAN_MAC] * len(frames)
    assert ARP in frames[-1]


def test_frames_leave_by_the_uplink_with_their_offloads(uplink, lan, batch):
    receiver = lan.udp("192.0.2.9", 53)
    body = Raw(bytes(i * 7 & 0xFF for i in range(5000)))
    header = Ether(src=UP_MAC, dst=LAN_MAC) / IP(src="192.0.2.50", dst="192.0.2.9") / UDP(sport=4000, dport=53)
    frame = Ether(bytes(header / body))
    assert send(uplink, batch, partial(frame), Vnet(NEEDS_CSUM, GSO_UDP_L4, 0, 1000, 34, 6)) == 1
    assert b"".join(receiver.recv(6000) for _ in range(5)) == body.load
    assert send(uplink, batch, Ether(bytes(header / b"whole"))) == 1
    assert receiver.recv(6000) == b"whole"


def test_what_the_kernel_loses_is_counted(uplink, lan, batch):
    sender = lan.udp("192.0.2.9", 4000)
    assert uplink.statistics() == (0, 0)
    for _ in range(3):
        sender.sendto(b"hello", ("192.0.2.50", 53))
    wait(uplink)
    uplink._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for _ in range(50):
        sender.sendto(b"x" * 1000, ("192.0.2.50", 53))
    packets, drops = uplink.statistics()
    assert packets == 53
    assert 0 < drops <= 50
    assert uplink.statistics() == (packets, drops)


def test_the_uplink_knows_its_interface(uplink, host):
    assert host.run(lambda: (uplink.mac, uplink.mtu)) == (0x02_0000_0000_01, 1500)


def test_an_interface_that_goes_down_is_an_error_once(uplink, host, batch):
    host.ip("link", "set", "up0", "down")
    wait(uplink)
    assert uplink.recv(batch) == 0
    assert uplink._interfaces["error"][1] == errno.ENETDOWN
    assert uplink.recv(batch) == 0
    assert uplink._interfaces["rx_errors"][1] == 1


def test_an_interface_that_does_not_exist_is_named(host):
    def attempt() -> None:
        with pytest.raises(DeviceError, match="none0: set up the packet socket: No such device"):
            Uplink("none0", LB)

    host.run(attempt)


# --- tunnel ---


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
    watcher = lan.open(lambda: Uplink("lan0", [IPv4Network("192.0.2.9/32")]))
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


def test_the_tunnel_counts_what_it_loses(tunnel, lan):
    assert tunnel.statistics() == 0
    tunnel._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sender = lan.udp("192.0.2.9", 0)
    for _ in range(50):
        sender.sendto(b"x" * 1000, ("192.0.2.1", 4789))
    assert tunnel.statistics() > 0


def test_a_virtio_header_that_the_kernel_refuses_costs_one_packet(tap, batch):
    unknown_kind = 2
    assert send(tap, batch, datagram(), Vnet(NEEDS_CSUM, unknown_kind, 0, 100, 34, 6)) == 0
    assert batch.packets["reason"][0] == Reason.DEVICE_ERROR
    assert tap._interfaces["error"][1] == errno.EINVAL
    assert send(tap, batch, ETHER / IP(src="10.244.0.8", dst="10.244.0.7") / TCP()) == 1
