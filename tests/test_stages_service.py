"""Which backend a flow goes to, what it counts there, and what becomes of it when the backend goes."""

from ipaddress import ip_address

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from dataplane import batch as b
from dataplane.stages import conntrack
from dataplane.tables.policy import LOCAL, NO_LOCAL, Exposure
from dataplane.tables.scheduler import PERSISTENT
from dataplane.tables.service import Destination, Service
from dataplane.verdict import Reason
from tests import world as w
from tests.frames import lan_frame, pod_frame
from tests.lines import Scenario, packet_of
from tests.world import World


@pytest.fixture
def world():
    world = World()
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    return world


@pytest.fixture
def scenario(world):
    return Scenario(world)


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


def test_a_template_whose_time_is_over_lets_its_backend_go(world, scenario):
    row = world.service(w.VIP, 80, (w.IP_B, 8080), how=Service(flags=PERSISTENT, timeout_ns=100 * w.SECOND))
    scenario.line("lan: tcp S out:1 > vip:80 -> b: node:*1 > b:8080")
    world.tables.services.remove(row, ip_address(w.IP_B), 8080)
    assert world.tables.services.collect() == 0
    scenario.run("""
        wait 130
        wait 130
    """)
    assert (len(world.tables.templates), world.tables.services.collect()) == (0, 1)


# --- backends that go -------------------------------------------------------------------------------------------------


def test_a_datagram_to_a_deleted_backend_goes_to_another(world, scenario):
    row = world.service(w.VIP, 53, (w.IP_A, 5353), (w.IP_B, 5353), protocol="udp")
    scenario.line("lan: udp out:1 > vip:53 -> b: node:*1 > b:5353")
    world.tables.services.remove(row, ip_address(w.IP_B), 5353)
    scenario.line("b: udp b:5353 > node:*1 -> lb.dest-deleted")
    scenario.line("lan: udp out:1 > vip:53 -> a: node:*2 > a:5353")
    assert world.flows == 1


def test_answers_of_a_deleted_backend_do_not_leave_untranslated(world, scenario):
    row = world.service(w.VIP, 53, (w.IP_B, 5353), protocol="udp")
    scenario.line("a: udp a:1 > vip:53 -> b: a:1 > b:5353")
    world.tables.services.remove(row, ip_address(w.IP_B), 5353)
    scenario.run("""
        b: udp b:5353 > a:1 -> lb.dest-deleted
        b: udp b:5353 > a:1 -> lb.dest-deleted
    """)
    assert world.tables.services.collect() == 1
    scenario.line("b: udp b:5353 > a:1 -> lb.dest-deleted")


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


def test_a_service_that_is_made_again_counts_the_flows_that_came_back(world, scenario):
    """Its backend kept its row and connections; its own row is another service's by now."""
    services = world.tables.services
    row = world.service(w.VIP, 80, (w.IP_B, 8080))
    scenario.line("a: tcp S a:4000 > vip:80 -> b: a:4000 > b:8080")
    services.delete(row)
    other = world.service(w.VIP, 81, (w.IP_B, 8080))
    again = world.service(w.VIP, 80, (w.IP_B, 8080))
    assert other == row != again
    scenario.line("b: tcp SA b:8080 > a:4000 -> a: vip:80 > a:4000")
    assert [int(services.services[each]["out_packets"]) for each in (other, again)] == [0, 1]
    flow = world.tables.flows.flows[0]
    assert (flow["service"], flow["service_generation"]) == (again, services.services[again]["generation"])
