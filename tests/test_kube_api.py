"""The client of the Kubernetes API, against a server over real HTTP: lists, watches, and everything that fails."""

import asyncio
import json
import ssl

import pytest

from dataplane.control import kube_watch
from dataplane.control.kube_api import ApiError, AwayError, KubeApi, Resource
from dataplane.control.kube_config import Access
from dataplane.control.kube_watch import Backoff, ObjectError, Reflector, Shelf
from tests.kube_items import drop, endpoints, eventually, node, put, service, serving
from tests.kube_server import KubeServer, Request
from tests.test_kube_config import pair  # noqa: F401 - a fixture

SERVICES = Resource("services")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Backoff, "FIRST", 0.01)
    monkeypatch.setattr(Backoff, "LONGEST", 0.05)
    monkeypatch.setattr(kube_watch, "MISSING_SECONDS", 0.05)


def spec_of(item):
    """Convert an object to what tells its states apart; one that says so is broken."""
    if item["spec"].get("type") == "Broken":
        raise ObjectError("is broken")
    return item["spec"]["clusterIP"], ""


class Watched:
    """A reflector of a server's services, and what became known of them, in order."""

    def __init__(self, server: KubeServer, *versions: Resource, access: Access | None = None, **options) -> None:
        self.changes: list[tuple[str, object, object]] = []
        convert = options.pop("convert", spec_of)
        self.shelf = Shelf("services", convert, lambda *change: self.changes.append(change))
        self.api = KubeApi(access or Access(server.url, token=server.token))
        self.reflector = Reflector(self.api, versions or (SERVICES,), self.shelf, **options)

    @property
    def values(self):
        return {key: entry.value for key, entry in self.shelf.entries.items()}

    async def __aenter__(self):
        self.task = asyncio.ensure_future(self.reflector.run())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await self.api.close()


def many(count):
    return [service(f"s{number:04}", f"10.96.{number // 250}.{number % 250 + 1}") for number in range(count)]


def test_a_list_comes_in_pages_and_a_watch_goes_on_where_it_ended():
    async def whole():
        async with serving(*many(1201)) as server, Watched(server) as watched:
            await eventually(lambda: watched.shelf.synced)
            assert len(watched.values) == 1201
            assert server.requests[Request("list", "", "services")] == 1 + 1201 // kube_watch.PAGE
            await eventually(lambda: server.watching)
            put(server, service("s0000", "10.96.9.9"), service("new", "10.96.9.8"))
            drop(server, service("s0001"))
            await eventually(lambda: len(watched.changes) == 1204)
            assert watched.changes[-3:] == [
                ("default/s0000", "10.96.0.1", "10.96.9.9"),
                ("default/new", None, "10.96.9.8"),
                ("default/s0001", "10.96.0.2", None),
            ]

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("times", "requests"), [(1, 2 + 7), (2, 2 + 2 + 7), (3, 2 + 2 + 2 + 1)], ids=["once", "twice", "in one piece"]
)
def test_a_continue_token_that_expires_begins_the_list_anew_at_last_in_one_piece(monkeypatch, times, requests):
    async def whole():
        async with serving(*many(1201)) as server:
            page = server.store.page
            left = times

            def compacting(*arguments):
                nonlocal left
                found = page(*arguments)
                if left:
                    left -= 1
                    put(server, service("s0007"))
                    drop(server, service("s0007"))
                    put(server, service("late", "10.96.9.9"))
                    server.store.compact()
                    put(server, service("later", f"10.96.9.{left}"))
                return found

            monkeypatch.setattr(server.store, "page", compacting)
            async with Watched(server) as watched:
                await eventually(lambda: watched.shelf.synced)
                assert len(watched.values) == 1202
                assert "default/s0007" not in watched.values  # it was on a page that came before
                assert server.requests[Request("list", "", "services")] == requests

    asyncio.run(whole())


@pytest.mark.parametrize("by_event", [True, False], ids=["an event", "an answer"])
def test_a_version_that_is_gone_means_to_list_again_and_unchanged_objects_stay(by_event):
    async def whole():
        async with serving(*many(3), gone_by_event=by_event) as server, Watched(server) as watched:
            await eventually(lambda: server.watching)
            before = dict(watched.shelf.entries)
            server.cut()
            put(server, service("s0001", "10.96.9.9"))
            drop(server, service("s0002"))
            put(server, service("s0003", "10.96.9.3"))
            server.store.compact()
            await eventually(lambda: len(watched.changes) == 6)
            assert watched.values == {
                "default/s0000": "10.96.0.1",
                "default/s0001": "10.96.9.9",
                "default/s0003": "10.96.9.3",
            }
            assert watched.shelf.entries["default/s0000"] is before["default/s0000"]
            assert server.requests[Request("list", "", "services")] == 2

    asyncio.run(whole())


