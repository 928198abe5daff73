"""Services on one node: Kubernetes' tests of ports, endpoints, types and session affinity that need no cluster.

ext 192.0.2.100, .101 ── br0 ── eth0 192.0.2.11 [ node1 ] ── client 10.244.1.10
                                dp0                       ── s1, s2, s3 10.244.1.20, .30, .40
"""

import json

import pytest

from tests.netns.harness import Namespace, Network
from tests.netns.ours import assert_balanced, drops
from tests.netns.services import (
    ALIAS,
    EXT,
    EXT2,
    HTTP,
    Cluster,
    both,
    e2e,
    make_cluster,
    port,
    service,
    terminating,
    unready,
)
from tests.netns.sockets import ASK, ask_tcp, ask_udp, is_refused, is_silent, names

pytestmark = pytest.mark.netns

CLIENT, S1, S2, S3 = "10.244.1.10", "10.244.1.20", "10.244.1.30", "10.244.1.40"
NODE = "192.0.2.11"
EVERY = ["tcp", "udp"]


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    return make_cluster(network, [{"client": CLIENT, "s1": S1, "s2": S2, "s3": S3}])


@pytest.fixture(autouse=True)
def _balanced(cluster: Cluster):
    yield
    assert_balanced(cluster.node)


# --- ports and endpoints ---------------------------------------------------------------------------------------------


@e2e("should serve a basic endpoint from pods")
@pytest.mark.parametrize("protocol", EVERY)
def test_requests_go_round_the_endpoints(cluster, client, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80), [S1, S2, S3])):
        assert names(client, protocol, (spot.vip, 80), 9) == ["s3", "s2", "s1"] * 3  # ip_vs's rr: the newest first


@e2e("should serve multiport endpoints from pods")
def test_two_ports_lead_to_two_ports(cluster, client, spot):
    ports = [port(80, HTTP, name="one"), port(81, ALIAS, name="two")]
    with cluster.use(service("web", spot.vip, ports, [S1])):
        assert ask_tcp(client, spot.vip, 80).peer == (spot.vip, 80)
        assert ask_tcp(client, spot.vip, 81).peer == (spot.vip, 81)
        cluster.set(service("web", spot.vip, [ports[0], port(81, 9, name="two")], [S1]))
        assert is_refused(client, "tcp", spot.vip, 81)  # nothing listens at 9: each port has its own target
        assert ask_tcp(client, spot.vip, 80).name == "s1"


@e2e("should serve endpoints on same port and different protocols")
@e2e("should be able to update service type to NodePort listening on same port number but different protocols")
def test_one_port_number_serves_two_protocols(cluster, client, spot):
    tcp, udp = port(80, node=spot.node_port), port(80, protocol="udp", node=spot.node_port)
    with cluster.use(service("web", spot.vip, [port(80)], [S1])):
        assert is_refused(client, "udp", spot.vip, 80)
        cluster.set(service("web", spot.vip, [tcp, udp], [S1]))
        for protocol in EVERY:
            assert ASK[protocol](client, spot.vip, 80).name == "s1"
            assert ASK[protocol](cluster.ext, NODE, spot.node_port).name == "s1"
        cluster.set(service("web", spot.vip, [udp], [S1]))
        assert is_refused(client, "tcp", spot.vip, 80)
        assert ask_udp(client, spot.vip, 80).name == "s1"


def test_a_named_target_port_is_looked_up_in_each_endpoint(cluster, client, spot):
    endpoints = [{"ip": S1, "ports": {"web": HTTP}}, {"ip": S2, "ports": {"web": ALIAS}}]
    with cluster.use(service("web", spot.vip, [port(80, "web")], endpoints)):
        assert names(client, "tcp", (spot.vip, 80), 4) == ["s2", "s1"] * 2


@e2e("should be updated after adding or deleting ports")
def test_ports_come_and_go(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [S1])):
        assert is_refused(client, "tcp", spot.vip, 81)
        cluster.set(service("web", spot.vip, [port(80), port(81, ALIAS)], [S1]))
        assert ask_tcp(client, spot.vip, 81).name == "s1"
        cluster.set(service("web", spot.vip, [port(81, ALIAS)], [S1]))
        assert ask_tcp(client, spot.vip, 81).name == "s1"
        assert is_refused(client, "tcp", spot.vip, 80)


