"""Rules of the kernel's packet filter, by the library that nft(8) is made of.

One `Nftables` is one netlink socket. A table with the ``owner`` flag (Linux 5.12) belongs to the socket that made it:
nobody else can change it, and it goes when the socket is closed, however the process ends. So nothing is left behind by
a process that was killed, and no journal is needed. All commands of one call are one transaction.

The library is loaded when it is first needed: 10 ms, and a system may not have it.
"""

import ctypes
import os
import socket
from ctypes import c_char_p, c_int, c_uint32, c_void_p

LIBRARY = "libnftables.so.1"
NETLINK_NETFILTER = 12


class NftablesError(Exception):
    """The library is missing, or the kernel refused."""


class Nftables:
    """A connection to the kernel's nf_tables in the namespace of the calling thread. Not for two threads at once.

    Raises:
        NftablesError: The library or the kernel's part is missing.
    """

    def __init__(self) -> None:
        try:
            # The library ends the process when this fails.
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER).close()
        except OSError as error:
            raise NftablesError(f"the kernel has no netfilter: {os.strerror(error.errno or 0)}") from error
        try:
            self._library = _load()
        except OSError as error:
            raise NftablesError(f"{LIBRARY} cannot be loaded (Debian: apt install nftables)") from error
        self._context: int | None = self._library.nft_ctx_new(0)
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> str:
        """Carry out commands in nft's language, all of them or none; return what they print.

        Raises:
            NftablesError: With the library's explanation.
        """
        failed = self._library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output = self._library.nft_ctx_get_output_buffer(self._context)
        error = self._library.nft_ctx_get_error_buffer(self._context)
        if failed:
            raise NftablesError(error.decode(errors="replace").strip() or "refused")
        return str(output.decode(errors="replace"))

    def close(self) -> None:
        """Close the socket, and with it every table that it owns; a second call does nothing."""
        if self._context is not None:
            self._library.nft_ctx_free(self._context)
            self._context = None


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "nft_ctx_new": (c_void_p, [c_uint32]),
        "nft_ctx_free": (None, [c_void_p]),
        "nft_ctx_buffer_output": (c_int, [c_void_p]),
        "nft_ctx_buffer_error": (c_int, [c_void_p]),
        "nft_ctx_get_output_buffer": (c_char_p, [c_void_p]),
        "nft_ctx_get_error_buffer": (c_char_p, [c_void_p]),
        "nft_run_cmd_from_buffer": (c_int, [c_void_p, c_char_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
