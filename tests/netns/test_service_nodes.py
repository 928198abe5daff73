"""Services across three nodes: Kubernetes' tests of traffic policies, health checks and who sees whom.

    ext 192.0.2.100 ─────────┐
    a0, a1 ── node1 .11 ─────┤
    b0, b1 ── node2 .12 ─────┼── br0, VXLAN between the nodes
    c0 ────── node3 .13 ─────┘                      a1 and b1 are the servers: node3 never has one

A client outside reaches the services' addresses through node1, unless a test says otherwise.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.netns.harness import Network
from tests.netns.ours import assert_balanced, drops
from tests.netns.services import (
    EXT,
    HTTP,
    UDP_PORT,
    Cluster,
    both,
    e2e,
    make_cluster,
    port,
    serve,
    service,
    terminating,
)
from tests.netns.sockets import ASK, ask_tcp, exchange, is_silent, names, udp_socket

pytestmark = pytest.mark.netns

A0, A1, B0, B1, C0 = "10.244.1.10", "10.244.1.20", "10.244.2.10", "10.244.2.20", "10.244.3.10"
NODE1, NODE2, NODE3 = "192.0.2.11", "192.0.2.12", "192.0.2.13"
TUNNEL1, TUNNEL3 = "10.244.1.0", "10.244.3.0"
EVERY = ["tcp", "udp"]
HEALTH = 32000
FALLBACK = "should fallback to local terminating endpoints when there are no ready endpoints with {}TrafficPolicy=Local"
LOCAL = {"externalTrafficPolicy": "Local"}


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    return make_cluster(network, [{"a0": A0, "a1": A1}, {"b0": B0, "b1": B1}, {"c0": C0}])


@pytest.fixture(autouse=True)
def _balanced(cluster: Cluster):
    yield
    for node in cluster.nodes:
        assert_balanced(node)


@contextmanager
def entering_at(cluster: Cluster, node: str, address: str) -> Iterator[None]:
    """Have ``ext`` reach an address through another node than the first."""
    cluster.ext.ip("route", "add", address, "via", node)
    try:
        yield
    finally:
        cluster.ext.ip("route", "del", address)


# --- everybody reaches everything ------------------------------------------------------------------------------------


def granular(who: str, protocol: str, what: str = "Services") -> pytest.MarkDecorator:
    kind = {"tcp": "http", "udp": "udp"}[protocol]
    return e2e(f"Granular Checks: {what} should function for {who}: {kind}", "networking.go")


@pytest.mark.parametrize(
    ("client", "protocol"),
    [
        pytest.param(client, protocol, marks=granular(who, protocol), id=f"{who}-{client}-{protocol}")
        for who, clients in (("pod-Service", ["a0", "c0"]), ("node-Service", ["node1", "node3"]),
                             ("endpoint-Service", ["a1", "b1"]))
        for client in clients
        for protocol in EVERY
    ],
)  # fmt: skip
def test_a_service_is_reached_by_its_address_and_by_every_node_port(cluster, spot, client, protocol):
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [A1, B1])):
        for target in ((spot.vip, 80), *((node, spot.node_port) for node in (NODE1, NODE2, NODE3))):
            assert set(names(cluster.where(client), protocol, target, 4)) == {"a1", "b1"}, target


@e2e("should be able to create a functioning NodePort service")
@pytest.mark.parametrize("protocol", EVERY)
def test_every_node_serves_a_node_port(cluster, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [A1, B1])):
        for node in (NODE1, NODE2, NODE3):
            assert set(names(cluster.ext, protocol, (node, spot.node_port), 4)) == {"a1", "b1"}


@pytest.mark.parametrize(
    ("client", "target", "protocol"),
    [
        pytest.param(client, target, protocol, marks=granular(f"{who} communication", protocol, "Pods"))
        for who, client, target in (("intra-pod", "a0", "b0"), ("intra-pod", "a0", "a1"),
                                    ("node-pod", "node1", "b0"), ("node-pod", "node1", "a0"))
        for protocol in EVERY
    ],
)  # fmt: skip
def test_pods_and_nodes_reach_pods(cluster, client, target, protocol):
    address = cluster.pods[target].address
    answer = ASK[protocol](cluster.where(client), address, {"tcp": HTTP, "udp": UDP_PORT}[protocol])
    assert (answer.name, answer.peer[0]) == (target, address)


# --- who is seen -----------------------------------------------------------------------------------------------------


@e2e("should preserve source pod IP for traffic thru service cluster IP")
@pytest.mark.parametrize("protocol", EVERY)
def test_the_source_address_of_a_pod_on_another_node_is_preserved(cluster, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80), [B1])):
        for client, address in (("a0", A0), ("c0", C0)):
            answer = ASK[protocol](cluster.where(client), spot.vip, 80)
            assert (answer.name, answer.seen[0], answer.port_kept) == ("b1", address, True)
            assert answer.peer == (spot.vip, 80)


@pytest.mark.parametrize("protocol", EVERY)
def test_what_leaves_by_the_tunnel_is_masqueraded_with_its_address(cluster, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [B1])):
        for client, target in (("ext", (NODE1, spot.node_port)), ("node1", (spot.vip, 80)), ("ext", (spot.vip, 80))):
            answer = ASK[protocol](cluster.where(client), *target)
            assert (answer.name, answer.seen[0], answer.peer) == ("b1", TUNNEL1, target)
        answer = ASK[protocol](cluster.ext, NODE3, spot.node_port)
        assert (answer.name, answer.seen[0]) == ("b1", TUNNEL3)


def test_a_large_transfer_through_a_service_on_another_node_arrives_whole(cluster, spot):
    body = bytes(range(256)) * 12_000
    with cluster.use(service("web", spot.vip, [port(80, node=spot.node_port)], [B1])):
        assert ask_tcp(cluster.where("a0"), spot.vip, 80, body=body).body == body
        assert ask_tcp(cluster.ext, NODE1, spot.node_port, body=body).body == body


# --- traffic policies ------------------------------------------------------------------------------------------------


@e2e("should support externalTrafficPolicy=Local for type=NodePort")
@e2e("should work for type=NodePort", "loadbalancer.go")
@pytest.mark.parametrize("protocol", EVERY)
def test_a_node_port_with_policy_local_keeps_the_client_and_stays_on_its_node(cluster, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [A1, B1], **LOCAL)):
        for node, name in ((NODE1, "a1"), (NODE2, "b1")):
            for _ in range(2):
                answer = ASK[protocol](cluster.ext, node, spot.node_port)
                assert (answer.name, answer.seen[0], answer.port_kept) == (name, EXT, True)
        assert set(names(cluster.where("c0"), protocol, (spot.vip, 80), 4)) == {"a1", "b1"}  # not for cluster addresses


@e2e("should only target nodes with endpoints", "loadbalancer.go")
@pytest.mark.parametrize("protocol", EVERY)
def test_policy_local_without_a_local_endpoint_drops_and_counts(cluster, spot, protocol):
    web = service("web", spot.vip, both(80, spot.node_port), [B1], loadBalancerIPs=[spot.external], **LOCAL)
    with cluster.use(web):
        before = drops(cluster.node).get("svc.no-local-endpoints", 0)
        assert is_silent(cluster.ext, protocol, NODE1, spot.node_port)
        assert is_silent(cluster.ext, protocol, spot.external, 80)
        assert drops(cluster.node)["svc.no-local-endpoints"] == before + 2
        assert ASK[protocol](cluster.ext, NODE2, spot.node_port).seen[0] == EXT


@e2e("should work for type=LoadBalancer", "loadbalancer.go")
@pytest.mark.parametrize("protocol", EVERY)
def test_a_load_balancer_with_policy_local_keeps_the_client(cluster, spot, protocol):
    web = service("web", spot.vip, both(80), [A1, B1], loadBalancerIPs=[spot.external], **LOCAL)
    with cluster.use(web):
        for node, name in ((NODE1, "a1"), (NODE2, "b1")):
            with entering_at(cluster, node, spot.external):
                answer = ASK[protocol](cluster.ext, spot.external, 80)
                assert (answer.name, answer.seen[0], answer.peer) == (name, EXT, (spot.external, 80))


@e2e("should handle updates to ExternalTrafficPolicy field", "loadbalancer.go")
def test_the_external_policy_changes(cluster, spot):
    ports = [port(80, node=spot.node_port)]
    with cluster.use(service("web", spot.vip, ports, [B1], **LOCAL)):
        assert is_silent(cluster.ext, "tcp", NODE1, spot.node_port)
        cluster.set(service("web", spot.vip, ports, [B1]))
        assert ask_tcp(cluster.ext, NODE1, spot.node_port).seen[0] == TUNNEL1
        cluster.set(service("web", spot.vip, ports, [B1], **LOCAL))
        assert is_silent(cluster.ext, "tcp", NODE1, spot.node_port)
        assert ask_tcp(cluster.ext, NODE2, spot.node_port).seen[0] == EXT


@e2e("should respect internalTrafficPolicy=Local Pod to Pod")
@e2e("should respect internalTrafficPolicy=Local Pod (hostNetwork: true) to Pod")
@pytest.mark.parametrize("protocol", EVERY)
def test_the_internal_policy_local_stays_on_the_node(cluster, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80), [A1, B1], internalTrafficPolicy="Local")):
        for client, name in (("a0", "a1"), ("node1", "a1"), ("b0", "b1"), ("node2", "b1")):
            assert set(names(cluster.where(client), protocol, (spot.vip, 80), 3)) == {name}
        before = drops(cluster.nodes[2]).get("svc.no-local-endpoints", 0)
        assert is_silent(cluster.where("c0"), protocol, spot.vip, 80)
        assert is_silent(cluster.where("node3"), protocol, spot.vip, 80)
        assert drops(cluster.nodes[2])["svc.no-local-endpoints"] == before + 2


@e2e(
    "should fallback to local terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Local"
)
def test_the_external_policy_local_falls_back_to_local_terminating_endpoints(cluster, spot):
    ports = [port(80, node=spot.node_port)]
    with cluster.use(service("web", spot.vip, ports, [terminating(A1), B1], **LOCAL)):
        assert ask_tcp(cluster.ext, NODE1, spot.node_port).name == "a1"
        cluster.set(service("web", spot.vip, ports, [terminating(A1, serving=False), B1], **LOCAL))
        assert is_silent(cluster.ext, "tcp", NODE1, spot.node_port)


@e2e(
    "should fallback to local terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Local"
)
def test_the_internal_policy_local_falls_back_to_local_terminating_endpoints(cluster, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [terminating(A1), B1], internalTrafficPolicy="Local")):
        assert set(names(cluster.where("a0"), "tcp", (spot.vip, 80), 3)) == {"a1"}


@e2e("should fallback to terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Cluster")
def test_the_external_policy_cluster_falls_back_to_terminating_endpoints_anywhere(cluster, spot):
    endpoints = [terminating(A1), terminating(B1)]
    with cluster.use(service("web", spot.vip, [port(80, node=spot.node_port)], endpoints)):
        assert set(names(cluster.ext, "tcp", (NODE3, spot.node_port), 4)) == {"a1", "b1"}


# --- servers on a node's own address ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts(cluster: Cluster) -> dict[str, str]:
    """Servers of pods with hostNetwork, on the first two nodes, by name."""
    for number, address in (("1", NODE1), ("2", NODE2)):
        serve(cluster.where(f"node{number}"), f"h{number}", f"{address}:tcp:{HTTP}", f"{address}:udp:{UDP_PORT}")
    return {"h1": NODE1, "h2": NODE2}


@e2e("should respect internalTrafficPolicy=Local Pod and Node, to Pod (hostNetwork: true)")
@pytest.mark.parametrize("protocol", EVERY)
def test_the_internal_policy_local_knows_servers_on_the_nodes_address(cluster, spot, hosts, protocol):
    with cluster.use(service("web", spot.vip, both(80), [*hosts.values()], internalTrafficPolicy="Local")):
        for client, name in (("a0", "h1"), ("b0", "h2"), ("node1", "h1")):
            assert set(names(cluster.where(client), protocol, (spot.vip, 80), 2)) == {name}


@pytest.mark.parametrize("protocol", EVERY)
@pytest.mark.parametrize("client", ["a0", "c0", "node1", "node3", "ext"])
def test_servers_on_a_nodes_own_address_are_reached_from_everywhere(cluster, spot, hosts, client, protocol):
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [*hosts.values()])):
        for target in ((spot.vip, 80), (NODE1, spot.node_port), (NODE3, spot.node_port)):
            assert set(names(cluster.where(client), protocol, target, 4)) == {"h1", "h2"}, target


# --- health checks ---------------------------------------------------------------------------------------------------


def health(cluster: Cluster, node: str, number: int = HEALTH) -> tuple[int, dict[str, object]]:
    """Return status and answer of a health check node port, as a load balancer asks for it."""
    output = cluster.ext.run("curl", "-sS", "--max-time", 2, "-w", "\n%{http_code}", f"http://{node}:{number}/")
    body, _, status = output.rpartition("\n")
    return int(status), json.loads(body)


@pytest.mark.conformance("healthCheckNodePort: 200 with local endpoints, else 503", source="kube-proxy")
@e2e("should fail health check node port if there are only terminating endpoints")
def test_the_health_check_port_tells_whether_the_node_has_endpoints(cluster, spot):
    keys = {"loadBalancerIPs": [spot.external], "healthCheckNodePort": HEALTH, **LOCAL}
    with cluster.use(service("web", spot.vip, [port(80)], [A1], **keys)):
        status, answer = health(cluster, NODE1)
        assert (status, answer["localEndpoints"], answer["service"]) == (
            200, 1, {"namespace": "default", "name": "web"},
        )  # fmt: skip
        status, answer = health(cluster, NODE2)
        assert (status, answer["localEndpoints"]) == (503, 0)
        cluster.set(service("web", spot.vip, [port(80)], [B1], **keys))
        assert (health(cluster, NODE1)[0], health(cluster, NODE2)[0]) == (503, 200)
        cluster.set(service("web", spot.vip, [port(80)], [terminating(B1)], **keys))
        assert health(cluster, NODE2)[0] == 503


# --- flows across nodes ----------------------------------------------------------------------------------------------


@e2e("should be able to preserve UDP traffic when server pod cycles for a NodePort service", "conntrack.go")
def test_udp_goes_on_when_its_server_moves_to_another_node(cluster, spot):
    ports = [port(80, protocol="udp", node=spot.node_port)]
    with cluster.use(service("web", spot.vip, ports, [A1])), udp_socket(cluster.ext, 12345) as flow:
        for name, address in (("a1", A1), ("b1", B1), ("a1", A1), ("b1", B1)):
            cluster.set(service("web", spot.vip, ports, [address]))
            for _ in range(3):
                assert exchange(flow, (NODE1, spot.node_port)).name == name
