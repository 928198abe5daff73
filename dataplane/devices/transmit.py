"""Sending a burst: every row that has an output interface leaves by it, by the interface's driver.

A device with ``OFFLOAD`` takes frames as they are, with a virtio header that says what is left to do; any other device
gets finished ones (``devices/pieces.py``). The virtio header is written into the headroom, so a frame is one ``write``.
Frames for a tunnel already carry their outer headers. Its sockets make those themselves, so a row is sent from the
VXLAN header on, by the socket whose port is nearest to the one that the tunnel chose: the path sees the flow's entropy.

A device that fails costs its packets, never the node: each gets verdict DROP and a reason.
"""

from typing import Any

from dataplane.batch import ENCAPSULATED
from dataplane.codecs import virtio
from dataplane.devices.io import (
    IOV,
    IOV_WORDS,
    MAX_SOCKETS,
    ORDER,
    OUTBOX_FILLED,
    OUTBOX_USED,
    SOCKET_FDS,
    SOCKET_FILL,
    SOCKET_LOW,
    SOCKET_SPAN,
    SOCKETS,
    SORTED,
)
from dataplane.devices.messages import count_frame, describe_datagram, describe_message, enqueue, flush, reject, reserve
from dataplane.devices.pieces import ETHERNET, OUTER, finish_checksum, fragment, fragment_limit, segment
from dataplane.devices.syscalls import EINVAL, errno, write
from dataplane.jit import Array, address, kernel, load8, load16, store16, store64
from dataplane.tables.interface import OFFLOAD, UP, Driver
from dataplane.verdict import Reason, Verdict


@kernel
def transmit(batch: Any, count: int, interfaces: Array, io: Any) -> int:
    """Send rows of [0, count) that have an output interface and verdict ACCEPT or STOLEN; return how many were taken.

    A row that its device does not take, whole or in part, becomes DROP with reason device.down, device.error or
    overload.tx-full. Frames for memory devices stay in the batch, their pieces in the outbox. Updates ``tx_*`` and
    ``error`` of the interfaces; overwrites the bytes in front of the frames, and the checksums that it finishes.

    Args:
        batch: ``Batch.arrays``.
        count: Rows to look at.
        interfaces: ``(n,)`` of ``INTERFACE``.
        io: ``IoBuffers.arrays``.
    """
    data, packets = batch
    words, _ = io
    words[OUTBOX_USED] = 0
    words[OUTBOX_FILLED] = 0
    leaving = _arrange(data, packets, count, interfaces, words)
    for k in range(leaving):
        row = int(words[SORTED + k])
        if _is_plain(packets, interfaces, row):
            _write_plain(data, packets, interfaces, row)
        else:
            _send(batch, row, interfaces, io)
    flush(batch, interfaces, io)
    sent = 0
    for row in range(count):
        if _leaves(packets, row):
            interfaces["tx_packets"][packets["oif"][row]] += 1
            sent += 1
    return sent


@kernel
def _leaves(packets: Array, row: int) -> bool:
    verdict = packets["verdict"][row]
    return bool(packets["oif"][row] != 0 and (verdict == Verdict.ACCEPT or verdict == Verdict.STOLEN))


@kernel
def _arrange(data: Array, packets: Array, count: int, interfaces: Array, words: Array) -> int:
    """List the rows to send at ``SORTED``, those for the tunnel last and socket by socket; return how many.

    A counting sort keeps each flow's order, since a flow has one socket; more messages then fit one call.
    """
    plain, tunneled = 0, 0
    for row in range(count):
        if not _leaves(packets, row):
            continue
        oif = int(packets["oif"][row])
        if oif >= len(interfaces) or not interfaces["flags"][oif] & UP or interfaces["driver"][oif] == Driver.NONE:
            packets["verdict"][row] = Verdict.DROP
            packets["reason"][row] = Reason.DEVICE_DOWN
        elif interfaces["driver"][oif] == Driver.VXLAN_SOCKET:
            words[ORDER + tunneled] = row
            tunneled += 1
        else:
            words[SORTED + plain] = row
            plain += 1
    if tunneled > 0:
        for k in range(MAX_SOCKETS + 1):
            words[SOCKET_FILL + k] = 0
        for k in range(tunneled):
            words[SOCKET_FILL + 1 + _socket_of(data, packets, words, int(words[ORDER + k]))] += 1
        for k in range(MAX_SOCKETS):
            words[SOCKET_FILL + k + 1] += words[SOCKET_FILL + k]
        for k in range(tunneled):
            place = SOCKET_FILL + _socket_of(data, packets, words, int(words[ORDER + k]))
            words[SORTED + plain + words[place]] = words[ORDER + k]
            words[place] += 1
    return plain + tunneled


@kernel
def _socket_of(data: Array, packets: Array, words: Array, row: int) -> int:
    """Return the number of the socket whose port is nearest to the outer source port of ``row``."""
    sport = load16(data, int(packets["start"][row]) + 34)
    sockets = int(words[SOCKETS])
    bucket = (sport - int(words[SOCKET_LOW])) * sockets // int(words[SOCKET_SPAN])
    return max(min(bucket, sockets - 1), 0)


