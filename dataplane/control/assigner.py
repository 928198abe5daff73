"""Load balancer addresses put into a node's state, by the rules of ``control/loadbalancer.py``.

Who decides depends on where the state comes from. A node that has nothing but its file decides alone: services without
addresses get some, and keep them while the node runs; other nodes that have read the same files come to the same. In
etcd the addresses are written down, and here only handed to their services. A Kubernetes service says itself which it
has. In the last two cases a service of the node's own file gets none by itself: the others would not know.

Most changes are of endpoints, and those do not matter here: they cost a comparison of identities, 0.1 ms among 10,000
services, and every other service stays the same object.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import compress, count
from operator import is_not
from typing import Literal, TypeAlias

from dataplane.control.loadbalancer import SHARED, Assignments, Outcome, allocate, annotation, is_ours, without_given
from dataplane.control.pools import pool_of
from dataplane.control.state import Address, AddressPool, DesiredState, Service

SourceName: TypeAlias = Literal["static", "etcd", "kubernetes"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Memo:
    """What the last state came to."""

    services: tuple[Service, ...] = ()
    pools: tuple[AddressPool, ...] = ()
    held: Assignments = field(default_factory=dict)
    assigned: Assignments = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    result: tuple[Service, ...] = ()


class Assigner:
    """Completes one state after the other; the same state comes to the same, whatever was between.

    Args:
        source: Where the state comes from.
        applied: Returns the state that the node has now, None before the first.
    """

    def __init__(self, source: SourceName, applied: Callable[[], DesiredState | None]) -> None:
        self._source = source
        self._applied = applied
        self._memo = _Memo()
        self._made: dict[str, tuple[Service, Service]] = {}

    def __call__(self, state: DesiredState) -> DesiredState:
        """Return the state with addresses in its services, ``assigned`` and ``refused``."""
        memo, held = self._memo, self._held(state)
        changed = _differences(memo.services, state.services)
        same = memo.pools == state.pools and held in (memo.held, memo.assigned)
        if same and changed is not None and not any(_matters(memo.services[at], state.services[at]) for at in changed):
            result = self._patched(memo.result, state.services, changed)
            self._memo = replace(memo, services=state.services, result=result)
        else:
            self._memo = self._decided(state, held, edited(memo.services, state.services))
        memo = self._memo
        if not memo.assigned and not memo.refused and memo.result is state.services:
            return state if not state.assigned else replace(state, assigned={})
        return replace(state, services=memo.result, assigned=memo.assigned, refused=memo.refused)

    def _held(self, state: DesiredState) -> Assignments:
        if self._source == "etcd":
            return state.assigned
        if self._source == "kubernetes":
            having = (each for each in state.services if each.load_balancer_ips)
            return {each.id: each.load_balancer_ips for each in having if _is_of_pools(each, state.pools)}
        before = self._applied()
        return before.assigned if before is not None else {}

    def _decided(self, state: DesiredState, held: Assignments, changed: frozenset[str]) -> _Memo:
        outcome = self._outcome(state, held, changed)
        assigned: Assignments = {}
        if self._source == "static":
            assigned = outcome.addresses
        elif self._source == "etcd":
            assigned = {each.id: held[each.id] for each in state.services if each.id in held and _takes(each, held)}
        self._made = {name: made for name, made in self._made.items() if name in assigned}
        result = tuple(self._with(service, assigned.get(service.id, ())) for service in state.services)
        if all(a is b for a, b in zip(result, state.services, strict=True)):
            result = state.services
        return _Memo(state.services, state.pools, held, assigned, outcome.refusals, result)

    def _outcome(self, state: DesiredState, held: Assignments, changed: frozenset[str]) -> Outcome:
        if self._source == "static":
            return allocate(state.services, state.pools, without_given(held, state.services), changed)
        own, shared = list[Service](), list[Service]()
        for service in state.services:
            (shared if service.origin == self._source or service.load_balancer_ips else own).append(service)
        held = held if self._source == "kubernetes" else without_given(held, shared)
        outcome = allocate(shared, state.pools, held, changed)
        reason = f"a service of this node alone gets no address by itself while state.source is {self._source}"
        outcome.refusals.update((each.id, reason) for each in own if _takes(each, held))
        return outcome

    def _patched(
        self, result: tuple[Service, ...], services: tuple[Service, ...], changed: Iterable[int]
    ) -> tuple[Service, ...]:
        if services is self._memo.services:
            return result
        patched, assigned = list(result), self._memo.assigned
        for at in changed:
            patched[at] = self._with(services[at], assigned.get(services[at].id, ()))
        if result is self._memo.services and all(patched[at] is services[at] for at in changed):
            return services
        return tuple(patched)

    def _with(self, service: Service, addresses: tuple[Address, ...]) -> Service:
        """Return the service with its addresses, the same object as the last time if nothing is new."""
        if not addresses or service.load_balancer_ips:
            return service
        given, made = self._made.get(service.id, (None, service))
        if given is not service or made.load_balancer_ips != addresses:
            made = replace(service, load_balancer_ips=addresses)
            self._made[service.id] = service, made
        return made


def report(before: DesiredState | None, after: DesiredState) -> None:
    """Log which addresses services got, lost and did not get from one applied state to the next."""
    old: Assignments = before.assigned if before is not None else {}
    if old is not after.assigned:
        for name in sorted(old.keys() | after.assigned.keys()):
            had, has = old.get(name, ()), after.assigned.get(name, ())
            if had != has:
                was = f" instead of {_text(had)}" if had else ""
                log.info("load balancer addresses service=%s addresses=%s%s", name, _text(has) or "none", was)
    known: Mapping[str, str] = before.refused if before is not None else {}
    for name, reason in after.refused.items():
        if known.get(name) != reason:
            log.warning("no load balancer address service=%s: %s", name, reason)


def _text(addresses: tuple[Address, ...]) -> str:
    return ",".join(map(str, addresses))


def _takes(service: Service, held: Assignments) -> bool:
    return service.type == "LoadBalancer" and is_ours(service, held)


def _is_of_pools(service: Service, pools: tuple[AddressPool, ...]) -> bool:
    """Say whether a service's addresses may be out of our pools; others were given by somebody else."""
    return all(pool_of(pools, address) is not None for address in service.load_balancer_ips)


def _differences(before: tuple[Service, ...], after: tuple[Service, ...]) -> list[int] | None:
    """Return where services are other objects than before; None if there are others at all."""
    if before is after:
        return []
    if len(before) != len(after):
        return None
    changed = list(compress(count(), map(is_not, before, after)))
    return changed if all(before[at].id == after[at].id for at in changed) else None


def edited(before: Iterable[Service], after: Iterable[Service]) -> frozenset[str]:
    """Return the ids of services that are new, or of which the allocator might think otherwise than before."""
    known = {service.id: service for service in before}
    return frozenset(each.id for each in after if (old := known.get(each.id)) is None or _matters(old, each))


def _matters(a: Service, b: Service) -> bool:
    """Say whether the allocator might decide otherwise about a service than about what it was."""
    if a is b or (a.type != "LoadBalancer" and b.type != "LoadBalancer"):
        return False
    return _claim(a) != _claim(b)


def _claim(service: Service) -> tuple[object, ...]:
    """Return all of a service that the allocator looks at."""
    together = service.external_policy == "Local" and not service.selector and annotation(service, SHARED)
    return (
        *(service.type, service.load_balancer_class, service.load_balancer_ips, service.requested_ip),
        *(service.cluster_ips, service.family_policy, service.ports, service.labels, service.annotations),
        *(service.external_policy, service.selector, service.endpoints if together else ()),
    )
