"""What there is of a lab, and how it is: found again from its plan and from what answers."""

import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

from dataplane.control import client
from dataplane.control.query import Query
from dataplane.control.views import View, as_rows
from dataplane.devices import journal
from dataplane.devices.namespace import in_namespace, namespace_path
from dataplane.lab_machine import NODES, LabError, is_there
from dataplane.lab_plan import CLIENT, RUN, LabNode, LabPod, Plan

PLAN, READY = "lab.json", "ready"
_NO_LAB, _UNKNOWN = 3, 4
_USUAL = "lab"  # the name that nobody has chosen


def labs() -> list[str]:
    """Return the names of the labs that are there, whole or not."""
    return sorted(folder.name for folder in RUN.glob("*") if is_there(folder)) if RUN.is_dir() else []


def only(name: str = "") -> str:
    """Return the name of a lab that is there; without a name, of the only one.

    Raises:
        LabError: There is none, or there are several.
    """
    found = labs()
    if not name and len(found) > 1:
        raise LabError(f"there are several labs: {', '.join(found)}; choose one with --name", 2)
    if not found or (name and name not in found):
        raise LabError(f"no lab {name} is up" if name else "no lab is up", _NO_LAB)
    return name or found[0]


def find(name: str = "") -> Plan:
    """Return the plan of a lab; without a name, of the only one.

    Raises:
        LabError: There is none, there are several, or it has none.
    """
    chosen = only(name)
    try:
        return Plan.from_json((RUN / chosen / PLAN).read_text())
    except (OSError, ValueError):
        raise LabError(f'lab {chosen} was left half made: take it away with "dataplane lab down"') from None


def is_up(name: str) -> bool:
    """Whether a lab was set up whole, and all its nodes run."""
    try:
        plan = find(name)
    except LabError:
        return False
    return (plan.folder / READY).exists() and all(_owner(plan, node.name) for node in plan.nodes)


def place(plan: Plan, short: str) -> str:
    """Return the namespace of a node, a pod, the client or the LAN.

    Raises:
        LabError: There is no such thing.
    """
    if short not in plan.places:
        raise LabError(f"no {short} in lab {plan.name}; there are {', '.join(plan.places)}", _UNKNOWN)
    return plan.netns(short)


def status(plan: Plan) -> dict[str, Any]:
    """Return all of a lab and how it is: plain dictionaries that are JSON as they stand."""
    nodes = [
        {
            "name": node.name,
            "address": node.address,
            "block": node.block,
            "netns": plan.netns(node.name),
            "socket": str(plan.socket(node.name)),
            "pid": _owner(plan, node.name),
            "state": node_state(plan, node),
        }
        for node in plan.nodes
    ]
    pods = [
        {
            "name": pod.name,
            "namespace": pod.namespace,
            "node": pod.node,
            "address": pod.address,
            "netns": plan.netns(pod.name),
            "state": _pod_state(plan, pod),
        }
        for pod in plan.pods
    ]
    return {
        "name": plan.name,
        "state": plan.state,
        "ready": (plan.folder / READY).exists() and all(node["state"] == "ready" for node in nodes),
        "lan": plan.lan,
        "client": {"name": CLIENT, "address": plan.client, "netns": plan.netns(CLIENT)},
        "nodes": nodes,
        "pods": pods,
        "services": services(plan),
    }


def services(plan: Plan) -> list[dict[str, Any]]:
    """Return the addresses of each service, as the first node that answers knows them."""
    for node in plan.nodes:
        try:
            rows = client.listing(plan.socket(node.name), "services", Query())["services"]
        except client.ControlError:
            continue
        return [
            {key: row[key] for key in ("service", "type", "kind", "address", "port", "protocol", "ready", "total")}
            for row in rows
        ]
    return []


def node_state(plan: Plan, node: LabNode) -> str:
    """Return "ready", "starting" or "dead"."""
    if not _owner(plan, node.name):
        return "dead"
    return "ready" if is_ready(plan, node) else "starting"


def _pod_state(plan: Plan, pod: LabPod) -> str:
    if not namespace_path(plan.netns(pod.name)).exists():
        return "absent"
    return ("serves" if serves(plan, pod) else "silent") if pod.serve else "up"


