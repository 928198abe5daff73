"""The journal of a node: what a killed one left is undone by the next, and what is somebody else's is left alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.devices import journal as journals
from dataplane.devices.journal import (
    AlreadyRunningError,
    File,
    Interface,
    Journal,
    Namespace,
    Process,
    Sysctl,
    claim,
    process,
    recover,
)
from dataplane.devices.namespace import DIRECTORY, delete_namespace, open_namespace

pytestmark = pytest.mark.netns

NETNS = DIRECTORY / f"dpj{os.getpid()}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "node1.journal"


@pytest.fixture
def netns():
    yield NETNS
    delete_namespace(NETNS)


def make_namespace() -> int:
    handle = open_namespace(NETNS.name)
    os.close(handle.fd)
    return handle.cookie


def abandon(journal: Journal) -> None:
    """Leave the journal as a process that was killed leaves it: of an owner that does not exist any more."""
    lines = journal.path.read_text().splitlines()
    owner = json.loads(lines[0])
    lines[0] = json.dumps(owner | {"started": owner["started"] - 1})  # as if the process id had been used again since
    journal.close()
    journal.path.write_text("".join(line + "\n" for line in lines))


def test_without_a_journal_there_is_nothing_to_recover(path):
    assert recover(path) == []
    assert not path.exists()


def test_a_clean_exit_removes_the_journal(path):
    journal, report = claim(path)
    assert path.exists()
    assert report == []
    journal.close()
    journal.close()
    assert not path.exists()


def test_a_living_owner_is_named(path):
    journal, _ = claim(path)
    for attempt in (recover, claim):
        with pytest.raises(AlreadyRunningError, match=str(path)) as caught:
            attempt(path)
        assert caught.value.pid == os.getpid()
    journal.close()


def test_a_process_with_the_owners_id_but_another_start_is_not_the_owner(path):
    journal, _ = claim(path)
    abandon(journal)
    assert recover(path) == []
    assert not path.exists()


def test_an_owner_of_an_earlier_boot_is_dead():
    me = process(os.getpid())
    assert me is not None
    assert me.alive
    assert not Process(me.pid, me.started, "another boot").alive


def test_a_zombie_is_dead():
    child = subprocess.Popen(["sleep", "60"])
    running = process(child.pid)
    assert running is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not running.alive
    child.wait()
    assert process(child.pid) is None


def test_everything_is_undone_newest_first(path, netns, tmp_path):
    socket = tmp_path / "node1.sock"
    journal, _ = claim(path)
    entry = journal.record(Namespace(str(netns)))
    journal.made(entry, make_namespace())
    subprocess.run(["ip", "-n", netns.name, "tuntap", "add", "eth0", "mode", "tap"], check=True)
    journal.record(Interface("eth0", str(netns)))
    journal.record(File(str(socket)))
    socket.touch()
    abandon(journal)
    assert recover(path) == [
        f"file {socket} removed",
        f"interface eth0 removed from {netns}",
        f"namespace {netns} removed",
    ]
    assert not any(file.exists() for file in (path, netns, socket))
    assert recover(path) == []


def test_what_was_announced_but_never_made_is_no_matter(path, netns, tmp_path):
    journal, _ = claim(path)
    journal.record(Namespace(str(netns)))
    journal.record(Interface("eth0", str(netns)))
    journal.record(File(str(tmp_path / "node1.sock")))
    abandon(journal)
    assert recover(path) == []
    assert not path.exists()


def test_what_was_removed_in_time_is_not_removed_again(path, tmp_path):
    socket = tmp_path / "node1.sock"
    journal, _ = claim(path)
    journal.removed(journal.record(File(str(socket))))
    abandon(journal)
    socket.touch()
    assert recover(path) == []
    assert socket.exists()


def test_a_namespace_that_took_the_name_since_is_left_alone(path, netns):
    journal, _ = claim(path)
    journal.made(journal.record(Namespace(str(netns))), make_namespace())
    delete_namespace(netns)
    make_namespace()
    abandon(journal)
    assert recover(path) == [f"namespace {netns} was left alone: it is not the one that was made"]
    assert netns.exists()


def test_a_name_without_its_namespace_is_removed(path, netns):
    DIRECTORY.mkdir(exist_ok=True)
    journal, _ = claim(path)
    journal.record(Namespace(str(netns)))
    netns.touch()  # killed between making the file and mounting the namespace on it
    abandon(journal)
    assert recover(path) == [f"namespace {netns} removed"]
    assert not netns.exists()


@pytest.fixture
def sysctl(tmp_path, monkeypatch):
    """A setting in a directory that stands for /proc/sys: the machine's own stay as they are."""
    monkeypatch.setattr(journals, "SYSCTL", tmp_path)
    (tmp_path / "kernel/random").mkdir(parents=True)
    (tmp_path / "kernel/random/boot_id").write_text("boot\n")
    setting = tmp_path / "ip_forward"
    setting.write_text("0\n")
    return setting


