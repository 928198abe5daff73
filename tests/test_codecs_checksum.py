"""The Internet checksum against the loop of RFC 1071, and updates against computing anew."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataplane.codecs import checksum
from tests.strategies import (
    dirty,
    halves,
    ipv4_addresses,
    ipv6_addresses,
    mapped,
    naive_checksum,
    naive_sum,
    place,
    pseudo_bytes,
    words16,
    words32,
)


def same(left: int, right: int) -> bool:
    """Whether two sums are the same in ones complement, where 0 and 0xffff are one number."""
    return left % 0xFFFF == right % 0xFFFF


@pytest.mark.parametrize("at", range(9))
def test_the_sum_is_that_of_rfc_1071_at_every_alignment_and_length(at):
    noise = np.random.default_rng(at).integers(0, 256, 80, np.uint8).tobytes()
    for length in range(70):
        data = place(noise[:length], at)
        assert checksum.fold(checksum.sum16(data, at, length, 0)) == naive_sum(noise[:length])


@pytest.mark.parametrize("length", [1500, 65535, 65536])
def test_the_largest_words_do_not_overflow(length):
    data = place(b"\xff" * length)
    assert checksum.fold(checksum.sum16(data, 0, length, (1 << 47) - 1)) == naive_sum(b"\xff" * length, 0x7FFF + 0xFFFF)


@given(st.lists(st.binary(max_size=20).filter(lambda piece: len(piece) % 2 == 0), max_size=4), st.binary(max_size=9))
def test_pieces_of_even_length_chain(pieces, last):
    total = 0
    for piece in [*pieces, last]:
        total = checksum.sum16(place(piece, 1), 1, len(piece), total)
    assert checksum.fold(total) == naive_sum(b"".join([*pieces, last]))


@given(st.binary(min_size=2, max_size=60), st.integers(0, 3))
def test_a_region_with_its_checksum_filled_in_checks_to_zero(region, at):
    region = region[: len(region) & ~1]
    data = place(b"\0\0" + region, at)
    value = checksum.checksum(data, at, len(data) - at, 0)
    assert value == naive_checksum(region)
    data[at : at + 2] = value >> 8, value & 0xFF
    assert checksum.checksum(data, at, len(data) - at, 0) == 0


@given(st.integers(0, 2**63 - 1))
@example(0)
@example(0xFFFF)
@example(2**63 - 1)
def test_folding_keeps_the_value_and_gives_zero_only_for_zero(total):
    folded = checksum.fold(total)
    assert 0 <= folded <= 0xFFFF
    assert same(folded, total)
    assert (folded == 0) == (total == 0)


def changed(words: bytes, place_of: int, new: bytes) -> bytes:
    return words[:place_of] + new + words[place_of + len(new) :]


@given(st.binary(min_size=20, max_size=20), st.integers(0, 9), words16)
@example(b"\0" * 18 + b"\0\1", 0, 0xFFFF)
@example(b"\xff" * 20, 3, 0)
def test_an_update_of_16_bits_equals_computing_anew(header, word, new):
    header = changed(header, 18, b"\0\1")  # a header is never all zeros
    word = min(word, 8)
    old = int.from_bytes(header[2 * word : 2 * word + 2], "big")
    expected = naive_checksum(changed(header, 2 * word, new.to_bytes(2, "big")))
    assert checksum.update16(naive_checksum(header), old, new) == expected


@given(st.binary(min_size=20, max_size=20), st.integers(0, 7), words32)
@example(b"\xff" * 20, 0, 0)
@example(b"\0" * 20, 0, 0xFFFF_FFFF)
def test_an_update_of_32_bits_equals_computing_anew(header, word, new):
    header = changed(header, 18, b"\0\1")
    old = int.from_bytes(header[2 * word : 2 * word + 4], "big")
    expected = naive_checksum(changed(header, 2 * word, new.to_bytes(4, "big")))
    assert checksum.update32(naive_checksum(header), old, new) == expected


@given(ipv6_addresses(), ipv6_addresses(), st.binary(min_size=1, max_size=30))
def test_an_update_of_an_ipv6_address_equals_computing_anew(old, new, rest):
    before, after = (naive_checksum(address.to_bytes(16, "big") + b"\0\6" + rest) for address in (old, new))
    assert checksum.update128(before, *halves(old), *halves(new)) == after


@given(ipv4_addresses(), ipv4_addresses(), st.binary(min_size=1, max_size=30))
def test_an_update_of_a_mapped_ipv4_address_equals_computing_anew(old, new, rest):
    before, after = (naive_checksum(address.to_bytes(4, "big") + b"\0\6" + rest) for address in (old, new))
    assert checksum.update128(before, *halves(mapped(old)), *halves(mapped(new))) == after


@given(ipv4_addresses(), ipv4_addresses(), st.sampled_from([6, 17]), words16)
def test_the_ipv4_pseudo_header_is_that_of_mapped_addresses(source, destination, protocol, length):
    total = checksum.pseudo_header(*halves(mapped(source)), *halves(mapped(destination)), protocol, length)
    assert checksum.fold(total) == naive_sum(pseudo_bytes(source, destination, protocol, length))


@given(ipv6_addresses(), ipv6_addresses(), st.sampled_from([6, 17, 58]), words16)
def test_the_ipv6_pseudo_header_sums_whole_addresses(source, destination, protocol, length):
    total = checksum.pseudo_header(*halves(source), *halves(destination), protocol, length)
    assert checksum.fold(total) == naive_sum(pseudo_bytes(source, destination, protocol, length))


def test_udp_sends_a_computed_zero_as_all_ones():
    assert [checksum.udp_wire(value) for value in (0, 1, 0xFFFF)] == [0xFFFF, 1, 0xFFFF]


@settings(max_examples=20)
@given(st.integers(0, 40))
def test_summing_reads_only(length):
    data = dirty(length)
    checksum.sum16(data, 0, length, 0)
    assert (data == dirty(length)).all()
