"""Which frames a packet socket takes: a classic BPF program (bpf(4)), run by the kernel before a frame is copied.

The uplink is shared with the host's own network stack, so only what may concern the pods is taken: ARP, and IP packets
to given prefixes. The program tests one prefix after the other, each with its own ``ret``, since a conditional jump
reaches no more than 255 instructions: some 2000 IPv4 prefixes fit.
"""

import ctypes
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

SO_ATTACH_FILTER = 26
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

_LOAD_HALF, _LOAD_WORD = 0x28, 0x20  # ldh [k], ld [k]
_AND, _JUMP, _JUMP_EQUAL, _RETURN = 0x54, 0x05, 0x15, 0x06
_WHOLE = 0x4_0000  # bytes to keep: any frame
_ETHERTYPE, _IPV4_DESTINATION, _IPV6_DESTINATION = 12, 30, 38
_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false (both relative to the next instruction), operand."""

NOTHING: tuple[Instruction, ...] = ((_RETURN, 0, 0, 0),)
"""A program that takes no frame."""


class FilterError(ValueError):
    """More prefixes than a program may have instructions for.

    Attributes:
        instructions: How many it would take.
    """

    def __init__(self, instructions: int) -> None:
        super().__init__(f"the uplink's filter would need {instructions} instructions; at most {MAX_INSTRUCTIONS}")
        self.instructions = instructions


def _match4(prefixes: list[IPv4Network]) -> list[Instruction]:
    """Return instructions that take a packet to one of the prefixes, and fall through if it is to none.

    Prefixes of one length share the load and the mask: what the kernel allows a program to weigh (net.core.optmem_max)
    is used up by loads first.
    """
    program: list[Instruction] = []
    for length in sorted({prefix.prefixlen for prefix in prefixes}, reverse=True):
        mask = 0xFFFF_FFFF << (32 - length) & 0xFFFF_FFFF
        program += [(_LOAD_WORD, 0, 0, _IPV4_DESTINATION), (_AND, 0, 0, mask)]
        for prefix in prefixes:
            if prefix.prefixlen == length:
                program += [(_JUMP_EQUAL, 0, 1, int(prefix.network_address)), (_RETURN, 0, 0, _WHOLE)]
    return program


def _match6(prefix: IPv6Network) -> list[Instruction]:
    """Return instructions that take a packet to the prefix, and fall through if it is not."""
    tests = []
    for k in range(4):
        mask, value = (int(each) >> 32 * (3 - k) & 0xFFFF_FFFF for each in (prefix.netmask, prefix.network_address))
        if mask:
            tests.append((_IPV6_DESTINATION + 4 * k, mask, value))
    program: list[Instruction] = []
    for k, (offset, mask, value) in enumerate(tests):
        left = 3 * (len(tests) - 1 - k) + 1  # instructions up to the end of this prefix
        program += [(_LOAD_WORD, 0, 0, offset), (_AND, 0, 0, mask), (_JUMP_EQUAL, 0, left, value)]
    return [*program, (_RETURN, 0, 0, _WHOLE)]


def prefix_filter(prefixes: Iterable[IPv4Network | IPv6Network]) -> tuple[Instruction, ...]:
    """Return a program that takes ARP and the IP packets whose destination is in one of ``prefixes``.

    Raises:
        FilterError: There are too many of them.
    """
    given = list(prefixes)
    four = _match4([prefix for prefix in given if isinstance(prefix, IPv4Network)])
    six = [each for prefix in given if isinstance(prefix, IPv6Network) for each in _match6(prefix)]
    program = (
        (_LOAD_HALF, 0, 0, _ETHERTYPE),
        (_JUMP_EQUAL, 4, 0, _ARP),
        (_JUMP_EQUAL, 1, 0, _IPV4),
        (_JUMP_EQUAL, 1, 3, _IPV6),
        (_JUMP, 0, 0, 3),
        (_JUMP, 0, 0, 3 + len(four)),
        (_RETURN, 0, 0, _WHOLE),
        (_RETURN, 0, 0, 0),
        *four,
        (_RETURN, 0, 0, 0),
        *six,
        (_RETURN, 0, 0, 0),
    )
    if len(program) > MAX_INSTRUCTIONS:
        raise FilterError(len(program))
    return program


def attach(sock: socket.socket, program: Iterable[Instruction]) -> None:
    """Let ``sock`` receive only what ``program`` takes; it replaces the program before it."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
