"""The service table against a plain model: services, backends, connections, thresholds, removal and return."""

from ipaddress import ip_address
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.tables import backend, scheduler, service
from dataplane.tables.address import Address, halves
from dataplane.tables.backend import BACKEND
from dataplane.tables.result import MISS, TableFullError
from dataplane.tables.scheduler import FALLBACK, PERSISTENT, PORT, Scheduler
from dataplane.tables.service import SERVICE, Destination, Service, ServiceTable
from tests import naive_ipvs

Key: TypeAlias = tuple[int, Address, int]
Member: TypeAlias = tuple[Address, int]
TCP, UDP = 6, 17
VIP, OTHER = ip_address("10.96.0.10"), ip_address("10.96.0.11")
POD, POD2 = ip_address("10.244.0.7"), ip_address("10.244.0.8")
KEYS: list[Key] = [(TCP, VIP, 80), (UDP, VIP, 80), (TCP, ip_address("2001:db8:96::10"), 80)]
MEMBERS: list[Member] = [(ip_address(f"10.244.0.{i}"), 8080) for i in range(1, 5)]
KINDS = [kind for kind in Scheduler if kind != Scheduler.MH]  # mh has its own test: it takes long without compiling
BACKENDS = 6


def find(table, protocol, address, port):
    """Call the kernel as a stage does."""
    hi, lo = halves(address)
    return int(service.find(table.arrays, protocol, np.uint64(hi), np.uint64(lo), port))


