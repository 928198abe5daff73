"""The node's side of the LAN: the uplink's packet socket, the tunnel's UDP sockets, and news about the link.

The interface may go down, change its MTU or MAC, vanish and come back under another index; the node lives through all
of it and says what it sees once. In ``udp`` mode there is no packet socket: pods reach other nodes through the tunnel
only.
"""

import asyncio
import logging
from collections.abc import Iterable
from ipaddress import IPv4Network

import numpy as np

from dataplane import pipeline
from dataplane.announce import Announcing
from dataplane.apply import UNDERLAY, UPLINK
from dataplane.batch import ANNOUNCE_UNTIL, TUNNEL_PORT_HIGH, TUNNEL_PORT_LOW
from dataplane.control.announcer import Announcer
from dataplane.control.claims import Claims
from dataplane.control.state import DesiredState
from dataplane.devices import netlink
from dataplane.devices.device import DeviceError, register
from dataplane.devices.filter import FilterError, Instruction, prefix_filter
from dataplane.devices.netlink import Link, LinkEvent, Monitor
from dataplane.devices.uplink import Uplink
from dataplane.devices.vxlan_socket import PORT_HIGH, PORT_LOW, VxlanSocket
from dataplane.engine import Engine
from dataplane.resolve import Outgoing
from dataplane.tables.interface import UP, Driver, Role

EVERYTHING = IPv4Network("0.0.0.0/0")

log = logging.getLogger(__name__)


