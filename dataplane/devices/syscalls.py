"""System calls for kernels.

A kernel may call a function of libc directly: no Python, no allocation, arguments are integers and raw addresses. What
is called here is declared once; in interpreted mode the same names are ctypes functions with the same arguments, so one
source runs in all three modes. An address keeps no array alive (P7): ``devices/io.py`` owns every buffer.

All of them return -1 for an error, whose number ``errno()`` gives, as long as nothing else is called in between.
"""

import ctypes
from typing import Any

from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from dataplane.jit import INTERPRETED

EINTR = 4
EIO = 5
EAGAIN = 11
EINVAL = 22
EMSGSIZE = 90
ENOBUFS = 105
MSG_DONTWAIT = 0x40

_int, _long, _pointer = types.int32, types.int64, types.intp
_DECLARED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "read": (_long, (_int, _pointer, _pointer)),
    "write": (_long, (_int, _pointer, _pointer)),
    "readv": (_long, (_int, _pointer, _int)),
    "writev": (_long, (_int, _pointer, _int)),
    "recvmmsg": (_int, (_int, _pointer, _int, _int, _pointer)),
    "sendmmsg": (_int, (_int, _pointer, _int, _int)),
}
_CTYPES: dict[Any, Any] = {_int: ctypes.c_int, _long: ctypes.c_ssize_t, _pointer: ctypes.c_ssize_t}


def require(name: str) -> None:
    """Raise ImportError if this process has no function ``name``: compiled code that calls it would crash."""
    if binding.address_of_symbol(name) is None:
        raise ImportError(f"libc has no function {name!r}")


def _function(name: str) -> Any:
    """Declare the libc function ``name`` for kernels or, interpreted, give its twin."""
    require(name)
    result, arguments = _DECLARED[name]
    if not INTERPRETED:
        return types.ExternalFunction(name, result(*arguments))
    twin: Any = ctypes.CDLL(None, use_errno=True)[name]
    twin.restype = _CTYPES[result]
    twin.argtypes = [_CTYPES[argument] for argument in arguments]
    return twin


binding.load_library_permanently("libc.so.6")  # where LLVM is to find them
read = _function("read")
write = _function("write")
readv = _function("readv")
writev = _function("writev")
recvmmsg = _function("recvmmsg")
sendmmsg = _function("sendmmsg")


def _errno_location(typing_context: Any) -> Any:
    """Emit a load of this thread's errno: libc keeps it behind a function."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(word.as_pointer(), [])
        locate = builder.module.globals.get("__errno_location")
        locate = locate or ir.Function(builder.module, kind, "__errno_location")
        return builder.sext(builder.load(builder.call(locate, [])), ir.IntType(64))

    return types.int64(), generate


require("__errno_location")
errno: Any = ctypes.get_errno if INTERPRETED else intrinsic(_errno_location)
