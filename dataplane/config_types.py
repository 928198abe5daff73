"""The types of configuration values: how each is written, and what to say when it is not.

A type is ``Annotated[python type, expect(...)]``. The validator replaces pydantic's own: one parser and one phrase for
what is expected, so that every error reads "expected an IP prefix such as 10.244.1.0/24 (got ...)". Units are those of
Kubernetes and of ``tc``: durations ``5s``, ``15m``, ``24h``; sizes ``100M``, ``64K`` (powers of 1000).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Annotated, Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from dataplane.control.state import Address, Network

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_PREFIX = re.compile(r"[^\s/:]{1,4}")
_NETNS = re.compile(r"/[^\0]+|[^\s/]{1,255}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SIZE = re.compile(r"(\d+)([KMGT]?)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST = 2**31 - 1  # seconds: what the kernel takes; as nanoseconds it fits a table's field
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")  # IANA_SVC_NAME, RFC 6335 5.1
_LISTEN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Expect:
    """A validator that knows how to say what it wants. ``parse`` raises ValueError for what it does not take."""

    expected: str
    parse: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        """Return the parsed value or raise pydantic's error with our phrase."""
        try:
            return self.parse(value)
        except (ValueError, TypeError):
            raise PydanticCustomError("expected", "{expected}", {"expected": self.expected}) from None


