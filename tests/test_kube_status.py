"""Who writes load balancer addresses into services, and what; and the permissions that all of it needs."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataplane.control import kube_status
from dataplane.control.kube_api import ApiError
from dataplane.control.kube_lease import Election
from tests.kube_items import (
    FILE,
    Following,
    advertisement,
    drop,
    endpoints,
    eventually,
    following,
    namespace,
    node,
    pod,
    pool,
    put,
    service,
    serving,
)
from tests.kube_server import KubeServer, Request
from tests.test_kube_objects import with_
from tests.test_store_kubernetes import quick  # noqa: F401 - a fixture

BASIS = (node("node1"), node("node2", 2), namespace())
POOL = pool("public", "192.0.2.200-192.0.2.202")
LEASE = "kube-system/dataplane-loadbalancer"


def balancer(name: str, ip: str = "10.96.0.20", **spec: Any) -> Any:
    return service(name, ip, type="LoadBalancer", **spec)


def address(server: KubeServer, name: str) -> list[str]:
    """Return the addresses that a service's status has."""
    status = server.store.objects["services"][f"default/{name}"].get("status") or {}
    return [each["ip"] for each in (status.get("loadBalancer") or {}).get("ingress") or []]


def holder(server: KubeServer) -> str:
    """Return the node that the Lease names."""
    lease = server.store.objects["leases"].get(LEASE)
    return str(lease["spec"].get("holderIdentity", "")).partition("_")[0] if lease else ""


# --- the election ----------------------------------------------------------------------------------------------------


