"""Who sees which address when a service is used: the table that was recorded from Linux, in both uplink modes.

    ext 192.0.2.100 ── br0 ── eth0 192.0.2.11 [ node1 ] ── pod1 10.244.1.10
                              dp0                       ── pod2 10.244.1.20

The rows are those of a node with kube-proxy in ip_vs mode (Linux 6.1.176, clusterCIDR 10.244.0.0/16). "kept" and
"random" are what becomes of the client's source port; the reply always comes from where the client has sent to.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from tests.netns.harness import Namespace, Network
from tests.netns.ours import assert_balanced, drops
from tests.netns.services import ALIAS, EXT, UDP_PORT, Cluster, both, make_cluster, port, serve, service
from tests.netns.sockets import ASK, is_silent, refusal

pytestmark = pytest.mark.netns

POD1, POD2, NODE = "10.244.1.10", "10.244.1.20", "192.0.2.11"
DNS = 5353
AT_ONCE = 0.010  # seconds until an error reaches the client; ip_vs takes 1 ms
PATIENCE = 15.0  # until it does so once: a machine that is busy elsewhere is not what is measured
LAN_ADDRESS = "192.0.2.205"  # a load balancer's address that only ARP can find

SERVICES = [
    service("web", "10.96.0.53", both(53, 30053), [POD2], loadBalancerIPs=["203.0.113.5"]),
    service("self", "10.96.0.54", both(53, 30054), [POD1], loadBalancerIPs=["203.0.113.15"]),
    service("local", "10.96.0.55", both(53, 30055), [POD2], loadBalancerIPs=["203.0.113.6"],
            externalTrafficPolicy="Local"),
    service("empty", "10.96.0.56", both(53, 30056), [], loadBalancerIPs=["203.0.113.7"], externalIPs=["203.0.113.8"]),
    service("lan", "10.96.0.57", [port(53)], [POD2], loadBalancerIPs=[LAN_ADDRESS]),
    service("dns", "10.96.0.10", [port(53, DNS, "udp"), port(53, DNS)], [POD2]),
]  # fmt: skip


class Row(NamedTuple):
    """``target`` is what the client sends to; ``seen`` and ``port`` are what the backend sees of the client."""

    client: str
    target: tuple[str, int]
    backend: str
    seen: str
    port: str


ROWS = {
    "pod1 -> ClusterIP -> pod2":                 Row("pod1", ("10.96.0.53", 53), "pod2", POD1, "kept"),
    "pod1 -> ClusterIP -> pod1 (hairpin)":       Row("pod1", ("10.96.0.54", 53), "pod1", NODE, "kept"),
    "node -> ClusterIP -> pod2":                 Row("node", ("10.96.0.53", 53), "pod2", NODE, "random"),
    "external -> ClusterIP -> pod2":             Row("ext", ("10.96.0.53", 53), "pod2", NODE, "random"),
    "external -> NodePort -> pod2":              Row("ext", (NODE, 30053), "pod2", NODE, "random"),
    "external -> NodePort, policy Local -> pod2": Row("ext", (NODE, 30055), "pod2", EXT, "kept"),
    "external -> LB address -> pod2":            Row("ext", ("203.0.113.5", 53), "pod2", NODE, "random"),
    "external -> LB address, policy Local -> pod2": Row("ext", ("203.0.113.6", 53), "pod2", EXT, "kept"),
    "pod1 -> NodePort -> pod2":                  Row("pod1", (NODE, 30053), "pod2", NODE, "random"),
    "pod1 -> LB address -> pod2":                Row("pod1", ("203.0.113.5", 53), "pod2", NODE, "random"),
    "pod1 -> LB address -> pod1 (hairpin)":      Row("pod1", ("203.0.113.15", 53), "pod1", NODE, "kept"),
    "node -> own NodePort -> pod2":              Row("node", (NODE, 30053), "pod2", NODE, "random"),
}  # fmt: skip
LOOPBACK = "node -> 127.0.0.1:NodePort has no answer"


def recorded(name: str) -> pytest.MarkDecorator:
    return pytest.mark.conformance(name, source="Linux 6.1 ip_vs with kube-proxy's rules")


@pytest.fixture(scope="module", params=[True, False], ids=["shared-uplink", "own-uplink"])
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Network(tmp_path_factory.mktemp("network")) as network:
        made = make_cluster(network, [{"pod1": POD1, "pod2": POD2}], static=SERVICES, shared=request.param)
        serve(made.pods["pod2"].namespace, "pod2", f"{POD2}:dns:{DNS}")
        yield made


@pytest.fixture(autouse=True)
def _balanced(cluster: Cluster):
    yield
    assert_balanced(cluster.node)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("row", [pytest.param(ROWS[name], marks=recorded(name), id=name) for name in ROWS])
def test_the_backend_sees_the_address_that_linux_shows_it(cluster, row, protocol):
    answer = ASK[protocol](cluster.where(row.client), *row.target)
    assert (answer.name, answer.seen[0], answer.peer) == (row.backend, row.seen, row.target)
    assert answer.port_kept == (row.port == "kept"), answer


@recorded(LOOPBACK)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_node_port_is_not_on_the_loopback_address(cluster, protocol):
    with pytest.raises((ConnectionRefusedError, TimeoutError)):
        ASK[protocol](cluster.host, "127.0.0.1", 30053, timeout=0.3)


@recorded("a service address answers ping")
@pytest.mark.parametrize("target", ["10.96.0.53", "10.96.0.56", "203.0.113.5"])
@pytest.mark.parametrize("client", ["pod1", "node", "ext"])
def test_a_service_address_answers_ping(cluster, client, target):
    output = cluster.where(client).run("ping", "-n", "-c", 3, "-w", 3, "-i", 0.01, target)
    assert " 3 received, 0% packet loss" in output, output


@recorded("a closed port of a service address is refused")
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("client", ["pod1", "node", "ext"])
def test_a_closed_port_of_a_service_address_is_refused_at_once(cluster, client, protocol):
    before = drops(cluster.node).get("svc.vip-closed-port", 0)
    tries = tries_until_refused_at_once(cluster.where(client), protocol, "10.96.0.53", 9)
    assert drops(cluster.node)["svc.vip-closed-port"] == before + tries


@recorded("a service without endpoints is refused")
@pytest.mark.conformance("should be rejected when no endpoints exist", source="Kubernetes e2e service.go")
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    "target", [("10.96.0.56", 53), (NODE, 30056), ("203.0.113.7", 53)], ids=["cluster ip", "node port", "load balancer"]
)
@pytest.mark.parametrize("client", ["pod1", "node", "ext"])
def test_a_service_without_endpoints_is_refused_at_once(cluster, client, target, protocol):
    before = drops(cluster.node).get("svc.no-endpoints", 0)
    tries = tries_until_refused_at_once(cluster.where(client), protocol, *target)
    assert drops(cluster.node)["svc.no-endpoints"] == before + tries


def tries_until_refused_at_once(client: Namespace, protocol: str, address: str, number: int) -> int:
    """Return how often the client had to ask: more than once on a busy machine, or when it was told too often before.

    ICMP errors to one host are limited as in Linux: 6 at once, then one a second.
    """
    took: list[float] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        took.append(PATIENCE)
        with suppress(TimeoutError):
            took[-1] = refusal(client, protocol, address, number)
        if took[-1] < AT_ONCE:
            return len(took)
    raise AssertionError(f"{protocol} {address}:{number} was not refused within {AT_ONCE} s: {took}")


def test_an_address_that_no_service_has_is_dropped(cluster):
    before = drops(cluster.node).get("route.blackhole", 0)
    assert is_silent(cluster.pods["pod1"].namespace, "udp", "10.111.0.1", 53)
    assert drops(cluster.node)["route.blackhole"] == before + 1


def test_an_address_of_the_lan_is_found_by_arp(cluster):
    answer = ASK["tcp"](cluster.ext, LAN_ADDRESS, 53)
    assert (answer.name, answer.seen[0], answer.peer) == ("pod2", NODE, (LAN_ADDRESS, 53))


@pytest.mark.parametrize("options", [["+notcp"], ["+tcp"]], ids=["udp", "tcp"])
@pytest.mark.parametrize("client", ["pod1", "node", "ext"])
def test_dig_asks_a_name_server_behind_a_service(cluster, client, options):
    output = cluster.where(client).run("dig", "@10.96.0.10", *options, "+tries=1", "+time=2", "+short", "example.com")
    assert output == f"{POD2}\n"


@pytest.mark.parametrize("client", ["pod1", "node", "ext"])
def test_curl_reads_a_page_behind_a_service(cluster, client):
    output = cluster.where(client).run("curl", "-sS", "--fail", "--max-time", 3, "http://10.96.0.53:53/")
    assert output.startswith("pod2 ")


def test_the_hosts_own_servers_are_reached_past_the_services(cluster):
    server = serve(cluster.host, "host", f"{NODE}:tcp:{ALIAS}", f"{NODE}:udp:{ALIAS}")
    try:
        for client in ("ext", "pod1"):
            for protocol in ("tcp", "udp"):
                answer = ASK[protocol](cluster.where(client), NODE, ALIAS)
                assert (answer.name, answer.peer) == ("host", (NODE, ALIAS))
    finally:
        server.stop()


def test_the_host_reaches_the_lan_and_its_pods(cluster):
    server = serve(cluster.ext, "ext", f"tcp:{ALIAS}")
    try:
        answer = ASK["tcp"](cluster.host, EXT, ALIAS)
        assert (answer.name, answer.seen[0]) == ("ext", NODE)
    finally:
        server.stop()
    assert ASK["udp"](cluster.host, POD1, UDP_PORT).name == "pod1"
