"""arp: answer for the gateway that does not exist, and for everything else behind the node (proxy ARP).

A pod has a /32 address and one route, via 169.254.1.1, so it asks for that address and for nothing else; the answer
is the MAC of our end of its link. Decisions follow the kernel's ``arp_process`` with ``proxy_arp=1`` and
``proxy_delay=0``, except that 169.254.1.1 is answered even when the node has no default route (calico#3270).

The reply is made in place from the request and leaves by the interface it came from: one pass, no delay, no slow path.

On the uplink the host's own stack owns the node's addresses and answers for them; we answer nothing there and only
learn.

Steals: arp.answered. Queues: arp.learn. Drops: arp.malformed, arp.not-owner, arp.own-ip, arp.probe, l2.spoofed-src,
ip.spoofed-src.
"""

from typing import Any

import numpy as np

from dataplane.batch import GATEWAY_LO, INTERFACE_TABLE, NEIGHBOURS, PROXY_ARP, ROUTES, SETTINGS, TUNNELED, V4_PREFIX
from dataplane.codecs import arp as wire
from dataplane.codecs import ethernet
from dataplane.jit import kernel
from dataplane.tables import neighbour, route
from dataplane.tables.interface import Role
from dataplane.tables.route import Kind
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
        why = _decide(data, packet, tables)
        packet["reason"] = why
        if why == Reason.ARP_ANSWERED:
            _answer(data, packet, tables)
            packet["verdict"] = Verdict.STOLEN
        elif why == Reason.ARP_LEARN:
            packet["verdict"] = Verdict.QUEUE
        else:
            packet["verdict"] = Verdict.DROP


@kernel
def _decide(data: Any, packet: Any, tables: Any) -> int:
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
    if interfaces[iif]["role"] == Role.POD:
        return _from_pod(data, packet, tables)
    return _from_lan(data, at, iif, tables)


@kernel
def _from_pod(data: Any, packet: Any, tables: Any) -> int:
    """Return what becomes of an ARP packet from a pod: its addresses are known, everything else is a lie."""
    at, iif = int(packet["l3"]), int(packet["iif"])
    own = np.int64(tables[INTERFACE_TABLE][iif]["peer_mac"])
    if wire.sender_mac(data, at) != own or ethernet.source(data, packet["start"]) != own:
        return Reason.L2_SPOOFED_SRC
    routes = tables[ROUTES]
    table = routes[-1]
    sender, target = wire.sender_ip(data, at), wire.target_ip(data, at)
    if sender != 0:
        back = route.lookup(routes, 0, V4_PREFIX | sender)
        if back < 0 or table["kind"][back] != Kind.POD or table["oif"][back] != iif:
            return Reason.IP_SPOOFED_SRC
    if wire.operation(data, at) != _REQUEST:
        return Reason.ARP_NOT_OWNER
    gateway = V4_PREFIX | target == np.int64(tables[SETTINGS][GATEWAY_LO])
    found = route.lookup(routes, 0, V4_PREFIX | target)
    kind = 0 if found < 0 else int(table["kind"][found])
    if kind == Kind.POD and table["oif"][found] == iif:
        return Reason.ARP_OWN_IP
    if sender == 0 and (gateway or kind != Kind.LOCAL):
        return Reason.ARP_PROBE
    proxied = tables[SETTINGS][PROXY_ARP] != 0 and kind in (Kind.POD, Kind.VIA, Kind.TUNNEL)
    if gateway or proxied or kind == Kind.LOCAL:
        return Reason.ARP_ANSWERED
    return Reason.ARP_NOT_OWNER


@kernel
def _from_lan(data: Any, at: int, iif: int, tables: Any) -> int:
    """Return what becomes of an ARP packet from the uplink: worth learning from, or none of our business.

    As with ``arp_accept=0``: a reply, or a gratuitous request, updates an entry that exists; only a request for an
    address of the node makes a new one. That also bounds what a chatty LAN can send to the slow path.
    """
    sender = wire.sender_ip(data, at)
    if sender == 0:
        return Reason.ARP_NOT_OWNER
    if neighbour.find(tables[NEIGHBOURS], iif, 0, V4_PREFIX | sender) >= 0:
        return Reason.ARP_LEARN
    routes = tables[ROUTES]
    found = route.lookup(routes, 0, V4_PREFIX | wire.target_ip(data, at))
    if wire.operation(data, at) == _REQUEST and found >= 0 and routes[-1]["kind"][found] == Kind.LOCAL:
        return Reason.ARP_LEARN
    return Reason.ARP_NOT_OWNER


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
