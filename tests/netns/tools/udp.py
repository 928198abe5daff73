"""Echo datagrams: ``listen PORT`` returns what it gets; ``connect HOST PORT SIZE...`` sends one of each size.

The connecting end prints a line for each size: ``SIZE ok``, ``SIZE lost`` or ``SIZE differs``. Each is sent once: a
datagram that is lost on these links is a fault, not bad luck.
"""

import os
import socket
import sys

TIMEOUT = 2.0
LARGEST = 65507


def listen(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", port))
        print("ready", flush=True)
        while True:
            content, sender = server.recvfrom(LARGEST + 1)
            server.sendto(content, sender)


def exchange(client: socket.socket, size: int) -> str:
    content = os.urandom(size)
    client.send(content)
    try:
        answer = client.recv(LARGEST + 1)
    except TimeoutError:
        return "lost"
    except OSError as error:
        return f"failed: {error.strerror}"
    return "ok" if answer == content else "differs"


def connect(host: str, port: int, sizes: list[int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT)
        client.connect((host, port))
        for size in sizes:
            print(size, exchange(client, size), flush=True)


match sys.argv[1:]:
    case ["listen", port]:
        listen(int(port))
    case ["connect", host, port, *sizes]:
        connect(host, int(port), [int(size) for size in sizes])
    case _:
        sys.exit(__doc__)
