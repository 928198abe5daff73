"""What must fit together in a file whose shape is right, and what this version refuses.

Each check yields problems and never stops at the first. A problem names the keys it relies on: when one of those was
itself wrong, the problem would only be an echo and is left out (``config.load``).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, collapse_addresses
from typing import Any

from dataplane.config_lines import KeyPath
from dataplane.config_model import File, PeerSection, RouteSection, StaticPod
from dataplane.control.state import POD_GATEWAY, VXLAN_OVERHEAD, Address, Network, vtep_mac

POOLS = 63  # prefixes of ``tables.policy``
# Keys whose feature comes later, and the values that mean "off". The shape of them all is checked nevertheless.
_OFF: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("node", "netns"): ("",),
    ("uplink", "mode"): ("af_packet", "udp", "none"),
    ("pods", "static", "*", "bandwidth"): ({},),
    ("services", "ipvs", "strictARP"): (True,),
    ("services", "masqueradeBit"): (14,),  # a mark that is not the kernel's clashes with nobody's
    ("networkPolicies",): ([],),
    ("engine", "kernels"): ("numba",),
    ("engine", "workers"): (1,),
    ("engine", "busyPollUs"): (0,),
    ("web", "listen"): ("",),
    ("log", "format"): ("auto", "console", "json"),
    ("security", "user"): ("",),
    ("security", "keepCapabilities"): ([],),
    ("security", "seccomp"): (False,),
    ("capture", "dir"): ("",),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where, and the keys that must be right for this to be worth saying."""

    path: KeyPath
    text: str
    uses: tuple[str, ...] = ()


def check(file: File, values: dict[str, Any]) -> Iterator[Problem]:
    """Yield every problem of a file with a valid shape; ``values`` is the same file as plain TOML values."""
    yield from unsupported(values)
    yield from _ipv6(file)
    yield from _uplink(file)
    yield from _host_interface(file)
    yield from _pods(file)
    yield from _pod_addresses(file)
    yield from _peers(file)
    yield from _routes(file)
    yield from _pools(file, values)
    if "services" in values:
        from dataplane.config_services_checks import check_services

        yield from check_services(file)
    if {"loadBalancer", "dns", "cluster"} & values.keys():
        from dataplane.config_cluster_checks import check_cluster

        yield from check_cluster(file)
    if "ipam" in values:
        from dataplane.config_ipam import check_ipam

        yield from check_ipam(file)


# --- refused for now -------------------------------------------------------------------------------------------------


def unsupported(values: dict[str, Any]) -> Iterator[Problem]:
    """Yield what this version refuses."""
    for pattern, allowed in _OFF.items():
        for path, value in _select(values, pattern, ()):
            if value not in allowed:
                yield Problem(path, f"not supported yet{_instead(allowed)}")


def _instead(allowed: tuple[Any, ...]) -> str:
    words = [f'"{value}"' for value in allowed if isinstance(value, str) and value]
    return f"; use {' or '.join(words)}" if words else ""


