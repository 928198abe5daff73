"""engine: devices on a real event loop, what becomes of those that fail, and how much one burst may do.

The devices are socket pairs, which give a frame per read as a TAP does, with the virtio header in front:

    pod a ── theirs │ ours ── engine ── ours │ theirs ── pod b
"""

import asyncio
import errno
import logging
import socket
from contextlib import suppress

import pytest
import uvloop

from dataplane import engine as module
from dataplane import pipeline
from dataplane.batch import INJECTED, ROWS
from dataplane.engine import Engine
from dataplane.resolve import Outgoing
from dataplane.slowpath import BUDGET, SlowPath
from dataplane.stages.defrag import TIMEOUT_NS
from dataplane.tables.interface import Driver
from dataplane.tables.route import Kind, Route
from dataplane.verdict import Reason
from tests import world as w
from tests.frames import arp_request, fragments, ping, pod_frame, udp
from tests.world import SECOND, World

VIRTIO = bytes(10)
QUEUE = 4 << 20


class Bench:
    """An engine over a world whose pods are socket pairs."""

    def __init__(self, limit=ROWS):
        self.world = World()
        self.tables = self.world.tables
        self.slow = self.world.slow_path()
        self.engine = Engine(self.tables, self.slow, limit, clock=lambda: self.world.now)
        self.pods = {}
        self._sockets = []
        for index in (w.POD_A, w.POD_B):
            self.plug(index)
        self.engine.warm_up()

    def plug(self, index):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for each in (ours, theirs):
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE)
        self._sockets += [ours, theirs]
        self.pods[index] = theirs
        self.tables.interfaces["driver"][index] = Driver.TAP
        self.tables.interfaces["fd"][index] = ours.fileno()
        return ours

    def attach(self, *indices):
        for index in indices:
            self.engine.attach(index, int(self.tables.interfaces["fd"][index]), f"pod{index}")

    def send(self, index, *frames):
        for frame in frames:
            self.pods[index].send(VIRTIO + bytes(frame))

    def heard(self, index):
        """The frames that a pod has got, without their virtio headers."""
        frames = []
        while True:
            try:
                frames.append(self.pods[index].recv(1 << 17)[len(VIRTIO) :])
            except BlockingIOError:
                return frames

    def close(self):
        for each in self._sockets:
            each.close()


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.02)
    bench = Bench()
    yield bench
    assert bench.world.balanced()
    bench.close()


