"""Neighbors: link-layer addresses of stations, per interface (ARP, RFC 826; NDP, RFC 4861).

The table finds and keeps; when an entry changes state is decided by the slow path, which has the timers.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np

from dataplane.jit import kernel
from dataplane.tables import index
from dataplane.tables.address import Address, to_address
from dataplane.tables.hash import Word
from dataplane.tables.rows import Rows


class State(IntEnum):
    """How far the MAC address can be trusted (RFC 4861 7.3.2; Linux's NUD states)."""

    NONE = 0
    INCOMPLETE = 1  # asked, no answer yet: ``mac`` is not valid
    REACHABLE = 2
    STALE = 3
    DELAY = 4
    PROBE = 5
    FAILED = 6  # no answer: ``mac`` is not valid
    PERMANENT = 7


LOCK_NS = 1_000_000_000  # locktime: of two different answers the first holds for this long

NEIGHBOUR = np.dtype(
    {
        "names": ["interface", "state", "probes", "mac", "hi", "lo", "confirmed_ns", "used_ns", "updated_ns"],
        "formats": ["i4", "u1", "u1", "u8", "u8", "u8", "i8", "i8", "i8"],
        "offsets": [0, 4, 5, 8, 16, 24, 32, 40, 48],
        "itemsize": 64,
    }
)
"""One neighbor. ``confirmed_ns`` is when it last proved reachable, ``used_ns`` when a packet last went there,
``updated_ns`` when its state or MAC last changed; ``probes`` are those sent since.
"""


@kernel
def find(arrays: Any, interface: int, hi: Word, lo: Word) -> int:
    """Return the row of a neighbor, or -1.

    Args:
        arrays: ``NeighbourTable.arrays``.
        interface: The interface's row.
        hi: Upper half of the address.
        lo: Lower half.
    """
    return index.find(arrays[0], arrays[1], interface, hi, lo)


class NeighbourTable(Rows):
    """The neighbors of all interfaces. Linux collects garbage from 128 and refuses more than 1024 (gc_thresh)."""

    name = "neighbour"
    scope = "interface"

    def __init__(self, capacity: int = 1024, seed: int | None = None) -> None:
        super().__init__(NEIGHBOUR, capacity, seed)

    def find(self, interface: int, address: Address | str) -> int:
        """Return the row of a neighbor, or -1."""
        return self._find(interface, address)

    def insert(self, interface: int, address: Address | str) -> int:
        """Return the row of a neighbor; a new one begins with state ``NONE`` and all zeros.

        Raises:
            TableFullError: All ``capacity`` rows are in use; the caller may delete one and come again.
        """
        return self._insert(interface, address)

    def delete(self, row: int) -> None:
        """Forget a neighbor.

        Raises:
            KeyError: The row is not in use.
        """
        self._delete(row)

    def items(self) -> Iterator[tuple[int, int, Address]]:
        """Yield ``(row, interface, address)`` of every neighbor, oldest first. Rows may be deleted meanwhile."""
        for row in self.rows():
            record = self.records[row]
            yield row, int(record["interface"]), to_address(record["hi"], record["lo"])
