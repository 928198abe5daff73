"""Established flows through a node, and bursts of their packets.

An eighth of the flows goes from pod to pod and an eighth into the tunnel, untranslated; a quarter leaves masqueraded;
half goes to a service, of whose backends half are behind the tunnel. Half of each is UDP, half TCP. They are set up as
packets do it: SYN, SYN-ACK, ACK through the pipeline itself, so every tuple, window and counter is as it would be.

Then come bursts of *rounds*: each round has one packet of either direction of each of its flows, in random order; TCP
segments carry 10 bytes and acknowledge the peer's of the round before. All frames have 64 bytes, or 114 in the tunnel.
"""

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from bench import _traffic as node
from dataplane import batch as b
from dataplane import pipeline
from dataplane.batch import HEADROOM, ROWS, SMALL_SIZE, SMALL_STRIDE
from dataplane.codecs import ethernet, ipv4, tcp, udp, vxlan
from dataplane.codecs.checksum import LOW32, pseudo_header
from dataplane.jit import Array, kernel, store16
from dataplane.tables.flow import TUPLE
from dataplane.verdict import Reason, Verdict

FRAME = 64  # bytes, without the frame check sequence
SERVER = 0x100  # beside the TCP flags: the packet is a reply
SEGMENT = FRAME - ethernet.HEADER - ipv4.HEADER - tcp.HEADER  # bytes of TCP payload
NOW = 10**12
_TCP, _UDP = tcp.PROTOCOL, udp.PROTOCOL
_FIRST_POD, _FIRST_REMOTE = int(node.pod_address(0)), int(node.block(0, 0)[0])
_NODE, _FIRST_NODE = int(IPv4Address(node.NODE)), int(node.node_address(0))
_CLIENT_ISN, _SERVER_ISN = 1000, 5000
_INNER = 50  # bytes of outer headers
_SEED = 1

Process: TypeAlias = Callable[[int], object]


@kernel
def _write_transport(data: Any, at: int, half: Any, flags: int, size: int) -> None:
    pseudo = pseudo_header(0, half["src_lo"], 0, half["dst_lo"], int(half["protocol"]), size)
    ports = int(half["sport"]) << 16 | int(half["dport"])
    if int(half["protocol"]) == _UDP:
        udp.emit(data, at, ports >> 16, ports & 0xFFFF, size)
        udp.finish(data, at, pseudo)
        return
    client = flags & SERVER == 0
    mine, theirs = (_CLIENT_ISN, _SERVER_ISN) if client else (_SERVER_ISN, _CLIENT_ISN)
    begun = 0 if flags & tcp.SYN else 1
    acknowledged = theirs + 1 if flags & tcp.ACK else 0
    tcp.emit(data, at, ports, mine + begun, acknowledged, flags & 0xFF)
    store16(data, at + 14, 0xFFFF)
    tcp.finish(data, at, size, pseudo)


@kernel
def write(batch: Any, i: int, half: Any, flags: int) -> int:
    """Make row ``i`` a packet that comes in with the tuple ``half``; return where its TCP sequence number is, or 0.

    Args:
        batch: ``Batch.arrays``.
        i: The row.
        half: A record of ``TUPLE``.
        flags: TCP's, and ``SERVER``.
    """
    data, packets = batch
    packet = packets[i]
    source, target = int(half["src_lo"]) & LOW32, int(half["dst_lo"]) & LOW32
    remote, pod = (source - _FIRST_REMOTE) >> 8, source - _FIRST_POD
    tunneled = 0 <= remote < node.NODES
    start = i * SMALL_STRIDE + HEADROOM
    at = start + (_INNER if tunneled else 0)
    iif = node.UPLINK
    if tunneled:
        iif = node.UNDERLAY
        _wrap(data, start, remote, int(half["sport"]))
        ethernet.emit(data, at, node.VTEP_MAC, node.VTEP_MAC + 1 + remote, ethernet.ETHERTYPE_IPV4)
    elif 0 <= pod < node.PODS:
        iif = node.FIRST_POD + pod
        ethernet.emit(data, at, node.GATEWAY_MAC, 0x0200_0AF4_0101 + pod, ethernet.ETHERTYPE_IPV4)
    else:
        ethernet.emit(data, at, node.NODE_MAC, node.ROUTER_MAC, ethernet.ETHERTYPE_IPV4)
    l3, size, protocol = at + ethernet.HEADER, FRAME - ethernet.HEADER, int(half["protocol"])
    if protocol == _TCP and flags & tcp.SYN:
        size -= SEGMENT
    ipv4.emit(data, l3, source, target, protocol, size)
    _write_transport(data, l3 + ipv4.HEADER, half, flags, size - ipv4.HEADER)
    packet["start"], packet["length"] = start, at + FRAME - start
    packet["slot"], packet["size"] = i * SMALL_STRIDE, HEADROOM + SMALL_SIZE
    packet["iif"], packet["oif"] = iif, 0
    packet["verdict"], packet["reason"], packet["flags"], packet["mark"] = 0, 0, 0, 0
    packet["flow"], packet["route"], packet["vtep"] = -1, -1, -1
    packet["vnet_flags"], packet["gso_type"], packet["gso_size"] = 0, 0, 0
    return l3 + ipv4.HEADER + 4 if protocol == _TCP else 0


