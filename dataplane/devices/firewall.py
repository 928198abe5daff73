"""What the host's own stack must leave to us, as rules of nf_tables.

On an uplink that we share with the host its stack gets a copy of every frame. It must not answer what is ours (a RST
for a node port, where no process of the host listens, would end the client's connection), nor forward it (with
``ip_forward`` a packet to a pod would arrive twice). So in ``prerouting`` it loses everything to pods and services,
and at the node's own addresses the ports of services and those that we masquerade with; and in ARP the requests for
what is ours, or it would answer for the address of its own link. A packet socket sees frames before netfilter does: we
lose nothing.

On an uplink that is ours alone the host's stack loses everything, ARP and IPv6 too. Without that it would answer there
for the addresses that it has behind its own link: to the kernel an address belongs to the host, not to an interface.

The other way round, a process of the host that calls the node's own node port would never come to us: the kernel sends
what goes to its own addresses by ``lo``. A hook at the exit of ``lo`` (Linux 5.16) forwards those packets to the host's
link; the reply comes back by that. 127.0.0.1 is no address of the node: nothing answers at 127.0.0.1:nodePort, as with
kube-proxy in IPVS mode.

`commands` gives text, pure; `Firewall` carries it out.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network

from dataplane.devices.nftables import Nftables, NftablesError

Server = tuple[str, IPv4Address, int]
"""Protocol, address and port."""

UNPROTECTED = "the host's own stack answers on the uplink, too, and ends connections to node ports and masqueraded ones"
UNREACHED = "the host's own processes do not reach the node's node ports"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the rules say.

    Attributes:
        uplink: The interface on the LAN; "" when there is none.
        shared: Whether the host's stack is to have a part of what comes there; the next five say which.
        networks: What is ours alone, disjoint.
        addresses: The node's own.
        servers: What is ours at those.
        ports: And what is ours there of TCP and UDP, first and last; None: nothing.
        tunnel_port: But for this UDP port; 0: none.
        host: The interface and the MAC of the host's link; None without one.
        gateway_mac: Our end's of that.
    """

    uplink: str = ""
    shared: bool = True
    networks: tuple[IPv4Network, ...] = ()
    addresses: tuple[IPv4Address, ...] = ()
    servers: frozenset[Server] = frozenset()
    ports: tuple[int, int] | None = None
    tunnel_port: int = 0
    host: tuple[str, int] | None = None
    gateway_mac: int = 0


def uplink_table(name: str, rules: Rules) -> str:
    """Return the commands that make the table for the uplink."""
    return _shared_table(name, rules) if rules.shared else _own_table(name, rules.uplink)


def _own_table(name: str, uplink: str) -> str:
    lines = []
    for family, hook in (("inet", "prerouting priority raw"), ("arp", "input priority filter")):
        lines += [
            f"add table {family} {name} {{ flags owner; }}",
            f"add chain {family} {name} uplink {{ type filter hook {hook}; policy accept; }}",
            f'add rule {family} {name} uplink iifname "{uplink}" counter drop',
        ]
    return "\n".join([*lines, ""])


def _shared_table(name: str, rules: Rules) -> str:
    table = f"ip {name}"
    at_the_node = f"add rule {table} uplink ip daddr @addresses"
    lines = [
        f"add table {table} {{ flags owner; }}",
        f"add set {table} networks {{ type ipv4_addr; flags interval; }}",
        f"add set {table} addresses {{ type ipv4_addr; }}",
        f"add set {table} servers {{ type inet_proto . ipv4_addr . inet_service; }}",
        f"add chain {table} uplink {{ type filter hook prerouting priority raw; policy accept; }}",
        f'add rule {table} uplink iifname != "{rules.uplink}" accept',
        f"add rule {table} uplink ip daddr @networks counter drop",
        f"add rule {table} uplink ip daddr != @addresses accept",
        # In a later fragment nf_tables takes payload for ports (Linux 6.18): one in fourteen would be lost.
        f"add rule {table} uplink ip frag-off & 0x1fff != 0 accept",
        f"add rule {table} uplink meta l4proto . ip daddr . th dport @servers counter drop",
    ]
    if rules.tunnel_port:
        lines.append(f"{at_the_node} udp dport {rules.tunnel_port} accept")
    if rules.ports:
        first, last = rules.ports
        lines.append(f"{at_the_node} meta l4proto {{ tcp, udp }} th dport {first}-{last} counter drop")
    lines += [
        f"add table arp {name} {{ flags owner; }}",
        f"add set arp {name} networks {{ type ipv4_addr; flags interval; }}",
        f"add chain arp {name} uplink {{ type filter hook input priority filter; policy accept; }}",
        f'add rule arp {name} uplink iifname "{rules.uplink}" arp daddr ip @networks counter drop',
    ]
    lines += _elements("add", table, "addresses", map(str, rules.addresses))
    return "\n".join([*lines, *changes(name, Rules(), replace(rules, host=None)), ""])


