"""``dataplane-cni`` by its documented contract: environment and input in, output and exit status out.

The program is run as a runtime runs it, installed and by itself, against a socket that answers like the node. What
needs no process goes through ``cni.speak``.
"""

import ast
import io
import json
import os
import resource
import socket
import socketserver
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dataplane import cni
from dataplane.cli_cni import cni as command

CONFIG = {"cniVersion": "1.1.0", "name": "dataplane", "type": "dataplane-cni"}
ADD = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c-1", "CNI_NETNS": "/run/netns/c1", "CNI_IFNAME": "eth0"}
RESULT = {"cniVersion": "1.1.0", "ips": [{"address": "10.244.1.7/32"}]}


class Node:
    """A socket that gives one answer to everything, and the requests that it was sent."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self.path, self.answer = path, answer
        self.requests: list[tuple[str, Any]] = []


@contextmanager
def node(path: Path, status: int = 200, body: object = None, raw: bytes | None = None):
    content = json.dumps(body if body is not None else {"result": RESULT}).encode()
    head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    made = Node(path, raw if raw is not None else head.encode() + content)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request, length = self.rfile.readline().decode(), 0
            while line := self.rfile.readline().strip().lower():
                length = int(line.split(b":")[1]) if line.startswith(b"content-length") else length
            made.requests.append((request.rsplit(" ", 1)[0], json.loads(self.rfile.read(length))))
            self.wfile.write(made.answer)

    with socketserver.UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


def speak(environment: dict[str, str], config: object) -> tuple[Any, int]:
    """Return what the program prints, read as JSON ({} for nothing), and its exit status."""
    output = io.StringIO()
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    status = cni.speak(environment, io.BytesIO(content), output)
    return json.loads(output.getvalue() or "{}"), status


def code(environment: dict[str, str], config: object) -> int:
    """Return the code of the error that it prints."""
    answer, status = speak(environment, config)
    assert status == 1
    assert answer.keys() == {"cniVersion", "code", "msg", "details"}
    assert answer["msg"]
    return int(answer["code"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.sock"


@pytest.fixture
def config(path: Path) -> dict[str, Any]:
    return CONFIG | {"socket": str(path)}


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cni")
    done = CliRunner().invoke(command, ["install", "--bin-dir", f"{folder}/bin", "--conf-dir", f"{folder}/net.d"])
    assert done.exit_code == 0, done.output
    return folder


def start(installed: Path, environment: dict[str, str], config: object) -> subprocess.CompletedProcess[bytes]:
    """Run the installed program with nothing else in its environment."""
    content = json.dumps(config).encode()
    program = installed / "bin" / "dataplane-cni"
    return subprocess.run([program], input=content, env=environment, capture_output=True, check=False, timeout=60)


def test_the_installed_program_needs_no_environment(installed, path, config):
    with node(path) as listening:
        done = start(installed, ADD | {"CNI_ARGS": "A=1", "CNI_PATH": "/opt/cni/bin", "HOME": "/nowhere"}, config)
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, RESULT, b"")
    variables = ADD | {"CNI_ARGS": "A=1", "CNI_PATH": "/opt/cni/bin"}
    assert listening.requests == [("POST /v1/cni", {"env": variables, "config": config})]


def test_an_error_is_json_on_stdout_and_status_1(installed, config):
    done = start(installed, ADD, config)
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, b"")
    assert (answer["cniVersion"], answer["code"]) == ("1.1.0", cni.TRY_AGAIN_LATER)
    assert "nobody listens" in answer["msg"]


def test_the_program_imports_nothing_but_a_little_of_the_standard_library():
    modules = set()
    for statement in ast.walk(ast.parse(Path(cni.__file__).read_text())):
        if isinstance(statement, ast.Import):
            modules |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            modules.add(str(statement.module))
    assert modules == {"collections.abc", "json", "os", "re", "socket", "stat", "sys", "typing"}


def test_the_program_starts_in_a_few_times_what_python_takes(installed):
    def seconds(*words: str | Path) -> float:
        """Of the processor: whatever else the machine does takes nothing away from these."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, input=b"", env={"CNI_COMMAND": "VERSION"}, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    program = installed / "bin" / "dataplane-cni"
    interpreter = program.read_text().split()[0].removeprefix("#!")
    pairs = [(seconds(program), seconds(interpreter, "-IS", "-c", "pass")) for _ in range(10)]
    # 19 and 7 ms on an idle machine; with http.client in place of the bytes it is 5 times, with asyncio 12.
    assert min(ours for ours, _ in pairs) < 4.5 * min(bare for _, bare in pairs)