@kernel
def _wrap(data: Any, at: int, remote: int, entropy: int) -> None:
    """Write the outer headers of a frame from another node."""
    ethernet.emit(data, at, node.NODE_MAC, 0, ethernet.ETHERTYPE_IPV4)
    at += ethernet.HEADER
    size = FRAME + _INNER - ethernet.HEADER
    ipv4.emit(data, at, _FIRST_NODE + remote, _NODE, _UDP, size)
    at += ipv4.HEADER
    udp.emit(data, at, 0x8000 | entropy, vxlan.PORT, size - ipv4.HEADER)
    vxlan.emit(data, at + udp.HEADER, 4096)


# --- flows -----------------------------------------------------------------------------------------------------------


@kernel
def write_all(batch: Any, halves: Any, flags: int) -> None:
    """Make rows [0, len(halves)) packets that come in with these tuples."""
    for i in range(len(halves)):
        write(batch, i, halves[i], flags)


def _v4(first: int, offsets: Array) -> Array:
    return np.uint64(0xFFFF_0000_0000 + first) + offsets.astype(np.uint64)


def make_originals(count: int) -> Array:
    """Return ``(count,)`` of ``TUPLE``: what the clients send."""
    random = np.random.default_rng(_SEED)
    originals = np.zeros(count, TUPLE)
    pods = random.integers(0, node.PODS, count)
    originals["src_lo"] = _v4(_FIRST_POD, pods)
    # Not at random: two flows with one tuple would be one flow.
    originals["sport"] = 1024 + np.arange(count) % 64_000
    originals["dport"] = np.where(np.arange(count) % 8 < 4, node.SERVICE_PORT, 443)
    originals["protocol"] = np.where(np.arange(count) % 2, _TCP, _UDP)
    services = _v4(int(node.service_address(0)), random.integers(0, node.SERVICES, count))
    outside = _v4(int(IPv4Address("203.0.113.0")), random.integers(0, 256, count))
    remote = _v4(_FIRST_REMOTE, 256 * random.integers(0, node.NODES, count) + random.integers(1, 63, count))
    local = _v4(_FIRST_POD, (pods + random.integers(1, node.PODS, count)) % node.PODS)
    kind = np.arange(count) % 16
    originals["dst_lo"] = np.select([kind % 8 < 4, kind % 8 < 6, kind < 8], [services, outside, remote], local)
    return originals


def make_new(count: int) -> Array:
    """Return ``(count,)`` of ``TUPLE``: UDP clients of services that have not been seen yet."""
    number, fresh = np.arange(count), np.zeros(count, TUPLE)
    random = np.random.default_rng(_SEED)
    fresh["src_lo"] = _v4(_FIRST_POD, number // 512 % (node.PODS // 2) * 2)  # endpoints are odd: nobody asks itself
    fresh["sport"] = 65_024 + number % 512  # above those of make_originals
    fresh["dst_lo"] = _v4(int(node.service_address(0)), random.integers(0, node.SERVICES, count))
    fresh["dport"], fresh["protocol"] = node.SERVICE_PORT, _UDP
    return fresh


class Rounds(NamedTuple):
    """Stored packets: frames and records of whole bursts, and where each has its TCP sequence number in its slot."""

    frames: Array
    records: Array
    segments: Array


def open_flows(tables: pipeline.Tables, batch: b.Batch, count: int, process: Process) -> Array:
    """Set up about ``count`` flows; return their rows."""
    tuples, originals = tables.flows.tuples, make_originals(count)
    rows: Array = np.zeros(count, np.int64)
    for first in range(0, count, ROWS):
        some = rows[first : first + ROWS]
        for step, flags in enumerate((tcp.SYN, SERVER | tcp.SYN | tcp.ACK, tcp.ACK)):
            halves = tuples[2 * some + step % 2] if step else originals[first : first + ROWS]
            write_all(batch.arrays, halves, flags)
            process(len(halves))
            records = batch.packets[: len(halves)]
            assert (records["verdict"] == Verdict.ACCEPT).all(), [
                Reason.of(r).label for r in np.unique(records["reason"])
            ]
            some[:] = records["flow"] >> 1
    found = np.unique(rows)
    assert len(found) > 0.99 * count, f"{len(found)} of {count} flows"
    return found


@kernel
def write_burst(batch: Any, tuples: Any, halves: Any, segments: Any) -> None:
    """Fill all rows with packets of the given halves of flows."""
    for i in range(ROWS):
        e = int(halves[i])
        at = write(batch, i, tuples[e], tcp.ACK | (SERVER if e & 1 else 0))
        segments[i] = at - i * SMALL_STRIDE if at else 0


def choose_halves(rows: Array, bursts: int) -> Array:
    """Return ``(bursts, ROWS)``: both halves of random flows, each flow once, in random order."""
    random = np.random.default_rng(_SEED)
    chosen = random.choice(rows, bursts * ROWS // 2, replace=False)
    halves = np.concatenate([2 * chosen, 2 * chosen + 1])
    random.shuffle(halves)
    return halves.reshape(bursts, ROWS)
