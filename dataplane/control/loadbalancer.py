"""Which service gets which load balancer address: the rules of MetalLB's allocator (``internal/allocator``); pure.

A service keeps what it holds while that is still right: in a pool that is for it, what it asks for, and shared with
nobody whom it must not share with. What is not right any more is taken back and something else is looked for. A service
that asks for an address (``metallb.io/loadBalancerIPs`` or ``spec.loadBalancerIP``) or a pool
(``metallb.io/address-pool``) gets that or nothing. The others get the first free address, in the order of the ranges,
of the pools that are pinned to them (``serviceAllocation``; the lowest priority first, 0 last), then of the pools that
are for all.

Where MetalLB looks through pools in the random order of a map we go by the order of the file, and who asks for an
address comes before those who take any: nodes that read the same files in the same order come to the same addresses.

Services share an address if both name the same key (``metallb.io/allow-shared-ip``), have no port in common, and a
packet that is delivered for one of them arrives for the other, too: with external traffic policy Local only if they
have the same pods, since one node announces the address for both.

The work is proportional to what is held; addresses of a pool are not listed.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import NamedTuple, TypeAlias

from dataplane.control.pools import accepts, contains, is_buggy, is_pinned, place
from dataplane.control.state import Address, AddressPool, Protocol, Service

PREFIXES = ("metallb.io/", "metallb.universe.tf/")  # of annotations; the second is the old one
SHARED, POOL, ADDRESSES = "allow-shared-ip", "address-pool", "loadBalancerIPs"

Assignments: TypeAlias = Mapping[str, tuple[Address, ...]]
_Port: TypeAlias = tuple[Protocol, int]


class Outcome(NamedTuple):
    """What an allocation comes to, by the service's id: addresses, or the reason why there are none."""

    addresses: dict[str, tuple[Address, ...]]
    refusals: dict[str, str]


class _RefusedError(Exception):
    """An address that a service does not get; the message says why."""


def allocate(
    services: Iterable[Service],
    pools: Sequence[AddressPool],
    held: Assignments,
    changed: Collection[str] = frozenset(),
) -> Outcome:
    """Return the addresses of all services that want some.

    Services of a ``loadBalancerClass`` are somebody else's; addresses of services that do not hold them by us are left
    alone, and given to nobody who could not share them.

    Args:
        services: All, in an order that stays; those of other types are ignored.
        pools: In the order in which they are tried.
        held: What the last outcome was, or what a store says of it.
        changed: Services that were edited since: of two that cannot share any more it is one of these that moves.
    """
    book, keeping, waiting = _Book(), list[Service](), list[Service]()
    order: dict[str, int] = {}
    for service in services:
        if service.type != "LoadBalancer":
            continue
        if not is_ours(service, held):
            for address in service.load_balancer_ips:
                book.take(address, service)
            continue
        order[service.id] = len(order)
        (keeping if held.get(service.id) else waiting).append(service)
    outcome = Outcome({}, {})
    for service in sorted(keeping, key=lambda each: each.id in changed):
        try:
            _keep(service, held[service.id], pools, book)
            outcome.addresses[service.id] = held[service.id]
        except _RefusedError:
            waiting.append(service)
    for service in keeping:
        if service.family_policy == "PreferDualStack" and (one := outcome.addresses.get(service.id)):
            outcome.addresses[service.id] = _completed(service, one, pools, book)
    for service in sorted(waiting, key=lambda each: (not _asks(each), order[each.id])):
        try:
            outcome.addresses[service.id] = _find(service, pools, book)
        except _RefusedError as refused:
            outcome.refusals[service.id] = str(refused)
    return outcome


def is_ours(service: Service, held: Assignments) -> bool:
    """Say whether a service of type LoadBalancer gets its addresses from pools, and not by hand or from others."""
    given = service.load_balancer_ips
    return not service.load_balancer_class and (not given or given == held.get(service.id))


def without_given(held: Assignments, services: Iterable[Service]) -> Assignments:
    """Return what is held, without what services that have addresses by hand held before they had those."""
    given = {service.id for service in services if service.load_balancer_ips}
    return {name: each for name, each in held.items() if name not in given} if given else held


def annotation(service: Service, name: str) -> str:
    """Return one of MetalLB's annotations; "" without it."""
    if not service.annotations:
        return ""
    values = dict(service.annotations)
    return next((values[prefix + name] for prefix in PREFIXES if prefix + name in values), "")


# --- one service -----------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """What a service asks for: addresses, a pool, or nothing."""

    addresses: tuple[Address, ...]
    pool: str


def _asks(service: Service) -> bool:
    return bool(service.requested_ip or annotation(service, ADDRESSES))


