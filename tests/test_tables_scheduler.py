"""The schedulers: recordings of ip_vs, a plain model under random edits, and the rules one by one."""

import json
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataplane.jit import INTERPRETED
from dataplane.tables import backend, maglev, scheduler, service
from dataplane.tables.address import halves
from dataplane.tables.scheduler import FALLBACK, PORT, Scheduler
from dataplane.tables.service import Destination, Service, ServiceTable
from tests import ipvs_vectors, naive_ipvs

RECORDED = Path(__file__).parent / "data" / "ipvs_schedulers.json"
VIP = ip_address("10.96.0.10")
TCP, UDP = 6, 17
MEMBERS = [ip_address(f"10.244.0.{i}") for i in range(1, 10)]


class Cluster:
    """One service with backends 1, 2, ... of the weights given; picks are told by those numbers."""

    def __init__(self, kind: Scheduler, weights=(), flags=0, vip=VIP, **thresholds):
        self.table = ServiceTable(capacity=4, seed=1)
        self.row = self.table.set(TCP, vip, 80, Service(kind, flags))
        for number, weight in enumerate(weights, 1):
            self.add(number, weight, **thresholds)

    def add(self, number, weight, **thresholds):
        return self.table.add(self.row, MEMBERS[number - 1], 8080, Destination(weight, **thresholds))

    def remove(self, number):
        self.table.remove(self.row, MEMBERS[number - 1], 8080)

    def at(self, number):
        return self.table.find_backend(self.row, MEMBERS[number - 1], 8080)

    def pick(self, client="192.0.2.1", sport=0):
        hi, lo = (np.uint64(half) for half in halves(client))
        at = int(scheduler.pick(self.table.arrays, self.row, hi, lo, sport))
        return None if at < 0 else int(self.table.backends[at]["lo"]) & 0xFF

    def open(self, client="192.0.2.1", sport=0, active=True):
        number = self.pick(client, sport)
        if number is not None:
            service.connect(self.table.arrays, self.row, self.at(number))
            if active:
                backend.activate(self.table.backends, self.at(number), self.generation(number))
        return number

    def close(self, number, active=True):
        backend.disconnect(self.table.backends, self.at(number), self.generation(number), active)

    def generation(self, number):
        return int(self.table.backends[self.at(number)]["generation"])

    def buckets(self, count):
        base = int(self.table.services[self.row]["buckets"])
        return self.table.arrays[4][base : base + count]


def opens(cluster, count, **how):
    """The numbers of the next picks as digits, - for none."""
    return "".join(str(cluster.open(**how) or "-") for _ in range(count))


# --- recordings ------------------------------------------------------------------------------------------------------


def test_every_recorded_decision_of_ip_vs_is_repeated(capsys):
    assert ipvs_vectors.main([str(RECORDED)]) == 0
    assert capsys.readouterr().out == "136/136 scenarios, 7610/7610 picks\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one["kernel"].__setitem__(3, 4), "open 3: kernel 4, here 1"),
        (lambda one: one["table"].__setitem__(1, one["table"][1].replace(" 7 ", " 8 ")), "table: kernel"),
    ],
)
def test_a_recording_that_differs_is_told_and_fails(tmp_path, capsys, change, said):
    scenarios = json.loads(RECORDED.read_text())[:2]
    change(scenarios[0])
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(scenarios))
    assert ipvs_vectors.main([str(path)]) == 1
    assert f"h0_rr: {said}" in (out := capsys.readouterr().out)
    assert "1/2 scenarios" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.pop("kernel"), "'kernel' is missing"),
        (lambda one: one["kernel"].pop(), "30 opens, but 29 answers"),
        (lambda one: one["ops"].append(["x", 1]), "'x' is missing or unknown"),
        (lambda one: one["ops"].append(["c", 99]), "out of range"),
        (lambda one: one["ops"].append(["w", 99, 1]), "destination 99 is changed, but not there"),
        (lambda one: one["ops"].append(["a", 1, 1]), "destination 1 is added twice"),
        (lambda one: one["ops"].append(["d", 77]), "is missing"),
        (lambda one: one.update(sched="lblc"), "not those of the table"),
        (lambda one: one.update(vip="10.96.0.11"), "vip is not that of the table"),
        (lambda one: one.update(net="nowhere"), "nowhere.1"),
        (lambda one: one["table"].__setitem__(0, "IP"), "not a service of ipvsadm"),
        (lambda one: one["table"].__setitem__(1, "IP"), "not a destination of ipvsadm"),
        (lambda one: one.update(weights=3), "not iterable"),
    ],
)
def test_a_recording_of_another_form_is_refused(tmp_path, capsys, change, said):
    scenarios = json.loads(RECORDED.read_text())[:1]
    change(scenarios[0])
    path = tmp_path / "malformed.json"
    path.write_text(json.dumps(scenarios))
    assert ipvs_vectors.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "scenario h0_rr" in error


