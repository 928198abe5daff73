"""Frames for tests, made by scapy: an implementation that is not ours."""

from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, _ICMPv6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import NoPayload, Packet, Raw

from tests import world as w

BROADCAST = "ff:ff:ff:ff:ff:ff"


def pod_frame(ip: Packet, source: str = w.MAC_A, to: str = w.GATEWAY_MAC) -> Packet:
    """What a pod sends: everything goes to the gateway's MAC."""
    return Ether(src=source, dst=to) / ip


def udp(dst: str, src: str = w.IP_A, size: int = 8, sport: int = 4000, dport: int = 53, **fields: Any) -> Packet:
    return IP(src=src, dst=dst, **fields) / UDP(sport=sport, dport=dport) / Raw(bytes(k & 0xFF for k in range(size)))


def tcp(dst: str, src: str = w.IP_A, size: int = 8, flags: str = "A", **fields: Any) -> Packet:
    return IP(src=src, dst=dst, **fields) / TCP(sport=4000, dport=80, flags=flags) / Raw(b"t" * size)


def ping(dst: str, src: str = w.IP_A, size: int = 8, **fields: Any) -> Packet:
    return IP(src=src, dst=dst, **fields) / ICMP(id=7, seq=1) / Raw(b"p" * size)


def arp_request(tip: str, sender: str = w.IP_A, mac: str = w.MAC_A, to: str = BROADCAST, **fields: Any) -> Packet:
    return Ether(src=mac, dst=to) / ARP(op=1, hwsrc=mac, psrc=sender, hwdst="00:00:00:00:00:00", pdst=tip, **fields)


def lan_frame(ip: Packet, source: str = w.LAN_MAC, to: str = w.UPLINK_MAC) -> Packet:
    return Ether(src=source, dst=to) / ip


def inner_frame(ip: Packet, source: str = w.PEER_VTEP, to: str = w.VTEP) -> Packet:
    return Ether(src=source, dst=to) / ip


def tunnel(inner: Packet, source: str = w.PEER, tos: int = 0, flags: int = 8, vni: int = 4096, **header: Any) -> Packet:
    """What node2 sends: an inner frame in VXLAN, the UDP checksum absent as Calico configures it."""
    return (
        Ether(src=w.LAN_MAC, dst=w.UPLINK_MAC)
        / IP(src=source, dst=w.NODE, tos=tos, id=0)
        / UDP(sport=40000, dport=4789, chksum=header.pop("chksum", 0))
        / VXLAN(flags=flags, vni=vni, **header)
        / inner
    )


def fragments(packet: Packet, size: int) -> list[Packet]:
    """Cut an IP packet into pieces of at most ``size`` payload bytes (a multiple of 8)."""
    whole = IP(bytes(packet))
    payload = bytes(whole.payload)
    pieces: list[Packet] = []
    for at in range(0, len(payload), size):
        piece = whole.copy()
        piece.remove_payload()
        piece.len = piece.chksum = None
        piece.frag = at // 8
        piece.flags = "MF" if at + size < len(payload) else 0
        pieces.append(IP(bytes(piece / Raw(payload[at : at + size]))))
    return pieces


def patched(frame: Packet | bytes, at: int, octets: bytes) -> bytes:
    """A frame with some of its bytes overwritten."""
    raw = bytes(frame)
    return raw[:at] + octets + raw[at + len(octets) :]


_COMPUTED = (IP, IPv6, TCP, UDP, ICMP, _ICMPv6)  # and not what scapy sees in a payload because of its port


def recomputed(frame: bytes, layers: tuple[type[Packet], ...] = _COMPUTED) -> bytes:
    """The same frame with every length and checksum computed by scapy: what it must look like on the wire.

    What an ICMP error quotes stays as it is; a UDP checksum that is absent stays so. ``layers`` are those that are
    computed, where a payload is noise that only looks like UDP.
    """
    whole = Ether(frame)
    layer = whole
    while not isinstance(layer, NoPayload) and not type(layer).__name__.startswith("IPerror"):
        for name in ("len", "chksum", "plen", "cksum") if isinstance(layer, layers) else ():
            absent = isinstance(layer, UDP) and name == "chksum" and layer.chksum == 0
            if name in layer.fields and not absent:
                layer.delfieldval(name)  # forgets the bytes that were read, too
        layer = layer.payload
    return bytes(whole)


def tunneled(ip: Packet, **fields: Any) -> Packet:
    """An IP packet from node2's VTEP to ours, as it arrives on the underlay."""
    return tunnel(inner_frame(ip), **fields)