class Desk:
    """A Lease that any number of candidates write to, and the time."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.now = 0.0

    def turn(self, candidate: Election, *, lost: bool = False) -> bool:
        """Let a candidate look and write; return whether it leads."""
        candidate.saw(self.lease, self.now)
        wish = candidate.wish(self.now, self.now + 1_700_000_000)
        if wish is not None and not lost:
            self.lease = dict(wish)
            candidate.won(self.lease, self.now)
        return candidate.leads(self.now)


def test_the_first_one_leads_and_the_others_wait_while_it_renews():
    desk, a, b = Desk(), Election("a", "x", "y", 15), Election("b", "x", "y", 15)
    assert desk.turn(a)
    for _ in range(20):
        desk.now += 5
        assert not desk.turn(b)
        assert desk.turn(a)
    assert desk.lease is not None
    assert desk.lease["spec"]["leaseTransitions"] == 1
    assert desk.lease["spec"]["acquireTime"] < desk.lease["spec"]["renewTime"]


def test_who_is_silent_stops_to_lead_before_another_begins():
    desk, a, b = Desk(), Election("a", "x", "y", 15), Election("b", "x", "y", 15)
    assert desk.turn(a)
    leading = []
    for _ in range(20):
        desk.now += 1
        took = desk.turn(b)
        leading.append((a.leads(desk.now), took))
        if took:
            break
    assert (True, True) not in leading
    assert leading[-1] == (False, True)
    assert desk.now == 16  # it saw the record first one second after it was written
    assert not desk.turn(a)
    assert desk.lease is not None
    assert desk.lease["spec"]["leaseTransitions"] == 2


def test_of_two_that_write_at_once_only_the_one_that_the_server_took_leads():
    desk, a, b = Desk(), Election("a", "x", "y"), Election("b", "x", "y")
    assert not desk.turn(b, lost=True)
    assert desk.turn(a)
    assert not desk.turn(b)


def test_who_finds_another_name_in_the_lease_leads_no_more():
    desk, a = Desk(), Election("a", "x", "y")
    assert desk.turn(a)
    assert desk.lease is not None
    desk.lease = {**desk.lease, "spec": {**desk.lease["spec"], "holderIdentity": "b"}}
    assert not desk.turn(a)
    assert a.farewell() is None


def test_who_says_farewell_is_followed_at_once():
    desk, a, b = Desk(), Election("a", "x", "y"), Election("b", "x", "y")
    assert desk.turn(a)
    assert b.farewell() is None
    farewell = a.farewell()
    assert farewell is not None
    desk.lease = dict(farewell)
    assert not a.leads(desk.now)
    assert desk.turn(b)


@pytest.mark.parametrize(
    "spec", [{}, {"holderIdentity": None}, {"leaseTransitions": "x", "leaseDurationSeconds": "y"}, "x"]
)
def test_a_lease_that_somebody_has_emptied_is_taken(spec):
    desk, a = Desk(), Election("a", "x", "y")
    desk.lease = {"metadata": {"name": "x"}, "spec": spec}
    assert desk.turn(a)


# --- the work --------------------------------------------------------------------------------------------------------


def test_a_service_gets_an_address_and_everybody_knows_it():
    async def whole():
        async with serving(*BASIS, POOL, balancer("web")) as server, following(server) as found:
            await eventually(lambda: address(server, "web") == ["192.0.2.200"])
            await eventually(lambda: [str(ip) for ip in found.cluster.services[0].load_balancer_ips] == ["192.0.2.200"])
            put(server, balancer("api", "10.96.0.21"), service("plain", "10.96.0.22"))
            await eventually(lambda: address(server, "api") == ["192.0.2.201"])
            assert holder(server) == "node1"
            put(server, balancer("web") | {"spec": service("web")["spec"]})
            drop(server, balancer("web"))
            put(server, balancer("next", "10.96.0.23"))
            await eventually(lambda: address(server, "next") == ["192.0.2.200"])
            assert address(server, "plain") == []

    asyncio.run(whole())


def test_an_address_that_lies_in_no_pool_and_a_class_are_somebody_elses():
    other = balancer("cloud") | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}}}

    async def whole():
        foreign = balancer("foreign", loadBalancerClass="x/y")
        async with serving(*BASIS, POOL, other, foreign) as server, following(server):
            put(server, balancer("web", "10.96.0.21"))
            await eventually(lambda: address(server, "web") == ["192.0.2.200"])
            assert address(server, "cloud") == ["203.0.113.9"]
            assert address(server, "foreign") == []

    asyncio.run(whole())


def test_a_service_that_gets_nothing_is_told_why_once():
    async def whole():
        many = [balancer(f"s{number}", f"10.96.0.{number + 1}") for number in range(4)]
        async with serving(*BASIS, POOL, *many) as server, following(server):
            await eventually(lambda: server.store.objects["events"])
            put(
                server,
                service("other", "10.96.0.99"),
                endpoints("x", "s0", ["10.244.1.5"]),
                balancer("s9", "10.96.0.98"),
            )
            await eventually(lambda: len(server.store.objects["events"]) == 2)
            events = server.store.objects["events"].values()
            assert {each["involvedObject"]["name"] for each in events} == {"s3", "s9"}
            first = next(iter(events))
            assert (first["type"], first["reason"], first["source"]["host"]) == ("Warning", "AllocationFailed", "node1")
            assert first["message"]
            drop(server, many[0])
            await eventually(lambda: address(server, "s3") == ["192.0.2.200"])

    asyncio.run(whole())


def test_a_request_that_moves_to_another_address_moves_the_status():
    async def whole():
        async with serving(*BASIS, POOL, balancer("web")) as server, following(server):
            await eventually(lambda: address(server, "web") == ["192.0.2.200"])
            put(server, balancer("web", loadBalancerIP="192.0.2.202"))
            await eventually(lambda: address(server, "web") == ["192.0.2.202"])
            put(server, balancer("web", loadBalancerIP="198.51.100.1"))
            await eventually(lambda: address(server, "web") == [])

    asyncio.run(whole())


MEDDLING = {
    "what is asked for": (balancer("web", loadBalancerIP="192.0.2.202"), "192.0.2.202"),
    "what does not matter": (with_(balancer("web"), "metadata.finalizers", ["example.net/keep"]), "192.0.2.201"),
}


@pytest.mark.parametrize(("change", "expected"), MEDDLING.values(), ids=MEDDLING.keys())
def test_what_somebody_else_has_changed_meanwhile_is_not_overwritten(monkeypatch, change, expected):
    async def whole():
        async with serving(*BASIS, POOL, balancer("first", "10.96.0.9")) as server, following(server) as found:
            await eventually(lambda: address(server, "first") == ["192.0.2.200"])
            api = found.source._writer._api
            patch = api.patch
            outcomes: list[int] = []

            async def meddling(path, body):
                if not outcomes:  # between the decision and the request
                    put(server, change)
                try:
                    fresh = await patch(path, body)
                except ApiError as error:
                    outcomes.append(error.status)
                    raise
                outcomes.append(200)
                return fresh

            monkeypatch.setattr(api, "patch", meddling)
            put(server, balancer("web"))
            await eventually(lambda: address(server, "web") == [expected])
            assert outcomes == [409, 200]

    asyncio.run(whole())


def after_the_patch(monkeypatch, found: Following, name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Let something happen when the server has taken a patch of this service, and the writer does not know it yet."""
    api = found.source._writer._api
    patch = api.patch

    async def late(path, body):
        fresh = await patch(path, body)
        if path.endswith(f"/{name}/status"):
            await work()
        return fresh

    monkeypatch.setattr(api, "patch", late)


