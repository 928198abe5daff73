"""Routing netlink, as much of it as a node needs: look at links, set one up, watch them change (rtnetlink(7)).

A request is one datagram: a header of 16 bytes, a fixed body, then attributes (length, kind, value, padding to 4). The
socket belongs to the network namespace it was opened in and keeps working on it from any thread, so a namespace is
entered once, to open the socket, and never again. pyroute2 speaks the same protocol, but importing it takes 110-160 ms
of a start of 800, and a socket in another namespace 7-9 ms per pod (measured on the machine of the benchmarks).

The codec (`pack`, `messages`, `events`) is sans-IO; `Netlink` and `Monitor` put a socket under it.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from types import TracebackType

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port id
ATTRIBUTE = struct.Struct("=HH")  # length, kind
IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, changed flags
IFADDR = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
RTMSG = struct.Struct("=8BI")  # family, dst length, src length, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=B3xiHBB")  # family, index, state, flags, type

NLMSG_ERROR, NLMSG_DONE = 2, 3
NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH = 28
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
CREATE, REPLACE, CREATE_NEW = 0x400, 0x400 | 0x100, 0x400 | 0x200  # NLM_F_CREATE, and with REPLACE or EXCL
CAPPED = 0x100  # NLM_F_CAPPED: the answer does not repeat the request

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU = 1, 3, 4
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD = 0x02
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS, RTA_TABLE = 1, 4, 5, 7, 8, 15
RTAX_MTU = 2
NDA_DST, NDA_LLADDR = 1, 2
NUD_PERMANENT = 0x80
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
SCOPE_GLOBAL, SCOPE_LINK = 0, 253
TABLE_MAIN, PROTOCOL_BOOT, UNICAST = 254, 3, 1
PROTOCOL_OURS = 80  # what Calico's agent has, of the numbers that nobody else uses
RTNH_F_ONLINK = 4

SOL_NETLINK, NETLINK_EXT_ACK, NETLINK_CAP_ACK = 270, 11, 10
ERROR_TEXT = 1  # NLMSGERR_ATTR_MSG: the kernel's own words about a refusal
ROUTED_FAMILIES = (bytes([socket.AF_INET]), bytes([socket.AF_INET6]))
RECEIVE_SIZE = 1 << 16
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP: links, IPv4 and IPv6 addresses and routes

Message = tuple[int, int, int, bytes]
"""Type, flags, sequence number and the bytes after the header."""


class NetlinkError(Exception):
    """The kernel refused a request.

    Attributes:
        operation: What was asked for, in words.
        errno: The kernel's error number.
        text: The kernel's explanation, empty when it gave none.
    """

    def __init__(self, operation: str, number: int, text: str = "") -> None:
        super().__init__(f"{operation}: {text or os.strerror(number)}")
        self.operation, self.errno, self.text = operation, number, text


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. ``up`` is the administrator's wish, ``carrier`` the cable; ``mtu`` in bytes, ``mac`` as an int."""

    index: int
    name: str
    mac: int
    mtu: int
    up: bool
    carrier: bool
    addresses: tuple[Interface, ...] = ()


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A link came, changed or (``gone``) went; its addresses are not part of the event."""

    link: Link
    gone: bool


@dataclass(frozen=True, slots=True)
class AddressEvent:
    """An address was given to, or taken (``gone``) from the link ``index``."""

    index: int
    address: Interface
    gone: bool


@dataclass(frozen=True, slots=True)
class RouteEvent:
    """A route came or went. ``gateway`` is None when the destination is on the link, ``index`` 0 when it has none."""

    destination: Network
    gateway: Address | None
    index: int
    table: int
    gone: bool


@dataclass(frozen=True, slots=True)
class Overrun:
    """The kernel dropped events, for want of a faster reader: whatever was cached has to be read again."""


@dataclass(frozen=True, slots=True)
class Detour:
    """An IPv4 route to a gateway that is on the link whatever its addresses are (``onlink``).

    ``source`` is the address that packets have by default, ``mtu`` 0 the link's.
    """

    destination: IPv4Network
    gateway: IPv4Address
    source: IPv4Address | None = None
    mtu: int = 0


Event = LinkEvent | AddressEvent | RouteEvent | Overrun


def pack(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded."""
    return ATTRIBUTE.pack(len(value) + ATTRIBUTE.size, kind) + value + bytes(-len(value) % 4)


def unpack(data: bytes) -> dict[int, bytes]:
    """Return the attributes of a message by kind; what does not fit any more is left out."""
    found: dict[int, bytes] = {}
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if not ATTRIBUTE.size <= length <= len(data) - at:
            break
        found[kind & 0x3FFF] = data[at + ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def messages(data: bytes) -> Iterator[Message]:
    """Yield the messages of one datagram; a truncated one ends it."""
    at = 0
    while at + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
        if not HEADER.size <= length <= len(data) - at:
            return
        yield kind, flags, sequence, data[at + HEADER.size : at + length]
        at += (length + 3) & ~3


def _address(value: bytes) -> Address:
    return IPv4Address(value) if len(value) == 4 else IPv6Address(value)


def _interface(value: bytes, length: int) -> Interface:
    return IPv4Interface((value, length)) if len(value) == 4 else IPv6Interface((value, length))


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = IFINFO.unpack_from(body)
    found = unpack(body[IFINFO.size :])
    return Link(
        index=index,
        name=found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="surrogateescape"),
        mac=int.from_bytes(found.get(IFLA_ADDRESS, b""), "big"),
        mtu=int.from_bytes(found.get(IFLA_MTU, b""), "little"),
        up=bool(flags & IFF_UP),
        carrier=bool(flags & IFF_LOWER_UP),
    )


