"""A cluster on this machine: up, status, down.

``up`` makes the namespaces and the LAN, starts etcd if the state is to come from there, then the nodes: one first,
since the very first start compiles the kernels for all, then the others at once. It returns when every node carries
packets and every pod's server listens; all of it goes on running without us.
"""

import asyncio
import http.client
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dataplane.control import client
from dataplane.control.process import Store
from dataplane.control.query import Query
from dataplane.devices import journal
from dataplane.lab_look import PLAN, READY, inside, is_ready, is_up, only, serves
from dataplane.lab_machine import JOURNAL, LabError, Machine, is_there, owner_of, start, take_away, wait_for
from dataplane.lab_plan import ETCD_PORT, LAN, RUN, LabNode, Plan

ETCD = "etcd"
_FIRST_SECONDS = 900.0  # the first start compiles: 30 s on an idle core, minutes on a busy one
_SECONDS = 120.0
_BALANCED_SECONDS = 5.0
_LAST_LINES = 15
_REPORT_SECONDS = 2.0  # between lines of the compiler's progress

Say = Callable[[str], None]
Result = TypeVar("Result")


# --- up --------------------------------------------------------------------------------------------------------------


def up(plan: Plan, say: Say) -> None:
    """Set a lab up and return when all of it is ready; if anything fails, or we are interrupted, take it away.

    Raises:
        LabError: It is up already, a name is taken, something needed is not installed, or a node did not start.
    """
    if plan.state == "etcd" and shutil.which("etcd") is None:
        raise LabError('cluster.state = "etcd" needs the program etcd: apt-get install etcd-server')
    if shutil.which("nsenter") is None:
        raise LabError("a lab needs the program nsenter: apt-get install util-linux")
    _make_room(plan, say)
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        book, _ = journal.claim(plan.folder / JOURNAL)
    except journal.AlreadyRunningError as error:
        raise LabError(f"lab {plan.name} is being set up by process {error.pid}") from None
    try:
        (plan.folder / PLAN).write_text(plan.to_json())
        with Machine(plan, book) as machine:
            machine.make()
        say(f"lan {plan.lan}: {len(plan.nodes)} nodes, a client")
        _run(plan, say)
        (plan.folder / READY).touch()
    except BaseException:
        say("taking away what was made")
        for line in take_away(plan.folder):
            say(line)
        raise
    book.hand_over()


def _make_room(plan: Plan, say: Say) -> None:
    """Take away what a dead lab of this name has left.

    Raises:
        LabError: It lives.
    """
    if not is_there(plan.folder):
        return
    if (owner := owner_of(plan.folder)) is not None:
        raise LabError(f"lab {plan.name} is being set up by process {owner.pid}")
    if is_up(plan.name):
        raise LabError(f'lab {plan.name} is up already: take it away first with "dataplane lab down"')
    say(f"lab {plan.name} was left behind, not all of it running: taking it away")
    for line in take_away(plan.folder):
        say(line)


def _run(plan: Plan, say: Say) -> None:
    if plan.state == "etcd":
        _start_etcd(plan)
        say(f"etcd: ready at {plan.switch}:{ETCD_PORT}")
    first, *others = plan.nodes
    _start_nodes(plan, [first], say, _FIRST_SECONDS)
    _start_nodes(plan, others, say, _SECONDS)
    if plan.state == "etcd":
        _write_pools(plan)
        for service in plan.services:
            keys = {key: value for key, value in service.items() if key not in ("name", "namespace")}
            _asked(client.set_service, plan.socket(first.name), _namespace(service), service["name"], keys)
    _start_servers(plan, say)
    for node in plan.nodes:
        if not wait_for(partial(_is_complete, plan, node), _SECONDS):
            raise LabError(f"{node.name} does not know of all nodes and services:\n{_last_lines(plan.log(node.name))}")
    wait_for(lambda: _is_balanced(plan), _BALANCED_SECONDS)


def _is_balanced(plan: Plan) -> bool:
    """Whether every LoadBalancer service has an address that somebody answers for, as all nodes see it.

    It may never come true: pools run out, and nobody answers for a service without endpoints.
    """
    wanted = {f"{_namespace(each)}/{each['name']}" for each in plan.services if each.get("type") == "LoadBalancer"}
    views = []
    for node in plan.nodes:
        try:
            rows = client.get(plan.socket(node.name), "load_balancer")["addresses"]
        except client.ControlError:
            return False
        views.append({name: row["owner"] for row in rows if row["owner"] for name in row["services"]})
    return wanted <= views[0].keys() and all(view == views[0] for view in views)


def _start_nodes(plan: Plan, nodes: Sequence[LabNode], say: Say, seconds: float) -> None:
    began = time.monotonic()
    running = []
    for node in nodes:
        file = plan.folder / f"{node.name}.toml"
        file.write_text(node.text)
        command = [sys.executable, "-m", "dataplane", "run", "--config", str(file)]
        running.append((node, start(plan.netns(node.name), plan.log(node.name), command)))
    for node, program in running:
        _wait_for_program(plan, node.name, program, partial(is_ready, plan, node), seconds, say)
        pods = sum(pod.node == node.name for pod in plan.pods)
        say(f"{node.name}: ready after {time.monotonic() - began:.1f} s, {node.address}, {_count(pods)}")


