"""The shape of the sections whose feature comes later: services, load balancer addresses, DNS, network policies.

Their names are those of Kubernetes, kube-proxy and MetalLB. A file that has one of them is refused, but with every
error of its shape; this module is imported for such a file only.
"""

# ruff: noqa: RUF012 - pydantic copies a default; ruff sees its models only where BaseModel itself is the base

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from dataplane.config_model import File, Labels, Section
from dataplane.config_types import (
    IP,
    AddressRange,
    Duration,
    Interface,
    Name,
    OptionalName,
    Port,
    PortRange,
    Prefix,
    number,
)

Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]


class Ipvs(Section):
    """``KubeProxyConfiguration.ipvs``."""

    scheduler: Literal["rr", "wrr", "lc", "wlc", "sh", "dh", "sed", "nq", "mh"] = "rr"
    tcp_timeout: Duration = 900.0
    tcp_fin_timeout: Duration = 120.0
    udp_timeout: Duration = 300.0
    strict_arp: bool = True


class Conntrack(Section):
    """``KubeProxyConfiguration.conntrack``."""

    max: Annotated[int, number(1, 0xFFFF_FFFF)] = 262144
    tcp_established_timeout: Duration = 86400.0
    tcp_close_wait_timeout: Duration = 3600.0
    udp_timeout: Duration = 30.0


class ServicePort(Section):
    """``ServicePort`` of core/v1."""

    name: OptionalName = ""
    protocol: Protocol = "TCP"
    port: Port
    target_port: Port | None = None
    node_port: Port | None = None


class Endpoint(Section):
    """A backend."""

    ip: IP
    weight: Annotated[int, number(0, 65535)] = 1
    node: OptionalName = ""


class StaticService(Section):
    """A service that no API server gives."""

    name: Name
    namespace: Name = "default"
    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    cluster_ips: list[IP] = []
    ports: list[ServicePort] = []
    endpoints: list[Endpoint] = []
    session_affinity: Literal["None", "ClientIP"] = "None"
    session_affinity_timeout: Duration = 10800.0
    external_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    load_balancer_class: str = ""
    health_check_node_port: Annotated[int, number(0, 65535)] = 0


class ServicesSection(Section):
    """kube-proxy's own settings, and services."""

    cluster_cidr: list[Prefix] = []
    service_cidr: list[Prefix] = []
    node_port_range: PortRange = (30000, 32767)
    node_port_addresses: list[Prefix] = []
    masquerade_all: bool = False
    masquerade_bit: Annotated[int, number(0, 31)] = 14
    ipvs: Ipvs = Field(default_factory=Ipvs)
    conntrack: Conntrack = Field(default_factory=Conntrack)
    static: list[StaticService] = []


class IPAddressPool(Section):
    """``IPAddressPool`` of metallb.io/v1beta1."""

    name: Name
    addresses: list[AddressRange]
    auto_assign: bool = True
    avoid_buggy_ips: bool = False


class L2Advertisement(Section):
    """``L2Advertisement`` of metallb.io/v1beta1."""

    ip_address_pools: list[Name] = []
    interfaces: list[Interface] = []


class LoadBalancerSection(Section):
    """Addresses for services of type LoadBalancer."""

    ip_address_pools: list[IPAddressPool] = []
    l2_advertisements: list[L2Advertisement] = []


class DnsSection(Section):
    """Cluster DNS."""

    cluster_domain: Name = "cluster.local"
    cluster_ip: IP | None = None
    ttl: Duration = 5.0
    upstreams: list[IP] = []


class IPBlock(Section):
    """``IPBlock`` of networking.k8s.io/v1."""

    cidr: Prefix
    except_: list[Prefix] = []


class PolicyPeer(Section):
    """``NetworkPolicyPeer`` of networking.k8s.io/v1."""

    pod_selector: Labels | None = None
    namespace_selector: Labels | None = None
    ip_block: IPBlock | None = None


class PolicyPort(Section):
    """``NetworkPolicyPort`` of networking.k8s.io/v1."""

    protocol: Protocol = "TCP"
    port: Port | None = None
    end_port: Port | None = None


class IngressRule(Section):
    """Who may send, and to which ports."""

    from_: list[PolicyPeer] = []
    ports: list[PolicyPort] = []


class EgressRule(Section):
    """Who may be sent to, and on which ports."""

    to: list[PolicyPeer] = []
    ports: list[PolicyPort] = []


class NetworkPolicy(Section):
    """``NetworkPolicy`` of networking.k8s.io/v1."""

    name: Name
    namespace: Name = "default"
    pod_selector: Labels = {}
    policy_types: list[Literal["Ingress", "Egress"]] = ["Ingress"]
    ingress: list[IngressRule] = []
    egress: list[EgressRule] = []


class WholeFile(File):
    """The file with every section that there will be."""

    services: ServicesSection = Field(default_factory=ServicesSection)
    load_balancer: LoadBalancerSection = Field(default_factory=LoadBalancerSection)
    dns: DnsSection = Field(default_factory=DnsSection)
    network_policies: list[NetworkPolicy] = []
