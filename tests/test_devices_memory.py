import select

import pytest

from dataplane.batch import ROWS, SMALL_SIZE, SUPERS, make_batch
from dataplane.devices.memory import Faults, MemoryDevice, Vnet, load, unload


def test_what_is_loaded_is_unloaded():
    batch = make_batch()
    frames = [b"a" * 60, b"b" * SMALL_SIZE, b"c" * (SMALL_SIZE + 1), b"d" * 65549]
    assert load(batch, frames, iif=3) == 4
    assert [unload(batch, row) for row in range(4)] == frames


def test_a_loaded_row_looks_like_a_received_one():
    batch = make_batch()
    batch.packets["mtu"] = 7
    batch.packets["verdict"] = 3
    load(batch, [b"x" * 60], iif=5, vnet=[Vnet(flags=1, csum_start=34, csum_offset=6)])
    record = batch.packets[0]
    assert (record["iif"], record["oif"], record["verdict"], record["mtu"]) == (5, 0, 0, 0)
    assert (record["flow"], record["route"], record["vtep"]) == (-1, -1, -1)
    assert (record["vnet_flags"], record["csum_start"], record["csum_offset"], record["gso_size"]) == (1, 34, 6, 0)
    assert record["slot"] <= record["start"]
    assert record["start"] + record["length"] <= record["slot"] + record["size"]


def test_loading_stops_when_rows_or_super_slots_are_used_up():
    batch = make_batch()
    assert load(batch, [b"x"] * (ROWS + 5), iif=1) == ROWS
    assert load(batch, [b"x" * 3000] * (SUPERS + 5), iif=1) == SUPERS


@pytest.fixture
def device():
    made = []

    def make(**faults):
        made.append(MemoryDevice(7, Faults(**faults), seed=4))
        return made[-1]

    yield make
    for each in made:
        each.close()


def arrived(device: MemoryDevice) -> list[bytes]:
    batch = make_batch()
    frames = []
    while count := device.recv(batch):
        assert set(batch.packets["iif"][:count].tolist()) == {7}
        frames += [unload(batch, row) for row in range(count)]
    return frames


FRAMES = [bytes([i]) * (60 + i) for i in range(200)]


def test_a_memory_device_is_readable_while_frames_wait(device):
    link = device()
    assert select.select([link.fileno()], [], [], 0)[0] == []
    link.inject([b"x" * 60] * (ROWS + 1))
    batch = make_batch()
    assert link.recv(batch) == ROWS
    assert select.select([link.fileno()], [], [], 0)[0] == [link.fileno()]
    assert link.recv(batch) == 1
    assert select.select([link.fileno()], [], [], 0)[0] == []
    assert link.recv(batch) == 0


def test_a_link_without_faults_keeps_every_frame_in_order(device):
    link = device()
    link.inject(FRAMES)
    assert arrived(link) == FRAMES


def test_what_is_sent_can_be_read_back(device):
    link, batch = device(), make_batch()
    load(batch, FRAMES, iif=1)
    assert link.send(batch, [3, 1]) == 2
    assert list(link.sent) == [FRAMES[3], FRAMES[1]]


def test_the_same_seed_gives_the_same_faults(device):
    faults = {"drop": 0.2, "corrupt": 0.2, "duplicate": 0.2, "reorder": 0.2}
    first, second = device(**faults), device(**faults)
    first.inject(FRAMES)
    second.inject(FRAMES)
    assert arrived(first) == arrived(second) != FRAMES


def test_each_fault_does_what_it_says(device):
    for faults in ("drop", "corrupt", "duplicate", "reorder"):
        link = device(**{faults: 0.3})
        link.inject(FRAMES)
        frames = arrived(link)
        kept = [frame for frame in frames if frame in FRAMES]
        if faults == "drop":
            assert len(frames) < 200
            assert kept == frames == [frame for frame in FRAMES if frame in frames]
        if faults == "corrupt":
            changed = [(a, b) for a, b in zip(frames, FRAMES, strict=True) if a != b]
            assert 0 < len(changed) < 200
            assert all((int.from_bytes(a) ^ int.from_bytes(b)).bit_count() == 1 for a, b in changed)
        if faults == "duplicate":
            assert len(frames) > 200
            assert list(dict.fromkeys(frames)) == FRAMES
        if faults == "reorder":
            assert frames != FRAMES
            assert sorted(frames) == sorted(FRAMES)
