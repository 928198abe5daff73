"""pipeline: no packet is lost or made up, no byte outside a packet's slot is touched, whatever comes in.

Traffic is made by ``tests/corpus.py``: valid, damaged and random frames from every interface.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.l2 import ARP, Ether

from dataplane import batch as b
from dataplane import pipeline
from dataplane.devices.memory import Vnet, load
from dataplane.stages.defrag import reclaim
from dataplane.tables.interface import UP, Driver
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason, Verdict
from tests import world as w
from tests.corpus import Arrival, Corpus, Network, by_interface, transcript
from tests.frames import pod_frame, tunneled, udp
from tests.strategies import DIRT

REASONS = {int(reason): reason for reason in Reason}
ROOT = Path(__file__).parent.parent


# --- each stage alone ------------------------------------------------------------------------------------------------


def through(network, arrivals, iif, until):
    """Run the stages in front of ``until`` over a burst; return the number of rows."""
    count = network.load([each.frame for each in arrivals], iif, [each.vnet for each in arrivals])
    for stage in pipeline.STAGES:
        if stage is until:
            return count
        stage(network.batch.arrays, count, network.tables.arrays, network.now)
    return count


SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", pipeline.STAGES, ids=lambda stage: stage.__name__)
def test_packets_with_another_verdict_are_untouched(stage, seed):
    network = Network()
    data, packets = network.batch.arrays
    for iif, arrivals in by_interface(Corpus(seed).arrivals(100)):
        count = through(network, arrivals, iif, stage)
        packets["verdict"][:count] = np.resize([Verdict.STOLEN, Verdict.QUEUE, Verdict.DROP], count)
        before, octets = packets[:count].copy(), data[: b.ASSEMBLY_BASE].copy()
        tables = network.tables.counters.copy(), network.tables.assembly[0].copy()
        stage(network.batch.arrays, count, network.tables.arrays, network.now)
        assert np.array_equal(packets[:count], before)
        assert np.array_equal(data[: b.ASSEMBLY_BASE], octets)
        assert np.array_equal(network.tables.counters, tables[0])
        assert np.array_equal(network.tables.assembly[0], tables[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_no_byte_outside_the_slots_is_touched(seed):
    """The arena is poisoned around the frames; each stage may write its rows' slots, defrag its own, and no other."""
    network = Network()
    data, packets = network.batch.arrays
    for iif, arrivals in by_interface(Corpus(100 + seed).arrivals(60)):
        data[: b.ASSEMBLY_BASE] = DIRT
        count = network.load([each.frame for each in arrivals], iif, [each.vnet for each in arrivals])
        outside = np.ones(b.ASSEMBLY_BASE, np.bool_)
        for row in range(count):
            slot, size = int(packets["slot"][row]), int(packets["size"][row])
            outside[slot : slot + size] = False
        tail = {row: (int(packets["start"][row] + packets["length"][row])) for row in range(count)}
        behind = {row: int(packets["slot"][row] + packets["size"][row]) for row in range(count)}
        for stage in pipeline.STAGES:
            stage(network.batch.arrays, count, network.tables.arrays, network.now)
            assert (data[: b.ASSEMBLY_BASE][outside] == DIRT).all(), stage.__name__
            for row in range(count):
                assert (data[tail[row] : behind[row]] == DIRT).all(), stage.__name__
        reclaim(network.tables.arrays)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_frame_never_leaves_its_slot(seed):
    network = Network()
    packets = network.batch.packets
    for iif, arrivals in by_interface(Corpus(200 + seed).arrivals(200)):
        count = through(network, arrivals, iif, None)
        for record in packets[:count]:
            assert record["slot"] <= record["start"]
            assert record["start"] + record["length"] <= record["slot"] + record["size"]
            if record["verdict"] == Verdict.ACCEPT:
                assert record["start"] < record["l3"] < record["start"] + record["length"]
        reclaim(network.tables.arrays)


def test_every_verdict_has_a_reason_of_its_own_kind():
    network = Network()
    for iif, arrivals in by_interface(Corpus(7).arrivals(400)):
        count = through(network, arrivals, iif, None)
        for record in network.batch.packets[:count]:
            assert REASONS[int(record["reason"])].verdict == record["verdict"]
        reclaim(network.tables.arrays)


def test_the_order_of_stages_is_that_of_the_burst():
    """``burst`` calls them by name, so that they are compiled as one; the two lists must not part."""
    network, other = Network(), Network()
    for iif, arrivals in by_interface(Corpus(8).arrivals(200)):
        count = through(network, arrivals, iif, None)
        batch, io = other.engine.batch, other.engine.io
        other.engine.batch.packets[:] = 0
        load(batch, [each.frame for each in arrivals], iif, [each.vnet for each in arrivals])
        pipeline.burst(batch.arrays, pipeline.LOADED, other.tables.arrays, io.arrays, other.now, count)
        reasons = network.batch.packets["reason"][:count]
        sent = batch.packets["reason"][:count]
        by_transmit = np.isin(sent, [Reason.DEVICE_ERROR, Reason.DEVICE_DOWN, Reason.OVERLOAD_TX_FULL])
        assert np.array_equal(reasons[~by_transmit], sent[~by_transmit])
        reclaim(network.tables.arrays)


