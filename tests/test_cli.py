"""The command line as its users see it: a process, its output and its exit status."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane import __version__
from dataplane.cli import missing_capabilities
from dataplane.config import DEFAULT, load, parse
from tests.fake_node import FakeNode, dataplane, serving, snapshots
from tests.node_file import NODE

POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")  # root by name only: no capability, no override
KINDS = ("interfaces", "routes", "arp", "vteps", "drops", "counters", "pipeline")


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def path(tmp_path: Path, node: FakeNode) -> Iterator[Path]:
    with serving(node, tmp_path / "node1.sock"):
        yield tmp_path / "node1.sock"


# --- help ------------------------------------------------------------------------------------------------------------


def test_the_version_is_the_packages():
    assert dataplane("--version").stdout == f"dataplane {__version__}\n"


COMMANDS = (
    *((), ("run",), ("check",), ("show",), ("status",), ("reload",), ("show", "drops"), ("show", "conntrack")),
    *(("service",), ("service", "set"), ("endpoint", "add"), ("conntrack", "delete"), ("dns",), ("dns", "query")),
    *(("lab",), ("lab", "up"), ("lab", "status"), ("lab", "exec"), ("lab", "logs"), ("lab", "down")),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = dataplane(*command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"Usage: dataplane {' '.join(command)}".rstrip())
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\b" not in result.stdout


def test_help_says_the_exit_statuses():
    text = " ".join(dataplane("--help").stdout.split())
    assert "2 usage or configuration, 3 not running, 4 not found, 5 no permission" in text


def test_an_unknown_command_is_a_usage_error():
    result = dataplane("shwo")
    assert result.returncode == 2
    assert "No such command 'shwo'" in result.stderr


HEAVY = ("numba", "numpy", "aiohttp", "rich", "prometheus_client", "uvloop", "pyroute2")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check", str(DEFAULT)],
        ["show", "routes", "--socket", "/nowhere"],
        ["show", "conntrack", "-o", "conntrack", "--socket", "/nowhere"],
        ["service", "set", "web", "--port", "80", "--socket", "/nowhere"],
        ["cluster", "status", "--socket", "/nowhere"],
        ["lab", "status", "--name", "nowhere"],
        ["lab", "down", "--name", "nowhere"],
    ],
)
def test_what_must_start_fast_imports_nothing_heavy(arguments):
    program = f"""
import sys
from dataplane.cli import main
sys.argv = ["dataplane", *{arguments!r}]
try:
    main()
except SystemExit:
    print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("arguments", [["--help"], ["show", "routes", "--socket", "/nowhere"]])
def test_only_check_and_run_import_pydantic(arguments):
    program = "import sys\nfrom dataplane.cli import main\n"
    program += f"sys.argv = ['dataplane', *{arguments!r}]\n"
    program += "try: main()\nexcept SystemExit: print('pydantic' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False"


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_says_ok_and_what_the_node_is():
    result = dataplane("check", "node.toml")
    assert result.stdout == "OK node.toml: node node1, 3 pods, 0 peers, 0 static routes, no uplink\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_check_counts_in_words(tmp_path):
    (tmp_path / "x.toml").write_text(NODE)
    assert "node node1, 1 pod, 1 peer, 0 static routes, uplink eth0" in dataplane("check", tmp_path / "x.toml").stdout


