"""What etcd holds under the prefix, as values, kept up to date key by key.

    nodes/<name>                         a node: addresses, podCIDR, vtepMAC, zone, labels, uplinkMTU, since
    members/<name>                       leased: the node lives
    blocks/<cidr>                        of addresses (``ipam_json``): whose, and who has borrowed out of it
    pods/<node>/<namespace>/<name>       ip, labels
    services/<namespace>/<name>          the keys of [[services.static]] without endpoints
    endpoints/<namespace>/<name>/<slice> a list of endpoints, with the keys of the file
    pools/<name>                         the keys of [[loadBalancer.ipAddressPools]]
    advertisements/<name>                the keys of [[loadBalancer.l2Advertisements]]
    addresses/<address>                  of load balancers: the services that have it (``loadbalancer_etcd``)

Other keys have readers of their own. A value that is not right is skipped, with one line in the log that names its
key; so is one that wants what another has (``contest``). What a key changes is made anew when a ``Cluster`` is asked
for, the rest are the objects of the one before: with 10,000 services a changed endpoint costs 0.1 ms.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, ip_address, ip_network
from types import MappingProxyType
from typing import Any, Protocol

from dataplane.control.cluster import Cluster, ClusterPod
from dataplane.control.etcd import KeyValue
from dataplane.control.etcd_nodes import Nodes, StoredNode
from dataplane.control.etcd_services import Services
from dataplane.control.ipam import Block
from dataplane.control.ipam_json import BookError, load
from dataplane.control.loadbalancer_etcd import holders
from dataplane.control.services import ServerKey
from dataplane.control.state import Address, AddressPool, DesiredState, Endpoint, L2Advertisement, Service

_STEP = 64  # keys of a list that are looked at in one go: 2 ms when all of them are new
_SHORTEST = 8  # a route to half of the world is a mistake

Listener = Callable[[KeyValue], None]

log = logging.getLogger(__name__)


class ObjectError(ValueError):
    """A value in the store that is not right; the text says what is wrong with it, with the key's path inside."""


class Objects(Protocol):
    """How the store's texts become values that people write, too: with the words and the checks of the file.

    What reads a text raises ``ObjectError``.
    """

    def service(self, namespace: str, name: str, text: str) -> Service:
        """Return a service without endpoints."""
        ...

    def endpoints(self, text: str) -> tuple[Endpoint, ...]:
        """Return a slice of endpoints."""
        ...

    def pool(self, name: str, text: str) -> AddressPool:
        """Return a pool of load balancer addresses."""
        ...

    def advertisement(self, name: str, text: str) -> L2Advertisement:
        """Return an advertisement."""
        ...

    def claims(self, service: Service) -> Iterable[ServerKey]:
        """Return what a service wants that no other can have."""
        ...

    def check_edit(self, name: str, values: tuple[Any, ...], state: DesiredState) -> tuple[str, ...]:
        """Return what is wrong with an edit of the control API (``config_edit``).

        Raises:
            MissingError: There is no such service or endpoint.
        """
        ...


