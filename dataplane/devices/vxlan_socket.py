"""The tunnel's end as UDP sockets: no vxlan module, no privilege.

One socket receives on (node address, VXLAN port). To send, there is one socket per bucket of source ports: the outer
source port carries the inner flow's hash, and it is what the path's routers and the receiver's cores spread flows by.

The outer UDP checksum is 0 in what we send (``SO_NO_CHECK``) unless asked for; what we receive has been verified by
the kernel unless it was 0. The outer DF bit is 0. Sockets that only send have a filter that takes nothing, so that
strangers' datagrams to their ports do not fill a buffer that nobody reads.

``UDP_GRO`` and ``UDP_SEGMENT`` would carry several datagrams per call; both are off. The kernel refuses ``UDP_SEGMENT``
on a socket without checksums, and a coalesced datagram has no room for the outer headers that receive puts back.
"""

import errno
import socket
import struct

from dataplane.devices.device import KernelDevice, translated
from dataplane.devices.filter import NOTHING, attach
from dataplane.devices.io import MAX_SOCKETS, IoBuffers
from dataplane.devices.uplink import RECEIVE_BUFFER, SEND_BUFFER, enlarge
from dataplane.tables.interface import Driver

PORT = 4789
PORT_LOW, PORT_HIGH = 32768, 61000  # Linux's ip_local_port_range, [low, high)
BUCKETS = 16

IP_MTU_DISCOVER = 10
IP_PMTUDISC_DONT = 0
SO_NO_CHECK = 11
IP_RECVTOS = 13
SO_MEMINFO = 55
_MEMINFO_DROPS = 8


class VxlanSocket(KernelDevice):
    """The sockets of the tunnel.

    Attributes:
        address: The node's IPv4 address, as text.
        port: The VXLAN port.
        ports: Source ports that datagrams are sent from, ascending.
    """

    driver = Driver.VXLAN_SOCKET
    offload = False

    def __init__(self, address: str, port: int = PORT, buckets: int = BUCKETS, *, checksum: bool = False) -> None:
        """Bind all sockets.

        Args:
            address: One of this node's addresses.
            port: Of the tunnel; 0 lets the kernel choose (for tests).
            buckets: Sockets to send from, at most ``MAX_SOCKETS``; 0: send from the tunnel's own port.
            checksum: Whether outer UDP checksums are computed; Calico's device has none.

        Raises:
            DeviceError: The address is not ours, or a port is taken.
        """
        super().__init__()
        if not 0 <= buckets <= MAX_SOCKETS:
            raise ValueError(f"{buckets} buckets; at most {MAX_SOCKETS}")
        self.address = address
        self._checksum = checksum
        self._sockets: list[socket.socket] = []
        try:
            with translated(f"vxlan {address}:{port}", "bind"):
                self._receiver = self._open(port, port)
            self.port: int = self._receiver.getsockname()[1]
            enlarge(self._receiver, RECEIVE_BUFFER)
            self._receiver.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
            span = PORT_HIGH - PORT_LOW
            for bucket in range(buckets):
                with translated(f"vxlan {address}", f"bind a source port for bucket {bucket}"):
                    middle = PORT_LOW + (2 * bucket + 1) * span // (2 * buckets)
                    attach(self._open(middle, PORT_LOW + (bucket + 1) * span // buckets - 1), NOTHING)
        except BaseException:
            self.close()
            raise
        self.ports = [each.getsockname()[1] for each in self._sockets[1:]]

    def _open(self, low: int, high: int) -> socket.socket:
        """Return a socket bound to the first free port of [low, high]."""
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sockets.append(made)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, not self._checksum)
        enlarge(made, send=SEND_BUFFER)
        made.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        for port in range(low, high + 1):
            try:
                made.bind((self.address, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == high:
                    raise
                continue
            break
        return made

    def equip(self, io: IoBuffers) -> None:
        """Tell ``io`` the tunnel's address and sockets; they must stay open as long as it is used."""
        descriptors = [each.fileno() for each in self._sockets[1:]]
        address = int.from_bytes(socket.inet_aton(self.address), "big")
        io.use_tunnel(address, self.port, descriptors, PORT_LOW, PORT_HIGH - PORT_LOW)

    def _buffers(self) -> IoBuffers:
        fresh = self._io is None
        io = super()._buffers()
        if fresh:
            self.equip(io)
        return io

    def statistics(self) -> int:
        """Return how many datagrams were lost for want of room in the receive buffer."""
        with translated(f"vxlan {self.address}:{self.port}", "read the statistics"):
            words = struct.unpack("9I", self._receiver.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))
        return int(words[_MEMINFO_DROPS])

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 when closed."""
        return self._receiver.fileno()

    def close(self) -> None:
        """Close all sockets."""
        for each in self._sockets:
            each.close()
