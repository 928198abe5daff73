"""Nodes out of pieces: what each says of itself, whether it is a member now, and the blocks that are behind it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from types import MappingProxyType

from dataplane.control.cluster import ClusterNode
from dataplane.control.contest import Contest
from dataplane.control.ipam import Block
from dataplane.control.state import Address, Labels, Network, Peer, vtep_mac

_OWN, _ALIVE, _AWAY = range(3)
_FILE = ""  # before the names of the file's peers; a node's begins with a letter or a digit


@dataclass(frozen=True, slots=True)
class StoredNode:
    """What a node has written about itself; ``cidrs`` are blocks that its file gives."""

    addresses: tuple[Address, ...]
    cidrs: tuple[Network, ...] = ()
    vtep_mac: int = 0
    zone: str = ""
    labels: Labels = ()
    since: float = 0


@dataclass(frozen=True, slots=True)
class _Share:
    """What matters of a block to routes: whose it is, and the addresses that others have borrowed out of it."""

    cidr: Network
    node: str
    number: int
    borrowed: tuple[tuple[str, Address], ...]


class Nodes:
    """The nodes of a store, without those that say to have what another one has.

    Of two nodes with one address the living one is before the other, then the older one; before all are this node and
    the peers of its file.

    Args:
        own: This node's name.
        peers: Those of its file; of a node with the name of one nothing is used (``cluster.over``).
    """

    def __init__(self, own: str, peers: tuple[Peer, ...] = ()) -> None:
        self._own = own
        self._peers = {peer.name for peer in peers}
        self._stored: dict[str, tuple[StoredNode, int]] = {}
        self._members: dict[str, float] = {}
        self._shares: dict[str, _Share] = {}
        self._shares_of: dict[str, dict[str, _Share]] = {}  # by whom they matter to, else each looks through all
        self._contest: Contest[object] = Contest()
        for peer in peers:
            self._contest.enter(f"{_FILE}/{peer.name}", (_OWN, 0), (peer.address, peer.vtep_mac, *peer.pod_cidrs))
        self._whole: dict[str, ClusterNode] = {}
        self._dirty: set[str] = set()

    def set(self, name: str, node: StoredNode | None, created: int) -> None:
        """Set what a node says of itself; None: it is forgotten, except for this one, which lives and has its pods."""
        if node is not None:
            self._stored[name] = (node, created)
        elif name != self._own:
            self._stored.pop(name, None)
        self._dirty.add(name)

    def set_member(self, name: str, since: float | None) -> None:
        """Make a node a member, or take that back (None)."""
        if since is None:
            self._members.pop(name, None)
        else:
            self._members[name] = since
        self._dirty.add(name)

    def set_block(self, key: str, block: Block | None) -> bool:
        """Set a block; return whether that matters to anybody's routes."""
        before, after = self._shares.pop(key, None), _share(block) if block is not None else None
        for name in _sharers(before):
            del self._shares_of[name][key]
        if after is not None:
            self._shares[key] = after
            for name in _sharers(after):
                self._shares_of.setdefault(name, {})[key] = after
        if before == after:
            return False
        self._dirty |= {*_sharers(before), *_sharers(after)}
        return True

    def settled(self, lost: Callable[[str, str], None]) -> Mapping[str, ClusterNode]:
        """Return all nodes; those that nothing happened to are the same objects as before.

        ``lost`` is told the keys of nodes, and why each is left out; "" for one that is in.
        """
        cidrs = {name: self._cidrs(name) for name in self._dirty}
        rivals: set[str] = set()
        for name in self._dirty:
            if name not in self._stored:
                rivals |= self._contest.leave(name)
                continue
            node, created = self._stored[name]
            rank = _OWN if name == self._own else _ALIVE if name in self._members else _AWAY
            tokens = (*node.addresses, node.vtep_mac or vtep_mac(name), *cidrs[name])
            rivals |= self._contest.enter(name, (rank, created), () if name in self._peers else tokens)
        for name in sorted(self._dirty | rivals):
            self._settle(name, cidrs.get(name) or self._cidrs(name), lost)
        self._dirty.clear()
        return MappingProxyType(dict(self._whole))

    def _settle(self, name: str, cidrs: tuple[Network, ...], lost: Callable[[str, str], None]) -> None:
        self._whole.pop(name, None)
        if name not in self._stored:
            return
        defeat = self._contest.lost(name)
        if defeat is not None:
            what = f"{defeat[0]:012x}" if isinstance(defeat[0], int) else defeat[0]
            lost(f"nodes/{name}", f"{what} is also that of node {defeat[1].removeprefix('/')}")
            return
        lost(f"nodes/{name}", "")
        node, _ = self._stored[name]
        self._whole[name] = ClusterNode(
            name=name,
            addresses=node.addresses,
            pod_cidrs=cidrs,
            vtep_mac=node.vtep_mac,
            zone=node.zone,
            labels=node.labels,
            since=self._members.get(name) or node.since,
            alive=name in self._members,
        )

    def _cidrs(self, name: str) -> tuple[Network, ...]:
        """Return what is behind a node: the blocks of its file, its own in the order of their claims, what it borrowed.

        As ``ipam.prefixes_of`` does for blocks that are not cut down to shares.
        """
        given = self._stored[name][0].cidrs if name in self._stored else ()
        shares = self._shares_of.get(name, {}).values()
        own = sorted(
            (share.number, share.cidr.network_address.packed, share.cidr) for share in shares if share.node == name
        )
        borrowed = sorted(
            (address.packed, ip_network(address))
            for share in shares
            for node, address in share.borrowed
            if node == name
        )
        return (*given, *(cidr for *_, cidr in own), *(cidr for _, cidr in borrowed))


def _share(block: Block) -> _Share:
    return _Share(block.cidr, block.affinity, block.number, tuple(sorted(_borrowed(block), key=str)))


def _sharers(share: _Share | None) -> set[str]:
    return {share.node, *(node for node, _ in share.borrowed)} - {""} if share is not None else set()


def _borrowed(block: Block) -> Iterator[tuple[str, Address]]:
    for ordinal, allocation in block.allocations.items():
        if allocation.node != block.affinity:
            yield allocation.node, block.address(ordinal)
