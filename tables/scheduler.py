"""The choice of a backend for a new flow, decision for decision that of Linux's ip_vs (6.1).

All walk the service's list, in which the newest backend is the first. A backend can be used if its weight is above
zero and it is not overloaded; none means that the client is refused. ``rr``, ``wrr``, ``sh``, ``dh`` and ``mh`` take
constant time, the others look at every backend.

=====  ================================================================================================================
rr     the next after the last pick
wrr    the next in proportion to the weights (``weighted``)
lc     the fewest connections; an active one counts 256 times an inactive one
wlc    the fewest in proportion to the weight
sed    the fewest active ones plus one in proportion to the weight: the shortest expected delay
nq     the first without an active connection, else as sed: never queue
sh     the bucket of the client's address; a backend has as many of the 256 in a row as its weight
dh     the bucket of the service's address; the weight does not count
mh     the bucket of the client's address in a Maglev table (``maglev``)
fo     the heaviest: fail over
ovf    the heaviest whose active connections do not exceed its weight: overflow
=====  ================================================================================================================
"""

from enum import IntEnum
from typing import Any

from dataplane.jit import kernel
from dataplane.tables import hashed, maglev, weighted
from dataplane.tables.backend import NONE, is_usable
from dataplane.tables.hash import Word
from dataplane.tables.maglev import fold


class Scheduler(IntEnum):
    """ip_vs's schedulers; the names in lower case are those of ipvsadm."""

    RR = 0
    WRR = 1
    LC = 2
    WLC = 3
    SED = 4
    NQ = 5
    SH = 6
    DH = 7
    MH = 8
    FO = 9
    OVF = 10


PERSISTENT = 0x01  # flag of a service, as in ip_vs: a client stays with its backend
ONE_PACKET = 0x04  # each UDP datagram is scheduled for itself
FALLBACK = 0x08  # sh, mh: try further buckets when the backend cannot be used
PORT = 0x10  # sh, mh: the client's port counts

_NO_SIGN = 0x7FFF_FFFF
_ACTIVE = 8  # an active connection is 2**8 inactive ones (ip_vs_dest_conn_overhead)


@kernel
def _next(service: Any, backends: Any) -> int:
    """Round robin: at most once around, beginning after the last pick."""
    row = int(service["position"])
    if row >= 0:
        row = int(backends[row]["next"])
    for _ in range(int(service["count"])):
        if row < 0:
            row = int(service["head"])
        if is_usable(backends[row & _NO_SIGN]):
            service["position"] = row
            return row
        row = int(backends[row & _NO_SIGN]["next"])
    return NONE


@kernel
def _least(service: Any, backends: Any) -> int:
    best, fewest = NONE, 0
    row = int(service["head"])
    while row >= 0:
        backend = backends[row]
        if is_usable(backend):
            load = (int(backend["active"]) << _ACTIVE) + int(backend["inactive"])
            if best < 0 or load < fewest:
                best, fewest = row, load
        row = int(backend["next"])
    return best


@kernel
def _least_weighted(service: Any, backends: Any) -> int:
    best, best_load, best_weight = NONE, 0, 0
    row = int(service["head"])
    while row >= 0:
        backend = backends[row]
        if is_usable(backend):
            load = (int(backend["active"]) << _ACTIVE) + int(backend["inactive"])
            weight = int(backend["weight"])
            if best < 0 or best_load * weight > load * best_weight:
                best, best_load, best_weight = row, load, weight
        row = int(backend["next"])
    return best


@kernel
def _shortest(service: Any, backends: Any, take_idle: bool) -> int:
    """sed; with ``take_idle``, nq."""
    best, best_load, best_weight = NONE, 0, 0
    row = int(service["head"])
    while row >= 0:
        backend = backends[row]
        if is_usable(backend):
            load, weight = int(backend["active"]) + 1, int(backend["weight"])
            if take_idle and load == 1:
                return row
            if best < 0 or best_load * weight > load * best_weight:
                best, best_load, best_weight = row, load, weight
        row = int(backend["next"])
    return best


@kernel
def _heaviest(service: Any, backends: Any, overflow: bool) -> int:
    """fo; with ``overflow``, ovf."""
    best, most = NONE, 0
    row = int(service["head"])
    while row >= 0:
        backend = backends[row]
        weight = int(backend["weight"])
        if is_usable(backend) and weight > most and not (overflow and int(backend["active"]) > weight):
            best, most = row, weight
        row = int(backend["next"])
    return best


@kernel
def pick(arrays: Any, row: int, hi: Word, lo: Word, sport: int) -> int:
    """Return the row of the backend for a new flow to the service in ``row``, or -1 when none can be used.

    ``rr`` and ``wrr`` advance. Nothing is counted: that is ``backend.connect``.

    Args:
        arrays: ``ServiceTable.arrays``: ``(slots, key, services, backends, buckets)``.
        row: The service's row.
        hi: Upper half of the client's address.
        lo: Lower half.
        sport: The client's port; 0 when there is none, such as in a fragment.
    """
    _, _, services, backends, buckets = arrays
    service = services[row & _NO_SIGN]
    kind, flags, base = int(service["scheduler"]), int(service["flags"]), int(service["buckets"])
    if kind == Scheduler.RR:
        return _next(service, backends)
    if kind == Scheduler.WRR:
        return weighted.pick(service, backends)
    if kind == Scheduler.SH or kind == Scheduler.MH:
        word = fold(hi, lo) + (sport if flags & PORT else 0)
        fallback = (flags & FALLBACK) != 0
        if kind == Scheduler.MH:
            return maglev.pick(backends, buckets, base, word, fallback)
        return hashed.pick(backends, buckets, base, word, fallback)
    if kind == Scheduler.DH:
        return hashed.pick(backends, buckets, base, fold(service["hi"], service["lo"]), False)
    if kind == Scheduler.LC:
        return _least(service, backends)
    if kind == Scheduler.WLC:
        return _least_weighted(service, backends)
    if kind == Scheduler.FO or kind == Scheduler.OVF:
        return _heaviest(service, backends, kind == Scheduler.OVF)
    return _shortest(service, backends, kind == Scheduler.NQ)
