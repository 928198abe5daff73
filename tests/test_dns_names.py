"""Cluster DNS by name: the table of the specification, what is the same in all answers, and what changes."""

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from dnslib import QTYPE, DNSRecord

from dataplane.control import dns_zone
from dataplane.control.cluster import Cluster
from dataplane.control.dns import Forward, Responder
from dataplane.control.dns_wire import split, to_wire
from dataplane.control.dns_zone import Zone, hostname
from tests.dns_world import (
    CLUSTER,
    HTTP,
    NOW,
    SERVICES,
    STATE,
    UPSTREAM,
    ask,
    endpoint,
    external,
    question,
    reply,
    service,
    summary,
    zone,
)

TABLE = Path(__file__).parent / "data" / "dns_names.txt"
WEB = "svc1.testns.svc.cluster.local"
HEADLESS = "hdls.testns.svc.cluster.local"


def rows():
    mode = ""
    for line in TABLE.read_text().splitlines():
        if line.startswith("["):
            mode = line.strip("[]")
        elif line and not line.startswith("#"):
            name, kind, expected = line.split(maxsplit=2)
            yield mode, name, kind, expected


ROWS = list(rows())
ZONES = {mode: zone(pods=mode, upstreams=(UPSTREAM,)) for mode in ("disabled", "insecure", "verified")}


def written(found: bytes | Forward) -> str:
    if isinstance(found, Forward):
        return "forward " + (".".join(label for label in labels(found.name)) or ".")
    return summary(DNSRecord.parse(found))


def labels(name: bytes) -> list[str]:
    found = []
    while name[0]:
        found.append(name[1 : 1 + name[0]].decode())
        name = name[1 + name[0] :]
    return found


@pytest.mark.parametrize(("mode", "name", "kind", "expected"), ROWS, ids=[f"{m}-{n}-{k}" for m, n, k, _ in ROWS])
def test_the_table_of_names(mode, name, kind, expected):
    assert written(ask(question(name, kind, size=1232), ZONES[mode])) == expected


@pytest.mark.parametrize(("mode", "name", "kind", "expected"), ROWS, ids=[f"{m}-{n}-{k}" for m, n, k, _ in ROWS])
def test_what_holds_for_every_answer(mode, name, kind, expected):
    data = question(name, kind, number=4711)
    found = ask(data, ZONES[mode], "tcp")
    if isinstance(found, Forward):
        return
    answered = DNSRecord.parse(found)
    assert (answered.header.id, answered.header.qr, answered.header.rd) == (4711, 1, 1)
    assert (answered.header.aa, answered.header.ra, answered.header.tc) == (1, 1, 0)
    assert found[12:][: len(data) - 12] == data[12:]  # the question, in its own case
    ttls = {each.ttl for each in (*answered.rr, *answered.auth, *answered.ar)}
    assert ttls == ({28800} if name.startswith("dns-version") and kind == "TXT" else {5})
    assert bool(answered.auth) == (not answered.rr or "SOA of" in expected)


def test_a_name_keeps_its_case():
    data = question("sVc1.TESTns.svc.cluster.LOCAL")
    found = ask(data, ZONES["disabled"])
    assert isinstance(found, bytes)
    assert b"\x04sVc1\x06TESTns" in found
    assert str(DNSRecord.parse(found).rr[0].rname) == "sVc1.TESTns.svc.cluster.LOCAL."  # the owner points there


@pytest.mark.parametrize("ttl", [0, 30, 3600])
def test_records_live_as_long_as_is_configured(ttl):
    where = zone(ttl=ttl)
    assert reply(question(WEB), where).rr[0].ttl == ttl
    negative = reply(question("none." + WEB), where).auth[0]
    assert (negative.ttl, negative.rdata.times[4]) == (ttl, ttl)
    assert reply(question("dns-version.cluster.local", "TXT"), where).rr[0].ttl == 28800