def _request(service: Service) -> _Request:
    text, pool = annotation(service, ADDRESSES), annotation(service, POOL)
    if not text:
        return _Request((service.requested_ip,) if service.requested_ip else (), pool)
    if service.requested_ip:
        raise _RefusedError(f"asks twice: by the annotation {ADDRESSES} and by loadBalancerIP")
    try:
        addresses = tuple(ip_address(part.strip()) for part in text.split(","))
    except ValueError:
        raise _RefusedError(f"annotation {ADDRESSES}: expected addresses (got {text!r})") from None
    if len({address.version for address in addresses}) != len(addresses):
        raise _RefusedError(f"annotation {ADDRESSES}: expected one address of a family (got {text!r})")
    return _Request(addresses, pool)


def _families(service: Service) -> tuple[int, ...]:
    """Return the IP versions that a service wants addresses of, the first one first."""
    found = tuple(dict.fromkeys(address.version for address in service.cluster_ips)) or (4,)
    if service.family_policy == "RequireDualStack" and len(found) < 2:
        raise _RefusedError("wants addresses of both families, but its cluster IPs are of one")
    return found[:1] if service.family_policy == "SingleStack" else found


def _check_families(service: Service, addresses: tuple[Address, ...]) -> None:
    wanted, given = set(_families(service)), {address.version for address in addresses}
    if given != wanted and not (service.family_policy == "PreferDualStack" and given < wanted):
        raise _RefusedError(f"{_text(addresses)}: not of the families that the service has")


def _home(service: Service, addresses: tuple[Address, ...], pools: Sequence[AddressPool], wanted: str) -> AddressPool:
    """Return the pool that has all of the addresses and is for the service."""
    having = [pool for pool in pools if all(contains(pool, address) for address in addresses)]
    if not having:
        raise _RefusedError(f"{_text(addresses)} is in no pool")
    named = [pool for pool in having if wanted in ("", pool.name)]
    if not named:
        raise _RefusedError(f"{_text(addresses)} is not in pool {wanted}, which is asked for")
    for pool in named:
        if accepts(pool, service):
            return pool
    raise _RefusedError(f"{_text(addresses)} is in pool {named[0].name}, which is for other services")


def _keep(service: Service, held: tuple[Address, ...], pools: Sequence[AddressPool], book: "_Book") -> None:
    request = _request(service)
    if request.addresses and set(request.addresses) != set(held):
        raise _RefusedError(f"asks for {_text(request.addresses)} now")
    _check_families(service, held)
    if len({address.version for address in held}) != len(held):
        raise _RefusedError(f"{_text(held)}: more than one of a family")
    _home(service, held, pools, request.pool)
    for address in held:
        book.check(address, service, kept=True)
    for address in held:
        book.take(address, service)


def _completed(
    service: Service, held: tuple[Address, ...], pools: Sequence[AddressPool], book: "_Book"
) -> tuple[Address, ...]:
    """Return what a service holds, with an address of the other family out of the same pool if there is one now."""
    request = _request(service)
    pool, have = _home(service, held, pools, request.pool), {address.version for address in held}
    for version in _families(service) if not request.addresses else ():
        if version not in have and (address := book.first(pool, version, service)) is not None:
            book.take(address, service)
            held = (*held, address)
    return held


def _find(service: Service, pools: Sequence[AddressPool], book: "_Book") -> tuple[Address, ...]:
    request = _request(service)
    addresses = request.addresses or _choose(service, pools, request.pool, book)
    if request.addresses:
        _check_families(service, addresses)
        _home(service, addresses, pools, request.pool)
        for address in addresses:
            book.check(address, service)
    for address in addresses:
        book.take(address, service)
    return addresses


def _choose(service: Service, pools: Sequence[AddressPool], wanted: str, book: "_Book") -> tuple[Address, ...]:
    tiers = [[_named(service, pools, wanted)]] if wanted else _tiers(service, pools)
    for tier in tiers:
        if addresses := _best(service, tier, book):
            return addresses
    raise _RefusedError(_exhausted(service, pools, [pool for tier in tiers for pool in tier]))


def _named(service: Service, pools: Sequence[AddressPool], name: str) -> AddressPool:
    pool = next((pool for pool in pools if pool.name == name), None)
    if pool is None:
        raise _RefusedError(f"pool {name} is asked for and does not exist")
    if not accepts(pool, service):
        raise _RefusedError(f"pool {name} is asked for and is for other services")
    return pool


def _tiers(service: Service, pools: Sequence[AddressPool]) -> list[list[AddressPool]]:
    """Return the pools that are tried: first those pinned to the service, then those for all."""
    automatic = [pool for pool in pools if pool.auto_assign]
    pinned = [pool for pool in automatic if is_pinned(pool) and accepts(pool, service)]
    pinned.sort(key=lambda pool: (pool.priority == 0, pool.priority))
    return [pinned, [pool for pool in automatic if not is_pinned(pool)]]


