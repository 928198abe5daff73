"""The shape of ``[services]``: names and defaults are those of Kubernetes' Service and of kube-proxy's configuration.

This module is imported only for a file that has the section: building its models takes a third of what ``check`` takes.
"""

# ruff: noqa: RUF012 - pydantic copies a default; ruff sees its models only where BaseModel itself is the base

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from dataplane.config_model import File, Labels, Section
from dataplane.config_types import (
    IP,
    ClusterIP,
    Duration,
    Name,
    OptionalName,
    Port,
    PortRange,
    Prefix,
    TargetPort,
    number,
)
from dataplane.control import state as desired
from dataplane.control.state import Protocol, ServiceType, TrafficPolicy

Scheduler: TypeAlias = Literal["rr", "wrr", "lc", "wlc", "sed", "nq", "sh", "dh", "mh", "fo", "ovf"]
SchedulerFlag: TypeAlias = Literal["sh-port", "sh-fallback", "mh-port", "mh-fallback", "ops"]


class Ipvs(Section):
    """``KubeProxyConfiguration.ipvs``, with all schedulers that Linux 6.1 has. A timeout of 0 is the kernel's."""

    scheduler: Scheduler = "rr"
    tcp_timeout: Duration = 900.0
    tcp_fin_timeout: Duration = 120.0
    udp_timeout: Duration = 300.0
    strict_arp: bool = True


class Conntrack(Section):
    """``KubeProxyConfiguration.conntrack``; ``max`` stands for its ``maxPerCore`` and ``min``."""

    max: Annotated[int, number(1024, 1 << 26)] = 262144
    tcp_established_timeout: Duration = 86400.0
    tcp_close_wait_timeout: Duration = 3600.0
    tcp_be_liberal: bool = True
    udp_timeout: Duration = 30.0
    udp_stream_timeout: Duration = 120.0


class ServicePort(Section):
    """``ServicePort`` of core/v1."""

    name: OptionalName = ""
    protocol: Protocol = "TCP"
    port: Port
    target_port: TargetPort | None = None
    node_port: Port | None = None


class Endpoint(Section):
    """A backend, with the conditions of ``Endpoint`` of discovery.k8s.io/v1."""

    ip: IP
    weight: Annotated[int, number(0, 65535)] = 1
    node: OptionalName = ""
    zone: OptionalName = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    draining: bool = False
    ports: dict[str, Port] = {}
    hostname: OptionalName = ""


class StaticService(Section):
    """``ServiceSpec`` of core/v1, the addresses of its status, and its endpoints."""

    name: Name
    namespace: Name = "default"
    type: ServiceType = "ClusterIP"
    cluster_ips: list[ClusterIP] = []
    external_ips: list[IP] = []
    load_balancer_ips: list[IP] = []
    load_balancer_ip: IP | None = None
    external_name: OptionalName = ""
    ports: list[ServicePort] = []
    endpoints: list[Endpoint] = []
    session_affinity: Literal["None", "ClientIP"] = "None"
    session_affinity_timeout: Duration = 10800.0
    external_traffic_policy: TrafficPolicy = "Cluster"
    internal_traffic_policy: TrafficPolicy = "Cluster"
    labels: Labels = {}
    annotations: Labels = {}
    load_balancer_class: str = ""
    load_balancer_source_ranges: list[Prefix] = []
    health_check_node_port: Annotated[int, number(0, 65535)] = 0
    publish_not_ready_addresses: bool = False
    scheduler: Scheduler | None = None
    scheduler_flags: list[SchedulerFlag] = []
    drain_timeout: Duration = 0.0


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


class ServicesFile(File):
    """A file with services."""

    services: ServicesSection = Field(default_factory=ServicesSection)


# --- the desired state -----------------------------------------------------------------------------------------------


def service_of(given: StaticService) -> desired.Service:
    """Return the service that a section describes."""
    return desired.Service(
        name=given.name,
        namespace=given.namespace,
        type=given.type,
        cluster_ips=tuple(address for address in given.cluster_ips if address is not None),
        external_ips=tuple(given.external_ips),
        load_balancer_ips=tuple(given.load_balancer_ips),
        ports=tuple(
            desired.ServicePort(port.port, port.protocol, port.name, port.target_port, port.node_port or 0)
            for port in given.ports
        ),
        endpoints=tuple(endpoint_of(endpoint) for endpoint in given.endpoints),
        affinity_seconds=given.session_affinity_timeout if given.session_affinity == "ClientIP" else 0,
        external_policy=given.external_traffic_policy,
        internal_policy=given.internal_traffic_policy,
        source_ranges=tuple(given.load_balancer_source_ranges),
        health_check_node_port=given.health_check_node_port,
        scheduler=given.scheduler or "",
        scheduler_flags=frozenset(given.scheduler_flags),
        drain_seconds=given.drain_timeout,
        publish_not_ready=given.publish_not_ready_addresses,
        external_name=given.external_name,
        labels=tuple(sorted(given.labels.items())),
        annotations=tuple(sorted(given.annotations.items())),
        load_balancer_class=given.load_balancer_class,
        requested_ip=given.load_balancer_ip,
    )


def endpoint_of(given: Endpoint) -> desired.Endpoint:
    """Return the endpoint that a section describes."""
    return desired.Endpoint(
        address=given.ip,
        weight=given.weight,
        node=given.node,
        zone=given.zone,
        ready=given.ready,
        serving=given.serving,
        terminating=given.terminating,
        draining=given.draining,
        ports=tuple(sorted(given.ports.items())),
        hostname=given.hostname,
    )


def balancing_of(given: ServicesSection) -> desired.Balancing:
    """Return what all services share."""
    ipvs, conntrack = given.ipvs, given.conntrack
    timeouts = {
        "ipvs.tcpTimeout": ipvs.tcp_timeout,
        "ipvs.tcpFinTimeout": ipvs.tcp_fin_timeout,
        "ipvs.udpTimeout": ipvs.udp_timeout,
        "tcpCloseWaitTimeout": conntrack.tcp_close_wait_timeout,
        "tcpEstablishedTimeout": conntrack.tcp_established_timeout,
        "udpStreamTimeout": conntrack.udp_stream_timeout,
        "udpTimeout": conntrack.udp_timeout,
    }
    return desired.Balancing(
        cluster_cidrs=tuple(given.cluster_cidr),
        service_cidrs=tuple(given.service_cidr),
        node_port_range=given.node_port_range,
        node_port_addresses=tuple(given.node_port_addresses),
        masquerade_all=given.masquerade_all,
        scheduler=ipvs.scheduler,
        timeouts=tuple(sorted(timeouts.items())),
        conntrack_max=conntrack.max,
        tcp_be_liberal=conntrack.tcp_be_liberal,
    )
