"""New UDP flows at a steady rate, and who received them when; each in the namespace of a pod.

    _scale_traffic.py send ADDRESS PORT RATE    until SIGTERM; prints the number of flows
    _scale_traffic.py receive PORT              until SIGTERM; writes nanoseconds since the epoch and the flow's number
    _scale_traffic.py echo PORT

A flow is one datagram from a port of its own, with its number in it. The time of arrival is the kernel's, taken when
the frame reached the pod's interface: how late we are in reading it does not matter.
"""

import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from types import FrameType

SO_TIMESTAMPNS = 35
RECORD = struct.Struct("=qq")
_TIME = struct.Struct("=qq")
_BUFFER = 1 << 22


class Stop(Exception):  # noqa: N818 - not an error
    """SIGTERM."""


def stop(number: int, frame: FrameType | None) -> None:
    """End what is being done."""
    raise Stop


def send(address: str, port: int, rate: float) -> None:
    """Open flow after flow."""
    count, due = 0, time.monotonic()
    try:
        while True:
            due += 1 / rate
            time.sleep(max(0.0, due - time.monotonic()))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flow:
                flow.sendto(count.to_bytes(8, "little"), (address, port))
            count += 1
    finally:
        print(count, flush=True)


def receive(port: int) -> None:
    """Write down what arrives."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        server.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        server.bind(("0.0.0.0", port))
        print("ready", file=sys.stderr, flush=True)
        while True:
            data, ancillary, _, _ = server.recvmsg(64, 64)
            seconds, nanoseconds = _TIME.unpack(ancillary[0][2][: _TIME.size])
            record = RECORD.pack(seconds * 10**9 + nanoseconds, int.from_bytes(data, "little"))
            sys.stdout.buffer.write(record)
            sys.stdout.buffer.flush()


def echo(port: int) -> None:
    """Answer everything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", port))
        print("ready", file=sys.stderr, flush=True)
        while True:
            data, client = server.recvfrom(2048)
            server.sendto(data, client)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    with suppress(Stop):
        match sys.argv[1:]:
            case ["send", address, port, rate]:
                send(address, int(port), float(rate))
            case ["receive", port]:
                receive(int(port))
            case ["echo", port]:
                echo(int(port))
            case _:
                sys.exit(__doc__)