def text(expected: str, parse: Callable[[str], Any]) -> PlainValidator:
    """Validate a string with ``parse``."""

    def parse_text(value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError
        return parse(value)

    return PlainValidator(Expect(expected, parse_text))


def number(low: int, high: int, note: str = "") -> PlainValidator:
    """Validate an integer from ``low`` to ``high``; true and false are no numbers."""

    def parse_number(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return PlainValidator(Expect(f"a number from {low} to {high}{note}", parse_number))


def _matching(pattern: re.Pattern[str]) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError
        return value

    return parse


def _mac(value: str) -> int:
    if not _MAC.fullmatch(value):
        raise ValueError
    mac = int(value.replace(":", ""), 16)
    if mac == 0 or mac >> 40 & 1:
        raise ValueError
    return mac


def _duration(value: str) -> float:
    match = _DURATION.fullmatch(value)
    seconds = float(match[1]) * _SECONDS[match[2]] if match else -1.0
    if not 0 <= seconds <= _LONGEST:
        raise ValueError
    return seconds


def _size(value: str) -> int:
    match = _SIZE.fullmatch(value)
    if not match:
        raise ValueError
    return int(match[1]) * _FACTORS[match[2]]


def _listen(value: str) -> tuple[str, int] | None:
    if not value:
        return None
    match = _LISTEN.fullmatch(value)
    if not match or not 0 < int(match[2]) < 65536:
        raise ValueError
    host = match[1].strip("[]")
    return ("" if host == "*" else host), int(match[2])


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError
    if parts.port == 0:
        raise ValueError
    return value.rstrip("/")


def _host_port(value: str) -> tuple[Address, int]:
    """An address alone, or with a port; one of IPv6 with a port has brackets. Without a port it is DNS's."""
    match = _LISTEN.fullmatch(value)
    if not match or (value.count(":") > 1 and not value.startswith("[")):
        return ip_address(value), 53
    if not 0 < int(match[2]) < 65536:
        raise ValueError
    return ip_address(match[1].strip("[]")), int(match[2])


def _netns(value: str) -> str:
    """A path into the folder of ``ip netns`` is the name, so that one namespace has one spelling."""
    for folder in ("/var/run/netns/", "/run/netns/"):
        value = value.removeprefix(folder)
    return _matching(_NETNS)(value)


def _path(value: str) -> str:
    if not value.startswith("/") or "\0" in value:
        raise ValueError
    return value


def _socket(value: str) -> str:
    if len(_path(value).encode()) > 107:  # sockaddr_un.sun_path, with its final 0
        raise ValueError
    return value


def _address_range(value: str) -> tuple[Address, Address]:
    if "-" not in value:
        network = ip_network(value)
        return network[0], network[-1]
    first, last = (ip_address(part.strip()) for part in value.split("-", 1))
    if first.version != last.version or int(first) > int(last):
        raise ValueError
    return first, last


def _port_range(value: str) -> tuple[int, int]:
    low, high = (int(part) for part in value.split("-"))
    if not 0 < low <= high < 65536:
        raise ValueError
    return low, high


def _optional_port_range(value: str) -> tuple[int, int] | None:
    return _port_range(value) if value else None


def _cluster_ip(value: str) -> Address | None:
    return None if value == "None" else ip_address(value)


def _target_port(value: Any) -> int | str:
    if isinstance(value, str):
        return _matching(_PORT_NAME)(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 65536:
        raise ValueError
    return value


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda value: parse(value) if value else value


_DURATION_TEXT = 'a duration such as "5s", "15m" or "24h"'

IP: TypeAlias = Annotated[Address, text("an IP address such as 192.0.2.11", ip_address)]
Prefix: TypeAlias = Annotated[Network, text("an IP prefix without host bits, such as 10.244.1.0/24", ip_network)]
AddressRange: TypeAlias = Annotated[
    tuple[Address, Address], text("a prefix or a range such as 192.0.2.200-192.0.2.220", _address_range)
]
Mac: TypeAlias = Annotated[int, text("a unicast MAC address such as 02:00:0a:f4:01:0a", _mac)]
Name: TypeAlias = Annotated[str, text('a Kubernetes name (lower-case letters, digits, "-" and ".")', _matching(_NAME))]
OptionalName: TypeAlias = Annotated[
    str, text('a Kubernetes name (lower-case letters, digits, "-" and "."), or ""', _optional(_matching(_NAME)))
]
Interface: TypeAlias = Annotated[str, text("an interface name of 1 to 15 characters", _matching(_INTERFACE))]
OptionalInterface: TypeAlias = Annotated[
    str, text('an interface name of 1 to 15 characters, or ""', _optional(_matching(_INTERFACE)))
]
InterfacePrefix: TypeAlias = Annotated[str, text("1 to 4 characters (11 follow, the limit is 15)", _matching(_PREFIX))]
Netns: TypeAlias = Annotated[str, text('a namespace: a name as of "ip netns", or an absolute path', _netns)]
OptionalNetns: TypeAlias = Annotated[
    str, text('a namespace: a name as of "ip netns", an absolute path, or ""', _optional(_netns))
]
Path: TypeAlias = Annotated[str, text('an absolute path, or ""', _optional(_path))]
Socket: TypeAlias = Annotated[str, text("an absolute path of at most 107 bytes", _socket)]
Listen: TypeAlias = Annotated[tuple[str, int] | None, text('"address:port", or "" for off', _listen)]
Url: TypeAlias = Annotated[str, text('a URL such as "http://127.0.0.1:2379"', _url)]
HostPort: TypeAlias = Annotated[
    tuple[Address, int], text('an IP address, or one with a port such as "192.0.2.53:5353"', _host_port)
]
Duration: TypeAlias = Annotated[float, text(_DURATION_TEXT, _duration)]
Size: TypeAlias = Annotated[int, text('a size such as "64K" or "100M"', _size)]
Port: TypeAlias = Annotated[int, number(1, 65535)]
PortRange: TypeAlias = Annotated[tuple[int, int], text('ports such as "30000-32767"', _port_range)]
OptionalPortRange: TypeAlias = Annotated[
    tuple[int, int] | None, text('ports such as "1024-65535", or ""', _optional_port_range)
]
ClusterIP: TypeAlias = Annotated[Address | None, text('an IP address such as 10.96.0.10, or "None"', _cluster_ip)]
TargetPort: TypeAlias = Annotated[
    int | str, PlainValidator(Expect("a number from 1 to 65535, or the name of an endpoint's port", _target_port))
]
