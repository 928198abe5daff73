"""Services: a virtual address, port and protocol, and the list of backends that stand behind it (ip_vs's model).

Each record holds what its scheduler has to remember; the backends of all services share one array, and so do the bucket
tables of those that hash. The order of a service's list decides nearly every pick: a new destination becomes the first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dataplane.jit import Array, kernel
from dataplane.tables import backend, hashed, index, maglev, weighted
from dataplane.tables.address import Address, halves, to_address
from dataplane.tables.backend import AVAILABLE, BACKEND, NONE, OVERLOAD
from dataplane.tables.hash import Word
from dataplane.tables.hashed import BucketPool
from dataplane.tables.result import TableFullError
from dataplane.tables.rows import Rows
from dataplane.tables.scheduler import Scheduler

SERVICE = np.dtype(
    {
        "names": [
            "hi", "lo", "scope", "scheduler", "flags", "head", "count", "position", "cw", "mw", "di",
            "ring", "lightest_in", "buckets", "generation",
            "timeout_ns", "mask_hi", "mask_lo", "connections", "in_packets", "in_bytes", "out_packets", "out_bytes",
        ],
        "formats": [
            "u8", "u8", "i4", "u1", "u2", "i4", "i4", "i4", "i4", "i4", "i4",
            "i4", "i4", "i4", "i4",
            "i8", "u8", "u8", "u8", "u8", "u8", "u8", "u8",
        ],
        "offsets": [
            0, 8, 16, 20, 22, 24, 28, 32, 36, 40, 44,
            48, 52, 56, 60,
            64, 72, 80, 88, 96, 104, 112, 120,
        ],
        "itemsize": 128,
    }
)  # fmt: skip
"""One virtual service, two cache lines; the first is the scheduler's.

``scope`` is the protocol << 16 | port. ``head`` is the row of the newest of ``count`` backends. ``position`` is where
rr and wrr are, -1: before the head; ``cw``, ``mw``, ``di``, ``ring`` and ``lightest_in`` belong to ``weighted``.
``buckets`` is where those of sh, dh and mh begin. ``mask_*`` are the client's bits that a persistence template keeps,
for ``timeout_ns``.
"""

Endpoint: TypeAlias = tuple[Address, int]  # address and port
_SIZES = {Scheduler.SH: hashed.BUCKETS, Scheduler.DH: hashed.BUCKETS, Scheduler.MH: 4096}
_ALL = (1 << 128) - 1


@dataclass(frozen=True, slots=True)
class Service:
    """How a service schedules.

    Attributes:
        scheduler: Which way.
        flags: ``PERSISTENT``, ``PORT``, ``FALLBACK``, ``ONE_PACKET`` of ``scheduler``.
        timeout_ns: How long a client stays with its backend.
        client_bits: Leading bits of the client's address that make a client, counted of 128 (IPv4 /24: 120).
    """

    scheduler: Scheduler = Scheduler.RR
    flags: int = 0
    timeout_ns: int = 10_800 * 1_000_000_000
    client_bits: int = 128


@dataclass(frozen=True, slots=True)
class Destination:
    """How a service uses a backend. A threshold of 0 is none; the lower one is then 3/4 of the upper one."""

    weight: int = 1
    u_threshold: int = 0
    l_threshold: int = 0


@kernel
def find(arrays: Any, protocol: int, hi: Word, lo: Word, port: int) -> int:
    """Return the row of the service at an address and port, or -1.

    Args:
        arrays: ``ServiceTable.arrays``.
        protocol: IP protocol number.
        hi: Upper half of the address.
        lo: Lower half.
        port: The port.
    """
    return index.find(arrays[0], arrays[1], protocol << 16 | port, hi, lo)


@kernel
def connect(arrays: Any, row: int, chosen: int) -> None:
    """Count a new connection to a service and the backend that was picked for it."""
    service = arrays[2][row]
    service["connections"] = int(service["connections"]) + 1
    backend.connect(arrays[3], chosen)


@kernel
def _rebuild(arrays: Any, row: int) -> None:
    """Follow an edit of the list or of a weight, for schedulers that hash."""
    service, backends, buckets = arrays[2][row], arrays[3], arrays[4]
    if int(service["scheduler"]) == Scheduler.MH:
        maglev.build(backends, int(service["head"]), buckets, int(service["buckets"]))
    else:
        hashed.build(service, backends, buckets, int(service["scheduler"]) == Scheduler.SH)


@kernel
def _weigh(arrays: Any, row: int, order: Any, count: int) -> None:
    """Follow an edit, for wrr; ``order`` begins with the rows of the ``count`` backends above zero, heaviest first."""
    service, backends = arrays[2][row], arrays[3]
    weighted.change(service, backends)
    weighted.link(service, backends, order, count)


class _Services(Rows):
    """The services' records, found by protocol, address and port."""

    name = "service"

    def __init__(self, capacity: int, seed: int | None) -> None:
        super().__init__(SERVICE, capacity, seed)

    def find(self, protocol: int, address: Address | str, port: int) -> int:
        return self._find(protocol << 16 | port, address)

    def reserve(self, protocol: int, address: Address | str, port: int) -> int:
        return self._reserve(protocol << 16 | port, address)

    def enter(self, row: int) -> None:
        self._enter(row)

    def release(self, row: int) -> None:
        self._release(row)

    def delete(self, row: int) -> None:
        self._delete(row)

    def _release(self, row: int) -> None:
        generation = int(self.records[row]["generation"])
        super()._release(row)
        self.records[row]["generation"] = (generation + 1) & 0x7FFF_FFFF


