"""The health checks of services with ``healthCheckNodePort``: does this node have an endpoint?

A load balancer before the nodes asks each of them and sends a service's traffic only to those that answer 200
(kube-proxy: ``pkg/proxy/healthcheck/service_health.go``). One listener per service and node address; nothing is
imported or opened for a node without such services.
"""

import asyncio
import importlib
import json
import logging
import socket
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

from dataplane.control.services import Surroundings, local_ready
from dataplane.control.state import Address, DesiredState

if TYPE_CHECKING:
    from aiohttp import web

_IP_FREEBIND = 15  # linux/in.h: the node's address may be on an interface that is not up yet
_GRACE_S = 1.0

_Place: TypeAlias = tuple[Address, int]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Health:
    """What is answered for one service."""

    namespace: str
    name: str
    endpoints: int

    @property
    def service(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def status(self) -> int:
        """200 with an endpoint on this node, else 503: Service Unavailable."""
        return 200 if self.endpoints else 503

    @property
    def body(self) -> str:
        """The JSON of kube-proxy."""
        service = {"namespace": self.namespace, "name": self.name}
        answer = {"service": service, "localEndpoints": self.endpoints, "serviceProxyHealthy": True}
        return json.dumps(answer, indent="\t")


_GONE = Health("", "", 0)  # of a request that was still under way when its service went


def healths(state: DesiredState) -> dict[int, Health]:
    """Return what to answer on which port."""
    around = Surroundings.of(state)
    return {
        service.health_check_node_port: Health(service.namespace, service.name, local_ready(service, around))
        for service in state.services
        if service.health_check_node_port
    }


class HealthServer:
    """The listeners, and the answers as of the last ``update``.

    A port that another process has is tried again with every update, and said once.
    """

    def __init__(self) -> None:
        self._answers: dict[int, Health] = {}
        self._runners: dict[_Place, web.ServerRunner] = {}
        self._refused: set[_Place] = set()

    @property
    def ports(self) -> list[int]:
        """The ports that are listened on."""
        return sorted({port for _, port in self._runners})

    async def update(self, state: DesiredState) -> None:
        """Follow a new state: open and close listeners, and answer for the endpoints that there are now."""
        self._answers = healths(state)
        wanted = set(product(Surroundings.of(state).node_port_addresses, self._answers))
        for place in self._runners.keys() - wanted:
            await self._runners.pop(place).cleanup()
        self._refused &= wanted
        for place in sorted(wanted - self._runners.keys(), key=str):
            await self._open(place)

    async def close(self) -> None:
        """Close all listeners."""
        while self._runners:
            await self._runners.popitem()[1].cleanup()

    async def _open(self, place: _Place) -> None:
        await asyncio.to_thread(importlib.import_module, "aiohttp.web")  # packets flow meanwhile
        from aiohttp import web

        address, port = place

        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            health = self._answers.get(port, _GONE)
            headers = {"X-Content-Type-Options": "nosniff", "X-Load-Balancing-Endpoint-Weight": str(health.endpoints)}
            return web.Response(
                status=health.status, text=health.body, content_type="application/json", headers=headers
            )

        runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=_GRACE_S)
        await runner.setup()
        try:
            await web.SockSite(runner, _listen(address, port)).start()
        except OSError as error:
            await runner.cleanup()
            if place not in self._refused:
                self._refused.add(place)
                text = "health check cannot listen service=%s address=%s:%d: %s"
                log.warning(text, self._answers[port].service, address, port, error.strerror)
            return
        self._refused.discard(place)
        self._runners[place] = runner


def _listen(address: Address, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        listener.bind((str(address), port))
    except BaseException:
        listener.close()
        raise
    return listener