def _link_address(body: bytes) -> tuple[int, Interface] | None:
    _, length, _, _, index = IFADDR.unpack_from(body)
    found = unpack(body[IFADDR.size :])
    value = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS)  # on a point-to-point link IFA_ADDRESS is the other end
    return (index, _interface(value, length)) if value else None


def _route(body: bytes, gone: bool) -> RouteEvent:
    family, length, _, _, table, _, _, _, _ = RTMSG.unpack_from(body)
    found = unpack(body[RTMSG.size :])
    destination = _interface(found.get(RTA_DST, bytes(4 if family == socket.AF_INET else 16)), length).network
    return RouteEvent(
        destination=destination,
        gateway=_address(found[RTA_GATEWAY]) if RTA_GATEWAY in found else None,
        index=int.from_bytes(found.get(RTA_OIF, b""), "little"),
        table=int.from_bytes(found[RTA_TABLE], "little") if RTA_TABLE in found else table,
        gone=gone,
    )


def events(data: bytes) -> list[Event]:
    """Return the events in one datagram of a monitor, in order; what is of no interest or no sense is left out."""
    found: list[Event] = []
    for kind, _, _, body in messages(data):
        try:
            event = _event(kind, body)
        except (ValueError, struct.error):
            continue
        if event is not None:
            found.append(event)
    return found


def _event(kind: int, body: bytes) -> Event | None:
    if kind in (NEWLINK, DELLINK):
        return LinkEvent(_link(body), gone=kind == DELLINK)
    if kind in (NEWADDR, DELADDR):
        pair = _link_address(body)
        return AddressEvent(*pair, gone=kind == DELADDR) if pair is not None else None
    if kind in (NEWROUTE, DELROUTE) and body[:1] in ROUTED_FAMILIES:  # not the multicast routers'
        return _route(body, gone=kind == DELROUTE)
    return None