class ServiceTable:
    """Owns services, backends and buckets, and edits them between bursts.

    Take ``arrays`` anew after every edit: backends and buckets move when they grow. Rows never move.

    Attributes:
        services: ``(capacity,)`` of ``SERVICE``.
        backends: ``(n,)`` of ``BACKEND``; a larger array after it has grown.
    """

    def __init__(
        self,
        capacity: int = 1 << 16,
        backend_limit: int = 1 << 20,
        bucket_limit: int = 1 << 26,
        seed: int | None = None,
    ) -> None:
        self._services = _Services(capacity, seed)
        self._pool = BucketPool(bucket_limit)
        self._limit = backend_limit
        self._members: dict[int, dict[Endpoint, int]] = {}
        self._trash: dict[tuple[int, Address, Endpoint], int] = {}
        self._free: list[int] = []
        self._end = 0
        self.services = self._services.records
        self.backends: Array = np.zeros(min(64, backend_limit), BACKEND)

    def __len__(self) -> int:
        return len(self._services)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """``(slots, key, services, backends, buckets)``, what the kernels take."""
        slots, key, services = self._services.arrays
        return slots, key, services, self.backends, self._pool.words

    def find(self, protocol: int, address: Address | str, port: int) -> int:
        """Return the row of a service, or -1."""
        return self._services.find(protocol, address, port)

    def rows(self) -> list[int]:
        """Return the rows of the services, oldest first."""
        return self._services.rows()

    def set(self, protocol: int, address: Address | str, port: int, service: Service) -> int:
        """Add a service without backends, or change one and keep its backends and counters; return its row.

        Another scheduler begins anew; other flags do not disturb it.

        Raises:
            TableFullError: No row or no buckets are left; nothing was changed.
        """
        row = self.find(protocol, address, port)
        if row < 0:
            row = self.stage(protocol, address, port, service)
            self.publish(row)
            return row
        if int(self.services[row]["scheduler"]) == service.scheduler:
            self._tune(row, service)
            return row
        base = self._take_buckets(service.scheduler)
        self._give_back_buckets(row)
        self._tune(row, service)
        self._begin(row, service.scheduler, base)
        return row

    def stage(self, protocol: int, address: Address | str, port: int, service: Service) -> int:
        """Make a service that no packet finds before it is published; return its row. There must be no such service.

        Raises:
            TableFullError: No row or no buckets are left; nothing was changed.
        """
        base = self._take_buckets(service.scheduler)
        try:
            row = self._services.reserve(protocol, address, port)
        except TableFullError:
            if base >= 0:
                self._pool.give_back(base, _SIZES[service.scheduler])
            raise
        self._members[row] = {}
        self.services[row]["head"] = NONE
        self._tune(row, service)
        self._begin(row, service.scheduler, base)
        return row

    def publish(self, row: int) -> None:
        """Let packets find a service that was staged.

        Raises:
            TableFullError: Its place in the index is taken; it is forgotten.
        """
        try:
            self._services.enter(row)
        except TableFullError:
            self._clear(row)
            raise

    def discard(self, row: int) -> None:
        """Forget a service that was staged."""
        self._clear(row)
        self._services.release(row)

    def _begin(self, row: int, scheduler: Scheduler, base: int) -> None:
        record = self.services[row]
        record["scheduler"], record["buckets"] = scheduler, base
        record["position"], record["cw"] = NONE, 0
        self._follow(row)

    def _tune(self, row: int, service: Service) -> None:
        record = self.services[row]
        record["flags"], record["timeout_ns"] = service.flags, service.timeout_ns
        mask = _ALL ^ (_ALL >> service.client_bits)
        record["mask_hi"], record["mask_lo"] = mask >> 64, mask & (_ALL >> 64)

    def require_room(self, services: int, backends: int, schedulers: Mapping[Scheduler, int]) -> None:
        """Find out whether so many more of each fit; ``schedulers`` counts the services that get new buckets.

        Raises:
            TableFullError: They do not.
        """
        if len(self) + services > len(self.services):
            raise TableFullError("service", len(self), len(self.services))
        used = self._end - len(self._free)
        if used + backends > self._limit:
            raise TableFullError("backend", used, self._limit)
        runs: dict[int, int] = {}
        for scheduler, count in schedulers.items():
            if size := _SIZES.get(scheduler, 0):
                runs[size] = runs.get(size, 0) + count
        self._pool.require_room(runs)

    def delete(self, row: int) -> None:
        """Forget a service; its backends go as with ``remove``.

        Raises:
            KeyError: The row is not in use.
        """
        self._clear(row)
        self._services.delete(row)

    def _clear(self, row: int) -> None:
        for address, port in list(self._members[row]):
            self._unlink(row, address, port)
        del self._members[row]
        self._give_back_buckets(row)

    def get(self, row: int) -> Service:
        """Return how a service schedules."""
        record = self.services[row]
        mask = int(record["mask_hi"]) << 64 | int(record["mask_lo"])
        return Service(
            Scheduler(int(record["scheduler"])), int(record["flags"]), int(record["timeout_ns"]), mask.bit_count()
        )

    # --- backends ----------------------------------------------------------------------------------------------------

    def add(self, row: int, address: Address, port: int, destination: Destination) -> int:
        """Put a backend at the head of a service's list, or change one that is in; return its row.

        One that was removed and still has connections comes back with its counters and flows.

        Raises:
            KeyError: There is no service in the row.
            TableFullError: No row is left; nothing was changed.
        """
        at = self._put(row, address, port, destination)
        self._follow(row)
        return at

    def fill(self, row: int, destinations: Iterable[tuple[Address, int, Destination]]) -> None:
        """Add backends one after the other, and let a scheduler that hashes see its list once only."""
        is_hashed = int(self.services[row]["buckets"]) >= 0
        for address, port, destination in destinations:
            self._put(row, address, port, destination)
            if not is_hashed:  # what wrr remembers depends on every step
                self._follow(row)
        if is_hashed:
            self._follow(row)

    def _put(self, row: int, address: Address, port: int, destination: Destination) -> int:
        members = self._members[row]
        at = members.get((address, port))
        new = at is None
        if at is None:
            at = self._revive(row, address, port)
        record = self.backends[at]
        if new or destination.weight:
            record["last_weight"] = destination.weight
        record["weight"] = destination.weight
        flags = int(record["flags"]) | AVAILABLE
        if destination.u_threshold == 0 or destination.u_threshold > int(record["u_threshold"]):
            flags &= ~OVERLOAD
        record["flags"] = flags
        record["u_threshold"], record["l_threshold"] = destination.u_threshold, destination.l_threshold
        if new:
            self._link(row, at)
            members[address, port] = at
        return at

    def remove(self, row: int, address: Address, port: int) -> None:
        """Take a backend out of a service's list.

        Raises:
            KeyError: It is not in the list.
        """
        self._unlink(row, address, port)
        self._follow(row)

    def find_backend(self, row: int, address: Address, port: int) -> int:
        """Return the row of a backend, or -1."""
        return self._members[row].get((address, port), NONE)

    def members(self, row: int) -> Iterator[tuple[int, Address, int]]:
        """Yield ``(row, address, port)`` of a service's backends in the list's order."""
        at = int(self.services[row]["head"])
        while at >= 0:
            record = self.backends[at]
            yield at, to_address(record["hi"], record["lo"]), int(record["port"])
            at = int(record["next"])

    def destination(self, at: int) -> Destination:
        """Return how a backend is used."""
        record = self.backends[at]
        return Destination(int(record["weight"]), int(record["u_threshold"]), int(record["l_threshold"]))

    def has_left(self, protocol: int, address: Address, port: int) -> bool:
        """Say whether a service that was here has left backends with connections; they come back with it."""
        scope = protocol << 16 | port
        return any(key[:2] == (scope, address) for key in self._trash)

    def collect(self) -> int:
        """Free the rows of removed backends whose last connection has ended; return how many."""
        idle = [key for key, at in self._trash.items() if not self._is_held(at)]
        for key in idle:
            self._free_backend(self._trash.pop(key))
        return len(idle)

    def _is_held(self, at: int) -> bool:
        record = self.backends[at]
        return bool(record["active"] or record["inactive"] or record["persistent"])

    def _trash_key(self, row: int, address: Address, port: int) -> tuple[int, Address, Endpoint]:
        record = self.services[row]
        return int(record["scope"]), to_address(record["hi"], record["lo"]), (address, port)

    def _revive(self, row: int, address: Address, port: int) -> int:
        """Return the row that a removed backend has kept, or a new one."""
        at = self._trash.pop(self._trash_key(row, address, port), None)
        if at is None:
            at = self._take_backend()
            self.backends[at]["hi"], self.backends[at]["lo"] = halves(address)
            self.backends[at]["port"] = port
        self.backends[at]["service"] = row
        return at

    def _take_backend(self) -> int:
        if not self._free and self._end == self._limit and not self.collect():
            raise TableFullError("backend", self._end, self._limit)
        if self._free:
            return self._free.pop()
        if self._end == len(self.backends):
            # Not ``concatenate``: it packs a record that has padding, and no kernel was made for that type.
            larger = np.zeros(min(2 * self._end, self._limit), BACKEND)
            larger[: self._end] = self.backends
            self.backends = larger
        self._end += 1
        return self._end - 1

    def _free_backend(self, at: int) -> None:
        generation = int(self.backends[at]["generation"])
        self.backends[at] = np.zeros((), BACKEND)
        self.backends[at]["generation"] = (generation + 1) & 0x7FFF_FFFF
        self._free.append(at)

    def _link(self, row: int, at: int) -> None:
        service, head = self.services[row], int(self.services[row]["head"])
        self.backends[at]["next"], self.backends[at]["previous"] = head, NONE
        if head >= 0:
            self.backends[head]["previous"] = at
        service["head"], service["count"] = at, int(service["count"]) + 1

    def _unlink(self, row: int, address: Address, port: int) -> None:
        at = self._members[row].pop((address, port))
        service, record = self.services[row], self.backends[at]
        before, after = int(record["previous"]), int(record["next"])
        if before >= 0:
            self.backends[before]["next"] = after
        else:
            service["head"] = after
        if after >= 0:
            self.backends[after]["previous"] = before
        service["count"] = int(service["count"]) - 1
        if int(service["position"]) == at:  # round robin goes on with the one that followed
            service["position"] = before
        if self._is_held(at):
            record["flags"] = int(record["flags"]) & ~AVAILABLE
            self._trash[self._trash_key(row, address, port)] = at
            return
        self._free_backend(at)

    # --- schedulers --------------------------------------------------------------------------------------------------

    def _follow(self, row: int) -> None:
        """Let a service's scheduler see its list anew."""
        service = self.services[row]
        if int(service["scheduler"]) == Scheduler.WRR:
            rows = np.array(list(self._members[row].values()), np.int64)
            weights = self.backends["weight"][rows]
            _weigh(self.arrays, row, rows[np.argsort(-weights, kind="stable")], int(np.count_nonzero(weights)))
        elif int(service["buckets"]) >= 0:
            _rebuild(self.arrays, row)

    def _take_buckets(self, scheduler: Scheduler) -> int:
        size = _SIZES.get(scheduler, 0)
        return self._pool.take(size) if size else NONE

    def _give_back_buckets(self, row: int) -> None:
        if int(self.services[row]["buckets"]) >= 0:
            self._pool.give_back(
                int(self.services[row]["buckets"]), _SIZES[Scheduler(int(self.services[row]["scheduler"]))]
            )
