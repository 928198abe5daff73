"""[cluster] in node.toml: how nodes hear from each other."""

import pytest

from dataplane.config import parse
from dataplane.control.process import Heartbeat
from dataplane.control.reconcile import process_keys
from tests.node_file import NODE, errors

SECTION = """
[cluster]
heartbeatPort = 7000
heartbeatInterval = "50ms"
heartbeatMisses = 6
secret = "s"
"""


def test_every_key_is_read():
    assert parse(NODE + SECTION, "F").heartbeat == Heartbeat(7000, 0.05, 6, "s")


def test_without_the_section_nodes_hear_from_each_other_at_memberlists_port():
    assert parse(NODE, "F").heartbeat == Heartbeat(7946, 0.1, 4, "")


def test_a_change_needs_a_restart():
    before, after = parse(NODE, "F"), parse(NODE + SECTION, "F")
    assert process_keys(before, after) == ("cluster",)


WRONG = [
    (
        "heartbeatPort = 65536",
        "cluster.heartbeatPort: expected a number from 0 to 65535 (0: no heartbeats) (got 65536)",
    ),
    ("heartbeatPort = 4789", "cluster.heartbeatPort: is also vxlan.port (got 4789)"),
    (
        "heartbeatPort = 61000",
        "cluster.heartbeatPort: is a port that pods are masqueraded with: 61000-65535 (got 61000)",
    ),
    ('heartbeatInterval = "1ms"', "cluster.heartbeatInterval: expected 20ms to 10s (got 0.001s)"),
    ('heartbeatInterval = "11s"', "cluster.heartbeatInterval: expected 20ms to 10s (got 11s)"),
    ("heartbeatMisses = 1", "cluster.heartbeatMisses: expected a number from 2 to 1000 (got 1)"),
]


@pytest.mark.parametrize(("line", "error"), WRONG, ids=[line for line, _ in WRONG])
def test_what_cannot_work_is_refused(line, error):
    found = errors(f"{NODE}\n[cluster]\n{line}\n")
    assert [text.partition(": ")[2] for text in found] == [error]


def test_a_port_of_zero_is_no_port():
    assert parse(f"{NODE}\n[cluster]\nheartbeatPort = 0\n", "F").heartbeat.port == 0