def test_without_upstreams_other_names_are_refused():
    assert summary(reply(question("www.example.com"), zone())) == "REFUSED"
    assert reply(question(WEB), zone()).header.ra == 0


def test_who_wants_no_recursion_gets_none():
    where = ZONES["disabled"]
    assert summary(reply(question("www.example.com", rd=0), where)) == "REFUSED"
    assert summary(reply(question("external.testns.svc.cluster.local", rd=0), where)) == "CNAME ext.interwebs.test."


def test_an_external_name_without_upstreams_is_its_cname():
    assert summary(reply(question("external.testns.svc.cluster.local"), zone())) == "CNAME ext.interwebs.test."


def test_before_a_state_is_known_nothing_is_said_not_to_exist():
    assert summary(reply(question(WEB), Zone())) == "SERVFAIL"


def test_a_node_without_dns_has_no_names():
    where = Zone()
    where.update(replace(STATE, dns=None), CLUSTER, NOW)
    assert summary(reply(question(WEB), where)) == "REFUSED"


def test_the_domain_may_be_another():
    where = zone(domain="Kube.Example")
    assert summary(reply(question("svc1.testns.svc.kube.example"), where)) == "A 10.96.0.1"
    assert (
        summary(reply(question("kube.example", "NS"), where))
        == "NS ns.dns.kube.example. | ns.dns.kube.example. A 10.96.0.10"
    )
    assert summary(reply(question(WEB), where)) == "REFUSED"


@pytest.mark.parametrize(
    ("address", "name"),
    [("10.0.0.1", "10-0-0-1"), ("fd00::1", "fd00--1"), ("fd00::", "fd00--0"), ("::1", "--1")],
)
def test_an_endpoint_without_a_hostname_is_called_by_its_address(address, name):
    assert hostname(endpoint(address)) == name


def test_hostnames_are_compared_without_case():
    where = zone(replace(STATE, services=(service("db", endpoints=[endpoint("10.244.1.5", hostname="DB-0")]),)))
    assert summary(reply(question("db-0.db.testns.svc.cluster.local"), where)) == "A 10.244.1.5"


def test_what_is_too_long_for_dns_has_no_record():
    long = service("a" * 60, namespace="b" * 60, endpoints=[endpoint("10.244.1.5", hostname="c" * 63)])
    where = zone(replace(STATE, services=(replace(long, name="a" * 64), service("svc1", "10.96.0.1"))))
    assert summary(reply(question("5.1.244.10.in-addr.arpa", "PTR"), where)) == "NXDOMAIN; SOA of 244.10.in-addr.arpa."
    deep = ".".join(["d" * 60] * 2)
    where = zone(replace(STATE, services=(replace(long, namespace="b" * 63),)), domain=deep)
    name = f"{'a' * 60}.{'b' * 63}.svc.{deep}"
    assert summary(reply(question(name), where)) == "A 10.244.1.5"
    assert summary(reply(question(name, "SRV"), where)).startswith("NODATA")  # its target would have 317 bytes


# --- several addresses -----------------------------------------------------------------------------------------------


def test_clients_that_take_the_first_address_are_spread():
    responder = Responder(ZONES["disabled"])
    data = question("hdls.testns.svc.cluster.local")
    firsts = [str(DNSRecord.parse(taken(responder, data)).rr[0].rdata) for _ in range(8)]
    assert firsts == firsts[:4] * 2
    assert sorted(firsts[:4]) == [f"10.244.1.{number}" for number in (12, 13, 14, 15)]


def test_clients_whose_every_question_is_another_are_spread_too():
    responder = Responder(ZONES["disabled"])
    cookies = (question("hdls.testns.svc.cluster.local") + number.to_bytes(8) for number in range(8))
    firsts = [str(DNSRecord.parse(taken(responder, data)).rr[0].rdata) for data in cookies]
    assert sorted(firsts) == sorted([f"10.244.1.{number}" for number in (12, 13, 14, 15)] * 2)


