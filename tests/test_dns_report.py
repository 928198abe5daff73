"""What the node says of cluster DNS: the table, the metrics, the questions of ``dataplane dns query``."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dataplane.control import client, metrics, views
from dataplane.control.dns_text import candidates, lines, read_name, read_type
from dataplane.control.handlers_dns import dns_routes
from dataplane.control.snapshot_dns import OFF
from tests.dns_world import ask, question, zone
from tests.fake_node import FakeNode, dataplane, serving, snapshots
from tests.resolving import OTHER, STATE, WEB, by, good, place, resolving, scenario
from tests.resolving import ask as send
from tests.resolving import serving as upstreams

DOMAIN = "testns.svc.cluster.local"


# --- the table and the metrics ---------------------------------------------------------------------------------------


def test_the_table_counts_questions_and_answers():
    view = views.dns(snapshots()["dns"])
    assert view.rows == (("A by tcp", "1"), ("AAAA by udp", "9"), ("NOERROR", "6"), ("NXDOMAIN", "4"))
    assert view.notes == (
        "cluster.local at 10.96.0.10, services: 12",
        "upstream 192.0.2.53:53 does not answer, asked 5, failures 2",
        "upstream 192.0.2.54:53 answers, asked 3, failures 0",
        "their answers: 3 kept, hits 40, misses 8",
    )


def test_a_node_without_dns_says_so():
    assert views.dns(OFF).notes == ("the node answers no names",)


def samples(node: FakeNode) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(metrics.text(node.snapshot))
    ours = [each for family in families for each in family.samples if each.name.startswith("coredns")]
    where = {"server", "view"}  # the same everywhere
    return {
        (each.name, tuple(value for label, value in sorted(each.labels.items()) if label not in where)): each.value
        for each in ours
    }


def test_the_metrics_have_corednss_names():
    found = samples(FakeNode())
    assert found["coredns_dns_requests_total", ("1", "udp", "AAAA", "cluster.local.")] == 9
    assert found["coredns_dns_responses_total", ("NXDOMAIN", "cluster.local.")] == 4
    duration = "coredns_dns_request_duration_seconds"
    assert [found[f"{duration}_bucket", (edge, "cluster.local.")] for edge in ("0.001", "0.002", "+Inf")] == [7, 9, 10]
    assert (found[f"{duration}_count", ("cluster.local.",)], found[f"{duration}_sum", ("cluster.local.",)]) == (10, 0.5)
    assert found["coredns_proxy_failures_total", ("192.0.2.53:53",)] == 2
    assert found["coredns_cache_hits_total", ("cluster.local.",)] == 40


def test_a_node_without_dns_has_no_such_metrics():
    node = FakeNode()
    node.answers["dns"] = OFF
    assert samples(node) == {}


@scenario
async def test_the_resolver_counts_what_it_does():
    began = time.perf_counter()
    async with upstreams(good) as (server,), resolving(by(server)) as (made, node):
        assert node.names() == made.snapshot()
        await send(place(node, "UDP"), question(WEB), question(OTHER), question(OTHER))
        found = made.snapshot()
        assert found["requests"] == [{"transport": "udp", "type": "A", "count": 3}]
        assert found["responses"] == {"NOERROR": 3}
        assert sum(found["durations"]) >= 3
        assert 0 < found["duration_sum"] <= 4 * (time.perf_counter() - began)  # four answers, two of them together
        assert len(found["durations"]) == len(found["buckets"]) + 1
        assert [each["asked"] for each in found["upstreams"]] == [1]
        assert (found["services"], found["cache_entries"]) == (len(STATE.services) + 1, 1)
        assert [place.rpartition("/")[2] for place in found["listening"]] == ["UDP", "TCP"]
        await node.become(replace(STATE, dns=None))
        assert made.snapshot() == OFF


# --- names for people ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("web", ["web.a.svc.b.", "web.svc.b.", "web.b.", "web."]),
        ("1.2.3.4.5", ["1.2.3.4.5.a.svc.b.", "1.2.3.4.5.svc.b.", "1.2.3.4.5.b.", "1.2.3.4.5."]),
        ("1.2.3.4.5.6", ["1.2.3.4.5.6.", "1.2.3.4.5.6.a.svc.b.", "1.2.3.4.5.6.svc.b.", "1.2.3.4.5.6.b."]),
        ("web.", ["web."]),
    ],
)
def test_names_are_tried_as_in_a_pod(name, tried):
    assert candidates(name, "a", "b") == tried


@pytest.mark.parametrize(("text", "number"), [("a", 1), ("AAAA", 28), ("srv", 33), ("TYPE65280", 65280), ("ANY", 255)])
def test_types_have_names_and_numbers(text, number):
    assert read_type(text) == number


@pytest.mark.parametrize("text", ["", "B", "TYPE", "TYPE0", "TYPE65536", "TYPE-1", "TYPE²", "OPT", "1"])
def test_what_is_no_type(text):
    with pytest.raises(ValueError, match="no such type of record"):
        read_type(text)


@pytest.mark.parametrize("text", ["a..b", "a" * 64, "東"])
def test_what_is_no_name(text):
    with pytest.raises(ValueError, match="a label has"):
        read_name(text)


def test_an_answer_is_written_as_in_a_zone_file():
    found = ask(question(f"_http._tcp.svc1.{DOMAIN}", "SRV", size=1232), zone())
    assert isinstance(found, bytes)
    assert [(each["section"], each["type"], each["data"]) for each in lines(found)] == [
        ("answer", "SRV", f"0 100 80 svc1.{DOMAIN}."),
        ("additional", "A", "10.96.0.1"),
    ]
    assert lines(found[:-20]) == []


@scenario
async def test_questions_are_explained():
    async with upstreams(good) as (server,), resolving(by(server)) as (made, _):
        found = await made.explain("svc1", "a", "testns")
        assert (found["name"], found["type"], found["rcode"]) == (f"svc1.{DOMAIN}.", "A", "NOERROR")
        assert [each["data"] for each in found["records"]] == ["10.96.0.1"]
        found = await made.explain("x.nowhere.svc.cluster.local.", "A", "testns")
        assert (found["rcode"], found["why"]) == ("NXDOMAIN", "no namespace nowhere")
        found = await made.explain(OTHER, "A", "testns")
        assert (found["rcode"], found["why"], len(found["tried"])) == ("NOERROR", "an upstream's answer", 4)
        found = await made.explain("external", "A", "testns")
        assert found["why"] == "testns/external is an ExternalName; an upstream's answer"
        assert [each["type"] for each in found["records"]] == ["CNAME", "A"]
        assert not made.responder.counters()[0]  # nobody has asked
    async with resolving() as (made, _):
        found = await made.explain("cluster.local.", "AXFR", "testns")
        assert (found["rcode"], found["why"]) == ("REFUSED", "nobody gets the whole zone")
        found = await made.explain("svc1", "AAAA", "testns")
        assert (found["name"], found["rcode"]) == (f"svc1.{DOMAIN}.", "NOERROR")
        assert found["why"] == "no address of this family"
        assert [each["rcode"] for each in found["tried"]] == ["NOERROR", "NXDOMAIN", "NXDOMAIN", "REFUSED"]
        found = await made.explain(f"{OTHER}.", "A", "testns")
        assert (found["rcode"], found["why"]) == ("REFUSED", "no name of the cluster, and there are no upstreams")


# --- the command -----------------------------------------------------------------------------------------------------


class Explaining:
    """Answers from the cluster of these tests."""

    async def explain(self, name: str, kind: str, namespace: str) -> dict[str, Any]:
        async with resolving() as (made, _):
            return {**await made.explain(name, kind, namespace)}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with serving(FakeNode(), tmp_path / "node1.sock", extensions=[dns_routes(Explaining())]):
        yield tmp_path / "node1.sock"


def test_the_command_prints_records_and_what_was_tried(path):
    result = dataplane("dns", "query", "svc1", "-n", "testns", "--socket", path)
    assert result.returncode == 0
    assert result.stdout == f"svc1.{DOMAIN}.\t5\tIN\tA\t10.96.0.1\n; svc1.{DOMAIN}. NOERROR: found\n"


def test_the_command_says_why_there_is_nothing(path):
    result = dataplane("dns", "query", "svc0", "-n", "testns", "--socket", path)
    assert result.returncode == 4
    assert f"; svc0.{DOMAIN}. NXDOMAIN: no service svc0 in namespace testns\n" in result.stdout
    assert result.stderr.startswith("dataplane: ")


def test_the_command_prints_json(path):
    answer = json.loads(dataplane("dns", "query", WEB + ".", "SRV", "-o", "json", "--socket", path).stdout)
    assert (answer["rcode"], answer["records"][0]["data"]) == ("NOERROR", f"0 100 80 {WEB}.")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("a..b",), "dataplane: a label has 1 to 63 bytes (got '')"),
        (("web", "WEB"), "dataplane: no such type of record (got 'WEB')"),
    ],
)
def test_the_command_refuses_what_is_no_question(path, words, error):
    result = dataplane("dns", "query", *words, "--socket", path)
    assert (result.returncode, result.stderr) == (2, error + "\n")


@pytest.mark.parametrize("target", ["dns/query", "dns/query?name=", "dns/query?name=a&mode=x"])
def test_the_api_wants_a_name_and_nothing_unknown(path, target):
    with pytest.raises(client.RefusedError, match="expected name=NAME"):
        client.get(path, target)


def test_the_status_is_the_table(path):
    assert "upstream 192.0.2.53:53 does not answer" in dataplane("dns", "status", "--socket", path).stdout
    assert json.loads(dataplane("dns", "status", "-o", "json", "--socket", path).stdout)["domain"] == "cluster.local"


def test_a_node_without_dns_has_no_names_to_explain(tmp_path):
    with serving(FakeNode(), tmp_path / "node1.sock"):
        result = dataplane("dns", "query", "web", "--socket", tmp_path / "node1.sock")
        assert result.returncode == 4
