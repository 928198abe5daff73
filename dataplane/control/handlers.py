"""What the control API answers. The file needs aiohttp, so ``api.start`` imports it only when packets flow."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from dataplane.control import query
from dataplane.control.api import Backend, Listing, MissingError
from dataplane.control.snapshot import KINDS, LIST_KINDS, Kind, ListKind, Reload

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SERVICE = "/v1/services/{namespace}/{name}"
ENDPOINT = SERVICE + "/endpoints/{ip}"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Edit = Callable[[web.Request], Awaitable[Reload]]

log = logging.getLogger(__name__)


def control_app(backend: Backend) -> web.Application:
    """Make the application of the unix socket."""
    app = web.Application(middlewares=[errors_as_json])
    app.router.add_routes([web.get(f"/v1/{kind}", _show(backend, kind)) for kind in KINDS])
    app.router.add_routes([web.get(f"/v1/{kind}", _list(backend, kind)) for kind in LIST_KINDS])
    app.router.add_routes([web.get("/metrics", _metrics(backend)), web.delete("/v1/conntrack", _forget(backend))])
    edits = _Edits(backend)
    app.router.add_routes(
        [
            web.post("/v1/reload", edits.handler(edits.reload)),
            web.put(SERVICE, edits.handler(edits.set_service)),
            web.delete(SERVICE, edits.handler(edits.delete_service)),
            web.put(ENDPOINT, edits.handler(edits.add_endpoint)),
            web.delete(ENDPOINT, edits.handler(edits.delete_endpoint)),
            web.post(ENDPOINT + "/drain", edits.handler(edits.drain_endpoint)),
        ]
    )
    return app


def metrics_app(backend: Backend) -> web.Application:
    """Make the application of the TCP port: nothing but ``/metrics``."""
    app = web.Application(middlewares=[errors_as_json])
    app.router.add_get("/metrics", _metrics(backend))
    return app


# --- looking ---------------------------------------------------------------------------------------------------------


def _show(backend: Backend, kind: Kind) -> Handler:
    async def show(_: web.Request) -> web.StreamResponse:
        return web.json_response(backend.snapshot(kind))

    return show


def _list(backend: Backend, kind: ListKind) -> Handler:
    async def show(request: web.Request) -> web.StreamResponse:
        rows = backend.listing(kind, query.parse(request.query, kind))
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        await response.prepare(request)
        try:
            await _send(response, kind, rows)
        except ConnectionResetError:
            pass  # whoever asked has gone
        except Exception:
            log.exception("listing failed path=%s", request.path)
            assert request.transport is not None
            request.transport.abort()  # the answer has begun: only its missing end can say that it is not whole
        return response

    return show


async def _send(response: web.StreamResponse, kind: ListKind, rows: Listing) -> None:
    await response.write(f'{{"{kind}": ['.encode())
    separator = "\n"
    for page in rows:
        if page:
            await response.write((separator + ",\n".join(map(json.dumps, page))).encode())
            separator = ",\n"
        await asyncio.sleep(0)  # a write that fits the socket's buffer does not wait: packets have their turn here
    await response.write(f'\n], "matched": {rows.matched}}}'.encode())
    await response.write_eof()


def _metrics(backend: Backend) -> Handler:
    async def metrics(_: web.Request) -> web.StreamResponse:
        return web.Response(body=backend.metrics_text().encode(), headers={"Content-Type": METRICS_TYPE})

    return metrics


# --- editing ---------------------------------------------------------------------------------------------------------


def _forget(backend: Backend) -> Handler:
    async def forget(request: web.Request) -> web.StreamResponse:
        words = dict(request.query)
        everything = words.pop("all", "") == "yes"
        wanted = query.parse(words)
        if wanted.is_open and not everything:
            raise query.QueryError("no filter is given; all=yes deletes every flow")
        return web.json_response({"deleted": await backend.delete_flows(wanted)})

    return forget


class _Edits:
    """Changes of the desired state, one at a time."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._turn = asyncio.Lock()

    def handler(self, edit: Edit) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            async with self._turn:
                result = await edit(request)
            if result["errors"]:
                what = "configuration" if edit == self.reload else "edit"
                return _error(422, "refused", f"{what} refused; nothing was changed", errors=result["errors"])
            return web.json_response(result)

        return answer

    async def reload(self, _: web.Request) -> Reload:
        return await self._backend.reload()

    async def set_service(self, request: web.Request) -> Reload:
        names = request.match_info
        values = {**await _body(request), "name": names["name"], "namespace": names["namespace"]}
        return await self._backend.set_service(values)

    async def delete_service(self, request: web.Request) -> Reload:
        return await self._backend.delete_service(*_service(request))

    async def add_endpoint(self, request: web.Request) -> Reload:
        values = {**await _body(request), "ip": request.match_info["ip"]}
        return await self._backend.add_endpoint(*_service(request), values)

    async def drain_endpoint(self, request: web.Request) -> Reload:
        return await self._backend.drain_endpoint(*_service(request), {"ip": request.match_info["ip"]})

    async def delete_endpoint(self, request: web.Request) -> Reload:
        return await self._backend.delete_endpoint(*_service(request), {"ip": request.match_info["ip"]})


def _service(request: web.Request) -> tuple[str, str]:
    return request.match_info["namespace"], request.match_info["name"]


async def _body(request: web.Request) -> Mapping[str, Any]:
    content = await request.read()
    try:
        body = json.loads(content.decode()) if content else {}
    except (ValueError, RecursionError) as error:
        raise query.QueryError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise query.QueryError("the body is not a JSON object")
    return body


# --- errors ----------------------------------------------------------------------------------------------------------


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Make aiohttp's own answers (404, 405) and our bugs (500) JSON as well."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _error(404, "not-found", f"no such resource: {request.path}")
    except web.HTTPRequestEntityTooLarge as error:
        return _error(error.status, "too-large", str(error.text))
    except web.HTTPException as error:
        return _error(error.status, error.reason.lower().replace(" ", "-"), f"{request.method} {request.path}")
    except MissingError as error:
        return _error(404, "not-found", str(error))
    except query.QueryError as error:
        return _error(422, "refused", str(error))
    except Exception as error:
        # Whoever asks must not take the node down: the traceback goes to the log, one line to the client.
        log.exception("request failed method=%s path=%s", request.method, request.path)
        return _error(500, "internal", f"{type(error).__name__}: {error}")


def _error(code: int, word: str, message: str, **more: list[str]) -> web.Response:
    return web.json_response({"error": word, "message": message, **more}, status=code)
