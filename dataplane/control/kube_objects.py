"""From the API's JSON to our values: one function for each kind of object, pure.

The fields are those of core/v1, discovery.k8s.io/v1 and v1beta1, and metallb.io/v1beta1, with the defaults that their
documentation gives. Only IPv4 is taken over. Whatever cannot be used of an object (an endpoint with a bad address) is
left out and named in a complaint, beside the value; an object that cannot be used at all raises `ObjectError`.

How a port of a service finds its number: by its name in the endpoint slices and not by ``targetPort``, as kube-proxy
does. So every port asks its endpoints for "name/protocol".
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from dataplane.control.cluster import ClusterNode, ClusterPod
from dataplane.control.kube_watch import ObjectError
from dataplane.control.state import (
    Address,
    AddressPool,
    Endpoint,
    FamilyPolicy,
    L2Advertisement,
    Labels,
    Protocol,
    Selector,
    Service,
    ServicePort,
    ServiceType,
)

ZONE = "topology.kubernetes.io/zone"
HOSTNAME = "kubernetes.io/hostname"
SERVICE_NAME = "kubernetes.io/service-name"
PROXY_NAME = "service.kubernetes.io/service-proxy-name"
TUNNEL_ADDRESS = "projectcalico.org/IPv4VXLANTunnelAddr"
TUNNEL_MAC = "projectcalico.org/VXLANTunnelMACAddr"
AFFINITY_SECONDS, LONGEST_AFFINITY = 10800.0, 86400.0  # the API takes no longer one

Item: TypeAlias = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KubeService:
    """A service, without its endpoints, and what is needed to write to it.

    Attributes:
        held: The addresses that its status has now.
        version: Its ``resourceVersion``; no difference on its own.
    """

    service: Service
    uid: str = ""
    held: tuple[Address, ...] = ()
    version: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class KubeSlice:
    """An endpoint slice. ``service`` is "" for one that belongs to none."""

    service: str
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class KubePool:
    """An address pool, whose namespaces may also be chosen by their labels."""

    pool: AddressPool
    labels: Labels = ()
    namespace_selectors: tuple[Selector, ...] = ()


@dataclass(frozen=True, slots=True)
class KubeAdvertisement:
    """An advertisement, whose pools may also be chosen by their labels."""

    advertisement: L2Advertisement
    pool_selectors: tuple[Selector, ...] = ()


# --- nodes, pods, namespaces -----------------------------------------------------------------------------------------


def node_of(item: Item) -> tuple[ClusterNode, str]:
    """Return a Node. Its first block is the one with its tunnel address: Calico's annotation, if there is one."""
    metadata, spec, status = _table(item, "metadata"), _table(item, "spec"), _table(item, "status")
    said = _Said()
    cidrs = said.all(_prefix, _list(spec, "podCIDRs") or [spec.get("podCIDR")], "podCIDR")
    internal = (each.get("address") for each in _tables(status, "addresses") if each.get("type") == "InternalIP")
    addresses = said.all(_address, internal, "InternalIP")
    conditions = {_text(each, "type"): _text(each, "status") for each in _tables(status, "conditions")}
    annotations = _table(metadata, "annotations")
    tunnel = said.all(_address, [annotations.get(TUNNEL_ADDRESS)], TUNNEL_ADDRESS)
    if tunnel and not (cidrs and cidrs[0].network_address == tunnel[0]):
        cidrs = (IPv4Network(tunnel[0]), *cidrs)
    labels = _labels(metadata, "labels")
    node = ClusterNode(
        name=_name(metadata),
        addresses=addresses,
        pod_cidrs=cidrs,
        vtep_mac=next(iter(said.all(_mac, [annotations.get(TUNNEL_MAC)], TUNNEL_MAC)), 0),
        zone=dict(labels).get(ZONE, ""),
        labels=labels,
        network_unavailable=conditions.get("NetworkUnavailable") == "True",
        since=_seconds(metadata.get("creationTimestamp")),
        alive=conditions.get("Ready") == "True",
    )
    return node, said.text


def pod_of(item: Item) -> tuple[ClusterPod, str]:
    """Return a Pod; one that has ended has no addresses any more."""
    metadata, status = _table(item, "metadata"), _table(item, "status")
    said = _Said()
    given = [each.get("ip") for each in _tables(status, "podIPs")] or [status.get("podIP")]
    ended = status.get("phase") in ("Succeeded", "Failed")
    addresses = () if ended else said.all(_address, given, "podIP")
    node = _text(_table(item, "spec"), "nodeName")
    return ClusterPod(_name(metadata), _text(metadata, "namespace"), node, addresses), said.text


