"""The two ways to have an uplink: shared with the host's own stack, or ours alone with the host behind dp0.

    ext 192.0.2.100 ── br0 ── eth0 [ node1 192.0.2.11 ] ── pod 10.244.1.10
                                     dp0
                                      │
                              the host's processes

A peer that does not run makes some load balancers' addresses another node's.
"""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dataplane.control import client
from dataplane.control.election import winner
from tests.netns import checks
from tests.netns.harness import READY_TIMEOUT, Namespace, Network, Node, eventually
from tests.netns.ours import assert_balanced, config, drops, member
from tests.netns.services import BALANCING, EXT, LAN, Spec, both, make_cluster, serve, service, with_services
from tests.netns.sockets import ask_tcp, ask_udp, inside, is_refused, is_silent

pytestmark = pytest.mark.netns

NODE, POD, FREE, GATEWAY = "192.0.2.11", "10.244.1.10", "10.244.1.77", "169.254.1.1"
VIP, TUNNEL = "10.96.0.20", "10.244.1.0"
NODE_PORT, OTHER_PORT, CLOSED_PORT = 30080, 30090, 30099
OUTSIDE_PORT = 8000
SHARED, OWN = True, False


@dataclass(frozen=True)
class Site:
    """A node that may or may not run, its host, a client on the LAN, and addresses that are its and another's."""

    network: Network
    node: Node
    host: Namespace
    ext: Namespace
    mine: str
    theirs: str
    spare: str

    @property
    def pod(self) -> Namespace:
        return self.network.pod("pod")

    @property
    def mac(self) -> str:
        found = re.search(r"link/ether (\S+)", self.host.ip("link", "show", "eth0"))
        assert found is not None
        return found[1]

    def start(self) -> None:
        self.node.start()
        serve(self.pod, "pod", "tcp:8080", "udp:8081")


def make_site(network: Network, shared: bool) -> Site:
    host, ext = network.namespace("host"), network.namespace("ext")
    network.lan((host, f"{NODE}/24"), (ext, f"{EXT}/24"))
    if not shared:
        host.ip("address", "flush", "dev", "eth0")
    me, peer = member(network, 1), member(network, 9)
    candidates = [IPv4Address("192.0.2.200") + k for k in range(32)]
    won = [str(address) for address in candidates if winner([me.name, peer.name], address) == me.name]
    lost = [str(address) for address in candidates if str(address) not in won]
    text = config(me, {"pod": POD}, [peer], routes={"0.0.0.0/0": EXT})
    static = [balanced("web", VIP, NODE_PORT, won[0]), balanced("other", "10.96.0.21", OTHER_PORT, lost[0])]
    text = with_services(text, balancing=BALANCING, static=static, shared=shared)
    if not shared:
        text += f'[[routes]]\ndst = "{LAN}"\n'  # no address of an interface tells it
    return Site(network, network.node(host, "node1", text), host, ext, won[0], lost[0], won[1])


def balanced(name: str, vip: str, node_port: int, address: str) -> Spec:
    return service(name, vip, both(80, node_port), [POD], loadBalancerIPs=[address])


