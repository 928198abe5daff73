"""route: each kind of route, and what stands between a packet and its next hop: TTL, MTU, link address."""

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, IPOption_RR
from scapy.layers.inet6 import UDP, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.devices.memory import Vnet
from dataplane.stages.route import route
from dataplane.tables.neighbour import State
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason, Verdict
from tests import world as w
from tests.frames import fragments, lan_frame, patched, ping, pod_frame, recomputed, tcp, tunneled, udp
from tests.world import World

V6_A, V6_B = "2001:db8::a", "2001:db8::b"


@pytest.fixture
def world():
    return World()


def routed(world, ip, iif=w.POD_A, vnet=None):
    return world.stage(route, [pod_frame(ip)], iif, [vnet] if vnet else ())[0]


KINDS = [
    ("a pod of the node", w.IP_B, Reason.ACCEPTED, w.POD_B),
    ("the pod itself", w.IP_A, Reason.ACCEPTED, w.POD_A),
    ("the node", w.NODE, Reason.LOCAL_DELIVERY, 0),
    ("a remote pod", w.IP_REMOTE, Reason.ACCEPTED, w.UNDERLAY),
    ("a pod of a node whose VTEP is not known", w.IP_LOST, Reason.TUNNEL_NO_VTEP, 0),
    ("a station of the LAN", w.PEER, Reason.NEIGH_RESOLVE, w.UPLINK),
    ("the world", w.OUTSIDE, Reason.NEIGH_RESOLVE, w.UPLINK),
    ("a free address of the block", w.IP_FREE, Reason.ROUTE_BLACKHOLE, 0),
    ("an unreachable prefix", "203.0.113.9", Reason.ROUTE_UNREACHABLE, 0),
    ("nowhere", "8.8.8.8", Reason.ROUTE_NONE, 0),
]
OWING = {Reason.IP_TTL, Reason.MTU_DF, Reason.ROUTE_NONE, Reason.ROUTE_UNREACHABLE}


@pytest.mark.parametrize(("target", "reason", "oif"), [row[1:] for row in KINDS], ids=[row[0] for row in KINDS])
def test_a_packet_to(world, target, reason, oif):
    outcome = routed(world, udp(target))
    assert (outcome.verdict, outcome.reason, outcome.oif) == (reason.verdict, reason, oif)
    assert bool(outcome.record["flags"] & b.OWES_ERROR) == (reason in OWING)


def test_a_pods_frame_gets_the_links_addresses_and_loses_one_hop(world):
    outcome = routed(world, udp(w.IP_B, ttl=64))
    expected = Ether(src=w.GATEWAY_MAC, dst=w.MAC_B) / udp(w.IP_B, ttl=63)
    assert outcome.frame == bytes(expected)


def test_a_neighbors_frame_gets_the_uplinks_and_its_own_address(world):
    row = world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC)
    outcome = routed(world, udp(w.OUTSIDE))
    assert outcome.frame == bytes(Ether(src=w.UPLINK_MAC, dst=w.LAN_MAC) / udp(w.OUTSIDE, ttl=63))
    assert world.tables.neighbours.records["used_ns"][row] == world.now


def test_a_remote_pods_packet_is_left_to_the_tunnel(world):
    outcome = routed(world, udp(w.IP_REMOTE))
    assert outcome.record["vtep"] == world.peer
    assert outcome.frame[14:] == bytes(udp(w.IP_REMOTE, ttl=63))


NEXT_HOPS = [("on the link", w.PEER, w.PEER), ("behind the gateway", w.OUTSIDE, w.LAN_GATEWAY)]


@pytest.mark.parametrize(("target", "hop"), [row[1:] for row in NEXT_HOPS], ids=[row[0] for row in NEXT_HOPS])
def test_the_next_hop_is_asked_for(world, target, hop):
    outcome = routed(world, udp(target))
    assert int(outcome.record["next_lo"]) == int(ip_address(hop)) | b.V4_PREFIX
    assert outcome.record["next_hi"] == 0


STATES = [
    (State.NONE, False),
    (State.INCOMPLETE, False),
    (State.REACHABLE, True),
    (State.STALE, True),
    (State.DELAY, True),
    (State.PROBE, True),
    (State.FAILED, False),
    (State.PERMANENT, True),
]


@pytest.mark.parametrize(("state", "usable"), STATES, ids=lambda value: getattr(value, "name", str(value)))
def test_a_neighbor_is_used_while_its_address_is_valid(world, state, usable):
    world.neighbour(w.UPLINK, w.LAN_GATEWAY, w.LAN_MAC, state)
    assert routed(world, udp(w.OUTSIDE)).verdict == (Verdict.ACCEPT if usable else Verdict.QUEUE)


def test_a_neighbor_of_another_interface_is_not_used(world):
    world.neighbour(w.UNDERLAY, w.LAN_GATEWAY, w.LAN_MAC)
    assert routed(world, udp(w.OUTSIDE)).reason == Reason.NEIGH_RESOLVE


