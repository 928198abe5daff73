"""vxlan: out of the tunnel and into it, as the Linux driver does and as Calico sets it up (RFC 7348, behaviour of B4).

Rows carry whole outer frames whatever the device: a VXLAN socket rebuilds the headers that the kernel took off, so one
stage serves sockets, raw uplinks and captures. *Decapsulation* moves ``start`` to the inner frame and parses it;
*encapsulation* writes 50 bytes into the headroom in front of it. No byte of the packet is copied.

Checks are the driver's, stricter than the RFC: any reserved bit drops. Senders must be nodes of the cluster.

The inner checksum (P1): a veth underlay hands over checksums that were never finished; nothing marks them but that the
stored value equals the folded pseudo-header sum. Only then is the frame passed on as NEEDS_CSUM. Any other value goes
on as it is and the pod verifies it: to mark all would launder corruption.

Drops: tunnel.src-not-node, tunnel.csum, tunnel.truncated, tunnel.bad-flags, tunnel.reserved, tunnel.vni,
tunnel.own-mac, tunnel.inner-mac, tunnel.ecn, and what parse finds in the inner frame.
"""

from typing import Any

import numpy as np

from dataplane.batch import (
    ENCAPSULATED,
    FRAGMENT,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    INTERFACE_TABLE,
    IPV6,
    NEEDS_CSUM,
    NODE_LO,
    POD_MTU,
    SETTINGS,
    TUNNEL_PORT,
    TUNNEL_PORT_HIGH,
    TUNNEL_PORT_LOW,
    TUNNELED,
    VNI,
    VTEP_MAC,
    VTEPS,
)
from dataplane.codecs import checksum, ethernet, ipv4, ipv6, partial, udp
from dataplane.codecs import vxlan as wire
from dataplane.jit import kernel, load8
from dataplane.stages.parse import parse_frame
from dataplane.tables import vtep
from dataplane.tables.interface import Role
from dataplane.verdict import Reason, Verdict

_UDP = 17
_TCP = 6
_ECT0 = 2
_CE = 3
_GROUP = 1 << 40


@kernel
def decapsulate(batch: Any, count: int, tables: Any, now: int) -> None:
    """Unwrap the VXLAN packets of rows [0, count) that are addressed to this node; other rows are untouched."""
    data, packets = batch
    interfaces, settings = tables[INTERFACE_TABLE], tables[SETTINGS]
    port, node = int(settings[TUNNEL_PORT]), settings[NODE_LO]
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] != Verdict.ACCEPT or packet["protocol"] != _UDP:
            continue
        if packet["dport"] != port or packet["dst_lo"] != node:
            continue
        # A pod's VXLAN is the guard's business, a fragment has no ports, and the node's address is IPv4.
        role = interfaces[packet["iif"]]["role"]
        if role == Role.POD or role == Role.NODE or packet["flags"] & (FRAGMENT | IPV6):
            continue
        why = _unwrap(data, packet, tables)
        if why != Reason.ACCEPTED:
            packet["verdict"], packet["reason"] = Verdict.DROP, why


@kernel
def _unwrap(data: Any, packet: Any, tables: Any) -> int:
    settings, vteps = tables[SETTINGS], tables[VTEPS]
    sender = vtep.find(vteps, packet["src_hi"], packet["src_lo"])
    if sender < 0:
        return Reason.TUNNEL_SRC_NOT_NODE
    l3, l4 = int(packet["l3"]), int(packet["l4"])
    end = int(packet["start"]) + int(packet["length"])
    if not udp.valid(data, l4, end):
        return Reason.TUNNEL_TRUNCATED
    if not _outer_checksum_ok(data, packet):
        return Reason.TUNNEL_CSUM
    end = l4 + udp.length(data, l4)
    at = l4 + udp.HEADER
    if not wire.valid(data, at, end) or at + wire.HEADER + ethernet.HEADER > end:
        return Reason.TUNNEL_TRUNCATED
    if not wire.flags_ok(data, at):
        return Reason.TUNNEL_BAD_FLAGS
    if not wire.reserved_ok(data, at):
        return Reason.TUNNEL_RESERVED
    if wire.vni(data, at) != np.int64(settings[VNI]):
        return Reason.TUNNEL_VNI
    inner, mine = at + wire.HEADER, int(np.int64(settings[VTEP_MAC]))
    if ethernet.source(data, inner) == mine:
        return Reason.TUNNEL_OWN_MAC
    to = ethernet.destination(data, inner)
    if to != mine and not to & _GROUP:
        return Reason.TUNNEL_INNER_MAC
    outer_tos = load8(data, l3 + 1)
    packet["start"] = inner
    packet["length"] = end - inner
    packet["flags"] = (int(packet["flags"]) | TUNNELED) & 0xFFFF
    packet["vtep"] = -1
    why = parse_frame(data, packet, mine)
    if why != Reason.ACCEPTED:
        return why
    peer = vteps[-1][sender]
    peer["rx_packets"] += 1
    peer["rx_bytes"] += int(packet["length"])
    _pass_checksum_state(data, packet, int(settings[POD_MTU]))
    return _merge_ecn(data, packet, outer_tos)


