"""What must fit together in ``[dns]``, and in what it needs of the rest of the file."""

from collections.abc import Iterator
from ipaddress import ip_address

from dataplane.config_checks import Problem, each, path_text, repeats
from dataplane.config_cluster import ClusterFile
from dataplane.config_lines import KeyPath
from dataplane.control.state import Address

_AT: KeyPath = ("dns", "clusterIP")
_LONGEST = 128  # characters of the domain: names of services and endpoints stand in front of it, all of it in 253


def check_dns(file: ClusterFile) -> Iterator[Problem]:
    """Yield the problems of cluster DNS."""
    address = file.dns.cluster_ip
    if address is None:
        yield Problem(_AT, "missing; expected the cluster IP that pods ask, such as 10.96.0.10", ("dns",))
        return
    yield from _address(file, address)
    yield from _host(file)
    yield from _upstreams(file, address)
    domain = file.dns.cluster_domain
    if len(domain) > _LONGEST or any(len(label) > 63 for label in domain.split(".")):
        yield Problem(
            ("dns", "clusterDomain"), f"expected at most {_LONGEST} characters, 63 between dots (got {domain})"
        )
    elif domain.endswith("arpa") and domain.split(".")[-1] == "arpa":
        yield Problem(("dns", "clusterDomain"), f"is where names of addresses are (got {domain})")
    if not 0 <= file.dns.ttl <= 3600:
        yield Problem(("dns", "ttl"), f"expected at most 1h (got {file.dns.ttl:g}s)")


def _address(file: ClusterFile, address: Address) -> Iterator[Problem]:
    if address.version == 6:
        yield Problem(_AT, f"IPv6 is not supported yet (got {address})")
        return
    if address.is_multicast or address.is_unspecified or address.is_loopback or address.is_reserved:
        yield Problem(_AT, f"expected a unicast address (got {address})")
    if address in file.node.addresses:
        yield Problem(_AT, f"is this node's own address (got {address})", ("node.addresses",))
    if any(address in cidr for cidr in file.pods.cidr):
        yield Problem(_AT, f"expected an address outside pods.cidr (got {address})", ("pods.cidr",))
    ranges = file.services.service_cidr
    if ranges and not any(address in cidr for cidr in ranges):
        text = f"expected an address inside services.serviceCIDR {', '.join(map(str, ranges))} (got {address})"
        yield Problem(_AT, text, ("services.serviceCIDR",))
    for at, service in each(("services", "static"), file.services.static):
        for path, other in each((*at, "clusterIPs"), service.cluster_ips):
            if other == address:
                yield Problem(path, f"used twice: {address} is also {path_text(_AT)}", ("dns.clusterIP",))


def _host(file: ClusterFile) -> Iterator[Problem]:
    """Yield what keeps the resolver from having an address behind the host's link: that of ``state.host_address``."""
    if file.node.host_interface == "" or (file.uplink.mode == "udp" and file.node.host_interface is None):
        yield Problem(_AT, "needs node.hostInterface: the resolver answers behind it", ("node.hostInterface",))
    if not file.pods.cidr:
        if file.state.source == "static":
            yield Problem(_AT, "needs pods.cidr: the resolver has its first address", ("pods.cidr",))
        return
    first = file.pods.cidr[0].network_address
    for at, pod in each(("pods", "static"), file.pods.static):
        for path, address in each((*at, "ip"), pod.ip):
            if address == first:
                yield Problem(path, f"is the resolver's own address (got {address})", ("pods.cidr", "dns.clusterIP"))


def _upstreams(file: ClusterFile, own: Address) -> Iterator[Problem]:
    servers = list(each(("dns", "upstreams"), file.dns.upstreams))
    yield from repeats((path, f"{address}:{port}") for path, (address, port) in servers)
    for path, (address, _) in servers:
        if address == own:
            yield Problem(path, f"is dns.clusterIP itself (got {address})", ("dns.clusterIP",))
        elif address.is_multicast or address in (ip_address("0.0.0.0"), ip_address("::")):
            yield Problem(path, f"expected the address of a name server (got {address})")