@pytest.fixture(scope="module", params=[SHARED, OWN], ids=["shared", "own"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running node in each of the modes, for tests that leave it as it is."""
    with Network(tmp_path_factory.mktemp("site")) as network:
        made = make_site(network, request.param)
        made.start()
        serve(made.ext, "ext", f"tcp:{OUTSIDE_PORT}", f"udp:{OUTSIDE_PORT}")
        serve(made.host, "host", f"tcp:{OUTSIDE_PORT}", f"udp:{OUTSIDE_PORT}")
        yield made
        assert_balanced(made.node)


@pytest.fixture
def fresh(network: Network, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A node that does not run yet; indirect parameters say in which mode."""
    with Network(tmp_path) as made:
        yield make_site(made, request.param)


FRESH = pytest.mark.parametrize("fresh", [SHARED, OWN], ids=["shared", "own"], indirect=True)
FRESH_SHARED = pytest.mark.parametrize("fresh", [SHARED], ids=["shared"], indirect=True)


# --- ARP -------------------------------------------------------------------------------------------------------------


def answers(namespace: Namespace, address: str, count: int = 3) -> list[str]:
    """The MACs that answer requests for an address, one for each answer, extra ones too."""
    output = namespace.run("arping", "-i", "eth0", "-c", count, "-W", 0.05, address, check=False)
    return re.findall(r"bytes from (\S+) ", output)


def test_each_request_for_the_nodes_address_has_one_answer(site):
    """The kernel's on a shared uplink, ours on our own: never both."""
    assert answers(site.ext, NODE) == [site.mac] * 3


def test_a_load_balancers_address_is_answered_by_its_owner_alone(site):
    assert answers(site.ext, site.mine) == [site.mac] * 3
    assert answers(site.ext, site.theirs) == []


@pytest.mark.parametrize("address", [POD, FREE, GATEWAY, VIP, TUNNEL])
def test_nothing_else_of_ours_is_answered_on_the_lan(site, address):
    assert answers(site.ext, address, 1) == []


def test_an_owner_announces_its_address_at_once_then_every_1100_ms_for_5_s(site):
    with site.ext.capture("eth0", f"arp and ether src {site.mac} and arp host {site.spare}") as path:
        began = time.monotonic()
        set_service(site.node, balanced("late", "10.96.0.22", 30091, site.spare))
        eventually(lambda: time.monotonic() > began + 6.5, 10)
    client.delete_service(site.node.socket, "default", "late")
    found = checks.fields(path, "arp", "frame.time_relative", "arp.opcode", "arp.src.proto_ipv4", "arp.dst.proto_ipv4",
                          "arp.src.hw_mac", "eth.dst")  # fmt: skip
    assert [row[1:] for row in found] == [
        [operation, site.spare, site.spare, site.mac, "ff:ff:ff:ff:ff:ff"] for operation in "12" * 5
    ]
    times = [float(row[0]) for row in found]
    wanted = [1.1 * (k // 2) for k in range(10)]
    assert times == pytest.approx(wanted, abs=0.2)
    assert answers(site.ext, site.spare, 1) == []


@FRESH
def test_a_start_announces_what_the_node_answers_for(fresh, request):
    own = "own" in request.node.callspec.id
    with fresh.ext.capture("eth0", "arp") as path:
        fresh.node.start()
        eventually(lambda: fresh.node.show("counters")["queue"].get("announced", 0) >= 2 * (1 + own))
    found = checks.fields(path, "arp.isgratuitous == 1", "arp.opcode", "arp.src.proto_ipv4")
    assert {tuple(row) for row in found} == {
        (operation, address) for operation in "12" for address in [fresh.mine, *([NODE] if own else [])]
    }


@FRESH
def test_an_uplink_that_was_down_announces_again_when_it_is_back(fresh):
    def uplink() -> str:
        (found,) = (row for row in fresh.node.show("interfaces")["interfaces"] if row["name"] == "eth0")
        return str(found["state"])

    fresh.node.start()
    fresh.host.ip("link", "set", "eth0", "down")
    eventually(lambda: uplink() == "down")
    with fresh.ext.capture("eth0", f"arp host {fresh.mine}") as path:
        fresh.host.ip("link", "set", "eth0", "up")
        eventually(lambda: uplink() == "up")
        eventually(lambda: answers(fresh.ext, fresh.mine, 1) == [fresh.mac])
    found = checks.fields(path, "arp.isgratuitous == 1", "arp.opcode", "arp.src.proto_ipv4")
    assert found[:2] == [["1", fresh.mine], ["2", fresh.mine]]


def test_a_health_check_port_is_asked_from_outside(site):
    """The host's stack listens: at the node's address on a shared uplink, else behind dp0."""
    keys = {"externalTrafficPolicy": "Local", "healthCheckNodePort": 32001}
    checked = service("checked", "10.96.0.23", [{"port": 80}], [POD], loadBalancerIPs=[site.spare], **keys)
    ask = ("curl", "-sS", "--max-time", 5, "-o", "/dev/null", "-w", "%{http_code}", f"http://{NODE}:32001/")
    for endpoints, status in (([{"ip": POD}], "200"), ([], "503")):
        set_service(site.node, checked | {"endpoints": endpoints})
        assert site.ext.run(*ask) == status
    client.delete_service(site.node.socket, "default", "checked")
    assert is_refused(site.ext, "tcp", NODE, 32001)


# --- the host's own processes ----------------------------------------------------------------------------------------


def test_a_client_outside_reaches_a_process_of_the_host(site):
    checks.ping(site.ext, NODE, count=5)
    for ask in (ask_tcp, ask_udp):
        assert ask(site.ext, NODE, OUTSIDE_PORT).seen[0] == EXT


def test_a_process_of_the_host_reaches_the_outside(site):
    checks.ping(site.host, EXT, count=5)
    for ask in (ask_tcp, ask_udp):
        answer = ask(site.host, EXT, OUTSIDE_PORT)
        assert answer.seen == (NODE, answer.own[1])


def test_a_large_transfer_between_host_and_outside_arrives_unchanged(site):
    checks.tcp(site.ext, site.host, NODE, 20_000_000)
    checks.udp(site.host, site.ext, EXT, [1, 1472, 1473, 9000, 65507])


def test_a_process_of_the_host_reaches_pods_and_services(site):
    checks.ping(site.host, POD, count=5)
    checks.ping(site.host, VIP, count=5)
    for address, port in ((POD, 8080), (VIP, 80), (site.mine, 80), (site.theirs, 80), (NODE, NODE_PORT)):
        assert ask_tcp(site.host, address, port).seen[0] == NODE
    assert ask_udp(site.host, NODE, NODE_PORT, body=b"x" * 1000).seen[0] == NODE


def test_the_loopback_address_has_no_node_port(site):
    assert is_refused(site.host, "tcp", "127.0.0.1", NODE_PORT)


def test_a_pod_reaches_the_host(site):
    checks.ping(site.pod, NODE, count=5)
    assert ask_tcp(site.pod, NODE, OUTSIDE_PORT).seen[0] == POD


def test_a_port_of_the_node_where_nobody_listens_refuses_at_once(site):
    assert is_refused(site.ext, "tcp", NODE, CLOSED_PORT)
    assert is_refused(site.host, "tcp", NODE, CLOSED_PORT)
    assert is_refused(site.pod, "tcp", NODE, CLOSED_PORT)


# --- the kernel keeps out of it --------------------------------------------------------------------------------------

KERNEL_SAYS = f"ip.src == {NODE} && (tcp.flags.reset == 1 || icmp.type == 3)"


def use_what_is_ours(site: Site) -> None:
    """Connect to a node port from outside, and from the pod to the outside, masqueraded; losses are looked at later."""
    for ask in (ask_tcp, ask_udp):
        with suppress(OSError):
            ask(site.ext, NODE, NODE_PORT, timeout=1)
        with suppress(OSError):
            ask(site.pod, EXT, OUTSIDE_PORT, timeout=1)


@FRESH_SHARED
def test_without_the_rule_the_kernel_ends_connections_that_are_ours(fresh, tmp_path):
    """What the rule is for: the host's stack has no socket for these, and says so to both ends."""
    (tmp_path / "libnftables.so.1").touch()
    fresh.node.launch("env", f"LD_LIBRARY_PATH={tmp_path}").expect(r"\bready\b", READY_TIMEOUT)
    serve(fresh.pod, "pod", "tcp:8080", "udp:8081")
    serve(fresh.ext, "ext", f"tcp:{OUTSIDE_PORT}", f"udp:{OUTSIDE_PORT}")
    with fresh.ext.capture("eth0", "ip") as path:
        use_what_is_ours(fresh)
    said = checks.fields(path, KERNEL_SAYS, "ip.proto", "tcp.srcport", "tcp.dstport")
    assert ["6", str(NODE_PORT)] in [row[:2] for row in said]
    assert ["6", str(OUTSIDE_PORT)] in [[row[0], row[2]] for row in said]
    assert any(row[0].startswith("1") for row in said)
    assert sum("apt install nftables" in line for line in fresh.node.log) == 1, fresh.node.log


def test_with_the_rule_the_kernel_is_silent(site):
    with site.ext.capture("eth0", "ip") as path:
        for _ in range(5):
            for ask in (ask_tcp, ask_udp):
                assert ask(site.ext, NODE, NODE_PORT).name == "pod"
                assert ask(site.ext, site.mine, 80).name == "pod"
                assert ask(site.pod, EXT, OUTSIDE_PORT).seen[0] == NODE
    assert checks.fields(path, KERNEL_SAYS, "ip.proto") == []


def test_masqueraded_ports_are_not_the_hosts_on_a_shared_uplink(site, request):
    ports = {ask(site.pod, EXT, OUTSIDE_PORT).seen[1] for ask in (ask_tcp, ask_udp) for _ in range(5)}
    if "shared" in request.node.callspec.id:
        assert min(ports) >= 61000
        assert is_silent(site.ext, "tcp", NODE, 61000)
    assert len(ports) == 10


def test_a_host_that_forwards_does_not_deliver_twice(site):
    site.host.sysctl("net/ipv4/ip_forward", 1)
    site.ext.ip("route", "replace", "10.244.1.0/24", "via", NODE)
    site.ext.ip("route", "replace", "10.96.0.0/12", "via", NODE)
    try:
        checks.ping(site.ext, POD)
        checks.ping(site.ext, VIP)
        assert ask_tcp(site.ext, VIP, 80).name == "pod"
    finally:
        site.host.sysctl("net/ipv4/ip_forward", 0)


def rules(host: Namespace) -> str:
    return host.run("nft", "list", "ruleset")


def test_the_rules_follow_the_services(site, request):
    assert f"tcp . {NODE} . {NODE_PORT}" in rules(site.host)
    assert is_refused(site.ext, "tcp", NODE, 30092)
    set_service(site.node, service("new", "10.96.0.23", both(80, 30092), [POD], externalIPs=["203.0.113.9"]))
    assert f"udp . {NODE} . 30092" in rules(site.host)
    assert ("203.0.113.9" in rules(site.host)) == ("shared" in request.node.callspec.id)
    assert ask_tcp(site.ext, NODE, 30092).name == ask_tcp(site.host, "203.0.113.9", 80).name == "pod"
    client.delete_service(site.node.socket, "default", "new")
    assert "30092" not in rules(site.host)
    assert "203.0.113.9" not in rules(site.host) + site.host.ip("route")
    assert is_refused(site.ext, "tcp", NODE, 30092)


def set_service(node: Node, wanted: Spec) -> None:
    client.set_service(node.socket, "default", wanted["name"], {k: v for k, v in wanted.items() if k != "name"})


# --- coming and going ------------------------------------------------------------------------------------------------


def look(namespace: Namespace) -> list[str]:
    """Return everything that a node could have changed in a namespace."""
    words = (
        ("link",),
        ("address",),
        ("route", "show", "table", "all"),
        ("rule",),
        ("neigh", "show", "nud", "permanent"),
    )
    settings = namespace.run(
        "sh", "-c", "cd /proc/sys/net && grep -r . ipv4/conf ipv4/ip_forward core 2>/dev/null; true"
    )
    return [*(namespace.ip(*each) for each in words), rules(namespace), *sorted(settings.splitlines())]


@FRESH
def test_a_stopped_node_leaves_nothing_on_its_host(fresh):
    before = look(fresh.host)
    fresh.start()
    assert "dp0" in fresh.host.ip("link")
    assert "dataplane-" in rules(fresh.host)
    assert fresh.node.stop() == 0
    assert look(fresh.host) == before


@FRESH
def test_a_killed_node_leaves_nothing_on_its_host_even_before_the_next_start(fresh):
    before = look(fresh.host)
    fresh.start()
    fresh.node.kill()
    assert look(fresh.host) == before
    fresh.start()
    assert ask_tcp(fresh.ext, NODE, NODE_PORT).name == ask_tcp(fresh.host, VIP, 80).name == "pod"
    assert fresh.node.stop() == 0
    assert look(fresh.host) == before


@FRESH
def test_a_deleted_host_link_is_made_anew_with_its_routes_and_rules(fresh):
    fresh.start()
    fresh.host.ip("link", "delete", "dp0")
    eventually(lambda: any("restored name=dp0" in line for line in fresh.node.log))
    for address, port in ((VIP, 80), (NODE, NODE_PORT)):
        assert ask_tcp(fresh.host, address, port).name == "pod"
    assert_balanced(fresh.node)


@FRESH
def test_the_lan_is_told_again_when_the_uplink_comes_back(fresh):
    fresh.start()
    with fresh.ext.capture("eth0", "arp") as path:
        for state in ("down", "up"):
            fresh.host.ip("link", "set", "eth0", state)
        eventually(lambda: any("uplink eth0 is up" in line for line in fresh.node.log))
        eventually(lambda: answers(fresh.ext, fresh.mine, 1))
    assert [fresh.mine] in checks.fields(path, "arp.isgratuitous == 1", "arp.src.proto_ipv4")
    assert ask_tcp(fresh.ext, fresh.mine, 80).name == "pod"


# --- other sites -----------------------------------------------------------------------------------------------------


def test_a_tunnel_over_an_uplink_of_our_own(tmp_path):
    with Network(tmp_path) as network:
        cluster = make_cluster(network, [{"a": POD}, {"b": "10.244.2.10"}], shared=OWN)
        a, b = cluster.pods["a"].namespace, cluster.pods["b"].namespace
        checks.ping(a, "10.244.2.10")
        checks.tcp(a, b, "10.244.2.10", 20_000_000)
        checks.udp(b, a, POD)
        # Calico's rule: what the node itself sends into the tunnel comes from the tunnel's address.
        assert ask_tcp(cluster.host, "10.244.2.10", 8080).seen[0] == TUNNEL
        for node in cluster.nodes:
            assert_balanced(node)


def test_a_node_without_an_address_gives_its_host_the_first_one_of_its_block(tmp_path):
    with Network(tmp_path) as network:
        host = network.namespace("host")
        text = config(member(network, 1), {"pod": POD}, uplink=False)
        text += '[services]\nclusterCIDR = ["10.244.0.0/16"]\nserviceCIDR = ["10.96.0.0/12"]\n'
        node = network.node(host, "node1", text).start()
        serve(network.pod("pod"), "pod", "tcp:8080", "udp:8081")
        set_service(node, service("web", VIP, both(80), [POD]))
        assert ask_tcp(host, POD, 8080).seen[0] == TUNNEL
        checks.ping(host, POD, count=3)
        for ask in (ask_tcp, ask_udp):
            assert ask(host, VIP, 80).name == "pod"
        checks.ping(network.pod("pod"), TUNNEL, count=3)
        with inside(host, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as own:
            own.bind((TUNNEL, 0))
        assert "ip.spoofed-src" not in drops(node)
