"""What must fit together in node.toml, and what is refused for now."""

import pytest

from tests.node_file import NODE, errors

SENSE = [
    ('"10.244.1.10"', '"10.244.9.10"', "11: pods.static[0].ip[0]: expected an address inside pods.cidr 10.244.1.0/24"),
    ('"10.244.1.10"', '"10.244.1.0"', "11: pods.static[0].ip[0]: the first address of pods.cidr is the node's"),
    ('["10.244.1.10"]', "[]", "11: pods.static[0].ip: expected at least one address (got [])"),
    ('cidr = ["10.244.1.0/24"]', "", "7: pods.cidr: missing; expected the prefix that holds the pods' addresses"),
    ("[pods]", '[pods]\ngateway = "10.244.1.1"', "8: pods.gateway: expected an address outside pods.cidr"),
    ("[pods]", "[pods]\nmtu = 1451", "8: pods.mtu: expected at most 1450: uplink.mtu - 50 for VXLAN (got 1451)"),
    ("[pods]", "[pods]\nmtu = 500", "8: pods.mtu: expected 0 or at least 576 (got 500)"),
    ("[pods]", '[pods]\noffload = ["tso4"]', '8: pods.offload: expected "csum" beside the others'),
    ('"192.0.2.11"', '"10.244.1.9"', "4: node.addresses[0]: expected an address outside pods.cidr (got 10.244.1.9)"),
    ('addresses = ["192.0.2.11"]', "", "2: node.addresses: missing; expected this node's address on the uplink"),
    ('name = "node2"', 'name = "node1"', "13: peers[0].name: is this node's own name (got node1)"),
    ('"192.0.2.12"', '"192.0.2.11"', "14: peers[0].address: is this node's own address (got 192.0.2.11)"),
    ('"192.0.2.12"', '"10.244.1.9"', "14: peers[0].address: expected an address outside pods.cidr (got 10.244.1.9)"),
    ('"10.244.2.0/24"', '"10.244.0.0/16"', "15: peers[0].podCIDR[0]: 10.244.0.0/16 overlaps 10.244.1.0/24"),
    ('interface = "eth0"', 'mode = "none"', "12: peers[0]: needs an uplink: give uplink.interface"),
    ('interface = "eth0"', "mtu = 1500", "5: uplink.interface: missing; expected the name of the host's NIC"),
    ('interface = "eth0"', 'interface = "vxlan.calico"', "6: uplink.interface: is also vxlan.interface"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), SENSE, ids=[row[2].split(": ")[1] for row in SENSE])
def test_what_does_not_fit_together_is_named(old, new, expected):
    assert old in NODE
    found = errors(NODE.replace(old, new, 1))
    assert any(line.startswith(expected) for line in found), found


POD = '[[pods.static]]\nname = "{name}"\nip = ["{ip}"]\nmac = "{mac}"\nnetns = "{netns}"\n'
FIRST = {"name": "a", "ip": "10.244.1.20", "mac": "02:00:00:00:00:01", "netns": "x"}
SECOND = {"name": "b", "ip": "10.244.1.21", "mac": "02:00:00:00:00:02", "netns": "y"}
HEAD = '[pods]\ncidr = ["10.244.1.0/24"]\n'


@pytest.mark.parametrize(
    ("key", "line", "where"),
    [("name", 9, "name"), ("ip", 10, "ip[0]"), ("mac", 11, "mac"), ("netns", 12, "netns")],
)
def test_two_pods_may_share_nothing(key, line, where):
    assert not errors(HEAD + POD.format(**FIRST) + POD.format(**SECOND))
    found = errors(HEAD + POD.format(**FIRST) + POD.format(**(SECOND | {key: FIRST[key]})))
    assert len(found) == 1, found
    assert found[0].startswith(f"{line}: pods.static[1].{where}: used twice: ")
    assert found[0].endswith(f" is also pods.static[0].{where}")


PEER = '[[peers]]\nname = "node3"\naddress = "192.0.2.13"\npodCIDR = ["10.244.3.0/24"]\n'


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("node3", "node2", "17: peers[1].name: used twice: node2 is also peers[0].name"),
        ("192.0.2.13", "192.0.2.12", "18: peers[1].address: used twice: 192.0.2.12 is also peers[0].address"),
        ("10.244.3.0/24", "10.244.2.128/25", "overlaps 10.244.2.0/24 of peers[0].podCIDR[0]"),
        ("[[peers]]", '[[peers]]\nvtepMAC = "66:2d:bf:44:a6:8b"', "66:2d:bf:44:a6:8b is also peers[0].vtepMAC"),
    ],
)  # fmt: skip
def test_two_peers_may_share_nothing(old, new, expected):
    assert not errors(NODE + PEER)
    found = errors(NODE + PEER.replace(old, new))
    assert len(found) == 1, found
    assert expected in found[0]


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ('dst = "0.0.0.0/0"', "routes[0].via: missing; expected the address of the next hop"),
        ('dst = "0.0.0.0/0"\ntype = "blackhole"\nvia = "192.0.2.1"', 'a route of type "blackhole" has no next hop'),
        ('dst = "0.0.0.0/0"\nvia = "10.244.1.10"', "routes[0].via: expected a neighbor on the uplink, not a pod"),
        ('dst = "10.244.2.0/24"\nvia = "192.0.2.1"', "used twice: 10.244.2.0/24 is also peers[0].podCIDR[0]"),
        ('dst = "10.244.1.0/24"\nvia = "192.0.2.1"', "used twice: 10.244.1.0/24 is also pods.cidr[0]"),
    ],
)
def test_routes_that_cannot_be_are_named(route, expected):
    found = errors(f"{NODE}[[routes]]\n{route}")
    assert len(found) == 1, found
    assert expected in found[0]


