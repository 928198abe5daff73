"""The same services three times: as our node reads them, and as kube-proxy writes them for iptables and for nftables.

    client 10.244.1.10 ── the node: 10.96.x.y:80 ──▸ 10.244.1.20:8080 ── server

Of ``count`` services the last one is the one that is asked: its only endpoint is the server's pod, the others' are pods
of other nodes that nobody asks. In iptables mode each service is a rule in KUBE-SERVICES that the first packet of a
connection has to pass, and the last is the far end of them; kube-proxy's order is that of a Go map, so the mean of a
cluster is half of it. The rules are those of kube-proxy 1.33 with one cluster CIDR; beyond 1000 endpoints it leaves out
the comments at the rules of endpoints, and so do we.
"""

import base64
import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from bench._network import B, Network, Pair, inside

CLUSTER_CIDR = "10.244.0.0/16"
SERVICE_CIDR = "10.96.0.0/12"
HTTP, IPERF, TARGET = 80, 5201, 8080
_LARGE_CLUSTER = 1000  # endpoints
_TRANSACTION = 1000  # services
_FIRST_VIP, _FIRST_POD = IPv4Address("10.96.1.0"), IPv4Address("10.244.2.1")


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service, for TCP; what kube-proxy calls a service port."""

    service: str
    port_name: str
    vip: str
    port: int
    target: int
    endpoints: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name in kube-proxy's comments."""
        return f"default/{self.service}:{self.port_name}"


def vip(count: int) -> str:
    """Return the address of the service that is asked, the last of ``count``."""
    return str(_FIRST_VIP + count - 1)


def make_services(count: int) -> list[ServicePort]:
    """Return ``count`` services, each with two endpoints on other nodes but the last, which is asked."""
    services = []
    for i in range(count - 1):
        pods = str(_FIRST_POD + 2 * i), str(_FIRST_POD + 2 * i + 1)
        services.append(ServicePort(f"service-{i}", "http", str(_FIRST_VIP + i), HTTP, TARGET, pods))
    services.append(ServicePort("asked", "iperf", vip(count), IPERF, IPERF, (B,)))
    services.append(ServicePort("asked", "http", vip(count), HTTP, TARGET, (B,)))
    return services


# --- ours ------------------------------------------------------------------------------------------------------------


def toml(services: list[ServicePort]) -> str:
    """Return the services for node.toml."""
    lines = ["[services]", f'clusterCIDR = ["{CLUSTER_CIDR}"]', f'serviceCIDR = ["{SERVICE_CIDR}"]']
    ports: dict[str, list[ServicePort]] = {}
    for service in services:
        ports.setdefault(service.service, []).append(service)
    for name, some in ports.items():
        listed = ", ".join(
            f'{{ name = "{one.port_name}", protocol = "TCP", port = {one.port}, targetPort = {one.target} }}'
            for one in some
        )
        endpoints = ", ".join(f'{{ ip = "{address}" }}' for address in some[0].endpoints)
        lines += ["[[services.static]]", f'name = "{name}"', f'clusterIPs = ["{some[0].vip}"]']
        lines += [f"ports = [{listed}]", f"endpoints = [{endpoints}]"]
    return "\n".join(lines) + "\n"


# --- kube-proxy's rules ----------------------------------------------------------------------------------------------


def _digest(*parts: str) -> str:
    return base64.b32encode(hashlib.sha256("".join(parts).encode()).digest()).decode()


