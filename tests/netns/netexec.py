"""A server for namespaces that says who asked and who answered, and a client that checks every byte of many answers.

    netexec.py serve NAME [ADDRESS:]KIND:PORT...           KIND is tcp, udp or dns (with ADDRESS); prints "ready"
    netexec.py load ADDRESS PORT COUNT PARALLEL SIZE...    prints a JSON object: connections per server's name

tcp speaks HTTP/1.1 with keep-alive. Each answer has the headers ``X-Name`` and ``X-Client`` (address:port as the server
sees it). The body of a POST returns unchanged; ``GET /bytes/N`` gives N random bytes and their SHA-256 in ``X-Digest``;
any other GET gives ``NAME ADDRESS:PORT``. udp answers ``NAME ADDRESS:PORT `` and what it was sent. dns answers every
question, over both transports, with ADDRESS.
"""

import asyncio
import hashlib
import json
import os
import re
import resource
import socket
import sys
from collections import Counter
from functools import partial

HEADER_END = b"\r\n\r\n"
BACKLOG = 4096


class Http(asyncio.Protocol):
    """One connection of the tcp kind."""

    def __init__(self, name: str) -> None:
        self.name, self.pending = name, bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.client = "{}:{}".format(*transport.get_extra_info("peername"))

    def data_received(self, data: bytes) -> None:
        self.pending += data
        while (end := self.pending.find(HEADER_END)) >= 0:
            head = self.pending[:end].decode("latin1")
            length = int(found[1]) if (found := re.search(r"(?i)^content-length: *(\d+)", head, re.M)) else 0
            start = end + len(HEADER_END)
            if len(self.pending) < start + length:
                return
            body = bytes(self.pending[start : start + length])
            del self.pending[: start + length]
            self.answer(head, body)

    def answer(self, head: str, body: bytes) -> None:
        if found := re.match(r"GET /bytes/(\d+)", head):
            body = os.urandom(int(found[1]))
        elif head.startswith("GET"):
            body = f"{self.name} {self.client}\n".encode()
        lines = [
            "HTTP/1.1 200 OK", f"X-Name: {self.name}", f"X-Client: {self.client}", f"Content-Length: {len(body)}",
            f"X-Digest: {hashlib.sha256(body).hexdigest()}", "", "",
        ]  # fmt: skip
        self.transport.write("\r\n".join(lines).encode() + body)
        if re.search(r"(?i)^connection: *close", head, re.M):
            self.transport.close()  # the end that closes first keeps TIME_WAIT: a client has few ports, a server one


class Datagrams(asyncio.DatagramProtocol):
    """The udp kind."""

    def __init__(self, name: str) -> None:
        self.name = name

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(self.answer(data, addr), addr)

    def answer(self, data: bytes, addr: tuple[str, int]) -> bytes:
        return f"{self.name} {addr[0]}:{addr[1]} ".encode() + data


class Dns(Datagrams):
    """The dns kind: the header, the question and one A record that points to its name (RFC 1035 4)."""

    def answer(self, data: bytes, addr: tuple[str, int]) -> bytes:
        end = data.index(b"\0", 12) + 5  # root label, type, class; what follows is EDNS
        header = data[:2] + b"\x85\x00\x00\x01\x00\x01\x00\x00\x00\x00"
        record = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04" + socket.inet_aton(self.name)
        return header + data[12:end] + record


class DnsOverTcp(asyncio.Protocol):
    """The same with two bytes of length before each message (RFC 1035 4.2.2)."""

    def __init__(self, address: str) -> None:
        self.dns = Dns(address)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        message = self.dns.answer(data[2:], ("", 0))  # a question is never cut: it is one small segment
        self.transport.write(len(message).to_bytes(2, "big") + message)


async def serve(name: str, sockets: list[str]) -> None:
    loop = asyncio.get_running_loop()
    for text in sockets:
        *address, kind, port = text.split(":")
        host, number = (address or ["0.0.0.0"])[0], int(port)
        stream, datagram = {"tcp": (Http, None), "udp": (None, Datagrams), "dns": (DnsOverTcp, Dns)}[kind]
        me = host if kind == "dns" else name
        if stream:
            await loop.create_server(partial(stream, me), host, number, backlog=BACKLOG)
        if datagram:
            await loop.create_datagram_endpoint(partial(datagram, me), (host, number))
    print("ready", flush=True)
    await asyncio.Event().wait()


async def one(address: str, port: int, size: int) -> str:
    """Have a random body returned over a connection of its own; return who did it."""
    body = os.urandom(size)
    request = f"POST / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(request.encode() + body)
        head = await reader.readuntil(HEADER_END)
        assert await reader.readexactly(size) == body, "the body has changed"
        assert await reader.read() == b"", "bytes after the end"
    finally:
        writer.close()
    await writer.wait_closed()
    return head.split(b"X-Name: ")[1].split(b"\r\n")[0].decode()


async def load(address: str, port: int, count: int, parallel: int, sizes: list[int]) -> None:
    left, names = iter(range(count)), Counter[str]()

    async def work() -> None:
        for number in left:
            names[await one(address, port, sizes[number % len(sizes)])] += 1

    await asyncio.gather(*[work() for _ in range(parallel)])
    print(json.dumps(names), flush=True)


hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
match sys.argv[1:]:
    case ["serve", name, *sockets]:
        asyncio.run(serve(name, sockets))
    case ["load", address, port, count, parallel, *sizes]:
        asyncio.run(load(address, int(port), int(count), int(parallel), [int(size) for size in sizes]))
    case _:
        sys.exit(__doc__)
