"""A cluster with every kind of name, and how tests ask and read: with dnslib, which has nothing of our own code."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

from dnslib import EDNS0, QTYPE, RCODE, RR, DNSQuestion, DNSRecord

from dataplane.control.cluster import Cluster, ClusterPod
from dataplane.control.dns import Forward, Transport, answer
from dataplane.control.dns_wire import Query, read_query
from dataplane.control.dns_zone import Zone
from dataplane.control.state import Balancing, DesiredState, Dns, Endpoint, Node, Pod, PodNetwork, Service, ServicePort

NOW = 1_700_000_000.0
HTTP = ServicePort(80, "TCP", "http", 8080)
UPSTREAM = (ip_address("192.0.2.53"), 53)


def endpoint(address: str, **keys) -> Endpoint:
    return Endpoint(ip_address(address), **keys)


def service(name: str, *ips: str, namespace: str = "testns", ports=(HTTP,), endpoints=(), **keys) -> Service:
    made = tuple(each if isinstance(each, Endpoint) else endpoint(each) for each in endpoints)
    return Service(name, namespace, cluster_ips=tuple(map(ip_address, ips)), ports=ports, endpoints=made, **keys)


def external(name: str, target: str) -> Service:
    return Service(name, "testns", "ExternalName", external_name=target)


SERVICES = (
    service("svc1", "10.96.0.1", endpoints=["10.244.1.1", endpoint("10.244.1.2", hostname="two")]),
    service("svcempty", "10.96.0.2"),
    service("svc6", "fd00:96::6", endpoints=["fd00:244::1"]),
    service("dual", "10.96.0.3", "fd00:96::3"),
    service("noport", "10.96.0.4", ports=()),
    service(
        "multi",
        "10.96.0.5",
        ports=(HTTP, ServicePort(443, "TCP", "https"), ServicePort(53, "UDP", "dns"), ServicePort(9, "UDP")),
    ),
    service(
        "hdls",
        endpoints=[
            "10.244.1.12",
            "10.244.1.13",
            endpoint("10.244.1.14", hostname="dup-name"),
            endpoint("10.244.1.15", hostname="dup-name"),
            "fd00:244::12",
            "fd00:244::",
            endpoint("10.244.1.16", ready=False),
            endpoint("10.244.1.17", terminating=True),
            endpoint("10.244.1.18", draining=True),
        ],
    ),
    service("hdlsprtls", ports=(), endpoints=["10.244.1.20"]),
    service("hdlsempty"),
    service("hdlsdown", endpoints=[endpoint("10.244.1.30", ready=False)]),
    service("eager", endpoints=[endpoint("10.244.1.31", ready=False)], publish_not_ready=True),
    service(
        "named",
        ports=(ServicePort(80, "TCP", "http", "web"),),
        endpoints=[endpoint("10.244.1.40", ports=(("web", 8081),)), endpoint("10.244.1.41")],
    ),
    service("other", "10.96.0.9", namespace="second"),
    external("external", "ext.interwebs.test"),
    external("external-to-service", "svc1.testns.svc.cluster.local"),
    external("external-to-none", "svc0.testns.svc.cluster.local."),
    external("external-to-external", "external.testns.svc.cluster.local"),
    external("loop1", "loop2.testns.svc.cluster.local"),
    external("loop2", "loop1.testns.svc.cluster.local"),
    external("external-ip", "192.0.2.1"),
    external("external-bad", "a..b"),
)
STATE = DesiredState(
    Node("node1", host_interface="dp0"),
    PodNetwork((ip_network("10.244.1.0/24"),)),
    (Pod("web-0", "pods", "web-0", (ip_address("10.244.1.10"),), 1, 1450, "cali0"),),
    balancing=Balancing(
        cluster_cidrs=(ip_network("10.244.0.0/16"), ip_network("fd00:244::/64")),
        service_cidrs=(ip_network("10.96.0.0/12"), ip_network("fd00:96::/112")),
    ),
    services=SERVICES,
    dns=Dns(ip_address("10.96.0.10")),
)
CLUSTER = Cluster(
    pods={"far/web-1": ClusterPod("web-1", "far", "node2", (ip_address("10.244.2.10"), ip_address("fd00:244::99")))},
    namespaces=frozenset({"empty"}),
)


def zone(state: DesiredState = STATE, cluster: Cluster = CLUSTER, **dns) -> Zone:
    assert state.dns is not None
    made = Zone()
    made.update(replace(state, dns=replace(state.dns, **dns)), cluster, NOW)
    return made


def question(
    name: str, kind: str | int = "A", *, number: int = 7, size: int = 0, version: int = 0, rd: int = 1
) -> bytes:
    """Return a question; with a ``size`` the client speaks EDNS."""
    code = kind if isinstance(kind, int) else getattr(QTYPE, kind)
    labels = tuple(label.encode("latin-1") for label in name.rstrip(".").split(".")) if name != "." else ()
    record = DNSRecord(q=DNSQuestion(labels, code))
    record.header.id, record.header.rd = number, rd
    if size:
        record.add_ar(EDNS0(udp_len=size, version=version))
    return bytes(record.pack())


def parsed(data: bytes) -> Query:
    query = read_query(data)
    assert isinstance(query, Query)
    return query


def ask(data: bytes, where: Zone, transport: Transport = "udp", turn: int = 0) -> bytes | Forward:
    return answer(parsed(data), where, transport, turn)


def reply(data: bytes, where: Zone, transport: Transport = "udp", turn: int = 0) -> DNSRecord:
    found = ask(data, where, transport, turn)
    assert isinstance(found, bytes), found
    return DNSRecord.parse(found)


def text(record: RR) -> str:
    """Return ``TYPE data``, and in front of it the owner where that is not the question's."""
    return f"{QTYPE[record.rtype]} {record.rdata}"


def summary(answered: DNSRecord) -> str:
    """Return an answer as the table of names writes it."""
    assert answered.q is not None
    asked = str(answered.q.qname).lower()
    words = [text(each) if str(each.rname).lower() == asked else f"{each.rname} {text(each)}" for each in answered.rr]
    extras = sorted(f"{each.rname} {text(each)}" for each in answered.ar if each.rtype != QTYPE.OPT)
    authorities = [f"SOA of {each.rname}" for each in answered.auth]
    code = RCODE[answered.header.rcode]
    lead = [word for word in words if "CNAME" in word]
    rest = sorted(word for word in words if "CNAME" not in word)
    head = code if code != "NOERROR" else "NODATA" if not words else ""
    parts = [head, *lead, *rest, *authorities]
    return "; ".join(part for part in parts if part) + (" | " + "; ".join(extras) if extras else "")