def _start_servers(plan: Plan, say: Say) -> None:
    running = []
    for pod in plan.pods:
        if pod.serve:
            words = (f"{pod.name}@{pod.node}", str(pod.serve), plan.name)
            command = [sys.executable, "-m", "dataplane.lab_serve", *words]
            running.append((pod, start(plan.netns(pod.name), plan.log(pod.name), command)))
    for pod, program in running:
        _wait_for_program(plan, pod.name, program, partial(serves, plan, pod), _SECONDS, say)
    if running:
        say(f"{_count(len(running))}: serving")


def _count(pods: int) -> str:
    return f"{pods} pod{'' if pods == 1 else 's'}"


def _start_etcd(plan: Plan) -> None:
    urls = [f"http://{address}:{ETCD_PORT}" for address in (plan.switch, "127.0.0.1")]
    peer = "http://127.0.0.1:2380"
    command = [
        *("etcd", "--name", plan.name, "--data-dir", str(plan.folder / ETCD), "--logger", "zap"),
        *("--listen-client-urls", ",".join(urls), "--advertise-client-urls", urls[0], "--log-level", "warn"),
        *(
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"{plan.name}={peer}",
        ),
    ]
    program = start(plan.netns(LAN), plan.log(ETCD), command)
    _wait_for_program(plan, ETCD, program, lambda: _etcd_is_healthy(plan), _SECONDS, print)


def _write_pools(plan: Plan) -> None:
    """Put the pools and advertisements into etcd, where all nodes look for them."""
    from dataplane.control.etcd import Etcd, EtcdError, Put

    prefix = Store().prefix
    keys = {f"{prefix}/pools/{pool['name']}": pool for pool in plan.pools}
    keys |= {f"{prefix}/advertisements/{each.get('name', 'default')}": each for each in plan.advertisements}

    async def write() -> bool:
        etcd = Etcd([f"http://{plan.switch}:{ETCD_PORT}"])
        try:
            for key, value in keys.items():
                await etcd.txn([], [Put(key, json.dumps(value))])
        finally:
            await etcd.close()
        return True

    try:
        inside(plan.netns(LAN), lambda: asyncio.run(write()))
    except EtcdError as error:
        raise LabError(f"etcd: {error}") from None


def _wait_for_program(
    plan: Plan, short: str, program: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: float, say: Say
) -> None:
    """Wait until a program is ready, and say meanwhile what it compiles.

    Raises:
        LabError: It has ended, or is not ready in time; with the end of its log.
    """
    said, line = time.monotonic(), ""
    deadline = said + seconds
    while not wait_for(lambda: program.poll() is not None or ready(), _REPORT_SECONDS):
        last = _last_lines(plan.log(short), 1)
        if "compiling" in last and last != line:
            say(f"{short}: {last}")
            line = last
        if time.monotonic() > deadline:
            raise LabError(f"{short} was not ready after {seconds:.0f} s:\n{_last_lines(plan.log(short))}")
    if program.poll() is not None:
        raise LabError(f"{short} ended with {program.returncode}:\n{_last_lines(plan.log(short))}")


def _last_lines(path: Path, count: int = _LAST_LINES) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def _is_complete(plan: Plan, node: LabNode) -> bool:
    """Whether a node knows all others and every service that has ports, and has an address for it."""
    try:
        peers = client.get(plan.socket(node.name), "status")["peers"]
        rows = client.listing(plan.socket(node.name), "services", Query(limit=0))["services"]
    except client.ControlError:
        return False
    known = {(row["service"], row["kind"]) for row in rows}
    wanted = {(name, kind) for each in plan.services for name, kind in _virtual(each)}
    return bool(peers == len(plan.nodes) - 1 and wanted <= known)


def _virtual(service: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the kinds of addresses that a service will have, beside its name."""
    name = f"{_namespace(service)}/{service['name']}"
    if service.get("ports") and any(address != "None" for address in service.get("clusterIPs", ())):
        yield name, "cluster-ip"
    if service.get("ports") and service.get("loadBalancerIPs"):
        yield name, "load-balancer-ip"


def _namespace(service: Mapping[str, Any]) -> str:
    return str(service.get("namespace", "default"))


def _asked(request: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return request(*arguments)
    except client.ControlError as error:
        raise LabError("\n".join([str(error), *error.errors])) from None


def _etcd_is_healthy(plan: Plan) -> bool:
    def ask() -> bool:
        connection = http.client.HTTPConnection(plan.switch, ETCD_PORT, timeout=1)
        with closing(connection):
            try:
                connection.request("GET", "/health")
                return b'"true"' in connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                return False

    return inside(plan.netns(LAN), ask)


def down(name: str = "") -> list[str]:
    """Take a lab away, whatever is left of it; return what resisted.

    Raises:
        LabError: There is none, there are several, or it is being set up at this moment.
    """
    return take_away(RUN / only(name))
