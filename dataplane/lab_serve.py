"""The HTTP server of a lab's pod: says who answers whom. Standard library only, one process per pod.

Called as ``python -m dataplane.lab_serve web-0@node1 8080 [LAB]``; the last word is for whoever reads ps(1).
"""

import asyncio
import sys
from functools import partial

HEAD_END = b"\r\n\r\n"
_LONGEST = 1 << 16  # of a request's head; nobody needs more to ask this server something
_PATIENCE = 60.0  # seconds for a request to arrive


async def answer(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection: the server's name, its own address and the client's."""
    try:
        client = "{}:{}".format(*writer.get_extra_info("peername"))
        own = "{}:{}".format(*writer.get_extra_info("sockname"))
        body = f"{name} ({own}) answers {client}\n".encode()
        while head := await asyncio.wait_for(reader.readuntil(HEAD_END), _PATIENCE):
            writer.write(response(head, body))
            await writer.drain()
            if b"connection: close" in head.lower() or b"HTTP/1.0" in head.split(b"\r\n")[0]:
                break
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, OSError):
        pass  # the client has gone, or is none
    finally:
        writer.close()


def response(head: bytes, body: bytes) -> bytes:
    """Return the answer to a request with this head."""
    status = "200 OK" if head.startswith((b"GET ", b"HEAD ")) else "405 Method Not Allowed"
    lines = [f"HTTP/1.1 {status}", "Content-Type: text/plain", f"Content-Length: {len(body)}"]
    if status[0] != "2":
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head.startswith(b"HEAD ") else body)


async def serve(name: str, port: int) -> None:
    """Listen until the process ends; "ready" is the sign that connections are taken."""
    server = await asyncio.start_server(partial(answer, name), "0.0.0.0", port, backlog=4096, limit=_LONGEST)
    print(f"ready name={name} port={port}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
