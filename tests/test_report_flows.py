"""The flow table as it is listed and emptied: filters, rows, pages, and flows that change meanwhile."""

from ipaddress import ip_network
from typing import Any

import pytest

from dataplane.control import query
from dataplane.control.query import Query
from dataplane.report_flows import CHUNK, PAGE, FlowReport
from dataplane.tables import flow
from dataplane.tables.address import halves
from dataplane.tables.flow import (
    ASSURED,
    COUNTED,
    DST_NAT,
    MASQUERADED,
    SEEN_REPLY,
    SRC_NAT,
    FlowTable,
    LbState,
    TcpState,
)
from dataplane.tables.service import Service, ServiceTable

NOW = 1_000_000 * 1_000_000_000
SECOND = 1_000_000_000
TCP, UDP, ICMP, GRE = 6, 17, 1, 47
CLIENT, VIP, BACKEND, OUTSIDE, NODE = "10.244.1.11", "10.96.0.20", "10.244.1.10", "203.0.113.9", "192.0.2.11"


class World:
    """A flow table and a service table, filled by hand."""

    def __init__(self, capacity: int = 64) -> None:
        self.flows = FlowTable(capacity, seed=1)
        self.services = ServiceTable(16, seed=1)
        self.names: dict[int, tuple[str, str, str, str]] = {}
        self.now = NOW
        self.report = FlowReport(self.flows, self.services, self.names, lambda: self.now)

    def service(self, name: str, vip: str = VIP, port: int = 80) -> int:
        row = self.services.set(TCP, vip, port, Service())
        self.names[row] = (name, "http", "cluster-ip", "file")
        return row

    def add(self, protocol: int, original: tuple[str, int, str, int], reply: Any = None, **fields: int) -> int:
        scratch = self.flows.arrays[-1]
        source, sport, destination, dport = original
        for at, (src, port, dst, other) in enumerate((original, reply or (destination, dport, source, sport))):
            record = scratch[at]
            record["src_hi"], record["src_lo"] = halves(src)
            record["dst_hi"], record["dst_lo"] = halves(dst)
            record["sport"], record["dport"], record["protocol"] = port, other, protocol
        row = int(flow.insert(self.flows.arrays, self.now))
        assert row >= 0
        self.flows.flows["expires_ns"][row] = self.now + 30 * SECOND
        for name, value in fields.items():
            self.flows.flows[name][row] = value
        return row

    def balanced(self, sport: int, service: int, **fields: int) -> int:
        """Add a connection of the client to the VIP, answered by the backend."""
        known = {
            "state": TcpState.ESTABLISHED,
            "status": SEEN_REPLY | ASSURED | DST_NAT | COUNTED,
            "service": service,
            "service_generation": int(self.services.services[service]["generation"]),
            "backend": 0,
            "lb_state": LbState.ESTABLISHED,
            "lb_expires_ns": self.now + 900 * SECOND,
        }
        return self.add(TCP, (CLIENT, sport, VIP, 80), (BACKEND, 8080, CLIENT, sport), **(known | fields))

    def rows(self, **words: str) -> list[Any]:
        return [row for page in self.report.conntrack(query.parse(words)) for row in page]

    def ports(self, **words: str) -> list[int]:
        return sorted(row["original"]["sport"] for row in self.rows(**words))


@pytest.fixture
def world() -> World:
    return World()


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_balanced_connection_is_listed_with_both_tuples_and_both_states(world):
    row = world.balanced(40000, world.service("default/web"))
    world.flows.tuples["packets"][2 * row], world.flows.tuples["bytes"][2 * row] = 5, 300
    world.flows.tuples["packets"][2 * row + 1], world.flows.tuples["bytes"][2 * row + 1] = 4, 4000
    world.now += 1500 * 1_000_000
    assert world.rows() == [
        {
            "protocol": "tcp",
            "protocol_number": 6,
            "family": "ipv4",
            "state": "ESTABLISHED",
            "timeout_s": 28,
            "age_s": 1.5,
            "original": {"src": CLIENT, "dst": VIP, "sport": 40000, "dport": 80, "packets": 5, "bytes": 300},
            "reply": {"src": BACKEND, "dst": CLIENT, "sport": 8080, "dport": 40000, "packets": 4, "bytes": 4000},
            "icmp": None,
            "status": ["SEEN_REPLY", "ASSURED", "DST_NAT"],
            "mark": 0,
            "service": "default/web",
            "backend": "10.244.1.10:8080",
            "lb_state": "ESTABLISHED",
            "lb_timeout_s": 898,
        }
    ]


def test_a_ping_has_type_code_and_id_instead_of_ports(world):
    world.add(ICMP, (CLIENT, 77, OUTSIDE, 8 << 8), (OUTSIDE, 8 << 8, NODE, 1024), status=SRC_NAT | MASQUERADED)
    (row,) = world.rows()
    assert row["icmp"] == {"type": 8, "code": 0, "id": 77, "reply_type": 0, "reply_id": 1024}
    assert (row["original"]["sport"], row["original"]["dport"], row["reply"]["dport"]) == (0, 0, 0)


