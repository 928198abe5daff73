"""The cluster's names: what the Kubernetes DNS specification 1.1.0 says of each, as CoreDNS' kubernetes plugin does.

    SERVICE.NAMESPACE.svc.DOMAIN                    cluster IPs; headless: the ready endpoints; ExternalName: CNAME
    ENDPOINT.SERVICE.NAMESPACE.svc.DOMAIN           one endpoint, by its hostname, else its address with dashes
    _PORT._PROTOCOL.SERVICE.NAMESPACE.svc.DOMAIN    SRV (as for the service itself, for all of its ports)
    1-2-3-4.NAMESPACE.pod.DOMAIN                    a pod, by the mode of ``[dns] pods``
    4.3.2.1.in-addr.arpa, ....ip6.arpa              services and endpoints; others inside our prefixes do not exist
    dns-version.DOMAIN, ns.dns.DOMAIN, DOMAIN       TXT, the server's address, SOA and NS

A name that exists without records of the type has no data; so have names that only lead to others. Where CoreDNS leaves
the RFCs we follow those: ``dns.DOMAIN`` and ``_tcp.SERVICE...`` exist (RFC 8020), every type of an ExternalName is its
CNAME, ANY is answered by HINFO (RFC 8482), and port and protocol need their underscores.

A service's endpoints are put in order when its names are asked for the first time, and kept until it changes. What is
found is kept until anything changes: clients may make each of their questions a new one (cookies, case), and a service
with 5,000 endpoints costs 10 ms.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from struct import pack
from typing import NamedTuple

from dataplane.control.cluster import Cluster
from dataplane.control.dns_index import Index, is_headless
from dataplane.control.dns_reverse import Reverse, read_reverse
from dataplane.control.dns_wire import Rcode, Record, Type, split, to_wire
from dataplane.control.services import is_ready, target_port
from dataplane.control.state import Address, DesiredState, Dns, Endpoint, Service, ServicePort

VERSION, VERSION_TTL = "1.1.0", 28800
CHAIN = 8  # names that lead to each other inside the cluster
_VIEWS = 1024  # services whose endpoints are kept in order
_KEPT = 1 << 16  # records of the answers that are kept, of which each counts as 8 more: 16 MB
_REFRESH, _RETRY, _EXPIRE = 7200, 1800, 86400  # of the SOA; for secondaries, of which there are none
_HINFO = b"\x07RFC8482\x00"
_NO_PORT = ServicePort(0)
_TYPES = frozenset(int(kind) for kind in Type)


@dataclass(frozen=True, slots=True)
class Found:
    """What the cluster says to a question.

    Attributes:
        rcode: NOERROR without answers is "no data".
        answers: CNAMEs first, in their order.
        authorities: The SOA, when there is no answer.
        extras: Addresses of what the answers name.
        onward: The name that the last answer, a CNAME, leads to; empty: there is none.
        why: The reason, for people.
    """

    rcode: Rcode = Rcode.NOERROR
    answers: tuple[Record, ...] = ()
    authorities: tuple[Record, ...] = ()
    extras: tuple[Record, ...] = ()
    onward: tuple[str, ...] = ()
    why: str = ""


class Match(NamedTuple):
    """An address behind a service's name, by one port; without a port there is no SRV record of it."""

    host: str
    address: Address
    port: int