def test_a_watch_that_breaks_off_is_resumed_without_a_list():
    async def whole():
        async with serving(*many(3)) as server, Watched(server) as watched:
            for number in range(5):
                await eventually(lambda: server.watching)
                server.cut()
                put(server, service("s0001", f"10.96.9.{number + 1}"))
                await eventually(lambda: watched.values["default/s0001"] == f"10.96.9.{number + 1}")  # noqa: B023
            assert server.requests[Request("list", "", "services")] == 1
            assert [after for _, _, after in watched.changes[3:]] == [f"10.96.9.{n}" for n in range(1, 6)]

    asyncio.run(whole())


def test_a_bookmark_moves_the_version_past_what_is_compacted():
    async def whole():
        async with serving(*many(1), bookmark_seconds=0.02) as server, Watched(server) as watched:
            await eventually(lambda: server.watching)
            put(server, node("other"))  # another collection: services have nothing after their list
            version = str(server.store.version)
            await eventually(lambda: watched.shelf.version == version)
            server.store.compact()
            server.cut()
            await eventually(lambda: server.requests[Request("watch", "", "services")] > 1 and server.watching)
            put(server, service("s0000", "10.96.9.9"))
            await eventually(lambda: watched.values["default/s0000"] == "10.96.9.9")
            assert server.requests[Request("list", "", "services")] == 1

    asyncio.run(whole())


def test_a_server_that_restarts_is_found_again():
    async def whole():
        async with serving(*many(3)) as server, Watched(server) as watched:
            await eventually(lambda: watched.reflector.link.connected)
            await server.stop()
            await eventually(lambda: not watched.reflector.link.connected)
            assert watched.reflector.link.error.endswith(": connection refused")
            assert len(watched.values) == 3
            put(server, service("s0001", "10.96.9.9"))
            await server.start()
            await eventually(lambda: watched.values["default/s0001"] == "10.96.9.9")
            await eventually(lambda: watched.reflector.link.connected)

    asyncio.run(whole())


def test_a_server_that_takes_its_time_to_be_away_is_away_all_the_same(monkeypatch):
    monkeypatch.setattr(kube_watch, "SHORTEST_WATCH", 0.01)

    class Unreachable:
        def __init__(self, *_):
            pass

        async def __aenter__(self):
            await asyncio.sleep(0.02)  # as connect(2) does, for some seconds, when nobody answers
            raise AwayError("no answer in time")

        async def __aexit__(self, *_):
            raise AssertionError

    async def whole():
        async with serving(*many(1)) as server, Watched(server) as watched:
            await eventually(lambda: server.watching)
            monkeypatch.setattr(watched.api, "watch", Unreachable)
            server.cut()
            await eventually(lambda: watched.reflector.link.error == "no answer in time")

    asyncio.run(whole())


def test_a_watcher_that_reads_too_slowly_is_dropped_and_comes_back():
    async def whole():
        async with serving(*many(1), queue=2) as server, Watched(server) as watched:
            await eventually(lambda: server.watching)
            for number in range(10):  # nobody reads meanwhile: this loop does not give way
                put(server, service("s0000", f"10.96.9.{number + 1}"))
            assert not server.watching
            await eventually(lambda: watched.values["default/s0000"] == "10.96.9.10")

    asyncio.run(whole())


def test_a_watch_that_outlives_its_time_is_given_up(monkeypatch):
    monkeypatch.setattr(kube_watch, "WATCH_SECONDS", 0)
    monkeypatch.setattr("dataplane.control.kube_api.OVERTIME_SECONDS", 0.05)

    async def whole():
        async with serving(*many(1)) as server, Watched(server) as watched:
            server.talking.clear()  # its connections stay, and it ends no watch
            await eventually(lambda: watched.reflector.link.error.endswith(": no answer in time"))
            server.talking.set()
            put(server, service("s0000", "10.96.9.9"))
            await eventually(lambda: watched.values["default/s0000"] == "10.96.9.9")

    asyncio.run(whole())


def test_throttling_is_obeyed_for_as_long_as_the_server_asks():
    error = ApiError.of({"kind": "Status", "code": 429, "details": {"retryAfterSeconds": 7}}, 429)
    assert error.retry_after == 7
    backoff = Backoff(lambda: 1.0)
    assert backoff.failed(error.retry_after) > 7

    async def whole():
        async with serving(*many(3)) as server, Watched(server) as watched:
            server.throttle = 1
            await eventually(lambda: watched.shelf.synced)
            assert len(watched.values) == 3

    asyncio.run(whole())


