"""What the kernel's selftests assert of conntrack, NAT and ip_vs, asserted of our node in their router's place.

    pod1 10.244.1.10 ──┐                              ┌── ext 192.0.2.100
    pod2 10.244.1.20 ──┴─ [ node1 ] 192.0.2.11 ── br0 ┴── 192.0.2.1 [ router ] 198.51.100.1 ── 198.51.100.2 server
                                                                          MTU 1280

The files are those of tools/testing/selftests/net/netfilter; what they do is described at each test. The router's MTU
is that of its own interface only: the server's link has 1500, so that it is the router who finds a packet too large.
"""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Ether

from dataplane.control import client
from tests.netns import checks
from tests.netns.harness import Namespace, Network, Node, eventually
from tests.netns.ours import assert_balanced, drops
from tests.netns.services import (
    ALIAS,
    EXT,
    HTTP,
    UDP_PORT,
    VIPS,
    Cluster,
    Pod,
    both,
    make_cluster,
    port,
    selftest,
    serve,
    service,
)
from tests.netns.sockets import (
    ASK,
    ask_tcp,
    connected,
    exchange,
    inject,
    is_silent,
    post,
    sniffer,
    tcp_socket,
    udp_socket,
)

pytestmark = pytest.mark.netns

POD1, POD2, NODE = "10.244.1.10", "10.244.1.20", "192.0.2.11"
ROUTER, SERVER = "192.0.2.1", "198.51.100.2"
NARROW = 1280
LOCAL = {"externalTrafficPolicy": "Local"}
EVERY = ["tcp", "udp"]


@pytest.fixture(scope="module")
def router(network: Network) -> Namespace:
    return network.namespace("router", forward=True)


@pytest.fixture(scope="module")
def server(network: Network, router: Namespace) -> Namespace:
    made = network.namespace("server")
    network.wire((router, "eth1"), (made, "eth0"))
    router.ip("address", "add", "198.51.100.1/24", "dev", "eth1")
    router.ip("link", "set", "eth1", "mtu", NARROW)
    made.ip("address", "add", f"{SERVER}/24", "dev", "eth0")
    made.ip("route", "add", "default", "via", "198.51.100.1")
    serve(made, "server", f"tcp:{HTTP}", f"udp:{UDP_PORT}")
    return made


@pytest.fixture(scope="module")
def cluster(network: Network, router: Namespace, server: Namespace) -> Cluster:
    made = make_cluster(
        network, [{"pod1": POD1, "pod2": POD2}], shared=False, others=[(router, f"{ROUTER}/24")], gateway=ROUTER
    )  # fmt: skip
    for prefix in VIPS:
        router.ip("route", "add", prefix, "via", NODE)
    return made


@pytest.fixture(autouse=True)
def _balanced(cluster: Cluster):
    yield
    assert_balanced(cluster.node)


@pytest.fixture
def pod1(cluster: Cluster) -> Pod:
    return cluster.pods["pod1"]


@pytest.fixture
def pod2(cluster: Cluster) -> Pod:
    return cluster.pods["pod2"]


# --- ipvs.sh ---------------------------------------------------------------------------------------------------------


@selftest("NAT: a file passes the director unchanged", "ipvs.sh")
@pytest.mark.parametrize("policy", [{}, LOCAL], ids=["masqueraded", "source kept"])
def test_a_transfer_through_the_director_is_byte_exact(cluster, spot, pod1, policy):
    """ns0 is the client, ns1 the director (ours), ns2 the real server; a file goes through, its digest is compared."""
    ports = [port(checks.PORT, checks.PORT)]
    with cluster.use(service("file", spot.vip, ports, [POD1], loadBalancerIPs=[spot.external], **policy)):
        checks.tcp(cluster.ext, pod1.namespace, spot.external, 20_000_000)


# --- nft_nat.sh ------------------------------------------------------------------------------------------------------


@selftest("local dnat", "nft_nat.sh")
@pytest.mark.parametrize("protocol", EVERY)
def test_what_the_router_itself_sends_is_translated(cluster, spot, protocol):
    """Without the rule the address is not there, with it another host answers in its name, and then again not."""
    assert is_silent(cluster.host, protocol, spot.vip, 80)
    with cluster.use(service("web", spot.vip, both(80), [POD1])):
        answer = ASK[protocol](cluster.host, spot.vip, 80)
        assert (answer.name, answer.peer) == ("pod1", (spot.vip, 80))
    assert is_silent(cluster.host, protocol, spot.vip, 80)


