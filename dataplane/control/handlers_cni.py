"""The control API's answer to ``dataplane-cni``: one request, one command. The file needs aiohttp, as ``handlers``."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from aiohttp import web

from dataplane.cni import DECODING_FAILURE, CniError

_LARGEST = 16 << 20  # a GC lists every container of the machine, 100 bytes each


class Containers(Protocol):
    """What carries out the commands."""

    async def serve(self, environment: Mapping[str, str], config: Any) -> dict[str, Any]:
        """Carry out one command; return what the plugin is answered.

        Raises:
            CniError: The runtime is to be told.
        """
        ...


def cni_routes(containers: Containers) -> Callable[[web.Application], None]:
    """Return what adds ``POST /v1/cni`` to the application of the control socket."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            environment, config = _message(await request.clone(client_max_size=_LARGEST).read())
            return web.json_response(await containers.serve(environment, config))
        except CniError as error:
            failure = {"code": error.code, "msg": str(error), "details": error.details}
            return web.json_response(failure, status=422)

    def add(app: web.Application) -> None:
        app.router.add_post("/v1/cni", answer)

    return add


def _message(content: bytes) -> tuple[dict[str, str], Any]:
    try:
        body = json.loads(content.decode())
        environment, config = body["env"], body["config"]
        if all(isinstance(value, str) for value in environment.values()):
            return environment, config
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise CniError(DECODING_FAILURE, 'the body is not {"env": {...}, "config": {...}}')
