"""Flows while the services under them change: UDP moves at once, TCP is drained, nothing leaves untranslated.

    ext 192.0.2.100 ── br0 ── eth0 192.0.2.11 [ node1 ] ── client 10.244.1.10
                              dp0                       ── s1, s2, s3 10.244.1.20, .30, .40

A socket is kept open and asked again after each change; no question is repeated, so each answer is that of one packet.
"""

import socket
import time
from collections import Counter
from contextlib import ExitStack

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from tests.netns.harness import Namespace, Network, eventually
from tests.netns.ours import assert_balanced
from tests.netns.services import (
    BALANCING,
    HTTP,
    Cluster,
    both,
    e2e,
    make_cluster,
    port,
    serve,
    service,
    unready,
)
from tests.netns.sockets import (
    ABORT,
    SILENCE,
    ask_tcp,
    ask_udp,
    connected,
    exchange,
    inject,
    is_refused,
    names,
    post,
    sniffer,
    udp_socket,
)

pytestmark = pytest.mark.netns

CLIENT, S1, S2, S3 = "10.244.1.10", "10.244.1.20", "10.244.1.30", "10.244.1.40"
NODE = "192.0.2.11"
OTHER = 8090
SOON = 0.5  # a SYN that is lost is sent again after 1 s
SHORT = {"ipvs": {"udpTimeout": "1s"}, "conntrack": {"udpTimeout": "1s", "udpStreamTimeout": "1s"}}


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    pods = {"client": CLIENT, "s1": S1, "s2": S2, "s3": S3}
    made = make_cluster(network, [pods], balancing={**BALANCING, **SHORT})
    serve(made.pods["s1"].namespace, "other", f"udp:{OTHER}", f"tcp:{OTHER}")
    return made


@pytest.fixture(autouse=True)
def _balanced(cluster: Cluster):
    yield
    assert_balanced(cluster.node)


# --- UDP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "what"),
    [
        pytest.param("client", "vip", marks=e2e(
            "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service", "conntrack.go")),
        pytest.param("node", "vip", marks=e2e(
            "should be able to preserve UDP traffic when server pod cycles for a ClusterIP service and client is "
            "hostNetwork", "conntrack.go")),
        pytest.param("ext", "node port", marks=e2e(
            "should be able to preserve UDP traffic when server pod cycles for a NodePort service", "conntrack.go")),
    ],
)  # fmt: skip
def test_udp_goes_on_when_its_server_is_replaced(cluster, spot, who, what):
    where = cluster.where(who)
    target = (spot.vip, 80) if what == "vip" else (NODE, spot.node_port)
    ports = [port(80, protocol="udp", node=spot.node_port)]
    with cluster.use(service("web", spot.vip, ports, [S1])), udp_socket(where, 12345) as flow:
        for name, address in (("s1", S1), ("s2", S2), ("s3", S3), ("s1", S1)):
            cluster.set(service("web", spot.vip, ports, [address]))
            for _ in range(3):
                assert exchange(flow, target).name == name


@e2e("should be able to preserve UDP traffic when initial unready endpoints get ready", "conntrack.go")
def test_udp_finds_endpoints_that_get_ready(cluster, client, spot):
    with cluster.use(service("web", spot.vip, both(80), [unready(S1)])), udp_socket(client, 12346) as flow:
        with pytest.raises(ConnectionRefusedError):
            exchange(flow, (spot.vip, 80))
        cluster.set(service("web", spot.vip, both(80), [S1]))
        assert exchange(flow, (spot.vip, 80)).name == "s1"
        cluster.set(service("web", spot.vip, both(80), []))
        with pytest.raises(ConnectionRefusedError):
            exchange(flow, (spot.vip, 80))


@e2e(
    "should be able to cleanup conntrack entries when UDP service target port changes for a NodePort service",
    "conntrack.go",
)
def test_udp_follows_a_target_port(cluster, spot):
    ports = [port(80, protocol="udp", node=spot.node_port)]
    moved = [port(80, OTHER, "udp", node=spot.node_port)]
    with cluster.use(service("web", spot.vip, ports, [S1])), udp_socket(cluster.ext, 12347) as flow:
        assert exchange(flow, (NODE, spot.node_port)).name == "s1"
        cluster.set(service("web", spot.vip, moved, [S1]))
        assert exchange(flow, (NODE, spot.node_port)).name == "other"


