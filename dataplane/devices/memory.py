"""Frames from Python: what tests and replay put into a batch, and what they read back.

``load`` and ``unload`` move frames between Python bytes and the rows of a batch. ``MemoryDevice`` is the fake beside
the real devices: two queues of frames, and a fault injector whose choices depend on its seed alone.
"""

import os
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from random import Random
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
from dataplane.devices.io import OUTBOX, OUTBOX_DATA, OUTBOX_USED, IoBuffers
from dataplane.jit import Array
from dataplane.tables.interface import Driver
from dataplane.verdict import Verdict


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

    Raises:
        ValueError: A frame is larger than ``SUPER_SIZE``.
    """
    supers = 0
    for row, frame in enumerate(frames):
        large = len(frame) > SMALL_SIZE
        if len(frame) > SUPER_SIZE:
            raise ValueError(f"frame {row} has {len(frame)} bytes; a slot has {SUPER_SIZE}")
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


def collect(batch: Batch, count: int, interfaces: Array, io: IoBuffers) -> list[tuple[int, bytes]]:
    """Return what the last ``transmit`` of rows [0, count) sent to memory devices: (interface, frame), in row order."""
    words, octets = io.arrays
    pieces: dict[int, list[bytes]] = {}
    for entry in words[OUTBOX : OUTBOX + 4 * int(words[OUTBOX_USED])].reshape(-1, 4).tolist():
        row, _, begin, length = entry
        pieces.setdefault(row, []).append(octets[OUTBOX_DATA + begin : OUTBOX_DATA + begin + length].tobytes())
    frames = []
    for row in range(count):
        oif = int(batch.packets["oif"][row])
        if oif == 0 or interfaces["driver"][oif] != Driver.MEMORY or batch.packets["verdict"][row] > Verdict.STOLEN:
            continue
        frames += [(oif, frame) for frame in pieces.get(row) or [unload(batch, row)]]
    return frames


@dataclass(frozen=True, slots=True)
class Faults:
    """What a bad link does to each frame: probabilities, drawn in this order."""

    drop: float = 0.0
    corrupt: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


NO_FAULTS = Faults()


class MemoryDevice:
    """Two queues of frames: ``inject`` fills the one that ``recv`` reads, ``send`` fills ``sent``.

    Faults are done to frames on their way in. The same seed and the same frames give the same faults.
    """

    driver = Driver.MEMORY
    offload = False

    def __init__(self, index: int, faults: Faults = NO_FAULTS, seed: int = 0) -> None:
        self.index = index
        self.sent: deque[bytes] = deque()
        self._faults = faults
        self._random = Random(seed)
        self._incoming: deque[bytes] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def inject(self, frames: Iterable[bytes]) -> None:
        """Put frames on the wire towards us; the device becomes readable."""
        for frame in frames:
            self._arrive(frame)
        if self._incoming:
            os.eventfd_write(self._event, 1)

    def _arrive(self, frame: bytes) -> None:
        """Queue a frame, with what the link does to it."""
        faults, chance = self._faults, self._random.random
        if chance() < faults.drop:
            return
        if chance() < faults.corrupt and frame:
            bit = self._random.randrange(len(frame) * 8)
            damaged = bytearray(frame)
            damaged[bit >> 3] ^= 1 << (bit & 7)
            frame = bytes(damaged)
        copies = 2 if chance() < faults.duplicate else 1
        late = chance() < faults.reorder and bool(self._incoming)
        before = self._incoming.pop() if late else None
        self._incoming.extend([frame] * copies)
        if before is not None:
            self._incoming.append(before)

    def recv(self, batch: Batch) -> int:
        """Fill the first rows of ``batch`` with the frames that have arrived; return how many."""
        count = load(batch, list(islice(self._incoming, ROWS)), self.index)
        for _ in range(count):
            self._incoming.popleft()
        if not self._incoming:
            with suppress(BlockingIOError):
                os.eventfd_read(self._event)
        return count

    def send(self, batch: Batch, rows: Sequence[int]) -> int:
        """Append the frames of ``rows`` to ``sent``; return how many."""
        self.sent.extend(unload(batch, row) for row in rows)
        return len(rows)

    def fileno(self) -> int:
        """Return a file that is readable while frames wait."""
        return self._event

    def close(self) -> None:
        """Release the file; more than once is allowed."""
        if self._event >= 0:
            os.close(self._event)
            self._event = -1
