"""Traffic by seed: valid frames of every kind, damaged ones and noise, from every interface of ``tests/world.py``.

``python -m tests.corpus SEED COUNT`` prints what the pipeline made of it, one line a packet: run in two modes of the
compiler, the outputs must be equal.
"""

import hashlib
import sys
from collections.abc import Iterator
from ipaddress import ip_network
from random import Random
from typing import Any, NamedTuple

from scapy.layers.inet import ICMP, IP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import UDP, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Raw

from dataplane import batch as b
from dataplane import pipeline
from dataplane.devices.memory import Vnet, collect, load
from dataplane.engine import Engine
from dataplane.stages import conntrack, defrag
from dataplane.tables.policy import LOCAL, NO_LOCAL, Exposure
from dataplane.tables.route import Kind, Route
from tests import frames as f
from tests import world as w
from tests.world import SECOND, World


class Arrival(NamedTuple):
    """A frame and the interface it comes in by."""

    iif: int
    frame: bytes
    vnet: Vnet = Vnet()


V6_A, V6_B, V6_REMOTE = "2001:db8::a", "2001:db8::b", "2001:db8:2::1"
TARGETS = (w.IP_A, w.IP_B, w.IP_FREE, w.IP_REMOTE, w.IP_LOST, w.NODE, w.PEER, w.OUTSIDE, w.LAN_GATEWAY, "203.0.113.9")
ODD_TARGETS = ("8.8.8.8", "127.0.0.1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "169.254.1.1")
SERVICES = (
    (w.VIP, 80),
    (w.VIP, 80),
    (w.VIP, 53),
    (w.VIP, 81),
    (w.VIP, 82),
    (w.NODE, 30080),
    (w.LB_IP, 80),
    (w.LB_IP, 81),
)
FLAGS = ("S", "S", "S", "A", "A", "PA", "FA", "R", "RA", "SF", "FSPU")
OPTIONS: tuple[list[Any], ...] = ([], [IPOption_NOP()], [IPOption_RR(routers=["0.0.0.0"] * 9)])


class Corpus:
    """A source of arrivals; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self._makers = (
            self._from_pod,
            self._from_lan,
            self._from_tunnel,
            self._arp,
            self._fragments,
            self._large,
            self._v6,
            self._service,
            self._service,
            self._reply,
            self._error,
        )

    def arrivals(self, count: int) -> list[Arrival]:
        """The next frames; about a fifth of them are damaged, a twentieth are noise."""
        found: list[Arrival] = []
        while len(found) < count:
            if self.random.random() < 0.05:
                found.append(self._noise())
                continue
            made = list(self.random.choice(self._makers)())
            found += [self._damaged(each) if self.random.random() < 0.2 else each for each in made]
        return found[:count]

    def _ip(self, source: str, **fields: Any) -> Any:
        pick = self.random.choice
        fields = {
            "ttl": pick((0, 1, 2, 64, 64, 64, 255)),
            "tos": pick((0, 0, 1, 2, 3, 0xB8)),
            "id": self.random.randrange(65536),
            "flags": pick((0, 0, 2)),
            "options": pick(OPTIONS) if self.random.random() < 0.1 else [],
        } | fields
        target = pick(TARGETS) if self.random.random() < 0.9 else pick(ODD_TARGETS)
        size = pick((0, 1, 64, 1000, 1422, 1423, 1500))
        make = pick((f.udp, f.ping, self._tcp))
        ip = make(target, src=source, size=size)
        for name, value in fields.items():
            setattr(ip, name, value)
        return ip

    def _tcp(self, target: str, src: str, size: int) -> Any:
        return f.tcp(target, src=src, size=size, flags=self.random.choice("SAFRP"))

    def _pod(self) -> tuple[int, str, str]:
        return self.random.choice(((w.POD_A, w.IP_A, w.MAC_A), (w.POD_B, w.IP_B, w.MAC_B)))

    def _from_pod(self) -> Iterator[Arrival]:
        iif, source, mac = self._pod()
        source = source if self.random.random() < 0.9 else self.random.choice(TARGETS + ODD_TARGETS)
        to = w.GATEWAY_MAC if self.random.random() < 0.95 else self.random.choice((f.BROADCAST, w.MAC_B))
        ip = self._ip(source)
        if self.random.random() < 0.03:
            ip = f.udp(self.random.choice(TARGETS), src=source, dport=4789)
        yield Arrival(iif, bytes(f.pod_frame(ip, mac, to)))

    def _from_lan(self) -> Iterator[Arrival]:
        source = self.random.choice((w.OUTSIDE, w.PEER, w.LAN_GATEWAY, w.STRANGER, w.IP_A, w.IP_REMOTE))
        yield Arrival(w.UPLINK, bytes(f.lan_frame(self._ip(source))))

    def _from_tunnel(self) -> Iterator[Arrival]:
        pick = self.random.choice
        inner = f.inner_frame(self._ip(pick((w.IP_REMOTE, w.IP_REMOTE, w.OUTSIDE, w.IP_A))))
        header: dict[str, Any] = {"tos": pick((0, 1, 2, 3)), "source": pick((w.PEER, w.PEER, w.PEER, w.STRANGER))}
        if self.random.random() < 0.1:
            header |= pick(({"flags": 0}, {"vni": 1}, {"reserved2": 1}, {"chksum": None}, {"chksum": 77}))
        yield Arrival(pick((w.UNDERLAY, w.UPLINK)), bytes(f.tunnel(inner, **header)))

    def _arp(self) -> Iterator[Arrival]:
        pick = self.random.choice
        if self.random.random() < 0.5:
            iif, source, mac = self._pod()
            yield Arrival(
                iif, bytes(f.arp_request(pick(TARGETS + ODD_TARGETS), pick((source, source, "0.0.0.0")), mac))
            )
            return
        question = f.arp_request(
            pick(TARGETS), pick((w.LAN_GATEWAY, w.PEER, w.STRANGER)), w.LAN_MAC, pick(self._STATIONS)
        )
        question["ARP"].op = pick((1, 2))
        yield Arrival(w.UPLINK, bytes(question))

    _STATIONS = (f.BROADCAST, w.UPLINK_MAC)

    def _fragments(self) -> Iterator[Arrival]:
        iif, source, mac = self._pod()
        pieces = f.fragments(
            f.udp(self.random.choice(TARGETS), src=source, size=self.random.choice((64, 3000)), id=3), 1024
        )
        self.random.shuffle(pieces)
        for piece in pieces[: self.random.randrange(1, 5)]:
            yield Arrival(iif, bytes(f.pod_frame(piece, mac)))

    def _large(self) -> Iterator[Arrival]:
        iif, source, mac = self._pod()
        pick = self.random.choice
        size = pick((3000, 9000, 40000))
        ip = pick((f.tcp, f.udp))(pick(TARGETS[:4]), src=source, size=size)
        ip.flags = pick((0, 2))
        kind, offset = (b.GSO_TCPV4, 16) if "TCP" in ip else (b.GSO_UDP_L4, 6)
        segment = pick((500, 1400, 1410, 1460))
        yield Arrival(iif, bytes(f.pod_frame(ip, mac)), Vnet(b.NEEDS_CSUM, kind, 54, segment, 34, offset))

    def _v6(self) -> Iterator[Arrival]:
        pick = self.random.choice
        head = IPv6(src=pick((V6_A, V6_B, "::1")), dst=pick((V6_A, V6_B, V6_REMOTE, "ff02::1")), hlim=pick((1, 64)))
        middle = pick((Raw(b""), IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment(m=1), IPv6ExtHdrFragment(offset=3, nh=17)))
        packet = head / middle / UDP(sport=1, dport=2) / Raw(b"x" * 30) if not isinstance(middle, Raw) else head / UDP()
        yield Arrival(w.POD_A, bytes(f.pod_frame(packet)))

    def _service(self) -> Iterator[Arrival]:
        """A client of a service, one of few with few ports, so that many of its packets are of known flows."""
        pick = self.random.choice
        target, port = pick(SERVICES)
        source = pick((w.IP_A, w.IP_B, w.OUTSIDE, w.LAN_GATEWAY))
        sport = pick((4000, 4001))
        if self.random.random() < 0.5:
            yield self._arrival(f.udp(target, src=source, sport=sport, dport=port))
            return
        ip = f.tcp(target, src=source, size=pick((0, 0, 100)), flags=pick(FLAGS))
        ip["TCP"].sport, ip["TCP"].dport, ip["TCP"].seq = sport, port, self.random.randrange(3)
        yield self._arrival(ip)

    def _reply(self) -> Iterator[Arrival]:
        """What a backend may say to such a client, or to one that was masqueraded."""
        pick = self.random.choice
        source = pick((w.IP_A, w.IP_B))
        target, sport = pick((w.IP_A, w.IP_B, w.OUTSIDE, w.NODE)), pick((8080, 5353))
        dport = self.random.randrange(1024, 65536) if target == w.NODE else pick((4000, 4001))
        if sport == 5353:
            yield self._arrival(f.udp(target, src=source, sport=sport, dport=dport))
            return
        ip = f.tcp(target, src=source, flags=pick(("SA", "SA", *FLAGS)))
        ip["TCP"].sport, ip["TCP"].dport = sport, dport
        yield self._arrival(ip)

    def _error(self) -> Iterator[Arrival]:
        """An ICMP error about a packet that we may have sent, sometimes to one who has not sent it, sometimes torn."""
        pick = self.random.choice
        source, target = pick((w.IP_A, w.IP_B, w.OUTSIDE)), pick((w.IP_A, w.IP_B, w.OUTSIDE))
        quoted = f.udp(target, src=source, sport=pick((4000, 5353)), dport=pick((53, 4000)))
        to = source if self.random.random() < 0.8 else w.IP_B
        quote = bytes(quoted)[: pick((12, 28, 36, 36))]
        kind = pick((3, 3, 4, 5, 11, 12))
        yield self._arrival(IP(src=target, dst=to) / ICMP(type=kind, code=pick((0, 1, 4))) / Raw(quote))

    def _arrival(self, ip: Any) -> Arrival:
        """An IP packet by the interface that its source is behind."""
        pods = {w.IP_A: (w.POD_A, w.MAC_A), w.IP_B: (w.POD_B, w.MAC_B)}
        if ip.src in pods:
            iif, mac = pods[ip.src]
            return Arrival(iif, bytes(f.pod_frame(ip, mac)))
        return Arrival(w.UPLINK, bytes(f.lan_frame(ip)))

    def _noise(self) -> Arrival:
        head = (
            pick_mac(self.random)
            + self.random.randbytes(6)
            + self.random.choice((b"\x08\x00", b"\x08\x06", b"\x86\xdd"))
        )
        frame = (head + self.random.randbytes(self.random.randrange(120)))[: self.random.randrange(140)]
        return Arrival(self.random.choice((w.UPLINK, w.UNDERLAY, w.POD_A, w.POD_B)), frame)

    def _damaged(self, arrival: Arrival) -> Arrival:
        """Damage a frame; half of the time its header checksum is made right again, or parse would see it all."""
        octets = bytearray(arrival.frame)
        for _ in range(self.random.randrange(1, 4)):
            octets[self.random.randrange(12, len(octets))] = self.random.randrange(256)
        frame = bytes(octets)[: self.random.randrange(1, len(octets) * 3)]
        if self.random.random() < 0.5 and len(frame) > 34 and frame[12:14] == b"\x08\x00":
            frame = repaired(frame, 14)
            if frame[34:36] and len(frame) > 84 and arrival.iif == w.UNDERLAY:
                frame = repaired(frame, 64)
        vnet = arrival.vnet
        if self.random.random() < 0.2 and len(frame) > 60:
            vnet = Vnet(b.NEEDS_CSUM, 0, 0, 0, self.random.randrange(50), self.random.randrange(8))
        return Arrival(arrival.iif, frame, vnet)


def pick_mac(random: Random) -> bytes:
    """A destination that somebody has."""
    return bytes.fromhex(random.choice((w.GATEWAY_MAC, w.UPLINK_MAC, f.BROADCAST, w.MAC_B)).replace(":", ""))


def repaired(frame: bytes, at: int) -> bytes:
    """The frame with the checksum of the 20 bytes at ``at`` made right."""
    header = frame[at : at + 10] + bytes(2) + frame[at + 12 : at + 20]
    total = sum(int.from_bytes(header[k : k + 2]) for k in range(0, 20, 2))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return f.patched(frame, at + 10, (total ^ 0xFFFF).to_bytes(2))


class Network(World):
    """The world with an engine that no loop runs: steps of traffic and time, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        for address, pod in ((V6_A, w.POD_A), (V6_B, w.POD_B)):
            self.route(f"{address}/128", Route(Kind.POD, pod))
        self.route("2001:db8:2::/64", Route(Kind.TUNNEL, vtep=self.peer))
        pods = [(w.IP_A, 8080), (w.IP_B, 8080)]
        dns = [(w.IP_A, 5353), (w.IP_B, 5353)]
        self.service(w.VIP, 80, *pods)
        self.service(w.VIP, 53, *dns, protocol="udp")
        self.service(w.VIP, 81)
        self.service(w.NODE, 30080, *pods, (w.IP_REMOTE, 8080), exposure=Exposure.NODE_PORT)
        self.service(w.LB_IP, 80, *pods, exposure=Exposure.LOAD_BALANCER, ranges=[ip_network(f"{w.OUTSIDE}/32")])
        self.service(w.LB_IP, 81, *pods, exposure=Exposure.LOAD_BALANCER, flags=LOCAL | NO_LOCAL)
        self.tables.settings[b.NAT_OUTGOING] = 1
        self.slow = self.slow_path()
        self.engine = Engine(self.tables, self.slow, clock=lambda: self.now)
        self.engine.refresh()

    def receive(self, iif: int, arrivals: list[Arrival]) -> tuple[int, list[tuple[int, bytes]]]:
        """Take a burst through everything; return its rows and what its devices got, before the slow path answers."""
        batch, io = self.engine.batch, self.engine.io
        count = load(batch, [each.frame for each in arrivals], iif, [each.vnet for each in arrivals])
        punted = pipeline.burst(batch.arrays, pipeline.LOADED, self.tables.arrays, io.arrays, self.now, count)
        return punted, collect(batch, count, self.tables.interfaces, io)

    def answer(self, punted: int) -> list[Any]:
        """Let the slow path answer the last burst, as the engine does."""
        if not punted & 0xFFFF:
            return []
        out = self.slow.handle(self.engine.batch, punted >> 16, self.now)
        self.engine.inject(out)
        return out

    def tick(self, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.now += SECOND
            defrag.expire(self.tables.arrays, self.now)
            conntrack.expire(self.tables.arrays, self.now, w.FLOWS)
            self.engine.inject(self.slow.tick(self.now))


def by_interface(arrivals: list[Arrival]) -> Iterator[tuple[int, list[Arrival]]]:
    """Bursts of at most 16 frames, as they come; a batch has 16 large slots."""
    for iif in (w.POD_A, w.POD_B, w.UPLINK, w.UNDERLAY):
        own = [each for each in arrivals if each.iif == iif]
        for k in range(0, len(own), 16):
            yield iif, own[k : k + 16]


COLUMNS = (
    "verdict",
    "reason",
    "oif",
    "flags",
    "flow",
    "mark",
    "vnet_flags",
    "gso_type",
    "gso_size",
    "mtu",
    "vtep",
    "max_fragment",
)


def transcript(seed: int, count: int) -> Iterator[str]:
    """One line for each packet, each frame that left, each answer, and at last the counters."""
    network = Network()
    corpus = Corpus(seed)
    for _ in range(max(1, count // 200)):
        for iif, arrivals in by_interface(corpus.arrivals(200)):
            punted, sent = network.receive(iif, arrivals)
            for row in range(punted >> 16):
                record = network.engine.batch.packets[row]
                yield f"{iif} " + " ".join(str(int(record[name])) for name in COLUMNS)
            for oif, frame in sent:
                yield f"-> {oif} {len(frame)} {hashlib.sha256(frame).hexdigest()[:16]}"
            for packet in network.answer(punted):
                yield f"slow {packet.oif} {hashlib.sha256(packet.frame).hexdigest()[:16]}"
        network.tick(1)
    yield " ".join(map(str, network.tables.counters.tolist()))


if __name__ == "__main__":
    print("\n".join(transcript(int(sys.argv[1]), int(sys.argv[2]))))
