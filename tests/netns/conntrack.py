"""Linux's conntrack as a tracker of ``tests.tcp_segments``: a kernel that forwards between two silent hosts.

    client 192.0.2.2 ── left ┃ router: net.ipv4.ip_forward, ct state invalid drop ┃ right ── 198.51.100.2 server

The hosts have no addresses and no stack that answers: their frames are written and read by packet sockets. Behind every
segment goes a datagram that is not tracked; when it arrives and the segment has not, the kernel has dropped it. The
flow is then asked for by ctnetlink, which shows more of it than conntrack(8).
"""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

from pyroute2.netlink import NLM_F_REQUEST, NLMSG_ERROR
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, nfct_msg

from dataplane.devices.namespace import in_namespace, open_namespace
from tests.netns.harness import Namespace, Network
from tests.strategies import make_ethernet, make_ipv4, make_udp
from tests.tcp_segments import (
    CLIENT,
    CLIENT_MAC,
    PORT,
    SERVER,
    SERVER_MAC,
    STATES,
    Entry,
    Segment,
    Settings,
    Step,
)

LEFT_MAC, RIGHT_MAC = 0x02_00_C0_00_02_01, 0x02_00_C6_33_64_01  # the router's
FENCE = 9  # the discard port
ETH_IP = 0x0800
CTNETLINK, GET = 1 << 8, 1
SEEN_REPLY, ASSURED = 2, 4
Made = TypeVar("Made")
RULES = f"""
add table ip conntrack
add chain ip conntrack first {{ type filter hook prerouting priority raw; }}
add rule ip conntrack first udp dport {FENCE} notrack
add chain ip conntrack forward {{ type filter hook forward priority filter; }}
add rule ip conntrack forward ct state invalid drop
"""


def colons(mac: int) -> str:
    return mac.to_bytes(6, "big").hex(":")


def dotted(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4, "big"))


class Linux:
    """A tracker, one flow at a time; `fresh` goes on with ports that no flow has."""

    def __init__(self, network: Network) -> None:
        self.router = network.namespace("router", forward=True)
        self.hosts = [network.namespace("left"), network.namespace("right")]
        ends = [("left", CLIENT, CLIENT_MAC, LEFT_MAC), ("right", SERVER, SERVER_MAC, RIGHT_MAC)]
        for host, (name, address, mac, router_mac) in zip(self.hosts, ends, strict=True):
            network.wire((self.router, name), (host, "eth0"))
            host.ip("link", "set", "eth0", "address", colons(mac))
            self.router.ip("link", "set", name, "address", colons(router_mac))
            self.router.ip("address", "add", f"{dotted(address - 1)}/24", "dev", name)
            self.router.ip(
                "neighbor", "replace", dotted(address), "lladdr", colons(mac), "dev", name, "nud", "permanent"
            )
        rules = network.directory / "router.nft"
        rules.write_text(RULES)
        self.router.run("nft", "-f", rules)
        self._ends = [_inside(host, _packet_socket) for host in self.hosts]
        self._netlink = _inside(self.router, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12))
        self._sockets = [*self._ends, self._netlink]
        self._sysctls: dict[str, int] = {}  # open files: a sysctl belongs to the namespace in which it was opened
        self._settings: dict[str, int] = {}
        self._ports, self._fences = count(1024), count(1)
        self.sport = next(self._ports)

    def close(self) -> None:
        for each in self._sockets:
            each.close()
        for descriptor in self._sysctls.values():
            os.close(descriptor)

    def fresh(self) -> None:
        """Go on with a flow that does not exist yet."""
        self.sport = next(self._ports)

    def configure(self, settings: Settings) -> None:
        wanted = {"tcp_be_liberal": settings.liberal, "tcp_loose": settings.loose}
        for name, seconds in settings.timeouts.items():
            if name != "syn_sent2":  # has no sysctl: it is SYN_SENT's
                wanted[f"tcp_timeout_{name}"] = seconds
        if not self._sysctls:
            self._sysctls = _inside(self.router, lambda: {name: _open_sysctl(name) for name in wanted})
        for name, value in wanted.items():
            if self._settings.get(name) != value:
                os.pwrite(self._sysctls[name], str(value).encode(), 0)
        self._settings = wanted

    def send(self, segment: Segment, now: int) -> Step:
        del now
        here, there = self._ends[segment.side], self._ends[1 - segment.side]
        mac = CLIENT_MAC if segment.side == 0 else SERVER_MAC
        router_mac = LEFT_MAC if segment.side == 0 else RIGHT_MAC
        frame = segment.frame(self.sport, mac, router_mac)
        here.send(frame)
        fence = self._fence(segment.side, mac, router_mac)
        here.send(fence)
        seen = list(_until(there, fence[34:]))
        return Step(frame[34:] in seen, self._entry())

    def _fence(self, side: int, mac: int, router_mac: int) -> bytes:
        source, target = (CLIENT, SERVER) if side == 0 else (SERVER, CLIENT)
        octets = make_udp(source, target, FENCE, FENCE, struct.pack("!Q", next(self._fences)))
        return make_ethernet(router_mac, mac, ETH_IP, make_ipv4(source, target, 17, octets))

    def _entry(self) -> Entry | None:
        wanted = NFCTAttrTuple(
            saddr=dotted(CLIENT), daddr=dotted(SERVER), proto=socket.IPPROTO_TCP, sport=self.sport, dport=PORT
        )
        request = nfct_msg.create_from(tuple_orig=wanted)
        request["header"]["type"], request["header"]["flags"] = CTNETLINK | GET, NLM_F_REQUEST
        request["nfgen_family"] = socket.AF_INET
        request.encode()
        self._netlink.send(bytes(request.data))
        answer = self._netlink.recv(65536)
        if struct.unpack_from("=H", answer, 4)[0] == NLMSG_ERROR:
            return None
        found = nfct_msg(answer)
        found.decode()
        return _read(found)


