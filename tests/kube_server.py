"""A server of the Kubernetes API as far as the documentation describes it, for tests and for trying things out.

    python -m tests.kube_server --listen 192.0.2.5:6443 --control /tmp/control.sock

Real HTTP, real chunked watches: lists in pages, bookmarks, history that ends (410 Gone, as an answer or as an event),
watchers that read too slowly and are dropped, restarts, throttling, tokens, conflicts, the status subresource. What is
stored and remembered is `kube_store`; here is how it is asked for.

On the control socket the same API is served, without a token, and besides ``POST /control/compact``,
``/control/restart?seconds=N``, ``/control/cut`` and ``/control/throttle?count=N``.
"""

import argparse
import asyncio
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiohttp import web

from tests.kube_store import KINDS, Kind, Object, Selector, StatusError, Store, events_of, shown

SHORT = {"services": ["svc"], "nodes": ["no"], "namespaces": ["ns"], "pods": ["po"], "events": ["ev"]}
QUEUE = 1000  # events that a watcher may be behind


class Request(NamedTuple):
    """What was asked, in the words of RBAC."""

    verb: str
    group: str
    resource: str


@dataclass(eq=False)
class Watcher:
    """One open watch: what it wants, and the events that it has not been sent yet."""

    kind: Kind
    version: str
    selector: Selector
    queue: asyncio.Queue[tuple[str, Object] | None]
    bookmarks: bool = False

    def put(self, event: tuple[str, Object]) -> bool:
        """Add an event; return False when the watcher is too slow."""
        try:
            self.queue.put_nowait(event)
        except asyncio.QueueFull:
            return False
        return True


