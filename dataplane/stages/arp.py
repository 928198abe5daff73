"""arp: answer for the gateway that does not exist, and for everything else behind the node (proxy ARP).

A pod has a /32 address and one route, via 169.254.1.1, so it asks for that address and for nothing else; the answer
is the MAC of our end of its link. Decisions follow the kernel's ``arp_process`` with ``proxy_arp=1`` and
``proxy_delay=0``, except that 169.254.1.1 is answered even when the node has no default route (calico#3270).

The reply is made in place from the request and leaves by the interface it came from: one pass, no delay, no slow path.

On the uplink only what is announced is answered (the route's ``ANNOUNCED``): a load balancer's addresses while this
node is their owner, and the node's own addresses if the interface is ours alone; on a shared one the host's stack
answers for those. That is stricter than the kernel's ``arp_ignore=1``: no other address of the node, no pod, ever.
That it is an owner a node knows only for a while (``ANNOUNCE_UNTIL``, control/ownership.py): one that was stopped and
goes on does not answer for what another node has taken meanwhile, from its first packet on.
Whoever asks is learned from in place if it is a neighbor already; a new one is asked when there is something to send.

Steals: arp.answered. Queues: arp.learn. Drops: arp.malformed, arp.not-owner, arp.own-ip, arp.probe, l2.spoofed-src,
ip.spoofed-src.
"""

from typing import Any

import numpy as np

from dataplane.batch import (
    ANNOUNCE_UNTIL,
    GATEWAY_LO,
    INTERFACE_TABLE,
    NEIGHBOURS,
    PROXY_ARP,
    ROUTES,
    SETTINGS,
    TUNNELED,
    V4_PREFIX,
)
from dataplane.codecs import arp as wire
from dataplane.codecs import ethernet
from dataplane.jit import kernel
from dataplane.tables import neighbour, route
from dataplane.tables.interface import Role
from dataplane.tables.neighbour import LOCK_NS, State
from dataplane.tables.route import ANNOUNCED, Kind
from dataplane.verdict import Reason, Verdict

_REQUEST = 1
_REPLY = 2
_GROUP = 1 << 40


@kernel
def arp(batch: Any, count: int, tables: Any, now: int) -> None:
    """Decide about every ARP packet in rows [0, count); other rows are untouched."""
    data, packets = batch
    for i in range(count):
        packet = packets[i]
        if packet["ethertype"] != ethernet.ETHERTYPE_ARP or packet["verdict"] != Verdict.ACCEPT:
            continue
        why = _decide(data, packet, tables, now)
        packet["reason"] = why
        if why == Reason.ARP_ANSWERED:
            _note(data, packet, tables, now)
            _answer(data, packet, tables)
            packet["verdict"] = Verdict.STOLEN
        elif why == Reason.ARP_LEARN:
            packet["verdict"] = Verdict.QUEUE
        else:
            packet["verdict"] = Verdict.DROP


@kernel
def _decide(data: Any, packet: Any, tables: Any, now: int) -> int:
    interfaces = tables[INTERFACE_TABLE]
    at, iif = int(packet["l3"]), int(packet["iif"])
    start = int(packet["start"])
    if not wire.valid(data, at, start + int(packet["length"])):
        return Reason.ARP_MALFORMED
    sender, target = wire.sender_ip(data, at), wire.target_ip(data, at)
    if target >> 28 == 0xE or target >> 24 == 127 or wire.sender_mac(data, at) & _GROUP:
        return Reason.ARP_MALFORMED
    # No station has such an address, and none may fill the neighbor table with them.
    if sender >> 28 >= 0xE or sender >> 24 == 127:
        return Reason.ARP_MALFORMED
    # Nothing is learned from a tunnel: VTEPs are configured (Calico's ``nolearning``).
    if int(packet["flags"]) & TUNNELED:
        return Reason.ARP_NOT_OWNER
    role = int(interfaces[iif]["role"])
    if role == Role.POD or role == Role.HOST:
        return _from_link(data, packet, tables)
    return _from_lan(data, packet, tables, now)


@kernel
def _from_link(data: Any, packet: Any, tables: Any) -> int:
    """Return what becomes of an ARP packet from a pod or the host: their addresses are known, other ones are a lie."""
    at, iif = int(packet["l3"]), int(packet["iif"])
    own = np.int64(tables[INTERFACE_TABLE][iif]["peer_mac"])
    if wire.sender_mac(data, at) != own or ethernet.source(data, packet["start"]) != own:
        return Reason.L2_SPOOFED_SRC
    sender, target = wire.sender_ip(data, at), wire.target_ip(data, at)
    if sender != 0 and not _is_its_own(sender, iif, tables):
        return Reason.IP_SPOOFED_SRC
    if wire.operation(data, at) != _REQUEST:
        return Reason.ARP_NOT_OWNER
    if V4_PREFIX | target == np.int64(tables[SETTINGS][GATEWAY_LO]):
        return Reason.ARP_ANSWERED if sender else Reason.ARP_PROBE
    if _is_its_own(target, iif, tables):
        return Reason.ARP_OWN_IP
    routes = tables[ROUTES]
    found = route.lookup(routes, 0, V4_PREFIX | target)
    kind = 0 if found < 0 else int(routes[-1]["kind"][found])
    here = kind in (Kind.LOCAL, Kind.SERVICE)
    if sender == 0 and not here:
        return Reason.ARP_PROBE
    proxied = tables[SETTINGS][PROXY_ARP] != 0 and kind in (Kind.POD, Kind.VIA, Kind.TUNNEL)
    return Reason.ARP_ANSWERED if here or proxied else Reason.ARP_NOT_OWNER


