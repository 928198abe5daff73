"""A capture file as a device: frames come in from one file and go out to another.

With a seed and times from the file instead of a clock, a replay is deterministic: the same file and the same
configuration give the same verdicts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from dataplane.batch import ROWS, SMALL_SIZE, SUPER_SIZE, SUPERS, Batch
from dataplane.codecs import pcapng
from dataplane.devices.device import translated
from dataplane.devices.memory import load, unload
from dataplane.tables.interface import Driver


class PcapDevice:
    """Reads frames from a pcapng or pcap file, writes frames to a pcapng file.

    Attributes:
        index: The interface that the frames come in on.
        time_ns: When the last frame read was captured, nanoseconds since the epoch; frames are written with this time.
    """

    driver = Driver.MEMORY
    offload = False

    def __init__(self, index: int, source: Path | None = None, target: Path | None = None) -> None:
        """Open the files; either may be absent.

        Raises:
            DeviceError: A file cannot be opened.
        """
        self.index = index
        self.time_ns = 0
        self._frames: Iterator[pcapng.Capture] = iter(())
        self._next: pcapng.Capture | None = None
        self._target: BinaryIO | None = None
        if source is not None:
            with translated(str(source), "read the capture"):
                self._frames = filter(_fits, pcapng.read(source.read_bytes()))
        if target is not None:
            with translated(str(target), "write the capture"):
                self._target = target.open("wb")
            self._target.write(pcapng.section_header() + pcapng.interface_description(f"dataplane{index}"))

    def _burst(self, limit: int) -> Iterator[pcapng.Capture]:
        """Take the next frames, as many as a batch has rows and super slots for."""
        supers = 0
        for _ in range(min(limit, ROWS)):
            self._next = self._next or next(self._frames, None)
            if self._next is None:
                return
            supers += len(self._next.data) > SMALL_SIZE
            if supers > SUPERS:
                return
            capture, self._next = self._next, None
            yield capture

    def recv(self, batch: Batch, limit: int = ROWS) -> int:
        """Fill the first rows of ``batch`` with the next frames of the file; 0 at its end.

        Raises:
            PcapError: The file is damaged from here on.
        """
        captures = list(self._burst(limit))
        if captures:
            self.time_ns = captures[-1].time_ns
        return load(batch, [each.data for each in captures], self.index)

    def send(self, batch: Batch, rows: Sequence[int]) -> int:
        """Append the frames of ``rows`` to the target; return how many."""
        if self._target is None:
            return 0
        with translated(f"dataplane{self.index}", "write the capture"):
            for row in rows:
                self._target.write(pcapng.enhanced_packet(0, self.time_ns, unload(batch, row)))
        return len(rows)

    def fileno(self) -> int:
        """Return the target's descriptor, -1 without one; a file is always ready."""
        return -1 if self._target is None else self._target.fileno()

    def close(self) -> None:
        """Write out and close the target."""
        if self._target is not None:
            self._target.close()
            self._target = None


def _fits(capture: pcapng.Capture) -> bool:
    return capture.linktype == pcapng.LINKTYPE_ETHERNET and len(capture.data) <= SUPER_SIZE
