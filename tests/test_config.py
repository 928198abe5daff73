"""node.toml: what is accepted, and what is said about a wrong shape."""

import os
import tomllib
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from dataplane import config
from dataplane.config import ConfigError, load, parse
from dataplane.config_cluster import ClusterFile, DnsSection
from dataplane.config_model import CaptureSection, key_name
from dataplane.config_services import balancing_of, service_of
from dataplane.control.process import Engine, Log
from dataplane.control.state import PodNetwork, StaticRoute, Uplink, pod_mac, vtep_mac
from tests.node_file import EVERY_KEY, NODE, errors

ROOT = Path(__file__).parent.parent


# --- what is right ---------------------------------------------------------------------------------------------------


def test_the_example_is_the_built_in_configuration():
    assert (ROOT / "examples" / "node.toml").resolve() == config.DEFAULT.resolve()
    example = load(ROOT / "examples" / "node.toml")
    assert example.state == load().state
    assert load().path is None
    assert [(pod.name, pod.netns) for pod in example.state.pods] == [
        (name, name) for name in ("web-0", "web-1", "client-0")
    ]
    assert example.state.uplink is None


def test_the_example_says_the_defaults():
    values = tomllib.loads(config.DEFAULT.read_text())
    web = {key: values["services"]["static"][0][key] for key in ("name", "clusterIPs", "ports", "endpoints")}
    services = {key: values["services"][key] for key in ("clusterCIDR", "serviceCIDR")} | {"static": [web]}
    given = ClusterFile.model_validate(values)
    dns = {"clusterIP": values["dns"]["clusterIP"]}
    bare = ClusterFile.model_validate({"pods": {"cidr": values["pods"]["cidr"]}, "services": services, "dns": dns})
    assert given.dns == bare.dns
    assert service_of(given.services.static[0]) == service_of(bare.services.static[0])
    assert balancing_of(given.services) == balancing_of(bare.services)
    assert load().state.node.host_interface == "dp0"
    assert given.engine == bare.engine
    assert given.log == bare.log
    assert given.metrics == bare.metrics
    assert load().state.pod_network == PodNetwork(cidrs=(IPv4Network("10.244.1.0/24"),))


def test_a_whole_node_is_read():
    state = parse(NODE, "F").state
    assert state.node.name == "node1"
    assert state.uplink == Uplink("eth0", "af_packet", 1500)
    assert state.pods[0].mac == pod_mac("default", "web-0")
    assert state.pods[0].interface == "cali0d7763386da"
    assert state.pods[0].netns == "web-0"
    assert state.peers[0].vtep_mac == vtep_mac("node2")
    assert state.peers[0].pod_cidrs == (IPv4Network("10.244.2.0/24"),)


def test_an_empty_file_is_a_node_with_nothing():
    settings = parse("", "F")
    assert settings.state.pods == ()
    assert settings.socket == Path(f"/run/dataplane/{settings.state.node.name}.sock")
    assert settings.state.node.name == os.uname().nodename.lower()


MTUS = """
# uplink  vxlan        pods.mtu  -> pod
1500      Always       0         1450
9000      CrossSubnet  0         8950
1500      Never        0         1500
1500      Always       1400      1400
"""


@pytest.mark.parametrize("row", [line.split() for line in MTUS.splitlines() if line and line[0] != "#"])
def test_a_pods_mtu_is_what_the_uplink_leaves(row):
    uplink, mode, given, expected = row
    source = NODE.replace('"eth0"', f'"eth0"\nmtu = {uplink}').replace("[pods]", f"[pods]\nmtu = {given}")
    assert parse(f'{source}[vxlan]\nmode = "{mode}"', "F").state.pods[0].mtu == int(expected)


def test_settings_of_the_process_are_read():
    settings = parse(
        """
        engine = { loop = "asyncio", batch = 64 }
        api.socket = "/tmp/x.sock"
        metrics.listen = "[::1]:9091"
        log = { level = "debug", format = "json" }
        """,
        "F",
    )
    assert settings.engine == Engine("asyncio", 64)
    assert settings.socket == Path("/tmp/x.sock")
    assert settings.metrics == ("::1", 9091)
    assert settings.log == Log("debug", "json")