class ServiceMachine(RuleBasedStateMachine):
    """Two services of three, six backends, and connections that outlive both."""

    def __init__(self):
        super().__init__()
        self.table = ServiceTable(capacity=2, backend_limit=BACKENDS, seed=1)
        self.model = {}
        self.trash = {}
        self.connections = []
        self.generations = {}

    def needed(self):
        """Rows that backends need: those in a list, and those removed that have connections."""
        listed = sum(len(each.backends) for each in self.model.values())
        return listed + sum(mirror.held for mirror in self.trash.values())

    @rule(key=st.sampled_from(KEYS), kind=st.sampled_from(KINDS), flags=st.sampled_from([0, PORT, FALLBACK, 24]))
    def set(self, key: Key, kind, flags):
        if key not in self.model and len(self.model) == 2:
            with pytest.raises(TableFullError, match="service: full, 2 of 2"):
                self.table.set(*key, Service(kind, flags))
            return
        row = self.table.set(*key, Service(kind, flags))
        assert self.table.get(row) == Service(kind, flags)
        new = key not in self.model
        mirror = self.model.setdefault(key, naive_ipvs.Service(key[1], ""))
        mirror.port, mirror.fallback = bool(flags & PORT), bool(flags & FALLBACK)
        if mirror.scheduler != kind.name.lower():
            mirror.use(kind.name.lower())
        if new:
            self.generations[key] = int(self.table.services[row]["generation"])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data):
        key = data.draw(st.sampled_from(list(self.model)))
        row = self.table.find(*key)
        self.table.delete(row)
        for mirror in list(self.model.pop(key).backends):
            self.throw_away(key, mirror)
        assert find(self.table, *key) == MISS
        assert int(self.table.services[row]["generation"]) == self.generations[key] + 1

    def throw_away(self, key, mirror):
        mirror.present = False
        self.trash[key, mirror.address] = mirror

    @precondition(lambda self: self.model)
    @rule(data=st.data(), member=st.sampled_from(MEMBERS), weight=st.sampled_from([0, 1, 1, 2, 3, 6, 65535]))
    def add(self, data, member: Member, weight):
        key = data.draw(st.sampled_from(list(self.model)))
        upper, lower = data.draw(st.sampled_from([(0, 0), (0, 0), (1, 0), (2, 0), (4, 0), (4, 1), (3, 9)]))
        mirrors, row = self.model[key], self.table.find(*key)
        mirror = next((each for each in mirrors.backends if each.address == member[0]), None)
        new = mirror is None
        if new:
            mirror = self.trash.get((key, member[0]))
            if not (mirror and mirror.held) and self.needed() == BACKENDS:
                with pytest.raises(TableFullError, match="backend: full, 6 of 6"):
                    self.table.add(row, *member, Destination(weight, upper, lower))
                return
        at = self.table.add(row, *member, Destination(weight, upper, lower))
        assert self.table.destination(at) == Destination(weight, upper, lower)
        assert self.table.find_backend(row, *member) == at
        if new:
            mirror = self.trash.pop((key, member[0]), None) or naive_ipvs.Backend(*member)
            mirror.present = True
            mirrors.backends.insert(0, mirror)
        assert mirror
        mirror.change(weight, upper, lower, new)
        mirrors.changed()

    @precondition(lambda self: any(each.backends for each in self.model.values()))
    @rule(data=st.data())
    def remove(self, data):
        key = data.draw(st.sampled_from([key for key, each in self.model.items() if each.backends]))
        mirror = data.draw(st.sampled_from(self.model[key].backends))
        row = self.table.find(*key)
        self.table.remove(row, mirror.address, mirror.port)
        self.model[key].unlink(mirror)
        self.throw_away(key, mirror)
        assert self.table.find_backend(row, mirror.address, mirror.port) == MISS
        with pytest.raises(KeyError):
            self.table.remove(row, mirror.address, mirror.port)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), client=st.integers(0, 2**32 - 1), sport=st.integers(0, 65535), count=st.integers(1, 6))
    def open(self, data, client, sport, count):
        key = data.draw(st.sampled_from(list(self.model)))
        row = self.table.find(*key)
        address = ip_address(client)
        hi, lo = (np.uint64(half) for half in halves(address))
        for _ in range(count):
            at = int(scheduler.pick(self.table.arrays, row, hi, lo, sport))
            mirror = self.model[key].pick(address, sport)
            if mirror is None:
                assert at == backend.NONE
                return
            assert at == self.table.find_backend(row, mirror.address, mirror.port)
            service.connect(self.table.arrays, row, at)
            mirror.connect()
            self.connections.append([at, int(self.table.backends[at]["generation"]), mirror, False])

    @precondition(lambda self: self.connections)
    @rule(data=st.data())
    def change_state(self, data):
        connection = data.draw(st.sampled_from(self.connections))
        at, generation, mirror, active = connection
        (backend.inactivate if active else backend.activate)(self.table.backends, at, generation)
        connection[3] = not active
        mirror.active += -1 if active else 1
        mirror.inactive += 1 if active else -1

    @precondition(lambda self: self.connections)
    @rule(data=st.data(), count=st.integers(1, 4))
    def close(self, data, count):
        for _ in range(min(count, len(self.connections))):
            chosen = data.draw(st.integers(0, len(self.connections) - 1))
            at, generation, mirror, active = self.connections.pop(chosen)
            backend.disconnect(self.table.backends, at, generation, active)
            mirror.disconnect(active)

    @rule()
    def collect(self):
        self.table.collect()
        assert self.table.collect() == 0

    @invariant()
    def lists_and_counters_agree(self):
        assert len(self.table) == len(self.model)
        for key, mirrors in self.model.items():
            row = find(self.table, *key)
            assert row == self.table.find(*key) >= 0
            members = list(self.table.members(row))
            expected = [(mirror.address, mirror.port) for mirror in mirrors.backends]
            assert [member[1:] for member in members] == expected
            assert int(self.table.services[row]["count"]) == len(expected)
            for (at, _, _), mirror in zip(members, mirrors.backends, strict=True):
                record = self.table.backends[at]
                counted = tuple(int(record[name]) for name in ("active", "inactive", "weight", "last_weight"))
                assert counted == (mirror.active, mirror.inactive, mirror.weight, mirror.last_weight)
                assert bool(int(record["flags"]) & backend.OVERLOAD) == mirror.overload
                assert int(record["service"]) == row

    @invariant()
    def a_flow_knows_whether_its_backend_is_there(self):
        for at, generation, mirror, _ in self.connections:
            assert bool(backend.is_alive(self.table.backends, at, generation)) == mirror.present


ServiceMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestServiceMachine = ServiceMachine.TestCase


# --- examples --------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    return ServiceTable(capacity=4, seed=1)


def test_the_same_port_of_two_protocols_is_two_services(table):
    rows = {table.set(protocol, VIP, 53, Service()) for protocol in (TCP, UDP)}
    assert rows == {find(table, TCP, VIP, 53), find(table, UDP, VIP, 53)}
    assert len(rows) == 2
    assert find(table, TCP, VIP, 54) == find(table, TCP, OTHER, 53) == MISS
    assert table.rows() == sorted(rows)


def test_a_removed_backend_with_connections_comes_back_with_them(table):
    row = table.set(TCP, VIP, 80, Service())
    at = table.add(row, POD, 8080, Destination())
    generation = int(table.backends[at]["generation"])
    service.connect(table.arrays, row, at)
    table.remove(row, POD, 8080)
    assert not backend.is_alive(table.backends, at, generation)
    assert table.add(row, POD2, 8080, Destination()) != at
    assert table.add(row, POD, 8080, Destination()) == at
    assert backend.is_alive(table.backends, at, generation)
    assert int(table.backends[at]["inactive"]) == 1


def test_it_comes_back_even_after_its_service_was_deleted(table):
    row = table.set(TCP, VIP, 80, Service())
    at = table.add(row, POD, 8080, Destination())
    service.connect(table.arrays, row, at)
    table.delete(row)
    other = table.set(TCP, OTHER, 80, Service())
    assert table.add(other, POD, 8080, Destination()) != at
    row = table.set(TCP, VIP, 80, Service())
    assert table.add(row, POD, 8080, Destination()) == at
    assert int(table.backends[at]["service"]) == row


def test_a_row_given_to_another_backend_has_another_generation(table):
    row = table.set(TCP, VIP, 80, Service())
    at = table.add(row, POD, 8080, Destination())
    generation = int(table.backends[at]["generation"])
    table.remove(row, POD, 8080)
    assert table.add(row, POD2, 8080, Destination()) == at
    assert not backend.is_alive(table.backends, at, generation)
    backend.activate(table.backends, at, generation)
    backend.inactivate(table.backends, at, generation)
    backend.disconnect(table.backends, at, generation, True)
    backend.release(table.backends, at, generation)
    assert table.backends[["active", "inactive", "persistent"]][at].tolist() == (0, 0, 0)


def test_a_lower_threshold_of_its_own_decides_when_overload_ends(table):
    row = table.set(TCP, VIP, 80, Service())
    at = table.add(row, POD, 8080, Destination(1, u_threshold=4, l_threshold=1))
    generation = int(table.backends[at]["generation"])
    for _ in range(4):
        service.connect(table.arrays, row, at)
    overloaded = []
    for _ in range(4):
        backend.disconnect(table.backends, at, generation, False)
        overloaded.append(bool(int(table.backends[at]["flags"]) & backend.OVERLOAD))
    assert overloaded == [True, True, True, False]


def test_raising_or_dropping_the_upper_threshold_ends_overload(table):
    row = table.set(TCP, VIP, 80, Service())
    for upper, overloaded in ((2, True), (3, False), (1, True), (0, False)):
        at = table.add(row, POD, 8080, Destination(1, u_threshold=2))
        while int(table.backends[at]["inactive"]) < 2:
            service.connect(table.arrays, row, at)
        backend.hold(table.backends, at)  # a template is no connection, but looks at the threshold
        table.add(row, POD, 8080, Destination(1, upper))
        assert bool(int(table.backends[at]["flags"]) & backend.OVERLOAD) is overloaded


