"""Transmit, with ordinary sockets in place of devices; segments and fragments are in test_devices_pieces."""

import os
import socket
import struct
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from dataplane.batch import ENCAPSULATED, GSO_TCPV4, NEEDS_CSUM, make_batch
from dataplane.devices.io import MAX_SOCKETS, MESSAGES, IoBuffers
from dataplane.devices.memory import Vnet, collect, load, unload
from dataplane.devices.messages import reject
from dataplane.devices.syscalls import EAGAIN, EIO, ENOBUFS
from dataplane.devices.transmit import transmit
from dataplane.devices.vxlan_socket import PORT_HIGH, PORT_LOW, VxlanSocket
from dataplane.tables.interface import INTERFACE, OFFLOAD, UP, Driver
from dataplane.verdict import Reason, Verdict

ETHER = Ether(src="ee:ee:ee:ee:ee:ee", dst="02:00:00:00:00:07")
NOTHING = bytes(10)
EBADF = 9
EMSGSIZE = 90
GIANT = b"g" * 30000  # more than the send buffer of a link whose ``small`` is set


class Link:
    """A batch, and interface 1 whose other end the test reads."""

    def __init__(self, driver: Driver, flags: int = UP | OFFLOAD, kind: int = socket.SOCK_DGRAM) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, kind)
        self.ours.setblocking(False)
        self.theirs.settimeout(5)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        self.interfaces = np.zeros(3, INTERFACE)
        self.interfaces[1]["driver"], self.interfaces[1]["fd"] = driver, self.ours.fileno()
        self.interfaces[1]["flags"] = flags
        self.interfaces[2] = self.interfaces[1]
        self.batch, self.io = make_batch(), IoBuffers()

    def send(self, frames: list[bytes], vnet: tuple[Vnet, ...] = (), **fields: Any) -> int:
        count = load(self.batch, frames, 0, vnet)
        rows = self.batch.packets[:count]
        rows["oif"], rows["l3"], rows["l4"] = 1, rows["start"] + 14, rows["start"] + 34
        for name, values in fields.items():
            rows[name] = values
        return transmit(self.batch.arrays, count, self.interfaces, self.io.arrays)

    def arrived(self, count: int) -> list[bytes]:
        return [self.theirs.recv(1 << 17) for _ in range(count)]

    def nothing_more_arrived(self) -> bool:
        self.theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.theirs.recv(1)
        return True

    @property
    def reasons(self) -> list[int]:
        return [int(reason) for reason in self.batch.packets["reason"]]

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def make():
    made = []

    def link(*arguments: Any, **named: Any) -> Link:
        made.append(Link(*arguments, **named))
        return made[-1]

    yield link
    for each in made:
        each.close()


@pytest.fixture(params=[Driver.TAP, Driver.PACKET], ids=["tap", "packet"])
def link(request, make):
    return make(request.param)


def frames_of(*sizes: int) -> list[bytes]:
    return [bytes((k * 7 + i) & 0xFF for i in range(size)) for k, size in enumerate(sizes)]


def test_frames_leave_whole_behind_an_empty_virtio_header(link):
    frames = frames_of(60, 1514, 3000, 65000)
    assert link.send(frames) == 4
    assert link.arrived(4) == [NOTHING + frame for frame in frames]
    row = link.interfaces[1]
    assert (row["tx_packets"], row["tx_frames"], row["tx_bytes"]) == (4, 4, sum(map(len, frames)))


def test_more_messages_than_one_call_takes_leave_in_order(make):
    link = make(Driver.PACKET, kind=socket.SOCK_SEQPACKET)
    frames = frames_of(*range(60, 60 + 2 * MESSAGES + 3))
    assert link.send(frames) == len(frames)
    assert link.arrived(len(frames)) == [NOTHING + frame for frame in frames]


def test_only_rows_that_have_somewhere_to_go_and_are_not_dropped_leave(link):
    frames = frames_of(60, 61, 62, 63, 64)
    verdicts = [Verdict.ACCEPT, Verdict.STOLEN, Verdict.QUEUE, Verdict.DROP, Verdict.ACCEPT]
    before = [Reason.ACCEPTED, Reason.ARP_ANSWERED, Reason.NEIGH_RESOLVE, Reason.IP_TTL, Reason.ACCEPTED]
    assert link.send(frames, verdict=verdicts, reason=before, oif=[1, 1, 1, 1, 0]) == 2
    assert link.arrived(2) == [NOTHING + frames[0], NOTHING + frames[1]]
    assert link.nothing_more_arrived()
    assert link.batch.packets["verdict"][:5].tolist() == verdicts
    assert link.reasons[:5] == before


