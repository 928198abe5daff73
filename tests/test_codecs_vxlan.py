"""VXLAN headers against scapy (dpkt has none), and the source ports that Linux picks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.vxlan import VXLAN

from dataplane.codecs import vxlan
from tests.strategies import dirty, garbage, offsets, place, taken

vnis = st.integers(0, 0xFF_FFFF)


@given(vnis, offsets)
def test_a_written_header_reads_back(vni, at):
    data = dirty(at + vxlan.HEADER)
    vxlan.emit(data, at, vni)
    assert vxlan.valid(data, at, len(data))
    assert vxlan.flags_ok(data, at)
    assert vxlan.reserved_ok(data, at)
    assert vxlan.vni(data, at) == vni


@given(vnis)
def test_scapy_writes_the_same_header(vni):
    data = dirty(vxlan.HEADER)
    vxlan.emit(data, 0, vni)
    assert taken(data) == bytes(VXLAN(flags="Instance", vni=vni))


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_is_a_flag_the_vni_or_reserved(bit):
    data = dirty(vxlan.HEADER)
    vxlan.emit(data, 0, 4096)
    data[bit // 8] ^= 0x80 >> bit % 8
    is_flag, is_vni = bit == 4, 32 <= bit < 56
    assert vxlan.flags_ok(data, 0) == (not is_flag)
    assert vxlan.reserved_ok(data, 0) == (is_flag or is_vni)
    assert (vxlan.vni(data, 0) == 4096) == (not is_vni)


@given(garbage, offsets)
def test_any_bytes_stay_inside(header, at):
    data = place(header, at)
    if vxlan.valid(data, at, len(data)):
        vxlan.flags_ok(data, at), vxlan.reserved_ok(data, at)
        assert vxlan.vni(data, at) == int.from_bytes(header[4:7], "big")
    else:
        assert len(header) < vxlan.HEADER


@given(st.integers(0, 2**63 - 1))
def test_the_source_port_is_the_scaled_hash(flow_hash):
    word = flow_hash % 2**32
    word = (word ^ (word << 16)) % 2**32
    assert vxlan.source_port(flow_hash, 32768, 60999) == 32768 + (word * (60999 - 32768) >> 32)


def test_hashes_spread_over_the_whole_range_and_never_reach_its_end():
    assert vxlan.source_port(0, 32768, 60999) == 32768
    assert vxlan.source_port(0xFFFF_0000, 32768, 60999) == 60998
    assert {vxlan.source_port(step << 27, 49152, 49160) for step in range(32)} == set(range(49152, 49160))
