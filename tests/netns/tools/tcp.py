"""Move bytes over TCP and print their SHA-256: ``listen PORT SIZE`` here, ``connect HOST PORT SIZE`` there.

Both ends send SIZE random bytes and receive SIZE bytes, one direction after the other, the connecting end first. Each
prints ``sent HEX`` and ``received HEX``; the listening one prints ``ready`` when it listens. No byte is repeated in a
pattern that would hide an exchanged or repeated segment.
"""

import hashlib
import os
import socket
import sys

CHUNK = 1 << 20
TIMEOUT = 20  # of one call: a transfer that stalls ends as an error and not as a test that never ends


def send(connection: socket.socket, size: int) -> None:
    content = os.urandom(size)
    connection.sendall(content)
    print("sent", hashlib.sha256(content).hexdigest(), flush=True)


def receive(connection: socket.socket, size: int) -> None:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    while size and (count := connection.recv_into(buffer, min(CHUNK, size))):
        digest.update(memoryview(buffer)[:count])
        size -= count
    print("received", digest.hexdigest(), flush=True)


def listen(port: int, size: int) -> None:
    with socket.create_server(("0.0.0.0", port)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(TIMEOUT)
            receive(connection, size)
            send(connection, size)


def connect(host: str, port: int, size: int) -> None:
    with socket.create_connection((host, port), timeout=TIMEOUT) as connection:
        send(connection, size)
        receive(connection, size)


match sys.argv[1:]:
    case ["listen", port, size]:
        listen(int(port), int(size))
    case ["connect", host, port, size]:
        connect(host, int(port), int(size))
    case _:
        sys.exit(__doc__)