def _owner(plan: Plan, node: str) -> int:
    """Return the process of a node that runs, 0 for one that does not."""
    owner, _ = journal.contents(NODES / f"{plan.netns(node)}.journal")
    return owner.pid if owner is not None and owner.alive else 0


def is_ready(plan: Plan, node: LabNode) -> bool:
    """Whether a node answers, and says that it carries packets."""
    try:
        return bool(client.get(plan.socket(node.name), "status")["ready"])
    except client.ControlError:
        return False


def serves(plan: Plan, pod: LabPod) -> bool:
    """Whether somebody listens at a pod's port, asked from inside the pod."""

    def connect() -> bool:
        with closing(socket.socket()) as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", pod.serve)) == 0

    return inside(plan.netns(pod.name), connect)


def inside(netns: str, question: Callable[[], bool]) -> bool:
    """Ask in a namespace; one that is not there says no."""
    if not namespace_path(netns).exists():
        return False
    with journal.opened(str(namespace_path(netns))) as handle:
        return in_namespace(handle, question)


# --- for people ------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> View:
    """Return a lab's status as a table: nodes, pods, the client, services."""
    rows = [(node["name"], "node", "", node["address"], node["netns"], node["state"]) for node in found["nodes"]]
    rows += [(pod["name"], "pod", pod["node"], pod["address"], pod["netns"], pod["state"]) for pod in found["pods"]]
    outside = found["client"]
    rows.append((outside["name"], "client", "", outside["address"], outside["netns"], "up"))
    for row in found["services"]:
        if row["kind"] != "node-port":
            what = f"{row['ready']} of {row['total']} endpoints"
            rows.append(
                (
                    row["service"].partition("/")[2],
                    row["kind"],
                    "",
                    f"{row['address'] or '<pending>'}:{row['port']}/{row['protocol']}",
                    "",
                    what,
                )
            )
    return View(("name", "kind", "node", "address", "namespace", "state"), as_rows(rows))


def lines_to_try(plan: Plan, found: Mapping[str, Any], program: str) -> Iterator[str]:
    """Yield commands that show what there is, with a word for each; all of them work as they stand."""
    lab = f"{program} lab"
    named = "" if labs() == [_USUAL] else f" --name {plan.name}"
    pods = {pod.name: pod for pod in plan.pods}
    near = next((pod for pod in plan.pods if not pod.serve), plan.pods[0] if pods else None)
    far = near and next((pod for pod in plan.pods if pod.node != near.node), None)
    by_kind: dict[str, dict[str, Any]] = {}
    for row in found["services"]:
        is_theirs = row["service"] in plan.service_names and row["protocol"].upper() == "TCP"
        if is_theirs and row["ready"] and row["address"]:
            by_kind.setdefault(row["kind"], row)
    get = "curl -s" if shutil.which("curl") else "wget -qO-"
    if near and far:
        yield f"{lab} exec{named} {near.name} -- ping -c 3 {far.address}   # from pod to pod, by VXLAN"
    if near and (row := by_kind.get("cluster-ip")):
        yield f"{lab} exec{named} {near.name} -- {get} http://{_at(row)}   # from a pod to the service"
        if plan.dns:
            name = ".".join(reversed(row["service"].split("/")))
            yield f"{lab} exec{named} {near.name} -- {get} http://{_at(row | {'address': name})}   # by its name"
    if row := by_kind.get("load-balancer-ip"):
        yield f"{lab} exec{named} {CLIENT} -- {get} http://{_at(row)}   # from outside to its address on the LAN"
    if row := by_kind.get("node-port"):
        yield f"{lab} exec{named} {CLIENT} -- {get} http://{plan.nodes[-1].address}:{row['port']}   # to a node's port"
    node = plan.nodes[0].name
    yield f"{lab} exec{named} {node} -- dataplane show services   # any command, at {node}"
    yield f"{lab} exec{named} {node} -- dataplane show drops   # and what became of every packet"
    yield f"{lab} logs{named} {node}"
    yield f"{lab} down{named}"


def _at(row: Mapping[str, Any]) -> str:
    return str(row["address"]) if row["port"] == 80 else f"{row['address']}:{row['port']}"
