"""Whom to ask next, what is kept of what they said, and what a client gets of it."""

from ipaddress import ip_address

import pytest
from dnslib import CNAME, NS, QTYPE, RR, SOA, A, DNSRecord

from dataplane.control.dns import Forward
from dataplane.control.dns_answer import read_answer
from dataplane.control.dns_upstream import ALOOF_S, KEPT_S, Cache, Servers, finish
from tests.dns_world import UPSTREAM, ask, question, summary, zone
from tests.test_dns_wire import NAME, upstream

ONE, TWO, THREE = ((ip_address(f"192.0.2.{number}"), 53) for number in (1, 2, 3))
EXT = b"\x03ext\x09interwebs\x04test\0"
WHERE = zone(upstreams=(UPSTREAM,))


def answer(*sections, name="www.example.com", raw=NAME, **keys):
    found = read_answer(upstream(*sections, name=name, **keys), 99, raw, 1)
    assert found is not None
    return found


def address(ttl=60, name="www.example.com", data="203.0.113.1"):
    return RR(name, ttl=ttl, rdata=A(data))


def soa(ttl=20):
    return RR("example.com", QTYPE.SOA, ttl=ttl, rdata=SOA("ns.example.com", "root.example.com", (1, 2, 3, 4, ttl)))


def forwarded(name: str, *, size: int = 0, transport="udp") -> Forward:
    found = ask(question(name, size=size), WHERE, transport)
    assert isinstance(found, Forward)
    return found


# --- servers ---------------------------------------------------------------------------------------------------------


def test_servers_are_asked_in_turn():
    servers = Servers()
    assert servers.order(0) == []
    servers.configure((ONE, TWO, THREE))
    assert [servers.order(0) for _ in range(4)] == [
        [ONE, TWO, THREE],
        [TWO, THREE, ONE],
        [THREE, ONE, TWO],
        [ONE, TWO, THREE],
    ]


def test_who_did_not_answer_comes_last_for_a_while():
    servers = Servers()
    servers.configure((ONE, TWO))
    servers.failed(ONE, 100.0)
    assert [servers.order(100.0)[0] for _ in range(3)] == [TWO] * 3
    assert servers.is_aloof(ONE, 100.0 + ALOOF_S - 0.1)
    assert {servers.order(100.0 + ALOOF_S)[0] for _ in range(2)} == {ONE, TWO}
    servers.failed(ONE, 200.0)
    servers.answered(ONE)
    assert not servers.is_aloof(ONE, 200.0)
    assert (servers.failures[ONE], servers.asked[ONE]) == (2, 3)


def test_a_new_list_of_servers_is_one():
    servers = Servers()
    assert servers.configure((ONE, TWO))
    assert not servers.configure((ONE, TWO))
    servers.failed(ONE, 0)
    assert servers.configure((ONE,))
    assert servers.order(0) == [ONE]
    assert servers.failures == {ONE: 1}


# --- cache -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_kept_as_long_as_its_shortest_ttl():
    cache = Cache()
    cache.put(NAME, 1, answer([address(60), address(7)]), 100.0)
    assert cache.get(NAME.upper(), 1, 106.9) == (answer([address(60), address(7)]), 6)
    assert cache.get(NAME, 1, 107.0) is None
    assert cache.get(NAME, 28, 106.9) is None
    assert (cache.hits, cache.misses) == (1, 2)


def test_no_answer_is_kept_for_long():
    cache = Cache()
    cache.put(NAME, 1, answer([address(86400)]), 0.0)
    assert cache.get(NAME, 1, KEPT_S - 0.1)
    assert cache.get(NAME, 1, KEPT_S) is None


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        (True, answer([], [soa()], rcode=3)),
        (True, answer([], [soa()])),
        (False, answer([], [], rcode=3)),
        (False, answer([], [RR("example.com", QTYPE.NS, ttl=60, rdata=NS("ns.example.com"))])),
        (False, answer([address(0)])),
        (False, answer([address()], rcode=2)),
        (False, answer([address()], rcode=5)),
        (False, answer([address(data=f"203.0.113.{number}") for number in range(250)] * 2)),
    ],
    ids=[
        "no such name",
        "no data",
        "no such name, nobody says how long",
        "a referral",
        "ttl 0",
        "failed",
        "refused",
        "long",
    ],
)
def test_what_is_kept(kept, found):
    cache = Cache()
    cache.put(NAME, 1, found, 0.0)
    assert bool(cache.get(NAME, 1, 0.5)) == kept


def test_a_truncated_answer_is_not_kept():
    found = read_answer(upstream([address()])[:2] + b"\x83" + upstream([address()])[3:], 99, NAME, 1)
    assert found is not None
    assert found.truncated
    cache = Cache()
    cache.put(NAME, 1, found, 0.0)
    assert len(cache) == 0