@selftest("local dnat, port only", "nft_nat.sh")
def test_only_the_port_is_translated(cluster, spot):
    with cluster.use(service("web", spot.vip, [port(ALIAS, HTTP, node=spot.node_port)], [POD1])):
        assert ask_tcp(cluster.host, spot.vip, ALIAS).peer == (spot.vip, ALIAS)
        assert ask_tcp(cluster.host, NODE, spot.node_port).peer == (NODE, spot.node_port)


@selftest("masquerade", "nft_nat.sh")
def test_pods_are_masqueraded_outside(cluster, server, pod1, pod2):
    """The server sees the router only; both hosts behind it get their own answers."""
    with sniffer(server, "eth0") as seen:
        for pod in (pod1, pod2):
            checks.ping(pod.namespace, SERVER, count=3)
            for protocol, number in (("tcp", HTTP), ("udp", UDP_PORT)):
                answer = ASK[protocol](pod.namespace, SERVER, number)
                assert (answer.name, answer.seen[0], answer.peer) == ("server", NODE, (SERVER, number))
        packets = [packet[IP] for packet in map(Ether, seen()) if IP in packet]
    assert {packet.src for packet in packets} == {NODE, SERVER}


@selftest("masquerade of two hosts with the same ICMP id", "nft_nat.sh")
def test_pings_with_the_same_id_are_told_apart(cluster, pod1, pod2):
    running = [pod.namespace.spawn("ping", "-n", "-c", 20, "-i", 0.01, "-W", 1, "-e", 4711, SERVER)
               for pod in (pod1, pod2)]  # fmt: skip
    for each in running:
        assert each.wait() == 0, each.output
        assert "20 packets transmitted, 20 received, 0% packet loss" in each.output, each.output


@pytest.fixture
def keeps_ports(cluster: Cluster) -> Iterator[None]:
    """Masquerade that keeps the source port when it is free."""
    with configured(cluster.node, "natRandomFully = false"):
        yield


@contextmanager
def configured(node: Node, line: str) -> Iterator[None]:
    """Have one more key in [pods]."""
    before = node.config.read_text()
    node.write(before.replace("[pods]\n", f"[pods]\n{line}\n", 1))
    client.reload(node.socket)
    try:
        yield
    finally:
        node.write(before)
        client.reload(node.socket)


@selftest("masquerade keeps a free source port", "nft_nat.sh")
@pytest.mark.usefixtures("keeps_ports")
@pytest.mark.parametrize(("protocol", "number"), [("tcp", HTTP), ("udp", UDP_PORT)])
def test_a_free_source_port_is_kept(cluster, pod1, protocol, number):
    assert ASK[protocol](pod1.namespace, SERVER, number, source=20001).seen == (NODE, 20001)


@selftest("masquerade fully-random", "nft_nat.sh")
@pytest.mark.parametrize(("protocol", "number"), [("tcp", HTTP), ("udp", UDP_PORT)])
def test_a_random_source_port_is_taken_on_demand(cluster, pod1, protocol, number):
    answers = [ASK[protocol](pod1.namespace, SERVER, number, source=20002 + n) for n in range(4)]
    assert {answer.seen[0] for answer in answers} == {NODE}
    assert not all(answer.port_kept for answer in answers)


@selftest("masquerade: the second attempt reuses the state of the first", "nft_nat.sh")
def test_a_second_packet_has_the_port_of_the_first(cluster, pod1):
    with udp_socket(pod1.namespace, 20010) as flow, connected(pod1.namespace, SERVER, HTTP, source=20010) as stream:
        assert len({exchange(flow, (SERVER, UDP_PORT)).seen for _ in range(5)}) == 1
        assert len({post(stream).seen for _ in range(5)}) == 1
    start = time.monotonic()
    assert ask_tcp(pod1.namespace, SERVER, HTTP, source=20010).seen[0] == NODE
    assert time.monotonic() - start < 0.5  # a segment that is lost is sent again after 1 s


@selftest("port shadow, with random ports", "nft_nat.sh")
def test_a_pod_cannot_shadow_a_node_port(cluster, spot, pod1):
    """A host behind the router sends from a service's port to where a client of the service will send from."""
    with (
        cluster.use(service("web", spot.vip, both(80, spot.node_port), [POD2])),
        udp_socket(cluster.ext, 20020) as victim,
        udp_socket(pod1.namespace, spot.node_port) as shadow,
    ):
        shadow.sendto(b"shadow", (EXT, 20020))
        content, (address, number) = victim.recvfrom(100)
        assert (content, address) == (b"shadow", NODE)
        assert number != spot.node_port
        assert exchange(victim, (NODE, spot.node_port)).name == "pod2"
        victim.sendto(b"back", (address, number))
        assert shadow.recvfrom(100) == (b"back", (EXT, 20020))


