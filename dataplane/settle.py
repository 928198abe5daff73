"""Writing down the settings that stages read: what a file says once for the whole node."""

from itertools import chain

from dataplane import batch
from dataplane.control.edits import ChangeSettings
from dataplane.control.state import DesiredState
from dataplane.jit import Array
from dataplane.tables.address import halves
from dataplane.tables.flow import LbState, TcpState, Timeout, make_timeouts
from dataplane.tables.policy import PolicyTable, Pool

_SECOND = 1_000_000_000
_TIMEOUTS = {
    "ipvs.tcpTimeout": Timeout.LB + LbState.ESTABLISHED,
    "ipvs.tcpFinTimeout": Timeout.LB + LbState.FIN_WAIT,
    "ipvs.udpTimeout": Timeout.LB + LbState.UDP,
    "tcpEstablishedTimeout": Timeout.TCP + TcpState.ESTABLISHED,
    "tcpCloseWaitTimeout": Timeout.TCP + TcpState.CLOSE_WAIT,
    "udpTimeout": Timeout.UDP,
    "udpStreamTimeout": Timeout.UDP_STREAM,
}
"""kube-proxy's names for some of the timeouts; the first three are what ``ipvsadm --set`` changes."""


def fix(settings: Array, state: DesiredState) -> None:
    """Write down what stays as it is while the node runs."""
    if state.node.addresses:
        settings[batch.NODE_LO] = halves(state.node.addresses[0])[1]
    settings[batch.GATEWAY_LO] = halves(state.pod_network.gateway)[1]
    settings[batch.VTEP_MAC] = state.node.vtep_mac
    settings[batch.VNI], settings[batch.TUNNEL_PORT] = state.vxlan.vni, state.vxlan.port
    settings[batch.TCP_LOOSE] = 1
    settings[batch.UPLINK_OWN] = state.uplink is not None and not state.uplink.shared
    if state.tunnel_address is not None:
        settings[batch.TUNNEL_LO] = halves(state.tunnel_address)[1]


def change(settings: Array, timeouts: Array, policies: PolicyTable, edit: ChangeSettings) -> None:
    """Write down what a reload may change. ``timeouts`` is ``(TIMEOUT_COUNT,)`` int64 ns.

    Raises:
        TableFullError: There are too many pools; nothing was changed.
    """
    network, balancing = edit.pod_network, edit.balancing
    cluster = ((Pool.CLUSTER, prefix) for prefix in edit.cluster)
    policies.set_pools(chain(cluster, ((Pool.OUTGOING, prefix) for prefix in edit.outgoing)))
    settings[batch.GATEWAY_LO] = halves(network.gateway)[1]
    settings[batch.POD_MTU], settings[batch.PROXY_ARP] = network.mtu, network.proxy_arp
    settings[batch.MASQUERADE_LOW], settings[batch.MASQUERADE_HIGH] = edit.ports
    settings[batch.NAT_OUTGOING], settings[batch.NAT_RANDOM] = network.nat_outgoing, network.nat_random_fully
    settings[batch.MASQUERADE_ALL] = balancing.masquerade_all
    settings[batch.TCP_LIBERAL] = balancing.tcp_be_liberal
    timeouts[:] = make_timeouts()
    for name, seconds in balancing.timeouts:
        if seconds:
            timeouts[_TIMEOUTS[name]] = int(seconds * _SECOND)
