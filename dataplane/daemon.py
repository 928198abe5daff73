"""The process around a node: the journal, signals, logging, what the terminal shows.

The order at the start is the order of need: packets flow first, the control API is loaded after *ready*.
"""

import asyncio
import errno
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from dataplane import jit, pipeline
from dataplane.control.cluster import Cluster
from dataplane.control.process import Log
from dataplane.control.source import Source, SourceError
from dataplane.control.state import Settings
from dataplane.devices import journal
from dataplane.devices.device import DeviceError
from dataplane.devices.namespace import NamespaceError
from dataplane.devices.netlink import NetlinkError
from dataplane.failover import open_failover
from dataplane.follow import Follower, open_source
from dataplane.node import Node
from dataplane.tables.result import TableFullError

if TYPE_CHECKING:
    from dataplane.attach import Attacher
    from dataplane.control.api import Extension
    from dataplane.dns_service import DnsService
    from dataplane.resolver import Resolver

RUN = Path("/run/dataplane")
FAILED, NO_PERMISSION = 1, 5
_REPORT_SECONDS = 5

log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Be the node until SIGINT or SIGTERM; return the exit status."""
    set_up_logging(settings.log)
    name = settings.state.node.name
    try:
        log_book, report = journal.claim(RUN / f"{name}.journal")
    except journal.AlreadyRunningError as error:
        log.error("node %s is %s", name, error)
        return FAILED
    for line in report:
        log.info("left by a dead node: %s", line)
    try:
        source = open_source(settings)
    except SourceError as error:
        log_book.close()
        log.error("%s", error)
        return FAILED
    node = Node(settings, log_book)

    def leave(*_: object) -> None:
        """Stop at once: nothing was made yet. An exception could be lost in one of the compiler's callbacks."""
        log_book.close()
        log.info("stopped node=%s before it was ready", name)
        os._exit(0)

    # The loop has its own handlers, but it does not run while kernels are compiled, and that may take long.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    warm_up(node)
    start = asyncio.run if settings.engine.loop == "asyncio" else uvloop.run
    try:
        return start(_live(node, settings, log_book, source))
    except TableFullError as error:
        log.error("%s", error)
        return FAILED
    except (DeviceError, NamespaceError, NetlinkError) as error:
        log.error("%s", error)
        return NO_PERMISSION if error.errno in (errno.EPERM, errno.EACCES) else FAILED


async def _live(node: Node, settings: Settings, log_book: journal.Journal, source: Source | None) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, node.stopping.set)
    loop.add_signal_handler(signal.SIGHUP, node.request_reload)
    follower = Follower(node, source) if source is not None else None
    attacher = _attacher(node)
    service = _dns_service(node)
    failover = open_failover(node, settings)
    async with AsyncExitStack() as ending:  # what comes last here ends first, and one that fails keeps none from it
        if service is not None:
            ending.callback(service.close)
        answering = await ending.enter_async_context(AsyncExitStack())  # the resolver, which is made late
        ending.push_async_callback(node.stop)
        for companion in (follower, failover, attacher):
            if companion is not None:
                ending.push_async_callback(companion.stop)
        ending.callback(notify, "STOPPING=1")
        if follower is not None and not await _joined(follower, node):
            return 0
        if attacher is not None:
            await attacher.restore()
        await node.start()
        if follower is not None:
            follower.start()
        if failover is not None:
            failover.start()
        gc.freeze()
        gc.enable()
        log.info("ready node=%s pods=%d", settings.state.node.name, len(settings.state.pods))
        notify("READY=1")
        if attacher is not None:
            attacher.start()
        resolver = None
        if service is not None:
            resolver = await _resolver(node, service, follower)
            answering.push_async_callback(resolver.stop)
        await _serve(node, log_book, follower, attacher, resolver)
    log.info("stopped node=%s", settings.state.node.name)
    return 0


