"""Listings of services and flows as tables: pure functions from rows to a ``View``.

The plain views fit a terminal of 120 columns, most of them one of 80; the wide ones have all there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dataplane.control.snapshot import (
    EndpointRow,
    FlowRow,
    ListKind,
    ServiceRow,
    TemplateRow,
    Translation,
    endpoint_text,
)
from dataplane.control.views import View, as_rows

_DAY, _HOUR, _MINUTE = 86400, 3600, 60


def services(rows: Sequence[ServiceRow]) -> View:
    """One row per address and port; a Kubernetes service has several. One that waits for an address says why below."""
    return View(
        ("service", "type", "address", "sched", ">ready", ">active", ">conns"),
        as_rows(
            (
                _service(row),
                _type(row),
                f"{_virtual(row)}/{row['protocol']}",
                row["scheduler"],
                f"{row['ready']}/{row['total']}",
                row["active"],
                row["connections"],
            )
            for row in rows
        ),
        _waiting(rows),
    )


def services_wide(rows: Sequence[ServiceRow]) -> View:
    """As ``services``, with flags, affinity, counters and where the service comes from."""
    return View(
        (
            *("service", "type", "kind", "address", "proto", "scheduler", "flags", ">affinity", ">ready", ">active"),
            *(">inactive", ">conns", ">in", ">in bytes", ">out", ">out bytes", "origin"),
        ),
        as_rows(
            (
                *(_service(row), row["type"], row["kind"], _virtual(row), row["protocol"]),
                *(row["scheduler"], ",".join(row["scheduler_flags"]) or "-", _affinity(row)),
                *(f"{row['ready']}/{row['total']}", row["active"], row["inactive"], row["connections"]),
                *(row["in_packets"], row["in_bytes"], row["out_packets"], row["out_bytes"], row["origin"]),
            )
            for row in rows
        ),
        _waiting(rows),
    )


def endpoints(rows: Sequence[EndpointRow]) -> View:
    """One row per backend of each virtual service, in the order of its scheduler's list."""
    return View(
        ("service", "virtual", "endpoint", ">weight", ">active", ">inact", "state", "node"),
        as_rows(
            (
                row["service"] or "-",
                f"{endpoint_text(row['virtual_address'], row['virtual_port'])}/{row['protocol']}",
                endpoint_text(row["address"], row["port"]),
                row["weight"],
                row["active"],
                row["inactive"],
                row["state"],
                row["node"] or "-",
            )
            for row in rows
        ),
    )


def endpoints_wide(rows: Sequence[EndpointRow]) -> View:
    """As ``endpoints``, with templates and counters."""
    return View(
        (
            *("service", "kind", "virtual", "endpoint", ">weight", ">active", ">inactive", ">templates", ">conns"),
            *(">in", ">in bytes", ">out", ">out bytes", "state", "node"),
        ),
        as_rows(
            (
                *(_service(row), row["kind"]),
                f"{endpoint_text(row['virtual_address'], row['virtual_port'])}/{row['protocol']}",
                *(endpoint_text(row["address"], row["port"]), row["weight"], row["active"], row["inactive"]),
                *(row["persistent"], row["connections"], row["in_packets"], row["in_bytes"]),
                *(row["out_packets"], row["out_bytes"], row["state"], row["node"] or "-"),
            )
            for row in rows
        ),
    )


def conntrack(rows: Sequence[FlowRow]) -> View:
    """One row per flow: what the client sent, and who answers if that is somebody else."""
    return View(
        ("proto", "state", ">left", "source", "destination", "answered by"),
        as_rows(
            (row["protocol"], _state(row), _time(row["timeout_s"]), *_original(row), _answerer(row)) for row in rows
        ),
    )


def conntrack_wide(rows: Sequence[FlowRow]) -> View:
    """As ``conntrack``, with both tuples, flags, counters and ip_vs's state."""
    return View(
        (
            *("proto", "state", ">left", ">age", "source", "destination", "reply from", "reply to"),
            *(">packets", ">bytes", ">packets back", ">bytes back", "status", "lb state", "backend", "service"),
        ),
        as_rows(
            (
                *(row["protocol"], _state(row), _time(row["timeout_s"]), _time(int(row["age_s"]))),
                *(*_original(row), *_reply(row)),
                *(row["original"]["packets"], row["original"]["bytes"]),
                *(row["reply"]["packets"], row["reply"]["bytes"]),
                *(",".join(row["status"]) or "-", row["lb_state"] or "-", row["backend"] or "-", row["service"] or "-"),
            )
            for row in rows
        ),
    )


def nat(rows: Sequence[Translation]) -> View:
    """One row per translated flow; a side that stays as it is says so by a "="."""
    return View(
        ("proto", ">left", "source", "translated to", "destination", "translated to", "why"),
        as_rows(
            (
                row["protocol"],
                _time(row["timeout_s"]),
                *_translated(row["src"], row["sport"], row["new_src"], row["new_sport"]),
                *_translated(row["dst"], row["dport"], row["new_dst"], row["new_dport"]),
                ",".join(row["why"]),
            )
            for row in rows
        ),
    )


