"""What of a configuration concerns the process and not its data plane; read at the start only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Engine:
    """How the process runs. ``batch`` is the number of packets per burst."""

    loop: Literal["uvloop", "asyncio"] = "uvloop"
    batch: int = 256


@dataclass(frozen=True, slots=True)
class Log:
    """What is logged and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


@dataclass(frozen=True, slots=True)
class Store:
    """Where the state of the cluster comes from, beside the node's own file.

    Attributes:
        endpoints: etcd's client URLs.
        prefix: Of all keys in etcd.
        lease_ttl: Seconds after which etcd forgets a member that is silent.
        kubeconfig: A file's path; "": the pod's service account.
    """

    source: Literal["static", "etcd", "kubernetes"] = "static"
    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    prefix: str = "/dataplane/v1"
    lease_ttl: float = 10.0
    kubeconfig: str = ""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """How nodes find out that one of them is dead.

    Attributes:
        port: UDP, at the nodes' addresses; 0: there are no heartbeats.
        interval: Seconds between two.
        misses: So many missed in a row, and a node is silent.
        secret: What authenticates them; "": only the source address does.
    """

    port: int = 7946
    interval: float = 0.1
    misses: int = 4
    secret: str = ""
