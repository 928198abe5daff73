"""Capture files: a pcapng writer, and a reader of pcapng and classic pcap (draft-ietf-opsawg-pcapng, -pcap).

Plain Python, sans-IO: the writer's functions return the bytes of one block, the reader takes the bytes of a file (for a
large one: a memoryview of its ``mmap``) and yields its packets. Times are nanoseconds since the epoch in both.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

Buffer: TypeAlias = "bytes | bytearray | memoryview"

LINKTYPE_ETHERNET = 1

SECTION_HEADER = 0x0A0D0D0A
INTERFACE_DESCRIPTION = 1
SIMPLE_PACKET = 3
ENHANCED_PACKET = 6
BYTE_ORDER_MAGIC = 0x1A2B3C4D
MICROSECOND_MAGIC = 0xA1B2C3D4  # classic pcap
NANOSECOND_MAGIC = 0xA1B23C4D

OPT_END = 0
OPT_COMMENT = 1
OPT_IF_NAME = 2
OPT_IF_TSRESOL = 9
OPT_IF_TSOFFSET = 14

MAX_BLOCK = 16 << 20  # bytes; a larger length is taken for damage, as Wireshark does


class PcapError(Exception):
    """A capture file that is damaged or of no known kind.

    Attributes:
        offset: Where in the file the fault was found, in bytes.
        problem: What is wrong there.
    """

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(f"offset {offset}: {problem}")
        self.offset = offset
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Capture:
    """One captured packet.

    Attributes:
        time_ns: When, in nanoseconds since the epoch.
        interface: Number of the interface description in its section; 0 in classic files.
        linktype: 1 is Ethernet.
        data: The bytes that were kept.
        length: Bytes that were on the wire, at least ``len(data)`` in a sound file.
        comment: The packet's comments, one per line.
    """

    time_ns: int
    interface: int
    linktype: int
    data: bytes
    length: int
    comment: str = ""


# --- writer ----------------------------------------------------------------------------------------------------------


def _block(kind: int, body: bytes) -> bytes:
    total = len(body) + 12
    return struct.pack("<II", kind, total) + body + struct.pack("<I", total)


def _padded(value: bytes) -> bytes:
    return value + bytes(-len(value) % 4)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _padded(value)


def section_header() -> bytes:
    """Return the block that opens a file: little-endian, version 1.0, section of unknown length."""
    return _block(SECTION_HEADER, struct.pack("<IHHq", BYTE_ORDER_MAGIC, 1, 0, -1))


def interface_description(name: str, linktype: int = LINKTYPE_ETHERNET, snaplen: int = 0) -> bytes:
    """Return the block that describes the next interface; times of its packets are in nanoseconds.

    Interfaces are numbered from 0 in the order of these blocks. ``snaplen`` 0 means that packets are kept whole.
    """
    options = _option(OPT_IF_NAME, name.encode()) + _option(OPT_IF_TSRESOL, b"\x09") + _option(OPT_END, b"")
    return _block(INTERFACE_DESCRIPTION, struct.pack("<HHI", linktype, 0, snaplen) + options)


def enhanced_packet(interface: int, time_ns: int, data: Buffer, comment: str = "", length: int | None = None) -> bytes:
    """Return the block of one packet.

    Args:
        interface: Number of its interface description.
        time_ns: Nanoseconds since the epoch.
        data: The bytes that are kept.
        comment: What Wireshark shows as the packet's comment; cut at 65535 bytes of UTF-8.
        length: Bytes on the wire when ``data`` was cut, else None.
    """
    wire = len(data) if length is None else length
    header = struct.pack("<IIIII", interface, time_ns >> 32 & 0xFFFF_FFFF, time_ns & 0xFFFF_FFFF, len(data), wire)
    options = b""
    if comment:
        text = comment.encode()[:0xFFFF].decode(errors="ignore").encode()  # never half a character
        options = _option(OPT_COMMENT, text) + _option(OPT_END, b"")
    return _block(ENHANCED_PACKET, header + _padded(bytes(data)) + options)


# --- reader ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Interface:
    """What packets need of their interface description: a time unit is ``1 / per_second`` seconds."""

    linktype: int
    snaplen: int
    per_second: int = 1_000_000
    offset_ns: int = 0


@dataclass(slots=True)
class _Section:
    """The section being read; ``order`` is struct's sign for its byte order."""

    order: str
    interfaces: list[_Interface] = field(default_factory=list)


