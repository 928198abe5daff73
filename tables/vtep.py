"""VTEPs: the tunnel ends of the other nodes, by their outer address (RFC 7348).

The set is static: the control plane enters every node, nothing is learned from packets. On receive it answers whether
the outer source is a node of the cluster at all.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dataplane.jit import kernel
from dataplane.tables import index
from dataplane.tables.address import Address, to_address
from dataplane.tables.hash import Word
from dataplane.tables.rows import Rows

VTEP = np.dtype(
    {
        "names": [
            "hi", "lo", "mac", "oif", "mtu",
            "tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "scope",
        ],
        "formats": ["u8", "u8", "u8", "i4", "i4", "u8", "u8", "u8", "u8", "i4"],
        "offsets": [0, 8, 16, 24, 28, 32, 40, 48, 56, 64],
        "itemsize": 128,
    }
)  # fmt: skip
"""One remote node: its outer address and the MAC of its VTEP, the underlay interface's row, the largest inner packet of
the path, and counters of inner packets. ``scope`` is always 0.
"""


@kernel
def find(arrays: Any, hi: Word, lo: Word) -> int:
    """Return the row of the node with this outer address, or -1.

    Args:
        arrays: ``VtepTable.arrays``.
        hi: Upper half of the address.
        lo: Lower half.
    """
    return index.find(arrays[0], arrays[1], 0, hi, lo)


class VtepTable(Rows):
    """The remote nodes of the cluster."""

    name = "vtep"

    def __init__(self, capacity: int = 8192, seed: int | None = None) -> None:
        super().__init__(VTEP, capacity, seed)

    def find(self, address: Address | str) -> int:
        """Return the row of a node, or -1."""
        return self._find(0, address)

    def insert(self, address: Address | str, mac: int, oif: int, mtu: int) -> int:
        """Enter a node, or change what is known of it and keep its counters; return its row.

        Raises:
            TableFullError: All ``capacity`` rows are in use.
        """
        row = self._insert(0, address)
        record = self.records[row]
        record["mac"], record["oif"], record["mtu"] = mac, oif, mtu
        return row

    def delete(self, row: int) -> None:
        """Forget a node.

        Raises:
            KeyError: The row is not in use.
        """
        self._delete(row)

    def items(self) -> Iterator[tuple[int, Address]]:
        """Yield ``(row, outer address)`` of every node, oldest first. Rows may be deleted meanwhile."""
        for row in self.rows():
            yield row, to_address(self.records["hi"][row], self.records["lo"][row])
