"""Interfaces: one row per device, named by its row number as the kernel names one by its ifindex.

Row 0 stands for the node itself: packets that the slow path makes come from it, and ``oif`` 0 means "nowhere yet".
The *role* says what a stage may expect of the other end; the *driver* says how frames are read and written.
"""

from enum import IntEnum

import numpy as np


class Role(IntEnum):
    """Who is at the other end."""

    NODE = 0
    POD = 1  # one pod; its address and MAC are known, everything else is spoofed
    UPLINK = 2  # the LAN of the nodes, shared with the host's own stack
    UNDERLAY = 3  # VXLAN datagrams only; frames come and go with their outer headers
    HOST = 4  # the node's own processes, behind a TAP in the node's namespace


class Driver(IntEnum):
    """How frames are read and written."""

    NONE = 0
    TAP = 1
    PACKET = 2  # AF_PACKET with a virtio header
    VXLAN_SOCKET = 3  # UDP; the kernel makes the outer headers, so receive rebuilds them and send skips them
    MEMORY = 4  # frames stay in the batch; Python takes them


UP = 1  # flag: frames may be sent
OFFLOAD = 2  # flag: takes partial checksums and super-frames (a virtio header goes with each frame)

INTERFACES = 1024  # rows

INTERFACE = np.dtype(
    {
        "names": [
            "role", "driver", "flags", "fd", "mtu", "error", "mac", "peer_mac",
            "rx_packets", "rx_bytes", "tx_packets", "tx_bytes", "rx_errors", "tx_errors", "tx_frames", "rx_dropped",
        ],
        "formats": [
            "u1", "u1", "u2", "i4", "i4", "i4", "u8", "u8",
            "u8", "u8", "u8", "u8", "u8", "u8", "u8", "u8",
        ],
        "offsets": [0, 1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88],
        "itemsize": 128,
    }
)  # fmt: skip
"""``mac`` is our end's address, ``peer_mac`` the pod's; ``error`` the last errno. ``tx_packets`` counts records,
``tx_frames`` what they became after segmentation and fragmentation. ``rx_dropped`` is what the operating system says it
lost.
"""
