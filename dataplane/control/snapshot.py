"""What a running node says about itself: plain dictionaries that are JSON as they stand.

The node fills them (``Backend.snapshot(kind)``), the control API sends them, ``views`` makes tables of them and
``metrics`` time series. Addresses, prefixes and MACs are text; counters are totals since the start; what does not apply
is "" or 0. A key may be added later, none is taken away.
"""

from typing import Literal, TypeAlias, TypedDict, get_args

Kind: TypeAlias = Literal["status", "interfaces", "routes", "arp", "vteps", "drops", "counters", "pipeline"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Status(TypedDict):
    """The process. ``since`` is seconds since the epoch, ``config`` the file's path or "built-in"."""

    name: str
    version: str
    pid: int
    since: float
    ready: bool
    config: str
    socket: str
    uplink: str
    pods: int
    peers: int
    routes: int


class Interface(TypedDict):
    """One device. ``role`` and ``driver`` are the members' names in lower case, ``error`` is the last errno's text."""

    index: int
    name: str
    role: str
    driver: str
    state: Literal["up", "down"]
    mtu: int
    mac: str
    peer_mac: str
    pod: str
    rx_packets: int
    rx_bytes: int
    rx_errors: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_errors: int
    tx_frames: int
    error: str


class Interfaces(TypedDict):
    """``GET /v1/interfaces``, by index."""

    interfaces: list[Interface]


class Route(TypedDict):
    """One prefix. ``kind`` is ``RouteSpec.kind``, ``origin`` its source's label, ``vtep`` the peer's name."""

    prefix: str
    kind: Literal["pod", "local", "via", "tunnel", "blackhole", "unreachable"]
    dev: str
    via: str
    mtu: int
    vtep: str
    origin: str


class Routes(TypedDict):
    """``GET /v1/routes``, by prefix."""

    routes: list[Route]


class Neighbor(TypedDict):
    """A neighbor on the uplink; ``age_s`` is the time since it was last confirmed."""

    interface: str
    address: str
    mac: str
    state: str
    age_s: float


class Arp(TypedDict):
    """``GET /v1/arp``, by address."""

    arp: list[Neighbor]


class Vtep(TypedDict):
    """A remote node's end of the tunnel."""

    node: str
    address: str
    mac: str
    mtu: int
    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int


class Vteps(TypedDict):
    """``GET /v1/vteps``, by node."""

    vteps: list[Vtep]


class ReasonCount(TypedDict):
    """One ``verdict.Reason``; ``verdict`` is its name in lower case."""

    label: str
    verdict: Literal["accept", "stolen", "queue", "drop"]
    stage: str
    text: str
    count: int


class Drops(TypedDict):
    """``GET /v1/drops``: every reason, also those of other verdicts and those never seen."""

    reasons: list[ReasonCount]


class Counters(TypedDict):
    """``GET /v1/counters``: the conservation of packets, and what became of the queued ones."""

    received: int
    injected: int
    accepted: int
    stolen: int
    queued: int
    dropped: int
    balanced: bool
    queue: dict[str, int]


class Stage(TypedDict):
    """Packets that came to a stage, and those that went no farther."""

    stage: str
    entered: int
    stolen: int
    queued: int
    dropped: int


class Pipeline(TypedDict):
    """``GET /v1/pipeline``, in the order of the stages."""

    pipeline: list[Stage]


class Reload(TypedDict):
    """``POST /v1/reload``: what was done, one line each; or why nothing was."""

    applied: list[str]
    errors: list[str]
