"""arp: the whole table of who is answered, on pod links and on the uplink, and the reply byte by byte.

The rows are what Linux 6.18 did with ``proxy_arp=1`` and ``proxy_delay=0``, except that the gateway is always answered.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.stages.arp import arp
from dataplane.tables.address import parse_mac
from dataplane.tables.interface import OFFLOAD, UP, Role
from dataplane.tables.neighbour import LOCK_NS, State
from dataplane.tables.route import ANNOUNCED, Kind, Route
from dataplane.verdict import Reason, Verdict
from tests import world as w
from tests.frames import BROADCAST, arp_request, inner_frame, patched, pod_frame, tunnel, udp
from tests.world import World

GATEWAY = "169.254.1.1"
NOBODY = "0.0.0.0"
NOWHERE = "8.8.8.8"
OTHER_MAC = "02:00:00:00:00:99"


@pytest.fixture
def world():
    return World()


def asked(world, tip, iif=w.POD_A, **fields):
    return world.stage(arp, [arp_request(tip, **fields)], iif)[0]


def reply(tip, tpa=w.IP_A):
    """What the pod must hear, by scapy: op 2, to it alone, from the link's MAC."""
    answer = ARP(op=2, hwsrc=w.GATEWAY_MAC, psrc=tip, hwdst=w.MAC_A, pdst=tpa)
    return bytes(Ether(src=w.GATEWAY_MAC, dst=w.MAC_A) / answer)


FROM_A_POD = [
    ("the gateway", GATEWAY, Reason.ARP_ANSWERED),
    ("another pod of the node", w.IP_B, Reason.ARP_ANSWERED),
    ("a pod of another node", w.IP_REMOTE, Reason.ARP_ANSWERED),
    ("a pod of a node whose VTEP is not known", w.IP_LOST, Reason.ARP_ANSWERED),
    ("a station of the LAN", w.LAN_GATEWAY, Reason.ARP_ANSWERED),
    ("an address behind the LAN's gateway", w.OUTSIDE, Reason.ARP_ANSWERED),
    ("the node itself", w.NODE, Reason.ARP_ANSWERED),
    ("its own address", w.IP_A, Reason.ARP_OWN_IP),
    ("a free address of the node's block", w.IP_FREE, Reason.ARP_NOT_OWNER),
    ("an unreachable address", "203.0.113.9", Reason.ARP_NOT_OWNER),
    ("an address without a route", NOWHERE, Reason.ARP_NOT_OWNER),
    ("a multicast address", "224.0.0.251", Reason.ARP_MALFORMED),
    ("the loopback", "127.0.0.1", Reason.ARP_MALFORMED),
    ("the broadcast address", "255.255.255.255", Reason.ARP_NOT_OWNER),
    ("nothing", NOBODY, Reason.ARP_NOT_OWNER),
]


@pytest.mark.parametrize(("tip", "reason"), [row[1:] for row in FROM_A_POD], ids=[row[0] for row in FROM_A_POD])
def test_a_pod_asks_for(world, tip, reason):
    outcome = asked(world, tip)
    assert outcome.reason == reason
    if reason == Reason.ARP_ANSWERED:
        assert (outcome.verdict, outcome.oif, outcome.frame) == (Verdict.STOLEN, w.POD_A, reply(tip))
    else:
        assert (outcome.verdict, outcome.oif) == (Verdict.DROP, 0)


PROBES = [
    ("the gateway", GATEWAY, Reason.ARP_PROBE),
    ("another pod of the node", w.IP_B, Reason.ARP_PROBE),
    ("a pod of another node", w.IP_REMOTE, Reason.ARP_PROBE),
    ("its own address", w.IP_A, Reason.ARP_OWN_IP),
    ("the node itself", w.NODE, Reason.ARP_ANSWERED),
]


@pytest.mark.parametrize(("tip", "reason"), [row[1:] for row in PROBES], ids=[row[0] for row in PROBES])
def test_a_pod_probes_for(world, tip, reason):
    outcome = asked(world, tip, sender=NOBODY)
    assert outcome.reason == reason
    if reason == Reason.ARP_ANSWERED:
        assert outcome.frame == reply(tip, tpa=NOBODY)


def test_a_probe_for_the_gateway_is_silent_even_when_it_is_an_address_of_the_node(world):
    world.route(f"{GATEWAY}/32", Route(Kind.LOCAL))
    assert asked(world, GATEWAY, sender=NOBODY).reason == Reason.ARP_PROBE
    assert asked(world, GATEWAY).frame == reply(GATEWAY)


