"""Addresses at the edges: text and ``ipaddress`` objects to the numbers that tables and records hold, and back.

Inside, an address is two unsigned 64-bit halves, IPv4 as ::ffff:a.b.c.d (RFC 4291 2.5.5.2). This module imports neither
numba nor numpy: the command line uses it and must start in 0.1 s.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

V4_MAPPED = 0xFFFF  # the upper 32 bits of the low half of an IPv4 address; the high half is 0
V4_BITS = 96  # what mapping adds to the length of an IPv4 prefix
_LOW32 = 0xFFFF_FFFF
_LOW64 = 0xFFFF_FFFF_FFFF_FFFF


def halves(address: Address | str) -> tuple[int, int]:
    """Return ``(hi, lo)`` of an address; IPv4 becomes v4-mapped.

    Raises:
        ValueError: The text is no address.
    """
    parsed = ip_address(address) if isinstance(address, str) else address
    if isinstance(parsed, IPv4Address):
        return 0, V4_MAPPED << 32 | int(parsed)
    return int(parsed) >> 64, int(parsed) & _LOW64


def to_address(hi: int, lo: int) -> Address:
    """Return the address whose halves are given; a v4-mapped one as IPv4."""
    hi, lo = int(hi), int(lo)
    if hi == 0 and lo >> 32 == V4_MAPPED:
        return IPv4Address(lo & _LOW32)
    return IPv6Address(hi << 64 | lo)


def prefix_halves(prefix: Network) -> tuple[int, int, int]:
    """Return ``(hi, lo, length)`` of a prefix; the length counts of 128, so an IPv4 default route is 96 bits long."""
    hi, lo = halves(prefix.network_address)
    return hi, lo, prefix.prefixlen + (V4_BITS if prefix.version == 4 else 0)


def to_network(hi: int, lo: int, length: int) -> Network:
    """Return the prefix that ``prefix_halves`` turned into numbers."""
    address = to_address(hi, lo)
    if isinstance(address, IPv4Address) and length >= V4_BITS:
        return IPv4Network((address, length - V4_BITS))
    return IPv6Network((int(hi) << 64 | int(lo), length))


def mac_text(mac: int) -> str:
    """Return ``ee:ee:ee:ee:ee:ee`` for a 48-bit number."""
    return int(mac).to_bytes(6, "big").hex(":")


def parse_mac(text: str) -> int:
    """Return the number of a MAC address written with colons or dashes.

    Raises:
        ValueError: The text is no MAC address.
    """
    octets = text.replace("-", ":").split(":")
    if len(octets) != 6 or not all(1 <= len(octet) <= 2 for octet in octets):
        raise ValueError(f"{text!r} is not a MAC address; expected six octets such as ee:ee:ee:ee:ee:ee")
    try:
        return int.from_bytes(bytes(int(octet, 16) for octet in octets), "big")
    except ValueError:
        raise ValueError(f"{text!r} is not a MAC address; expected six octets such as ee:ee:ee:ee:ee:ee") from None