@e2e("should be able to up and down services")
def test_services_come_and_go_by_command(cluster, client, spot, tmp_path):
    other = cluster.spot()
    with cluster.use(service("stays", spot.vip, [port(80)], [S1, S2])):
        file = tmp_path / "service.json"
        file.write_text(json.dumps(service("goes", other.vip, [port(80)], [S2, S3])))
        for _ in range(2):
            cluster.node.cli("service", "set", "-f", str(file))
            assert set(names(client, "tcp", (other.vip, 80), 4)) == {"s2", "s3"}
            assert set(names(client, "tcp", (spot.vip, 80), 4)) == {"s1", "s2"}
            cluster.node.cli("service", "delete", "default/goes")
            assert is_silent(client, "tcp", other.vip, 80)
            assert set(names(client, "tcp", (spot.vip, 80), 4)) == {"s1", "s2"}


@e2e("should work after the service has been recreated")
@pytest.mark.parametrize("protocol", EVERY)
def test_a_service_that_was_deleted_may_come_back(cluster, client, spot, protocol):
    web = service("web", spot.vip, both(80), [S1])
    with cluster.use(web):
        assert ASK[protocol](client, spot.vip, 80, source=5001).name == "s1"
    assert is_silent(client, protocol, spot.vip, 80)
    with cluster.use(web):
        assert ASK[protocol](client, spot.vip, 80, source=5002).name == "s1"


@e2e("Granular Checks: Services should update endpoints: http", "networking.go")
@e2e("Granular Checks: Services should update endpoints: udp", "networking.go")
@pytest.mark.parametrize("protocol", EVERY)
def test_endpoints_come_and_go_by_command(cluster, client, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80), [S1, S2])):
        cluster.node.cli("endpoint", "add", "default/web", S3)
        assert set(names(client, protocol, (spot.vip, 80), 6)) == {"s1", "s2", "s3"}
        cluster.node.cli("endpoint", "drain", "default/web", S2)
        assert set(names(client, protocol, (spot.vip, 80), 4)) == {"s1", "s3"}
        cluster.node.cli("endpoint", "delete", "default/web", S1)
        assert set(names(client, protocol, (spot.vip, 80), 2)) == {"s3"}


@e2e("Granular Checks: Services should update nodePort: http", "networking.go")
@e2e("Granular Checks: Services should update nodePort: udp", "networking.go")
@pytest.mark.parametrize("protocol", EVERY)
def test_a_node_port_moves(cluster, spot, protocol):
    other = cluster.spot()
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [S1])):
        assert ASK[protocol](cluster.ext, NODE, spot.node_port).name == "s1"
        cluster.set(service("web", spot.vip, both(80, other.node_port), [S1]))
        assert ASK[protocol](cluster.ext, NODE, other.node_port).name == "s1"
        assert is_refused(cluster.ext, protocol, NODE, spot.node_port)


@e2e("Granular Checks: Services should function for multiple endpoint-Services with same selector", "networking.go")
def test_two_services_share_their_endpoints(cluster, client, spot):
    other = cluster.spot()
    both_ways = [service("one", spot.vip, both(80), [S1, S2]), service("two", other.vip, both(80), [S1, S2])]
    with cluster.use(*both_ways):
        for protocol in EVERY:
            for vip in (spot.vip, other.vip):
                assert set(names(client, protocol, (vip, 80), 4)) == {"s1", "s2"}
        cluster.delete("two")
        assert set(names(client, "tcp", (spot.vip, 80), 4)) == {"s1", "s2"}
        cluster.set(both_ways[1])


@e2e("Granular Checks: Services should be able to handle large requests: http", "networking.go")
@e2e("Granular Checks: Services should be able to handle large requests: udp", "networking.go")
@pytest.mark.parametrize(("protocol", "size"), [("tcp", 3_000_000), ("udp", 2000), ("udp", 60_000)])
def test_large_requests_arrive_whole(cluster, client, spot, protocol, size):
    body = bytes(range(256)) * (size // 256)
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [S1])):
        assert ASK[protocol](client, spot.vip, 80, body=body).body == body
        assert ASK[protocol](cluster.ext, NODE, spot.node_port, body=body).body == body


@e2e("should allow pods to hairpin back to themselves through services")
@pytest.mark.parametrize("protocol", EVERY)
def test_a_pod_reaches_itself_through_a_service(cluster, spot, protocol):
    me = cluster.pods["s1"]
    with cluster.use(service("self", spot.vip, both(80), [S1])):
        answer = ASK[protocol](me.namespace, spot.vip, 80)
        assert (answer.name, answer.seen[0], answer.peer) == ("s1", NODE, (spot.vip, 80))


@e2e("should preserve source pod IP for traffic thru service cluster IP")
@pytest.mark.parametrize("protocol", EVERY)
def test_the_source_address_of_a_pod_on_the_same_node_is_preserved(cluster, client, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80), [S1])):
        answer = ASK[protocol](client, spot.vip, 80)
        assert (answer.seen[0], answer.port_kept) == (CLIENT, True)


