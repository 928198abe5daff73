"""The host's own link: what the kernel has of it, read by ip(8), and packets of real sockets through it.

namespace host
+-----------------------------------------------+
| up0  192.0.2.1/24      dp0 -> HostLink (here) |
+-----------------------------------------------+
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from dataplane.batch import make_batch
from dataplane.devices.device import DeviceError
from dataplane.devices.firewall import Firewall, Rules
from dataplane.devices.host import EVERYWHERE, HostLink
from dataplane.devices.netlink import Netlink, NetlinkError
from tests.spaces import OUR_MAC, lan_of, opened_spaces, read, send

pytestmark = pytest.mark.netns

NODE, TUNNEL, GATEWAY = IPv4Address("192.0.2.1"), IPv4Address("10.244.1.0"), IPv4Address("169.254.1.1")
MAC, MAC_TEXT = 0x0200_0000_0001, "02:00:00:00:00:01"
PODS, SERVICES = IPv4Network("10.244.0.0/16"), IPv4Network("10.96.0.0/12")
VIP = "10.96.0.10"


@pytest.fixture
def spaces():
    with opened_spaces() as space:
        yield space


@pytest.fixture
def host(spaces):
    made = spaces("host")
    lan_of(spaces, made)
    return made


def opened(space, addresses=(), name="dp0", routes=(), source=NODE):
    link = space.open(
        lambda: HostLink(
            name,
            mac=MAC,
            mtu=1450,
            gateway=GATEWAY,
            gateway_mac=0xEEEE_EEEE_EEEE,
            addresses=addresses,
            offload=("csum", "tso4", "tso6", "uso"),
        )
    )
    link.configure(addresses, routes, source)
    return link


def ip(space, *words):
    output = subprocess.run(["ip", "-j", "-d", "-n", space.name, *words], check=True, capture_output=True, text=True)
    return json.loads(output.stdout or "[]")


def routes(space, device="dp0"):
    return {
        (
            route["dst"],
            route.get("gateway"),
            route.get("prefsrc"),
            *route.get("flags", []),
            str(route.get("metrics", "")),
        )
        for route in ip(space, "route")
        if route["dev"] == device
    }


def test_the_device_is_up_quiet_and_has_its_gateway(host):
    opened(host)
    (link,) = ip(host, "link", "show", "dp0")
    assert (link["address"], link["mtu"], "UP" in link["flags"]) == (MAC_TEXT, 1450, True)
    (gateway,) = ip(host, "neigh", "show", "dev", "dp0")
    assert (gateway["dst"], gateway["lladdr"], gateway["state"]) == (str(GATEWAY), OUR_MAC, ["PERMANENT"])
    assert ip(host, "-6", "address", "show", "dev", "dp0") == []
    assert host.run(Path("/proc/sys/net/ipv4/conf/dp0/accept_local").read_text) == "1\n"


def test_routes_lead_to_the_gateway_with_the_nodes_address(host):
    link = opened(host)
    link.configure([], [PODS, SERVICES], NODE)
    assert routes(host) == {(str(prefix), str(GATEWAY), str(NODE), "onlink", "") for prefix in (PODS, SERVICES)}
    link.configure([], [SERVICES], NODE)
    assert routes(host) == {(str(SERVICES), str(GATEWAY), str(NODE), "onlink", "")}


def test_what_leads_to_everywhere_has_the_mtu_of_the_device_and_the_rest_the_pods(host):
    link = opened(host, [NODE])
    link.configure([NODE], [EVERYWHERE, PODS], NODE, mtu=1400)
    found = {(route["dst"], str(route.get("metrics", ""))) for route in ip(host, "route") if route["dev"] == "dp0"}
    assert found == {("default", ""), (str(PODS), "[{'mtu': 1400}]")}


def test_a_route_of_the_hosts_counts_again_when_the_link_goes(host):
    host.ip("route", "add", str(PODS), "via", "192.0.2.9")
    before = ip(host, "route")
    link = opened(host)
    link.configure([], [PODS], NODE)
    (chosen,) = ip(host, "route", "get", "10.244.7.7")
    assert chosen["dev"] == "dp0"
    link.close()
    assert ip(host, "route") == before
    link.close()


def test_a_killed_process_leaves_nothing(host):
    def look():
        return [ip(host, *words) for words in (("link",), ("route", "show", "table", "all"), ("neigh",))]

    before = look()
    code = f"""