def test_more_addresses_than_orders_are_begun_with_all_over():
    services = (service("many", endpoints=[f"10.244.2.{number}" for number in range(64)]),)
    responder = Responder(zone(replace(STATE, services=services)))
    data = question("many.testns.svc.cluster.local", size=1232)
    firsts = {str(DNSRecord.parse(taken(responder, data)).rr[0].rdata) for _ in range(17)}
    assert firsts >= {f"10.244.2.{number}" for number in range(4, 64, 4)}


def test_what_leads_to_addresses_stays_in_front_of_them():
    services = (external("alias", "hdls.testns.svc.cluster.local"), *SERVICES)
    responder = Responder(zone(replace(STATE, services=services)))
    data = question("alias.testns.svc.cluster.local")
    for _ in range(5):
        records = DNSRecord.parse(taken(responder, data)).rr
        assert [QTYPE[each.rtype] for each in records] == ["CNAME", "A", "A", "A", "A"]


def taken(responder: Responder, data: bytes) -> bytes:
    found = responder.respond(data, "udp")
    assert isinstance(found, bytes)
    return found


def test_ports_of_one_service_are_weighed_alike():
    services = (service("many", endpoints=[f"10.244.{number >> 8}.{number & 255}" for number in range(200)]),)
    answered = reply(question("many.testns.svc.cluster.local", "SRV"), zone(replace(STATE, services=services)), "tcp")
    assert {each.rdata.weight for each in answered.rr} == {1}  # 100/200, but never 0: that would mean never
    assert len(answered.rr) == 200


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_what_was_found_is_not_looked_for_again(monkeypatch):
    where = zone(upstreams=(UPSTREAM,))
    responder = Responder(where)
    looked: list[tuple[str, ...]] = []
    look = where._at

    def noted(labels, kind):
        looked.append(labels)
        return look(labels, kind)

    monkeypatch.setattr(where, "_at", noted)
    for number in range(10):
        name = "".join(letter.upper() if number >> place & 1 else letter for place, letter in enumerate(HEADLESS))
        for kind in ("A", "AAAA", "SRV", "ANY", 64, 65):
            taken(responder, question(name, kind) + number.to_bytes(8))  # as much as a cookie
    assert len(looked) == 4  # the last two are none of ours
    for number in range(10):
        taken(responder, question(f"x{number}.{HEADLESS}") * 2)
    assert len(looked) == 14
    assert len(where._kept) == 4
    assert where.update(replace(STATE, services=SERVICES[1:]), CLUSTER, NOW)
    taken(responder, question(HEADLESS, number=1))
    taken(responder, question(HEADLESS) + bytes(9))
    assert len(looked) == 15


def test_what_was_found_is_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(dns_zone, "_KEPT", 100)
    where = zone(pods="insecure")
    for number in range(100):
        assert where.find((f"10-0-0-{number}", "testns", "pod", "cluster", "local"), 1)
        assert len(where._kept) * 9 <= 100
    assert where._kept


def test_an_answer_that_was_given_before_has_the_new_number():
    responder = Responder(ZONES["disabled"])
    for number in (1, 2, 65535):
        found = taken(responder, question(WEB, number=number))
        assert DNSRecord.parse(found).header.id == number
        assert summary(DNSRecord.parse(found)) == "A 10.96.0.1"


def test_a_changed_endpoint_is_seen_at_once():
    where = zone()
    responder = Responder(where)
    data = question("hdlsprtls.testns.svc.cluster.local")
    assert summary(DNSRecord.parse(taken(responder, data))) == "A 10.244.1.20"
    new = service("hdlsprtls", ports=(), endpoints=["10.244.1.20", "10.244.1.21"])
    services = tuple(new if each.name == "hdlsprtls" else each for each in SERVICES)
    assert where.update(replace(STATE, services=services), CLUSTER, NOW)
    responder.forget()
    assert summary(DNSRecord.parse(taken(responder, data))) == "A 10.244.1.20; A 10.244.1.21"