def test_a_version_that_the_server_has_not_reached_is_of_no_use_either():
    causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
    status = {"kind": "Status", "code": 504, "reason": "Timeout", "details": {"causes": causes, "retryAfterSeconds": 1}}
    error = ApiError.of(status, 504)
    assert error.is_gone
    assert error.retry_after == 1
    for harmless in ({}, {"causes": 7}, {"causes": ["x"]}):
        assert not ApiError.of(status | {"details": harmless}, 504).is_gone


def test_a_token_that_is_rotated_is_read_again(tmp_path):
    path = tmp_path / "token"
    path.write_text("t1")

    async def whole():
        async with (
            serving(*many(3), token="t1") as server,
            Watched(server, access=Access(server.url, token_file=path)) as watched,
        ):
            await eventually(lambda: server.watching)
            server.token = "t2"
            server.cut()
            await eventually(lambda: watched.reflector.link.error == "401 Unauthorized: Unauthorized")
            path.write_text("t2")
            await eventually(lambda: server.watching)
            put(server, service("s0000", "10.96.9.9"))
            await eventually(lambda: watched.values["default/s0000"] == "10.96.9.9")

    asyncio.run(whole())


def test_a_collection_that_may_not_be_seen_is_named_and_an_optional_one_counts_as_empty(caplog):
    caplog.set_level("INFO")

    async def whole():
        async with serving(*many(3)) as server:
            server.forbidden.add(Request("list", "", "services"))
            async with Watched(server) as watched, Watched(server, optional=True) as optional:
                await eventually(lambda: watched.reflector.link.error)
                await eventually(lambda: optional.shelf.synced)
                assert "services is forbidden" in watched.reflector.link.error
                assert not watched.shelf.synced
                assert (optional.reflector.link.connected, optional.shelf.installed) == (True, False)
                asked = server.requests[Request("list", "", "services")]
                await eventually(lambda: server.requests[Request("list", "", "services")] > asked + 4)
                server.forbidden.clear()
                await eventually(lambda: len(watched.values) == len(optional.values) == 3)

    asyncio.run(whole())
    lines = [record.message for record in caplog.records if "refuses" in record.message]
    assert len(lines) == 2  # one for each reflector, however often it asked


def test_a_collection_that_is_not_installed_is_looked_for_again():
    pools = Resource("ipaddresspools", "v1beta1", "metallb.io")

    async def whole():
        async with serving() as server:
            server.store.installed.discard("metallb.io")
            async with Watched(server, pools, optional=True, convert=lambda item: (item["spec"], "")) as watched:
                await eventually(lambda: watched.shelf.synced)
                assert not watched.shelf.installed
                server.store.installed.add("metallb.io")
                put(server, {"kind": "IPAddressPool", "metadata": {"name": "p", "namespace": "m"}, "spec": {}})
                await eventually(lambda: watched.values == {"m/p": {}})
                assert watched.shelf.installed
                server.store.installed.discard("metallb.io")
                server.cut()
                await eventually(lambda: not watched.shelf.installed)
                assert watched.values == {}

    asyncio.run(whole())


@pytest.mark.parametrize("status", [403, 404])
def test_a_collection_that_was_seen_and_is_refused_for_a_while_keeps_what_is_known(monkeypatch, status):
    async def whole():
        async with serving(*many(3)) as server, Watched(server, optional=True) as watched:
            await eventually(lambda: server.watching)
            refused: list[tuple[object, str]] = []
            get = watched.api.get

            async def refusing(*arguments):
                if len(refused) < kube_watch.REMOVED - 1:
                    refused.append((watched.values.keys(), watched.reflector.link.error))
                    raise ApiError(status, text="not now")
                return await get(*arguments)

            monkeypatch.setattr(watched.api, "get", refusing)
            known = watched.values.keys()
            server.cut()
            put(server, service("new", "10.96.9.9"))
            server.store.compact()
            await eventually(lambda: "default/new" in watched.values)
            assert refused[1:] == [(known, f"{status} : not now")] * (kube_watch.REMOVED - 2)
            assert watched.reflector.link.connected
            assert len(watched.changes) == 4

    asyncio.run(whole())


def test_permission_that_is_taken_away_for_good_empties_nothing():
    async def whole():
        async with serving(*many(3)) as server, Watched(server, optional=True) as watched:
            await eventually(lambda: server.watching)
            server.forbidden |= {Request(verb, "", "services") for verb in ("list", "watch")}
            server.cut()
            asked = server.requests[Request("list", "", "services")]
            await eventually(lambda: server.requests[Request("list", "", "services")] > asked + 2 * kube_watch.REMOVED)
            assert "services is forbidden" in watched.reflector.link.error
            assert len(watched.values) == 3

    asyncio.run(whole())


