"""The index of names follows the state step by step, and is then what a new one made of the last state would be."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dataplane.control.cluster import Cluster, ClusterPod
from dataplane.control.dns_index import Index
from dataplane.control.dns_zone import Zone
from dataplane.control.state import DesiredState, Dns, Endpoint, Node, Peer, Pod, Service
from tests.dns_world import CLUSTER, HTTP, NOW, STATE, endpoint, question, reply, service, summary

NAMES, SPACES = st.sampled_from(["a", "b", "c"]), st.sampled_from(["one", "two"])
HOSTS = [f"10.244.1.{number}" for number in range(4)]
ENDPOINTS = st.lists(
    st.builds(
        Endpoint,
        address=st.sampled_from([ip_address(host) for host in HOSTS]),
        ready=st.booleans(),
        hostname=st.sampled_from(["", "h0", "h1"]),
    ),
    max_size=3,
).map(tuple)
VIPS = st.sampled_from([(), (ip_address("10.96.0.1"),), (ip_address("10.96.0.2"), ip_address("10.96.0.3"))])
SERVICES = st.builds(
    Service, name=NAMES, namespace=SPACES, cluster_ips=VIPS, ports=st.just((HTTP,)), endpoints=ENDPOINTS
)
PODS = st.builds(
    ClusterPod,
    name=NAMES,
    namespace=SPACES,
    node=st.just("node2"),
    addresses=st.sampled_from([ip_address(host) for host in HOSTS]).map(lambda address: (address,)),
)


class Following(RuleBasedStateMachine):
    """States that differ in one thing each, as a source hands them out: what did not change is the same object."""

    def __init__(self) -> None:
        super().__init__()
        self.state = DesiredState(Node("node1"), dns=Dns(ip_address("10.96.0.10"), pods="verified"))
        self.cluster = Cluster()
        self.zone = Zone()
        self.zone.update(self.state, self.cluster, NOW)

    def become(self, **changes) -> None:
        self.state = replace(self.state, **changes)
        self.zone.update(self.state, self.cluster, NOW)

    @rule(new=SERVICES)
    def set_service(self, new):
        if any(each.id == new.id for each in self.state.services):
            self.become(services=tuple(new if each.id == new.id else each for each in self.state.services))
        else:
            self.become(services=(*self.state.services, new))

    @rule(some=st.lists(SERVICES, max_size=6, unique_by=lambda each: each.id))
    def set_all_services(self, some):
        self.become(services=tuple(some))

    @rule(index=st.integers(0, 5))
    def delete_service(self, index):
        self.become(services=self.state.services[:index] + self.state.services[index + 1 :])

    @rule(index=st.integers(0, 5), endpoints=ENDPOINTS)
    def change_endpoints(self, index, endpoints):
        services = list(self.state.services)
        if index < len(services):
            services[index] = replace(services[index], endpoints=endpoints)
        self.become(services=tuple(services))

    @rule(pod=PODS)
    def set_pod(self, pod):
        self.cluster = replace(self.cluster, pods={**self.cluster.pods, f"{pod.namespace}/{pod.name}": pod})
        self.become()

    @rule(keep=st.sets(NAMES))
    def delete_pods(self, keep):
        pods = {name: pod for name, pod in self.cluster.pods.items() if pod.name in keep}
        self.cluster = replace(self.cluster, pods=pods)
        self.become()

    @rule(own=st.lists(PODS, max_size=2, unique_by=lambda pod: pod.name))
    def set_own_pods(self, own):
        self.become(pods=tuple(Pod(pod.name, pod.namespace, pod.name, pod.addresses, 1, 1450, "cali") for pod in own))

    @rule(namespaces=st.frozensets(st.sampled_from(["one", "three"])))
    def set_namespaces(self, namespaces):
        self.cluster = replace(self.cluster, namespaces=namespaces)
        self.become()

    @rule(third=st.integers(0, 3))
    def move_a_peer(self, third):
        self.become(peers=(Peer("node2", ip_address("192.0.2.12"), (ip_network(f"10.245.{third}.0/24"),), 1),))

    @invariant()
    def it_is_as_if_it_were_new(self):
        fresh = Zone()
        fresh.update(self.state, self.cluster, NOW)
        old, new = vars(self.zone.index), vars(fresh.index)
        for name in ("networks", "_services", "_pods", "_pod_namespaces", "_namespaces"):
            assert old[name] == new[name], name
        assert {address: {*held} for address, held in old["_holders"].items()} == {
            address: {*held} for address, held in new["_holders"].items()
        }

    @invariant()
    def it_answers_as_if_it_were_new(self):
        fresh = Zone()
        fresh.update(self.state, self.cluster, NOW)
        names = [f"{name}.{space}.svc.cluster.local" for name in "ab" for space in ("one", "two", "three")]
        names += [
            "h0." + names[0],
            "10-244-1-0." + names[0],
            "10-244-1-1.one.pod.cluster.local",
            "three.pod.cluster.local",
        ]
        asked = [question(name, kind) for name in names for kind in ("A", "SRV")]
        asked += [question(f"{last}.1.244.10.in-addr.arpa", "PTR") for last in range(4)]
        asked += [question(f"{last}.0.96.10.in-addr.arpa", "PTR") for last in range(4)]
        for data in asked:
            old, new = (summary(reply(data, where, "tcp")) for where in (self.zone, fresh))
            assert old.split(" 1700")[0] == new.split(" 1700")[0]


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)


# --- single steps ----------------------------------------------------------------------------------------------------


def test_nothing_is_said_to_change_when_nothing_does():
    index = Index()
    assert index.update(STATE, CLUSTER)
    assert not index.update(STATE, CLUSTER)
    assert not index.update(replace(STATE), replace(CLUSTER))
    again = {name: replace(pod) for name, pod in CLUSTER.pods.items()}
    assert not index.update(replace(STATE, pods=tuple(map(replace, STATE.pods))), replace(CLUSTER, pods=again))
    assert not index.update(replace(STATE, services=tuple(map(replace, STATE.services))), CLUSTER)


def test_each_thing_that_names_depend_on_is_a_change():
    changes = (
        {"services": STATE.services[1:]},
        {"services": (*STATE.services, service("new", "10.96.0.77"))},
        {"pods": ()},
        {"peers": (Peer("node2", ip_address("192.0.2.12"), (ip_network("10.99.0.0/24"),), 1),)},
        {"balancing": replace(STATE.balancing, service_cidrs=())},
    )
    for change in changes:
        index = Index()
        index.update(STATE, CLUSTER)
        assert index.update(replace(STATE, **change), CLUSTER), change
    for cluster in (replace(CLUSTER, pods={}), replace(CLUSTER, namespaces=frozenset())):
        index = Index()
        index.update(STATE, CLUSTER)
        assert index.update(STATE, cluster)


def test_services_that_did_not_change_are_not_looked_at():
    many = tuple(service(f"s{number}", f"10.96.1.{number}") for number in range(100))
    index = Index()
    index.update(replace(STATE, services=many), CLUSTER)
    held = index.service("testns", "s7")
    new = replace(many[50], endpoints=(endpoint("10.244.1.9", hostname="x"),))
    assert index.update(replace(STATE, services=(*many[:50], new, *many[51:])), CLUSTER)
    assert index.service("testns", "s7") is held
    assert index.service("testns", "s50") is new
    assert [each.name for each in index.holders(ip_address("10.244.1.9"))] == ["s50"]


def test_two_services_of_one_name_do_no_harm():
    twins = (service("twin", "10.96.0.1"), service("twin", "10.96.0.2"))
    index = Index()
    index.update(replace(STATE, services=twins), CLUSTER)
    index.update(replace(STATE, services=tuple(replace(each, ports=()) for each in twins)), CLUSTER)
    index.update(replace(STATE, services=()), CLUSTER)
    assert len(index) == 0
