from pathlib import Path

import pytest

from dataplane.batch import ROWS, SMALL_SIZE, SUPERS, make_batch
from dataplane.codecs import pcapng
from dataplane.devices.device import DeviceError
from dataplane.devices.memory import load, unload
from dataplane.devices.pcap import PcapDevice


@pytest.fixture
def capture(tmp_path):
    def write(*frames: bytes, linktype: int = pcapng.LINKTYPE_ETHERNET) -> Path:
        blocks = [pcapng.section_header(), pcapng.interface_description("eth0", linktype)]
        blocks += [pcapng.enhanced_packet(0, 1_000_000_000 + k, frame) for k, frame in enumerate(frames)]
        path: Path = tmp_path / "in.pcapng"
        path.write_bytes(b"".join(blocks))
        return path

    return write


def read_all(device: PcapDevice) -> list[list[bytes]]:
    batch, bursts = make_batch(), []
    while count := device.recv(batch):
        assert set(batch.packets["iif"][:count].tolist()) == {device.index}
        bursts.append([unload(batch, row) for row in range(count)])
    return bursts


def test_a_capture_is_read_in_bursts(capture):
    frames = [bytes([k & 0xFF]) * 60 for k in range(ROWS + 10)]
    assert read_all(PcapDevice(3, capture(*frames))) == [frames[:ROWS], frames[ROWS:]]


def test_a_burst_ends_when_the_super_slots_are_used_up(capture):
    large = [b"l" * (SMALL_SIZE + 1)] * (SUPERS + 1)
    bursts = read_all(PcapDevice(3, capture(*large, b"s" * 60)))
    assert bursts == [large[:SUPERS], [large[0], b"s" * 60]]


def test_frames_that_no_device_could_give_are_left_out(capture):
    assert read_all(PcapDevice(3, capture(b"x" * 70000, b"s" * 60))) == [[b"s" * 60]]
    assert read_all(PcapDevice(3, capture(b"s" * 60, linktype=101))) == []


def test_what_is_sent_is_written_with_the_time_of_what_was_read(capture, tmp_path):
    source, target = capture(b"a" * 60, b"b" * 60), tmp_path / "out.pcapng"
    device, batch = PcapDevice(3, source, target), make_batch()
    assert device.recv(batch, limit=1) == 1
    assert device.send(batch, [0]) == 1
    load(batch, [b"c" * 70], 3)
    assert device.recv(batch) == 1
    assert device.send(batch, [0]) == 1
    device.close()
    device.close()
    written = list(pcapng.read(target.read_bytes()))
    assert [(each.time_ns, each.data) for each in written] == [(10**9, b"a" * 60), (10**9 + 1, b"b" * 60)]


def test_without_a_target_nothing_is_taken(capture):
    device, batch = PcapDevice(3, capture(b"a" * 60)), make_batch()
    device.recv(batch)
    assert device.send(batch, [0]) == 0
    assert device.fileno() == -1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DeviceError, match=r"none\.pcap: read the capture: No such file"):
        PcapDevice(1, tmp_path / "none.pcap")
    with pytest.raises(DeviceError, match="write the capture"):
        PcapDevice(1, None, tmp_path / "none" / "out.pcap")
