"""Reading a burst of frames into a batch, by the interface's driver.

Most frames fit a small slot, some are super-frames of 64 KiB, and nothing tells before the read. So every read goes
into a free super slot; a frame that fits is then moved to its row's small slot, and the super slot is free again. The
move costs 5 ns for a frame of 60 bytes and 25 ns for one of 1400; ``readv`` into a small slot and the rest of a super
slot, so that only large frames move, costs 80 ns more than ``read`` (in C too; 2 shared vCPUs, Linux 6.18). Reading
stops when no super slot is left, when the rows are used up, or when the device has no more: the rows bound every loop.

An error of the device (unplugged, down) is stored in the interface's row and counted; the frames read before it count.
"""

from typing import Any

from dataplane.batch import HEADROOM, ROWS, SMALL_SIZE, SMALL_STRIDE, SUPER_BASE, SUPER_SIZE, SUPER_STRIDE, SUPERS
from dataplane.codecs import virtio
from dataplane.codecs.checksum import checksum
from dataplane.devices.io import (
    CONTROL,
    CONTROL_WORDS,
    FREE,
    IOV,
    IOV_WORDS,
    MSG,
    MSG_WORDS,
    NAME,
    NAME_SIZE,
    RX,
    RX_MESSAGES,
    TUNNEL_ADDRESS,
    TUNNEL_PORT,
)
from dataplane.devices.syscalls import EAGAIN, EINTR, EIO, MSG_DONTWAIT, errno, read, recvmmsg
from dataplane.jit import Array, address, copy, kernel, load16, load32, store8, store16, store32, store48
from dataplane.tables.interface import Driver

OUTER = 42  # Ethernet 14, IPv4 20, UDP 8: what the kernel takes off a datagram

_BEFORE = HEADROOM - virtio.HEADER  # where in a slot the virtio header is
_LOW32 = 0xFFFF_FFFF
_TTL = 64
_UDP = 17


@kernel
def receive(batch: Any, interfaces: Array, index: int, io: Any, limit: int) -> int:
    """Read up to ``limit`` frames from interface ``index`` into rows 0, 1, ... and return their number.

    Overwrites the rows' fields that describe a frame and its virtio header, and everything an earlier packet in the row
    could leave behind to be acted on. A virtio header that is out of bounds is treated as absent. Updates the
    interface's ``rx_*`` counters and ``error``.

    Args:
        batch: ``Batch.arrays``.
        interfaces: ``(n,)`` of ``INTERFACE``.
        index: A row of it.
        io: ``IoBuffers.arrays``.
        limit: Frames; at most ``ROWS`` are read.
    """
    driver = interfaces["driver"][index]
    limit = min(limit, ROWS)
    if driver == Driver.TAP:
        return _receive_tap(batch, interfaces, index, limit)
    if driver == Driver.PACKET or driver == Driver.VXLAN_SOCKET:
        return _receive_messages(batch, interfaces, index, io, limit)
    return 0


@kernel
def _fail(interfaces: Array, index: int, error: int) -> None:
    """Record an error of the device; an empty queue and an interrupted call are none."""
    if error != EAGAIN and error != EINTR:
        interfaces["error"][index] = error
        interfaces["rx_errors"][index] += 1


@kernel
def _fill(packets: Array, row: int, index: int, start: int, length: int) -> None:
    """Describe a frame of interface ``index`` that no stage has seen yet and that has no virtio header."""
    packets["start"][row] = start
    packets["length"][row] = length
    packets["iif"][row] = index
    packets["oif"][row] = 0
    packets["verdict"][row] = 0
    packets["reason"][row] = 0
    packets["flags"][row] = 0
    packets["mark"][row] = 0
    packets["flow"][row] = -1
    packets["route"][row] = -1
    packets["vtep"][row] = -1
    packets["vnet_flags"][row] = 0
    packets["gso_type"][row] = 0
    packets["hdr_len"][row] = 0
    packets["gso_size"][row] = 0
    packets["csum_start"][row] = 0
    packets["csum_offset"][row] = 0
    packets["max_fragment"][row] = 0
    packets["mtu"][row] = 0


@kernel
def _take_virtio(data: Array, packets: Array, row: int, at: int) -> None:
    """Copy the virtio header at ``at`` into the row, unless it points outside the frame."""
    if not virtio.valid(data, at, int(packets["length"][row])):
        return
    packets["vnet_flags"][row] = virtio.flags(data, at)
    packets["gso_type"][row] = virtio.gso_type(data, at)
    packets["hdr_len"][row] = virtio.hdr_len(data, at)
    packets["gso_size"][row] = virtio.gso_size(data, at)
    packets["csum_start"][row] = virtio.csum_start(data, at)
    packets["csum_offset"][row] = virtio.csum_offset(data, at)


@kernel
def _place(batch: Any, row: int, spare: int, first: int, length: int) -> int:
    """Give the row the slot for ``length`` bytes that were read into super slot ``spare``; return their offset.

    ``first`` counts from the slot: where the read began. What fits the row's small slot is moved there, from the same
    distance in front of it on.
    """
    data, packets = batch
    slot = SUPER_BASE + spare * SUPER_STRIDE
    packets["slot"][row] = slot
    packets["size"][row] = HEADROOM + SUPER_SIZE
    if length > SMALL_SIZE:
        return slot + first
    small = row * SMALL_STRIDE
    copy(data, small + first, data, slot + first, HEADROOM - first + length)
    packets["slot"][row] = small
    packets["size"][row] = HEADROOM + SMALL_SIZE
    return small + first


