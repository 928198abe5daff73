"""Containers of real runtimes: podman with its CNI backend, and containerd through ctr.

They run a busybox of their own root file system, keep their state in a folder of the test, and leave nothing.

┌── container ──────┐  ┌── pod web ────────┐   10.96.0.20:80 = web.default.svc.cluster.local -> 10.244.1.5:8080
│ eth0 10.244.1.x   │  │ eth0 10.244.1.5   │   10.96.0.10:53: the node's DNS
└──────┬────────────┘  └──────┬────────────┘
       └────── dataplane ─────┘
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.netns.containers import CIDR, DNS, GATEWAY, SERVICE, WEB, Runtime, container_node
from tests.netns.harness import RUN, Network, Node, Process, eventually, run

pytestmark = pytest.mark.netns

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "ip", "ping", "wget", "sleep", "nslookup", "cat")
CGROUPS = Path("/sys/fs/cgroup")
NAME = "web.default.svc.cluster.local"
# What a container does: its address, the gateway, another pod, a service by address and by name.
SCRIPT = f"""
ip -o -4 address show eth0
ip route
ping -c 2 -W 2 {GATEWAY} >/dev/null && echo gateway answers
ping -c 2 -W 2 {WEB} >/dev/null && echo pod answers
wget -q -O - http://{SERVICE}/ && wget -q -O - http://{NAME}/ && wget -q -O - http://web/
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(scope="module")
def node(network: Network) -> Node:
    """A node whose pod answers every request with "hello"."""
    made = container_node(network).start()
    web = network.pod("web")
    page = network.directory / "index.html"
    page.write_text("hello\n")
    web.spawn("python3", "-m", "http.server", "8080", "--directory", network.directory)
    eventually(lambda: ":8080 " in web.run("ss", "-ltn"))
    return made


@pytest.fixture(scope="module")
def runtime(node: Node, directory: Path) -> Runtime:
    return Runtime(node, directory / "cni")


@pytest.fixture(scope="module")
def root(directory: Path) -> Path:
    """The container's root file system: busybox, and links to it."""
    made = directory / "rootfs"
    for folder in ("bin", "proc", "sys", "dev", "etc", "run", "tmp"):
        (made / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, made / "bin" / "busybox")
    for applet in APPLETS:
        (made / "bin" / applet).symlink_to("busybox")
    return made


@contextmanager
def present(*paths: str) -> Iterator[None]:
    """Have these folders for the length of a ``with``: those that were not there go again, if they are empty."""
    missing = [path for text in paths for path in reversed([Path(text), *Path(text).parents]) if not path.exists()]
    for path in missing:
        path.mkdir(exist_ok=True)
    try:
        yield
    finally:
        for path in reversed(missing):
            with suppress(FileNotFoundError):
                path.rmdir()


def pods(node: Node) -> list[str]:
    found = (each["pod"] for each in node.show("interfaces")["interfaces"] if each["role"] == "pod")
    return sorted(pod for pod in found if pod != "default/web")


def left(node: Node) -> list[str]:
    """Return what a container could have left: its pod, its books, its namespace."""
    books = [path.name for path in RUN.glob(f"{node.name}*") if path not in (node.socket, node.journal)]
    return pods(node) + books


def assert_connected(output: str) -> str:
    """The container has seen what it should; return its address."""
    address = re.search(rf"inet ({re.escape(CIDR)}\d+)/32", output)
    assert address, output
    assert f"default via {GATEWAY} dev eth0" in output
    assert "gateway answers" in output, output
    assert "pod answers" in output, output
    assert output.splitlines()[-3:] == ["hello"] * 3, output
    return address[1]


# --- podman ----------------------------------------------------------------------------------------------------------

# With the second version of cgroups crun can do without any; beside the first one only runc runs at all.
UNIFIED = (CGROUPS / "cgroup.controllers").exists()
PODMAN = """
[containers]
cgroups = "{cgroups}"
netns = "bridge"
log_driver = "k8s-file"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[network]
network_backend = "cni"
cni_plugin_dirs = ["{bin}"]
network_config_dir = "{conf}"
default_network = "dataplane"
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
lock_type = "file"
events_logger = "none"
static_dir = "{state}/static"
tmp_dir = "{state}/tmp"
volume_path = "{state}/volumes"
"""


class Podman:
    """podman with its state in a folder, and its containers' cgroups under a name of the test."""

    def __init__(self, runtime: Runtime, state: Path, name: str) -> None:
        state.mkdir()
        words = {"cgroups": "disabled", "runtime": "crun"} if UNIFIED else {"cgroups": "enabled", "runtime": "runc"}
        words |= {"bin": str(runtime.bin_dir), "conf": str(runtime.conf_dir), "state": str(state)}
        (state / "containers.conf").write_text(PODMAN.format(**words))
        storage = f'[storage]\ndriver = "vfs"\ngraphroot = "{state}/graph"\nrunroot = "{state}/run"\n'
        (state / "storage.conf").write_text(storage)
        self.environment = {
            "CONTAINERS_CONF": str(state / "containers.conf"), "CONTAINERS_STORAGE_CONF": str(state / "storage.conf"),
        }  # fmt: skip
        self.cgroup = name
        self._containers: list[str] = []

    def __call__(self, *arguments: str | Path) -> str:
        words = [f"{key}={value}" for key, value in self.environment.items()]
        return run(["env", *words, "podman", *map(str, arguments)], timeout=120)

    def start(self, name: str, *arguments: str | Path) -> None:
        """Run a container in the background."""
        self._containers.append(name)
        parent = () if UNIFIED else ("--cgroup-parent", f"/{self.cgroup}")
        self("run", "-d", "--name", name, *parent, *arguments)

    def close(self) -> None:
        """Remove all containers, and the cgroups."""
        for name in self._containers:
            self("rm", "--force", "--ignore", "--time", "0", name)
        for top in (CGROUPS, *CGROUPS.glob("*")):
            for folder, _, _ in os.walk(top / self.cgroup, topdown=False):
                os.rmdir(folder)


