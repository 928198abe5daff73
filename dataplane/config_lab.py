"""The shape of ``cluster.toml``: nodes, pods and services of a cluster on one machine.

What it shares with ``node.toml`` has the same names and the same models: services, load balancer addresses, DNS, the
overlay. The lab writes each node's own file from it (``lab_plan``).
"""

# ruff: noqa: RUF012 - pydantic copies a default; ruff sees its models only where BaseModel itself is the base

import re
from ipaddress import ip_network
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from dataplane.config_cluster import DnsSection, LoadBalancerSection
from dataplane.config_model import Labels, Section, VxlanSection
from dataplane.config_services import StaticService
from dataplane.config_types import Name, Port, Prefix, number, text

MAX_NODES = 100
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,29}[a-z0-9])?")  # with a pod's name behind it, it names a file in /run/netns


def _label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError
    return value


Label: TypeAlias = Annotated[str, text('a name of up to 31 lower-case letters, digits and "-", a letter first', _label)]


class ClusterSection(Section):
    """How many nodes, and from where they know of each other."""

    name: Label = "lab"
    nodes: Annotated[int, number(1, MAX_NODES)] = 3
    state: Literal["static", "etcd"] = "static"


class NetworkSection(Section):
    """The LAN, and the ranges that the cluster takes its addresses from."""

    lan: Prefix = ip_network("192.0.2.0/24")
    mtu: Annotated[int, number(626, 65535)] = 1500
    pod_cidr: Prefix = ip_network("10.244.0.0/16")
    block_size: Annotated[int, number(8, 28)] = 24
    service_cidr: Prefix = ip_network("10.96.0.0/16")


class PodGroup(Section):
    """Pods of one kind: ``count`` of them dealt out over the nodes, or ``per_node`` on each."""

    name: Label
    namespace: Name = "default"
    count: Annotated[int, number(0, 10_000)] = 0
    per_node: Annotated[int, number(0, 200)] = 0
    labels: Labels = {}
    serve: Port | None = None


class LabService(StaticService):
    """A service, whose endpoints are the pods with these labels, unless it names them itself."""

    selector: Labels = {}


class LabFile(Section):
    """The whole file."""

    api_version: Literal["dataplane/v1"] = "dataplane/v1"
    kind: Literal["Cluster"] = "Cluster"
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    network: NetworkSection = Field(default_factory=NetworkSection)
    vxlan: VxlanSection = Field(default_factory=VxlanSection)
    pods: list[PodGroup] = []
    services: list[LabService] = []
    load_balancer: LoadBalancerSection = Field(default_factory=LoadBalancerSection)
    dns: DnsSection | None = None
