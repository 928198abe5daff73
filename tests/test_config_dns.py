"""[dns] in node.toml: what becomes of it, and what is refused."""

from ipaddress import IPv4Address

import pytest

from dataplane.config import load, parse
from dataplane.control.reconcile import process_keys
from dataplane.control.state import Dns
from tests.node_file import NODE, errors

HEAD = """
[services]
clusterCIDR = ["10.244.0.0/16"]
serviceCIDR = ["10.96.0.0/12"]
[[services.static]]
name = "web"
clusterIPs = ["10.96.0.20"]
ports = [{ port = 80 }]
"""
WHOLE = """
[dns]
clusterDomain = "kube.example"
clusterIP = "10.96.0.10"
ttl = "30s"
upstreams = ["192.0.2.53", "192.0.2.54:5353"]
pods = "verified"
"""
FILE = NODE + HEAD


def test_a_whole_section_is_read():
    servers = ((IPv4Address("192.0.2.53"), 53), (IPv4Address("192.0.2.54"), 5353))
    assert parse(FILE + WHOLE, "F").state.dns == Dns(IPv4Address("10.96.0.10"), "kube.example", 30, servers, "verified")


def test_without_the_section_there_is_no_dns():
    assert parse(FILE, "F").state.dns is None


def test_the_defaults_are_those_of_coredns():
    assert parse(FILE + '[dns]\nclusterIP = "10.96.0.10"', "F").state.dns == Dns(IPv4Address("10.96.0.10"))


def test_the_built_in_example_answers_names():
    assert load(None).state.dns == Dns(IPv4Address("10.96.0.10"))


def test_dns_needs_the_hosts_link_by_itself():
    assert parse(NODE + '[dns]\nclusterIP = "10.96.0.10"', "F").state.node.host_interface == "dp0"


def test_dns_comes_and_goes_by_a_restart_only():
    without, with_it, other = (parse(FILE + text, "F") for text in ("", WHOLE, WHOLE.replace("30s", "5s")))
    assert process_keys(without, with_it) == ("dns.clusterIP",)
    assert process_keys(with_it, without) == ("dns.clusterIP",)
    assert process_keys(with_it, other) == ()


SECTION = '[dns]\nclusterIP = "10.96.0.10"\n'


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ("[dns]", "dns.clusterIP: missing; expected the cluster IP that pods ask, such as 10.96.0.10"),
        ('[dns]\nclusterIP = "fd00::10"', "dns.clusterIP: IPv6 is not supported yet (got fd00::10)"),
        ('[dns]\nclusterIP = "dns"', 'dns.clusterIP: expected an IP address such as 192.0.2.11 (got "dns")'),
        (
            '[dns]\nclusterIP = "10.10.0.10"',
            "dns.clusterIP: expected an address inside services.serviceCIDR 10.96.0.0/12 (got 10.10.0.10)",
        ),
        (SECTION + 'ttl = "2h"', "dns.ttl: expected at most 1h (got 7200s)"),
        (SECTION + 'pods = "all"', 'dns.pods: expected "disabled", "insecure" or "verified" (got "all")'),
        (SECTION + 'upstreams = ["10.96.0.10"]', "dns.upstreams[0]: is dns.clusterIP itself (got 10.96.0.10)"),
        (
            SECTION + 'upstreams = ["192.0.2.53", "192.0.2.53:53"]',
            "dns.upstreams[1]: used twice: 192.0.2.53:53 is also dns.upstreams[0]",
        ),
        (SECTION + 'upstreams = ["0.0.0.0"]', "dns.upstreams[0]: expected the address of a name server (got 0.0.0.0)"),
        (SECTION + 'clusterDomain = "in.arpa"', "dns.clusterDomain: is where names of addresses are (got in.arpa)"),
        (SECTION + 'domain = "a"', 'dns.domain: unknown key; did you mean "clusterDomain"?'),
    ],
)  # fmt: skip
def test_what_is_refused(section, error):
    found = errors(FILE + section)
    assert [line.partition(" ")[2] for line in found] == [error]


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("224.0.0.10", "expected a unicast address (got 224.0.0.10)"),
        ("192.0.2.11", "is this node's own address (got 192.0.2.11)"),
        ("10.244.1.99", "expected an address outside pods.cidr (got 10.244.1.99)"),
    ],
)
def test_the_address_is_nobody_elses(address, error):
    found = errors(NODE + f'[dns]\nclusterIP = "{address}"')
    assert [line.partition(" ")[2] for line in found] == [f"dns.clusterIP: {error}"]


def test_a_domain_leaves_room_for_names_in_front_of_it():
    long = ".".join(["a" * 42] * 4)
    assert errors(FILE + SECTION + f'clusterDomain = "{long}"')[0].endswith(
        f"dns.clusterDomain: expected at most 128 characters, 63 between dots (got {long})"
    )


def test_an_address_that_is_a_services_is_not_for_dns():
    found = errors(FILE + '[dns]\nclusterIP = "10.96.0.20"')
    assert [line.partition(" ")[2] for line in found] == [
        "services.static[0].clusterIPs[0]: used twice: 10.96.0.20 is also dns.clusterIP"
    ]


def test_the_resolver_needs_an_address_of_its_own():
    alone = (
        '[node]\nname = "node1"\n[pods]\ncidr = ["10.244.1.0/24"]\n[[pods.static]]\nname = "a"\nip = ["10.244.1.0"]\n'
    )
    assert errors(alone) == []
    assert errors(alone + SECTION)[0].endswith("pods.static[0].ip[0]: is the resolver's own address (got 10.244.1.0)")


def test_the_resolver_needs_the_hosts_link():
    off = FILE.replace('name = "node1"', 'name = "node1"\nhostInterface = ""')
    assert "needs node.hostInterface: the resolver answers behind it" in errors(off + SECTION)[0]


def test_the_resolver_needs_a_block():
    alone = '[node]\nname = "node1"\n[dns]\nclusterIP = "10.96.0.10"\n'
    assert [line.partition(" ")[2] for line in errors(alone)] == [
        "dns.clusterIP: needs pods.cidr: the resolver has its first address"
    ]
    assert errors(alone + '[state]\nsource = "etcd"') == []