def test_p3_a_partial_checksum_passes_to_an_offloading_device_with_its_header(link):
    frame = b"x" * 100
    assert link.send([frame], (Vnet(NEEDS_CSUM, csum_start=34, csum_offset=16),)) == 1
    assert link.arrived(1) == [struct.pack("BBHHHH", 1, 0, 0, 0, 34, 16) + frame]


def test_p4_a_super_frame_passes_whole_with_the_length_of_its_headers(link):
    frame = bytes(ETHER / IP() / TCP(options=[("Timestamp", (1, 2))]) / Raw(b"x" * 9000))
    assert link.send([frame], (Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 1400, 34, 16),), mtu=1450) == 1
    assert link.arrived(1) == [struct.pack("BBHHHH", 1, 1, 14 + 20 + 32, 1400, 34, 16) + frame]


def test_a_packet_larger_than_the_path_is_fragmented_for_an_offloading_device_too(link):
    frame = bytes(ETHER / IP(id=1) / UDP() / Raw(b"x" * 3000))
    assert link.send([frame], mtu=1500) == 1
    pieces = link.arrived(3)
    assert all(piece[:10] == NOTHING for piece in pieces)
    assert [Ether(piece[10:])[IP].frag for piece in pieces] == [0, 185, 370]
    assert (link.interfaces["tx_packets"][1], link.interfaces["tx_frames"][1]) == (1, 3)


def test_a_super_frame_is_segmented_for_a_device_without_offloads(make):
    for driver in (Driver.TAP, Driver.PACKET):
        link = make(driver, UP)
        frame = bytes(ETHER / IP(id=1) / TCP() / Raw(b"x" * 100 * (MESSAGES + 6)))
        assert link.send([frame], (Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 100, 34, 16),)) == 1
        pieces = link.arrived(MESSAGES + 6)
        assert all(piece[:10] == NOTHING and len(piece) == 164 for piece in pieces)
        assert link.nothing_more_arrived()


def test_p6_nothing_is_coalesced_so_nothing_unverified_can_be(link):
    segment = bytes(ETHER / IP() / TCP(flags="A") / Raw(b"x" * 1400))
    assert link.send([segment] * 8) == 8
    assert link.arrived(8) == [NOTHING + segment] * 8


# --- devices that fail ---


@pytest.mark.parametrize("oif", [1, 2, 3, 1023])
def test_an_interface_that_is_down_or_unknown_drops(make, oif):
    link = make(Driver.TAP, OFFLOAD)
    link.interfaces[2]["flags"], link.interfaces[2]["driver"] = UP, Driver.NONE
    assert link.send([b"x" * 60], oif=oif) == 0
    assert link.batch.packets["verdict"][0] == Verdict.DROP
    assert link.reasons[0] == Reason.DEVICE_DOWN
    assert link.interfaces["tx_packets"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("driver", [Driver.TAP, Driver.PACKET])
def test_a_full_queue_drops_as_overload_and_is_no_error_of_the_device(make, driver):
    link = make(driver, kind=socket.SOCK_SEQPACKET)
    link.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20000)
    frames = frames_of(*[1400] * 100)
    sent = link.send(frames)
    assert 0 < sent < 100
    assert link.arrived(sent) == [NOTHING + frame for frame in frames[:sent]]
    assert link.nothing_more_arrived()
    assert link.reasons[:100] == [0] * sent + [Reason.OVERLOAD_TX_FULL] * (100 - sent)
    assert link.interfaces["tx_packets"][1] == link.interfaces["tx_frames"][1] == sent
    assert link.interfaces["tx_errors"][1] == link.interfaces["error"][1] == 0


def test_a_file_that_is_gone_is_an_error_of_the_device(link):
    link.interfaces["fd"][1] = 1 << 20
    assert link.send(frames_of(60, 60)) == 0
    assert link.reasons[:2] == [Reason.DEVICE_ERROR] * 2
    assert link.interfaces["error"][1] == EBADF
    assert link.interfaces["tx_errors"][1] == 2


def test_one_refused_packet_costs_no_other(link):
    link.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20000)
    frames = [b"a" * 60, GIANT + GIANT, b"b" * 60, GIANT + GIANT, b"c" * 60]
    assert link.send(frames) == 3
    assert link.arrived(3) == [NOTHING + frames[0], NOTHING + frames[2], NOTHING + frames[4]]
    assert link.reasons[:5] == [0, Reason.DEVICE_ERROR, 0, Reason.DEVICE_ERROR, 0]
    assert link.interfaces["error"][1] == EMSGSIZE


