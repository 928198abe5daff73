"""Routes: a longest prefix match whose values are rows of ``ROUTE``.

A row keeps its number while its prefix is in the table, so a flow may remember it; a row is used again only after its
prefix was deleted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables import lpm
from dataplane.tables.address import Address, Network, halves, prefix_halves, to_address
from dataplane.tables.hash import Word
from dataplane.tables.lpm import Lpm


class Kind(IntEnum):
    """What becomes of a packet that takes the route."""

    NONE = 0  # the row is not in use
    POD = 1  # deliver to the pod behind interface ``oif``
    LOCAL = 2  # the node's own address
    VIA = 3  # out of ``oif`` to ``gateway``; without one the next hop is the destination
    TUNNEL = 4  # to the node of row ``vtep``; -1: that node's VTEP is not known
    BLACKHOLE = 5  # dropped silently
    UNREACHABLE = 6  # dropped, and ICMP host unreachable is owed
    SERVICE = 7  # a service's address: answered, never forwarded


ANNOUNCED = 1  # flag: this node answers for the address on the LAN
HOSTED = 2  # flag of a LOCAL route: the host's own stack has the address

ROUTE = np.dtype(
    {
        "names": ["kind", "origin", "flags", "oif", "mtu", "vtep", "gateway_hi", "gateway_lo"],
        "formats": ["u1", "u1", "u2", "i4", "i4", "i4", "u8", "u8"],
        "offsets": [0, 1, 2, 4, 8, 12, 16, 24],
        "itemsize": 64,
    }
)
"""One route, one cache line. ``origin`` says who set it, for people and for conflicts; ``mtu`` 0 is the interface's."""


@dataclass(frozen=True, slots=True)
class Route:
    """One route as control code knows it; the fields are those of ``ROUTE``."""

    kind: Kind
    oif: int = 0
    gateway: Address | None = None
    vtep: int = -1
    mtu: int = 0
    origin: int = 0
    flags: int = 0


@kernel
def lookup(arrays: Any, hi: Word, lo: Word) -> int:
    """Return the row of the route to an address, or -1.

    Args:
        arrays: ``RouteTable.arrays``; the last one is the rows, ``(n,)`` of ``ROUTE``.
        hi: Upper half of the address.
        lo: Lower half.
    """
    return lpm.lookup(arrays, hi, lo)


class RouteTable:
    """Owns the rows and the prefixes that lead to them.

    A growing table moves to larger arrays: take ``arrays`` anew after every edit.
    """

    def __init__(self, limit: int = 1 << 22, seed: int | None = None) -> None:
        self._lpm = Lpm(limit, seed)
        self._rows: dict[Network, int] = {}
        self._free: list[int] = []
        self.routes: Array = np.zeros(64, ROUTE)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """``(nodes, rules, lengths, key, routes)`` for ``lookup``."""
        return (*self._lpm.arrays, self.routes)

    def set(self, prefix: Network, route: Route) -> int:
        """Add a route, or change the one to this prefix in its place; return its row.

        Raises:
            TableFullError: The table holds ``limit`` prefixes; nothing was changed.
        """
        row = self._rows.get(prefix)
        if row is None:
            row = self._free[-1] if self._free else len(self._rows)
            self._lpm.insert(*prefix_halves(prefix), row)
            if self._free:
                self._free.pop()
            self._rows[prefix] = row
            if row == len(self.routes):
                # Not ``concatenate``: it packs a record that has padding, and no kernel was made for that type.
                larger = np.zeros(2 * row, ROUTE)
                larger[:row] = self.routes
                self.routes = larger
        gateway = halves(route.gateway) if route.gateway else (0, 0)
        self.routes[row] = (route.kind, route.origin, route.flags, route.oif, route.mtu, route.vtep, *gateway)
        return row

    def delete(self, prefix: Network) -> bool:
        """Take the route to a prefix out; return whether it was there."""
        row = self._rows.pop(prefix, None)
        if row is None:
            return False
        self._lpm.delete(*prefix_halves(prefix))
        self.routes[row] = np.zeros((), ROUTE)
        self._free.append(row)
        return True

    def get(self, prefix: Network) -> Route | None:
        """Return the route to exactly this prefix."""
        row = self._rows.get(prefix)
        return None if row is None else self.at(row)

    def row(self, prefix: Network) -> int:
        """Return the row of exactly this prefix, or -1."""
        return self._rows.get(prefix, -1)

    def lookup(self, address: Address | str) -> Route | None:
        """Return the route that a packet to ``address`` takes."""
        row = self._lpm.lookup(*halves(address))
        return None if row < 0 else self.at(row)

    def at(self, row: int) -> Route:
        """Return the route in a row."""
        record = self.routes[row]
        hi, lo = int(record["gateway_hi"]), int(record["gateway_lo"])
        return Route(
            kind=Kind(int(record["kind"])),
            oif=int(record["oif"]),
            gateway=to_address(hi, lo) if hi or lo else None,
            vtep=int(record["vtep"]),
            mtu=int(record["mtu"]),
            origin=int(record["origin"]),
            flags=int(record["flags"]),
        )

    def items(self) -> Iterator[tuple[Network, Route]]:
        """Yield every prefix with its route, in the order they were added."""
        for prefix, row in self._rows.items():
            yield prefix, self.at(row)