@kernel
def _is_plain(packets: Array, interfaces: Array, row: int) -> bool:
    """Say whether the row is for a TAP, with nothing left to do: by far the most frequent case."""
    work = int(packets["vnet_flags"][row]) | int(packets["gso_type"][row]) | int(packets["max_fragment"][row])
    work |= int(packets["flags"][row]) & ENCAPSULATED
    mtu = int(packets["mtu"][row])
    fits = mtu == 0 or int(packets["length"][row]) <= mtu + ETHERNET
    return bool(fits and work == 0 and interfaces["driver"][packets["oif"][row]] == Driver.TAP)


@kernel
def _write_plain(data: Array, packets: Array, interfaces: Array, row: int) -> None:
    """Write one such row. It stands apart from ``_send`` because calling that costs as much as all of this."""
    oif, at, length = int(packets["oif"][row]), int(packets["start"][row]) - virtio.HEADER, int(packets["length"][row])
    store64(data, at, 0)
    store16(data, at + 8, 0)
    if write(int(interfaces["fd"][oif]), address(data, at), length + virtio.HEADER) < 0:
        reject(packets, interfaces, row, oif, errno())
        return
    count_frame(interfaces, oif, length)


@kernel
def _send(batch: Any, row: int, interfaces: Array, io: Any) -> None:
    """Send one row, in the form that the device takes."""
    data, packets = batch
    words, _ = io
    oif, tunneled = int(packets["oif"][row]), bool(packets["flags"][row] & ENCAPSULATED)
    fd = int(interfaces["fd"][oif])
    if interfaces["driver"][oif] == Driver.VXLAN_SOCKET:
        if not tunneled:
            reject(packets, interfaces, row, oif, EINVAL)
            return
        if words[SOCKETS] > 0:
            fd = int(words[SOCKET_FDS + _socket_of(data, packets, words, row)])
    # The virtio header cannot describe a checksum or segments inside a tunnel.
    raw = tunneled or not interfaces["flags"][oif] & OFFLOAD
    if packets["gso_type"][row] != virtio.GSO_NONE:
        if raw:
            segment(batch, row, interfaces, io, oif, fd)
        else:
            _send_whole(batch, row, interfaces, io, oif, fd)
        return
    too_large = fragment_limit(data, packets, row) > 0
    if (
        packets["vnet_flags"][row] & virtio.NEEDS_CSUM
        and (raw or too_large)
        and not finish_checksum(data, packets, row)
    ):
        reject(packets, interfaces, row, oif, EINVAL)
        return
    if too_large:
        fragment(batch, row, interfaces, io, oif, fd)
        return
    _send_whole(batch, row, interfaces, io, oif, fd)


@kernel
def _send_whole(batch: Any, row: int, interfaces: Array, io: Any, oif: int, fd: int) -> None:
    """Send one row as it is."""
    data, packets = batch
    words, _ = io
    driver = interfaces["driver"][oif]
    start, length = int(packets["start"][row]), int(packets["length"][row])
    if driver == Driver.MEMORY:
        count_frame(interfaces, oif, length)
        return
    if driver == Driver.TAP:
        _put_virtio(data, packets, row)
        if write(fd, address(data, start - virtio.HEADER), length + virtio.HEADER) < 0:
            reject(packets, interfaces, row, oif, errno())
            return
        count_frame(interfaces, oif, length)
        return
    message = reserve(batch, interfaces, io, oif, fd)
    if driver == Driver.VXLAN_SOCKET:
        first = start + OUTER
        describe_datagram(io, message, 1, data, start)
    else:
        first = start - virtio.HEADER
        _put_virtio(data, packets, row)
        describe_message(io, message, 1)
    words[IOV + message * IOV_WORDS] = address(data, first)
    words[IOV + message * IOV_WORDS + 1] = start + length - first
    enqueue(io, row, length)


@kernel
def _put_virtio(data: Array, packets: Array, row: int) -> None:
    """Write the virtio header in front of the frame, from the row."""
    at = int(packets["start"][row]) - virtio.HEADER
    if not packets["vnet_flags"][row] | packets["gso_type"][row]:
        store64(data, at, 0)
        store16(data, at + 8, 0)
        return
    virtio.emit(
        data, at, int(packets["vnet_flags"][row]), int(packets["csum_start"][row]), int(packets["csum_offset"][row])
    )
    kind = int(packets["gso_type"][row])
    if kind != virtio.GSO_NONE:
        virtio.set_gso(data, at, kind, _header_length(data, packets, row), int(packets["gso_size"][row]))


@kernel
def _header_length(data: Array, packets: Array, row: int) -> int:
    """Return the bytes of headers that each segment repeats: the kernel keeps that many in one piece."""
    start, l4 = int(packets["start"][row]), int(packets["l4"][row])
    end = start + int(packets["length"][row])
    if l4 <= start or l4 + 20 > end:
        return int(packets["hdr_len"][row])
    if int(packets["gso_type"][row]) & ~virtio.GSO_ECN == virtio.GSO_UDP_L4:
        return l4 + 8 - start
    return min(l4 + (load8(data, l4 + 12) >> 4) * 4, end) - start
