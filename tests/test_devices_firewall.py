"""The rules in the host's kernel, looked at with nft(8), and what they do to packets.

namespace host                                       namespace lan
+--------------------------------------+         +---------------------+
| up0  192.0.2.1/24   dt0 (a TAP)      |-- veth -| lan0  192.0.2.9/24  |
+--------------------------------------+         +---------------------+
"""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.devices import firewall, nftables
from dataplane.devices.firewall import Firewall, Rules
from dataplane.devices.nftables import Nftables, NftablesError
from tests.spaces import lan_of, opened_spaces

pytestmark = pytest.mark.netns

NODE, OTHER = IPv4Address("192.0.2.1"), IPv4Address("198.51.100.1")
WEB, DNS = ("TCP", NODE, 30080), ("UDP", NODE, 30053)
RULES = Rules(
    uplink="up0",
    networks=(IPv4Network("10.96.0.0/12"), IPv4Network("10.244.1.0/24"), IPv4Network("192.0.2.200/32")),
    addresses=(NODE,),
    servers=frozenset({WEB, DNS}),
    ports=(61000, 65535),
    tunnel_port=4789,
)


@pytest.fixture
def spaces():
    with opened_spaces() as space:
        yield space


@pytest.fixture
def host(spaces):
    return spaces("host")


@pytest.fixture
def installed(host):
    """A function that installs rules in the host's namespace; they go when the test ends."""
    made = []

    def install(rules):
        made.append(Firewall("node1.example-1"))
        host.run(lambda: made[-1].install(rules))
        return made[-1]

    yield install
    for each in made:
        each.close()


