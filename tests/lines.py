"""Tables of packets in and packets out: ``a: udp a:4000 > vip:53 -> b: a:4000 > b:5353``.

Each line is a packet that comes in by a device (pod a or b, lan, tunnel, host), and what leaves by which, or the reason
why nothing does. ``*1`` stands for a port that the dataplane chose; it is remembered. ``wait 30`` lets time pass.
"""

import re

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.stages import conntrack
from tests import world as w
from tests.frames import inner_frame, lan_frame, pod_frame, recomputed, tunnel

NAMES = {"a": w.IP_A, "b": w.IP_B, "remote": w.IP_REMOTE, "node": w.NODE, "vip": w.VIP, "lb": w.LB_IP,
         "tunnel": w.TUNNEL_ADDRESS, "out": w.OUTSIDE, "lan": w.LAN_GATEWAY, "free": w.IP_FREE}  # fmt: skip
WORDS = {address: name for name, address in NAMES.items()}
LINE = re.compile(r"(\w+): (tcp|udp|icmp)(?: (\w+))? (\S+) > (\S+)(?: -> (.*))?")
DEVICES = {w.POD_A: "a", w.POD_B: "b", w.UPLINK: "lan", w.UNDERLAY: "tunnel", w.HOST: "host"}
QUERIES = {8: "echo", 0: "reply"}


def endpoint(text):
    name, _, port = text.partition(":")
    return NAMES[name], int(port or 0)


def packet_of(protocol, what, source, target):
    """An IP packet for one side of a line."""
    (src, sport), (dst, dport) = endpoint(source), endpoint(target)
    ip = IP(src=src, dst=dst)
    if protocol == "icmp":
        return ip / ICMP(type=0 if what == "reply" else 8, id=sport or dport, seq=1) / Raw(b"ping")
    if protocol == "udp":
        return ip / UDP(sport=sport, dport=dport) / Raw(b"data")
    seq, ack = {"S": (1000, 0), "SA": (1999, 1001)}.get(what, (1001, 2000))
    return ip / TCP(sport=sport, dport=dport, flags=what, seq=seq, ack=ack)


def entering(device, ip):
    """The frame that carries a packet in by a device, and the device's row."""
    if device in ("a", "b"):
        return pod_frame(ip, source=w.MAC_A if device == "a" else w.MAC_B), w.POD_A if device == "a" else w.POD_B
    if device == "tunnel":
        return tunnel(inner_frame(ip)), w.UNDERLAY
    if device == "host":
        return Ether(src=w.HOST_MAC, dst=w.HOST_MAC) / ip, w.HOST
    return lan_frame(ip), w.UPLINK


def leaving(outcome):
    """What left, in the words of a line: ``b: 10.244.1.10:4000 > b:53``, ports above 1023 that were not given as *."""
    if outcome.label not in ("accepted",):
        return outcome.label
    frame = outcome.frame
    ether = Ether(frame)
    if outcome.record["flags"] & b.ENCAPSULATED:
        ether = Ether(frame[50:])
    assert bytes(ether) == recomputed(bytes(ether)), "checksums"
    ip = ether[IP]
    if ICMP in ip and ip[ICMP].type in QUERIES:
        ports = (ip[ICMP].id, 0) if ip[ICMP].type == 8 else (0, ip[ICMP].id)
    else:
        ports = (ip.payload.sport, ip.payload.dport)
    sides = [
        WORDS.get(address, address) + (f":{port}" if port else "")
        for address, port in zip((ip.src, ip.dst), ports, strict=True)
    ]
    return f"{DEVICES[outcome.oif]}: {' > '.join(sides)}"


class Scenario:
    """Runs lines of ``device: protocol flags source > target -> what leaves``, remembering chosen ports by ``*``."""

    def __init__(self, world):
        self.world = world
        self.chosen = {}

    def run(self, text):
        for line in text.strip().splitlines():
            self.line(line.strip())

    def line(self, line):
        if line.startswith("wait "):
            self.world.now += int(line.split()[1]) * w.SECOND
            conntrack.expire(self.world.tables.arrays, self.world.now, w.FLOWS)
            return
        found = LINE.fullmatch(" ".join(line.split()))
        assert found, line
        device, protocol, what, source, target, expected = found.groups()
        source, target = (re.sub(r"\*(\d?)", lambda mark: str(self.chosen[mark[0]]), side) for side in (source, target))
        frame, iif = entering(device, packet_of(protocol, what, source, target))
        left = leaving(self.world.one(frame, iif))
        pattern = re.escape(expected).replace(r"\*", "*")
        marks = re.findall(r"\*\d?", pattern)
        shape = re.sub(r"\*\d?", r"(\\d+)", pattern)
        match = re.fullmatch(shape, left)
        assert match, f"{line}\n  left: {left}"
        for mark, port in zip(marks, match.groups(), strict=True):
            assert self.chosen.setdefault(mark, port) == port, f"{line}: {mark} was {self.chosen[mark]}"
