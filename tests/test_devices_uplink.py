"""The uplink between the host's network stack and the LAN.

namespace host                                       namespace lan
+--------------------------------------+         +---------------------+
| up0  192.0.2.1/24   <- Uplink        |-- veth -| lan0  192.0.2.9/24  |
+--------------------------------------+         +---------------------+
"""

import errno
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from dataplane.batch import GSO_UDP_L4, NEEDS_CSUM, Batch, make_batch
from dataplane.devices.device import DeviceError
from dataplane.devices.filter import prefix_filter
from dataplane.devices.memory import Vnet
from dataplane.devices.uplink import Uplink
from tests.spaces import (
    LAN_MAC,
    UP_MAC,
    Space,
    lan_of,
    opened_spaces,
    partial,
    read,
    send,
    wait,
)

pytestmark = pytest.mark.netns


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


LB = [IPv4Network("192.0.2.48/28")]


@pytest.fixture
def uplink(host: Space, lan: Space) -> Uplink:
    return host.open(lambda: Uplink("up0", prefix_filter(LB)))


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
    uplink.set_filter(prefix_filter([IPv4Network("192.0.2.1/32")]))
    sender.sendto(b"no", ("192.0.2.50", 53))
    sender.sendto(b"yes", ("192.0.2.1", 53))
    assert [bytes(Ether(frame)[UDP].payload) for frame in read(uplink, batch)] == [b"yes"]


def test_the_uplink_hears_arp_but_not_what_the_host_itself_sends(uplink, host, lan, batch):
    uplink.set_filter(prefix_filter([IPv4Network("0.0.0.0/0")]))
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
            Uplink("none0", prefix_filter(LB))

    host.run(attempt)
