"""Names of addresses: ``1.2.0.192.in-addr.arpa`` (RFC 1035 3.5) and ``...ip6.arpa`` (RFC 3596 2.5)."""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from dataplane.control.dns_wire import to_wire
from dataplane.control.state import Address, Network


@dataclass(frozen=True, slots=True)
class Reverse:
    """A name below ``in-addr.arpa`` or ``ip6.arpa``, as far as it can be read from its end.

    Attributes:
        labels: Of the name.
        prefix: The addresses that it is about.
        address: If it is about one, exactly.
        is_above: It is about several: addresses' names are below it, and it has no records.
    """

    labels: tuple[str, ...]
    prefix: Network
    address: Address | None
    is_above: bool

    def apex(self, networks: Iterable[Network]) -> int:
        """Return the length, as bytes, of the name of the one of these networks that has all of the prefix; 0: none.

        A network that does not end between two labels counts as the smaller one that does.
        """
        bits = 8 if self.prefix.version == 4 else 4
        for network in networks:
            if _contains(network, self.prefix):
                kept = min(-(-network.prefixlen // bits), self.prefix.prefixlen // bits)
                return len(to_wire(self.labels[-kept - 2 :]))
        return 0


def read_reverse(labels: tuple[str, ...]) -> Reverse | None:
    """Return what such a name is about; None for a name that is not below either of the two."""
    if labels[-2:] == ("in-addr", "arpa"):
        return _read(labels, 4, 8)
    if labels[-2:] == ("ip6", "arpa"):
        return _read(labels, 32, 4)
    return None


def _read(labels: tuple[str, ...], most: int, bits: int) -> Reverse:
    units: list[int] = []
    for label in labels[-3::-1][:most]:
        unit = _octet(label) if bits == 8 else _nibble(label)
        if unit < 0:
            break
        units.append(unit)
    value = 0
    for unit in units:
        value = value << bits | unit
    value <<= bits * (most - len(units))
    length = bits * len(units)
    whole = len(units) == len(labels) - 2
    if bits == 8:
        found: Address = IPv4Address(value)
        prefix: Network = IPv4Network((value, length))
    else:
        found, prefix = IPv6Address(value), IPv6Network((value, length))
    complete = whole and len(units) == most
    return Reverse(labels, prefix, found if complete else None, is_above=whole and not complete)


def _octet(label: str) -> int:
    canonical = label.isascii() and label.isdecimal() and len(label) <= 3 and str(int(label)) == label
    return int(label) if canonical and int(label) < 256 else -1


def _nibble(label: str) -> int:
    return int(label, 16) if len(label) == 1 and label in "0123456789abcdef" else -1


def _contains(network: Network, prefix: Network) -> bool:
    if isinstance(network, IPv4Network):
        return isinstance(prefix, IPv4Network) and prefix.subnet_of(network)
    return isinstance(prefix, IPv6Network) and prefix.subnet_of(network)