def test_check_lists_every_error_and_exits_with_2(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("[vxlan]\nvni = 0\nmod = 1\n")
    result = dataplane("check", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"{path}:2: vxlan.vni: expected a number from 1 to 16777215 (got 0)\n"
        f'{path}:3: vxlan.mod: unknown key; did you mean "mode"?\n'
    )


@pytest.mark.parametrize("command", [("check",), ("run", "--config")])
def test_a_missing_file_exits_with_2(command):
    result = dataplane(*command, "/nowhere/node.toml")
    assert (result.returncode, result.stderr) == (2, "/nowhere/node.toml: no such file\n")


def test_an_unreadable_file_is_a_matter_of_permission(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(NODE)
    path.chmod(0)
    result = dataplane("check", path, prefix=POWERLESS)
    assert (result.returncode, result.stderr) == (5, f"{path}: no permission to read the file\n")


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_without_capabilities_names_them():
    result = dataplane("run", prefix=POWERLESS)
    assert result.returncode == 5
    assert result.stderr == "no permission: needs CAP_NET_ADMIN and CAP_SYS_ADMIN; run as root\n"


def test_the_raw_socket_of_an_uplink_needs_a_capability_of_its_own():
    uplink = parse(NODE, "F")
    os.seteuid(65534)
    try:
        assert missing_capabilities(uplink) == ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_NET_RAW"]
        assert missing_capabilities(parse("", "F")) == []
    finally:
        os.seteuid(0)
    assert missing_capabilities(load()) == []


# --- show, status, reload --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_the_snapshot_as_json(kind, path):
    result = dataplane("show", kind, "-o", "json", "--socket", path)
    assert json.loads(result.stdout) == snapshots()[kind]
    assert result.returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_a_plain_table_into_a_pipe(kind, path):
    result = dataplane("show", kind, "--socket", path)
    assert result.returncode == 0
    assert result.stdout.splitlines()[0].isupper()
    assert "\x1b" not in result.stdout


def test_the_socket_may_come_from_the_environment(path):
    result = dataplane("show", "drops", DATAPLANE_SOCKET=str(path))
    assert result.stdout.splitlines()[1].split()[:3] == ["12", "ip.ttl", "route"]


def test_drops_shows_all_reasons_when_asked(path):
    few, every = (dataplane("show", "drops", *flag, "--socket", path).stdout for flag in ((), ("--all",)))
    assert len(few.splitlines()) == 3
    assert re.search(r"^ +0  mtu\.df +route", every, re.MULTILINE)


def test_routes_are_also_printed_as_iproute2_does(path):
    result = dataplane("show", "routes", "-o", "iproute", "--socket", path)
    assert "10.244.2.0/24 via 10.244.2.0 dev vxlan.calico onlink mtu 1450\n" in result.stdout


def test_only_routes_know_iproute(path):
    result = dataplane("show", "arp", "-o", "iproute", "--socket", path)
    assert result.returncode == 2
    assert "'iproute' is not one of 'table', 'json'" in result.stderr


def test_status_says_what_runs(path):
    assert re.search(r"^name +node1$", dataplane("status", "--socket", path).stdout, re.MULTILINE)
    assert json.loads(dataplane("status", "-o", "json", "--socket", path).stdout) == snapshots()["status"]


def test_cluster_status_says_who_is_in_and_how_the_store_is_doing(path):
    table = dataplane("cluster", "status", "--socket", path).stdout
    assert re.search(r"^node1 +192\.0\.2\.11 +10\.244\.1\.0/26 .* alive +\*$", table, re.MULTILINE)
    assert re.search(r"^node2 +192\.0\.2\.12 +10\.244\.2\.0/26 +- +away$", table, re.MULTILINE)
    assert table.splitlines()[-1].startswith("etcd http://192.0.2.100:2379: connected since")
    assert json.loads(dataplane("cluster", "status", "-o", "json", "--socket", path).stdout) == snapshots()["cluster"]


def test_reload_says_what_was_done(path):
    result = dataplane("reload", "--socket", path)
    assert (result.returncode, result.stdout) == (0, "pod added name=default/web-0\nOK: 1 change\n")


def test_a_refused_reload_lists_the_errors_and_exits_with_2(path, node):
    node.result = {"applied": [], "errors": ["node.toml:3: vxlan.vni: expected a number"]}
    result = dataplane("reload", "--socket", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "node.toml:3: vxlan.vni: expected a number\ndataplane: configuration refused; nothing was changed\n"
    )


@pytest.mark.parametrize("command", [("status",), ("show", "drops"), ("reload",)])
def test_no_node_exits_with_3(command, tmp_path):
    result = dataplane(*command, "--socket", tmp_path / "x.sock")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == f"dataplane: no node is running: nobody listens on {tmp_path}/x.sock\n"


def test_a_socket_without_a_listener_is_no_node(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "x.sock"))
    assert dataplane("status", "--socket", tmp_path / "x.sock").returncode == 3


def test_a_socket_that_may_not_be_written_exits_with_5(path):
    path.chmod(0)
    result = dataplane("status", "--socket", path, prefix=POWERLESS)
    assert result.returncode == 5
    assert result.stderr == f"dataplane: {path}: no permission to write to the socket (mode 0660); run as its owner\n"


def test_a_bug_in_the_node_is_one_line_and_exits_with_1(path, node):
    node.failure = KeyError("oops")
    result = dataplane("show", "arp", "--socket", path)
    assert (result.returncode, result.stderr) == (1, "dataplane: KeyError: 'oops'\n")


# --- pipes and signals -----------------------------------------------------------------------------------------------


def test_a_closed_pipe_is_quiet(path, node):
    node.answers["routes"]["routes"] *= 5000
    command = f"{sys.executable} -m dataplane show routes --socket {path} | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert (len(result.stdout.splitlines()), result.stderr) == (1, "")


def test_ctrl_c_is_quiet(tmp_path):
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        # A background job of a shell ignores SIGINT, and so would all that it starts.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "dataplane", "status", "--socket", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = silent.accept()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
            connection.close()
    assert (process.returncode, out, err) == (130, "", "")


def test_a_terminal_gets_a_drawn_table(path):
    command = f"{sys.executable} -m dataplane show counters --socket {path}"
    result = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "\x1b[1mCOUNTER" in result.stdout
    assert "104 = 104: OK" in result.stdout
