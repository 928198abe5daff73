"""Ask a name server many times by UDP, with random numbers, and say what came back.

    dns_load.py ADDRESS COUNT NAME...     prints "answered N of COUNT, CODE: N, ...; wrong N"

Each of 50 sockets has one query under way; one that gets no answer in five seconds counts as lost. An answer is wrong
if its number or its question is not that of the query.
"""

import random
import selectors
import socket
import sys
import time
from collections import Counter

SOCKETS, PATIENCE = 50, 5.0


def query(name: str) -> bytes:
    """Return a question for the name's IPv4 addresses."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.rstrip(".").split("."))
    return random.randbytes(2) + b"\x01\0\0\x01\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"


def main(address: str, count: int, names: list[str]) -> None:
    """Ask, wait, and print."""
    waiting: dict[socket.socket, bytes] = {}
    codes: Counter[int] = Counter()
    wrong = asked = 0
    with selectors.DefaultSelector() as selector:
        for _ in range(SOCKETS):
            each = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            each.connect((address, 53))
            selector.register(each, selectors.EVENT_READ)
            waiting[each] = b""
        deadline = time.monotonic() + PATIENCE
        while waiting:
            for each, data in list(waiting.items()):
                if not data and asked < count:
                    waiting[each] = query(names[asked % len(names)])
                    each.send(waiting[each])
                    asked += 1
                elif not data:
                    del waiting[each]
            ready = selector.select(max(0, deadline - time.monotonic()))
            if waiting and not ready:
                break
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                each = key.fileobj
                reply, sent = each.recv(65535), waiting[each]
                good = reply[:2] == sent[:2] and reply[12 : len(sent)] == sent[12:]
                wrong += not good
                codes[reply[3] & 15] += good
                waiting[each] = b""
                deadline = time.monotonic() + PATIENCE
    words = ", ".join(f"{code}: {number}" for code, number in sorted(codes.items()))
    print(f"answered {sum(codes.values())} of {count}, {words}; wrong {wrong}")


main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
