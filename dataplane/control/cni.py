"""Containers that a runtime has connected through ``dataplane-cni``, as values, and what the runtime is told.

An *attachment* is one interface in one container. It makes a pod of this node, in a namespace that is the runtime's
and that the node knows by its path and, since paths and process ids are used again, by the kernel's number for it (the
cookie). Everything here is pure; ``attach.Attacher`` looks into namespaces, keeps addresses and applies the result.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from ipaddress import IPv4Address, IPv4Interface, ip_interface
from typing import Any, TypeAlias

from dataplane.cni import (
    ATTACHMENTS,
    EXISTS,
    IDENTIFIER,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    MISMATCH,
    TRY_AGAIN_LATER,
    UNKNOWN_CONTAINER,
    VERSIONS,
    CniError,
    Request,
)
from dataplane.control.state import (
    Address,
    DesiredState,
    Network,
    Pod,
    PodNetwork,
    host_interface,
    pod_mac,
)

_BARE = "default"  # the namespace of a container that Kubernetes knows nothing of
_MAC = re.compile(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}")
_LONGEST_NAME = 253  # of a pod: RFC 1123's subdomain

Key: TypeAlias = tuple[str, str, str]
"""Network, container, interface: what the specification has as primary key."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """One interface in one container.

    Attributes:
        network: The name in the network's configuration.
        netns: The path that the runtime gave.
        cookie: The kernel's number for that namespace.
        namespace: The pod's in Kubernetes, "default" for a container without pod.
        name: The pod's, or the container's id.
        mac: Of the interface.
    """

    network: str
    container: str
    ifname: str
    netns: str
    cookie: int
    namespace: str
    name: str
    address: IPv4Address
    mac: int

    @property
    def key(self) -> Key:
        """What no other attachment has."""
        return self.network, self.container, self.ifname

    @property
    def id(self) -> str:
        """The pod's ``namespace/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Draft:
    """An attachment that is being made.

    Attributes:
        replaces: Attachments that can only be leftovers: a pod of this name with an earlier sandbox, or a namespace
            at this path that is gone.
        requested: The address that the runtime wants; None is any.
    """

    attachment: Attachment
    replaces: tuple[Attachment, ...]
    requested: IPv4Address | None

    def with_address(self, address: IPv4Address) -> Attachment:
        """Return the attachment that it becomes."""
        return replace(self.attachment, address=address)


def key_of(wanted: Request) -> Key:
    """Return the key of the attachment that a request is about."""
    return wanted.network, wanted.container, wanted.ifname


def handle_of(node: str, key: Key) -> str:
    """Return under what name an attachment's address is held: no part of it can have a slash."""
    return "/".join(("cni", node, *key))


def key_of_handle(node: str, handle: str) -> Key | None:
    """Return whose address a handle of this node holds; None when it is none of ours."""
    words = handle.split("/")
    return (words[2], words[3], words[4]) if len(words) == 5 and words[:2] == ["cni", node] else None


# --- ADD -------------------------------------------------------------------------------------------------------------


def draft(
    wanted: Request, cookie: int, attached: Mapping[Key, Attachment], drafts: Collection[Draft], state: DesiredState
) -> Draft:
    """Return what an ADD would make.

    Args:
        wanted: The request.
        cookie: Of the namespace that it names.
        attached: What there is.
        drafts: What else is being made.
        state: The node's, for the pods of its file.

    Raises:
        CniError: It is there already, or asks for something that cannot be.
    """
    if "prevResult" in wanted.config:
        raise CniError(INVALID_CONFIG, "prevResult: a plugin that makes the first interface cannot come second")
    namespace, name = _pod_name(wanted)
    requested, mac = _wishes(wanted)
    made = Attachment(
        wanted.network, wanted.container, wanted.ifname, wanted.netns, cookie, namespace, name, IPv4Address(0),
        mac or pod_mac(namespace, name),
    )  # fmt: skip
    if made.key in attached:
        raise CniError(EXISTS, f"{made.ifname}: the container is connected already", _told(attached[made.key]))
    for pod in state.pods:
        if pod.id == made.id and not pod.cookie:
            raise CniError(EXISTS, f"pod {made.id}: it is in the node's file, in namespace {pod.netns}")
    for other in attached.values():
        if other.cookie == cookie or (other.id == made.id and other.container == made.container):
            raise CniError(EXISTS, f"{made.ifname}: the container has an interface of this node already", _told(other))
    for other in (each.attachment for each in drafts):
        if other.cookie == cookie or other.id == made.id or other.netns == made.netns:
            raise CniError(TRY_AGAIN_LATER, f"pod {made.id}: it is being connected just now", _told(other))
    replaces = tuple(other for other in attached.values() if other.id == made.id or other.netns == made.netns)
    return Draft(made, replaces, requested)