def test_a_packet_that_loses_a_piece_counts_as_dropped(make):
    link = make(Driver.TAP, UP, kind=socket.SOCK_SEQPACKET)
    link.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10000)
    frame = bytes(ETHER / IP(id=1) / TCP() / Raw(b"x" * 60000))
    assert link.send([frame], (Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 1000, 34, 16),)) == 0
    assert link.reasons[0] == Reason.OVERLOAD_TX_FULL
    assert link.interfaces["tx_packets"][1] == 0
    assert 0 < link.interfaces["tx_frames"][1] < 60


@pytest.mark.parametrize(
    ("error", "reason"),
    [(EAGAIN, "OVERLOAD_TX_FULL"), (ENOBUFS, "OVERLOAD_TX_FULL"), (EIO, "DEVICE_ERROR"), (EBADF, "DEVICE_ERROR")],
)
def test_errors_have_their_reasons(error, reason):
    batch, interfaces = make_batch(), np.zeros(2, INTERFACE)
    reject(batch.packets, interfaces, 3, 1, error)
    assert batch.packets["verdict"][3] == Verdict.DROP
    assert batch.packets["reason"][3] == Reason[reason]
    assert interfaces["error"][1] == (error if reason == "DEVICE_ERROR" else 0)


def test_two_interfaces_of_the_same_kind_keep_their_own_counters(make):
    link, other = make(Driver.PACKET), make(Driver.PACKET)
    link.interfaces["fd"][2] = other.ours.fileno()
    frames = frames_of(60, 61, 62, 63)
    assert link.send(frames, oif=[1, 2, 1, 2]) == 4
    assert link.arrived(2) == [NOTHING + frames[0], NOTHING + frames[2]]
    assert other.arrived(2) == [NOTHING + frames[1], NOTHING + frames[3]]
    assert link.interfaces["tx_bytes"].tolist() == [0, 122, 124]


def test_a_reader_that_closes_is_an_error_not_a_signal():
    reader, writer = os.pipe()
    os.close(reader)
    batch, io, interfaces = make_batch(), IoBuffers(), np.zeros(2, INTERFACE)
    interfaces[1]["driver"], interfaces[1]["flags"], interfaces[1]["fd"] = Driver.TAP, UP | OFFLOAD, writer
    load(batch, [b"x" * 60], 0)
    batch.packets["oif"][0] = 1
    assert transmit(batch.arrays, 1, interfaces, io.arrays) == 0
    assert batch.packets["reason"][0] == Reason.DEVICE_ERROR
    os.close(writer)


# --- memory devices ---


def test_frames_for_a_memory_device_stay_in_the_batch(make):
    for flags in (UP, UP | OFFLOAD):
        link = make(Driver.MEMORY, flags)
        frames = frames_of(60, 3000)
        assert link.send(frames, oif=[1, 2]) == 2
        assert collect(link.batch, 2, link.interfaces, link.io) == [(1, frames[0]), (2, frames[1])]
        assert [unload(link.batch, row) for row in range(2)] == frames
        assert link.interfaces["tx_frames"].tolist() == [0, 1, 1]


def test_a_memory_device_with_offloads_takes_super_frames_whole(make):
    link = make(Driver.MEMORY, UP | OFFLOAD)
    frame = bytes(ETHER / IP() / TCP() / Raw(b"x" * 9000))
    assert link.send([frame], (Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 1400, 34, 16),)) == 1
    assert collect(link.batch, 1, link.interfaces, link.io) == [(1, frame)]


# --- the tunnel ---


def outer(sport: int, dport: int, tos: int = 0) -> Packet:
    network = IP(src="127.0.0.1", dst="127.0.0.1", tos=tos)
    return ETHER / network / UDP(sport=sport, dport=dport, chksum=0) / VXLAN(flags=8, vni=4096)


class Tunnel(Link):
    """Sends from the sockets of a tunnel to another socket of this machine."""

    def __init__(self, buckets: int) -> None:
        super().__init__(Driver.VXLAN_SOCKET, UP)
        self.device = VxlanSocket("127.0.0.1", port=0, buckets=buckets)
        self.device.equip(self.io)
        self.interfaces["fd"][1] = self.device.fileno()
        self.peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.peer.bind(("127.0.0.1", 0))
        self.peer.settimeout(5)
        self.peer.setsockopt(socket.IPPROTO_IP, 13, 1)  # IP_RECVTOS
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.port = self.peer.getsockname()[1]

    def close(self) -> None:
        super().close()
        self.device.close()
        self.peer.close()


@pytest.fixture
def tunnel():
    made = []

    def open_tunnel(buckets: int = 4) -> Tunnel:
        made.append(Tunnel(buckets))
        return made[-1]

    yield open_tunnel
    for each in made:
        each.close()


INNER = ETHER / IP(id=1) / TCP(seq=7) / Raw(b"x" * 100)


