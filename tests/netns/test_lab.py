"""A cluster on this machine by ``dataplane lab``: up, used, and gone again, whatever was killed.

Every lab here is a user's: made by the command line from a file. Its name is the network's prefix and a word, so what a
killed test run leaves is swept like everything else.
"""

import json
import os
import pty
import re
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dataplane.devices.journal import claim
from dataplane.devices.namespace import DIRECTORY, delete_namespace, open_namespace
from dataplane.lab_look import READY
from dataplane.lab_machine import JOURNAL, identity, processes
from tests.netns.harness import LABS, READY_TIMEOUT, ROOT, RUN, Network, Process, eventually, ip, left_over, run

pytestmark = pytest.mark.netns

FILE = """
[cluster]
nodes = {nodes}
state = "{state}"
[[pods]]
name = "web"
count = {nodes}
labels = {{ app = "web" }}
serve = 8080
[[pods]]
name = "app"
perNode = 1
[[services]]
name = "web"
type = "LoadBalancer"
clusterIPs = ["10.96.0.20"]
ports = [{{ name = "http", port = 80, targetPort = 8080, nodePort = 30080 }}]
selector = {{ app = "web" }}
[[loadBalancer.ipAddressPools]]
name = "lan"
addresses = ["192.0.2.200-192.0.2.220"]
[dns]
clusterIP = "10.96.0.10"
"""
LAB = (sys.executable, "-m", "dataplane", "lab")


