"""A node's tables for benches of the pipeline: 250 pods, 1000 routes, 187 other nodes, 100 services.

Each service has a TCP and a UDP port with 8 endpoints: four pods of this node, four of others. The pods' traffic to the
outside is masqueraded (natOutgoing). ``_flows`` makes the traffic.
"""

from ipaddress import IPv4Address, IPv4Network

from dataplane import batch as b
from dataplane.codecs import vxlan
from dataplane.pipeline import Tables
from dataplane.tables.address import halves
from dataplane.tables.interface import OFFLOAD, UP, Driver, Role
from dataplane.tables.neighbour import State
from dataplane.tables.policy import Exposure, Pool
from dataplane.tables.route import Kind, Route
from dataplane.tables.scheduler import Scheduler
from dataplane.tables.service import Destination, Service

UPLINK, UNDERLAY, FIRST_POD = 1, 2, 3
PODS = 250
NODES = 187
ROUTES = 1000
SERVICES, ENDPOINTS, SERVICE_PORT, TARGET_PORT = 100, 8, 80, 8080
POD_MTU = 1450
NODE_MAC, VTEP_MAC, GATEWAY_MAC, ROUTER_MAC = 0x0200_C000_020B, 0x6600_0000_0001, 0xEEEE_EEEE_EEEE, 0x0200_C000_0201
NODE, GATEWAY = "192.0.2.11", "192.0.2.1"


def pod_address(pod: int) -> IPv4Address:
    """Return the address of a pod of this node."""
    return IPv4Address("10.244.1.1") + pod


def pod_mac(pod: int) -> int:
    """Return its MAC address."""
    return 0x0200_0AF4_0101 + pod


def service_address(number: int) -> IPv4Address:
    """Return the address of a service."""
    return IPv4Address("10.96.0.1") + number


def node_address(node: int) -> IPv4Address:
    """Return the address of another node."""
    return IPv4Address("192.0.2.20") + node


def block(node: int, part: int) -> IPv4Network:
    """Return one of the blocks of another node's pods."""
    return IPv4Network((int(IPv4Address("10.244.2.0")) + 64 * (4 * node + part), 26))


def make_tables(flows: int) -> Tables:
    """Return the node's tables, as reconciliation would fill them, with room for ``flows``."""
    tables = Tables(seed=1, flows=flows)
    settings = tables.settings
    settings[b.NODE_LO], settings[b.GATEWAY_LO] = halves(NODE)[1], halves("169.254.1.1")[1]
    settings[b.VTEP_MAC], settings[b.VNI], settings[b.TUNNEL_PORT] = VTEP_MAC, 4096, vxlan.PORT
    settings[b.TUNNEL_PORT_LOW], settings[b.TUNNEL_PORT_HIGH] = 32768, 60999
    settings[b.POD_MTU], settings[b.PROXY_ARP] = POD_MTU, 1
    _interface(tables, UPLINK, Role.UPLINK, 1500, NODE_MAC)
    _interface(tables, UNDERLAY, Role.UNDERLAY, 1500, NODE_MAC)
    for pod in range(PODS):
        _interface(tables, FIRST_POD + pod, Role.POD, POD_MTU, GATEWAY_MAC, pod_mac(pod))
        tables.routes.set(IPv4Network(pod_address(pod)), Route(Kind.POD, FIRST_POD + pod))
    for node in range(NODES):
        vtep = tables.vteps.insert(node_address(node), VTEP_MAC + 1 + node, UNDERLAY, POD_MTU)
        for part in range(4):
            tables.routes.set(block(node, part), Route(Kind.TUNNEL, vtep=vtep))
    tables.routes.set(IPv4Network("10.244.1.0/24"), Route(Kind.BLACKHOLE))
    tables.routes.set(IPv4Network(NODE), Route(Kind.LOCAL))
    tables.routes.set(IPv4Network("192.0.2.0/24"), Route(Kind.VIA, UPLINK))
    gateway = tables.neighbours.records[tables.neighbours.insert(UPLINK, GATEWAY)]
    gateway["mac"], gateway["state"] = ROUTER_MAC, State.PERMANENT
    tables.routes.set(IPv4Network("0.0.0.0/0"), Route(Kind.VIA, UPLINK, IPv4Address(GATEWAY)))
    while len(tables.routes) < ROUTES:
        network = IPv4Network((int(IPv4Address("198.18.0.0")) + 256 * len(tables.routes), 24))
        tables.routes.set(network, Route(Kind.VIA, UPLINK, IPv4Address(GATEWAY)))
    _add_services(tables)
    return tables


def _add_services(tables: Tables) -> None:
    pods = IPv4Network("10.244.0.0/16")
    tables.policies.set_pools([(Pool.CLUSTER, pods), (Pool.OUTGOING, pods)])
    tables.settings[b.NAT_OUTGOING] = 1
    for number in range(SERVICES):
        address = service_address(number)
        tables.routes.set(IPv4Network(address), Route(Kind.SERVICE))
        for protocol in (6, 17):
            row = tables.services.set(protocol, address, SERVICE_PORT, Service(Scheduler.RR))
            tables.policies.set(row, Exposure.CLUSTER_IP)
            for k in range(ENDPOINTS):
                local = pod_address((4 * number + k) % PODS)
                remote = block((4 * number + k) % NODES, k % 4)[1 + number % 62]
                tables.services.add(row, local if k % 2 else remote, TARGET_PORT, Destination())


def _interface(tables: Tables, index: int, role: Role, mtu: int, mac: int, peer: int = 0) -> None:
    row = tables.interfaces[index]
    row["role"], row["driver"], row["flags"], row["mtu"], row["fd"] = role, Driver.MEMORY, UP | OFFLOAD, mtu, -1
    row["mac"], row["peer_mac"] = mac, peer
