"""The other end of the control API: HTTP over the unix socket with nothing but the standard library.

``show`` and ``status`` start in a tenth of a second because of that. Each way to fail is an exception with the exit
status that the command line gives it: 1 failed, 2 refused or ambiguous, 3 not running, 4 not found, 5 no permission.
"""

import errno
import http.client
import json
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from dataplane.control.query import Query
from dataplane.control.snapshot import ListKind

if TYPE_CHECKING:
    from dataplane.control.ipam_report import IpamReport

RUN = Path("/run/dataplane")
TIMEOUT_S = 10.0


class ControlError(Exception):
    """A request that did not succeed.

    Attributes:
        exit_code: What the command exits with.
        errors: More than the message, one line each: the errors of a configuration file.
    """

    exit_code = 1

    def __init__(self, message: str, errors: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.errors = tuple(errors)


class RefusedError(ControlError):
    """The node understood and declined; or the request is ambiguous."""

    exit_code = 2


class NotRunningError(ControlError):
    """Nobody listens."""

    exit_code = 3


class NotFoundError(ControlError):
    """The node does not know what was asked for."""

    exit_code = 4


class NoPermissionError(ControlError):
    """The socket is not ours to write to."""

    exit_code = 5


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket: the host of a URL has no meaning there."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(str(self._path))
        except BaseException:
            self.sock.close()
            raise


def get(path: Path, kind: str) -> dict[str, Any]:
    """Return a snapshot of the node that listens on ``path``."""
    return _request(path, "GET", f"/v1/{kind}")


class Rows:
    """The rows of a listing as they arrive: a million of them need no room here.

    Attributes:
        matched: How many would pass without a limit; known after the last row.

    Raises, while they are read:
        RefusedError: The node does not know a filter.
        ControlError: The answer broke off.
    """

    def __init__(self, path: Path, kind: ListKind, query: Query) -> None:
        self._path = path
        self._target = f"/v1/{kind}?{urlencode(query.words())}"
        self.matched = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _answered(self._path, "GET", self._target) as response:
            if response.status != http.client.OK:
                _answer(response.status, response.read())
            response.readline()  # the opening bracket; each row has a line of its own, and so has what follows them
            for line in response:
                if line.startswith(b"]"):
                    self.matched = int(_json(b"{" + line.lstrip(b"], "))["matched"])
                    return
                yield _json(line.strip().rstrip(b","))
        raise ControlError(f"{self._path}: the answer broke off")


def listing(path: Path, kind: ListKind, query: Query) -> dict[str, Any]:
    """Return ``{kind: rows, "matched": number}``: the rows that pass the query, and how many would without a limit."""
    rows = Rows(path, kind, query)
    return {kind: list(rows), "matched": rows.matched}


def delete_flows(path: Path, query: Query, everything: bool = False) -> int:
    """Make the node forget the flows that pass the query; return how many those were."""
    words = query.words() | ({"all": "yes"} if everything else {})
    return int(_request(path, "DELETE", f"/v1/conntrack?{urlencode(words)}")["deleted"])


def set_service(path: Path, namespace: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add or replace a service; returns ``snapshot.Reload``, as all edits do."""
    return _request(path, "PUT", _service(namespace, name), values)


def delete_service(path: Path, namespace: str, name: str) -> dict[str, Any]:
    """Delete a service."""
    return _request(path, "DELETE", _service(namespace, name))


def add_endpoint(path: Path, namespace: str, name: str, ip: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add an endpoint to a service, or change it."""
    return _request(path, "PUT", _endpoint(namespace, name, ip), values)


def drain_endpoint(path: Path, namespace: str, name: str, ip: str) -> dict[str, Any]:
    """Give an endpoint no new connections."""
    return _request(path, "POST", f"{_endpoint(namespace, name, ip)}/drain")


def delete_endpoint(path: Path, namespace: str, name: str, ip: str) -> dict[str, Any]:
    """Delete an endpoint."""
    return _request(path, "DELETE", _endpoint(namespace, name, ip))


def _service(namespace: str, name: str) -> str:
    return f"/v1/services/{quote(namespace, safe='')}/{quote(name, safe='')}"


def _endpoint(namespace: str, name: str, ip: str) -> str:
    return f"{_service(namespace, name)}/endpoints/{quote(ip, safe='')}"


def ipam(path: Path) -> "IpamReport":
    """Return the books of addresses."""
    books: Any = _request(path, "GET", "/v1/ipam")
    return cast("IpamReport", books)


def release_address(path: Path, address: str) -> dict[str, Any]:
    """Take back an address of pods that no pod has; returns ``snapshot.Reload``."""
    return _request(path, "DELETE", f"/v1/ipam/addresses/{quote(address, safe='')}")


def forget_node(path: Path, node: str) -> dict[str, Any]:
    """Take back all addresses of a node that will not come back; returns ``snapshot.Reload``."""
    return _request(path, "DELETE", f"/v1/ipam/nodes/{quote(node, safe='')}")


def reload(path: Path) -> dict[str, Any]:
    """Make the node read its file again; returns ``snapshot.Reload``.

    Raises:
        RefusedError: The file is wrong, or changes what cannot be changed; nothing was done.
    """
    return _request(path, "POST", "/v1/reload")


def listens(path: Path) -> bool:
    """Whether a unix socket may have somebody behind it: only a refused connection says that nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(TIMEOUT_S)
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def find_socket(folder: Path = RUN) -> Path:
    """Return the socket of the one node on this machine.

    Raises:
        NotRunningError: There is none.
        RefusedError: There are several.
        NoPermissionError: The folder may not be read.
    """
    try:
        found = sorted(entry for entry in folder.iterdir() if stat.S_ISSOCK(entry.stat().st_mode))
    except FileNotFoundError:
        found = []
    except PermissionError:
        raise NoPermissionError(f"{folder}: no permission to look for a node's socket") from None
    if len(found) > 1:  # a node that was killed leaves its socket behind
        found = [entry for entry in found if listens(entry)] or found[:1]
    if not found:
        raise NotRunningError(f"no node is running: no socket in {folder}")
    if len(found) > 1:
        names = ", ".join(str(entry) for entry in found)
        raise RefusedError(f"several nodes are running: {names}; choose one with --socket or DATAPLANE_SOCKET")
    return found[0]


def _request(path: Path, method: str, target: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    with _answered(path, method, target, body) as response:
        return _answer(response.status, response.read())


@contextmanager
def _answered(
    path: Path, method: str, target: str, body: Mapping[str, Any] | None = None
) -> Iterator[http.client.HTTPResponse]:
    connection = _Connection(path)
    try:
        _send(connection, method, target, body)
        yield connection.getresponse()
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunningError(f"no node is running: nobody listens on {path}") from None
    except PermissionError:
        raise NoPermissionError(f"{path}: no permission to write to the socket (mode 0660); run as its owner") from None
    except TimeoutError:
        raise ControlError(f"{path}: no answer within {TIMEOUT_S:.0f} s") from None
    except BrokenPipeError:
        raise  # whoever reads what we print has gone
    except (OSError, http.client.HTTPException) as error:
        raise ControlError(f"{path}: {str(error) or type(error).__name__}") from None
    finally:
        connection.close()


def _send(connection: _Connection, method: str, target: str, body: Mapping[str, Any] | None) -> None:
    try:
        connection.request(method, target, None if body is None else json.dumps(body, default=str).encode())
    except BrokenPipeError as error:
        raise ControlError(f"the node hung up: {error}") from None


def _json(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ControlError("the answer is not a JSON object")
    return content


def _answer(code: int, body: bytes) -> dict[str, Any]:
    content = _json(body)
    if code == http.client.OK:
        return content
    errors = {http.client.NOT_FOUND: NotFoundError, http.client.UNPROCESSABLE_ENTITY: RefusedError}
    message = str(content.get("message", f"HTTP status {code}"))
    raise errors.get(http.HTTPStatus(code), ControlError)(message, content.get("errors", ()))
