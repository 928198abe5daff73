"""Cluster DNS as pods, the host and the LAN meet it: dig, the C library's resolver, and an upstream on the LAN.

ext 192.0.2.100, .101 ── br0 ── eth0 192.0.2.11 [ node1 ] ── client 10.244.1.10
 dnsmasq on both                dp0 (the resolver)        ── web    10.244.1.20
"""

import re
import signal
from pathlib import Path

import pytest

from dataplane.control import client as control
from tests.netns.harness import Namespace, Network, Process
from tests.netns.ours import assert_balanced, drops
from tests.netns.services import EXT, EXT2, Cluster, e2e, make_cluster, port, service

pytestmark = pytest.mark.netns

CLIENT, WEB = "10.244.1.10", "10.244.1.20"
DNS = "10.96.0.10"
DOMAIN = "default.svc.cluster.local"
MANY = [f"10.244.7.{number}" for number in range(1, 121)]
STATIC = [
    service("kubernetes", "10.96.0.1", [port(443, name="https")], []),
    service("web", "10.96.0.20", [port(80, name="http")], [WEB]),
    service("hdls", "None", [port(80, name="http")], [{"ip": WEB, "hostname": "web-0"}, "10.244.1.30"]),
    service("many", "None", [port(80, name="http")], MANY),
    {"name": "ext", "type": "ExternalName", "externalName": "www.example.com"},
]
DNSMASQ = [
    *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"),
    *("--pid-file=", "--bind-interfaces", "--log-facility=-"),
]
SECTION = {"clusterIP": DNS, "pods": "verified", "upstreams": [EXT, EXT2]}


@pytest.fixture(scope="module")
def cluster(network: Network) -> Cluster:
    return make_cluster(network, [{"client": CLIENT, "web": WEB}], static=STATIC, sections={"dns": SECTION})


@pytest.fixture(scope="module")
def upstreams(cluster: Cluster) -> list[Process]:
    """Two name servers, which give names of example.com different addresses."""
    started = []
    for number, address in enumerate((EXT, EXT2), 1):
        command = [*DNSMASQ, f"--listen-address={address}", f"--address=/example.com/203.0.113.{number}"]
        started.append(cluster.ext.spawn(*command))
    for each in started:
        each.expect("started")
    return started


def dig(where: Namespace, *words: str, server: str = DNS) -> str:
    return where.run("dig", f"@{server}", "+tries=1", *words)


def short(where: Namespace, *words: str) -> list[str]:
    return dig(where, "+short", *words).split("\n")[:-1]


def status(text: str) -> str:
    found = re.search(r"status: (\w+)", text)
    assert found, text
    return found[1]


# --- who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["+notcp", "+tcp"])
@pytest.mark.parametrize("where", ["client", "web", "node", "ext"])
def test_everybody_who_reaches_services_is_answered(cluster, where, how):
    assert short(cluster.where(where), how, f"web.{DOMAIN}") == ["10.96.0.20"]


def test_only_the_cluster_ip_answers(cluster, client):
    text = client.run("dig", "@10.244.1.0", "+tries=1", "+time=1", f"web.{DOMAIN}", check=False)
    assert "connection refused" in text or "no servers could be reached" in text


# --- what dig is told ------------------------------------------------------------------------------------------------

ANSWERS = {
    f"web.{DOMAIN} A": ["10.96.0.20"],
    f"web.{DOMAIN} AAAA": [],
    "WEB.Default.svc.CLUSTER.local A": ["10.96.0.20"],
    f"_http._tcp.web.{DOMAIN} SRV": [f"0 100 80 web.{DOMAIN}."],
    f"_http._tcp.hdls.{DOMAIN} SRV": [f"0 50 8080 10-244-1-30.hdls.{DOMAIN}.", f"0 50 8080 web-0.hdls.{DOMAIN}."],
    f"hdls.{DOMAIN} A": [WEB, "10.244.1.30"],
    f"web-0.hdls.{DOMAIN} A": [WEB],
    "-x 10.96.0.20": [f"web.{DOMAIN}."],
    f"-x {WEB}": [f"web-0.hdls.{DOMAIN}."],
    f"-x {DNS}": ["kube-dns.kube-system.svc.cluster.local."],
    "10-244-1-20.default.pod.cluster.local A": [WEB],
    "dns-version.cluster.local TXT": ['"1.1.0"'],
    "cluster.local NS": ["ns.dns.cluster.local."],
    "ns.dns.cluster.local A": [DNS],
    f"ext.{DOMAIN} CNAME": ["www.example.com."],
}