@kernel
def _settle(batch: Any, index: int, row: int, spare: int, got: int) -> int:
    """Make a row of the ``got`` bytes read for it, virtio header included; return the frame's length."""
    data, packets = batch
    length = max(got - virtio.HEADER, 0)
    header = _place(batch, row, spare, _BEFORE, length)
    _fill(packets, row, index, header + virtio.HEADER, length)
    _take_virtio(data, packets, row, header)
    return length


@kernel
def _receive_tap(batch: Any, interfaces: Array, index: int, limit: int) -> int:
    """Read frames one by one: a TAP gives no more than one per call."""
    data, _ = batch
    fd = int(interfaces["fd"][index])
    row, spare, total = 0, 0, 0
    while row < limit and spare < SUPERS:
        got = read(fd, address(data, SUPER_BASE + spare * SUPER_STRIDE + _BEFORE), virtio.HEADER + SUPER_SIZE)
        if got < virtio.HEADER:
            _fail(interfaces, index, errno() if got < 0 else EIO)
            break
        length = _settle(batch, index, row, spare, got)
        spare += length > SMALL_SIZE
        total += length
        row += 1
    interfaces["rx_packets"][index] += row
    interfaces["rx_bytes"][index] += total
    return row


@kernel
def _prepare_message(data: Array, io: Any, message: int, spare: int, tunnel: bool) -> None:
    """Make message ``message`` ready for a call that reads into super slot ``spare``.

    All of it: the kernel has overwritten the lengths. The tunnel's messages bring an address and a control message, all
    others a virtio header.
    """
    words, octets = io
    at, iov, before = MSG + message * MSG_WORDS, IOV + message * IOV_WORDS, 0 if tunnel else virtio.HEADER
    words[iov] = address(data, SUPER_BASE + spare * SUPER_STRIDE + HEADROOM - before)
    words[iov + 1] = before + SUPER_SIZE
    words[at] = address(octets, NAME + message * NAME_SIZE) if tunnel else 0
    words[at + 1] = NAME_SIZE if tunnel else 0
    words[at + 2] = address(words, iov)
    words[at + 3] = 1
    words[at + 4] = address(words, CONTROL + message * CONTROL_WORDS) if tunnel else 0
    words[at + 5] = CONTROL_WORDS * 8 if tunnel else 0
    words[at + 6] = 0


@kernel
def _keep_unused(words: Array, packets: Array, rows: int, got: int, free: int) -> int:
    """Take the super slots that the last ``got`` rows have kept off the list of free ones; return how many are left."""
    kept = 0
    for k in range(free):
        if k < got and packets["slot"][rows - got + k] >= SUPER_BASE:
            continue
        words[FREE + kept] = words[FREE + k]
        kept += 1
    return kept


@kernel
def _rebuild_outer(data: Array, at: int, length: int, io: Any, message: int, mac: int) -> None:
    """Write the 42 bytes of headers that the kernel took off a datagram of ``length`` bytes: Ethernet, IPv4, UDP.

    The UDP checksum is 0: the kernel has verified it. The source MAC is lost and 0.
    """
    words, octets = io
    name = NAME + message * NAME_SIZE
    control = CONTROL + message * CONTROL_WORDS
    # One IP_TOS message (level 0, type 1) of one byte, if any.
    has_tos = words[MSG + message * MSG_WORDS + 5] >= 17 and words[control + 1] == 1 << 32
    store48(data, at, mac)
    store48(data, at + 6, 0)
    store16(data, at + 12, 0x0800)
    ip = at + 14
    store8(data, ip, 0x45)
    store8(data, ip + 1, int(words[control + 2]) & 0xFF if has_tos else 0)
    store16(data, ip + 2, length + 28)
    store32(data, ip + 4, 0)
    store8(data, ip + 8, _TTL)
    store8(data, ip + 9, _UDP)
    store16(data, ip + 10, 0)
    store32(data, ip + 12, load32(octets, name + 4))
    store32(data, ip + 16, int(words[TUNNEL_ADDRESS]))
    store16(data, ip + 10, checksum(data, ip, 20, 0))
    store16(data, ip + 20, load16(octets, name + 2))
    store16(data, ip + 22, int(words[TUNNEL_PORT]))
    store16(data, ip + 24, length + 8)
    store16(data, ip + 26, 0)


@kernel
def _receive_messages(batch: Any, interfaces: Array, index: int, io: Any, limit: int) -> int:
    """Read frames from a packet socket or datagrams from the tunnel's socket, a group per call."""
    data, packets = batch
    words, _ = io
    tunnel = interfaces["driver"][index] == Driver.VXLAN_SOCKET
    free, row, total = SUPERS, 0, 0
    for k in range(SUPERS):
        words[FREE + k] = k
    while row < limit and free > 0:
        group = min(RX_MESSAGES, free, limit - row)
        for k in range(group):
            _prepare_message(data, io, RX + k, int(words[FREE + k]), tunnel)
        got = recvmmsg(int(interfaces["fd"][index]), address(words, MSG + RX * MSG_WORDS), group, MSG_DONTWAIT, 0)
        if got <= 0:
            _fail(interfaces, index, errno() if got < 0 else EIO)
            break
        for k in range(got):
            length = int(words[MSG + (RX + k) * MSG_WORDS + 7] & _LOW32)
            if tunnel:
                start = _place(batch, row, int(words[FREE + k]), HEADROOM, length) - OUTER
                _rebuild_outer(data, start, length, io, RX + k, int(interfaces["mac"][index]))
                _fill(packets, row, index, start, length + OUTER)
            else:
                _settle(batch, index, row, int(words[FREE + k]), length)
            total += int(packets["length"][row])
            row += 1
        free = _keep_unused(words, packets, row, got, free)
        if got < group:
            break
    interfaces["rx_packets"][index] += row
    interfaces["rx_bytes"][index] += total
    return row
