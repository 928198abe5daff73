from dataplane.batch import ROWS, SMALL_SIZE, SUPERS, make_batch
from dataplane.devices.memory import Vnet, load, unload


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
