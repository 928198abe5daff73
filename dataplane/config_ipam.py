"""The shape and the sense of ``[ipam]``: how pods get addresses that no file names.

Names and defaults are Calico's (``IPPool``, ``IPAMConfiguration`` and ``IPReservation`` of projectcalico.org/v3). This
module is imported only for a file that has the section.
"""

# ruff: noqa: RUF012 - pydantic copies a default; ruff sees its models only where BaseModel itself is the base

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from dataplane.config_checks import Problem, each, overlaps, repeats
from dataplane.config_cluster import ClusterFile, LabelSelector, selector_of
from dataplane.config_lines import KeyPath
from dataplane.config_model import File, Section
from dataplane.config_types import Duration, Name, Prefix, number
from dataplane.control.ipam import BLOCK_SIZES, DEFAULT_BLOCK_SIZE, MAX_BLOCKS, MAX_COOLDOWN, Pool, Rules

_POOLS: KeyPath = ("ipam", "pools")


class IPPool(Section):
    """``IPPool`` of projectcalico.org/v3."""

    name: Name = "default"
    cidr: Prefix
    block_size: Annotated[int, number(20, 128)] | None = None
    disabled: bool = False
    node_selector: LabelSelector | None = None


class IpamSection(Section):
    """How pods get addresses."""

    pools: list[IPPool] = []
    strict_affinity: bool = False
    max_blocks_per_host: Annotated[int, number(1, 1 << 20)] = MAX_BLOCKS
    cooldown: Duration = 0.0
    reservations: list[Prefix] = []


class IpamFile(ClusterFile):
    """A file that says how pods get addresses."""

    ipam: IpamSection = Field(default_factory=IpamSection)


def rules_of(given: IpamSection) -> Rules:
    """Return the rules that a section describes."""
    return Rules(
        pools=tuple(
            Pool(
                name=pool.name,
                cidr=pool.cidr,
                block_size=_block_size(pool),
                disabled=pool.disabled,
                node_selector=None if pool.node_selector is None else selector_of(pool.node_selector),
            )
            for pool in given.pools
        ),
        reservations=tuple(given.reservations),
        strict_affinity=given.strict_affinity,
        max_blocks=given.max_blocks_per_host,
        cooldown=given.cooldown,
    )


def _block_size(pool: IPPool) -> int:
    return pool.block_size or max(DEFAULT_BLOCK_SIZE[pool.cidr.version], pool.cidr.prefixlen)


def check_ipam(file: File) -> Iterator[Problem]:
    """Yield the problems of the section."""
    assert isinstance(file, IpamFile)
    pools = list(each(_POOLS, file.ipam.pools))
    yield from repeats(((*at, "name"), pool.name) for at, pool in pools)
    for at, pool in pools:
        yield from _pool(file, pool, at)
    blocks = list(each(("pods", "cidr"), file.pods.cidr))
    prefixes = blocks + [((*at, "cidr"), pool.cidr) for at, pool in pools]
    for problem in overlaps(prefixes, first=len(blocks)):
        yield Problem(problem.path, problem.text, ("pods.cidr",))
    for path, prefix in each(("ipam", "reservations"), file.ipam.reservations):
        if prefix.version == 6:
            yield Problem(path, f"IPv6 is not supported yet (got {prefix})")
    if file.ipam.cooldown > MAX_COOLDOWN:
        yield Problem(("ipam", "cooldown"), f"expected at most {MAX_COOLDOWN:g}s (got {file.ipam.cooldown:g}s)")
    if pools and file.state.source != "etcd":
        text = f'needs state.source "etcd": pods of a {file.state.source} node have addresses of pods.cidr'
        yield Problem((*_POOLS, 0), text, ("state.source",))


def _pool(file: IpamFile, pool: IPPool, at: KeyPath) -> Iterator[Problem]:
    if pool.cidr.version == 6:
        yield Problem((*at, "cidr"), f"IPv6 is not supported yet (got {pool.cidr})")
    low, high = BLOCK_SIZES[pool.cidr.version]
    low = max(low, pool.cidr.prefixlen)
    if low > high:
        yield Problem((*at, "cidr"), f"expected a prefix of at most {high} bits (got {pool.cidr})")
    elif not low <= _block_size(pool) <= high:
        text = f"expected a number from {low} to {high} for {pool.cidr} (got {_block_size(pool)})"
        yield Problem((*at, "blockSize"), text, ("ipam.pools.cidr",))
    for path, address in each(("node", "addresses"), file.node.addresses):
        if address in pool.cidr:
            yield Problem(path, f"expected an address outside the pool {pool.cidr} (got {address})", ("ipam.pools",))
    if (file.pods.gateway is not None) and file.pods.gateway in pool.cidr:
        yield Problem(("pods", "gateway"), f"expected an address outside the pool {pool.cidr}", ("ipam.pools",))