def namespace_of(item: Item) -> tuple[Labels, str]:
    """Return a Namespace's labels."""
    return _labels(_table(item, "metadata"), "labels"), ""


# --- services and their endpoints ------------------------------------------------------------------------------------


def service_of(item: Item) -> tuple[KubeService, str]:
    """Return a Service.

    One with the label ``service-proxy-name`` belongs to another proxy: only cluster DNS needs to know it, so it keeps
    its cluster IP, and loses its ports and everything else that would make traffic ours.
    """
    metadata, spec, status = _table(item, "metadata"), _table(item, "spec"), _table(item, "status")
    said = _Said()
    kind = _choice(spec, "type", ServiceType, "ClusterIP")
    labels = _labels(metadata, "labels")
    foreign = any(key == PROXY_NAME for key, _ in labels)
    ingress = [each for each in _tables(_table(status, "loadBalancer"), "ingress") if each.get("ipMode") != "Proxy"]
    held = said.all(_address, (each.get("ip") for each in ingress), "ingress") if kind == "LoadBalancer" else ()
    affinity = _table(_table(spec, "sessionAffinityConfig"), "clientIP").get("timeoutSeconds", AFFINITY_SECONDS)
    cluster_ips = [each for each in _list(spec, "clusterIPs") or [spec.get("clusterIP")] if each not in ("None", "")]
    external = _text(spec, "externalTrafficPolicy") == "Local" and kind in ("NodePort", "LoadBalancer")
    service = Service(
        name=_name(metadata),
        namespace=_text(metadata, "namespace"),
        type=kind,
        cluster_ips=() if kind == "ExternalName" else said.all(_address, cluster_ips, "clusterIP"),
        external_ips=() if foreign else said.all(_address, _list(spec, "externalIPs"), "externalIP"),
        load_balancer_ips=() if foreign else held,
        ports=() if foreign else said.all(_port, _tables(spec, "ports"), "port"),
        affinity_seconds=min(_number(affinity, AFFINITY_SECONDS), LONGEST_AFFINITY)
        if spec.get("sessionAffinity") == "ClientIP"
        else 0,
        external_policy="Local" if external or _local_externals(spec, kind) else "Cluster",
        internal_policy="Local" if spec.get("internalTrafficPolicy") == "Local" else "Cluster",
        source_ranges=said.all(_range, _list(spec, "loadBalancerSourceRanges"), "loadBalancerSourceRange"),
        health_check_node_port=0 if foreign else _port_number(spec.get("healthCheckNodePort")),
        publish_not_ready=spec.get("publishNotReadyAddresses") is True,
        external_name=_text(spec, "externalName") if kind == "ExternalName" else "",
        origin="kubernetes",
        labels=labels,
        annotations=_labels(metadata, "annotations"),
        load_balancer_class=_text(spec, "loadBalancerClass"),
        family_policy=_choice(spec, "ipFamilyPolicy", FamilyPolicy, "SingleStack"),
        selector=_labels(spec, "selector"),
        requested_ip=next(iter(said.all(_address, [spec.get("loadBalancerIP") or None], "loadBalancerIP")), None),
    )
    return KubeService(service, _text(metadata, "uid"), held, _text(metadata, "resourceVersion")), said.text


def _local_externals(spec: Item, kind: str) -> bool:
    """A ClusterIP service with external IPs may say Local, too (``ServiceSpec.externalTrafficPolicy``)."""
    return kind == "ClusterIP" and bool(_list(spec, "externalIPs")) and spec.get("externalTrafficPolicy") == "Local"


def _port(given: Item) -> ServicePort:
    name = _text(given, "name")
    protocol = _choice(given, "protocol", Protocol, "TCP")
    number = _port_number(given.get("port"))
    if not number:
        raise ObjectError("expected a port number")
    return ServicePort(number, protocol, name, f"{name}/{protocol}", _port_number(given.get("nodePort")))


def slice_of(item: Item) -> tuple[KubeSlice, str]:
    """Return an EndpointSlice of either version. Of an endpoint's addresses only the first means anything."""
    metadata = _table(item, "metadata")
    name = _text(_table(metadata, "labels"), SERVICE_NAME)
    if not name or item.get("addressType", "IPv4") != "IPv4":
        return KubeSlice(""), ""
    said = _Said()
    ports = tuple(
        sorted(
            (f"{_text(port, 'name')}/{_text(port, 'protocol') or 'TCP'}", number)
            for port in _tables(item, "ports")
            if (number := _port_number(port.get("port")))
        )
    )
    endpoints = said.all(lambda given: _endpoint(given, ports), _tables(item, "endpoints"), "endpoint")
    return KubeSlice(f"{_text(metadata, 'namespace')}/{name}", endpoints), said.text


