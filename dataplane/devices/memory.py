"""Frames from Python: what tests and replay put into a batch, and what they read back.

``load`` and ``unload`` move frames between Python bytes and the rows of a batch. ``MemoryDevice`` is the fake beside
the real devices: two queues of frames, and a fault injector whose choices depend on its seed alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dataplane.batch import (
    HEADROOM,
    PACKET,
    ROWS,
    SMALL_SIZE,
    SMALL_STRIDE,
    SUPER_BASE,
    SUPER_SIZE,
    SUPER_STRIDE,
    SUPERS,
    Batch,
)


class Vnet(NamedTuple):
    """The virtio header of one frame, in host integers (virtio 1.2, 5.1.6); all zero: nothing is left to do."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0


def load(batch: Batch, frames: Sequence[bytes], iif: int, vnet: Sequence[Vnet] = ()) -> int:
    """Fill the first rows of ``batch`` as if ``frames`` had been received on interface ``iif``.

    A frame of up to ``SMALL_SIZE`` bytes takes its row's small slot, a larger one the next super slot; loading stops at
    the first frame for which there is no row or slot. ``vnet`` gives the virtio headers of the first frames.

    Returns:
        The number of rows filled.
    """
    supers = 0
    for row, frame in enumerate(frames):
        large = len(frame) > SMALL_SIZE
        if row == ROWS or (large and supers == SUPERS):
            return row
        slot = SUPER_BASE + supers * SUPER_STRIDE if large else row * SMALL_STRIDE
        size = HEADROOM + (SUPER_SIZE if large else SMALL_SIZE)
        supers += large
        start = slot + HEADROOM
        batch.data[start : start + len(frame)] = np.frombuffer(frame, np.uint8)
        record = np.zeros((), PACKET)
        record["start"], record["length"], record["slot"], record["size"] = start, len(frame), slot, size
        record["iif"] = iif
        record["flow"] = record["route"] = record["vtep"] = -1
        header = vnet[row] if row < len(vnet) else Vnet()
        record["vnet_flags"], record["gso_type"], record["hdr_len"] = header.flags, header.gso_type, header.hdr_len
        record["gso_size"], record["csum_start"], record["csum_offset"] = header[3:]
        batch.packets[row] = record
    return len(frames)


def unload(batch: Batch, row: int) -> bytes:
    """Return the frame in ``row`` as it stands: from ``start``, ``length`` bytes."""
    start, length = int(batch.packets["start"][row]), int(batch.packets["length"][row])
    return batch.data[start : start + length].tobytes()