class Lab:
    """A lab by the command line."""

    def __init__(self, network: Network, word: str, nodes: int = 2, state: str = "static") -> None:
        self.network, self.nodes = network, nodes
        self.name = f"{network.prefix}{word}"
        self.file = network.directory / f"{word}.toml"
        self.file.write_text(FILE.format(nodes=nodes, state=state))

    def command(self, *words: str) -> list[str]:
        action, *rest = words
        return [*LAB, action, "--name", self.name, *rest]

    def up(self) -> str:
        return run(self.command("up", str(self.file)), timeout=READY_TIMEOUT)

    def launch(self) -> Process:
        return self.network.own(Process(self.command("up", str(self.file)), cwd=ROOT))

    def exec(self, place: str, *command: str) -> str:
        return run(self.command("exec", place, "--", *command))

    def fail(self, *words: str) -> tuple[int, str]:
        running = self.network.own(Process(self.command(*words), cwd=ROOT))
        code = running.wait(READY_TIMEOUT)
        assert code != 0, running.output
        return code, running.output

    def status(self) -> Any:
        return json.loads(run(self.command("status", "-o", "json"), check=False))

    def down(self) -> None:
        assert run(self.command("down")) == ""
        self.assert_gone()

    def assert_gone(self) -> None:
        assert left_over(self.name) == []
        assert self.processes() == []

    def processes(self) -> list[str]:
        """Return the command lines that name the lab: its nodes, its etcd, whoever is in one of its namespaces."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if self.name in line:
                found.append(line)
        return found

    def pid(self, node: str) -> int:
        return int(next(each["pid"] for each in self.status()["nodes"] if each["name"] == node))


def answers(lab: Lab, place: str, url: str, count: int) -> Counter[str]:
    """Return who answered how many of some requests."""
    output = lab.exec(place, "sh", "-c", f"for i in $(seq {count}); do curl -sS -m 5 {url}; done")
    return Counter(line.split("@")[0] for line in output.splitlines())


# --- a lab that is up ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["static", "etcd"])
def lab(request, network) -> Iterator[tuple[Lab, str]]:
    """A lab of three nodes, and what ``up`` printed."""
    made = Lab(network, request.param, 3, request.param)
    printed = made.up()
    yield made, printed
    made.down()


def test_up_returns_when_all_of_it_is_ready(lab):
    made, printed = lab
    status = made.status()
    assert status["ready"], status
    assert [node["state"] for node in status["nodes"]] == ["ready"] * 3
    assert {pod["name"]: pod["state"] for pod in status["pods"]} == {
        **{f"web-{number}": "serves" for number in range(3)},
        **{f"app-{number}": "up" for number in range(3)},
    }
    assert {row["kind"] for row in status["services"]} == {"cluster-ip", "load-balancer-ip", "node-port"}
    for name in ("node1", "node3", "web-2", "app-0", "client", "load-balancer-ip"):
        assert re.search(rf"\b{name}\b", printed), printed


def test_every_line_to_try_works_as_it_stands(lab):
    made, printed = lab
    lines = [line.strip() for line in printed.split("Try:\n")[1].splitlines()]
    assert len(lines) >= 8, printed
    assert shlex.split(lines[-1], comments=True)[-3:] == ["down", "--name", made.name]
    for line in lines[:-1]:
        assert run(["sh", "-c", line]).strip(), line


def test_pods_reach_pods_of_every_node(lab):
    made, _ = lab
    for target in made.status()["pods"]:
        assert "1 received" in made.exec("app-0", "ping", "-n", "-c", "1", "-W", "5", target["address"])


def test_a_service_is_reached_from_pods_and_from_outside_and_all_pods_answer(lab):
    made, _ = lab
    everybody = {"web-0": 3, "web-1": 3, "web-2": 3}
    assert answers(made, "app-1", "http://10.96.0.20", 9) == everybody
    assert answers(made, "client", "http://192.0.2.200", 9) == everybody
    assert answers(made, "client", "http://192.0.2.13:30080", 9) == everybody
    assert answers(made, "node2", "http://10.96.0.20", 9).keys() == everybody.keys()


def test_pods_find_services_by_their_names_and_the_machine_keeps_its_own(lab):
    made, _ = lab
    resolver = Path("/etc/resolv.conf").read_text()
    assert answers(made, "app-2", "http://web", 3) == {"web-0": 1, "web-1": 1, "web-2": 1}
    assert made.exec("app-0", "getent", "hosts", "web.default").split() == [
        "10.96.0.20",
        "web.default.svc.cluster.local",
    ]
    assert made.exec("app-0", "cat", "/etc/resolv.conf").startswith("nameserver 10.96.0.10\nsearch default.svc.")
    assert Path("/etc/resolv.conf").read_text() == resolver == made.exec("node1", "cat", "/etc/resolv.conf")


def test_pods_reach_the_client_under_their_nodes_address(lab):
    made, _ = lab
    server = made.network.own(
        Process(made.command("exec", "client", "--", sys.executable, "-m", "dataplane.lab_serve", "client", "8081"))
    )
    server.expect("ready")
    try:
        assert re.search(r"answers 192\.0\.2\.12:\d+$", made.exec("app-1", "curl", "-sS", "http://192.0.2.1:8081"))
    finally:
        server.stop()


def test_a_command_at_a_node_talks_to_that_node(lab):
    made, _ = lab
    for node in ("node1", "node3"):
        status = json.loads(made.exec(node, "dataplane", "status", "-o", "json"))
        assert status["name"] == f"{made.name}-{node}"
        assert status["peers"] == 2


def test_the_exit_status_of_a_command_is_passed_on(lab):
    made, _ = lab
    assert made.fail("exec", "app-0", "--", "sh", "-c", "exit 7") == (7, "")
    assert made.fail("exec", "app-0", "--", "no-such-program") == (127, "no-such-program: command not found")
    assert made.fail("exec", "app-0", "--", "/etc/passwd") == (126, "/etc/passwd: permission denied")
    code, output = made.fail("exec", "nobody", "--", "true")
    assert (code, output.startswith(f"dataplane: no nobody in lab {made.name}; there are node1, ")) == (4, True)


def test_a_command_may_have_options_without_a_dash_dash(lab):
    made, _ = lab
    assert "eth0" in run(made.command("exec", "app-0", "ip", "-br", "link"))


def test_a_command_has_the_terminal(lab):
    made, _ = lab
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    child = os.fork()
    if child == 0:
        os.login_tty(theirs)
        command = made.command("exec", "web-0", "--", "tty")
        os.execv(command[0], command)
    os.close(theirs)
    try:
        assert os.read(ours, 100).decode().strip() == name
        assert os.waitpid(child, 0)[1] == 0
    finally:
        os.close(ours)


def test_the_log_of_a_node_is_there(lab):
    made, _ = lab
    assert "ready node=" in run(made.command("logs", "node2"))
    code, output = made.fail("logs", "app-0")
    assert (code, "there are " in output) == (4, True)


def test_a_lab_that_is_up_is_not_made_again(lab):
    made, _ = lab
    before = [node["pid"] for node in made.status()["nodes"]]
    code, output = made.fail("up", str(made.file))
    assert code == 1
    assert "is up already" in output
    assert [node["pid"] for node in made.status()["nodes"]] == before


# --- labs that end ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(network) -> Iterator[Lab]:
    """A lab of two nodes, not up before the test and gone after it."""
    made = Lab(network, "small")
    yield made
    made.assert_gone()


def test_two_labs_with_the_same_addresses_do_not_know_of_each_other(small, network):
    other = Lab(network, "other")
    small.up()
    other.up()
    for each in (small, other):
        assert answers(each, "client", "http://192.0.2.200", 4) == {"web-0": 2, "web-1": 2}
    small.down()
    assert answers(other, "app-0", "http://10.96.0.20", 4) == {"web-0": 2, "web-1": 2}
    other.down()


@pytest.mark.parametrize("victim", ["node", "everything"])
def test_what_was_killed_is_taken_away_by_down(small, victim):
    small.up()
    if victim == "node":
        os.kill(small.pid("node2"), signal.SIGKILL)
        eventually(lambda: small.status()["nodes"][1]["state"] == "dead")
        code, output = small.fail("status")
        assert (code, output.splitlines()[-1].removeprefix("dataplane: ")) == (1, "not all of it is ready: node2")
    else:
        spaces = frozenset(identity(path) for path in DIRECTORY.glob(f"{small.name}-*"))
        assert len(spaces) == 8  # two nodes, four pods, the client, the LAN
        for pid in processes(spaces):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    small.down()


def test_a_second_up_says_that_something_was_left_and_starts_anew(small):
    small.up()
    os.kill(small.pid("node1"), signal.SIGKILL)
    eventually(lambda: small.status()["nodes"][0]["state"] == "dead")
    assert f"lab {small.name} was left behind, not all of it running: taking it away\n" in small.up()
    assert answers(small, "client", "http://192.0.2.200", 4) == {"web-0": 2, "web-1": 2}
    small.down()


@pytest.mark.parametrize("line", [r"^lan ", r"^node1: ready", r"^2 pods:"])
def test_an_up_that_is_killed_half_way_is_taken_away(small, line):
    running = small.launch()
    running.expect(line, READY_TIMEOUT)
    running.stop(signal.SIGKILL)
    small.down()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_up_that_is_interrupted_takes_everything_away_itself(small, number, code):
    running = small.launch()
    running.expect("^lan ")
    running.send(number)
    assert running.wait() == code, running.output
    assert "Traceback" not in running.output, running.output


def test_nobody_else_touches_a_lab_that_is_being_set_up(small):
    running = small.launch()
    running.expect("^lan ")
    for action in (["up", str(small.file)], ["down"]):
        code, output = small.fail(*action)
        assert (code, output) == (1, f"dataplane: lab {small.name} is being set up by process {running.pid}")
    assert running.wait(READY_TIMEOUT) == 0, running.output
    small.down()


def test_without_etcd_a_lab_that_needs_it_says_what_to_install(network):
    lab = Lab(network, "bare", state="etcd")
    running = network.own(Process(["env", "PATH=/nonexistent", *lab.command("up", str(lab.file))], cwd=ROOT))
    assert running.wait() == 1
    assert running.output == 'dataplane: cluster.state = "etcd" needs the program etcd: apt-get install etcd-server'
    lab.assert_gone()


def test_without_the_capabilities_a_lab_is_refused_and_nothing_stays(small):
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    running = small.network.own(Process([*powerless, *small.command("up", str(small.file))], cwd=ROOT))
    assert running.wait() == 5, running.output
    assert "run as root" in running.output


def test_a_namespace_of_somebody_else_is_left_alone(small):
    name = f"{small.name}-web-1"
    os.close(open_namespace(name).fd)
    try:
        code, output = small.fail("up", str(small.file))
        assert (code, f"namespace {name} exists already" in output) == (1, True)
        assert left_over(small.name) == [f"/run/netns/{name}"]
    finally:
        delete_namespace(Path("/run/netns") / name)


def test_a_name_that_somebody_has_taken_since_is_left_alone(small):
    small.up()
    name = f"{small.name}-client"
    ip("netns", "delete", name)
    ip("netns", "add", name)
    keeper = small.network.own(Process(["nsenter", f"--net=/run/netns/{name}", "--", "sleep", "1000"]))
    eventually(lambda: str(keeper.pid) in run(["ip", "netns", "pids", name]))
    try:
        assert run(small.command("down"), check=False) == ""
        assert keeper.running
        assert left_over(small.name) == [f"/run/netns/{name}"]
    finally:
        keeper.stop()
        delete_namespace(Path("/run/netns") / name)


def test_a_node_that_does_not_start_is_said_with_its_last_words(small):
    claimed, _ = claim(RUN / f"{small.name}-node2.journal")  # as if a node of this name were running elsewhere
    code, output = small.fail("up", str(small.file))
    assert code == 1
    assert re.search(
        rf"dataplane: node2 ended with 1:\n.*ERROR node \S+ is already running as process {os.getpid()}", output
    )
    assert "taking away what was made" in output
    assert left_over(small.name) == [str(claimed.path)]
    claimed.close()


def test_the_journal_is_all_that_is_needed_to_take_a_lab_away(small):
    small.up()
    folder = LABS / small.name
    for path in folder.iterdir():
        if path.is_file() and path.name != JOURNAL:
            path.unlink()
    assert not (folder / READY).exists()
    small.down()
