"""[services] in node.toml: what becomes of it, and what is refused."""

from ipaddress import IPv4Address, IPv4Network

import pytest

from dataplane.config import parse
from dataplane.control.state import Balancing, Endpoint, Service, ServicePort
from tests.node_file import EVERY_KEY, NODE, errors

HEAD = """
[services]
clusterCIDR = ["10.244.0.0/16"]
serviceCIDR = ["10.96.0.0/12"]
"""
WEB = """
[[services.static]]
name = "web"
clusterIPs = ["10.96.0.20"]
ports = [{ port = 80 }]
"""
BALANCED = WEB.replace('"web"', '"web"\ntype = "LoadBalancer"\nloadBalancerIPs = ["192.0.2.200"]')
NODE_PORT = WEB.replace('"web"', '"web"\ntype = "NodePort"').replace("port = 80", "port = 80, nodePort = 30080")
FILE = NODE + HEAD


# --- what is right ---------------------------------------------------------------------------------------------------


def test_a_whole_service_is_read():
    lines = EVERY_KEY.splitlines()
    first, last = lines.index("[services]"), lines.index("[[loadBalancer.ipAddressPools]]")
    state = parse(NODE + "\n".join(lines[first:last]), "F").state
    assert state.services == (
        Service(
            name="web",
            type="LoadBalancer",
            cluster_ips=(IPv4Address("10.96.0.20"),),
            external_ips=(IPv4Address("198.51.100.20"),),
            load_balancer_ips=(IPv4Address("192.0.2.200"),),
            ports=(ServicePort(80, "TCP", "http", 8080, 30080),),
            endpoints=(
                Endpoint(IPv4Address("10.244.1.10")),
                Endpoint(IPv4Address("10.244.2.10"), node="node2", zone="z2"),
                Endpoint(IPv4Address("10.244.2.11"), ports=(("http", 8080),), hostname="web-2"),
            ),
            affinity_seconds=10800,
            external_policy="Local",
            source_ranges=(IPv4Network("203.0.113.0/24"),),
            health_check_node_port=30180,
            scheduler="mh",
            scheduler_flags=frozenset({"mh-port", "mh-fallback"}),
            drain_seconds=300,
            labels=(("app", "web"),),
            annotations=(("metallb.io/allow-shared-ip", "web"),),
            requested_ip=IPv4Address("192.0.2.200"),
        ),
        Service("out", type="ExternalName", external_name="www.example.net"),
    )
    assert state.balancing == Balancing(
        cluster_cidrs=(IPv4Network("10.244.0.0/16"),),
        service_cidrs=(IPv4Network("10.96.0.0/12"),),
        timeouts=(
            ("ipvs.tcpFinTimeout", 120),
            ("ipvs.tcpTimeout", 900),
            ("ipvs.udpTimeout", 300),
            ("tcpCloseWaitTimeout", 3600),
            ("tcpEstablishedTimeout", 86400),
            ("udpStreamTimeout", 120),
            ("udpTimeout", 30),
        ),
    )


def test_outgoing_nat_needs_no_services():
    network = parse(
        NODE.replace("[pods]", '[pods]\nnatOutgoing = true\nnatPortRange = "1024-65535"'), "F"
    ).state.pod_network
    assert (network.nat_outgoing, network.nat_ports, network.nat_random_fully) == (True, (1024, 65535), True)
    assert parse(NODE, "F").state.pod_network.nat_ports is None


HOST = """
# uplink.mode  shared  services  given   -> hostInterface
af_packet      true    no        -          -
af_packet      true    yes       -          dp0
af_packet      false   no        -          dp0
af_packet      true    yes       host0      host0
af_packet      true    yes       ""         -
udp            true    yes       -          -
none           true    yes       -          dp0
"""


@pytest.mark.parametrize("row", [line.split() for line in HOST.splitlines() if line and line[0] != "#"])
def test_the_host_has_an_interface_of_its_own_where_it_needs_one(row):
    mode, shared, services, given, expected = row
    source = f'uplink = {{ interface = "eth0", mode = "{mode}", shared = {shared} }}\n' if mode != "none" else ""
    source += 'node.addresses = ["192.0.2.11"]\n'
    if given != "-":
        source += 'node.hostInterface = "{}"\n'.format(given.strip('"'))
    source += HEAD if services == "yes" else ""
    assert parse(source, "F").state.node.host_interface == expected.strip("-")