def run(main):
    """Run a coroutine function on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


async def until(condition):
    """Wait for what other callbacks of the loop bring about."""
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it did not happen within five seconds")


def test_a_frame_goes_from_pod_to_pod(bench):
    async def main():
        bench.attach(w.POD_A, w.POD_B)
        bench.send(w.POD_A, pod_frame(udp(w.IP_B, ttl=64)))
        await until(lambda: bench.world.count(Reason.ACCEPTED) == 1)
        bench.engine.stop()

    run(main)
    (frame,) = bench.heard(w.POD_B)
    assert frame[14:] == bytes(udp(w.IP_B, ttl=63))


def test_arp_and_ping_are_answered(bench):
    async def main():
        bench.attach(w.POD_A)
        bench.send(w.POD_A, arp_request("169.254.1.1"), pod_frame(ping(w.NODE)))
        await until(lambda: bench.slow.answered["answered"] == 1)
        bench.engine.stop()

    run(main)
    answers = bench.heard(w.POD_A)
    assert [frame[12:14] for frame in answers] == [b"\x08\x06", b"\x08\x00"]
    assert answers[1][34] == 0


# --- devices that fail -----------------------------------------------------------------------------------------------


class Broken:
    """A file that a read finds broken: end of file, or an error."""

    @staticmethod
    def end_of_file():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs.close()
        return ours

    @staticmethod
    def refused():
        """A datagram socket with an error pending: its fd is readable and the read gives ECONNREFUSED."""
        ours = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        gone = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        gone.bind(("127.0.0.1", 0))
        ours.connect(gone.getsockname())
        gone.close()
        ours.send(b"x")
        return ours


FAULTS = [("end of file", Broken.end_of_file, errno.EIO), ("an error", Broken.refused, errno.ECONNREFUSED)]


@pytest.mark.parametrize(("make", "error"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_device_that_fails_is_taken_off_the_loop_and_logged_once(bench, caplog, make, error):
    caplog.set_level(logging.INFO, "dataplane.engine")
    failures: list[int] = []

    async def main():
        with make() as broken:
            broken.setblocking(False)
            bench.tables.interfaces["fd"][w.POD_A] = broken.fileno()
            bench.engine.on_failure = failures.append
            bench.attach(w.POD_A, w.POD_B)
            await until(lambda: failures)
            bench.send(w.POD_B, pod_frame(udp(w.IP_B, src=w.IP_B), source=w.MAC_B))
            await until(lambda: bench.world.count(Reason.ACCEPTED) == 1)
            if make is Broken.end_of_file:
                await until(lambda: len(failures) > 2)
            bench.engine.stop()

    run(main)
    lines = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(lines) == 1
    assert f"name=pod{w.POD_A}" in lines[0]
    assert bench.tables.interfaces["rx_errors"][w.POD_A] >= 1
    assert set(failures) == {w.POD_A}
    if make is Broken.end_of_file:
        assert bench.tables.interfaces["error"][w.POD_A] in (0, error)


def test_a_device_that_comes_back_is_read_again_and_that_is_logged(bench, caplog):
    caplog.set_level(logging.INFO, "dataplane.engine")

    async def main():
        fd = int(bench.tables.interfaces["fd"][w.POD_A])
        bench.attach(w.POD_A)
        bench.tables.interfaces["fd"][w.POD_A] = -1  # EBADF
        bench.send(w.POD_A, pod_frame(udp(w.IP_B)))
        await until(lambda: bench.tables.interfaces["rx_errors"][w.POD_A])
        bench.tables.interfaces["fd"][w.POD_A] = fd
        await until(lambda: bench.world.count(Reason.ACCEPTED) == 1)
        await until(lambda: any("back" in record.getMessage() for record in caplog.records))
        bench.engine.stop()

    run(main)
    assert [record.getMessage().split(" name")[0] for record in caplog.records] == ["device failed", "device is back"]
    assert len(bench.heard(w.POD_B)) == 1


def test_a_packet_that_a_device_refused_does_not_stop_its_reading(bench, caplog):
    """A transmit error is the packet's, even if the next read finds nothing (a datagram with a wrong checksum)."""

    async def main():
        bench.attach(w.POD_A, w.POD_B)
        bench.tables.interfaces["error"][w.POD_A] = errno.EINVAL
        bench.engine.drain()  # reads, and nothing is there
        bench.send(w.POD_A, pod_frame(udp(w.IP_B)))
        await until(lambda: bench.world.count(Reason.ACCEPTED) == 1)
        bench.engine.stop()

    run(main)
    assert caplog.records == []


def test_a_device_that_is_gone_may_be_detached_while_it_pauses(bench):
    async def main():
        with Broken.end_of_file() as broken:
            bench.tables.interfaces["fd"][w.POD_A] = broken.fileno()
            bench.engine.on_failure = bench.engine.detach
            bench.attach(w.POD_A)
            await until(lambda: w.POD_A not in bench.engine._attached)
        ours = bench.plug(w.POD_A)
        bench.attach(w.POD_A)
        await asyncio.sleep(0.05)
        bench.send(w.POD_A, pod_frame(udp(w.IP_B)))
        await until(lambda: bench.world.count(Reason.ACCEPTED) == 1)
        bench.engine.stop()
        assert ours.fileno() >= 0

    run(main)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 7, ROWS, 10_000])
def test_one_readiness_is_one_burst(limit):
    bench = Bench(limit)
    count = 20

    async def main():
        bench.attach(w.POD_A)
        bench.send(w.POD_A, *[pod_frame(udp(w.IP_B))] * count)
        bench.engine._readable(w.POD_A)
        assert bench.world.count(Reason.ACCEPTED) == min(limit, count)
        await until(lambda: bench.world.count(Reason.ACCEPTED) == count)
        bench.engine.stop()

    run(main)
    assert len(bench.heard(w.POD_B)) == count
    bench.close()


def test_a_burst_of_pings_costs_the_slow_path_its_budget_and_no_more(bench):
    async def main():
        bench.attach(w.POD_A)
        count = 0
        with suppress(BlockingIOError):
            for _ in range(ROWS):
                bench.send(w.POD_A, pod_frame(ping(w.NODE)))
                count += 1
        await until(lambda: bench.world.count(Reason.LOCAL_DELIVERY) == count)
        bench.engine.stop()
        return count

    count = run(main)
    assert bench.slow.answered["answered"] + bench.world.count(Reason.OVERLOAD_SLOW_PATH) == count


class Echo(SlowPath):
    """A slow path that answers every packet with another for itself, for ever."""

    def handle(self, batch, count, now):
        return [Outgoing(bytes(12) + b"\x08\x00" + bytes(udp(w.NODE)))] * 3