def test_a_service_that_is_deleted_while_another_one_is_written_ends_nothing(monkeypatch):
    async def whole():
        async with serving(*BASIS, balancer("a", "10.96.0.21"), balancer("b")) as server, following(server) as found:

            async def deleted():
                drop(server, balancer("b"))
                await eventually(lambda: "default/b" not in found.source.view.services.entries)

            after_the_patch(monkeypatch, found, "a", deleted)
            put(server, POOL)
            await eventually(lambda: address(server, "a") == ["192.0.2.200"])
            put(server, balancer("c", "10.96.0.22"))
            await eventually(lambda: address(server, "c") == ["192.0.2.201"])

    asyncio.run(whole())


def test_a_decision_that_is_older_than_the_service_is_not_written(monkeypatch):
    async def whole():
        async with serving(*BASIS, balancer("a", "10.96.0.21"), balancer("b")) as server, following(server) as found:

            async def taken():
                put(server, balancer("b") | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}}})
                entry, entries = found.source.view.services.entries["default/b"], found.source.view.services.entries
                await eventually(lambda: entries["default/b"].version != entry.version)

            after_the_patch(monkeypatch, found, "a", taken)
            put(server, POOL)
            await eventually(lambda: address(server, "a") == ["192.0.2.200"])
            put(server, balancer("c", "10.96.0.22"))
            await eventually(lambda: address(server, "c"))
            assert address(server, "b") == ["203.0.113.9"]

    asyncio.run(whole())


def test_a_service_that_is_deleted_before_the_answer_to_its_patch_stays_deleted(monkeypatch):
    async def whole():
        async with serving(*BASIS, POOL) as server, following(server) as found:
            entries = found.source.view.services.entries

            async def deleted():
                drop(server, balancer("a"))
                await eventually(lambda: "default/a" not in entries)

            after_the_patch(monkeypatch, found, "a", deleted)
            put(server, balancer("a"))
            await eventually(lambda: server.requests[Request("patch", "", "services/status")] == 1)
            put(server, balancer("b", "10.96.0.21"))
            await eventually(lambda: address(server, "b"))
            assert list(entries) == ["default/b"]
            assert address(server, "b") == ["192.0.2.200"]

    asyncio.run(whole())


def node_two(text: str = FILE) -> str:
    return text.replace('name = "node1"', 'name = "node2"')