def test_installing_again_replaces_and_uninstalling_removes(tmp_path):
    where = ["--bin-dir", f"{tmp_path}/bin", "--conf-dir", f"{tmp_path}/net.d"]
    for options in ([], ["--socket", "/run/dataplane/n.sock", "--network", "pods"]):
        done = CliRunner().invoke(command, ["install", *where, *options])
        assert done.exit_code == 0, done.output
        assert os.listdir(tmp_path / "net.d") == ["10-dataplane.conflist"]
        assert os.listdir(tmp_path / "bin") == ["dataplane-cni"]
    network = json.loads((tmp_path / "net.d" / "10-dataplane.conflist").read_text())
    assert (network["name"], network["cniVersion"], network["cniVersions"][-1]) == ("pods", "1.0.0", "1.1.0")
    assert network["plugins"][0]["socket"] == "/run/dataplane/n.sock"
    assert network["plugins"][0]["type"] == "dataplane-cni"
    assert stat.S_IMODE((tmp_path / "bin" / "dataplane-cni").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "net.d" / "10-dataplane.conflist").stat().st_mode) == 0o644
    for _ in range(2):
        assert CliRunner().invoke(command, ["uninstall", *where]).exit_code == 0
        assert os.listdir(tmp_path / "net.d") == os.listdir(tmp_path / "bin") == []


def test_a_folder_that_cannot_be_written_is_an_error_with_a_name(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(
        command, ["install", "--bin-dir", f"{tmp_path}/file/bin", "--conf-dir", f"{tmp_path}/net.d"]
    )
    assert done.exit_code == 1
    assert f"{tmp_path}/file/bin/dataplane-cni" in done.output
    assert not (tmp_path / "net.d").exists()


# --- VERSION ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "version"),
    [({"cniVersion": "1.0.0"}, "1.0.0"), ({"cniVersion": "0.4.0"}, "0.4.0"), ({"cniVersion": "9.9.9"}, "1.1.0"),
     (b"", "1.1.0"), (b"[]", "1.1.0"), (b"\xff", "1.1.0")],
)  # fmt: skip
def test_version_answers_in_the_version_that_it_is_asked_in(content, version):
    expected = {"cniVersion": version, "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]}
    assert speak({"CNI_COMMAND": "VERSION"}, content) == (expected, 0)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_only_add_prints_a_result(path, config):
    with node(path, body={}):
        for name in ("DEL", "CHECK", "GC", "STATUS"):
            assert speak(ADD | {"CNI_COMMAND": name}, config) == ({}, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"CNI_COMMAND": ""}, {"CNI_COMMAND": "add"}, {"CNI_COMMAND": "REMOVE"},
        {"CNI_CONTAINERID": ""}, {"CNI_CONTAINERID": "-c"}, {"CNI_CONTAINERID": "a/b"}, {"CNI_CONTAINERID": "c\n"},
        {"CNI_CONTAINERID": "ö"}, {"CNI_IFNAME": ""}, {"CNI_IFNAME": "."}, {"CNI_IFNAME": ".."}, {"CNI_IFNAME": "a b"},
        {"CNI_IFNAME": "a:b"}, {"CNI_IFNAME": "a/b"}, {"CNI_IFNAME": "a" * 16}, {"CNI_IFNAME": "ö" * 8},
        {"CNI_NETNS": ""}, {"CNI_NETNS": "c1"}, {"CNI_ARGS": "A"}, {"CNI_ARGS": "=1"}, {"CNI_ARGS": "A=1;B"},
    ],
    ids=repr,
)  # fmt: skip
def test_a_bad_environment_is_code_4(config, change):
    assert code(ADD | change, config) == cni.INVALID_ENVIRONMENT


@pytest.mark.parametrize("name", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"])
@pytest.mark.parametrize("asked", ["ADD", "DEL", "CHECK"])
def test_each_command_says_which_variable_it_needs(path, config, asked, name):
    environment = {key: value for key, value in ADD.items() if key != name} | {"CNI_COMMAND": asked}
    if (asked, name) == ("DEL", "CNI_NETNS"):
        with node(path, body={}):
            assert speak(environment, config) == ({}, 0)
        return
    answer, _ = speak(environment, config)
    assert (answer["code"], answer["msg"]) == (cni.INVALID_ENVIRONMENT, f"{name}: missing; {asked} needs it")


@pytest.mark.parametrize("name", ["c1", "A", "0", "a_b.c-d", "f" * 200])
def test_ids_of_real_runtimes_pass(path, config, name):
    with node(path) as listening:
        assert speak(ADD | {"CNI_CONTAINERID": name}, config)[1] == 0
    assert listening.requests[0][1]["env"]["CNI_CONTAINERID"] == name


@pytest.mark.parametrize(
    ("version", "asked", "fits"),
    [("0.2.0", "ADD", False), ("0.3.0", "ADD", True), ("0.3.1", "CHECK", False), ("0.4.0", "CHECK", True),
     ("1.0.0", "GC", False), ("1.0.0", "STATUS", False), ("1.1.0", "GC", True), ("1.2.0", "ADD", False),
     (None, "ADD", False), (1, "ADD", False), ("", "DEL", False), ("0.3.1", "DEL", True)],
)  # fmt: skip
def test_a_version_without_the_command_is_code_1(path, config, version, asked, fits):
    given = {key: value for key, value in {**config, "cniVersion": version}.items() if value is not None}
    if fits:
        with node(path, body={}):
            assert speak(ADD | {"CNI_COMMAND": asked}, given) == ({}, 0)
        return
    assert code(ADD | {"CNI_COMMAND": asked}, given) == cni.INCOMPATIBLE_VERSION


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"1", b"[" * 100_000])
def test_input_that_is_no_object_is_code_6(content):
    assert code(ADD, content) == cni.DECODING_FAILURE


