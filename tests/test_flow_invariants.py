"""What always holds between flows, backends, templates and packets, whatever traffic, edits and time do to them.

The whole pipeline runs over bursts from every device while services come and go, routes change and the flow table is
nearly always full. After each step the counters of backends and templates are compared with the flows themselves; each
packet that leaves is parsed by scapy and compared with the tuples of its flow.
"""

from collections import Counter
from ipaddress import ip_address
from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.stages import conntrack
from dataplane.tables import flow as table
from dataplane.tables import persistence
from dataplane.tables.flow import ACTIVE, COUNTED, DST_NAT, MISS, SOURCE_KEPT, SRC_NAT
from dataplane.tables.policy import LOCAL, Exposure
from dataplane.tables.route import Kind, Route
from dataplane.tables.scheduler import PERSISTENT, Scheduler
from dataplane.tables.service import Destination, Service
from dataplane.verdict import Verdict
from tests import world as w
from tests.frames import recomputed
from tests.lines import DEVICES, entering
from tests.world import World


class Tuple(NamedTuple):
    """A packet's flow key; of an ICMP query the id, and the request's type << 8 where a server's port would be."""

    protocol: int
    src: str
    sport: int
    dst: str
    dport: int

    @property
    def inverted(self) -> "Tuple":
        return Tuple(self.protocol, self.dst, self.dport, self.src, self.sport)


class Left(NamedTuple):
    """A packet that left: as what it came, as what it left, and by which device."""

    came: Tuple
    went: Tuple
    device: str
    packet: bytes


CLIENTS = {"a": (w.IP_A,), "b": (w.IP_B,), "lan": (w.OUTSIDE, w.LAN_GATEWAY, "192.0.2.77"),
           "tunnel": (w.IP_REMOTE,), "host": (w.NODE,)}  # fmt: skip
HOME = {address: device for device, addresses in CLIENTS.items() for address in addresses}
PODS = ((w.IP_A, 8080), (w.IP_B, 8080), (w.IP_REMOTE, 8080))
STICKY = Service(Scheduler.RR, PERSISTENT, 90 * w.SECOND)
SERVICES: dict[tuple[str, str, int], tuple[Service, Exposure, int]] = {
    ("tcp", w.VIP, 80): (Service(Scheduler.RR), Exposure.CLUSTER_IP, 0),
    ("tcp", w.VIP, 81): (STICKY, Exposure.CLUSTER_IP, 0),
    ("udp", w.VIP, 53): (Service(Scheduler.WLC), Exposure.CLUSTER_IP, 0),
    ("udp", w.VIP, 54): (STICKY, Exposure.CLUSTER_IP, 0),
    ("tcp", w.NODE, 30080): (Service(Scheduler.WRR), Exposure.NODE_PORT, 0),
    ("udp", w.LB_IP, 53): (Service(Scheduler.SH), Exposure.LOAD_BALANCER, 0),
    ("tcp", w.LB_IP, 80): (Service(Scheduler.LC), Exposure.LOAD_BALANCER, LOCAL),
}
TARGETS = [(w.PROTOCOLS[name], address, port) for name, address, port in SERVICES] + [
    (6, w.IP_B, 8080), (17, w.IP_A, 8080), (17, w.OUTSIDE, 53), (6, w.OUTSIDE, 80), (17, w.IP_REMOTE, 53),
    (1, w.IP_B, 8 << 8), (1, w.OUTSIDE, 8 << 8), (1, w.VIP, 8 << 8),
]  # fmt: skip
FLAGS = ["S", "S", "S", "A", "A", "FA", "R", "RA", "SA", "SF"]
ANSWERS = ["SA", "SA", "A", "FA", "RA", "S"]


def packet_of(key: Tuple, flags: str = "S") -> Any:
    """An IP packet with this key."""
    ip = IP(src=key.src, dst=key.dst)
    if key.protocol == 1:
        request = key.dport == 8 << 8
        return ip / ICMP(type=8 if request else 0, id=key.sport if request else key.dport, seq=1) / Raw(b"ping")
    if key.protocol == 17:
        return ip / UDP(sport=key.sport, dport=key.dport) / Raw(b"data")
    seq, ack = {"S": (1000, 0), "SA": (1999, 1001)}.get(flags, (1001, 2000))
    return ip / TCP(sport=key.sport, dport=key.dport, flags=flags, seq=seq, ack=ack)


