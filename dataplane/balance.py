"""Carrying out edits of virtual servers: rows of the service table, and of the policies beside them.

A destination that goes is treated gracefully, as kube-proxy does (``pkg/proxy/ipvs/graceful_termination.go``): one with
TCP connections gets weight 0 and is deleted when the last of them has ended or its time is over; looked at every second
instead of every minute. Others are deleted at once: a UDP flow would stay for as long as it is used. When it returns
meanwhile it is deleted and added again, so it comes back with its connections (ip_vs's trash), as the newest.

The flows of a destination that is deleted need no work here: they remember its generation, and their next packet is
scheduled anew.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from dataplane.control import edits as plan
from dataplane.control.edits import Edit
from dataplane.control.services import Destination, ServerKey, VirtualServer
from dataplane.tables import service as table
from dataplane.tables.address import Address
from dataplane.tables.policy import LOCAL, NO_LOCAL, Exposure, PolicyTable
from dataplane.tables.scheduler import FALLBACK, PERSISTENT, PORT, Scheduler

PROTOCOLS = {"TCP": 6, "UDP": 17}
_EXPOSURES = {
    "cluster-ip": Exposure.CLUSTER_IP,
    "external-ip": Exposure.EXTERNAL_IP,
    "load-balancer-ip": Exposure.LOAD_BALANCER,
    "node-port": Exposure.NODE_PORT,
}
_FLAGS = {"sh-port": PORT, "mh-port": PORT, "sh-fallback": FALLBACK, "mh-fallback": FALLBACK}
_SECOND = 1_000_000_000

_Backend: TypeAlias = tuple[Address, int]

log = logging.getLogger(__name__)


class Balancer:
    """Owns what is known of the service table's rows besides the numbers in them.

    Attributes:
        names: What is in a row: the service's id, the port's name, the kind of address, and where it comes from.
        last_sync: When an edit was last carried out, seconds since the epoch; 0: never.
    """

    def __init__(self, services: table.ServiceTable, policies: PolicyTable) -> None:
        self._table = services
        self._policies = policies
        self._rows: dict[ServerKey, int] = {}
        self._servers: dict[int, VirtualServer] = {}
        self._leaving: dict[ServerKey, dict[_Backend, int]] = {}  # until when; 0: until it is idle
        self._staged: dict[ServerKey, int] = {}
        self._news: list[tuple[Any, ...]] = []
        self.names: dict[int, tuple[str, str, str, str]] = {}
        self.last_sync = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def server(self, row: int) -> VirtualServer | None:
        """Return what is in a row; its destinations are those that it was made with."""
        return self._servers.get(row)

    def is_leaving(self, key: ServerKey, address: Address, port: int) -> bool:
        """Say whether a destination is on its way out."""
        return (address, port) in self._leaving.get(key, ())

    # --- before the edits ---------------------------------------------------------------------------------------------

    def stage(self, server: VirtualServer) -> None:
        """Make a virtual server that no packet finds yet, so that to add it afterwards takes a moment only.

        Not one that was here before and has flows: they would find their backends.
        """
        protocol, address, port = server.key
        if self._table.has_left(PROTOCOLS[protocol], address, port):
            return
        row = self._table.stage(PROTOCOLS[protocol], address, port, _scheduling(server))
        self._staged[server.key] = row
        self._furnish(row, server)

    def discard(self) -> None:
        """Forget what was staged."""
        while self._staged:
            row = self._staged.popitem()[1]
            self._table.discard(row)
            self._policies.clear(row)

    # --- edits -------------------------------------------------------------------------------------------------------

    def require_room(self, edits: Iterable[Edit]) -> None:
        """Find out before anything is changed whether all edits can be carried out.

        Raises:
            TableFullError: There would be more virtual servers, destinations or buckets than there is room for.
        """
        services = backends = 0
        schedulers: Counter[Scheduler] = Counter()
        for edit in edits:
            match edit:
                case plan.AddServer(server):
                    services, backends = services + 1, backends + len(server.destinations)
                    schedulers[_scheduler(server)] += 1
                case plan.RemoveServer(server):
                    row = self._rows[server.key]
                    services, backends = services - 1, backends - self._idle(row)
                    schedulers[_scheduler(server)] -= 1
                case plan.ChangeServer(old, new) if old.scheduler != new.scheduler:
                    schedulers[_scheduler(new)] += 1  # before the old ones are given back
                case plan.AddDestination():
                    backends += 1
                case plan.RemoveDestination(server, (address, port, _)):
                    backends -= self._is_idle(self._rows[server.key], address, port)
        self._table.require_room(services, backends, schedulers)

    def _idle(self, row: int) -> int:
        """Count the destinations whose rows are free at once when their server goes."""
        return sum(self._is_idle(row, address, port) for _, address, port in self._table.members(row))

    def commit(self, edit: Edit, now: int) -> bool:
        """Carry out an edit if it is about services; return whether it is."""
        match edit:
            case plan.AddServer(server):
                self._add_server(server)
            case plan.ChangeServer(old, new):
                self._change_server(old, new)
            case plan.RemoveServer(server):
                self._remove_server(server.key)
                self._say("service removed name=%s vip=%s", server.service, server.key)
            case plan.AddDestination(server, destination):
                self._add(server.key, destination)
                self._say("endpoint added service=%s vip=%s to=%s", server.service, server.key, _text(destination))
            case plan.ChangeDestination(server, destination):
                self._weigh(server.key, destination)
                self._say(
                    "endpoint changed service=%s vip=%s to=%s weight=%d",
                    server.service, server.key, _text(destination), destination.weight,
                )  # fmt: skip
            case plan.RemoveDestination(server, destination):
                self._retire(server, destination, now)
            case _:
                return False
        self.last_sync = time.time()
        return True

    def _add_server(self, server: VirtualServer) -> None:
        row = self._staged.pop(server.key, None)
        if row is None:
            protocol, address, port = server.key
            row = self._table.set(PROTOCOLS[protocol], address, port, _scheduling(server))
            self._furnish(row, server)
        else:
            self._table.publish(row)
        self._enter(row, server)
        count = len(server.destinations)
        self._say("service added name=%s vip=%s backends=%d", server.service, server.key, count)

    def _furnish(self, row: int, server: VirtualServer) -> None:
        self._set_policy(row, server)
        self._table.fill(
            row, ((each.address, each.port, table.Destination(each.weight)) for each in server.destinations)
        )

    def _set_policy(self, row: int, server: VirtualServer) -> None:
        flags = server.local * LOCAL | server.no_local * NO_LOCAL
        self._policies.set(row, _EXPOSURES[server.kind], flags, server.ranges or None)

    def _enter(self, row: int, server: VirtualServer) -> None:
        self._rows[server.key], self._servers[row] = row, server
        self.names[row] = (server.service, server.port_name, server.kind, server.origin)

    def _change_server(self, old: VirtualServer, new: VirtualServer) -> None:
        row = self._rows[new.key]
        self._table.set(PROTOCOLS[new.key.protocol], new.key.address, new.key.port, _scheduling(new))
        self._set_policy(row, new)
        self._enter(row, new)
        if new.scheduler == "mh" != old.scheduler:
            for _, address, port in list(self._table.members(row)):
                if self._weight(row, address, port) == 0:
                    self._quiesce(row, address, port)
        self._say("service changed name=%s vip=%s scheduler=%s", new.service, new.key, new.scheduler)

    def _remove_server(self, key: ServerKey) -> None:
        row = self._rows.pop(key)
        self._leaving.pop(key, None)
        self._table.delete(row)
        self._policies.clear(row)
        del self._servers[row], self.names[row]

    def _say(self, *words: Any) -> None:
        self._news.append(words)

    def news(self) -> Iterator[None]:
        """Log what was carried out, a line at each step: ten thousand take half a second, while packets flow."""
        news, self._news = self._news, []
        for words in news:
            log.info(*words)
            yield

    # --- destinations ------------------------------------------------------------------------------------------------

    def _add(self, key: ServerKey, destination: Destination) -> None:
        row, (address, port, weight) = self._rows[key], destination
        if self._leaving.get(key, {}).pop((address, port), None) is not None:
            self._table.remove(row, address, port)
        self._table.add(row, address, port, table.Destination(weight))

    def _weigh(self, key: ServerKey, destination: Destination) -> None:
        row, (address, port, weight) = self._rows[key], destination
        if weight == 0:
            self._quiesce(row, address, port)
            return
        self._table.add(row, address, port, table.Destination(weight))

    def _quiesce(self, row: int, address: Address, port: int) -> None:
        """Give a destination no new connections.

        Maglev keeps the buckets of one whose weight becomes 0, and refuses the clients that fall into them; one that is
        added with weight 0 has none. So it goes and comes back at once, with its connections.
        """
        if int(self._table.services[row]["scheduler"]) == Scheduler.MH:
            self._table.remove(row, address, port)
        self._table.add(row, address, port, table.Destination(0))

    def _retire(self, server: VirtualServer, destination: Destination, now: int) -> None:
        key, row = server.key, self._rows[server.key]
        address, port, _ = destination
        open_now = self._connections(row, address, port)
        if key.protocol == "TCP" and open_now:
            self._quiesce(row, address, port)
            until = now + int(server.drain_seconds * _SECOND) if server.drain_seconds else 0
            self._leaving.setdefault(key, {})[address, port] = until
        else:
            self._table.remove(row, address, port)
        to, drains = _text(destination), open_now if key.protocol == "TCP" else 0
        self._say("endpoint removed service=%s vip=%s to=%s draining=%d", server.service, key, to, drains)

    def _connections(self, row: int, address: Address, port: int) -> int:
        record = self._table.backends[self._table.find_backend(row, address, port)]
        return int(record["active"]) + int(record["inactive"])

    def _is_idle(self, row: int, address: Address, port: int) -> bool:
        record = self._table.backends[self._table.find_backend(row, address, port)]
        return not (record["active"] or record["inactive"] or record["persistent"])

    def _weight(self, row: int, address: Address, port: int) -> int:
        return int(self._table.backends[self._table.find_backend(row, address, port)]["weight"])

    # --- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: int) -> None:
        """Delete the destinations that have no connections any more, or had their time."""
        for key, leaving in list(self._leaving.items()):
            row = self._rows[key]
            for (address, port), until in list(leaving.items()):
                if self._connections(row, address, port) and not 0 < until <= now:
                    continue
                self._table.remove(row, address, port)
                del leaving[address, port]
            if not leaving:
                del self._leaving[key]
        self._table.collect()


def _scheduler(server: VirtualServer) -> Scheduler:
    return Scheduler[server.scheduler.upper()]


def _scheduling(server: VirtualServer) -> table.Service:
    scheduler = _scheduler(server)
    flags = sum({_FLAGS[flag] for flag in server.flags})
    if not server.affinity_seconds:
        return table.Service(scheduler, flags)
    return table.Service(scheduler, flags | PERSISTENT, int(server.affinity_seconds * _SECOND))


def _text(destination: Destination) -> str:
    return f"{destination.address}:{destination.port}"