@pytest.mark.parametrize("asked", ANSWERS)
@pytest.mark.parametrize("how", ["+notcp", "+tcp", "+noedns", "+bufsize=4096"])
def test_the_answers_that_dig_prints(client, asked, how):
    assert sorted(short(client, how, *asked.split())) == sorted(ANSWERS[asked])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((f"none.{DOMAIN}",), "NXDOMAIN"),
        (("web.nowhere.svc.cluster.local",), "NXDOMAIN"),
        (("10-244-1-21.default.pod.cluster.local",), "NXDOMAIN"),
        (("-x", "10.96.0.21"), "NXDOMAIN"),
        ((f"web.{DOMAIN}", "MX"), "NOERROR"),
        ((f"web.{DOMAIN}", "+edns=1", "+noednsnegotiation"), "BADVERS"),
        ((f"web.{DOMAIN}", "+opcode=notify"), "NOTIMP"),
        ((f"web.{DOMAIN}", "CH"), "REFUSED"),
        (("www.example.com", "+norecurse"), "REFUSED"),
    ],
)  # fmt: skip
def test_the_codes_that_dig_prints(client, words, code):
    assert status(dig(client, *words)) == code


def test_nobody_gets_the_zone(client):
    assert "Transfer failed" in dig(client, "cluster.local", "AXFR")


def test_any_is_answered_by_hinfo(client):
    assert '"RFC8482" ""' in dig(client, "ANY", "+notcp", f"web.{DOMAIN}")


def test_what_is_long_is_asked_for_again_by_tcp(client):
    assert re.search(r"flags: qr aa tc rd", dig(client, "+ignore", f"many.{DOMAIN}"))
    whole = dig(client, f"many.{DOMAIN}")
    assert "Truncated, retrying in TCP mode" in whole
    assert "ANSWER: 120" in whole
    assert sorted(short(client, f"many.{DOMAIN}")) == sorted(MANY)


def test_clients_are_spread(client):
    assert {short(client, f"hdls.{DOMAIN}")[0] for _ in range(4)} == {WEB, "10.244.1.30"}


# --- upstreams -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("upstreams")
@pytest.mark.parametrize("how", ["+notcp", "+tcp"])
def test_names_of_others_are_asked_for(client, how):
    text = dig(client, how, "www.example.com")
    assert re.search(r"flags: qr rd ra", text)
    assert re.search(r"www\.example\.com\.\s+\d+\s+IN\s+A\s+203\.0\.113\.[12]", text)
    assert status(dig(client, how, "www.example.net")) in ("REFUSED", "SERVFAIL", "NXDOMAIN")


@pytest.mark.usefixtures("upstreams")
def test_an_external_name_is_followed(client):
    found = short(client, f"ext.{DOMAIN}")
    assert found[0] == "www.example.com."
    assert found[1].startswith("203.0.113.")


def test_when_one_upstream_is_silent_the_other_answers(cluster, client, upstreams):
    for silent, other in ((0, 2), (1, 1)):
        upstreams[silent].send(signal.SIGSTOP)
        try:
            found = [short(client, "+timeout=10", f"n{silent}{number}.example.com") for number in range(4)]
            assert found == [[f"203.0.113.{other}"]] * 4
        finally:
            upstreams[silent].send(signal.SIGCONT)
    assert any("upstream does not answer" in line for line in cluster.node.log)


# --- programs in a pod -----------------------------------------------------------------------------------------------


def in_pod(where: Namespace, directory: Path, *command: str, check: bool = True) -> str:
    """Run a program that finds the resolv.conf of a pod, as kubelet writes it, in a mount namespace of its own."""
    file = directory / "resolv.conf"
    file.write_text(f"search {DOMAIN} svc.cluster.local cluster.local\nnameserver {DNS}\noptions ndots:5\n")
    mount = f'mount --bind {file} /etc/resolv.conf && exec "$@"'
    return where.run("unshare", "--mount", "sh", "-c", mount, "sh", *command, check=check)


