"""A node that serves container runtimes, and the plugin as a runtime calls it: environment, input, output, status."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.netns.harness import Namespace, Network, Node

CONFIG = """
apiVersion = "dataplane/v1"
kind = "Node"
[node]
name = "{name}"
hostInterface = "dp0"
[pods]
cidr = ["10.244.1.0/24"]
mtu = 1450
[[pods.static]]
name = "web"
netns = "{{prefix}}web"
ip = ["10.244.1.5"]
[services]
clusterCIDR = ["10.244.0.0/16"]
serviceCIDR = ["10.96.0.0/16"]
[[services.static]]
name = "web"
clusterIPs = ["10.96.0.20"]
ports = [{{ port = 80, targetPort = 8080 }}]
endpoints = [{{ ip = "10.244.1.5" }}]
[dns]
clusterIP = "10.96.0.10"
[api]
cni = true
"""
WEB, SERVICE, DNS = "10.244.1.5", "10.96.0.20", "10.96.0.10"
GATEWAY, CIDR = "169.254.1.1", "10.244.1."


class PluginError(Exception):
    """The plugin's own words; ``code`` is the specification's."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(f"{answer['code']}: {answer['msg']} ({answer['details']})")
        self.code = answer["code"]


class Runtime:
    """What a container runtime does with an installed plugin.

    Attributes:
        bin_dir: Where the plugin is installed.
        conf_dir: And the network.
    """

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.bin_dir, self.conf_dir = directory / "bin", directory / "net.d"
        where = ("--bin-dir", str(self.bin_dir), "--conf-dir", str(self.conf_dir))
        node.cli("cni", "install", *where, "--socket", str(node.socket))
        self.network = json.loads((self.conf_dir / "10-dataplane.conflist").read_text())

    def call(self, command: str, container: str = "", netns: str | Path = "", args: str = "", **keys: Any) -> Any:
        """Run the plugin; return its result, or raise what it says."""
        ifname = keys.pop("ifname", "eth0" if container else "")
        plugin = {"cniVersion": "1.1.0", "name": self.network["name"], **self.network["plugins"][0], **keys}
        environment = {
            "PATH": os.environ["PATH"], "CNI_PATH": str(self.bin_dir), "CNI_COMMAND": command,
            "CNI_CONTAINERID": container, "CNI_NETNS": str(netns), "CNI_IFNAME": ifname, "CNI_ARGS": args,
        }  # fmt: skip
        done = subprocess.run(
            [self.bin_dir / "dataplane-cni"], input=json.dumps(plugin), env=environment, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.stderr == "", done.stderr
        answer = json.loads(done.stdout) if done.stdout else {}
        if done.returncode:
            raise PluginError(answer)
        return answer

    def add(self, container: Namespace, name: str = "", **keys: Any) -> Any:
        """Connect the container whose namespace this is; return the result."""
        return self.call("ADD", name or container.name, container.path, **keys)

    def collect(self, *kept: Namespace, **keys: Any) -> None:
        """Let everything go but these containers."""
        listed = [{"containerID": container.name, "ifname": "eth0"} for container in kept]
        given: dict[str, Any] = {"cni.dev/valid-attachments": listed, **keys}
        assert self.call("GC", **given) == {}

    def delete(self, container: Namespace, name: str = "", **keys: Any) -> None:
        """Disconnect it."""
        self.call("DEL", name or container.name, container.path, **keys)


def container_node(network: Network, name: str = "node1") -> Node:
    """Return a node without uplink that serves runtimes, in a namespace of its own, not started."""
    host = network.namespace("host")
    return network.node(host, name, CONFIG.format(name=network.prefix + name))


def address_of(result: Mapping[str, Any]) -> str:
    """Return the address in a result."""
    address: str = result["ips"][0]["address"]
    assert address.endswith("/32")
    return address.removesuffix("/32")
