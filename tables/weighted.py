"""Weighted round robin as ip_vs's ``wrr``, decision for decision, in constant time.

ip_vs walks the list of destinations for the next whose weight is at least the current weight ``cw``; at the end of
the list it lowers ``cw`` by the weights' greatest common divisor ``di``, from ``mw`` to 1 and around. With one heavy
backend among many light ones nearly every pick walks the whole list: 1000 steps of 1000 backends.

Here the backends with at least ``cw`` form a *ring* of their own, in the list's order. Lowering ``cw`` puts back the
next lighter ones where they had been: each remembers its neighbors of the moment when it was taken out, and putting
back happens in the reverse order (Knuth's dancing links). A cycle picks each backend at least once, and takes it out
and puts it back at most once; so a pick costs a constant on average. The order of putting back is a second list, from
the heaviest to the lightest.
"""

from typing import Any

from dataplane.jit import kernel
from dataplane.tables.backend import NONE, gcd, is_usable

_ANY = 1 << 31  # above every weight


@kernel
def _take_out(service: Any, backends: Any, row: int) -> None:
    """Take a backend out of the ring; it keeps its links."""
    before, after = int(backends[row]["ring_previous"]), int(backends[row]["ring_next"])
    if before >= 0:
        backends[before]["ring_next"] = after
    else:
        service["ring"] = after
    if after >= 0:
        backends[after]["ring_previous"] = before


@kernel
def _put_back(service: Any, backends: Any, row: int) -> None:
    """Put the backend that was taken out last where it was."""
    before, after = int(backends[row]["ring_previous"]), int(backends[row]["ring_next"])
    if before >= 0:
        backends[before]["ring_next"] = row
    else:
        service["ring"] = row
    if after >= 0:
        backends[after]["ring_previous"] = row


@kernel
def _shrink(service: Any, backends: Any) -> None:
    """Take out those lighter than ``cw``, the lightest first."""
    last = int(service["lightest_in"])
    while last >= 0 and int(backends[last]["weight"]) < int(service["cw"]):
        _take_out(service, backends, last)
        last = int(backends[last]["heavier"])
    service["lightest_in"] = last


@kernel
def _grow(service: Any, backends: Any) -> None:
    """Put back those that have ``cw`` now; the heaviest never left."""
    last = int(service["lightest_in"])
    while last >= 0:
        lighter = int(backends[last]["lighter"])
        if lighter < 0 or int(backends[lighter]["weight"]) < int(service["cw"]):
            break
        _put_back(service, backends, lighter)
        last = lighter
    service["lightest_in"] = last


@kernel
def measure(service: Any, backends: Any) -> None:
    """Set ``di`` and ``mw`` from the weights in a service's list."""
    divisor, heaviest = 0, 0
    row = int(service["head"])
    while row >= 0:
        weight = int(backends[row]["weight"])
        divisor = gcd(weight, divisor)
        heaviest = max(heaviest, weight)
        row = int(backends[row]["next"])
    service["di"] = max(divisor, 1)
    service["mw"] = heaviest - (max(divisor, 1) - 1)


@kernel
def change(service: Any, backends: Any) -> None:
    """Follow an edit of the list or of a weight: the walk begins anew, at about the weight it had come to."""
    measure(service, backends)
    current, step = int(service["cw"]), int(service["di"])
    if current > int(service["mw"]) or current == 0:
        service["cw"] = int(service["mw"])
    elif step > 1:
        service["cw"] = current // step * step + 1
    service["position"] = NONE


@kernel
def link(service: Any, backends: Any, order: Any, count: int) -> None:
    """Make the ring.

    Args:
        service: The record.
        backends: ``(n,)`` of ``BACKEND``.
        order: Rows of the service's backends, the heaviest first.
        count: How many of them have a weight above zero.
    """
    before = NONE
    row = int(service["head"])
    service["ring"] = NONE
    while row >= 0:
        if int(backends[row]["weight"]) > 0:
            backends[row]["ring_previous"] = before
            backends[row]["ring_next"] = NONE
            if before >= 0:
                backends[before]["ring_next"] = row
            else:
                service["ring"] = row
            before = row
        row = int(backends[row]["next"])
    heavier = NONE
    for i in range(count):
        row = int(order[i])
        backends[row]["heavier"] = heavier
        backends[row]["lighter"] = NONE
        if heavier >= 0:
            backends[heavier]["lighter"] = row
        heavier = row
    service["lightest_in"] = heavier
    _shrink(service, backends)


@kernel
def _heaviest_usable(service: Any, backends: Any) -> int:
    """Return the largest weight in a service's list that can be used, at least 1."""
    heaviest = 1
    row = int(service["head"])
    while row >= 0:
        if is_usable(backends[row]):
            heaviest = max(heaviest, int(backends[row]["weight"]))
        row = int(backends[row]["next"])
    return heaviest


@kernel
def _lower(service: Any, backends: Any, limit: int) -> None:
    """Bring ``cw`` to its first value that is not above ``limit``, and the ring with it."""
    excess, step = int(service["cw"]) - limit, int(service["di"])
    if excess > 0:
        service["cw"] = int(service["cw"]) - (excess + step - 1) // step * step
    _grow(service, backends)


@kernel
def pick(service: Any, backends: Any) -> int:
    """Return the row of the next backend, or -1 when none can be used."""
    start = int(service["position"])
    if int(service["mw"]) == 0:
        return NONE
    at, stop, limit, passes, last_pass, restarted = start, -2, _ANY, 0, False, False
    while True:
        row = int(service["ring"]) if at < 0 else int(backends[at]["ring_next"])
        while row >= 0:
            if is_usable(backends[row]):
                service["position"] = row
                return row
            if row == stop:
                service["position"] = row
                return NONE
            row = int(backends[row]["ring_next"])
        at = NONE
        service["cw"] = int(service["cw"]) - int(service["di"])
        if int(service["cw"]) <= 0:
            service["cw"] = int(service["mw"])
            _shrink(service, backends)
            # Now all have been seen with a weight of 1: in a walk from the head, or in a second one.
            if last_pass or start < 0:
                service["position"] = NONE
                return NONE
            restarted = True
        passes += 1
        if passes == 2:  # a pass from the head without a pick: all that are so heavy are overloaded
            limit = _heaviest_usable(service, backends)
        _lower(service, backends, limit)
        last_pass = int(service["cw"]) <= int(service["di"])
        if last_pass and restarted:
            stop = start