def nat_wide(rows: Sequence[Translation]) -> View:
    """As ``nat``, with state and service."""
    narrow = nat(rows)
    more = ((row["state"] or "-", row["service"] or "-") for row in rows)
    cells = (line + extra for line, extra in zip(narrow.rows, more, strict=True))
    return View((*narrow.columns, "state", "service"), tuple(cells))


def persistence(rows: Sequence[TemplateRow]) -> View:
    """One row per client that stays with a backend."""
    return View(
        ("client", "service", "virtual", "backend", ">left", ">conns"),
        as_rows(
            (
                row["client"],
                _service(row),
                f"{endpoint_text(row['virtual_address'], row['virtual_port'])}/{row['protocol']}",
                row["backend"],
                _time(row["timeout_s"]),
                row["controls"],
            )
            for row in rows
        ),
    )


LISTINGS: dict[ListKind, Callable[[Any], View]] = {
    "services": services,
    "endpoints": endpoints,
    "conntrack": conntrack,
    "nat": nat,
    "persistence": persistence,
}
WIDE: dict[ListKind, Callable[[Any], View]] = LISTINGS | {
    "services": services_wide,
    "endpoints": endpoints_wide,
    "conntrack": conntrack_wide,
    "nat": nat_wide,
}


def with_rest(view: View, shown: int, matched: int) -> View:
    """Return the view with a line that says how many rows the limit has cut off."""
    if shown == matched:
        return view
    return replace(view, notes=(*view.notes, f"{matched - shown} more of {matched}: --limit 0 shows all"))


# --- cells -----------------------------------------------------------------------------------------------------------


def _service(row: ServiceRow | EndpointRow | TemplateRow) -> str:
    """Return ``namespace/name:port``; what stands in the table without a name is of no service any more."""
    return f"{row['service']}:{row['port_name']}" if row["port_name"] else row["service"] or "-"


def _virtual(row: ServiceRow) -> str:
    """Return address and port; kubectl's word where there is no address yet."""
    return endpoint_text(row["address"] or "<pending>", row["port"])


def _waiting(rows: Sequence[ServiceRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{row['service']}: {row['reason']}" for row in rows if row["reason"]))


def _type(row: ServiceRow) -> str:
    """Return what the address is; a cluster IP of a service of another type is one all the same."""
    words = {"cluster-ip": "ClusterIP", "node-port": "NodePort", "external-ip": "ExternalIP"}
    return words.get(row["kind"], "LoadBalancer")


def _affinity(row: ServiceRow) -> str:
    return _time(row["affinity_s"]) if row["affinity_s"] else "-"


def _state(row: FlowRow) -> str:
    if row["state"]:
        return row["state"]
    if "ASSURED" in row["status"]:
        return "ASSURED"
    return "REPLIED" if "SEEN_REPLY" in row["status"] else "UNREPLIED"


def _time(seconds: int) -> str:
    """Return a duration in its two largest units."""
    if seconds >= _DAY:
        return f"{seconds // _DAY}d{seconds % _DAY // _HOUR}h"
    if seconds >= _HOUR:
        return f"{seconds // _HOUR}h{seconds % _HOUR // _MINUTE}m"
    return f"{seconds // _MINUTE}m{seconds % _MINUTE}s" if seconds >= _MINUTE else f"{seconds}s"


def _original(row: FlowRow) -> tuple[str, str]:
    half, icmp = row["original"], row["icmp"]
    if icmp is not None:
        return f"{half['src']} id {icmp['id']}", f"{half['dst']} type {icmp['type']}"
    if not half["sport"] and not half["dport"]:
        return half["src"], half["dst"]
    return endpoint_text(half["src"], half["sport"]), endpoint_text(half["dst"], half["dport"])


def _reply(row: FlowRow) -> tuple[str, str]:
    half, icmp = row["reply"], row["icmp"]
    if icmp is not None:
        return f"{half['src']} type {icmp['reply_type']}", f"{half['dst']} id {icmp['reply_id']}"
    if not half["sport"] and not half["dport"]:
        return half["src"], half["dst"]
    return endpoint_text(half["src"], half["sport"]), endpoint_text(half["dst"], half["dport"])


def _answerer(row: FlowRow) -> str:
    asked, answers = row["original"], row["reply"]
    same = (asked["dst"], asked["dport"]) == (answers["src"], answers["sport"])
    return "" if same else endpoint_text(answers["src"], answers["sport"])


def _translated(address: str, port: int, new_address: str, new_port: int) -> tuple[str, str]:
    before = endpoint_text(address, port) if port else address
    after = endpoint_text(new_address, new_port) if new_port else new_address
    return before, "=" if before == after else after
