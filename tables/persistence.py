"""Persistence templates: which backend a client of a persistent service stays with (ip_vs; ClientIP affinity).

A template is found by the service's protocol, address and port and by the client's address under the service's mask. It
is valid while its backend is a destination of the service, except, if so configured, one of weight 0. A new connection
refreshes it; it outlives its time by steps of a minute while connections that it *controls* are open.

The table is bounded. A new template takes the room of one that has expired, which a hand looks for that goes around the
rows; when there is none the connection is scheduled without a template, and counted. The hash is keyed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables import backend, scheduler
from dataplane.tables.address import Address, to_address
from dataplane.tables.hash import Word, hash5, make_key
from dataplane.tables.result import FULL, MISS

POSTPONED_NS = 60 * 1_000_000_000  # an expired template that controls connections is looked at again
_SPARE = 4  # slots per row
_HAND = 64  # rows that an insert into a full table looks at
_NO_SIGN = 0x7FFF_FFFF

# Indices of ``state``.
USED = 0
HAND = 1
QUIESCENT = 2  # sysctl expire_quiescent_template: a backend of weight 0 keeps no clients
REFUSED = 3  # connections that got no template

TEMPLATE = np.dtype(
    {
        "names": [
            "hi", "lo", "vip_hi", "vip_lo", "expires_ns", "scope", "backend", "backend_generation", "generation",
            "controls",
        ],
        "formats": ["u8", "u8", "u8", "u8", "i8", "i4", "i4", "i4", "i4", "i4"],
        "offsets": [0, 8, 16, 24, 32, 40, 44, 48, 52, 56],
        "itemsize": 64,
    }
)  # fmt: skip
"""One client of one service: the client's masked address, the service's address, protocol << 16 | port (0: the row is
free), the backend that was picked and how many open connections were led there. ``generation`` changes when the row is
given to another client.
"""


@kernel
def _home(table: Any, template: Any) -> int:
    """Return the slot where the search for a template's key begins; ``template`` is a record with that key."""
    slots, key = table[0], table[1]
    word = hash5(template["hi"], template["lo"], template["vip_hi"], template["vip_lo"], int(template["scope"]), key)
    return int(word & _NO_SIGN) & ((len(slots) - 1) & _NO_SIGN)


@kernel
def _home_of(table: Any, service: Any, hi: Word, lo: Word) -> int:
    slots, key = table[0], table[1]
    word = hash5(hi, lo, service["hi"], service["lo"], int(service["scope"]), key)
    return int(word & _NO_SIGN) & ((len(slots) - 1) & _NO_SIGN)


@kernel
def find(table: Any, service: Any, hi: Word, lo: Word) -> int:
    """Return the row of a client's template, expired or not, or -1.

    Args:
        table: ``TemplateTable.arrays``.
        service: The service's record.
        hi: Upper half of the client's address.
        lo: Lower half.
    """
    slots, templates = table[0], table[2]
    hi, lo = np.uint64(hi) & service["mask_hi"], np.uint64(lo) & service["mask_lo"]
    mask = (len(slots) - 1) & _NO_SIGN
    at = _home_of(table, service, hi, lo)
    while int(slots[at]) != 0:
        row = int(slots[at]) - 1
        found = templates[row]
        same_client = found["lo"] == lo and found["hi"] == hi and int(found["scope"]) == int(service["scope"])
        if same_client and found["vip_lo"] == service["lo"] and found["vip_hi"] == service["hi"]:
            return row
        at = (at + 1) & mask
    return MISS


@kernel
def remove(table: Any, backends: Any, row: int) -> None:
    """Take a template out; the connections that it controls go on."""
    slots, _, templates, free, state = table
    template = templates[row]
    mask = (len(slots) - 1) & _NO_SIGN
    hole = _home(table, template)
    while int(slots[hole]) != row + 1:
        hole = (hole + 1) & mask
    at = (hole + 1) & mask
    while int(slots[at]) != 0:
        home = _home(table, templates[int(slots[at]) - 1])
        # An entry may move back to the hole only if that is not in front of its home.
        if ((at - home) & mask) >= ((at - hole) & mask):
            slots[hole] = slots[at]
            hole = at
        at = (at + 1) & mask
    slots[hole] = 0
    backend.release(backends, int(template["backend"]), int(template["backend_generation"]))
    template["scope"] = 0
    template["controls"] = 0
    template["generation"] = (int(template["generation"]) + 1) & 0x7FFF_FFFF
    state[USED] -= 1
    free[len(templates) - 1 - int(state[USED])] = row


@kernel
def _has_expired(template: Any, now_ns: int) -> bool:
    return int(template["controls"]) == 0 and int(template["expires_ns"]) <= now_ns