@kernel
def _is_its_own(address: int, iif: int, tables: Any) -> bool:
    """Tell whether an address lives behind this link: a pod's, or the node's behind the host's device."""
    routes = tables[ROUTES]
    found = route.lookup(routes, 0, V4_PREFIX | address)
    if found < 0:
        return False
    if tables[INTERFACE_TABLE][iif]["role"] == Role.HOST:
        gateway = V4_PREFIX | address == np.int64(tables[SETTINGS][GATEWAY_LO])
        return bool(routes[-1]["kind"][found] == Kind.LOCAL and not gateway)
    return bool(routes[-1]["kind"][found] == Kind.POD and routes[-1]["oif"][found] == iif)


@kernel
def _from_lan(data: Any, packet: Any, tables: Any, now: int) -> int:
    """Return what becomes of an ARP packet from the uplink: answered, worth learning from, or none of our business.

    As with ``arp_accept=0``: a reply, or a gratuitous request, updates an entry that exists; only a request for an
    address of the node makes a new one. That also bounds what a chatty LAN can send to the slow path.
    """
    at, iif = int(packet["l3"]), int(packet["iif"])
    sender, target = wire.sender_ip(data, at), wire.target_ip(data, at)
    routes = tables[ROUTES]
    request = wire.operation(data, at) == _REQUEST
    found = route.lookup(routes, 0, V4_PREFIX | target) if request else -1
    # A sender that has our address is in conflict with us: answering it would not make that better.
    if found >= 0 and sender != target and _is_announced(routes[-1], found, tables, now):
        to = ethernet.destination(data, packet["start"])
        if to == ethernet.BROADCAST or to == np.int64(tables[INTERFACE_TABLE][iif]["mac"]):
            return Reason.ARP_ANSWERED
    if sender == 0:
        return Reason.ARP_NOT_OWNER
    if neighbour.find(tables[NEIGHBOURS], iif, 0, V4_PREFIX | sender) >= 0:
        return Reason.ARP_LEARN
    if found >= 0 and routes[-1]["kind"][found] == Kind.LOCAL:
        return Reason.ARP_LEARN
    return Reason.ARP_NOT_OWNER


@kernel
def _is_announced(entries: Any, found: int, tables: Any, now: int) -> bool:
    """Tell whether this node answers for a route's address: for one that may move, only as long as it is known to."""
    if not entries["flags"][found] & ANNOUNCED:
        return False
    until = np.int64(tables[SETTINGS][ANNOUNCE_UNTIL])
    return bool(until == 0 or now < until or entries["kind"][found] == Kind.LOCAL)


@kernel
def _note(data: Any, packet: Any, tables: Any, now: int) -> None:
    """Take over another MAC of a known neighbor that asks: the answer leaves from here, past the slow path.

    As ``Resolver.learn`` does it: an entry that changed within ``LOCK_NS`` stays, and a new MAC is only ``STALE``.
    """
    at = int(packet["l3"])
    row = neighbour.find(tables[NEIGHBOURS], int(packet["iif"]), 0, V4_PREFIX | wire.sender_ip(data, at))
    if row < 0:
        return
    entry = tables[NEIGHBOURS][-1][row]
    if entry["state"] < State.REACHABLE or entry["state"] > State.PROBE:
        return
    mac = wire.sender_mac(data, at)
    if np.int64(entry["mac"]) != mac and now - int(entry["updated_ns"]) >= LOCK_NS:
        entry["mac"], entry["state"], entry["probes"], entry["updated_ns"] = mac, State.STALE, 0, now


@kernel
def _answer(data: Any, packet: Any, tables: Any) -> None:
    """Turn a request into its reply, in place, to leave by where it came from."""
    start, at, iif = int(packet["start"]), int(packet["l3"]), int(packet["iif"])
    ours = int(tables[INTERFACE_TABLE][iif]["mac"])
    asker, asker_ip, wanted = wire.sender_mac(data, at), wire.sender_ip(data, at), wire.target_ip(data, at)
    ethernet.emit(data, start, asker, ours, ethernet.ETHERTYPE_ARP)
    wire.emit(data, at, _REPLY, ours, wanted, asker, asker_ip)
    packet["length"] = ethernet.HEADER + wire.HEADER
    packet["oif"] = iif
    packet["vnet_flags"] = 0
    packet["gso_type"] = 0
