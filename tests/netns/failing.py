"""Three nodes whose owner of an address can fail, and a client that asks for it all the time.

    ext 192.0.2.100 ──┐
    etcd 192.0.2.50 ──┼── br0 ──┬── node1 .11   the owner of ADDRESS, without a pod of the service
                      │         ├── node2 .12 ── web2 10.244.2.10
                      │         └── node3 .13 ── web3 10.244.3.10

`Site.outage` is what a client sees: from a moment, such as that of a ``kill -9``, to the first answer after it that was
asked after it. Nothing tells the client's kernel where the address went but gratuitous ARP: an entry of its neighbor
table is asked about again only after 5 s without an answer.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from itertools import count, pairwise
from pathlib import Path

from dataplane.control import client
from dataplane.control.election import winner
from tests.etcd_server import EtcdServer
from tests.netns.harness import READY_TIMEOUT, Network, Node, Process, eventually
from tests.netns.ours import config, member
from tests.netns.services import BALANCING, EXT, LAN, port, section, serve, service, with_services

STORE = "192.0.2.50"
UDP_PORT = 8081
HEARTBEATS = 7946
INTERVAL = 0.01


class Site:
    """The nodes; ``names[0]`` wins the election for ``address``."""

    def __init__(self, network: Network, *, etcd: Path | None = None, shared: bool = True, lease: int = 10) -> None:
        self.network = network
        self.members = [member(network, number) for number in (1, 2, 3)]
        self.names = [each.name for each in self.members]
        candidates = (IPv4Address("192.0.2.200") + k for k in count())
        self.address = str(next(each for each in candidates if winner(self.names, each) == self.names[0]))
        self.ext = network.namespace("ext")
        self.hosts = [network.namespace(f"host{number}") for number in (1, 2, 3)]
        store = network.namespace("store")
        hosts = [(host, f"{each.address}/24") for host, each in zip(self.hosts, self.members, strict=True)]
        self.switch = network.lan((self.ext, f"{EXT}/24"), (store, f"{STORE}/24"), *hosts)
        self.etcd = EtcdServer(etcd, within=store.command(), host=STORE) if etcd else None
        self.nodes: list[Node] = []
        for number, (host, me) in enumerate(zip(self.hosts, self.members, strict=True), 1):
            if not shared:
                host.ip("address", "flush", "dev", "eth0")
            text = self._file(number, shared, lease)
            self.nodes.append(network.node(host, me.name.removeprefix(network.prefix), text))
        self._asking: Process | None = None

    def _file(self, number: int, shared: bool, lease: int) -> str:
        me = self.members[number - 1]
        peers = [] if self.etcd else [each for each in self.members if each is not me]
        pods = {f"web{number}": f"10.244.{number}.10"} if number > 1 else {}
        text = config(me, pods, peers, heartbeats=HEARTBEATS)
        balanced = service(
            "web", "10.96.0.20", [port(80, protocol="udp")],
            [{"ip": "10.244.2.10", "node": self.names[1]}, {"ip": "10.244.3.10", "node": self.names[2]}],
            loadBalancerIPs=[self.address],
        )  # fmt: skip
        text = with_services(text, balancing=BALANCING, static=[balanced], shared=shared)
        if not shared:
            text += f'[[routes]]\ndst = "{LAN}"\n'
        if self.etcd:
            text = section(text, "state", {"source": "etcd"})
            text = section(text, "state.etcd", {"endpoints": [self.etcd.url], "leaseTTL": f"{lease}s"})
        return text

    # --- nodes -------------------------------------------------------------------------------------------------------

    def start(self) -> "Site":
        """Start everything, and ask until there are answers."""
        if self.etcd:
            self.etcd.start()
        self.nodes[0].start()  # alone: it may have to compile the kernels
        for running in [node.launch() for node in self.nodes[1:]]:
            running.expect(r"\bready\b", READY_TIMEOUT)
        for node in self.nodes:
            eventually(lambda node=node: client.listens(node.socket), READY_TIMEOUT)  # type: ignore[misc]
        for number in (2, 3):
            serve(self.network.pod(f"web{number}"), f"web{number}", f"udp:{UDP_PORT}")
        eventually(lambda: self.is_owner(0), 20)
        return self

    def close(self) -> None:
        """Stop what the network does not."""
        if self.etcd:
            self.etcd.kill()

    def pid(self, index: int) -> int:
        """The process of a node."""
        running = self.nodes[index].process
        assert running is not None
        return running.pid

    def mac(self, index: int) -> str:
        """The MAC of a node's uplink."""
        found = re.search(r"link/ether (\S+)", self.hosts[index].ip("link", "show", "eth0"))
        assert found is not None
        return found[1]

    def back(self, index: int) -> None:
        """Start a node again, and wait until it owns what it should."""
        self.nodes[index].start()
        eventually(lambda: self.is_owner(0), 20)

    # --- the client --------------------------------------------------------------------------------------------------

    def answers(self) -> list[str]:
        """The MACs that answer one request for the address."""
        output = self.ext.run("arping", "-i", "eth0", "-c", 1, "-W", 0.1, self.address, check=False)
        return re.findall(r"bytes from (\S+) ", output)

    def is_owner(self, index: int) -> bool:
        """Whether a node, and no other, answers; what others have asked meanwhile is answered to all."""
        return set(self.answers()) == {self.mac(index)}

    def others_answer(self) -> bool:
        """Whether another node than the first one answers, and that one does not."""
        return bool(found := self.answers()) and self.mac(0) not in found

    def ask(self) -> Process:
        """Ask the service every 10 ms from now on."""
        asking = self.ext.spawn(*self.ext.tool("steady", self.address, 80, INTERVAL))
        asking.expect(r" web[23]$")
        self._asking = asking
        return asking

    def outage(self, fail: Callable[[], object], timeout: float = 15.0) -> float:
        """Have something fail; return the seconds from then to the first answer to a question asked afterwards."""
        assert self._asking is not None
        asking = self._asking
        last = int(asking.lines[-1].split()[1])
        began = time.monotonic()
        fail()
        return eventually(lambda: _first(asking.lines, began, last), timeout) - began

    def gap(self, since: float, until: float) -> float:
        """Return the longest time without an answer, in a span of time, seconds."""
        assert self._asking is not None
        times = [float(line.split()[0]) for line in self._asking.lines[1:]]
        inside = [since, *(at for at in times if since <= at <= until), until]
        return max(later - at for at, later in pairwise(inside))

    def lines(self) -> list[str]:
        """What the asking client has printed."""
        assert self._asking is not None
        return self._asking.lines

    def port(self, index: int) -> str:
        """The switch's port to a node: behind those of the client and of etcd."""
        return f"port{index + 3}"

    def signal(self, index: int, number: signal.Signals) -> None:
        """Send a signal to a node."""
        os.kill(self.pid(index), number)


def _first(lines: list[str], began: float, last: int) -> float:
    """Return when a question was answered that was asked some time after a moment: at most two were under way then."""
    for line in lines[1:]:
        at, number, _ = line.split()
        if float(at) > began and int(number) > last + 2:
            return float(at)
    return 0