@pytest.mark.parametrize("name", ["web", "web.default", "web.default.svc", f"web.{DOMAIN}", f"web.{DOMAIN}."])
def test_searched_names_are_found_by_the_c_library(client, tmp_path, name):
    found = in_pod(client, tmp_path, "getent", "ahostsv4", name)
    assert {line.split()[0] for line in found.splitlines()} == {"10.96.0.20"}


@pytest.mark.usefixtures("upstreams")
def test_names_of_others_are_found_after_the_searched_ones(client, tmp_path):
    assert in_pod(client, tmp_path, "getent", "ahostsv4", "www.example.com").startswith("203.0.113.")
    assert in_pod(client, tmp_path, "getent", "ahostsv4", "ext").startswith("203.0.113.")


def test_an_address_has_its_name(client, tmp_path):
    assert in_pod(client, tmp_path, "getent", "hosts", "10.96.0.20").split() == ["10.96.0.20", f"web.{DOMAIN}"]


def test_all_addresses_of_a_long_answer_arrive(client, tmp_path):
    found = in_pod(client, tmp_path, "getent", "ahostsv4", "many")
    assert {line.split()[0] for line in found.splitlines()} == set(MANY)


def test_what_does_not_exist_is_not_found(client, tmp_path):
    assert in_pod(client, tmp_path, "getent", "hosts", "none", check=False) == ""


def test_a_name_leads_to_the_service(cluster, client, tmp_path):
    assert "web" in in_pod(client, tmp_path, "curl", "-s", "--max-time", "5", "http://web/hostname")


# --- Kubernetes' own tests -------------------------------------------------------------------------------------------


def searched(where: Namespace, directory: Path, *words: str) -> list[str]:
    """Ask for a name as a program in a pod does, by the search list, and return the answers."""
    return in_pod(where, directory, "dig", "+search", "+short", *words).split("\n")[:-1]


@e2e("should provide DNS for the cluster", "dns.go")
@e2e("should resolve DNS of partial qualified names for the cluster", "dns.go")
@pytest.mark.parametrize("how", ["+notcp", "+tcp"])
@pytest.mark.parametrize("name", ["kubernetes.default", "kubernetes.default.svc", f"kubernetes.{DOMAIN}"])
def test_the_cluster_has_a_name(client, tmp_path, name, how):
    assert searched(client, tmp_path, how, name, "A") == ["10.96.0.1"]


@e2e("should provide DNS for services", "dns.go")
@e2e("should resolve DNS of partial qualified names for services", "dns.go")
@pytest.mark.parametrize("how", ["+notcp", "+tcp"])
@pytest.mark.parametrize("suffix", ["", ".default", ".default.svc", f".{DOMAIN}"])
def test_services_have_names_and_ports_and_addresses_have_services(client, tmp_path, suffix, how):
    assert searched(client, tmp_path, how, f"web{suffix}", "A") == ["10.96.0.20"]
    assert set(searched(client, tmp_path, how, f"hdls{suffix}", "A")) == {WEB, "10.244.1.30"}
    for name, ports in (("web", 1), ("hdls", 2)):
        found = searched(client, tmp_path, how, f"_http._tcp.{name}{suffix}", "SRV")
        assert len(found) == ports
        assert all(line.endswith(f"{name}.{DOMAIN}.") for line in found)
    assert searched(client, tmp_path, how, "-x", "10.96.0.20") == [f"web.{DOMAIN}."]


@e2e("should provide DNS for pods for Hostname", "dns.go")
@e2e("should provide DNS for pods for Subdomain", "dns.go")
def test_pods_with_a_hostname_have_names_below_their_service(client, tmp_path):
    assert in_pod(client, tmp_path, "getent", "hosts", f"web-0.hdls.{DOMAIN}").split() == [WEB, f"web-0.hdls.{DOMAIN}"]