@pytest.mark.parametrize(
    "service",
    [
        WEB.replace('"10.96.0.20"', '"None"'),
        '[[services.static]]\nname = "out"\ntype = "ExternalName"\nexternalName = "www.example.net"\n',
        BALANCED,
        NODE_PORT,
        NODE_PORT.replace('clusterIPs = ["10.96.0.20"]\n', ""),
        WEB.replace('clusterIPs = ["10.96.0.20"]', 'externalIPs = ["192.0.2.11"]\nexternalTrafficPolicy = "Local"'),
        WEB.replace("{ port = 80 }", '{ port = 53, name = "a" }, { port = 53, protocol = "UDP", name = "b" }'),
    ],
    ids=[
        "headless",
        "external-name",
        "load-balancer",
        "node-port",
        "node-port-alone",
        "a-nodes-address",
        "tcp-and-udp",
    ],
)
def test_every_type_of_service_is_accepted(service):
    assert errors(FILE + service) == []


# --- shape -----------------------------------------------------------------------------------------------------------

SHAPES = [
    ("scheduler = 1", 'scheduler: expected "rr", "wrr", "lc", "wlc", "sed", "nq", "sh", "dh", "mh", "fo" or "ovf"'),
    ('clusterIPs = ["none"]', 'clusterIPs[0]: expected an IP address such as 10.96.0.10, or "None" (got "none")'),
    ("endpoints = [{ weight = 1 }]", "endpoints[0].ip: missing; expected an IP address such as 192.0.2.11"),
    ("ports = [{}]", "ports[0].port: missing; expected a number from 1 to 65535"),
    ('ports = [{ port = 80, targetPort = "no name" }]', "ports[0].targetPort: expected a number from 1 to 65535, or"),
    ("ports = [{ port = 80, targetPort = 1.5 }]", "ports[0].targetPort: expected a number from 1 to 65535, or"),
    ("ports = [{ port = 80, targetPort = 0 }]", "ports[0].targetPort: expected a number from 1 to 65535, or the name"),
    ("ports = [{ port = 80, targetport = 1 }]", 'ports[0].targetport: unknown key; did you mean "targetPort"?'),
    ('drainTimeout = "24856d"', 'drainTimeout: expected a duration such as "5s"'),
    (f'drainTimeout = "{"9" * 400}d"', 'drainTimeout: expected a duration such as "5s"'),
    ('schedulerFlags = ["persistent"]', 'schedulerFlags[0]: expected "sh-port", "sh-fallback", "mh-port",'),
    ('endpoints = [{ ip = "10.244.1.10", ports = { http = 0 } }]', "endpoints[0].ports.http: expected a number from"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), SHAPES, ids=[expected.split(":")[0] for _, expected in SHAPES])
def test_a_wrong_shape_is_named(line, expected):
    found = errors(f'{FILE}[[services.static]]\nname = "web"\n{line}')
    assert any(f": services.static[0].{expected}" in each for each in found), found


# --- sense -----------------------------------------------------------------------------------------------------------

