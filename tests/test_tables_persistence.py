"""Persistence templates against a dict, with time passed in."""

from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.tables import backend, persistence, service
from dataplane.tables.address import halves, to_address
from dataplane.tables.persistence import TEMPLATE, TemplateTable
from dataplane.tables.result import FULL, MISS
from dataplane.tables.scheduler import PERSISTENT, Scheduler
from dataplane.tables.service import Destination, Service, ServiceTable

SECOND = 1_000_000_000
TCP = 6
VIP, VIP6 = ip_address("10.96.0.10"), ip_address("2001:db8:96::10")
PODS = [ip_address(f"10.244.0.{i}") for i in range(1, 4)]
TIMEOUT = 100  # seconds
# Clients of a /24: .1 and .2 of the first network are one client.
CLIENTS = [ip_address(text) for text in ("192.0.2.1", "192.0.2.2", "198.51.100.1", "203.0.113.1", "203.0.112.1")]
CAPACITY = 3


class Node:
    """Two persistent services with three backends each, and a table for few templates."""

    def __init__(self, capacity=CAPACITY, expire_quiescent=True, scheduler=Scheduler.RR):
        self.table = ServiceTable(capacity=4, seed=1)
        self.templates = TemplateTable(capacity, expire_quiescent, seed=1)
        how = Service(scheduler, PERSISTENT, TIMEOUT * SECOND, client_bits=120)
        self.rows = [self.table.set(TCP, VIP, port, how) for port in (80, 81)]
        for row in self.rows:
            for pod in PODS:
                self.table.add(row, pod, 8080, Destination())

    def select(self, which, client, now):
        """Return the pod and the template's row, as a stage would get them; count the connection."""
        hi, lo = (np.uint64(half) for half in halves(client))
        row = self.rows[which]
        arrays = self.table.arrays
        at, template = persistence.select(self.templates.arrays, arrays, row, (hi, lo, 4000), now * SECOND)
        if at < 0:
            return None, int(template)
        service.connect(arrays, row, at)
        return to_address(self.table.backends[at]["hi"], self.table.backends[at]["lo"]), int(template)

    def generation(self, template):
        return int(self.templates.templates[template]["generation"])

    def let_go(self, template, generation, now):
        persistence.let_go(self.templates.arrays, template, generation, now * SECOND)

    def sweep(self, now):
        return persistence.sweep(self.templates.arrays, self.table.backends, now * SECOND, self.templates.capacity)


