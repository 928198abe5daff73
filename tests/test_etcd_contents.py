"""What keys of etcd become, whatever the order in which they come."""

import json
import logging
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.config import parse
from dataplane.config_objects import FileObjects
from dataplane.control.cluster import Cluster, over
from dataplane.control.etcd import KeyValue
from dataplane.control.etcd_contents import Contents, ObjectError
from dataplane.control.ipam import Affinity, Allocation, Block, allocated, claimed, new_block
from dataplane.control.ipam_json import dump
from tests.node_file import NODE

PREFIX = "/dataplane/v1"
STATE = parse(NODE, "node.toml").state
OBJECTS = FileObjects(STATE)
WEB = {"clusterIPs": ["10.96.0.20"], "ports": [{"port": 80, "targetPort": 8080}]}


class Store:
    """A few keys with revisions, and the contents that are told of them."""

    def __init__(self, file: str = NODE) -> None:
        self.state = parse(file, "node.toml").state
        self.contents = Contents(PREFIX, FileObjects(self.state), self.state)
        self.revision = 0
        self.items: dict[str, KeyValue] = {}

    def put(self, key: str, value: object) -> None:
        self.revision += 1
        full = f"{PREFIX}/{key}"
        text = value if isinstance(value, str) else json.dumps(value)
        old = self.items.get(full)
        created = old.create_revision if old else self.revision
        self.items[full] = KeyValue(full, text, created, self.revision, 1, 0)
        self.contents.take(self.items[full])

    def delete(self, key: str) -> None:
        self.revision += 1
        self.items.pop(f"{PREFIX}/{key}", None)
        self.contents.take(KeyValue(f"{PREFIX}/{key}", "", 0, self.revision, 0, 0))

    @property
    def cluster(self) -> Cluster:
        return self.contents.cluster(self.revision)

    def services(self) -> dict[str, list[str]]:
        return {service.id: [str(each.address) for each in service.endpoints] for service in self.cluster.services}


@pytest.fixture
def store() -> Store:
    return Store()