# --- conservation ----------------------------------------------------------------------------------------------------


def transmitted(network):
    return int(network.tables.interfaces["tx_packets"].sum())


def assert_conserved(network):
    """Received + injected = accepted + stolen + queued + dropped; devices got what was accepted or answered."""
    came, by_verdict = pipeline.balance(network.tables.counters)
    assert came == sum(by_verdict.values())
    assert transmitted(network) == network.count(Reason.ACCEPTED) + network.count(Reason.ARP_ANSWERED)
    # Nothing is counted under a number that is no reason.
    known = {int(reason) for reason in Reason}
    assert not [k for k in range(128) if k not in known and network.tables.counters[k]]
    held = network.tables.assembly[0]
    pieces = int(held["pieces"][held["phase"] == 1].sum())
    assert pieces <= network.count(Reason.FRAGMENT_HELD)
    released = network.slow.answered["held"] - network.slow.resolver.waiting
    assert released >= 0


def assert_whole(packet, length):
    """The header sums up, the length is the frame's, and there are hops left."""
    right = packet.copy()
    del right.chksum
    assert IP(bytes(right)).chksum == packet.chksum
    assert packet.len == length
    assert packet.ttl > 0


def assert_sent_right(sent, network):
    """What leaves is whole, with the link's addresses; in a tunnel that holds for both frames, and the MTU is kept."""
    own = {w.POD_A: (w.MAC_A, w.GATEWAY_MAC), w.POD_B: (w.MAC_B, w.GATEWAY_MAC)}
    for oif, frame in sent:
        if frame[12:14] != b"\x08\x00":
            continue
        packet = IP(frame[14:])
        assert_whole(packet, len(frame) - 14)
        if oif in own:
            assert (Ether(frame).dst, Ether(frame).src) == own[oif]
        if oif != w.UNDERLAY:
            continue
        assert (packet.src, packet.dst, packet.proto) == (w.NODE, w.PEER, 17)
        assert packet.len <= 1500
        inner = Ether(frame[50:])
        assert (inner.dst, inner.src) == (w.PEER_VTEP, w.VTEP)
        if inner.type == 0x0800:
            assert_whole(IP(frame[64:]), len(frame) - 64)


