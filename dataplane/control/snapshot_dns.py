"""What a running node says about cluster DNS, as ``snapshot`` describes the rest."""

from typing import TypedDict


class DnsRequests(TypedDict):
    """Questions of one type (A, AAAA, ..., other) that came by one way (udp, tcp)."""

    transport: str
    type: str
    count: int


class DnsUpstream(TypedDict):
    """A server that is asked about other names. ``aloof``: it did not answer lately, so the others come first."""

    server: str
    asked: int
    failures: int
    aloof: bool


class Dns(TypedDict):
    """``GET /v1/dns``. ``domain`` is "" while the node answers no names.

    ``listening`` is where the cluster IP leads to. ``responses`` are counted by code. ``durations`` has the number of
    answers that took at most so many seconds as the bucket at the same place in ``buckets``, but longer than the one
    before; its last number is of those that took longer than all. ``refused`` questions were not asked of an upstream,
    since too many others were under way; ``dropped`` messages were no questions, or came while far too many were.
    """

    domain: str
    address: str
    listening: list[str]
    ttl: int
    pods: str
    services: int
    serial: int
    requests: list[DnsRequests]
    responses: dict[str, int]
    buckets: list[float]
    durations: list[int]
    duration_sum: float
    dropped: int
    connections: int
    upstreams: list[DnsUpstream]
    cache_entries: int
    cache_hits: int
    cache_misses: int
    refused: int


class DnsRecord(TypedDict):
    """A record of an answer; ``data`` as in a zone file."""

    section: str
    name: str
    ttl: int
    type: str
    data: str


class DnsTry(TypedDict):
    """A name that was asked for, what came of it, and why."""

    name: str
    rcode: str
    why: str


class DnsAnswer(TypedDict):
    """``GET /v1/dns/query``: the names that a pod's resolver would try in order, and the answer to the last of them."""

    name: str
    type: str
    rcode: str
    why: str
    records: list[DnsRecord]
    tried: list[DnsTry]


OFF: Dns = {
    "domain": "",
    "address": "",
    "listening": [],
    "ttl": 0,
    "pods": "disabled",
    "services": 0,
    "serial": 0,
    "requests": [],
    "responses": {},
    "buckets": [],
    "durations": [],
    "duration_sum": 0.0,
    "dropped": 0,
    "connections": 0,
    "upstreams": [],
    "cache_entries": 0,
    "cache_hits": 0,
    "cache_misses": 0,
    "refused": 0,
}
"""A node without ``[dns]``."""
