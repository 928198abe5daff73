"""The uplink: a packet socket on the node's own network interface, beside the host's network stack.

The host sees the same frames as we do; the filter keeps away from us what is the host's alone, and a rule of the kernel
(``firewall``) keeps away from the host what is ours. Frames carry a virtio header in both directions, so the
interface's offloads are used: super-frames are cut by the hardware, or by the kernel on our behalf.
"""

import socket
import struct
from collections.abc import Iterable

from dataplane.devices.device import KernelDevice, interface_mac, interface_mtu, translated
from dataplane.devices.filter import Instruction, attach
from dataplane.tables.interface import Driver

ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23  # Linux 4.20
SO_RCVBUFFORCE = 33
SO_SNDBUFFORCE = 32
SEND_BUFFER = 8 << 20  # a burst of super-frames; the usual limit of 208 KiB is full with two
RECEIVE_BUFFER = 8 << 20  # bytes; the kernel counts whole pages, so some 4000 small frames

_CAPABILITY = "CAP_NET_RAW"


class Uplink(KernelDevice):
    """A packet socket bound to one interface of this namespace.

    Attributes:
        name: The interface.
    """

    driver = Driver.PACKET

    def __init__(self, name: str, program: Iterable[Instruction]) -> None:
        """Open the socket; it takes what a filter's program takes.

        The filter is attached before the socket is bound: no other frame is ever queued.

        Raises:
            DeviceError: Not permitted, or no such interface.
        """
        super().__init__()
        self.name = name
        self._packets = self._drops = 0
        with translated(name, "open a packet socket", _CAPABILITY):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            with translated(name, "set up the packet socket", _CAPABILITY):
                attach(self._socket, program)
                self._socket.setblocking(False)
                self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
                self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
                enlarge(self._socket, RECEIVE_BUFFER, SEND_BUFFER)
                self._socket.bind((name, ETH_P_ALL))
        except BaseException:
            self._socket.close()
            raise

    def set_filter(self, program: Iterable[Instruction]) -> None:
        """Replace the filter; nothing is lost in between."""
        with translated(self.name, "replace the filter"):
            attach(self._socket, program)

    def statistics(self) -> tuple[int, int]:
        """Return how many frames the filter has let through so far, and how many of them were lost for want of room."""
        with translated(self.name, "read the statistics"):
            packets, drops = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._packets += packets  # the kernel starts again from zero at each reading
        self._drops += drops
        return self._packets, self._drops

    @property
    def mac(self) -> int:
        """The interface's MAC address."""
        with translated(self.name, "read the MAC address"):
            return interface_mac(self.name)

    @property
    def mtu(self) -> int:
        """Bytes of the largest IP packet."""
        with translated(self.name, "read the MTU"):
            return interface_mtu(self.name)

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def enlarge(sock: socket.socket, receive: int = 0, send: int = 0) -> None:
    """Give ``sock`` buffers of so many bytes, or as much as the system allows us; 0 leaves one as it is."""
    buffers = (SO_RCVBUFFORCE, socket.SO_RCVBUF, receive), (SO_SNDBUFFORCE, socket.SO_SNDBUF, send)
    for force, ask, size in buffers:
        if not size:
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, ask, size)