def test_the_cache_is_bounded_and_forgets_the_oldest():
    cache = Cache()
    found = answer([address()])
    for number in range(10_100):
        cache.put(b"%d" % number, 1, found, 0.0)
    assert len(cache) == 10_000
    assert cache.get(b"99", 1, 1.0) is None
    assert cache.get(b"100", 1, 1.0)
    large = answer([address(data=f"203.0.113.{number}") for number in range(240)])
    assert 3800 < len(large.message) <= 4096
    for number in range(10_000):
        cache.put(b"x%d" % number, 1, large, 0.0)
    assert sum(len(held[0].message) for held in cache._held.values()) <= 16 << 20
    cache.clear()
    assert (len(cache), cache._bytes) == (0, 0)


# --- what the client gets --------------------------------------------------------------------------------------------


def test_without_an_answer_the_client_hears_of_a_failure():
    found = DNSRecord.parse(finish(forwarded("www.example.com", size=1232), None, 0))
    assert (summary(found), found.header.id, found.header.ra) == ("SERVFAIL", 7, 1)


def test_an_answer_is_handed_on():
    found = DNSRecord.parse(finish(forwarded("www.example.com"), answer([address()]), 10))
    assert (summary(found), found.rr[0].ttl) == ("A 203.0.113.1", 50)


def test_a_failure_is_handed_on():
    assert summary(DNSRecord.parse(finish(forwarded("www.example.com"), answer(rcode=2), 0))) == "SERVFAIL"


def test_what_an_external_name_leads_to_follows_its_cname():
    forward = forwarded("External.testns.svc.cluster.local", size=1232)
    assert forward.name == EXT
    rows = [
        RR("ext.interwebs.test", QTYPE.CNAME, ttl=60, rdata=CNAME("a.interwebs.test")),
        address(name="a.interwebs.test"),
    ]
    found = DNSRecord.parse(finish(forward, answer(rows, name="ext.interwebs.test", raw=EXT), 10))
    assert [(str(each.rname), each.ttl, str(each.rdata)) for each in found.rr] == [
        ("External.testns.svc.cluster.local.", 5, "ext.interwebs.test."),
        ("ext.interwebs.test.", 50, "a.interwebs.test."),
        ("a.interwebs.test.", 50, "203.0.113.1"),
    ]
    assert (found.header.aa, found.header.ra, found.ar[0].edns_len) == (1, 1, 1232)


def test_two_steps_inside_the_cluster_and_one_outside():
    forward = forwarded("external-to-external.testns.svc.cluster.local")
    found = DNSRecord.parse(
        finish(forward, answer([address(name="ext.interwebs.test")], name="ext.interwebs.test", raw=EXT), 0)
    )
    assert [f"{each.rname} {each.rdata}" for each in found.rr] == [
        "external-to-external.testns.svc.cluster.local. external.testns.svc.cluster.local.",
        "external.testns.svc.cluster.local. ext.interwebs.test.",
        "ext.interwebs.test. 203.0.113.1",
    ]


@pytest.mark.parametrize(("rcode", "text"), [(0, ""), (3, "NXDOMAIN; ")])
def test_an_external_name_that_leads_to_nothing_says_so(rcode, text):
    forward = forwarded("external.testns.svc.cluster.local")
    nothing = answer([], [soa()], rcode=rcode, name="ext.interwebs.test", raw=EXT)
    found = summary(DNSRecord.parse(finish(forward, nothing, 0)))
    assert found == f"{text}CNAME ext.interwebs.test.; SOA of example.com."


def test_an_external_name_with_many_addresses_is_cut_for_udp():
    forward = forwarded("external.testns.svc.cluster.local")
    rows = [address(name="ext.interwebs.test", data=f"203.0.113.{number}") for number in range(100)]
    whole = answer(rows, name="ext.interwebs.test", raw=EXT)
    data = finish(forward, whole, 0)
    assert len(data) <= 512
    assert DNSRecord.parse(data).header.tc == 1
    forward = forwarded("external.testns.svc.cluster.local", transport="tcp")
    assert len(DNSRecord.parse(finish(forward, whole, 0)).rr) == 101


def test_what_is_cut_behind_a_cname_says_so():
    whole = upstream([address(name="ext.interwebs.test")], name="ext.interwebs.test")
    for message, cut in ((whole, 0), (whole[:2] + bytes((whole[2] | 2,)) + whole[3:], 1)):
        found = read_answer(message, 99, EXT, 1)
        data = finish(forwarded("external.testns.svc.cluster.local", transport="tcp"), found, 0)
        assert DNSRecord.parse(data).header.tc == cut
