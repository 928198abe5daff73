"""Edits of virtual servers on the real tables: a model of the lists, connections, and what goes gracefully."""

import logging
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.balance import PROTOCOLS, Balancer
from dataplane.control.edits import AddServer, ChangeServer, RemoveServer
from dataplane.control.reconcile import plan
from dataplane.control.services import Destination as Member
from dataplane.control.services import ServerKey, VirtualServer, virtual_servers
from dataplane.control.state import Balancing, DesiredState, ServicePort
from dataplane.tables import backend
from dataplane.tables.policy import LOCAL, NO_LOCAL, RESTRICTED, Exposure, PolicyTable
from dataplane.tables.result import TableFullError
from dataplane.tables.scheduler import FALLBACK, PERSISTENT, PORT, Scheduler, pick
from dataplane.tables.service import Destination, Service, ServiceTable
from tests.service_states import endpoint, state, states, web

SECOND = 1_000_000_000
VIP = IPv4Address("10.96.0.20")
KEY = ServerKey("TCP", VIP, 80)
A, B, C = "10.244.1.10", "10.244.2.10", "10.244.2.11"


class Node:
    """The tables, and the state that they are in."""

    def __init__(self, desired: DesiredState | None = None) -> None:
        self.services = ServiceTable(1 << 10, seed=3)
        self.policies = PolicyTable(1 << 10)
        self.balancer = Balancer(self.services, self.policies)
        self.now = 1000 * SECOND
        self.state: DesiredState | None = None
        if desired:
            self.become(desired)

    def become(self, desired: DesiredState) -> None:
        edits = plan(self.state, desired)
        for edit in edits:
            if isinstance(edit, AddServer):
                self.balancer.stage(edit.server)
        for edit in edits:
            self.balancer.commit(edit, self.now)
        self.state = desired

    def row(self, key: ServerKey = KEY) -> int:
        return self.services.find(PROTOCOLS[key.protocol], key.address, key.port)

    def members(self, key: ServerKey = KEY) -> dict[str, int]:
        """Weight by address, the newest first."""
        return {
            str(address): self.services.destination(at).weight
            for at, address, _ in self.services.members(self.row(key))
        }

    def backend(self, address: str, key: ServerKey = KEY, port: int = 8080) -> int:
        return self.services.find_backend(self.row(key), IPv4Address(address), port)

    def connect(self, address: str, key: ServerKey = KEY) -> tuple[int, int]:
        """Open a connection; return what its flow remembers: the backend's row and generation."""
        at = self.backend(address, key)
        backend.connect(self.services.backends, at)
        return at, int(self.services.backends[at]["generation"])

    def disconnect(self, flow: tuple[int, int]) -> None:
        backend.disconnect(self.services.backends, *flow, False)

    def is_alive(self, flow: tuple[int, int]) -> bool:
        return bool(backend.is_alive(self.services.backends, *flow))

    def tick(self, seconds: float = 1) -> None:
        self.now += int(seconds * SECOND)
        self.balancer.tick(self.now)

    def picks(self, count: int, key: ServerKey = KEY) -> set[str]:
        found = set()
        for client in range(count):
            at = int(pick(self.services.arrays, self.row(key), 0, 0xFFFF_C633_6400 + client, 40000 + client))
            assert at >= 0
            found.add(str(IPv4Address(int(self.services.backends[at]["lo"]) & 0xFFFF_FFFF)))
        return found


def two() -> DesiredState:
    return state(web(endpoint(A), endpoint(B)))


def one(**fields) -> DesiredState:
    return state(web(endpoint(B), **fields))


# --- what is written down --------------------------------------------------------------------------------------------


def test_destinations_are_added_in_order_so_that_the_last_is_the_first_of_the_list():
    assert list(Node(state(web(endpoint(C), endpoint(A), endpoint(B)))).members()) == [C, B, A]


