"""Keeping up with one collection of the API: a list, then a watch from there on, for ever.

By kubernetes.io/docs/reference/using-api/api-concepts ("Efficient detection of changes"): a list in pages gives the
objects and a resource version; a watch from that version gives every change after it, and bookmarks that only move the
version. A watch that ends is resumed from the last version seen. A version that the server has forgotten (410 Gone, as
an answer or as an ERROR event) means to list again; objects whose version has not changed stay the same values then. A
continue token that the server has forgotten means to list again, after some of them in one piece. Versions are opaque:
they are only compared for being equal.

A collection that was seen and is refused keeps what is known of it, until the server has said often that it has none.

Pages are read in a thread, so that packets are carried meanwhile; an object that did not change is not converted.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dataplane.control.kube_api import ApiError, AwayError, KubeApi, KubeError, Parameters, Resource, parsed

PAGE = 200  # of endpoint slices that is 15 ms of parsing, during which no packet moves; client-go has 500
WATCH_SECONDS = 300  # client-go's shortest; up to twice that, so that nodes do not come all at once
SHORTEST_WATCH = 1.0  # one that ends sooner, without an event, counts as failed
MISSING_SECONDS = 60.0  # until a collection that the server did not have is looked for again
REMOVED = 8  # times 404 in a row, 13 s or more: an API server that starts may not know its own collections for seconds
TOKENS = 3  # that the server forgot, until a list is asked for in one piece: reading that stops all packets for long
_TURN = 64  # events between two turns of the packets

T = TypeVar("T")

log = logging.getLogger(__name__)


class ObjectError(ValueError):
    """An object that cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One object.

    Attributes:
        version: Its ``resourceVersion``.
        value: What it became; None when it cannot be used.
        complaint: Why not, or what of it cannot be used; "" when nothing is wrong.
    """

    version: str
    value: T | None
    complaint: str = ""


class Shelf(Generic[T]):
    """The objects of one collection, as values.

    Attributes:
        entries: By ``namespace/name``, or by name.
        synced: A whole list was seen, or the server has no such collection, or does not let us see it.
        installed: The server has such a collection, as far as is known.
        version: The newest resource version of the collection.

    Args:
        name: For the log.
        convert: From JSON to a value and a complaint about parts of it; raises `ObjectError`. Runs in any thread.
        changed: Is told the key, the value before and the value after, None for none; not if they are equal.
    """

    def __init__(
        self,
        name: str,
        convert: Callable[[Mapping[str, Any]], tuple[T, str]],
        changed: Callable[[str, T | None, T | None], None],
    ) -> None:
        self.name = name
        self.entries: dict[str, Entry[T]] = {}
        self.synced = False
        self.installed = True
        self.version = ""
        self._convert = convert
        self._changed = changed

    def read(self, item: Any) -> tuple[str, Entry[T]]:
        """Return an object's key and entry: the one that is known, if its version is.

        Raises:
            ObjectError: It has not even a name.
        """
        metadata = item.get("metadata") if isinstance(item, dict) else None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
            raise ObjectError("an object without metadata.name")
        namespace, version = metadata.get("namespace"), str(metadata.get("resourceVersion", ""))
        key = f"{namespace}/{metadata['name']}" if namespace else metadata["name"]
        held = self.entries.get(key)
        if held is not None and version and held.version == version:
            return key, held
        try:
            value, complaint = self._convert(item)
        except ObjectError as error:
            return key, Entry(version, None, str(error))
        return key, Entry(version, value, complaint)

    def put(self, key: str, entry: Entry[T]) -> None:
        """Take over one object."""
        held = self.entries.get(key)
        if held is entry:
            return
        if entry.complaint and (held is None or held.complaint != entry.complaint):
            log.warning("%s of the api server not usable key=%s: %s", self.name, key, entry.complaint)
        self.entries[key] = entry
        self._tell(key, held.value if held else None, entry.value)

    def remove(self, key: str) -> None:
        """Forget one object; one that is not known was never here."""
        held = self.entries.pop(key, None)
        if held is not None:
            self._tell(key, held.value, None)

    def replace(self, entries: Mapping[str, Entry[T]]) -> None:
        """Take over a whole list."""
        for key in self.entries.keys() - entries.keys():
            self.remove(key)
        for key, entry in entries.items():
            self.put(key, entry)
        self.synced = True

    def _tell(self, key: str, before: T | None, after: T | None) -> None:
        if before != after:
            self._changed(key, before, after)


class Backoff:
    """How long to wait after a failure: from 0.2 s to 30 s, doubled each time, a random part of it.

    Args:
        random_part: Gives a number from 0 to 1.
    """

    FIRST, LONGEST = 0.2, 30.0

    def __init__(self, random_part: Callable[[], float] = random.random) -> None:
        self._random = random_part
        self._failures = 0

    def failed(self, asked: float = 0) -> float:
        """Return how many seconds to wait now; not less than the server has asked for."""
        longest = min(self.FIRST * 2.0**self._failures, self.LONGEST)
        self._failures = min(self._failures + 1, 16)
        return asked + longest * (0.5 + self._random() / 2)

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed, too."""
        return self._failures > 0

    def succeeded(self) -> None:
        """Begin anew with the next failure."""
        self._failures = 0