def _told(other: Attachment) -> str:
    return f"network {other.network}, container {other.container}, interface {other.ifname}, address {other.address}"


def _pod_name(wanted: Request) -> tuple[str, str]:
    names = []
    for key, default in (("K8S_POD_NAMESPACE", _BARE), ("K8S_POD_NAME", wanted.container)):
        name = wanted.arguments.get(key) or default
        if not IDENTIFIER.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {key}: {name!r}; expected letters, digits and _ . -")
        names.append(name)
    return names[0], names[1]


def _wishes(wanted: Request) -> tuple[IPv4Address | None, int]:
    """Return the address and the MAC that the runtime asks for; None and 0 when it does not care.

    They come by ``runtimeConfig``, for a plugin with the capabilities, or as podman has it by ``CNI_ARGS``.
    """
    given = wanted.config.get("runtimeConfig") or {}
    if not isinstance(given, dict):
        raise CniError(INVALID_CONFIG, f"runtimeConfig: {given!r}; expected an object")
    ips = given.get("ips") or [text for text in (wanted.arguments.get("IP"),) if text]
    mac = given.get("mac") or wanted.arguments.get("MAC", "")
    if not isinstance(ips, list) or len(ips) > 1:
        raise CniError(INVALID_CONFIG, f"runtimeConfig.ips: {ips!r}; expected one address in a list")
    return (_requested(ips[0]) if ips else None), (_station(mac) if mac else 0)


def _requested(text: Any) -> IPv4Address:
    try:
        interface = ip_interface(text if isinstance(text, str) else "")
    except ValueError:
        raise CniError(INVALID_CONFIG, f"address {text!r}; expected one such as 10.244.1.10") from None
    if not isinstance(interface, IPv4Interface):
        raise CniError(INVALID_CONFIG, f"address {text!r}; pods have IPv4 addresses only, for now")
    return interface.ip


def _station(text: Any) -> int:
    if not isinstance(text, str) or not _MAC.fullmatch(text):
        raise CniError(INVALID_CONFIG, f"MAC {text!r}; expected six bytes such as 02:00:0a:f4:01:0a")
    number = int(text.replace(":", ""), 16)
    if number >> 40 & 1 or not number:
        raise CniError(INVALID_CONFIG, f"MAC {text!r}; expected one station's")
    return number


def pod_of(attachment: Attachment, network: PodNetwork) -> Pod:
    """Return the pod that an attachment makes of this node's."""
    return Pod(
        name=attachment.name,
        namespace=attachment.namespace,
        netns=attachment.netns,
        addresses=(attachment.address,),
        mac=attachment.mac,
        mtu=network.mtu,
        interface=host_interface(network.interface_prefix, attachment.namespace, attachment.name),
        ifname=attachment.ifname,
        cookie=attachment.cookie,
    )


def over(state: DesiredState, attached: Iterable[Attachment]) -> DesiredState:
    """Return the state with the containers among its pods."""
    pods = tuple(pod_of(attachment, state.pod_network) for attachment in attached)
    return replace(state, pods=state.pods + pods) if pods else state


def result(wanted: Request, attachment: Attachment, state: DesiredState) -> dict[str, Any]:
    """Return what the runtime is told, in the form of its version of the specification."""
    at = VERSIONS.index(wanted.version)
    interface: dict[str, Any] = {"name": attachment.ifname, "mac": _mac(attachment.mac)}
    interface |= {"mtu": state.pod_network.mtu} if at >= VERSIONS.index("1.1.0") else {}
    gateway = str(state.pod_network.gateway)
    address: dict[str, Any] = {"version": "4"} if at < VERSIONS.index("1.0.0") else {}
    return {
        "cniVersion": wanted.version,
        "interfaces": [interface | {"sandbox": attachment.netns}],
        "ips": [address | {"address": f"{attachment.address}/32", "gateway": gateway, "interface": 0}],
        "routes": [{"dst": "0.0.0.0/0", "gw": gateway}],
        "dns": wanted.config.get("dns") or _dns(attachment, state),
    }


def _dns(attachment: Attachment, state: DesiredState) -> dict[str, Any]:
    """Return what a kubelet writes into a pod's resolv.conf (``dnsPolicy: ClusterFirst``)."""
    if state.dns is None:
        return {}
    domain = state.dns.domain
    return {
        "nameservers": [str(state.dns.address)],
        "domain": domain,
        "search": [f"{attachment.namespace}.svc.{domain}", f"svc.{domain}", domain],
        "options": ["ndots:5"],
    }


# --- CHECK -----------------------------------------------------------------------------------------------------------


