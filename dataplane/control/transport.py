"""What the clients of stores share below HTTP: sockets that notice a dead peer, and words for what the system says."""

import os
import socket
from typing import Any

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 3), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))  # a dead peer: 9 s


def keepalive_socket(address: tuple[Any, ...]) -> socket.socket:
    """Make a socket that notices by itself when the other end is gone without a word."""
    made = socket.socket(address[0], address[1], address[2])
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def os_text(error: OSError) -> str:
    """Say what failed; the numbers of a look-up of a name are not errno's."""
    if isinstance(error, socket.gaierror):
        return (error.strerror or str(error)).lower()
    return os.strerror(error.errno).lower() if error.errno else str(error)