def _read(found: nfct_msg) -> Entry:
    tcp = found.get_attr("CTA_PROTOINFO").get_attr("CTA_PROTOINFO_TCP")
    address = found.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_IP").get_attr("CTA_IP_V4_SRC")
    status = found.get_attr("CTA_STATUS")
    ways = ("ORIGINAL", "REPLY")
    flags = [tcp.get_attr(f"CTA_PROTOINFO_TCP_FLAGS_{way}")[0] for way in ways]
    scales = [tcp.get_attr(f"CTA_PROTOINFO_TCP_WSCALE_{way}") for way in ways]
    return Entry(
        originator=int(address != dotted(CLIENT)),
        state=STATES[tcp.get_attr("CTA_PROTOINFO_TCP_STATE")],
        timeout=found.get_attr("CTA_TIMEOUT"),
        replied=bool(status & SEEN_REPLY),
        assured=bool(status & ASSURED),
        flags=(flags[0], flags[1]),
        scales=(scales[0], scales[1]),
    )


def _open_sysctl(name: str) -> int:
    return os.open(f"/proc/sys/net/netfilter/nf_conntrack_{name}", os.O_WRONLY)


def _inside(namespace: Namespace, make: Callable[[], Made]) -> Made:
    handle = open_namespace(namespace.name)
    try:
        return in_namespace(handle, make)
    finally:
        os.close(handle.fd)


def _packet_socket() -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_IP))
    made.bind(("eth0", ETH_IP))
    made.settimeout(5.0)
    return made


def _until(there: socket.socket, fence: bytes) -> Iterator[bytes]:
    """Yield what arrives, from the transport header on, until the fence does."""
    while (octets := there.recv(65536)[34:]) != fence:
        yield octets


@contextmanager
def one_processor() -> Iterator[None]:
    """Stay on one CPU: each has its own queue between the ends of a veth, and the fence must not overtake."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