def nft(host, *words):
    command = ["nsenter", f"--net=/run/netns/{host.name}", "nft", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sets(host):
    """The elements of every set by table and name."""
    found = {}
    for item in json.loads(nft(host, "-j", "list", "ruleset"))["nftables"]:
        if "set" in item:
            each = item["set"]
            found[each["family"], each["name"]] = {json.dumps(element) for element in each.get("elem", [])}
    return found


def test_without_rules_the_kernel_has_no_table(host, installed):
    installed(Rules())
    assert nft(host, "list", "ruleset") == ""


def test_the_tables_go_when_they_are_closed(host, installed):
    rules = installed(RULES)
    assert "table ip dataplane-node1.example-1" in nft(host, "list", "ruleset")
    rules.close()
    assert nft(host, "list", "ruleset") == ""
    rules.close()


def test_nobody_else_can_change_or_delete_them(host, installed):
    installed(RULES)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        nft(host, "delete", "table", "ip", "dataplane-node1.example-1")
    assert "not permitted" in caught.value.stderr
    nft(host, "flush", "ruleset")
    assert "@servers" in nft(host, "list", "ruleset")


def test_they_go_with_a_process_that_is_killed(host):
    code = f"""
import sys
from ipaddress import IPv4Address
from dataplane.devices.firewall import Firewall, Rules
rules = Firewall("killed")
rules.install(Rules(uplink="up0", addresses=(IPv4Address("{NODE}"),), host=("lo", 1)))
print("made", flush=True)
sys.stdin.read()
"""
    command = ["nsenter", f"--net=/run/netns/{host.name}", sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        assert nft(host, "list", "ruleset").count("table") == 3
        os.kill(process.pid, signal.SIGKILL)
    assert nft(host, "list", "ruleset") == ""


def test_the_sets_follow_and_nothing_else_is_made_anew(host, installed):
    rules = installed(replace(RULES, host=("lo", 1)))
    before = nft(host, "-a", "list", "chains")
    first = sets(host)
    assert first["ip", "servers"] == first["netdev", "servers"]
    assert len(first["ip", "servers"]) == 2
    rules.update(replace(RULES, servers=frozenset({DNS, ("UDP", OTHER, 30054)}), networks=RULES.networks[1:]))
    after = sets(host)
    assert after["ip", "servers"] == after["netdev", "servers"]
    assert len(after["ip", "servers"]) == 2
    assert after["ip", "servers"] != first["ip", "servers"]
    assert len(after["ip", "networks"]) == 2
    assert nft(host, "-a", "list", "chains") == before


PREFIX = st.integers(8, 30).flatmap(
    lambda length: st.integers(0, 3).map(lambda k: IPv4Network(((10 << 24) + (k << (32 - length)), length)))
)


def disjoint(prefixes):
    kept: list[IPv4Network] = []
    for prefix in sorted(prefixes, key=lambda each: each.prefixlen):
        if not any(prefix.overlaps(other) for other in kept):
            kept.append(prefix)
    return tuple(sorted(kept))


def test_any_prefixes_may_follow_any_others(host, installed):
    rules = installed(RULES)

    @settings(max_examples=40)
    @given(st.lists(PREFIX, max_size=6).map(disjoint))
    def follow(networks):
        rules.update(replace(RULES, networks=networks))
        assert len(sets(host)["ip", "networks"]) <= len(networks)
        for network in networks:
            nft(host, "get", "element", "ip", "dataplane-node1.example-1", "networks", f"{{ {network[0]} }}")

    follow()


def test_ten_thousand_services_fit(host, installed):
    many = replace(
        RULES,
        networks=tuple(IPv4Network((0x0A60_0000 + 2 * k, 32)) for k in range(10_000)),
        servers=frozenset(("TCP", NODE, 20_000 + k) for k in range(10_000)),
    )
    rules = installed(many)
    rules.update(RULES)
    assert len(sets(host)["ip", "servers"]) == 2
    rules.update(many)
    assert len(sets(host)["ip", "servers"]) == 10_000


# --- what is missing is said once ------------------------------------------------------------------------------------


def test_a_system_without_the_library_is_told_what_that_means(installed, monkeypatch, caplog):
    monkeypatch.setattr(nftables, "LIBRARY", "libnowhere.so.1")
    rules = installed(RULES)
    rules.update(Rules())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "apt install nftables" in caplog.text
    assert firewall.UNPROTECTED in caplog.text


def test_a_kernel_without_a_hook_at_lo_still_gets_the_rest(host, installed, monkeypatch, caplog):
    real = firewall.loopback_table
    monkeypatch.setattr(firewall, "loopback_table", lambda *given: real(*given).replace("egress", "output"))
    rules = installed(replace(RULES, host=("lo", 1)))
    rules.update(replace(RULES, servers=frozenset({WEB})))
    assert re.findall(r"table (\w+)", nft(host, "list", "ruleset")) == ["ip", "arp"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert firewall.UNREACHED in caplog.text


def test_without_permission_the_reason_is_said(host):
    def drop_and_try():
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            try:
                Nftables().run("add table ip x")
            except NftablesError as error:
                os._exit(0 if "not permitted" in str(error) else 2)
            os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert host.run(drop_and_try) == 0


# --- what the rules do to packets ------------------------------------------------------------------------------------


def is_refused(space, address, port, kind=socket.SOCK_STREAM):
    """Whether a connection is refused at once; the kernel answers within the first round trip, silence lasts."""
    with space.run(lambda: socket.socket(socket.AF_INET, kind)) as client:
        client.settimeout(0.3)
        try:
            client.connect((str(address), port))
            client.send(b"x")
            client.recv(1)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    raise AssertionError("nobody listens there")


def test_the_kernel_refuses_our_ports_without_the_rules_and_is_silent_with_them(spaces, host, installed):
    lan = lan_of(spaces, host)
    ours = [(30080, socket.SOCK_STREAM), (30053, socket.SOCK_DGRAM), (61000, socket.SOCK_STREAM)]
    ours.append((65535, socket.SOCK_DGRAM))
    others = [(30081, socket.SOCK_STREAM), (30080, socket.SOCK_DGRAM), (60999, socket.SOCK_STREAM)]
    assert [is_refused(lan, NODE, *each) for each in ours] == [True] * 4
    installed(RULES)
    assert [is_refused(lan, NODE, *each) for each in ours] == [False] * 4
    assert [is_refused(lan, NODE, *each) for each in others] == [True] * 3


def test_the_tunnels_port_stays_open_inside_a_range_of_ours(spaces, host, installed):
    lan = lan_of(spaces, host)
    installed(replace(RULES, ports=(1024, 65535)))
    assert is_refused(lan, NODE, 4789, socket.SOCK_DGRAM)
    assert not is_refused(lan, NODE, 4790, socket.SOCK_DGRAM)


def test_what_is_for_pods_and_services_is_not_forwarded_by_the_host(spaces, host, installed):
    lan = lan_of(spaces, host)
    host.write("/proc/sys/net/ipv4/ip_forward", "1")
    host.ip("route", "add", "unreachable", "10.244.0.0/16")
    lan.ip("route", "add", "10.244.0.0/16", "via", str(NODE))

    def reached(address):
        with lan.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as client:
            client.settimeout(0.3)
            try:
                client.connect((address, 80))
            except TimeoutError:
                return "silence"
            except OSError as error:
                return os.strerror(error.errno or 0)
        return "connected"

    assert reached("10.244.1.10") == "No route to host"
    installed(RULES)
    assert reached("10.244.1.10") == "silence"
    assert reached("10.244.2.10") == "No route to host"
    assert list(chain(sets(host)["ip", "addresses"])) == [json.dumps(str(NODE))]


def test_later_fragments_for_the_host_are_not_taken_for_our_ports(spaces, host, installed):
    lan = lan_of(spaces, host)
    installed(RULES)
    server, client = host.udp("192.0.2.1", 7777), lan.udp("192.0.2.9", 0)
    client.sendto(b"\xff" * 9000, ("192.0.2.1", 7777))  # ports 65535 in every later fragment
    assert server.recv(10_000) == b"\xff" * 9000


def test_arp_for_what_is_ours_is_not_answered_by_the_host(spaces, host, installed):
    lan = lan_of(spaces, host)
    host.ip("address", "add", "10.244.1.0/32", "dev", "lo")
    lan.ip("route", "add", "10.244.1.0", "dev", "lan0")

    def resolves():
        lan.ip("neigh", "flush", "to", "10.244.1.0")
        command = ["nsenter", f"--net=/run/netns/{lan.name}", "ping", "-c", "1", "-W", "0.3", "10.244.1.0"]
        subprocess.run(command, check=False, capture_output=True)
        shown = ["ip", "-n", lan.name, "neigh", "show", "to", "10.244.1.0"]
        return "lladdr" in subprocess.run(shown, check=True, capture_output=True, text=True).stdout

    assert resolves()
    installed(RULES)
    assert not resolves()


def test_on_an_uplink_of_our_own_the_host_hears_nothing_and_says_nothing(spaces, host, installed):
    lan = lan_of(spaces, host)
    host.ip("address", "add", "203.0.113.1/32", "dev", "lo")
    lan.ip("route", "add", "203.0.113.1", "dev", "lan0")

    def hears(address):
        command = ["nsenter", f"--net=/run/netns/{lan.name}", "ping", "-c", "1", "-W", "0.5", address]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    assert hears("203.0.113.1")
    lan.ip("neigh", "flush", "all")
    installed(Rules(uplink="up0", shared=False))
    assert not hears("203.0.113.1")
    assert not hears(str(NODE))
    counted = re.findall(r"table (\w+)[^}]*counter packets (\d+)", nft(host, "list", "ruleset"))
    assert [(family, int(packets) > 0) for family, packets in counted] == [("inet", True), ("arp", True)]