class TemplateMachine(RuleBasedStateMachine):
    """Clients come and go, backends drain and leave, and time passes."""

    def __init__(self):
        super().__init__()
        self.node = Node()
        self.now = 1000
        self.model = {}  # (service, network) -> [pod, expiry, connections]
        self.connections = []  # [key, the model's entry, template, generation]
        self.gone = set()
        self.weights = {}

    def is_valid(self, which, entry):
        pod, expiry, controls = entry
        usable = (which, pod) not in self.gone and self.weights.get((which, pod), 1) > 0
        return usable and (controls > 0 or expiry > self.now)

    def has_expired(self, entry):
        return entry[2] == 0 and entry[1] <= self.now

    @rule(which=st.integers(0, 1), client=st.sampled_from(CLIENTS), count=st.integers(1, 3))
    def connect(self, which, client, count):
        for _ in range(count):
            self.connect_once(which, client)

    def connect_once(self, which, client):
        key = which, int(client) >> 8
        entry = self.model.get(key)
        if entry is not None and not self.is_valid(which, entry):
            del self.model[key]
            entry = None
        full = entry is None and len(self.model) == CAPACITY
        expired = [each for each, old in self.model.items() if self.has_expired(old)]
        refused = self.node.templates.refused
        pod, template = self.node.select(which, client, self.now)
        if pod is None:
            assert all(self.weights.get((which, each), 1) == 0 or (which, each) in self.gone for each in PODS)
            assert template == MISS
            return
        if full and not expired:
            assert template == FULL
            assert self.node.templates.refused == refused + 1
            return
        if full:
            for each in expired:
                del self.model[each]
        if entry is None:
            entry = self.model[key] = [pod, 0, 0]
        assert pod == entry[0]
        entry[1:] = self.now + TIMEOUT, entry[2] + 1
        self.connections.append((entry, template, self.node.generation(template)))

    @precondition(lambda self: self.connections)
    @rule(data=st.data())
    def close(self, data):
        entry, template, generation = self.connections.pop(data.draw(st.integers(0, len(self.connections) - 1)))
        self.node.let_go(template, generation, self.now)
        entry[2] -= 1
        if entry[2] == 0:
            while entry[1] <= self.now:
                entry[1] += 60

    @rule(seconds=st.sampled_from([1, 20, 59, 60, 61, 100, 101, 500]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule(which=st.integers(0, 1), pod=st.sampled_from(PODS), weight=st.integers(0, 1))
    def weigh(self, which, pod, weight):
        """Also brings back what was removed: the same backend, as its templates still hold it."""
        self.gone.discard((which, pod))
        self.node.table.add(self.node.rows[which], pod, 8080, Destination(weight))
        self.weights[which, pod] = weight

    @rule(which=st.integers(0, 1), pod=st.sampled_from(PODS))
    def remove(self, which, pod):
        if (which, pod) not in self.gone:
            self.node.table.remove(self.node.rows[which], pod, 8080)
            self.gone.add((which, pod))

    @rule()
    def sweep(self):
        expired = [key for key, entry in self.model.items() if self.has_expired(entry)]
        assert self.node.sweep(self.now) == len(expired)
        for key in expired:
            del self.model[key]

    @invariant()
    def templates_and_counters_agree(self):
        templates, backends = self.node.templates, self.node.table.backends
        shown = {}
        for row, network in templates.items():
            record = templates.templates[row]
            which = int(record["scope"]) - (TCP << 16 | 80)
            at = int(record["backend"])
            pod = to_address(backends[at]["hi"], backends[at]["lo"])
            shown[which, int(network) >> 8] = [pod, int(record["expires_ns"]) // SECOND, int(record["controls"])]
        assert shown == self.model
        assert len(templates) == len(self.model)
        held = sum(int(backends[at]["persistent"]) for at in range(len(backends)))
        assert held == len(self.model)

    @invariant()
    def every_template_is_found(self):
        for which, network in self.model:
            hi, lo = (np.uint64(half) for half in halves(ip_address(network << 8 | 77)))
            record = self.node.table.services[self.node.rows[which]]
            assert persistence.find(self.node.templates.arrays, record, hi, lo) >= 0


TemplateMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestTemplateMachine = TemplateMachine.TestCase


def test_a_client_stays_with_its_backend_until_the_timeout():
    node = Node()
    first, _ = node.select(0, CLIENTS[0], 0)
    assert node.select(0, CLIENTS[0], 0)[0] == first
    assert node.select(0, CLIENTS[1], 50)[0] == first  # the same /24
    assert node.select(0, CLIENTS[2], 50)[0] != first
    assert node.select(1, CLIENTS[0], 50)[0] is not None
    assert len(node.templates) == 3


def test_a_template_expires_after_its_last_new_connection():
    node = Node()
    first, template = node.select(0, CLIENTS[0], 0)
    node.let_go(template, node.generation(template), 1)
    assert node.select(0, CLIENTS[0], 99) == (first, template)
    node.let_go(template, node.generation(template), 100)
    assert node.select(0, CLIENTS[0], 198) == (first, template)
    node.let_go(template, node.generation(template), 198)
    assert node.select(0, CLIENTS[0], 298)[0] != first


def test_open_connections_hold_their_template_by_whole_minutes():
    node = Node()
    first, template = node.select(0, CLIENTS[0], 0)
    generation = node.generation(template)
    assert node.sweep(1000) == 0
    node.let_go(template, generation, 170)  # looked at after 100 and 160 s
    assert node.sweep(219) == 0
    assert node.sweep(220) == 1
    node.let_go(template, generation, 221)  # the end of a connection whose template is gone
    assert int(node.templates.templates[template]["controls"]) == 0
    assert node.select(0, CLIENTS[0], 221)[0] != first


@pytest.mark.parametrize(("expire_quiescent", "stays"), [(True, False), (False, True)])
def test_a_quiescent_backend_keeps_its_clients_only_if_so_configured(expire_quiescent, stays):
    node = Node(expire_quiescent=expire_quiescent)
    first, _ = node.select(0, CLIENTS[0], 0)
    node.table.add(node.rows[0], first, 8080, Destination(0))
    assert (node.select(0, CLIENTS[0], 1)[0] == first) is stays


def test_a_client_of_a_removed_backend_gets_another_one():
    node = Node(expire_quiescent=False)
    first, _ = node.select(0, CLIENTS[0], 0)
    node.table.remove(node.rows[0], first, 8080)
    second, _ = node.select(0, CLIENTS[0], 1)
    assert second != first
    node.table.add(node.rows[0], first, 8080, Destination())
    assert node.select(0, CLIENTS[0], 2)[0] == second


def test_an_overloaded_backend_keeps_its_clients():
    node = Node()
    for pod in PODS:
        node.table.add(node.rows[0], pod, 8080, Destination(1, u_threshold=1))
    first, _ = node.select(0, CLIENTS[0], 0)
    assert node.select(0, CLIENTS[0], 0)[0] == first
    assert node.select(0, CLIENTS[2], 0)[0] != first


def test_no_template_is_made_when_no_backend_can_be_used():
    node = Node()
    for pod in PODS:
        node.table.remove(node.rows[0], pod, 8080)
    assert node.select(0, CLIENTS[0], 0) == (None, MISS)
    assert len(node.templates) == 0


def test_a_full_table_schedules_without_a_template():
    node = Node(capacity=1)
    node.select(0, CLIENTS[0], 0)
    assert node.select(0, CLIENTS[2], 0)[1] == FULL
    assert node.templates.refused == 1
    assert node.select(0, CLIENTS[0], 0)[1] == 0


def test_clients_of_ipv6_are_whole_addresses_unless_masked():
    table, templates = ServiceTable(capacity=1, seed=1), TemplateTable(4, seed=1)
    row = table.set(TCP, VIP6, 80, Service(Scheduler.RR, PERSISTENT))
    for number in (1, 2):
        table.add(row, ip_address(f"2001:db8::{number}"), 80, Destination())
    picked = []
    for text in ("2001:db8:1::1", "2001:db8:1::2", "2001:db8:1::1"):
        hi, lo = (np.uint64(half) for half in halves(text))
        picked.append(int(persistence.select(templates.arrays, table.arrays, row, (hi, lo, 1), 0)[0]))
    assert picked[0] == picked[2] != picked[1]
    assert {str(client) for _, client in templates.items()} == {"2001:db8:1::1", "2001:db8:1::2"}


def test_many_templates_come_and_go_in_a_small_table():
    node = Node(capacity=64)
    for i in range(64):
        node.select(i % 2, ip_address(0xC000_0000 + (i << 8)), i)
    assert len(node.templates) == 64
    for row, _ in list(node.templates.items()):
        node.let_go(row, node.generation(row), 0)
    assert node.sweep(100 + 31) == 32
    for i in range(32):
        assert node.select(i % 2, ip_address(0xC001_0000 + (i << 8)), 131)[1] >= 0
    assert len(node.templates) == 64
    assert int(node.table.backends["persistent"].sum()) == 64


def test_a_template_fills_a_cache_line():
    assert TEMPLATE.itemsize == 64
    assert backend.NONE == MISS
