"""A small node for tests of stages: two pods, an uplink, two remote nodes, and frames made by scapy.

pod a 10.244.1.10 ─┐                    ┌─ uplink 192.0.2.11/24: gateway 192.0.2.1
pod b 10.244.1.11 ─┴─ node1 (this one) ─┴─ tunnel: node2 192.0.2.12 (10.244.2.0/24), node3 192.0.2.13 (unknown VTEP)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

import numpy as np

from dataplane import batch as b
from dataplane import pipeline
from dataplane.codecs import vxlan
from dataplane.devices.io import IoBuffers
from dataplane.devices.memory import Vnet, load, unload
from dataplane.slowpath import SlowPath
from dataplane.stages import defrag
from dataplane.stages.parse import parse
from dataplane.tables.address import halves, parse_mac
from dataplane.tables.interface import OFFLOAD, UP, Driver, Role
from dataplane.tables.neighbour import State
from dataplane.tables.policy import Exposure, Pool
from dataplane.tables.route import HOSTED, Kind, Route
from dataplane.tables.service import Destination, Service
from dataplane.verdict import Reason, Verdict

UPLINK, UNDERLAY, POD_A, POD_B, HOST = 1, 2, 3, 4, 5
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"
MAC_A, MAC_B = "02:00:0a:f4:01:0a", "02:00:0a:f4:01:0b"
IP_A, IP_B, IP_FREE = "10.244.1.10", "10.244.1.11", "10.244.1.99"
IP_REMOTE, IP_LOST = "10.244.2.10", "10.244.3.10"
NODE, PEER, STRANGER, LAN_GATEWAY = "192.0.2.11", "192.0.2.12", "192.0.2.66", "192.0.2.1"
HOST_MAC = "02:00:00:00:00:d0"
UPLINK_MAC, LAN_MAC = "02:00:c0:00:02:0b", "02:00:c0:00:02:01"
VTEP, PEER_VTEP = "66:00:00:00:00:01", "66:00:00:00:00:02"
OUTSIDE = "198.51.100.7"
TUNNEL_ADDRESS = "10.244.1.1"
SECOND = 1_000_000_000
POD_MTU = 1450
FLOWS = 1024
VIP, LB_IP = "10.96.0.20", "203.0.113.200"
CLUSTER, SERVICES = "10.244.0.0/16", "10.96.0.0/12"
PROTOCOLS = {"tcp": 6, "udp": 17}


@dataclass(frozen=True)
class Outcome:
    """What became of one packet; ``frame`` is as it would leave."""

    verdict: Verdict
    reason: Reason
    oif: int
    frame: bytes
    record: Any

    @property
    def label(self) -> str:
        return self.reason.label


class World:
    """Tables as ``node`` would make them, with memory devices."""

    def __init__(self, offload: bool = True, flows: int = FLOWS) -> None:
        self.tables = pipeline.Tables(seed=7, flows=flows)
        self.batch = b.make_batch()
        self.io = IoBuffers()
        self.now = 1_000 * SECOND
        settings = self.tables.settings
        settings[b.NODE_LO] = halves(NODE)[1]
        settings[b.GATEWAY_LO] = halves("169.254.1.1")[1]
        settings[b.VTEP_MAC] = parse_mac(VTEP)
        settings[b.VNI], settings[b.TUNNEL_PORT] = 4096, vxlan.PORT
        settings[b.TUNNEL_PORT_LOW], settings[b.TUNNEL_PORT_HIGH] = 32768, 60999
        settings[b.POD_MTU] = POD_MTU
        settings[b.PROXY_ARP] = 1
        flags = UP | OFFLOAD if offload else UP
        self.interface(UPLINK, Role.UPLINK, flags, 1500, UPLINK_MAC)
        self.interface(UNDERLAY, Role.UNDERLAY, UP, 1500, UPLINK_MAC)
        self.interface(POD_A, Role.POD, flags, POD_MTU, GATEWAY_MAC, MAC_A)
        self.interface(POD_B, Role.POD, flags, POD_MTU, GATEWAY_MAC, MAC_B)
        self.peer = self.tables.vteps.insert(PEER, parse_mac(PEER_VTEP), UNDERLAY, POD_MTU)
        self.route(f"{NODE}/32", Route(Kind.LOCAL))
        self.route(f"{IP_A}/32", Route(Kind.POD, POD_A))
        self.route(f"{IP_B}/32", Route(Kind.POD, POD_B))
        self.route("10.244.1.0/24", Route(Kind.BLACKHOLE))
        self.route("10.244.2.0/24", Route(Kind.TUNNEL, vtep=self.peer))
        self.route("10.244.3.0/24", Route(Kind.TUNNEL, vtep=-1))
        self.route(SERVICES, Route(Kind.BLACKHOLE))
        self.route("203.0.113.0/24", Route(Kind.UNREACHABLE))
        self.route("192.0.2.0/24", Route(Kind.VIA, UPLINK))
        self.route("198.51.100.0/24", Route(Kind.VIA, UPLINK, ip_address(LAN_GATEWAY)))
        settings[b.TUNNEL_LO] = halves(TUNNEL_ADDRESS)[1]
        settings[b.NAT_RANDOM] = 1
        self.route(f"{TUNNEL_ADDRESS}/32", Route(Kind.LOCAL))
        self.tables.policies.set_pools([(Pool.CLUSTER, ip_network(CLUSTER)), (Pool.OUTGOING, ip_network(CLUSTER))])

    def interface(self, index: int, role: Role, flags: int, mtu: int, mac: str, peer: str = "") -> None:
        row = self.tables.interfaces[index]
        row["role"], row["driver"], row["flags"], row["mtu"], row["fd"] = role, Driver.MEMORY, flags, mtu, -1
        row["mac"], row["peer_mac"] = parse_mac(mac), parse_mac(peer) if peer else 0

    def route(self, prefix: str, route: Route) -> None:
        self.tables.routes.set(ip_network(prefix), route)

    def neighbour(self, interface: int, address: str, mac: str, state: State = State.REACHABLE) -> int:
        row = self.tables.neighbours.insert(interface, address)
        entry = self.tables.neighbours.records[row]
        entry["mac"], entry["state"] = parse_mac(mac), state
        return row

    def service(
        self,
        address: str,
        port: int,
        *backends: tuple[str, int],
        protocol: str = "tcp",
        exposure: Exposure = Exposure.CLUSTER_IP,
        how: Service | None = None,
        **policy: Any,
    ) -> int:
        """A service with these backends, the last of which is the first in ip_vs's list; its address gets a route."""
        row = self.tables.services.set(PROTOCOLS[protocol], ip_address(address), port, how or Service())
        for backend, backend_port in backends:
            self.tables.services.add(row, ip_address(backend), backend_port, Destination())
        self.tables.policies.set(row, exposure, **policy)
        if exposure != Exposure.NODE_PORT:
            self.route(f"{address}/32", Route(Kind.SERVICE))
        return row

    def host(self) -> None:
        """Give the node a host's device, dp0."""
        self.interface(HOST, Role.HOST, UP | OFFLOAD, POD_MTU, HOST_MAC, HOST_MAC)
        self.tables.settings[b.HOST_INTERFACE] = HOST
        self.route(f"{NODE}/32", Route(Kind.LOCAL, flags=HOSTED))

    @property
    def flows(self) -> int:
        """How many flows are known."""
        return len(self.tables.flows)

    def load(self, frames: Sequence[Any], iif: int, vnet: Sequence[Vnet] = (), flags: int = 0) -> int:
        count = load(self.batch, [bytes(frame) for frame in frames], iif, vnet)
        self.batch.packets["flags"][:count] |= np.uint16(flags)
        return count

    def run(self, frames: Sequence[Any], iif: int, vnet: Sequence[Vnet] = (), flags: int = 0) -> list[Outcome]:
        """Run the stages over frames that came in by ``iif``; nothing is sent, everything is counted."""
        count = self.load(frames, iif, vnet, flags)
        assert count == len(frames)
        for stage in pipeline.STAGES:
            stage(self.batch.arrays, count, self.tables.arrays, self.now)
        outcomes = self.outcomes(count)
        pipeline.tally(self.batch.arrays, count, self.tables.arrays, self.now)
        defrag.reclaim(self.tables.arrays)
        return outcomes

    def stage(self, stage: Any, frames: Sequence[Any], iif: int, vnet: Sequence[Vnet] = ()) -> list[Outcome]:
        """Run one stage alone over frames that are already parsed."""
        count = self.load(frames, iif, vnet)
        parse(self.batch.arrays, count, self.tables.arrays, self.now)
        stage(self.batch.arrays, count, self.tables.arrays, self.now)
        return self.outcomes(count)

    def one(self, frame: Any, iif: int, vnet: Vnet | None = None, flags: int = 0) -> Outcome:
        """What becomes of a single frame."""
        return self.run([frame], iif, [vnet] if vnet else (), flags)[0]

    def outcomes(self, count: int) -> list[Outcome]:
        return [
            Outcome(
                Verdict(int(record["verdict"])),
                Reason.of(int(record["reason"])),
                int(record["oif"]),
                unload(self.batch, row),
                record.copy(),
            )
            for row, record in enumerate(self.batch.packets[:count])
        ]

    def slow_path(self) -> SlowPath:
        """The slow path over these tables, with the tunnel's address of the node."""
        slow = SlowPath(self.tables.arrays, self.tables.routes, self.tables.neighbours, seed=1)
        slow.tunnel_address = ip_address(TUNNEL_ADDRESS).packed
        return slow

    def count(self, reason: Reason) -> int:
        """How many packets had this reason so far."""
        return int(self.tables.counters[reason])

    def balanced(self) -> bool:
        came, by_verdict = pipeline.balance(self.tables.counters)
        return came == sum(by_verdict.values())