@pytest.fixture
def podman(network: Network, runtime: Runtime, tmp_path):
    with present("/run/runc", "/run/crun", "/var/lib/cni/results"):
        made = Podman(runtime, tmp_path / "podman", network.prefix + "podman")
        try:
            yield made
        finally:
            made.close()


def test_podmans_containers(network, node, podman, root):
    podman.start("first", "--rootfs", root, "sleep", "600")
    podman.start("second", "--rootfs", root, "sleep", "600")
    assert pods(node) == ["default/first", "default/second"]
    first = assert_connected(podman("exec", "first", "sh", "-c", SCRIPT))
    shown = json.loads(podman("inspect", "second"))[0]["NetworkSettings"]["Networks"]["dataplane"]
    assert shown["Gateway"] == GATEWAY
    assert f"nameserver {DNS}" in podman("exec", "first", "cat", "/etc/resolv.conf")
    assert "2 packets received" in podman("exec", "first", "ping", "-c", "2", "-W", "2", shown["IPAddress"])
    assert "2 packets received" in podman("exec", "second", "ping", "-c", "2", "-W", "2", first)
    podman("restart", "--time", "0", "first")
    assert_connected(podman("exec", "first", "sh", "-c", SCRIPT))
    podman("rm", "--force", "--time", "0", "first")
    assert pods(node) == ["default/second"]
    podman("rm", "--force", "--time", "0", "second")
    assert left(node) == []


def test_podmans_containers_have_the_address_that_is_asked_for(node, podman, root):
    podman.start(
        "fixed",
        "--network",
        "dataplane",
        "--ip",
        "10.244.1.99",
        "--mac-address",
        "02:00:00:00:09:09",
        "--rootfs",
        root,
        "sleep",
        "600",
    )
    assert assert_connected(podman("exec", "fixed", "sh", "-c", SCRIPT)) == "10.244.1.99"
    assert "02:00:00:00:09:09" in podman("exec", "fixed", "ip", "link", "show", "eth0")
    podman("rm", "--force", "--time", "0", "fixed")
    assert left(node) == []


# --- containerd ------------------------------------------------------------------------------------------------------

CONTAINERD = """
version = 2
root = "{state}/root"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "/run/containerd/containerd.sock"
"""


@pytest.fixture
def ctr(network: Network, runtime: Runtime, directory: Path):
    """The command line of a containerd that finds our plugin and network where it looks: its paths are fixed."""
    state = directory / "containerd"
    for folder in ("run/dataplane", "run/containerd", "cache"):
        (state / folder).mkdir(parents=True)
    (state / "config.toml").write_text(CONTAINERD.format(state=state))
    views = {
        runtime.conf_dir: "/etc/cni/net.d", runtime.bin_dir: "/opt/cni/bin", state / "cache": "/var/lib/cni",
        RUN: state / "run/dataplane", state / "run": "/run",
    }  # fmt: skip
    mounts = [f"{source}:{target}" for source, target in views.items()]
    program = ["containerd", "--config", str(state / "config.toml"), "--log-level", "warn"]
    with present("/etc/cni/net.d", "/opt/cni/bin", "/var/lib/cni"):
        shelter = Path(__file__).parent / "tools" / "shelter.py"
        daemon = network.own(Process(["python3", str(shelter), *mounts, "--", *program]))
        enter = ["nsenter", "--mount", "--target", str(daemon.pid), "--", "ctr"]
        try:
            eventually((state / "run/containerd/containerd.sock").is_socket, timeout=30)  # ctr would wait for 10 s
            eventually(lambda: _succeeds([*enter, "version"]), timeout=30)
            yield lambda *arguments: run([*enter, *map(str, arguments)], timeout=120)
        finally:
            daemon.stop()


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_containerds_containers(node, ctr, root):
    search = "search default.svc.cluster.local svc.cluster.local cluster.local"
    (root / "etc" / "resolv.conf").write_text(f"nameserver {DNS}\n{search}\noptions ndots:5\n")
    options = ("--cni", "--cgroup", "", "--env", "PATH=/bin", "--rm", "--rootfs")
    output = ctr("run", *options, root, "one", "sh", "-c", SCRIPT)
    address = assert_connected(output)
    assert left(node) == []
    again = assert_connected(ctr("run", *options, root, "one", "sh", "-c", SCRIPT))
    assert again != address  # it went to the end of the queue
    assert left(node) == []
