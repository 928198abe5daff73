"""What a device is, and what every device shares: errors, ioctls by name, and send and receive outside the engine.

The engine does not call ``recv`` and ``send``: it hands a device's descriptor to the compiled burst through a row of
the interface table (``register``). The methods are for benches, tests and tools; they run the same kernels.
"""

import errno
import fcntl
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from dataplane.batch import ROWS, Batch
from dataplane.devices.io import IoBuffers
from dataplane.devices.receive import receive
from dataplane.devices.transmit import transmit
from dataplane.jit import Array
from dataplane.tables.interface import INTERFACE, OFFLOAD, UP, Driver, Role
from dataplane.verdict import Verdict

SIOCGIFMTU = 0x8921
SIOCSIFHWADDR = 0x8924
SIOCGIFHWADDR = 0x8927

_ARPHRD_ETHER = 1
_NAME_MAX = 15


class DeviceError(OSError):
    """A device could not be opened or set up.

    Attributes:
        device: Its name.
        action: What was attempted.
        capability: What the process would need, when it lacks permission; otherwise empty.
    """

    def __init__(self, device: str, action: str, error: OSError, capability: str = "") -> None:
        denied = error.errno in (errno.EPERM, errno.EACCES) and capability
        self.device, self.action, self.capability = device, action, capability if denied else ""
        reason = f"needs {capability}" if denied else error.strerror or str(error)
        super().__init__(error.errno, f"{device}: {action}: {reason}")

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def translated(device: str, action: str, capability: str = "") -> Iterator[None]:
    """Turn an OSError inside into a ``DeviceError`` that says which device, what for and what it needs."""
    try:
        yield
    except OSError as error:
        raise DeviceError(device, action, error, capability) from error


class Device(Protocol):
    """Something that frames enter and leave by.

    The batch contract: ``recv`` overwrites rows 0, 1, ... of a batch and returns how many; it never waits, and 0 means
    that there is nothing now. ``send`` takes rows that hold whole frames with their virtio fields, and returns how many
    the device took; a refused row has verdict DROP and a reason. It may overwrite the bytes in front of a frame and
    finish its checksum, and nothing else of it. Neither keeps a reference to the batch. ``fileno`` is readable while
    ``recv`` has something to give. ``close`` may be called twice.
    """

    @property
    def driver(self) -> Driver:
        """How kernels read and write it."""

    @property
    def offload(self) -> bool:
        """Whether frames carry a virtio header: partial checksums and super-frames pass as they are."""

    def recv(self, batch: Batch) -> int:
        """Fill the first rows of ``batch``; return how many."""

    def send(self, batch: Batch, rows: Sequence[int]) -> int:
        """Send ``rows`` of ``batch``; return how many were taken."""

    def fileno(self) -> int:
        """Return the descriptor to wait on."""

    def close(self) -> None:
        """Give the device back."""


def register(interfaces: Array, index: int, device: Device, role: Role, mac: int = 0, mtu: int = 0) -> None:
    """Make row ``index`` of ``interfaces`` stand for ``device``, up and with all counters zero."""
    interfaces[index] = np.zeros((), INTERFACE)
    interfaces["role"][index], interfaces["driver"][index] = role, device.driver
    interfaces["flags"][index] = UP | (OFFLOAD if device.offload else 0)
    interfaces["fd"][index] = device.fileno()
    interfaces["mac"][index], interfaces["mtu"][index] = mac, mtu


class KernelDevice(ABC):
    """``recv`` and ``send`` of a device with a descriptor, by the kernels that the engine uses."""

    driver = Driver.NONE
    offload = True

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor to wait on."""

    @abstractmethod
    def close(self) -> None:
        """Give the device back."""

    def __init__(self) -> None:
        self._io: IoBuffers | None = None
        self._interfaces = np.zeros(2, INTERFACE)

    def _buffers(self) -> IoBuffers:
        """Make the buffers when they are first needed: the engine has its own."""
        if self._io is None:
            self._io = IoBuffers()
            register(self._interfaces, 1, self, Role.NODE)
        return self._io

    def recv(self, batch: Batch) -> int:
        """Fill the first rows of ``batch`` with what can be read now, as interface 1; return how many."""
        io = self._buffers()
        return receive(batch.arrays, self._interfaces, 1, io.arrays, ROWS)

    def send(self, batch: Batch, rows: Sequence[int]) -> int:
        """Send ``rows`` of ``batch``; return how many the device took."""
        io = self._buffers()
        packets = batch.packets
        before = packets["oif"].copy()
        packets["oif"] = 0
        packets["oif"][list(rows)] = 1
        transmit(batch.arrays, ROWS, self._interfaces, io.arrays)
        packets["oif"] = before
        return sum(int(packets["verdict"][row]) <= Verdict.STOLEN for row in rows)


def _request(name: str, body: bytes = b"") -> bytearray:
    """Lay out a ``struct ifreq`` of 40 bytes."""
    encoded = name.encode()
    if len(encoded) > _NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, f"an interface name has at most {_NAME_MAX} bytes")
    return bytearray(struct.pack("16s24s", encoded, body))


def interface_ioctl(name: str, number: int, body: bytes = b"") -> bytes:
    """Call ``ioctl`` about the interface ``name`` of this namespace and return the union behind the name."""
    request = _request(name, body)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket.fileno(), number, request)
    return bytes(request[16:])


def interface_mtu(name: str) -> int:
    """Return the MTU of the interface ``name``."""
    return int(struct.unpack_from("i", interface_ioctl(name, SIOCGIFMTU))[0])


def interface_mac(name: str) -> int:
    """Return the MAC address of the interface ``name``."""
    return int.from_bytes(interface_ioctl(name, SIOCGIFHWADDR)[2:8], "big")


def set_interface_mac(name: str, mac: int) -> None:
    """Give the interface ``name`` a MAC address."""
    interface_ioctl(name, SIOCSIFHWADDR, struct.pack("H6s", _ARPHRD_ETHER, mac.to_bytes(6, "big")))