class Underlay:
    """The open devices of the uplink.

    Attributes:
        on_link: Its own prefixes.
        names: Interface rows by name, for routes and reports.

    Raises:
        DeviceError, NetlinkError: The interface does not exist, or a socket cannot be opened.
    """

    def __init__(self, engine: Engine, state: DesiredState, ours: Claims) -> None:
        assert state.uplink is not None
        self._engine = engine
        self._interfaces = engine.tables.interfaces
        self._state = state
        self._wanted = state.uplink
        self._ours = ours
        self._lost: dict[int, int] = {}
        self._packet_socket: Uplink | None = None
        self._tunnel: VxlanSocket | None = None
        self.names = {self._wanted.interface: UPLINK}
        link = netlink.link(self._wanted.interface)
        self._monitor = Monitor()
        self._index = link.index
        self.on_link = _on_link(state, link)
        self._announcing = Announcing(Announcer(link.mac, self._is_owner), self._send)
        try:
            self._open(link)
        except BaseException:
            self.close()
            raise
        engine.every_tick(self._count_losses)

    def _open(self, link: Link) -> None:
        own = {each.ip for each in link.addresses if each.version == 4}
        if not self._wanted.shared and own:
            log.warning("uplink.shared = false, but the host has addresses on %s: %s", link.name, _text(own))
        for address in self._state.node.addresses if self._wanted.shared else ():
            if address not in own:
                log.warning("node.addresses: %s is not an address of %s", address, link.name)
        interfaces = self._interfaces
        if self._wanted.mode == "af_packet":
            self._packet_socket = self._open_packet_socket()
            register(interfaces, UPLINK, self._packet_socket, Role.UPLINK, link.mac, self._mtu(link))
        else:
            interfaces["role"][UPLINK], interfaces["mtu"][UPLINK] = Role.UPLINK, self._mtu(link)
            interfaces["mac"][UPLINK] = link.mac
        if self._state.tunnels:
            self._tunnel = self._open_tunnel()
            self._tunnel.equip(self._engine.io)
            register(interfaces, UNDERLAY, self._tunnel, Role.UNDERLAY, link.mac, self._mtu(link))
            settings = self._engine.tables.settings
            settings[TUNNEL_PORT_LOW], settings[TUNNEL_PORT_HIGH] = PORT_LOW, PORT_HIGH
            self.names[self._state.vxlan.interface] = UNDERLAY
        if not link.up:
            self._set(up=False)

    def _open_packet_socket(self) -> Uplink:
        return Uplink(self._wanted.interface, _filter(self._ours))

    def _open_tunnel(self) -> VxlanSocket:
        vxlan = self._state.vxlan
        return VxlanSocket(str(self._state.node.addresses[0]), vxlan.port, checksum=vxlan.udp_checksum)

    def _mtu(self, link: Link) -> int:
        return min(link.mtu, self._wanted.mtu)

    def attach(self) -> None:
        """Begin to read."""
        if self._packet_socket is not None:
            self._engine.attach(UPLINK, self._packet_socket.fileno(), self._wanted.interface)
        if self._tunnel is not None:
            self._engine.attach(UNDERLAY, self._tunnel.fileno(), self._state.vxlan.interface)
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._hear)
        self._announcing.follow(self._state)

    def follow(self, state: DesiredState, ours: Claims) -> None:
        """Take over a new desired state: other blocks and services need another filter, and have other owners."""
        self._state, self._ours = state, ours
        if self._packet_socket is not None:
            self._packet_socket.set_filter(_filter(ours))
        self._announcing.follow(state)

    def close(self) -> None:
        """Stop reading and close everything; a second call does nothing."""
        self._announcing.close()
        if self._monitor.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
        for row in (UPLINK, UNDERLAY):
            self._engine.detach(row)
        for device in (self._packet_socket, self._tunnel, self._monitor):
            if device is not None:
                device.close()

    # --- news --------------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        for event in self._monitor.read():
            if isinstance(event, LinkEvent) and event.link.name == self._wanted.interface:
                self._follow_link(event.link, event.gone)

    def _follow_link(self, link: Link, gone: bool) -> None:
        """Follow the interface: down and up, another MTU or MAC, gone and back."""
        was = self._known_by
        self._set(up=link.up and not gone)
        if gone:
            return
        for row in (UPLINK, UNDERLAY):
            self._interfaces["mac"][row], self._interfaces["mtu"][row] = link.mac, self._mtu(link)
        if link.index != self._index:
            self._reopen(link)
        if self._known_by not in (was, 0):
            self._announcing.repeat(link.mac)

    def announce(self) -> None:
        """Tell the LAN anew what this node answers for."""
        self._announcing.again()

    def _is_owner(self, now: int) -> bool:
        until = int(self._engine.tables.settings[ANNOUNCE_UNTIL])
        return until == 0 or now < until

    @property
    def _known_by(self) -> int:
        """The MAC that the LAN can reach us by; 0 while the link is down."""
        return int(self._interfaces["mac"][UPLINK]) if self._interfaces["flags"][UPLINK] & UP else 0

    def _send(self, frames: list[bytes]) -> None:
        self._engine.slow.answered["announced"] += len(frames)
        self._engine.inject([Outgoing(frame, UPLINK) for frame in frames])

    def _set(self, up: bool) -> None:
        flags = self._interfaces["flags"]
        if bool(flags[UPLINK] & UP) != up:
            log.warning("uplink %s is %s", self._wanted.interface, "up" if up else "down")
        for row in (UPLINK, UNDERLAY):
            if self._interfaces["driver"][row] != Driver.NONE:
                flags[row] = flags[row] | np.uint16(UP) if up else flags[row] & ~np.uint16(UP)

    def _reopen(self, link: Link) -> None:
        """The interface was deleted and made again: the packet socket is bound to the one that is gone."""
        self._index = link.index
        if self._packet_socket is None:
            return
        self._engine.detach(UPLINK)
        self._packet_socket.close()
        try:
            self._packet_socket = self._open_packet_socket()
        except DeviceError as error:
            log.warning("uplink cannot be opened again: %s", error)
            return
        self._lost.pop(UPLINK, None)
        self._interfaces["fd"][UPLINK] = self._packet_socket.fileno()
        self._engine.attach(UPLINK, self._packet_socket.fileno(), self._wanted.interface)
        log.info("uplink opened again name=%s", link.name)

    def _count_losses(self, now: int) -> None:
        """Account for what the kernel lost before we could read it."""
        totals = {}
        if self._packet_socket is not None:
            totals[UPLINK] = self._packet_socket.statistics()[1]
        if self._tunnel is not None:
            totals[UNDERLAY] = self._tunnel.statistics()
        for row, total in totals.items():
            lost = total - self._lost.get(row, 0)
            self._lost[row] = total
            if lost > 0:
                pipeline.count_lost(self._engine.tables.counters, lost)
                self._interfaces["rx_dropped"][row] += np.uint64(lost)


def _on_link(state: DesiredState, link: Link) -> tuple[IPv4Network, ...]:
    """Return the LAN's prefixes: those of the interface's addresses, and of routes that have no gateway."""
    given = [route.destination for route in state.routes if route.type == "unicast" and route.via is None]
    found = [*(each.network for each in link.addresses), *given]
    return tuple(network for network in found if isinstance(network, IPv4Network))


def _text(addresses: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, addresses)))


def _filter(ours: Claims) -> tuple[Instruction, ...]:
    """Return the program that takes what is ours; with more services than it can hold, whatever is not the host's."""
    shared = ours.addresses if ours.shared else ()
    prefixes = ours.arrivals if ours.shared else (*ours.arrivals, *map(IPv4Network, ours.addresses))
    try:
        return prefix_filter(prefixes, shared, ours.ranges)
    except FilterError as error:
        log.warning("every packet that is not the host's is looked at: %s", error)
        return prefix_filter([EVERYTHING], shared, ours.ranges)
