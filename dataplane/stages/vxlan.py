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

OVERHEAD = 50  # outer Ethernet is not counted by an MTU, the inner one is: 20 + 8 + 8 + 14

_UDP = 17
_TCP = 6
_CE = 3
_GROUP = 1 << 40


@kernel
def decapsulate(batch: Any, count: int, tables: Any, now: int) -> None:
    """Unwrap the VXLAN packets of rows [0, count) that are addressed to this node; other rows are untouched."""
    data, packets = batch
    verdict, reason, iif = packets["verdict"], packets["reason"], packets["iif"]
    protocol, dport, target = packets["protocol"], packets["dport"], packets["dst_lo"]
    role = tables[INTERFACE_TABLE]["role"]
    settings = tables[SETTINGS]
    port, node = int(settings[TUNNEL_PORT]), settings[NODE_LO]
    for i in range(count):
        # A pod's VXLAN is the guard's business, and a fragment has no ports.
        if verdict[i] != Verdict.ACCEPT or protocol[i] != _UDP or dport[i] != port or target[i] != node:
            continue
        if role[iif[i]] == Role.POD or role[iif[i]] == Role.NODE or packets["flags"][i] & FRAGMENT:
            continue
        why = _unwrap(data, packets, i, tables)
        if why != Reason.ACCEPTED:
            verdict[i], reason[i] = Verdict.DROP, why


@kernel
def _unwrap(data: Any, packets: Any, i: int, tables: Any) -> int:
    settings, vteps = tables[SETTINGS], tables[VTEPS]
    sender = vtep.find(vteps, packets["src_hi"][i], packets["src_lo"][i])
    if sender < 0:
        return Reason.TUNNEL_SRC_NOT_NODE
    l3, l4 = int(packets["l3"][i]), int(packets["l4"][i])
    end = int(packets["start"][i]) + int(packets["length"][i])
    if not udp.valid(data, l4, end):
        return Reason.TUNNEL_TRUNCATED
    if not _outer_checksum_ok(data, packets, i):
        return Reason.TUNNEL_CSUM
    at = l4 + udp.HEADER
    if not wire.valid(data, at, end) or at + wire.HEADER + ethernet.HEADER > end:
        return Reason.TUNNEL_TRUNCATED
    if not wire.flags_ok(data, at):
        return Reason.TUNNEL_BAD_FLAGS
    if not wire.reserved_ok(data, at):
        return Reason.TUNNEL_RESERVED
    if wire.vni(data, at) != int(settings[VNI]):
        return Reason.TUNNEL_VNI
    inner, mine = at + wire.HEADER, int(settings[VTEP_MAC])
    if ethernet.source(data, inner) == mine:
        return Reason.TUNNEL_OWN_MAC
    to = ethernet.destination(data, inner)
    if to != mine and not to & _GROUP:
        return Reason.TUNNEL_INNER_MAC
    outer_tos = load8(data, l3 + 1)
    packets["start"][i] = inner
    packets["length"][i] = end - inner
    packets["flags"][i] = (int(packets["flags"][i]) | TUNNELED) & 0xFFFF
    packets["vtep"][i] = -1
    why = parse_frame(data, packets, i, mine)
    if why != Reason.ACCEPTED:
        return why
    table = vteps[-1]
    table["rx_packets"][sender] += 1
    table["rx_bytes"][sender] += int(packets["length"][i])
    _pass_checksum_state(data, packets, i, int(settings[POD_MTU]))
    return _merge_ecn(data, packets, i, outer_tos)


@kernel
def _outer_checksum_ok(data: Any, packets: Any, i: int) -> bool:
    """Say whether the outer UDP checksum is absent, right, or promised by the virtio header."""
    if packets["vnet_flags"][i]:
        return True
    l4 = int(packets["l4"][i])
    if udp.checksum(data, l4) == 0:
        return True
    length = udp.length(data, l4)
    pseudo = checksum.pseudo_header(0, packets["src_lo"][i], 0, packets["dst_lo"][i], _UDP, length)
    return bool(udp.checksum_ok(data, l4, pseudo))


@kernel
def _merge_ecn(data: Any, packets: Any, i: int, outer_tos: int) -> int:
    """Carry congestion marks of the path inward (RFC 6040 4.2)."""
    if outer_tos & 3 != _CE or packets["ethertype"][i] == ethernet.ETHERTYPE_ARP:
        return Reason.ACCEPTED
    tos, l3 = int(packets["tos"][i]), int(packets["l3"][i])
    if tos & 3 == 0:
        return Reason.TUNNEL_ECN
    if int(packets["flags"][i]) & IPV6:
        ipv6.set_traffic_class(data, l3, tos | _CE)
    else:
        ipv4.set_tos(data, l3, tos | _CE)
    packets["tos"][i] = tos | _CE
    return Reason.ACCEPTED