def test_a_namespace_has_one_spelling():
    for spelling in ("blue", "/run/netns/blue", "/var/run/netns/blue"):
        source = NODE.replace('name = "web-0"', f'name = "web-0"\nnetns = "{spelling}"')
        assert parse(source, "F").state.pods[0].netns == "blue"
    source = NODE.replace('name = "web-0"', 'name = "web-0"\nnetns = "/proc/1/ns/net"')
    assert parse(source, "F").state.pods[0].netns == "/proc/1/ns/net"


def test_routes_are_read():
    source = NODE + '[[routes]]\ndst = "198.51.100.0/24"\nvia = "192.0.2.1"\n'
    source += '[[routes]]\ndst = "203.0.113.0/24"\ntype = "unreachable"\n'
    assert parse(source, "F").state.routes == (
        StaticRoute(IPv4Network("198.51.100.0/24"), IPv4Address("192.0.2.1")),
        StaticRoute(IPv4Network("203.0.113.0/24"), None, "unreachable"),
    )


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5), ("15m", 900), ("24h", 86400), ("500ms", 0.5), ("1.5s", 1.5)])
def test_durations_have_units(text, seconds):
    assert DnsSection.model_validate({"ttl": text}).ttl == seconds


@pytest.mark.parametrize(("text", "size"), [("100M", 100_000_000), ("64K", 64_000), ("7", 7), ("1G", 10**9)])
def test_sizes_have_units(text, size):
    assert CaptureSection.model_validate({"maxSize": text}).max_size == size


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("gateway_mac", "gatewayMAC"),
        ("pod_cidr", "podCIDR"),
        ("proxy_arp", "proxyARP"),
        ("cluster_ips", "clusterIPs"),
        ("lease_ttl", "leaseTTL"),
        ("busy_poll_us", "busyPollUs"),
        ("l2_advertisements", "l2Advertisements"),
        ("from_", "from"),
    ],
)
def test_keys_are_spelt_as_kubernetes_and_calico_spell_them(field, key):
    assert key_name(field) == key


# --- errors of shape -------------------------------------------------------------------------------------------------

SHAPES = [
    ("a = 1\nb = = 2", "2: not TOML: invalid value"),
    ("a = [1,\n2", "2: not TOML: unclosed array"),
    ("[vxlan]\nvni = 0", "2: vxlan.vni: expected a number from 1 to 16777215 (got 0)"),
    ("[vxlan]\nvni = 16777216", "2: vxlan.vni: expected a number from 1 to 16777215 (got 16777216)"),
    ("[vxlan]\nport = 65536", "2: vxlan.port: expected a number from 1 to 65535 (got 65536)"),
    ("vxlan.vni = true", "1: vxlan.vni: expected a number from 1 to 16777215 (got true)"),
    ('vxlan.mode = "always"', '1: vxlan.mode: expected "Always", "CrossSubnet" or "Never" (got "always")'),
    ("vxlan.udpChecksum = 1", "1: vxlan.udpChecksum: expected true or false (got 1)"),
    ("vxlan = 5", "1: vxlan: expected a table (got 5)"),
    ("peers = 5", "1: peers: expected a list (got 5)"),
    ("[[vxlan]]", "1: vxlan: expected a table (got [{}])"),
    ('node.addresses = "192.0.2.1"', '1: node.addresses: expected a list (got "192.0.2.1")'),
    (
        'node.addresses = [\n"192.0.2.1",\n"192.0.2"]',
        '3: node.addresses[1]: expected an IP address such as 192.0.2.11 (got "192.0.2")',
    ),
    (
        'pods.cidr = ["10.244.1.5/24"]',
        '1: pods.cidr[0]: expected an IP prefix without host bits, such as 10.244.1.0/24 (got "10.244.1.5/24")',
    ),
    (
        'pods.gatewayMAC = "01:00:5e:00:00:01"',
        '1: pods.gatewayMAC: expected a unicast MAC address such as 02:00:0a:f4:01:0a (got "01:00:5e:00:00:01")',
    ),
    ('node.name = "Node_1"', '1: node.name: expected a Kubernetes name (lower-case letters, digits, "-" and ".")'),
    ('metrics.listen = "9091"', '1: metrics.listen: expected "address:port", or "" for off (got "9091")'),
    ('api.socket = "x"', '1: api.socket: expected an absolute path of at most 107 bytes (got "x")'),
    ('dns.ttl = "5"', '1: dns.ttl: expected a duration such as "5s", "15m" or "24h" (got "5")'),
    ("dns.ttl = 5", '1: dns.ttl: expected a duration such as "5s", "15m" or "24h" (got 5)'),
    ("[[peers]]\nname = 'a'\naddress = '192.0.2.1'", "1: peers[0].podCIDR: missing; expected a list, each an IP"),
    ("[[routes]]\nvia = '192.0.2.1'", "1: routes[0].dst: missing; expected an IP prefix without host bits"),
    ("pods.gatewayMac = 1", '1: pods.gatewayMac: unknown key; did you mean "gatewayMAC"?'),
    ("\n[vxlna]", '2: vxlna: unknown key; did you mean "vxlan"?'),
    ("[log]\nqqq = 1", "2: log.qqq: unknown key; known are level, format"),
    ("[[pods.static]]\nlabels = { app = 1 }", '2: pods.static[0].labels.app: expected a string (got 1)'),
    ('apiVersion = "dataplane/v9"', '1: apiVersion: expected "dataplane/v1" (got "dataplane/v9")'),
    ("engine.batch = 257", "1: engine.batch: expected a number from 1 to 256 (got 257)"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "expected"), SHAPES, ids=[expected.split(": ")[1] for _, expected in SHAPES])