@kernel
def _outer_checksum_ok(data: Any, packet: Any) -> bool:
    """Say whether the outer UDP checksum is absent, right, or promised by the virtio header."""
    if packet["vnet_flags"]:
        return True
    l4 = int(packet["l4"])
    if udp.checksum(data, l4) == 0:
        return True
    length = udp.length(data, l4)
    pseudo = checksum.pseudo_header(0, packet["src_lo"], 0, packet["dst_lo"], _UDP, length)
    return bool(udp.checksum_ok(data, l4, pseudo))


@kernel
def _merge_ecn(data: Any, packet: Any, outer_tos: int) -> int:
    """Carry congestion marks of the path inward (RFC 6040 4.2): CE always, ECT(1) onto ECT(0)."""
    mark, tos, l3 = outer_tos & 3, int(packet["tos"]), int(packet["l3"])
    if mark & 1 == 0 or packet["ethertype"] == ethernet.ETHERTYPE_ARP:
        return Reason.ACCEPTED
    if mark == _CE and tos & 3 == 0:
        return Reason.TUNNEL_ECN
    if mark != _CE and tos & 3 != _ECT0:
        return Reason.ACCEPTED
    tos = tos & ~3 | mark
    if int(packet["flags"]) & IPV6:
        ipv6.set_traffic_class(data, l3, tos)
    else:
        ipv4.set_tos(data, l3, tos)
    packet["tos"] = tos
    return Reason.ACCEPTED


@kernel
def _pass_checksum_state(data: Any, packet: Any, pod_mtu: int) -> None:
    """Make the virtio header of a frame that came out of a tunnel (P1, P2)."""
    packet["vnet_flags"] = 0
    packet["gso_type"] = GSO_NONE
    start, l3, l4 = int(packet["start"]), int(packet["l3"]), int(packet["l4"])
    end = start + int(packet["length"])
    flags, protocol = int(packet["flags"]), int(packet["protocol"])
    if l4 == 0 or flags & FRAGMENT or protocol not in (_TCP, _UDP) or not partial.partial_state(data, l3, end):
        return
    packet["vnet_flags"] = NEEDS_CSUM
    packet["csum_start"] = (l4 - start) & 0xFFFF
    packet["csum_offset"] = 16 if protocol == _TCP else 6
    if protocol == _TCP and end - l3 > pod_mtu:
        # The sender's segment size is lost with its virtio header; a pod's MSS follows from the pods' common MTU (P2).
        headers = l4 - l3 + (load8(data, l4 + 12) >> 4) * 4
        packet["hdr_len"] = (l3 - start + headers) & 0xFFFF
        packet["gso_size"] = (pod_mtu - headers) & 0xFFFF
        packet["gso_type"] = GSO_TCPV6 if flags & IPV6 else GSO_TCPV4