async def _joined(follower: Follower, node: Node) -> bool:
    """Join the cluster; False: told to stop before its store could be reached."""
    joining = asyncio.ensure_future(follower.join())
    stopping = asyncio.ensure_future(node.stopping.wait())
    await asyncio.wait({joining, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if joining.done():
        joining.result()
        return True
    joining.cancel()
    return False


def _attacher(node: Node) -> "Attacher | None":
    """Return what serves a container runtime, if the node is to."""
    if not node.settings.cni:
        return None
    from dataplane.attach import open_attacher

    return open_attacher(node, RUN)


def _dns_service(node: Node) -> "DnsService | None":
    """Return the service of cluster DNS, if the node is to have it: it is in the first state already."""
    if node.settings.state.dns is None:
        return None
    from dataplane.dns_service import DnsService

    return DnsService(node)


async def _resolver(node: Node, service: "DnsService", follower: Follower | None) -> "Resolver":
    """Return what answers for the cluster's names, started."""
    await asyncio.to_thread(importlib.import_module, "dataplane.resolver")  # packets flow meanwhile
    from dataplane.resolver import Resolver

    resolver = Resolver(node, service, (lambda: follower.cluster) if follower is not None else Cluster)
    await resolver.start()
    return resolver


async def _serve(
    node: Node,
    log_book: journal.Journal,
    follower: Follower | None,
    attacher: "Attacher | None",
    resolver: "Resolver | None",
) -> None:
    """Offer the control API until the node is told to stop; without it the node goes on, and says so."""
    settings = node.settings
    for module in ("control.handlers", "control.handlers_ipam", "addresses"):
        await asyncio.to_thread(importlib.import_module, f"dataplane.{module}")  # packets flow meanwhile
    from dataplane.control import api

    extensions: list[Extension] = []
    if attacher is not None:
        from dataplane.control.handlers_cni import cni_routes

        extensions.append(cni_routes(attacher))
    extensions.append(_ipam_routes(node, follower, attacher))
    if resolver is not None:
        from dataplane.control.handlers_dns import dns_routes

        extensions.append(dns_routes(resolver))
    entry = log_book.record(journal.File(str(settings.socket)))
    try:
        server = await api.start(node, settings.socket, settings.metrics, extensions)
    except (api.ListenError, OSError) as error:
        log.error("no control api: %s", error)
        log_book.removed(entry)
        await node.stopping.wait()
        return
    try:
        if sys.stdout.isatty():
            from dataplane.control import banner

            banner.show(node.report.interfaces(), settings)
        await node.stopping.wait()
    finally:
        await server.close()
        log_book.removed(entry)


def _ipam_routes(node: Node, follower: Follower | None, attacher: "Attacher | None") -> "Extension":
    """Return what serves the books of addresses: those of the containers, if there are some."""
    from dataplane.addresses import holders, nodes_alive, open_addresses
    from dataplane.control.handlers_ipam import ipam_routes

    books = attacher.addresses if attacher is not None else open_addresses(node, RUN)
    return ipam_routes(
        books,
        lambda: holders(node, follower.cluster if follower is not None else Cluster()),
        lambda: nodes_alive(node, follower.cluster if follower is not None else Cluster()),
    )


def warm_up(node: Node) -> None:
    """Compile the pipeline, or load it from the cache, and say so when it takes long."""
    line = _CompileLine()
    with jit.CompileProgress(line.show):
        node.engine.warm_up()
    line.finish()
    jit.freeze(pipeline.burst)


class _CompileLine:
    """Says what is being compiled: on a terminal in one line that changes, else a line every few seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said = 0.0
        self._kernels = 0
        self._terminal = sys.stderr.isatty()

    def show(self, name: str, done: int) -> None:
        """Report that ``done`` kernels are ready and ``name`` is being compiled."""
        now = time.monotonic()
        self._kernels = done
        if now - self._said < (0.1 if self._terminal else _REPORT_SECONDS):
            return
        self._said = now
        line = f"compiling kernels (first start only): {done} done in {now - self._began:.0f} s, now {name}"
        shown, end = (f"\r\x1b[K{line}", "") if self._terminal else (line, "\n")
        print(shown, end=end, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Clear the line and log how long it took, if anything was compiled."""
        if not self._kernels:
            return
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        log.info(
            "compiled kernels=%d seconds=%.1f; the next start takes them from the cache",
            self._kernels,
            time.monotonic() - self._began,
        )


def set_up_logging(settings: Log) -> None:
    """Log to standard error: for people on a terminal, else one line of key=value or of JSON per event."""
    handler = logging.StreamHandler()
    if settings.format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    for library in ("numba", "asyncio", "aiohttp"):
        logging.getLogger(library).setLevel(logging.WARNING)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return the event as one line of JSON."""
        import json

        event = {"time": record.created, "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(event | ({"exception": self.formatException(record.exc_info)} if record.exc_info else {}))


def notify(state: str) -> None:
    """Tell systemd, if it has started us (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.connect("\0" + path[1:] if path.startswith("@") else path)
        sender.sendall(state.encode())
