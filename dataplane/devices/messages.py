"""The queue of messages for ``sendmmsg``, and what becomes of a packet that a device refuses.

Messages wait until the next one is for another file, until there are ``MESSAGES`` of them, or until the burst ends. The
kernel tells which message failed and why only by stopping in front of it; the queue then gives that message's packet
its verdict, steps over it and goes on, so one refused packet costs no other.
"""

from typing import Any

from dataplane.devices.io import (
    CONTROL,
    CONTROL_WORDS,
    IOV,
    IOV_WORDS,
    MESSAGES,
    MSG,
    MSG_WORDS,
    NAME,
    NAME_SIZE,
    OWNER,
    PENDING,
    PENDING_FD,
    PENDING_OIF,
    WIRE,
)
from dataplane.devices.syscalls import EAGAIN, EIO, ENOBUFS, MSG_DONTWAIT, errno, sendmmsg
from dataplane.jit import Array, address, kernel, load8, load16, load32, store16, store16n, store32
from dataplane.verdict import Reason, Verdict

_AF_INET = 2
_IP_TOS = 1 << 32  # cmsg level 0 (IPPROTO_IP), type 1
_TOS_LENGTH = 20  # a cmsg of one int
_TOS_SPACE = 24


@kernel
def reject(packets: Array, interfaces: Array, row: int, oif: int, error: int) -> None:
    """Drop a packet that the device of interface ``oif`` did not take."""
    packets["verdict"][row] = Verdict.DROP
    if error in (EAGAIN, ENOBUFS):
        packets["reason"][row] = Reason.OVERLOAD_TX_FULL
        return
    packets["reason"][row] = Reason.DEVICE_ERROR
    interfaces["error"][oif] = error
    interfaces["tx_errors"][oif] += 1


@kernel
def count_frame(interfaces: Array, oif: int, length: int) -> None:
    """Count a frame that a device has taken."""
    interfaces["tx_frames"][oif] += 1
    interfaces["tx_bytes"][oif] += length


@kernel
def reserve(batch: Any, interfaces: Array, io: Any, oif: int, fd: int) -> int:
    """Return the number of the next message for ``fd``, once those queued for another file are sent."""
    words, _ = io
    pending = int(words[PENDING])
    if pending == MESSAGES or (pending > 0 and (words[PENDING_FD] != fd or words[PENDING_OIF] != oif)):
        flush(batch, interfaces, io)
    words[PENDING_FD] = fd
    words[PENDING_OIF] = oif
    return int(words[PENDING])


@kernel
def enqueue(io: Any, row: int, length: int) -> None:
    """Queue the message that was reserved; it is (a piece of) the packet in ``row`` and counts as ``length`` bytes."""
    words, _ = io
    pending = int(words[PENDING])
    words[OWNER + pending] = row
    words[WIRE + pending] = length
    words[PENDING] = pending + 1


@kernel
def flush(batch: Any, interfaces: Array, io: Any) -> None:
    """Send what is queued. Every call sends, or gives a verdict to, one message at least."""
    _, packets = batch
    words, _ = io
    pending, oif, fd = int(words[PENDING]), int(words[PENDING_OIF]), int(words[PENDING_FD])
    words[PENDING] = 0
    at = 0
    while at < pending:
        sent = sendmmsg(fd, address(words, MSG + at * MSG_WORDS), pending - at, MSG_DONTWAIT)
        for k in range(at, at + sent):
            count_frame(interfaces, oif, int(words[WIRE + k]))
        if sent > 0:
            at += sent
            continue
        error = errno() if sent < 0 else EIO
        # A full queue refuses all that are left; any other error may be this packet's own.
        last = pending if error == EAGAIN else at + 1
        for k in range(at, last):
            reject(packets, interfaces, int(words[OWNER + k]), oif, error)
        at = last


@kernel
def describe_message(io: Any, message: int, iovecs: int) -> None:
    """Make message header ``message`` one of ``iovecs`` pieces, for a socket that knows its destination."""
    words, _ = io
    at = MSG + message * MSG_WORDS
    words[at] = 0
    words[at + 1] = 0
    words[at + 2] = address(words, IOV + message * IOV_WORDS)
    words[at + 3] = iovecs
    words[at + 4] = 0
    words[at + 5] = 0
    words[at + 6] = 0


@kernel
def describe_datagram(io: Any, message: int, iovecs: int, frame: Array, start: int) -> None:
    """The same for a datagram; address, port and TOS are those of the outer headers in ``frame[start:]``."""
    words, octets = io
    describe_message(io, message, iovecs)
    at, name, control = MSG + message * MSG_WORDS, NAME + message * NAME_SIZE, CONTROL + message * CONTROL_WORDS
    words[at] = address(octets, name)
    words[at + 1] = NAME_SIZE
    store16n(octets, name, _AF_INET)
    store16(octets, name + 2, load16(frame, start + 36))
    store32(octets, name + 4, load32(frame, start + 30))
    tos = load8(frame, start + 15)
    if tos == 0:
        return
    words[control] = _TOS_LENGTH
    words[control + 1] = _IP_TOS
    words[control + 2] = tos
    words[at + 4] = address(words, control)
    words[at + 5] = _TOS_SPACE