def test_what_is_punted_again_and_again_comes_to_an_end():
    world = World()
    slow = Echo(world.tables.arrays, world.tables.routes, world.tables.neighbours)
    engine = Engine(world.tables, slow, clock=lambda: world.now)
    engine.inject([Outgoing(bytes(12) + b"\x08\x00" + bytes(udp(w.NODE)))])
    came, by_verdict = pipeline.balance(world.tables.counters)
    assert world.count(Reason.LOCAL_DELIVERY) == 1 + 3 + 3 + 3
    assert world.count(Reason.OVERLOAD_SLOW_PATH) == 3
    assert came == sum(by_verdict.values())


def test_more_frames_than_a_batch_has_rows_are_sent_in_turns():
    world = World()
    engine = Engine(world.tables, world.slow_path(), clock=lambda: world.now)
    frame = bytes(12) + b"\x08\x00" + bytes(udp(w.IP_B, src=w.NODE))
    engine.inject([Outgoing(frame)] * (2 * ROWS + 5))
    assert world.tables.interfaces["tx_packets"][w.POD_B] == 2 * ROWS + 5
    large = bytes(12) + b"\x08\x00" + bytes(udp(w.IP_B, src=w.NODE, size=20000))
    engine.inject([Outgoing(large)] * 40)
    assert world.count(Reason.ACCEPTED) == 2 * ROWS + 45
    assert world.balanced()


def test_a_released_datagram_leaves_in_pieces_as_large_as_it_came(bench):
    bench.tables.interfaces["driver"][w.POD_B] = Driver.MEMORY
    whole = bytes(12) + b"\x08\x00" + bytes(udp(w.IP_B, src=w.OUTSIDE, size=4000, flags="DF"))
    bench.engine.inject([Outgoing(whole, max_fragment=1020)])
    assert bench.world.count(Reason.ACCEPTED) == 1
    assert bench.tables.interfaces["tx_frames"][w.POD_B] == -(-4008 // 1000)


def test_an_injected_error_about_an_injected_packet_ends_at_the_node():
    """The reply to a ping whose source is unreachable: its error would be for ourselves."""
    world = World()
    world.route("10.244.1.0/24", Route(Kind.UNREACHABLE))
    engine = Engine(world.tables, world.slow_path(), clock=lambda: world.now)
    engine.inject([Outgoing(bytes(12) + b"\x08\x00" + bytes(udp(w.IP_FREE, src=w.NODE)))])
    assert world.count(Reason.ROUTE_UNREACHABLE) == 1
    assert world.count(Reason.LOCAL_NO_LISTENER) == 1
    assert world.balanced()


# --- time ------------------------------------------------------------------------------------------------------------


def test_ticks_age_what_waits(bench):
    seen: list[int] = []

    async def main():
        bench.engine.every_tick(seen.append)
        bench.engine.start()
        bench.attach(w.POD_A)
        pieces = fragments(udp(w.IP_B, size=3000), 1400)
        bench.send(w.POD_A, pod_frame(pieces[0]), pod_frame(udp(w.OUTSIDE)))
        await until(lambda: bench.slow.resolver.waiting == 1)
        for _ in range(3):
            bench.world.now += SECOND
            ticks = len(seen)
            await until(lambda ticks=ticks: len(seen) > ticks + 1)
        assert bench.world.count(Reason.NEIGH_UNRESOLVED) == 1
        bench.world.now += TIMEOUT_NS
        await until(lambda: bench.world.count(Reason.IP_FRAG_TIMEOUT) == 1)
        bench.engine.stop()
        ticks = len(seen)
        await asyncio.sleep(0.05)
        assert len(seen) == ticks

    run(main)
    (error,) = bench.heard(w.POD_A)
    assert error[34:36] == b"\x03\x01"


def test_drain_forwards_what_waits_in_the_devices(bench):
    async def main():
        bench.attach(w.POD_A, w.POD_B)
        bench.send(w.POD_A, pod_frame(udp(w.IP_B)))
        bench.engine.drain()
        bench.engine.stop()

    run(main)
    assert len(bench.heard(w.POD_B)) == 1


def test_a_detached_device_is_not_read(bench):
    async def main():
        bench.attach(w.POD_A)
        bench.engine.detach(w.POD_A)
        bench.engine.detach(w.POD_A)
        bench.send(w.POD_A, pod_frame(udp(w.IP_B)))
        await asyncio.sleep(0.02)

    run(main)
    assert bench.world.count(Reason.ACCEPTED) == 0


def test_injected_packets_are_marked(bench):
    bench.engine.inject([Outgoing(bytes(12) + b"\x08\x00" + bytes(udp(w.IP_B, src=w.NODE)))])
    assert bench.engine.batch.packets["flags"][0] & INJECTED


def test_the_budget_is_below_a_burst():
    assert 0 < BUDGET < ROWS
