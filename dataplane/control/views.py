"""Snapshots as tables: pure functions from a snapshot to columns and rows of text.

``VIEWS`` has one per kind; listings have theirs in ``views_services``. ``plain`` draws a table for a file or a pipe
(one line per row, nothing cut, so that grep and awk work), ``draw`` one for a terminal, with rich.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dataplane.control.snapshot import (
    Arp,
    Balancing,
    ClusterStatus,
    ConntrackStats,
    Counters,
    Drops,
    Interfaces,
    Kind,
    LoadBalancer,
    Pipeline,
    ReasonCount,
    Route,
    Routes,
    Status,
    Vteps,
)
from dataplane.control.snapshot_dns import Dns

_FOLDED_WIDTH = 24  # of the last column, however narrow the terminal
PROTO_CALICO = "proto 80"  # what Calico programs is told from the host's own routes by this number


@dataclass(frozen=True, slots=True)
class View:
    """A table: headings, rows of text, and lines to print below it. A heading that starts with ">" is for numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings as they are printed."""
        return tuple(column.removeprefix(">") for column in self.columns)


def interfaces(snapshot: Interfaces) -> View:
    """One row per device: the pod's MAC or, on the uplink, our own; the last errno stands at the end."""
    return View(
        (
            *(">#", "name", "role", "driver", "state", ">mtu", "mac", "pod", ">rx", ">rx bytes", ">tx", ">tx bytes"),
            *(">errors", ">lost", "last error"),
        ),
        as_rows(
            (
                *(item["index"], item["name"], item["role"], item["driver"], item["state"], item["mtu"]),
                *(
                    item["peer_mac"] or item["mac"],
                    item["pod"],
                    item["rx_packets"],
                    item["rx_bytes"],
                    item["tx_packets"],
                ),
                *(item["tx_bytes"], item["rx_errors"] + item["tx_errors"], item["rx_dropped"], item["error"]),
            )
            for item in snapshot["interfaces"]
        ),
    )


def routes(snapshot: Routes) -> View:
    """One row per prefix."""
    return View(
        ("prefix", "kind", "via", "dev", ">mtu", "node", "origin"),
        as_rows(
            (item["prefix"], item["kind"], item["via"], item["dev"], item["mtu"] or "", item["vtep"], item["origin"])
            for item in snapshot["routes"]
        ),
    )


def arp(snapshot: Arp) -> View:
    """One row per neighbor on the uplink."""
    return View(
        ("address", "mac", "state", "interface", ">age"),
        as_rows(
            (item["address"], item["mac"], item["state"], item["interface"], f"{item['age_s']:.0f} s")
            for item in snapshot["arp"]
        ),
    )


def vteps(snapshot: Vteps) -> View:
    """One row per remote node."""
    return View(
        ("node", "address", "mac", ">mtu", ">rx", ">rx bytes", ">tx", ">tx bytes"),
        as_rows(
            (
                *(item["node"], item["address"], item["mac"], item["mtu"]),
                *(item["rx_packets"], item["rx_bytes"], item["tx_packets"], item["tx_bytes"]),
            )
            for item in snapshot["vteps"]
        ),
    )


def drops(snapshot: Drops) -> View:
    """The drop reasons that were met, the most frequent first."""
    met = [reason for reason in snapshot["reasons"] if reason["verdict"] == "drop" and reason["count"]]
    return _reasons(met, () if met else ("no packet was dropped",))


def all_drops(snapshot: Drops) -> View:
    """Every drop reason, the most frequent first."""
    return _reasons([reason for reason in snapshot["reasons"] if reason["verdict"] == "drop"], ())


def _reasons(reasons: list[ReasonCount], notes: tuple[str, ...]) -> View:
    ordered = sorted(reasons, key=lambda reason: -reason["count"])  # stable: equal counts stay in the order of stages
    rows = as_rows((reason["count"], reason["label"], reason["stage"], reason["text"]) for reason in ordered)
    return View((">packets", "reason", "stage", "what it means"), rows, notes)


