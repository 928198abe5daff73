"""How a kernel is compiled, and the words it is made of.

A *kernel* is a plain Python function over numpy arrays that numba compiles to machine code. This file holds everything
that knows numba: the one decorator, the cache directory, and loads and stores of big-endian words. Each word function
is ordinary Python (that is what runs under ``NUMBA_DISABLE_JIT=1`` and from the slow path); inside a kernel the
compiler replaces it by one unaligned machine instruction. With ``NUMBA_BOUNDSCHECK=1`` the instruction is preceded by
a check.

Three modes, one source: compiled (default), interpreted (``NUMBA_DISABLE_JIT=1``: coverage and the debugger see every
line) and bounds-checked (``NUMBA_BOUNDSCHECK=1``: an access outside an array raises IndexError).
"""

import ctypes
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core import config as numba_config
from numba.core import event as numba_event
from numba.extending import lower_builtin, type_callable

from dataplane import linking

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Function = TypeVar("Function", bound=Callable[..., Any])

INTERPRETED = bool(numba_config.DISABLE_JIT)
BOUNDSCHECK = bool(numba_config.BOUNDSCHECK)
MASK64 = 0xFFFF_FFFF_FFFF_FFFF
_CACHES_KEPT = 3
_PR_SET_PDEATHSIG = 1
_KERNEL_FOLDERS = ("codecs", "tables", "stages", "devices")
_KERNEL_FILES = ("linking.py", "jit.py", "verdict.py", "batch.py", "pipeline.py")


