"""Pools of load balancer addresses: what is in them, and whom they are for; pure.

A pool may hold millions of addresses. Nothing here lists them: sums are made of the ends of ranges.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dataplane.control.selector import any_matches
from dataplane.control.state import Address, AddressPool, Service

_BUGGY = (0, 255)  # last bytes of IPv4 addresses that some firmware takes for a network's or a broadcast's


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How full a pool is.

    Attributes:
        total: Addresses that it can give.
        in_use: Addresses that services have.
        services: Services that have them; several may share one.
    """

    pool: AddressPool
    total: int
    in_use: int
    services: int


def contains(pool: AddressPool, address: Address) -> bool:
    """Say whether a pool can give an address."""
    return place(pool, address) is not None and not (pool.avoid_buggy_ips and is_buggy(address.version, int(address)))


def place(pool: AddressPool, address: Address) -> tuple[int, int] | None:
    """Return where an address stands in a pool, to be compared with others; None if it is not in its ranges."""
    number = int(address)
    for index, (first, last) in enumerate(pool.ranges):
        if address.version == first.version and int(first) <= number <= int(last):
            return index, number
    return None


def pool_of(pools: Iterable[AddressPool], address: Address) -> AddressPool | None:
    """Return the pool that an address is of; the first, should there be several."""
    return next((pool for pool in pools if contains(pool, address)), None)


def is_pinned(pool: AddressPool) -> bool:
    """Say whether a pool is for some services only."""
    return bool(pool.namespaces or pool.service_selectors)


def accepts(pool: AddressPool, service: Service) -> bool:
    """Say whether a service may have addresses of a pool: its namespace and its labels are among those it is for."""
    if pool.namespaces and service.namespace not in pool.namespaces:
        return False
    return not pool.service_selectors or any_matches(pool.service_selectors, service.labels)


def is_buggy(version: int, number: int) -> bool:
    """Say whether an address is one that ``avoidBuggyIPs`` avoids."""
    return version == 4 and number & 0xFF in _BUGGY


def size(pool: AddressPool) -> int:
    """Return how many addresses a pool can give."""
    total = 0
    for first, last in pool.ranges:
        low, high = int(first), int(last)
        total += high - low + 1
        if pool.avoid_buggy_ips and first.version == 4:
            total -= sum(_with_last_byte(byte, high) - _with_last_byte(byte, low - 1) for byte in _BUGGY)
    return total


def _with_last_byte(byte: int, number: int) -> int:
    """Count the numbers from 0 to ``number`` that end with this byte."""
    return (number - byte) // 256 + 1


def usage(pools: Sequence[AddressPool], services: Iterable[Service]) -> list[PoolUse]:
    """Return how full each pool is, in their order."""
    used: dict[str, set[Address]] = {pool.name: set() for pool in pools}
    users: dict[str, set[str]] = {pool.name: set() for pool in pools}
    for service in services:
        for address in service.load_balancer_ips:
            pool = pool_of(pools, address)
            if pool is not None:
                used[pool.name].add(address)
                users[pool.name].add(service.id)
    return [PoolUse(pool, size(pool), len(used[pool.name]), len(users[pool.name])) for pool in pools]
