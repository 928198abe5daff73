"""What a running node says about itself: plain dictionaries that are JSON as they stand.

The node fills them (``Backend.snapshot(kind)``), the control API sends them, ``views`` makes tables of them and
``metrics`` time series. Addresses, prefixes and MACs are text; counters are totals since the start; what does not apply
is "" or 0. A key may be added later, none is taken away.
"""

from typing import Literal, TypeAlias, TypedDict, get_args

Kind: TypeAlias = Literal[
    "status",
    "interfaces",
    "routes",
    "arp",
    "vteps",
    "drops",
    "counters",
    "pipeline",
    "conntrack_stats",
    "balancing",
    "cluster",
    "load_balancer",
    "dns",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

ListKind: TypeAlias = Literal["services", "endpoints", "conntrack", "nat", "persistence"]
LIST_KINDS: tuple[ListKind, ...] = get_args(ListKind)
"""What may have a million rows: answered page by page, and filtered by a ``Query``."""


def endpoint_text(address: str, port: int) -> str:
    """Return ``address:port``, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


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
    kind: Literal["pod", "local", "via", "tunnel", "blackhole", "unreachable", "service"]
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


# --- services and flows ----------------------------------------------------------------------------------------------


class ServiceRow(TypedDict):
    """One virtual service, as in ``ipvsadm -Ln``: an address, a port and a protocol of a Kubernetes service.

    ``kind`` says what the address is: cluster-ip, node-port, external-ip or load-balancer-ip. ``scheduler_flags`` are
    ipvsadm's (sh-port, sh-fallback, mh-port, mh-fallback, ops). ``affinity_s`` is 0 without client affinity,
    ``mask_bits`` how much of a client's address counts for it. ``origin`` is file or api.

    A port of a service that waits for a load balancer's address has a row with address "", and a ``reason``.
    """

    service: str
    port_name: str
    type: str
    kind: str
    address: str
    port: int
    protocol: str
    scheduler: str
    scheduler_flags: list[str]
    affinity_s: int
    mask_bits: int
    ready: int
    total: int
    active: int
    inactive: int
    origin: str
    connections: int
    in_packets: int
    in_bytes: int
    out_packets: int
    out_bytes: int
    reason: str


class EndpointRow(TypedDict):
    """One backend of one virtual service, in the order in which its scheduler sees them: the newest first."""

    service: str
    port_name: str
    kind: str
    protocol: str
    virtual_address: str
    virtual_port: int
    address: str
    port: int
    weight: int
    state: Literal["ready", "draining", "overloaded"]
    node: str
    active: int
    inactive: int
    persistent: int
    connections: int
    in_packets: int
    in_bytes: int
    out_packets: int
    out_bytes: int


class Half(TypedDict):
    """One direction of a flow, as its packets arrive. ICMP: ``sport`` and ``dport`` are 0, and ``icmp`` is set."""

    src: str
    dst: str
    sport: int
    dport: int
    packets: int
    bytes: int


class IcmpQuery(TypedDict):
    """What a flow of ICMP queries is known by, in its two directions."""

    type: int
    code: int
    id: int
    reply_type: int
    reply_id: int


class FlowRow(TypedDict):
    """One tracked flow.

    ``state`` is conntrack's TCP state, "" for other protocols; ``status`` holds SEEN_REPLY, ASSURED, SRC_NAT, DST_NAT,
    MASQUERADED. ``lb_state`` is ip_vs's state, ``lb_timeout_s`` its time: "" and 0 for a flow that it would not list.
    ``backend`` is address:port.
    """

    protocol: str
    protocol_number: int
    family: Literal["ipv4", "ipv6"]
    state: str
    timeout_s: int
    age_s: float
    original: Half
    reply: Half
    icmp: IcmpQuery | None
    status: list[str]
    mark: int
    service: str
    backend: str
    lb_state: str
    lb_timeout_s: int


class Translation(TypedDict):
    """One flow whose addresses or ports are rewritten. ``why`` holds service, masquerade, hairpin, outgoing."""

    protocol: str
    state: str
    timeout_s: int
    src: str
    dst: str
    sport: int
    dport: int
    new_src: str
    new_dst: str
    new_sport: int
    new_dport: int
    why: list[str]
    service: str


class TemplateRow(TypedDict):
    """One persistence template: which backend a client stays with; ``controls`` open connections keep it alive."""

    client: str
    service: str
    port_name: str
    protocol: str
    virtual_address: str
    virtual_port: int
    backend: str
    timeout_s: int
    controls: int


class ConntrackStats(TypedDict):
    """``GET /v1/conntrack_stats``: the flow table's size, and totals by the names of ``conntrack -S``.

    ``out_of_window`` is ours: TCP segments outside the window, dropped or let pass (``tcpBeLiberal``).
    """

    flows: int
    limit: int
    found: int
    invalid: int
    insert: int
    insert_failed: int
    drop: int
    early_drop: int
    error: int
    search_restart: int
    clash_resolve: int
    chaintoolong: int
    out_of_window: int


class ServiceTotals(TypedDict):
    """One port of a service, all its addresses together."""

    service: str
    port_name: str
    protocol: str
    connections: int
    active: int
    inactive: int
    in_packets: int
    in_bytes: int
    out_packets: int
    out_bytes: int


class Balancing(TypedDict):
    """``GET /v1/balancing``: the service tables as a whole.

    ``no_local_endpoints`` counts services by traffic policy (internal, external) that are Local and have no backend on
    this node; ``last_sync`` is when the tables were last brought up to date, seconds since the epoch. ``totals`` are of
    the oldest services only, ``left_off`` is how many virtual services are not in them.
    """

    services: int
    endpoints: int
    templates: int
    templates_limit: int
    templates_refused: int
    no_local_endpoints: dict[str, int]
    last_sync: float
    totals: list[ServiceTotals]
    left_off: int


class ClusterMember(TypedDict):
    """One node of the cluster. ``since`` is seconds since the epoch, 0 when unknown; ``here``: it is the one asked."""

    name: str
    address: str
    blocks: list[str]
    zone: str
    since: float
    alive: bool
    here: bool


class ClusterStatus(TypedDict):
    """``GET /v1/cluster``: where the state of the cluster comes from, and who is in it, by name.

    ``where`` is the address of the store, ``changed`` when ``connected`` last changed, ``error`` why it is not,
    ``revision`` the newest that the node has and ``lag_s`` by how much that may be behind. A static node knows its
    file's peers and has no store: ``connected`` is true and ``revision`` 0.
    """

    source: Literal["static", "etcd", "kubernetes"]
    where: str
    connected: bool
    changed: float
    error: str
    revision: int
    lag_s: float
    nodes: list[ClusterMember]


class PoolRow(TypedDict):
    """A pool of load balancer addresses: how many it can give, how many services have, and how many those are."""

    name: str
    ranges: list[str]
    auto_assign: bool
    addresses: int
    in_use: int
    services: int


class BalancedAddress(TypedDict):
    """A load balancer's address. ``pool`` is "" for one given by hand, ``owner`` the node that announces it or ""."""

    address: str
    pool: str
    services: list[str]
    owner: str


class Pending(TypedDict):
    """A service that waits for an address, and why."""

    service: str
    reason: str


class LoadBalancer(TypedDict):
    """``GET /v1/load_balancer``: pools in the order in which they are tried, addresses by number."""

    pools: list[PoolRow]
    addresses: list[BalancedAddress]
    pending: list[Pending]


class Reload(TypedDict):
    """What an edit (``POST /v1/reload``, ``PUT /v1/services/...``) has done, one line each; or why nothing was."""

    applied: list[str]
    errors: list[str]