@kernel
def sweep(table: Any, backends: Any, now_ns: int, count: int) -> int:
    """Let the hand look at the next ``count`` rows and take out what has expired; return how many that were."""
    templates, state = table[2], table[4]
    removed = 0
    if int(state[USED]) == 0:
        return 0
    for _ in range(count):
        row = int(state[HAND])
        state[HAND] = row + 1 if row + 1 < len(templates) else 0
        if int(templates[row]["scope"]) != 0 and _has_expired(templates[row], now_ns):
            remove(table, backends, row)
            removed += 1
    return removed


@kernel
def _insert(table: Any, arrays: Any, service: Any, client: Any, now_ns: int) -> int:
    """Return the row of a new template without a backend, or ``FULL``."""
    slots, _, templates, free, state = table
    if int(state[USED]) == len(templates) and sweep(table, arrays[3], now_ns, min(_HAND, len(templates))) == 0:
        state[REFUSED] += 1
        return FULL
    row = int(free[len(templates) - 1 - int(state[USED])])
    state[USED] += 1
    template = templates[row]
    template["hi"] = np.uint64(client[0]) & service["mask_hi"]
    template["lo"] = np.uint64(client[1]) & service["mask_lo"]
    template["vip_hi"] = service["hi"]
    template["vip_lo"] = service["lo"]
    template["scope"] = service["scope"]
    at = _home(table, template)
    while int(slots[at]) != 0:
        at = (at + 1) & ((len(slots) - 1) & _NO_SIGN)
    slots[at] = row + 1
    return row


@kernel
def is_valid(table: Any, backends: Any, row: int, now_ns: int) -> bool:
    """Say whether a new connection may follow a template."""
    template, state = table[2][row], table[4]
    chosen = int(template["backend"])
    if _has_expired(template, now_ns) or not backend.is_alive(backends, chosen, int(template["backend_generation"])):
        return False
    return int(state[QUIESCENT]) == 0 or int(backends[chosen]["weight"]) != 0


@kernel
def select(table: Any, arrays: Any, row: int, client: Any, now_ns: int) -> Any:
    """Return ``(backend, template)`` for a new flow to a persistent service.

    The backend is -1 when none can be used, the template -1 (or -2) when there is none to control the flow. An
    overloaded backend keeps its clients.

    Args:
        table: ``TemplateTable.arrays``.
        arrays: ``ServiceTable.arrays``.
        row: The service's row.
        client: ``(hi, lo, sport)``: the client's address in two uint64 halves, and its port.
        now_ns: The time.
    """
    service, backends, templates = arrays[2][row], arrays[3], table[2]
    at = find(table, service, client[0], client[1])
    if at >= 0 and not is_valid(table, backends, at, now_ns):
        remove(table, backends, at)
        at = MISS
    if at < 0:
        chosen = scheduler.pick(arrays, row, client[0], client[1], client[2])
        if chosen < 0:
            return chosen, at
        at = _insert(table, arrays, service, client, now_ns)
        if at < 0:
            return chosen, at
        templates[at]["backend"] = chosen
        templates[at]["backend_generation"] = int(backends[chosen]["generation"])
        backend.hold(backends, chosen)
    template = templates[at]
    template["expires_ns"] = now_ns + int(service["timeout_ns"])
    template["controls"] = int(template["controls"]) + 1
    return int(template["backend"]), at


@kernel
def let_go(table: Any, row: int, generation: int, now_ns: int) -> None:
    """Count the end of a connection that a template controlled; nothing if the row is another client's by now."""
    template = table[2][row]
    if int(template["generation"]) != generation:
        return
    template["controls"] = int(template["controls"]) - 1
    late = now_ns - int(template["expires_ns"])
    if int(template["controls"]) == 0 and late >= 0:
        # It was looked at when it expired and every minute since; the next time it goes.
        template["expires_ns"] = now_ns - late % POSTPONED_NS + POSTPONED_NS


class TemplateTable:
    """Owns the templates of all services. The arrays never move.

    Attributes:
        templates: ``(capacity,)`` of ``TEMPLATE``.
        arrays: ``(slots, key, templates, free, state)``, what the kernels take.
    """

    def __init__(self, capacity: int = 1 << 18, expire_quiescent: bool = True, seed: int | None = None) -> None:
        self.capacity = capacity
        self.templates: Array = np.zeros(capacity, TEMPLATE)
        slots = np.zeros(1 << max(6, (capacity * _SPARE - 1).bit_length()), np.int32)
        self.state: Array = np.zeros(8, np.int64)
        self.state[QUIESCENT] = int(expire_quiescent)
        free = np.arange(capacity, dtype=np.int32)[::-1].copy()
        self.arrays = (slots, make_key(seed), self.templates, free, self.state)

    def __len__(self) -> int:
        return int(self.state[USED])

    @property
    def refused(self) -> int:
        """Connections to persistent services that got no template, because the table was full."""
        return int(self.state[REFUSED])

    def items(self) -> Iterator[tuple[int, Address]]:
        """Yield ``(row, masked address of the client)`` of every template."""
        for row in np.flatnonzero(self.templates["scope"]).tolist():
            record = self.templates[row]
            yield row, to_address(record["hi"], record["lo"])
