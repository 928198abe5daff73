"""The gate for questions and for upstreams' answers, what fits into an answer, and bytes that nobody should send."""

import random
from dataclasses import replace

import pytest
from dnslib import CNAME, EDNS0, MX, NS, QTYPE, RR, SOA, SRV, A, DNSLabel, DNSQuestion, DNSRecord, EDNSOption
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import TCP, UDP
from scapy.packet import split_layers

from dataplane.control.dns import Forward, Responder
from dataplane.control.dns_answer import Answer, adopt, read_answer, read_name, records
from dataplane.control.dns_wire import (
    Edns,
    Query,
    Rcode,
    Rejected,
    labels_of,
    name_end,
    read_query,
    write_question,
)
from tests.dns_world import STATE, UPSTREAM, ask, parsed, question, reply, service, summary, zone

for port in (53, 5353):  # other tests read noise that is sent to DNS's port, and it has to stay as it is
    for field in ({"sport": port}, {"dport": port}):
        split_layers(UDP, DNS, **field)
        split_layers(TCP, DNS, **field)

WEB = "svc1.testns.svc.cluster.local"
WHERE = zone(pods="insecure", upstreams=(UPSTREAM,))
LABEL = st.binary(min_size=1, max_size=63)


def header(*, number=7, flags=0x0100, counts=(1, 0, 0, 0)) -> bytes:
    return b"".join(word.to_bytes(2) for word in (number, flags, *counts))


BODY = question(WEB)[12:]
OPT = b"\0\0\x29\x04\xd0\0\0\0\0\0\0"


# --- questions -------------------------------------------------------------------------------------------------------


def test_a_question_is_read():
    data = question("Www.Example.COM", "AAAA", number=513, size=4096)
    query = read_query(data)
    assert isinstance(query, Query)
    assert (query.id, query.type, query.klass, query.edns) == (513, 28, 1, Edns(4096, 0))
    assert query.labels == ("www", "example", "com")
    assert query.name == b"\x03Www\x07Example\x03COM\0"
    assert query.question == data[12:33]


def test_scapys_question_is_the_same():
    data = bytes(DNS(id=513, rd=1, qd=DNSQR(qname="www.example.com", qtype="AAAA")))
    assert parsed(data) == parsed(question("www.example.com", "AAAA", number=513))


@given(st.lists(LABEL, max_size=5), st.integers(1, 0xFFFF).filter(lambda kind: kind != 41))
def test_what_dnslib_writes_is_read_as_it_was_meant(labels, kind):
    record = DNSRecord(q=DNSQuestion(DNSLabel(tuple(labels)), kind))
    if sum(len(label) + 1 for label in labels) > 250:
        return
    query = parsed(bytes(record.pack()))
    assert query.labels == tuple(label.lower().decode("latin-1") for label in labels)
    assert query.type == kind


