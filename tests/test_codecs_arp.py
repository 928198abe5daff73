"""ARP against dpkt and scapy, and the kernel's rules of acceptance (B1)."""

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.l2 import ARP

from dataplane.codecs import arp
from dataplane.jit import Array
from tests.strategies import dirty, garbage, ipv4_addresses, macs, offsets, place, taken

operations = st.sampled_from([arp.REQUEST, arp.REPLY])
packets = st.tuples(operations, macs, ipv4_addresses(), macs, ipv4_addresses())


def fields(data: Array, at: int) -> tuple[int, int, int, int, int]:
    return (
        arp.operation(data, at),
        arp.sender_mac(data, at),
        arp.sender_ip(data, at),
        arp.target_mac(data, at),
        arp.target_ip(data, at),
    )


@given(packets, offsets)
def test_a_written_packet_reads_back(packet, at):
    data = dirty(at + arp.HEADER)
    arp.emit(data, at, *packet)
    assert arp.valid(data, at, len(data))
    assert fields(data, at) == packet


@given(packets)
def test_dpkt_and_scapy_write_the_same_packet(packet):
    operation, sender_mac, sender_ip, target_mac, target_ip = packet
    data = dirty(arp.HEADER)
    arp.emit(data, 0, *packet)
    addresses = {"sha": sender_mac.to_bytes(6, "big"), "spa": sender_ip.to_bytes(4, "big")}
    addresses |= {"tha": target_mac.to_bytes(6, "big"), "tpa": target_ip.to_bytes(4, "big")}
    assert taken(data) == bytes(dpkt.arp.ARP(op=operation, **addresses))
    seen = ARP(taken(data))
    assert (seen.hwtype, seen.ptype, seen.hwlen, seen.plen, seen.op) == (1, 0x0800, 6, 4, operation)
    assert int(seen.hwsrc.replace(":", ""), 16) == sender_mac
    assert seen.pdst == ".".join(str(byte) for byte in target_ip.to_bytes(4, "big"))


ACCEPTANCE = """
# hardware  protocol  lengths  operation  accepted
  0001      0800      0604     0001       yes
  0001      0800      0604     0002       yes
  0006      0800      0604     0001       yes
  0006      0800      0604     0002       yes
  0000      0800      0604     0001       no
  0002      0800      0604     0001       no
  0001      86dd      0604     0001       no
  0001      0800      0804     0001       no
  0001      0800      0610     0001       no
  0001      0800      0604     0000       no
  0001      0800      0604     0003       no
  0001      0800      0604     0008       no
  0001      0800      0604     0101       no
"""


@pytest.mark.parametrize("row", [row.split() for row in ACCEPTANCE.splitlines() if row[:1] == " "], ids="-".join)
def test_only_ethernet_ipv4_requests_and_replies_are_accepted(row):
    *words, accepted = row
    data = place(bytes.fromhex("".join(words)) + bytes(20))
    assert arp.valid(data, 0, len(data)) == (accepted == "yes")


def test_a_packet_cut_anywhere_is_not_valid():
    packet = bytes.fromhex("0001080006040001") + bytes(20)
    assert not any(arp.valid(place(packet[:length]), 0, length) for length in range(len(packet)))


@given(garbage, offsets)
def test_any_bytes_stay_inside(packet, at):
    data = place(packet, at)
    if arp.valid(data, at, len(data)):
        fields(data, at)