@dataclass
class Link:
    """How the connection for one collection is doing.

    Attributes:
        connected: The last request succeeded, or a watch goes on.
        error: What failed; "" while connected.
        since: When ``connected`` last changed, in seconds since the epoch.
    """

    connected: bool = False
    error: str = ""
    since: float = field(default_factory=time.time)

    def set(self, error: str = "") -> bool:
        """Note a failure, or success with ""; return whether that is news."""
        news = self.connected == bool(error) or (bool(error) and error != self.error)
        if self.connected == bool(error):
            self.since = time.time()
        self.connected, self.error = not error, error
        return news


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list."""

    entries: dict[str, Entry[T]]
    version: str
    token: str
    complaints: list[str]


class Reflector(Generic[T]):
    """Keeps a shelf equal to a collection.

    Attributes:
        link: How it is doing.

    Args:
        versions: In which the collection may be found, the best first; which of them the server has is asked.
        optional: The server may have none, or not let us see it: it counts as empty then, if it was never seen.
        parameters: Selectors.
        news: Is called when anything in the shelf, or the link, may have changed.
    """

    def __init__(
        self,
        api: KubeApi,
        versions: tuple[Resource, ...],
        shelf: Shelf[T],
        *,
        optional: bool = False,
        parameters: Parameters | None = None,
        news: Callable[[], None] = lambda: None,
        backoff: Backoff | None = None,
    ) -> None:
        self._api = api
        self._versions = versions
        self._resource: Resource | None = None
        self._shelf = shelf
        self._optional = optional
        self._parameters = dict(parameters or {})
        self._news = news
        self._backoff = backoff or Backoff()
        self._hurry = asyncio.Event()
        self._patient = True
        self._missing = 0
        self.link = Link()

    async def run(self) -> None:
        """List and watch until cancelled."""
        while True:
            try:
                if not self._shelf.version:
                    await self._list()
                await self._watch()
            except KubeError as error:
                pause = self._failed(error)
                self._patient = not isinstance(error, AwayError)
                self._hurry.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._hurry.wait()

    def hurry(self) -> None:
        """Wait no longer for a server that was away: it has answered somebody else."""
        if not self._patient:
            self._hurry.set()

    def _failed(self, error: KubeError) -> float:
        """Take note of a failure; return how many seconds to wait."""
        asked = 0.0
        if isinstance(error, ApiError):
            asked = error.retry_after
            if error.is_gone:
                self._shelf.version = ""
                log.info("list anew resource=%s: %s", self._shelf.name, error)
                return self._backoff.failed(asked)
            if error.status in (403, 404):
                return self._withheld(error)
        if self._backoff.failing:  # a watch that breaks off once is resumed, and nobody needs to know
            self.link.set(str(error))
            self._news()
        return self._backoff.failed(asked)

    def _withheld(self, error: ApiError) -> float:
        """There is no such collection, or it may not be seen: others go on, and it is looked for every now and then."""
        missing = error.status == 404
        self._missing = self._missing + 1 if missing else 0
        self._shelf.version, self._resource = "", None
        known = self._shelf.synced and self._shelf.installed
        if not self._optional or (known and self._missing < REMOVED):
            if self.link.set(str(error)):
                log.error("api server refuses resource=%s: %s", self._shelf.name, error)
            self._news()
            return self._backoff.failed()
        if self.link.set() or self._shelf.installed or not self._shelf.synced:
            if missing:
                log.info("api server has none resource=%s", self._shelf.name)
            else:
                log.error("api server refuses resource=%s: %s", self._shelf.name, error)
        self._shelf.installed = False
        self._shelf.replace({})
        self._news()
        return MISSING_SECONDS * (0.5 + random.random())

    # --- list --------------------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        resource = self._resource = self._resource or await self._choose()
        entries: dict[str, Entry[T]] = {}
        token, limit, forgotten = "", PAGE, 0
        while True:
            asked = {**self._parameters, **({"limit": str(limit)} if limit else {})}
            try:
                body = await self._api.get(resource.path(), {**asked, **({"continue": token} if token else {})})
            except ApiError as error:
                if not (token and error.is_gone):
                    raise
                forgotten += 1
                entries, token, limit = {}, "", PAGE if forgotten < TOKENS else 0
                continue
            page = await asyncio.to_thread(self._read_page, body)
            entries.update(page.entries)
            for complaint in page.complaints:
                log.warning("%s of the api server not usable: %s", self._shelf.name, complaint)
            token = page.token
            if not token:
                break
        self._missing = 0
        self._shelf.installed = True
        self._shelf.replace(entries)
        self._shelf.version = page.version
        self.link.set()
        self._news()

    async def _choose(self) -> Resource:
        """Return the best version that the server has, by its document of the group; the first when it has none."""
        if len(self._versions) == 1:
            return self._versions[0]
        try:
            group = json.loads(await self._api.get(f"/apis/{self._versions[0].group}"))
            served = {version["version"] for version in group["versions"]}
        except (ApiError, ValueError, TypeError, KeyError):
            return self._versions[0]
        return next((each for each in self._versions if each.version in served), self._versions[0])

    def _read_page(self, body: bytes) -> Page[T]:
        """Read a page. Runs in a thread."""
        document = parsed(body)
        metadata = document.get("metadata")
        items = document.get("items")
        if not isinstance(metadata, dict) or not isinstance(metadata.get("resourceVersion"), str):
            raise AwayError("the answer is no list")
        entries, complaints = {}, []
        for item in items if isinstance(items, list) else []:
            try:
                key, entry = self._shelf.read(item)
            except ObjectError as error:
                complaints.append(str(error))
            else:
                entries[key] = entry
        return Page(entries, metadata["resourceVersion"], str(metadata.get("continue") or ""), complaints)

    # --- watch -------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        assert self._resource is not None
        asked = {**self._parameters, "resourceVersion": self._shelf.version, "allowWatchBookmarks": "true"}
        seconds = int(WATCH_SECONDS * (1 + random.random()))
        version, began = self._shelf.version, None
        try:
            async with self._api.watch(self._resource.path(), asked, seconds) as lines:
                began = time.monotonic()
                self.link.set()
                self._news()
                await self._follow(lines)
        finally:
            lasted = began is not None and time.monotonic() - began >= SHORTEST_WATCH
            if lasted:
                self._backoff.succeeded()
        if self._shelf.version == version and not lasted:
            raise AwayError("the watch ended at once")

    async def _follow(self, lines: AsyncIterator[bytes]) -> None:
        count = 0
        async for line in lines:
            if line.strip():
                self._event(parsed(line))
                self._backoff.succeeded()
            count += 1
            if count % _TURN == 0:
                await asyncio.sleep(0)

    def _event(self, event: Mapping[str, Any]) -> None:
        """Take over one event.

        Raises:
            ApiError: It is an error.
        """
        kind, item = event.get("type"), event.get("object")
        if kind == "ERROR":
            raise ApiError.of(item, 500)
        if kind == "BOOKMARK":
            self._advance(item)
            return
        if kind not in ("ADDED", "MODIFIED", "DELETED"):
            log.warning("event of an unknown type resource=%s type=%r", self._shelf.name, kind)
            return
        with suppress(ObjectError):
            key, entry = self._shelf.read(item)
            if kind == "DELETED":
                self._shelf.remove(key)
            else:
                self._shelf.put(key, entry)
        self._advance(item)
        self._news()

    def _advance(self, item: Any) -> None:
        metadata = item.get("metadata") if isinstance(item, dict) else None
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if isinstance(version, str) and version:
            self._shelf.version = version