_FILTER = """
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" \
-j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" \
-j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 ! -s 127.0.0.0/8 \
-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack \
--ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""

_NAT_HEAD = """
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
"""

_NAT_TAIL = """
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" \
-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
COMMIT
"""


def iptables(services: list[ServicePort]) -> str:
    """Return the input of iptables-restore."""
    commented = sum(len(service.endpoints) for service in services) <= _LARGE_CLUSTER
    chains: list[str] = []
    rules: list[str] = []
    for service in services:
        for line in _iptables_rules(service, commented):
            (chains if line[0] == ":" else rules).append(line)
    return "\n".join([_FILTER + "*nat" + _NAT_HEAD.rstrip(), *chains, *rules]) + _NAT_TAIL


def _iptables_rules(service: ServicePort, commented: bool) -> Iterator[str]:
    def comment(text: str) -> str:
        return f'-m comment --comment "{text}" ' if commented else ""

    name = service.name
    chain = f"KUBE-SVC-{_digest(name, 'tcp')[:16]}"
    to_vip = f'-m comment --comment "{name} cluster IP" -m tcp -p tcp -d {service.vip} --dport {service.port}'
    yield f":{chain} - [0:0]"
    yield f"-A KUBE-SERVICES {to_vip} -j {chain}"
    yield f"-A {chain} {to_vip} ! -s {CLUSTER_CIDR} -j KUBE-MARK-MASQ"
    for left, address in zip(range(len(service.endpoints), 0, -1), service.endpoints, strict=True):
        target = f"{address}:{service.target}"
        endpoint = f"KUBE-SEP-{_digest(name, 'tcp', target)[:16]}"
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        yield f":{endpoint} - [0:0]"
        yield f"-A {chain} {comment(f'{name} -> {target}')}{chance}-j {endpoint}"
        yield f"-A {endpoint} {comment(name)}-s {address} -j KUBE-MARK-MASQ"
        yield f"-A {endpoint} {comment(name)}-m tcp -p tcp -j DNAT --to-destination {target}"


_NFTABLES = f"""
table ip kube-proxy {{
    set cluster-ips {{ type ipv4_addr; }}
    set nodeport-ips {{ type ipv4_addr; }}
    map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
    map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    map service-nodeports {{ type inet_proto . inet_service : verdict; }}
    chain cluster-ips-check {{
        ip daddr @cluster-ips reject
        ip daddr {{ {SERVICE_CIDR} }} drop
    }}
    chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
    chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
    chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
    chain mark-for-masquerade {{ mark set mark or 0x4000; }}
    chain masquerading {{
        mark and 0x4000 == 0 return
        mark set mark xor 0x4000
        masquerade fully-random
    }}
    chain services {{
        ip daddr . meta l4proto . th dport vmap @service-ips
        ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }}
    chain filter-prerouting-pre-dnat {{
        type filter hook prerouting priority -110; ct state new jump firewall-check;
    }}
    chain filter-output-pre-dnat {{ type filter hook output priority -110; ct state new jump firewall-check; }}
    chain filter-forward {{
        type filter hook forward priority 0
        ct state new jump service-endpoints-check
        ct state new jump cluster-ips-check
    }}
    chain filter-input {{
        type filter hook input priority 0
        ct state new jump nodeport-endpoints-check
        ct state new jump service-endpoints-check
    }}
    chain filter-output {{
        type filter hook output priority 0
        ct state new jump service-endpoints-check
        ct state new jump cluster-ips-check
    }}
    chain nat-output {{ type nat hook output priority -100; jump services; }}
    chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
    chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
}}
"""


def nftables(services: list[ServicePort]) -> Iterator[str]:
    """Yield the inputs of ``nft -f``, one after the other.

    Each is a transaction of some thousand services: the kernel's time for one grows with its length squared, 40 seconds
    for 10,000 services at once and 11 in ten.
    """
    yield _NFTABLES
    for start in range(0, len(services), _TRANSACTION):
        yield "\n".join(_nftables_lines(services[start : start + _TRANSACTION])) + "\n"


def _nftables_lines(services: list[ServicePort]) -> Iterator[str]:
    elements = []
    yield "table ip kube-proxy {"
    for service in services:
        chain = f"service-{_digest(service.name, 'tcp')[:8]}"
        endpoints = [f"endpoint-{_digest(service.name, address)[:8]}" for address in service.endpoints]
        for endpoint, address in zip(endpoints, service.endpoints, strict=True):
            to_self = f"ip saddr {address} jump mark-for-masquerade"
            yield f"chain {endpoint} {{ {to_self}; meta l4proto tcp dnat to {address}:{service.target}; }}"
        from_outside = f"ip daddr {service.vip} tcp dport {service.port} ip saddr != {CLUSTER_CIDR}"
        choice = ", ".join(f"{i} : goto {endpoint}" for i, endpoint in enumerate(endpoints))
        pick = f"numgen random mod {len(endpoints)} vmap {{ {choice} }}"
        yield f"chain {chain} {{ {from_outside} jump mark-for-masquerade; {pick}; }}"
        elements.append(f"{service.vip} . tcp . {service.port} : goto {chain}")
    yield "}"
    addresses = dict.fromkeys(service.vip for service in services)
    yield f"add element ip kube-proxy cluster-ips {{ {', '.join(addresses)} }}"
    yield f"add element ip kube-proxy service-ips {{ {', '.join(elements)} }}"


# --- nodes -----------------------------------------------------------------------------------------------------------

OURS, IPTABLES, NFTABLES = "ours", "iptables", "nftables"


def make_pair(network: Network, kind: str, count: int) -> Pair:
    """Return two pods with a node of a kind between them that has ``count`` services."""
    name, services = f"{kind[0]}{count}", make_services(count)
    if kind == OURS:
        return network.ours(name, toml(services))
    pair = network.kernel(name)
    network.spread(2, name)
    if kind == IPTABLES:
        _load(network.prefix + name, iptables(services), "iptables-legacy-restore")
    else:
        for transaction in nftables(services):
            _load(network.prefix + name, transaction, "nft", "-f", "-")
    return pair


def _load(namespace: str, rules: str, *command: str) -> None:
    done = subprocess.run(inside(namespace, *command), input=rules, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