import sys
from ipaddress import IPv4Address, IPv4Network
from dataplane.devices.host import HostLink
gateway, node = IPv4Address("{GATEWAY}"), IPv4Address("{NODE}")
link = HostLink("dp0", mac={MAC}, mtu=1450, gateway=gateway, gateway_mac=1)
link.configure([IPv4Address("{TUNNEL}")], [IPv4Network("{PODS}")], node)
print("made", flush=True)
sys.stdin.read()
"""
    command = ["nsenter", f"--net=/run/netns/{host.name}", sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        assert look() != before
        os.kill(process.pid, signal.SIGKILL)
    assert look() == before


def test_addresses_come_and_go_with_their_routes(host):
    link = opened(host)
    link.configure([TUNNEL], [PODS], TUNNEL)
    assert routes(host) == {(str(PODS), str(GATEWAY), str(TUNNEL), "onlink", "")}
    link.configure([NODE], [PODS], NODE)
    assert routes(host) == {(str(PODS), str(GATEWAY), str(NODE), "onlink", "")}
    (device,) = ip(host, "-4", "address", "show", "dev", "dp0")
    assert [(each["local"], each["prefixlen"]) for each in device["addr_info"]] == [(str(NODE), 32)]


def test_a_name_in_use_is_refused(host):
    opened(host)
    with pytest.raises(DeviceError, match="dp0"):
        opened(host)


def test_what_the_kernel_refuses_leaves_no_device(host, monkeypatch):
    def refuse(*_):
        raise NetlinkError("set neighbor", errno.ENOBUFS)

    monkeypatch.setattr(Netlink, "set_neighbor", refuse)
    with pytest.raises(DeviceError, match=r"dp0: set neighbor") as caught:
        opened(host)
    assert caught.value.errno == errno.ENOBUFS
    assert not any(link["ifname"] == "dp0" for link in ip(host, "link"))


# --- packets ---------------------------------------------------------------------------------------------------------


def next_packet(link):
    """The next frame from the host."""
    frame, *_ = read(link.tap, make_batch())
    return Ether(frame)


def turned(packet):
    """The same datagram on its way back."""
    answer = Ether(src=OUR_MAC, dst=MAC_TEXT) / IP(src=packet[IP].dst, dst=packet[IP].src)
    return answer / UDP(sport=packet[UDP].dport, dport=packet[UDP].sport) / packet[UDP].payload


def test_a_socket_reaches_a_service_and_hears_the_answer(host):
    link = opened(host)
    link.configure([], [SERVICES], NODE)
    client = host.udp("0.0.0.0", 0)
    client.sendto(b"question", (VIP, 53))
    packet = next_packet(link)
    assert (packet.src, packet.dst, packet[IP].src, packet[IP].dst) == (MAC_TEXT, OUR_MAC, str(NODE), VIP)
    send(link.tap, make_batch(), turned(packet))
    assert client.recvfrom(100) == (b"question", (VIP, 53))


# Debian leaves rp_filter for all devices at 0, Ubuntu sets 2, hardened systems 1.
@pytest.mark.parametrize("strict", [0, 1, 2])
def test_a_process_of_the_node_reaches_the_nodes_own_node_port(host, strict):
    host.write("/proc/sys/net/ipv4/conf/all/rp_filter", str(strict))
    link = opened(host, [TUNNEL])
    rules = Firewall("node1")
    host.run(
        lambda: rules.install(
            Rules(servers=frozenset({("UDP", NODE, 30053)}), host=("dp0", MAC), gateway_mac=0xEEEE_EEEE_EEEE)
        )
    )
    try:
        client = host.udp("0.0.0.0", 0)
        for size in (1, 1400, 9000):
            client.sendto(b"x" * size, (str(NODE), 30053))
            packet = next_packet(link)
            assert (packet.src, packet.dst, packet[IP].src, packet[IP].dst) == (MAC_TEXT, OUR_MAC, str(NODE), str(NODE))
            send(link.tap, make_batch(), turned(packet))
            assert client.recvfrom(10_000) == (b"x" * size, (str(NODE), 30053))
        with host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as other:
            other.connect(("127.0.0.1", 30053))
            other.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                other.recv(1)
    finally:
        rules.close()