SH_FLAGS = frozenset({"sh-port", "sh-fallback"})
SETTINGS = [
    ({}, (Scheduler.RR, 0, 10800)),
    ({"scheduler": "mh"}, (Scheduler.MH, PORT, 10800)),
    ({"scheduler": "sh", "scheduler_flags": SH_FLAGS}, (Scheduler.SH, PORT | FALLBACK, 10800)),
    ({"affinity_seconds": 60}, (Scheduler.RR, PERSISTENT, 60)),
    ({"scheduler": "mh", "affinity_seconds": 5}, (Scheduler.MH, PORT | PERSISTENT, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), SETTINGS)
def test_a_service_schedules_as_it_says(fields, expected):
    node = Node(two())
    for desired in (two(), one(**fields)):
        node.become(desired)
    scheduler, flags, seconds = expected
    assert node.services.get(node.row()) == Service(scheduler, flags, seconds * SECOND)


EXPOSURES = [
    ("10.96.0.20", 80, Exposure.CLUSTER_IP, 0),
    ("198.51.100.20", 80, Exposure.EXTERNAL_IP, LOCAL | NO_LOCAL),
    ("192.0.2.200", 80, Exposure.LOAD_BALANCER, LOCAL | NO_LOCAL | RESTRICTED),
    ("192.0.2.11", 30080, Exposure.NODE_PORT, LOCAL | NO_LOCAL),
]


@pytest.mark.parametrize(("address", "port", "exposure", "flags"), EXPOSURES, ids=["cluster", "external", "lb", "node"])
def test_a_policy_stands_beside_each_virtual_server(address, port, exposure, flags):
    given = web(
        endpoint(B), external_policy="Local", type="LoadBalancer", ports=(ServicePort(80, "TCP", "http", 8080, 30080),),
        external_ips=(IPv4Address("198.51.100.20"),), load_balancer_ips=(IPv4Address("192.0.2.200"),),
        source_ranges=(IPv4Network("203.0.113.0/24"),),
    )  # fmt: skip
    node = Node(state(given))
    row = node.row(ServerKey("TCP", IPv4Address(address), port))
    record = node.policies.policies[row]
    assert (int(record["exposure"]), int(record["flags"])) == (exposure, flags)
    assert node.policies.ranges(row) == (
        (IPv4Network("203.0.113.0/24"),) if exposure == Exposure.LOAD_BALANCER else None
    )
    kind = exposure.name.lower().replace("_", "-")
    assert node.balancer.names[row] == ("default/web", "http", kind + "-ip" * (kind == "load-balancer"), "file")


def test_nothing_is_left_of_a_service_that_goes():
    node = Node(two())
    row = node.row()
    node.become(state())
    assert node.row() < 0
    assert (len(node.balancer), node.balancer.names, node.balancer.server(row)) == (0, {}, None)
    assert int(node.policies.policies[row]["exposure"]) == Exposure.NONE


def test_a_staged_service_is_found_when_it_is_added_and_forgotten_when_it_is_not():
    node = Node()
    (edit,) = [edit for edit in plan(None, two()) if isinstance(edit, AddServer)]
    for added in (False, True):
        node.balancer.stage(edit.server)
        assert (node.row(), len(node.balancer), node.balancer.names) == (-1, 0, {})
        if added:
            node.balancer.commit(edit, node.now)
        node.balancer.discard()
    assert node.members() == {A: 1, B: 1}
    assert len(node.services) == len(node.balancer) == 1


def test_flows_of_a_service_that_returns_wait_until_it_is_added():
    node = Node(two())
    flow = node.connect(A)
    node.become(state())
    (edit,) = [edit for edit in plan(state(), two()) if isinstance(edit, AddServer)]
    node.balancer.stage(edit.server)
    assert not node.is_alive(flow)
    node.balancer.commit(edit, node.now)
    assert node.is_alive(flow)


def test_what_was_carried_out_is_logged_afterwards_and_once(caplog):
    node = Node(two())
    node.become(one())
    with caplog.at_level(logging.INFO):
        assert [len(list(node.balancer.news())) for _ in range(2)] == [2, 0]
    assert caplog.messages == [
        "service added name=default/web vip=10.96.0.20:80/TCP backends=2",
        "endpoint removed service=default/web vip=10.96.0.20:80/TCP to=10.244.1.10:8080 draining=0",
    ]


def servers(count: int, **fields) -> list[AddServer]:
    keys = [ServerKey("TCP", VIP, port) for port in range(1, count + 1)]
    return [AddServer(VirtualServer(key, "default/web", "", "cluster-ip", **fields)) for key in keys]


PAIR = (Member(IPv4Address(A), 80), Member(IPv4Address(B), 80))
# A table that holds two of each, and what fills it.
FULL = [
    (ServiceTable(2), {}),
    (ServiceTable(8, backend_limit=4), {"destinations": PAIR}),
    (ServiceTable(8, bucket_limit=512), {"scheduler": "sh"}),
    (ServiceTable(8, bucket_limit=8192), {"scheduler": "mh"}),
]


@pytest.mark.parametrize(("rows", "fields"), FULL, ids=["services", "backends", "buckets", "maglev"])
def test_more_than_there_is_room_for_is_refused_before_anything_is_changed(rows, fields):
    balancer, (first, second, third) = Balancer(rows, PolicyTable(8)), servers(3, **fields)
    with pytest.raises(TableFullError):
        balancer.require_room([first, second, third])
    for edit in (first, second):
        balancer.commit(edit, 0)
    with pytest.raises(TableFullError):
        balancer.require_room([third])
    balancer.require_room([RemoveServer(first.server), third])
    assert balancer.commit(RemoveServer(first.server), 0)
    assert balancer.commit(third, 0)


def test_a_destination_that_keeps_its_connections_keeps_its_room():
    table = ServiceTable(8, backend_limit=2)
    balancer, (first, second) = Balancer(table, PolicyTable(8)), servers(2, destinations=PAIR)
    balancer.commit(first, 0)
    backend.connect(table.backends, 0)
    with pytest.raises(TableFullError):
        balancer.require_room([RemoveServer(first.server), second])


def test_another_scheduler_needs_its_buckets_before_the_old_ones_are_free():
    balancer, (first,) = Balancer(ServiceTable(8, bucket_limit=256), PolicyTable(8)), servers(1, scheduler="sh")
    balancer.commit(first, 0)
    with pytest.raises(TableFullError):
        balancer.require_room([ChangeServer(first.server, replace(first.server, scheduler="dh"))])
    balancer.require_room([ChangeServer(first.server, replace(first.server, scheduler="rr"))])


# --- what goes -------------------------------------------------------------------------------------------------------


def test_an_idle_endpoint_goes_at_once():
    node = Node(two())
    node.become(one())
    assert node.members() == {B: 1}


def test_a_tcp_endpoint_with_connections_gets_weight_0_and_goes_with_the_last_of_them():
    node = Node(two())
    first, second = node.connect(A), node.connect(A)
    node.become(one())
    assert node.members() == {B: 1, A: 0}
    assert node.balancer.is_leaving(KEY, IPv4Address(A), 8080)
    node.disconnect(first)
    node.tick()
    assert (node.members(), node.is_alive(second)) == ({B: 1, A: 0}, True)
    node.disconnect(second)
    node.tick()
    assert node.members() == {B: 1}
    assert not node.balancer.is_leaving(KEY, IPv4Address(A), 8080)


def test_connections_are_ended_when_the_time_to_drain_is_over():
    node = Node(state(web(endpoint(A), endpoint(B), drain_seconds=10)))
    flow = node.connect(A)
    node.become(one(drain_seconds=10))
    node.tick(9)
    assert node.is_alive(flow)
    node.tick(1)
    assert (node.members(), node.is_alive(flow)) == ({B: 1}, False)


def test_a_udp_endpoint_goes_at_once_and_its_flows_with_it():
    ports = (ServicePort(53, "UDP", target_port=8080),)
    key = ServerKey("UDP", VIP, 53)
    node = Node(state(web(endpoint(A), endpoint(B), ports=ports)))
    flow = node.connect(A, key)
    node.become(one(ports=ports))
    assert (node.members(key), node.is_alive(flow)) == ({B: 1}, False)


def test_an_endpoint_that_returns_while_it_drains_has_its_connections_again():
    node = Node(two())
    flow = node.connect(A)
    node.become(one())
    node.become(two())
    assert (node.members(), list(node.members())) == ({A: 1, B: 1}, [A, B])  # added again: the newest
    assert node.is_alive(flow)
    node.tick()
    assert int(node.services.backends[flow[0]]["inactive"]) == 1


def test_an_endpoint_that_returns_after_its_time_is_another_one():
    node = Node(state(web(endpoint(A), endpoint(B), drain_seconds=1)))
    flow = node.connect(A)
    node.become(one(drain_seconds=1))
    node.tick(2)
    node.disconnect(flow)
    node.tick()
    node.become(state(web(endpoint(A), endpoint(B), drain_seconds=1)))
    assert not node.is_alive(flow)


def test_a_drained_endpoint_keeps_its_connections_and_gets_no_new_ones():
    node = Node(two())
    flow = node.connect(A)
    node.become(state(web(endpoint(A, draining=True), endpoint(B))))
    node.tick(100_000)
    assert (node.members(), node.is_alive(flow)) == ({B: 1, A: 0}, True)
    assert node.picks(8) == {B}


@pytest.mark.parametrize("how", ["removed", "drained", "weighed"])
def test_no_client_of_a_maglev_service_is_refused_because_an_endpoint_goes(how):
    def become(*given):
        node.become(state(web(*given, scheduler="mh")))

    node = Node()
    become(endpoint(A), endpoint(B))
    flow = node.connect(A)
    assert node.picks(64) == {A, B}
    endings = {"drained": [endpoint(A, draining=True)], "weighed": [endpoint(A, weight=0)], "removed": []}
    become(*endings[how], endpoint(B))
    assert node.members()[A] == 0
    assert node.picks(64) == {B}
    assert node.is_alive(flow)
    become(endpoint(A), endpoint(B))
    assert node.picks(64) == {A, B}


def test_a_service_that_turns_to_maglev_has_no_bucket_for_what_drains():
    node = Node(state(web(endpoint(A, draining=True), endpoint(B))))
    node.become(state(web(endpoint(A, draining=True), endpoint(B), scheduler="mh")))
    assert node.picks(64) == {B}


def test_a_service_that_goes_takes_what_drains_with_it():
    node = Node(two())
    flow = node.connect(A)
    node.become(one())
    node.become(state())
    node.tick()
    assert not node.is_alive(flow)
    node.become(two())
    assert node.members() == {A: 1, B: 1}


def test_a_list_that_is_filled_is_that_of_single_steps():
    for scheduler in Scheduler:
        tables = ServiceTable(4, seed=1), ServiceTable(4, seed=1)
        given = [(IPv4Address(f"10.244.2.{host}"), 80, Destination(host % 4)) for host in range(1, 9)]
        for services in tables:
            services.set(6, VIP, 80, Service(scheduler))
        tables[0].fill(0, given)
        for each in given:
            tables[1].add(0, *each)
        for filled, added in zip(tables[0].arrays[2:], tables[1].arrays[2:], strict=True):
            assert filled.tobytes() == added.tobytes(), scheduler


# --- any sequence of states ------------------------------------------------------------------------------------------


class Lifetimes(RuleBasedStateMachine):
    """States follow one another while connections come and go; the model is what each state means, and who drains."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(state())
        self.flows: list[tuple[ServerKey, tuple[int, int]]] = []

    @rule(desired=states())
    def become(self, desired: DesiredState) -> None:
        self.node.become(desired)

    @precondition(lambda self: self.node.services.rows())
    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        assert self.node.state is not None
        servers = virtual_servers(self.node.state)
        key = data.draw(st.sampled_from(sorted(servers, key=str)))
        row = self.node.row(key)
        at = int(pick(self.node.services.arrays, row, 0, 0xFFFF_C633_6401, 40000))
        if at < 0:
            return
        backend.connect(self.node.services.backends, at)
        self.flows.append((key, (at, int(self.node.services.backends[at]["generation"]))))

    @precondition(lambda self: self.flows)
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        _, flow = self.flows.pop(data.draw(st.integers(0, len(self.flows) - 1)))
        self.node.disconnect(flow)

    @rule(seconds=st.sampled_from([1, 4, 6]))
    def tick(self, seconds: int) -> None:
        self.node.tick(seconds)

    @invariant()
    def lists_are_those_of_the_state_and_of_what_drains(self) -> None:
        assert self.node.state is not None
        servers = virtual_servers(self.node.state)
        assert len(self.node.services.rows()) == len(servers)
        for key, server in servers.items():
            row = self.node.row(key)
            wanted = {(each.address, each.port): each.weight for each in server.destinations}
            for at, address, port in self.node.services.members(row):
                weight = self.node.services.destination(at).weight
                if self.node.balancer.is_leaving(key, address, port):
                    assert weight == 0
                    assert key.protocol == "TCP"
                    assert (address, port) not in wanted
                else:
                    assert wanted.pop((address, port)) == weight
            assert not wanted
            assert self.node.balancer.names[row][0] == server.service
            assert self.node.services.get(row).scheduler == Scheduler[server.scheduler.upper()]

    @invariant()
    def no_connection_is_counted_where_it_does_not_belong(self) -> None:
        counted: dict[int, int] = {}
        for _, (at, generation) in self.flows:
            if int(self.node.services.backends[at]["generation"]) == generation:
                counted[at] = counted.get(at, 0) + 1
        for at in range(len(self.node.services.backends)):
            record = self.node.services.backends[at]
            assert int(record["active"]) + int(record["inactive"]) == counted.get(at, 0)


TestLifetimes = Lifetimes.TestCase
TestLifetimes.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_names_follow_where_a_service_comes_from():
    node = Node(two())
    node.become(replace(two(), services=(replace(two().services[0], origin="api"),)))
    assert node.balancer.names[node.row()] == ("default/web", "", "cluster-ip", "api")


def test_another_default_scheduler_is_every_services():
    node = Node(two())
    node.become(replace(two(), balancing=Balancing(scheduler="wlc")))
    assert node.services.get(node.row()).scheduler == Scheduler.WLC
    assert node.members() == {A: 1, B: 1}
