"""The control API over a real unix socket, and the views of what it answers."""

import http.client
import json
import os
import re
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path

import pytest

from dataplane.control import client, views
from dataplane.control.api import ListenError, MissingError
from dataplane.control.query import Query
from dataplane.control.snapshot import KINDS, LIST_KINDS
from dataplane.verdict import Reason
from tests.fake_node import FakeListing, FakeNode, listings, serving, snapshots
from tests.fake_rows import route


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "node1.sock"


def request(path: Path, method: str, target: str) -> tuple[int, dict[str, str], str]:
    connection = client._Connection(path)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()
    finally:
        connection.close()


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_answered_with_the_nodes_snapshot(kind, path):
    with serving(FakeNode(), path):
        assert client.get(path, kind) == snapshots()[kind]


def test_the_socket_is_for_owner_and_group_only_and_goes_away_with_the_server(path):
    with serving(FakeNode(), path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


def test_the_socket_of_a_killed_node_is_replaced(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(FakeNode(), path):
        assert client.get(path, "status")["name"] == "node1"


def test_a_node_that_listens_is_not_pushed_away(path):
    with serving(FakeNode(), path):
        with pytest.raises(ListenError, match=r"another node listens there"), serving(FakeNode(), path):
            pass
        assert client.get(path, "status")["name"] == "node1"


def test_a_file_that_is_no_socket_is_left_alone(path):
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(ListenError, match="exists and is no socket"), serving(FakeNode(), path):
        pass
    assert path.read_text() == "precious"


def test_a_socket_that_another_node_put_there_meanwhile_is_not_taken_away(path):
    with socket.socket(socket.AF_UNIX) as other:
        with serving(FakeNode(), path):
            path.unlink()
            other.bind(str(path))
        assert path.exists()


@pytest.mark.parametrize(
    ("method", "target", "code", "word"),
    [
        ("GET", "/v1/nonsense", 404, "not-found"),
        ("GET", "/", 404, "not-found"),
        ("POST", "/v1/routes", 405, "method-not-allowed"),
        ("GET", "/v1/reload", 405, "method-not-allowed"),
    ],
)
def test_errors_are_json(method, target, code, word, path):
    with serving(FakeNode(), path):
        status, headers, body = request(path, method, target)
    assert (status, json.loads(body)["error"]) == (code, word)
    assert target in json.loads(body)["message"]
    assert headers["Content-Type"].startswith("application/json")


def test_a_bug_in_a_request_is_an_answer_and_the_node_lives(path, caplog):
    node = FakeNode()
    node.failure = KeyError("oops")
    with serving(node, path):
        status, _, body = request(path, "GET", "/v1/routes")
        assert (status, json.loads(body)) == (500, {"error": "internal", "message": "KeyError: 'oops'"})
        node.failure = None
        assert client.get(path, "routes")["routes"]
    assert "request failed method=GET path=/v1/routes" in caplog.text


def test_reload_says_what_was_done(path):
    with serving(FakeNode(), path):
        assert client.reload(path)["applied"] == ["pod added name=default/web-0"]


def test_a_refused_reload_lists_every_error(path):
    node = FakeNode()
    node.result = {"applied": [], "errors": ["node.toml:3: a: bad", "node.toml:4: b: bad"]}
    with serving(node, path), pytest.raises(client.RefusedError, match="nothing was changed") as refused:
        client.reload(path)
    assert refused.value.errors == ("node.toml:3: a: bad", "node.toml:4: b: bad")


def test_edits_and_reloads_do_not_overlap(path):
    node = FakeNode()
    with serving(node, path), ThreadPoolExecutor(4) as pool:
        edits = [partial(client.reload, path), partial(client.delete_service, path, "default", "web")]
        for result in [pool.submit(edit) for _ in range(4) for edit in edits]:
            result.result()
    assert (node.most_at_once, len(node.edits)) == (1, 8)


def test_metrics_are_served_on_the_socket_and_on_tcp(path):
    with serving(FakeNode(), path, ("127.0.0.1", 0)) as server:
        on_socket = request(path, "GET", "/metrics")
        connection = http.client.HTTPConnection("127.0.0.1", server.metrics_port, timeout=10)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.read().decode() == on_socket[2]
        assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
        connection.request("GET", "/v1/status")  # the control API is not for the network
        assert connection.getresponse().status == 404
        connection.close()


def test_a_metrics_port_that_is_taken_is_named_and_the_socket_is_closed_again(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        expected = rf"metrics.listen 127.0.0.1:{address[1]}: .*in use"
        with pytest.raises(ListenError, match=expected), serving(FakeNode(), path, address):
            pass
    assert not path.exists()


# --- listings and edits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIST_KINDS)
def test_every_listing_is_answered_whole(kind, path):
    with serving(FakeNode(), path):
        rows = listings()[kind]
        assert client.listing(path, kind, Query()) == {kind: rows, "matched": len(rows)}


def test_a_listing_is_filtered_and_limited_by_the_node(path):
    node = FakeNode()
    with serving(node, path):
        answer = client.listing(path, "conntrack", Query(dport=53, service="default/web", limit=1))
    assert node.queries == [Query(dport=53, service="default/web", limit=1)]
    assert (len(answer["conntrack"]), answer["matched"]) == (1, 4)


def test_an_empty_listing_is_json_too(path):
    node = FakeNode()
    node.rows["nat"] = []
    with serving(node, path):
        assert client.listing(path, "nat", Query()) == {"nat": [], "matched": 0}


def test_a_listing_has_one_row_per_line(path):
    with serving(FakeNode(), path):
        lines = request(path, "GET", "/v1/conntrack")[2].splitlines()
    assert (lines[0], lines[-1]) == ('{"conntrack": [', '], "matched": 4}')
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == listings()["conntrack"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/v1/conntrack?dport=http", "dport: expected a port from 0 to 65535 (got 'http')"),
        ("/v1/conntrack?port=1", "port: no filter of conntrack; expected one of dport, dst, limit"),
        ("/v1/services?state=CLOSE", "state: no filter of services; expected one of dport, dst, limit"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(target, message, path):
    with serving(FakeNode(), path):
        status, _, body = request(path, "GET", target)
    assert (status, json.loads(body)["error"]) == (422, "refused")
    assert message in json.loads(body)["message"]


def test_a_listing_that_fails_in_the_middle_ends_the_connection(path, caplog):
    class Failing(FakeListing):
        def __iter__(self):
            yield listings()["nat"]
            raise KeyError("oops")

    node = FakeNode()
    node.listing = lambda kind, query: Failing([], 0)  # type: ignore[method-assign]
    with serving(node, path):
        with pytest.raises(client.ControlError, match=r"node1\.sock"):
            client.listing(path, "nat", Query())
        assert client.get(path, "status")["name"] == "node1"
    assert "listing failed path=/v1/nat" in caplog.text


def test_an_answer_that_lacks_its_end_is_an_error(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"nat": [\n{"a": 1}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(client.ControlError, match="the answer broke off"):
            client.listing(path, "nat", Query())
        thread.join()


def test_flows_are_deleted_by_filter(path):
    node = FakeNode()
    with serving(node, path):
        assert client.delete_flows(path, Query(protocol=17)) == 4
        assert client.delete_flows(path, Query(), everything=True) == 4
        with pytest.raises(client.RefusedError, match="all=yes deletes every flow"):
            client.delete_flows(path, Query())
    assert node.queries == [Query(protocol=17), Query()]


def test_the_path_names_what_is_edited_whatever_the_body_says(path):
    node = FakeNode()
    with serving(node, path):
        client.set_service(path, "shop", "web", {"name": "other", "ports": []})
        client.add_endpoint(path, "shop", "web", "10.244.1.9", {"ip": "10.244.1.8", "weight": 2})
    assert node.edits == [
        ("set_service", {"name": "web", "namespace": "shop", "ports": []}),
        ("add_endpoint", "shop", "web", {"ip": "10.244.1.9", "weight": 2}),
    ]


def test_values_that_json_does_not_have_are_for_the_node_to_refuse(path):
    node = FakeNode()
    with serving(node, path):
        client.set_service(path, "default", "web", {"type": date(2026, 1, 2)})
    assert node.edits == [("set_service", {"name": "web", "namespace": "default", "type": "2026-01-02"})]


def test_names_of_any_letters_arrive_as_they_were_sent(path):
    node = FakeNode()
    with serving(node, path):
        client.delete_service(path, "a b", "c?d%2F")
        client.drain_endpoint(path, "x", "y", "2001:db8::1")
    assert node.edits == [
        ("delete_service", "a b", "c?d%2F"),
        ("drain_endpoint", "x", "y", {"ip": "2001:db8::1"}),
    ]


BODIES = {
    "a list": (b"[]", 422, "the body is not a JSON object"),
    "a number": (b"1", 422, "the body is not a JSON object"),
    "half an object": (b"{", 422, "the body is not JSON: "),
    "no text": (b'{"type": "\xff"}', 422, "the body is not JSON: 'utf-8' codec can't decode byte 0xff"),
    "too deep": (b'{"ports":' + b"[" * 200_000, 422, "the body is not JSON: maximum recursion depth"),
    "too long a number": (b'{"weight": ' + b"9" * 5000 + b"}", 422, "the body is not JSON: Exceeds the limit"),
    "too large": (b'{"type": "' + b"x" * (1 << 20) + b'"}', 413, "Maximum request body size 1048576 exceeded"),
}


@pytest.mark.parametrize(("body", "code", "message"), BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_object_is_refused(body, code, message, path, caplog):
    node = FakeNode()
    with serving(node, path):
        connection = client._Connection(path)
        connection.request("PUT", "/v1/services/default/web", body, {"Content-Type": "image/png; charset=klingon"})
        response = connection.getresponse()
        assert response.status == code
        assert json.loads(response.read())["message"].startswith(message)
        connection.close()
    assert node.edits == []
    assert caplog.messages == []


def test_what_does_not_exist_is_not_found(path):
    node = FakeNode()
    node.missing = MissingError("no such service: default/web")
    with serving(node, path), pytest.raises(client.NotFoundError, match="no such service: default/web"):
        client.delete_service(path, "default", "web")


# --- the client ------------------------------------------------------------------------------------------------------


def test_nobody_listening_is_not_running(path):
    with pytest.raises(client.NotRunningError, match="nobody listens on") as error:
        client.get(path, "status")
    assert error.value.exit_code == 3
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(client.NotRunningError):
        client.get(path, "status")


def test_an_unknown_resource_is_not_found(path):
    with serving(FakeNode(), path), pytest.raises(client.NotFoundError, match="/v1/nonsense") as error:
        client.get(path, "nonsense")
    assert error.value.exit_code == 4


def test_a_socket_of_somebody_else_is_named(path):
    with serving(FakeNode(), path):
        path.parent.chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(client.NoPermissionError, match=re.escape(str(path))) as error:
                client.get(path, "status")
        finally:
            os.seteuid(0)
    assert error.value.exit_code == 5


def test_an_answer_that_is_no_json_is_an_error_not_a_traceback(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(client.ControlError, match="not a JSON object"):
            client.get(path, "status")
        thread.join()


def test_the_only_socket_is_found(path):
    with serving(FakeNode(), path):
        (path.parent / "node1.toml").touch()
        assert client.find_socket(path.parent) == path


def test_of_several_sockets_the_one_that_answers_is_taken(path):
    with serving(FakeNode(), path), socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path.with_name("dead.sock")))
        dead.close()
        assert client.find_socket(path.parent) == path


def test_several_nodes_are_named(path):
    other = path.with_name("node2.sock")
    with serving(FakeNode(), path), serving(FakeNode(), other):
        with pytest.raises(client.RefusedError, match=f"{path}, {other}; choose one with --socket") as error:
            client.find_socket(path.parent)
        assert error.value.exit_code == 2


@pytest.mark.parametrize("made", [True, False])
def test_no_socket_is_not_running(path, made):
    if made:
        path.parent.mkdir()
    with pytest.raises(client.NotRunningError, match=f"no socket in {path.parent}"):
        client.find_socket(path.parent)


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_table_whose_rows_fit_its_columns(kind):
    view = views.VIEWS[kind](snapshots()[kind])
    assert view.rows
    assert {len(row) for row in view.rows} == {len(view.columns)}


def test_the_cluster_is_a_row_per_node_and_a_line_about_the_store():
    snapshot = snapshots()["cluster"]
    view = views.cluster(snapshot)
    assert [(row[0], row[1], row[2], row[-2], row[-1]) for row in view.rows] == [
        ("node1", "192.0.2.11", "10.244.1.0/26", "alive", "*"),
        ("node2", "192.0.2.12", "10.244.2.0/26", "away", ""),
    ]
    assert view.rows[1][4] == "-"
    since = view.rows[0][4]
    assert view.notes == (f"etcd http://192.0.2.100:2379: connected since {since}, revision 1234, lag 0.0 s",)
    away = views.cluster(snapshot | {"connected": False, "lag_s": 2.52, "error": "connection refused"})
    assert away.notes[0].endswith(f": away since {since}, revision 1234, lag 2.5 s: connection refused")
    assert views.cluster(snapshot | {"source": "static", "where": "node.toml"}).notes == ("static node.toml",)


def test_only_reasons_that_were_met_are_shown_the_most_frequent_first():
    rows = views.drops(snapshots()["drops"]).rows
    assert [(row[0], row[1], row[2]) for row in rows] == [("12", "ip.ttl", "route"), ("3", "route.none", "route")]
    assert rows[0][3] == Reason.IP_TTL.text


def test_all_drop_reasons_are_shown_when_asked_for_and_no_others():
    rows = views.all_drops(snapshots()["drops"]).rows
    assert rows[0][1] == "ip.ttl"
    assert {row[1] for row in rows} == {reason.label for reason in Reason if reason.verdict.name == "DROP"}


def test_no_drops_are_a_sentence():
    assert views.plain(views.drops({"reasons": []})) == "no packet was dropped\n"


def test_the_conservation_of_packets_is_shown_and_its_violation_as_well():
    counters = snapshots()["counters"]
    assert views.counters(counters).notes == (
        "received + injected = accepted + stolen + queued + dropped: 104 = 104: OK",
    )
    assert views.counters(counters | {"accepted": 80}).notes[0].endswith("104 = 98: VIOLATED, +6 packets")


def test_what_passed_a_stage_is_what_entered_less_what_it_took():
    assert views.pipeline(snapshots()["pipeline"]).rows[2] == ("route", "102", "86", "0", "1", "15")


def test_an_empty_table_says_so():
    assert views.plain(views.arp({"arp": []})) == "none\n"


def test_numbers_stand_right_and_words_left():
    view = views.View(("name", ">packets"), (("a", "1"), ("bcdef", "1000")))
    assert views.plain(view) == "NAME   PACKETS\na            1\nbcdef     1000\n"


IPROUTE = """\
default via 192.0.2.1 dev eth0 proto static
blackhole 10.244.1.0/24 proto 80
10.244.1.10 dev cali0d7763386da scope link
10.244.2.0/24 via 10.244.2.0 dev vxlan.calico onlink mtu 1450
10.244.3.0/24 via 192.0.2.13 dev eth0 proto 80
192.0.2.0/24 dev eth0 proto kernel scope link
local 192.0.2.11 dev lo table local proto kernel scope host src 192.0.2.11
unreachable 203.0.113.0/24 proto static
"""


def test_routes_are_printed_as_iproute2_prints_them():
    assert views.iproute(snapshots()["routes"]) == IPROUTE


def test_no_routes_are_no_lines():
    assert views.iproute({"routes": []}) == ""
    assert views.iproute({"routes": [route("10.244.1.0/24", "blackhole")]}) == "blackhole 10.244.1.0/24 proto 80\n"  # type: ignore[list-item]
