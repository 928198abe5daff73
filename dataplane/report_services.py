"""Services, endpoints and persistence templates as ``show`` lists them, in pages as ``report_flows`` does.

The tables know addresses and numbers; the service's name, its type and an endpoint's node come from the desired state,
by the id that the balancer keeps for each row.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np

from dataplane.balance import Balancer
from dataplane.control.query import Query
from dataplane.control.snapshot import Balancing, EndpointRow, ServiceRow, ServiceTotals, TemplateRow, endpoint_text
from dataplane.control.state import DesiredState, Service
from dataplane.jit import Array
from dataplane.tables.address import V4_BITS, Address, to_address
from dataplane.tables.backend import AVAILABLE, OVERLOAD
from dataplane.tables.persistence import TemplateTable
from dataplane.tables.policy import LOCAL, NO_LOCAL, Exposure, PolicyTable
from dataplane.tables.scheduler import FALLBACK, ONE_PACKET, PERSISTENT, PORT, Scheduler
from dataplane.tables.service import ServiceTable

PAGE = 64  # rows that are made in one step, at 10 us each
CHUNK = 8192  # templates that are looked at in one step
TOTALS = 250  # ports of services that metrics are made of: 2 ms for a scrape, and a bounded number of time series

_PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP"}
_NAMELESS = ("", "", "", "")
_SECOND = 1_000_000_000


class Pages:
    """Rows in pages, filtered by a query's limit; see ``control.api.Listing``.

    Args:
        pages: All that pass the other filters.
        limit: Rows that are given, 0: all.
    """

    def __init__(self, pages: Iterator[Sequence[Any]], limit: int) -> None:
        self._pages = pages
        self._limit = limit
        self.matched = 0

    def __iter__(self) -> Iterator[Sequence[Any]]:
        for page in self._pages:
            given, self.matched = self.matched, self.matched + len(page)
            yield page[: max(0, self._limit - given)] if self._limit else page


class ServiceReport:
    """Reads the tables of services.

    Args:
        services: The service table.
        policies: What kube-proxy's rules add to its rows.
        templates: The persistence templates.
        balancer: Knows what is in the service table's rows.
        state: Returns the desired state, None before there is one.
        clock: Nanoseconds, the engine's.
    """

    def __init__(
        self,
        services: ServiceTable,
        policies: PolicyTable,
        templates: TemplateTable,
        balancer: Balancer,
        state: Callable[[], DesiredState | None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        self._table = services
        self._policies = policies
        self._templates = templates
        self._balancer = balancer
        self._names = balancer.names
        self._state = state
        self._clock = clock

    def services(self, query: Query) -> Pages:
        """Return the virtual services that pass a query, the oldest first."""
        return Pages(self._services(query), query.limit)

    def endpoints(self, query: Query) -> Pages:
        """Return the backends of the virtual services that pass a query."""
        return Pages(self._endpoints(query), query.limit)

    def persistence(self, query: Query) -> Pages:
        """Return the templates that pass a query."""
        return Pages(self._persistence(query), query.limit)

    def balancing(self) -> Balancing:
        """Return the tables as a whole."""
        templates, (totals, left_off) = self._templates, self._totals()
        return {
            "services": len(self._table),
            "endpoints": int(np.count_nonzero(self._table.backends["flags"] & AVAILABLE)),
            "templates": len(templates),
            "templates_limit": templates.capacity,
            "templates_refused": templates.refused,
            "no_local_endpoints": self._no_local(),
            "last_sync": self._balancer.last_sync,
            "totals": totals,
            "left_off": left_off,
        }

    def _totals(self) -> tuple[list[ServiceTotals], int]:
        """Sum up the addresses of each port; return the oldest ports, and how many addresses of others there are."""
        oldest = set(islice(dict.fromkeys(name[:2] for name in self._names.values()), TOTALS))
        rows = [row for row, name in self._names.items() if name[:2] in oldest]
        ports: dict[tuple[str, str, str], list[int]] = {}
        for row in rows:
            protocol = _PROTOCOLS[int(self._table.services[row]["scope"]) >> 16]
            ports.setdefault((*self._names[row][:2], protocol), []).append(row)
        sums = _Sums(self._table)
        return [self._total(port, members, sums) for port, members in ports.items()], len(self._names) - len(rows)

    def _total(self, key: tuple[str, str, str], rows: list[int], sums: "_Sums") -> ServiceTotals:
        records = self._table.services[rows]
        return {
            "service": key[0],
            "port_name": key[1],
            "protocol": key[2],
            "connections": int(records["connections"].sum()),
            "active": sum(sums.get("active", row) for row in rows),
            "inactive": sum(sums.get("inactive", row) for row in rows),
            "in_packets": int(records["in_packets"].sum()),
            "in_bytes": int(records["in_bytes"].sum()),
            "out_packets": int(records["out_packets"].sum()),
            "out_bytes": int(records["out_bytes"].sum()),
        }

    def _no_local(self) -> dict[str, int]:
        """Count Kubernetes services, not addresses, by the traffic policy that leaves them without a backend."""
        lacking: dict[str, set[str]] = {"internal": set(), "external": set()}
        flags, exposures = self._policies.policies["flags"], self._policies.policies["exposure"]
        for row in np.flatnonzero((flags & (LOCAL | NO_LOCAL)) == LOCAL | NO_LOCAL).tolist():
            if row in self._names:
                policy = "internal" if int(exposures[row]) == Exposure.CLUSTER_IP else "external"
                lacking[policy].add(self._names[row][0])
        return {policy: len(services) for policy, services in lacking.items()}

    # --- rows --------------------------------------------------------------------------------------------------------

    def _rows(self, query: Query) -> Iterator[list[int]]:
        """Yield the rows of the services that pass, some at a time; they are in the table when they are yielded."""
        rows = self._table.rows()
        for at in range(0, len(rows), PAGE):
            yield [row for row in rows[at : at + PAGE] if self._passes(row, query)]

    def _passes(self, row: int, query: Query) -> bool:
        record = self._table.services[row]
        scope = int(record["scope"])
        return (
            scope != 0
            and query.protocol in (None, scope >> 16)
            and query.dport in (None, scope & 0xFFFF)
            and query.service in ("", self._name(row)[0])
            and (query.dst is None or to_address(record["hi"], record["lo"]) in query.dst)
        )

    def _name(self, row: int) -> tuple[str, str, str, str]:
        return self._names.get(row, _NAMELESS)

    def _known(self) -> dict[str, Service]:
        state = self._state()
        return {service.id: service for service in state.services} if state else {}

    def _own_pods(self) -> dict[Address, str]:
        """Return this node's name by the addresses of its pods; an endpoint on it need not say where it is."""
        state = self._state()
        return {address: state.node.name for pod in state.pods for address in pod.addresses} if state else {}

    def _services(self, query: Query) -> Iterator[list[ServiceRow]]:
        known = self._known()
        yield []
        sums = _Sums(self._table)
        yield []
        for rows in self._rows(query):
            yield [self._service(row, known, sums) for row in rows]
        state = self._state()
        yield list(_pending(state, query)) if state else []

    def _service(self, row: int, known: Mapping[str, Service], sums: "_Sums") -> ServiceRow:
        record, (name, port_name, kind, origin) = self._table.services[row], self._name(row)
        address, scope, flags = to_address(record["hi"], record["lo"]), int(record["scope"]), int(record["flags"])
        mask = int(record["mask_hi"]) << 64 | int(record["mask_lo"])
        scheduler = Scheduler(int(record["scheduler"])).name.lower()
        return {
            "service": name,
            "port_name": port_name,
            "type": known[name].type if name in known else "",
            "kind": kind,
            "address": str(address),
            "port": scope & 0xFFFF,
            "protocol": _PROTOCOLS[scope >> 16],
            "scheduler": scheduler,
            "scheduler_flags": _flags(scheduler, flags),
            "affinity_s": int(record["timeout_ns"]) // _SECOND if flags & PERSISTENT else 0,
            "mask_bits": max(0, mask.bit_count() - (V4_BITS if address.version == 4 else 0)),
            "ready": sums.get("ready", row),
            "total": int(record["count"]),
            "active": sums.get("active", row),
            "inactive": sums.get("inactive", row),
            "origin": origin,
            "connections": int(record["connections"]),
            "in_packets": int(record["in_packets"]),
            "in_bytes": int(record["in_bytes"]),
            "out_packets": int(record["out_packets"]),
            "out_bytes": int(record["out_bytes"]),
            "reason": "",
        }

    def _endpoints(self, query: Query) -> Iterator[list[EndpointRow]]:
        known, here = self._known(), self._own_pods()
        yield []
        for rows in self._rows(query):
            for row in rows:
                if int(self._table.services[row]["scope"]) == 0:
                    continue  # deleted since the page before
                nodes = here | _nodes(known.get(self._name(row)[0]))
                members = self._members(row)
                for at in range(0, len(members), PAGE):
                    page = members[at : at + PAGE]
                    yield [self._endpoint(row, each, nodes) for each in page if self._is_member(row, each)]
            yield []

    def _members(self, row: int) -> list[int]:
        """Return a service's list, the newest first; walked as plain numbers, since a service may have thousands."""
        following, members = self._table.backends["next"], []
        at = int(self._table.services[row]["head"])
        while at >= 0:
            members.append(at)
            at = int(following[at])
        return members

    def _is_member(self, row: int, at: int) -> bool:
        record = self._table.backends[at]
        return bool(record["flags"] & AVAILABLE) and int(record["service"]) == row

    def _endpoint(self, row: int, at: int, nodes: Mapping[Address, str]) -> EndpointRow:
        service, record = self._table.services[row], self._table.backends[at]
        name, port_name, kind, _ = self._name(row)
        address, scope = to_address(record["hi"], record["lo"]), int(service["scope"])
        return {
            "service": name,
            "port_name": port_name,
            "kind": kind,
            "protocol": _PROTOCOLS[scope >> 16],
            "virtual_address": str(to_address(service["hi"], service["lo"])),
            "virtual_port": scope & 0xFFFF,
            "address": str(address),
            "port": int(record["port"]),
            "weight": int(record["weight"]),
            "state": _condition(record),
            "node": nodes.get(address, ""),
            "active": int(record["active"]),
            "inactive": int(record["inactive"]),
            "persistent": int(record["persistent"]),
            "connections": int(record["connections"]),
            "in_packets": int(record["in_packets"]),
            "in_bytes": int(record["in_bytes"]),
            "out_packets": int(record["out_packets"]),
            "out_bytes": int(record["out_bytes"]),
        }

    # --- templates ---------------------------------------------------------------------------------------------------

    def _persistence(self, query: Query) -> Iterator[list[TemplateRow]]:
        templates = self._templates.templates
        for start in range(0, len(templates), CHUNK):
            rows = (np.flatnonzero(templates["scope"][start : start + CHUNK]) + start).tolist()
            yield []
            for at in range(0, len(rows), PAGE):
                now = self._clock()
                made = (self._template(row, query, now) for row in rows[at : at + PAGE])
                yield [row for row in made if row is not None]

    def _template(self, row: int, query: Query, now: int) -> TemplateRow | None:
        record = self._templates.templates[row]
        scope, left = int(record["scope"]), int(record["expires_ns"]) - now
        if scope == 0 or (left <= 0 and int(record["controls"]) == 0):
            return None
        client, virtual = to_address(record["hi"], record["lo"]), to_address(record["vip_hi"], record["vip_lo"])
        service = self._table.find(scope >> 16, virtual, scope & 0xFFFF)
        name, port_name, _, _ = self._name(service)
        passes = (
            query.protocol in (None, scope >> 16)
            and query.dport in (None, scope & 0xFFFF)
            and query.service in ("", name)
            and (query.src is None or client in query.src)
            and (query.dst is None or virtual in query.dst)
        )
        if not passes:
            return None
        return {
            "client": str(client),
            "service": name,
            "port_name": port_name,
            "protocol": _PROTOCOLS[scope >> 16],
            "virtual_address": str(virtual),
            "virtual_port": scope & 0xFFFF,
            "backend": self._backend(int(record["backend"]), int(record["backend_generation"])),
            "timeout_s": max(0, left) // _SECOND,
            "controls": int(record["controls"]),
        }

    def _backend(self, at: int, generation: int) -> str:
        record = self._table.backends[at]
        if int(record["generation"]) != generation:
            return "-"
        return endpoint_text(str(to_address(record["hi"], record["lo"])), int(record["port"]))