def test_a_protocol_without_a_name_is_its_number(world):
    world.add(89, (CLIENT, 0, OUTSIDE, 0))
    assert [(row["protocol"], row["protocol_number"]) for row in world.rows()] == [("89", 89)]


def test_ipv6_flows_say_so(world):
    world.add(UDP, ("2001:db8::1", 53, "2001:db8::2", 53))
    assert [(row["family"], row["original"]["src"]) for row in world.rows()] == [("ipv6", "2001:db8::1")]


def test_a_flow_whose_time_is_up_is_not_listed_though_the_hand_has_not_come_by(world):
    world.add(UDP, (CLIENT, 1, OUTSIDE, 53))
    world.now += 30 * SECOND
    assert world.rows() == []
    assert len(world.flows) == 1


def test_a_deleted_flow_is_not_listed(world):
    flow.delete(world.flows.arrays, world.add(UDP, (CLIENT, 1, OUTSIDE, 53)))
    world.add(UDP, (CLIENT, 2, OUTSIDE, 53))
    flow.delete(world.flows.arrays, world.add(UDP, (CLIENT, 3, OUTSIDE, 53)))
    assert world.ports() == [2]


def test_the_flow_of_a_service_that_is_gone_names_none(world):
    service = world.service("default/web")
    world.balanced(40000, service)
    world.services.delete(service)
    world.service("default/other")  # in the same row
    assert [row["service"] for row in world.rows()] == [""]


def test_the_flow_of_an_earlier_service_of_that_name_is_not_the_services(world):
    service = world.service("default/web")
    world.balanced(40000, service)
    world.services.delete(service)
    assert world.service("default/web") == service
    world.balanced(40001, service)
    assert world.ports(service="web") == [40001]


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(world: World) -> World:
    """Four flows that are told apart by their source ports 1 to 4."""
    web = world.service("default/web")
    world.balanced(1, web)
    world.balanced(2, world.service("shop/web", VIP, 81), state=TcpState.TIME_WAIT, status=SEEN_REPLY | DST_NAT)
    world.add(UDP, (CLIENT, 3, OUTSIDE, 53), (OUTSIDE, 53, NODE, 1024), status=SRC_NAT | MASQUERADED)
    world.add(UDP, ("10.244.2.3", 4, OUTSIDE, 53))
    return world


@pytest.mark.parametrize(
    ("words", "ports"),
    [
        ({}, [1, 2, 3, 4]),
        ({"protocol": "tcp"}, [1, 2]),
        ({"protocol": "17"}, [3, 4]),
        ({"src": CLIENT}, [1, 2, 3]),
        ({"src": "10.244.2.0/24"}, [4]),
        ({"src": "0.0.0.0/0"}, [1, 2, 3, 4]),
        ({"src": "::/0"}, [1, 2, 3, 4]),  # mapped, as everywhere
        ({"src": "2001:db8::/32"}, []),
        ({"dst": VIP}, [1, 2]),
        ({"sport": "2"}, [2]),
        ({"dport": "53"}, [3, 4]),
        ({"reply_src": BACKEND}, [1, 2]),
        ({"reply_dst": NODE}, [3]),
        ({"reply_sport": "8080"}, [1, 2]),
        ({"reply_dport": "1024"}, [3]),
        ({"state": "time_wait"}, [2]),
        ({"status": "assured"}, [1]),
        ({"status": "unreplied"}, [3, 4]),
        ({"status": "seen_reply"}, [1, 2]),
        ({"status": "src_nat"}, [3]),
        ({"status": "dst_nat"}, [1, 2]),
        ({"status": "any_nat"}, [1, 2, 3]),
        ({"status": "balanced"}, [1]),
        ({"service": "web"}, [1]),
        ({"service": "shop/web"}, [2]),
        ({"service": "shop/nothing"}, []),
        ({"protocol": "tcp", "sport": "1", "dst": OUTSIDE}, []),
    ],
)
def test_filters_find_what_passes_all_of_them(words, ports, mixed):
    assert mixed.ports(**words) == ports


def test_the_id_of_a_ping_is_no_port(world):
    world.add(ICMP, (CLIENT, 77, OUTSIDE, 8 << 8))
    assert world.rows(sport="77") == []
    assert len(world.rows(protocol="icmp")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sprot": "1"}, "sprot: no filter of conntrack; expected one of dport, dst"),
        ({"sport": "65536"}, "sport: expected a port from 0 to 65535 .got '65536'."),
        ({"sport": "-1"}, "sport: expected a port"),
        ({"src": "10.244.1"}, "src: expected an address or a prefix"),
        ({"protocol": "tpc"}, "protocol: expected a number from 0 to 255 or one of icmp, tcp"),
        ({"state": "OPEN"}, "state: expected one of NONE, SYN_SENT"),
        ({"service": "/web"}, "service: expected NAME or NAMESPACE/NAME"),
    ],
)
def test_a_filter_that_makes_no_sense_is_named(words, message):
    with pytest.raises(query.QueryError, match=message):
        query.parse(words)