@pytest.mark.parametrize(
    ("text", "said"), [("[", "not JSON"), ("{}", "not a list"), ("[]", "not a list"), ("[1]", "scenario 0")]
)
def test_a_file_that_holds_no_scenarios_is_refused(tmp_path, capsys, text, said):
    path = tmp_path / "broken.json"
    path.write_text(text)
    assert ipvs_vectors.main([str(path)]) == 2
    assert said in capsys.readouterr().err
    assert ipvs_vectors.main([str(tmp_path / "missing.json")]) == 2
    assert ipvs_vectors.main([]) == 2


# --- rules -----------------------------------------------------------------------------------------------------------


def test_the_newest_backend_is_first():
    assert opens(Cluster(Scheduler.RR, [1, 1, 1]), 6) == "321321"


def test_round_robin_goes_on_behind_its_last_pick_when_that_is_removed():
    cluster = Cluster(Scheduler.RR, [1, 1, 1, 1])
    assert opens(cluster, 2) == "43"
    cluster.remove(3)
    assert opens(cluster, 3) == "214"
    cluster.remove(4)
    assert opens(cluster, 2) == "21"


def test_a_new_backend_of_round_robin_waits_for_the_next_turn():
    cluster = Cluster(Scheduler.RR, [1, 1])
    assert opens(cluster, 1) == "2"
    cluster.add(3, 1)
    assert opens(cluster, 4) == "1321"


def test_weighted_round_robin_remembers_how_its_list_came_about():
    assert opens(Cluster(Scheduler.WRR, [4, 3, 2]), 18) == "321121321321121321"


def test_weighted_round_robin_gives_each_its_share():
    cluster = Cluster(Scheduler.WRR, [1, 100, 10, 0])
    picked = opens(cluster, 3 * 111)
    assert {number: picked.count(number) for number in "1234"} == {"1": 3, "2": 300, "3": 30, "4": 0}


@pytest.mark.parametrize("kind", list(Scheduler))
def test_nothing_can_be_picked_of_an_empty_service(kind):
    for flags in (0, FALLBACK):
        cluster = Cluster(kind, flags=flags)
        assert opens(cluster, 2) == "--"
        cluster.add(1, 1)
        assert opens(cluster, 1) == "1"
        cluster.remove(1)
        assert opens(cluster, 2) == "--"


@pytest.mark.parametrize("kind", list(Scheduler))
@pytest.mark.parametrize("flags", [0, FALLBACK])
def test_weight_zero_is_never_picked(kind, flags):
    cluster = Cluster(kind, [0, 0, 3], flags)
    cluster.add(3, 0)
    assert opens(cluster, 5) == "-----"


@pytest.mark.parametrize("kind", list(Scheduler))
def test_overload_is_never_picked_and_ends_at_three_quarters(kind):
    cluster = Cluster(kind, [9], u_threshold=4)
    assert opens(cluster, 6) == "1111--"
    cluster.close(1)
    assert opens(cluster, 1) == "-"
    cluster.close(1)
    assert opens(cluster, 3) == "11-"


def test_weighted_round_robin_skips_heavy_backends_that_are_overloaded():
    cluster = Cluster(Scheduler.WRR, [1, 2])
    cluster.add(3, 65535, u_threshold=1)
    assert opens(cluster, 9) == "321" + "221" * 2  # 65535 steps down to a weight of 2 are one step
    for number in (1, 2):
        cluster.add(number, 0)
    assert opens(cluster, 3) == "---"


def test_the_fewest_connections_win_and_256_inactive_ones_are_one_active():
    cluster = Cluster(Scheduler.LC, [1, 1])
    for _ in range(256):
        service.connect(cluster.table.arrays, cluster.row, cluster.at(2))
    assert opens(cluster, 3) == "121"


def test_least_connections_take_the_weight_into_account():
    assert opens(Cluster(Scheduler.WLC, [1, 3]), 8) == "21222122"


