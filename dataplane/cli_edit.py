"""``dataplane service``, ``endpoint`` and ``conntrack``: changes of the running node.

Each is carried out whole or not at all, between two packets. What is set here lives as long as the node does; what
should outlive it belongs into its file.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from dataplane.cli_base import ask, count, fail, fail_usage, output_option, report, socket_option
from dataplane.cli_show import flow_filters, limit_option, make_query, service_filter, show_listing

_PORT = re.compile(
    r"(?:(?P<name>[a-z0-9-]+)=)?(?P<port>\d{1,5})(?::(?P<target>[a-z0-9-]+))?"
    r"(?:/(?P<protocol>TCP|UDP|SCTP))?(?:@(?P<node>\d{1,5}))?",
    re.ASCII | re.IGNORECASE,
)


# --- services --------------------------------------------------------------------------------------------------------


@click.group()
def service() -> None:
    """Set, delete and list services.

    \b
    Examples:
      dataplane service set web --cluster-ip 10.96.0.20 --port 80:8080
      dataplane service set -f web.toml
      dataplane service delete shop/web
    """  # noqa: D301 - click wants the backspace itself


@service.command("set")
@click.argument("name", required=False)
@click.option(
    "-f", "--file", "file", type=click.Path(allow_dash=True, path_type=Path), help='TOML or JSON; "-": stdin.'
)
@click.option(
    "--type", "kind", type=click.Choice(["ClusterIP", "NodePort", "LoadBalancer"]), help="Default: ClusterIP."
)
@click.option("--cluster-ip", "clusterIPs", multiple=True, metavar="IP")
@click.option("--external-ip", "externalIPs", multiple=True, metavar="IP")
@click.option("--load-balancer-ip", "loadBalancerIPs", multiple=True, metavar="IP")
@click.option("--port", "ports", multiple=True, metavar="[NAME=]PORT[:TARGET][/PROTOCOL][@NODEPORT]")
@click.option("--endpoint", "endpoints", multiple=True, metavar="IP[=WEIGHT]")
@click.option("--scheduler", metavar="NAME", help="rr, wrr, lc, wlc, sed, nq, sh, dh, mh, fo or ovf.")
@click.option("--affinity", metavar="SECONDS", type=click.IntRange(1, 86400), help="A client keeps its endpoint.")
@click.option("--external-policy", "externalTrafficPolicy", type=click.Choice(["Cluster", "Local"]))
@click.option("--internal-policy", "internalTrafficPolicy", type=click.Choice(["Cluster", "Local"]))
@socket_option
def set_service(name: str | None, file: Path | None, path: Path | None, **options: Any) -> None:
    """Add [NAMESPACE/]NAME, or replace it.

    A service that exists keeps its endpoints unless some are given.

    A FILE has the keys of [[services.static]] in the node's file: one service, or several under that heading; the first
    that is refused ends the command.

    \b
    Examples:
      dataplane service set web --cluster-ip 10.96.0.20 --port 80:8080 \\
          --endpoint 10.244.1.10 --endpoint 10.244.2.7=2
      dataplane service set shop/dns --cluster-ip 10.96.0.10 --port dns=53/UDP
      dataplane service set -f - < web.json
    """  # noqa: D301 - click wants the backspace itself
    given = {key: value for key, value in options.items() if value not in (None, ())}
    if file is not None:
        if given:
            fail_usage([f"dataplane: -f does not go with {', '.join(map(_option, given))}"])
        services = _read(file, name)
    elif name is None:
        fail_usage(["dataplane: expected a NAME or -f FILE"])
    else:
        services = [(*_split(name), _values(given))]
    from dataplane.control import client

    for namespace, own_name, values in services:
        report(ask(partial(client.set_service, namespace=namespace, name=own_name, values=values), path))


@service.command("delete")
@click.argument("name")
@socket_option
def delete_service(name: str, path: Path | None) -> None:
    """Delete service [NAMESPACE/]NAME; its connections end."""
    from dataplane.control import client

    report(ask(lambda socket: client.delete_service(socket, *_split(name)), path))


@service.command("list")
@service_filter
@output_option("table", "wide", "json")
@limit_option
@socket_option
def list_services(output: str, path: Path | None, **words: str | None) -> None:
    """List the services, as "show services"."""
    show_listing("services", make_query(words), output, path)


# --- endpoints -------------------------------------------------------------------------------------------------------


@click.group()
def endpoint() -> None:
    """Add, drain and delete endpoints of a service.

    \b
    Examples:
      dataplane endpoint add default/web 10.244.1.12 --weight 2
      dataplane endpoint drain default/web 10.244.1.10
      dataplane endpoint delete default/web 10.244.1.10
    """  # noqa: D301 - click wants the backspace itself


@endpoint.command("add")
@click.argument("service")
@click.argument("ip")
@click.option("--weight", type=click.IntRange(0, 65535), help="Default: 1; 0 gets no new connections.")
@click.option(
    "--node", metavar="NAME", help="Where it runs, for traffic policy Local; not needed for this node's pods."
)
@socket_option
def add_endpoint(service: str, ip: str, weight: int | None, node: str | None, path: Path | None) -> None:
    """Add the endpoint at IP to SERVICE, or change it."""
    from dataplane.control import client

    values = {key: value for key, value in {"weight": weight, "node": node}.items() if value is not None}
    report(ask(lambda socket: client.add_endpoint(socket, *_split(service), ip, values), path))


@endpoint.command("drain")
@click.argument("service")
@click.argument("ip")
@socket_option
def drain_endpoint(service: str, ip: str, path: Path | None) -> None:
    """Give the endpoint at IP no new connections; those it has go on."""
    from dataplane.control import client

    report(ask(lambda socket: client.drain_endpoint(socket, *_split(service), ip), path))


@endpoint.command("delete")
@click.argument("service")
@click.argument("ip")
@socket_option
def delete_endpoint(service: str, ip: str, path: Path | None) -> None:
    """Delete the endpoint at IP; its TCP connections drain.

    UDP moves on to another endpoint with the next datagram.
    """
    from dataplane.control import client

    report(ask(lambda socket: client.delete_endpoint(socket, *_split(service), ip), path))


# --- flows -----------------------------------------------------------------------------------------------------------


@click.group()
def conntrack() -> None:
    """Forget tracked flows.

    \b
    Examples:
      dataplane conntrack delete -p udp -d 10.96.0.10 --dport 53
      dataplane conntrack delete --service default/web
    """  # noqa: D301 - click wants the backspace itself


@conntrack.command("delete")
@flow_filters
@click.option("--all", "everything", is_flag=True, help="Delete every flow; without it a filter is needed.")
@socket_option
def delete_flows(everything: bool, path: Path | None, **words: str | None) -> None:
    """Forget the flows that pass all filters; their next packets begin new ones.

    The filters are those of "conntrack -D".
    """
    wanted = make_query(words)
    if wanted.is_open and not everything:
        fail_usage(["dataplane: no filter is given; --all deletes every flow"])
    if everything and not wanted.is_open:
        fail_usage(["dataplane: --all does not go with a filter"])
    from dataplane.control import client

    deleted = ask(lambda socket: client.delete_flows(socket, wanted, everything), path)
    click.echo(f"{count(deleted, 'flow entry').replace('entrys', 'entries')} deleted")


# --- what was written ------------------------------------------------------------------------------------------------


def _split(name: str) -> tuple[str, str]:
    namespace, slash, own_name = name.rpartition("/")
    if not own_name or (slash and not namespace) or "/" in namespace:
        fail_usage([f"dataplane: {name!r}: expected NAME or NAMESPACE/NAME"])
    return namespace or "default", own_name


def _option(key: str) -> str:
    names = {"kind": "--type", "clusterIPs": "--cluster-ip", "externalIPs": "--external-ip", "ports": "--port"}
    names |= {"loadBalancerIPs": "--load-balancer-ip", "endpoints": "--endpoint"}
    names |= {"externalTrafficPolicy": "--external-policy", "internalTrafficPolicy": "--internal-policy"}
    return names.get(key, f"--{key}")


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """Return what the options say under the keys of the node's file."""
    renamed = {"kind": "type"}
    values = {renamed.get(key, key): value for key, value in options.items() if key != "affinity"}
    values |= {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
    if "affinity" in options:
        values |= {"sessionAffinity": "ClientIP", "sessionAffinityTimeout": f"{options['affinity']}s"}
    for key, parse in (("ports", _port), ("endpoints", _endpoint)):
        if key in options:
            values[key] = [parse(text) for text in options[key]]
    return values


def _port(text: str) -> dict[str, Any]:
    found = _PORT.fullmatch(text)
    if not found:
        fail_usage([f"dataplane: --port {text!r}: expected [NAME=]PORT[:TARGET][/PROTOCOL][@NODEPORT]"])
    words = found.groupdict()
    target = words["target"]
    values = {
        "name": words["name"],
        "port": int(words["port"]),
        "targetPort": int(target) if target and target.isdigit() and len(target) < 6 else target,
        "protocol": words["protocol"] and words["protocol"].upper(),
        "nodePort": words["node"] and int(words["node"]),
    }
    return {key: value for key, value in values.items() if value is not None}


def _endpoint(text: str) -> dict[str, Any]:
    ip, equals, weight = text.partition("=")
    if equals and not (weight.isascii() and weight.isdigit() and len(weight) < 6):
        fail_usage([f"dataplane: --endpoint {text!r}: expected IP[=WEIGHT]"])
    return {"ip": ip, "weight": int(weight)} if equals else {"ip": ip}


def _read(file: Path, name: str | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (namespace, name, values) of the services in a file."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
    except FileNotFoundError:
        fail_usage([f"{file}: no such file"])
    except PermissionError:
        fail(f"{file}: no permission to read the file", 5)
    except (OSError, UnicodeDecodeError) as error:
        fail_usage([f"{file}: {error}"])
    content = _parse(file, text)
    section = content.get("services")
    tables = section.get("static") if isinstance(section, dict) else [content]
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        fail_usage([f"{file}: services.static: expected an array of tables"])
    if name is not None and len(tables) != 1:
        fail_usage([f"{file}: has {len(tables)} services; a NAME goes with one"])
    return [_named(file, table, name) for table in tables]


def _parse(file: Path, text: str) -> dict[str, Any]:
    import tomllib

    is_json = text.lstrip().startswith("{")
    try:
        content = json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:  # both parsers' errors are
        fail_usage([f"{file}: {'JSON' if is_json else 'TOML'}: {error}"])
    assert isinstance(content, dict)
    return content


def _named(file: Path, table: dict[str, Any], name: str | None) -> tuple[str, str, dict[str, Any]]:
    own = {key: table.get(key, default) for key, default in (("namespace", "default"), ("name", ""))}
    namespace, own_name = _split(name) if name is not None else (own["namespace"], own["name"])
    if not isinstance(own_name, str) or not own_name or not isinstance(namespace, str):
        fail_usage([f"{file}: name: missing; expected the service's name"])
    return namespace, own_name, {key: value for key, value in table.items() if key not in ("name", "namespace")}