def _select(value: Any, pattern: tuple[str, ...], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if not pattern:
        yield path, value
        return
    head, rest = pattern[0], pattern[1:]
    if head == "*":
        for index, item in enumerate(value):
            yield from _select(item, rest, (*path, index))
    elif head in value:
        yield from _select(value[head], rest, (*path, head))


def _ipv6(file: File) -> Iterator[Problem]:
    for path, value in _addresses(file):
        if value.version == 6:
            yield Problem(path, f"IPv6 is not supported yet (got {value})")


def _addresses(file: File) -> Iterator[tuple[KeyPath, Address | Network]]:
    yield from each(("node", "addresses"), file.node.addresses)
    yield from each(("pods", "cidr"), file.pods.cidr)
    if file.pods.gateway is not None:
        yield ("pods", "gateway"), file.pods.gateway
    for pod, at in _static_pods(file):
        yield from each((*at, "ip"), pod.ip)
    for peer, at in _peer_sections(file):
        yield (*at, "address"), peer.address
        yield from each((*at, "podCIDR"), peer.pod_cidr)
    for route, at in _route_sections(file):
        yield (*at, "dst"), route.dst
        if route.via is not None:
            yield (*at, "via"), route.via


# --- what must fit together ------------------------------------------------------------------------------------------


def _uplink(file: File) -> Iterator[Problem]:
    uplink = file.uplink
    if uplink.mode == "none":
        for key, given in (("peers", file.peers), ("routes", file.routes)):
            if given:
                yield Problem((key, 0), "needs an uplink: give uplink.interface", ("uplink",))
        return
    if not uplink.interface:
        yield Problem(("uplink", "interface"), "missing; expected the name of the host's NIC", ("uplink",))
    if uplink.interface == file.vxlan.interface and file.vxlan.mode != "Never":
        yield Problem(("uplink", "interface"), f"is also vxlan.interface (got {uplink.interface})", ("vxlan",))
    if not file.node.addresses and file.state.source != "kubernetes":  # there the Node object says them
        yield Problem(("node", "addresses"), "missing; expected this node's address on the uplink", ("node",))
    if uplink.mode == "udp" and file.vxlan.mode != "Always":
        text = f'needs frames on the uplink: uplink.mode "udp" carries "Always" only (got "{file.vxlan.mode}")'
        yield Problem(("vxlan", "mode"), text, ("uplink", "vxlan"))


def _host_interface(file: File) -> Iterator[Problem]:
    name = file.node.host_interface
    if name and file.uplink.mode == "udp":
        yield Problem(("node", "hostInterface"), 'uplink.mode "udp" has none', ("uplink",))
    others = {"uplink.interface": file.uplink.interface, "vxlan.interface": file.vxlan.interface}
    for key, other in others.items():
        if name and name == other:
            yield Problem(("node", "hostInterface"), f"is also {key} (got {name})", (key,))


def _pods(file: File) -> Iterator[Problem]:
    limit, why = file.uplink.mtu, "uplink.mtu"
    if file.uplink.mode != "none":
        if file.vxlan.mode != "Never":
            limit, why = limit - VXLAN_OVERHEAD, f"uplink.mtu - {VXLAN_OVERHEAD} for VXLAN"
        if file.pods.mtu > limit:
            uses = ("uplink", "vxlan.mode")
            yield Problem(("pods", "mtu"), f"expected at most {limit}: {why} (got {file.pods.mtu})", uses)
    if 0 < file.pods.mtu < 576:
        yield Problem(("pods", "mtu"), f"expected 0 or at least 576 (got {file.pods.mtu})")
    if "csum" not in file.pods.offload and file.pods.offload:
        yield Problem(("pods", "offload"), 'expected "csum" beside the others: segmentation needs it')
    gateway = file.pods.gateway or POD_GATEWAY
    for cidr in file.pods.cidr:
        if gateway in cidr:
            text = f"expected an address outside pods.cidr {cidr} (got {gateway})"
            yield Problem(("pods", "gateway"), text, ("pods.cidr",))
    for path, address in each(("node", "addresses"), file.node.addresses):
        if any(address in cidr for cidr in file.pods.cidr):
            yield Problem(path, f"expected an address outside pods.cidr (got {address})", ("pods.cidr",))
        if address == gateway:
            yield Problem(path, f"is pods.gateway (got {address})", ("pods.gateway",))
    yield from overlaps(list(each(("pods", "cidr"), file.pods.cidr)))


def _pod_addresses(file: File) -> Iterator[Problem]:
    pods = list(_static_pods(file))
    cidrs = ", ".join(str(cidr) for cidr in file.pods.cidr)
    tunnels = file.uplink.mode != "none" and file.vxlan.mode != "Never"
    own = file.pods.cidr[0].network_address if tunnels and file.pods.cidr else None
    if pods and not cidrs and file.state.source == "static":
        yield Problem(("pods", "cidr"), "missing; expected the prefix that holds the pods' addresses", ("pods.cidr",))
    for pod, at in pods:
        if not pod.ip:
            yield Problem((*at, "ip"), "expected at least one address (got [])", ("pods.static.ip",))
        for path, address in each((*at, "ip"), pod.ip):
            if cidrs and not any(address in cidr for cidr in file.pods.cidr):
                yield Problem(path, f"expected an address inside pods.cidr {cidrs} (got {address})", ("pods.cidr",))
            if address == own:
                yield Problem(
                    path, "the first address of pods.cidr is the node's own end of the tunnel", ("pods.cidr",)
                )
        if pod.mac == file.pods.gateway_mac:
            yield Problem((*at, "mac"), "is pods.gatewayMAC", ("pods.gatewayMAC",))
    yield from repeats(((*at, "name"), f"{pod.namespace}/{pod.name}") for pod, at in pods)
    yield from repeats((path, ip) for pod, at in pods for path, ip in each((*at, "ip"), pod.ip))
    yield from repeats(((*at, "mac"), pod.mac) for pod, at in pods if pod.mac is not None)
    yield from repeats(((*at, "netns"), pod.netns or pod.name) for pod, at in pods)


def _peers(file: File) -> Iterator[Problem]:
    peers = list(_peer_sections(file))
    own_macs = {vtep_mac(file.node.name)}
    for peer, at in peers:
        if peer.name == file.node.name:
            yield Problem((*at, "name"), f"is this node's own name (got {peer.name})", ("node.name",))
        if peer.address in file.node.addresses:
            yield Problem((*at, "address"), f"is this node's own address (got {peer.address})", ("node.addresses",))
        if peer.vtep_mac in own_macs:
            yield Problem((*at, "vtepMAC"), "is the MAC of this node's own VTEP", ("node.name",))
        if any(peer.address in cidr for cidr in file.pods.cidr):
            yield Problem((*at, "address"), f"expected an address outside pods.cidr (got {peer.address})")
        if not peer.pod_cidr:
            yield Problem((*at, "podCIDR"), "expected at least one prefix (got [])", ("peers.podCIDR",))
    yield from repeats(((*at, "name"), peer.name) for peer, at in peers)
    yield from repeats(((*at, "address"), peer.address) for peer, at in peers)
    names = {peer.name: (peer, at) for peer, at in reversed(peers)}  # of two with one name, the derived MAC is no news
    yield from repeats(
        ((*at, "vtepMAC"), peer.vtep_mac or vtep_mac(peer.name)) for peer, at in reversed(names.values())
    )
    blocks = list(each(("pods", "cidr"), file.pods.cidr))
    remote = [pair for peer, at in peers for pair in each((*at, "podCIDR"), peer.pod_cidr)]
    yield from overlaps(blocks + remote, first=len(blocks))


def _routes(file: File) -> Iterator[Problem]:
    for route, at in _route_sections(file):
        if route.type == "unicast" and route.via is None and file.uplink.shared:
            yield Problem((*at, "via"), "missing; expected the address of the next hop", ("routes",))
        if route.type != "unicast" and route.via is not None:
            yield Problem((*at, "via"), f'a route of type "{route.type}" has no next hop (got {route.via})')
        if route.via is None:
            continue
        if file.uplink.mode == "udp":
            yield Problem((*at, "via"), 'needs frames on the uplink: uplink.mode "udp" has none', ("uplink",))
        if any(route.via in cidr for cidr in file.pods.cidr):
            yield Problem((*at, "via"), f"expected a neighbor on the uplink, not a pod (got {route.via})")
    blocks = [*each(("pods", "cidr"), file.pods.cidr)]
    blocks += [pair for peer, at in _peer_sections(file) for pair in each((*at, "podCIDR"), peer.pod_cidr)]
    yield from repeats([*blocks, *(((*at, "dst"), route.dst) for route, at in _route_sections(file))], len(blocks))


def _pools(file: File, values: dict[str, Any]) -> Iterator[Problem]:
    """NatOutgoing and kube-proxy's detection of local traffic are about prefixes, of which there is a limit."""
    given = len(values.get("services", {}).get("clusterCIDR", ()))
    count = given * (1 + file.pods.nat_outgoing)
    if not given and file.pods.nat_outgoing and file.state.source != "static":
        text = "missing; expected the prefixes of all pods: pods.natOutgoing needs them where a store has the blocks"
        yield Problem(("services", "clusterCIDR"), text, ("services.clusterCIDR", "state.source"))
    elif not given and file.pods.nat_outgoing:
        blocks = [*file.pods.cidr, *(cidr for peer in file.peers for cidr in peer.pod_cidr)]
        count = len(list(collapse_addresses(block for block in blocks if isinstance(block, IPv4Network))))
    if count > POOLS:
        text = f"expected a few prefixes that hold all pods: with {count} there are more than the limit of {POOLS}"
        yield Problem(("services", "clusterCIDR"), text, ("services.clusterCIDR", "pods.cidr", "peers"))


# --- words -----------------------------------------------------------------------------------------------------------


def path_text(path: KeyPath) -> str:
    """Return ``pods.static[0].mac``."""
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(words).removeprefix(".")


def _static_pods(file: File) -> Iterator[tuple[StaticPod, KeyPath]]:
    return ((pod, ("pods", "static", index)) for index, pod in enumerate(file.pods.static))


def _peer_sections(file: File) -> Iterator[tuple[PeerSection, KeyPath]]:
    return ((peer, ("peers", index)) for index, peer in enumerate(file.peers))


def _route_sections(file: File) -> Iterator[tuple[RouteSection, KeyPath]]:
    return ((route, ("routes", index)) for index, route in enumerate(file.routes))


def each(path: KeyPath, items: Iterable[Any]) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the elements of a list with their paths."""
    return (((*path, index), item) for index, item in enumerate(items))


def repeats(pairs: Iterable[tuple[KeyPath, Any]], first: int = 0) -> Iterator[Problem]:
    """Yield the second and later uses of a value, from the pair numbered ``first`` on."""
    seen: dict[Any, KeyPath] = {}
    for number, (path, value) in enumerate(pairs):
        if number >= first and value in seen:
            got = f"{value:012x}" if isinstance(value, int) else value
            text = ":".join(got[i : i + 2] for i in range(0, 12, 2)) if isinstance(value, int) else got
            yield Problem(path, f"used twice: {text} is also {path_text(seen[value])}")
        seen.setdefault(value, path)


def overlaps(pairs: list[tuple[KeyPath, Network]], first: int = 0) -> Iterator[Problem]:
    """Yield the prefixes, from the pair numbered ``first`` on, that share addresses with one before them."""
    for number, (path, prefix) in enumerate(pairs):
        for other_path, other in pairs[:number] if number >= first else ():
            if prefix.version == other.version and prefix.overlaps(other):
                yield Problem(path, f"{prefix} overlaps {other} of {path_text(other_path)}")
