"""What becomes of packets that begin, continue and end flows: tables of packets in and packets out."""

import re
from ipaddress import ip_address

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.stages import conntrack
from dataplane.tables.flow import Count, Timeout
from dataplane.tables.policy import LOCAL, NO_LOCAL, Exposure
from dataplane.tables.route import Kind, Route
from dataplane.tables.scheduler import PERSISTENT
from dataplane.tables.service import Destination, Service
from dataplane.verdict import Reason
from tests import world as w
from tests.frames import inner_frame, lan_frame, pod_frame, recomputed, tunnel
from tests.world import World

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


@pytest.fixture
def world():
    world = World()
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    return world


@pytest.fixture
def scenario(world):
    return Scenario(world)


# --- without translation ---------------------------------------------------------------------------------------------


def test_a_flow_between_pods_is_tracked_and_not_translated(world, scenario):
    scenario.run("""
        a: tcp S  a:4000 > b:80   -> b: a:4000 > b:80
        b: tcp SA b:80 > a:4000   -> a: b:80 > a:4000
        a: tcp A  a:4000 > b:80   -> b: a:4000 > b:80
    """)
    assert world.flows == 1


def test_two_packets_of_a_new_flow_in_one_burst_are_one_flow(world):
    world.service(w.VIP, 53, (w.IP_A, 5353), (w.IP_B, 5353), protocol="udp")
    frames = [entering("lan", packet_of("udp", None, "out:4000", "vip:53"))[0] for _ in range(5)]
    outcomes = world.run(frames, w.UPLINK)
    assert len({leaving(outcome) for outcome in outcomes}) == 1
    assert world.flows == 1
    assert int(world.tables.flows.tuples["packets"][0]) == 5


def test_two_hosts_that_ping_each_other_with_one_id_have_two_flows(world, scenario):
    scenario.run("""
        a: icmp a:7 > b -> b: a:7 > b
        b: icmp b:7 > a -> a: b:7 > a
        b: icmp reply b > a:7 -> a: b > a:7
    """)
    assert world.flows == 2


INVALID = """
    a: tcp FSPU a:1 > b:80    -> ct.invalid-flags
    a: tcp R    a:2 > b:80    -> ct.not-syn
    a: tcp FA   a:3 > b:80    -> ct.not-syn
    a: tcp SA   a:4 > b:80    -> ct.not-syn
    a: icmp reply a > b:9     -> ct.not-syn
    a: tcp A    a:5 > b:80    -> b: a:5 > b:80
"""


def test_what_cannot_begin_a_flow_is_dropped_with_its_reason(world, scenario):
    scenario.run(INVALID)
    assert world.flows == 1
    assert world.tables.flows.counters["invalid"] == 5


def test_a_torn_transport_header_is_invalid(world):
    torn = IP(src=w.IP_A, dst=w.IP_B, proto=17) / Raw(b"1234567")
    assert world.one(pod_frame(torn), w.POD_A).reason == Reason.CT_INVALID_FLAGS


def test_without_loose_pick_up_a_connection_begins_with_syn(world, scenario):
    world.tables.settings[b.TCP_LOOSE] = 0
    scenario.line("a: tcp A a:5 > b:80 -> ct.not-syn")


def test_an_unknown_route_leaves_no_flow(world):
    assert world.one(pod_frame(packet_of("udp", None, "a:1", "free:1")), w.POD_A).reason == Reason.ROUTE_BLACKHOLE
    assert world.flows == 0


# --- services --------------------------------------------------------------------------------------------------------


def test_a_cluster_address_keeps_the_pods_source(world, scenario):
    world.service(w.VIP, 80, (w.IP_B, 8080))
    scenario.run("""
        a: tcp S  a:4000 > vip:80    -> b: a:4000 > b:8080
        b: tcp SA b:8080 > a:4000    -> a: vip:80 > a:4000
        a: tcp A  a:4000 > vip:80    -> b: a:4000 > b:8080
        b: tcp A  b:9 > a:4000       -> a: b:9 > a:4000
    """)


def test_a_pod_reaches_itself_through_its_service(world, scenario):
    world.service(w.VIP, 80, (w.IP_A, 8080))
    scenario.run("""
        a: tcp S  a:4000 > vip:80       -> a: node:4000 > a:8080
        a: tcp SA a:8080 > node:4000    -> a: vip:80 > a:4000
    """)