def test_the_serial_grows_with_each_change_and_only_then():
    where = zone()
    first = where.serial
    assert first == int(NOW)
    assert not where.update(STATE, CLUSTER, NOW + 9)
    assert where.serial == first
    assert where.update(replace(STATE, services=SERVICES[1:]), CLUSTER, NOW)
    assert where.serial == first + 1
    assert where.update(STATE, CLUSTER, NOW + 100)
    assert where.serial == int(NOW) + 100


def test_counters_tell_what_was_asked_and_answered():
    responder = Responder(ZONES["disabled"])
    for _ in range(3):
        responder.respond(question(WEB), "udp")
    responder.respond(question("none." + WEB), "tcp")
    responder.respond(question("www.example.com", "AAAA"), "udp")
    responder.respond(question(WEB, "AXFR"), "tcp")
    responder.respond(question(WEB, 65280), "udp")
    responder.respond(b"\0" * 12, "udp")
    responder.respond(b"\0", "udp")
    responder.forget()
    requests, responses = responder.counters()
    assert requests == {
        ("udp", "A"): 3,
        ("tcp", "A"): 1,
        ("udp", "AAAA"): 1,
        ("tcp", "AXFR"): 1,
        ("udp", "other"): 2,
    }
    assert responses == {"NOERROR": 4, "NXDOMAIN": 1, "REFUSED": 1, "FORMERR": 1}
    assert responder.dropped == 1


def test_what_is_kept_is_bounded():
    responder = Responder(ZONES["disabled"])
    for number in range(20_000):
        responder.respond(question(f"x{number}.testns.svc.cluster.local"), "udp")
    assert len(responder._kept["udp"]) <= 8192
    long = question(WEB) + bytes(60_000)
    for number in range(2_000):
        responder.respond(long + number.to_bytes(2), "tcp")
    assert sum(map(len, responder._kept["tcp"])) < 17 << 20
    assert sum(responder.counters()[1].values()) == 22_000


def test_names_that_are_written_with_dots_become_bytes():
    assert to_wire(split("a.bc.")) == b"\x01a\x02bc\0"
    assert to_wire(split(".")) == b"\0"
    assert len(to_wire(["a" * 63] * 3 + ["a" * 61])) == 255
    with pytest.raises(ValueError, match="a name has at most 255 bytes"):
        to_wire(["a" * 63] * 3 + ["a" * 62])
    for wrong in ("a..b", "a" * 64, ".".join(["a" * 63] * 4)):
        with pytest.raises(ValueError, match=r"a label has|a name has"):
            to_wire(split(wrong))


def test_an_address_of_two_services_is_the_first_ones():
    services = (service("b", "10.96.0.1"), service("a", "10.96.0.1"), service("c", endpoints=["10.96.0.1"]))
    where = zone(replace(STATE, services=services))
    assert summary(reply(question("1.0.96.10.in-addr.arpa", "PTR"), where)) == "PTR a.testns.svc.cluster.local."


def test_an_endpoint_of_several_headless_services_has_several_names():
    services = tuple(service(name, endpoints=["10.244.1.5"]) for name in "ba")
    where = zone(replace(STATE, services=services), Cluster())
    names = [str(each.rdata) for each in reply(question("5.1.244.10.in-addr.arpa", "PTR"), where).rr]
    assert names == [f"10-244-1-5.{name}.testns.svc.cluster.local." for name in "ab"]


def test_an_endpoint_outside_the_cluster_has_a_name_too():
    where = zone(replace(STATE, services=(service("far", endpoints=["198.51.100.7"], ports=(HTTP,)),)))
    assert (
        summary(reply(question("7.100.51.198.in-addr.arpa", "PTR"), where))
        == "PTR 198-51-100-7.far.testns.svc.cluster.local."
    )
    assert summary(reply(question("7.100.51.198.in-addr.arpa", "A"), where)).startswith("NODATA; SOA of 7.100.51.198")
    assert ip_address("198.51.100.7").packed in where.index._holders