def test_the_longest_prefix_wins(world):
    for prefix, kind in (("0.0.0.0/0", Kind.UNREACHABLE), ("10.0.0.0/8", Kind.BLACKHOLE)):
        world.route(prefix, Route(kind))
    assert routed(world, udp("8.8.8.8")).reason == Reason.ROUTE_UNREACHABLE
    assert routed(world, udp("10.1.2.3")).reason == Reason.ROUTE_BLACKHOLE
    assert routed(world, udp(w.IP_B)).verdict == Verdict.ACCEPT
    assert routed(world, udp(w.IP_REMOTE)).verdict == Verdict.ACCEPT


# --- TTL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [0, 1])
@pytest.mark.parametrize("target", [w.IP_B, w.IP_REMOTE, w.IP_LOST, w.OUTSIDE])
def test_a_packet_without_hops_left_is_dropped_and_its_sender_told(world, ttl, target):
    outcome = routed(world, udp(target, ttl=ttl))
    assert outcome.reason == Reason.IP_TTL
    assert outcome.record["flags"] & b.OWES_ERROR
    assert outcome.frame == bytes(pod_frame(udp(target, ttl=ttl)))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (w.NODE, Reason.LOCAL_DELIVERY),
        (w.IP_FREE, Reason.ROUTE_BLACKHOLE),
        ("203.0.113.9", Reason.ROUTE_UNREACHABLE),
        ("8.8.8.8", Reason.ROUTE_NONE),
    ],
)
def test_the_route_is_asked_before_the_ttl(world, target, reason):
    assert routed(world, udp(target, ttl=1)).reason == reason


@settings(max_examples=120)
@given(
    st.integers(2, 255), st.integers(0, 255), st.integers(0, 0xFFFF), st.sampled_from([6, 17, 1, 255]), st.booleans()
)
def test_the_header_checksum_follows_the_ttl(ttl, tos, name, protocol, options):
    extra = [IPOption_RR(routers=["0.0.0.0"] * 3)] if options else []
    ip = IP(src=w.IP_A, dst=w.IP_B, ttl=ttl, tos=tos, id=name, proto=protocol, options=extra) / Raw(b"12345678")
    frame = routed(WORLD, ip).frame
    assert frame == recomputed(frame, (IP,))
    assert IP(frame[14:]).ttl == ttl - 1


def test_a_wrong_transport_checksum_stays_wrong_by_as_much(world):
    frame = patched(pod_frame(tcp(w.IP_B)), 50, b"\xde\xad")
    assert world.stage(route, [frame], w.POD_A)[0].frame[50:52] == b"\xde\xad"


def test_ipv6_loses_a_hop_and_has_no_header_checksum(world):
    world.route(f"{V6_B}/128", Route(Kind.POD, w.POD_B))
    packet = IPv6(src=V6_A, dst=V6_B, hlim=9) / UDP(sport=1, dport=2) / Raw(b"x")
    outcome = world.stage(route, [pod_frame(packet)], w.POD_A)[0]
    packet.hlim = 8
    assert outcome.frame == bytes(Ether(src=w.GATEWAY_MAC, dst=w.MAC_B) / packet)


def test_what_the_node_makes_keeps_its_ttl(world):
    count = world.load([pod_frame(udp(w.IP_B, ttl=1))], 0, flags=b.INJECTED)
    outcome = world.run([pod_frame(udp(w.IP_B, ttl=1))], 0, flags=b.INJECTED)[count - 1]
    assert (outcome.verdict, IP(outcome.frame[14:]).ttl) == (Verdict.ACCEPT, 1)


# --- MTU -------------------------------------------------------------------------------------------------------------


def sized(target, total, **fields):
    """An IP packet of ``total`` bytes."""
    return udp(target, size=total - 28, **fields)


SIZES = [(w.POD_MTU, True), (w.POD_MTU + 1, False), (w.POD_MTU + 1000, False)]


@pytest.mark.parametrize(("total", "fits"), SIZES)
@pytest.mark.parametrize("target", [w.IP_B, w.IP_REMOTE], ids=["pod", "tunnel"])
def test_df_and_a_packet_larger_than_the_next_link(world, total, fits, target):
    outcome = routed(world, sized(target, total, flags="DF"))
    assert outcome.reason == (Reason.ACCEPTED if fits else Reason.MTU_DF)
    assert outcome.record["mtu"] == w.POD_MTU
    if not fits:
        assert outcome.record["flags"] & b.OWES_ERROR
        assert (outcome.oif, outcome.record["vtep"]) == (0, -1)
        assert outcome.frame == bytes(pod_frame(sized(target, total, flags="DF")))


@pytest.mark.parametrize(("total", "fits"), SIZES)
def test_without_df_a_packet_may_be_cut(world, total, fits):
    outcome = routed(world, sized(w.IP_B, total))
    assert (outcome.verdict, outcome.record["mtu"]) == (Verdict.ACCEPT, w.POD_MTU)


