"""What the commands show and change on a node that carries real connections.

ext 192.0.2.100 ── br0 ── eth0 192.0.2.11 [ node1 ] ── client 10.244.1.10
                          dp0                       ── s1, s2 10.244.1.20, .30
"""

import json
import re
import socket
import subprocess
import threading
import time
from functools import partial
from typing import Any

import pytest

from tests.netns.harness import Network, eventually
from tests.netns.services import HTTP, Cluster, both, make_cluster, port, service
from tests.netns.sockets import ask_tcp, ask_udp, inside, tcp_socket

pytestmark = pytest.mark.netns

CLIENT, S1, S2 = "10.244.1.10", "10.244.1.20", "10.244.1.30"
NODE, EXT = "192.0.2.11", "192.0.2.100"
LINE = re.compile(
    r"(?P<name>tcp      6|udp      17|icmp     1) \d+ (?:(?P<state>[A-Z_]+) )?src=(?P<src>\S+) dst=(?P<dst>\S+) "
    r"(?:sport=\d+ dport=(?P<dport>\d+)|type=8 code=0 id=\d+) (?P<unreplied>\[UNREPLIED\] )?"
    r"src=(?P<reply_src>\S+) dst=(?P<reply_dst>\S+) (?:sport=\d+ dport=\d+|type=0 code=0 id=\d+) "
    r"(?P<assured>\[ASSURED\] )?mark=\d+ use=1"
)


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    return make_cluster(network, [{"client": CLIENT, "s1": S1, "s2": S2}])


def lines(cluster: Cluster, *words: str) -> list[dict[str, Any]]:
    """Return the parts of the lines that ``show conntrack -o conntrack`` prints."""
    printed = cluster.node.cli("show", "conntrack", "-o", "conntrack", *words).splitlines()
    found = [LINE.fullmatch(line) for line in printed if line and not line.startswith("dataplane: ")]
    assert all(found), printed
    return [each.groupdict() for each in found if each]


def sums(cluster: Cluster, vip: str) -> tuple[int, int]:
    """Return active and inactive connections of the services at an address."""
    rows = cluster.rows("services", dst=vip)
    return sum(row["active"] for row in rows), sum(row["inactive"] for row in rows)


def test_a_connection_is_shown_as_conntrack_and_as_ipvsadm_show_it(cluster, spot, client):
    with cluster.use(service("shown", spot.vip, [port(80)], [S1], scheduler="wlc")), tcp_socket(client) as connection:
        connection.connect((spot.vip, 80))
        assert lines(cluster, "-d", spot.vip) == [
            {
                "name": "tcp      6",
                "state": "ESTABLISHED",
                "src": CLIENT,
                "dst": spot.vip,
                "dport": "80",
                "unreplied": None,
                "reply_src": S1,
                "reply_dst": CLIENT,
                "assured": "[ASSURED] ",
            }
        ]
        table = cluster.node.cli("show", "services", "-o", "ipvsadm", "--service", "shown")
        assert table.splitlines()[3:] == [
            f"TCP  {spot.vip}:80 wlc",
            f"  -> {f'{S1}:{HTTP}':<28} Masq    1      1          0         ",
        ]
        listed = cluster.node.cli("show", "conntrack", "-o", "ipvsadm", "-d", spot.vip)
        assert re.search(
            rf"^TCP 1[45]:\d\d  ESTABLISHED {CLIENT}:\d+ +{spot.vip}:80 +{S1}:{HTTP}$", listed, re.MULTILINE
        )


def test_pings_and_datagrams_are_shown_as_conntrack_shows_them(cluster, spot, client):
    client.run("ping", "-c1", "-W2", S2)
    (ping,) = lines(cluster, "-p", "icmp", "-s", CLIENT, "-d", S2)
    assert (ping["name"], ping["unreplied"], ping["reply_src"]) == ("icmp     1", None, S2)
    with cluster.use(service("shown", spot.vip, [port(53, protocol="udp")], [S1])):
        ask_udp(client, spot.vip, 53)
        (datagram,) = lines(cluster, "-p", "udp", "-d", spot.vip)
    assert (datagram["name"], datagram["state"], datagram["reply_src"]) == ("udp      17", None, S1)


