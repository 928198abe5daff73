"""The source that follows an API server: how it joins, what it hands out, and that it comes to what the server has."""

import asyncio
import logging
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dataplane.control import kube_watch
from dataplane.control.cluster import Cluster, over
from dataplane.control.kube_config import Access, KubeconfigError
from dataplane.control.kube_view import NOWHERE, View
from dataplane.control.kube_watch import Backoff
from dataplane.control.state import L2Advertisement
from dataplane.control.store_kubernetes import KubernetesSource
from dataplane.follow import open_source
from tests.kube_items import (
    FILE,
    KIND,
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
    settings,
)
from tests.kube_server import KubeServer, Request
from tests.kube_store import Object, key_of
from tests.node_file import errors

BASIS = (node("node1"), namespace())
DNS = '[dns]\nclusterIP = "10.96.0.10"\npods = "verified"\n'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Backoff, "FIRST", 0.01)
    monkeypatch.setattr(Backoff, "LONGEST", 0.05)
    monkeypatch.setattr(kube_watch, "MISSING_SECONDS", 0.05)


def contents(server: KubeServer, like: View) -> Cluster:
    """Return the cluster that a server's objects come to, made from nothing."""
    view = View("node1")
    for shelf in view.shelves:
        kind = next(each for each in KIND.values() if each.plural == shelf.name)
        items = server.store.objects[shelf.name].values() if server.store.served(kind) else ()
        shelf.replace(dict(shelf.read(item) for item in items))
        shelf.installed = bool(server.store.served(kind))
    assert like.own is not None
    view.pin(like.own)
    return view.cluster()


def same(a: Cluster, b: Cluster) -> bool:
    return replace(a, revision=0) == replace(b, revision=0)


# --- joining ---------------------------------------------------------------------------------------------------------


def test_a_node_knows_everything_when_it_has_joined():
    async def whole():
        items = (
            *BASIS,
            node("node2", 2),
            service("web"),
            endpoints("web-a", "web", ["10.244.2.5"]),
            pod("p", "10.244.1.5"),
        )
        async with serving(*items) as server, following(server) as found:
            cluster = found.cluster
            assert sorted(cluster.nodes) == ["node1", "node2"]
            assert found.endpoints("web") == ["10.244.2.5"]
            assert sorted(cluster.pods) == ["default/p"]
            assert cluster.namespaces == {"default"}
            assert (cluster.pools, cluster.advertisements) == ((), ())
            assert cluster.revision == server.store.version
            state = over(cluster, settings().state)
            assert state.node.addresses == (ip_address("192.0.2.11"),)
            assert state.pod_network.cidrs == (ip_network("10.244.1.0/24"),)
            assert [f"{peer.name} {peer.address} {peer.tunnel_address}" for peer in state.peers] == [
                "node2 192.0.2.12 10.244.2.0"
            ]

    asyncio.run(whole())


def test_a_node_waits_for_its_node_object_its_address_and_its_block(caplog):
    caplog.set_level(logging.INFO)
    bare = node("node1") | {"spec": {}, "status": {}}

    async def whole():
        async with serving(namespace()) as server:
            source = KubernetesSource(settings(), Access(server.url))
            joining = asyncio.ensure_future(source.join(settings()))
            said = "waiting for an InternalIP of the Node node1"
            await eventually(lambda: any(said in record.message for record in caplog.records))
            put(server, bare, bare | {"status": node("node1")["status"]})
            said = "waiting for a podCIDR of the Node node1"
            await eventually(lambda: any(said in record.message for record in caplog.records))
            assert not joining.done()
            put(server, node("node1"))
            cluster = await joining
            assert cluster.nodes["node1"].pod_cidrs == (ip_network("10.244.1.0/24"),)
            await source.leave()

    asyncio.run(whole())


def test_what_the_file_says_of_the_node_needs_no_node_object():
    text = (
        FILE.replace('name = "node1"', 'name = "node1"\naddresses = ["192.0.2.77"]')
        + '[pods]\ncidr = ["10.244.7.0/24"]\n'
    )

    async def whole():
        async with serving() as server, following(server, text) as found:
            state = over(found.cluster, settings(text).state)
            assert state.node.addresses == (ip_address("192.0.2.77"),)
            assert state.pod_network.cidrs == (ip_network("10.244.7.0/24"),)

    asyncio.run(whole())


