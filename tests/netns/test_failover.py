"""Failover of a load balancer's address between real nodes: killed, stopped, ended, cut off (the topology: failing.py).

The mark is a second from the kill to the first answer from elsewhere. These tests allow five, since they are about
what happens and not about how fast a busy machine is; ``python -m bench failover`` measures.
"""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from tests.netns import checks
from tests.netns.failing import Site
from tests.netns.harness import Network, eventually
from tests.netns.ours import assert_balanced

pytestmark = pytest.mark.netns

SOON = 5.0
LEASE = 2


@pytest.fixture(scope="module", params=["static", "etcd"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three running nodes that every test leaves as they are."""
    directory = tmp_path_factory.mktemp("failover")
    with Network(directory) as network:
        made = Site(network, etcd=directory if request.param == "etcd" else None, lease=LEASE)
        try:
            made.start()
            made.ask()
            yield made
            for node in made.nodes:
                assert_balanced(node)
        finally:
            made.close()


@contextmanager
def owners(site: Site) -> Iterator[list[str]]:
    """Ask who has the address 50 times a second; afterwards the list has who answered, each run of one MAC once."""
    asking = site.ext.spawn("arping", "-i", "eth0", "-c", 100_000, "-W", 0.02, site.address)
    asking.expect("bytes from")
    found: list[str] = []
    try:
        yield found
    finally:
        asking.stop(signal.SIGINT)
        found += [mac for mac, _ in groupby(re.findall(r"bytes from (\S+) ", asking.output))]


def test_another_node_answers_when_the_owner_is_killed(site):
    assert site.answers() == [site.mac(0)]
    with site.ext.capture("eth0", f"arp host {site.address} and not ether src {site.mac(0)}") as path:
        assert site.outage(lambda: site.signal(0, signal.SIGKILL)) < SOON
    site.nodes[0].kill()
    (mac,) = site.answers()
    assert mac in {site.mac(1), site.mac(2)}
    told = checks.fields(path, "arp.isgratuitous == 1", "arp.opcode", "arp.src.proto_ipv4", "arp.src.hw_mac")
    assert told[:2] == [["1", site.address, mac], ["2", site.address, mac]]
    began = time.monotonic()
    site.back(0)
    assert site.gap(began, time.monotonic()) < 1, "a node that comes back takes what it wins without an interruption"


def test_an_owner_that_ends_hands_over_without_an_interruption(site):
    began = time.monotonic()
    with owners(site) as found:
        assert site.nodes[0].stop() == 0
        eventually(site.others_answer)
    assert site.gap(began, time.monotonic()) < 1
    assert len(found) == 2, found
    assert found[0] == site.mac(0)
    site.back(0)


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.0, 3.0])
def test_an_owner_that_was_stopped_never_answers_beside_another(site, seconds):
    """With 3 s etcd has forgotten its lease as well. What was asked meanwhile waits in its socket."""
    with owners(site) as found:
        site.signal(0, signal.SIGSTOP)
        began = time.monotonic()
        try:
            eventually(lambda: time.monotonic() > began + seconds)
        finally:
            site.signal(0, signal.SIGCONT)
        eventually(lambda: site.is_owner(0), 20)
    assert found[0] == found[-1] == site.mac(0)
    assert len(found) == 3 or (len(found) == 1 and seconds < 1), found


def test_a_node_that_does_not_own_the_address_may_die_unnoticed(site):
    began = time.monotonic()
    with owners(site) as found:
        site.nodes[1].kill()
        eventually(lambda: time.monotonic() > began + 3)
    assert found == [site.mac(0)]
    seen = len(site.nodes[0].log)
    site.nodes[1].start()
    eventually(lambda: any("heard again" in line for line in site.nodes[0].log[seen:]), 20)


def test_while_etcd_is_away_the_owner_goes_on_and_is_the_owner_afterwards(site):
    if site.etcd is None:
        assert site.answers() == [site.mac(0)]
        return
    began = time.monotonic()
    with owners(site) as found:
        site.etcd.pause()
        try:
            eventually(lambda: time.monotonic() > began + LEASE + 2, 20)
        finally:
            site.etcd.resume()
        eventually(lambda: time.monotonic() > began + LEASE + 5, 20)
    assert found == [site.mac(0)]
    assert site.gap(began, time.monotonic()) < 1


def test_an_owner_that_is_cut_off_from_the_lan_is_replaced_and_comes_back_alone(site):
    with owners(site) as found:
        site.switch.ip("link", "set", site.port(0), "down")
        eventually(site.others_answer, SOON * 3)
        site.switch.ip("link", "set", site.port(0), "up")
        eventually(lambda: site.is_owner(0), 20)
    assert found[0] == found[-1] == site.mac(0)
    if site.etcd:  # without a store both answer until they hear each other
        assert len(found) == 3, found


def test_an_uplink_of_our_own_fails_over_too(tmp_path: Path):
    with Network(tmp_path) as network:
        site = Site(network, shared=False)
        site.start()
        site.ask()
        assert site.outage(lambda: site.signal(0, signal.SIGKILL)) < SOON
        assert site.answers() != [site.mac(0)]
