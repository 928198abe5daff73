"""A client of etcd: the part of its v3 API that a node needs, spoken as JSON over HTTP (etcd's gRPC gateway).

Keys and values are text here and base64 on the wire; 64-bit numbers are JSON strings, and what is 0 or empty is left
out. A range comes in pages of one revision, so that a hundred thousand keys neither make one huge answer nor keep the
loop from its packets. A watch is one answer that does not end, a line per message.

Each request goes to the endpoint that answered last, then to the others. What may have been carried out is not asked
again: only the caller knows whether a second time does harm.

Every call may raise, besides what is said of it:
    UnavailableError: No endpoint answers, or none can (no leader): later it may.
    EtcdError: etcd refuses.
"""

import asyncio
import json
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, NamedTuple, TypeAlias

import aiohttp

from dataplane.control.transport import keepalive_socket, os_text

PAGE = 1000  # keys per answer: to take one apart keeps the packets waiting for 5 ms if values have 200 bytes
HEAVY_PAGE = 64  # keys whose values have up to 20 kB, as full blocks of addresses do
_STEP = 64  # keys that are taken apart in one go
_PAGE_TRIES = 3  # a compaction may fall between two pages
_SILENT_SECONDS = 5.0  # then the watch's endpoint is asked whether it still is there
_READ_BUFFER = 1 << 18
_UNAVAILABLE = frozenset({1, 2, 4, 14})  # gRPC: cancelled, unknown (a time-out inside etcd), deadline, unavailable
_NOT_FOUND, _OUT_OF_RANGE = 5, 11
_GATEWAY_ERRORS = frozenset({502, 503, 504})
_HAS_LEADER = {"Grpc-Metadata-hasleader": "true"}  # a member that lost the others must not keep a watch open in silence

Answer: TypeAlias = dict[str, Any]


class EtcdError(Exception):
    """A request that etcd refuses; the message is etcd's."""


class UnavailableError(EtcdError):
    """A request that nobody answered; whether it was carried out is not known."""


class LeaseGoneError(EtcdError):
    """The lease has ended."""


class CompactedError(EtcdError):
    """The revision that was asked for is forgotten, or not there yet.

    Attributes:
        revision: The oldest one that is there; 0 when etcd did not say.
    """

    def __init__(self, revision: int) -> None:
        super().__init__(f"revisions before {revision} are compacted" if revision else "the revision is not there")
        self.revision = revision


class KeyValue(NamedTuple):
    """One key. Bytes that are no UTF-8 are shown as backslash escapes; a deleted key has no value and version 0."""

    key: str
    value: str
    create_revision: int
    mod_revision: int
    version: int
    lease: int

    @property
    def deleted(self) -> bool:
        """Whether this is the news that there is no such key any more."""
        return self.version == 0


class Range(NamedTuple):
    """The keys of a prefix in their order, all as they were at ``revision``."""

    items: tuple[KeyValue, ...]
    revision: int