def read(data: Buffer) -> Iterator[Capture]:
    """Yield the packets of a pcapng or classic pcap file, in file order.

    Blocks and options of unknown kind are passed over, as the format asks.

    Raises:
        PcapError: At the first fault; the packets before it have been yielded.
    """
    view = memoryview(data)
    if len(view) < 4:
        raise PcapError(0, "shorter than any capture file")
    if struct.unpack_from("<I", view)[0] == SECTION_HEADER:
        yield from _read_blocks(view)
        return
    for order in "<>":
        magic = struct.unpack_from(order + "I", view)[0]
        if magic in (MICROSECOND_MAGIC, NANOSECOND_MAGIC):
            yield from _read_classic(view, order, 1000 if magic == MICROSECOND_MAGIC else 1)
            return
    raise PcapError(0, f"neither pcapng nor pcap: magic {bytes(view[:4]).hex()}")


def _read_classic(view: memoryview, order: str, unit_ns: int) -> Iterator[Capture]:
    if len(view) < 24:
        raise PcapError(0, f"file header of 24 bytes cut to {len(view)}")
    major, minor = struct.unpack_from(order + "HH", view, 4)
    if (major, minor) != (2, 4):
        raise PcapError(4, f"version {major}.{minor}, expected 2.4")
    linktype = struct.unpack_from(order + "I", view, 20)[0] & 0xFFFF  # the upper half tells about frame check sequences
    at = 24
    while at < len(view):
        if at + 16 > len(view):
            raise PcapError(at, "packet header cut off")
        seconds, fraction, kept, length = struct.unpack_from(order + "IIII", view, at)
        if kept > MAX_BLOCK:
            raise PcapError(at + 8, f"packet of {kept} bytes")
        if at + 16 + kept > len(view):
            raise PcapError(at + 8, f"packet of {kept} bytes cut to {len(view) - at - 16}")
        packet = bytes(view[at + 16 : at + 16 + kept])
        yield Capture(seconds * 1_000_000_000 + fraction * unit_ns, 0, linktype, packet, length)
        at += 16 + kept


def _read_blocks(view: memoryview) -> Iterator[Capture]:
    section = _Section("<")
    at = 0
    while at < len(view):
        if at + 12 > len(view):
            raise PcapError(at, "block header cut off")
        if struct.unpack_from("<I", view, at)[0] == SECTION_HEADER:  # a palindrome: readable in either byte order
            section = _Section(_byte_order(view, at))
        kind, total = struct.unpack_from(section.order + "II", view, at)
        body = _body(view, at, total, section.order)
        if kind == SECTION_HEADER:
            _check_section(body, at, section.order)
        elif kind == INTERFACE_DESCRIPTION:
            section.interfaces.append(_interface(body, at + 8, section.order))
        elif kind == ENHANCED_PACKET:
            yield _enhanced(body, at + 8, section)
        elif kind == SIMPLE_PACKET:
            yield _simple(body, at + 8, section)
        at += total


def _byte_order(view: memoryview, at: int) -> str:
    for order in "<>":
        if struct.unpack_from(order + "I", view, at + 8)[0] == BYTE_ORDER_MAGIC:
            return order
    raise PcapError(at + 8, f"byte-order magic {bytes(view[at + 8 : at + 12]).hex()}")