BAD = {
    "an opcode": (header(flags=0x2900) + BODY, Rcode.NOTIMP),
    "an update": (header(flags=0x2800, counts=(0, 0, 0, 0)), Rcode.NOTIMP),
    "no question": (header(counts=(0, 0, 0, 0)), Rcode.FORMERR),
    "two questions": (header(counts=(2, 0, 0, 0)) + BODY + BODY, Rcode.FORMERR),
    "an answer in it": (header(counts=(1, 1, 0, 0)) + BODY + b"\0" * 11, Rcode.FORMERR),
    "many authorities": (header(counts=(1, 0, 2, 0)) + BODY + (b"\0\0\6" + b"\0" * 8) * 2, Rcode.FORMERR),
    "many extras": (header(counts=(1, 0, 0, 3)) + BODY + OPT, Rcode.FORMERR),
    "a cut name": (header() + b"\x05abc", Rcode.FORMERR),
    "a name without an end": (header() + b"\x03abc", Rcode.FORMERR),
    "a name without a type": (header() + b"\x03abc\0\0\x01", Rcode.FORMERR),
    "a pointer to itself": (header() + b"\xc0\x0c\0\x01\0\x01", Rcode.FORMERR),
    "a pointer forward": (header() + b"\xc0\x20\0\x01\0\x01", Rcode.FORMERR),
    "a pointer that ends with a zero": (header() + b"\x03abc\xc0\0\0\x01\0\x01", Rcode.FORMERR),
    "a pointer at the end": (header() + b"\xc0", Rcode.FORMERR),
    "a label of 64": (header() + b"\x40" + b"a" * 64 + b"\0\0\x01\0\x01", Rcode.FORMERR),
    "a label of 191": (header() + b"\xbf" + b"a" * 191 + b"\0\0\x01\0\x01", Rcode.FORMERR),
    "a name of 256": (
        header() + b"\x3f" * 1 + b"a" * 63 + (b"\x3f" + b"a" * 63) * 3 + b"\0\0\x01\0\x01",
        Rcode.FORMERR,
    ),
    "two opts": (header(counts=(1, 0, 0, 2)) + BODY + OPT + OPT, Rcode.FORMERR),
    "an opt with a name": (header(counts=(1, 0, 0, 1)) + BODY + b"\x01a" + OPT, Rcode.FORMERR),
    "an opt among authorities": (header(counts=(1, 0, 1, 0)) + BODY + OPT, Rcode.FORMERR),
    "a cut opt": (header(counts=(1, 0, 0, 1)) + BODY + OPT[:-1], Rcode.FORMERR),
    "an opt longer than the message": (header(counts=(1, 0, 0, 1)) + BODY + OPT[:-2] + b"\0\x09", Rcode.FORMERR),
    "an opt that is promised": (header(counts=(1, 0, 0, 1)) + BODY, Rcode.FORMERR),
    "a question for opt": (question(WEB, "OPT"), Rcode.FORMERR),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_question_gets_a_code_and_its_number(what):
    data, rcode = BAD[what]
    found = read_query(data)
    assert isinstance(found, Rejected)
    answered = DNSRecord.parse(found.reply)
    assert (answered.header.id, answered.header.qr, answered.header.rcode) == (7, 1, rcode)
    assert answered.header.opcode == data[2] >> 3 & 15
    assert len(found.reply) == 12


@pytest.mark.parametrize(
    "data",
    [b"", header()[:11], header(flags=0x8180) + BODY, header(flags=0xA900) + BODY, header(flags=0x8000)],
    ids=["nothing", "half a header", "an answer", "an answer to an update", "an empty answer"],
)
def test_what_could_go_round_in_circles_gets_no_answer(data):
    assert read_query(data) is None


def test_the_longest_name_is_read():
    name = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0"
    assert len(name) == 255
    query = parsed(header() + name + b"\0\x01\0\x01")
    assert query.name == name
    assert isinstance(ask(header() + name + b"\0\x01\0\x01", WHERE), Forward)


def test_labels_may_hold_any_bytes_and_dots_are_no_borders():
    odd = b"\x04\x00.\xffA\x00"
    assert labels_of(odd) == ("\x00.\xffa",)
    assert name_end(odd, 0) == 6
    hidden = header() + b"\x1dsvc1.testns.svc.cluster.local\0\0\x01\0\x01"
    assert isinstance(ask(hidden, WHERE), Forward)


def test_a_signature_and_an_ixfr_s_soa_do_not_harm():
    tsig = b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\0"
    query = parsed(header(counts=(1, 0, 0, 2)) + BODY + OPT + tsig)
    assert query.edns == Edns(1232, 0)
    soa = b"\xc0\x0c\0\x06\0\x01\0\0\0\0\0\0"
    ixfr = header(counts=(1, 0, 1, 0)) + question(WEB, "IXFR")[12:] + soa
    assert summary(reply(ixfr, WHERE)) == "REFUSED"


# --- answers that are not about names --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AXFR", "IXFR"])
@pytest.mark.parametrize("name", ["cluster.local", WEB, "www.example.com", "96.10.in-addr.arpa"])
def test_nobody_gets_the_whole_zone(name, kind):
    assert summary(reply(question(name, kind), WHERE, "tcp")) == "REFUSED"


@pytest.mark.parametrize("klass", [0, 3, 4, 254, 255])
def test_other_classes_are_refused(klass):
    data = question(WEB)
    assert summary(reply(data[:-2] + klass.to_bytes(2), WHERE)) == "REFUSED"


def test_a_later_edns_is_told_which_one_is_spoken():
    answered = reply(question(WEB, size=1232, version=1), WHERE)
    opt = answered.ar[0]
    assert (answered.header.rcode, opt.edns_rcode, opt.edns_ver, opt.edns_len) == (0, 1, 0, 1232)  # 16: BADVERS
    assert not answered.rr


def test_edns_is_answered_by_edns_and_its_options_are_left_alone():
    record = DNSRecord(q=DNSQuestion(WEB))
    record.add_ar(EDNS0(flags="do", udp_len=4096, opts=[EDNSOption(10, b"cookie01"), EDNSOption(65001, b"")]))
    answered = reply(bytes(record.pack()), WHERE)
    opt = answered.ar[0]
    assert (summary(answered), opt.rtype, opt.edns_len, opt.edns_do, opt.rdata) == (
        "A 10.96.0.1",
        QTYPE.OPT,
        1232,
        0,
        [],
    )
    assert not reply(question(WEB), WHERE).ar


# --- what fits -------------------------------------------------------------------------------------------------------


def many(count: int):
    endpoints = [f"10.244.{number >> 8}.{number & 255}" for number in range(count)]
    return zone(replace(STATE, services=(service("many", endpoints=endpoints),)))


MANY = "many.testns.svc.cluster.local"


@pytest.mark.parametrize(
    ("size", "limit"), [(0, 512), (100, 512), (512, 512), (800, 800), (1232, 1232), (4096, 1232), (65535, 1232)]
)
def test_an_answer_is_not_longer_than_its_client_takes(size, limit):
    where = many(200)
    found = ask(question(MANY, size=size), where)
    assert isinstance(found, bytes)
    answered = DNSRecord.parse(found)
    assert limit - 16 < len(found) <= limit  # no other address would have fitted
    assert (answered.header.tc, answered.header.rcode) == (1, 0)
    assert bool(answered.ar) == bool(size)
    whole = reply(question(MANY, size=size), where, "tcp")
    assert (len(whole.rr), whole.header.tc) == (200, 0)


def test_what_just_fits_is_not_cut():
    for count in range(20, 40):
        found = ask(question(MANY), many(count))
        assert isinstance(found, bytes)
        answered = DNSRecord.parse(found)
        assert answered.header.tc == (len(answered.rr) < count)
        assert len(found) <= 512
    assert answered.header.tc


def test_additional_records_go_before_answers_and_silently():
    for count in range(1, 30):
        answered = reply(question(MANY, "SRV"), many(count))
        assert answered.header.tc == (len(answered.rr) < count)
        assert len(answered.ar) <= count
        if len(answered.ar) < count and len(answered.rr) == count:
            return
    pytest.fail("there is always room")


def test_even_tcp_has_an_end():
    found = ask(question(MANY, "SRV"), many(3_000), "tcp")
    assert isinstance(found, bytes)
    assert len(found) <= 65535
    assert DNSRecord.parse(found).header.tc == 1


def test_truncated_answers_take_turns_too():
    where = many(200)
    seen = set()
    for turn in range(200):
        seen |= {str(each.rdata) for each in reply(question(MANY), where, turn=turn).rr}
    assert len(seen) == 200


# --- upstreams -------------------------------------------------------------------------------------------------------

NAME = b"\x03www\x07example\x03com\0"


def upstream(
    *sections: list[RR], rcode: int = 0, name: str = "www.example.com", kind: int = 1, opt: bool = True
) -> bytes:
    record = DNSRecord(q=DNSQuestion(name, kind))
    record.header.id, record.header.qr, record.header.ra, record.header.rcode = 99, 1, 1, rcode
    for add, each in zip((record.add_answer, record.add_auth, record.add_ar), sections, strict=False):
        add(*each)
    if opt:
        record.add_ar(EDNS0(udp_len=4096))
    return bytes(record.pack())


ANSWER = upstream(
    [
        RR("www.example.com", QTYPE.CNAME, ttl=60, rdata=CNAME("web.example.com")),
        RR("web.example.com", ttl=20, rdata=A("203.0.113.1")),
    ],
    [RR("example.com", QTYPE.NS, ttl=900, rdata=NS("ns.example.com"))],
    [RR("ns.example.com", ttl=900, rdata=A("203.0.113.53"))],
)


def read(message: bytes, number: int = 99, name: bytes = NAME, kind: int = 1) -> Answer | None:
    return read_answer(message, number, name, kind)


def test_a_question_to_an_upstream_wants_recursion_and_speaks_edns():
    record = DNSRecord.parse(write_question(99, NAME, 28))
    assert (record.header.id, record.header.rd, str(record.q.qname), record.q.qtype) == (99, 1, "www.example.com.", 28)
    assert record.ar[0].edns_len == 1232


def test_an_upstreams_answer_becomes_the_clients():
    answer = read(ANSWER)
    assert answer is not None
    assert answer.lifetime == 20
    query = parsed(question("WWW.example.com", number=1234, size=1232))
    answered = DNSRecord.parse(adopt(query, answer, 5, 1232))
    assert (answered.header.id, answered.header.ra, answered.header.aa, answered.header.tc) == (1234, 1, 0, 0)
    assert str(answered.q.qname) == "WWW.example.com."
    assert [(str(each.rname), each.ttl, str(each.rdata)) for each in answered.rr] == [
        ("WWW.example.com.", 55, "web.example.com."),
        ("web.example.com.", 15, "203.0.113.1"),
    ]
    assert [each.ttl for each in answered.auth] == [895]
    assert [each.rtype for each in answered.ar] == [QTYPE.A, QTYPE.OPT]
    assert [each.rtype for each in DNSRecord.parse(adopt(parsed(question("www.example.com")), answer, 0, 512)).ar] == [
        1
    ]


def test_an_answer_that_does_not_fit_leaves_only_the_news_of_that():
    message = upstream([RR("www.example.com", rdata=A(f"203.0.113.{number}")) for number in range(100)])
    answer = read(message)
    assert answer is not None
    answered = DNSRecord.parse(adopt(parsed(question("www.example.com")), answer, 0, 512))
    assert (answered.header.tc, len(answered.rr), answered.header.rcode) == (1, 0, 0)
    assert len(DNSRecord.parse(adopt(parsed(question("www.example.com")), answer, 0, 65535)).rr) == 100


LIES = {
    "another number": ANSWER[:1] + b"\0" + ANSWER[2:],
    "a question": ANSWER[:2] + b"\x01" + ANSWER[3:],
    "another opcode": ANSWER[:2] + b"\xa9" + ANSWER[3:],
    "no question": ANSWER[:4] + b"\0\0" + ANSWER[6:],
    "another name": upstream(name="www.example.org"),
    "a longer name": upstream(name="a.www.example.com"),
    "another type": upstream(kind=28),
    "another class": ANSWER[:31] + b"\0\3" + ANSWER[33:],
    "too short": ANSWER[:11],
    "a cut record": ANSWER[:60],
    "records that are promised": ANSWER[:6] + b"\xff\xff" + ANSWER[8:],
}


@pytest.mark.parametrize("what", LIES)
def test_what_does_not_answer_the_question_is_nothing(what):
    assert LIES[what] != ANSWER
    assert read(LIES[what]) is None


def test_an_answer_may_have_another_case():
    assert read(ANSWER.replace(b"\x03www", b"\x03wWw")) is not None


def test_what_follows_opt_is_left_out():
    message = upstream([RR("www.example.com", rdata=A("203.0.113.1"))])
    message = message[:11] + b"\2" + message[12:] + b"\xc0\x0c\0\x01\0\x01\0\0\0\1\0\4abcd"
    assert len(DNSRecord.parse(message).ar) == 2
    answer = read(message)
    assert answer is not None
    assert answer.counts == (1, 0, 0)
    assert len(DNSRecord.parse(adopt(parsed(question("www.example.com")), answer, 0, 512)).rr) == 1


def test_records_are_taken_out_with_all_their_names():
    rows = [
        RR("www.example.com", QTYPE.CNAME, ttl=60, rdata=CNAME("a.example.com")),
        RR("www.example.com", QTYPE.MX, ttl=60, rdata=MX("mail.example.com", 10)),
        RR("www.example.com", QTYPE.SRV, ttl=60, rdata=SRV(1, 2, 3, "srv.example.com")),
        RR("www.example.com", QTYPE.A, ttl=60, rdata=A("203.0.113.1")),
    ]
    soa = RR("example.com", QTYPE.SOA, ttl=60, rdata=SOA("ns.example.com", "root.example.com", (1, 2, 3, 4, 60)))
    answer = read(upstream(rows, [soa]))
    assert answer is not None
    found = [*records(answer, 10)]
    assert [(each.type, each.ttl) for each in found] == [(5, 50), (15, 50), (33, 50), (1, 50), (6, 50)]
    assert found[0].data == b"\x01a\x07example\x03com\0"
    assert found[1].data == b"\0\x0a\x04mail\x07example\x03com\0"
    assert found[2].data == b"\0\1\0\2\0\3\x03srv\x07example\x03com\0"
    assert found[4].data.startswith(b"\x02ns\x07example\x03com\0\x04root\x07example\x03com\0\0\0\0\1")
    assert (found[4].prefix, found[4].suffix) == (b"\x07example\x03com", 1)


def test_that_there_is_nothing_is_true_as_long_as_the_soa_says():
    for ttl, minimum, lifetime in ((900, 7, 7), (7, 900, 7)):
        soa = RR(
            "example.com", QTYPE.SOA, ttl=ttl, rdata=SOA("ns.example.com", "root.example.com", (1, 2, 3, 4, minimum))
        )
        answer = read(upstream([], [soa], rcode=3))
        assert answer is not None
        assert answer.lifetime == lifetime
        assert DNSRecord.parse(adopt(parsed(question("www.example.com")), answer, 2, 512)).auth[0].ttl == lifetime - 2
        assert [each.ttl for each in records(answer, 2)] == [lifetime - 2]


@pytest.mark.parametrize(
    ("message", "at", "name"),
    [
        (b"\x01a\0", 0, b"\x01a\0"),
        (b"\x01a\0\x01b\xc0\0", 3, b"\x01b\x01a\0"),
        (b"\xc0\0", 0, None),
        (b"\x01a\xc0\0", 0, None),
        (b"\xc0\2\xc0\0", 2, None),
        (b"\xc0\3\0\0", 0, None),
        (b"\0\xc0", 1, None),
        (b"\x05abc", 0, None),
        (b"\x40" + b"a" * 64 + b"\0", 0, None),
        (b"\0" + (b"\x3f" + b"a" * 63) * 4 + b"\0", 1, None),
        (b"", 0, None),
    ],
)
def test_names_with_pointers(message, at, name):
    assert read_name(message, at) == name


# --- any bytes -------------------------------------------------------------------------------------------------------

SEEDS = [
    question(WEB),
    question("hdls.testns.svc.cluster.local", "SRV", size=1232),
    question("external-to-service.testns.svc.cluster.local", size=512),
    question("12.1.244.10.in-addr.arpa", "PTR", size=4096),
    question("6.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa", "PTR"),
    question("10-0-0-1.testns.pod.cluster.local", "ANY"),
    question("cluster.local", "NS"),
]


def endure(responder: Responder, data: bytes) -> None:
    """A message is answered with its own number and as an answer, forwarded, or dropped; and none of it raises."""
    for transport in ("udp", "tcp"):
        found = responder.respond(data, transport)
        again = responder.respond(data, transport)
        assert type(found) is type(again)
        if isinstance(found, bytes):
            assert found[:2] == data[:2]
            assert found[2] & 0x80
            assert len(found) <= (1232 if transport == "udp" else 65535)
            query = read_query(data)
            if isinstance(query, Query) and query.klass == 1:
                assert read_answer(found, query.id, query.name, query.type) is not None


@given(st.binary(max_size=600))
@example(b"")
def test_any_bytes_are_endured(data):
    endure(Responder(WHERE), data)


OURS = ["svc.cluster.local", "testns.pod.cluster.local", "hdls.testns.svc.cluster.local", "244.10.in-addr.arpa"]


@given(st.lists(LABEL, max_size=6), st.integers(0, 0xFFFF), st.sampled_from([*OURS, "ip6.arpa", "cluster.local"]))
def test_any_name_below_ours_is_endured(labels, kind, suffix):
    tail = b"".join(bytes((len(label),)) + label.encode() for label in suffix.split("."))
    name = b"".join(bytes((len(label),)) + label for label in labels) + tail + b"\0"
    endure(Responder(WHERE), header() + name + kind.to_bytes(2) + b"\0\1")


def mutated(chooser: random.Random, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(chooser.randint(1, 4)):
        at = chooser.randrange(len(data)) if data else 0
        action = chooser.randrange(4)
        if action == 0 and data:
            data[at] = chooser.choice((0, 1, 12, 63, 64, 191, 192, 255, chooser.randrange(256)))
        elif action == 1 and data:
            data[at] ^= 1 << chooser.randrange(8)
        elif action == 2:
            del data[at : at + chooser.randint(1, 8)]
        else:
            data[at:at] = chooser.randbytes(chooser.randint(1, 8))
    return bytes(data)


def test_ten_thousand_damaged_questions_are_endured():
    chooser = random.Random(53)
    responder = Responder(WHERE)
    for _ in range(10_000):
        endure(responder, mutated(chooser, chooser.choice(SEEDS)))
    assert {"NOERROR", "FORMERR", "REFUSED", "NXDOMAIN"} <= responder.counters()[1].keys()


def test_ten_thousand_damaged_answers_are_endured():
    chooser = random.Random(53)
    query = parsed(question("www.example.com", size=1232))
    read_by_us = 0
    for _ in range(10_000):
        answer = read(mutated(chooser, ANSWER))
        if answer is None:
            continue
        read_by_us += 1
        assert answer.lifetime >= 0
        for record in records(answer, 7):
            assert len(record.prefix) < 255
        for age in (0, 10):
            assert len(adopt(query, answer, age, 1232)) <= 1232
    assert 1_000 < read_by_us < 9_000


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_name_with_pointers_ends(message, at):
    name = read_name(message, at)
    assert name is None or (name.endswith(b"\0") and len(name) <= 256)
