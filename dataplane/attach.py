"""Containers of a runtime on this node: ``dataplane-cni`` asks, the node connects and disconnects them.

What is attached is an amendment of the node's state, so a container is connected as any pod is: by a plan. Requests
come at once; those that arrive while a plan is carried out share the next one, and when a plan for several is refused
each is tried alone. The attachments are in a file before the plan, and so before the runtime gets its result; the
next start of the node makes the links anew in the namespaces that are still there, also after a crash. An address is
released after the plan. What cannot be released (the store is away) is owed and tried again.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from dataplane.addresses import open_addresses
from dataplane.cni import (
    EXHAUSTED,
    INVALID_CONFIG,
    IO_FAILURE,
    NOT_AVAILABLE,
    REFUSED,
    TRY_AGAIN_LATER,
    CniError,
    Request,
    request,
)
from dataplane.config import ConfigError
from dataplane.containers import admit, examine, look
from dataplane.control import cni
from dataplane.control.cni import Attachment, Draft, Key
from dataplane.control.ipam import IpamError, NoAddressError, TakenError
from dataplane.control.ipam_addresses import Books
from dataplane.control.state import Address, DesiredState
from dataplane.devices.journal import process
from dataplane.devices.namespace import NamespaceError
from dataplane.node import Node

_RETRY_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Change:
    added: tuple[Attachment, ...] = ()
    removed: tuple[Attachment, ...] = ()


class Attacher:
    """The containers of one node.

    Attributes:
        addresses: Where theirs come from.

    Args:
        node: Not started yet.
        path: The file that outlives the process; there is none while nothing is attached.
    """

    def __init__(self, node: Node, addresses: Books, path: Path) -> None:
        self._node = node
        self.addresses = addresses
        self._path = path
        me = process(os.getpid())
        assert me is not None
        self._boot = me.boot
        self._attached: dict[Key, Attachment] = {}
        self._drafts: list[Draft] = []
        self._busy: dict[Key, asyncio.Event] = {}
        self._waiting: list[tuple[_Change, asyncio.Future[None]]] = []
        self._working: asyncio.Task[None] | None = None
        self._running: set[asyncio.Future[dict[str, Any]]] = set()
        self._owed: set[Key] = set()
        self._owing = asyncio.Event()
        self._tidying: asyncio.Task[None] | None = None

    # --- start and end -----------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Take over what an earlier process has attached, as far as it is still there; before the node starts."""
        self._node.amend(self._over)
        if not self._path.exists():
            return
        found, problems = cni.read(await asyncio.to_thread(self._path.read_text, errors="replace"), self._boot)
        for problem in problems:
            log.warning("attachments %s: %s", self._path, problem)
        given = {pod.id for pod in self._node.settings.state.pods}
        given |= {str(address) for pod in self._node.settings.state.pods for address in pod.addresses}
        for each in found:
            try:
                if {each.id, str(each.address)} & given:
                    raise ValueError("a pod of the node's file has its name or its address")
                await asyncio.to_thread(examine, each.netns, each.ifname, each.cookie)
            except (NamespaceError, ValueError) as error:
                log.info("attachment is stale pod=%s container=%s: %s", each.id, each.container, error)
                continue
            self._attached[each.key] = each
        await asyncio.to_thread(self._save, self._attached)

    def start(self) -> None:
        """Release what nobody has, from now on and beside the packets."""
        self._tidying = asyncio.ensure_future(self._tidy())

    async def stop(self) -> None:
        """Finish what is under way."""
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._tidying is not None:
            self._tidying.cancel()
            with suppress(asyncio.CancelledError):
                await self._tidying

    def _over(self, state: DesiredState) -> DesiredState:
        """Return the state with the containers.

        Raises:
            ConfigError: A pod of a file that is about to be read takes the name or the address of a container.
        """
        amended = cni.over(state, self._attached.values())
        if amended is not state:
            _require_apart(state, self._attached)
        return amended

    # --- commands ----------------------------------------------------------------------------------------------------

    async def serve(self, environment: Mapping[str, str], config: Any) -> dict[str, Any]:
        """Carry out one command; return ``{}``, or ``{"result": ...}`` for the runtime.

        Raises:
            CniError: The runtime is to be told.
        """
        wanted = request(environment, config)
        commands = {
            "ADD": self._add, "DEL": self._delete, "CHECK": self._check, "GC": self._collect, "STATUS": self._status,
        }  # fmt: skip
        # A client that hangs up half way must not leave half a container: what has begun is carried out.
        running = asyncio.ensure_future(commands[wanted.command](wanted))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(running)
        except CniError as error:
            log.warning("cni %s refused container=%s: %s", wanted.command, wanted.container, error)
            raise

    @property
    def _state(self) -> DesiredState:
        state = self._node.wiring.state
        if state is None or self._node.stopping.is_set():
            raise CniError(TRY_AGAIN_LATER, "the node is stopping, or not started yet")
        return state

    async def _add(self, wanted: Request) -> dict[str, Any]:
        async with self._alone(cni.key_of(wanted)):
            cookie = await asyncio.to_thread(admit, wanted.netns, wanted.ifname)
            draft = cni.draft(wanted, cookie, self._attached, self._drafts, self._state)
            self._drafts.append(draft)
            try:
                attachment = await self._make(draft)
            finally:
                self._drafts.remove(draft)
            for each in draft.replaces:
                await self._release(each.key)
            return {"result": cni.result(wanted, attachment, self._state)}

    async def _make(self, draft: Draft) -> Attachment:
        key = draft.attachment.key
        attachment = draft.with_address(await self._assign(draft))
        try:
            await self._carry_out(_Change((attachment,), draft.replaces))
        except BaseException:
            await self._release(key)
            raise
        return attachment

    async def _assign(self, draft: Draft) -> IPv4Address:
        attachment, node = draft.attachment, self._node.settings.state.node.name
        about = {"node": node, "namespace": attachment.namespace, "pod": attachment.name}
        handle = cni.handle_of(node, attachment.key)
        try:
            address = await self.addresses.assign(handle, time.time(), draft.requested, about)
        except NoAddressError as error:
            raise CniError(EXHAUSTED, f"no address: {error}") from None
        except TakenError as error:
            raise CniError(INVALID_CONFIG, f"runtimeConfig.ips: {error}") from None
        except IpamError as error:
            raise CniError(TRY_AGAIN_LATER, f"no address for now: {error}") from None
        if not isinstance(address, IPv4Address):
            await self._release(attachment.key)
            raise CniError(REFUSED, f"address {address}: pods have IPv4 addresses only, for now")
        return address

    async def _delete(self, wanted: Request) -> dict[str, Any]:
        key = cni.key_of(wanted)
        async with self._alone(key):
            await self._detach([self._attached[key]] if key in self._attached else [])
        return {}

    async def _collect(self, wanted: Request) -> dict[str, Any]:
        # Together, so that they share a plan, and to the end, whatever becomes of the others.
        given_up = (self._give_up(each) for each in cni.stale(wanted, self._attached))
        for failure in await asyncio.gather(*given_up, return_exceptions=True):
            if failure is not None:
                raise failure
        return {}

    async def _give_up(self, attachment: Attachment) -> None:
        """Detach what is stale, unless it has gone, or its place was taken, by the time it is its turn."""
        async with self._alone(attachment.key):
            if self._attached.get(attachment.key) is attachment:
                await self._detach([attachment])

    async def _detach(self, gone: list[Attachment]) -> None:
        if gone:
            await self._carry_out(_Change(removed=tuple(gone)))
        for each in gone:
            await self._release(each.key)

    async def _check(self, wanted: Request) -> dict[str, Any]:
        async with self._alone(cni.key_of(wanted)):
            attachment = cni.require_listed(wanted, self._attached.get(cni.key_of(wanted)))
            seen = await asyncio.to_thread(look, attachment)
            cni.require_as_made(attachment, self._state.pod_network, seen)
        return {}

    async def _status(self, _: Request) -> dict[str, Any]:
        if self._node.stopping.is_set() or not self._node.report.ready:
            raise CniError(NOT_AVAILABLE, "the node is stopping, or not started yet")
        if not self._state.pod_network.cidrs:
            raise CniError(NOT_AVAILABLE, "the node has no addresses for pods: no pods.cidr, and no block in a store")
        try:
            await self.addresses.held()
        except IpamError as error:
            raise CniError(NOT_AVAILABLE, f"no addresses for now: {error}") from None
        return {}

    @asynccontextmanager
    async def _alone(self, key: Key) -> AsyncIterator[None]:
        """Let one request about an attachment run at a time: a runtime that gave up an ADD follows with a DEL."""
        while (other := self._busy.get(key)) is not None:
            await other.wait()
        done = self._busy[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._busy[key]
            done.set()

    # --- changes -----------------------------------------------------------------------------------------------------

    async def _carry_out(self, change: _Change) -> None:
        """Carry out a change, together with others that came meanwhile.

        Raises:
            CniError: It was refused, and nothing is left of it.
        """
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((change, done))
        if self._working is None or self._working.done():
            self._working = asyncio.ensure_future(self._work())
        await done

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            failure = await self._attempt([change for change, _ in batch])
            if failure is None or len(batch) == 1:
                _answer(batch, failure)
                continue
            for each in batch:
                _answer([each], await self._attempt([each[0]]))

    async def _attempt(self, changes: list[_Change]) -> Exception | None:
        """Make all of these changes; return why not, and then nothing is changed."""
        before, after = self._attached, dict(self._attached)
        for change in changes:
            for each in change.removed:
                after.pop(each.key, None)
            after |= {each.key: each for each in change.added}
        try:
            await asyncio.to_thread(self._save, after)
            # Here, not by the plan: until that is refused, whoever else refreshes would be refused as well.
            _require_apart(self._node.settings.state, after)
            self._attached = after
            errors = (await self._node.refresh())["errors"]
            if not errors:
                return None
            stopping = self._node.stopping.is_set()
            failure: Exception = CniError(TRY_AGAIN_LATER if stopping else REFUSED, "; ".join(errors))
        except ConfigError as error:
            failure = CniError(REFUSED, "; ".join(error.errors))
        except OSError as error:
            failure = CniError(IO_FAILURE, f"{self._path}: {error.strerror}")
        except Exception as error:
            log.exception("containers could not be connected")
            failure = error
        self._attached = before
        try:
            await asyncio.to_thread(self._save, before)
        except OSError as error:
            log.error("attachments %s: %s", self._path, error.strerror)
        return failure

    def _save(self, attached: Mapping[Key, Attachment]) -> None:
        """Write the file, whole or not at all. Its folder does not outlive the machine's boot, so nothing is synced."""
        if not attached:
            self._path.unlink(missing_ok=True)
            return
        draft = self._path.with_name(self._path.name + ".new")
        draft.write_text(cni.written(attached.values(), self._boot))
        os.replace(draft, self._path)

    # --- addresses ---------------------------------------------------------------------------------------------------

    async def _release(self, key: Key) -> None:
        try:
            await self.addresses.release(cni.handle_of(self._node.settings.state.node.name, key), time.time())
        except IpamError as error:
            log.warning("address will be released later container=%s: %s", key[1], error)
            self._owed.add(key)
            self._owing.set()

    async def _tidy(self) -> None:
        """Release what is owed, first of all what an earlier process has left."""
        swept = False
        while True:
            try:
                swept = swept or await self._sweep()
                for key in tuple(self._owed):
                    await self._pay(key)
            except IpamError as error:
                log.debug("addresses cannot be released: %s", error)
            except Exception:
                log.exception("addresses cannot be released")
            if swept and not self._owed:
                await self._owing.wait()
            else:
                await asyncio.sleep(_RETRY_SECONDS)
            self._owing.clear()

    async def _sweep(self) -> bool:
        """Find what is held for containers that are not attached, and containers whose address is not held."""
        node = self._node.settings.state.node.name
        held = await self.addresses.held()
        for handle in held:
            key = cni.key_of_handle(node, handle)
            if key is not None and key not in self._attached:
                self._owed.add(key)
        for key, each in self._attached.items():
            if held.get(cni.handle_of(node, key)) != each.address and key not in self._busy:
                log.warning("address %s of container=%s is not in the books", each.address, each.container)
        return True

    async def _pay(self, key: Key) -> None:
        async with self._alone(key):
            if key not in self._attached:  # by an ADD that came first
                node = self._node.settings.state.node.name
                await self.addresses.release(cni.handle_of(node, key), time.time())
                log.info("address released container=%s", key[1])
            self._owed.discard(key)


def _answer(batch: list[tuple[_Change, asyncio.Future[None]]], failure: Exception | None) -> None:
    for _, done in batch:
        if done.done():  # whoever waited has gone
            continue
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(failure)


def _require_apart(state: DesiredState, attached: Mapping[Key, Attachment]) -> None:
    names = {each.id: each for each in attached.values()}
    addresses: dict[Address, Attachment] = {each.address: each for each in attached.values()}
    errors = []
    for pod in state.pods:
        taken = [names.get(pod.id), *map(addresses.get, pod.addresses)]
        errors += [
            f"pods.static {pod.id}: container {each.container} has this name or address {each.address} (CNI)"
            for each in taken
            if each is not None
        ]
    if errors:
        raise ConfigError(tuple(errors))


def open_attacher(node: Node, run: Path) -> Attacher:
    """Return what serves a container runtime; its files are in the folder ``run``."""
    return Attacher(node, open_addresses(node, run), run / f"{node.settings.state.node.name}.cni.json")
