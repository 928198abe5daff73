"""``dataplane show``: what the running node says of itself, for people and in the formats of the tools they know."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from dataplane.cli_base import Command, ask, fail_usage, output_option, print_json, print_table, socket_option

if TYPE_CHECKING:
    from dataplane.control.query import Query
    from dataplane.control.snapshot import FlowRow, Kind, ListKind

_PROTOCOL = ("-p", "--proto", "--protocol")
_CONNTRACK_FILTERS = (  # as conntrack(8) has them
    (("-s", "--src", "--orig-src"), "src", "ADDRESS", "Source of the original direction; an address or a prefix."),
    (("-d", "--dst", "--orig-dst"), "dst", "ADDRESS", "Destination of the original direction."),
    (("-r", "--reply-src"), "reply_src", "ADDRESS", "Source of the reply direction: who answers."),
    (("-q", "--reply-dst"), "reply_dst", "ADDRESS", "Destination of the reply direction."),
    (("--sport", "--orig-port-src"), "sport", "PORT", "Source port of the original direction."),
    (("--dport", "--orig-port-dst"), "dport", "PORT", "Destination port of the original direction."),
    (("--reply-port-src",), "reply_sport", "PORT", "Source port of the reply direction."),
    (("--reply-port-dst",), "reply_dport", "PORT", "Destination port of the reply direction."),
    (("--state",), "state", "STATE", "TCP state: SYN_SENT, ESTABLISHED, TIME_WAIT, ..."),
    (("-u", "--status"), "status", "STATUS", "UNREPLIED, SEEN_REPLY, ASSURED, SRC_NAT, DST_NAT or ANY_NAT."),
)
_SERVICE = (("--service",), "service", "NAME", "Of this service; [NAMESPACE/]NAME.")


def service_filter(command: Command) -> Command:
    """Give a command the filters of what belongs to services."""
    return _options(command, ((_PROTOCOL, "protocol", "PROTO", "tcp, udp or sctp."), _SERVICE))


def flow_filters(command: Command) -> Command:
    """Give a command the filters of flows."""
    protocol = (_PROTOCOL, "protocol", "PROTO", "tcp, udp, icmp, ... or a number.")
    return _options(command, (protocol, *_CONNTRACK_FILTERS, _SERVICE))


def limit_option(command: Command) -> Command:
    """Give a command ``--limit``."""
    return click.option("--limit", metavar="N", default="1000", help="Rows to show, 0: all.  [default: 1000]")(command)


def _options(command: Command, filters: tuple[tuple[tuple[str, ...], str, str, str], ...]) -> Command:
    for names, field, metavar, text in reversed(filters):
        command = click.option(*names, field, metavar=metavar, help=text)(command)
    return command


def make_query(words: dict[str, str | None]) -> "Query":
    """Return the query that the options make; end the command if they make none."""
    from dataplane.control import query

    try:
        return query.parse({name: word for name, word in words.items() if word is not None})
    except query.QueryError as error:
        fail_usage([f"dataplane: --{str(error).replace('_', '-')}"])


@click.group()
def show() -> None:
    """Look into the running node.

    \b
    Examples:
      dataplane show interfaces
      dataplane show drops --all
      dataplane show services -o ipvsadm
      dataplane show conntrack --service web --state TIME_WAIT
      dataplane show counters -o json | jq .dropped
    """  # noqa: D301 - click wants the backspace itself


# --- the node --------------------------------------------------------------------------------------------------------


@show.command()
@output_option("table", "json")
@socket_option
def interfaces(output: str, path: Path | None) -> None:
    """List the devices, with their counters."""
    show_snapshot("interfaces", output, path)


@show.command()
@output_option("table", "json", "iproute")
@socket_option
def routes(output: str, path: Path | None) -> None:
    """List the routing table; "-o iproute" as "ip route" prints it."""
    show_snapshot("routes", output, path)


@show.command()
@output_option("table", "json")
@socket_option
def arp(output: str, path: Path | None) -> None:
    """List the neighbors on the uplink."""
    show_snapshot("arp", output, path)


@show.command()
@output_option("table", "json")
@socket_option
def vteps(output: str, path: Path | None) -> None:
    """List the other nodes' ends of the tunnel."""
    show_snapshot("vteps", output, path)