def test_a_file_may_leave_address_and_block_to_the_api_server_and_to_nobody_else():
    assert errors(FILE) == []
    assert errors(FILE + '[pods]\nstatic = [{ name = "a", ip = ["10.244.1.5"] }]\n') == []
    assert any("node.addresses: missing" in line for line in errors(FILE.replace("kubernetes", "static")))


def test_an_access_that_can_never_work_is_said_before_anything_starts(tmp_path):
    text = f'{FILE}kubernetes = {{ kubeconfig = "{tmp_path}/none" }}\n'
    with pytest.raises(KubeconfigError, match="none: the kubeconfig cannot be read"):
        open_source(settings(text))


def test_joining_waits_for_a_server_that_is_away_and_can_be_given_up():
    async def whole():
        server = KubeServer()
        await server.start()
        await server.stop()
        source = KubernetesSource(settings(), Access(server.url))
        joining = asyncio.ensure_future(source.join(settings()))
        await eventually(lambda: "connection refused" in source.health.error)
        assert not joining.done()
        joining.cancel()
        await source.leave()

        put(server, *BASIS)
        await server.start()
        async with following(server) as found:
            assert found.source.health.connected
        await server.stop()

    asyncio.run(whole())


# --- following -------------------------------------------------------------------------------------------------------


def test_one_changed_slice_changes_one_service_and_nothing_else_is_another_object():
    async def whole():
        items = [service(f"s{number}", f"10.96.0.{number + 1}") for number in range(50)]
        async with serving(*BASIS, *items) as server, following(server) as found:
            before = found.cluster
            put(server, endpoints("s7-a", "s7", ["10.244.1.5"]))
            await eventually(lambda: found.endpoints("s7") == ["10.244.1.5"])
            after = found.cluster
            changed = [b.id for a, b in zip(before.services, after.services, strict=True) if a is not b]
            assert changed == ["default/s7"]
            for part in ("nodes", "pods", "namespaces", "pools", "advertisements"):
                assert getattr(before, part) is getattr(after, part)
            handed, unseen = len(found.handed), endpoints("s7-a", "s7", ["10.244.1.5"])
            unseen["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": "now"}
            put(server, unseen)
            await eventually(lambda: found.source.view.slices.version == str(server.store.version))
            await asyncio.sleep(0.02)
            assert len(found.handed) == handed  # what nobody looks at is no news
            held = found.cluster.services
            # The endpoint is in two slices for a moment: its service is made anew, and comes to the same.
            put(server, endpoints("s7-b", "s7", ["10.244.1.5"]), endpoints("s8-a", "s8", ["10.244.1.6"]))
            await eventually(lambda: found.endpoints("s8") == ["10.244.1.6"])
            changed = [b.id for a, b in zip(held, found.cluster.services, strict=True) if a is not b]
            assert changed == ["default/s8"]

    asyncio.run(whole())


def test_slices_may_come_before_their_service_and_move_to_another():
    async def whole():
        async with (
            serving(*BASIS, service("a"), endpoints("x", "b", ["10.244.1.5"])) as server,
            following(server) as found,
        ):
            put(server, service("b", "10.96.0.21"))
            await eventually(lambda: found.endpoints("b") == ["10.244.1.5"])
            put(server, endpoints("x", "a", ["10.244.1.5"]))
            await eventually(lambda: found.endpoints("a") == ["10.244.1.5"])
            assert found.endpoints("b") == []
            put(server, endpoints("y", "a", ["10.244.1.6", "10.244.1.5"]))
            await eventually(lambda: found.endpoints("a") == ["10.244.1.5", "10.244.1.6"])
            drop(server, endpoints("x", "a", []))
            drop(server, endpoints("y", "a", []))
            await eventually(lambda: found.endpoints("a") == [])

    asyncio.run(whole())


def test_a_running_node_keeps_its_address_and_block_also_without_a_node_object():
    async def whole():
        async with serving(*BASIS) as server, following(server) as found:
            own = found.cluster.nodes["node1"]
            put(server, node("node1", 9))
            put(server, node("node2", 2))
            await eventually(lambda: "node2" in found.cluster.nodes)
            assert found.cluster.nodes["node1"] == own
            drop(server, node("node1"))
            await eventually(lambda: not found.cluster.nodes["node1"].alive)
            assert found.cluster.nodes["node1"] == replace(own, alive=False)

    asyncio.run(whole())