def test_one_of_all_writes_and_another_takes_over_when_it_leaves(monkeypatch):
    monkeypatch.setattr(kube_status, "SECONDS", 1)

    async def whole():
        async with serving(*BASIS, POOL, balancer("web")) as server, AsyncExitStack() as stack:
            first: Following
            async with following(server) as first:
                await eventually(lambda: address(server, "web") == ["192.0.2.200"])
                second = await stack.enter_async_context(following(server, node_two()))
                election = second.source._writer.election
                await eventually(lambda: election.holder.startswith("node1_"))
                assert holder(server) == "node1"
                assert first.source._writer.election.holder == election.holder
            await eventually(lambda: holder(server) == "node2")
            put(server, balancer("api", "10.96.0.21"))
            await eventually(lambda: address(server, "api") == ["192.0.2.201"])

    asyncio.run(whole())


def test_a_writer_that_dies_is_followed_when_its_lease_has_ended(monkeypatch):
    monkeypatch.setattr(kube_status, "SECONDS", 1)

    async def whole():
        async with serving(*BASIS, POOL, balancer("web")) as server, following(server) as first:
            await eventually(lambda: holder(server) == "node1")
            async with following(server, node_two()):
                for task in first.source._tasks.values():  # as a process that is killed: no farewell
                    task.cancel()
                await eventually(lambda: holder(server) == "node2")
                put(server, balancer("api", "10.96.0.21"))
                await eventually(lambda: address(server, "api") == ["192.0.2.201"])
            first.source._writer.election.farewell()

    asyncio.run(whole())


def test_a_writer_that_may_not_write_says_so_once_and_everything_else_goes_on(caplog):
    async def whole():
        async with serving(*BASIS, POOL, balancer("web")) as server:
            server.forbidden.add(Request("patch", "", "services/status"))
            async with following(server) as found:
                await eventually(lambda: server.requests[Request("patch", "", "services/status")] > 3)
                put(server, endpoints("x", "web", ["10.244.1.5"]))
                await eventually(lambda: found.endpoints("web") == ["10.244.1.5"])
                server.forbidden.clear()
                await eventually(lambda: address(server, "web") == ["192.0.2.200"])

    asyncio.run(whole())
    lines = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert len(lines) == 1
    assert "services/status is forbidden" in lines[0]


@pytest.mark.parametrize(
    "body", ["", "{", "[]", '"x"', "[" * 100_000], ids=["nothing", "half", "a list", "text", "deep"]
)
@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_a_lease_that_is_none_is_an_error_and_not_a_crash(monkeypatch, caplog, verb, body):
    async def whole():
        async with serving(*BASIS, POOL) as server, following(server) as found:
            api = found.source._writer._api
            asked = api._asked
            broken: list[str] = []

            async def breaking(method, path, *rest):
                if "/leases" not in path or method != verb or len(broken) == 3:
                    return await asked(method, path, *rest)
                broken.append(method)
                return body.encode()

            monkeypatch.setattr(api, "_asked", breaking)
            put(server, balancer("web"))
            await eventually(lambda: address(server, "web") == ["192.0.2.200"])
            assert len(broken) == 3

    asyncio.run(whole())
    assert [record.message for record in caplog.records if "cannot be written: the answer is no" in record.message]


# --- permissions -----------------------------------------------------------------------------------------------------


def test_the_manifest_allows_exactly_what_is_asked_for():
    manifest = Path(__file__).parent.parent / "examples" / "kubernetes-rbac.yaml"
    allowed = {
        Request(verb, group, resource)
        for document in yaml.safe_load_all(manifest.read_text())
        for rule in document.get("rules", ())
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    text = FILE + '[dns]\nclusterIP = "10.96.0.10"\npods = "verified"\n'

    async def whole():
        items = POOL, advertisement("l2"), balancer("web"), balancer("api", "10.96.0.9"), pod("p", "10.244.1.5")
        more = [balancer(f"s{number}", f"10.96.1.{number + 1}") for number in range(3)]
        async with serving(*BASIS, *items, *more, endpoints("x", "web", ["10.244.1.5"])) as server:
            async with following(server, text):
                await eventually(lambda: server.store.objects["events"])
                await eventually(lambda: len(server.watching) == 7)
            return set(server.requests)

    assert asyncio.run(whole()) == allowed
