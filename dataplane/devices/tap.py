"""A pod's link: a TAP whose other end is an ordinary network device in the pod's namespace.

Frames come and go with a virtio header of 10 bytes, so partial checksums and super-frames of 64 KiB pass between pods
without being touched: 8-10 Gbit/s instead of 1.2-1.6. ``TUNSETOFFLOAD`` says what we are willing to *receive*; writing
needs no permission (P4). No ``IFF_NAPI``: it makes writes 1.6-1.8 times slower.

pytun-pmd3 opens the device, and its ``mtu``, ``up`` and ``persist`` are used. Its setters for addresses are not: they
are broken on Linux, and ``hwaddr`` writes into the interned ``b""``.
"""

import errno
import fcntl
import os
from collections.abc import Collection

from pytun_pmd3 import TunTapDevice

from dataplane.devices.device import DeviceError, KernelDevice, interface_mac, set_interface_mac, translated
from dataplane.tables.interface import Driver

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUNSETOFFLOAD = 0x400454D0

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_USO4 = 0x20  # Linux 6.2; only together with USO6
TUN_F_USO6 = 0x40
OFFLOADS = (
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6,
    TUN_F_CSUM,
    0,
)
"""What we ask for, until the kernel agrees."""

NAMED = {"csum": TUN_F_CSUM, "tso4": TUN_F_TSO4, "tso6": TUN_F_TSO6, "uso": TUN_F_USO4 | TUN_F_USO6}
"""The words of the configuration."""

_CAPABILITY = "CAP_NET_ADMIN"


class Tap(KernelDevice):
    """A TAP device in the namespace of the calling thread.

    Attributes:
        name: The interface's name; the kernel chooses one if none was given.
        offloads: The ``TUN_F_*`` that the kernel has agreed to.
    """

    driver = Driver.TAP

    def __init__(
        self,
        name: str = "",
        *,
        mac: int | None = None,
        mtu: int | None = None,
        persist: bool = False,
        offload: Collection[str] = frozenset({"csum", "tso4", "tso6", "uso"}),
    ) -> None:
        """Open or create the device and set it up; it is not up yet.

        Args:
            name: Of the interface; one that is persistent and in use by nobody is opened again.
            mac: Of the pod's end.
            mtu: In bytes of IP packet.
            persist: Whether the interface stays when we close it or die.
            offload: Which of ``NAMED`` to ask for; segmentation needs ``csum``.

        Raises:
            DeviceError: Not permitted, in use by another process, or no TUN driver.
        """
        super().__init__()
        self._device = _open(name)
        self.name: str = self._device.name
        try:
            os.set_blocking(self.fileno(), False)
            self.offloads = self._negotiate(sum(NAMED[word] for word in offload))
            with translated(self.name, "persist", _CAPABILITY):
                self._device.persist(persist)
            if mac is not None:
                self.mac = mac
            if mtu is not None:
                self.mtu = mtu
        except BaseException:
            self.close()
            raise

    def _negotiate(self, wanted: int) -> int:
        """Ask for the most offloads, then for fewer; return what was granted."""
        for offloads in (each & wanted for each in OFFLOADS):
            try:
                fcntl.ioctl(self.fileno(), TUNSETOFFLOAD, offloads)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise DeviceError(self.name, "TUNSETOFFLOAD", error, _CAPABILITY) from error
                continue
            return offloads
        return 0

    @property
    def mac(self) -> int:
        """The pod end's MAC address."""
        with translated(self.name, "read the MAC address"):
            return interface_mac(self.name)

    @mac.setter
    def mac(self, value: int) -> None:
        with translated(self.name, "set the MAC address", _CAPABILITY):
            set_interface_mac(self.name, value)

    @property
    def mtu(self) -> int:
        """Bytes of the largest IP packet."""
        with translated(self.name, "read the MTU"):
            return int(self._device.mtu)

    @mtu.setter
    def mtu(self, value: int) -> None:
        with translated(self.name, "set the MTU", _CAPABILITY):
            self._device.mtu = value

    def up(self) -> None:
        """Set the pod's end up."""
        with translated(self.name, "set up", _CAPABILITY):
            self._device.up()

    def persist(self, keep: bool) -> None:
        """Say whether the interface stays when the device is closed."""
        with translated(self.name, "persist", _CAPABILITY):
            self._device.persist(keep)

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 when closed."""
        return int(self._device.fileno())

    def close(self) -> None:
        """Close the device; the interface goes unless it is persistent."""
        self._device.close()


def _open(name: str) -> TunTapDevice:
    device = TunTapDevice.__new__(TunTapDevice)
    try:
        with translated(name or "tap", "open /dev/net/tun", _CAPABILITY):
            device.__init__(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    except DeviceError:
        # When it fails, its constructor closes the descriptor and forgets that it has: its finalizer would close the
        # number once more, which may be another file by then.
        device._fd = -1
        raise
    return device