@show.command()
@click.option("--all", "every", is_flag=True, help="Also reasons that no packet has met.")
@output_option("table", "json")
@socket_option
def drops(every: bool, output: str, path: Path | None) -> None:
    """List why packets were dropped, the main reason first."""
    show_snapshot("drops", output, path, "all_drops" if every else "drops")


@show.command()
@output_option("table", "json")
@socket_option
def counters(output: str, path: Path | None) -> None:
    """Show the totals, and that every packet is accounted for."""
    show_snapshot("counters", output, path)


@show.command()
@output_option("table", "json")
@socket_option
def pipeline(output: str, path: Path | None) -> None:
    """List the stages, and how many packets each took out."""
    show_snapshot("pipeline", output, path)


def show_snapshot(kind: "Kind", output: str, path: Path | None, view: str = "") -> None:
    """Print a snapshot."""
    from dataplane.control import client

    snapshot: Any = ask(lambda socket: client.get(socket, kind), path)
    if output == "json":
        print_json(snapshot)
        return
    from dataplane.control import views

    if output == "iproute":
        click.echo(views.iproute(snapshot), nl=False)
        return
    print_table(getattr(views, view or kind)(snapshot))


# --- services and flows ----------------------------------------------------------------------------------------------


@show.command()
@service_filter
@click.option("--stats", is_flag=True, help="Totals, as ipvsadm -Ln --stats; implies -o ipvsadm.")
@click.option("--rate", is_flag=True, help="Per second, measured over one, as ipvsadm -Ln --rate; implies -o ipvsadm.")
@output_option("table", "wide", "json", "ipvsadm")
@limit_option
@socket_option
def services(stats: bool, rate: bool, output: str, path: Path | None, **words: str | None) -> None:
    """List the virtual services, also as ipvsadm prints them.

    "-o ipvsadm" is "ipvsadm -Ln".
    """
    if stats and rate:
        fail_usage(["dataplane: --stats and --rate: choose one"])
    if output == "ipvsadm" or stats or rate:
        if output not in ("table", "ipvsadm"):
            fail_usage([f"dataplane: --stats and --rate are ipvsadm's; they do not go with -o {output}"])
        words["limit"] = "0"  # ipvsadm lists all
        _show_as_ipvsadm("stats" if stats else "rate" if rate else "services", make_query(words), path)
        return
    show_listing("services", make_query(words), output, path)


@show.command()
@service_filter
@output_option("table", "wide", "json")
@limit_option
@socket_option
def endpoints(output: str, path: Path | None, **words: str | None) -> None:
    """List the endpoints of each virtual service.

    They stand in the order of the scheduler's list, the newest first.
    """
    show_listing("endpoints", make_query(words), output, path)


@show.command()
@flow_filters
@click.option("--stats", is_flag=True, help='The table\'s counters; with "-o conntrack" as conntrack -S.')
@output_option("table", "wide", "json", "conntrack", "extended", "ipvsadm")
@limit_option
@socket_option
def conntrack(stats: bool, output: str, path: Path | None, **words: str | None) -> None:
    """List the tracked flows.

    "-o conntrack" prints them as "conntrack -L", "-o extended" as "conntrack -L -o extended" on a host that counts
    packets, "-o ipvsadm" as "ipvsadm -Lnc".
    """
    if stats:
        _show_stats(output, path)
        return
    wanted = make_query(words)
    formats: dict[str, Callable[[Query, Path | None], None]] = {
        "conntrack": partial(_show_as_conntrack, False),
        "extended": partial(_show_as_conntrack, True),
        "ipvsadm": _show_connections,
    }
    if output in formats:
        formats[output](wanted, path)
        return
    show_listing("conntrack", wanted, output, path)


@show.command()
@flow_filters
@output_option("table", "wide", "json")
@limit_option
@socket_option
def nat(output: str, path: Path | None, **words: str | None) -> None:
    """List the translated flows: what a packet becomes, and why."""
    show_listing("nat", make_query(words), output, path)


