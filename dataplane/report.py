"""What the node says about itself: snapshots of the tables, as ``control/snapshot.py`` describes them."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from dataplane import __version__, pipeline
from dataplane.apply import Wiring
from dataplane.batch import ERRORS_LIMITED, INJECTED_TOTAL, RECEIVED
from dataplane.control import loadbalancer_report
from dataplane.control import snapshot as shape
from dataplane.control.api import Listing
from dataplane.control.cluster import ClusterNode
from dataplane.control.query import Query
from dataplane.control.snapshot import Kind, ListKind
from dataplane.control.snapshot_dns import OFF, Dns
from dataplane.control.source import Health, cluster_status
from dataplane.control.state import Settings
from dataplane.report_flows import FlowReport
from dataplane.report_services import ServiceReport
from dataplane.slowpath import SlowPath
from dataplane.stages import conntrack
from dataplane.tables.address import mac_text, to_address
from dataplane.tables.interface import UP, Driver, Role
from dataplane.tables.neighbour import State
from dataplane.tables.route import Kind as RouteKind
from dataplane.verdict import Reason, Verdict

STAGES = (
    *("receive", "parse", "vxlan", "arp", "guard", "defrag", "conntrack", "service", "masquerade", "route", "transmit"),
    "slowpath",
)
"""The order in which a packet can be lost; the slow path sees queued packets only."""


class Report:
    """Reads the tables when asked; counts nothing itself."""

    def __init__(self, settings: Settings, wiring: Wiring, slow: SlowPath) -> None:
        self.settings = settings
        self._wiring = wiring
        self._tables = wiring.tables
        self._slow = slow
        tables, names = wiring.tables, wiring.balancer.names
        self._flows = FlowReport(tables.flows, tables.services, names)
        self._services = ServiceReport(
            tables.services, tables.policies, tables.templates, wiring.balancer, lambda: wiring.state
        )
        self._since = time.time()
        self.ready = False

    def snapshot(self, kind: Kind) -> Mapping[str, Any]:
        """Return the snapshot of this kind."""
        take: Mapping[str, Any] = getattr(self, kind)()
        return take

    def listing(self, kind: ListKind, query: Query) -> Listing:
        """Return the rows of this kind that pass a query, in pages."""
        rows: Listing = getattr(self._flows if kind in ("conntrack", "nat") else self._services, kind)(query)
        return rows

    def deletion(self, query: Query) -> Iterator[int]:
        """End the flows that pass a query, some at each step; yield how many those were."""
        return self._flows.deletion(query, lambda now, rows: conntrack.expire(self._tables.arrays, now, rows))

    def conntrack_stats(self) -> shape.ConntrackStats:
        """The flow table's size, and its counters."""
        flows = self._tables.flows
        stats: Any = {"flows": len(flows), "limit": flows.capacity, **flows.counters}
        return cast(shape.ConntrackStats, stats)

    def balancing(self) -> shape.Balancing:
        """The service tables as a whole."""
        return self._services.balancing()

    def status(self) -> shape.Status:
        """The process, and what it has."""
        state = self._wiring.state or self.settings.state
        return {
            "name": state.node.name,
            "version": __version__,
            "pid": os.getpid(),
            "since": self._since,
            "ready": self.ready,
            "config": str(self.settings.path or "built-in"),
            "socket": str(self.settings.socket),
            "uplink": state.uplink.interface if state.uplink else "",
            "pods": len(state.pods),
            "peers": len(state.peers),
            "routes": len(self._tables.routes),
        }

    def cluster(self) -> shape.ClusterStatus:
        """This node and the peers of its file: what is known of a cluster without a store."""
        state = self._wiring.state or self.settings.state
        own = ClusterNode(state.node.name, state.node.addresses, state.pod_network.cidrs, zone=state.node.zone)
        peers = (
            ClusterNode(peer.name, (peer.address,), peer.pod_cidrs, zone=peer.zone, alive=peer.name not in state.silent)
            for peer in state.peers
        )
        nodes = (replace(own, since=self._since), *peers)
        where = str(self.settings.path or "built-in")
        return cluster_status("static", where, Health(connected=True, changed=self._since), own.name, nodes)

    def dns(self) -> Dns:
        """Cluster DNS of a node that answers no names."""
        return OFF

    def load_balancer(self) -> shape.LoadBalancer:
        """Pools and addresses of load balancers."""
        return loadbalancer_report.snapshot(self._wiring.state or self.settings.state)

    def interfaces(self) -> shape.Interfaces:
        """The devices, by index."""
        return {"interfaces": [self._interface(name, row) for name, row in self._by_row()]}

    def _by_row(self) -> list[tuple[str, int]]:
        return sorted(self._wiring.interfaces.items(), key=lambda item: item[1])

    def _interface(self, name: str, row: int) -> shape.Interface:
        record = self._tables.interfaces[row]
        link = self._wiring.links.get(name)
        count = {field: int(record[field]) for field in record.dtype.names if field[:3] in ("rx_", "tx_")}
        error = int(record["error"])
        return {
            "index": row,
            "name": name,
            "role": Role(int(record["role"])).name.lower(),
            "driver": Driver(int(record["driver"])).name.lower(),
            "state": "up" if record["flags"] & UP else "down",
            "mtu": int(record["mtu"]),
            "mac": mac_text(int(record["mac"])),
            "peer_mac": mac_text(int(record["peer_mac"])) if record["peer_mac"] else "",
            "pod": link.pod.id if link else "",
            "rx_packets": count["rx_packets"],
            "rx_bytes": count["rx_bytes"],
            "rx_errors": count["rx_errors"],
            "rx_dropped": count["rx_dropped"],
            "tx_packets": count["tx_packets"],
            "tx_bytes": count["tx_bytes"],
            "tx_errors": count["tx_errors"],
            "tx_frames": count["tx_frames"],
            "error": os.strerror(error) if error else "",
        }

    def routes(self) -> shape.Routes:
        """The routing table, by prefix."""
        wiring = self._wiring
        tunnel = wiring.state.vxlan.interface if wiring.state else ""
        names = {row: name for name, row in wiring.interfaces.items()}
        rows: list[shape.Route] = []
        for prefix, route in self._tables.routes.items():
            spec = wiring.specs[prefix]
            dev = tunnel if route.kind == RouteKind.TUNNEL else names.get(route.oif, "")
            rows.append(
                {
                    "prefix": str(prefix),
                    "kind": spec.kind,
                    "dev": dev,
                    "via": str(spec.gateway) if spec.gateway else "",
                    "mtu": int(self._tables.vteps.records["mtu"][route.vtep]) if route.vtep >= 0 else route.mtu,
                    "vtep": spec.target if route.kind == RouteKind.TUNNEL else "",
                    "origin": spec.source.name.lower().replace("_", "-"),
                }
            )
        return {"routes": rows}

    def arp(self) -> shape.Arp:
        """The neighbors on the uplink."""
        names = {row: name for name, row in self._wiring.interfaces.items()}
        now = time.monotonic_ns()
        rows: list[shape.Neighbor] = []
        for row, interface, address in self._tables.neighbours.items():
            record = self._tables.neighbours.records[row]
            rows.append(
                {
                    "interface": names.get(interface, str(interface)),
                    "address": str(address),
                    "mac": mac_text(int(record["mac"])) if record["mac"] else "",
                    "state": State(int(record["state"])).name,
                    "age_s": round((now - int(record["confirmed_ns"] or record["updated_ns"])) / 1e9, 1),
                }
            )
        return {"arp": rows}

    def vteps(self) -> shape.Vteps:
        """The other nodes' ends of the tunnel."""
        rows: list[shape.Vtep] = []
        for name, row in sorted(self._wiring.vteps.items()):
            record = self._tables.vteps.records[row]
            rows.append(
                {
                    "node": name,
                    "address": str(to_address(int(record["hi"]), int(record["lo"]))),
                    "mac": mac_text(int(record["mac"])),
                    "mtu": int(record["mtu"]),
                    "tx_packets": int(record["tx_packets"]),
                    "tx_bytes": int(record["tx_bytes"]),
                    "rx_packets": int(record["rx_packets"]),
                    "rx_bytes": int(record["rx_bytes"]),
                }
            )
        return {"vteps": rows}

    def drops(self) -> shape.Drops:
        """Every reason with its count."""
        words: dict[Verdict, Any] = {verdict: verdict.name.lower() for verdict in Verdict}
        return {
            "reasons": [
                {
                    "label": reason.label,
                    "verdict": words[reason.verdict],
                    "stage": reason.stage,
                    "text": reason.text,
                    "count": int(self._tables.counters[reason]),
                }
                for reason in Reason
            ]
        }

    def counters(self) -> shape.Counters:
        """The conservation of packets."""
        counters = self._tables.counters
        came, by_verdict = pipeline.balance(counters)
        queue = {name.replace(" ", "_"): count for name, count in sorted(self._slow.answered.items())}
        queue["waiting"] = self._slow.resolver.waiting
        queue["errors_limited"] = queue.get("errors_limited", 0) + int(counters[ERRORS_LIMITED])
        return {
            "received": int(counters[RECEIVED]),
            "injected": int(counters[INJECTED_TOTAL]),
            "accepted": by_verdict[Verdict.ACCEPT],
            "stolen": by_verdict[Verdict.STOLEN],
            "queued": by_verdict[Verdict.QUEUE],
            "dropped": by_verdict[Verdict.DROP],
            "balanced": came == sum(by_verdict.values()),
            "queue": queue,
        }

    def pipeline(self) -> shape.Pipeline:
        """Packets that came to each stage, and those that went no farther: derived from the reasons' counters."""
        lost: dict[str, Counter[Verdict]] = {stage: Counter() for stage in STAGES}
        for reason in Reason:
            if reason.verdict != Verdict.ACCEPT:
                lost[reason.stage][reason.verdict] += int(self._tables.counters[reason])
        came, by_verdict = pipeline.balance(self._tables.counters)
        came -= sum(lost["slowpath"].values())  # these came a second time, from the queue
        rows: list[shape.Stage] = []
        for stage in STAGES:
            count = lost[stage]
            rows.append(
                {
                    "stage": stage,
                    "entered": came if stage != "slowpath" else by_verdict[Verdict.QUEUE],
                    "stolen": count[Verdict.STOLEN],
                    "queued": count[Verdict.QUEUE],
                    "dropped": count[Verdict.DROP],
                }
            )
            came -= sum(count.values())
        return {"pipeline": rows}
