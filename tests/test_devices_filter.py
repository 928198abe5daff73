import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
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


# --- an address that the host has, too -------------------------------------------------------------------------------

NODE, SECOND = IPv4Address("192.0.2.11"), IPv4Address("192.0.2.12")
PORTS = [(30000, 32767), (61000, 65535)]
BORDERS = [1, 29999, 30000, 32767, 32768, 60999, 61000, 65535]


def at_the_node(layer: Packet, address: IPv4Address = NODE, **header) -> Packet:
    return ETHER / IP(src="198.51.100.9", dst=str(address), **header) / layer


@pytest.fixture
def shared(pair):
    attach(pair[0], prefix_filter([PODS], [NODE, SECOND], PORTS))
    return pair


@pytest.mark.parametrize("options", [[], [IPOption_Router_Alert()]], ids=["plain", "options"])
@pytest.mark.parametrize("address", [NODE, SECOND])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_of_a_shared_address_only_our_ports_are_taken(shared, protocol, address, options):
    frames = [at_the_node(protocol(sport=30001, dport=port), address, options=options) for port in BORDERS]
    assert taken(shared, *frames) == [any(first <= port <= last for first, last in PORTS) for port in BORDERS]


def test_of_a_shared_address_echo_requests_are_the_hosts_and_other_icmp_is_for_both(shared):
    kinds = [0, 3, 4, 5, 8, 11, 12]
    assert taken(shared, *(at_the_node(ICMP(type=kind)) for kind in kinds)) == [kind != 8 for kind in kinds]


def test_later_fragments_to_a_shared_address_are_taken_since_their_ports_are_not_known(shared):
    # The words where ports and type would be are those of a packet that is left to the host.
    assert (
        taken(shared, at_the_node(UDP(dport=53), frag=185), at_the_node(ICMP(type=8), frag=1, flags="MF")) == [True] * 2
    )
    assert taken(shared, at_the_node(UDP(dport=53), flags="MF"), at_the_node(UDP(dport=30000), flags="MF")) == [
        False,
        True,
    ]


def test_of_a_shared_address_no_other_protocol_is_taken(shared):
    assert not any(taken(shared, *(at_the_node(Raw(b"\x75\x30" * 20), proto=number) for number in (2, 4, 47, 50, 132))))


def test_a_shared_address_inside_a_prefix_is_still_shared(pair):
    attach(pair[0], prefix_filter([IPv4Network("192.0.2.0/24")], [NODE], PORTS))
    assert taken(pair, at_the_node(UDP(dport=53)), at_the_node(UDP(dport=30000)), to("192.0.2.12")) == [
        False,
        True,
        True,
    ]


def test_a_shared_address_changes_nothing_for_others(shared):
    assert taken(shared, ETHER / ARP(), to("10.244.0.1"), to("192.0.2.13"), to("fd00::1")) == [True, True, False, False]


def test_a_truncated_packet_to_a_shared_address_is_left(shared):
    whole = bytes(at_the_node(UDP(dport=30000)))
    assert taken(shared, *(whole[:length] for length in (14, 20, 24, 34, 37, 38))) == [False] * 5 + [True]


@settings(max_examples=60)
@given(
    st.lists(st.ip_addresses(v=4), max_size=200, unique=True),
    st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(sorted).map(tuple), max_size=4),
    st.data(),
)
def test_the_filter_of_shared_addresses_agrees_with_its_description(pair, addresses, ports, data):
    attach(pair[0], prefix_filter([PODS], addresses, ports))
    address = data.draw(st.sampled_from([*addresses, IPv4Address("10.244.3.3")]))
    port = data.draw(st.sampled_from([1, 65535, *(edge for pair_of in ports for edge in pair_of)]))
    expected = any(first <= port <= last for first, last in ports) if address in addresses else address in PODS
    assert taken(pair, at_the_node(UDP(dport=port), address)) == [expected]


# --- limits ----------------------------------------------------------------------------------------------------------


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
