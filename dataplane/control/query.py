"""What a listing is asked for: conntrack's filters, as words of a URL's query and as values.

The command line makes a ``Query`` from its options, the control API from the request; both ends share this module, so
it needs nothing but the standard library. Names follow ``conntrack(8)``: ``src``, ``dst``, ``sport`` and ``dport`` are
those of the original direction, what a client sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, TypeAlias

Network: TypeAlias = IPv4Network | IPv6Network

LIMIT = 1000  # rows of a listing unless asked otherwise; 0: all
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "icmpv6": 58, "sctp": 132}
STATES = (
    "NONE SYN_SENT SYN_RECV ESTABLISHED FIN_WAIT CLOSE_WAIT LAST_ACK TIME_WAIT CLOSE SYN_SENT2".split()  # noqa: SIM905
)
STATUSES = ("UNREPLIED", "ASSURED", "SEEN_REPLY", "SRC_NAT", "DST_NAT", "ANY_NAT", "BALANCED")


class QueryError(ValueError):
    """A filter that cannot be understood; the message names it."""


@dataclass(frozen=True, slots=True)
class Query:
    """Filters, all of which a row has to pass; None and "" pass everything.

    Attributes:
        protocol: IP protocol number.
        state: A member of ``STATES``: TCP's.
        status: A member of ``STATUSES``; BALANCED are the flows that ip_vs would list.
        service: ``namespace/name``.
        limit: Rows that are answered; the rest is counted. 0: all.
    """

    protocol: int | None = None
    src: Network | None = None
    dst: Network | None = None
    sport: int | None = None
    dport: int | None = None
    reply_src: Network | None = None
    reply_dst: Network | None = None
    reply_sport: int | None = None
    reply_dport: int | None = None
    state: str = ""
    status: str = ""
    service: str = ""
    limit: int = LIMIT

    @property
    def is_open(self) -> bool:
        """Whether every row passes."""
        return all(getattr(self, name) in (None, "") for name in _PARSERS if name != "limit")

    def words(self) -> dict[str, str]:
        """Return the filters that are set as ``parse`` reads them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) for name, value in found.items() if value not in (None, "")}


def parse(words: Mapping[str, str], kind: str = "conntrack") -> Query:
    """Return the query that these words make for a listing.

    Raises:
        QueryError: A name or a value is unknown, or the listing has no such column.
    """
    values: dict[str, Any] = {}
    for name, text in words.items():
        if name not in KEYS[kind]:
            raise QueryError(f"{name}: no filter of {kind}; expected one of {', '.join(sorted(KEYS[kind]))}")
        try:
            values[name] = _PARSERS[name](text)
        except ValueError as error:
            raise QueryError(f"{name}: {error} (got {text!r})") from None
    return Query(**values)


def _protocol(text: str) -> int:
    if text.lower() in PROTOCOLS:
        return PROTOCOLS[text.lower()]
    return _number(255, f"expected a number from 0 to 255 or one of {', '.join(PROTOCOLS)}")(text)


def _network(text: str) -> Network:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise ValueError("expected an address or a prefix such as 10.244.1.0/24") from None


def _number(most: int, expected: str) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) > most:
            raise ValueError(expected)
        return int(text)

    return number


def _choice(*choices: str) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text.upper() not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text.upper()

    return choice


def _service(text: str) -> str:
    """Return ``namespace/name``; a name alone is in the namespace "default"."""
    namespace, slash, name = text.rpartition("/")
    if not name or (slash and not namespace) or "/" in namespace:
        raise ValueError("expected NAME or NAMESPACE/NAME")
    return f"{namespace or 'default'}/{name}"


_port = _number(65535, "expected a port from 0 to 65535")
_PARSERS: dict[str, Callable[[str], Any]] = {
    "protocol": _protocol,
    "src": _network,
    "dst": _network,
    "sport": _port,
    "dport": _port,
    "reply_src": _network,
    "reply_dst": _network,
    "reply_sport": _port,
    "reply_dport": _port,
    "state": _choice(*STATES),
    "status": _choice(*STATUSES),
    "service": _service,
    "limit": _number(1 << 32, "expected a number; 0 is all"),
}

_OF_SERVICES = frozenset({"protocol", "dst", "dport", "service", "limit"})
KEYS: dict[str, frozenset[str]] = {
    "services": _OF_SERVICES,
    "endpoints": _OF_SERVICES,
    "persistence": _OF_SERVICES | {"src"},
    "conntrack": frozenset(_PARSERS),
    "nat": frozenset(_PARSERS),
}
"""The filters of each listing."""