def test_of_two_nodes_that_claim_one_address_or_block_the_first_has_it(caplog):
    thief, twin = node("node9", 1), node("node3", 2)

    async def whole():
        async with (
            serving(*BASIS, node("node2", 2), thief, twin, node("node4", 4)) as server,
            following(server) as found,
        ):
            assert sorted(found.cluster.nodes) == ["node1", "node2", "node4"]
            drop(server, node("node2"))
            await eventually(lambda: "node3" in found.cluster.nodes)

    asyncio.run(whole())
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert lines == [
        "node left out name=node3: has an address or block of node2",
        "node left out name=node9: has an address or block of node1",
    ]


@pytest.mark.parametrize(("text", "seen"), [(FILE, ["default/mine"]), (FILE + DNS, ["default/mine", "default/other"])])
def test_all_pods_are_watched_only_where_dns_verifies_their_names(text, seen):
    async def whole():
        pods = pod("mine", "10.244.1.5"), pod("other", "10.244.2.5", "node2")
        async with serving(*BASIS, *pods) as server, following(server, text) as found:
            assert sorted(found.cluster.pods) == seen
            put(server, pod("mine", "10.244.1.5", phase="Succeeded"))
            await eventually(lambda: found.cluster.pods["default/mine"].addresses == ())

    asyncio.run(whole())


def test_selectors_of_pools_and_advertisements_are_names_of_namespaces_and_pools():
    async def whole():
        chosen = {"namespaceSelectors": [{"matchLabels": {"team": "a"}}]}
        public = pool("public", "192.0.2.200/30", serviceAllocation=chosen)
        public["metadata"]["labels"] = {"tier": "a"}
        both = advertisement("l2", ipAddressPoolSelectors=[{"matchLabels": {"tier": "a"}}])
        async with serving(*BASIS, public, both, advertisement("other")) as server, following(server) as found:
            assert found.cluster.pools[0].namespaces == {NOWHERE}
            assert found.cluster.advertisements == (
                L2Advertisement("l2", frozenset({"public"})),
                L2Advertisement("other"),
            )
            put(server, namespace("shop", team="a"))
            await eventually(lambda: found.cluster.pools[0].namespaces == {"shop"})
            pools = found.cluster.pools
            put(server, namespace("other", team="b"))
            await eventually(lambda: "other" in found.cluster.namespaces)
            assert found.cluster.pools is pools
            drop(server, public)
            await eventually(lambda: found.cluster.advertisements == (L2Advertisement("other"),))

    asyncio.run(whole())


def test_without_metallbs_objects_every_address_is_announced():
    async def whole():
        server = KubeServer()
        put(server, *BASIS)
        server.store.installed.discard("metallb.io")
        await server.start()
        async with following(server) as found:
            assert found.cluster.advertisements is None
            server.store.installed.add("metallb.io")
            await eventually(lambda: found.cluster.advertisements == ())
        await server.stop()

    asyncio.run(whole())


def test_what_must_be_seen_and_may_not_keeps_a_node_from_joining_and_what_need_not_does_not():
    async def whole():
        async with serving(*BASIS) as server:
            server.forbidden |= {Request("list", "", "pods"), Request("list", "", "namespaces")}
            async with following(server) as found:
                assert found.source.health.connected
            server.forbidden.add(Request("list", "", "services"))
            source = KubernetesSource(settings(), Access(server.url))
            joining = asyncio.ensure_future(source.join(settings()))
            await eventually(lambda: "services is forbidden" in source.health.error)
            assert not joining.done()
            joining.cancel()
            await source.leave()

    asyncio.run(whole())


def test_the_health_says_since_when_the_server_is_away():
    async def whole():
        async with serving(*BASIS) as server, following(server) as found:
            source = found.source
            assert (source.health.connected, source.health.error, source.health.lag) == (True, "", 0)
            await server.stop()
            await eventually(lambda: not source.health.connected)
            assert source.health.error == f"{server.url}: connection refused"
            assert source.health.lag >= 0
            status = source.status()
            assert (status["source"], status["where"], status["connected"]) == ("kubernetes", server.url, False)
            assert [(each["name"], each["here"]) for each in status["nodes"]] == [("node1", True)]
            await server.start()
            await eventually(lambda: source.health.connected)

    asyncio.run(whole())


