"""Linux's NAT beside ours: the same frames through both, the same flows, and the bytes that leave compared.

The kernel chooses a flow's ports; our stage is then given the flow as the kernel has it, so every frame that follows
has one right answer. What is chosen is compared by itself: kept ports exactly, searched ones by their class.
"""

from itertools import product
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP, IPOption_NOP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6ParamProblem, ICMPv6TimeExceeded, IPv6
from scapy.packet import Packet, Raw

from dataplane.tables import ports
from dataplane.tables.flow import ORIGINAL, REPLY, FlowTable, insert, keep_source
from tests.netns.conntrack import one_processor
from tests.netns.harness import Network
from tests.netns.linux_nat import LEFT, RIGHT, Router
from tests.translation import Translator, Way, frame_of, packet, side, sides, way

pytestmark = pytest.mark.netns

RULES = """
add table inet nat
add chain inet nat first { type nat hook prerouting priority dstnat; }
add rule inet nat first ip daddr 10.96.0.1 tcp dport 443 dnat ip to 10.244.1.20:6443
add rule inet nat first ip daddr 10.96.0.10 udp dport 53 dnat ip to 10.244.1.20:5353
add rule inet nat first ip daddr 10.96.0.11 udp dport 53 dnat ip to 198.51.100.7:5353
add rule inet nat first ip6 daddr 2001:db8:96::1 tcp dport 443 dnat ip6 to [fd00::20]:6443
add rule inet nat first ip daddr 192.0.2.11 tcp dport 30053 dnat ip to 10.244.1.10:53
add rule inet nat first ip daddr 192.0.2.11 udp dport 30053 dnat ip to 10.244.1.10:53
add chain inet nat last { type nat hook postrouting priority srcnat; }
add rule inet nat last oifname left ip daddr 10.244.1.10 masquerade
add rule inet nat last oifname right ip saddr 10.244.1.12 masquerade fully-random
add rule inet nat last oifname right masquerade
"""
FLOWS = [
    (LEFT, way("udp", "10.244.1.10:4000", "198.51.100.7:53")),
    (LEFT, way("tcp", "10.244.1.10:4000", "198.51.100.7:80")),
    (LEFT, way("icmp", "10.244.1.10:7", "198.51.100.7")),
    (LEFT, way("other", "10.244.1.10", "198.51.100.7")),
    (LEFT, way("udp", "10.244.1.12:4000", "198.51.100.7:5353")),
    (LEFT, way("icmp", "10.244.1.12:9", "198.51.100.8")),
    (LEFT, way("udp", "10.244.1.10:4000", "10.96.0.11:53")),
    (LEFT, way("udp", "[fd00::10]:4000", "[2001:db8:7::7]:53")),
    (LEFT, way("tcp", "[fd00::10]:4000", "[2001:db8:7::7]:80")),
    (LEFT, way("icmp6", "[fd00::10]:7", "[2001:db8:7::7]")),
    (RIGHT, way("tcp", "198.51.100.7:4000", "10.96.0.1:443")),
    (RIGHT, way("udp", "198.51.100.7:4000", "10.96.0.10:53")),
    (RIGHT, way("tcp", "[2001:db8:7::7]:4000", "[2001:db8:96::1]:443")),
    (RIGHT, way("tcp", "198.51.100.7:4000", "192.0.2.11:30053")),
    (RIGHT, way("udp", "198.51.100.7:4000", "192.0.2.11:30053")),
]
ERRORS = {4: [(3, 1), (3, 4), (4, 0), (11, 0), (12, 0)], 6: [(1, 4), (2, 0), (3, 0), (4, 1)]}
ROUTERS = {4: {LEFT: "10.244.9.9", RIGHT: "203.0.113.99"}, 6: {LEFT: "fd00:9::9", RIGHT: "2001:db8:99::1"}}
OTHER = {LEFT: RIGHT, RIGHT: LEFT}
V6_ERRORS = {1: ICMPv6DestUnreach, 2: ICMPv6PacketTooBig, 3: ICMPv6TimeExceeded, 4: ICMPv6ParamProblem}
TRANSLATOR = Translator()


@pytest.fixture(scope="module")
def router(network: Network):
    with one_processor(), Router(network, "router", RULES) as made:
        yield made


def framed(network: bytes) -> bytes:
    return bytes(12) + (b"\x08\x00" if network[0] >> 4 == 4 else b"\x86\xdd") + network


