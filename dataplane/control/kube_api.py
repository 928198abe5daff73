"""A client of the Kubernetes API: plain HTTP and JSON, by kubernetes.io/docs/reference/using-api/api-concepts.

Nothing here knows what the objects mean. Every failure is one of two: the server could not be asked (`AwayError`), or
it answered with a status that is not success (`ApiError`), whose text is the ``message`` of its ``Status`` object.

A connection that says nothing is noticed in two ways: the kernel probes idle connections (15 s, then every 5 s, three
times), and a watch that outlives the time that it asked for by ten seconds is given up.
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from dataplane import __version__
from dataplane.control.kube_config import Access, Token
from dataplane.control.transport import os_text

if TYPE_CHECKING:
    import aiohttp

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # the longest silence within an answer: an API server gives up on a request after a minute
OVERTIME_SECONDS = 10.0
LONGEST_EVENT = 16 << 20  # bytes: etcd refuses objects of more than 1.5 MiB, so a longer line is none

TOO_LARGE = "ResourceVersionTooLarge"  # a cause of a Status whose reason is Timeout
MERGE_PATCH = "application/merge-patch+json"

Parameters: TypeAlias = Mapping[str, str]


class KubeError(Exception):
    """A request that failed."""


class AwayError(KubeError):
    """The server could not be asked, or stopped answering."""


class ApiError(KubeError):
    """The server answered that it will not.

    Attributes:
        status: Of HTTP, or the ``code`` of a ``Status`` in a watch.
        reason: A word for programs, such as ``Expired`` or ``Forbidden``; "" when there is none.
        retry_after: Seconds that the server asks to be left alone; 0 when it does not.
    """

    def __init__(self, status: int, reason: str = "", text: str = "", retry_after: float = 0) -> None:
        super().__init__(f"{status} {reason}: {text}".rstrip(": ") if text else f"{status} {reason}".rstrip())
        self.status, self.reason, self.retry_after = status, reason, retry_after

    @property
    def is_gone(self) -> bool:
        """Whether a resource version or a continue token is of no use: what began with it has to begin anew.

        It is too old, or, after etcd was restored from a backup, newer than anything that the server has.
        """
        return self.status == 410 or self.reason in ("Gone", "Expired", TOO_LARGE)

    @classmethod
    def of(cls, status: Any, code: int, retry_after: float = 0) -> "ApiError":
        """Return the error that a ``Status`` object describes; anything else is an error without words."""
        if not isinstance(status, dict) or status.get("kind") != "Status":
            return cls(code, retry_after=retry_after)
        details = status.get("details")
        details = details if isinstance(details, dict) else {}
        asked, causes, given = details.get("retryAfterSeconds"), details.get("causes"), status.get("code")
        too_large = isinstance(causes, list) and any(
            isinstance(c, dict) and c.get("reason") == TOO_LARGE for c in causes
        )
        return cls(
            given if isinstance(given, int) and given else code,
            TOO_LARGE if too_large else str(status.get("reason") or ""),
            str(status.get("message") or ""),
            retry_after or (float(asked) if isinstance(asked, int) else 0),
        )


@dataclass(frozen=True, slots=True)
class Resource:
    """A collection of the API.

    Attributes:
        name: In URLs: ``endpointslices``.
        group: "" is core.
    """

    name: str
    version: str = "v1"
    group: str = ""

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Return the URL's path of all objects, of those in a namespace, of one, or of a part of one."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        within = f"/namespaces/{namespace}" if namespace else ""
        return "/".join(part for part in (f"{root}{within}", self.name, name, subresource) if part)


class KubeApi:
    """Connections to one API server.

    Args:
        access: How it is reached.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._token = Token(access)
        self._tls = access.tls()
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, parameters: Parameters | None = None) -> bytes:
        """Return the body of what is at this path.

        Raises:
            KubeError: It cannot be had.
        """
        return await self._asked("GET", path, parameters)

    async def patch(self, path: str, body: Any, kind: str = MERGE_PATCH) -> dict[str, Any]:
        """Change a part of an object (RFC 7386) and return all of it.

        Raises:
            KubeError: It was not changed, as far as that is known; 409: not from that ``resourceVersion``.
        """
        return parsed(await self._asked("PATCH", path, None, body, kind))

    async def create(self, path: str, body: Any) -> dict[str, Any]:
        """Add an object to the collection at this path and return it.

        Raises:
            KubeError: It was not added, as far as that is known; 409: there is one with this name.
        """
        return parsed(await self._asked("POST", path, None, body))

    async def replace(self, path: str, body: Any) -> dict[str, Any]:
        """Replace an object whole and return it.

        Raises:
            KubeError: It was not replaced, as far as that is known; 409: not from that ``resourceVersion``.
        """
        return parsed(await self._asked("PUT", path, None, body))

    @asynccontextmanager
    async def watch(self, path: str, parameters: Parameters, seconds: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """Give the lines of a watch, each an event, until the server ends it, which it should after ``seconds``.

        Raises:
            KubeError: It could not begin, broke off, or went on for too long.
        """
        asked = {**parameters, "watch": "true", "timeoutSeconds": str(seconds)}
        deadline = asyncio.get_running_loop().time() + seconds + OVERTIME_SECONDS
        async with self._answer("GET", path, asked, silence=None) as answer:
            yield _lines(answer.content, deadline)

    async def close(self) -> None:
        """End all connections; a second call does nothing."""
        if self._session is not None:
            await self._session.close()

    # --- one request -------------------------------------------------------------------------------------------------

    async def _asked(
        self, method: str, path: str, parameters: Parameters | None, body: Any = None, kind: str = "application/json"
    ) -> bytes:
        async with self._answer(method, path, parameters, body, kind) as answer:
            return await answer.read()

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, parameters: Parameters | None, body: Any = None,
        kind: str = "application/json", silence: float | None = ANSWER_SECONDS,
    ) -> AsyncIterator["aiohttp.ClientResponse"]:  # fmt: skip
        """Send a request and give the answer; once more, with a fresh token, if the server refuses the one we had."""
        import aiohttp

        data = None if body is None else json.dumps(body).encode()
        options: dict[str, Any] = {"params": parameters, "data": data, "allow_redirects": False}
        options["timeout"] = aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=silence)
        if self._access.server_name:
            options["server_hostname"] = self._access.server_name
        try:
            for again in (self._token.rotates, False):
                headers = self._headers(kind if data is not None else "")
                request = self._opened().request(method, self._access.server + path, headers=headers, **options)
                async with _Begun(request) as answer:
                    if answer.status == 401 and again:
                        self._token.forget()
                        continue
                    if not 200 <= answer.status < 300:
                        raise await _refusal(answer)
                    yield answer
                    return
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
            raise AwayError(f"{self._access.server}: {_why(error)}") from None

    def _headers(self, kind: str) -> dict[str, str]:
        token = self._token.get(time.monotonic())
        return {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # on a LAN, unpacking costs more than it saves
            **({"Authorization": f"Bearer {token}"} if token else {}),
            **({"Content-Type": kind} if kind else {}),
        }

    def _opened(self) -> "aiohttp.ClientSession":
        if self._session is None:
            import aiohttp

            connector = aiohttp.TCPConnector(
                ssl=self._tls if self._tls is not None else True, limit=0, socket_factory=_probed_socket
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers={"User-Agent": f"dataplane/{__version__}"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


class _Begun:
    """A request whose answer has to begin within ``ANSWER_SECONDS``, however long it may then go on."""

    def __init__(self, request: "aiohttp.client._RequestContextManager") -> None:
        self._request = request

    async def __aenter__(self) -> "aiohttp.ClientResponse":
        async with asyncio.timeout(ANSWER_SECONDS):  # wait_for may swallow a cancellation (cpython#86296)
            return await self._request.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self._request.__aexit__(kind, error, where)


def _probed_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a socket that notices that the other side has vanished."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)  # ms, for what was sent and not acknowledged
    return made


async def _lines(content: "aiohttp.StreamReader", deadline: float) -> AsyncIterator[bytes]:
    """Yield whole lines of any length: aiohttp's own are limited."""
    held = bytearray()
    searched = 0
    while True:
        async with asyncio.timeout_at(deadline):
            chunk = await content.readany()
        if not chunk:
            return  # what is held is the beginning of an event whose end was lost: it comes again
        held += chunk
        while (end := held.find(b"\n", searched)) >= 0:
            yield bytes(held[:end])
            del held[: end + 1]
            searched = 0
        searched = len(held)
        if searched > LONGEST_EVENT:
            raise AwayError(f"an event of more than {LONGEST_EVENT} bytes")


async def _refusal(answer: "aiohttp.ClientResponse") -> ApiError:
    body = await answer.read()
    try:
        status = json.loads(body)
    except ValueError:
        status = None
    given = answer.headers.get("Retry-After", "")
    return ApiError.of(status, answer.status, float(given) if given.isdecimal() else 0)


def parsed(body: bytes) -> dict[str, Any]:
    """Return the object that an answer or an event is.

    Raises:
        AwayError: It is none.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise AwayError("the answer is not JSON") from None
    if not isinstance(value, dict):
        raise AwayError("the answer is no object")
    return value


def _why(error: Exception) -> str:
    """Return what failed, without the library's own words for it."""
    import aiohttp

    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return os_text(error.os_error)
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | ConnectionError):
        return "the connection broke off"
    return str(error) or type(error).__name__
