"""Clients for netexec servers: sockets of this process that were made inside a namespace, and what they see.

A socket belongs to the namespace that its thread was in when it was made, so a test needs no process to be a client:
a question costs a millisecond, and a test can hold a socket while it changes the network under it.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import NamedTuple, TypeVar

from dataplane.devices.namespace import NamespaceHandle, in_namespace
from tests.netns.harness import Namespace

PATIENCE = 2.0  # of one question: nothing here takes longer than some milliseconds unless it is lost
SILENCE = 0.3  # after which a packet that should be dropped was
REFUSED_BY = 3.0
ETH_P_ALL = 3
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST

Endpoint = tuple[str, int]
Result = TypeVar("Result")


class Answer(NamedTuple):
    """Who answered, whom it saw, where the answer came from, and what the client itself is."""

    name: str
    seen: Endpoint
    peer: Endpoint
    own: Endpoint
    body: bytes = b""

    @property
    def port_kept(self) -> bool:
        """Whether the server saw the client's own source port."""
        return self.seen[1] == self.own[1]


def inside(namespace: Namespace, function: Callable[[], Result]) -> Result:
    """Return what the function returns inside the namespace."""
    fd = os.open(namespace.path, os.O_RDONLY)
    try:
        return in_namespace(NamespaceHandle(fd, namespace.path, False, 0), function)
    finally:
        os.close(fd)


def udp_socket(namespace: Namespace, port: int = 0, address: str = "0.0.0.0") -> socket.socket:
    """Return an unconnected UDP socket; errors that ICMP reports are raised on it, too (``IP_RECVERR``)."""
    made = inside(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.setsockopt(socket.IPPROTO_IP, 11, 1)
    made.bind((address, port))
    made.settimeout(PATIENCE)
    return made


def tcp_socket(namespace: Namespace, port: int = 0, address: str = "0.0.0.0") -> socket.socket:
    """Return a TCP socket that is not connected; ``port`` may be one that was used before."""
    made = inside(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if port:
        made.bind((address, port))
    made.settimeout(PATIENCE)
    return made


def ask_udp(
    namespace: Namespace, address: str, port: int, *, source: int = 0, timeout: float = PATIENCE, body: bytes = b"x"
) -> Answer:
    """Send one datagram and return the answer; it is not sent again."""
    with udp_socket(namespace, source) as client:
        return exchange(client, (address, port), timeout=timeout, body=body)


def exchange(client: socket.socket, target: Endpoint, *, timeout: float = PATIENCE, body: bytes = b"x") -> Answer:
    """Do the same with a socket that is there already."""
    client.settimeout(timeout)
    client.sendto(body, target)
    while True:
        content, peer = client.recvfrom(65535)
        name, seen, answer = content.split(b" ", 2)
        if answer == body:  # not a late answer to an earlier question
            return Answer(
                name.decode(), _endpoint(seen), peer, (client.getsockname()[0], client.getsockname()[1]), body
            )


def _endpoint(text: bytes) -> Endpoint:
    address, port = text.decode().split(":")
    return address, int(port)


def ask_tcp(
    namespace: Namespace, address: str, port: int, *, source: int = 0, timeout: float = PATIENCE, body: bytes = b"x"
) -> Answer:
    """Connect, have the body returned, and let the server close first."""
    with tcp_socket(namespace, source) as client:
        client.settimeout(timeout)
        _connect(client, (address, port))
        return post(client, body, close=True)


def _connect(client: socket.socket, target: Endpoint) -> None:
    """Connect, if need be after the last segment of an earlier connection from the same port has come."""
    deadline = time.monotonic() + PATIENCE
    while error := client.connect_ex(target):
        if error != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
            raise TimeoutError if error == errno.EAGAIN else OSError(error, os.strerror(error))
        time.sleep(0.001)


def post(client: socket.socket, body: bytes = b"x", *, close: bool = False) -> Answer:
    """Have the body returned over a connection that is there already; it stays open unless ``close``."""
    connection = HTTPConnection("server")
    connection.sock = client
    connection.request("POST", "/", body, {"Connection": "close"} if close else {})
    response = connection.getresponse()
    seen = _endpoint(response.headers["X-Client"].encode())
    answer = Answer(response.headers["X-Name"], seen, client.getpeername(), client.getsockname(), response.read())
    assert answer.body == body
    if close:
        assert client.recv(1) == b"", "the server has closed"
    return answer


ASK: dict[str, Callable[..., Answer]] = {"tcp": ask_tcp, "udp": ask_udp}


@contextmanager
def connected(
    namespace: Namespace, address: str, port: int, *, source: int = 0, own: str = "0.0.0.0"
) -> Iterator[socket.socket]:
    """Give a TCP connection, if wanted from a certain port and address."""
    with tcp_socket(namespace, source, own) as client:
        client.connect((address, port))
        yield client


def names(namespace: Namespace, protocol: str, target: Endpoint, count: int) -> list[str]:
    """Ask so often, each time from another port, and return who answered, in order."""
    return [ASK[protocol](namespace, *target).name for _ in range(count)]


def refusal(namespace: Namespace, protocol: str, address: str, port: int) -> float:
    """Return how many seconds it takes until the client is told that nobody is there.

    Raises:
        TimeoutError: It is not told.
    """
    with udp_socket(namespace) if protocol == "udp" else tcp_socket(namespace) as client:
        client.settimeout(SILENCE)
        start = time.perf_counter()
        try:
            client.connect((address, port))
            client.send(b"x")
            client.recv(1)
        except ConnectionRefusedError:
            return time.perf_counter() - start
    raise AssertionError(f"{protocol} {address}:{port} was answered")


def is_refused(namespace: Namespace, protocol: str, address: str, port: int) -> bool:
    """Tell whether a question is refused, and not answered.

    It is asked again when nothing comes: ICMP errors to one host are limited to 6 at once and then one a second.
    """
    deadline = time.monotonic() + REFUSED_BY
    while True:
        try:
            ASK[protocol](namespace, address, port, timeout=SILENCE)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            assert time.monotonic() < deadline, f"{protocol} {address}:{port} is neither answered nor refused"
        else:
            return False


def is_silent(namespace: Namespace, protocol: str, address: str, port: int, timeout: float = SILENCE) -> bool:
    """Tell whether a question has neither answer nor refusal."""
    try:
        ASK[protocol](namespace, address, port, timeout=timeout)
    except TimeoutError:
        return True
    return False


def inject(namespace: Namespace, packet: bytes) -> None:
    """Send an IPv4 packet as it stands."""
    with inside(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw:
        raw.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))


@contextmanager
def sniffer(namespace: Namespace, interface: str) -> Iterator[Callable[[], list[bytes]]]:
    """Give a function that returns all frames of an interface so far, in both directions."""
    tap = inside(namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
    frames: list[bytes] = []

    def collect() -> list[bytes]:
        while True:
            try:
                frames.append(tap.recv(65535))
            except BlockingIOError:
                return frames

    with closing(tap):
        tap.bind((interface, ETH_P_ALL))
        tap.setblocking(False)
        yield collect