@pytest.mark.parametrize(
    "change", [{"name": ""}, {"name": None}, {"name": "a b"}, {"name": "-a"}, {"socket": "node.sock"}, {"socket": 1}]
)
def test_a_bad_network_is_code_7(config, change):
    assert code(ADD, config | change) == cni.INVALID_CONFIG


@pytest.mark.parametrize("change", [{"ipam": {"type": "host-local"}}, {"ipMasq": True}])
def test_a_field_for_something_that_the_node_does_itself_is_code_2_and_named(config, change):
    answer, _ = speak(ADD, config | change)
    [(key, value)] = change.items()
    assert answer["code"] == cni.UNSUPPORTED_FIELD
    assert key in answer["msg"]
    assert json.dumps(value) in answer["msg"]


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(5, "Input/output error")


def test_input_that_cannot_be_read_is_code_5():
    output = io.StringIO()
    assert cni.speak(ADD, Broken(), output) == 1
    assert json.loads(output.getvalue())["code"] == cni.IO_FAILURE


@given(st.dictionaries(st.sampled_from(sorted(ADD | {"CNI_ARGS": ""})), st.text(max_size=20)), st.binary(max_size=60))
def test_whatever_comes_ends_with_a_result_or_an_error_of_the_specification(environment, content):
    answer, status = speak(environment, content)
    assert status == (1 if "code" in answer else 0)
    if "code" in answer:
        assert answer["code"] in range(1, 8)


# --- what the node says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 4, 7, 11, 100, 101, 102, 103])
def test_the_nodes_error_reaches_the_runtime(path, config, number):
    with node(path, status=422, body={"code": number, "msg": "no", "details": "since it is so"}):
        answer, status = speak(ADD, config | {"cniVersion": "1.0.0"})
    assert status == 1
    assert answer == {"cniVersion": "1.0.0", "code": number, "msg": "no", "details": "since it is so"}


@pytest.mark.parametrize(
    ("status", "body", "number"),
    [(404, {"error": "not-found", "message": "no such resource"}, cni.NOT_SERVED),
     (500, {"error": "internal", "message": "KeyError"}, cni.IO_FAILURE),
     (422, {"error": "refused", "message": "the body is not JSON"}, cni.IO_FAILURE)],
)  # fmt: skip
def test_a_node_that_does_not_understand_is_an_error(path, config, status, body, number):
    with node(path, status=status, body=body):
        assert code(ADD, config) == number


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1", b"hello\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\n{", b"\r\n\r\n",
                                 b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 two OK\r\n\r\n{}"])  # fmt: skip
def test_an_answer_that_breaks_off_is_code_5(path, config, raw):
    with node(path, raw=raw):
        assert code(ADD, config) == cni.IO_FAILURE


def test_a_node_that_does_not_run_is_code_11_and_for_status_51(path, config):
    for name in ("ADD", "DEL", "CHECK", "GC"):
        assert code(ADD | {"CNI_COMMAND": name}, config) == cni.TRY_AGAIN_LATER
    assert code({"CNI_COMMAND": "STATUS"}, config) == cni.LIMITED_CONNECTIVITY
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert code(ADD, config) == cni.TRY_AGAIN_LATER
    assert code({"CNI_COMMAND": "STATUS"}, config) == cni.LIMITED_CONNECTIVITY


@pytest.mark.parametrize(
    ("status", "body", "number"),
    [(404, {"message": "no such resource"}, 50), (422, {"code": 50, "msg": "no blocks", "details": ""}, 50),
     (422, {"code": 51, "msg": "half dead", "details": ""}, 51), (500, {"message": "KeyError"}, 50)],
)  # fmt: skip
def test_a_node_that_cannot_add_now_is_50_for_status(path, config, status, body, number):
    with node(path, status=status, body=body):
        assert code({"CNI_COMMAND": "STATUS"}, config) == number


def test_a_node_that_does_not_answer_is_code_11(path, config, monkeypatch):
    monkeypatch.setattr(cni, "TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        assert code(ADD, config) == cni.TRY_AGAIN_LATER


# --- which node ------------------------------------------------------------------------------------------------------


def test_without_a_socket_in_the_configuration_the_only_node_is_asked(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(cni.find_socket, "__defaults__", (str(run),))
    assert code(ADD, CONFIG) == cni.TRY_AGAIN_LATER
    run.mkdir()
    assert code({"CNI_COMMAND": "STATUS"}, CONFIG) == cni.LIMITED_CONNECTIVITY
    (run / "node1.journal").write_text("")
    (run / "dangling.sock").symlink_to(run / "nothing")
    (run / "loop.sock").symlink_to(run / "loop.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run / "dead.sock"))
    with node(run / "b.sock"):
        assert speak(ADD, CONFIG) == (RESULT, 0)
        with node(run / "c.sock"):
            assert code(ADD, CONFIG) == cni.INVALID_CONFIG


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, cni.__file__], input=b"{}", env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["cniVersion"] == "1.1.0"