@e2e("should be possible to connect to a service via ExternalIP when the external IP is not assigned to a node")
@pytest.mark.parametrize("protocol", EVERY)
def test_an_external_address_leads_to_the_service(cluster, client, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80), [S1, S2], externalIPs=[spot.external])):
        for source in (client, cluster.host, cluster.ext):
            assert set(names(source, protocol, (spot.external, 80), 4)) == {"s1", "s2"}


@e2e("should be able to change the type from ClusterIP to ExternalName")
@e2e("should be able to change the type from ExternalName to NodePort")
@e2e("should be able to change the type from NodePort to ClusterIP")
def test_the_type_of_a_service_changes(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [S1])):
        assert ask_tcp(client, spot.vip, 80).name == "s1"
        cluster.set({"name": "web", "type": "ExternalName", "externalName": "example.com"})
        assert is_silent(client, "tcp", spot.vip, 80)
        cluster.set(service("web", spot.vip, [port(80, node=spot.node_port)], [S1]))
        assert ask_tcp(client, spot.vip, 80).name == "s1"
        assert ask_tcp(cluster.ext, NODE, spot.node_port).name == "s1"
        cluster.set(service("web", spot.vip, [port(80)], [S1]))
        assert ask_tcp(client, spot.vip, 80).name == "s1"
        assert is_refused(cluster.ext, "tcp", NODE, spot.node_port)


@pytest.mark.parametrize(
    "protocol",
    [
        pytest.param(
            "tcp", marks=e2e("should be able to change the type and ports of a TCP service", "loadbalancer.go")
        ),
        pytest.param(
            "udp", marks=e2e("should be able to change the type and ports of a UDP service", "loadbalancer.go")
        ),
    ],
)
def test_a_service_becomes_a_load_balancer_and_a_cluster_address_again(cluster, client, spot, protocol):
    def ask_all(*targets: tuple[Namespace, str, int]) -> set[str]:
        return {ASK[protocol](*target).name for target in targets}

    other = cluster.spot()
    old, new = ((client, spot.vip, 80), (cluster.ext, NODE, spot.node_port), (cluster.ext, spot.external, 80)), (
        (client, spot.vip, 81), (cluster.ext, NODE, other.node_port), (cluster.ext, spot.external, 81))  # fmt: skip
    with cluster.use(service("web", spot.vip, [port(80, protocol=protocol)], [S1])):
        assert ask_all(*old[:1]) == {"s1"}
        cluster.set(service("web", spot.vip, [port(80, protocol=protocol, node=spot.node_port)], [S1]))
        assert ask_all(*old[:2]) == {"s1"}
        keys = {"loadBalancerIPs": [spot.external]}
        cluster.set(service("web", spot.vip, [port(80, protocol=protocol, node=spot.node_port)], [S1], **keys))
        assert ask_all(*old) == {"s1"}
        cluster.set(service("web", spot.vip, [port(80, protocol=protocol, node=other.node_port)], [S1], **keys))
        assert ask_all(old[0], new[1], old[2]) == {"s1"}
        assert is_refused(cluster.ext, protocol, NODE, spot.node_port)
        cluster.set(service("web", spot.vip, [port(81, protocol=protocol, node=other.node_port)], [S1], **keys))
        assert ask_all(*new) == {"s1"}
        cluster.set(service("web", spot.vip, [port(81, protocol=protocol)], [S1]))
        assert ask_all(*new[:1]) == {"s1"}
        assert is_refused(cluster.ext, protocol, NODE, other.node_port)
        assert is_silent(cluster.ext, protocol, spot.external, 81)


# --- who may come in -------------------------------------------------------------------------------------------------


@e2e("should only allow access from service loadbalancer source ranges", "loadbalancer.go")
def test_a_load_balancer_admits_its_source_ranges_only(cluster, spot):
    ranges = [f"{EXT}/32"]
    web = service(
        "web", spot.vip, [port(80)], [S1], loadBalancerIPs=[spot.external], loadBalancerSourceRanges=ranges
    )  # fmt: skip

    with cluster.use(web):
        assert ask_tcp(cluster.ext, spot.external, 80).name == "s1"
        before = drops(cluster.node).get("svc.source-range", 0)
        cluster.ext.ip("route", "replace", spot.external, "via", NODE, "src", EXT2)
        try:
            assert is_silent(cluster.ext, "tcp", spot.external, 80)
        finally:
            cluster.ext.ip("route", "del", spot.external)
        assert is_silent(cluster.pods["client"].namespace, "tcp", spot.external, 80)
        assert drops(cluster.node)["svc.source-range"] == before + 2
        assert ask_tcp(cluster.pods["client"].namespace, spot.vip, 80).name == "s1"  # the cluster's address is open