def key_of(ip: Any) -> Tuple:
    """The key of an IP packet that scapy has parsed; of one that an ICMP error quotes there may be 8 bytes more."""
    above = bytes(ip.payload)
    first, second, third = (int.from_bytes(above[at : at + 2]) for at in (0, 2, 4))
    if ip.proto != 1:
        return Tuple(ip.proto, ip.src, first, ip.dst, second)
    ports = (third, 8 << 8) if above[0] == 8 else (8 << 8, third)
    return Tuple(1, ip.src, ports[0], ip.dst, ports[1])


def key_in(record: Any) -> Tuple:
    """The key in a row of the table."""
    src, dst = (str(ip_address(int(record[side]) & 0xFFFF_FFFF)) for side in ("src_lo", "dst_lo"))
    return Tuple(int(record["protocol"]), src, int(record["sport"]), dst, int(record["dport"]))


class Machine(RuleBasedStateMachine):
    """A node whose flow table has room for a few flows."""

    @initialize(capacity=st.sampled_from([8, 16, 64]), random=st.booleans())
    def start(self, capacity, random):
        self.world = world = World(flows=capacity)
        world.host()
        world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
        world.tables.settings[b.NAT_OUTGOING] = 1
        world.tables.settings[b.NAT_RANDOM] = int(random)
        self.left: list[Left] = []
        self.held: list[bytes] = []
        for key in SERVICES:
            self.make(key, PODS)

    def make(self, key, backends=()):
        protocol, address, port = key
        how, exposure, flags = SERVICES[key]
        self.world.service(address, port, *backends, protocol=protocol, exposure=exposure, how=how, flags=flags)

    def row(self, key):
        return self.world.tables.services.find(w.PROTOCOLS[key[0]], key[1], key[2])

    # --- traffic -----------------------------------------------------------------------------------------------------

    def pass_through(self, device, packets):
        """Send packets in one burst, judge what leaves, and return it."""
        frames, (iif, *_) = zip(*(entering(device, packet) for packet in packets), strict=True)
        outcomes = self.world.run(frames, iif)
        left: list[Left] = []
        for packet, outcome in zip(packets, outcomes, strict=True):
            if outcome.verdict == Verdict.QUEUE and outcome.label == "neigh.resolve":
                self.held.append(outcome.frame)
            if outcome.verdict == Verdict.ACCEPT:
                left += self.judge(IP(bytes(packet)), outcome)
        self.left = [*self.left, *left][-16:]
        return left

    def known(self):
        """The tuples of flows whose time is not over, and what their packets leave as."""
        flows, tuples = self.world.tables.flows, self.world.tables.flows.tuples
        living = [row for row in flows.items() if int(flows.flows["expires_ns"][row]) > self.world.now]
        halves = [half for row in living for half in (2 * row, 2 * row + 1)]
        return {key_in(tuples[half]): key_in(tuples[half ^ 1]).inverted for half in halves}

    def judge(self, sent, outcome):
        """Compare what has left with its flow, and yield it."""
        frame = outcome.frame[50:] if outcome.record["flags"] & b.ENCAPSULATED else outcome.frame
        assert frame == recomputed(frame)
        ip = Ether(frame)[IP]
        assert ip.dst not in (w.VIP, w.LB_IP), "nobody behind a device has these"
        half = int(outcome.record["flow"])
        if half < 0 or outcome.record["flags"] & b.RELATED:
            return
        came, went = key_of(sent), key_of(ip)
        # The flow may have ended with a later packet of the burst: what it said of this one still holds.
        tuples = self.world.tables.flows.tuples
        assert key_in(tuples[half])._replace(protocol=0) == came._replace(protocol=0)
        assert key_in(tuples[half ^ 1]).inverted._replace(protocol=0) == went._replace(protocol=0)
        yield Left(came, went, DEVICES[outcome.oif], bytes(ip))

    @rule(data=st.data(), device=st.sampled_from(list(CLIENTS)))
    def send(self, data, device):
        packets = []
        for protocol, dst, dport in data.draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3)):
            src = data.draw(st.sampled_from(CLIENTS[device]))
            key = Tuple(protocol, src, data.draw(st.sampled_from([4000, 4001, 0])), dst, dport)
            flags = data.draw(st.lists(st.sampled_from(FLAGS), min_size=1, max_size=3))
            packets += [packet_of(key, each) for each in flags]
        self.pass_through(device, packets)

    @rule(device=st.sampled_from(["a", "lan"]), first=st.integers(1, 50), to=st.sampled_from(TARGETS))
    def flood(self, device, first, to):
        protocol, dst, dport = to
        keys = [Tuple(protocol, CLIENTS[device][0], 5000 + first + i, dst, dport) for i in range(12)]
        self.pass_through(device, [packet_of(key) for key in keys])

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def reply(self, data):
        """Answer what has left: while its flow is known it reaches the client, from the address that was asked."""
        left = data.draw(st.sampled_from(self.left))
        flags = data.draw(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=2))
        answer = left.went.inverted
        known = self.known()
        arrived = self.pass_through(left.device, [packet_of(answer, each) for each in flags])
        if known.get(answer) == left.came.inverted and "S" not in flags:  # that may open another connection
            assert all(each.went == left.came.inverted for each in arrived[:1])

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def go_on(self, data):
        left = data.draw(st.sampled_from(self.left))
        flags = data.draw(st.lists(st.sampled_from(FLAGS), min_size=1, max_size=3))
        self.pass_through(HOME.get(left.came.src, "a"), [packet_of(left.came, each) for each in flags])

    @precondition(lambda self: self.left)
    @rule(data=st.data(), size=st.sampled_from([28, 36, 576]))
    def complain(self, data, size):
        """An ICMP error about what has left, from where it went: it quotes to the client what the client sent."""
        left = data.draw(st.sampled_from(self.left))
        error = IP(src=left.went.dst, dst=left.went.src) / ICMP(type=3, code=1) / Raw(left.packet[:size])
        known = self.known()
        frame, iif = entering(left.device, error)
        outcome = self.world.one(frame, iif)
        if known.get(left.went.inverted) != left.came.inverted or outcome.verdict != Verdict.ACCEPT:
            return
        arrived = Ether(outcome.frame[50:] if outcome.record["flags"] & b.ENCAPSULATED else outcome.frame)
        assert arrived[IP].dst == left.came.src
        assert key_of(arrived[ICMP].payload) == left.came
        assert bytes(arrived)[:38] == recomputed(bytes(arrived))[:38]

    @precondition(lambda self: self.held)
    @rule(waits=st.integers(1, 4))
    def release(self, waits):
        """A neighbor was found: what has waited for it goes by the stages once more, but waits again."""
        frames, self.held = self.held[:waits], self.held[waits:]
        for outcome in self.world.run(frames, 0, flags=b.INJECTED | b.WAITED):
            assert outcome.verdict != Verdict.ACCEPT or outcome.oif != w.UPLINK or outcome.record["flow"] >= 0

    # --- time --------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0, 1, 3, 11, 31, 61, 121, 301, 1000]), budget=st.sampled_from([1, 4, 1024]))
    def wait(self, seconds, budget):
        self.world.now += seconds * w.SECOND
        conntrack.expire(self.world.tables.arrays, self.world.now, budget)

    @rule(count=st.sampled_from([1, 64]))
    def sweep(self, count):
        tables = self.world.tables
        persistence.sweep(tables.templates.arrays, tables.services.backends, self.world.now, count)

    @precondition(lambda self: self.world.flows)
    @rule(data=st.data())
    def delete_a_flow(self, data):
        flows = self.world.tables.flows
        flows.flows["expires_ns"][data.draw(st.sampled_from(flows.items()))] = self.world.now
        conntrack.expire(self.world.tables.arrays, self.world.now, 1024)

    # --- edits -------------------------------------------------------------------------------------------------------

    @rule(key=st.sampled_from(list(SERVICES)), backend=st.sampled_from(PODS), weight=st.sampled_from([0, 1, 1, 2]))
    def set_backend(self, key, backend, weight):
        if self.row(key) >= 0:
            address, port = backend
            self.world.tables.services.add(self.row(key), ip_address(address), port, Destination(weight))

    @rule(key=st.sampled_from(list(SERVICES)), backend=st.sampled_from(PODS))
    def remove_backend(self, key, backend):
        address, services = ip_address(backend[0]), self.world.tables.services
        if self.row(key) >= 0 and services.find_backend(self.row(key), address, backend[1]) >= 0:
            services.remove(self.row(key), address, backend[1])

    @rule(keys=st.lists(st.sampled_from(list(SERVICES)), min_size=1, max_size=3, unique=True), again=st.booleans())
    def delete_services(self, keys, again):
        """Services go; those that come back do so in another order, in each other's rows."""
        for key in keys:
            if self.row(key) >= 0:
                self.world.tables.policies.clear(self.row(key))
                self.world.tables.services.delete(self.row(key))
        for key in keys if again else ():
            self.make(key, PODS[:2])

    @rule(key=st.sampled_from(list(SERVICES)))
    def make_service(self, key):
        if self.row(key) < 0:
            self.make(key, PODS)

    @rule()
    def collect(self):
        self.world.tables.services.collect()

    @rule(kind=st.sampled_from([Kind.VIA, Kind.TUNNEL]))
    def move_a_route(self, kind):
        """The way outside leads through the tunnel, or back again."""
        outside = Route(kind, w.UPLINK, ip_address(w.LAN_GATEWAY))
        self.world.route("198.51.100.0/24", outside if kind == Kind.VIA else Route(kind, vtep=self.world.peer))
        self.world.tables.settings[b.ROUTE_GENERATION] += np.uint64(1)

    # --- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def packets_are_conserved(self):
        assert self.world.balanced()

    @invariant()
    def every_flow_is_found_by_its_tuples_and_by_nothing_else(self):
        flows = self.world.tables.flows
        rows, seen = flows.items(), set()
        assert len(rows) == len(flows) <= flows.capacity
        for half in (half for row in rows for half in (2 * row, 2 * row + 1)):
            assert table.find(flows.arrays, flows.tuples[half]) == half
            seen.add(key_in(flows.tuples[half]))
        assert len(seen) == 2 * len(rows)
        kept = [row for row in rows if flows.flows["status"][row] & SOURCE_KEPT]
        assert np.count_nonzero(flows.arrays[0]) == 2 * len(rows) + len(kept)
        assert all(table.find_source(flows.arrays, flows.tuples[2 * row]) == row for row in kept)
        assert table.find_source(flows.arrays, flows.arrays[6][6]) == MISS

    @invariant()
    def a_translated_flow_says_so(self):
        flows = self.world.tables.flows
        for row in flows.items():
            original, reply = key_in(flows.tuples[2 * row]), key_in(flows.tuples[2 * row + 1])
            status = int(flows.flows["status"][row])
            assert (reply.dst, reply.dport) == (original.src, original.sport) or status & SRC_NAT
            assert (reply.src, reply.sport) == (original.dst, original.dport) or status & DST_NAT
            assert bool(status & DST_NAT) == (int(flows.flows["backend"][row]) >= 0)

    @invariant()
    def backends_and_templates_count_their_flows(self):
        tables = self.world.tables
        backends, templates = tables.services.backends, tables.templates.templates[:256]
        flows = tables.flows.flows[tables.flows.items()]
        counted = flows[(flows["status"] & COUNTED) != 0]
        held: Counter[tuple[int, int, str]] = Counter()
        for each in counted:
            name = (int(each["backend"]), int(each["backend_generation"]))
            held[*name, "active" if each["status"] & ACTIVE else "inactive"] += 1
        assert not np.any((flows["status"] & COUNTED == 0) & (flows["status"] & ACTIVE != 0))
        for each in templates[templates["scope"] != 0]:
            held[int(each["backend"]), int(each["backend_generation"]), "persistent"] += 1
        for at, record in enumerate(backends):
            for column in ("active", "inactive", "persistent"):
                assert int(record[column]) == held.pop((at, int(record["generation"]), column), 0), (at, column)
        assert not held, "a backend that is counted at was given away"
        controls = Counter((int(each["template"]), int(each["template_generation"])) for each in counted)
        for row, record in enumerate(templates):
            expected = controls[row, int(record["generation"])] if record["scope"] else 0
            assert int(record["controls"]) == expected

    @invariant()
    def a_backend_knows_the_row_of_its_service(self):
        services = self.world.tables.services
        for row in services.rows():
            for at, _, _ in services.members(row):
                assert int(services.backends["service"][at]) == row


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFlowInvariants = Machine.TestCase
