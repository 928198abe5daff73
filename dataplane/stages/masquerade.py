"""masquerade: whose source address is replaced, and by which (B6, B7, B11).

The order is that of the chains behind POSTROUTING: kube-proxy's loop-back rule (a pod that reached itself through a
service), kube-proxy's mark, then Calico's natOutgoing and its rule for what the host itself sends into the tunnel. The
decision is made once, when a flow begins; its packets then carry the stored rewrite.

Drops: nat.no-port, nat.masq-no-addr, ct.clash.
"""

from typing import Any

import numpy as np

from dataplane.batch import (
    FLOWS,
    GATEWAY_LO,
    IPV6,
    MASQUERADE_HIGH,
    MASQUERADE_LOW,
    NAT_OUTGOING,
    NAT_RANDOM,
    NODE_LO,
    POLICIES,
    ROUTES,
    SETTINGS,
    TUNNEL_LO,
    TUNNEL_PORT,
)
from dataplane.jit import kernel
from dataplane.tables import flow, policy, ports, route
from dataplane.tables.policy import Pool
from dataplane.tables.route import Kind
from dataplane.verdict import Reason

LEFT, KEPT, RANDOM = 0, 1, 2  # the source is left alone; replaced, with its port if that is free; with a random port


@kernel
def decide(packet: Any, tables: Any, marked: bool, translated: bool, kind: int) -> int:
    """Return what becomes of the source of a new flow.

    Args:
        packet: The packet's record; its destination is the translated one.
        tables: What a stage gets.
        marked: The flow has kube-proxy's mark.
        translated: Its destination was a service's.
        kind: The kind of the route to the destination.
    """
    if translated and packet["src_lo"] == packet["dst_lo"] and packet["src_hi"] == packet["dst_hi"]:
        return KEPT
    if marked or (translated and kind == Kind.LOCAL and not _is_pod(packet, tables)):
        return RANDOM
    settings = tables[SETTINGS]
    outgoing = kind in (Kind.VIA, Kind.TUNNEL) and settings[NAT_OUTGOING] != 0 and _leaves_the_pools(packet, tables)
    tunnel = settings[TUNNEL_LO]
    if not outgoing and kind == Kind.TUNNEL and tunnel != 0 and packet["src_lo"] != tunnel:
        outgoing = _is_local(packet, tables)
    if not outgoing:
        return LEFT
    return RANDOM if settings[NAT_RANDOM] != 0 else KEPT


@kernel
def _is_pod(packet: Any, tables: Any) -> bool:
    return policy.is_in_pool(tables[POLICIES], Pool.CLUSTER, packet["src_hi"], packet["src_lo"])


@kernel
def _leaves_the_pools(packet: Any, tables: Any) -> bool:
    policies = tables[POLICIES]
    return policy.is_in_pool(policies, Pool.OUTGOING, packet["src_hi"], packet["src_lo"]) and not policy.is_in_pool(
        policies, Pool.OUTGOING, packet["dst_hi"], packet["dst_lo"]
    )


@kernel
def _is_local(packet: Any, tables: Any) -> bool:
    routes = tables[ROUTES]
    found = route.lookup(routes, packet["src_hi"], packet["src_lo"])
    return found >= 0 and int(routes[-1][found]["kind"]) == Kind.LOCAL


@kernel
def address(tables: Any, kind: int) -> Any:
    """Return the low half of the IPv4 address that stands for a flow leaving by a route of this kind; 0: there is none.

    That of the egress device, else the node's. A node that stands alone has no address but the gateway's. To the host
    it is the gateway's, too: what the host sends to its own addresses, or to a client on the LAN, would not come back
    to us. So a server on the node's own address sees the clients of its services, but for pods, as 169.254.1.1.
    """
    settings = tables[SETTINGS]
    if kind == Kind.LOCAL:
        return settings[GATEWAY_LO]
    if kind == Kind.TUNNEL and settings[TUNNEL_LO] != 0:
        return settings[TUNNEL_LO]
    if settings[NODE_LO] != 0:
        return settings[NODE_LO]
    return settings[GATEWAY_LO]


@kernel
def apply(packet: Any, tables: Any, how: int, kind: int) -> int:
    """Give the reply tuple of a new flow, in ``scratch[1]``, a destination that no other flow has.

    Returns:
        ``ACCEPTED``, or why there is none.
    """
    flows, settings = tables[FLOWS], tables[SETTINGS]
    reply = flows[6][1]
    if how == LEFT:
        # A reply that two flows would share (a client that reaches a pod directly and through a service, from one
        # port) gets another port, as from the kernel's null binding.
        if flow.find(flows, reply) < 0 or ports.allocate(flows, 0, 0, int(np.int64(settings[TUNNEL_PORT])), False):
            return Reason.ACCEPTED
        return Reason.CT_CLASH
    source = address(tables, kind)
    if source == 0 or int(packet["flags"]) & IPV6:
        return Reason.NAT_MASQ_NO_ADDR
    reply["dst_hi"] = np.uint64(0)
    reply["dst_lo"] = source
    low = high = 0
    if kind == Kind.VIA:  # only there a reply could also be meant for the host, or the range be what a firewall expects
        low, high = int(np.int64(settings[MASQUERADE_LOW])), int(np.int64(settings[MASQUERADE_HIGH]))
    if ports.allocate(flows, low, high, int(np.int64(settings[TUNNEL_PORT])), how == RANDOM):
        return Reason.ACCEPTED
    return Reason.NAT_NO_PORT
