"""Addresses as text, as objects and as halves."""

import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.tables.address import halves, mac_text, parse_mac, prefix_halves, to_address, to_network


@given(st.ip_addresses())
def test_an_address_survives_the_way_through_its_halves(address):
    mapped = isinstance(address, IPv6Address) and address.ipv4_mapped
    assert to_address(*halves(address)) == (mapped or address)


@given(st.ip_addresses())
def test_text_and_object_give_the_same_halves(address):
    assert halves(str(address)) == halves(address)


def test_an_ipv4_address_is_v4_mapped():
    assert halves("192.0.2.1") == (0, 0xFFFF_C000_0201)
    assert halves("::ffff:192.0.2.1") == halves("192.0.2.1")


@pytest.mark.parametrize("text", ["10.244.0.0/16", "0.0.0.0/0", "192.0.2.1/32", "::/0", "2001:db8::/33", "::1/128"])
def test_a_prefix_survives_the_way_through_its_numbers(text):
    assert to_network(*prefix_halves(ip_network(text))) == ip_network(text)


def test_prefix_lengths_count_of_128():
    assert prefix_halves(IPv4Network("0.0.0.0/0")) == (0, 0xFFFF_0000_0000, 96)
    assert prefix_halves(IPv6Network("2001:db8::/32")) == (0x2001_0DB8_0000_0000, 0, 32)


@given(st.integers(0, (1 << 48) - 1))
def test_a_mac_survives_the_way_through_text(mac):
    assert parse_mac(mac_text(mac)) == mac


def test_a_mac_may_be_written_with_dashes_and_short_octets():
    assert parse_mac("EE-ee-1-ee-ee-EE") == 0xEEEE_01EE_EEEE


@pytest.mark.parametrize(
    "text", ["", "ee:ee:ee:ee:ee", "ee:ee:ee:ee:ee:ee:ee", "gg:ee:ee:ee:ee:ee", "ee:ee:ee:ee:ee:eee"]
)
def test_what_is_no_mac_is_refused(text):
    with pytest.raises(ValueError, match="is not a MAC address"):
        parse_mac(text)


def test_the_halves_in_a_record_are_understood():
    record = np.array([(0, 0xFFFF_C000_0201)], [("hi", "u8"), ("lo", "u8")])[0]
    assert to_address(record["hi"], record["lo"]) == IPv4Address("192.0.2.1")


def test_the_command_line_can_import_it_without_numba_and_numpy():
    code = "import sys, dataplane.tables.address; print(sorted({'numba', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