def test_when_one_collection_answers_again_the_others_are_asked_at_once(monkeypatch):
    async def whole():
        async with serving(*BASIS) as server, following(server) as found:
            monkeypatch.setattr(Backoff, "LONGEST", 3600.0)
            monkeypatch.setattr(Backoff, "FIRST", 0.01)
            await server.stop()
            await eventually(lambda: not found.source.health.connected)
            first, *others = found.source._reflectors
            monkeypatch.setattr(Backoff, "FIRST", 3600.0)
            monkeypatch.setattr(first._backoff, "failed", lambda _: 0.01)
            for _ in range(4):  # the others have failed once more, and would wait for an hour
                await eventually(lambda: all(each.link.error for each in others))
                await asyncio.sleep(0.02)
            await server.start()
            await eventually(lambda: found.source.health.connected)

    asyncio.run(whole())


def test_an_edit_of_the_control_api_is_refused_with_the_tool_to_use():
    async def whole():
        async with serving(*BASIS) as server, following(server) as found:
            done = await found.source.edit("set_service", ({},), settings().state)
            assert done is not None
            assert done["applied"] == []
            assert "kubectl" in done["errors"][0]

    asyncio.run(whole())


# --- any history -----------------------------------------------------------------------------------------------------

NAMES, ADDRESSES = st.sampled_from(["a", "b", "c"]), st.sampled_from([f"10.244.1.{number}" for number in range(5, 9)])
ITEMS = st.one_of(
    st.builds(node, st.sampled_from(["node1", "node2", "node3"]), st.integers(1, 4)),
    st.builds(namespace, NAMES, team=NAMES),
    st.builds(
        service,
        NAMES,
        st.sampled_from(["10.96.0.1", "10.96.0.2", "None", "bad"]),
        publishNotReadyAddresses=st.booleans(),
    ),
    st.builds(endpoints, st.sampled_from(["x", "y", "z"]), NAMES, st.lists(ADDRESSES, max_size=3), ready=st.booleans()),
    st.builds(pod, NAMES, ADDRESSES, st.sampled_from(["node1", "node2"]), phase=st.sampled_from(["Running", "Failed"])),
    st.builds(pool, NAMES, st.sampled_from(["192.0.2.0/28", "x"])),
    st.builds(advertisement, NAMES, ipAddressPools=st.lists(NAMES, max_size=1)),
)
FAULTS = st.sampled_from(["cut", "compact", "restart", "throttle", "wait", "uninstall", "install"])
STEPS = st.lists(
    st.one_of(st.tuples(st.just("put"), ITEMS), st.tuples(st.just("drop"), ITEMS), st.tuples(st.just("fault"), FAULTS)),
    max_size=25,
)


async def disturb(server: KubeServer, fault: str) -> None:
    """Let something go wrong, or some events go out."""
    match fault:
        case "cut":
            server.cut()
        case "compact":
            server.store.compact()
            server.cut()
        case "restart":
            await server.restart()
        case "throttle":
            server.throttle = 3
        case "wait":
            await asyncio.sleep(0.02)
        case "uninstall":
            server.store.installed.discard("metallb.io")
            server.cut()
        case "install":
            server.store.installed.add("metallb.io")


async def run(steps: list[tuple[str, object]]) -> None:
    async with serving(*BASIS, bookmark_seconds=0.02, queue=3) as server, following(server, FILE + DNS) as found:
        server.throttle = 0
        for action, what in steps:
            if isinstance(what, str):
                await disturb(server, what)
                continue
            item: Object = what  # type: ignore[assignment]
            there = key_of(item) in server.store.objects[KIND[item["kind"]].plural]
            if action == "put":
                put(server, item)
            elif there:
                drop(server, item)
        expected = contents(server, found.source.view)
        await eventually(lambda: same(found.cluster, expected))
        # Nothing that is equal may have become another object on the way.
        for a, b in zip(found.handed, found.handed[1:], strict=False):
            before = {each.id: each for each in a.services}
            assert not [each for each in b.services if before.get(each.id) == each and before[each.id] is not each]


@given(STEPS)
@hypothesis_settings(max_examples=40)
def test_whatever_happens_the_cluster_comes_to_what_the_server_has(steps):
    logging.disable(logging.ERROR)  # of thousands of broken objects and connections
    try:
        asyncio.run(run(steps))
    finally:
        logging.disable(logging.NOTSET)