@kernel
def _pass_checksum_state(data: Any, packets: Any, i: int, pod_mtu: int) -> None:
    """Make the virtio header of a frame that came out of a tunnel (P1, P2)."""
    packets["vnet_flags"][i] = 0
    packets["gso_type"][i] = GSO_NONE
    start, l3, l4 = int(packets["start"][i]), int(packets["l3"][i]), int(packets["l4"][i])
    end = start + int(packets["length"][i])
    flags, protocol = int(packets["flags"][i]), int(packets["protocol"][i])
    if l4 == 0 or flags & FRAGMENT or protocol not in (_TCP, _UDP) or not partial.partial_state(data, l3, end):
        return
    packets["vnet_flags"][i] = NEEDS_CSUM
    packets["csum_start"][i] = (l4 - start) & 0xFFFF
    packets["csum_offset"][i] = 16 if protocol == _TCP else 6
    if protocol == _TCP and end - l3 > pod_mtu:
        # The sender's segment size is lost with its virtio header; a pod's MSS follows from the pods' common MTU (P2).
        headers = l4 - l3 + (load8(data, l4 + 12) >> 4) * 4
        packets["hdr_len"][i] = (l3 - start + headers) & 0xFFFF
        packets["gso_size"][i] = (pod_mtu - headers) & 0xFFFF
        packets["gso_type"][i] = GSO_TCPV6 if flags & IPV6 else GSO_TCPV4


@kernel
def encapsulate(batch: Any, count: int, tables: Any, now: int) -> None:
    """Wrap the packets of rows [0, count) that route has given a VTEP; other rows are untouched.

    Mutates ``start`` and ``length`` (now of the outer frame), ``flags``; ``l3`` and ``l4`` stay at the inner headers.
    """
    data, packets = batch
    verdict, row, flags = packets["verdict"], packets["vtep"], packets["flags"]
    vteps = tables[VTEPS]
    table = vteps[-1]
    for i in range(count):
        if verdict[i] != Verdict.ACCEPT or row[i] < 0 or flags[i] & ENCAPSULATED:
            continue
        peer = int(row[i])
        inner = int(packets["l3"][i]) - ethernet.HEADER
        length = int(packets["length"][i])
        kind = ethernet.ETHERTYPE_IPV6 if flags[i] & IPV6 else ethernet.ETHERTYPE_IPV4
        ethernet.emit(data, inner, int(table["mac"][peer]), int(tables[SETTINGS][VTEP_MAC]), kind)
        start = _outer(data, packets, i, tables, int(table["lo"][peer]) & 0xFFFF_FFFF)
        packets["start"][i] = start
        packets["length"][i] = length + inner - start
        packets["csum_start"][i] = (int(packets["csum_start"][i]) + inner - start) & 0xFFFF
        packets["hdr_len"][i] = (int(packets["hdr_len"][i]) + inner - start) & 0xFFFF
        flags[i] = (int(flags[i]) | ENCAPSULATED) & 0xFFFF
        table["tx_packets"][peer] += 1
        table["tx_bytes"][peer] += length


@kernel
def _outer(data: Any, packets: Any, i: int, tables: Any, remote: int) -> int:
    """Write VXLAN, UDP, IPv4 and Ethernet in front of the inner frame; return where the outer frame starts.

    TOS carries only ECN, and CE becomes ECT(0): the tunnel's own path marks anew (RFC 6040 4.1). DF 0, TTL 64, UDP
    checksum 0, as Calico's device is configured. The MAC addresses stay zero: a socket has none, and a raw uplink
    fills them in.
    """
    settings = tables[SETTINGS]
    inner = int(packets["l3"][i]) - ethernet.HEADER
    length = int(packets["length"][i])
    at = inner - wire.HEADER
    wire.emit(data, at, int(settings[VNI]))
    at -= udp.HEADER
    low, high = int(settings[TUNNEL_PORT_LOW]), int(settings[TUNNEL_PORT_HIGH])
    udp.emit(
        data,
        at,
        wire.source_port(_flow_hash(packets, i), low, high),
        int(settings[TUNNEL_PORT]),
        (udp.HEADER + wire.HEADER + length) & 0xFFFF,
    )
    at -= ipv4.HEADER
    total = (ipv4.HEADER + udp.HEADER + wire.HEADER + length) & 0xFFFF
    ipv4.emit(data, at, int(settings[NODE_LO]) & 0xFFFF_FFFF, remote, _UDP, total)
    ecn = int(packets["tos"][i]) & 3
    if ecn:
        ipv4.set_tos(data, at, 2 if ecn == _CE else ecn)
    at -= ethernet.HEADER
    ethernet.emit(data, at, 0, 0, ethernet.ETHERTYPE_IPV4)
    return at


@kernel
def _flow_hash(packets: Any, i: int) -> int:
    """Return 32 bits that are the same for all packets of a flow and well spread otherwise (murmur3's finalizer).

    It picks a source port and nothing else, so it needs no secret: an attacker gains only an uneven spread of his own
    flows.
    """
    ports = int(packets["sport"][i]) << 16 | int(packets["dport"][i])
    word = packets["src_lo"][i] ^ packets["src_hi"][i]
    other = packets["dst_lo"][i] ^ packets["dst_hi"][i]
    mixed = (int(word) & 0xFFFF_FFFF) * 0x9E37_79B1 + (int(other) & 0xFFFF_FFFF) * 0x85EB_CA77
    mixed = (mixed + ports * 0xC2B2_AE3D + int(packets["protocol"][i])) & 0xFFFF_FFFF
    mixed = (mixed ^ mixed >> 16) * 0x85EB_CA6B & 0xFFFF_FFFF
    mixed = (mixed ^ mixed >> 13) * 0xC2B2_AE35 & 0xFFFF_FFFF
    return mixed ^ mixed >> 16