@show.command()
@service_filter
@click.option("-s", "--src", "src", metavar="ADDRESS", help="The client; an address or a prefix.")
@output_option("table", "json", "ipvsadm")
@limit_option
@socket_option
def persistence(output: str, path: Path | None, **words: str | None) -> None:
    """List the clients that stay with an endpoint (affinity)."""
    wanted = make_query(words)
    if output == "ipvsadm":
        from dataplane.control import ipvsadm

        _print(ipvsadm.connections([], _listing("persistence", wanted, path)["persistence"]))
        return
    show_listing("persistence", wanted, output, path)


def show_listing(kind: "ListKind", wanted: "Query", output: str, path: Path | None) -> None:
    """Print a listing."""
    answer = _listing(kind, wanted, path)
    if output == "json":
        print_json(answer)
        return
    from dataplane.control import views_services as views

    rows = answer[kind]
    table = (views.WIDE if output == "wide" else views.LISTINGS)[kind](rows)
    print_table(views.with_rest(table, len(rows), answer["matched"]))


def _listing(kind: "ListKind", wanted: "Query", path: Path | None) -> dict[str, Any]:
    from dataplane.control import client

    return ask(lambda socket: client.listing(socket, kind, wanted), path)


def _show_as_ipvsadm(form: str, wanted: "Query", path: Path | None) -> None:
    from dataplane.control import client, ipvsadm

    def take() -> tuple[Any, Any]:
        rows = _listing("services", wanted, path)["services"]
        return [row for row in rows if row["address"]], _listing("endpoints", wanted, path)["endpoints"]

    size = ask(lambda socket: client.get(socket, "conntrack_stats"), path)["limit"]
    found, began = take(), time.monotonic()
    if form == "rate":
        time.sleep(1)
        before, found, seconds = found, take(), time.monotonic() - began
        rows, members = (ipvsadm.per_second(old, new, seconds) for old, new in zip(before, found, strict=True))
        found = rows, members
    _print(getattr(ipvsadm, form)(*found, size))


def _show_as_conntrack(extended: bool, wanted: "Query", path: Path | None) -> None:
    from dataplane.control import client
    from dataplane.control import conntrack as form

    def draw(socket: Path) -> None:
        rows, shown = client.Rows(socket, "conntrack", wanted), 0
        for row in rows:
            sys.stdout.write(form.line(cast("FlowRow", row), extended) + "\n")
            shown += 1
        sys.stdout.flush()
        rest = rows.matched - shown
        more = f" {rest} more pass: --limit 0 shows all." if rest else ""
        click.echo(f"dataplane: {shown} flow entries have been shown.{more}", err=True)

    ask(draw, path)


def _show_connections(wanted: "Query", path: Path | None) -> None:
    """Print what ip_vs would list: balanced flows, and templates unless a filter is about flows alone."""
    from dataclasses import replace

    from dataplane.control import ipvsadm, query

    answer = _listing("conntrack", replace(wanted, status=wanted.status or "BALANCED"), path)
    flows = answer["conntrack"]
    words = wanted.words()
    templates = []
    if words.keys() <= query.KEYS["persistence"]:
        templates = _listing("persistence", wanted, path)["persistence"]
    _print(ipvsadm.connections(flows, templates))
    rest = answer["matched"] - len(flows)
    if rest:
        click.echo(f"dataplane: {rest} more connections pass: --limit 0 shows all", err=True)


def _show_stats(output: str, path: Path | None) -> None:
    if output not in ("table", "json", "conntrack"):
        fail_usage([f"dataplane: --stats goes with -o table, json or conntrack, not with {output}"])
    if output != "conntrack":
        show_snapshot("conntrack_stats", output, path)
        return
    from dataplane.control import client
    from dataplane.control import conntrack as form

    snapshot: Any = ask(lambda socket: client.get(socket, "conntrack_stats"), path)
    _print(form.stats(snapshot))


def _print(text: str) -> None:
    click.echo(text, nl=False)