def _best(service: Service, pools: Iterable[AddressPool], book: "_Book") -> tuple[Address, ...]:
    """Return addresses of the first pool that has all families; with PreferDualStack else of one family."""
    wanted = _families(service)
    alone: dict[int, Address] = {}
    for pool in pools:
        found = {version: address for version in wanted if (address := book.first(pool, version, service)) is not None}
        if len(found) == len(wanted):
            return tuple(found.values())
        for version, address in found.items():
            alone.setdefault(version, address)
    if service.family_policy != "PreferDualStack":
        return ()
    return next(((alone[version],) for version in wanted if version in alone), ())


def _exhausted(service: Service, pools: Sequence[AddressPool], tried: Sequence[AddressPool]) -> str:
    if not pools:
        return "there is no address pool"
    if not tried:
        return "no pool gives addresses to this service by itself (autoAssign, serviceAllocation)"
    families = " and ".join(f"IPv{version}" for version in _families(service))
    names = ", ".join(pool.name for pool in tried)
    return f"no {families} address is free in pool{'s' if len(tried) > 1 else ''} {names}"


def _text(addresses: tuple[Address, ...]) -> str:
    return ", ".join(map(str, addresses))


# --- who has which address -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Use:
    """An address that services have.

    Attributes:
        service: The first of them; the others have the same key and the same backends.
        ports: Whose each port is.
    """

    service: Service
    ports: dict[_Port, str] = field(default_factory=dict)


class _Book:
    """The addresses in use. They only become more, so a pool is never searched from its beginning again."""

    def __init__(self) -> None:
        self._uses: dict[Address, _Use] = {}
        self._shared: dict[str, list[Address]] = {}
        self._next: dict[tuple[str, int], tuple[int, int]] = {}  # by pool and family: a range, and a number in it

    def take(self, address: Address, service: Service) -> None:
        """Enter a service as one that has an address."""
        use = self._uses.get(address)
        if use is None:
            use = self._uses[address] = _Use(service)
            if key := annotation(service, SHARED):
                self._shared.setdefault(key, []).append(address)
        for port in service.ports:
            use.ports.setdefault((port.protocol, port.port), service.id)

    def check(self, address: Address, service: Service, *, kept: bool = False) -> None:
        """Refuse an address that others have who do not share it with this service.

        What is ``kept`` may have other endpoints than when it was given: those of a service without a selector come
        and go by single edits.
        """
        use = self._uses.get(address)
        if use is None:
            return
        key, other = annotation(service, SHARED), annotation(use.service, SHARED)
        if not key or not other:
            raise _RefusedError(f"{address} is in use by {use.service.id}")
        if key != other:
            raise _RefusedError(f"{address} is in use by {use.service.id} with another sharing key ({other!r})")
        lenient = kept and not service.selector and service.external_policy == use.service.external_policy
        if not lenient and _backends(service) != _backends(use.service):
            raise _RefusedError(f"{address} is in use by {use.service.id}, whose pods may be on other nodes")
        for port in service.ports:
            if (user := use.ports.get((port.protocol, port.port))) is not None:
                raise _RefusedError(f"port {port.port}/{port.protocol} of {address} is in use by {user}")

    def first(self, pool: AddressPool, version: int, service: Service) -> Address | None:
        """Return a pool's first address that a service can have: one that is free, or one that it can share."""
        found = [free] if (free := self._first_free(pool, version)) is not None else []
        found += self._shareable(pool, version, service)
        return min(found, key=lambda address: place(pool, address) or (0, 0), default=None)

    def _first_free(self, pool: AddressPool, version: int) -> Address | None:
        index, number = self._next.get((pool.name, version), (0, 0))
        for at in range(index, len(pool.ranges)):
            first, last = pool.ranges[at]
            if first.version != version:
                continue
            number = max(int(first), number if at == index else 0)
            while number <= int(last):
                address = type(first)(number)
                if address not in self._uses and not (pool.avoid_buggy_ips and is_buggy(version, number)):
                    self._next[pool.name, version] = at, number
                    return address
                number += 1
        self._next[pool.name, version] = len(pool.ranges), 0
        return None

    def _shareable(self, pool: AddressPool, version: int, service: Service) -> Iterator[Address]:
        for address in self._shared.get(annotation(service, SHARED), ()):
            if address.version == version and contains(pool, address) and self._shares(address, service):
                yield address

    def _shares(self, address: Address, service: Service) -> bool:
        try:
            self.check(address, service)
        except _RefusedError:
            return False
        return True


def _backends(service: Service) -> str:
    """Return what decides on which nodes a service's packets must arrive; "" where any node will do."""
    if service.external_policy != "Local":
        return ""
    if service.selector:
        return "Local " + ",".join(f"{key}={value}" for key, value in service.selector)
    return "Local " + ",".join(sorted(str(endpoint.address) for endpoint in service.endpoints))