# What is appended to the service WEB, and the error that must be the only one.
SENSE = [
    ('externalTrafficPolicy = "Local"', 'externalTrafficPolicy: "Local" is for type "NodePort" or "LoadBalancer", or'),
    ('loadBalancerIPs = ["192.0.2.200"]', 'loadBalancerIPs: needs type = "LoadBalancer" (got "ClusterIP")'),
    ('loadBalancerSourceRanges = ["203.0.113.0/24"]', 'loadBalancerSourceRanges: needs type = "LoadBalancer"'),
    ("healthCheckNodePort = 30180", 'healthCheckNodePort: needs type = "LoadBalancer" (got "ClusterIP")'),
    ('externalName = "www.example.net"', 'externalName: needs type = "ExternalName" (got "ClusterIP")'),
    ('externalIPs = ["224.0.0.1"]', "externalIPs[0]: expected a unicast address (got 224.0.0.1)"),
    ('externalIPs = ["255.255.255.255"]', "externalIPs[0]: expected a unicast address (got 255.255.255.255)"),
    ('externalIPs = ["10.244.1.77"]', "externalIPs[0]: expected an address outside pods.cidr 10.244.1.0/24 (got"),
    ('externalIPs = ["10.244.2.77"]', "externalIPs[0]: expected an address outside peers[0].podCIDR 10.244.2.0/24"),
    ('externalIPs = ["2001:db8::1"]', "externalIPs[0]: IPv6 is not supported yet (got 2001:db8::1)"),
    ('externalIPs = ["10.96.0.20"]', "externalIPs[0]: used twice: 10.96.0.20 is also services.static[0].clusterIPs[0]"),
    ('schedulerFlags = ["ops"]', 'schedulerFlags[0]: "ops" is not supported: every datagram belongs to a flow'),
    ('schedulerFlags = ["mh-port"]', 'schedulerFlags[0]: "mh-port" belongs to scheduler "mh" (got "rr")'),
    ('sessionAffinityTimeout = "1h"', 'sessionAffinityTimeout: needs sessionAffinity = "ClientIP"'),
    ('sessionAffinity = "ClientIP"\nsessionAffinityTimeout = "25h"', 'sessionAffinityTimeout: expected "1s" to "24h"'),
    ('loadBalancerClass = "x"', 'loadBalancerClass: needs type = "LoadBalancer" (got "ClusterIP")'),
    ('endpoints = [{ ip = "127.0.0.1" }]', "endpoints[0].ip: expected the address of a pod or a node (got 127.0.0.1)"),
    ('endpoints = [{ ip = "fd00::1" }]', "endpoints[0].ip: IPv6 is not supported yet (got fd00::1)"),
    ('endpoints = [{ ip = "10.244.1.10" }, { ip = "10.244.1.10" }]', "endpoints[1].ip: used twice: 10.244.1.10 is"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), SENSE, ids=[expected.split(":")[0] for _, expected in SENSE])
def test_what_does_not_belong_to_a_service_is_named(line, expected):
    found = errors(FILE + WEB + line)
    assert len(found) == 1, found
    assert f": services.static[0].{expected}" in found[0]


# What in the service is replaced by what.
CHANGES = [
    (WEB, '"10.96.0.20"', '"192.0.2.50"', "clusterIPs[0]: expected an address inside services.serviceCIDR"),
    (WEB, '["10.96.0.20"]', '["None", "10.96.0.20"]', 'clusterIPs: expected "None" alone: a headless service has no'),
    (NODE_PORT, '"10.96.0.20"', '"None"', 'clusterIPs: expected an address: a "NodePort" is not headless (got "None")'),
    (WEB, 'clusterIPs = ["10.96.0.20"]', "", 'clusterIPs: missing; expected an address, or ["None"] for a headless'),
    (WEB, "{ port = 80 }", "", "ports: missing; expected at least one port"),
    (WEB, "port = 80", 'port = 80, protocol = "SCTP"', "ports[0].protocol: SCTP is not supported yet"),
    (WEB, "port = 80", "port = 80, nodePort = 30080", 'ports[0].nodePort: needs type "NodePort" or "LoadBalancer"'),
    (NODE_PORT, "30080", "80", "ports[0].nodePort: expected a port of services.nodePortRange, 30000 to 32767 (got 80)"),
    (NODE_PORT, ", nodePort = 30080", "", "ports[0].nodePort: missing; expected a port from 30000 to 32767"),
    (WEB, "{ port = 80 }", '{ port = 80, name = "a" }, { port = 81 }', "ports[1].name: missing; with several ports"),
    (WEB, "{ port = 80 }", '{ port = 80, name = "a" }, { port = 81, name = "a" }', "ports[1].name: used twice: a"),
    (WEB, "{ port = 80 }", '{ port = 80, name = "a" }, { port = 80, name = "b" }',
     "ports[1].port: used twice: 10.96.0.20:80/TCP is also services.static[0].ports[0].port"),
    (BALANCED, '"192.0.2.200"]', '"192.0.2.200"]\nhealthCheckNodePort = 30180', "healthCheckNodePort: needs"),
    (BALANCED, '"192.0.2.200"]', '"192.0.2.200"]\nhealthCheckNodePort = 62000\nexternalTrafficPolicy = "Local"',
     "healthCheckNodePort: expected a port of services.nodePortRange, 30000 to 32767 (got 62000)"),
    (BALANCED, '"192.0.2.200"', '"192.0.2.12"', "loadBalancerIPs[0]: is the address of peers[0] (got 192.0.2.12)"),
    (WEB, "80 }]", '80, targetPort = "http" }]\nendpoints = [{ ip = "10.244.1.10" }]',
     'endpoints[0].ports: the target port "http" is missing; expected ports = { http = 8080 }'),
    (WEB, '"web"', '"web"\ntype = "ExternalName"\nexternalName = "a.b"', 'clusterIPs: a service of type'),
]  # fmt: skip