@pytest.mark.parametrize("served", [("v1",), ("v1beta1",), ("v1", "v1beta1")], ids="+".join)
def test_the_best_version_that_the_server_has_is_used(served):
    versions = [Resource("endpointslices", version, "discovery.k8s.io") for version in ("v1", "v1beta1")]
    seen = []

    def convert(item):
        seen.append(item)
        return item, ""

    async def whole():
        async with serving(endpoints("web-a", "web", ["10.244.1.5"])) as server:
            server.store.slice_versions = served
            async with Watched(server, *versions, convert=convert) as watched:
                await eventually(lambda: watched.shelf.synced)

    asyncio.run(whole())
    assert ("topology" in seen[0]["endpoints"][0]) == (served[0] == "v1beta1")


def test_a_server_that_is_upgraded_is_asked_for_its_new_version():
    versions = [Resource("endpointslices", version, "discovery.k8s.io") for version in ("v1", "v1beta1")]

    async def whole():
        async with serving(endpoints("web-a", "web", ["10.244.1.5"])) as server:
            server.store.slice_versions = ("v1beta1",)
            async with Watched(server, *versions, convert=lambda item: (item["endpoints"][0], "")) as watched:
                await eventually(lambda: server.watching)
                server.store.slice_versions = ("v1",)
                server.cut()
                put(server, endpoints("web-a", "web", ["10.244.1.6"]))
                await eventually(lambda: watched.values["default/web-a"]["addresses"] == ["10.244.1.6"])
                assert watched.values["default/web-a"]["nodeName"] == "node1"

    asyncio.run(whole())


def test_a_broken_object_is_named_once_and_the_others_go_on(caplog):
    async def whole():
        async with serving(*many(2), service("bad", type="Broken")) as server, Watched(server) as watched:
            await eventually(lambda: server.watching)
            put(server, service("bad", "10.96.7.7", type="Broken"), service("worse", type="Broken"))
            put(server, service("s0001", type="Broken"), service("s0000", "10.96.9.9"))
            await eventually(lambda: watched.values["default/s0000"] == "10.96.9.9")
            assert watched.values == {
                "default/bad": None, "default/worse": None, "default/s0001": None, "default/s0000": "10.96.9.9",
            }  # fmt: skip
            put(server, service("bad", "10.96.8.8"))
            await eventually(lambda: watched.values["default/bad"] == "10.96.8.8")

    asyncio.run(whole())
    lines = [record.message for record in caplog.records]
    assert [line.split("key=")[1] for line in lines] == [
        "default/bad: is broken", "default/worse: is broken", "default/s0001: is broken",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"items": []}', b'{"metadata": {}, "items": [1]}', b"\xff", b"[" * 100_000],
    ids=["nothing", "a list", "half", "no metadata", "no version", "no text", "too deep"],
)
def test_an_answer_that_is_no_list_is_an_error_and_not_a_crash(monkeypatch, body):
    async def whole():
        async with serving() as server, Watched(server) as watched:

            async def get(*_):
                return body

            monkeypatch.setattr(watched.api, "get", get)
            await eventually(lambda: watched.reflector.link.error.startswith("the answer is no"))
            assert not watched.task.done()

    asyncio.run(whole())


def test_a_servers_certificate_is_checked(pair):  # noqa: F811
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair / "cert.pem", pair / "key.pem")
    authority = (pair / "cert.pem").read_text()

    async def whole():
        async with serving(*many(2), tls=context) as server:
            async with Watched(server, access=Access(server.url, authority=authority)) as watched:
                await eventually(lambda: watched.shelf.synced)
            async with Watched(server, access=Access(server.url, verify=False)) as watched:
                await eventually(lambda: watched.shelf.synced)
            async with Watched(server) as watched:
                await eventually(lambda: "certificate" in watched.reflector.link.error)
                assert not watched.shelf.synced

    asyncio.run(whole())


def test_writes_return_what_became_of_the_object_and_conflicts_are_told():
    async def whole():
        async with serving(service("web")) as server:
            api = KubeApi(Access(server.url))
            held = json.loads(await api.get(SERVICES.path("default", "web")))
            change = {"metadata": {"resourceVersion": held["metadata"]["resourceVersion"]}, "status": {"a": 1}}
            fresh = await api.patch(SERVICES.path("default", "web", "status"), change)
            assert fresh["status"] == {"a": 1}
            for work in (
                api.patch(SERVICES.path("default", "web", "status"), change | {"status": {"a": 2}}),
                api.replace(SERVICES.path("default", "web"), held | {"spec": {}}),
                api.create(SERVICES.path("default"), service("web")),
            ):
                with pytest.raises(ApiError) as caught:
                    await work
                assert caught.value.status == 409
            with pytest.raises(ApiError, match="404 NotFound"):
                await api.get(SERVICES.path("default", "nobody"))
            await api.close()

    asyncio.run(whole())
