"""The control API's answer to ``dataplane dns query``. The file needs aiohttp, as ``handlers``."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from aiohttp import web

from dataplane.control.query import QueryError

_WORDS = {"name", "type", "namespace"}


class Names(Protocol):
    """What knows the names."""

    async def explain(self, name: str, kind: str, namespace: str) -> Mapping[str, Any]:
        """Return ``snapshot_dns.DnsAnswer``.

        Raises:
            ValueError: That is no name, or no type.
        """
        ...


def dns_routes(names: Names) -> Callable[[web.Application], None]:
    """Return what adds ``GET /v1/dns/query`` to the application of the control socket."""

    async def answer(request: web.Request) -> web.StreamResponse:
        words = dict(request.query)
        if words.keys() - _WORDS or not words.get("name"):
            raise QueryError("expected name=NAME and, if need be, type=TYPE and namespace=NAMESPACE")
        try:
            found = await names.explain(words["name"], words.get("type", "A"), words.get("namespace", "default"))
        except ValueError as error:
            raise QueryError(str(error)) from None
        return web.json_response(found)

    def add(app: web.Application) -> None:
        app.router.add_get("/v1/dns/query", answer)

    return add