WITHOUT_PROXY = [
    ("the gateway", GATEWAY, Reason.ARP_ANSWERED),
    ("the node itself", w.NODE, Reason.ARP_ANSWERED),
    ("another pod of the node", w.IP_B, Reason.ARP_NOT_OWNER),
    ("a pod of another node", w.IP_REMOTE, Reason.ARP_NOT_OWNER),
    ("an address behind the LAN's gateway", w.OUTSIDE, Reason.ARP_NOT_OWNER),
    ("its own address", w.IP_A, Reason.ARP_OWN_IP),
]


@pytest.mark.parametrize(("tip", "reason"), [row[1:] for row in WITHOUT_PROXY], ids=[row[0] for row in WITHOUT_PROXY])
def test_without_proxy_arp_a_pod_asks_for(world, tip, reason):
    world.tables.settings[b.PROXY_ARP] = 0
    assert asked(world, tip).reason == reason


def test_the_gateway_is_answered_on_a_node_without_any_other_route():
    world = World()
    for prefix, _ in list(world.tables.routes.items()):
        if str(prefix) != f"{w.IP_A}/32":
            world.tables.routes.delete(prefix)
    assert asked(world, GATEWAY).frame == reply(GATEWAY)


def test_the_answer_is_the_links_own_mac_address():
    world = World()
    world.tables.interfaces["mac"][w.POD_A] = 0x0242_0000_0001
    frame = Ether(src=w.MAC_A, dst=BROADCAST) / ARP(op=1, hwsrc=w.MAC_A, psrc=w.IP_A, pdst=GATEWAY)
    answer = Ether(world.stage(arp, [frame], w.POD_A)[0].frame)
    assert answer.src == answer[ARP].hwsrc == "02:42:00:00:00:01"


def test_a_unicast_request_is_answered_and_its_padding_is_not_sent_back(world):
    outcome = world.stage(arp, [arp_request(GATEWAY, to=w.GATEWAY_MAC) / Raw(b"\xa5" * 18)], w.POD_A)[0]
    assert outcome.frame == reply(GATEWAY)


def test_an_old_stations_hardware_type_is_answered_with_ethernets(world):
    frame = patched(arp_request(GATEWAY), 14, b"\x00\x06")
    assert world.stage(arp, [frame], w.POD_A)[0].frame == reply(GATEWAY)


LIES = [
    ("another pod's address", {"sender": w.IP_B}, Reason.IP_SPOOFED_SRC),
    ("a free address", {"sender": w.IP_FREE}, Reason.IP_SPOOFED_SRC),
    ("the gateway's address", {"sender": GATEWAY}, Reason.IP_SPOOFED_SRC),
    ("the node's address", {"sender": w.NODE}, Reason.IP_SPOOFED_SRC),
    ("another MAC address", {"mac": OTHER_MAC}, Reason.L2_SPOOFED_SRC),
    ("a group's MAC address", {"mac": BROADCAST}, Reason.ARP_MALFORMED),
]


@pytest.mark.parametrize(("fields", "reason"), [row[1:] for row in LIES], ids=[row[0] for row in LIES])
def test_a_pod_cannot_speak_with(world, fields, reason):
    assert asked(world, GATEWAY, **fields).reason == reason


@pytest.mark.parametrize("lie", ["hwsrc", "src"])
def test_a_pods_frame_and_its_arp_must_name_the_same_station(world, lie):
    frame = arp_request(GATEWAY)
    setattr(frame[ARP] if lie == "hwsrc" else frame, lie, OTHER_MAC)
    assert world.stage(arp, [frame], w.POD_A)[0].reason == Reason.L2_SPOOFED_SRC


def test_a_pods_gratuitous_request_is_silent(world):
    assert asked(world, w.IP_A).reason == Reason.ARP_OWN_IP


@pytest.mark.parametrize("tip", [w.IP_A, GATEWAY, w.IP_B])
def test_a_pods_reply_is_never_answered(world, tip):
    frame = Ether(src=w.MAC_A, dst=BROADCAST) / ARP(op=2, hwsrc=w.MAC_A, psrc=w.IP_A, hwdst=w.MAC_A, pdst=tip)
    assert world.stage(arp, [frame], w.POD_A)[0].reason == Reason.ARP_NOT_OWNER


MALFORMED = [
    ("another hardware type", 14, b"\x00\x02"),
    ("another protocol type", 16, b"\x86\xdd"),
    ("another hardware length", 18, b"\x08"),
    ("another protocol length", 19, b"\x10"),
]


