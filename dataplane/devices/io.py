"""The memory that device kernels and the operating system share.

``IoBuffers`` owns it all (P7: an address keeps no array alive): iovecs, message headers, addresses and control messages
for ``recvmmsg`` and ``sendmmsg``, room for the headers of segments and fragments, and the outbox of memory devices.
Kernels see two flat arrays, ``words`` (int64) and ``octets`` (uint8), at the offsets below: each array more in a tuple
makes every call slower. The layouts are those of 64-bit little-endian Linux, the same on x86-64 and aarch64:

    struct iovec    0 base, 1 length                                                                      (2 words)
    struct mmsghdr  0 name, 1 name length, 2 iovec, 3 iovecs, 4 control, 5 control length, 6 flags, 7 length (8 words)
    struct cmsghdr  0 length, 1 level | type << 32, then data                                             (3 words each)
    sockaddr_in     family (host order), port, address (network order), 8 bytes of zero                   (16 octets)
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from dataplane.batch import ROWS, SUPERS
from dataplane.jit import Array

MESSAGES: Final = 64  # per sendmmsg
SPARE: Final = MESSAGES  # the message of a device that takes one frame at a time
TEMPLATE: Final = MESSAGES + 1  # headers of a segment that is yet to be fragmented
RX: Final = MESSAGES + 2  # the first message for recvmmsg
RX_MESSAGES: Final = SUPERS  # each needs a super slot for what does not fit the small one
_SLOTS: Final = RX + RX_MESSAGES

# words: buffers, by message
MSG: Final = 0
MSG_WORDS: Final = 8
IOV: Final = MSG + _SLOTS * MSG_WORDS
IOV_WORDS: Final = 4  # two iovecs
CONTROL: Final = IOV + _SLOTS * IOV_WORDS
CONTROL_WORDS: Final = 8
OWNER: Final = CONTROL + _SLOTS * CONTROL_WORDS  # the row of a queued message
WIRE: Final = OWNER + MESSAGES  # and the bytes it counts for
FREE: Final = WIRE + MESSAGES  # numbers of the super slots that the burst has not used
ORDER: Final = FREE + SUPERS  # rows for the tunnel, as they came
SORTED: Final = ORDER + ROWS  # all rows to send, those for the tunnel last and by socket

# words: the queue of messages, all for one file
PENDING: Final = SORTED + ROWS
PENDING_FD: Final = PENDING + 1
PENDING_OIF: Final = PENDING + 2

# words: the packet that is being cut to pieces; offsets count from its first byte
CUT_ROW: Final = PENDING + 3
CUT_OIF: Final = CUT_ROW + 1
CUT_FD: Final = CUT_ROW + 2
CUT_L3: Final = CUT_ROW + 3
CUT_L4: Final = CUT_ROW + 4
CUT_BODY: Final = CUT_ROW + 5  # behind the headers that every piece repeats
CUT_LIMIT: Final = CUT_ROW + 6  # IP bytes of the largest piece, 0: any
CUT_SIZE: Final = CUT_ROW + 7  # payload bytes of a segment
CUT_EXTRA: Final = CUT_ROW + 8  # bytes of transport header that only the first fragment of a segment has
CUT_HEADERS: Final = CUT_ROW + 9  # bytes of headers of the piece at hand
CUT_COUNT: Final = CUT_ROW + 10  # pieces so far

# words: the tunnel's sockets
MAX_SOCKETS: Final = 64
TUNNEL_ADDRESS: Final = CUT_ROW + 11  # IPv4, 32 bits
TUNNEL_PORT: Final = TUNNEL_ADDRESS + 1
SOCKETS: Final = TUNNEL_ADDRESS + 2  # how many there are to send from
SOCKET_LOW: Final = TUNNEL_ADDRESS + 3  # they share the ports [low, low + span)
SOCKET_SPAN: Final = TUNNEL_ADDRESS + 4
SOCKET_FDS: Final = TUNNEL_ADDRESS + 5
SOCKET_FILL: Final = SOCKET_FDS + MAX_SOCKETS  # scratch of the sort by socket

# words: pieces for memory devices; (row, oif, first octet, length) each
OUTBOX_USED: Final = SOCKET_FILL + MAX_SOCKETS + 1
OUTBOX_FILLED: Final = OUTBOX_USED + 1
OUTBOX: Final = OUTBOX_USED + 2
OUTBOX_PIECES: Final = 4096
_WORDS: Final = OUTBOX + OUTBOX_PIECES * 4

# octets
NAME: Final = 0
NAME_SIZE: Final = 16
HEADERS: Final = NAME + _SLOTS * NAME_SIZE
HEADERS_SIZE: Final = 256  # by message: 10 virtio + 50 tunnel + 14 + 60 IPv4 + 60 TCP = 194; 82 for IPv6 extensions
FRAME: Final = 16  # where in it the frame begins; the virtio header stands in front
OUTBOX_DATA: Final = HEADERS + _SLOTS * HEADERS_SIZE
OUTBOX_SIZE: Final = 4 << 20  # 16 super-frames of 64 KiB in pieces with headers, twice over
_OCTETS: Final = OUTBOX_DATA + OUTBOX_SIZE


class IoBuffers:
    """One set of buffers for receive and transmit; they belong to one thread and to one batch at a time."""

    def __init__(self) -> None:
        self.words: Array = np.zeros(_WORDS, np.int64)
        self.words[SOCKET_SPAN] = 1
        self.octets: Array = np.zeros(_OCTETS, np.uint8)

    @property
    def arrays(self) -> tuple[Array, Array]:
        """What ``receive`` and ``transmit`` take as ``io``."""
        return self.words, self.octets

    def use_tunnel(self, address: int, port: int, sockets: Sequence[int] = (), low: int = 0, span: int = 1) -> None:
        """Name the tunnel's end and the sockets to send from.

        Args:
            address: This node's IPv4 address, 32 bits: the destination of what the tunnel's socket receives.
            port: Its UDP port.
            sockets: File descriptors, ascending by source port; none: the interface's own.
            low: First port of the range over which the sockets are spread evenly.
            span: Ports in that range.
        """
        if len(sockets) > MAX_SOCKETS:
            raise ValueError(f"{len(sockets)} sockets for the tunnel; at most {MAX_SOCKETS}")
        words = self.words
        words[TUNNEL_ADDRESS], words[TUNNEL_PORT] = address, port
        words[SOCKET_LOW], words[SOCKET_SPAN] = low, span
        words[SOCKETS] = len(sockets)
        words[SOCKET_FDS : SOCKET_FDS + len(sockets)] = sockets
