"""The host's own link into the dataplane: a TAP in the node's namespace, ``dp0``, with routes that lead to it.

The host's processes are then behind the dataplane like a pod's. They reach pods and services by

    10.96.0.0/12 via 169.254.1.1 dev dp0 onlink src 192.0.2.11

where the gateway is the address that nobody has, with a permanent neighbor entry, so nothing is ever asked on this
link. On an interface that is ours alone the node's addresses and the default route are here, too.

Everything goes with the device, and the device with the process, since it is not persistent: the neighbor entry, the
addresses, the routes, the two settings. A route of the host's to the same prefix is not replaced but stands behind ours
and counts again afterwards. Nothing needs a journal.

``accept_local``: who is answered by the node's own address through us (a process of the node that calls its node port)
gets packets from an address of its own. ``rp_filter`` = 2 outweighs a strict 1 for all devices, as the larger one
counts; on a device without an address even 2 refuses them (``fib_validate_source``), hence 0 there.
"""

from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv4Network, ip_interface
from pathlib import Path

from dataplane.devices.device import DeviceError
from dataplane.devices.netlink import Detour, Netlink, NetlinkError
from dataplane.devices.tap import Tap

EVERYWHERE = IPv4Network("0.0.0.0/0")
_SETTINGS = Path("/proc/sys/net")


class HostLink:
    """The open device with its addresses and routes.

    Attributes:
        tap: The device; frames are read and written here.
        addresses: What the host has on it now, each as a /32.
        routes: What leads to it now.
    """

    def __init__(
        self,
        name: str,
        *,
        mac: int,
        mtu: int,
        gateway: IPv4Address,
        gateway_mac: int,
        addresses: Collection[IPv4Address] = (),
        offload: Collection[str] = (),
    ) -> None:
        """Open the device in the namespace of the calling thread, and set it up but for the routes.

        Args:
            name: Of the interface.
            mac: Of the host's end.
            mtu: In bytes of IP packet.
            gateway: The next hop of all routes.
            gateway_mac: Our end's.
            addresses: What the host has on it at first; without any, see above.
            offload: As a pod's.

        Raises:
            DeviceError: Not permitted, or an interface with this name is in use.
        """
        self.addresses: frozenset[IPv4Address] = frozenset()
        self.routes: frozenset[Detour] = frozenset()
        self._gateway = gateway
        self.tap = Tap(name, mac=mac, mtu=mtu, offload=offload)
        try:
            self._netlink = Netlink()
        except BaseException:
            self.tap.close()
            raise
        try:
            self._set_up(name, gateway_mac, anonymous=not addresses)
            self.configure(addresses, (), None)
        except NetlinkError as error:
            self.close()
            raise DeviceError(name, error.operation, OSError(error.errno, str(error)), "CAP_NET_ADMIN") from error
        except BaseException:
            self.close()
            raise

    def _set_up(self, name: str, gateway_mac: int, *, anonymous: bool) -> None:
        _write(f"ipv6/conf/{name}/disable_ipv6", "1")
        _write(f"ipv4/conf/{name}/accept_local", "1")
        _write(f"ipv4/conf/{name}/rp_filter", "0" if anonymous else "2")
        self._index = self._netlink.link(name).index
        self.tap.up()
        self._netlink.set_neighbor(self._index, self._gateway, gateway_mac)

    def configure(
        self,
        addresses: Iterable[IPv4Address],
        destinations: Iterable[IPv4Network],
        source: IPv4Address | None,
        mtu: int = 0,
    ) -> None:
        """Give the host these addresses here, and let these prefixes lead here, and no others.

        What is new comes before what is old goes.

        Args:
            addresses: The host's on this link.
            destinations: Prefixes.
            source: The address that the host's packets have unless a program says otherwise.
            mtu: Of packets to any of the prefixes but to everywhere; 0 is the device's.

        Raises:
            NetlinkError: The kernel refused one.
        """
        wanted = frozenset(addresses)
        for address in wanted - self.addresses:
            self._netlink.add_address(self._index, ip_interface(address))
            self.addresses |= {address}
        self._route(destinations, source, mtu)
        for address in self.addresses - wanted:
            self._netlink.delete_address(self._index, ip_interface(address))
            self.addresses -= {address}

    def _route(self, destinations: Iterable[IPv4Network], source: IPv4Address | None, mtu: int) -> None:
        wanted = frozenset(
            Detour(prefix, self._gateway, source, mtu if prefix.prefixlen else 0) for prefix in destinations
        )
        for detour in wanted - self.routes:
            self._netlink.add_detour(self._index, detour)
            self.routes |= {detour}
        for detour in self.routes - wanted:
            self._netlink.delete_detour(self._index, detour)
            self.routes -= {detour}

    def close(self) -> None:
        """Close the device, which takes everything else along; a second call does nothing."""
        self.tap.close()
        self._netlink.close()


def _write(name: str, value: str) -> None:
    """Change a setting of the device, unless the kernel has none such (IPv6 may be missing)."""
    file = _SETTINGS / name
    if file.exists():
        file.write_text(value)