def kernel(function: Function) -> Function:
    """Compile ``function`` on its first call and keep the machine code on disk.

    ``_nrt=False`` leaves out numba's reference counting (a flow insert costs 56 ns instead of 132) and turns an
    allocation into a compile error. It is a private option of numba, so this is the only line that names it.

    ``forceinline``: a call passes every array of a tuple by value, seven words each, and the stages' tables are two
    dozen arrays. Where LLVM by itself had left a call in a stage's loop, the packet paid 10-100 ns for that; with all
    calls inlined the stages went from 194 to 45 ns per packet, and compile no slower.
    """
    if INTERPRETED:
        return function
    options = {"error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True, "forceinline": True, "nogil": True}
    compiled = numba.njit(pipeline_class=linking.Entry, **options)(function)
    _cache_from_first_use(compiled)
    _link_calls(compiled, lambda: numba.njit(pipeline_class=linking.Linked, **options)(function))
    return cast(Function, compiled)


def _cache_from_first_use(compiled: Any) -> None:
    """Look for the cache on disk when Python first calls a kernel: most are only ever called by others.

    400 kernels that each look for it when they are defined are a tenth of a warm start.
    """

    def compile_cached(signature: Any) -> Any:
        del compiled.compile
        compiled.enable_caching()
        return compiled.compile(signature)

    compiled.compile = compile_cached


def _link_calls(compiled: Any, make_linked: Callable[[], Any]) -> None:
    """Let kernels that call this one take its linked twin, and pass every integer but uint64 as int64.

    numba compiles a kernel again for each type that a caller happens to have at hand: the literal 0, a uint16 column,
    an int32. One version instead of up to ten takes a quarter of the first start's compilation away.
    """

    @cache
    def linked() -> Any:
        twin = make_linked()
        twin._insert = lambda *arguments: None  # it is never called from Python, and has nothing that could be
        return twin

    def widened(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        return linked().get_call_template(tuple(_widen(kind) for kind in arguments), keywords)

    compiled.get_call_template = widened
    compiled.get_overload = lambda signature: linked().get_overload(signature)


def _widen(kind: Any) -> Any:
    if isinstance(kind, types.Literal):
        kind = kind.literal_type
    return types.int64 if isinstance(kind, types.Integer) and kind != types.uint64 else kind


# --- the cache -------------------------------------------------------------------------------------------------------


def source_digest(root: Path) -> str:
    """Name the sources that kernels are made of, below the package ``root``.

    numba looks at the defining file only and would keep code whose helpers or constants have changed. A change of the
    control plane keeps the cache.
    """
    digest = hashlib.sha256(f"{sys.version} {numba.__version__} {np.__version__} {BOUNDSCHECK}".encode())
    files = [root / name for name in _KERNEL_FILES]
    for folder in _KERNEL_FOLDERS:
        files += sorted((root / folder).glob("*.py"))
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_home() -> Path:
    """Return the folder that holds one cache directory per state of the sources."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "dataplane", "kernels")


def use_cache(home: Path | None = None) -> Path:
    """Point numba at the directory for these sources; keep the newest few, delete the rest.

    Must run before the first kernel is defined: numba reads the setting when it decorates.
    """
    home = home or cache_home()
    chosen = home / source_digest(Path(__file__).parent)
    chosen.mkdir(parents=True, exist_ok=True)
    os.utime(chosen)
    stale = sorted(home.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[_CACHES_KEPT:]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    numba_config.CACHE_DIR = str(chosen)
    return chosen


def is_cold() -> bool:
    """Say whether the cache is empty: the first start with these sources."""
    return not INTERPRETED and next(Path(numba_config.CACHE_DIR).iterdir(), None) is None


@contextmanager
def compiled_beside(function: Callable[[], object]) -> Iterator[None]:
    """Run ``function``, which compiles kernels, in a child process while the body compiles others.

    The two meet in the cache. Compilation is single-threaded Python: with two cores this shortens the first start.
    """
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody waits for what an orphan compiles
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parent reports progress
        try:
            function()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.waitpid(child, 0)


class CompileProgress(numba_event.Listener):
    """Calls ``report(name, done)`` as each kernel is compiled; kernels loaded from the cache are silent."""

    def __init__(self, report: Callable[[str, int], None]) -> None:
        self.done = 0
        self._report = report

    def on_start(self, event: Any) -> None:
        """Name the kernel that is about to be compiled."""
        self._report(event.data["dispatcher"].py_func.__name__, self.done)

    def on_end(self, event: Any) -> None:
        """Count the kernel that has been compiled."""
        self.done += 1
        self._report(event.data["dispatcher"].py_func.__name__, self.done)

    def __enter__(self) -> "CompileProgress":
        numba_event.register("numba:compile", self)
        return self

    def __exit__(self, *_: object) -> None:
        numba_event.unregister("numba:compile", self)


def freeze(entry: Callable[..., Any]) -> None:
    """Forbid further compilation of a kernel: an unexpected type must fail, not stall packets for seconds."""
    if not INTERPRETED:
        entry.disable_compile()  # type: ignore[attr-defined]


# --- words -----------------------------------------------------------------------------------------------------------
# Loads give a signed 64-bit int (load64: unsigned), so that a difference of two loads is never a huge unsigned number.
# Stores keep the low bits of the value. ``at`` counts bytes from the start of ``data``, a 1-D uint8 array.


def load8(data: Any, at: int) -> int:
    """Return the byte at ``at``."""
    return int(data[at])


def load16(data: Any, at: int) -> int:
    """Return the big-endian 16-bit word at ``at``."""
    return int(data[at]) << 8 | int(data[at + 1])


def load32(data: Any, at: int) -> int:
    """Return the big-endian 32-bit word at ``at``."""
    return load16(data, at) << 16 | load16(data, at + 2)


def load48(data: Any, at: int) -> int:
    """Return the big-endian 48-bit word at ``at``: a MAC address."""
    return load16(data, at) << 32 | load32(data, at + 2)


def load64(data: Any, at: int) -> int:
    """Return the big-endian 64-bit word at ``at``: half an IPv6 address. Unsigned."""
    return load32(data, at) << 32 | load32(data, at + 4)


def load16n(data: Any, at: int) -> int:
    """Return the native-endian 16-bit word at ``at``: the kernel's virtio header is in host order."""
    return int(data[at]) | int(data[at + 1]) << 8


def store8(data: Any, at: int, value: int) -> None:
    """Write the low 8 bits of ``value``."""
    data[at] = int(value) & 0xFF


def store16(data: Any, at: int, value: int) -> None:
    """Write the low 16 bits of ``value``, big-endian."""
    data[at] = int(value) >> 8 & 0xFF
    data[at + 1] = int(value) & 0xFF


def store32(data: Any, at: int, value: int) -> None:
    """Write the low 32 bits of ``value``, big-endian."""
    store16(data, at, int(value) >> 16)
    store16(data, at + 2, value)


def store48(data: Any, at: int, value: int) -> None:
    """Write the low 48 bits of ``value``, big-endian."""
    store16(data, at, int(value) >> 32)
    store32(data, at + 2, value)


def store64(data: Any, at: int, value: int) -> None:
    """Write the low 64 bits of ``value``, big-endian."""
    store32(data, at, int(value) >> 32)
    store32(data, at + 4, value)


def store16n(data: Any, at: int, value: int) -> None:
    """Write the low 16 bits of ``value`` in host order."""
    data[at] = int(value) & 0xFF
    data[at + 1] = int(value) >> 8 & 0xFF


def copy(data: Any, to: int, source: Any, start: int, length: int) -> None:
    """Copy ``length`` bytes from ``source[start:]`` to ``data[to:]``; the two may overlap."""
    if length > 0:
        data[to : to + length] = source[start : start + length].copy()


def prefetch(array: Any, index: int) -> None:
    """Ask for the cache line of ``array[index]``; no effect but time. Any index is allowed."""


def address(array: Any, index: int) -> int:
    """Return the memory address of ``array[index]``. It keeps nothing alive: the caller owns the array."""
    return int(array.ctypes.data) + int(index) * int(array.strides[0])


# --- words, compiled -------------------------------------------------------------------------------------------------


_BYTES = ir.IntType(8).as_pointer()


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, size: Any, position: int = 0) -> Any:
    """Emit a byte pointer to ``array[index]`` for the arguments at ``position``, checked in bounds-checked mode.

    A pointer computed by ``getelementptr`` keeps its origin; one made of an integer has none, and LLVM then gives up
    vectorising: 64 KiB are summed in 0.46 us instead of 3.0.
    """
    kind = signature.args[position]
    array = context.make_array(kind)(context, builder, arguments[position])
    at = context.cast(builder, arguments[position + 1], signature.args[position + 1], types.intp)
    if BOUNDSCHECK and size is not None:
        count = cgutils.unpack_tuple(builder, array.shape, 1)[0]
        outside = builder.or_(
            builder.icmp_signed("<", at, ir.Constant(at.type, 0)),
            builder.icmp_signed(">", builder.add(at, size), count),
        )
        with builder.if_then(outside, likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("access outside the array",))
    base = builder.bitcast(array.data, _BYTES)
    if kind.layout == "C" and kind.dtype == types.uint8:
        return builder.gep(base, [at])
    stride = cgutils.unpack_tuple(builder, array.strides, 1)[0]
    return builder.gep(base, [builder.mul(at, stride)])


def _register_load(function: Callable[..., int], bits: int, swap: bool) -> None:
    result = types.uint64 if bits == 64 else types.int64

    @type_callable(function)
    def _(context: Any) -> Any:
        return lambda data, at: result if isinstance(data, types.Array) else None

    @lower_builtin(function, types.Array, types.Integer)
    def _(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _pointer(context, builder, signature, arguments, ir.Constant(ir.IntType(64), bits // 8))
        word = ir.IntType(bits)
        value = builder.load(builder.bitcast(at, word.as_pointer()), align=1)
        if swap and bits > 8:
            value = builder.bswap(value)
        return value if bits == 64 else builder.zext(value, ir.IntType(64))


def _register_store(function: Callable[..., None], bits: int, swap: bool) -> None:
    @type_callable(function)
    def _(context: Any) -> Any:
        return lambda data, at, value: types.void if isinstance(data, types.Array) else None

    @lower_builtin(function, types.Array, types.Integer, types.Integer)
    def _(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _pointer(context, builder, signature, arguments, ir.Constant(ir.IntType(64), bits // 8))
        word = ir.IntType(bits)
        value = context.cast(builder, arguments[2], signature.args[2], types.uint64)
        value = value if bits == 64 else builder.trunc(value, word)
        if swap and bits > 8:
            value = builder.bswap(value)
        builder.store(value, builder.bitcast(at, word.as_pointer()), align=1)
        return context.get_dummy_value()


def _register_load48() -> None:
    @type_callable(load48)
    def _(context: Any) -> Any:
        return lambda data, at: types.int64 if isinstance(data, types.Array) else None

    @lower_builtin(load48, types.Array, types.Integer)
    def _(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _pointer(context, builder, signature, arguments, ir.Constant(ir.IntType(64), 6))
        i16, i32, i64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
        high = builder.bswap(builder.load(builder.bitcast(at, i16.as_pointer()), align=1))
        rest = builder.gep(at, [ir.Constant(i64, 2)])
        low = builder.bswap(builder.load(builder.bitcast(rest, i32.as_pointer()), align=1))
        return builder.or_(builder.shl(builder.zext(high, i64), ir.Constant(i64, 32)), builder.zext(low, i64))


def _register_store48() -> None:
    @type_callable(store48)
    def _(context: Any) -> Any:
        return lambda data, at, value: types.void if isinstance(data, types.Array) else None

    @lower_builtin(store48, types.Array, types.Integer, types.Integer)
    def _(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _pointer(context, builder, signature, arguments, ir.Constant(ir.IntType(64), 6))
        i16, i32, i64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
        value = context.cast(builder, arguments[2], signature.args[2], types.uint64)
        high = builder.bswap(builder.trunc(builder.lshr(value, ir.Constant(i64, 32)), i16))
        low = builder.bswap(builder.trunc(value, i32))
        builder.store(high, builder.bitcast(at, i16.as_pointer()), align=1)
        rest = builder.gep(at, [ir.Constant(i64, 2)])
        builder.store(low, builder.bitcast(rest, i32.as_pointer()), align=1)
        return context.get_dummy_value()


def _register_memory() -> None:
    i8, i64 = ir.IntType(8), ir.IntType(64)

    @type_callable(copy)
    def _(context: Any) -> Any:
        return lambda data, to, source, start, length: types.void

    @lower_builtin(copy, types.Array, types.Integer, types.Array, types.Integer, types.Integer)
    def _(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        length = context.cast(builder, arguments[4], signature.args[4], types.intp)
        with builder.if_then(builder.icmp_signed(">", length, ir.Constant(i64, 0))):
            target = _pointer(context, builder, signature, arguments, length, 0)
            source = _pointer(context, builder, signature, arguments, length, 2)
            pointer = i8.as_pointer()
            move = builder.module.declare_intrinsic("llvm.memmove", [pointer, pointer, i64])
            builder.call(move, [target, source, length, ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    @type_callable(prefetch)
    def _(context: Any) -> Any:
        return lambda array, index: types.void if isinstance(array, types.Array) else None

    @lower_builtin(prefetch, types.Array, types.Integer)
    def _(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = _pointer(context, builder, signature, arguments, None)
        i32 = ir.IntType(32)
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [i8.as_pointer()], ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        )
        read, keep, as_data = ir.Constant(i32, 0), ir.Constant(i32, 3), ir.Constant(i32, 1)
        builder.call(fetch, [at, read, keep, as_data])
        return context.get_dummy_value()

    @type_callable(address)
    def _(context: Any) -> Any:
        return lambda array, index: types.int64 if isinstance(array, types.Array) else None

    @lower_builtin(address, types.Array, types.Integer)
    def _(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(_pointer(context, builder, signature, arguments, None), i64)


for _function, _bits, _swap in ((load8, 8, True), (load16, 16, True), (load32, 32, True), (load64, 64, True)):
    _register_load(_function, _bits, _swap)
_register_load(load16n, 16, False)
for _store, _bits, _swap in ((store8, 8, True), (store16, 16, True), (store32, 32, True), (store64, 64, True)):
    _register_store(_store, _bits, _swap)
_register_store(store16n, 16, False)
_register_load48()
_register_store48()
_register_memory()

if not INTERPRETED:
    use_cache()
