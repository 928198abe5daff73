"""The section [ipam]: what it means, and what is refused."""

from ipaddress import ip_network

import pytest

from dataplane.config import parse
from dataplane.control.ipam import Pool, Rules
from dataplane.control.state import Selector
from tests.node_file import errors

CLUSTER = """
[node]
name = "node1"
addresses = ["192.0.2.11"]
[uplink]
interface = "eth0"
[state]
source = "etcd"
"""
IPAM = """
[ipam]
strictAffinity = true
maxBlocksPerHost = 4
cooldown = "30s"
reservations = ["10.244.0.0/28", "10.244.9.9"]
[[ipam.pools]]
name = "west"
cidr = "10.244.0.0/16"
blockSize = 27
disabled = true
nodeSelector = { matchLabels = { zone = "west" } }
[[ipam.pools]]
name = "tiny"
cidr = "10.245.0.0/28"
"""


def test_the_section_becomes_rules():
    assert parse(CLUSTER + IPAM, "node.toml").ipam == Rules(
        pools=(
            Pool("west", ip_network("10.244.0.0/16"), 27, disabled=True, node_selector=Selector((("zone", "west"),))),
            Pool("tiny", ip_network("10.245.0.0/28"), 28),
        ),
        reservations=(ip_network("10.244.0.0/28"), ip_network("10.244.9.9/32")),
        strict_affinity=True,
        max_blocks=4,
        cooldown=30.0,
    )


def test_a_file_without_the_section_has_no_rules():
    assert parse(CLUSTER, "node.toml").ipam is None
    assert parse(CLUSTER + "[ipam]", "node.toml").ipam == Rules()


def test_a_block_has_calicos_size():
    rules = parse(CLUSTER + '[[ipam.pools]]\ncidr = "10.244.0.0/16"', "node.toml").ipam
    assert rules == Rules((Pool("default", ip_network("10.244.0.0/16"), 26),))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"30s"', '"1201s"', "13: ipam.cooldown: expected at most 1200s (got 1201s)"),
        ('"10.244.9.9"', '"fd00::/64"', "14: ipam.reservations[1]: IPv6 is not supported yet (got fd00::/64)"),
        ('"10.244.9.9"', '"10.244.9.9/8"', "14: ipam.reservations[1]: expected an IP prefix without host bits"),
        ("= 4", "= 0", "12: ipam.maxBlocksPerHost: expected a number from 1 to 1048576 (got 0)"),
        ("= 27", "= 15", "18: ipam.pools[0].blockSize: expected a number from 20 to 128 (got 15)"),
        ("= 27", "= 33", "18: ipam.pools[0].blockSize: expected a number from 20 to 32 for 10.244.0.0/16"),
        ('/28"\n', '/28"\nblockSize = 26\n', "24: ipam.pools[1].blockSize: expected a number from 28 to 32"),
        ('"tiny"', '"west"', "22: ipam.pools[1].name: used twice: west is also ipam.pools[0].name"),
        ('"10.245.0.0/28"', '"10.244.0.0/28"', "23: ipam.pools[1].cidr: 10.244.0.0/28 overlaps 10.244.0.0/16"),
        ('"10.245.0.0/28"', '"fd00::/116"', "23: ipam.pools[1].cidr: IPv6 is not supported yet (got fd00::/116)"),
        ('"10.245.0.0/28"', '"192.0.2.0/24"', "4: node.addresses[0]: expected an address outside the pool"),
        ('"etcd"', '"static"', '15: ipam.pools[0]: needs state.source "etcd": pods of a static node have'),
        ("[state]", '[pods]\ncidr = ["10.245.0.0/24"]\n[state]', "25: ipam.pools[1].cidr: 10.245.0.0/28 overlaps"),
        ("[state]", '[pods]\ngateway = "10.245.0.1"\n[state]', "8: pods.gateway: expected an address outside the pool"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(old, new, expected):
    text = CLUSTER + IPAM
    assert not errors(text)
    assert old in text
    found = errors(text.replace(old, new, 1))
    assert len(found) == 1, found
    assert found[0].startswith(expected), found