def require_listed(wanted: Request, attachment: Attachment | None) -> Attachment:
    """Return the attachment, if it is there and is what the runtime's ``prevResult`` says; more may be in that.

    Raises:
        CniError: It is not.
    """
    if attachment is None:
        raise CniError(
            UNKNOWN_CONTAINER, f"{wanted.ifname}: the container is not connected to network {wanted.network}"
        )
    if attachment.netns != wanted.netns:
        raise CniError(MISMATCH, f"CNI_NETNS: {wanted.netns}; the container was connected in {attachment.netns}")
    previous = wanted.config.get("prevResult")
    if not isinstance(previous, dict):
        raise CniError(INVALID_CONFIG, "prevResult: missing; CHECK compares it with what is there")
    ours = {"name": wanted.ifname, "mac": _mac(attachment.mac), "sandbox": wanted.netns}
    if not any(ours.items() <= _text(each).items() for each in _objects(previous, "interfaces")):
        raise CniError(MISMATCH, f"prevResult.interfaces: {wanted.ifname} is not as it was made", json.dumps(ours))
    address = f"{attachment.address}/32"
    if not any(each.get("address") == address for each in _objects(previous, "ips")):
        raise CniError(MISMATCH, f"prevResult.ips: the container's address is {address}")
    return attachment


def _objects(previous: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = previous.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise CniError(INVALID_CONFIG, f"prevResult.{key}: expected a list of objects")
    return found


def _mac(number: int) -> str:
    return number.to_bytes(6).hex(":")


def _text(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the values that are text, MACs in one form."""
    words = {key: value for key, value in given.items() if isinstance(value, str)}
    return words | {"mac": words.get("mac", "").lower()}


@dataclass(frozen=True, slots=True)
class Seen:
    """An interface as it is in the container; routes are (destination, gateway)."""

    up: bool
    mac: int
    mtu: int
    addresses: frozenset[Address]
    routes: frozenset[tuple[Network, Address | None]]


def require_as_made(attachment: Attachment, network: PodNetwork, seen: Seen | None) -> None:
    """Check that the container's interface is still what was made; others may have added to it.

    Raises:
        CniError: It is not; the details name each difference.
    """
    if seen is None:
        raise CniError(MISMATCH, f"{attachment.ifname}: the interface is gone")
    gateways = {gateway for destination, gateway in seen.routes if not destination.prefixlen}
    wrong = [] if seen.up else ["it is down"]
    if seen.mac != attachment.mac:
        wrong.append(f"its MAC is {_mac(seen.mac)}, not {_mac(attachment.mac)}")
    if seen.mtu != network.mtu:
        wrong.append(f"its MTU is {seen.mtu}, not {network.mtu}")
    if attachment.address not in seen.addresses:
        wrong.append(f"it has no address {attachment.address}")
    if network.gateway not in gateways:
        wrong.append(f"it has no default route by {network.gateway}")
    if wrong:
        raise CniError(MISMATCH, f"{attachment.ifname}: {'; '.join(wrong)}")


# --- GC --------------------------------------------------------------------------------------------------------------


def stale(wanted: Request, attached: Mapping[Key, Attachment]) -> list[Attachment]:
    """Return the attachments of the network that the runtime does not list.

    Raises:
        CniError: There is no list.
    """
    listed = wanted.config.get(ATTACHMENTS, "missing")
    if listed is None:  # libcni writes a Go slice as it is: without a container it is nil
        listed = []
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise CniError(INVALID_CONFIG, f"{ATTACHMENTS}: {listed!r}; expected a list of objects")
    valid = {(str(each.get("containerID")), str(each.get("ifname"))) for each in listed}
    of_network = (each for each in attached.values() if each.network == wanted.network)
    return [each for each in of_network if (each.container, each.ifname) not in valid]


# --- the books -------------------------------------------------------------------------------------------------------


def written(attached: Iterable[Attachment], boot: str) -> str:
    """Return the file that the next start of the node reads; a cookie is good for one boot of the machine."""
    rows = [asdict(each) | {"address": str(each.address)} for each in attached]
    return json.dumps({"boot": boot, "attachments": rows}, indent=1)


def read(text: str, boot: str) -> tuple[list[Attachment], list[str]]:
    """Return the attachments in a file, and a line for each entry that makes no sense."""
    try:
        content = json.loads(text)
        rows = content["attachments"] if content["boot"] == boot else []
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        return [], [f"it is unreadable: {error!r}"]
    found, problems = [], []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        try:
            found.append(_attachment(row))
        except (ValueError, LookupError, TypeError):
            problems.append(f"entry {number} is unreadable: {row!r}")
    return found, problems


def _attachment(row: Mapping[str, Any]) -> Attachment:
    values = {field.name: row[field.name] for field in fields(Attachment)} | {"address": IPv4Address(row["address"])}
    numbers = {"cookie", "mac"}
    if not all(isinstance(values[key], int if key in numbers else str) for key in values if key != "address"):
        raise ValueError(row)
    return Attachment(**values)
