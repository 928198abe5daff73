"""The shape of what a node shares with others: load balancer addresses and cluster DNS.

Names and defaults are those of MetalLB (metallb.io/v1beta1) and of CoreDNS. This module is imported only for a file
that has one of the sections.
"""

# ruff: noqa: RUF012 - pydantic copies a default; ruff sees its models only where BaseModel itself is the base

from typing import Annotated, Literal

from pydantic import Field

from dataplane.config_model import Labels, Section
from dataplane.config_services import ServicesFile
from dataplane.config_types import IP, AddressRange, Duration, HostPort, Interface, Name, number
from dataplane.control import process
from dataplane.control import state as desired


class Expression(Section):
    """``LabelSelectorRequirement`` of meta/v1."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class LabelSelector(Section):
    """``LabelSelector`` of meta/v1."""

    match_labels: Labels = {}
    match_expressions: list[Expression] = []


class ServiceAllocation(Section):
    """``ServiceAllocation`` of metallb.io/v1beta1: which services a pool is for."""

    priority: Annotated[int, number(0, 1 << 31)] = 0
    namespaces: list[Name] = []
    service_selectors: list[LabelSelector] = []


class IPAddressPool(Section):
    """``IPAddressPool`` of metallb.io/v1beta1."""

    name: Name
    addresses: list[AddressRange]
    auto_assign: bool = True
    avoid_buggy_ips: bool = False
    service_allocation: ServiceAllocation = Field(default_factory=ServiceAllocation)


class PreferredNodeSelector(Section):
    """``PreferredNodeSelector`` of metallb.io/v1beta1: nodes that come first while they are eligible."""

    weight: Annotated[int, number(1, 100)]
    preference: LabelSelector


class L2Advertisement(Section):
    """``L2Advertisement`` of metallb.io/v1beta1."""

    name: Name = "default"
    ip_address_pools: list[Name] = []
    node_selectors: list[LabelSelector] = []
    preferred_node_selectors: list[PreferredNodeSelector] = []
    interfaces: list[Interface] = []


class LoadBalancerSection(Section):
    """Addresses for services of type LoadBalancer. Without any advertisement every address is announced."""

    ip_address_pools: list[IPAddressPool] = []
    l2_advertisements: list[L2Advertisement] = []


class DnsSection(Section):
    """Cluster DNS."""

    cluster_domain: Name = "cluster.local"
    cluster_ip: IP | None = None
    ttl: Duration = 5.0
    upstreams: list[HostPort] = []
    pods: Literal["disabled", "insecure", "verified"] = "disabled"


class ClusterSection(Section):
    """How nodes hear from each other; the port is memberlist's, which MetalLB has for the same."""

    heartbeat_port: Annotated[int, number(0, 65535, " (0: no heartbeats)")] = 7946
    heartbeat_interval: Duration = 0.1
    heartbeat_misses: Annotated[int, number(2, 1000)] = 4
    secret: str = ""


class ClusterFile(ServicesFile):
    """A file with load balancer addresses or cluster DNS."""

    load_balancer: LoadBalancerSection = Field(default_factory=LoadBalancerSection)
    dns: DnsSection = Field(default_factory=DnsSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)


# --- the desired state -----------------------------------------------------------------------------------------------


def pool_of(given: IPAddressPool) -> desired.AddressPool:
    """Return the pool that a section describes."""
    pinned = given.service_allocation
    return desired.AddressPool(
        name=given.name,
        ranges=tuple(given.addresses),
        auto_assign=given.auto_assign,
        avoid_buggy_ips=given.avoid_buggy_ips,
        priority=pinned.priority,
        namespaces=frozenset(pinned.namespaces),
        service_selectors=tuple(selector_of(selector) for selector in pinned.service_selectors),
    )


def advertisement_of(given: L2Advertisement) -> desired.L2Advertisement:
    """Return the advertisement that a section describes."""
    return desired.L2Advertisement(
        name=given.name,
        pools=frozenset(given.ip_address_pools),
        node_selectors=tuple(selector_of(selector) for selector in given.node_selectors),
        interfaces=frozenset(given.interfaces),
        preferences=tuple((each.weight, selector_of(each.preference)) for each in given.preferred_node_selectors),
    )


def selector_of(given: LabelSelector) -> desired.Selector:
    """Return the selector that a table describes."""
    return desired.Selector(
        tuple(sorted(given.match_labels.items())),
        tuple((each.key, each.operator, tuple(each.values)) for each in given.match_expressions),
    )


def dns_of(given: DnsSection) -> desired.Dns | None:
    """Return cluster DNS; None when it has no address to answer at."""
    if given.cluster_ip is None:
        return None
    return desired.Dns(given.cluster_ip, given.cluster_domain, int(given.ttl), tuple(given.upstreams), given.pods)


def heartbeat_of(given: ClusterSection) -> process.Heartbeat:
    """Return how nodes hear from each other."""
    return process.Heartbeat(given.heartbeat_port, given.heartbeat_interval, given.heartbeat_misses, given.secret)