EVENTS = st.one_of(
    st.tuples(st.just("traffic"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("traffic"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("time"), st.sampled_from([1, 3, 31, 120])),
    st.tuples(st.just("device"), st.sampled_from([w.POD_A, w.POD_B, w.UPLINK, w.UNDERLAY])),
    st.tuples(st.just("broken"), st.sampled_from([w.POD_A, w.POD_B])),
    st.tuples(st.just("route"), st.sampled_from([Kind.BLACKHOLE, Kind.UNREACHABLE, Kind.POD])),
    st.tuples(st.just("lan"), st.booleans()),
)


def happen(network, event, value):
    """Let one thing happen to the node; return what its devices got."""
    interfaces = network.tables.interfaces
    sent = []
    if event == "traffic":
        for iif, arrivals in by_interface(Corpus(value).arrivals(24)):
            punted, frames = network.receive(iif, arrivals)
            sent += frames
            network.answer(punted)
            assert_conserved(network)
    elif event == "time":
        network.tick(value)
    elif event == "device":
        interfaces["flags"][value] ^= UP
    elif event == "broken":
        # A TAP without a file: every write fails with EBADF.
        broken = interfaces["driver"][value] == Driver.TAP
        interfaces["driver"][value] = Driver.MEMORY if broken else Driver.TAP
    elif event == "route":
        network.route(f"{w.IP_B}/32", Route(value, w.POD_B))
        network.engine.refresh()
    else:
        mac = w.LAN_MAC if value else "02:00:c0:00:02:99"
        for address in (w.LAN_GATEWAY, w.PEER):
            answer = Ether(src=mac, dst=w.UPLINK_MAC) / _arp_reply(mac, address)
            punted, frames = network.receive(w.UPLINK, [Arrival(w.UPLINK, bytes(answer))])
            sent += frames
            network.answer(punted)
    return sent


def _arp_reply(mac, address):
    return ARP(op=2, hwsrc=mac, psrc=address, hwdst=w.UPLINK_MAC, pdst=w.NODE)


@settings(max_examples=50)
@given(st.lists(EVENTS, min_size=1, max_size=8))
def test_whatever_happens_no_packet_is_lost_or_made_up(events):
    network = Network()
    for event, value in events:
        sent = happen(network, event, value)
        assert_conserved(network)
        assert_sent_right(sent, network)
    network.tick(40)
    assert_conserved(network)
    assert network.slow.resolver.waiting == 0
    assert not (network.tables.assembly[0]["phase"] == 1).any()


PROMISES = [("the destination MAC", 0), ("the source MAC", 10), ("the IP header's checksum", 24)]
PROMISES += [("the source address", 28), ("the source port", 34), ("the UDP length", 38)]


@pytest.mark.parametrize("field", [row[1] for row in PROMISES], ids=[row[0] for row in PROMISES])
@pytest.mark.parametrize("target", [w.IP_REMOTE, w.IP_B])
def test_a_pod_cannot_have_us_write_over(field, target):
    """A virtio header may ask for a checksum anywhere in the frame: over what has been checked, it is not written."""
    network = Network()
    network.tables.interfaces["flags"][w.POD_B] = UP
    frame = bytes(pod_frame(udp(target)))
    for vnet in (Vnet(b.NEEDS_CSUM, 0, 0, 0, 0, field), Vnet(b.NEEDS_CSUM, 0, 0, 0, field, 0)):
        _, sent = network.receive(w.POD_A, [Arrival(w.POD_A, frame, vnet)])
        ((oif, left),) = sent
        assert left[64 if oif == w.UNDERLAY else 14 :] == bytes(udp(target, ttl=63))


def test_losses_of_the_kernel_are_counted_as_received_and_dropped():
    network = Network()
    pipeline.count_lost(network.tables.counters, 1000)
    assert network.count(Reason.OVERLOAD_RX_RING) == 1000
    assert_conserved(network)


def test_a_burst_says_how_many_rows_it_had_and_how_many_need_the_slow_path():
    network = Network()
    arrivals = [Arrival(w.POD_A, bytes(pod_frame(ip))) for ip in (udp(w.IP_B), udp(w.NODE), udp("8.8.8.8"))]
    punted, sent = network.receive(w.POD_A, arrivals)
    assert (punted >> 16, punted & 0xFFFF) == (3, 2)
    assert [oif for oif, _ in sent] == [w.POD_B]


def test_an_empty_burst_is_nothing():
    network = Network()
    assert network.receive(w.POD_A, []) == (0, [])


def test_tables_warm_up_and_stay_as_they_were():
    tables = pipeline.Tables(seed=1)
    tables.warm_up()
    assert (len(tables.routes), len(tables.neighbours), len(tables.vteps), len(tables.services)) == (0, 0, 0, 0)


def test_a_tunneled_packet_goes_from_tunnel_to_pod_and_back():
    network = Network()
    _, sent = network.receive(w.UNDERLAY, [Arrival(w.UNDERLAY, bytes(tunneled(udp(w.IP_A, src=w.IP_REMOTE))))])
    ((oif, frame),) = sent
    assert (oif, frame[14:]) == (w.POD_A, bytes(udp(w.IP_A, src=w.IP_REMOTE, ttl=63)))


# --- interpreted and compiled ----------------------------------------------------------------------------------------


def test_the_interpreted_kernels_do_exactly_the_same():
    """Verdicts, reasons, every byte that leaves, every counter: one corpus, the other mode in a process of its own."""
    seed, count = 20_26, 2000
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("NUMBA_BOUNDSCHECK", None)
    command = [sys.executable, "-m", "tests.corpus", str(seed), str(count)]
    other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    ours = list(transcript(seed, count))
    theirs = other.stdout.splitlines()
    assert len(ours) == len(theirs) > count
    for k, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        assert mine == yours, f"line {k}"


def test_the_corpus_reaches_most_reasons():
    """A corpus that is dropped at the door shows nothing."""
    network = Network()
    for iif, arrivals in by_interface(Corpus(20_26).arrivals(2000)):
        punted, _ = network.receive(iif, arrivals)
        network.answer(punted)
    reached = {reason for reason in Reason if network.count(reason)}
    rare = {Reason.NEIGH_QUEUE_FULL, Reason.NEIGH_UNRESOLVED, Reason.IP_FRAG_TIMEOUT, Reason.IP_FRAG_LIMIT}
    rare |= {Reason.OVERLOAD_RX_RING, Reason.OVERLOAD_TX_FULL, Reason.OVERLOAD_SLOW_PATH, Reason.DEVICE_DOWN}
    rare |= {Reason.DEVICE_ERROR, Reason.IP_FRAG_OVERLAP, Reason.TUNNEL_OWN_MAC, Reason.TUNNEL_INNER_MAC}
    rare |= {Reason.TUNNEL_TRUNCATED, Reason.L2_TOO_SHORT, Reason.TUNNEL_BAD_FLAGS, Reason.TUNNEL_RESERVED}
    rare |= {Reason.TUNNEL_VNI, Reason.LB_DEST_DELETED, Reason.CT_WINDOW, Reason.CT_TABLE_FULL, Reason.CT_CLASH}
    rare |= {Reason.NAT_NO_PORT, Reason.NAT_MASQ_NO_ADDR, Reason.CT_BAD_RST}
    assert set(Reason) - reached <= rare