@kernel
def encapsulate(batch: Any, count: int, tables: Any, now: int) -> None:
    """Wrap the packets of rows [0, count) that route has given a VTEP; other rows are untouched.

    Mutates ``start`` and ``length`` (now of the outer frame), ``flags``; ``l3`` and ``l4`` stay at the inner headers.
    """
    data, packets = batch
    vteps, mine = tables[VTEPS][-1], int(tables[SETTINGS][VTEP_MAC])
    for i in range(count):
        packet = packets[i]
        if packet["verdict"] != Verdict.ACCEPT or packet["vtep"] < 0 or packet["flags"] & ENCAPSULATED:
            continue
        peer = vteps[packet["vtep"]]
        inner = int(packet["l3"]) - ethernet.HEADER
        length = int(packet["length"])
        kind = ethernet.ETHERTYPE_IPV6 if packet["flags"] & IPV6 else ethernet.ETHERTYPE_IPV4
        ethernet.emit(data, inner, int(peer["mac"]), mine, kind)
        start = _outer(data, packet, tables[SETTINGS], int(peer["lo"]) & 0xFFFF_FFFF)
        packet["start"] = start
        packet["length"] = length + inner - start
        packet["csum_start"] = (int(packet["csum_start"]) + inner - start) & 0xFFFF
        packet["hdr_len"] = (int(packet["hdr_len"]) + inner - start) & 0xFFFF
        packet["flags"] = (int(packet["flags"]) | ENCAPSULATED) & 0xFFFF
        peer["tx_packets"] += 1
        peer["tx_bytes"] += length


@kernel
def _outer(data: Any, packet: Any, settings: Any, remote: int) -> int:
    """Write VXLAN, UDP, IPv4 and Ethernet in front of the inner frame; return where the outer frame starts.

    TOS carries only ECN, and CE becomes ECT(0): the tunnel's own path marks anew (RFC 6040 4.1). DF 0, TTL 64, UDP
    checksum 0, as Calico's device is configured. The MAC addresses stay zero: a socket has none, and a raw uplink
    fills them in.
    """
    inner = int(packet["l3"]) - ethernet.HEADER
    length = int(packet["length"])
    at = inner - wire.HEADER
    wire.emit(data, at, int(settings[VNI]))
    at -= udp.HEADER
    low, high = int(settings[TUNNEL_PORT_LOW]), int(settings[TUNNEL_PORT_HIGH])
    udp.emit(
        data,
        at,
        wire.source_port(_flow_hash(packet), low, high),
        int(settings[TUNNEL_PORT]),
        (udp.HEADER + wire.HEADER + length) & 0xFFFF,
    )
    at -= ipv4.HEADER
    total = (ipv4.HEADER + udp.HEADER + wire.HEADER + length) & 0xFFFF
    ipv4.emit(data, at, int(settings[NODE_LO]) & 0xFFFF_FFFF, remote, _UDP, total)
    ecn = int(packet["tos"]) & 3
    if ecn:
        ipv4.set_tos(data, at, _ECT0 if ecn == _CE else ecn)
    at -= ethernet.HEADER
    ethernet.emit(data, at, 0, 0, ethernet.ETHERTYPE_IPV4)
    return at


@kernel
def _flow_hash(packet: Any) -> int:
    """Return 32 bits that are the same for all packets of a flow and well spread otherwise (murmur3's finalizer).

    It picks a source port and nothing else, so it needs no secret: an attacker gains only an uneven spread of his own
    flows. Fragments leave the ports out, since only the first one has them.
    """
    ports = (int(packet["sport"]) << 16 | int(packet["dport"])) & 0xFFFF_FFFF  # signed, as the 0 below: else a float
    if packet["flags"] & FRAGMENT:
        ports = 0
    word = packet["src_lo"] ^ packet["src_hi"]
    other = packet["dst_lo"] ^ packet["dst_hi"]
    mixed = (int(word) & 0xFFFF_FFFF) * 0x9E37_79B1 + (int(other) & 0xFFFF_FFFF) * 0x85EB_CA77
    mixed = (mixed + ports * 0xC2B2_AE3D + int(packet["protocol"])) & 0xFFFF_FFFF
    mixed = (mixed ^ mixed >> 16) * 0x85EB_CA6B & 0xFFFF_FFFF
    mixed = (mixed ^ mixed >> 13) * 0xC2B2_AE35 & 0xFFFF_FFFF
    return mixed ^ mixed >> 16
