"""Network namespaces of a test's own, and the devices at their edges."""

import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

from scapy.packet import Packet

from dataplane.batch import Batch
from dataplane.devices.device import Device, DeviceError
from dataplane.devices.memory import Vnet, load, unload
from dataplane.devices.namespace import NamespaceHandle, in_namespace, open_namespace, remove_namespace

OUR_MAC, POD_MAC, LAN_MAC, UP_MAC = "ee:ee:ee:ee:ee:ee", "02:00:00:00:00:07", "02:00:00:00:00:09", "02:00:00:00:00:01"
UDP_SEGMENT = 103
Result = TypeVar("Result")
numbers = count()


class Space:
    """A namespace of our own, and what was opened in it."""

    def __init__(self, label: str) -> None:
        self.name = f"dptest-{os.getpid()}-{next(numbers)}-{label}"
        self.handle: NamespaceHandle = open_namespace(self.name)
        self._opened: list[Any] = []
        self.write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
        self.ip("link", "set", "lo", "up")

    def run(self, function: Callable[[], Result]) -> Result:
        return in_namespace(self.handle, function)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True, capture_output=True)

    def write(self, path: str, text: str) -> None:
        def put() -> None:
            with open(path, "w") as file:
                file.write(text)

        self.run(put)

    def open(self, function: Callable[[], Result]) -> Result:
        made = self.run(function)
        self._opened.append(made)
        return made

    def udp(self, address: str, port: int) -> socket.socket:
        made = self.open(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        made.bind((address, port))
        made.settimeout(5)
        return made

    def close(self) -> None:
        for each in self._opened:
            each.close()
        remove_namespace(self.handle)


@contextmanager
def opened_spaces() -> Iterator[Callable[[str], Space]]:
    """Give a function that makes namespaces; they and what was opened in them go at the end."""
    made: list[Space] = []

    def space(label: str) -> Space:
        made.append(Space(label))
        return made[-1]

    try:
        yield space
    finally:
        for each in made:
            each.close()


def lan_of(spaces: Callable[[str], Space], host: Space) -> Space:
    """Make the namespace at the other end of the host's uplink; both know each other's MAC address."""
    space = spaces("lan")
    host.ip(
        "link", "add", "up0", "address", UP_MAC, "type", "veth", "peer", "lan0", "address", LAN_MAC, "netns", space.name
    )
    host.ip("addr", "add", "192.0.2.1/24", "dev", "up0")
    space.ip("addr", "add", "192.0.2.9/24", "dev", "lan0")
    host.ip("link", "set", "up0", "up")
    space.ip("link", "set", "lan0", "up")
    host.ip("neigh", "add", "192.0.2.9", "lladdr", LAN_MAC, "dev", "up0")
    space.ip("neigh", "add", "192.0.2.1", "lladdr", UP_MAC, "dev", "lan0")
    space.ip("neigh", "add", "192.0.2.50", "lladdr", UP_MAC, "dev", "lan0")
    return space


def wait(device: Device) -> None:
    assert select.select([device.fileno()], [], [], 5)[0], "nothing to read within 5 s"


def read(device: Device, batch: Batch) -> list[bytes]:
    wait(device)
    return [unload(batch, row) for row in range(device.recv(batch))]


def send(device: Device, batch: Batch, frame: Packet | bytes, vnet: Vnet = Vnet(), **fields: int) -> int:  # noqa: B008
    load(batch, [bytes(frame)], 0, [vnet])
    record = batch.packets[:1]
    record["l3"], record["l4"] = record["start"] + 14, record["start"] + 34
    for name, value in fields.items():
        record[name] = value
    return device.send(batch, [0])


def partial(frame: Packet, at: int = 34, offset: int = 6) -> bytes:
    """Replace the checksum by the folded pseudo-header sum."""
    data = bytearray(bytes(frame))
    words = [int.from_bytes(data[i : i + 2], "big") for i in range(at - 8, at, 2)]
    total = sum(words) + data[at - 11] + len(data) - at
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    data[at + offset : at + offset + 2] = total.to_bytes(2, "big")
    return bytes(data)


def as_nobody(function: Callable[[], Any]) -> str:
    """Return what the DeviceError says that ``function`` raises in a child without privileges."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setuid(65534)
            function()
        except DeviceError as error:
            os.write(writer, f"{error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text