def test_udp_stays_with_its_server_while_others_come_and_go(cluster, client, spot):
    with cluster.use(service("web", spot.vip, both(80), [S1])), udp_socket(client) as flow:
        for endpoints in ([S1], [S1, S2], [S1, S2, S3], [S1, S3]):
            cluster.set(service("web", spot.vip, both(80), endpoints))
            assert exchange(flow, (spot.vip, 80)).name == "s1"


def test_a_backend_that_does_not_listen_refuses_in_the_services_name(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80, 9, "udp")], [S1])), udp_socket(client) as flow:
        with pytest.raises(ConnectionRefusedError):
            exchange(flow, (spot.vip, 80))
        cluster.set(service("web", spot.vip, both(80), [S1]))
        assert exchange(flow, (spot.vip, 80)).name == "s1"


# --- TCP -------------------------------------------------------------------------------------------------------------


def test_a_connection_outlives_the_endpoint_that_new_ones_avoid(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [S1])), connected(client, spot.vip, 80) as open_one:
        assert post(open_one).name == "s1"
        cluster.set(service("web", spot.vip, [port(80)], [S2]))
        assert names(client, "tcp", (spot.vip, 80), 3) == ["s2"] * 3
        for size in (1, 100_000):
            assert post(open_one, bytes(size)).name == "s1"


def test_a_drained_endpoint_keeps_what_it_has(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [S1, S2])):
        with connected(client, spot.vip, 80) as first, connected(client, spot.vip, 80) as second:
            held = {post(each).name: each for each in (first, second)}
            assert set(held) == {"s1", "s2"}
            cluster.node.cli("endpoint", "drain", "default/web", S1)
            assert names(client, "tcp", (spot.vip, 80), 3) == ["s2"] * 3
            assert post(held["s1"]).name == "s1"
        cluster.node.cli("endpoint", "add", "default/web", S1)
        assert set(names(client, "tcp", (spot.vip, 80), 4)) == {"s1", "s2"}


def test_a_drained_endpoint_goes_with_its_last_connection(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [S1])):
        with connected(client, spot.vip, 80) as open_one:
            assert post(open_one).name == "s1"
            cluster.set(service("web", spot.vip, [port(80)], [S2]))
            assert endpoints(cluster, spot.vip) == {f"{S1}:{HTTP}": "draining", f"{S2}:{HTTP}": "ready"}
            open_one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)  # RST: 10 s, where FIN would take 120
        eventually(lambda: endpoints(cluster, spot.vip) == {f"{S2}:{HTTP}": "ready"}, timeout=20)


def test_the_connections_of_an_endpoint_that_is_gone_end_with_the_drain_timeout(cluster, client, spot):
    with (
        cluster.use(service("web", spot.vip, [port(80)], [S1], drainTimeout="1s")),
        connected(client, spot.vip, 80) as open_one,
    ):
        assert post(open_one).name == "s1"
        cluster.set(service("web", spot.vip, [port(80)], [S2], drainTimeout="1s"))
        assert post(open_one).name == "s1"
        eventually(lambda: endpoints(cluster, spot.vip) == {f"{S2}:{HTTP}": "ready"})
        open_one.settimeout(SILENCE)
        with pytest.raises((ConnectionResetError, TimeoutError)):
            post(open_one)


def endpoints(cluster: Cluster, vip: str) -> dict[str, str]:
    found = [each for each in cluster.rows("endpoints") if each["virtual_address"] == vip]
    return {f"{each['address']}:{each['port']}": each["state"] for each in found}


def test_a_reused_client_port_is_scheduled_again_at_once(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [S1, S2, S3])):
        took, served = [], Counter[str]()
        for _ in range(9):
            start = time.monotonic()
            served[ask_tcp(client, spot.vip, 80, source=12348).name] += 1
            took.append(time.monotonic() - start)
        assert served == {"s1": 3, "s2": 3, "s3": 3}
        assert max(took) < SOON, took


def test_a_reused_client_port_leaves_a_drained_endpoint_at_once(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [S1])):
        assert ask_tcp(client, spot.vip, 80, source=12349).name == "s1"
        cluster.set(service("web", spot.vip, [port(80)], [S2]))
        start = time.monotonic()
        assert ask_tcp(client, spot.vip, 80, source=12349).name == "s2"
        assert time.monotonic() - start < SOON


# --- session affinity ends -------------------------------------------------------------------------------------------