def test_nat_names_the_address_that_a_client_outside_is_masqueraded_with(cluster, spot):
    with cluster.use(service("shown", spot.vip, [port(80, node=spot.node_port)], [S1])):
        ask_tcp(cluster.ext, NODE, spot.node_port)
        (row,) = json.loads(cluster.node.cli("show", "nat", "-s", EXT, "--dport", str(spot.node_port), "-o", "json"))[
            "nat"
        ]
    assert (row["src"], row["dst"], row["new_dst"], row["new_dport"]) == (EXT, NODE, S1, HTTP)
    assert row["why"] == ["service", "masquerade"]
    assert row["new_src"] not in (EXT, "")


def test_persistence_names_who_stays_where(cluster, spot, client):
    with cluster.use(service("shown", spot.vip, [port(80)], [S1, S2], sessionAffinity="ClientIP")):
        name = ask_tcp(client, spot.vip, 80).name
        (row,) = cluster.rows("persistence", service="shown")
        listed = cluster.node.cli("show", "persistence", "-o", "ipvsadm", "--service", "shown").splitlines()[-1]
    address = cluster.pods[name].address
    assert (row["client"], row["backend"], row["controls"]) == (CLIENT, f"{address}:{HTTP}", 1)
    assert re.fullmatch(rf"TCP 1(79|80):\d\d NONE        {CLIENT}:0 +{spot.vip}:80 +{address}:{HTTP}", listed)


def test_deleted_flows_are_gone_from_the_table_and_from_their_backends_counters(cluster, spot, client):
    with cluster.use(service("shown", spot.vip, both(80), [S1, S2])):
        for _ in range(3):
            ask_tcp(client, spot.vip, 80)
            ask_udp(client, spot.vip, 80)
        assert sum(sums(cluster, spot.vip)) == 6
        assert cluster.node.cli("conntrack", "delete", "-p", "udp", "-d", spot.vip) == "3 flow entries deleted\n"
        assert sum(sums(cluster, spot.vip)) == 3
        assert cluster.node.cli("conntrack", "delete", "--service", "shown") == "3 flow entries deleted\n"
        assert sums(cluster, spot.vip) == (0, 0)
        assert lines(cluster, "-d", spot.vip) == []
        assert cluster.node.fail("conntrack", "delete") == (
            "dataplane: no filter is given; --all deletes every flow",
            2,
        )


def test_a_service_lives_from_set_to_delete(cluster, spot, client):
    cli = cluster.node.cli
    cli("service", "set", "shown", "--cluster-ip", spot.vip, "--port", f"80:{HTTP}", "--endpoint", S1)
    try:
        assert ask_tcp(client, spot.vip, 80).name == "s1"
        cli("endpoint", "add", "shown", S2)
        cli("endpoint", "drain", "shown", S1)
        states = {row["address"]: row["state"] for row in cluster.rows("endpoints", service="shown")}
        assert states == {S1: "draining", S2: "ready"}
        assert {ask_tcp(client, spot.vip, 80).name for _ in range(3)} == {"s2"}
        cli("endpoint", "delete", "shown", S1)
        assert cluster.node.fail("endpoint", "delete", "shown", "10.244.1.99")[1] == 4
        (row,) = cluster.rows("services", service="shown")
        assert (row["origin"], row["port"]) == ("api", 80)
    finally:
        cli("service", "delete", "shown")
    assert cluster.rows("services", service="shown") == []


def test_packets_are_forwarded_while_a_big_table_is_shown_and_emptied(cluster, client):
    """A listing of 60,000 flows takes half a second and more; echoes of the same node do not wait for it."""
    count, target = 60_000, cluster.pods["s2"].address
    with inside(client, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        for number in range(count):
            sender.sendto(b"", (target, 5_000 + number))
            if number % 64 == 63:
                ask_udp(client, cluster.pods["s1"].address, 8081)  # no faster than the node takes them
    listing = ("curl", "-s", "--unix-socket", str(cluster.node.socket), "http://node/v1/conntrack?limit=0")
    with subprocess.Popen(listing, stdout=subprocess.PIPE, text=True) as curl:
        shown: list[str] = []
        reader = threading.Thread(target=lambda: shown.extend(curl.stdout or ()))
        reader.start()
        waits = []
        while reader.is_alive():
            began = time.perf_counter()
            ask_udp(client, cluster.pods["s1"].address, 8081)
            waits.append(time.perf_counter() - began)
        reader.join()
    assert len(shown) > count / 2
    assert max(waits) < sum(waits) / 4  # none had to wait until all was made into text
    deleted = cluster.node.cli("conntrack", "delete", "-d", target, "-p", "udp")
    assert int(deleted.split()[0]) > count / 2
    eventually(lambda: cluster.node.show("conntrack_stats")["flows"] < count / 2)
