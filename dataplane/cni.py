"""``dataplane-cni``: what a container runtime runs to connect a container (CNI 1.1.0).

A plugin is a program: the command and the container are in its environment, the network's configuration is its input,
the result or one JSON object with a code is its output. This one checks what it was given and asks the node, which
listens on a unix socket and does everything else:

    POST /v1/cni   {"env": {"CNI_COMMAND": "ADD", ...}, "config": {...}}  ->  200 {"result": ...}, or 422 {"code": ...}

The file is copied to /opt/cni/bin as it stands (``dataplane cni install``) and runs with whatever Python is there: the
standard library only, and little of it, since a runtime starts it twice for each container. The node reads the same
request by the same rules (`request`), so both are here.
"""

import json
import os
import re
import socket
import stat
import sys
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")  # from 0.3.0 on a result has interfaces
NEWEST = VERSIONS[-1]
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
}
ATTACHMENTS = "cni.dev/valid-attachments"

# The codes of the specification, then our own.
INCOMPATIBLE_VERSION, UNSUPPORTED_FIELD, UNKNOWN_CONTAINER, INVALID_ENVIRONMENT = 1, 2, 3, 4
IO_FAILURE, DECODING_FAILURE, INVALID_CONFIG, TRY_AGAIN_LATER = 5, 6, 7, 11
NOT_AVAILABLE, LIMITED_CONNECTIVITY = 50, 51
EXISTS, MISMATCH, EXHAUSTED, REFUSED, NOT_SERVED = 100, 101, 102, 103, 104

RUN = "/run/dataplane"
TIMEOUT_S = 60.0  # a kubelet waits for minutes, and its next attempt begins with a DEL
IDENTIFIER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*", re.ASCII)
INTERFACE = re.compile(r"(?!\.{1,2}\Z)[^/:\s\0]{1,15}")


class CniError(Exception):
    """What the runtime gets in place of a result.

    Attributes:
        code: One of the constants above.
        details: More than the message says; "" is nothing more.
    """

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code, self.details = code, details


class Request(NamedTuple):
    """What a runtime wants, checked. What a command does not need is ""."""

    command: str
    container: str
    netns: str
    ifname: str
    arguments: dict[str, str]
    version: str
    network: str
    config: dict[str, Any]


# --- the request -----------------------------------------------------------------------------------------------------


def request(environment: Mapping[str, str], config: Any) -> Request:
    """Return the request that the environment and the network's configuration make.

    Raises:
        CniError: With the code that the specification has for what is wrong.
    """
    command = environment.get("CNI_COMMAND", "")
    if command not in REQUIRED:
        known = ", ".join([*REQUIRED, "VERSION"])
        raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND: {command!r}; expected one of {known}")
    for name in REQUIRED[command]:
        if not environment.get(name):
            raise CniError(INVALID_ENVIRONMENT, f"{name}: missing; {command} needs it")
    container, ifname = environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")
    if container and not IDENTIFIER.fullmatch(container):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_CONTAINERID: {container!r}; expected letters, digits and _ . -")
    if ifname and not (INTERFACE.fullmatch(ifname) and len(ifname.encode()) <= 15):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_IFNAME: {ifname!r}; expected the name of an interface")
    netns = environment.get("CNI_NETNS", "")
    if netns and (not netns.startswith("/") or "\0" in netns):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS: {netns!r}; expected an absolute path")
    arguments = _arguments(environment.get("CNI_ARGS", ""))
    version = _version(config, command)
    network = _network(config)
    return Request(command, container, netns, ifname, arguments, version, network, config)


def _arguments(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in text.split(";") if word]
    if not all(key and equals for key, equals, _ in pairs):
        raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {text!r}; expected KEY=VALUE pairs with ; between them")
    return {key: value for key, _, value in pairs}


def _version(config: Any, command: str) -> str:
    if not isinstance(config, dict):
        raise CniError(DECODING_FAILURE, "the network configuration is not a JSON object")
    version = config.get("cniVersion", "0.1.0")  # before 0.2.0 nobody wrote one
    if version not in VERSIONS:
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion: {version!r} is not supported", f"expected one of {VERSIONS}")
    since = SINCE.get(command, VERSIONS[0])
    if VERSIONS.index(version) < VERSIONS.index(since):
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion: {command} is not in {version}", f"it came with {since}")
    return str(version)


def _network(config: dict[str, Any]) -> str:
    name = config.get("name", "")
    if not isinstance(name, str) or not IDENTIFIER.fullmatch(name):
        raise CniError(INVALID_CONFIG, f"name: {name!r}; expected the network's name: letters, digits and _ . -")
    path = config.get("socket", "")
    if not isinstance(path, str) or "\0" in path or (path and not path.startswith("/")):
        raise CniError(INVALID_CONFIG, f"socket: {path!r}; expected the absolute path of the node's control socket")
    for key in ("ipam", "ipMasq"):
        if config.get(key):
            value = json.dumps(config[key])
            raise CniError(UNSUPPORTED_FIELD, f"{key}: {value} is not supported", "the node does this by itself")
    return name


# --- the node --------------------------------------------------------------------------------------------------------