def test_changing_a_service_keeps_its_backends_and_counters(table):
    row = table.set(TCP, VIP, 80, Service(Scheduler.MH))
    at = table.add(row, POD, 8080, Destination())
    service.connect(table.arrays, row, at)
    for kind in (Scheduler.SH, Scheduler.RR, Scheduler.WRR, Scheduler.MH, Scheduler.DH):
        changed = Service(kind, PERSISTENT, timeout_ns=5, client_bits=120)
        assert table.set(TCP, VIP, 80, changed) == row
        assert table.get(row) == changed
        assert int(scheduler.pick(table.arrays, row, np.uint64(0), np.uint64(0xFFFF_C000_0201), 1)) == at
    assert int(table.services[row]["connections"]) == int(table.backends[at]["connections"]) == 1


def test_buckets_are_bounded_and_used_again():
    table = ServiceTable(capacity=4, bucket_limit=4096 + 256, seed=1)
    maglev = table.set(TCP, VIP, 80, Service(Scheduler.MH))
    table.set(TCP, VIP, 81, Service(Scheduler.SH))
    for port, kind in ((82, Scheduler.DH), (81, Scheduler.MH)):
        with pytest.raises(TableFullError, match="buckets: full, 4352 of 4352"):
            table.set(TCP, VIP, port, Service(kind))
    assert len(table) == 2
    assert table.get(table.find(TCP, VIP, 81)).scheduler == Scheduler.SH
    table.delete(maglev)
    table.set(TCP, VIP, 83, Service(Scheduler.MH))
    table.set(TCP, VIP, 81, Service(Scheduler.RR))
    table.set(TCP, VIP, 84, Service(Scheduler.DH))


def test_a_full_table_gives_the_buckets_back():
    table = ServiceTable(capacity=1, bucket_limit=512, seed=1)
    row = table.set(TCP, VIP, 80, Service())
    for _ in range(3):
        with pytest.raises(TableFullError, match="service: full, 1 of 1"):
            table.set(TCP, VIP, 81, Service(Scheduler.SH))
    table.delete(row)
    table.set(TCP, VIP, 80, Service(Scheduler.SH))
    with pytest.raises(KeyError):
        table.delete(3)
    with pytest.raises(KeyError):
        table.add(3, POD, 80, Destination())


def test_arrays_grow_and_keep_what_they_hold(table):
    hashed = table.set(TCP, VIP, 80, Service(Scheduler.SH))
    row = table.set(TCP, VIP, 81, Service(Scheduler.MH))
    members = [(ip_address(0x0AF4_0000 + i), 8080) for i in range(100)]
    rows = [table.add(hashed, *member, Destination()) for member in members]
    assert rows == [table.find_backend(hashed, *member) for member in members] == list(range(100))
    assert [member[1:] for member in table.members(hashed)] == members[::-1]
    table.add(row, POD, 80, Destination())
    base = int(table.services[hashed]["buckets"])
    assert table.arrays[4][base : base + 256].tolist() == (rows[::-1] * 3)[:256]


def test_records_fill_whole_cache_lines():
    assert (SERVICE.itemsize, BACKEND.itemsize) == (128, 128)


def test_a_service_that_is_staged_is_found_when_it_is_published():
    table = ServiceTable(2, bucket_limit=256, seed=1)
    row = table.stage(6, VIP, 80, Service(Scheduler.SH))
    table.fill(row, [(ip_address("10.244.1.10"), 80, Destination())])
    assert (table.find(6, VIP, 80), table.rows(), len(table)) == (-1, [], 0)
    table.publish(row)
    assert (table.find(6, VIP, 80), table.rows(), len(table)) == (row, [row], 1)


def test_a_service_that_is_discarded_gives_back_what_it_had_and_its_row_is_another_ones():
    table = ServiceTable(1, backend_limit=1, bucket_limit=256, seed=1)
    for turn in range(3):
        row = table.stage(6, VIP, 80, Service(Scheduler.SH))
        table.fill(row, [(ip_address("10.244.1.10"), 80, Destination())])
        assert int(table.services[row]["generation"]) == turn
        table.discard(row)
    assert table.find(6, VIP, 80) == -1