# --- conntrack_icmp_related.sh ---------------------------------------------------------------------------------------


@selftest("frag-needed from behind the masquerade reaches the right host", "conntrack_icmp_related.sh")
def test_a_router_behind_us_tells_the_pod_its_mtu(cluster, server, pod1, pod2):
    """A hop of MTU 1280 behind the NAT router: its error is related to the flow, and reaches only who has caused it."""
    del server
    before = drops(cluster.node)
    with sniffer(pod2.namespace, "eth0") as others:
        output = pod1.namespace.run(
            "ping", "-n", "-c", 1, "-W", 2, "-M", "do", "-s", NARROW - 28 + 1, SERVER, check=False
        )  # fmt: skip
        assert f"From {ROUTER} icmp_seq=1 Frag needed and DF set (mtu = {NARROW})" in output, output
        assert [packet for packet in map(Ether, others()) if ICMP in packet] == []
    assert learned(pod1.namespace, SERVER)
    assert {key: drops(cluster.node).get(key, 0) - before.get(key, 0) for key in ("icmp.unrelated", "icmp.bad-inner")} \
        == {"icmp.unrelated": 0, "icmp.bad-inner": 0}  # fmt: skip


def learned(namespace: Namespace, address: str) -> bool:
    """Tell whether a host has learned the narrow MTU of a way, and forget it."""
    output = namespace.ip("route", "get", address)
    namespace.ip("route", "flush", "cache")
    return f"mtu {NARROW}" in output


@selftest("frag-needed for a masqueraded UDP flow is seen by its socket", "conntrack_icmp_related.sh")
def test_a_datagram_that_is_too_large_is_reported_to_its_socket(cluster, server, pod1):
    body = bytes(1400)
    with udp_socket(pod1.namespace) as flow:
        flow.setsockopt(0, 10, 2)  # IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO
        with pytest.raises(OSError, match="Message too long"):
            exchange(flow, (SERVER, UDP_PORT), body=body)
    assert learned(pod1.namespace, SERVER)


@selftest("frag-needed for what a backend sends reaches the backend", "conntrack_icmp_related.sh")
@pytest.mark.parametrize(("policy", "peer"), [({}, NODE), (LOCAL, SERVER)], ids=["masqueraded", "source kept"])
def test_a_backend_learns_the_mtu_of_its_clients_way(cluster, server, spot, pod1, policy, peer):
    """The error quotes a packet from the service's address to the client; the pod has sent another."""
    with cluster.use(service("web", spot.vip, [port(80)], [POD1], loadBalancerIPs=[spot.external], **policy)):
        output = server.run(
            "curl", "-sS", "--fail", "--max-time", 5, "-D", "-", "-o", "/dev/null", "-w", "%{size_download}",
            f"http://{spot.external}:80/bytes/300000",
        )  # fmt: skip
    assert output.endswith("300000")
    assert re.search("X-Name: pod1", output)
    assert learned(pod1.namespace, peer)


@selftest("an ICMP error that belongs to no flow is not let in", "conntrack_icmp_related.sh")
def test_an_unrelated_error_is_dropped_and_counted(cluster, pod1):
    before = drops(cluster.node).get("icmp.unrelated", 0)
    error = IP(src=EXT, dst=POD1) / ICMP(type=3, code=3) / IP(src=POD1, dst=EXT) / UDP(sport=33333, dport=44444)
    with sniffer(pod1.namespace, "eth0") as seen:
        cluster.ext.ip("route", "replace", POD1, "via", NODE)
        inject(cluster.ext, bytes(error))
        eventually(lambda: drops(cluster.node).get("icmp.unrelated", 0) == before + 1)
        cluster.ext.ip("route", "del", POD1)
        assert [packet for packet in map(Ether, seen()) if ICMP in packet] == []


# --- conntrack_tcp_unreplied.sh --------------------------------------------------------------------------------------