def counters(snapshot: Counters) -> View:
    """The totals, and whether every packet is accounted for."""
    came = snapshot["received"] + snapshot["injected"]
    went = snapshot["accepted"] + snapshot["stolen"] + snapshot["queued"] + snapshot["dropped"]
    names = ("received", "injected", "accepted", "stolen", "queued", "dropped")
    rows = [(name, snapshot[name]) for name in names]  # type: ignore[literal-required]
    rows += [(f"queue {name}", count) for name, count in snapshot["queue"].items()]
    verdict = "OK" if came == went else f"VIOLATED, {came - went:+d} packets"
    equation = "received + injected = accepted + stolen + queued + dropped"
    return View(("counter", ">packets"), as_rows(rows), (f"{equation}: {came} = {went}: {verdict}",))


def pipeline(snapshot: Pipeline) -> View:
    """The stages in order, and how many packets each took out."""
    return View(
        ("stage", ">entered", ">passed", ">stolen", ">queued", ">dropped"),
        as_rows(
            (
                *(item["stage"], item["entered"], item["entered"] - item["stolen"] - item["queued"] - item["dropped"]),
                *(item["stolen"], item["queued"], item["dropped"]),
            )
            for item in snapshot["pipeline"]
        ),
    )


def status(snapshot: Status) -> View:
    """One row per property."""
    values = dict(snapshot)
    values["since"] = _moment(snapshot["since"])
    rows = as_rows((name.replace("_", " "), _word(value)) for name, value in values.items())
    return View(("property", "value"), rows)


def conntrack_stats(snapshot: ConntrackStats) -> View:
    """One row per counter, under the names of ``conntrack -S`` where it has one."""
    return View(("counter", ">value"), as_rows(snapshot.items()))


def balancing(snapshot: Balancing) -> View:
    """One row per number."""
    values = {name: value for name, value in snapshot.items() if not isinstance(value, dict | list)}
    values |= {f"no local endpoints, {policy}": count for policy, count in snapshot["no_local_endpoints"].items()}
    return View(("number", ">value"), as_rows((name.replace("_", " "), value) for name, value in values.items()))


def cluster(snapshot: ClusterStatus) -> View:
    """One row per node, the one that was asked marked, and a line about the store."""
    rows = as_rows(
        (
            *(node["name"], node["address"], ",".join(node["blocks"]), node["zone"]),
            *(_moment(node["since"]), "alive" if node["alive"] else "away", "*" if node["here"] else ""),
        )
        for node in snapshot["nodes"]
    )
    line = f"{snapshot['source']} {snapshot['where']}"
    if snapshot["source"] != "static":
        line += f": {'connected' if snapshot['connected'] else 'away'} since {_moment(snapshot['changed'])}"
        line += f", revision {snapshot['revision']}, lag {snapshot['lag_s']:.1f} s"
        line += f": {snapshot['error']}" if snapshot["error"] else ""
    return View(("node", "address", "blocks", "zone", "since", "state", "here"), rows, (line,))


def pools(snapshot: LoadBalancer) -> View:
    """One row per pool of load balancer addresses, in the order in which they are tried."""
    rows = as_rows(
        (
            *(row["name"], ",".join(row["ranges"]), _word(row["auto_assign"])),
            *(row["addresses"], row["in_use"], row["services"]),
        )
        for row in snapshot["pools"]
    )
    notes = () if rows else ("there is no address pool",)
    return View(("pool", "ranges", "auto", ">addresses", ">in use", ">services"), rows, notes)


def load_balancer(snapshot: LoadBalancer) -> View:
    """One row per load balancer's address, then who waits for one."""
    having = ((row["address"], row["pool"], ",".join(row["services"]), row["owner"]) for row in snapshot["addresses"])
    waiting = [("<pending>", "", row["service"], "") for row in snapshot["pending"]]
    rows = as_rows(map(_word, row) for row in (*having, *waiting))
    notes = tuple(f"{row['service']}: {row['reason']}" for row in snapshot["pending"])
    return View(("address", "pool", "services", "announced by"), rows, notes)


