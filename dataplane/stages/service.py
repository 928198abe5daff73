"""service: which backend a new flow goes to, and what its service counts while it lasts (B5, B6, B8, B9).

``conntrack`` calls these kernels, once for a new flow and then once a packet. The choice is ip_vs's; who may come and
whose source address will be replaced is kube-proxy's. The mark (KUBE-MARK-MASQ, 0x4000) is decided on the tuple as the
client sent it.

A flow's backend is *counted* as ip_vs counts it: by ip_vs's own state machine and timeouts, which are not conntrack's.
An established connection is forgotten by ip_vs after 15 idle minutes and by conntrack after a day. The counters follow
ip_vs, since the schedulers must; the flow lives on, and its next packet counts it again.
"""

from typing import Any

from dataplane.batch import FLOWS, MASQUERADE_ALL, POLICIES, SERVICES, SETTINGS, TEMPLATES, TIMEOUTS
from dataplane.codecs import ethernet
from dataplane.jit import kernel
from dataplane.stages import tcp
from dataplane.tables import backend, persistence, policy, scheduler
from dataplane.tables import service as virtual
from dataplane.tables.flow import ACTIVE, COUNTED, ORIGINAL, LbState, Timeout
from dataplane.tables.policy import Exposure, Pool
from dataplane.tables.scheduler import PERSISTENT
from dataplane.verdict import Reason

NONE = -1
MARK = 0x4000  # KUBE-MARK-MASQ

_TCP = 6
_UDP = 17


@kernel
def find(packet: Any, tables: Any) -> int:
    """Return the row of the service that a packet is addressed to, or -1."""
    protocol = int(packet["protocol"])
    if protocol != _TCP and protocol != _UDP:
        return NONE
    return virtual.find(tables[SERVICES], protocol, packet["dst_hi"], packet["dst_lo"], int(packet["dport"]))


@kernel
def admit(packet: Any, tables: Any, row: int) -> int:
    """Return why a client may not use the service in ``row``, or ``ACCEPTED``."""
    policies = tables[POLICIES]
    if not policy.is_allowed(policies, row, packet["src_hi"], packet["src_lo"]):
        return Reason.SVC_SOURCE_RANGE
    if int(policies[0][row]["flags"]) & policy.NO_LOCAL:
        return Reason.SVC_NO_LOCAL_ENDPOINTS
    return Reason.ACCEPTED


@kernel
def is_marked(packet: Any, tables: Any, row: int) -> bool:
    """Say whether the source of a new flow to the service in ``row`` is to be masqueraded (KUBE-SERVICES, B6)."""
    policies = tables[POLICIES]
    record = policies[0][row]
    exposure = int(record["exposure"])
    if exposure != Exposure.CLUSTER_IP:
        return exposure != Exposure.NONE and int(record["flags"]) & policy.LOCAL == 0
    if tables[SETTINGS][MASQUERADE_ALL] != 0:
        return True
    if policy.has_pool(policies, Pool.CLUSTER):
        return not policy.is_in_pool(policies, Pool.CLUSTER, packet["src_hi"], packet["src_lo"])
    # Without a clusterCIDR only what a node sends from the service's own address: the reply would find no way.
    return bool(packet["src_hi"] == packet["dst_hi"] and packet["src_lo"] == packet["dst_lo"])


@kernel
def choose(packet: Any, tables: Any, row: int, now: int) -> Any:
    """Return ``(backend, template)`` for a new flow; the backend is -1 when none can be used."""
    arrays = tables[SERVICES]
    if int(arrays[2][row]["flags"]) & PERSISTENT:
        client = (packet["src_hi"], packet["src_lo"], int(packet["sport"]))
        return persistence.select(tables[TEMPLATES], arrays, row, client, now)
    return scheduler.pick(arrays, row, packet["src_hi"], packet["src_lo"], int(packet["sport"])), NONE


@kernel
def give_back(tables: Any, template: int, now: int) -> None:
    """Let go of a template that ``choose`` has returned for a flow that was refused afterwards."""
    if template >= 0:
        templates = tables[TEMPLATES]
        persistence.let_go(templates, template, int(templates[2][template]["generation"]), now)


