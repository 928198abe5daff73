"""Internet checksum of whole packets: 64, 1500 and 65536 bytes, all in the L2 cache."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import dpkt
import numpy as np

from bench.harness import Case, bind, compile_c
from dataplane.codecs.checksum import checksum
from dataplane.jit import Array, kernel

SIZES = {64: 2048, 1500: 86, 65536: 2}  # bytes: packets, about 128 KiB together


@kernel
def drive(data: Array, out: Array, size: int) -> None:
    """Compute the checksum of each of ``len(out)`` packets of ``size`` bytes."""
    for i in range(len(out)):
        out[i] = checksum(data, i * size, size, 0)


def in_dpkt(packets: list[bytes]) -> list[int]:
    """Compute them with dpkt, which sums with the standard library's array module."""
    return [dpkt.in_cksum(packet) for packet in packets]


def in_numpy(data: Array, out: Array, size: int) -> None:
    """Compute all of them in one sweep over the 16-bit words."""
    total = data.view(">u2").reshape(len(out), size // 2).sum(axis=1, dtype=np.int64)
    total = (total & 0xFFFF) + (total >> 16)
    out[:] = ((total & 0xFFFF) + (total >> 16)) ^ 0xFFFF


def cases(quick: bool) -> Iterator[Case]:
    """Yield one case per size."""
    twin = compile_c(Path(__file__).with_name("c").joinpath("checksum.c").read_text(), "checksum")
    for size, count in SIZES.items():
        data = np.frombuffer(np.random.default_rng(1).bytes(size * count), np.uint8).copy()
        packets = [data[i * size : (i + 1) * size].tobytes() for i in range(count)]
        out = np.zeros(count, np.uint16)
        calls: dict[str, Callable[[], object]] = {
            "C": bind(twin.drive_words, data, out, count, size),
            "C, RFC 1071": bind(twin.drive_rfc1071, data, out, count, size),
            "numpy": partial(in_numpy, data, out, size),
        }
        expected = in_dpkt(packets)
        ours: Callable[[], object] = partial(drive, data, out, size)
        for call in [ours, *calls.values()]:
            out[:] = 0
            call()
            assert out.tolist() == expected
        yield Case(
            group=f"checksum {size} bytes",
            what=f"checksum of one packet of {size} bytes",
            operations=count,
            ours=ours,
            references={**calls, "dpkt": partial(in_dpkt, packets)},
        )
