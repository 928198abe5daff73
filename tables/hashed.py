"""Source and destination hashing as ip_vs's ``sh`` and ``dh``: 256 buckets, dealt to the backends in the list's order.

Each service that hashes has buckets of its own, a run of words in one array that all services share: 256 of them, or
4096 for ``maglev``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables.backend import NONE, is_usable
from dataplane.tables.result import TableFullError

BUCKETS = 256
_NO_SIGN = 0x7FFF_FFFF
_GOLDEN = 0x61C8_8647  # hash_32's multiplier


@kernel
def _bucket(word: int) -> int:
    """Return one of ``BUCKETS`` for 32 bits: the upper bits of a product."""
    return ((word * _GOLDEN) & 0xFFFF_FFFF) >> 24


@kernel
def pick(backends: Any, buckets: Any, base: int, word: int, fallback: bool) -> int:
    """Return the backend in the bucket of ``word``, the folded address and the port; sh and dh."""
    home = _bucket(word)
    row = int(buckets[(base + home) & _NO_SIGN])
    if row < 0 or is_usable(backends[row]):
        return row
    if not fallback:
        return NONE
    for offset in range(BUCKETS):
        at = (2 * home + offset) & 0xFF  # ip_vs adds the home to the hash, which is the home
        row = int(buckets[(base + at) & _NO_SIGN])
        if row < 0 or is_usable(backends[row]):
            return row
    return NONE


@kernel
def build(service: Any, backends: Any, buckets: Any, by_weight: bool) -> None:
    """Fill the ``BUCKETS`` buckets of a service from its list; a weight of zero takes one all the same."""
    base, row, taken = int(service["buckets"]), int(service["head"]), 0
    for at in range(base, base + BUCKETS):
        buckets[at] = row
        if row < 0:
            continue
        taken += 1
        if not by_weight or taken >= int(backends[row]["weight"]):
            taken = 0
            row = int(backends[row]["next"])
            if row < 0:
                row = int(service["head"])


class BucketPool:
    """Runs of words in one growing array; a run that was given back is used again for one of its size.

    Attributes:
        words: ``(n,)`` int32; a larger array after it has grown.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.words: Array = np.full(4096, NONE, np.int32)
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def require_room(self, runs: Mapping[int, int]) -> None:
        """Find out whether as many runs of each size can be taken, one after the other.

        Raises:
            TableFullError: They cannot.
        """
        fresh = sum(max(0, count - len(self._free.get(size, ()))) * size for size, count in runs.items())
        if self._end + fresh > self.limit:
            raise TableFullError("buckets", self._end, self.limit)

    def take(self, size: int) -> int:
        """Return the start of a run of ``size`` words.

        Raises:
            TableFullError: It would be beyond ``limit`` words.
        """
        free = self._free.get(size)
        if free:
            return free.pop()
        start, end = self._end, self._end + size
        if end > self.limit:
            raise TableFullError("buckets", start, self.limit)
        if end > len(self.words):
            larger = np.full(min(max(2 * len(self.words), end), self.limit), NONE, np.int32)
            larger[:start] = self.words[:start]
            self.words = larger
        self._end = end
        return start

    def give_back(self, start: int, size: int) -> None:
        """Take back a run."""
        self._free.setdefault(size, []).append(start)