def test_a_client_outside_is_masqueraded_with_a_random_port(world, scenario):
    world.service(w.VIP, 80, (w.IP_B, 8080))
    scenario.run("""
        lan: tcp S  out:4000 > vip:80   -> b: node:* > b:8080
        b:   tcp SA b:8080 > node:*     -> lan: vip:80 > out:4000
        lan: tcp A  out:4000 > vip:80   -> b: node:* > b:8080
    """)
    assert scenario.chosen["*"] != "4000"


def test_a_backend_on_another_node_sees_the_tunnels_address(world, scenario):
    world.service(w.NODE, 30080, (w.IP_REMOTE, 8080), exposure=Exposure.NODE_PORT)
    scenario.run("""
        lan:    tcp S  out:4000 > node:30080     -> tunnel: tunnel:* > remote:8080
        tunnel: tcp SA remote:8080 > tunnel:*    -> lan: node:30080 > out:4000
    """)


EXPOSURES = [
    (Exposure.CLUSTER_IP, {}, "a", "a:4000"),
    (Exposure.CLUSTER_IP, {}, "lan", "node:*"),
    (Exposure.EXTERNAL_IP, {}, "a", "node:*"),
    (Exposure.EXTERNAL_IP, {"flags": LOCAL}, "lan", "out:4000"),
    (Exposure.LOAD_BALANCER, {}, "lan", "node:*"),
    (Exposure.LOAD_BALANCER, {}, "a", "node:*"),
    (Exposure.LOAD_BALANCER, {"flags": LOCAL}, "lan", "out:4000"),
]


@pytest.mark.parametrize(("exposure", "policy", "device", "seen"), EXPOSURES)
def test_the_mark_follows_the_exposure_and_the_policy(world, scenario, exposure, policy, device, seen):
    world.service(w.LB_IP, 80, (w.IP_B, 8080), exposure=exposure, **policy)
    source = "a:4000" if device == "a" else "out:4000"
    scenario.line(f"{device}: tcp S {source} > lb:80 -> b: {seen} > b:8080")


def test_masquerade_all_means_pods_too(world, scenario):
    world.tables.settings[b.MASQUERADE_ALL] = 1
    world.service(w.VIP, 80, (w.IP_B, 8080))
    scenario.line("a: tcp S a:4000 > vip:80 -> b: node:* > b:8080")


def test_without_a_cluster_cidr_nobody_is_masqueraded_at_a_cluster_address(world, scenario):
    world.tables.policies.set_pools([])
    world.service(w.VIP, 80, (w.IP_B, 8080))
    scenario.line("lan: tcp S out:4000 > vip:80 -> b: out:4000 > b:8080")


def test_a_service_address_answers_pings_and_refuses_closed_ports(world):
    world.service(w.VIP, 80, (w.IP_B, 8080))
    assert world.one(pod_frame(packet_of("icmp", None, "a:7", "vip")), w.POD_A).reason == Reason.LOCAL_DELIVERY
    closed = world.one(pod_frame(packet_of("tcp", "S", "a:7", "vip:81")), w.POD_A)
    assert closed.reason == Reason.SVC_VIP_CLOSED_PORT
    assert closed.record["flags"] & b.OWES_ERROR
    assert world.flows == 0


def test_a_service_without_backends_refuses(world):
    world.service(w.VIP, 80)
    refused = world.one(pod_frame(packet_of("tcp", "S", "a:7", "vip:80")), w.POD_A)
    assert refused.reason == Reason.SVC_NO_ENDPOINTS
    assert refused.record["flags"] & b.OWES_ERROR


def test_source_ranges_and_missing_local_backends_drop_in_silence(world):
    world.service(w.LB_IP, 80, (w.IP_B, 8080), exposure=Exposure.LOAD_BALANCER, ranges=[])
    world.service(w.LB_IP, 81, (w.IP_B, 8080), exposure=Exposure.LOAD_BALANCER, flags=LOCAL | NO_LOCAL)
    for port, reason in ((80, Reason.SVC_SOURCE_RANGE), (81, Reason.SVC_NO_LOCAL_ENDPOINTS)):
        outcome = world.one(lan_frame(packet_of("tcp", "S", "out:7", f"lb:{port}")), w.UPLINK)
        assert outcome.reason == reason
        assert not outcome.record["flags"] & b.OWES_ERROR