class Contents:
    """Everything under one prefix.

    Args:
        prefix: Of all keys, without a slash at its end.
        state: The node's file: its own name, and services that come before those of the store.
    """

    def __init__(self, prefix: str, objects: Objects, state: DesiredState) -> None:
        self._prefix = f"{prefix}/"
        self._objects = objects
        self._revisions: dict[str, int] = {}
        self._complaints: dict[str, str] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self._services = Services(objects.claims, state.services)
        self._nodes = Nodes(state.node.name, state.peers)
        self._pods: dict[str, tuple[str, ClusterPod]] = {}
        self._pools: dict[str, AddressPool] = {}
        self._advertisements: dict[str, L2Advertisement] = {}
        self._holders: dict[Address, tuple[str, ...]] = {}
        self._made = Cluster(assigned=MappingProxyType({}))
        self._dirty: set[str] = set()

    @property
    def last(self) -> Cluster:
        """The cluster that was made last."""
        return self._made

    def revision_of(self, key: str) -> int:
        """Return the revision that a key was written at, 0 if there is none."""
        return self._revisions.get(key, 0)

    @property
    def changed(self) -> bool:
        """Whether the next one may be another."""
        return bool(self._dirty)

    def listen(self, kind: str, listener: Listener) -> None:
        """Call a function with every key of a kind (the first word behind the prefix) that is put or deleted."""
        self._listeners.setdefault(kind, []).append(listener)

    # --- taking in ---------------------------------------------------------------------------------------------------

    def load(self, items: Iterable[KeyValue], revision: int) -> Iterator[None]:
        """Take a whole list: what is not in it is gone, what has not changed stays as it is.

        Yields now and then, for packets to have their turn.
        """
        there: set[str] = set()
        for number, item in enumerate(items):
            there.add(item.key)
            if self._revisions.get(item.key) != item.mod_revision:
                self.take(item)
            if number % _STEP == 0:
                yield
        for number, key in enumerate(tuple(self._revisions)):
            if key not in there:
                self.take(KeyValue(key, "", 0, revision, 0, 0))
            if number % _STEP == 0:
                yield

    def take(self, item: KeyValue) -> None:
        """Take one key that was put or deleted."""
        if item.deleted:
            self._revisions.pop(item.key, None)
        else:
            self._revisions[item.key] = item.mod_revision
        kind, *names = item.key.removeprefix(self._prefix).split("/")
        for listener in self._listeners.get(kind, ()):
            listener(item)
        taker = _TAKERS.get(kind)
        if taker is None:
            return
        depth, take = taker
        why, bug = "", None
        try:
            if len(names) != depth or not all(names):
                raise ObjectError(f"expected {depth} names behind {kind}/")
            take(self, names, item)
        except ObjectError as error:
            why = str(error)
        except Exception as error:  # every node reads this key: a bug in doing so must not stop them all
            why, bug = f"it cannot be read: {error!r}", error
        if why and len(names) == depth:
            with suppress(ObjectError):
                take(self, names, item._replace(value="", version=0))
        self._complain(item.key, why, bug)

    def _service(self, names: list[str], item: KeyValue) -> None:
        namespace, name = names
        service = None if item.deleted else self._objects.service(namespace, name, item.value)
        self._services.set(f"{namespace}/{name}", service, item.create_revision)
        self._dirty.add("services")

    def _endpoints(self, names: list[str], item: KeyValue) -> None:
        namespace, name, piece = names
        endpoints = () if item.deleted else self._objects.endpoints(item.value)
        self._services.set_slice(f"{namespace}/{name}", piece, endpoints)
        self._dirty.add("services")

    def _node(self, names: list[str], item: KeyValue) -> None:
        self._nodes.set(names[0], None if item.deleted else _node(item.value), item.create_revision)
        self._dirty.add("nodes")

    def _member(self, names: list[str], item: KeyValue) -> None:
        since = None if item.deleted else float(_number(_object(item.value).get("since", 0)))
        self._nodes.set_member(names[0], since)
        self._dirty.add("nodes")

    def _block(self, names: list[str], item: KeyValue) -> None:
        key = f"blocks/{names[0]}"
        try:
            block = None if item.deleted else load(key, item.value)
        except BookError as error:
            raise ObjectError(str(error)) from None
        if self._nodes.set_block(key, block if isinstance(block, Block) else None):
            self._dirty.add("nodes")

    def _pod(self, names: list[str], item: KeyValue) -> None:
        node, namespace, name = names
        key = f"{namespace}/{name}"
        if not item.deleted:
            addresses = _addresses(_object(item.value), "ip")
            self._pods[key] = (node, ClusterPod(name, namespace, node, addresses))
        elif self._pods.get(key, ("",))[0] == node:  # it may have moved to another node before
            del self._pods[key]
        self._dirty.add("pods")

    def _pool(self, names: list[str], item: KeyValue) -> None:
        self._pools.pop(names[0], None)
        self._dirty.add("pools")
        if not item.deleted:
            self._pools[names[0]] = self._objects.pool(names[0], item.value)

    def _advertisement(self, names: list[str], item: KeyValue) -> None:
        self._advertisements.pop(names[0], None)
        self._dirty.add("advertisements")
        if not item.deleted:
            self._advertisements[names[0]] = self._objects.advertisement(names[0], item.value)

    def _holding(self, names: list[str], item: KeyValue) -> None:
        address = _address(names[0])
        self._holders.pop(address, None)
        self._dirty.add("addresses")
        if item.deleted:
            return
        try:
            self._holders[address] = holders(_object(item.value))
        except ValueError as error:
            raise ObjectError(str(error)) from None

    # --- handing out -------------------------------------------------------------------------------------------------

    def cluster(self, revision: int) -> Cluster:
        """Return the whole, as of a revision; what did not change are the objects of the last one."""
        before = self._made
        services, nodes, pods = before.services, before.nodes, before.pods
        if "services" in self._dirty:
            services = self._services.settled(self._lost)
        if "nodes" in self._dirty:
            nodes = self._nodes.settled(self._lost)
        if "pods" in self._dirty:
            pods = MappingProxyType({key: pod for key, (_, pod) in self._pods.items()})
        self._made = Cluster(
            nodes=nodes,
            services=services,
            pods=pods,
            pools=self._sorted(self._pools) if "pools" in self._dirty else before.pools,
            advertisements=self._sorted(self._advertisements) or None
            if "advertisements" in self._dirty
            else before.advertisements,
            assigned=self._assigned() if "addresses" in self._dirty else before.assigned,
            revision=revision,
        )
        self._dirty.clear()
        return self._made

    def _assigned(self) -> Mapping[str, tuple[Address, ...]]:
        found: dict[str, tuple[Address, ...]] = {}
        for address in sorted(self._holders, key=lambda each: each.packed):
            for service in self._holders[address]:
                found[service] = (*found.get(service, ()), address)
        return MappingProxyType(found)

    @staticmethod
    def _sorted(values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(values[name] for name in sorted(values))

    # --- complaining -------------------------------------------------------------------------------------------------

    def _lost(self, key: str, why: str) -> None:
        self._complain(self._prefix + key, why)

    def _complain(self, key: str, why: str, bug: Exception | None = None) -> None:
        """Say once what is wrong with a key; nothing is wrong with it when there is no text."""
        if not why:
            self._complaints.pop(key, None)
        elif self._complaints.get(key) != why:
            self._complaints[key] = why
            log.error("etcd: skipped key=%s: %s", key, why, exc_info=bug)


_TAKERS: dict[str, tuple[int, Callable[[Contents, list[str], KeyValue], None]]] = {
    "nodes": (1, Contents._node),
    "members": (1, Contents._member),
    "blocks": (1, Contents._block),
    "pods": (3, Contents._pod),
    "services": (2, Contents._service),
    "endpoints": (3, Contents._endpoints),
    "pools": (1, Contents._pool),
    "advertisements": (1, Contents._advertisement),
    "addresses": (1, Contents._holding),
}


# --- what nodes write -------------------------------------------------------------------------------------------------


def parsed(text: str) -> Any:
    """Return the value of a JSON text; raise ``ObjectError`` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ObjectError(f"not JSON: {error}") from None


def _object(text: str) -> dict[str, Any]:
    values = parsed(text)
    if not isinstance(values, dict):
        raise ObjectError("expected a JSON object")
    return values


def _node(text: str) -> StoredNode:
    values = _object(text)
    labels = values.get("labels", {})
    if not isinstance(labels, dict):
        raise ObjectError("labels: expected an object")
    try:
        cidrs = tuple(ip_network(str(cidr)) for cidr in values.get("podCIDR", ()))
        mac = int(str(values.get("vtepMAC", "0")).replace(":", ""), 16)
    except (ValueError, TypeError) as error:
        raise ObjectError(str(error)) from None
    addresses = _addresses(values, "addresses")
    for cidr in cidrs:
        if cidr.version == 6:
            raise ObjectError("podCIDR: IPv6 is not supported yet")
        if cidr.prefixlen < _SHORTEST:
            raise ObjectError(f"podCIDR: expected a block of pods, /{_SHORTEST} or longer (got {cidr})")
    if not 0 <= mac < 1 << 48 or mac >> 40 & 1:
        raise ObjectError(f"vtepMAC: expected a unicast MAC address (got {values['vtepMAC']})")
    return StoredNode(
        addresses=addresses,
        cidrs=cidrs,
        vtep_mac=mac,
        zone=str(values.get("zone", "")),
        labels=tuple(sorted((str(key), str(value)) for key, value in labels.items())),
        since=float(_number(values.get("since", 0))),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise ObjectError(f"since: expected seconds since the epoch (got {value!r})")
    return value


def _addresses(values: Mapping[str, Any], key: str) -> tuple[Address, ...]:
    given = values.get(key, [])
    if not isinstance(given, list):
        raise ObjectError(f"{key}: expected a list of addresses")
    return tuple(_address(text) for text in given)


def _address(text: Any) -> Address:
    try:
        address = ip_address(text) if isinstance(text, str) else None
    except ValueError:
        address = None
    if not isinstance(address, IPv4Address) or address.is_multicast or address.is_unspecified:
        raise ObjectError(f"expected an IPv4 address (got {text!r})")
    return address