@dataclass
class KubeServer:
    """A server in the loop of its user.

    Attributes:
        requests: What was asked, how often.
        forbidden: What is answered with 403.
        throttle: So many requests are answered with 429.
        token: Without it in the header everything is answered with 401; "" wants none.
        gone_by_event: A watch from a forgotten version gets an ERROR event, and not an answer with 410.
        talking: Not set: watches send nothing any more, and their connections stay.
    """

    store: Store = field(default_factory=Store)
    token: str = ""
    tls: ssl.SSLContext | None = None
    requests: Counter[Request] = field(default_factory=Counter)
    forbidden: set[Request] = field(default_factory=set)
    throttle: int = 0
    gone_by_event: bool = True
    bookmark_seconds: float = 60.0
    queue: int = QUEUE
    port: int = 0

    def __post_init__(self) -> None:
        self.talking = asyncio.Event()
        self.talking.set()
        self._watchers: set[Watcher] = set()
        self._runner: web.AppRunner | None = None
        self._connections: set[asyncio.Transport] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    async def start(self, host: str = "127.0.0.1") -> None:
        """Listen, on the same port as before."""
        self._runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, self.port, ssl_context=self.tls, reuse_address=True)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop(self) -> None:
        """End all connections and listen no more; what is stored stays."""
        for watcher in self._watchers:
            with suppress(asyncio.QueueFull):
                watcher.queue.put_nowait(None)
        for transport in self._connections:
            transport.abort()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self._connections.clear()
        for _ in range(5):  # a transport that was closed needs some turns of the loop to be so
            await asyncio.sleep(0)

    async def restart(self) -> None:
        """Do both."""
        await self.stop()
        await self.start()

    def cut(self) -> None:
        """End all watches in the middle, without a word."""
        for transport in self._connections:
            transport.abort()

    @property
    def watching(self) -> list[str]:
        """The collections that are watched now."""
        return sorted(watcher.kind.plural for watcher in self._watchers)

    def app(self, *, control: bool = False) -> web.Application:
        """Make the application; for the control socket with what only tests may ask."""
        app = web.Application(middlewares=[self._guarded(control)])
        paths = ("/api/{version}", "/apis/{group}/{version}")
        for root in paths:
            for base in (f"{root}/{{plural}}", f"{root}/namespaces/{{namespace}}/{{plural}}"):
                app.router.add_route("GET", base, self._collection)
                app.router.add_route("POST", base, self._create)
                for path in (f"{base}/{{name}}", f"{base}/{{name}}/status"):
                    for method in ("GET", "PUT", "PATCH", "DELETE"):
                        app.router.add_route(method, path, self._object)
            app.router.add_get(root, self._resources)
        app.router.add_get("/api", self._core)
        app.router.add_get("/apis", self._groups)
        app.router.add_get("/apis/{group}", self._group)
        app.router.add_get("/version", self._version)
        if control:
            app.router.add_post("/control/{action}", self._control)
        return app

    def _guarded(self, control: bool) -> Callable[..., Awaitable[web.StreamResponse]]:
        @web.middleware
        async def guarded(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                if not control:
                    self._admit(request)
                response: web.StreamResponse = await handler(request)
            except StatusError as error:
                headers = {"Retry-After": "1"} if error.code == 429 else {}
                return web.json_response(error.status, status=error.code, headers=headers)
            except web.HTTPException as error:
                return web.json_response(StatusError(error.status, "", error.reason).status, status=error.status)
            return response

        return guarded

    def _admit(self, request: web.Request) -> None:
        transport = request.transport
        if isinstance(transport, asyncio.Transport):
            self._connections.add(transport)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise StatusError(401, "Unauthorized", "Unauthorized")
        if self.throttle:
            self.throttle -= 1
            raise StatusError(429, "TooManyRequests", "Too many requests, please try again later.")
        asked = _asked(request)
        if asked is not None:
            self.requests[asked] += 1
            if asked in self.forbidden:
                text = f'{asked.resource} is forbidden: User "test" cannot {asked.verb} resource "{asked.resource}"'
                raise StatusError(403, "Forbidden", text)

    # --- collections and watches -------------------------------------------------------------------------------------

    def _kind(self, request: web.Request) -> Kind:
        found = request.match_info
        return self.store.kind(found.get("group", ""), found["version"], found["plural"])

    async def _collection(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        selector = Selector.parse(
            query.get("fieldSelector", ""), query.get("labelSelector", ""), request.match_info.get("namespace", "")
        )
        kind, version = self._kind(request), request.match_info["version"]
        if query.get("watch") in ("true", "1"):
            return await self._watch(request, kind, selector)
        items, meta = self.store.page(kind.plural, selector, int(query.get("limit", 0)), query.get("continue", ""))
        body = {"kind": f"{kind.kind}List", "apiVersion": _api(kind, version), "metadata": meta}
        return web.json_response(body | {"items": [_bare(shown(kind, version, item)) for item in items]})

    async def _watch(self, request: web.Request, kind: Kind, selector: Selector) -> web.StreamResponse:
        query, version = request.query, request.match_info["version"]
        watcher = Watcher(kind, version, selector, asyncio.Queue(self.queue), "allowWatchBookmarks" in query)
        start = query.get("resourceVersion", "")
        first: list[tuple[str, Object]] = []
        try:
            if start in ("", "0"):
                first = [("ADDED", item) for item in self.store.page(kind.plural, selector)[0]]
            else:
                first = [(type_, item) for _, type_, item in self.store.since(kind.plural, int(start), selector)]
        except StatusError as error:
            if not self.gone_by_event:
                raise
            first, watcher.queue = [("ERROR", error.status)], asyncio.Queue()
            watcher.queue.put_nowait(None)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        self._watchers.add(watcher)
        try:
            await response.prepare(request)
            async with asyncio.timeout(int(query.get("timeoutSeconds", 0)) or 1800):
                for type_, item in first:
                    await self._send(response, watcher, type_, item)
                while (event := await self._next(watcher)) is not None:
                    await self._send(response, watcher, *event)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self._watchers.discard(watcher)
        await self.talking.wait()
        with suppress(ConnectionError):
            await response.write_eof()
        return response

    async def _next(self, watcher: Watcher) -> tuple[str, Object] | None:
        try:
            async with asyncio.timeout(self.bookmark_seconds if watcher.bookmarks else None):
                return await watcher.queue.get()
        except TimeoutError:
            return ("BOOKMARK", {"metadata": {"resourceVersion": str(self.store.version), "creationTimestamp": None}})

    async def _send(self, response: web.StreamResponse, watcher: Watcher, type_: str, item: Object) -> None:
        await self.talking.wait()
        if type_ == "BOOKMARK":
            item = {"kind": watcher.kind.kind, "apiVersion": _api(watcher.kind, watcher.version)} | item
        item = item if type_ == "ERROR" else shown(watcher.kind, watcher.version, item)
        await response.write(json.dumps({"type": type_, "object": item}).encode() + b"\n")

    def publish(self) -> None:
        """Send the newest change to whom it concerns; who is too slow is dropped."""
        change = self.store.history[-1]
        for watcher in [each for each in self._watchers if each.kind.plural == change.plural]:
            for _, type_, item in events_of(change, watcher.selector):
                if not watcher.put((type_, item)):
                    self._watchers.discard(watcher)
                    watcher.queue = asyncio.Queue()
                    watcher.queue.put_nowait(None)

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[Store]:
        version = self.store.version
        yield self.store
        if self.store.version != version:
            self.publish()

    # --- objects -----------------------------------------------------------------------------------------------------

    async def _create(self, request: web.Request) -> web.StreamResponse:
        kind = self._kind(request)
        async with self._writing() as store:
            made = store.create(kind, request.match_info.get("namespace", ""), await request.json())
        return web.json_response(made, status=201)

    async def _object(self, request: web.Request) -> web.StreamResponse:
        kind, found = self._kind(request), request.match_info
        key = f"{found['namespace']}/{found['name']}" if "namespace" in found else found["name"]
        status = request.path.endswith("/status")
        if request.method == "GET":
            return web.json_response(shown(kind, found["version"], self.store.get(kind.plural, key)))
        async with self._writing() as store:
            if request.method == "DELETE":
                gone = store.delete(kind, key)
                body: Object = {"kind": "Status", "apiVersion": "v1", "status": "Success", "metadata": {}}
                return web.json_response(body | {"details": {"name": gone["metadata"]["name"], "kind": kind.plural}})
            given = await request.json()
            if request.method == "PUT":
                return web.json_response(store.replace(kind, key, given, status=status))
            if request.content_type != "application/merge-patch+json":
                raise StatusError(415, "UnsupportedMediaType", "the server does not support this patch")
            return web.json_response(store.patch(kind, key, given, status=status))

    # --- discovery ---------------------------------------------------------------------------------------------------

    async def _core(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})

    async def _groups(self, _: web.Request) -> web.StreamResponse:
        names = sorted({kind.group for kind in KINDS if kind.group and self.store.served(kind)})
        groups = [self._api_group(name) for name in names]
        return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})

    async def _group(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(
            {"kind": "APIGroup", "apiVersion": "v1"} | self._api_group(request.match_info["group"])
        )

    def _api_group(self, name: str) -> Object:
        versions = [self.store.served(kind) for kind in KINDS if kind.group == name and self.store.served(kind)]
        if not versions:
            raise StatusError(404, "NotFound", "the server could not find the requested resource")
        listed = [{"groupVersion": f"{name}/{each}", "version": each} for each in versions[0]]
        return {"name": name, "versions": listed, "preferredVersion": listed[0]}

    async def _resources(self, request: web.Request) -> web.StreamResponse:
        group, version = request.match_info.get("group", ""), request.match_info["version"]
        found: list[Object] = []
        for kind in KINDS:
            if kind.group != group or version not in self.store.served(kind):
                continue
            words = {"kind": kind.kind, "namespaced": kind.namespaced, "singularName": kind.kind.lower()}
            words |= {"shortNames": SHORT[kind.plural]} if kind.plural in SHORT else {}
            verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
            found.append(words | {"name": kind.plural, "verbs": verbs})
            if kind.status:
                found.append(words | {"name": f"{kind.plural}/status", "verbs": ["get", "patch", "update"]})
        name = f"{group}/{version}".lstrip("/")
        return web.json_response(
            {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": found}
        )

    async def _version(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"major": "1", "minor": "32", "gitVersion": "v1.32.0", "platform": "linux/amd64"})

    async def _control(self, request: web.Request) -> web.StreamResponse:
        match request.match_info["action"]:
            case "compact":
                self.store.compact()
            case "restart":
                await self.stop()
                await asyncio.sleep(float(request.query.get("seconds", 0)))
                await self.start("0.0.0.0")
            case "cut":
                self.cut()
            case "throttle":
                self.throttle = int(request.query["count"])
            case action:
                raise StatusError(404, "NotFound", action)
        return web.json_response({"requests": [[*each, count] for each, count in self.requests.items()]})


def _asked(request: web.Request) -> Request | None:
    found = request.match_info
    if "plural" not in found:
        return None
    one = "name" in found
    verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    reading = "get" if one else "watch" if request.query.get("watch") in ("true", "1") else "list"
    resource = found["plural"] + ("/status" if request.path.endswith("/status") else "")
    return Request(verbs.get(request.method, reading), found.get("group", ""), resource)


def _api(kind: Kind, version: str) -> str:
    return f"{kind.group}/{version}".lstrip("/")


def _bare(item: Object) -> Object:
    """In a list, items have neither ``kind`` nor ``apiVersion``: the list has them."""
    return {key: value for key, value in item.items() if key not in ("kind", "apiVersion")}


async def serve(listen: str, control: str, token: str, certificate: str) -> None:
    """Serve until the process ends."""
    host, _, port = listen.rpartition(":")
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    server = KubeServer(port=int(port), token=token, tls=tls, bookmark_seconds=1.0)
    await server.start(host)
    runner = web.AppRunner(server.app(control=True), access_log=None)
    await runner.setup()
    await web.UnixSite(runner, control).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server of the Kubernetes API, for tests.")
    parser.add_argument("--listen", required=True, help="address:port")
    parser.add_argument("--control", required=True, help="a unix socket")
    parser.add_argument("--token", default="", help="that clients have to show")
    parser.add_argument("--certificate", default="", help="a file with the server's certificate and key: HTTPS")
    given = parser.parse_args()
    asyncio.run(serve(given.listen, given.control, given.token, given.certificate))