def _endpoint(given: Item, ports: tuple[tuple[str, int], ...]) -> Endpoint:
    addresses = _list(given, "addresses")
    if not addresses:
        raise ObjectError("without an address")
    conditions, topology = _table(given, "conditions"), _table(given, "topology")
    ready = conditions.get("ready") is not False
    serving = conditions.get("serving")
    address = _address(addresses[0])
    if address is None:
        raise ObjectError(f"expected an IPv4 address (got {addresses[0]})")
    return Endpoint(
        address=address,
        node=_text(given, "nodeName") or _text(topology, HOSTNAME),
        zone=_text(given, "zone") or _text(topology, ZONE),
        ready=ready,
        serving=ready if serving is None else serving is True,
        terminating=conditions.get("terminating") is True,
        ports=ports,
        hostname=_text(given, "hostname"),
    )


def merged(slices: Iterable[tuple[Endpoint, ...]]) -> tuple[Endpoint, ...]:
    """Return the endpoints of a service's slices, in an order that does not depend on the order of the slices.

    An endpoint may be in two slices for a while; then the better of its conditions counts. One with other ports in
    another slice stays a second one: each port finds the endpoints that have it.
    """
    found: dict[tuple[Address, tuple[tuple[str, int], ...]], Endpoint] = {}
    for endpoints in slices:
        for endpoint in endpoints:
            key = endpoint.address, endpoint.ports
            held = found.get(key)
            if held is None or _goodness(endpoint) > _goodness(held):
                found[key] = endpoint
    return tuple(found[key] for key in sorted(found, key=lambda key: (int(key[0]), key[1])))


def _goodness(endpoint: Endpoint) -> tuple[bool, bool, bool, bool, str, str, str]:
    texts = endpoint.node, endpoint.hostname, endpoint.zone  # any order will do, if it is the same everywhere
    good = endpoint.ready and not endpoint.terminating
    return (good, endpoint.serving, not endpoint.terminating, endpoint.ready, *texts)


# --- MetalLB ---------------------------------------------------------------------------------------------------------


def pool_of(item: Item) -> tuple[KubePool, str]:
    """Return an IPAddressPool."""
    metadata, spec = _table(item, "metadata"), _table(item, "spec")
    said = _Said()
    allocation = _table(spec, "serviceAllocation")
    priority = allocation.get("priority")
    pool = AddressPool(
        name=_name(metadata),
        ranges=said.all(_address_range, _list(spec, "addresses"), "address"),
        auto_assign=spec.get("autoAssign") is not False,
        avoid_buggy_ips=spec.get("avoidBuggyIPs") is True,
        priority=priority if isinstance(priority, int) and 0 <= priority < 1 << 31 else 0,
        namespaces=frozenset(name for name in _list(allocation, "namespaces") if isinstance(name, str)),
        service_selectors=_selectors(allocation, "serviceSelectors"),
    )
    return KubePool(pool, _labels(metadata, "labels"), _selectors(allocation, "namespaceSelectors")), said.text


def advertisement_of(item: Item) -> tuple[KubeAdvertisement, str]:
    """Return an L2Advertisement."""
    metadata, spec = _table(item, "metadata"), _table(item, "spec")
    if spec.get("serviceSelectors"):
        raise ObjectError("serviceSelectors are not supported")  # without them it would announce too much
    advertisement = L2Advertisement(
        name=_name(metadata),
        pools=frozenset(name for name in _list(spec, "ipAddressPools") if isinstance(name, str)),
        node_selectors=_selectors(spec, "nodeSelectors"),
        interfaces=frozenset(name for name in _list(spec, "interfaces") if isinstance(name, str)),
        preferences=tuple(
            (int(min(_number(each.get("weight"), 1), 100)), _selector(_table(each, "preference")))
            for each in _tables(spec, "preferredNodeSelectors")
        ),
    )
    return KubeAdvertisement(advertisement, _selectors(spec, "ipAddressPoolSelectors")), ""


def _selectors(table: Item, key: str) -> tuple[Selector, ...]:
    return tuple(_selector(given) for given in _tables(table, key))


_Operator: TypeAlias = Literal["In", "NotIn", "Exists", "DoesNotExist"]