def test_a_tunneled_frame_is_sent_from_its_vxlan_header_on(tunnel):
    link = tunnel()
    frame = bytes(outer(40000, link.port) / INNER)
    assert link.send([frame], flags=ENCAPSULATED) == 1
    data, _, _, (address, port) = link.peer.recvmsg(65535)
    assert data == frame[42:]
    assert address == "127.0.0.1"
    assert port in link.device.ports
    assert (link.interfaces["tx_frames"][1], link.interfaces["tx_bytes"][1]) == (1, len(frame))


@pytest.mark.parametrize("tos", [0, 1, 2])
def test_the_outer_tos_goes_along(tunnel, tos):
    link = tunnel()
    marked, plain = (bytes(outer(40000, link.port, each) / INNER) for each in (tos, 0))
    assert link.send([marked, plain], flags=ENCAPSULATED) == 2
    for expected in (tos, 0):
        _, control, _, _ = link.peer.recvmsg(65535, 64)
        assert [data[0] for _, _, data in control] == [expected]


def test_the_source_port_is_the_nearest_that_there_is(tunnel):
    link = tunnel(buckets=16)
    wanted = [PORT_LOW, 40000, 50000, PORT_HIGH - 1, 0, 65535, 40000]
    assert link.send([bytes(outer(port, link.port) / INNER) for port in wanted], flags=ENCAPSULATED) == len(wanted)
    got = sorted(link.peer.recvfrom(65535)[1][1] for _ in wanted)
    nearest = [min(link.device.ports, key=lambda port: abs(port - each)) for each in wanted]
    assert got == sorted(nearest)


def test_each_flow_keeps_its_order(tunnel):
    link = tunnel(buckets=16)
    sports = [PORT_LOW + k * 997 % 28000 for k in range(20)]
    frames = [bytes(outer(sports[k % 20], link.port) / INNER / Raw(bytes([k]))) for k in range(200)]
    assert link.send(frames, flags=ENCAPSULATED) == 200
    arrived = [link.peer.recvfrom(65535) for _ in range(200)]
    by_port: dict[int, list[int]] = {}
    for data, (_, port) in arrived:
        by_port.setdefault(port, []).append(data[-1])
    assert all(numbers == sorted(numbers) for numbers in by_port.values())
    assert sum(map(len, by_port.values())) == 200


@pytest.mark.parametrize("buckets", [0, 1, MAX_SOCKETS])
def test_any_number_of_sockets_will_do(tunnel, buckets):
    link = tunnel(buckets=buckets)
    frames = [bytes(outer(PORT_LOW + (2 * k + 1) * 28232 // 128, link.port) / INNER) for k in range(64)]
    assert link.send(frames, flags=ENCAPSULATED) == 64
    ports = {link.peer.recvfrom(65535)[1][1] for _ in range(64)}
    assert ports == (set(link.device.ports) or {link.device.port})


def test_p5_a_tunneled_super_frame_is_sent_as_segments_that_fit_a_datagram(tunnel):
    link = tunnel()
    frame = bytes(outer(40000, link.port) / ETHER / IP(id=1) / TCP(seq=7) / Raw(b"x" * 65000))
    vnet = Vnet(NEEDS_CSUM, GSO_TCPV4, 0, 500, 50 + 34, 16)
    load(link.batch, [frame], 0)  # tells where the frame will start
    inner = int(link.batch.packets["start"][0]) + 50
    assert link.send([frame], (vnet,), flags=ENCAPSULATED, l3=inner + 14, l4=inner + 34) == 1
    assert link.interfaces["tx_frames"][1] == 130 > MESSAGES
    stream = b""
    for k in range(130):
        inner = VXLAN(link.peer.recv(65535))[Ether]
        checked = inner.copy()
        del checked[TCP].chksum, checked[IP].chksum
        assert bytes(checked) == bytes(inner)
        assert (inner[TCP].seq, inner[IP].id) == (7 + 500 * k, 1 + k)
        stream += bytes(inner[TCP].payload)
    assert stream == b"x" * 65000


def test_a_datagram_larger_than_udp_allows_is_refused(tunnel):
    link = tunnel()
    frame = bytes(outer(40000, 4789)) + b"x" * 65501
    assert link.send([frame], flags=ENCAPSULATED) == 0
    assert link.reasons[0] == Reason.DEVICE_ERROR
    assert link.interfaces["error"][1] == EMSGSIZE


def test_a_frame_without_outer_headers_cannot_leave_by_the_tunnel(tunnel):
    link = tunnel()
    assert link.send([bytes(INNER)]) == 0
    assert link.reasons[0] == Reason.DEVICE_ERROR