@pytest.mark.parametrize(("now", "then"), [("1\n", "0"), ("2\n", "2\n")])
def test_a_sysctl_is_put_back_unless_somebody_else_has_changed_it(path, sysctl, now, then):
    journal, _ = claim(path)
    change = Sysctl.to("ip_forward", "1")
    journal.record(change)
    change.apply()
    assert sysctl.read_text() == "1"
    sysctl.write_text(now)
    abandon(journal)
    recover(path)
    assert sysctl.read_text() == then


def test_what_cannot_be_undone_stays_in_the_journal(path, tmp_path):
    stuck, easy = tmp_path / "directory", tmp_path / "node1.sock"
    stuck.mkdir()  # unlink refuses a directory
    easy.touch()
    journal, _ = claim(path)
    journal.record(File(str(stuck)))
    journal.record(File(str(easy)))
    abandon(journal)
    assert [line.split(":")[0] for line in recover(path)] == [
        f"file {easy} removed",
        f"could not undo File(path='{stuck}')",
    ]
    heir, report = claim(path)
    assert len(report) == 1
    abandon(heir)
    stuck.rmdir()
    stuck.touch()
    assert recover(path) == [f"file {stuck} removed"]
    assert not path.exists()


def test_a_line_that_was_cut_short_is_skipped(path, tmp_path):
    socket = tmp_path / "node1.sock"
    socket.touch()
    journal, _ = claim(path)
    journal.record(File(str(socket)))
    journal.record(File(str(tmp_path / "other.sock")))
    abandon(journal)
    path.write_bytes(path.read_bytes()[:-9])
    assert recover(path) == ["line 3 is unreadable", f"file {socket} removed"]


@given(data=st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789adeimnoprvwk', max_size=80).map(str.encode))
def test_a_garbage_journal_is_reported_and_removed(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "garbage.journal"
    path.write_bytes(data)
    recover(path)
    assert not path.exists()


WORDS = ["id", "kind", "made", "removed", "owner", "started", "boot", "path", "cookie"]
VALUES = (
    st.none()
    | st.integers(-2, 9)
    | st.sampled_from(["namespace", "interface", "file", "sysctl", ""])
    | st.lists(st.none())
)


@given(st.lists(st.dictionaries(st.sampled_from(WORDS), VALUES), max_size=6))
def test_lines_of_the_wrong_shape_are_read_without_an_error(lines):
    _, things, _ = journals._read(b"\n".join(json.dumps(line).encode() for line in lines))
    assert all(isinstance(getattr(thing, "path", ""), str) for thing in things)


CHILD = """
import os, sys, time
from pathlib import Path
from dataplane.devices.journal import Namespace, claim
from dataplane.devices.namespace import open_namespace
journal, _ = claim(Path(sys.argv[1]))
entry = journal.record(Namespace(sys.argv[2]))
handle = open_namespace(Path(sys.argv[2]).name)
if sys.argv[3] == "after":
    journal.made(entry, handle.cookie)
print("made", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("killed", ["before", "after"])
def test_a_namespace_of_a_killed_process_is_removed_by_the_next(path, netns, killed):
    arguments = [sys.executable, "-c", CHILD, str(path), str(netns), killed]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "made\n"
        with pytest.raises(AlreadyRunningError) as caught:
            claim(path)
        assert caught.value.pid == child.pid
        child.send_signal(signal.SIGKILL)
    journal, report = claim(path)
    assert report == [f"namespace {netns} removed"]
    assert not netns.exists()
    journal.close()


RIVAL = """
import sys, time
from pathlib import Path
from dataplane.devices.journal import AlreadyRunningError, claim
sys.stdin.readline()
try:
    journal, _ = claim(Path(sys.argv[1]))
except AlreadyRunningError as error:
    print("refused", flush=True)
else:
    print("owner", flush=True)
    sys.stdin.readline()
    journal.close()
"""


def test_of_nodes_that_start_at_once_one_becomes_the_owner(path):
    arguments, pipe = [sys.executable, "-c", RIVAL, str(path)], subprocess.PIPE
    rivals = [subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    try:
        for rival in rivals:
            print("go", file=rival.stdin, flush=True)
        assert sorted(rival.stdout.readline().strip() for rival in rivals if rival.stdout) == [
            "owner",
            "refused",
            "refused",
            "refused",
        ]
    finally:
        for rival in rivals:
            rival.communicate("stop\n")
    assert not Path(path).exists()


def test_a_journal_that_was_handed_over_is_read_by_anybody_and_recovered_when_its_owner_has_ended(path, netns):
    assert journals.contents(path) == (None, [])
    thing = File(str(path.with_name("socket")))
    journal, _ = claim(path)
    journal.record(thing)
    journal.hand_over()
    assert journals.contents(path) == (process(os.getpid()), [thing])
    with pytest.raises(AlreadyRunningError):
        recover(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"started": 1}), *lines[1:]]) + "\n")
    Path(thing.path).touch()
    assert recover(path) == [f"file {thing.path} removed"]
    assert not path.exists()