@e2e("should provide DNS for ExternalName services", "dns.go")
@pytest.mark.usefixtures("upstreams")
def test_an_external_name_may_become_another_and_then_a_service(cluster, client):
    name = f"turning.{DOMAIN}"
    for target in ("foo.example.com", "bar.example.com"):
        keys = {"type": "ExternalName", "externalName": target}
        control.set_service(cluster.node.socket, "default", "turning", keys)
        assert short(client, name, "CNAME") == [f"{target}."]
        assert short(client, name)[0] == f"{target}."
    cluster.set(service("turning", "10.96.0.99", [port(80)], [WEB]))
    assert short(client, name) == ["10.96.0.99"]
    assert short(client, name, "CNAME") == []
    cluster.delete("turning")


# --- many, and changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["client", "node"])
def test_ten_thousand_queries_are_all_answered(cluster, where):
    asking = cluster.where(where)
    names = (f"web.{DOMAIN}", f"hdls.{DOMAIN}", f"none.{DOMAIN}", "cluster.local")
    found = asking.run(*asking.tool("dns_load", DNS, 10_000, *names), timeout=120)
    assert found == "answered 10000 of 10000, 0: 7500, 3: 2500; wrong 0\n"


def test_a_changed_endpoint_is_seen_at_once(cluster, client):
    for number in range(40, 50):
        control.set_service(cluster.node.socket, "default", "moving", {"clusterIPs": ["None"], "ports": [port(80)]})
        control.add_endpoint(cluster.node.socket, "default", "moving", f"10.244.1.{number}", {})
        assert short(client, f"moving.{DOMAIN}") == [f"10.244.1.{number}"]
        control.delete_service(cluster.node.socket, "default", "moving")
        assert status(dig(client, f"moving.{DOMAIN}")) == "NXDOMAIN"


def test_other_upstreams_and_another_ttl_come_by_a_reload(cluster, client):
    node = cluster.node
    before = node.config.read_text()
    assert "upstreams" in before
    node.write(before.replace(f'upstreams = ["{EXT}", "{EXT2}"]', 'upstreams = []\nttl = "77s"'))
    try:
        node.cli("reload")
        assert status(dig(client, "www.example.com")) == "REFUSED"
        assert f"web.{DOMAIN}. 77 IN" in re.sub(r"\s+", " ", dig(client, f"web.{DOMAIN}"))
    finally:
        node.write(before)
        node.cli("reload")


def test_the_service_is_listed_and_nothing_was_lost(cluster):
    rows = cluster.rows("services", service="kube-system/kube-dns")
    assert {(each["address"], each["port"], each["protocol"], each["origin"]) for each in rows} == {
        (DNS, 53, "UDP", "node"),
        (DNS, 53, "TCP", "node"),
    }
    assert_balanced(cluster.node)
    assert not [label for label in drops(cluster.node) if label.startswith(("ct.", "nat.", "svc.", "lb.", "route."))]


def test_the_node_says_what_it_answers_and_why(cluster):
    node = cluster.node
    assert node.cli("dns", "query", "web").splitlines()[0] == f"web.{DOMAIN}.\t5\tIN\tA\t10.96.0.20"
    text, code = node.fail("dns", "query", "web.nowhere.svc.cluster.local.")
    assert (code, "NXDOMAIN: no namespace nowhere" in text) == (4, True)
    text = node.cli("dns", "status")
    assert re.search(r"^NXDOMAIN +\d+$", text, re.MULTILINE)
    assert f"upstream {EXT}:53" in text


def test_prometheus_is_told_under_corednss_names(cluster):
    text = cluster.host.run("curl", "-s", "--unix-socket", cluster.node.socket, "http://node/metrics")
    labels = re.escape('{family="1",proto="udp",server="dns://:53",type="A",view="",zone="cluster.local."}')
    found = re.search(rf"coredns_dns_requests_total{labels} ([\d.e+]+)", text)
    assert found
    assert float(found[1]) > 20_000


# --- end -------------------------------------------------------------------------------------------------------------


def test_names_outlive_a_crash_of_the_node(cluster, client):
    node = cluster.node
    node.kill()
    node.start()
    assert short(client, f"web.{DOMAIN}") == ["10.96.0.20"]
    assert node.stop() == 0
    assert "10.244.1.0" not in cluster.host.run("ss", "-Hlunt")