@pytest.mark.parametrize(("service", "old", "new", "expected"), CHANGES, ids=[row[3].split(":")[0] for row in CHANGES])
def test_a_service_that_cannot_be_is_named(service, old, new, expected):
    assert old in service
    found = errors(FILE + service.replace(old, new, 1))
    assert len(found) == 1, found
    assert f": services.static[0].{expected}" in found[0]


def test_a_cluster_ip_is_not_the_nodes_own_address():
    found = errors(NODE + "[services]\n" + WEB.replace("10.96.0.20", "192.0.2.11"))
    assert [line.split(": ", 1)[1] for line in found] == [
        "services.static[0].clusterIPs[0]: is this node's own address (got 192.0.2.11)"
    ]


OTHER = WEB.replace('"web"', '"other"').replace("10.96.0.20", "10.96.0.21")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (WEB, WEB.replace("port = 80", "port = 81"), "name: used twice: default/web is also services.static[0].name"),
        (WEB, OTHER.replace("10.96.0.21", "10.96.0.20"), "ports[0].port: used twice: 10.96.0.20:80/TCP is also"),
        (
            NODE_PORT,
            NODE_PORT.replace('"web"', '"b"').replace("10.96.0.20", "10.96.0.21"),
            "ports[0].nodePort: used twice: 30080/TCP is also services.static[0].ports[0].nodePort",
        ),
        (
            NODE_PORT,
            OTHER.replace("port = 80", "port = 30080") + 'externalIPs = ["192.0.2.11"]',
            "ports[0].port: used twice: 192.0.2.11:30080/TCP is also services.static[0].ports[0].nodePort",
        ),
        (
            NODE_PORT,
            BALANCED.replace('"web"', '"b"').replace("10.96.0.20", "10.96.0.21")
            + 'externalTrafficPolicy = "Local"\nhealthCheckNodePort = 30080',
            "healthCheckNodePort: used twice: 30080/TCP is also services.static[0].ports[0].nodePort",
        ),
    ],
    ids=["name", "vip", "node-port", "external-ip-and-node-port", "health-check"],
)
def test_two_services_may_share_nothing(first, second, expected):
    found = errors(FILE + first + second)
    assert len(found) == 1, found
    assert f": services.static[1].{expected}" in found[0]


def test_two_services_may_share_an_address_with_different_ports_or_protocols():
    udp = OTHER.replace("port = 80", 'port = 80, protocol = "UDP"').replace("10.96.0.21", "10.96.0.20")
    assert errors(FILE + WEB + udp) == []
    assert errors(FILE + WEB + OTHER.replace("port = 80", "port = 81").replace("10.96.0.21", "10.96.0.20")) == []


RANGES = [
    ('"10.96.0.0/12"', '"10.244.1.0/25"', "services.serviceCIDR[0]: 10.244.1.0/25 overlaps 10.244.1.0/24 of"),
    ('"10.96.0.0/12"', '"192.0.2.0/24"', "services.serviceCIDR[0]: 192.0.2.0/24 has this node's own address"),
    ('"10.96.0.0/12"', '"fd00::/112"', "services.serviceCIDR[0]: IPv6 is not supported yet (got fd00::/112)"),
    ('"10.244.0.0/16"', ", ".join(f'"10.{n}.0.0/16"' for n in range(64)), "services.clusterCIDR: expected a few"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), RANGES, ids=["pods", "node", "ipv6", "many"])
def test_ranges_that_cannot_be_are_named(old, new, expected):
    found = errors(NODE + HEAD.replace(old, new))
    assert len(found) == 1, found
    assert expected in found[0]


def test_the_hosts_interface_is_no_other_one():
    found = errors(NODE.replace('name = "node1"', 'name = "node1"\nhostInterface = "eth0"'))
    assert found == ["4: node.hostInterface: is also uplink.interface (got eth0)"]


def test_an_error_in_one_service_does_not_hide_those_of_another():
    found = errors(FILE + WEB.replace("port = 80", 'port = "x"') + OTHER + 'externalTrafficPolicy = "Local"')
    assert [line.split(": ")[1] for line in found] == [
        "services.static[0].ports[0].port",
        "services.static[1].externalTrafficPolicy",
    ]