@e2e("should have session affinity timeout work for service with type clusterIP")
@e2e("should have session affinity timeout work for NodePort service")
def test_affinity_ends_with_its_timeout(cluster, client):
    """Each kind of address and protocol at once, since it takes its time."""
    keys = {"sessionAffinity": "ClientIP", "sessionAffinityTimeout": "2s"}
    cases: list[tuple[Namespace, str, tuple[str, int], list[str]]] = []
    with ExitStack() as stack:
        for protocol in ("tcp", "udp"):
            for where in (client, cluster.ext):
                spot = cluster.spot()
                ports = both(80, spot.node_port)
                stack.enter_context(cluster.use(service(f"web{len(cases)}", spot.vip, ports, [S1, S2, S3], **keys)))
                target = (spot.vip, 80) if where is client else (NODE, spot.node_port)
                cases.append((where, protocol, target, names(where, protocol, target, 5)))
        assert [len(set(first)) for *_, first in cases] == [1, 1, 1, 1]
        assert len(templates(cluster)) == 4
        for _, protocol, (address, _), _ in cases:
            if (
                protocol == "tcp"
            ):  # a connection in TIME_WAIT keeps its client's affinity for 2 minutes, as ip_vs has it
                cluster.forget(address)
        eventually(lambda: templates(cluster) == [], timeout=10)
        for where, protocol, target, first in cases:
            assert names(where, protocol, target, 1) != first[:1]  # rr goes on to the next


def templates(cluster: Cluster) -> list[str]:
    return [each["backend"] for each in cluster.rows("persistence") if each["service"].startswith("default/web")]


# --- packets that belong to nothing ----------------------------------------------------------------------------------


STRANGE = {
    "data before the window": {"flags": "PA", "seq": -100_000},
    "data beyond the window": {"flags": "PA", "seq": 1 << 30},
    "an acknowledgment of what was not sent": {"flags": "A", "ack": 1 << 30},
    "a reset out of the window": {"flags": "R", "seq": 1 << 30},
    "flags that no segment has": {"flags": "SF"},
    "no flags": {"flags": 0},
    "every flag": {"flags": "FSRPAU"},
}


@e2e("should drop INVALID conntrack entries", "conntrack.go")
@e2e("proxy implementation should not be vulnerable to the invalid conntrack state bug", "conntrack.go")
@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("who", ["client", "ext"])
def test_a_strange_segment_of_the_server_is_not_seen_untranslated(cluster, spot, who, strange):
    where = cluster.where(who)
    server = cluster.pods["s1"].namespace
    target = (spot.vip, 80) if who == "client" else (NODE, spot.node_port)
    with (
        cluster.use(service("web", spot.vip, [port(80, node=spot.node_port)], [S1])),
        sniffer(server, "eth0") as sent,
        sniffer(where, "eth0") as received,
        connected(where, *target) as connection,
    ):
        post(connection)
        last = [packet for packet in map(Ether, sent()) if TCP in packet and packet[TCP].sport == HTTP][-1]
        bad = TCP(
            sport=HTTP, dport=last[TCP].dport, flags=strange["flags"],
            seq=(last[TCP].seq + len(last[TCP].payload) + strange.get("seq", 0)) % 2**32,
            ack=(last[TCP].ack + strange.get("ack", 0)) % 2**32,
        )  # fmt: skip
        inject(server, bytes(IP(src=S1, dst=last[IP].dst) / bad / b"boom"))
        for size in (1, 10_000):
            assert post(connection, bytes(size)).name == "s1"
        packets = [packet for packet in map(Ether, received()) if TCP in packet]
        assert [packet.summary() for packet in packets if S1 in (packet[IP].src, packet[IP].dst)] == []
        assert [packet.summary() for packet in packets if packet[TCP].flags.R and packet[IP].dst == target[0]] == []


def test_what_a_service_does_not_know_is_not_let_in(cluster, client, spot):
    """An ACK to a service without a connection cannot begin one; the client is not answered by a pod's address."""
    with (
        cluster.use(service("web", spot.vip, [port(80)], [S1])),
        sniffer(client, "eth0") as received,
    ):
        stray = TCP(sport=12350, dport=80, flags="A", seq=1, ack=1)
        inject(client, bytes(IP(src=CLIENT, dst=spot.vip) / stray))
        assert ask_tcp(client, spot.vip, 80).name == "s1"
        assert ask_udp(client, S1, OTHER).name == "other"
        assert not is_refused(client, "tcp", spot.vip, 80)
        packets = [packet for packet in map(Ether, received()) if TCP in packet]
        assert [packet.summary() for packet in packets if S1 in (packet[IP].src, packet[IP].dst)] == []