def dns(snapshot: Dns) -> View:
    """Questions by way and type, answers by code; below, the upstreams and what is kept of what they said."""
    columns = ("what", ">count")
    if not snapshot["domain"]:
        return View(columns, (), ("the node answers no names",))
    asked = ((f"{row['type']} by {row['transport']}", row["count"]) for row in snapshot["requests"])
    rows = as_rows([*asked, *sorted(snapshot["responses"].items())])
    notes = [f"{snapshot['domain']} at {snapshot['address']}, services: {snapshot['services']}"]
    for each in snapshot["upstreams"]:
        how = "does not answer" if each["aloof"] else "answers"
        notes.append(f"upstream {each['server']} {how}, asked {each['asked']}, failures {each['failures']}")
    if snapshot["upstreams"]:
        entries, hits, misses = snapshot["cache_entries"], snapshot["cache_hits"], snapshot["cache_misses"]
        notes.append(f"their answers: {entries} kept, hits {hits}, misses {misses}")
    return View(columns, rows, tuple(notes))


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def _word(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value == "" else value


def as_rows(rows: Iterable[Iterable[object]]) -> tuple[tuple[str, ...], ...]:
    """Return the rows with every cell as text."""
    return tuple(tuple(str(cell) for cell in row) for row in rows)


VIEWS: dict[Kind, Callable[[Any], View]] = {
    "status": status,
    "interfaces": interfaces,
    "routes": routes,
    "arp": arp,
    "vteps": vteps,
    "drops": drops,
    "counters": counters,
    "pipeline": pipeline,
    "conntrack_stats": conntrack_stats,
    "balancing": balancing,
    "cluster": cluster,
    "load_balancer": load_balancer,
    "dns": dns,
}


# --- as iproute2 prints routes ---------------------------------------------------------------------------------------


def iproute(snapshot: Routes) -> str:
    """Return the routes as ``ip route`` would print them, one per line."""
    return "".join(f"{_ip_route(route)}\n" for route in snapshot["routes"])


def _ip_route(route: Route) -> str:
    prefix = route["prefix"].removesuffix("/32").removesuffix("/128")
    prefix = "default" if route["prefix"] in ("0.0.0.0/0", "::/0") else prefix
    match route["kind"]:
        case "pod":
            return f"{prefix} dev {route['dev']} scope link"
        case "local" | "service":
            return f"local {prefix} dev {route['dev'] or 'lo'} table local proto kernel scope host src {prefix}"
        case "tunnel":
            return f"{prefix} via {route['via']} dev {route['dev']} onlink mtu {route['mtu']}"
        case "via":
            hop = f"via {route['via']} " if route["via"] else ""
            return f"{prefix} {hop}dev {route['dev']} {_proto(route)}{'' if route['via'] else ' scope link'}"
        case kind:
            return f"{kind} {prefix} {_proto(route)}"


def _proto(route: Route) -> str:
    return {"Static": "proto static", "OnLink": "proto kernel"}.get(route["origin"], PROTO_CALICO)


# --- drawing ---------------------------------------------------------------------------------------------------------


def plain(view: View) -> str:
    """Return the table as text, two spaces between columns."""
    headings = tuple(heading.upper() for heading in view.headings)
    lines = [headings, *view.rows] if view.rows else []
    widths = [max(len(line[at]) for line in lines) for at in range(len(view.columns))] if lines else []
    text = "".join(f"{_line(view.columns, line, widths)}\n" for line in lines)
    return text + "".join(f"{note}\n" for note in view.notes or (() if lines else ("none",)))


def _line(columns: Sequence[str], cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.rjust(width) if column.startswith(">") else cell.ljust(width)
        for column, cell, width in zip(columns, cells, widths, strict=True)
    )
    return "  ".join(padded).rstrip()


def draw(view: View) -> None:
    """Draw the table on the terminal. Only the last column is folded; a table that is still too wide runs over."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if view.rows:
        lines = (view.headings, *view.rows)
        widths = [max(len(line[at]) for line in lines) for at in range(len(view.columns))]
        widths[-1] = min(widths[-1], _FOLDED_WIDTH)
        console.width = max(console.width, sum(widths) + 2 * (len(widths) - 1))
        table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
        for column, heading, width in zip(view.columns, view.headings, widths, strict=True):
            side: Literal["right", "left"] = "right" if column.startswith(">") else "left"
            table.add_column(heading.upper(), justify=side, min_width=width, no_wrap=column != view.columns[-1])
        for row in view.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for note in view.notes or (() if view.rows else ("none",)):
        console.print(note, markup=False, style="bold red" if "VIOLATED" in note else "")
