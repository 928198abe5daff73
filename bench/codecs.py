"""Headers, parsed and written: gate and fields of 4096 packets, 128 bytes apart, in the L2 cache."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dpkt
import numpy as np

from bench.harness import Case, bind, compile_c
from dataplane.codecs import arp, ethernet, ipv4, ipv6, tcp, udp, vxlan
from dataplane.jit import Array, kernel

PACKETS = 4096
SLOT = 128
LOW63 = 0x7FFF_FFFF_FFFF_FFFF


@kernel
def _parse_ethernet(data: Array, out: Array) -> None:
    for i in range(len(out)):
        at, out[i] = i * SLOT, -1
        if ethernet.valid(data, at, at + SLOT):
            out[i] = ethernet.destination(data, at) ^ ethernet.source(data, at) ^ ethernet.ethertype(data, at)


@kernel
def _parse_arp(data: Array, out: Array) -> None:
    for i in range(len(out)):
        at, out[i] = i * SLOT, -1
        if arp.valid(data, at, at + SLOT):
            sender = arp.sender_mac(data, at) ^ arp.sender_ip(data, at)
            out[i] = arp.operation(data, at) ^ sender ^ arp.target_mac(data, at) ^ arp.target_ip(data, at)


@kernel
def _parse_ipv4(data: Array, out: Array) -> None:
    for i in range(len(out)):
        at, out[i] = i * SLOT, -1
        if ipv4.valid(data, at, at + SLOT):
            small = ipv4.protocol(data, at) ^ ipv4.ttl(data, at) ^ ipv4.total_length(data, at)
            out[i] = ipv4.source(data, at) ^ ipv4.destination(data, at) ^ small ^ ipv4.fragment_word(data, at)


@kernel
def _parse_ipv6(data: Array, out: Array) -> None:
    for i in range(len(out)):
        at, out[i] = i * SLOT, -1
        if ipv6.valid(data, at, at + SLOT):
            source = ipv6.source_hi(data, at) ^ ipv6.source_lo(data, at)
            destination = ipv6.destination_hi(data, at) ^ ipv6.destination_lo(data, at)
            out[i] = (source ^ destination ^ ipv6.hop_limit(data, at) ^ ipv6.payload_length(data, at)) & LOW63


@kernel
def _parse_udp(data: Array, out: Array) -> None:
    for i in range(len(out)):
        at, out[i] = i * SLOT, -1
        if udp.valid(data, at, at + SLOT):
            ports = udp.source_port(data, at) ^ udp.destination_port(data, at)
            out[i] = ports ^ udp.length(data, at) ^ udp.checksum(data, at)


@kernel
def _parse_tcp(data: Array, out: Array) -> None:
    for i in range(len(out)):
        at, out[i] = i * SLOT, -1
        if tcp.valid(data, at, at + SLOT):
            ports = tcp.source_port(data, at) ^ tcp.destination_port(data, at)
            numbers = tcp.sequence(data, at) ^ tcp.acknowledgment(data, at)
            out[i] = ports ^ numbers ^ tcp.flags(data, at) ^ tcp.window(data, at)


@kernel
def _parse_vxlan(data: Array, out: Array) -> None:
    for i in range(len(out)):
        at, out[i] = i * SLOT, -1
        if vxlan.valid(data, at, at + SLOT) and vxlan.flags_ok(data, at) and vxlan.reserved_ok(data, at):
            out[i] = vxlan.vni(data, at)


@kernel
def _emit_ethernet(data: Array, values: Array) -> None:
    for i in range(len(values)):
        ethernet.emit(data, i * SLOT, int(values[i]), int(values[i]) + 1, ethernet.ETHERTYPE_IPV4)


@kernel
def _emit_arp(data: Array, values: Array) -> None:
    for i in range(len(values)):
        value = int(values[i])
        arp.emit(data, i * SLOT, arp.REPLY, value, value, value + 1, value + 1)


@kernel
def _emit_ipv4(data: Array, values: Array) -> None:
    for i in range(len(values)):
        ipv4.emit(data, i * SLOT, int(values[i]), int(values[i]) + 1, ipv4.PROTO_UDP, 100)


@kernel
def _emit_ipv6(data: Array, values: Array) -> None:
    for i in range(len(values)):
        at, value = i * SLOT, int(values[i])
        ipv6.emit(data, at, ipv4.PROTO_UDP, 60, 64)
        ipv6.set_addresses(data, at, value, value + 1, value + 2, value + 3)


@kernel
def _emit_udp(data: Array, values: Array) -> None:
    for i in range(len(values)):
        udp.emit(data, i * SLOT, int(values[i]), 53, 60)


@kernel
def _emit_tcp(data: Array, values: Array) -> None:
    for i in range(len(values)):
        value = int(values[i])
        tcp.emit(data, i * SLOT, value, value + 1, value + 2, tcp.ACK)


@kernel
def _emit_vxlan(data: Array, values: Array) -> None:
    for i in range(len(values)):
        vxlan.emit(data, i * SLOT, int(values[i]))


OURS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "ethernet": (_parse_ethernet, _emit_ethernet),
    "arp": (_parse_arp, _emit_arp),
    "ipv4": (_parse_ipv4, _emit_ipv4),
    "ipv6": (_parse_ipv6, _emit_ipv6),
    "udp": (_parse_udp, _emit_udp),
    "tcp": (_parse_tcp, _emit_tcp),
    "vxlan": (_parse_vxlan, _emit_vxlan),
}
DPKT: dict[str, tuple[Any, int]] = {  # class and bytes of a header; dpkt has no VXLAN
    "ethernet": (dpkt.ethernet.Ethernet, 14),
    "arp": (dpkt.arp.ARP, 28),
    "ipv4": (dpkt.ip.IP, 20),
    "ipv6": (dpkt.ip6.IP6, 40),
    "udp": (dpkt.udp.UDP, 8),
    "tcp": (dpkt.tcp.TCP, 20),
}
NUMPY = {  # the words whose XOR is the result: big-endian, at these offsets; gates are left out
    "arp": {6: ">u2", 8: ">u2", 10: ">u4", 14: ">u4", 18: ">u2", 20: ">u4", 24: ">u4"},
    "ipv4": {12: ">u4", 16: ">u4", 9: "u1", 8: "u1", 2: ">u2", 6: ">u2"},
    "ipv6": {8: ">i8", 16: ">i8", 24: ">i8", 32: ">i8", 7: "u1", 4: ">u2"},
    "udp": {0: ">u2", 2: ">u2", 4: ">u2", 6: ">u2"},
    "tcp": {0: ">u2", 2: ">u2", 4: ">u4", 8: ">u4", 13: "u1", 14: ">u2"},
}
HIGH_WORDS = {8, 18}  # of ARP: upper halves of MACs


def parse_with_dpkt(kind: Any, packets: list[bytes]) -> list[Any]:
    """Make one object per packet."""
    return [kind(packet) for packet in packets]


def emit_with_dpkt(objects: list[Any]) -> list[bytes]:
    """Write the headers of parsed objects."""
    return [parsed.pack_hdr() for parsed in objects]


def parse_with_numpy(name: str, data: Array, out: Array) -> None:
    """Gather each field of all packets, then XOR the columns."""
    fields = NUMPY[name]
    names = [f"f{at}" for at in fields]
    formats = list(fields.values())
    rows = data.view(np.dtype({"names": names, "offsets": list(fields), "formats": formats, "itemsize": SLOT}))
    out[:] = 0
    for at in fields:
        column = rows[f"f{at}"].astype(np.int64)
        out ^= column << 32 if name == "arp" and at in HIGH_WORDS else column
    out &= LOW63


def cases(quick: bool) -> Iterator[Case]:
    """Yield a case that writes and a case that parses for each codec; both must agree with C to the byte."""
    twin = compile_c(Path(__file__).with_name("c").joinpath("codecs.c").read_text(), "codecs")
    values = np.random.default_rng(1).integers(0, 1 << 47, PACKETS)
    for name, (parse, emit) in OURS.items():
        data, copy = (np.full(PACKETS * SLOT, 0xA5, np.uint8) for _ in range(2))
        out, expected = np.zeros(PACKETS, np.int64), np.zeros(PACKETS, np.int64)
        emit_in_c = bind(getattr(twin, f"emit_{name}"), copy, values, PACKETS)
        parse_in_c = bind(getattr(twin, f"parse_{name}"), copy, expected, PACKETS)
        emit(data, values)
        emit_in_c()
        assert (data == copy).all()
        parse(data, out)
        parse_in_c()
        assert (out == expected).all()
        assert (out >= 0).all()
        emit_references: dict[str, Callable[[], object]] = {"C": emit_in_c}
        parse_references: dict[str, Callable[[], object]] = {"C": parse_in_c}
        if name in DPKT:
            kind, size = DPKT[name]
            packets = [data[i * SLOT : i * SLOT + size].tobytes() for i in range(PACKETS)]
            emit_references["dpkt"] = partial(emit_with_dpkt, parse_with_dpkt(kind, packets))
            parse_references["dpkt"] = partial(parse_with_dpkt, kind, packets)
        if name in NUMPY:
            parse_with_numpy(name, data, expected)
            assert (out == expected).all()
            parse_references["numpy"] = partial(parse_with_numpy, name, data, expected.copy())
        what = f"{name} header"
        yield Case(
            f"emit {name}",
            f"write one {what}",
            ours=partial(emit, data, values),
            references=emit_references,
            operations=PACKETS,
        )
        yield Case(
            f"parse {name}",
            f"check one {what}, read its fields",
            ours=partial(parse, data, out),
            references=parse_references,
            operations=PACKETS,
        )
