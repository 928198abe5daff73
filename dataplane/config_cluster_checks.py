"""What must fit together in ``[loadBalancer]``, ``[dns]`` and ``[cluster]``."""

from collections.abc import Iterator

from dataplane.config_checks import Problem, each, repeats
from dataplane.config_cluster import ClusterFile
from dataplane.config_dns_checks import check_dns
from dataplane.config_lines import KeyPath
from dataplane.config_model import File
from dataplane.control.claims import SHARED_PORTS
from dataplane.control.state import Address

_SHORTEST, _LONGEST = 0.02, 10.0  # seconds between heartbeats: a loop has other work, too; and a minute is no failover
_POOLS, _ADVERTISEMENTS = ("loadBalancer", "ipAddressPools"), ("loadBalancer", "l2Advertisements")


def check_cluster(file: File) -> Iterator[Problem]:
    """Yield the problems of the sections that nodes share."""
    assert isinstance(file, ClusterFile)
    yield from _pools(file) if file.state.source == "static" else _stored(file)
    if "dns" in file.model_fields_set:
        yield from check_dns(file)
    yield from _heartbeats(file)


def _heartbeats(file: ClusterFile) -> Iterator[Problem]:
    given, at = file.cluster, ("cluster", "heartbeatPort")
    port, interval = given.heartbeat_port, given.heartbeat_interval
    if port and port == file.vxlan.port:
        yield Problem(at, f"is also vxlan.port (got {port})", ("vxlan.port",))
    low, high = file.pods.nat_port_range or SHARED_PORTS
    if file.uplink.shared and low <= port <= high:
        yield Problem(at, f"is a port that pods are masqueraded with: {low}-{high} (got {port})", ("pods", "uplink"))
    if not _SHORTEST <= interval <= _LONGEST:
        text = f"expected {_SHORTEST * 1000:.0f}ms to {_LONGEST:.0f}s (got {interval:g}s)"
        yield Problem(("cluster", "heartbeatInterval"), text)


def _stored(file: ClusterFile) -> Iterator[Problem]:
    """All nodes have the same pools where there is a store: nobody looks for them in a node's file."""
    etcd = file.state.etcd.prefix.rstrip("/")
    places = {
        "etcd": (f"keys {etcd}/pools/NAME", f"keys {etcd}/advertisements/NAME"),
        "kubernetes": ("objects of kind IPAddressPool", "objects of kind L2Advertisement"),
    }[file.state.source]
    given = (file.load_balancer.ip_address_pools, file.load_balancer.l2_advertisements)
    for at, sections, place in zip((_POOLS, _ADVERTISEMENTS), given, places, strict=True):
        if sections:
            yield Problem(at, f'with state.source = "{file.state.source}" these are {place}', ("state.source",))


def _others(file: ClusterFile) -> Iterator[tuple[str, Address, Address]]:
    """Yield what services must not be given, under the names of the keys."""
    yield from (("node.addresses", address, address) for address in file.node.addresses)
    blocks = [("pods.cidr", cidr) for cidr in file.pods.cidr]
    blocks += [("services.serviceCIDR", cidr) for cidr in file.services.service_cidr]
    for number, peer in enumerate(file.peers):
        yield f"peers[{number}].address", peer.address, peer.address
        blocks += [(f"peers[{number}].podCIDR", cidr) for cidr in peer.pod_cidr]
    yield from ((name, cidr.network_address, cidr.broadcast_address) for name, cidr in blocks)


def _pools(file: ClusterFile) -> Iterator[Problem]:
    pools = list(each(_POOLS, file.load_balancer.ip_address_pools))
    yield from repeats(((*at, "name"), pool.name) for at, pool in pools)
    seen: list[tuple[KeyPath, str, Address, Address]] = []
    for at, pool in pools:
        if not pool.addresses:
            yield Problem(
                (*at, "addresses"), "expected at least one range (got [])", ("loadBalancer.ipAddressPools.addresses",)
            )
        for path, (first, last) in each((*at, "addresses"), pool.addresses):
            if first.version == 6:
                yield Problem(path, f"IPv6 is not supported yet (got {first})")
                continue
            for _, name, low, high in seen:
                if int(first) <= int(high) and int(low) <= int(last):
                    yield Problem(path, f"{first}-{last} overlaps {low}-{high} of pool {name}")
            seen.append((path, pool.name, first, last))
            for name, low, high in _others(file):
                if first.version == low.version and int(first) <= int(high) and int(low) <= int(last):
                    text = f"{first}-{last} has addresses of {name} ({low if low == high else f'{low}-{high}'})"
                    yield Problem(path, text, (name.partition("[")[0],))
    names = {pool.name for _, pool in pools}
    for at, advertisement in each(_ADVERTISEMENTS, file.load_balancer.l2_advertisements):
        for path, name in each((*at, "ipAddressPools"), advertisement.ip_address_pools):
            if name not in names:
                yield Problem(path, f"no such pool (got {name})", ("loadBalancer.ipAddressPools",))
