"""A client that asks a UDP server steadily, and says when each answer came: ``steady.py ADDRESS PORT INTERVAL``.

Prints ``ready``, then a line per answer: the time in seconds (CLOCK_MONOTONIC, which all processes of the machine
share), the number of the question, who answered. What is not answered is not repeated.
"""

import socket
import sys
import time
from contextlib import suppress


def main() -> None:
    """Ask until killed."""
    address, port, interval = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asking.connect((address, port))
    print("ready", flush=True)
    number, due = 0, time.monotonic()
    while True:
        with suppress(OSError):  # an ICMP error about an earlier question, or nobody answers ARP
            asking.send(b"%d" % number)
        number, due = number + 1, max(due + interval, time.monotonic())
        while (left := due - time.monotonic()) > 0:
            asking.settimeout(left)
            try:
                name, _, asked = asking.recv(2048).split(b" ", 2)
            except OSError:
                continue
            print(f"{time.monotonic():.6f} {int(asked)} {name.decode()}", flush=True)


main()