class Flow:
    """A flow that the kernel has made, and our copy of it."""

    def __init__(self, router: Router, client: str, original: Way) -> None:
        self.router, self.original = router, original
        self.sides = {ORIGINAL: client, REPLY: OTHER[client]}  # where the packets of a direction come in
        (left,) = router.cross(client, packet(original))
        src, dst = sides(framed(left))
        self.reply = Way(original.protocol, side(dst), side(src))
        TRANSLATOR.rows = 0
        self.row = TRANSLATOR.flow(original, self.reply)

    def way(self, direction: int) -> Way:
        return self.reply if direction == REPLY else self.original

    def kernels(self, direction: int, sent: Packet) -> list[bytes]:
        return self.router.cross(self.sides[direction], sent)

    def ours(self, direction: int, sent: Packet, related: bool = False) -> list[bytes]:
        """What leaves us; route, which takes one off the TTL, is not in it."""
        forwarded = sent.copy()
        if IP in sent:
            forwarded.ttl -= 1
        else:
            forwarded.hlim -= 1
        return [TRANSLATOR.one(frame_of(forwarded), 2 * self.row + direction, related=related).frame[14:]]


@pytest.fixture(params=FLOWS, ids=lambda flow: f"{flow[1].protocol} {flow[1].src} to {flow[1].dst}")
def flow(router, request):
    return Flow(router, *request.param)


def variants(of: Way, reply: bool) -> list[Packet]:
    """Packets of one direction: lengths, options, no checksum."""
    made = [packet(of, payload, reply) for payload in (b"payload", b"", b"12345678", bytes(1300))]
    if of.family == 4:
        made.append(packet(of, reply=reply, options=[IPOption_NOP()] * 8))
        if of.protocol == 17:
            made.append(packet(of))
            made[-1][UDP].chksum = 0
    return made


def test_packets_of_both_directions_leave_as_from_the_kernel(flow):
    for direction in (ORIGINAL, REPLY):
        for sent in variants(flow.way(direction), direction == REPLY):
            assert flow.kernels(direction, sent) == flow.ours(direction, sent)


def error(src: str, dst: str, kind: int, code: int, quote: bytes) -> Packet:
    if ":" in src:
        return IPv6(src=src, dst=dst) / V6_ERRORS[kind](code=code) / Raw(quote)
    header = ICMP(type=kind, code=code)
    if (kind, code) == (3, 4):
        header.nexthopmtu = 1280
    return IP(src=src, dst=dst) / header / Raw(quote)


@pytest.mark.parametrize("direction", [REPLY, ORIGINAL], ids=["about a request", "about a reply"])
def test_errors_leave_as_from_the_kernel(flow, direction):
    """About every variant of packet and cut in every way, from the end of its way and from a router on it."""
    of = flow.way(direction)
    sources = [of.src.address, ROUTERS[of.family][flow.sides[direction]]]
    for number, sent in enumerate(variants(flow.way(1 - direction), direction == ORIGINAL)):
        (left,) = flow.kernels(1 - direction, sent)
        header = 40 if of.family == 6 else (left[0] & 15) * 4
        cuts = (8, 9, 17, 19, 20, 21, 1200) if number == 0 else (8, 1200)
        kinds = ERRORS[of.family] if number == 0 else ERRORS[of.family][:1]
        for src, (kind, code), cut in product(sources, kinds, cuts):
            back = error(src, of.dst.address, kind, code, left[: header + cut])
            assert flow.kernels(direction, back) == flow.ours(direction, back, related=True)


# --- choices ---------------------------------------------------------------------------------------------------------