def complaints(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# --- services --------------------------------------------------------------------------------------------------------


def test_a_service_and_its_endpoints_come_in_any_order_and_pieces(store):
    store.put("endpoints/default/web/b", [{"ip": "10.244.1.11"}, {"ip": "10.244.1.12"}])
    assert store.services() == {}
    store.put("services/default/web", WEB)
    store.put("endpoints/default/web/a", [{"ip": "10.244.1.10", "ready": False}, {"ip": "10.244.1.12", "weight": 5}])
    assert store.services() == {"default/web": ["10.244.1.10", "10.244.1.12", "10.244.1.11"]}
    (service,) = store.cluster.services
    assert service.origin == "etcd"
    assert [endpoint.weight for endpoint in service.endpoints] == [1, 5, 1]
    store.delete("endpoints/default/web/a")
    assert store.services() == {"default/web": ["10.244.1.11", "10.244.1.12"]}
    store.delete("services/default/web")
    assert store.services() == {}
    store.put("services/default/web", WEB)
    assert store.services() == {"default/web": ["10.244.1.11", "10.244.1.12"]}


def test_what_did_not_change_stays_the_same_object(store):
    for number in range(5):
        store.put(f"services/default/s{number}", WEB | {"clusterIPs": [f"10.96.0.{number + 1}"]})
        store.put(f"endpoints/default/s{number}/a", [{"ip": f"10.244.1.{number + 10}"}])
    store.put("nodes/node3", {"addresses": ["192.0.2.13"]})
    store.put("pods/node3/default/a", {"ip": ["10.244.3.5"]})
    before = store.cluster
    store.put("endpoints/default/s2/a", [{"ip": "10.244.1.99"}])
    after = store.cluster
    same = [a is b for a, b in zip(before.services, after.services, strict=True)]
    assert same == [True, True, False, True, True]
    assert after.nodes is before.nodes
    assert after.pods is before.pods
    assert after.revision > before.revision
    store.put("elsewhere/x", "not even JSON")
    assert not store.contents.changed
    assert store.cluster.services is after.services


def test_a_list_keeps_what_has_not_changed_and_forgets_what_is_not_in_it(store):
    for number in range(3):
        store.put(f"services/default/s{number}", WEB | {"clusterIPs": [f"10.96.0.{number + 1}"]})
    before = store.cluster.services
    items = dict(store.items)
    del items[f"{PREFIX}/services/default/s1"]
    changed = json.dumps(WEB | {"clusterIPs": ["10.96.0.77"]})
    items[f"{PREFIX}/services/default/s2"] = KeyValue(f"{PREFIX}/services/default/s2", changed, 3, 9, 2, 0)
    for _ in store.contents.load(items.values(), 9):
        pass
    after = store.contents.cluster(9).services
    assert [str(service.cluster_ips[0]) for service in after] == ["10.96.0.1", "10.96.0.77"]
    assert after[0] is before[0]


BROKEN = [
    ("services/default/bad", "{", "not JSON"),
    ("services/default/bad", "[]", "expected a JSON object"),
    ("services/default/bad", {"ports": [{"port": 0}]}, "ports[0].port: expected a number from 1 to 65535"),
    ("services/default/bad", WEB | {"clusterIp": []}, 'clusterIp: unknown key; did you mean "clusterIPs"?'),
    ("services/default/bad", WEB | {"endpoints": []}, "endpoints/default/bad/<slice>"),
    ("services/default/bad", WEB | {"name": "good"}, 'expected what the key says, "bad" (got "good")'),
    ("services/default/bad", {"clusterIPs": ["10.96.0.9"]}, "ports: missing"),
    ("services/default/bad", WEB | {"clusterIPs": ["10.244.2.9"]}, "expected an address outside the block of node2"),
    ("services/bad", WEB, "expected 2 names behind services/"),
    ("endpoints/default/web/bad", {}, "expected a JSON list of endpoints"),
    ("endpoints/default/web/bad", [{"ip": "10.244.1.300"}], "endpoints[0].ip: expected an IP address"),
    ("endpoints/default/web/bad", [{"ip": "10.244.1.3", "node": "A b"}], "endpoints[0].node: expected a Kubernetes"),
    ("endpoints/default/web/bad", [{"ip": "127.0.0.1"}], "[0].ip: expected the address of a pod or a node"),
    ("endpoints/default/web/bad", [{"ip": "2001:db8::1"}], "[0].ip: IPv6 is not supported yet"),
    ("endpoints/default/web/bad", ["10.244.1.3"], "endpoints[0]: expected a table"),
    ("nodes/bad", {"addresses": ["nowhere"]}, "expected an IPv4 address (got 'nowhere')"),
    ("nodes/bad", {"podCIDR": ["10.0.0.1/8"]}, "10.0.0.1/8 has host bits set"),
    ("nodes/bad", {"podCIDR": ["0.0.0.0/0"]}, "podCIDR: expected a block of pods"),
    ("nodes/bad", {"podCIDR": [5]}, "'5' does not appear to be"),
    ("nodes/bad", {"vtepMAC": "zz"}, "invalid literal"),
    ("nodes/bad", {"vtepMAC": "01:00:00:00:00:00"}, "vtepMAC: expected a unicast MAC"),
    ("nodes/bad", {"labels": []}, "labels: expected an object"),
    ("members/bad", '{"since": NaN}', "since: expected seconds"),
    ("blocks/10.0.0.0-26", {"cidr": "10.0.0.0/26"}, "affinity is missing"),
    ("pods/node2/default/bad", {"ip": "10.0.0.1"}, "ip: expected a list of addresses"),
    ("pools/bad", {"addresses": ["no"]}, "expected a prefix or a range"),
    ("pools/bad", {"addresses": []}, "expected at least one range"),
    ("advertisements/bad", {"pools": []}, "unknown key"),
    ("advertisements/bad", {"preferredNodeSelectors": [{"weight": 1}]}, "preference: missing; expected a table"),
    ("advertisements/bad", {"nodeSelectors": [{"matchExpressions": [{"key": "a"}]}]}, '"In" or "NotIn" or "Exists"'),
    (
        "pools/bad",
        {"serviceAllocation": {"serviceSelectors": [{"matchExpressions": [{}]}]}},
        "missing; expected a string",
    ),
]


@pytest.mark.parametrize(("key", "value", "why"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_object_is_skipped_with_one_line_that_names_its_key(store, caplog, key, value, why):
    store.put("services/default/web", WEB)
    before = store.cluster
    store.put(key, value)
    store.put("services/default/other", WEB | {"clusterIPs": ["10.96.0.21"]})
    after = store.cluster
    assert [line for line in complaints(caplog) if key in line and why in line] == complaints(caplog)
    assert len(complaints(caplog)) == 1
    assert list(store.services()) == ["default/web", "default/other"]
    assert (after.nodes, after.pods, after.pools, after.advertisements) == (
        (before.nodes, before.pods, before.pools, before.advertisements)
    )


def test_a_bug_in_reading_one_key_is_that_keys_alone(store, caplog, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the models disagree")

    monkeypatch.setattr(FileObjects, "advertisement", fail)
    store.put("advertisements/x", {})
    store.put("advertisements/x", {})
    store.put("services/default/web", WEB)
    assert list(store.services()) == ["default/web"]
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"{PREFIX}/advertisements/x: it cannot be read: AssertionError" in line.getMessage()
    assert line.exc_info


def test_an_object_that_breaks_is_gone_until_it_is_repaired(store, caplog):
    store.put("services/default/web", WEB)
    assert list(store.services()) == ["default/web"]
    store.put("services/default/web", "{}")
    store.put("services/default/web", "{}")
    assert store.services() == {}
    assert len(complaints(caplog)) == 1
    store.put("services/default/web", WEB)
    assert list(store.services()) == ["default/web"]


def test_the_simple_way_to_read_endpoints_agrees_with_the_models(store):
    simple = '[{"ip": "10.244.1.10", "node": "node2"}, {"ip": "10.244.1.11"}]'
    closer = '[{"ip": "10.244.1.10", "node": "node2", "weight": 1}, {"ip": "10.244.1.11"}]'
    assert OBJECTS.endpoints(simple) == OBJECTS.endpoints(closer)


@given(st.text("0123456789.af:x ", max_size=16), st.text("aA-.", max_size=4))
def test_both_ways_to_read_an_endpoint_take_the_same(ip, node):
    def outcome(**more: object) -> object:
        try:
            return OBJECTS.endpoints(json.dumps([{"ip": ip, "node": node, **more}]))
        except ObjectError as error:
            return str(error)

    assert outcome() == outcome(weight=1)


WORDS = st.sampled_from(
    ["ip", "addresses", "podCIDR", "vtepMAC", "labels", "since", "ports", "port", "clusterIPs", "cidr"]
)
WORDS |= st.sampled_from(["allocations", "ordinal", "affinity", "number", "released", "services", "node", "type"])
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just("10.0.0.1"),
    st.just("10.0.0.0/26"),
)
JSON = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4))
KEYS = ["nodes/a", "members/a", "blocks/10.0.0.0-26", "pods/a/b/c", "services/a/b", "endpoints/a/b/c", "pools/a"]


@given(
    st.sampled_from([*KEYS, "advertisements/a", "addresses/10.0.0.1", "addresses/x"]), JSON.map(json.dumps) | st.text()
)
def test_no_value_of_any_key_does_any_harm(key, text):
    store = Store()
    store.put(key, text)
    assert store.cluster.revision == 1
    store.delete(key)
    assert (store.cluster.services, store.cluster.nodes) == ((), {})


# --- contests --------------------------------------------------------------------------------------------------------


def test_of_two_services_at_one_address_and_port_the_older_one_stays(store, caplog):
    store.put("services/default/a", WEB)
    store.put("services/default/b", WEB)
    assert list(store.services()) == ["default/a"]
    assert complaints(caplog) == [
        f"etcd: skipped key={PREFIX}/services/default/b: 10.96.0.20:80/TCP is used by service default/a"
    ]
    store.put("services/default/b", WEB | {"clusterIPs": ["10.96.0.21"]})
    assert sorted(store.services()) == ["default/a", "default/b"]
    store.put("services/default/b", WEB)
    store.delete("services/default/a")
    assert list(store.services()) == ["default/b"]


def test_the_files_services_come_before_all_of_the_stores(caplog):
    text = NODE + '[[services.static]]\nname = "mine"\nclusterIPs = ["10.96.0.20"]\nports = [{ port = 80 }]\n'
    store = Store(text + '[services]\nserviceCIDR = ["10.96.0.0/16"]\n')
    store.put("services/default/web", WEB)
    store.put("services/default/mine", WEB)
    assert [service.id for service in over(store.cluster, store.state).services] == ["default/mine"]
    assert len(complaints(caplog)) == 1
    assert "used by service default/mine" in complaints(caplog)[0]


names = st.sampled_from(["a", "b", "c"])
addresses = st.sampled_from(["10.96.0.1", "10.96.0.2"])
moves = st.one_of(
    st.tuples(st.just("service"), names, st.lists(addresses, min_size=1, max_size=2, unique=True)),
    st.tuples(st.just("gone"), names, st.none()),
    st.tuples(st.just("slice"), names, st.tuples(st.sampled_from("xy"), st.lists(st.integers(1, 4), max_size=3))),
    st.tuples(st.just("node"), names, st.tuples(addresses, st.booleans())),
    st.tuples(st.just("member"), names, st.booleans()),
    st.tuples(st.just("look"), st.none(), st.none()),
)


@given(st.lists(moves, max_size=25))
def test_any_history_ends_where_a_fresh_list_begins(history):
    store = Store()
    for kind, name, what in history:
        match kind:
            case "service":
                store.put(f"services/default/{name}", WEB | {"clusterIPs": what})
            case "gone":
                store.delete(f"services/default/{name}")
            case "slice":
                store.put(f"endpoints/default/{name}/{what[0]}", [{"ip": f"10.244.9.{each}"} for each in what[1]])
            case "node":
                record = {"addresses": [what[0].replace("10.96.0", "192.0.2")], "podCIDR": []}
                store.put(f"nodes/{name}", record) if what[1] else store.delete(f"nodes/{name}")
            case "member":
                store.put(f"members/{name}", {"since": 1}) if what else store.delete(f"members/{name}")
            case _:
                assert store.cluster.revision == store.revision
    fresh = Contents(PREFIX, OBJECTS, STATE)
    for _ in fresh.load(sorted(store.items.values(), reverse=True), store.revision):
        pass
    expected, found = fresh.cluster(store.revision), store.cluster
    assert {service.id: service for service in found.services} == {each.id: each for each in expected.services}
    assert found.nodes == expected.nodes


# --- nodes and the rest ----------------------------------------------------------------------------------------------


def block(cidr: str, node: str, number: int, *borrowers: str) -> Block:
    made = claimed(new_block(ip_network(cidr)), Affinity(node, ip_network(cidr), number), 0.0)
    for ordinal, borrower in enumerate(borrowers, 1):
        made = allocated(made, ordinal, Allocation(f"handle{ordinal}", borrower))
    return made


def test_a_node_is_what_it_says_its_blocks_and_whether_it_is_a_member(store):
    store.put("blocks/10.244.9.64-26", dump(block("10.244.9.64/26", "node3", 2)))
    store.put("blocks/10.244.9.128-26", dump(block("10.244.9.128/26", "node3", 1, "node3", "node4")))
    record = {"addresses": ["192.0.2.13"], "vtepMAC": "66:00:00:00:00:01", "zone": "z", "labels": {"a": "b"}}
    store.put("nodes/node3", record | {"uplinkMTU": 1500, "of": "a newer version"})
    store.put("nodes/node4", {"addresses": ["192.0.2.14"], "podCIDR": ["10.244.4.0/24"]})
    third, fourth = store.cluster.nodes["node3"], store.cluster.nodes["node4"]
    assert third.addresses == (ip_address("192.0.2.13"),)
    assert (third.vtep_mac, third.zone, third.labels, third.alive) == (0x660000000001, "z", (("a", "b"),), False)
    assert [str(cidr) for cidr in third.pod_cidrs] == ["10.244.9.128/26", "10.244.9.64/26"]
    assert [str(cidr) for cidr in fourth.pod_cidrs] == ["10.244.4.0/24", "10.244.9.130/32"]
    store.put("members/node3", {"since": 1234.5, "pid": 1, "version": "0"})
    assert (store.cluster.nodes["node3"].alive, store.cluster.nodes["node3"].since) == (True, 1234.5)
    assert store.cluster.nodes["node4"] is fourth
    store.delete("members/node3")
    assert not store.cluster.nodes["node3"].alive


def test_what_is_behind_a_node_is_found_without_a_look_at_the_blocks_of_others(store):
    for number in (3, 4):
        store.put(f"nodes/node{number}", {"addresses": [f"192.0.2.1{number}"]})
        store.put(f"blocks/10.244.{number}.0-26", dump(block(f"10.244.{number}.0/26", f"node{number}", 1)))
    assert len(store.cluster.nodes) == 2
    store.contents._nodes._shares["blocks/10.244.4.0-26"] = None  # it would fail
    store.put("members/node3", {"since": 1})
    assert [str(cidr) for cidr in store.cluster.nodes["node3"].pod_cidrs] == ["10.244.3.0/26"]
    store.delete("blocks/10.244.3.0-26")
    assert store.cluster.nodes["node3"].pod_cidrs == ()


def test_an_address_within_a_block_that_its_own_node_takes_changes_nobodys_routes(store):
    store.put("nodes/node3", {"addresses": ["192.0.2.13"]})
    store.put("blocks/10.244.9.0-26", dump(block("10.244.9.0/26", "node3", 1)))
    before = store.cluster
    store.put("blocks/10.244.9.0-26", dump(block("10.244.9.0/26", "node3", 1, "node3")))
    assert store.cluster.nodes is before.nodes


def test_of_two_nodes_with_one_address_the_living_one_stays_then_the_older_and_this_one_before_all(store, caplog):
    store.put("nodes/old", {"addresses": ["192.0.2.13"]})
    store.put("nodes/new", {"addresses": ["192.0.2.13"]})
    assert list(store.cluster.nodes) == ["old"]
    store.put("members/new", {"since": 1})
    assert list(store.cluster.nodes) == ["new"]
    store.put("members/old", {"since": 2})
    assert list(store.cluster.nodes) == ["old"]
    store.put("nodes/node1", {"addresses": ["192.0.2.13"]})
    assert list(store.cluster.nodes) == ["node1"]
    assert complaints(caplog)[0].endswith(f"{PREFIX}/nodes/new: 192.0.2.13 is also that of node old")


def test_the_files_peers_come_before_nodes_that_want_the_same(store, caplog):
    store.put("nodes/other", {"addresses": ["192.0.2.12"]})
    store.put("nodes/node2", {"addresses": ["192.0.2.12"]})
    assert [(peer.name, str(peer.address)) for peer in over(store.cluster, store.state).peers] == [
        ("node2", "192.0.2.12")
    ]
    assert [line.partition("nodes/")[2] for line in complaints(caplog)] == [
        "other: 192.0.2.12 is also that of node node2"
    ]


@pytest.mark.parametrize("text", [None, "{", {"addresses": ["nowhere"]}])
def test_what_becomes_of_its_record_in_the_store_takes_nothing_from_this_node(store, text):
    store.put("nodes/node1", {"addresses": ["192.0.2.11"]})
    store.put("members/node1", {"since": 1})
    store.put("blocks/10.244.9.0-26", dump(block("10.244.9.0/26", "node1", 1)))
    before = store.cluster.nodes["node1"]
    assert [str(cidr) for cidr in before.pod_cidrs] == ["10.244.9.0/26"]
    store.delete("nodes/node1") if text is None else store.put("nodes/node1", text)
    assert store.cluster.nodes["node1"] == before
    store.put("blocks/10.244.9.64-26", dump(block("10.244.9.64/26", "node1", 2)))
    assert [str(cidr) for cidr in store.cluster.nodes["node1"].pod_cidrs] == ["10.244.9.0/26", "10.244.9.64/26"]


def test_a_pod_that_moves_is_where_it_was_put_last(store):
    store.put("pods/node2/default/a", {"ip": ["10.244.2.5"], "labels": {"x": "y"}})
    store.put("pods/node3/default/a", {"ip": ["10.244.3.5"]})
    store.delete("pods/node2/default/a")
    assert (store.cluster.pods["default/a"].node, str(store.cluster.pods["default/a"].addresses[0])) == (
        ("node3", "10.244.3.5")
    )
    store.delete("pods/node3/default/a")
    assert store.cluster.pods == {}


def test_pools_and_advertisements_are_read_in_the_files_words(store):
    assert store.cluster.advertisements is None
    store.put("pools/b", {"addresses": ["203.0.113.0/28"], "avoidBuggyIPs": True})
    store.put("pools/a", {"addresses": ["203.0.113.32-203.0.113.40"], "serviceAllocation": {"priority": 5}})
    store.put("advertisements/all", {"ipAddressPools": ["a"], "nodeSelectors": [{"matchLabels": {"rack": "1"}}]})
    cluster = store.cluster
    assert [(pool.name, pool.priority, pool.avoid_buggy_ips) for pool in cluster.pools] == [
        ("a", 5, False),
        ("b", 0, True),
    ]
    assert cluster.advertisements is not None
    assert [each.name for each in cluster.advertisements] == ["all"]


def test_a_listener_hears_of_every_key_of_its_kind(store):
    heard: list[tuple[str, bool]] = []
    store.contents.listen("addresses", lambda item: heard.append((item.key, item.deleted)))
    store.put("addresses/203.0.113.1", {})
    store.put("pools/a", {"addresses": ["203.0.113.0/28"]})
    for _ in store.contents.load((), 9):
        pass
    assert heard == [(f"{PREFIX}/addresses/203.0.113.1", False), (f"{PREFIX}/addresses/203.0.113.1", True)]
