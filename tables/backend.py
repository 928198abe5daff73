"""Backends: the destinations of a service, and the connections that each of them has.

A row is named together with its *generation*, which changes when the row is given to another destination. A flow
remembers both, so one comparison tells it that its backend is gone. A deleted destination that still has connections
keeps its row, no longer ``AVAILABLE``, so that their ends are counted; added again it is the same one, with its
counters, as in ip_vs, where such a destination waits in the "trash".
"""

from typing import Any

import numpy as np

from dataplane.jit import kernel

AVAILABLE = 1  # flag: in its service's list
OVERLOAD = 2  # flag: reached its upper threshold and has not fallen below the lower one
NONE = -1  # no row: the end of a list

BACKEND = np.dtype(
    {
        "names": [
            "hi", "lo", "next", "weight", "active", "inactive", "flags", "port", "last_weight", "generation",
            "ring_next", "ring_previous", "lighter", "heavier", "service",
            "previous", "persistent", "u_threshold", "l_threshold", "turns", "place", "skip",
            "connections", "in_packets", "in_bytes", "out_packets", "out_bytes",
        ],
        "formats": [
            "u8", "u8", "i4", "i4", "i4", "i4", "u2", "u2", "i4", "i4",
            "i4", "i4", "i4", "i4", "i4",
            "i4", "i4", "i4", "i4", "i2", "i2", "i2",
            "u8", "u8", "u8", "u8", "u8",
        ],
        "offsets": [
            0, 8, 16, 20, 24, 28, 32, 34, 36, 40,
            44, 48, 52, 56, 60,
            64, 68, 72, 76, 80, 82, 84,
            88, 96, 104, 112, 120,
        ],
        "itemsize": 128,
    }
)  # fmt: skip
"""One destination, two cache lines; the first has what a scheduler reads.

``next`` and ``previous`` are its neighbors in the service's list, the newest first. ``active`` and ``inactive`` count
connections (a UDP flow is always inactive), ``persistent`` the templates that lead here. ``last_weight`` is the last
one above zero, or the one it was added with. ``ring_*``, ``lighter`` and ``heavier`` belong to ``weighted``, ``turns``,
``place`` and ``skip`` to the building of ``maglev``. ``service`` is the service's row.
"""


@kernel
def gcd(a: int, b: int) -> int:
    """Return the greatest common divisor of two weights; of 0 and a weight, the weight."""
    while b:
        a, b = b, a % b
    return a


@kernel
def is_usable(backend: Any) -> bool:
    """Say whether a new connection may go to the backend whose record is given."""
    return int(backend["weight"]) > 0 and (int(backend["flags"]) & OVERLOAD) == 0


@kernel
def is_alive(backends: Any, row: int, generation: int) -> bool:
    """Say whether a flow's backend is still a destination of its service; of any weight."""
    backend = backends[row]
    return int(backend["generation"]) == generation and (int(backend["flags"]) & AVAILABLE) != 0


@kernel
def _check_upper(backend: Any) -> None:
    """Set OVERLOAD where the upper threshold is reached."""
    upper = int(backend["u_threshold"])
    if upper != 0 and int(backend["active"]) + int(backend["inactive"]) >= upper:
        backend["flags"] = int(backend["flags"]) | OVERLOAD


@kernel
def _check_lower(backend: Any) -> None:
    """Take OVERLOAD away below the lower threshold, which is three quarters of the upper one unless it is given."""
    upper, lower = int(backend["u_threshold"]), int(backend["l_threshold"])
    total = int(backend["active"]) + int(backend["inactive"])
    below = total < lower
    if lower == 0:
        below = upper == 0 or 4 * total < 3 * upper
    if below:
        backend["flags"] = int(backend["flags"]) & ~OVERLOAD & 0xFFFF


@kernel
def connect(backends: Any, row: int) -> None:
    """Count a new connection; it is inactive until ``activate`` (TCP: when its handshake begins; UDP: never)."""
    backend = backends[row]
    backend["inactive"] = int(backend["inactive"]) + 1
    backend["connections"] = int(backend["connections"]) + 1
    _check_upper(backend)


@kernel
def activate(backends: Any, row: int, generation: int) -> None:
    """Count an inactive connection as active; nothing if the row is another destination's by now."""
    backend = backends[row]
    if int(backend["generation"]) == generation:
        backend["active"] = int(backend["active"]) + 1
        backend["inactive"] = int(backend["inactive"]) - 1


@kernel
def inactivate(backends: Any, row: int, generation: int) -> None:
    """Count an active connection as inactive: it is closing."""
    backend = backends[row]
    if int(backend["generation"]) == generation:
        backend["active"] = int(backend["active"]) - 1
        backend["inactive"] = int(backend["inactive"]) + 1


@kernel
def disconnect(backends: Any, row: int, generation: int, active: bool) -> None:
    """Count the end of a connection that was ``active`` or not."""
    backend = backends[row]
    if int(backend["generation"]) != generation:
        return
    if active:
        backend["active"] = int(backend["active"]) - 1
    else:
        backend["inactive"] = int(backend["inactive"]) - 1
    _check_lower(backend)


@kernel
def hold(backends: Any, row: int) -> None:
    """Count a new persistence template."""
    backend = backends[row]
    backend["persistent"] = int(backend["persistent"]) + 1
    _check_upper(backend)


@kernel
def release(backends: Any, row: int, generation: int) -> None:
    """Count the end of a persistence template."""
    backend = backends[row]
    if int(backend["generation"]) == generation:
        backend["persistent"] = int(backend["persistent"]) - 1
        _check_lower(backend)