def loopback_table(name: str, rules: Rules) -> str:
    """Return the commands that make the table for the loopback interface."""
    assert rules.host is not None
    interface, mac = rules.host
    table = f"netdev {name}"
    lines = [
        f"add table {table} {{ flags owner; }}",
        f"add set {table} servers {{ type inet_proto . ipv4_addr . inet_service; }}",
        f'add chain {table} loopback {{ type filter hook egress device "lo" priority filter; policy accept; }}',
        # Not "ether daddr set": that asks for an Ethernet interface first, which lo is not.
        f"add rule {table} loopback meta l4proto . ip daddr . th dport @servers "
        f'@ll,0,48 set {rules.gateway_mac:#014x} @ll,48,48 set {mac:#014x} counter fwd to "{interface}"',
    ]
    return "\n".join([*lines, *changes(name, Rules(), replace(rules, uplink="")), ""])


def changes(name: str, old: Rules, new: Rules) -> list[str]:
    """Return the commands that lead from the sets of one value to those of another, for the tables of the new one."""
    lines: list[str] = []
    shared = bool(new.uplink) and new.shared
    for family in ("ip", "arp") if shared and old.networks != new.networks else ():
        # As a whole: prefixes that are cut anew would overlap old ones half way through.
        lines.append(f"flush set {family} {name} networks")
        lines += _elements("add", f"{family} {name}", "networks", map(str, new.networks))
    tables = [f"ip {name}"] * shared + [f"netdev {name}"] * (new.host is not None)
    for table in tables:
        lines += _elements("delete", table, "servers", _keys(old.servers - new.servers))
        lines += _elements("add", table, "servers", _keys(new.servers - old.servers))
    return lines


def _keys(servers: Iterable[Server]) -> Iterator[str]:
    return (f"{protocol.lower()} . {address} . {port}" for protocol, address, port in sorted(servers))


def _elements(verb: str, table: str, name: str, keys: Iterable[str]) -> list[str]:
    text = ", ".join(keys)
    return [f"{verb} element {table} {name} {{ {text} }}"] if text else []


class Firewall:
    """The rules of one node. Without netfilter the node does without them, and says once what that means.

    Its methods wait for the kernel: call them in a thread, one at a time.
    """

    def __init__(self, node: str) -> None:
        self._name = f"dataplane-{node}"
        self._rules = Rules()
        self._kernel: Nftables | None = None

    def install(self, rules: Rules) -> None:
        """Make the tables."""
        try:
            self._kernel = Nftables()
        except NftablesError as error:
            log.warning("no rules in the host's kernel: %s: %s", error, UNPROTECTED)
            return
        uplink, host = rules.uplink, rules.host
        if uplink and not self._make(uplink_table(self._name, rules), UNPROTECTED):
            uplink = ""
        if host and not self._make(loopback_table(self._name, rules), UNREACHED):
            host = None
        self._rules = replace(rules, uplink=uplink, host=host)

    def _make(self, commands: str, otherwise: str) -> bool:
        assert self._kernel is not None
        try:
            self._kernel.run(commands)
        except NftablesError as error:
            log.warning("a rule in the host's kernel is missing: %s: %s", str(error).splitlines()[0], otherwise)
            return False
        return True

    def update(self, rules: Rules) -> None:
        """Change the sets, all of them at once."""
        rules = replace(rules, uplink=self._rules.uplink, host=self._rules.host)
        commands = changes(self._name, self._rules, rules)
        if self._kernel is None or not commands:
            return
        try:
            self._kernel.run("\n".join(commands))
        except NftablesError as error:
            log.warning("the rules in the host's kernel are out of date: %s", error)
            return
        self._rules = rules

    def close(self) -> None:
        """Take the tables away."""
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None
