"""What must fit together in ``[loadBalancer]`` and ``[dns]``."""

from collections.abc import Iterator

from dataplane.config_checks import Problem, each, repeats
from dataplane.config_cluster import ClusterFile
from dataplane.config_dns_checks import check_dns
from dataplane.config_lines import KeyPath
from dataplane.config_model import File
from dataplane.control.state import Address

_POOLS, _ADVERTISEMENTS = ("loadBalancer", "ipAddressPools"), ("loadBalancer", "l2Advertisements")


def check_cluster(file: File) -> Iterator[Problem]:
    """Yield the problems of the sections that nodes share."""
    assert isinstance(file, ClusterFile)
    yield from _pools(file)
    if "dns" in file.model_fields_set:
        yield from check_dns(file)


def _pools(file: ClusterFile) -> Iterator[Problem]:
    pools = list(each(_POOLS, file.load_balancer.ip_address_pools))
    yield from repeats(((*at, "name"), pool.name) for at, pool in pools)
    seen: list[tuple[KeyPath, str, Address, Address]] = []
    for at, pool in pools:
        if not pool.addresses:
            yield Problem((*at, "addresses"), "expected at least one range (got [])")
        for path, (first, last) in each((*at, "addresses"), pool.addresses):
            if first.version == 6:
                yield Problem(path, f"IPv6 is not supported yet (got {first})")
                continue
            for _, name, low, high in seen:
                if int(first) <= int(high) and int(low) <= int(last):
                    yield Problem(path, f"{first}-{last} overlaps {low}-{high} of pool {name}")
            seen.append((path, pool.name, first, last))
    names = {pool.name for _, pool in pools}
    for at, advertisement in each(_ADVERTISEMENTS, file.load_balancer.l2_advertisements):
        for path, name in each((*at, "ipAddressPools"), advertisement.ip_address_pools):
            if name not in names and file.state.source == "static":
                yield Problem(path, f"no such pool (got {name})", ("loadBalancer.ipAddressPools",))
