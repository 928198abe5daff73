"""Settings: what a state says once for the whole node, as numbers in the arrays that stages read."""

from ipaddress import IPv4Address, IPv4Network

import numpy as np
import pytest

from dataplane import batch, config_checks, settle
from dataplane.control.edits import ChangeSettings
from dataplane.control.state import Balancing, DesiredState, Node, PodNetwork, Uplink
from dataplane.tables.address import halves
from dataplane.tables.flow import LbState, TcpState, Timeout, make_timeouts
from dataplane.tables.policy import POOLS, PolicyTable, Pool, is_in_pool

SECOND = 1_000_000_000
BLOCK = IPv4Network("10.244.1.0/24")


def settled(balancing: Balancing | None = None, **network) -> tuple[np.ndarray, np.ndarray, PolicyTable]:
    settings, timeouts, policies = np.zeros(batch.SETTING_COUNT, np.uint64), make_timeouts(), PolicyTable(4)
    given = PodNetwork(cidrs=(BLOCK,), **network)
    desired = DesiredState(Node("node1"), given, balancing=balancing or Balancing())
    settle.change(settings, timeouts, policies, ChangeSettings.of(desired))
    return settings, timeouts, policies


def test_a_state_without_services_is_the_kernels_defaults():
    settings, timeouts, policies = settled()
    assert (timeouts == make_timeouts()).all()
    assert not policies.pools["pool"].any()
    assert (settings[batch.TCP_LIBERAL], settings[batch.NAT_OUTGOING], settings[batch.MASQUERADE_ALL]) == (1, 0, 0)


TIMEOUTS = {
    "ipvs.tcpTimeout": Timeout.LB + LbState.ESTABLISHED,
    "ipvs.tcpFinTimeout": Timeout.LB + LbState.FIN_WAIT,
    "ipvs.udpTimeout": Timeout.LB + LbState.UDP,
    "tcpEstablishedTimeout": Timeout.TCP + TcpState.ESTABLISHED,
    "tcpCloseWaitTimeout": Timeout.TCP + TcpState.CLOSE_WAIT,
    "udpTimeout": Timeout.UDP,
    "udpStreamTimeout": Timeout.UDP_STREAM,
}


@pytest.mark.parametrize(("name", "index"), TIMEOUTS.items())
def test_each_of_kube_proxys_timeouts_is_one_of_ours(name, index):
    timeouts = settled(Balancing(timeouts=((name, 7.5),)))[1]
    assert timeouts[index] == 7.5 * SECOND
    timeouts[index] = make_timeouts()[index]
    assert (timeouts == make_timeouts()).all()


def test_a_timeout_of_0_is_the_kernels_own():
    timeouts = settled(Balancing(timeouts=tuple((name, 0.0) for name in sorted(TIMEOUTS))))[1]
    assert (timeouts == make_timeouts()).all()


def test_the_pools_are_what_the_stages_ask_for():
    balancing = Balancing(cluster_cidrs=(IPv4Network("10.244.0.0/16"),))
    policies = settled(balancing, nat_outgoing=True)[2]
    inside, outside = halves("10.244.7.7"), halves("192.0.2.1")
    for pool in (Pool.CLUSTER, Pool.OUTGOING):
        assert is_in_pool(policies.arrays, pool, *map(np.uint64, inside))
        assert not is_in_pool(policies.arrays, pool, *map(np.uint64, outside))


def test_what_is_fixed_is_written_once():
    settings = np.zeros(batch.SETTING_COUNT, np.uint64)
    node = Node("node1", addresses=(IPv4Address("192.0.2.11"),))
    settle.fix(settings, DesiredState(node, PodNetwork(cidrs=(BLOCK,)), uplink=Uplink("eth0", shared=False)))
    assert settings[batch.NODE_LO] == halves("192.0.2.11")[1]
    assert settings[batch.TUNNEL_LO] == halves("10.244.1.0")[1]
    assert settings[batch.UPLINK_OWN] == settings[batch.TCP_LOOSE] == 1
    settle.fix(settings, DesiredState(node, uplink=Uplink("eth0")))
    assert settings[batch.UPLINK_OWN] == 0


def test_a_file_may_list_as_many_pools_as_the_table_holds():
    assert config_checks.POOLS == POOLS - 1  # the file is checked without numpy, so it has a number of its own