def test_a_wrong_shape_is_named_with_its_line(source, expected):
    found = errors(source)
    assert any(line.startswith(expected) for line in found), found


def test_all_errors_are_reported_at_once_in_the_order_of_the_file():
    found = errors(
        """
        [vxlan]
        vni = 0
        [pods]
        cidr = ["10.244.1.0/24"]
        gateway = "10.244.1.1"
        natOutgoing = 1
        [[pods.static]]
        name = "a"
        ip = ["10.244.9.9"]
        mac = "nonsense"
        [nonsense]
        """
    )
    assert [line.split(": ")[:2] for line in found] == [
        ["3", "vxlan.vni"],
        ["6", "pods.gateway"],
        ["7", "pods.natOutgoing"],
        ["10", "pods.static[0].ip[0]"],
        ["11", "pods.static[0].mac"],
        ["12", "nonsense"],
    ]


def test_a_wrong_value_has_no_echo():
    assert errors(NODE.replace('interface = "eth0"', 'interfce = "eth0"')) == [
        '6: uplink.interfce: unknown key; did you mean "interface"?'
    ]
    assert len(errors(NODE.replace("10.244.1.0/24", "10.244.1.5/24"))) == 1
    assert len(errors(NODE.replace('"192.0.2.12"', '"192.0.2"'))) == 1


def test_indexes_stay_those_of_the_file_when_an_element_before_was_wrong():
    source = (
        NODE + '[[peers]]\nname = "x"\n[[peers]]\nname = "node2"\naddress = "192.0.2.13"\npodCIDR=["10.244.3.0/24"]'
    )
    found = errors(source)
    assert "19: peers[2].name: used twice: node2 is also peers[0].name" in found, found


def test_every_key_is_known_and_what_comes_later_has_its_shape_checked_too():
    assert all("not supported yet" in line for line in errors(EVERY_KEY))
    assert len(errors(EVERY_KEY)) == 6
    found = errors(EVERY_KEY.replace("port = 80, ", 'port = "80", '))
    assert '73: services.static[0].ports[0].port: expected a number from 1 to 65535 (got "80")' in found


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/x\.toml: no such file$"):
        load(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: is a directory; expected a TOML file$"):
        load(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "node.toml"
    path.write_bytes(b'[node]\nname = "\xff"\n')
    with pytest.raises(ConfigError, match=r"node\.toml:2: expected UTF-8 \(got byte 0xff\)$"):
        load(path)


def test_the_path_is_remembered_for_reload(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text(NODE)
    assert load(path).path == path
