"""What ``dataplane loadbalancer show`` and the metrics say of pools and addresses: made of a state alone; pure."""

from functools import lru_cache

from dataplane.control.election import Same, holders, owners
from dataplane.control.pools import PoolUse, pool_of, usage
from dataplane.control.snapshot import BalancedAddress, LoadBalancer, PoolRow
from dataplane.control.state import Address, DesiredState


def snapshot(state: DesiredState) -> LoadBalancer:
    """Return pools with their use, addresses with their services and owner, and who waits.

    Of one state it is made once: it takes 10 us for an address, and metrics ask every few seconds.
    """
    return _made(Same(state))


@lru_cache(maxsize=1)
def _made(same: Same) -> LoadBalancer:
    state = same.state
    return {
        "pools": [_pool(use) for use in usage(state.pools, state.services)],
        "addresses": _addresses(state),
        "pending": [{"service": name, "reason": reason} for name, reason in sorted(state.refused.items())],
    }


def _pool(use: PoolUse) -> PoolRow:
    return {
        "name": use.pool.name,
        "ranges": [_range(first, last) for first, last in use.pool.ranges],
        "auto_assign": use.pool.auto_assign,
        "addresses": use.total,
        "in_use": use.in_use,
        "services": use.services,
    }


def _range(first: Address, last: Address) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _addresses(state: DesiredState) -> list[BalancedAddress]:
    found, announcing = holders(state), owners(state)
    rows: list[BalancedAddress] = []
    for address in sorted(found, key=lambda each: (each.version, int(each))):
        pool = pool_of(state.pools, address)
        rows.append(
            {
                "address": str(address),
                "pool": pool.name if pool else "",
                "services": [service.id for service in found[address]],
                "owner": announcing.get(address, ""),
            }
        )
    return rows