def test_a_routes_own_mtu_is_smaller(world):
    world.route(f"{w.IP_B}/32", Route(Kind.POD, w.POD_B, mtu=1280))
    outcome = routed(world, sized(w.IP_B, 1281, flags="DF"))
    assert (outcome.reason, outcome.record["mtu"]) == (Reason.MTU_DF, 1280)
    assert routed(world, sized(w.IP_B, 1280, flags="DF")).verdict == Verdict.ACCEPT


def test_padding_does_not_count(world):
    frame = bytes(pod_frame(sized(w.IP_B, w.POD_MTU, flags="DF"))) + bytes(20)
    assert world.stage(route, [frame], w.POD_A)[0].verdict == Verdict.ACCEPT


REASSEMBLED = [
    ("pieces that fit, with DF", 1000, 2, Reason.ACCEPTED),
    ("pieces that fit", 1000, 0, Reason.ACCEPTED),
    ("pieces that do not fit, with DF", 1448, 2, Reason.MTU_DF),
    ("pieces that do not fit", 1448, 0, Reason.ACCEPTED),
]


@pytest.mark.parametrize(("size", "df", "reason"), [r[1:] for r in REASSEMBLED], ids=[r[0] for r in REASSEMBLED])
def test_a_datagram_that_came_in(world, size, df, reason):
    """Linux's ip_exceeds_mtu: with DF it may be cut again, into pieces no larger than those that came."""
    pieces = fragments(udp(w.IP_B, size=4000), size)
    for piece in pieces:
        piece.flags = int(piece.flags) | df
        del piece.chksum
    assert world.run([pod_frame(piece) for piece in pieces], w.POD_A)[-1].reason == reason


@pytest.mark.parametrize("iif", [w.UPLINK, w.UNDERLAY])
def test_mtu_is_the_egress_links_whoever_sent(world, iif):
    ip = sized(w.IP_A, 1460, src=w.IP_REMOTE, flags="DF")
    frame = lan_frame(ip) if iif == w.UPLINK else tunneled(ip)
    assert world.one(frame, iif).reason == Reason.MTU_DF


# --- super-frames ----------------------------------------------------------------------------------------------------

GSO = [
    ("segments that fit", tcp, b.GSO_TCPV4, w.POD_MTU - 40, "DF", Reason.ACCEPTED, w.POD_MTU - 40),
    ("segments too large, with DF", tcp, b.GSO_TCPV4, w.POD_MTU - 39, "DF", Reason.MTU_DF, w.POD_MTU - 39),
    ("segments too large", tcp, b.GSO_TCPV4, w.POD_MTU - 39, 0, Reason.ACCEPTED, w.POD_MTU - 40),
    ("segments with congestion marks", tcp, b.GSO_TCPV4 | b.GSO_ECN, 1460, 0, Reason.ACCEPTED, w.POD_MTU - 40),
    ("datagrams that fit", udp, b.GSO_UDP_L4, w.POD_MTU - 28, "DF", Reason.ACCEPTED, w.POD_MTU - 28),
    ("datagrams too large, with DF", udp, b.GSO_UDP_L4, w.POD_MTU - 27, "DF", Reason.MTU_DF, w.POD_MTU - 27),
]


@pytest.mark.parametrize(
    ("make", "kind", "size", "df", "reason", "cut"), [row[1:] for row in GSO], ids=[row[0] for row in GSO]
)
@pytest.mark.parametrize("target", [w.IP_B, w.IP_REMOTE], ids=["pod", "tunnel"])
def test_a_super_frame_of(world, make, kind, size, df, reason, cut, target):
    ip = make(target, size=9000)
    ip.flags = df
    outcome = routed(world, ip, vnet=Vnet(b.NEEDS_CSUM, kind, 54, size, 34, 16 if make is tcp else 6))
    assert outcome.reason == reason
    assert outcome.record["gso_size"] == cut


def test_datagrams_of_a_super_frame_keep_their_boundaries(world):
    """They cannot be cut smaller as TCP can; each that is too large is to be fragmented."""
    ip = udp(w.IP_B, size=9000)
    vnet = Vnet(b.NEEDS_CSUM, b.GSO_UDP_L4, 42, w.POD_MTU, 34, 6)
    outcome = routed(world, ip, vnet=vnet)
    assert (outcome.verdict, outcome.record["gso_size"]) == (Verdict.ACCEPT, w.POD_MTU)


def test_other_rows_are_untouched(world):
    world.load([pod_frame(udp(w.IP_B))], w.POD_A)
    world.batch.packets["verdict"][0] = Verdict.STOLEN
    before = world.batch.packets[0].copy(), world.batch.data[: b.SMALL_STRIDE].copy()
    route(world.batch.arrays, 1, world.tables.arrays, world.now)
    assert world.batch.packets[0] == before[0]
    assert (world.batch.data[: b.SMALL_STRIDE] == before[1]).all()


def test_a_ping_to_the_node_keeps_its_ttl_for_the_reply(world):
    outcome = routed(world, ping(w.NODE, ttl=1))
    assert (outcome.reason, outcome.frame) == (Reason.LOCAL_DELIVERY, bytes(pod_frame(ping(w.NODE, ttl=1))))


WORLD = World()