def test_the_shortest_delay_and_an_idle_backend():
    assert opens(Cluster(Scheduler.SED, [1, 3]), 6) == "222122"
    assert opens(Cluster(Scheduler.NQ, [1, 3]), 4) == "2122"


@pytest.mark.parametrize("kind", [Scheduler.SED, Scheduler.NQ])
def test_udp_is_always_inactive_so_the_heaviest_gets_it_all(kind):
    picked = opens(Cluster(kind, [1, 2, 2]), 6, active=False)
    assert picked == "333333"


def test_failover_stays_with_the_heaviest_and_overflow_leaves_it_when_full():
    assert opens(Cluster(Scheduler.FO, [2, 3, 1]), 8) == "22222222"
    assert opens(Cluster(Scheduler.OVF, [2, 3, 1]), 10) == "222211133-"


def test_source_hashing_gives_weight_zero_one_bucket_whose_clients_get_nothing():
    cluster = Cluster(Scheduler.SH, [2, 0, 1])
    rows = [cluster.at(number) for number in (3, 2, 1, 1)]
    assert cluster.buckets(256).tolist() == rows * 64
    picked = {cluster.pick(f"192.0.2.{i}") for i in range(50)}
    assert picked == {1, 3, None}
    cluster = Cluster(Scheduler.SH, [2, 0, 1], FALLBACK)
    assert {cluster.pick(f"192.0.2.{i}") for i in range(50)} == {1, 3}


@pytest.mark.parametrize("kind", [Scheduler.SH, Scheduler.MH])
def test_the_port_counts_only_when_asked(kind):
    for flags, many in ((0, False), (PORT, True)):
        cluster = Cluster(kind, [1, 1, 1], flags)
        assert (len({cluster.pick(sport=port) for port in range(40)}) > 1) is many


def test_maglev_keeps_the_buckets_of_a_drained_backend_so_its_clients_get_nothing():
    cluster = Cluster(Scheduler.MH, [1, 1])
    before = cluster.buckets(maglev.BUCKETS).tolist()
    cluster.add(1, 0)
    assert cluster.buckets(maglev.BUCKETS).tolist() == before
    assert {cluster.pick(f"192.0.2.{i}") for i in range(50)} == {2, None}
    cluster.add(3, 0)  # added with no weight: no buckets
    assert cluster.buckets(maglev.BUCKETS).tolist() == before


def test_more_maglev_backends_than_buckets_leave_the_oldest_without():
    table = ServiceTable(capacity=1, seed=1)
    row = table.set(UDP, VIP, 53, Service(Scheduler.RR))
    first = int(ip_address("10.244.0.0"))
    for i in range(maglev.BUCKETS + 7):
        table.add(row, ip_address(first + i), 53, Destination())
    table.set(UDP, VIP, 53, Service(Scheduler.MH))
    base = int(table.services[row]["buckets"])
    assert sorted(table.arrays[4][base : base + maglev.BUCKETS].tolist()) == list(range(7, maglev.BUCKETS + 7))


def test_the_hash_is_siphash_of_the_reference():
    for word in (0, 1, 0xFFFF_FFFF, 0x0A32_1C47):
        assert maglev.siphash(word, 2654435761) == naive_ipvs.maglev_hash(word, 2654435761)
    # Linux's own vectors for HalfSipHash's 64-bit stand-in, key 00..0f (lib/siphash_kunit.c).
    for length, expected in enumerate((0x050FC4DC, 0x7D57CA93, 0x4DC7D44D, 0xE7DDF7FB, 0x88D38328)):
        assert naive_ipvs.siphash13(bytes(range(length)), bytes(range(16))) % 2**32 == expected


def test_an_ipv6_address_is_its_four_words_xored():
    address = ip_address("2001:db8::1:2")
    hi, lo = (np.uint64(half) for half in halves(address))
    assert maglev.fold(hi, lo) == 0x2001_0DB8 ^ 0x0001_0002 == naive_ipvs.fold(address)


# --- the model -------------------------------------------------------------------------------------------------------

