"""``POST /v1/cni``: the plugin's own client against the real server, with containers that say what they are told to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dataplane import cni
from dataplane.cni import DECODING_FAILURE, IO_FAILURE, NOT_SERVED, CniError
from dataplane.control.handlers_cni import cni_routes
from tests.fake_node import FakeNode, serving

ENVIRONMENT = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1"}
CONFIG = {"cniVersion": "1.1.0", "name": "net"}


class Containers:
    """Answers everything the same way, and remembers what it was asked."""

    def __init__(self, answer: dict[str, Any] | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[Mapping[str, str], Any]] = []

    async def serve(self, environment: Mapping[str, str], config: Any) -> dict[str, Any]:
        self.asked.append((environment, config))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def ask(path: Path, containers: Containers | None, message: object) -> dict[str, Any]:
    content = message if isinstance(message, bytes) else json.dumps(message).encode()
    with serving(FakeNode(), path, extensions=[cni_routes(containers)] if containers else []):
        return cni.ask(str(path), content)


def code(path: Path, containers: Containers | None, message: object) -> int:
    with pytest.raises(CniError) as caught:
        ask(path, containers, message)
    return caught.value.code


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node1.sock"


def test_environment_and_configuration_arrive_as_they_are(path):
    containers = Containers({"result": {"ips": []}})
    message = {"env": ENVIRONMENT | {"CNI_ARGS": "A=\udcff"}, "config": CONFIG}
    assert ask(path, containers, message) == {"result": {"ips": []}}
    assert containers.asked == [(message["env"], CONFIG)]


def test_an_error_arrives_with_its_code_and_details(path):
    with pytest.raises(CniError, match="no room") as caught:
        ask(path, Containers(CniError(102, "no room", "256 of 256")), {"env": ENVIRONMENT, "config": CONFIG})
    assert (caught.value.code, caught.value.details) == (102, "256 of 256")


def test_a_bug_is_an_input_or_output_failure_for_the_runtime(path, caplog):
    assert code(path, Containers(KeyError("oops")), {"env": ENVIRONMENT, "config": CONFIG}) == IO_FAILURE
    assert "request failed" in caplog.text


def test_a_node_without_containers_says_so(path):
    assert code(path, None, {"env": ENVIRONMENT, "config": CONFIG}) == NOT_SERVED


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        [],
        {},
        {"env": {}},
        {"env": [], "config": {}},
        {"env": {"A": 1}, "config": 1},
    ],
    ids=lambda message: repr(message)[:20],
)
def test_a_body_that_makes_no_sense_is_a_decoding_failure(path, message):
    containers = Containers({})
    assert code(path, containers, message) == DECODING_FAILURE
    assert containers.asked == []


def test_a_list_of_many_containers_is_taken_whole(path):
    listed = [{"containerID": "f" * 64 + str(number), "ifname": "eth0"} for number in range(20_000)]
    containers = Containers({})
    assert ask(path, containers, {"env": ENVIRONMENT, "config": CONFIG | {cni.ATTACHMENTS: listed}}) == {}
    assert len(containers.asked[0][1][cni.ATTACHMENTS]) == 20_000