class _Sums:
    """Sums over the backends of each service, made in one go: 2 ms for 100,000 of them."""

    def __init__(self, table: ServiceTable) -> None:
        backends, size = table.backends, len(table.services)
        listed = (backends["flags"] & AVAILABLE) != 0
        rows = backends["service"][listed]
        self._of: dict[str, Array] = {
            "ready": np.bincount(rows, backends["weight"][listed] > 0, size),
            "active": np.bincount(rows, backends["active"][listed], size),
            "inactive": np.bincount(rows, backends["inactive"][listed], size),
        }

    def get(self, column: str, row: int) -> int:
        return int(self._of[column][row])


def _pending(state: DesiredState, query: Query) -> Iterator[ServiceRow]:
    """Yield a row for each port of a service that waits for a load balancer's address."""
    for service in state.services if state.refused and query.dst is None else ():
        if service.id not in state.refused or query.service not in ("", service.id):
            continue
        for port in service.ports:
            number = next(number for number, name in _PROTOCOLS.items() if name == port.protocol)
            if query.protocol not in (None, number) or query.dport not in (None, port.port):
                continue
            yield {
                "service": service.id,
                "port_name": port.name,
                "type": service.type,
                "kind": "load-balancer-ip",
                "address": "",
                "port": port.port,
                "protocol": port.protocol,
                "scheduler": service.scheduler or state.balancing.scheduler,
                "scheduler_flags": sorted(service.scheduler_flags),
                "affinity_s": int(service.affinity_seconds),
                "mask_bits": 0,
                "ready": 0,
                "total": 0,
                "active": 0,
                "inactive": 0,
                "origin": service.origin,
                "connections": 0,
                "in_packets": 0,
                "in_bytes": 0,
                "out_packets": 0,
                "out_bytes": 0,
                "reason": state.refused[service.id],
            }


def _nodes(service: Service | None) -> dict[Address, str]:
    return {each.address: each.node for each in service.endpoints if each.node} if service else {}


def _flags(scheduler: str, flags: int) -> list[str]:
    named = {f"{scheduler}-port": PORT, f"{scheduler}-fallback": FALLBACK} if scheduler in ("sh", "mh") else {}
    return [name for name, bit in (named | {"ops": ONE_PACKET}).items() if flags & bit]


def _condition(record: Any) -> Literal["ready", "draining", "overloaded"]:
    if int(record["weight"]) == 0:
        return "draining"
    return "overloaded" if int(record["flags"]) & OVERLOAD else "ready"
