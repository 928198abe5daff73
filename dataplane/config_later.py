"""The shape of the sections whose feature comes later: load balancer addresses, DNS, network policies.

Their names are those of Kubernetes, kube-proxy and MetalLB. A file that has one of them is refused, but with every
error of its shape; this module is imported for such a file only.
"""

# ruff: noqa: RUF012 - pydantic copies a default; ruff sees its models only where BaseModel itself is the base

from typing import Literal

from pydantic import Field

from dataplane.config_model import Labels, Section
from dataplane.config_services import ServicesFile
from dataplane.config_types import IP, AddressRange, Duration, Interface, Name, Port, Prefix
from dataplane.control.state import Protocol


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


class WholeFile(ServicesFile):
    """The file with every section that there will be."""

    load_balancer: LoadBalancerSection = Field(default_factory=LoadBalancerSection)
    dns: DnsSection = Field(default_factory=DnsSection)
    network_policies: list[NetworkPolicy] = []
