"""An allocator of load balancer addresses that tries everything: the oracle of ``control/loadbalancer.py``.

It lists every address of every pool and compares every pair of services; single stack only. It says nothing of why.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, ip_address

from dataplane.control.state import Address, AddressPool, Labels, Selector, Service

Held = Mapping[str, tuple[Address, ...]]


def allocate(
    services: Sequence[Service], pools: Sequence[AddressPool], held: Held, changed: Collection[str]
) -> dict[str, tuple[Address, ...]]:
    """Return the addresses of all services that get some."""
    ours = [each for each in services if each.type == "LoadBalancer" and not _is_others(each, held)]
    having = [(each, each.load_balancer_ips) for each in services if each.type == "LoadBalancer" and each not in ours]
    result = {}
    for again in (False, True):
        for service in ours:
            addresses = held.get(service.id, ())
            if addresses and (service.id in changed) == again and _may_keep(service, addresses, pools, having):
                having.append((service, addresses))
                result[service.id] = addresses
    for asking in (True, False):
        for service in ours:
            if service.id in result or asking != bool(_wish(service)[0]):
                continue
            found = next((each for each in _offers(service, pools) if _is_free(service, each, having)), None)
            if found is not None:
                having.append((service, (found,)))
                result[service.id] = (found,)
    return result


def may_share(one: Service, other: Service) -> bool:
    """Say whether two services may have the same address."""
    keys = [_note(each, "allow-shared-ip") for each in (one, other)]
    ports = [{(port.protocol, port.port) for port in each.ports} for each in (one, other)]
    return bool(keys[0]) and keys[0] == keys[1] and not ports[0] & ports[1] and _pods(one) == _pods(other)


def _is_others(service: Service, held: Held) -> bool:
    by_hand = service.load_balancer_ips and service.load_balancer_ips != held.get(service.id)
    return bool(service.load_balancer_class or by_hand)


def _may_keep(
    service: Service,
    addresses: tuple[Address, ...],
    pools: Sequence[AddressPool],
    having: list[tuple[Service, tuple[Address, ...]]],
) -> bool:
    wish, wanted = _wish(service)
    if wish is not None and addresses != (wish,):
        return False
    homes = [pool for pool in pools if addresses[0] in _addresses(pool) and wanted in ("", pool.name)]
    return any(_is_for(pool, service) for pool in homes) and _is_free(service, addresses[0], having)


def _offers(service: Service, pools: Sequence[AddressPool]) -> Iterator[Address]:
    """Yield the addresses that a service might get, the best first."""
    wish, wanted = _wish(service)
    every = [pool for pool in pools if _is_for(pool, service)]
    if wish is not None:
        if any(wish in _addresses(pool) for pool in every if wanted in ("", pool.name)):
            yield wish
        return
    if wanted:
        tried = [pool for pool in every if pool.name == wanted]
    else:
        automatic = [pool for pool in every if pool.auto_assign]
        pinned = [pool for pool in automatic if pool.namespaces or pool.service_selectors]
        first = [pool for priority in range(1, 100) for pool in pinned if pool.priority == priority]
        last = [pool for pool in pinned if pool.priority == 0]
        tried = [*first, *last, *(pool for pool in automatic if pool not in pinned)]
    for pool in tried:
        yield from _addresses(pool)


def _addresses(pool: AddressPool) -> list[Address]:
    found: list[Address] = []
    for first, last in pool.ranges:
        found += [IPv4Address(number) for number in range(int(first), int(last) + 1)]
    return [each for each in found if not pool.avoid_buggy_ips or str(each).rpartition(".")[2] not in ("0", "255")]


def _is_free(service: Service, address: Address, having: list[tuple[Service, tuple[Address, ...]]]) -> bool:
    return all(address not in theirs or may_share(service, other) for other, theirs in having)


def _is_for(pool: AddressPool, service: Service) -> bool:
    selected = not pool.service_selectors or any(_selects(each, service.labels) for each in pool.service_selectors)
    return selected and (not pool.namespaces or service.namespace in pool.namespaces)


def _selects(selector: Selector, labels: Labels) -> bool:
    return set(selector.labels) <= set(labels)  # the tests use no expressions


def _wish(service: Service) -> tuple[Address | None, str]:
    text = _note(service, "loadBalancerIPs")
    wish = ip_address(text) if text else service.requested_ip
    return wish, _note(service, "address-pool")


def _note(service: Service, name: str) -> str:
    return dict(service.annotations).get(f"metallb.io/{name}", "")


def _pods(service: Service) -> object:
    return service.selector if service.external_policy == "Local" else None
