"""The words of kernels, in whatever mode the tests run, and what the decorator promises."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core import config as numba_config

from dataplane import jit
from dataplane.jit import (
    copy,
    kernel,
    load8,
    load16,
    load16n,
    load32,
    load48,
    load64,
    store8,
    store16,
    store16n,
    store32,
    store48,
    store64,
)

SIZE = 24
BYTES = st.binary(min_size=SIZE, max_size=SIZE)
PLACES = st.integers(0, SIZE - 8)


@kernel
def load_all(data, at):
    return load8(data, at), load16(data, at), load32(data, at), load48(data, at), load64(data, at), load16n(data, at)


@kernel
def store_all(data, value):
    store8(data, 0, value)
    store16(data, 1, value)
    store32(data, 3, value)
    store48(data, 7, value)
    store64(data, 13, value)
    store16n(data, 21, value)


@kernel
def copy_within(data, to, start, length):
    copy(data, to, data, start, length)


@kernel
def load_one(data, at):
    return load32(data, at)


@given(BYTES, PLACES)
def test_loads_read_big_endian_words_at_any_alignment(content, at):
    data = np.frombuffer(content, np.uint8).copy()
    expected = [int.from_bytes(content[at : at + size]) for size in (1, 2, 4, 6, 8)]
    expected.append(int.from_bytes(content[at : at + 2], "little"))
    assert [int(word) for word in load_all(data, at)] == expected


@given(st.integers(0, 2**63 - 1))
def test_stores_keep_the_low_bits(value):
    data = np.full(SIZE, 0xA5, np.uint8)
    store_all(data, value)
    words = [(value % 2 ** (8 * size)).to_bytes(size) for size in (1, 2, 4, 6, 8)]
    assert data.tobytes() == b"".join(words) + (value % 2**16).to_bytes(2, "little") + b"\xa5"


@given(BYTES, st.integers(0, SIZE), st.integers(0, SIZE), st.integers(-2, SIZE))
def test_copy_moves_overlapping_bytes(content, to, start, length):
    length = min(length, SIZE - max(to, start))
    data = np.frombuffer(content, np.uint8).copy()
    copy_within(data, to, start, length)
    expected = bytearray(content)
    if length > 0:
        expected[to : to + length] = content[start : start + length]
    assert data.tobytes() == expected


def in_mode(mode: str, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "0", "NUMBA_DISABLE_JIT": "0"} | ({mode: "1"} if mode else {})
    program = textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("mode", ["NUMBA_BOUNDSCHECK", "NUMBA_DISABLE_JIT"])
def test_an_access_outside_the_array_is_an_index_error_where_it_is_checked(mode):
    script = """
        import numpy as np
        from dataplane.codecs import arp
        data = np.zeros(27, np.uint8)
        try:
            arp.target_ip(data, 0)
        except IndexError:
            print("caught")
    """
    done = in_mode(mode, script)
    assert done.stdout == "caught\n", done.stderr


def test_no_kernel_counts_references(tmp_path):
    """``_nrt=False`` is private to numba: if it stops working, this is where it shows."""
    script = f"""
        import os
        os.environ["XDG_CACHE_HOME"] = {str(tmp_path)!r}  # code from the cache cannot be inspected
        import numpy as np
        from dataplane import pipeline
        from dataplane.batch import COUNTER_COUNT, make_batch
        tables = (np.zeros(1, np.uint8), np.zeros(COUNTER_COUNT, np.uint64))
        pipeline.tally(make_batch().arrays, 0, tables, 1)
        ir = "".join(pipeline.tally.inspect_llvm().values())
        print("NRT_" in ir, len(ir) > 1000)
    """
    done = in_mode("", script)
    assert done.stdout == "False True\n", done.stderr


def test_an_allocation_does_not_compile(tmp_path):
    source = tmp_path / "allocating.py"
    source.write_text(
        "import numpy as np\n"
        "from dataplane.jit import kernel\n"
        "@kernel\n"
        "def allocate(count):\n"
        "    return np.zeros(count).sum()\n"
        "try:\n"
        "    allocate(3)\n"
        "except Exception as error:\n"
        "    print('refused')\n"
    )
    done = in_mode("", f"import runpy; runpy.run_path({str(source)!r})")
    assert done.stdout == "refused\n", done.stderr


def test_the_cache_is_named_by_what_kernels_are_made_of(tmp_path):
    for folder in ("codecs", "tables", "stages", "devices"):
        (tmp_path / folder).mkdir()
    for name in ("linking.py", "jit.py", "verdict.py", "batch.py", "pipeline.py"):
        (tmp_path / name).write_text("")
    before = jit.source_digest(tmp_path)
    (tmp_path / "cli.py").write_text("x = 1")
    assert jit.source_digest(tmp_path) == before
    (tmp_path / "codecs" / "ipv4.py").write_text("HEADER = 20")
    assert jit.source_digest(tmp_path) != before


def test_old_caches_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(numba_config, "CACHE_DIR", numba_config.CACHE_DIR, raising=False)
    for number in range(5):
        (tmp_path / f"old{number}").mkdir()
        os.utime(tmp_path / f"old{number}", (number, number))
    chosen = jit.use_cache(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {chosen.name, "old4", "old3"}
