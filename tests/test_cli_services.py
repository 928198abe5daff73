"""The commands about services and flows as their users see them."""

import json
import re
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from dataplane.config import parse
from dataplane.control.api import MissingError
from dataplane.control.query import Query
from tests.fake_node import FakeNode, dataplane, listings, serving
from tests.node_file import NODE

LISTS = ("services", "endpoints", "conntrack", "nat", "persistence")


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def path(tmp_path: Path, node: FakeNode) -> Iterator[Path]:
    with serving(node, tmp_path / "node1.sock"):
        yield tmp_path / "node1.sock"


# --- services and flows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LISTS)
def test_show_prints_a_listing_as_json(kind, path):
    answer = json.loads(dataplane("show", kind, "-o", "json", "--socket", path).stdout)
    assert answer == {kind: listings()[kind], "matched": len(listings()[kind])}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("form", ["table", "wide"])
def test_show_prints_a_listing_as_a_table(kind, form, path):
    if (kind, form) == ("persistence", "wide"):
        form = "table"
    result = dataplane("show", kind, "-o", form, "--socket", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].isupper()
    assert len(result.stdout.splitlines()) == 1 + len(listings()[kind])


@pytest.mark.parametrize("kind", LISTS)
def test_the_usual_table_fits_the_terminal(kind, path):
    result = dataplane("show", kind, "--socket", path)
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_services_show_who_answers_where(path):
    assert (
        dataplane("show", "services", "--socket", path).stdout
        == """\
SERVICE              TYPE       ADDRESS            SCHED  READY  ACTIVE  CONNS
default/web:http     ClusterIP  10.96.0.20:80/TCP  rr       2/2       1     12
kube-system/dns:dns  ClusterIP  10.96.0.10:53/UDP  rr       0/1       1     12
"""
    )


def test_conntrack_shows_what_a_client_sent_and_who_answers(path):
    assert (
        dataplane("show", "conntrack", "--socket", path).stdout
        == """\
PROTO  STATE          LEFT  SOURCE             DESTINATION         ANSWERED BY
tcp    ESTABLISHED  23h59m  10.244.1.11:40000  10.96.0.20:80       10.244.1.10:8080
udp    UNREPLIED       29s  10.244.1.11:5353   203.0.113.9:53
icmp   REPLIED         30s  10.244.1.11 id 77  203.0.113.9 type 8
gre    UNREPLIED     10m0s  10.244.1.11        203.0.113.9
"""
    )


def test_nat_shows_only_what_changes(path):
    assert (
        dataplane("show", "nat", "--socket", path).stdout
        == """\
PROTO    LEFT  SOURCE             TRANSLATED TO    DESTINATION    TRANSLATED TO     WHY
tcp    23h59m  10.244.1.11:40000  =                10.96.0.20:80  10.244.1.10:8080  service
icmp      30s  10.244.1.11:77     192.0.2.11:1024  203.0.113.9    =                 outgoing
"""
    )


def test_a_limit_says_how_many_more_there_are(path):
    lines = dataplane("show", "conntrack", "--limit", "1", "--socket", path).stdout.splitlines()
    assert len(lines) == 3
    assert lines[-1] == "3 more of 4: --limit 0 shows all"
    result = dataplane("show", "conntrack", "--limit", "1", "-o", "conntrack", "--socket", path)
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == "dataplane: 1 flow entries have been shown. 3 more pass: --limit 0 shows all.\n"


FILTERS = {
    ("-p", "udp"): Query(protocol=17),
    ("--proto", "89"): Query(protocol=89),
    ("-s", "10.244.1.11"): Query(src=ip_network("10.244.1.11")),
    ("--src", "10.244.0.0/16", "-d", "10.96.0.20"): Query(
        src=ip_network("10.244.0.0/16"), dst=ip_network("10.96.0.20")
    ),
    ("--orig-src", "10.0.0.1", "--reply-src", "10.0.0.2"): Query(
        src=ip_network("10.0.0.1"), reply_src=ip_network("10.0.0.2")
    ),
    ("-r", "10.0.0.2", "-q", "10.0.0.3"): Query(reply_src=ip_network("10.0.0.2"), reply_dst=ip_network("10.0.0.3")),
    ("--sport", "1", "--dport", "2"): Query(sport=1, dport=2),
    ("--orig-port-src", "1", "--orig-port-dst", "2"): Query(sport=1, dport=2),
    ("--reply-port-src", "3", "--reply-port-dst", "4"): Query(reply_sport=3, reply_dport=4),
    ("--state", "established", "-u", "assured"): Query(state="ESTABLISHED", status="ASSURED"),
    ("--service", "web"): Query(service="default/web"),
}


