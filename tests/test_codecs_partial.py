import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Raw

from dataplane.codecs.partial import COMPLETE, UNFINISHED, partial_state

V4 = IP(src="10.244.0.7", dst="10.244.1.9")
V6 = IPv6(src="fd00::7", dst="fd00:1::9")


def state(packet: bytes, before: int = 6) -> int:
    data = np.full(before + len(packet) + 9, 0xA5, np.uint8)
    data[before : before + len(packet)] = np.frombuffer(packet, np.uint8)
    return partial_state(data, before, before + len(packet))


def field(packet: bytes) -> int:
    """Where the transport checksum is, for the headers used here."""
    l4 = 20 if packet[0] >> 4 == 4 else 40
    protocol = packet[9] if packet[0] >> 4 == 4 else packet[6]
    return l4 + (16 if protocol == 6 else 6)


def unfinished(packet: bytes) -> bytes:
    """Store the folded pseudo-header sum, as a sender with checksum offload does."""
    l4, addresses = (20, packet[12:20]) if packet[0] >> 4 == 4 else (40, packet[8:40])
    protocol = packet[9] if packet[0] >> 4 == 4 else packet[6]
    total = sum(int.from_bytes(addresses[i : i + 2], "big") for i in range(0, len(addresses), 2))
    total += protocol + len(packet) - l4
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    at = field(packet)
    return packet[:at] + total.to_bytes(2, "big") + packet[at + 2 :]


@pytest.mark.parametrize("network", [V4, V6], ids=["v4", "v6"])
@pytest.mark.parametrize("transport", [TCP(sport=4000, dport=80), UDP(sport=4000, dport=53)], ids=["tcp", "udp"])
@pytest.mark.parametrize("size", [0, 1, 1400, 60000])
def test_p1_only_the_folded_pseudo_header_sum_is_unfinished(network, transport, size):
    complete = bytes(network / transport / Raw(bytes(i * 7 & 0xFF for i in range(size))))
    assert state(complete) == COMPLETE
    assert state(unfinished(complete)) == UNFINISHED


@given(st.binary(max_size=80), st.integers(1, 0xFFFF))
def test_p1_a_payload_damaged_in_transit_is_not_called_unfinished(payload, damage):
    packet = bytearray(bytes(V4 / TCP(sport=4000, dport=80) / Raw(payload + b"xx")))
    packet[-2] ^= damage >> 8
    packet[-1] ^= damage & 0xFF
    assert (state(bytes(packet)) == UNFINISHED) == (bytes(packet) == unfinished(bytes(packet)))


def test_a_udp_datagram_without_checksum_is_complete():
    packet = bytearray(bytes(V4 / UDP(sport=4000, dport=53) / b"hello"))
    packet[26:28] = b"\0\0"
    assert state(bytes(packet)) == COMPLETE


def test_padding_behind_the_packet_does_not_count():
    assert state(unfinished(bytes(V4 / TCP())) + b"\x5a" * 6) == UNFINISHED
    assert state(unfinished(bytes(V6 / TCP())) + b"\x5a" * 6) == UNFINISHED


def test_extension_headers_are_skipped():
    plain = unfinished(bytes(V6 / UDP(sport=1, dport=2) / b"abc"))
    extended = bytearray(bytes(V6 / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2) / b"abc"))
    extended[48 + 6 : 48 + 8] = plain[46:48]
    assert state(bytes(extended)) == UNFINISHED


def test_fragments_and_other_protocols_are_complete():
    for flags, offset in (("MF", 0), (0, 8)):
        fragment = V4.copy()
        fragment.flags, fragment.frag = flags, offset
        assert state(unfinished(bytes(fragment / UDP() / b"hello"))) == COMPLETE
    assert state(bytes(V6 / IPv6ExtHdrFragment(m=1) / UDP() / b"hello")) == COMPLETE
    assert state(bytes(IP(src="10.244.0.7", dst="10.244.1.9", proto=132) / (b"x" * 20))) == COMPLETE


@given(st.binary(max_size=120))
def test_any_bytes_are_judged_without_reading_outside(packet):
    data = np.frombuffer(packet, np.uint8).copy()
    assert partial_state(data, 0, len(packet)) in (COMPLETE, UNFINISHED)


@given(st.integers(0, 70))
def test_a_truncated_packet_is_complete(cut):
    for whole in (unfinished(bytes(V4 / TCP() / b"hello")), unfinished(bytes(V6 / UDP() / b"hello"))):
        if cut < len(whole):
            assert state(whole[:cut]) == COMPLETE