def _body(view: memoryview, at: int, total: int, order: str) -> memoryview:
    """Return what stands between a block's two lengths, which must agree."""
    if total < 12 or total % 4 or total > MAX_BLOCK:
        raise PcapError(at + 4, f"block length {total}")
    if at + total > len(view):
        raise PcapError(at + 4, f"block of {total} bytes cut to {len(view) - at}")
    again = struct.unpack_from(order + "I", view, at + total - 4)[0]
    if again != total:
        raise PcapError(at + total - 4, f"block length {total} is repeated as {again}")
    return view[at + 8 : at + total - 4]


def _check_section(body: memoryview, at: int, order: str) -> None:
    if len(body) < 16:
        raise PcapError(at + 4, "section header is too short")
    major = struct.unpack_from(order + "H", body, 4)[0]
    if major != 1:
        raise PcapError(at + 12, f"pcapng version {major}, expected 1")


def _options(body: memoryview, start: int, at: int, order: str) -> Iterator[tuple[int, bytes, int]]:
    """Yield code, value and file offset of each option in ``body[start:]``; ``at`` is the body's place in the file.

    Blocks, ``start`` and padded options are whole 32-bit words, so there is always room for an option's header.
    """
    while start < len(body):
        code, length = struct.unpack_from(order + "HH", body, start)
        if code == OPT_END:
            return
        if start + 4 + length > len(body):
            raise PcapError(at + start, f"option {code} of {length} bytes leaves its block")
        yield code, bytes(body[start + 4 : start + 4 + length]), at + start
        start += 4 + length + -length % 4


def _interface(body: memoryview, at: int, order: str) -> _Interface:
    if len(body) < 8:
        raise PcapError(at, "interface description is too short")
    linktype, _, snaplen = struct.unpack_from(order + "HHI", body)
    interface = _Interface(linktype, snaplen)
    for code, value, where in _options(body, 8, at, order):
        if code == OPT_IF_TSRESOL:
            if len(value) != 1:
                raise PcapError(where, f"if_tsresol of {len(value)} bytes")
            exponent = value[0] & 0x7F
            interface.per_second = 2**exponent if value[0] & 0x80 else 10**exponent
        elif code == OPT_IF_TSOFFSET:
            if len(value) != 8:
                raise PcapError(where, f"if_tsoffset of {len(value)} bytes")
            interface.offset_ns = struct.unpack(order + "q", value)[0] * 1_000_000_000
    return interface


def _enhanced(body: memoryview, at: int, section: _Section) -> Capture:
    if len(body) < 20:
        raise PcapError(at, "enhanced packet block is too short")
    number, high, low, kept, length = struct.unpack_from(section.order + "IIIII", body)
    if number >= len(section.interfaces):
        raise PcapError(at, f"interface {number} is not described")
    if 20 + kept > len(body):
        raise PcapError(at + 12, f"packet of {kept} bytes in a block with room for {len(body) - 20}")
    interface = section.interfaces[number]
    time_ns = (high << 32 | low) * 1_000_000_000 // interface.per_second + interface.offset_ns
    options = _options(body, 20 + kept + -kept % 4, at, section.order)
    comments = [value.decode(errors="replace") for code, value, _ in options if code == OPT_COMMENT]
    return Capture(time_ns, number, interface.linktype, bytes(body[20 : 20 + kept]), length, "\n".join(comments))


def _simple(body: memoryview, at: int, section: _Section) -> Capture:
    if len(body) < 4:
        raise PcapError(at, "simple packet block is too short")
    if not section.interfaces:
        raise PcapError(at, "interface 0 is not described")
    interface = section.interfaces[0]
    length = struct.unpack_from(section.order + "I", body)[0]
    kept = min(length, interface.snaplen) if interface.snaplen else length
    if 4 + kept > len(body):
        raise PcapError(at, f"packet of {kept} bytes in a block with room for {len(body) - 4}")
    return Capture(0, 0, interface.linktype, bytes(body[4 : 4 + kept]), length)
