"""The shape of the section whose feature comes later: network policies.

Its names are those of Kubernetes. A file that has it is refused, but with every
error of its shape; this module is imported for such a file only.
"""

# ruff: noqa: RUF012 - pydantic copies a default; ruff sees its models only where BaseModel itself is the base

from typing import Literal

from dataplane.config_ipam import IpamFile
from dataplane.config_model import Labels, Section
from dataplane.config_types import Name, Port, Prefix
from dataplane.control.state import Protocol


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


class WholeFile(IpamFile):
    """The file with every section that there will be."""

    network_policies: list[NetworkPolicy] = []
