"""What a lab is made of, as plain values: everything that ``up`` has worked out before it makes anything.

Everything has a short name in the lab (``node2``, ``web-0``, ``client``, ``lan``); its network namespace, and a node's
own name, are that with the lab's name before it (``lab-node2``), so that two labs never meet. The plan lies in the
lab's folder while it is up, where the other commands find it: they need not read the file, nor its models.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RUN = Path("/run/dataplane/lab")
CLIENT, LAN = "client", "lan"
ETCD_PORT = 2379


@dataclass(frozen=True, slots=True)
class LabNode:
    """A node: its short name, its address on the LAN, its block, and its file."""

    name: str
    address: str
    block: str
    text: str


@dataclass(frozen=True, slots=True)
class LabPod:
    """A pod: its short name, and the node's; ``serve`` is the port of its HTTP server, 0 without one."""

    name: str
    namespace: str
    node: str
    address: str
    serve: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A lab.

    Attributes:
        state: "static" or "etcd".
        lan: The LAN's prefix; ``client`` and ``switch`` are addresses in it.
        services: With the keys of ``[[services.static]]``.
        pools: With the keys of ``[[loadBalancer.ipAddressPools]]``.
        advertisements: With those of ``[[loadBalancer.l2Advertisements]]``.
        dns: The address that pods ask; "" without cluster DNS.
        domain: Of cluster DNS.
    """

    name: str
    state: str
    lan: str
    mtu: int
    client: str
    switch: str
    nodes: tuple[LabNode, ...]
    pods: tuple[LabPod, ...]
    services: tuple[Mapping[str, Any], ...]
    pools: tuple[Mapping[str, Any], ...]
    advertisements: tuple[Mapping[str, Any], ...]
    dns: str
    domain: str

    @property
    def folder(self) -> Path:
        """Where its files are while it runs."""
        return RUN / self.name

    def netns(self, short: str) -> str:
        """Return the namespace of what has this short name."""
        return f"{self.name}-{short}"

    def socket(self, node: str) -> Path:
        """Return the control socket of a node."""
        return self.folder / f"{node}.sock"

    def log(self, short: str) -> Path:
        """Return the log of a node, of a pod's server, or of etcd."""
        return self.folder / f"{short}.log"

    @property
    def places(self) -> tuple[str, ...]:
        """The short names of everything that has a namespace."""
        return (*(node.name for node in self.nodes), *(pod.name for pod in self.pods), CLIENT, LAN)

    @property
    def service_names(self) -> frozenset[str]:
        """The services of the file, as ``namespace/name``."""
        return frozenset(f"{each.get('namespace', 'default')}/{each['name']}" for each in self.services)

    def to_json(self) -> str:
        """Return the plan as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that a text holds.

        Raises:
            ValueError: It holds none.
        """
        try:
            found = json.loads(text)
            nodes = tuple(LabNode(**node) for node in found.pop("nodes"))
            pods = tuple(LabPod(**pod) for pod in found.pop("pods"))
            found |= {key: tuple(found[key]) for key in ("services", "pools", "advertisements")}
            return cls(**found | {"nodes": nodes, "pods": pods})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no plan of a lab: {error!r}") from None
