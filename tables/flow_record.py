"""What is kept of a flow: its record, the flags and states in it, and the timeouts. For the table see ``flow``."""

from enum import IntEnum

import numpy as np

from dataplane.jit import Array

ORIGINAL, REPLY = 0, 1  # directions

TUPLE = np.dtype(
    {
        "names": [
            "src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "protocol", "packets", "bytes",
            "seq_end", "max_end", "max_window", "max_ack", "scale", "window_flags", "shared",
        ],
        "formats": [
            "u8", "u8", "u8", "u8", "u2", "u2", "u1", "u8", "u8",
            "u4", "u4", "u4", "u4", "u1", "u1", ("u4", (11,)),
        ],
        "offsets": [0, 8, 16, 24, 32, 34, 36, 40, 48, 64, 68, 72, 76, 80, 81, 84],
        "itemsize": 128,
    }
)  # fmt: skip
"""One direction. An ICMP query goes from its id to its type << 8, its reply back; other protocols without ports have 0.
The second line is the TCP window of the sender of this direction (kernel: ``ip_ct_tcp_state`` td_end, td_maxend,
td_maxwin, td_maxack, td_scale, flags); ``shared`` is where ``FLOW`` has its fields: a half is copied whole.
"""

FLOW = np.dtype(
    {
        "names": [
            "state", "lb_state", "status", "expires_ns", "lb_expires_ns", "last_direction", "last_index", "retrans",
            "last_flags", "last_seq", "last_ack", "last_end", "last_window",
            "backend", "backend_generation", "service", "service_generation", "template", "template_generation",
            "route_generation", "created_ns", "mark",
        ],
        "formats": [
            "u1", "u1", "u2", "i8", "i8", "u1", "u1", "u1",
            "u1", "u4", "u4", "u4", "u2",
            "i4", "i4", "i4", "i4", "i4", "i4",
            "i4", "i8", "u4",
        ],
        "offsets": [
            84, 85, 86, 88, 96, 104, 105, 106,
            107, 108, 112, 116, 120,
            212, 216, 220, 224, 228, 232,
            236, 240, 248,
        ],
        "itemsize": 256,
    }
)  # fmt: skip
"""What both directions share; it lies in the second cache line of each half. What packets write, and the clock hand
reads, is in the first half's, what is decided once in the other.

``state`` is a ``TcpState`` (0 for other protocols), ``lb_state`` ip_vs's own (``LbState``), ``status`` the flags below.
``last_*`` and ``retrans`` are conntrack's memory of the last segment. ``backend``, ``service`` and ``template`` are
rows with their generations, -1: none. ``lb_expires_ns`` is when ip_vs would forget the connection: its backend's
counters follow that, and not ``expires_ns``.
"""

# Flags of ``status``; SEEN_REPLY ... DST_NAT have the kernel's values (IPS_*).
SEEN_REPLY = 0x0002
ASSURED = 0x0004
SRC_NAT = 0x0010
DST_NAT = 0x0020
COUNTED = 0x0100  # counted at its backend: ip_vs knows the connection
ACTIVE = 0x0200  # and as an active one
MASQUERADED = 0x0400  # the source address is the egress interface's: the flow dies with it
SOURCE_KEPT = 0x0800  # holds the by-source entry of its source (endpoint-independent reuse)


class TcpState(IntEnum):
    """conntrack's states, in the kernel's order (``enum tcp_conntrack``)."""

    NONE = 0
    SYN_SENT = 1
    SYN_RECV = 2
    ESTABLISHED = 3
    FIN_WAIT = 4
    CLOSE_WAIT = 5
    LAST_ACK = 6
    TIME_WAIT = 7
    CLOSE = 8
    SYN_SENT2 = 9


class LbState(IntEnum):
    """ip_vs's TCP states (``IP_VS_TCP_S_*``), and one for UDP."""

    NONE = 0
    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT = 4
    TIME_WAIT = 5
    CLOSE = 6
    CLOSE_WAIT = 7
    LAST_ACK = 8
    LISTEN = 9
    SYNACK = 10
    UDP = 11


class Timeout(IntEnum):
    """Indices of the array of timeouts: conntrack's TCP states first, then its other protocols, then ip_vs's states."""

    TCP = 0  # + TcpState
    RETRANS = 10
    UNACK = 11
    UDP = 12
    UDP_STREAM = 13
    ICMP = 14
    GENERIC = 15
    LB = 16  # + LbState


TIMEOUT_COUNT = 32
_SECONDS = {
    Timeout.TCP: (0, 120, 60, 86400, 120, 3600, 30, 120, 10, 120),  # ESTABLISHED and CLOSE_WAIT are kube-proxy's
    Timeout.RETRANS: (300,),
    Timeout.UNACK: (300,),
    Timeout.UDP: (30,),
    Timeout.UDP_STREAM: (120,),
    Timeout.ICMP: (30,),
    Timeout.GENERIC: (600,),
    Timeout.LB: (2, 900, 120, 60, 120, 120, 10, 60, 30, 120, 120, 300),
}


def make_timeouts() -> Array:
    """Return ``(TIMEOUT_COUNT,)`` int64 ns, indexed by ``Timeout``: the defaults of Linux and kube-proxy."""
    timeouts = np.zeros(TIMEOUT_COUNT, np.int64)
    for first, seconds in _SECONDS.items():
        timeouts[first : first + len(seconds)] = np.array(seconds) * 1_000_000_000
    return timeouts