def test_a_query_is_the_same_at_both_ends_of_the_socket():
    wanted = Query(6, ip_network("10.0.0.0/8"), None, 1, 0, state="CLOSE", status="ASSURED", service="a/b", limit=0)
    assert query.parse(wanted.words()) == wanted


def test_only_a_query_without_filters_is_open():
    assert Query().is_open
    assert Query(limit=3).is_open
    assert not Query(dport=0).is_open


# --- pages -----------------------------------------------------------------------------------------------------------


def test_a_limit_cuts_the_listing_and_the_rest_is_counted(world):
    for port in range(10):
        world.add(UDP, (CLIENT, port, OUTSIDE, 53))
    listing = world.report.conntrack(Query(limit=3))
    assert sum(len(page) for page in listing) == 3
    assert listing.matched == 10


def test_a_big_table_comes_in_small_pages_and_whole():
    world = World(2 * CHUNK)
    for port in range(CHUNK + PAGE + 1):
        world.add(UDP, (CLIENT, port & 0xFFFF, OUTSIDE, 53 + (port >> 16)))
    listing = world.report.conntrack(Query(limit=0))
    pages = [len(page) for page in listing]
    assert sum(pages) == listing.matched == CHUNK + PAGE + 1
    assert max(pages) == PAGE


def test_flows_that_go_while_they_are_listed_are_listed_as_they_were(world):
    rows = [world.add(UDP, (CLIENT, port, OUTSIDE, 53)) for port in range(3)]
    pages = iter(world.report.conntrack(Query()))
    next(pages)
    for row in rows:
        flow.delete(world.flows.arrays, row)
    assert [row["original"]["sport"] for page in pages for row in page] == [0, 1, 2]


# --- translations ----------------------------------------------------------------------------------------------------


def test_nat_says_what_a_packet_becomes_and_why(world):
    service = world.service("default/web")
    world.balanced(1, service)
    world.add(
        TCP, (OUTSIDE, 2, VIP, 80), (BACKEND, 8080, NODE, 1024), status=DST_NAT | SRC_NAT, state=TcpState.SYN_SENT
    )
    world.add(TCP, (BACKEND, 3, VIP, 80), (BACKEND, 8080, "169.254.1.1", 3), status=DST_NAT | SRC_NAT)
    world.add(ICMP, (CLIENT, 77, OUTSIDE, 8 << 8), (OUTSIDE, 8 << 8, NODE, 1024), status=SRC_NAT)
    world.add(UDP, (CLIENT, 5, OUTSIDE, 53))
    rows = [row for page in world.report.nat(Query()) for row in page]
    assert [(row["src"], row["sport"], row["new_src"], row["new_sport"]) for row in rows] == [
        (CLIENT, 1, CLIENT, 1),
        (OUTSIDE, 2, NODE, 1024),
        (BACKEND, 3, "169.254.1.1", 3),
        (CLIENT, 77, NODE, 1024),
    ]
    assert [(row["dst"], row["dport"], row["new_dst"], row["new_dport"]) for row in rows] == [
        *[(VIP, 80, BACKEND, 8080)] * 3,
        (OUTSIDE, 0, OUTSIDE, 0),
    ]
    assert [row["why"] for row in rows] == [
        ["service"],
        ["service", "masquerade"],
        ["service", "hairpin"],
        ["outgoing"],
    ]


# --- deletion --------------------------------------------------------------------------------------------------------


def sweeper(world: World) -> Any:
    """The hand, without services: what it finds goes out of the table."""

    def sweep(now: int, rows: int) -> int:
        row, left = flow.next_due(world.flows.arrays, now, rows)
        while row >= 0:
            flow.delete(world.flows.arrays, row)
            row, left = flow.next_due(world.flows.arrays, now, left)
        return 0

    return sweep


def test_deletion_ends_what_passes_and_nothing_else(world):
    for port in range(8):
        world.add(UDP, (CLIENT, port, OUTSIDE, 53))
    world.add(TCP, (CLIENT, 99, OUTSIDE, 53))
    assert sum(world.report.deletion(query.parse({"protocol": "udp", "limit": "1"}), sweeper(world))) == 8
    assert world.ports() == [99]
    assert len(world.flows) == 1


def test_a_big_table_is_emptied_in_steps():
    world = World(2 * CHUNK)
    for port in range(CHUNK + 1):
        world.add(UDP, (CLIENT, port & 0xFFFF, OUTSIDE, 53 + (port >> 16)))
    steps = list(world.report.deletion(Query(), sweeper(world)))
    assert [step for step in steps if step] == [CHUNK, 1]
    assert len(world.flows) == 0


def test_what_begins_while_flows_are_deleted_stays(world):
    world.add(UDP, (CLIENT, 1, OUTSIDE, 53))
    steps = world.report.deletion(Query(), sweeper(world))
    next(steps)
    world.now += SECOND
    world.add(UDP, (CLIENT, 2, OUTSIDE, 53))
    assert sum(steps) == 0
    assert world.ports() == [2]
