import socket
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from dataplane.devices.filter import MAX_INSTRUCTIONS, NOTHING, FilterError, attach, prefix_filter

ETHER = Ether(src="02:00:00:00:00:09", dst="02:00:00:00:00:01")  # else scapy asks the network for them
PODS = IPv4Network("10.244.0.0/16")
PODS6 = IPv6Network("fd00:10:244::/48")


@pytest.fixture(scope="module")
def pair():
    """A filter runs on any socket; the kernel drops what it does not take without telling the sender."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def taken(pair, *frames: Packet | bytes) -> list[bool]:
    ours, theirs = pair
    result = []
    for frame in frames:
        theirs.send(bytes(frame))
        try:
            result.append(ours.recv(1 << 16) == bytes(frame))
        except BlockingIOError:
            result.append(False)
    return result


def to(address: str, size: int = 10) -> Packet:
    network = IPv6(src="fd00::9", dst=address) if ":" in address else IP(src="192.0.2.9", dst=address)
    return ETHER / network / UDP() / Raw(b"x" * size)


def test_arp_and_packets_to_the_prefixes_are_taken_whole(pair):
    attach(pair[0], prefix_filter([IPv4Network("198.51.100.7/32"), PODS, PODS6, IPv6Network("ff02::/16")]))
    assert all(taken(pair, ETHER / ARP(), to("10.244.0.1"), to("198.51.100.7"), to("10.244.255.255", 60000)))
    assert all(taken(pair, to("fd00:10:244::1"), to("fd00:10:244:ffff::1"), to("ff02::1:ff00:7")))


def test_everything_else_is_left_to_the_host(pair):
    attach(pair[0], prefix_filter([PODS, PODS6]))
    others = [to("10.243.255.255"), to("10.245.0.0"), to("192.0.2.1"), to("fd00:10:245::1"), to("ff02::1")]
    assert not any(taken(pair, *others, Ether(src=ETHER.src, dst=ETHER.dst, type=0x88CC) / Raw(b"lldp" * 20)))
    assert not any(
        taken(pair, ETHER / Dot1Q(vlan=5) / IP(dst="10.244.0.1"), b"", b"short", bytes(to("10.244.0.1"))[:33])
    )


def test_without_prefixes_only_arp_is_taken(pair):
    attach(pair[0], prefix_filter([]))
    assert taken(pair, ETHER / ARP(), to("10.244.0.1"), to("fd00::1")) == [True, False, False]


def test_the_prefix_of_length_zero_takes_every_packet_of_its_family(pair):
    attach(pair[0], prefix_filter([IPv4Network("0.0.0.0/0")]))
    assert taken(pair, to("203.0.113.9"), to("fd00::1")) == [True, False]
    attach(pair[0], prefix_filter([IPv6Network("::/0")]))
    assert taken(pair, to("203.0.113.9"), to("fd00::1")) == [False, True]


def test_a_filter_that_takes_nothing(pair):
    attach(pair[0], NOTHING)
    assert not any(taken(pair, ETHER / ARP(), to("10.244.0.1")))


def prefixes(bits: int) -> st.SearchStrategy[IPv4Network | IPv6Network]:
    def network(address: int, length: int) -> IPv4Network | IPv6Network:
        kept = address >> (bits - length) << (bits - length)
        return ip_network(((kept).to_bytes(bits // 8, "big"), length))

    return st.builds(network, st.integers(0, 2**bits - 1), st.integers(0, bits))


@settings(max_examples=60)
@given(st.lists(st.one_of(prefixes(32), prefixes(128)), max_size=40), st.data())
def test_the_filter_agrees_with_ipaddress(pair, networks, data):
    attach(pair[0], prefix_filter(networks))
    base = data.draw(st.sampled_from(networks)) if networks else PODS
    flip = data.draw(st.integers(0, base.max_prefixlen - 1))
    for value in (int(base.network_address), int(base.network_address) ^ 1 << flip, int(base.broadcast_address)):
        address = ip_address(value.to_bytes(base.max_prefixlen // 8, "big"))
        expected = any(address in each for each in networks if each.version == address.version)
        assert taken(pair, to(str(address))) == [expected]


def test_two_thousand_prefixes_fit_and_more_are_refused_before_any_effect(pair):
    networks = [IPv4Network((0x0A600000 + k, 32)) for k in range(2000)]
    attach(pair[0], prefix_filter(networks))
    assert taken(pair, to("10.96.7.207"), to("10.96.7.208")) == [True, False]
    with pytest.raises(FilterError, match="at most 4096") as caught:
        prefix_filter(networks * 2)
    assert caught.value.instructions > MAX_INSTRUCTIONS
