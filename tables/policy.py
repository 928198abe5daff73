"""What kube-proxy's rules add to a service: who exposes it, which clients may come, whose traffic is masqueraded (B6).

ip_vs knows virtual servers and backends only; kube-proxy wraps them in ipsets and iptables rules. Here that is one
record beside each service's row, the source ranges of the few services that have some, and a short list of prefixes
(*pools*): the cluster's pods, whose traffic to a cluster address keeps its source, and the pools that natOutgoing is
about.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables.address import Network, halves
from dataplane.tables.hash import Word
from dataplane.tables.result import TableFullError


class Exposure(IntEnum):
    """By which of its addresses a service is reached: the ipset of kube-proxy that would hold it."""

    NONE = 0
    CLUSTER_IP = 1
    EXTERNAL_IP = 2
    LOAD_BALANCER = 3
    NODE_PORT = 4


class Pool(IntEnum):
    """What a prefix is listed for."""

    END = 0
    CLUSTER = 1  # the pods of the whole cluster (clusterCIDR): kube-proxy's local detector
    OUTGOING = 2  # natOutgoing: from such an address to any other is masqueraded


LOCAL = 1  # flag: traffic policy Local, the client keeps its address
NO_LOCAL = 2  # and none of the backends is on this node
RESTRICTED = 4  # loadBalancerSourceRanges are given

POOLS = 64

POLICY = np.dtype(
    {"names": ["exposure", "flags", "first", "count"], "formats": ["u1", "u1", "i4", "i4"], "offsets": [0, 1, 4, 8],
     "itemsize": 16}
)  # fmt: skip
"""One service; ``ranges[first:first + count]`` may use it if it is ``RESTRICTED``."""

RANGE = np.dtype(
    {
        "names": ["first_hi", "first_lo", "last_hi", "last_lo", "pool", "version"],
        "formats": ["u8", "u8", "u8", "u8", "u1", "u1"],
        "offsets": [0, 8, 16, 24, 32, 33],
        "itemsize": 64,
    }
)
"""A prefix as its first and last address; ::/0 holds no IPv4 address, though it would hold a mapped one."""


@kernel
def _holds(prefix: Any, hi: Word, lo: Word) -> bool:
    high, low = np.uint64(hi), np.uint64(lo)
    mapped = high == 0 and low >> np.uint64(32) == 0xFFFF
    if mapped != (int(prefix["version"]) == 4):
        return False
    if high < prefix["first_hi"] or high > prefix["last_hi"]:
        return False
    if high == prefix["first_hi"] and low < prefix["first_lo"]:
        return False
    return not (high == prefix["last_hi"] and low > prefix["last_lo"])


@kernel
def is_allowed(arrays: Any, row: int, hi: Word, lo: Word) -> bool:
    """Say whether a client may use the service in ``row``.

    Args:
        arrays: ``PolicyTable.arrays``.
        row: The service's row.
        hi: Upper half of the client's address.
        lo: Lower half.
    """
    policies, ranges, _ = arrays
    policy = policies[row]
    if int(policy["flags"]) & RESTRICTED == 0:
        return True
    first = int(policy["first"])
    found = False
    for k in range(first, first + int(policy["count"])):
        found = found or _holds(ranges[k], hi, lo)
    return found


@kernel
def is_in_pool(arrays: Any, pool: int, hi: Word, lo: Word) -> bool:
    """Say whether an address is in one of the prefixes that are listed for ``pool``."""
    pools = arrays[2]
    for k in range(POOLS):
        listed = int(pools[k]["pool"])
        if listed == Pool.END:
            return False
        if listed == pool and _holds(pools[k], hi, lo):
            return True
    return False


@kernel
def has_pool(arrays: Any, pool: int) -> bool:
    """Say whether any prefix is listed for ``pool``."""
    pools = arrays[2]
    for k in range(POOLS):
        listed = int(pools[k]["pool"])
        if listed == pool:
            return True
        if listed == Pool.END:
            return False
    return False


class PolicyTable:
    """Owns the records, parallel to those of ``ServiceTable``.

    The ranges move when they grow: take ``arrays`` anew after every edit.
    """

    def __init__(self, capacity: int = 1 << 16) -> None:
        self.policies: Array = np.zeros(capacity, POLICY)
        self.pools: Array = np.zeros(POOLS, RANGE)
        self._ranges: Array = np.zeros(64, RANGE)
        self._end = 0  # of what is written of the ranges; those of services that have others by now are holes
        self._restricted: dict[int, tuple[Network, ...]] = {}

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """``(policies, ranges, pools)``, what the kernels take."""
        return self.policies, self._ranges, self.pools

    def set(self, row: int, exposure: Exposure, flags: int = 0, ranges: Iterable[Network] | None = None) -> None:
        """Say how the service in ``row`` is exposed; with ``ranges``, even none, only their clients may come."""
        held = self._restricted.get(row)
        allowed = None if ranges is None else tuple(ranges)
        record = self.policies[row]
        record["exposure"] = exposure
        record["flags"] = flags | (0 if allowed is None else RESTRICTED)
        if allowed == held:
            return
        self._restricted.pop(row, None)
        if allowed is not None:
            self._restrict(row, allowed)

    def clear(self, row: int) -> None:
        """Forget what is known of a service that is deleted."""
        self.policies[row] = np.zeros((), POLICY)
        self._restricted.pop(row, None)

    def ranges(self, row: int) -> tuple[Network, ...] | None:
        """Return the source ranges of a service, None if everybody may come."""
        return self._restricted.get(row)

    def set_pools(self, pools: Iterable[tuple[Pool, Network]]) -> None:
        """List the prefixes of the cluster and of natOutgoing anew.

        Raises:
            TableFullError: There are more than ``POOLS`` - 1; nothing was changed.
        """
        given = list(pools)
        if len(given) >= POOLS:
            raise TableFullError("pool", len(given), POOLS - 1)
        self.pools[:] = np.zeros((), RANGE)
        for k, (pool, prefix) in enumerate(given):
            self.pools[k] = _record(prefix, pool)

    def _restrict(self, row: int, allowed: tuple[Network, ...]) -> None:
        """Write the ranges of a service behind the others, which move together when there is no room."""
        if self._end + len(allowed) > len(self._ranges):
            count = sum(map(len, self._restricted.values())) + len(allowed)
            self._ranges, self._end = np.zeros(max(64, 2 * count), RANGE), 0
            for other, prefixes in self._restricted.items():
                self._write(other, prefixes)
        self._write(row, allowed)
        self._restricted[row] = allowed

    def _write(self, row: int, prefixes: tuple[Network, ...]) -> None:
        self.policies[row]["first"], self.policies[row]["count"] = self._end, len(prefixes)
        for prefix in prefixes:
            self._ranges[self._end] = _record(prefix)
            self._end += 1


def _record(prefix: Network, pool: Pool = Pool.END) -> tuple[int, ...]:
    return (*halves(prefix.network_address), *halves(prefix.broadcast_address), int(pool), prefix.version)
