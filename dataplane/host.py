"""The node's own host, as the dataplane meets it: the link of its processes, and the rules in its kernel.

Both follow the state, each in one go: routes and addresses of the link, sets of the rules. What the kernel has to be
asked for runs in a thread, while packets flow.
"""

import asyncio
import logging
from ipaddress import IPv4Address, IPv4Network

from dataplane.apply import HOST
from dataplane.batch import HOST_INTERFACE
from dataplane.control.claims import Claims
from dataplane.control.state import DesiredState, pod_mac
from dataplane.devices.device import register
from dataplane.devices.firewall import Firewall, Rules
from dataplane.devices.host import EVERYWHERE, HostLink
from dataplane.devices.netlink import NetlinkError
from dataplane.engine import Engine
from dataplane.tables.interface import Role

log = logging.getLogger(__name__)


class Host:
    """The link, unless the configuration wants none, and the rules, as far as the kernel has such.

    Attributes:
        names: The link's row by its name, for reports.
    """

    def __init__(self, engine: Engine, state: DesiredState) -> None:
        self._engine = engine
        self._name = state.node.host_interface
        self._mac = pod_mac("", state.node.name)  # no pod's: those have a namespace
        self._firewall = Firewall(state.node.name)
        self._link: HostLink | None = None
        self.names = {self._name: HOST} if self._name else {}

    async def open(self, state: DesiredState, ours: Claims) -> None:
        """Make the link and the rules; nothing is read yet.

        Raises:
            DeviceError, NetlinkError: The link cannot be made.
        """
        await asyncio.to_thread(self._open, state, ours)
        if self._link is None:
            return
        tables, network = self._engine.tables, state.pod_network
        register(tables.interfaces, HOST, self._link.tap, Role.HOST, network.gateway_mac, self._link.tap.mtu)
        tables.interfaces["peer_mac"][HOST] = self._mac
        tables.settings[HOST_INTERFACE] = HOST

    def _open(self, state: DesiredState, ours: Claims) -> None:
        network = state.pod_network
        if self._name:
            self._link = HostLink(
                self._name,
                mac=self._mac,
                mtu=_mtu(state),
                gateway=network.gateway,
                gateway_mac=network.gateway_mac,
                addresses=_addresses(state),
                offload=network.offload,
            )
            _configure(self._link, state, ours)
        rules = self._rules(state, ours)
        if rules.uplink or rules.host:
            self._firewall.install(rules)

    def attach(self) -> None:
        """Begin to read."""
        if self._link is not None:
            self._engine.attach(HOST, self._link.tap.fileno(), self._name)

    async def follow(self, state: DesiredState, ours: Claims) -> None:
        """Take over a new state."""
        await asyncio.to_thread(self._follow, state, ours)

    def _follow(self, state: DesiredState, ours: Claims) -> None:
        self._firewall.update(self._rules(state, ours))
        if self._link is None:
            return
        try:
            _configure(self._link, state, ours)
        except NetlinkError as error:
            log.warning("the host's routes are out of date: %s", error)

    async def restore(self, state: DesiredState, ours: Claims) -> None:
        """Make the link anew when somebody has deleted it, and the rules, which name it by its number.

        Raises:
            DeviceError, NetlinkError: It cannot be made now.
        """
        self._engine.detach(HOST)
        await asyncio.to_thread(self.close)
        await self.open(state, ours)
        self.attach()

    def close(self) -> None:
        """Take link and rules away; a second call does nothing."""
        if self._link is not None:
            self._engine.tables.interfaces["flags"][HOST] = 0
            self._link.close()
            self._link = None
        self._firewall.close()

    def _rules(self, state: DesiredState, ours: Claims) -> Rules:
        frames = state.uplink is not None and state.uplink.mode == "af_packet"
        return Rules(
            uplink=state.uplink.interface if state.uplink is not None and frames else "",
            shared=ours.shared,
            networks=ours.arrivals,
            addresses=ours.addresses,
            servers=ours.servers,
            ports=ours.masquerade,
            tunnel_port=ours.tunnel_port,
            host=(self._name, self._mac) if self._name else None,
            gateway_mac=state.pod_network.gateway_mac,
        )


def _owns_the_uplink(state: DesiredState) -> bool:
    return state.uplink is not None and not state.uplink.shared


def _mtu(state: DesiredState) -> int:
    """The LAN's for a host that has no other link, else the pods'."""
    return state.uplink.mtu if state.uplink is not None and _owns_the_uplink(state) else state.pod_network.mtu


def _addresses(state: DesiredState) -> list[IPv4Address]:
    given = [*(state.node.addresses if _owns_the_uplink(state) else ()), state.host_address]
    return [address for address in given if isinstance(address, IPv4Address)]


def _configure(link: HostLink, state: DesiredState, ours: Claims) -> None:
    own = _owns_the_uplink(state)
    source = next(iter(ours.addresses), None) or next(iter(_addresses(state)), None)
    clients = IPv4Network(state.pod_network.gateway)  # as servers on the node's address see them (stages/masquerade)
    destinations: list[IPv4Network] = [*ours.departures, clients, *([EVERYWHERE] if own else [])]
    link.configure(_addresses(state), destinations, source, state.pod_network.mtu if own else 0)