class Events(NamedTuple):
    """What a watch has seen.

    Attributes:
        revision: Nothing up to this one is missing: a watch that begins anew goes on behind it.
        events: In order, puts and deletions. Empty: the store is there, and nothing happened.
    """

    revision: int
    events: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction: ``target`` of the key equals the value. A key that does not exist has all zeros."""

    key: str
    target: Literal["mod_revision", "create_revision", "version", "value"]
    equals: int | str


@dataclass(frozen=True, slots=True)
class Put:
    """Set a key; with a lease it goes when that ends."""

    key: str
    value: str
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key, or every key that begins with it."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    """Read a key within a transaction."""

    key: str


Operation: TypeAlias = Put | Delete | Get


class Txn(NamedTuple):
    """What became of a transaction.

    Attributes:
        succeeded: All comparisons held, and ``success`` was carried out; else ``failure`` was.
        responses: One per operation: what a `Get` has read, None for a key that is not there and for the others.
        wrote: Something was put or deleted, in ``revision``; else that is merely the store's.
    """

    succeeded: bool
    revision: int
    responses: tuple[KeyValue | None, ...]
    wrote: bool


class Etcd:
    """A connection to one cluster.

    Args:
        endpoints: URLs of its members, such as ``http://127.0.0.1:2379``.
        timeout: Seconds that one member has for an answer.
    """

    def __init__(self, endpoints: Sequence[str], timeout: float = 5.0) -> None:
        self.endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self._timeout = timeout
        self._at = 0
        self._opened: aiohttp.ClientSession | None = None

    @property
    def endpoint(self) -> str:
        """The member that is asked first."""
        return self.endpoints[self._at]

    async def close(self) -> None:
        """Close all connections; watches end with an error."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    # --- keys --------------------------------------------------------------------------------------------------------

    async def range(self, prefix: str, *, keys_only: bool = False, heavy: str = "") -> Range:
        """Return all keys that begin with the prefix, as they were at one revision; without values if not wanted.

        ``heavy`` is the prefix of those among them that have large values: they come in smaller pages.
        """
        pieces = [(_encoded(prefix), _end(prefix), PAGE)]
        if heavy:
            inner = (_encoded(heavy), _end(heavy), HEAVY_PAGE)
            pieces = [(_encoded(prefix), inner[0], PAGE), inner, (inner[1], _end(prefix), PAGE)]
        for _ in range(_PAGE_TRIES - 1):
            try:
                return await self._pages(pieces, keys_only)
            except CompactedError:
                continue
        return await self._pages(pieces, keys_only)

    async def _pages(self, pieces: Sequence[tuple[str, str, int]], keys_only: bool) -> Range:
        items: list[KeyValue] = []
        revision = 0
        for begin, end, limit in pieces:
            start = begin
            while start != end:
                page = {"key": start, "range_end": end, "limit": limit, "revision": revision, "keys_only": keys_only}
                answer = await self._call("kv/range", page, again=True)
                revision = revision or _revision(answer)
                found = answer.get("kvs", ())
                for first in range(0, len(found), _STEP):
                    items += map(_item, found[first : first + _STEP])
                    await asyncio.sleep(0)
                # Not by the decoded key: one that is no UTF-8 would not come back.
                more = answer.get("more")
                start = b64encode(b64decode(found[-1]["key"]) + b"\0").decode() if more else end
        return Range(tuple(items), revision)

    async def get(self, key: str) -> KeyValue | None:
        """Return a key; None if there is none."""
        answer = await self._call("kv/range", {"key": _encoded(key)}, again=True)
        return next(map(_item, answer.get("kvs", ())), None)

    async def put(self, key: str, value: str, lease: int = 0) -> int:
        """Set a key; return the revision.

        Raises:
            LeaseGoneError: The lease has ended.
        """
        body = {"key": _encoded(key), "value": _encoded(value), "lease": lease}
        return _revision(await self._call("kv/put", body))

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether there was one."""
        return bool(int((await self._call("kv/deleterange", {"key": _encoded(key)})).get("deleted", 0)))

    async def txn(
        self, compare: Iterable[Compare], success: Iterable[Operation], failure: Iterable[Operation] = ()
    ) -> Txn:
        """Carry out ``success`` if all comparisons hold, else ``failure``, in one revision.

        etcd takes 128 operations at most, and no key twice among those that write.

        Raises:
            LeaseGoneError: One of the leases has ended; nothing was done.
        """
        body = {
            "compare": [_comparison(each) for each in compare],
            "success": [_operation(each) for each in success],
            "failure": [_operation(each) for each in failure],
        }
        answer = await self._call("kv/txn", body)
        responses = answer.get("responses", ())
        read = (each.get("response_range", {}).get("kvs", ()) for each in responses)
        found = tuple(next(map(_item, items), None) for items in read)
        wrote = any("response_put" in each or "deleted" in each.get("response_delete_range", {}) for each in responses)
        return Txn(answer.get("succeeded", False), _revision(answer), found, wrote)

    # --- leases ------------------------------------------------------------------------------------------------------

    async def grant(self, ttl: float) -> int:
        """Return a new lease; etcd rounds up to whole seconds, and to twice its election's time."""
        return int((await self._call("lease/grant", {"TTL": ceil(ttl)}, again=True))["ID"])

    async def keep_alive(self, lease: int) -> int:
        """Let a lease last its whole time from now on; return that time in seconds, 0: it is gone."""
        answer = await self._call("lease/keepalive", {"ID": lease}, again=True)
        return max(0, int(answer.get("result", {}).get("TTL", 0)))

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; one that is gone already is as good."""
        try:
            await self._call("lease/revoke", {"ID": lease}, again=True)
        except LeaseGoneError:
            return

    # --- watching ----------------------------------------------------------------------------------------------------

    async def watch(self, prefix: str, start_revision: int) -> AsyncGenerator[Events, None]:
        """Yield what happens to keys that begin with the prefix, from a revision on; what one wrote comes as one.

        The first value comes when the watch stands, with no events; so does one every few seconds of silence, in which
        the member was asked whether it still is there. Close it (``contextlib.aclosing``) to stop.

        Raises:
            CompactedError: The revision is forgotten, or the store never had it: read the whole range again.
            UnavailableError: The connection is lost: watch again, from behind the last revision.
        """
        create = {
            "key": _encoded(prefix),
            "range_end": _end(prefix),
            "start_revision": start_revision,
            "progress_notify": True,
            "fragment": True,  # else a burst of more than 1.5 MB does not fit into a message
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=None)
        known, parts = start_revision - 1, list[KeyValue]()
        endpoint = self.endpoint  # others may turn to the next one meanwhile
        try:
            request = self._session.post(
                f"{endpoint}/v3/watch", json={"create_request": create}, timeout=timeout, headers=_HAS_LEADER
            )
            async with request as response:
                if response.status != 200:
                    raise _error(response.status, _parsed(await response.read()))
                lines = _Lines(response.content)
                while True:
                    try:
                        line = await lines.next()
                    except TimeoutError:
                        await self._ask(endpoint, "kv/range", {"key": _encoded("\0")})
                        yield Events(known, ())
                        continue
                    message = _message(line)
                    behind = message.get("created") and _revision(message) < known
                    # A member that lags is told the newest by its leader; else the whole store came from a backup.
                    if behind and _revision(await self._ask(endpoint, "kv/range", {"key": _encoded("\0")})) < known:
                        raise CompactedError(0)
                    parts += (_item(event["kv"]) for event in message.get("events", ()))
                    if message.get("fragment"):
                        continue
                    if parts:
                        known = parts[-1].mod_revision  # not the header's: what is behind that may be on its way
                    elif not message.get("created"):
                        known = max(known, _revision(message))
                    yield Events(known, tuple(parts))
                    parts = []
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._turn(endpoint)
            raise UnavailableError(f"{endpoint}: {_reason(error)}") from error
        except UnavailableError:
            self._turn(endpoint)
            raise

    # --- requests ----------------------------------------------------------------------------------------------------

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(socket_factory=keepalive_socket),
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                read_bufsize=_READ_BUFFER,
            )
        return self._opened

    async def _call(self, path: str, body: Mapping[str, Any], *, again: bool = False) -> Answer:
        """Ask one member after the other; unless ``again``, the next only when the request never left."""
        for left in reversed(range(len(self.endpoints))):
            endpoint = self.endpoint
            try:
                return await self._ask(endpoint, path, body)
            except UnavailableError as error:
                self._turn(endpoint)
                if not left or (not again and not isinstance(error.__cause__, aiohttp.ClientConnectorError)):
                    raise
        raise AssertionError("without endpoints")

    async def _ask(self, endpoint: str, path: str, body: Mapping[str, Any]) -> Answer:
        try:
            async with self._session.post(f"{endpoint}/v3/{path}", json=body) as response:
                status, content = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(f"{endpoint}: {_reason(error)}") from error
        answer = _parsed(content)
        if status != 200 or "error" in answer:
            raise _error(status, answer)
        return answer

    def _turn(self, failed: str) -> None:
        """Ask the next endpoint from now on, unless another call that failed has turned already."""
        if self.endpoint == failed:
            self._at = (self._at + 1) % len(self.endpoints)


# --- the wire's form --------------------------------------------------------------------------------------------------


def _encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return b64decode(text).decode(errors="backslashreplace")


def _end(prefix: str) -> str:
    """Return the end of the range of all keys with a prefix: the prefix with its last byte one higher."""
    raw = prefix.encode()
    return b64encode(raw[:-1] + bytes([raw[-1] + 1]) if raw else b"\0").decode()  # UTF-8 has no byte 0xFF


def _item(given: Mapping[str, Any]) -> KeyValue:
    return KeyValue(
        _decoded(given["key"]),
        _decoded(given.get("value", "")),
        int(given.get("create_revision", 0)),
        int(given.get("mod_revision", 0)),
        int(given.get("version", 0)),
        int(given.get("lease", 0)),
    )


def _comparison(given: Compare) -> Answer:
    value = given.equals if isinstance(given.equals, int) else _encoded(given.equals)
    target = given.target.partition("_")[0].upper()
    return {"key": _encoded(given.key), "target": target, "result": "EQUAL", given.target: value}


def _operation(given: Operation) -> Answer:
    key = _encoded(given.key)
    match given:
        case Put():
            return {"request_put": {"key": key, "value": _encoded(given.value), "lease": given.lease}}
        case Delete():
            end = {"range_end": _end(given.key)} if given.prefix else {}
            return {"request_delete_range": {"key": key, **end}}
        case Get():
            return {"request_range": {"key": key}}


def _revision(answer: Mapping[str, Any]) -> int:
    return int(answer.get("header", {}).get("revision", 0))


def _message(line: bytes) -> Answer:
    """Return one message of a watch."""
    answer = _parsed(line)
    if "error" in answer:
        raise _error(200, answer)
    message: Answer = answer.get("result", {})
    if message.get("canceled"):
        if "compact_revision" in message:
            raise CompactedError(int(message["compact_revision"]))
        raise UnavailableError(message.get("cancel_reason") or "the watch was cancelled")
    return message


class _Lines:
    """The messages of a watch, one per line."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content
        self._whole: deque[bytes] = deque()
        self._parts: list[bytes] = []

    async def next(self) -> bytes:
        """Return the next message.

        Raises:
            TimeoutError: It is silent; ask for the next one again.
            UnavailableError: There will be no more.
        """
        while not self._whole:
            try:
                async with asyncio.timeout(_SILENT_SECONDS):  # wait_for() of Python 3.11 may lose a cancellation
                    chunk = await self._content.readany()
            except RuntimeError:  # aiohttp's, for a connection that was closed on this side
                raise UnavailableError("the connection was closed") from None
            if not chunk and not any(self._parts):
                raise UnavailableError("the watch was closed")
            chunk = chunk or b"\n"  # the end ends a line, too
            first, *lines = chunk.split(b"\n")
            self._parts.append(first)
            for line in lines:
                self._whole.append(b"".join(self._parts))
                self._parts = [line]
        return self._whole.popleft()


# --- what can go wrong ------------------------------------------------------------------------------------------------


def _parsed(content: bytes) -> Answer:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    return answer if isinstance(answer, dict) else {"error": "the answer is no JSON; is this etcd?"}


def _error(status: int, answer: Answer) -> EtcdError:
    given = answer.get("error", "")
    details = given if isinstance(given, dict) else answer  # a stream's errors are objects
    code = details.get("code") or details.get("grpc_code")
    code = code if isinstance(code, int) else 0  # a proxy may have words
    text = str(details.get("message") or given or f"status {status}")
    if code == _OUT_OF_RANGE and "compacted" in text:
        return CompactedError(0)
    if code == _NOT_FOUND and "lease" in text:
        return LeaseGoneError(text)
    if code in _UNAVAILABLE or status in _GATEWAY_ERRORS:
        return UnavailableError(text)
    return EtcdError(text)


def _reason(error: Exception) -> str:
    """Say in a few words why a member could not be asked."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        return os_text(error.os_error)
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
        return "the connection was cut"
    return str(error).lower() or type(error).__name__