class Netlink:
    """A socket for requests, in the network namespace of the thread that makes it. Close it, or use it in ``with``."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        for option in (NETLINK_EXT_ACK, NETLINK_CAP_ACK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._sequence = 0

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self._socket.close()

    def request(self, operation: str, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Send one request and return the bodies of its answers.

        Args:
            operation: What this is for, in words; the error repeats it.
            kind: ``NEWLINK`` and so on.
            flags: Besides ``REQUEST`` and, unless this is a dump, ``ACK``.
            body: The fixed part and the attributes.

        Raises:
            NetlinkError: The kernel refused.
        """
        self._sequence += 1
        flags |= REQUEST if flags & DUMP == DUMP else REQUEST | ACK
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
        answers: list[bytes] = []
        while True:
            for answer, its_flags, sequence, rest in messages(self._socket.recv(RECEIVE_SIZE)):
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_DONE:
                    return answers
                if answer != NLMSG_ERROR:
                    answers.append(rest)
                    continue
                number = -int.from_bytes(rest[:4], "little", signed=True)
                if number == 0:
                    return answers
                text = unpack(rest[4 + HEADER.size :]).get(ERROR_TEXT, b"") if its_flags & CAPPED else b""
                raise NetlinkError(operation, number, text.rstrip(b"\0").decode(errors="replace"))

    def links(self) -> list[Link]:
        """Return every link of the namespace with its addresses."""
        found = [_link(body) for body in self.request("list links", GETLINK, DUMP, IFINFO.pack(0, 0, 0, 0, 0))]
        return [replace(link, addresses=self._addresses(link.index)) for link in found]

    def link(self, interface: str | int) -> Link:
        """Return one link by name or index, with its addresses.

        Raises:
            NetlinkError: There is none (``ENODEV``).
        """
        index, name = (interface, "") if isinstance(interface, int) else (0, interface)
        body = IFINFO.pack(0, 0, index, 0, 0) + (pack(IFLA_IFNAME, name.encode() + b"\0") if name else b"")
        found = _link(self.request(f"find link {interface}", GETLINK, 0, body)[0])
        return replace(found, addresses=self._addresses(found.index))

    def exists(self, interface: str) -> bool:
        """Return whether a link has this name."""
        try:
            self.link(interface)
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return True

    def _addresses(self, index: int) -> tuple[Interface, ...]:
        bodies = self.request("list addresses", GETADDR, DUMP, IFADDR.pack(0, 0, 0, 0, 0))
        found = [pair for body in bodies if (pair := _link_address(body)) is not None]
        return tuple(address for its_index, address in found if its_index == index)

    def routes(self, index: int) -> list[RouteEvent]:
        """Return the IPv4 and IPv6 routes of the main table that lead over a link."""
        body = RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)
        found = [_route(each, gone=False) for each in self.request("list routes", GETROUTE, DUMP, body)
                 if each[:1] in ROUTED_FAMILIES]  # fmt: skip
        return [route for route in found if route.index == index and route.table == TABLE_MAIN]

    def set_link(
        self, index: int, *, up: bool | None = None, mac: int | None = None, mtu: int | None = None, name: str = ""
    ) -> None:
        """Change what is given of a link; one request, so all of it or nothing."""
        flags = 0 if up is None else IFF_UP * up
        body = IFINFO.pack(0, 0, index, flags, IFF_UP if up is not None else 0)
        body += pack(IFLA_IFNAME, name.encode() + b"\0") if name else b""
        body += pack(IFLA_ADDRESS, mac.to_bytes(6, "big")) if mac is not None else b""
        body += pack(IFLA_MTU, mtu.to_bytes(4, "little")) if mtu is not None else b""
        self.request(f"set up link {index}", NEWLINK, 0, body)

    def delete_link(self, index: int) -> None:
        """Remove a link."""
        self.request(f"delete link {index}", DELLINK, 0, IFINFO.pack(0, 0, index, 0, 0))

    def add_address(self, index: int, address: Interface) -> None:
        """Give a link an address; IPv6 without duplicate detection, since whoever owns the address is known."""
        family, value = (socket.AF_INET6 if address.version == 6 else socket.AF_INET), address.ip.packed
        body = IFADDR.pack(family, address.network.prefixlen, 0, SCOPE_GLOBAL, index)
        body += pack(IFA_LOCAL, value) + pack(IFA_ADDRESS, value)
        body += pack(IFA_FLAGS, IFA_F_NODAD.to_bytes(4, "little")) if address.version == 6 else b""
        self.request(f"add address {address}", NEWADDR, CREATE_NEW, body)

    def add_route(self, index: int, destination: Network, gateway: Address | None = None) -> None:
        """Add, or replace, a route over a link; without a gateway the destination is on the link itself."""
        family = socket.AF_INET6 if destination.version == 6 else socket.AF_INET
        scope = SCOPE_LINK if gateway is None and destination.version == 4 else SCOPE_GLOBAL
        body = RTMSG.pack(family, destination.prefixlen, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, scope, UNICAST, 0)
        body += pack(RTA_DST, destination.network_address.packed) if destination.prefixlen else b""
        body += pack(RTA_OIF, index.to_bytes(4, "little"))
        body += pack(RTA_GATEWAY, gateway.packed) if gateway is not None else b""
        self.request(f"add route {destination}", NEWROUTE, REPLACE, body)

    def delete_address(self, index: int, address: Interface) -> None:
        """Take an address from a link."""
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        body = IFADDR.pack(family, address.network.prefixlen, 0, SCOPE_GLOBAL, index)
        self.request(f"delete address {address}", DELADDR, 0, body + pack(IFA_LOCAL, address.ip.packed))

    def set_neighbor(self, index: int, address: Address, mac: int) -> None:
        """Say once and for all which MAC a neighbor has."""
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        body = NDMSG.pack(family, index, NUD_PERMANENT, 0, 0)
        body += pack(NDA_DST, address.packed) + pack(NDA_LLADDR, mac.to_bytes(6, "big"))
        self.request(f"set neighbor {address}", NEWNEIGH, REPLACE, body)

    def add_detour(self, index: int, detour: Detour) -> None:
        """Put a detour before whatever route to the same prefix there is: that one comes back when the link goes."""
        self.request(f"add route {detour.destination}", NEWROUTE, CREATE, _detour(index, detour))

    def delete_detour(self, index: int, detour: Detour) -> None:
        """Take a detour away."""
        self.request(f"delete route {detour.destination}", DELROUTE, 0, _detour(index, detour))


def _detour(index: int, detour: Detour) -> bytes:
    length = detour.destination.prefixlen
    body = RTMSG.pack(socket.AF_INET, length, 0, 0, TABLE_MAIN, PROTOCOL_OURS, SCOPE_GLOBAL, UNICAST, RTNH_F_ONLINK)
    body += pack(RTA_DST, detour.destination.network_address.packed) if length else b""
    body += pack(RTA_OIF, index.to_bytes(4, "little")) + pack(RTA_GATEWAY, detour.gateway.packed)
    body += pack(RTA_PREFSRC, detour.source.packed) if detour.source else b""
    return body + (pack(RTA_METRICS, pack(RTAX_MTU, detour.mtu.to_bytes(4, "little"))) if detour.mtu else b"")


class Monitor:
    """A socket that hears about links, addresses and routes of the namespace it is made in. It never blocks."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, GROUPS))
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        self._socket.close()

    def read(self) -> list[Event]:
        """Return the events of one datagram; none when nothing is waiting."""
        try:
            return events(self._socket.recv(RECEIVE_SIZE))
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return [Overrun()]
            raise


def link(interface: str | int) -> Link:
    """Return a link of the current namespace, for a caller with one question.

    Raises:
        NetlinkError: There is none (``ENODEV``).
    """
    with Netlink() as netlink:
        return netlink.link(interface)