def find_socket(folder: str = RUN) -> str:
    """Return the socket of the only node on this machine.

    Raises:
        CniError: There is none, or more than one.
    """
    try:
        found = sorted(entry.path for entry in os.scandir(folder) if _is_socket(entry))
    except FileNotFoundError:
        found = []
    except OSError as error:
        raise CniError(IO_FAILURE, f"{folder}: {error.strerror}") from None
    if len(found) > 1:  # a node that was killed leaves its socket behind
        found = [path for path in found if _listens(path)] or found[:1]
    if not found:
        raise CniError(TRY_AGAIN_LATER, f"no node is running: no socket in {folder}")
    if len(found) > 1:
        names = ", ".join(found)
        raise CniError(INVALID_CONFIG, f"several nodes are running: {names}", 'the configuration needs "socket"')
    return found[0]


def _is_socket(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISSOCK(entry.stat().st_mode)
    except OSError:  # a link to nowhere, or gone meanwhile
        return False


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(TIMEOUT_S)
        return probe.connect_ex(path) == 0


def ask(path: str, message: bytes) -> dict[str, Any]:
    """Return what the node answers; the HTTP is written by hand because ``http.client`` alone takes 15 ms to import.

    Raises:
        CniError: Nobody answers, or the node's answer is an error.
    """
    head = f"POST /v1/cni HTTP/1.1\r\nHost: node\r\nConnection: close\r\nContent-Length: {len(message)}\r\n\r\n"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(path)
            connection.sendall(head.encode() + message)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    except (FileNotFoundError, ConnectionError):
        raise CniError(TRY_AGAIN_LATER, f"no node is running: nobody listens on {path}") from None
    except TimeoutError:
        raise CniError(TRY_AGAIN_LATER, f"{path}: no answer within {TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise CniError(IO_FAILURE, f"{path}: {error.strerror or error}") from None
    return _answer(path, answer)


def _answer(path: str, answer: bytes) -> dict[str, Any]:
    start, _, body = answer.partition(b"\r\n\r\n")
    words = start.split(b" ", 2)
    try:
        status, content = int(words[1]), json.loads(body)
    except (LookupError, ValueError, RecursionError):
        raise CniError(IO_FAILURE, f"{path}: the answer broke off or makes no sense") from None
    if not isinstance(content, dict):
        raise CniError(IO_FAILURE, f"{path}: the answer is not a JSON object")
    if status == 200:
        return content
    if isinstance(content.get("code"), int):
        raise CniError(content["code"], str(content.get("msg", "")), str(content.get("details", "")))
    message = str(content.get("message", f"HTTP status {status}"))
    if status == 404:
        raise CniError(NOT_SERVED, f"the node at {path} serves no container runtime", "its file needs api.cni = true")
    raise CniError(IO_FAILURE, f"{path}: {message}")


# --- the program -----------------------------------------------------------------------------------------------------


def run(environment: Mapping[str, str], given: bytes) -> dict[str, Any] | None:
    """Carry out one command; return what is to be printed, None for nothing.

    Raises:
        CniError: The runtime is to be told.
    """
    if environment.get("CNI_COMMAND") == "VERSION":
        return {"cniVersion": version_of(given), "supportedVersions": list(VERSIONS)}
    if not environment.get("CNI_COMMAND"):
        raise CniError(INVALID_ENVIRONMENT, "CNI_COMMAND: missing", "a container runtime runs this program, not people")
    try:
        config = json.loads(given.decode())
    except (ValueError, RecursionError) as error:
        raise CniError(DECODING_FAILURE, f"the network configuration is not JSON: {error}") from None
    wanted = request(environment, config)
    variables = {name: value for name, value in environment.items() if name.startswith("CNI_")}
    message = json.dumps({"env": variables, "config": config}).encode()
    try:
        answer = ask(config.get("socket") or find_socket(), message)
    except CniError as error:
        if wanted.command != "STATUS":
            raise
        # Without the node no packet moves; with one that does not serve us, only new containers have to wait.
        down = error.code == TRY_AGAIN_LATER
        code = LIMITED_CONNECTIVITY if down else NOT_AVAILABLE
        raise CniError(error.code if error.code in (50, 51) else code, str(error), error.details) from None
    return answer.get("result")


def version_of(given: bytes) -> str:
    """Return the version that a configuration asks for; ours where it says none that we know."""
    try:
        version = json.loads(given.decode())["cniVersion"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return NEWEST
    return version if version in VERSIONS else NEWEST


def main() -> int:
    """Be the program: input, environment, output and exit status of the specification."""
    return speak(os.environ, sys.stdin.buffer, sys.stdout)


def speak(environment: Mapping[str, str], given: IO[bytes], output: IO[str]) -> int:
    """Read the input, carry out the command, write the result or the error, and return the exit status."""
    content = b""
    try:
        try:
            content = given.read()
        except OSError as error:
            raise CniError(IO_FAILURE, f"standard input: {error.strerror}") from None
        result = run(environment, content)
    except CniError as error:
        failure = {"cniVersion": version_of(content), "code": error.code, "msg": str(error), "details": error.details}
        print(json.dumps(failure), file=output)
        return 1
    if result is not None:
        print(json.dumps(result), file=output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