V6 = ip_address("2001:db8:96::10")
NAMES = [kind.name.lower() for kind in Scheduler]
WEIGHTS = st.sampled_from([0, 1, 2, 3, 5, 6, 64, 100, 4096, 65535])
EDITS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 6), WEIGHTS),
    st.tuples(st.just("remove"), st.integers(1, 6)),
    st.tuples(st.just("overload"), st.integers(1, 6)),
    st.just(("overload", 1, 2, 3, 4, 5, 6)),
    st.tuples(st.just("open"), st.integers(0, 2**32 - 1), st.integers(0, 65535), st.integers(1, 9)),
)
FLAGS = st.sampled_from([0, PORT, FALLBACK, PORT | FALLBACK])
LISTS = st.lists(EDITS, min_size=12, max_size=50)


def check_against_model(name, flags, vip, edits):
    """Do the same to a table and to the model, and compare every pick."""
    cluster = Cluster(Scheduler[name.upper()], flags=flags, vip=vip)
    model = naive_ipvs.Service(vip, name, bool(flags & PORT), bool(flags & FALLBACK))
    model.use(name)
    known: dict[int, naive_ipvs.Backend] = {}
    for what, *numbers in edits:
        number = numbers[0]
        if what == "add":
            cluster.add(number, numbers[1])
            new = number not in known
            mirror = known.setdefault(number, naive_ipvs.Backend(MEMBERS[number - 1], 8080))
            mirror.change(numbers[1], 0, 0, new)  # without a threshold, which ends an overload
            if new:
                model.backends.insert(0, mirror)
            model.changed()
        elif what == "remove" and number in known:
            cluster.remove(number)
            model.unlink(known.pop(number))
        elif what == "open":
            for near in range(numbers[2]):
                words = (number + near) % 2**32
                client = ip_address(words) if vip.version == 4 else ip_address(0x2001 << 112 | words << 40 | words)
                expected = model.pick(client, numbers[1])
                picked = cluster.pick(client, numbers[1])
                assert picked == (None if expected is None else int(expected.address) & 0xFF)
        elif what == "overload":
            for each in known.keys() & set(numbers):
                record = cluster.table.backends[cluster.at(each)]
                record["flags"] = int(record["flags"]) ^ backend.OVERLOAD
                known[each].overload = not known[each].overload


@pytest.mark.parametrize("name", ["rr", "wrr", "sh", "dh"])
@settings(max_examples=200)
@given(flags=FLAGS, v6=st.booleans(), edits=LISTS)
@example(flags=0, v6=False, edits=[("add", 1, 4), ("add", 2, 3), ("add", 3, 2), ("open", 1, 1, 27)])
def test_picks_are_those_of_the_model(name, flags, v6, edits):
    edits = [edit if edit[0] != "add" or name != "wrr" else ("add", edit[1], min(edit[2], 101)) for edit in edits]
    check_against_model(name, flags, V6 if v6 else VIP, edits)


@settings(max_examples=300)
@given(
    weights=st.lists(st.sampled_from([0, 1, 2, 4, 5]), min_size=2, max_size=4),
    edits=st.lists(
        st.one_of(
            st.lists(st.integers(1, 4), min_size=1).map(lambda numbers: ("overload", *numbers)),
            st.integers(1, 5).map(lambda count: ("open", 1, 1, count)),
        ),
        min_size=8,
    ),
)
@example(weights=[1, 5], edits=[("open", 1, 1, 4), ("overload", 2), ("open", 1, 1, 2)])
def test_weighted_picks_among_overloaded_backends_are_those_of_the_model(weights, edits):
    check_against_model("wrr", 0, VIP, [("add", i, weight) for i, weight in enumerate(weights, 1)] + edits)


@settings(max_examples=6 if INTERPRETED else 40)
@given(flags=st.sampled_from([0, PORT, FALLBACK, PORT | FALLBACK]), v6=st.booleans(), edits=LISTS)
def test_maglev_picks_are_those_of_the_model(flags, v6, edits):
    check_against_model("mh", flags, V6 if v6 else VIP, edits)


@settings(max_examples=4 if INTERPRETED else 25)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=8))
def test_maglev_tables_are_those_of_the_model(weights):
    cluster = Cluster(Scheduler.MH, weights)
    model = naive_ipvs.Service(VIP, "mh")
    for number, weight in enumerate(weights, 1):
        model.backends.insert(0, naive_ipvs.Backend(MEMBERS[number - 1], 8080, last_weight=weight))
    rows = {address: at for at, address, _ in cluster.table.members(cluster.row)}
    expected = [-1 if mirror is None else rows[mirror.address] for mirror in model.maglev()]
    assert cluster.buckets(maglev.BUCKETS).tolist() == expected