@kernel
def bind(tables: Any, flow: Any, row: int, chosen: int, template: int) -> None:
    """Connect a new flow to its backend."""
    arrays = tables[SERVICES]
    virtual.connect(arrays, row, chosen)
    flow["service"] = row
    flow["service_generation"] = arrays[2][row]["generation"]
    flow["backend"] = chosen
    flow["backend_generation"] = arrays[3][chosen]["generation"]
    flow["template"] = template
    if template >= 0:
        flow["template_generation"] = tables[TEMPLATES][2][template]["generation"]
    flow["lb_state"] = LbState.NONE
    flow["status"] = int(flow["status"]) | COUNTED


@kernel
def is_gone(tables: Any, flow: Any) -> bool:
    """Say whether a flow's backend was deleted."""
    chosen = int(flow["backend"])
    if chosen < 0:
        return False
    return not backend.is_alive(tables[SERVICES][3], chosen, int(flow["backend_generation"]))


@kernel
def is_quiesced(tables: Any, flow: Any) -> bool:
    """Say whether a flow's backend has weight 0: a client that begins anew is scheduled anew (expire_nodest_conn)."""
    chosen = int(flow["backend"])
    return chosen >= 0 and int(tables[SERVICES][3][chosen]["weight"]) == 0


@kernel
def follow(packet: Any, tables: Any, e: int, now: int) -> None:
    """Count a packet of tuple ``e`` at its flow's service and backend, and follow ip_vs's state."""
    flow = tables[FLOWS][3][e >> 1]
    chosen = int(flow["backend"])
    if chosen < 0:
        return
    arrays, timeouts = tables[SERVICES], tables[TIMEOUTS]
    record = arrays[3][chosen]
    status = int(flow["status"])
    if status & COUNTED == 0:
        backend.connect(arrays[3], chosen)
        status |= COUNTED
        flow["lb_state"] = LbState.ESTABLISHED
    state: int = LbState.UDP
    if int(packet["protocol"]) == _TCP:
        state = tcp.lb_follow(packet, flow, e & 1)
    if tcp.is_lb_active(state) != (status & ACTIVE != 0):
        status ^= ACTIVE
        if status & ACTIVE:
            backend.activate(arrays[3], chosen, int(flow["backend_generation"]))
        else:
            backend.inactivate(arrays[3], chosen, int(flow["backend_generation"]))
    flow["status"] = status
    flow["lb_state"] = state
    flow["lb_expires_ns"] = now + int(timeouts[Timeout.LB + state])
    if state == LbState.UDP and int(flow["lb_expires_ns"]) > int(flow["expires_ns"]):
        # ip_vs remembers where a datagram of this client went longer than conntrack does.
        flow["expires_ns"] = flow["lb_expires_ns"]
    home = int(record["service"])
    service = arrays[2][home]
    if int(flow["service"]) != home or int(flow["service_generation"]) != int(service["generation"]):
        # The service was deleted and made again, its backend came back with its connections: only it knows the row.
        flow["service"] = home
        flow["service_generation"] = service["generation"]
    _count(packet, service, record, e & 1)


@kernel
def _count(packet: Any, service: Any, record: Any, direction: int) -> None:
    size = int(packet["length"]) - ethernet.HEADER
    if direction == ORIGINAL:
        service["in_packets"] = int(service["in_packets"]) + 1
        service["in_bytes"] = int(service["in_bytes"]) + size
        record["in_packets"] = int(record["in_packets"]) + 1
        record["in_bytes"] = int(record["in_bytes"]) + size
        return
    service["out_packets"] = int(service["out_packets"]) + 1
    service["out_bytes"] = int(service["out_bytes"]) + size
    record["out_packets"] = int(record["out_packets"]) + 1
    record["out_bytes"] = int(record["out_bytes"]) + size


@kernel
def release(tables: Any, flow: Any, now: int) -> None:
    """Count the end of a flow at its backend; nothing if that is done already."""
    status, chosen = int(flow["status"]), int(flow["backend"])
    if status & COUNTED == 0:
        return
    generation = int(flow["backend_generation"])
    backend.disconnect(tables[SERVICES][3], chosen, generation, status & ACTIVE != 0)
    template = int(flow["template"])
    if template >= 0:
        # The hand comes up to a second late; a template that expires meanwhile must not be prolonged by that.
        over = min(now, int(flow["expires_ns"]), int(flow["lb_expires_ns"]))
        persistence.let_go(tables[TEMPLATES], template, int(flow["template_generation"]), over)
    flow["template"] = NONE
    flow["status"] = status & ~(COUNTED | ACTIVE)


@kernel
def backend_of(tables: Any, chosen: int) -> Any:
    """Return the record of a backend."""
    return tables[SERVICES][3][chosen]