class Zone:
    """The names of one node's state.

    Attributes:
        settings: The section ``[dns]``; None: there are no names at all.
        synced: A state was taken over; before that nobody can say that a name does not exist.
        serial: Of the SOA: the time of the last change, in seconds since the epoch.
        index: What names are looked up in.
    """

    def __init__(self) -> None:
        self.settings: Dns | None = None
        self.synced = False
        self.serial = 0
        self.index = Index()
        self._domain: tuple[str, ...] = ()
        self._wire = b"\0"
        self._views: OrderedDict[str, tuple[Service, dict[str, list[Endpoint]]]] = OrderedDict()
        self._kept: dict[tuple[tuple[str, ...], int], Found] = {}
        self._records = 0

    def update(self, state: DesiredState, cluster: Cluster, now: float) -> bool:
        """Take over a state; say whether an answer may be another one than before.

        Args:
            state: What the node has become.
            cluster: What else its store knows.
            now: In seconds since the epoch.
        """
        changed = self.index.update(state, cluster)
        if state.dns != self.settings or not self.synced:
            self.settings, self.synced, changed = state.dns, True, True
            self._domain = split(state.dns.domain.lower()) if state.dns else ()
            self._wire = to_wire(self._domain)
        if changed:
            self.serial = max(self.serial + 1, int(now)) & 0xFFFF_FFFF
            self._forget()
        return changed

    def find(self, labels: tuple[str, ...], kind: int) -> Found | None:
        """Return what the cluster says to a question; None: it is not the cluster's to answer.

        Args:
            labels: Of the name, in lower case.
            kind: The type of the records that are wanted.
        """
        wanted = Type.A if kind == Type.ANY else kind if kind in _TYPES else 0
        found = self._kept.get((labels, wanted))
        if found is None:
            found = self._find(labels, wanted)
            self._keep(labels, wanted, found)
        if kind != Type.ANY or found is None or found.rcode != Rcode.NOERROR:
            return found
        return Found(answers=(self._record(Type.HINFO, _HINFO),), why="questions for all types get none (RFC 8482)")

    def _keep(self, labels: tuple[str, ...], kind: int, found: Found | None) -> None:
        if found is None or found.rcode != Rcode.NOERROR:
            return  # there is no end of names that do not exist; and they cost little
        size = 8 + len(found.answers) + len(found.extras)
        if self._records + size > _KEPT:
            self._forget()
        self._records += size
        self._kept[labels, kind] = found

    def _forget(self) -> None:
        self._kept.clear()
        self._records = 0

    def _find(self, labels: tuple[str, ...], kind: int) -> Found | None:
        if self.settings is None:
            return None
        if self._is_inside(labels):
            return self._follow(labels, kind)
        reverse = read_reverse(labels) if labels[-1:] == ("arpa",) else None
        return self._reverse(reverse, kind) if reverse else None

    def _is_inside(self, labels: tuple[str, ...]) -> bool:
        return bool(labels) and labels[-len(self._domain) :] == self._domain

    # --- what answers are made of ------------------------------------------------------------------------------------

    def _record(self, kind: Type, data: bytes, ttl: int = -1) -> Record:
        assert self.settings is not None
        return Record(b"", 0, kind, self.settings.ttl if ttl < 0 else ttl, data)

    def _soa(self, suffix: int) -> Record:
        assert self.settings is not None
        ttl = self.settings.ttl
        names = to_wire(("ns", "dns"))[:-1] + self._wire + to_wire(("hostmaster",))[:-1] + self._wire
        data = names + pack("!5I", self.serial, _REFRESH, _RETRY, _EXPIRE, ttl)
        return Record(b"", suffix, Type.SOA, ttl, data)

    def _nothing(self, why: str, rcode: Rcode = Rcode.NOERROR) -> Found:
        return Found(rcode, authorities=(self._soa(len(self._wire)),), why=why)

    def _unknown(self, why: str) -> Found:
        return self._nothing(why, Rcode.NXDOMAIN)

    # --- inside the domain -------------------------------------------------------------------------------------------

    def _follow(self, labels: tuple[str, ...], kind: int) -> Found:
        """Answer a name, and what it leads to inside the cluster."""
        chain: list[Record] = []
        seen = {labels}
        found, name = self._at(labels, kind), labels
        while kind != Type.CNAME and self._is_inside(found.onward):
            chain += self._owned(found.answers, name, labels)
            name = found.onward
            if name in seen or len(seen) == CHAIN:
                return self._nothing("names of ExternalName services lead to each other", Rcode.SERVFAIL)
            seen.add(name)
            found = self._at(name, kind)
        if not chain:
            return found
        return replace(found, answers=(*chain, *self._owned(found.answers, name, labels)), extras=())

    def _owned(self, records: Iterable[Record], name: tuple[str, ...], asked: tuple[str, ...]) -> Iterator[Record]:
        """Yield records of a name in an answer about another one, inside the domain as well."""
        if name == asked:
            yield from records
            return
        prefix = to_wire(name[: -len(self._domain)])[:-1]
        for record in records:
            yield record._replace(prefix=prefix, suffix=len(self._wire))

    def _at(self, labels: tuple[str, ...], kind: int) -> Found:
        rest = labels[: -len(self._domain)]
        if not rest:
            return self._apex(kind)
        if rest[-1] == "svc":
            return self._services(labels, rest[:-1], kind)
        if rest[-1] == "pod":
            return self._pods(rest[:-1], kind)
        if rest == ("ns", "dns"):
            assert self.settings is not None
            return self._answer([Match("", self.settings.address, 0)], kind)
        if rest == ("dns-version",):
            text = bytes((len(VERSION),)) + VERSION.encode()
            version = Found(answers=(self._record(Type.TXT, text, VERSION_TTL),), why="the specification's version")
            return version if kind == Type.TXT else self._nothing("only a TXT record")
        if rest == ("dns",):
            return self._nothing("only ns.dns is below it")
        return self._unknown(f"only svc, pod, dns and dns-version are below {'.'.join(self._domain)}")

    def _apex(self, kind: int) -> Found:
        assert self.settings is not None
        if kind == Type.SOA:
            return Found(answers=(self._soa(len(self._wire)),), why="the cluster's domain")
        if kind == Type.NS:
            name = to_wire(("ns", "dns"))[:-1]
            address = _address(self.settings.address)
            extra = Record(name, len(self._wire), address[0], self.settings.ttl, address[1])
            return Found(
                answers=(self._record(Type.NS, name + self._wire),), extras=(extra,), why="the cluster's domain"
            )
        return self._nothing("the cluster's domain has only SOA and NS")

    # --- services ----------------------------------------------------------------------------------------------------

    def _services(self, labels: tuple[str, ...], rest: tuple[str, ...], kind: int) -> Found:
        if not rest:
            return self._nothing("services are below it")
        *below, name, namespace = ("", *rest) if len(rest) == 1 else rest
        if not self.index.has_namespace(namespace):
            return self._unknown(f"no namespace {namespace}")
        if not name:
            return self._nothing("services are below it")
        service = self.index.service(namespace, name)
        if service is None:
            return self._unknown(f"no service {name} in namespace {namespace}")
        if service.type == "ExternalName":
            return self._external(service, kind) if not below else self._unknown(f"{service.id} is an ExternalName")
        matches: list[Match] = []
        if len(below) == 2 and all(label.startswith("_") and len(label) > 1 for label in below):
            port, protocol = (label[1:] for label in below)
            matches = [*self._matches(service, port, protocol)]
        elif len(below) == 1 and _has_protocol(service, below[0]):
            return self._nothing("ports are below it")
        elif len(below) == 1:
            endpoints = self._by_host(service).get(below[0], ())
            matches = [*_by_port(below[0], endpoints, service.ports)]
        elif not below:
            matches = [*self._matches(service)]
        if not matches:
            what = f"no such endpoint or port of service {service.id}" if below else f"{service.id} has none ready"
            return self._unknown(what)
        return self._answer(matches, kind, labels[len(below) :])

    def _matches(self, service: Service, port: str = "", protocol: str = "") -> Iterator[Match]:
        """Yield what a service's own name stands for, if need be by one port only."""
        ports = tuple(
            each
            for each in service.ports or (() if port else (_NO_PORT,))
            if not port or (each.name.lower() == port and each.protocol.lower() == protocol)
        )
        if is_headless(service):
            for host, endpoints in self._by_host(service).items() if ports else ():
                yield from _by_port(host, endpoints, ports)
            return
        for each in ports:
            for address in service.cluster_ips:
                yield Match("", address, each.port)

    def _by_host(self, service: Service) -> dict[str, list[Endpoint]]:
        """Return a service's ready endpoints by their hostname."""
        kept = self._views.get(service.id)
        if kept is not None and kept[0] is service:
            self._views.move_to_end(service.id)
            return kept[1]
        made: dict[str, list[Endpoint]] = {}
        for endpoint in service.endpoints:
            if is_ready(service, endpoint) and not endpoint.draining:
                made.setdefault(hostname(endpoint), []).append(endpoint)
        self._views[service.id] = service, made
        self._views.move_to_end(service.id)
        if len(self._views) > _VIEWS:
            self._views.popitem(last=False)
        return made

    def _external(self, service: Service, kind: int) -> Found:
        name = service.external_name.lower()
        try:
            target = to_wire(split(name))
        except ValueError:
            return self._unknown(f"the externalName of {service.id} is no name")
        if _read_address(name) is not None or len(target) == 1:
            return self._unknown(f"the externalName of {service.id} is no name")
        record = self._record(Type.CNAME, target)
        onward = split(name) if kind != Type.CNAME else ()
        return Found(answers=(record,), onward=onward, why=f"{service.id} is an ExternalName")

    def _answer(self, matches: list[Match], kind: int, name: tuple[str, ...] = ()) -> Found:
        """Answer with what of some matches is of this type.

        Args:
            matches: At least one.
            kind: The type.
            name: The service's; the name that was asked ends with it.
        """
        if kind in (Type.A, Type.AAAA):
            found = dict.fromkeys(_address(match.address) for match in matches)
            answers = tuple(self._record(own, data) for own, data in found if own == kind)
            return Found(answers=answers, why="found") if answers else self._nothing("no address of this family")
        if kind != Type.SRV:
            return self._nothing("no record of this type")
        owner = to_wire(name)
        services: dict[bytes, None] = {}
        extras: dict[Record, None] = {}
        weight = max(1, 100 // len(matches))
        for match in matches:
            prefix = bytes((len(match.host),)) + match.host.encode("latin-1", "replace") if match.host else b""
            target = prefix + owner
            if not match.port or len(match.host) > 63 or len(target) > 255:
                continue
            services[pack("!3H", 0, weight, match.port) + target] = None
            own, data = _address(match.address)
            extras[self._record(own, data)._replace(prefix=prefix, suffix=len(owner))] = None
        if not services:
            return self._nothing("no port")
        answers = tuple(self._record(Type.SRV, data) for data in services)
        return Found(answers=answers, extras=tuple(extras), why="found")

    # --- pods --------------------------------------------------------------------------------------------------------

    def _pods(self, rest: tuple[str, ...], kind: int) -> Found:
        assert self.settings is not None
        mode = self.settings.pods
        if not rest:
            return self._nothing("pods are below it")
        if mode == "disabled":
            return self._unknown('pods have no names: dns.pods is "disabled"')
        namespace = rest[-1]
        if not self.index.has_namespace(namespace):
            return self._unknown(f"no namespace {namespace}")
        if len(rest) == 1:
            return self._nothing("pods are below it")
        dashed = rest[-2]
        is_v4 = dashed.count("-") == 3 and "--" not in dashed
        address = _read_address(dashed.replace("-", "." if is_v4 else ":"))
        if len(rest) > 2 or address is None:
            return self._unknown("a pod's name is its address with dashes")
        if mode == "verified" and not self.index.has_pod(namespace, address):
            return self._unknown(f"no pod with the address {address} in namespace {namespace}")
        return self._answer([Match("", address, 0)], kind)

    # --- addresses ---------------------------------------------------------------------------------------------------

    def _reverse(self, reverse: Reverse, kind: int) -> Found | None:
        names = [] if reverse.address is None else [*dict.fromkeys(self._names_of(reverse.address))]
        apex = reverse.apex(self.index.networks)
        if names and kind == Type.PTR:
            return Found(answers=tuple(self._record(Type.PTR, name) for name in names), why="found")
        if not names and not apex:
            return None
        exists = bool(names) or reverse.is_above
        why = "no record of this type" if exists else "nobody has this address"
        return Found(Rcode.NOERROR if exists else Rcode.NXDOMAIN, authorities=(self._soa(apex),), why=why)

    def _names_of(self, address: Address) -> Iterator[bytes]:
        """Yield the names of an address: the service whose cluster IP it is, else the endpoints that have it."""
        holders = sorted(self.index.holders(address), key=lambda service: service.id)
        for service in holders:
            if address in service.cluster_ips:
                yield from self._name(service)
                return
        for service in holders:
            for host, endpoints in self._by_host(service).items():
                named = is_headless(service) or any(endpoint.hostname for endpoint in endpoints)
                if named and any(endpoint.address == address for endpoint in endpoints):
                    yield from self._name(service, host)

    def _name(self, service: Service, *host: str) -> Iterator[bytes]:
        try:
            yield to_wire((*host, service.name, service.namespace, "svc", *self._domain))
        except ValueError:
            return  # a store may know names that are too long for DNS; nobody can ask for them


def hostname(endpoint: Endpoint) -> str:
    """Return an endpoint's name in DNS: its own, else its address with dashes, which may not end with one."""
    if endpoint.hostname:
        return endpoint.hostname.lower()
    dashed = str(endpoint.address).replace(".", "-").replace(":", "-")
    return f"{dashed}0" if dashed.endswith("-") else dashed


def _by_port(host: str, endpoints: Iterable[Endpoint], ports: Iterable[ServicePort]) -> Iterator[Match]:
    for endpoint in endpoints:
        for port in tuple(ports) or (_NO_PORT,):
            yield Match(host, endpoint.address, target_port(port, endpoint) or 0)


def _has_protocol(service: Service, label: str) -> bool:
    """Say whether a service has named ports below this name, such as ``_tcp``."""
    return any(port.name and label == f"_{port.protocol.lower()}" for port in service.ports)


def _address(address: Address) -> tuple[Type, bytes]:
    return (Type.A if address.version == 4 else Type.AAAA), address.packed


def _read_address(text: str) -> Address | None:
    if "%" in text:
        return None  # a scope is no part of an address in DNS
    try:
        return IPv6Address(text) if ":" in text else IPv4Address(text)
    except ValueError:
        return None