@pytest.mark.parametrize(("at", "octets"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
@pytest.mark.parametrize("iif", [w.POD_A, w.UPLINK])
def test_an_arp_packet_with(world, at, octets, iif):
    assert world.stage(arp, [patched(arp_request(GATEWAY), at, octets)], iif)[0].reason == Reason.ARP_MALFORMED


@pytest.mark.parametrize("operation", [0, 3, 8, 0xFFFF])
def test_an_operation_that_is_neither_request_nor_reply(world, operation):
    frame = arp_request(GATEWAY)
    frame[ARP].op = operation
    assert world.stage(arp, [frame], w.POD_A)[0].reason == Reason.ARP_MALFORMED


@given(st.integers(14, 41))
def test_an_arp_packet_that_is_cut_off(length):
    assert MODULE.stage(arp, [bytes(arp_request(GATEWAY))[:length]], w.POD_A)[0].reason == Reason.ARP_MALFORMED


# --- the host's device: as a pod's link, but the addresses behind it are the node's ----------------------------------

HOST, HOST_MAC = 5, "02:00:00:00:00:05"
CLUSTER_IP = "10.96.0.10"


@pytest.fixture
def host():
    made = World()
    made.interface(HOST, Role.HOST, UP | OFFLOAD, w.POD_MTU, w.GATEWAY_MAC, HOST_MAC)
    made.route(f"{CLUSTER_IP}/32", Route(Kind.SERVICE))
    made.route(f"{GATEWAY}/32", Route(Kind.LOCAL))
    return made


FROM_THE_HOST = [
    ("the gateway", GATEWAY, w.NODE, Reason.ARP_ANSWERED),
    ("a pod", w.IP_A, w.NODE, Reason.ARP_ANSWERED),
    ("a pod of another node", w.IP_REMOTE, w.NODE, Reason.ARP_ANSWERED),
    ("a service", CLUSTER_IP, w.NODE, Reason.ARP_ANSWERED),
    ("a free address of the node's block", w.IP_FREE, w.NODE, Reason.ARP_NOT_OWNER),
    ("its own address", w.NODE, w.NODE, Reason.ARP_OWN_IP),
    ("its own address, as a probe", w.NODE, NOBODY, Reason.ARP_OWN_IP),
    ("the gateway, as a probe", GATEWAY, NOBODY, Reason.ARP_PROBE),
    ("a pod, as a probe", w.IP_A, NOBODY, Reason.ARP_PROBE),
    ("the gateway in the name of a pod", GATEWAY, w.IP_A, Reason.IP_SPOOFED_SRC),
    ("the gateway in its own name", GATEWAY, GATEWAY, Reason.IP_SPOOFED_SRC),
]


@pytest.mark.parametrize(
    ("tip", "sender", "reason"), [row[1:] for row in FROM_THE_HOST], ids=[row[0] for row in FROM_THE_HOST]
)
def test_the_host_asks_for(host, tip, sender, reason):
    outcome = asked(host, tip, HOST, sender=sender, mac=HOST_MAC)
    assert outcome.reason == reason
    if reason == Reason.ARP_ANSWERED:
        answer = Ether(outcome.frame)[ARP]
        assert (answer.psrc, answer.hwsrc, answer.pdst, answer.hwdst) == (tip, w.GATEWAY_MAC, sender, HOST_MAC)


@pytest.mark.parametrize("sender", [w.IP_A, NOBODY])
def test_a_service_is_answered_to_a_pod_like_the_node_itself(host, sender):
    assert asked(host, CLUSTER_IP, sender=sender).frame == reply(CLUSTER_IP, tpa=sender)


# --- the uplink: what is announced is answered, else we only learn ----------------------------------------------------

LAN = {"sender": w.LAN_GATEWAY, "mac": w.LAN_MAC}
REPLY = Ether(src=w.LAN_MAC, dst=w.UPLINK_MAC) / ARP(op=2, hwsrc=w.LAN_MAC, psrc=w.LAN_GATEWAY, pdst=w.NODE)
FROM_THE_LAN = [
    ("a request for the node", arp_request(w.NODE, **LAN), Reason.ARP_LEARN),
    ("a request for a pod", arp_request(w.IP_A, **LAN), Reason.ARP_NOT_OWNER),
    ("a request for the pods' gateway", arp_request(GATEWAY, **LAN), Reason.ARP_NOT_OWNER),
    ("a request for a station behind us", arp_request(w.IP_REMOTE, **LAN), Reason.ARP_NOT_OWNER),
    ("a request for somebody else", arp_request(w.PEER, **LAN), Reason.ARP_NOT_OWNER),
    ("a probe for the node", arp_request(w.NODE, sender=NOBODY, mac=w.LAN_MAC), Reason.ARP_NOT_OWNER),
    ("a reply that nobody asked for", REPLY, Reason.ARP_NOT_OWNER),
    ("a gratuitous request", arp_request(w.LAN_GATEWAY, **LAN), Reason.ARP_NOT_OWNER),
    ("a multicast sender", arp_request(w.NODE, sender="224.0.0.1", mac=w.LAN_MAC), Reason.ARP_MALFORMED),
    ("a loopback sender", arp_request(w.NODE, sender="127.0.0.1", mac=w.LAN_MAC), Reason.ARP_MALFORMED),
    ("a broadcast sender", arp_request(w.NODE, sender="255.255.255.255", mac=w.LAN_MAC), Reason.ARP_MALFORMED),
    ("a group's MAC address", arp_request(w.NODE, sender=w.LAN_GATEWAY, mac="01:00:5e:00:00:01"), Reason.ARP_MALFORMED),
]


@pytest.mark.parametrize(("frame", "reason"), [row[1:] for row in FROM_THE_LAN], ids=[row[0] for row in FROM_THE_LAN])
def test_from_the_lan_comes(world, frame, reason):
    outcome = world.stage(arp, [frame], w.UPLINK)[0]
    assert outcome.reason == reason
    assert outcome.verdict == (Verdict.QUEUE if reason == Reason.ARP_LEARN else Verdict.DROP)
    assert outcome.frame == bytes(frame)


@pytest.mark.parametrize("op", [1, 2])
@pytest.mark.parametrize("target", [w.NODE, w.LAN_GATEWAY, w.PEER])
def test_whatever_a_known_neighbor_says_is_worth_learning(world, op, target):
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    frame = Ether(src=w.LAN_MAC, dst=BROADCAST) / ARP(op=op, hwsrc=w.LAN_MAC, psrc=w.LAN_GATEWAY, pdst=target)
    assert world.stage(arp, [frame], w.UPLINK)[0].reason == Reason.ARP_LEARN


def test_a_neighbor_of_another_interface_is_not_known(world):
    world.neighbour(w.UNDERLAY, w.LAN_GATEWAY, w.LAN_MAC)
    frame = Ether(src=w.LAN_MAC, dst=BROADCAST) / ARP(op=2, hwsrc=w.LAN_MAC, psrc=w.LAN_GATEWAY, pdst=w.NODE)
    assert world.stage(arp, [frame], w.UPLINK)[0].reason == Reason.ARP_NOT_OWNER


def test_arp_from_a_tunnel_teaches_nothing(world):
    world.neighbour(w.UNDERLAY, w.IP_REMOTE, w.PEER_VTEP)
    inner = Ether(src=w.PEER_VTEP, dst=BROADCAST) / ARP(op=1, hwsrc=w.PEER_VTEP, psrc=w.IP_REMOTE, pdst=w.NODE)
    assert world.one(tunnel(inner), w.UNDERLAY).reason == Reason.ARP_NOT_OWNER
    assert world.one(tunnel(inner_frame(udp(w.IP_A, src=w.IP_REMOTE))), w.UNDERLAY).verdict == Verdict.ACCEPT


def test_other_packets_are_not_looked_at(world):
    outcome = world.stage(arp, [pod_frame(udp(w.IP_B))], w.POD_A)[0]
    assert (outcome.verdict, outcome.reason) == (Verdict.ACCEPT, Reason.ACCEPTED)


BALANCER = "192.0.2.200"


@pytest.fixture
def owner():
    """A node that owns a load balancer's address, beside one that it does not own."""
    made = World()
    made.route(f"{BALANCER}/32", Route(Kind.SERVICE, flags=ANNOUNCED))
    made.route("192.0.2.201/32", Route(Kind.SERVICE))
    return made


def lan_reply(tip, tpa=w.LAN_GATEWAY):
    answer = ARP(op=2, hwsrc=w.UPLINK_MAC, psrc=tip, hwdst=w.LAN_MAC, pdst=tpa)
    return bytes(Ether(src=w.UPLINK_MAC, dst=w.LAN_MAC) / answer)


@pytest.mark.parametrize("to", [BROADCAST, w.UPLINK_MAC])
@pytest.mark.parametrize("sender", [w.LAN_GATEWAY, NOBODY, "198.51.100.9"])
def test_an_announced_address_is_answered_with_the_uplinks_mac(owner, sender, to):
    outcome = asked(owner, BALANCER, w.UPLINK, sender=sender, mac=w.LAN_MAC, to=to)
    assert (outcome.verdict, outcome.reason, outcome.oif) == (Verdict.STOLEN, Reason.ARP_ANSWERED, w.UPLINK)
    assert outcome.frame == lan_reply(BALANCER, sender)


SILENT = [
    ("an address that another node announces", arp_request("192.0.2.201", **LAN)),
    ("a gratuitous request of another owner", arp_request(BALANCER, sender=BALANCER, mac=w.LAN_MAC)),
    ("a request to a group", arp_request(BALANCER, to="01:00:5e:00:00:01", **LAN)),
    ("a reply", Ether(src=w.LAN_MAC, dst=BROADCAST) / ARP(op=2, hwsrc=w.LAN_MAC, psrc=w.LAN_GATEWAY, pdst=BALANCER)),
]


@pytest.mark.parametrize("frame", [row[1] for row in SILENT], ids=[row[0] for row in SILENT])
def test_on_the_uplink_there_is_no_answer_to(owner, frame):
    assert owner.stage(arp, [frame], w.UPLINK)[0].reason == Reason.ARP_NOT_OWNER


def test_an_address_that_was_given_up_is_not_answered_any_more(owner):
    owner.route(f"{BALANCER}/32", Route(Kind.SERVICE))
    assert asked(owner, BALANCER, w.UPLINK, **LAN).reason == Reason.ARP_NOT_OWNER


def test_on_an_interface_of_our_own_the_nodes_address_is_answered_and_defended(world):
    world.route(f"{w.NODE}/32", Route(Kind.LOCAL, flags=ANNOUNCED))
    assert asked(world, w.NODE, w.UPLINK, **LAN).frame == lan_reply(w.NODE)
    assert asked(world, w.NODE, w.UPLINK, sender=NOBODY, mac=w.LAN_MAC).frame == lan_reply(w.NODE, NOBODY)
    assert asked(world, GATEWAY, w.UPLINK, **LAN).reason == Reason.ARP_NOT_OWNER


@pytest.mark.parametrize("until", [0, 1 << 62])
def test_an_address_that_may_move_is_answered_while_the_node_knows_that_it_is_the_owner(owner, until):
    owner.tables.settings[b.ANNOUNCE_UNTIL] = until
    assert asked(owner, BALANCER, w.UPLINK, **LAN).reason == Reason.ARP_ANSWERED


def test_when_that_time_is_over_only_the_nodes_own_address_is_answered(owner):
    owner.route(f"{w.NODE}/32", Route(Kind.LOCAL, flags=ANNOUNCED))
    owner.tables.settings[b.ANNOUNCE_UNTIL] = owner.now
    assert asked(owner, BALANCER, w.UPLINK, **LAN).reason == Reason.ARP_NOT_OWNER
    assert asked(owner, w.NODE, w.UPLINK, **LAN).reason == Reason.ARP_ANSWERED
    owner.tables.settings[b.ANNOUNCE_UNTIL] = owner.now + 1
    assert asked(owner, BALANCER, w.UPLINK, **LAN).reason == Reason.ARP_ANSWERED


KNOWN = [
    ("a reachable neighbor", State.REACHABLE, LOCK_NS, (OTHER_MAC, State.STALE)),
    ("a neighbor that is being probed", State.PROBE, LOCK_NS, (OTHER_MAC, State.STALE)),
    ("a neighbor that has changed just now", State.REACHABLE, LOCK_NS - 1, (w.LAN_MAC, State.REACHABLE)),
    ("a neighbor without a MAC", State.INCOMPLETE, LOCK_NS, (w.LAN_MAC, State.INCOMPLETE)),
    ("a permanent one", State.PERMANENT, LOCK_NS, (w.LAN_MAC, State.PERMANENT)),
]


@pytest.mark.parametrize(("state", "age", "expected"), [row[1:] for row in KNOWN], ids=[row[0] for row in KNOWN])
def test_an_answered_request_with_another_mac_updates(owner, state, age, expected):
    row = owner.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC, state)
    owner.tables.neighbours.records["updated_ns"][row] = owner.now - age
    assert asked(owner, BALANCER, w.UPLINK, sender=w.LAN_GATEWAY, mac=OTHER_MAC).reason == Reason.ARP_ANSWERED
    entry = owner.tables.neighbours.records[row]
    assert (int(entry["mac"]), State(int(entry["state"]))) == (parse_mac(expected[0]), expected[1])


MODULE = World()
