"""What our nodes put on the wire, as Wireshark sees it: every header and every checksum, outer and inner.

         pod a                       captured here                        pod b
    10.244.1.10 ── dataplane ══ eth0 ── port1, br0 ══ eth0 ══ dataplane ── 10.244.2.10
                   192.0.2.11                         192.0.2.12

The offloads of the underlay are off: the kernel of the underlay finishes nothing for us, and shows packets one by one.
Those of the pods are on, so that our node gets unfinished checksums and super-frames.
"""

import json
from pathlib import Path

import pytest

from dataplane.control.state import vtep_mac
from tests.netns import checks
from tests.netns.harness import Namespace, Network
from tests.netns.ours import Pair, config, member, set_offloads
from tests.netns.peers import colons

pytestmark = pytest.mark.netns

OUTER = "udp.dstport == 4789"
FROM_A = f"{OUTER} && ip.src == 192.0.2.11"
FROM_B = f"{OUTER} && ip.src == 192.0.2.12"


@pytest.fixture(scope="module")
def pair(network: Network) -> Pair:
    first, second = member(network, 1), member(network, 2)
    hosts = network.namespace("host1"), network.namespace("host2")
    switch = network.lan((hosts[0], f"{first.address}/24"), (hosts[1], f"{second.address}/24"))
    nodes = (
        network.node(hosts[0], "node1", config(first, {"a": Pair.A}, [second])).start(),
        network.node(hosts[1], "node2", config(second, {"b": Pair.B}, [first])).start(),
    )
    made = Pair(network.pod("a"), network.pod("b"), nodes, hosts, switch)
    set_offloads(made, "off")
    return made


def mac_of(host: Namespace) -> str:
    found: str = json.loads(host.ip("-json", "link", "show", "dev", "eth0"))[0]["address"]
    return found


@pytest.fixture(scope="module")
def captured(pair: Pair) -> Path:
    """A little of everything."""
    with pair.switch.capture("port1") as capture:
        checks.ping(pair.a, pair.B, count=20)
        checks.tcp(pair.a, pair.b, pair.B, 3_000_000)
        checks.udp(pair.a, pair.b, pair.B)
        checks.hops(pair.a, pair.B)
        checks.ping(pair.b, pair.A, size=4000)
    return capture


def test_wireshark_decodes_every_frame_without_a_warning(captured):
    checks.nothing_is_malformed(captured, at_least=4000)


def test_every_checksum_was_there_and_good(captured):
    """The outer UDP header alone has none, as Calico's; wireshark: 1 good, 3 not present."""
    whole = f"{OUTER} && !(ip.flags.mf == 1) && !(ip.frag_offset > 0) && !(icmp.type in {{3, 11}})"
    names = ("ip.checksum.status", "udp.checksum.status", "tcp.checksum.status", "icmp.checksum.status")
    found = {tuple(each) for each in checks.fields(captured, whole, *names)}
    assert found == {("1,1", "3", "1", ""), ("1,1", "3,1", "", ""), ("1,1", "3", "", "1")}


@pytest.mark.parametrize(("node", "way"), [(0, FROM_A), (1, FROM_B)], ids=["node1", "node2"])
def test_the_headers_are_calicos(captured, pair, node, way):
    names = ("ip.ttl", "ip.flags.df", "ip.dsfield", "udp.checksum", "vxlan.flags", "vxlan.vni", "eth.src", "eth.dst")
    macs = [colons(vtep_mac(each.name)) for each in pair.nodes]
    uplinks = [mac_of(host) for host in pair.hosts]
    lines = checks.fields(captured, f"{way} && icmp.type in {{0, 8}} && !(ip.flags.mf == 1)", *names)
    assert len(lines) >= 20
    for ttl, dont_fragment, tos, checksum, flags, vni, source, target in lines:
        assert [each.split(",")[0] for each in (ttl, dont_fragment, tos, checksum)] == ["64", "0", "0x00", "0x0000"]
        assert (flags, vni) == ("0x0800", "4096")
        assert source.split(",") == [uplinks[node], macs[node]]
        assert target.split(",") == [uplinks[1 - node], macs[1 - node]]


def test_no_packet_on_the_wire_is_larger_than_its_mtu(captured):
    assert max(int(length) for (length,) in checks.fields(captured, OUTER, "frame.len")) == 14 + 1500


def test_a_flow_keeps_its_outer_source_port_and_flows_differ(pair):
    sizes = [100] * 4
    with pair.switch.capture("port1", "udp port 4789") as capture:
        for _ in range(24):
            checks.udp(pair.a, pair.b, pair.B, sizes)
    flows: dict[str, set[int]] = {}
    for (ports,) in checks.fields(capture, f"{FROM_A} && udp.dstport == {checks.PORT}", "udp.srcport"):
        outside, inside = ports.split(",")
        flows.setdefault(inside, set()).add(int(outside))
    assert len(flows) == 24
    assert all(len(ports) == 1 for ports in flows.values()), flows
    used = {port for ports in flows.values() for port in ports}
    assert len(used) >= 6, used
    assert all(32768 <= port <= 60999 for port in used), used


@pytest.mark.parametrize(("inner", "outer"), [(0x00, 0x00), (0xB8, 0x00), (0x01, 0x01), (0x02, 0x02), (0x03, 0x02)])
def test_the_outer_header_carries_the_inner_ecn_and_nothing_else(pair, inner, outer):
    with pair.switch.capture("port1", "udp port 4789 and src host 192.0.2.11") as capture:
        pair.a.run("ping", "-n", "-c", 1, "-Q", inner, pair.B)
    assert checks.fields(capture, "icmp.type == 8", "ip.dsfield") == [[f"0x{outer:02x},0x{inner:02x}"]]


def test_a_pods_ttl_goes_down_by_one_at_each_node(pair):
    with pair.b.capture("eth0", "icmp") as arrived, pair.switch.capture("port1", "udp port 4789") as between:
        pair.a.run("ping", "-n", "-c", 1, "-t", 40, pair.B)
    assert checks.fields(between, "icmp.type == 8", "ip.ttl") == [["64,39"]]
    assert checks.fields(arrived, "icmp.type == 8", "ip.ttl", "eth.src") == [["38", checks.GATEWAY_MAC]]


def test_arp_on_the_uplink_is_left_to_the_kernel(pair):
    """Our nodes answer for their addresses nowhere but in pods: the kernel has them, and two answers would be wrong."""
    output = pair.hosts[0].run("arping", "-i", "eth0", "-c", 2, "-W", 0.05, "192.0.2.12")
    assert "2 packets received,   0% unanswered (0 extra)" in output, output
    for address in ("10.244.2.10", "169.254.1.1"):
        output = pair.hosts[0].run("arping", "-i", "eth0", "-c", 2, "-W", 0.05, address, check=False)
        assert "0 packets received" in output, output