# In order: each line is the first packet of a flow that stays. A class stands for a port that is searched.
KEEPING = """
# protocol client               remote               -> port
  udp      10.244.1.10:4000     198.51.100.7:53      4000
  udp      10.244.1.11:4000     198.51.100.8:53      4000
  udp      10.244.1.12:4000     198.51.100.7:5353    4000
  tcp      10.244.1.11:4000     198.51.100.7:53      4000
  udp      10.244.1.13:4000     198.51.100.7:53      1024-65535
  udp      10.244.1.13:4000     198.51.100.9:53      same
  udp      10.244.1.13:4000     198.51.100.10:53     same
  udp      10.244.1.10:53       198.51.100.7:53      53
  udp      10.244.1.11:53       198.51.100.7:53      1-511
  udp      10.244.1.10:511      198.51.100.7:53      511
  udp      10.244.1.11:511      198.51.100.7:53      1-511
  tcp      10.244.1.10:512      198.51.100.7:53      512
  tcp      10.244.1.11:512      198.51.100.7:53      600-1023
  tcp      10.244.1.10:1023     198.51.100.7:53      1023
  tcp      10.244.1.11:1023     198.51.100.7:53      600-1023
  tcp      10.244.1.10:1024     198.51.100.7:53      1024
  tcp      10.244.1.11:1024     198.51.100.7:53      1024-65535
  icmp     10.244.1.10:7        198.51.100.7         7
  icmp     10.244.1.11:7        198.51.100.7         0-65535
  icmp     10.244.1.11:7        198.51.100.8         same
  icmp     10.244.1.10:0        198.51.100.7         0
  other    10.244.1.10          198.51.100.7         0
  other    10.244.1.11          198.51.100.7         none
  other    10.244.1.11          198.51.100.8         0
  udp      10.244.1.10:0        198.51.100.7:53      0
  udp      10.244.1.11:0        198.51.100.7:53      1-511
  udp      192.0.2.11:4000      198.51.100.7:53      1024-65535
  udp      192.0.2.11:4000      198.51.100.11:53     4000
"""
RANDOM = """
  udp      10.244.1.10:4000     198.51.100.7:53      1024-65535
  udp      10.244.1.10:4000     198.51.100.8:53      1024-65535
  tcp      10.244.1.10:80       198.51.100.7:53      1-511
  udp      10.244.1.10:0        198.51.100.7:53      1-511
  tcp      10.244.1.10:700      198.51.100.7:53      600-1023
  icmp     10.244.1.10:7        198.51.100.7         0-65535
"""
RANGE = """
  udp      10.244.1.10:4000     198.51.100.7:53      50000-50002
  udp      10.244.1.10:50000    198.51.100.8:53      50000
  udp      10.244.1.11:4000     198.51.100.7:53      50000-50002
  udp      10.244.1.12:80       198.51.100.7:53      50000-50002
  udp      10.244.1.13:50001    198.51.100.7:53      none
  udp      10.244.1.13:50001    198.51.100.9:53      50001
  udp      10.244.1.10:4000     198.51.100.12:53     same
"""
HOW: dict[str, tuple[str, str, dict[str, Any]]] = {
    "keeping": (KEEPING, "masquerade", {}),
    "random": (RANDOM, "masquerade fully-random", {"random": True}),
    "range": (RANGE, "udp sport 1-65535 masquerade to :50000-50002", {"low": 50000, "high": 50002}),
}
MASQUERADE = """
add table ip nat
add chain ip nat last {{ type nat hook postrouting priority srcnat; }}
add rule ip nat last oifname right {}
"""


class Ours:
    """Our choices, made among the flows that the kernel has."""

    def __init__(self) -> None:
        self.table = FlowTable(256, seed=1)

    def choose(self, of: Way, low: int = 0, high: int = 0, random: bool = False) -> int | None:
        TRANSLATOR.fill(self.table.arrays[6][ORIGINAL], of, ORIGINAL)
        TRANSLATOR.fill(self.table.arrays[6][REPLY], Way(of.protocol, of.dst, side("192.0.2.11")), REPLY)
        found = ports.allocate(self.table.arrays, low, high, 4789, random)
        return int(self.table.arrays[6][REPLY]["dport"]) if found else None

    def add(self, port: int) -> None:
        """Put in the flow of the last choice, with the kernel's port."""
        self.table.arrays[6][REPLY]["dport"] = port
        row = insert(self.table.arrays, 0)
        assert row >= 0
        keep_source(self.table.arrays, row)


def is_expected(text: str, port: int | None, last: dict[tuple[int, str], int], of: Way) -> bool:
    if text == "none" or port is None:
        return text == "none" and port is None
    if text == "same":
        return port == last[of.protocol, str(of.src)]
    first, _, end = text.partition("-")
    return int(first) <= port <= int(end or first)


@pytest.mark.parametrize("how", HOW)
def test_ports_are_chosen_as_by_the_kernel(network, how):
    table, rule, arguments = HOW[how]
    ours = Ours()
    last: dict[tuple[int, str], int] = {}
    with one_processor(), Router(network, f"choice-{how}", MASQUERADE.format(rule)) as router:
        for line in table.splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            protocol, client, remote, expected = line.split()
            of = way(protocol, client, remote)
            left = router.cross(LEFT, packet(of))
            kernels = side(sides(framed(left[0]))[0]).port if left else None
            chosen = ours.choose(of, **arguments)
            assert is_expected(expected, kernels, last, of), f"the kernel: {line} {kernels}"
            assert is_expected(expected, chosen, last, of), f"ours: {line} {chosen}"
            if kernels is not None:
                ours.add(kernels)
                last[of.protocol, str(of.src)] = kernels