def test_a_lost_connection_to_a_service_is_reset(world):
    world.service(w.VIP, 80, (w.IP_B, 8080))
    for flags in ("A", "FA", "PA"):
        outcome = world.one(pod_frame(packet_of("tcp", flags, "a:7", "vip:80")), w.POD_A)
        assert outcome.reason == Reason.CT_NOT_SYN
        assert outcome.record["flags"] & b.OWES_ERROR
    count = world.load([pod_frame(packet_of("tcp", "A", "a:7", "vip:80"))], w.POD_A)
    slow = world.slow_path()
    outcomes = world.run([pod_frame(packet_of("tcp", "A", "a:7", "vip:80"))], w.POD_A)
    assert outcomes[0].reason == Reason.CT_NOT_SYN
    (answer,) = slow.handle(world.batch, count, world.now)
    reset = Ether(answer.frame)
    assert (reset[IP].src, reset[IP].dst, reset[TCP].flags, reset[TCP].seq) == (w.VIP, w.IP_A, "R", 2000)


def test_connections_are_balanced_and_counted_as_ip_vs_does(world, scenario):
    row = world.service(w.VIP, 80, (w.IP_A, 8080), (w.IP_B, 8080))
    scenario.run("""
        lan: tcp S out:1 > vip:80 -> b: node:*1 > b:8080
        lan: tcp S out:2 > vip:80 -> a: node:*2 > a:8080
        lan: tcp S out:3 > vip:80 -> b: node:*3 > b:8080
    """)
    counts = {str(address): world.tables.services.backends[at] for at, address, _ in world.tables.services.members(row)}
    assert (counts[w.IP_B]["active"], counts[w.IP_A]["active"]) == (2, 1)
    scenario.run("""
        b:   tcp SA b:8080 > node:*1  -> lan: vip:80 > out:1
        lan: tcp A  out:1 > vip:80    -> b: node:*1 > b:8080
        lan: tcp FA out:1 > vip:80    -> b: node:*1 > b:8080
    """)
    assert (counts[w.IP_B]["active"], counts[w.IP_B]["inactive"]) == (1, 1)
    assert int(world.tables.services.services[row]["in_packets"]) == 5
    scenario.line("wait 400")
    assert (counts[w.IP_B]["active"], counts[w.IP_B]["inactive"]) == (0, 0)


def test_an_idle_connection_leaves_its_backends_counters_and_lives_on(world, scenario):
    row = world.service(w.VIP, 80, (w.IP_B, 8080))
    opened = """
        a: tcp S  a:4000 > vip:80    -> b: a:4000 > b:8080
        b: tcp SA b:8080 > a:4000    -> a: vip:80 > a:4000
        a: tcp A  a:4000 > vip:80    -> b: a:4000 > b:8080
    """
    scenario.run(opened)
    at = world.tables.services.find_backend(row, ip_address(w.IP_B), 8080)
    record = world.tables.services.backends[at]
    world.now += 901 * w.SECOND
    conntrack.expire(world.tables.arrays, world.now, w.FLOWS)
    assert (record["active"], record["inactive"], world.flows) == (0, 0, 1)
    scenario.line("a: tcp A a:4000 > vip:80 -> b: a:4000 > b:8080")
    assert (record["active"], record["inactive"]) == (1, 0)


def test_a_client_stays_with_its_backend(world, scenario):
    how = Service(flags=PERSISTENT, timeout_ns=100 * w.SECOND)
    world.service(w.VIP, 80, (w.IP_A, 8080), (w.IP_B, 8080), how=how)
    scenario.run("""
        lan: tcp S out:1 > vip:80 -> b: node:*1 > b:8080
        lan: tcp S out:2 > vip:80 -> b: node:*2 > b:8080
        lan: tcp S lan:2 > vip:80 -> a: node:*3 > a:8080
        lan: tcp S out:3 > vip:80 -> b: node:*4 > b:8080
        wait 400
        lan: tcp S out:4 > vip:80 -> b: node:*5 > b:8080
    """)


# --- backends that go ------------------------------------------------------------------------------------------------


def test_a_datagram_to_a_deleted_backend_goes_to_another(world, scenario):
    row = world.service(w.VIP, 53, (w.IP_A, 5353), (w.IP_B, 5353), protocol="udp")
    scenario.line("lan: udp out:1 > vip:53 -> b: node:*1 > b:5353")
    world.tables.services.remove(row, ip_address(w.IP_B), 5353)
    scenario.line("b: udp b:5353 > node:*1 -> lb.dest-deleted")
    scenario.line("lan: udp out:1 > vip:53 -> a: node:*2 > a:5353")
    assert world.flows == 1


