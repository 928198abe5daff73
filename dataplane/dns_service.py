"""The virtual server that leads pods to this node's resolver, and the sockets behind it.

The cluster IP that pods ask, port 53, is a service like any other: conntrack and NAT bring its packets to the host's
link, where two ordinary sockets wait, UDP and TCP. Every node answers its own pods. The sockets are bound before the
service is there, to an address that need not be there yet and to whatever ports are free; what comes before the names
are loaded waits in them. So the service is in the very first state, and *ready* waits neither for names nor for the
code that knows them (``resolver``).
"""

import logging
import socket
from contextlib import suppress
from dataclasses import dataclass, replace

from dataplane.control.state import Address, DesiredState, Endpoint, Service, ServicePort
from dataplane.node import Node

NAMESPACE, NAME, OTHER_NAME = "kube-system", "kube-dns", "node-dns"
PORT = 53

_IP_FREEBIND = 15  # linux/in.h: the host's link may not be up yet
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_RECEIVE_BUFFER = 4 << 20  # a query counts for 768 bytes: 5,000 of them, while names are loaded
_WAITING = 512  # connections

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listener:
    """The two sockets at one address."""

    address: Address
    udp: socket.socket
    tcp: socket.socket

    @property
    def ports(self) -> tuple[ServicePort, ServicePort]:
        """The service's, and where they lead to."""
        udp, tcp = (each.getsockname()[1] for each in (self.udp, self.tcp))
        return ServicePort(PORT, "UDP", "dns", udp), ServicePort(PORT, "TCP", "dns-tcp", tcp)

    def close(self) -> None:
        """Close both."""
        self.udp.close()
        self.tcp.close()


class DnsService:
    """Puts the service into each state of the node.

    Attributes:
        listener: Where the service of the newest state leads; None: nowhere.
        answering: The one that a resolver reads; when it is another, that state was applied and the resolver is to
            move, or the state was refused.

    Args:
        node: Not started yet.
    """

    def __init__(self, node: Node) -> None:
        self.listener: Listener | None = None
        self.answering: Listener | None = None
        self._seen: tuple[Service, ...] | None = None
        self._made: tuple[Service, ...] = ()
        self._failed: Address | None = None
        node.amend(self.over)

    def over(self, state: DesiredState) -> DesiredState:
        """Return the state with the service.

        Where the store has such a service itself, as clusters with CoreDNS do, ours takes its place.
        """
        address = state.host_address
        if state.dns is None or address is None:
            return state
        if self.listener is None or self.listener.address != address:
            self._listen(address)
        if self.listener is None:
            return state
        own = Service(
            _name(state, state.dns.address),
            NAMESPACE,
            cluster_ips=(state.dns.address,),
            ports=self.listener.ports,
            endpoints=(Endpoint(address, node=state.node.name),),
            origin="node",
        )
        if state.services is not self._seen or self._made[0] != own:
            self._seen = state.services
            self._made = (own, *(service for service in state.services if service.id != own.id))
        return replace(state, services=self._made)

    def _listen(self, address: Address) -> None:
        """Bind new sockets; those that are answered at now are the resolver's to close."""
        if self.listener is not None and self.listener is not self.answering:
            self.listener.close()
        if self.answering is not None and self.answering.address == address:
            self.listener = self.answering  # what led elsewhere for a moment was refused
            return
        try:
            self.listener = _bound(address)
        except OSError as error:
            self.listener = None
            if address != self._failed:
                log.error("no cluster dns: cannot listen address=%s: %s", address, error.strerror)
            self._failed = address

    def close(self) -> None:
        """Close the sockets, after the node's end: the service is gone by then."""
        for each in (self.listener, self.answering):
            if each is not None:
                each.close()
        self.listener = self.answering = None


def _name(state: DesiredState, address: Address) -> str:
    """Return the service's name: the usual one, unless the store has a service of that name at another address."""
    for service in state.services:
        if (service.namespace, service.name) == (NAMESPACE, NAME) and address not in service.cluster_ips:
            return OTHER_NAME
    return NAME


def _bound(address: Address) -> Listener:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    udp, tcp = socket.socket(family, socket.SOCK_DGRAM), socket.socket(family, socket.SOCK_STREAM)
    try:
        for each in (udp, tcp):
            each.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            each.setblocking(False)
            each.bind((str(address), 0))
        with suppress(PermissionError):  # without CAP_NET_ADMIN the usual buffer has to do
            udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        tcp.listen(_WAITING)
    except BaseException:
        udp.close()
        tcp.close()
        raise
    return Listener(address, udp, tcp)
