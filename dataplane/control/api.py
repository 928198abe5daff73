"""The control API: HTTP and JSON on a unix socket, and Prometheus' text on TCP.

    GET    /v1/{status,interfaces,routes,arp,vteps,drops,counters,...}    a snapshot (``snapshot.KINDS``)
    GET    /v1/{services,endpoints,conntrack,nat,persistence}?FILTERS     a listing, filtered (``query.Query``)
    DELETE /v1/conntrack?FILTERS                                          forget flows; all of them only with all=yes
    PUT    /v1/services/NAMESPACE/NAME                                    set a service: the keys of [[services.static]]
    DELETE /v1/services/NAMESPACE/NAME
    PUT    /v1/services/NAMESPACE/NAME/endpoints/IP                       add an endpoint, or change it
    DELETE /v1/services/NAMESPACE/NAME/endpoints/IP
    POST   /v1/services/NAMESPACE/NAME/endpoints/IP/drain                 no new connections; those it has go on
    POST   /v1/cni                                                        what dataplane-cni asks (``cni.py``)
    GET    /v1/ipam                                                       pools and blocks of pods' addresses
    DELETE /v1/ipam/{addresses/ADDRESS,nodes/NAME}                        take back what is leaked (``handlers_ipam``)
    POST   /v1/reload                                                     read the file again, all or nothing
    GET    /metrics                                                       Prometheus

A snapshot is made in one go. A listing may have a million rows: it is made and sent in pages, and packets have their
turn between any two of them. Rows that come or go meanwhile are in it or not, as with the kernel's own tables.

An error is ``{"error": word, "message": line}`` with a fitting HTTP status. Who may open the socket may use it: it has
mode 0660. aiohttp is imported when the server starts, after the data plane is up: packets do not wait for it.
"""

import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dataplane.control.client import listens
from dataplane.control.query import Query
from dataplane.control.snapshot import Kind, ListKind, Reload

if TYPE_CHECKING:
    from aiohttp import web

    Extension: TypeAlias = Callable[[web.Application], None]

_MODE = 0o660
_GRACE_S = 1.0  # for requests under way when the server closes

log = logging.getLogger(__name__)


class Listing(Protocol):
    """Rows in pages. To make one page takes a millisecond at most; the loop has its turn after each.

    Attributes:
        matched: Rows that passed the filters, the ones beyond the limit included; final after the last page.
    """

    @property
    def matched(self) -> int: ...  # noqa: D102 - an attribute

    def __iter__(self) -> Iterator[Sequence[Mapping[str, Any]]]: ...


class MissingError(LookupError):
    """What should be edited does not exist; the message names it."""


class Backend(Protocol):
    """What the node has to be able to say and do. All calls come from the event loop's thread, between bursts.

    Those that edit return what ``reload`` returns; with ``errors`` nothing was changed. The server lets one of them run
    at a time.
    """

    def snapshot(self, kind: Kind) -> Mapping[str, Any]:
        """Return the snapshot of this kind (``control/snapshot.py``)."""
        ...

    def listing(self, kind: ListKind, query: Query) -> Listing:
        """Return the rows of this kind that pass the query."""
        ...

    async def reload(self) -> Reload:
        """Read the configuration again."""
        ...

    async def delete_flows(self, query: Query) -> int:
        """Forget the flows that pass the query, whatever its limit; return how many."""
        ...

    async def set_service(self, values: Mapping[str, Any]) -> Reload:
        """Add or replace a service; ``values`` has the keys of ``[[services.static]]``, name and namespace included."""
        ...

    async def delete_service(self, namespace: str, name: str) -> Reload:
        """Forget a service; ``MissingError`` if there is none."""
        ...

    async def add_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        """Add or change an endpoint; ``values`` has the keys of a service's ``endpoints``, ``ip`` at least."""
        ...

    async def drain_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        """Give the endpoint at ``values["ip"]`` no new connections."""
        ...

    async def delete_endpoint(self, namespace: str, name: str, values: Mapping[str, Any]) -> Reload:
        """Forget the endpoint at ``values["ip"]``."""
        ...

    def metrics_text(self) -> str:
        """Return Prometheus' text format."""
        ...


class ListenError(Exception):
    """A socket that cannot be opened; the message says which and why."""


class Server:
    """A running API.

    Attributes:
        metrics_port: The TCP port of ``/metrics``; None when off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = _identity(path)
        self._runners: list[web.AppRunner] = []
        self.metrics_port: int | None = None

    async def add(self, app: "web.Application") -> "web.AppRunner":
        """Prepare an application; it is closed with the server."""
        from aiohttp import web

        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_GRACE_S)
        self._runners.append(runner)
        await runner.setup()
        return runner

    async def close(self) -> None:
        """Stop listening and take the socket file away, unless another node has put its own there."""
        for runner in self._runners:
            await runner.cleanup()
        if self._path.exists() and _identity(self._path) == self._identity:
            self._path.unlink()


async def start(
    backend: Backend,
    path: Path,
    metrics: tuple[str, int] | None = None,
    extensions: Sequence["Extension"] = (),
) -> Server:
    """Listen on the unix socket ``path`` and, if given, on (host, port) for ``/metrics``.

    Extensions add what not every node has to the application of the socket.

    Raises:
        ListenError: Another node listens there, or the system refuses.
        PermissionError: The socket's folder is not writable.
    """
    from aiohttp import web

    from dataplane.control.handlers import control_app, metrics_app

    listener = _listen(path)
    server = Server(path)
    app = control_app(backend)
    for extend in extensions:
        extend(app)
    await web.SockSite(await server.add(app), listener).start()
    log.info("control api listening socket=%s", path)
    if metrics is None:
        return server
    host, port = metrics
    runner = await server.add(metrics_app(backend))
    try:
        await web.TCPSite(runner, host or None, port).start()
    except OSError as error:
        await server.close()
        raise ListenError(f"metrics.listen {host}:{port}: {error.strerror}") from error
    server.metrics_port = runner.addresses[0][1]
    log.info("metrics listening host=%s port=%d", host, server.metrics_port)
    return server


# --- the socket file -------------------------------------------------------------------------------------------------


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~_MODE)  # from the first moment: a chmod afterwards would come too late
    try:
        listener.bind(str(path))
    except PermissionError:
        listener.close()
        raise
    except OSError as error:
        listener.close()
        raise ListenError(f"api.socket {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    return listener


def _remove_stale(path: Path) -> None:
    """Take away the socket of a node that was killed; nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"api.socket {path}: exists and is no socket")
    if listens(path):
        raise ListenError(f"api.socket {path}: {os.strerror(errno.EADDRINUSE).lower()}: another node listens there")
    path.unlink()
    log.info("stale socket removed socket=%s", path)


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