def test_on_an_uplink_of_our_own_a_route_without_a_next_hop_is_the_lan_itself():
    own = NODE.replace('interface = "eth0"', 'interface = "eth0"\nshared = false')
    assert not errors(f'{own}[[routes]]\ndst = "192.0.2.0/24"')
    assert errors(f'{NODE}[[routes]]\ndst = "192.0.2.0/24"')


def test_udp_mode_carries_vxlan_only():
    udp = NODE.replace('interface = "eth0"', 'interface = "eth0"\nmode = "udp"')
    assert not errors(udp)
    found = errors(udp + '[[routes]]\ndst="0.0.0.0/0"\nvia="192.0.2.1"\n[vxlan]\nmode = "CrossSubnet"')
    assert [line.split(": ")[1] for line in found] == ["routes[0].via", "vxlan.mode"]


# --- what comes later ------------------------------------------------------------------------------------------------

LATER = [
    ('node.netns = "x"', "node.netns"),
    ('uplink = { interface = "eth0", mode = "tap" }', "uplink.mode"),
    ("services.ipvs.strictARP = false", "services.ipvs.strictARP"),
    ("services.masqueradeBit = 15", "services.masqueradeBit"),
    ('[[networkPolicies]]\nname = "x"', "networkPolicies"),
    ('engine.kernels = "python"', "engine.kernels"),
    ("engine.workers = 2", "engine.workers"),
    ("engine.busyPollUs = 50", "engine.busyPollUs"),
    ('web.listen = "127.0.0.1:8090"', "web.listen"),
    ('log.format = "journal"', "log.format"),
    ('security.user = "nobody"', "security.user"),
    ("security.seccomp = true", "security.seccomp"),
    ('security.keepCapabilities = ["CAP_NET_RAW"]', "security.keepCapabilities"),
    ('capture.dir = "/var/log"', "capture.dir"),
    ("[[pods.static]]\nname='a'\nip=['10.244.1.9']\nbandwidth = { ingress = '1M' }", "pods.static[0].bandwidth"),
]


@pytest.mark.parametrize(("source", "key"), LATER, ids=[key for _, key in LATER])
def test_what_comes_later_is_refused_never_ignored(source, key):
    assert any(f": {key}: not supported yet" in line for line in errors(source)), errors(source)


def test_what_is_switched_off_is_accepted():
    off = """
    services = {}
    networkPolicies = []
    state.source = "static"
    web.listen = ""
    api.cni = false
    pods.natOutgoing = false
    security = { user = "", seccomp = false, keepCapabilities = [] }
    capture.dir = ""
    engine = { kernels = "numba", workers = 1, busyPollUs = 0 }
    """
    assert errors(off) == []


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ('node.addresses = ["2001:db8::11"]', "node.addresses[0]"),
        ('pods.cidr = ["fd00::/64"]', "pods.cidr[0]"),
        ('pods.gateway = "fe80::1"', "pods.gateway"),
        (NODE.replace("192.0.2.12", "2001:db8::12"), "peers[0].address"),
        (NODE.replace("10.244.2.0/24", "fd00::/64"), "peers[0].podCIDR[0]"),
        (NODE + '[[routes]]\ndst = "::/0"\nvia = "192.0.2.1"', "routes[0].dst"),
    ],
)
def test_ipv6_comes_later(source, key):
    assert any(f": {key}: IPv6 is not supported yet (got " in line for line in errors(source)), errors(source)


def test_nat_outgoing_needs_to_know_all_pods_where_a_store_has_their_blocks():
    text = '[state]\nsource = "etcd"\n[pods]\nnatOutgoing = true\n[uplink]\ninterface = "eth0"\n'
    text += '[node]\naddresses = ["192.0.2.11"]\n'
    assert "services.clusterCIDR: missing; expected the prefixes of all pods" in errors(text)[0]
    assert errors(text + '[services]\nclusterCIDR = ["10.244.0.0/16"]\n') == []