@pytest.mark.parametrize("words", FILTERS, ids=" ".join)
@pytest.mark.parametrize("command", [("show", "conntrack"), ("show", "nat"), ("conntrack", "delete")], ids=" ".join)
def test_filters_reach_the_node(command, words, path, node):
    result = dataplane(*command, *words, "--socket", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert node.queries == [FILTERS[words]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sport", "http"), "--sport: expected a port from 0 to 65535 (got 'http')"),
        (("-p", "tpc"), "--protocol: expected a number from 0 to 255 or one of icmp, tcp, udp, gre, icmpv6, sctp"),
        (("--reply-src", "here"), "--reply-src: expected an address or a prefix such as 10.244.1.0/24 (got 'here')"),
        (("--limit", "many"), "--limit: expected a number; 0 is all (got 'many')"),
    ],
)
def test_a_filter_that_makes_no_sense_is_a_usage_error(words, message, path, node):
    result = dataplane("show", "conntrack", *words, "--socket", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert node.queries == []


def test_services_are_also_printed_as_ipvsadm_does(path):
    lines = dataplane("show", "services", "-o", "ipvsadm", "--socket", path).stdout.splitlines()
    assert lines[0] == "IP Virtual Server version 1.2.1 (size=262144)"
    assert lines[3:5] == [
        "TCP  10.96.0.20:80 rr persistent 10800",
        "  -> 10.244.1.10:8080             Masq    1      1          0         ",
    ]
    lines = dataplane("show", "services", "--stats", "--socket", path).stdout.splitlines()
    assert lines[3] == "TCP  10.96.0.20:80                      12      120      100    12000  100000K"
    lines = dataplane("show", "services", "--rate", "--socket", path).stdout.splitlines()
    assert lines[3] == "TCP  10.96.0.20:80                       0        0        0        0        0"


def test_flows_are_also_printed_as_conntrack_and_ipvsadm_do(path):
    result = dataplane("show", "conntrack", "-o", "conntrack", "--socket", path)
    assert result.stdout.splitlines()[1].startswith(
        "udp      17 29 src=10.244.1.11 dst=203.0.113.9 sport=5353 dport=53"
    )
    assert result.stderr == "dataplane: 4 flow entries have been shown.\n"
    assert "packets=5 bytes=300" in dataplane("show", "conntrack", "-o", "extended", "--socket", path).stdout
    assert dataplane("show", "conntrack", "-o", "ipvsadm", "--socket", path).stdout.splitlines()[2:] == [
        "TCP 179:59 NONE        10.244.1.11:0      10.96.0.20:80      10.244.1.10:8080",
        "TCP 14:59  ESTABLISHED 10.244.1.11:40000  10.96.0.20:80      10.244.1.10:8080",
    ]
    assert len(dataplane("show", "persistence", "-o", "ipvsadm", "--socket", path).stdout.splitlines()) == 3


def test_connections_that_a_limit_cuts_off_are_counted_on_stderr(path):
    result = dataplane("show", "conntrack", "-o", "ipvsadm", "--limit", "1", "--socket", path)
    assert result.stderr == "dataplane: 3 more connections pass: --limit 0 shows all\n"


def test_the_tables_counters_have_conntracks_names(path):
    assert dataplane("show", "conntrack", "--stats", "-o", "conntrack", "--socket", path).stdout == (
        "cpu=0   \tfound=96 invalid=1 insert=9 insert_failed=0 drop=0 early_drop=0 error=0 search_restart=0 "
        "clash_resolve=0 chaintoolong=0 \n"
    )
    assert re.search(
        r"^limit +262144$", dataplane("show", "conntrack", "--stats", "--socket", path).stdout, re.MULTILINE
    )


@pytest.mark.parametrize(
    "words",
    [
        ("services", "--stats", "--rate"),
        ("services", "--stats", "-o", "json"),
        ("conntrack", "--stats", "-o", "ipvsadm"),
    ],
    ids=" ".join,
)
def test_what_does_not_go_together_is_a_usage_error(words, path):
    assert dataplane("show", *words, "--socket", path).returncode == 2


def test_conntrack_delete_says_how_many_flows_went(path, node):
    result = dataplane("conntrack", "delete", "-p", "udp", "--socket", path)
    assert (result.returncode, result.stdout) == (0, "4 flow entries deleted\n")
    node.rows["conntrack"] = node.rows["conntrack"][:1]
    assert dataplane("conntrack", "delete", "--all", "--socket", path).stdout == "1 flow entry deleted\n"


def test_conntrack_delete_does_not_delete_everything_by_accident(path, node):
    result = dataplane("conntrack", "delete", "--socket", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "dataplane: no filter is given; --all deletes every flow\n"
    assert dataplane("conntrack", "delete", "--all", "-p", "udp", "--socket", path).returncode == 2
    assert node.queries == []


# --- edits -----------------------------------------------------------------------------------------------------------

WEB = """
name = "web"
namespace = "shop"
clusterIPs = ["10.96.0.20"]
ports = [{ port = 80, targetPort = 8080 }]
"""
WEB_VALUES = {"clusterIPs": ["10.96.0.20"], "ports": [{"port": 80, "targetPort": 8080}]}


def test_service_set_makes_of_options_what_a_file_would_say(path, node):
    node.result = {"applied": ["service default/web added"], "errors": []}
    result = dataplane(
        *("service", "set", "web", "--type", "NodePort", "--cluster-ip", "10.96.0.20", "--scheduler", "wrr"),
        *("--port", "http=80:8080@30080", "--port", "53/udp", "--port", "81:named", "--affinity", "300"),
        *("--endpoint", "10.244.1.10", "--endpoint", "10.244.1.11=3", "--external-policy", "Local", "--socket", path),
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "service default/web added\nOK: 1 change\n", "")
    values = {
        "name": "web",
        "namespace": "default",
        "type": "NodePort",
        "clusterIPs": ["10.96.0.20"],
        "scheduler": "wrr",
        "ports": [
            {"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080},
            {"port": 53, "protocol": "UDP"},
            {"port": 81, "targetPort": "named"},
        ],
        "endpoints": [{"ip": "10.244.1.10"}, {"ip": "10.244.1.11", "weight": 3}],
        "sessionAffinity": "ClientIP",
        "sessionAffinityTimeout": "300s",
        "externalTrafficPolicy": "Local",
    }
    assert node.edits == [("set_service", values)]


def test_what_service_set_sends_is_what_a_file_may_say(path, node):
    dataplane(
        "service", "set", "web", "--cluster-ip", "10.96.0.20", "--port", "80", "--affinity", "9", "--socket", path
    )
    (_, values), *_ = node.edits
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key != "ports"]
    settings = parse("[[services.static]]\n" + "\n".join(lines) + "\nports = [{ port = 80 }]\n" + NODE, "F")
    assert [each.affinity_seconds for each in settings.state.services if each.id == "default/web"] == [9]


def test_a_port_without_a_name_keeps_endpoints_out_of_it(path, node):
    dataplane("service", "set", "shop/web", "--port", "80", "--socket", path)
    assert node.edits == [("set_service", {"name": "web", "namespace": "shop", "ports": [{"port": 80}]})]


@pytest.mark.parametrize("text", [WEB, json.dumps({"name": "web", "namespace": "shop", **WEB_VALUES})])
@pytest.mark.parametrize("stdin", [True, False])
def test_service_set_reads_toml_and_json_from_a_file_or_stdin(text, stdin, path, node, tmp_path):
    file = tmp_path / "web"
    file.write_text(text)
    with file.open() as content:
        result = dataplane("service", "set", "-f", "-" if stdin else file, "--socket", path, stdin=content)
    assert (result.returncode, result.stderr) == (0, "")
    assert node.edits == [("set_service", {"name": "web", "namespace": "shop", **WEB_VALUES})]


def test_service_set_takes_the_services_of_a_nodes_file(path, node, tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(f"[[services.static]]{WEB}[[services.static]]{WEB.replace('web', 'other')}")
    assert dataplane("service", "set", "-f", file, "--socket", path).returncode == 0
    assert [values["name"] for _, values in node.edits] == ["web", "other"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "dataplane: expected a NAME or -f FILE"),
        (("a/b/c", "--port", "80"), "dataplane: 'a/b/c': expected NAME or NAMESPACE/NAME"),
        (("web", "--port", "http"), "dataplane: --port 'http': expected [NAME=]PORT[:TARGET][/PROTOCOL][@NODEPORT]"),
        (
            ("web", "--port", "9" * 5000),
            f"dataplane: --port '{'9' * 5000}': expected [NAME=]PORT[:TARGET][/PROTOCOL][@NODEPORT]",
        ),
        (("web", "--endpoint", "10.0.0.1=²"), "dataplane: --endpoint '10.0.0.1=²': expected IP[=WEIGHT]"),
        (("web", "--endpoint", "10.0.0.1=x"), "dataplane: --endpoint '10.0.0.1=x': expected IP[=WEIGHT]"),
        (("-f", "/nowhere/web.toml"), "/nowhere/web.toml: no such file"),
        (("-f", "x", "--cluster-ip", "10.0.0.1"), "dataplane: -f does not go with --cluster-ip"),
    ],
)
def test_service_set_says_what_is_wrong_before_it_asks(words, message, path, node):
    result = dataplane("service", "set", *words, "--socket", path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{message}\n")
    assert node.edits == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "TOML: Invalid value"),
        ('{"name": }', "JSON: Expecting value"),
        ("port = 1", "name: missing; expected the service's name"),
        ("[services]\nstatic = 1", "services.static: expected an array of tables"),
    ],
)
def test_a_file_that_is_none_is_a_usage_error(text, message, path, node, tmp_path):
    file = tmp_path / "x"
    file.write_text(text)
    result = dataplane("service", "set", "-f", file, "--socket", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{file}: {message}")
    assert node.edits == []


EDITS = {
    ("service", "delete", "web"): ("delete_service", "default", "web"),
    ("endpoint", "add", "shop/web", "10.244.1.12", "--weight", "2", "--node", "node2"): (
        *("add_endpoint", "shop", "web"),
        {"ip": "10.244.1.12", "weight": 2, "node": "node2"},
    ),
    ("endpoint", "add", "web", "10.244.1.12"): ("add_endpoint", "default", "web", {"ip": "10.244.1.12"}),
    ("endpoint", "drain", "web", "10.244.1.12"): ("drain_endpoint", "default", "web", {"ip": "10.244.1.12"}),
    ("endpoint", "delete", "web", "2001:db8::1"): ("delete_endpoint", "default", "web", {"ip": "2001:db8::1"}),
}


@pytest.mark.parametrize("command", EDITS, ids=" ".join)
def test_edits_reach_the_node_and_say_what_was_done(command, path, node):
    node.result = {"applied": ["one", "two"], "errors": []}
    result = dataplane(*command, "--socket", path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "one\ntwo\nOK: 2 changes\n", "")
    assert node.edits == [EDITS[command]]


@pytest.mark.parametrize("command", EDITS, ids=" ".join)
def test_a_refused_edit_lists_the_errors_and_exits_with_2(command, path, node):
    node.result = {"applied": [], "errors": ["ip: expected an address"]}
    result = dataplane(*command, "--socket", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "ip: expected an address\ndataplane: edit refused; nothing was changed\n"


@pytest.mark.parametrize("command", EDITS, ids=" ".join)
def test_what_does_not_exist_exits_with_4(command, path, node):
    node.missing = MissingError("no such service: default/web")
    result = dataplane(*command, "--socket", path)
    assert (result.returncode, result.stdout, result.stderr) == (4, "", "dataplane: no such service: default/web\n")


def test_service_list_is_show_services(path):
    assert (
        dataplane("service", "list", "--socket", path).stdout == dataplane("show", "services", "--socket", path).stdout
    )
