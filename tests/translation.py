"""Flows and their packets for tests of translation: what a packet of each direction comes in as, and leaves as.

A side of a packet is written ``10.244.1.10:4000``, ``[2001:db8::1]:53`` or ``[2001:db8::1]``. An ICMP query has its
identifier for a port on the side that asks and none on the other; other protocols have no ports at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from dataplane import batch as b
from dataplane.devices.memory import Vnet
from dataplane.stages.nat import nat
from dataplane.stages.parse import parse
from dataplane.tables.address import halves, to_address
from dataplane.tables.flow import DST_NAT, ORIGINAL, REPLY, SRC_NAT, FlowTable
from dataplane.verdict import Verdict
from tests import world as w
from tests.world import Outcome, World

PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmp6": 58, "other": 253}
QUERIES = {1: (8, 0), 58: (128, 129)}  # request, reply


class Side(NamedTuple):
    """An address and a port; port 0 where there is none."""

    address: str
    port: int = 0

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}" if self.port else address


def side(text: str) -> Side:
    """Read what ``str`` of a side writes."""
    if text.startswith("["):
        address, _, port = text[1:].partition("]")
        return Side(address, int(port.lstrip(":") or 0))
    address, _, port = text.partition(":")
    return Side(address, int(port or 0))


@dataclass(frozen=True)
class Way:
    """One direction of a flow: how its packets come in."""

    protocol: int
    src: Side
    dst: Side

    @property
    def inverse(self) -> "Way":
        return Way(self.protocol, self.dst, self.src)

    @property
    def family(self) -> int:
        return 6 if ":" in self.src.address else 4


def way(protocol: str, src: str, dst: str) -> Way:
    return Way(PROTOCOLS[protocol], side(src), side(dst))


def ip(protocol: int, src: str, dst: str, **fields: Any) -> Packet:
    """An IP header of the addresses' family."""
    if ":" in src:
        return IPv6(src=src, dst=dst, nh=protocol, **fields)
    return IP(src=src, dst=dst, proto=protocol, **fields)


def packet(of: Way, payload: bytes = b"payload", reply: bool = False, **fields: Any) -> Packet:
    """A packet that comes in this way; ``reply`` makes an ICMP query's answer."""
    header = ip(of.protocol, of.src.address, of.dst.address, **fields)
    if of.protocol == 6:
        return header / TCP(sport=of.src.port, dport=of.dst.port, flags="PA", seq=77) / Raw(payload)
    if of.protocol == 17:
        return header / UDP(sport=of.src.port, dport=of.dst.port) / Raw(payload)
    name = of.dst.port if reply else of.src.port
    if of.protocol == 1:
        return header / ICMP(type=QUERIES[1][reply], id=name, seq=3) / Raw(payload)
    if of.protocol == 58:
        return header / (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=name, seq=3, data=payload)
    return header / Raw(payload)


def sides(frame: bytes) -> tuple[str, str]:
    """Source and destination of a frame, written as above."""
    network = Ether(frame).payload
    src, dst = 0, 0
    layer = network.payload
    if TCP in network or UDP in network:
        src, dst = layer.sport, layer.dport
    elif isinstance(layer, ICMPv6EchoReply) or (isinstance(layer, ICMP) and layer.type == 0):
        dst = layer.id
    elif isinstance(layer, ICMPv6EchoRequest) or (isinstance(layer, ICMP) and layer.type == 8):
        src = layer.id
    return str(Side(network.src, src)), str(Side(network.dst, dst))


class Translator:
    """The nat stage over flows that a test puts in by hand, in place of conntrack."""

    def __init__(self) -> None:
        self.world = World()
        self.table = FlowTable(64, seed=1)
        self.rows = 0
        tables = list(self.world.tables.arrays) + [None] * (b.FLOWS + 1)
        tables[b.FLOWS] = self.table.arrays
        self.tables = tuple(tables[: b.FLOWS + 1])

    def flow(self, original: Way, reply: Way) -> int:
        """Add a flow whose two directions come in these ways; return its row."""
        row, self.rows = self.rows, self.rows + 1
        for direction, tuple_ in ((ORIGINAL, original), (REPLY, reply)):
            self.fill(self.table.tuples[2 * row + direction], tuple_, direction)
        self.table.flows[row]["status"] = (DST_NAT if reply.src != original.dst else 0) | (
            SRC_NAT if reply.dst != original.src else 0
        )
        return row

    @staticmethod
    def fill(record: Any, of: Way, direction: int) -> None:
        """Write a tuple; a query gets ports as from parse."""
        record["src_hi"], record["src_lo"] = (np.uint64(half) for half in halves(of.src.address))
        record["dst_hi"], record["dst_lo"] = (np.uint64(half) for half in halves(of.dst.address))
        record["sport"], record["dport"], record["protocol"] = of.src.port, of.dst.port, of.protocol
        if of.protocol in QUERIES:  # as parse gives ports to a query
            record["dport" if direction == ORIGINAL else "sport"] = QUERIES[of.protocol][0] << 8

    def run(
        self,
        frames: Sequence[Any],
        halves: Sequence[int],
        vnet: Sequence[Vnet] = (),
        related: bool = False,
        verdict: Verdict = Verdict.ACCEPT,
    ) -> list[Outcome]:
        """Run nat alone over frames of these halves (2 * row + direction), as conntrack leaves them."""
        world, arrays = self.world, self.world.batch.arrays
        count = world.load(frames, w.UPLINK, vnet)
        parse(arrays, count, world.tables.arrays, world.now)
        for record, half in zip(world.batch.packets[:count], halves, strict=True):
            self.mark(record, half, related)
            record["verdict"] = verdict
        nat(arrays, count, self.tables, world.now)
        return world.outcomes(count)

    def one(self, frame: Any, half: int, vnet: Vnet | None = None, **fields: Any) -> Outcome:
        return self.run([frame], [half], [vnet] if vnet else (), **fields)[0]

    def mark(self, record: Any, half: int, related: bool = False) -> None:
        """Write into a record what conntrack does: the flow and the translated destination."""
        record["flow"] = half
        if half < 0:
            return
        other = self.table.tuples[half ^ 1]
        record["dst_hi"], record["dst_lo"] = other["src_hi"], other["src_lo"]
        if related:
            record["flags"] |= b.RELATED
        else:
            record["dport"] = other["sport"]

    def parsed(self, frame: Any) -> Any:
        """The record that parse makes of a frame."""
        world = self.world
        world.load([frame], w.UPLINK)
        parse(world.batch.arrays, 1, world.tables.arrays, world.now)
        return world.batch.packets[0].copy()


def record_sides(record: Any) -> tuple[Any, ...]:
    """The addresses and ports that a packet's record or a tuple has."""
    src, dst = (to_address(int(record[f"{end}_hi"]), int(record[f"{end}_lo"])) for end in ("src", "dst"))
    return str(src), int(record["sport"]), str(dst), int(record["dport"])


def frame_of(network: Packet) -> Packet:
    """The packet on the LAN."""
    return Ether(src=w.LAN_MAC, dst=w.UPLINK_MAC) / network
