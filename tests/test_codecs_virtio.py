"""The virtio network header: host order, and offsets that stay inside the frame."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.codecs import virtio
from tests.strategies import bytes8, dirty, offsets, place, taken, words16


@given(bytes8, bytes8, words16, words16, words16, words16, offsets)
def test_a_written_header_reads_back(flags, kind, hdr_len, size, start, offset, at):
    data = dirty(at + virtio.HEADER)
    virtio.emit(data, at, flags, start, offset)
    assert taken(data, at) == struct.pack("=BBHHHH", flags, 0, 0, 0, start, offset)
    virtio.set_gso(data, at, kind, hdr_len, size)
    assert taken(data, at) == struct.pack("=BBHHHH", flags, kind, hdr_len, size, start, offset)
    assert (virtio.flags(data, at), virtio.gso_type(data, at)) == (flags, kind)
    assert (virtio.hdr_len(data, at), virtio.gso_size(data, at)) == (hdr_len, size)
    assert (virtio.csum_start(data, at), virtio.csum_offset(data, at)) == (start, offset)


ACCEPTANCE = [
    # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; frame; accepted
    ((0, 0, 0, 0, 0, 0), 60, True),
    ((0, 0, 999, 0, 999, 999), 60, True),  # nothing is used
    ((virtio.DATA_VALID, 0, 0, 0, 999, 999), 60, True),
    ((virtio.NEEDS_CSUM, 0, 0, 0, 34, 16), 54, True),
    ((virtio.NEEDS_CSUM, 0, 0, 0, 34, 16), 52, True),
    ((virtio.NEEDS_CSUM, 0, 0, 0, 34, 16), 51, False),
    ((virtio.NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF), 60, False),
    ((virtio.NEEDS_CSUM, virtio.GSO_TCPV4, 54, 1448, 34, 16), 9000, True),
    ((virtio.NEEDS_CSUM, virtio.GSO_TCPV4 | virtio.GSO_ECN, 54, 1448, 34, 16), 9000, True),
    ((virtio.NEEDS_CSUM, virtio.GSO_TCPV4, 54, 0, 34, 16), 9000, False),
    ((virtio.NEEDS_CSUM, virtio.GSO_TCPV4, 54, 1448, 34, 16), 53, False),
    ((virtio.NEEDS_CSUM, virtio.GSO_ECN, 54, 1448, 34, 16), 9000, False),
    ((0, virtio.GSO_UDP_L4, 42, 1400, 0, 0), 9000, True),
    ((0, virtio.GSO_UDP_L4, 42, 0, 0, 0), 9000, False),
]


@pytest.mark.parametrize(("fields", "frame", "accepted"), ACCEPTANCE)
def test_what_is_used_must_lie_inside_the_frame(fields, frame, accepted):
    data = place(struct.pack("=BBHHHH", *fields))
    assert virtio.valid(data, 0, frame) == accepted


@given(st.binary(min_size=10, max_size=10), st.integers(0, 70000))
def test_an_accepted_checksum_field_lies_inside_the_frame(header, frame):
    data = place(header, 2)
    if virtio.valid(data, 2, frame) and virtio.flags(data, 2) & virtio.NEEDS_CSUM:
        assert virtio.csum_start(data, 2) + virtio.csum_offset(data, 2) + 2 <= frame