# --- endpoints that are not ready ------------------------------------------------------------------------------------


@e2e("should fallback to terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Cluster")
def test_terminating_endpoints_are_used_when_none_is_ready(cluster, client, spot):
    with cluster.use(service("web", spot.vip, [port(80)], [terminating(S1), S2])):
        assert set(names(client, "tcp", (spot.vip, 80), 4)) == {"s2"}
        cluster.set(service("web", spot.vip, [port(80)], [terminating(S1), terminating(S2, serving=False)]))
        assert set(names(client, "tcp", (spot.vip, 80), 4)) == {"s1"}
        cluster.set(service("web", spot.vip, [port(80)], [terminating(S1, serving=False)]))
        assert is_refused(client, "tcp", spot.vip, 80)


@e2e("should be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is true")
def test_unready_endpoints_are_published_on_demand(cluster, client, spot):
    endpoints = [unready(S1), terminating(S2, serving=False)]
    with cluster.use(service("web", spot.vip, [port(80)], endpoints, publishNotReadyAddresses=True)):
        assert set(names(client, "tcp", (spot.vip, 80), 4)) == {"s1", "s2"}


@e2e("should not be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is false")
def test_unready_endpoints_are_not_published(cluster, client, spot):
    endpoints = [unready(S1), terminating(S2, serving=False)]
    with cluster.use(service("web", spot.vip, [port(80, node=spot.node_port)], endpoints)):
        assert is_refused(client, "tcp", spot.vip, 80)
        assert is_refused(cluster.ext, "tcp", NODE, spot.node_port)


# --- session affinity ------------------------------------------------------------------------------------------------

STICKY = {"sessionAffinity": "ClientIP"}


@e2e("should have session affinity work for service with type clusterIP")
@e2e("should have session affinity work for NodePort service")
@e2e("Granular Checks: Services should function for client IP based session affinity: http", "networking.go")
@e2e("Granular Checks: Services should function for client IP based session affinity: udp", "networking.go")
@pytest.mark.parametrize("protocol", EVERY)
def test_a_client_stays_with_its_endpoint(cluster, client, spot, protocol):
    with cluster.use(service("web", spot.vip, both(80, spot.node_port), [S1, S2, S3], **STICKY)):
        first = names(client, protocol, (spot.vip, 80), 10)
        assert len(set(first)) == 1
        second = names(cluster.ext, protocol, (NODE, spot.node_port), 10)
        assert len(set(second)) == 1
        assert names(client, protocol, (spot.vip, 80), 2) == first[:2]


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, marks=[
            e2e(f"should have session affinity work for LoadBalancer service with {policy} traffic policy",
                "loadbalancer.go"),
            e2e(f"should be able to switch session affinity for LoadBalancer service with {policy} traffic policy",
                "loadbalancer.go"),
        ])
        for policy in ("Local", "Cluster")
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", EVERY)
def test_a_client_of_a_load_balancer_stays_with_its_endpoint(cluster, spot, protocol, policy):
    endpoints, target = [S1, S2, S3], (spot.external, 80)
    keys = {"loadBalancerIPs": [spot.external], "externalTrafficPolicy": policy}
    with cluster.use(service("web", spot.vip, both(80), endpoints, **keys, **STICKY)):
        assert len(set(names(cluster.ext, protocol, target, 10))) == 1
        cluster.set(service("web", spot.vip, both(80), endpoints, **keys))
        assert len(set(names(cluster.ext, protocol, target, 6))) == 3


@e2e("should be able to switch session affinity for service with type clusterIP")
@e2e("should be able to switch session affinity for NodePort service")
@pytest.mark.parametrize("protocol", EVERY)
def test_affinity_is_switched_on_and_off(cluster, client, spot, protocol):
    endpoints, ports = [S1, S2, S3], both(80, spot.node_port)
    with cluster.use(service("web", spot.vip, ports, endpoints)):
        for source, target in ((client, (spot.vip, 80)), (cluster.ext, (NODE, spot.node_port))):
            assert len(set(names(source, protocol, target, 6))) == 3
            cluster.set(service("web", spot.vip, ports, endpoints, **STICKY))
            assert len(set(names(source, protocol, target, 6))) == 1
            cluster.set(service("web", spot.vip, ports, endpoints))
            assert len(set(names(source, protocol, target, 6))) == 3
