"""What the control API answers. The only file that needs aiohttp; ``api.start`` imports it when packets flow."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from dataplane.control.api import Backend
from dataplane.control.snapshot import KINDS, Kind

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)


def control_app(backend: Backend) -> web.Application:
    """Make the application of the unix socket."""
    app = web.Application(middlewares=[errors_as_json])
    app.router.add_routes([web.get(f"/v1/{kind}", _show(backend, kind)) for kind in KINDS])
    app.router.add_routes([web.post("/v1/reload", _reload(backend)), web.get("/metrics", _metrics(backend))])
    return app


def metrics_app(backend: Backend) -> web.Application:
    """Make the application of the TCP port: nothing but ``/metrics``."""
    app = web.Application(middlewares=[errors_as_json])
    app.router.add_get("/metrics", _metrics(backend))
    return app


def _show(backend: Backend, kind: Kind) -> Handler:
    async def show(_: web.Request) -> web.StreamResponse:
        return web.json_response(backend.snapshot(kind))

    return show


def _reload(backend: Backend) -> Handler:
    one_at_a_time = asyncio.Lock()

    async def reload(_: web.Request) -> web.StreamResponse:
        async with one_at_a_time:
            result = await backend.reload()
        if result["errors"]:
            return _error(422, "refused", "configuration refused; nothing was changed", errors=result["errors"])
        return web.json_response(result)

    return reload


def _metrics(backend: Backend) -> Handler:
    async def metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(body=backend.metrics_text().encode(), headers={"Content-Type": METRICS_TYPE})

    return metrics


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Make aiohttp's own answers (404, 405) and our bugs (500) JSON as well."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _error(404, "not-found", f"no such resource: {request.path}")
    except web.HTTPException as error:
        return _error(error.status, error.reason.lower().replace(" ", "-"), f"{request.method} {request.path}")
    except Exception as error:
        # Whoever asks must not take the node down: the traceback goes to the log, one line to the client.
        log.exception("request failed method=%s path=%s", request.method, request.path)
        return _error(500, "internal", f"{type(error).__name__}: {error}")


def _error(code: int, word: str, message: str, **more: list[str]) -> web.Response:
    return web.json_response({"error": word, "message": message, **more}, status=code)
