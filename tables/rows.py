"""A fixed number of records found by (scope, 128-bit address): what the neighbor and the VTEP table have in common."""

from typing import Any

import numpy as np

from dataplane.jit import Array
from dataplane.tables import index
from dataplane.tables.address import Address, halves
from dataplane.tables.hash import make_key
from dataplane.tables.result import FULL, TableFullError


class Rows:
    """Owns records, the index over them and the free rows.

    A row keeps its number while its entry is in; the arrays never move.

    Attributes:
        records: ``(capacity,)`` of the table's record.
        arrays: ``(slots, key, records)``, what the table's kernels take.
    """

    name = "rows"
    scope = "scope"  # the column that the address is relative to

    def __init__(self, dtype: Any, capacity: int, seed: int | None) -> None:
        self.capacity = capacity
        self.records: Array = np.zeros(capacity, dtype)
        self._slots = index.make_slots(capacity)
        self._key = make_key(seed)
        self._free = list(range(capacity - 1, -1, -1))
        self._used: dict[int, None] = {}
        self.arrays = (self._slots, self._key, self.records)

    def __len__(self) -> int:
        return len(self._used)

    def rows(self) -> list[int]:
        """Return the rows in use, oldest first."""
        return list(self._used)

    def _find(self, scope: int, address: Address | str) -> int:
        hi, lo = halves(address)
        return int(index.find(self._slots, self._key, scope, np.uint64(hi), np.uint64(lo)))

    def _insert(self, scope: int, address: Address | str) -> int:
        """Return the row of an address, a zeroed new one if it is not in."""
        row = self._find(scope, address)
        if row < 0:
            row = self._reserve(scope, address)
            self._enter(row)
        return row

    def _reserve(self, scope: int, address: Address | str) -> int:
        """Return a new row for an address that is not in, and that no lookup finds before the row is entered."""
        if not self._free:
            raise TableFullError(self.name, len(self), self.capacity)
        row = self._free.pop()
        record = self.records[row]
        record[self.scope], (record["hi"], record["lo"]) = scope, halves(address)
        return row

    def _enter(self, row: int) -> None:
        """Let lookups find a reserved row; one that finds no place is released."""
        record = self.records[row]
        if index.insert(self._slots, self._key, int(record[self.scope]), record["hi"], record["lo"], row) == FULL:
            self._release(row)
            raise TableFullError(self.name, len(self), self.capacity)
        self._used[row] = None

    def _release(self, row: int) -> None:
        self.records[row] = np.zeros((), self.records.dtype)
        self._free.append(row)

    def _delete(self, row: int) -> None:
        """Free a row that is in use; its record becomes zeros."""
        del self._used[row]
        record = self.records[row]
        index.delete(self._slots, self._key, int(record[self.scope]), record["hi"], record["lo"], row)
        self._release(row)