@selftest("SYN retransmissions keep no entry alive; a new rule then takes effect", "conntrack_tcp_unreplied.sh")
def test_a_connection_without_an_answer_finds_a_service_that_comes(cluster, router, spot, pod1):
    """A client repeats its SYN to an address where nobody is; meanwhile a rule for it appears."""
    router.ip("route", "add", "blackhole", spot.external)
    try:
        with tcp_socket(pod1.namespace) as waiting:
            waiting.setblocking(False)
            waiting.connect_ex((spot.external, 80))
            left = eventually(lambda: timeouts(cluster, spot.external))
            eventually(lambda: packets(cluster, spot.external) >= 3, timeout=10)  # after 1 and 3 s
            assert timeouts(cluster, spot.external)[0] <= left[0] - 2
            with cluster.use(service("late", spot.vip, [port(80)], [POD2], externalIPs=[spot.external])):
                cluster.forget(spot.external)  # what 120 s would do
                waiting.settimeout(10)
                waiting.send(b"")
                assert post(waiting).name == "pod2"
    finally:
        router.ip("route", "del", "blackhole", spot.external)


def timeouts(cluster: Cluster, address: str) -> list[int]:
    return [flow["timeout_s"] for flow in cluster.rows("conntrack", dst=address)]


def packets(cluster: Cluster, address: str) -> int:
    return sum(flow["original"]["packets"] for flow in cluster.rows("conntrack", dst=address))


# --- nf_nat_edemux.sh ------------------------------------------------------------------------------------------------


@selftest("one source port, directly and through a service", "nf_nat_edemux.sh")
@pytest.mark.parametrize("protocol", EVERY)
@pytest.mark.parametrize("client", ["pod1", "node"])
def test_a_clash_of_source_ports_is_resolved(cluster, spot, pod2, protocol, client):
    """Both flows end at the same server and port, from the same address and port: one of them gets another port."""
    direct = (POD2, {"tcp": HTTP, "udp": UDP_PORT}[protocol])
    where = cluster.where(client)
    with cluster.use(service("web", spot.vip, both(80), [POD2])), ExitStack() as stack:
        for order in ([direct, (spot.vip, 80)], [(spot.vip, 80), direct]):
            source = 20030 + (order[0] == direct)
            if protocol == "tcp":
                streams = [stack.enter_context(connected(where, *target, source=source)) for target in order]
                answers = [post(stream) for stream in streams]
            else:
                with udp_socket(where, source) as flow:
                    answers = [exchange(flow, target) for target in order]
            assert [answer.name for answer in answers] == ["pod2", "pod2"]
            assert [answer.peer for answer in answers] == order
            assert answers[0].seen != answers[1].seen


@selftest("many clients with one source port", "nf_nat_edemux.sh")
@pytest.mark.parametrize("protocol", EVERY)
def test_many_clients_with_one_source_port_are_told_apart(cluster, spot, protocol):
    own = [f"192.0.2.{number}" for number in range(130, 150)]
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [POD1, POD2])), ExitStack() as stack:
        for address in own:
            cluster.ext.ip("address", "add", f"{address}/24", "dev", "eth0")
            stack.callback(cluster.ext.ip, "address", "del", f"{address}/24", "dev", "eth0")
        if protocol == "tcp":
            streams = [
                stack.enter_context(connected(cluster.ext, NODE, spot.node_port, source=20040, own=address))
                for address in own
            ]
            answers = [post(stream) for stream in streams]
        else:
            sockets = [stack.enter_context(udp_socket(cluster.ext, 20040, address)) for address in own]
            answers = [exchange(each, (NODE, spot.node_port)) for each in sockets]
    assert {answer.seen[0] for answer in answers} == {NODE}
    assert len({(answer.name, answer.seen) for answer in answers}) == len(own)


@selftest("two hosts with one source port behind the masquerade", "nf_nat_edemux.sh")
@pytest.mark.usefixtures("keeps_ports")
def test_two_pods_with_one_source_port_are_told_apart(cluster, pod1, pod2):
    with (
        udp_socket(pod1.namespace, 20050) as first,
        udp_socket(pod2.namespace, 20050) as second,
        connected(pod1.namespace, SERVER, HTTP, source=20050) as third,
        connected(pod2.namespace, SERVER, HTTP, source=20050) as fourth,
    ):
        seen = [exchange(flow, (SERVER, UDP_PORT)).seen for flow in (first, second, first, second)]
        assert seen[:2] == seen[2:]
        assert seen[0] == (NODE, 20050)
        assert seen[1] != seen[0]
        assert post(third).seen != post(fourth).seen
