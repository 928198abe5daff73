"""Linux's NAT between two silent hosts: what a kernel makes of a frame, to compare with what our kernels make of it.

    hosts: left 02:..:02 ── left ┃ router: nftables, 10.99.0.1 | 192.0.2.11, 2001:db8::11 ┃ right ── right 02:..:12
           10.244.0.0/16, fd00::/16                                                          everything else

The hosts have no addresses and no stack that answers: their frames are written and read by packet sockets. Behind every
frame goes a datagram that is not tracked; what arrives before that is what became of the frame.
"""

import socket
from functools import partial
from types import TracebackType

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.netns.harness import Network
from tests.netns.sockets import inside
from tests.strategies import make_ethernet, make_ipv4, make_udp

MACS = {"left": (0x02_00_0A_63_00_02, 0x02_00_0A_63_00_01), "right": (0x02_00_C0_00_02_01, 0x02_00_C0_00_02_0B)}
LEFT, RIGHT = "left", "right"
FENCE = 9  # the discard port
FENCES = {LEFT: (0x0AF4_0107, 0xC633_6407), RIGHT: (0xC633_6407, 0x0AF4_0107)}  # from this side, not tracked
UNTRACKED = f"""
add table ip fence
add chain ip fence first {{ type filter hook prerouting priority raw; }}
add rule ip fence first udp dport {FENCE} notrack
"""
ETH_P_ALL = 3


def colons(mac: int) -> str:
    return mac.to_bytes(6, "big").hex(":")


class Router:
    """A kernel that translates by these rules of nftables; use it in ``with``."""

    def __init__(self, network: Network, name: str, rules: str) -> None:
        hosts, router = network.namespace(f"{name}-hosts"), network.namespace(name, forward=True)
        for scope in ("all", "default"):
            router.sysctl(f"net/ipv6/conf/{scope}/disable_ipv6", 0)
            router.sysctl(f"net/ipv6/conf/{scope}/forwarding", 1)
            router.sysctl(f"net/ipv6/conf/{scope}/accept_dad", 0)
        for side, (host, ours) in MACS.items():
            network.wire((hosts, side), (router, side))
            hosts.ip("link", "set", side, "address", colons(host), "arp", "off")
            router.ip("link", "set", side, "address", colons(ours))
            for gateway in ("10.99.0.2" if side == LEFT else "192.0.2.1", "fe80::99"):
                router.ip("neighbor", "replace", gateway, "lladdr", colons(host), "dev", side, "nud", "permanent")
        for side, address in ((LEFT, "10.99.0.1/24"), (RIGHT, "192.0.2.11/24"), (RIGHT, "2001:db8::11/64")):
            router.ip("address", "add", address, "dev", side)
        for prefix, gateway, side in (
            ("10.244.0.0/16", "10.99.0.2", LEFT),
            ("0.0.0.0/0", "192.0.2.1", RIGHT),
            ("fd00::/16", "fe80::99", LEFT),
            ("::/0", "fe80::99", RIGHT),
        ):
            router.ip("route", "add", prefix, "via", gateway, "dev", side)
        router.sysctl("net/ipv4/conf/left/accept_local", 1)  # a test plays the router's own packets
        router.run("nft", UNTRACKED + rules)
        router.sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", 1)  # segments here have no history
        self._sockets = {side: inside(hosts, partial(_packet_socket, side)) for side in MACS}

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for opened in self._sockets.values():
            opened.close()

    def cross(self, side: str, packet: Packet) -> list[bytes]:
        """Send a packet by the host of this side; return what the other one receives, from the IP header on."""
        here, there = self._sockets[side], self._sockets[RIGHT if side == LEFT else LEFT]
        mine, router = (colons(mac) for mac in MACS[side])
        here.send(bytes(Ether(src=mine, dst=router) / packet))
        source, target = FENCES[side]
        fence = make_ipv4(source, target, 17, make_udp(source, target, FENCE, FENCE))
        here.send(make_ethernet(MACS[side][1], MACS[side][0], 0x0800, fence))
        arrived = []
        while (frame := there.recv(65536))[23:24] + frame[34:38] != b"\x11" + FENCE.to_bytes(2, "big") * 2:
            if frame[6:12] == MACS[RIGHT if side == LEFT else LEFT][1].to_bytes(6, "big") and not frame[0] & 1:
                arrived.append(frame[14:])
        return arrived


def _packet_socket(side: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    made.bind((side, ETH_P_ALL))
    made.settimeout(5.0)
    return made