def test_a_segment_to_a_deleted_backend_is_reset(world, scenario):
    row = world.service(w.VIP, 80, (w.IP_A, 8080), (w.IP_B, 8080))
    scenario.line("lan: tcp S out:1 > vip:80 -> b: node:*1 > b:8080")
    world.tables.services.remove(row, ip_address(w.IP_B), 8080)
    scenario.run("""
        lan: tcp A out:1 > vip:80 -> ct.not-syn
        lan: tcp S out:1 > vip:80 -> a: node:*2 > a:8080
    """)


def test_a_client_port_that_is_used_again_is_scheduled_at_once(world, scenario):
    row = world.service(w.VIP, 80, (w.IP_A, 8080), (w.IP_B, 8080))
    scenario.line("a: tcp S a:4000 > vip:80 -> b: a:4000 > b:8080")
    world.tables.services.add(row, ip_address(w.IP_B), 8080, Destination(weight=0))
    scenario.line("a: tcp S a:4000 > vip:80 -> a: node:4000 > a:8080")


# --- masquerading ----------------------------------------------------------------------------------------------------


def test_nat_outgoing_is_for_what_leaves_the_pools(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.run("""
        a: udp a:4000 > out:53       -> lan: node:*1 > out:53
        lan: udp out:53 > node:*1    -> a: out:53 > a:4000
        a: udp a:4000 > remote:53    -> tunnel: a:4000 > remote:53
        a: udp a:4000 > b:53         -> b: a:4000 > b:53
        a: icmp a:7 > out            -> lan: node:*2 > out
        lan: icmp reply out > node:*2  -> a: out > a:7
    """)


def test_with_keep_if_free_a_source_keeps_its_port_and_its_mapping(world, scenario):
    world.tables.settings[b.NAT_OUTGOING], world.tables.settings[b.NAT_RANDOM] = 1, 0
    scenario.run(
        """
        a: udp a:4000 > out:53       -> lan: node:4000 > out:53
        b: udp b:4000 > out:53       -> lan: node:*1 > out:53
        b: udp b:4000 > lan:53       -> neigh.resolve
    """.replace("neigh.resolve", "lan: node:*1 > lan:53")
    )
    assert scenario.chosen["*1"] != "4000"


def test_a_reply_without_a_flow_is_the_hosts(world):
    assert world.one(lan_frame(packet_of("udp", None, "out:53", "node:40000")), w.UPLINK).reason == Reason.HOST_OWNED


def test_no_port_is_free(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    world.tables.settings[b.MASQUERADE_LOW] = world.tables.settings[b.MASQUERADE_HIGH] = 50000
    scenario.run("""
        a: udp a:1 > out:53 -> lan: node:50000 > out:53
        a: udp a:2 > out:53 -> nat.no-port
        a: udp a:2 > out:54 -> lan: node:50000 > out:54
    """)


def test_a_client_that_reaches_a_pod_directly_and_by_service_from_one_port_gets_two_flows(world, scenario):
    world.service(w.VIP, 80, (w.IP_B, 8080), protocol="udp")
    scenario.run("""
        a: udp a:4000 > b:8080     -> b: a:4000 > b:8080
        a: udp a:4000 > vip:80     -> b: a:* > b:8080
        b: udp b:8080 > a:4000     -> a: b:8080 > a:4000
        b: udp b:8080 > a:*        -> a: vip:80 > a:4000
    """)
    assert scenario.chosen["*"] != "4000"


def test_a_masqueraded_flow_dies_with_its_address(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.line("a: udp a:4000 > out:53 -> lan: node:*1 > out:53")
    world.route("198.51.100.0/24", Route(Kind.TUNNEL, vtep=world.peer))
    scenario.line("a: udp a:4000 > out:53 -> tunnel: node:*1 > out:53")
    world.tables.settings[b.ROUTE_GENERATION] += np.uint64(1)
    scenario.line("a: udp a:4000 > out:53 -> tunnel: tunnel:*2 > out:53")


def test_without_an_address_nothing_is_masqueraded(world):
    for setting in (b.NODE_LO, b.GATEWAY_LO, b.TUNNEL_LO):
        world.tables.settings[setting] = 0
    world.service(w.VIP, 80, (w.IP_A, 8080))
    outcome = world.one(pod_frame(packet_of("tcp", "S", "a:7", "vip:80")), w.POD_A)
    assert outcome.reason == Reason.NAT_MASQ_NO_ADDR


# --- the host --------------------------------------------------------------------------------------------------------


def test_the_host_reaches_services_and_pods_by_its_device(world, scenario):
    world.host()
    world.service(w.VIP, 80, (w.IP_B, 8080))
    scenario.run("""
        host: tcp S  node:4000 > vip:80    -> b: node:* > b:8080
        b:    tcp SA b:8080 > node:*       -> host: vip:80 > node:4000
        host: tcp S  node:5000 > a:22      -> a: node:5000 > a:22
        a:    tcp SA a:22 > node:5000      -> host: a:22 > node:5000
        a:    tcp S  a:6000 > node:10250   -> host: a:6000 > node:10250
        host: tcp SA node:10250 > a:6000   -> a: node:10250 > a:6000
    """)


def test_what_the_host_sends_into_the_tunnel_comes_from_the_tunnels_address(world, scenario):
    world.host()
    scenario.run("""
        host:   udp node:4000 > remote:53       -> tunnel: tunnel:* > remote:53
        tunnel: udp remote:53 > tunnel:*        -> host: remote:53 > node:4000
    """)


def test_an_uplink_of_our_own_hands_everything_for_the_node_to_the_host(world, scenario):
    world.host()
    scenario.line("lan: tcp S out:4000 > node:22 -> host.owned")
    world.tables.settings[b.UPLINK_OWN] = 1
    scenario.line("lan: tcp S out:4000 > node:22 -> host: out:4000 > node:22")


# --- ICMP errors -----------------------------------------------------------------------------------------------------


def error(source, target, quoted, kind=3, code=1):
    return IP(src=NAMES.get(source, source), dst=NAMES[target]) / ICMP(type=kind, code=code) / IP(bytes(quoted))


def test_an_error_about_a_translated_flow_reaches_its_client_translated(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.line("a: udp a:4000 > out:53 -> lan: node:* > out:53")
    sent = packet_of("udp", None, f"node:{scenario.chosen['*']}", "out:53")
    outcome = world.one(lan_frame(error("192.0.2.77", "node", sent)), w.UPLINK)
    assert outcome.label == "accepted"
    arrived = Ether(outcome.frame)
    assert (arrived[IP].src, arrived[IP].dst) == ("192.0.2.77", w.IP_A)
    quoted = arrived[ICMP].payload
    assert (quoted.src, quoted.dst, quoted.sport) == (w.IP_A, w.OUTSIDE, 4000)
    assert bytes(arrived)[:38] == recomputed(bytes(arrived))[:38]


RELATED = [
    ("of no flow", error("out", "a", packet_of("udp", None, "a:9", "out:53")), Reason.ICMP_UNRELATED),
    ("torn", IP(src=w.OUTSIDE, dst=w.IP_A) / ICMP(type=3, code=1) / Raw(b"E" * 12), Reason.ICMP_BAD_INNER),
    ("for another", error("out", "b", packet_of("udp", None, "a:4000", "out:53")), Reason.ICMP_BAD_INNER),
    ("for the host", error("out", "node", packet_of("udp", None, "node:9", "out:53")), Reason.HOST_OWNED),
]


@pytest.mark.parametrize(("packet", "reason"), [row[1:] for row in RELATED], ids=[row[0] for row in RELATED])
def test_an_error_of_no_flow_goes_nowhere(world, scenario, packet, reason):
    scenario.line("a: udp a:4000 > out:53 -> lan: a:4000 > out:53")
    assert world.one(lan_frame(packet), w.UPLINK).reason == reason


def test_a_redirect_of_a_translated_flow_is_dropped(world, scenario):
    world.tables.settings[b.NAT_OUTGOING] = 1
    scenario.line("a: udp a:4000 > out:53 -> lan: node:* > out:53")
    sent = packet_of("udp", None, f"node:{scenario.chosen['*']}", "out:53")
    outcome = world.one(lan_frame(error("lan", "node", sent, kind=5)), w.UPLINK)
    assert outcome.reason == Reason.ICMP_UNRELATED


def test_an_error_of_our_own_quotes_the_clients_packet(world):
    """TTL 1 to a service: what route drops has been given a backend, and its bytes are still the client's."""
    world.service(w.VIP, 53, (w.IP_B, 5353), protocol="udp")
    packet = packet_of("udp", None, "a:4000", "vip:53")
    packet.ttl = 1
    assert world.one(pod_frame(packet), w.POD_A).reason == Reason.IP_TTL
    (answer,) = world.slow_path().handle(world.batch, 1, world.now)
    quoted = Ether(answer.frame)[ICMP].payload
    assert (quoted.src, quoted.dst, quoted.dport) == (w.IP_A, w.VIP, 53)
    back = world.one(answer.frame, 0, flags=b.INJECTED)
    assert leaving_oif(back) == "a"


def leaving_oif(outcome):
    assert outcome.label == "accepted"
    return DEVICES[outcome.oif]


# --- limits and time -------------------------------------------------------------------------------------------------


def test_a_full_table_gives_up_what_nobody_has_answered(world):
    for port in range(1, 1 + 2 * w.FLOWS):
        assert world.one(pod_frame(packet_of("udp", None, f"a:{port}", "b:53")), w.POD_A).label == "accepted"
    assert world.flows == w.FLOWS
    assert world.tables.flows.counters["early_drop"] == w.FLOWS


def test_a_full_table_keeps_what_is_assured(world):
    for port in range(1, 1 + w.FLOWS):
        world.one(pod_frame(packet_of("tcp", "S", f"a:{port}", "b:80")), w.POD_A)
        world.one(pod_frame(packet_of("tcp", "SA", "b:80", f"a:{port}"), source=w.MAC_B), w.POD_B)
        world.one(pod_frame(packet_of("tcp", "A", f"a:{port}", "b:80")), w.POD_A)
    outcome = world.one(pod_frame(packet_of("udp", None, "a:1", "b:53")), w.POD_A)
    assert outcome.reason == Reason.CT_TABLE_FULL
    assert world.tables.flows.state[Count.DROP] == 1


TIMES = """
    a: udp a:1 > b:53 -> b: a:1 > b:53
    wait 29
    b: udp b:53 > a:1 -> a: b:53 > a:1
    wait 29
    a: udp a:1 > b:53 -> b: a:1 > b:53
    wait 119
    b: udp b:53 > a:1 -> a: b:53 > a:1
    wait 119
"""


def test_an_answered_udp_flow_becomes_a_stream(world, scenario):
    scenario.run(TIMES)
    assert world.flows == 1
    scenario.line("wait 1")
    assert world.flows == 0


def test_an_unanswered_datagram_is_forgotten_after_30_seconds(world, scenario):
    scenario.line("a: udp a:1 > b:53 -> b: a:1 > b:53")
    scenario.line("wait 30")
    assert world.flows == 0


def test_a_packet_finds_no_flow_whose_time_is_over(world, scenario):
    row = world.service(w.VIP, 53, (w.IP_A, 5353), (w.IP_B, 5353), protocol="udp")
    scenario.line("lan: udp out:1 > vip:53 -> b: node:*1 > b:5353")
    world.now += int(world.tables.timeouts[Timeout.LB + 11])
    scenario.line("lan: udp out:1 > vip:53 -> a: node:*2 > a:5353")
    assert world.flows == 1
    held = [int(world.tables.services.backends[at]["inactive"]) for at, _, _ in world.tables.services.members(row)]
    assert held == [0, 1]


def test_packets_with_another_verdict_are_untouched(world):
    world.load([pod_frame(packet_of("udp", None, "a:1", "b:53"))], w.POD_A)
    world.batch.packets["verdict"][0] = 3
    before = world.batch.packets[0].copy()
    conntrack.conntrack(world.batch.arrays, 1, world.tables.arrays, world.now)
    after = world.batch.packets[0]
    assert all(before[name] == after[name] for name in before.dtype.names if name != "flow")
    assert world.flows == 0


def test_ipv6_is_tracked_as_well(world):
    a, b6 = "2001:db8:1::a", "2001:db8:1::b"
    world.route(f"{a}/128", Route(Kind.POD, w.POD_A))
    world.route(f"{b6}/128", Route(Kind.POD, w.POD_B))
    outcome = world.one(pod_frame(IPv6(src=a, dst=b6) / UDP(sport=1, dport=53) / Raw(b"x")), w.POD_A)
    assert (outcome.label, outcome.oif, world.flows) == ("accepted", w.POD_B, 1)