def _selector(given: Item) -> Selector:
    expressions: list[tuple[str, _Operator, tuple[str, ...]]] = []
    for each in _tables(given, "matchExpressions"):
        operator: _Operator = _choice(each, "operator", _Operator, "")
        expressions.append((_text(each, "key"), operator, tuple(str(value) for value in _list(each, "values"))))
    return Selector(_labels(given, "matchLabels"), tuple(expressions))


# --- values ----------------------------------------------------------------------------------------------------------


class _Said:
    """What could not be used of an object."""

    def __init__(self) -> None:
        self._complaints: list[str] = []

    @property
    def text(self) -> str:
        """All complaints, in one line."""
        return "; ".join(self._complaints)

    def all(self, convert: Callable[[Any], T | None], values: Iterable[Any], what: str) -> tuple[T, ...]:
        """Convert values; None is left out, and so is what cannot be converted."""
        found: dict[T, None] = {}
        for value in values:
            if value is None:
                continue
            try:
                made = convert(value)
            except ValueError as error:
                self._complaints.append(f"{what}: {error}")
            else:
                if made is not None:
                    found[made] = None
        return tuple(found)


@lru_cache(1 << 17)
def _usable(text: str) -> IPv4Address | None:
    address = ip_address(text)
    if address.is_loopback or address.is_unspecified or address.is_multicast or address.is_link_local:
        raise ObjectError(f"nobody can have the address {address}")
    return address if isinstance(address, IPv4Address) else None


def _address(value: Any) -> IPv4Address | None:
    """Return an address that a node, a pod or a service can have; None for one of IPv6, which is no mistake."""
    if not isinstance(value, str):
        raise ObjectError(f"expected an IP address (got {value!r})")
    return _usable(value)


def _prefix(value: Any) -> IPv4Network | None:
    network = ip_network(value) if isinstance(value, str) else None
    if network is None:
        raise ObjectError(f"expected an IP prefix (got {value!r})")
    return network if isinstance(network, IPv4Network) else None


def _range(value: Any) -> IPv4Network | None:
    """Return a source range, which may have blanks around it and bits behind its length, as kube-proxy takes it."""
    network = ip_network(value.strip(), strict=False) if isinstance(value, str) else None
    if network is None:
        raise ObjectError(f"expected an IP prefix (got {value!r})")
    return network if isinstance(network, IPv4Network) else None


def _address_range(value: Any) -> tuple[Address, Address] | None:
    if not isinstance(value, str):
        raise ObjectError(f"expected a prefix or a range (got {value!r})")
    if "-" not in value:
        network = ip_network(value)
        return (network[0], network[-1]) if isinstance(network, IPv4Network) else None
    first, last = (ip_address(part.strip()) for part in value.split("-", 1))
    if first.version != last.version or int(first) > int(last):
        raise ObjectError(f"expected a range (got {value!r})")
    return (first, last) if isinstance(first, IPv4Address) else None


def _mac(value: Any) -> int:
    parts = value.split(":") if isinstance(value, str) else []
    if len(parts) != 6 or not all(len(part) == 2 for part in parts):
        raise ObjectError(f"expected a MAC address (got {value!r})")
    mac = int("".join(parts), 16)
    if mac == 0 or mac >> 40 & 1:
        raise ObjectError(f"expected a unicast MAC address (got {value})")
    return mac


def _seconds(value: Any) -> float:
    """Return a ``Time`` of meta/v1 (RFC 3339) in seconds since the epoch; 0 for none."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else default


def _port_number(value: Any) -> int:
    """Return a port's number; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536 else 0


# --- JSON that may be anything ---------------------------------------------------------------------------------------


def _table(holder: Item, key: str) -> Item:
    found = holder.get(key)
    return found if isinstance(found, dict) else {}


def _list(holder: Item, key: str) -> list[Any]:
    found = holder.get(key)
    return found if isinstance(found, list) else []


def _tables(holder: Item, key: str) -> list[Item]:
    return [each for each in _list(holder, key) if isinstance(each, dict)]


def _text(holder: Item, key: str) -> str:
    found = holder.get(key)
    return found if isinstance(found, str) else ""


def _name(metadata: Item) -> str:
    return str(metadata["name"])  # `Shelf.read` has seen that there is one


def _labels(holder: Item, key: str) -> Labels:
    return tuple(sorted((name, value) for name, value in _table(holder, key).items() if isinstance(value, str)))


def _choice(holder: Item, key: str, choices: Any, default: str) -> Any:
    value = holder.get(key, default)
    if value not in get_args(choices):
        raise ObjectError(f"{key} is {value!r}")
    return value
