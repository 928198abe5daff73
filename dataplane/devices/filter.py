"""Which frames a packet socket takes: a classic BPF program (bpf(4)), run by the kernel before a frame is copied.

Only what may be ours is taken: ARP, and IP packets to given prefixes. The program tests one prefix after the other,
each with its own ``ret``, since a conditional jump reaches no more than 255 instructions: some 2000 IPv4 prefixes fit.

An address that we share with the host's own network stack is tested before them. Of what is sent to it we take TCP and
UDP to given ports (node ports, and those that we masquerade with), ICMP but for echo requests, which the host answers
itself, and later fragments, whose ports nobody knows yet.
"""

import ctypes
import socket
import struct
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network

SO_ATTACH_FILTER = 26
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD = 0x30, 0x28, 0x20  # ldb [k], ldh [k], ld [k]
_LOAD_HEADER = 0xB1  # ldxb 4*([k]&0xf): the length of the IPv4 header at k
_LOAD_BYTE_AFTER, _LOAD_HALF_AFTER = 0x50, 0x48  # ldb [x+k], ldh [x+k]
_AND, _JUMP, _RETURN = 0x54, 0x05, 0x06
_JUMP_EQUAL, _JUMP_MORE, _JUMP_NOT_LESS, _JUMP_BITS = 0x15, 0x25, 0x35, 0x45
_WHOLE = 0x4_0000  # bytes to keep: any frame
_TAKE = (_RETURN, 0, 0, _WHOLE)
_LEAVE = (_RETURN, 0, 0, 0)
_ETHERTYPE, _HEADER, _FRAGMENT, _PROTOCOL, _IPV4_DESTINATION, _IPV6_DESTINATION = 12, 14, 20, 23, 30, 38
_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_ICMP, _TCP, _UDP = 1, 6, 17
_ECHO_REQUEST = 8
_OFFSET_BITS = 0x1FFF

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false (both relative to the next instruction), operand."""

NOTHING: tuple[Instruction, ...] = (_LEAVE,)
"""A program that takes no frame."""


class FilterError(ValueError):
    """More prefixes than a program may have instructions for.

    Attributes:
        instructions: How many it would take.
    """

    def __init__(self, instructions: int) -> None:
        super().__init__(f"the uplink's filter would need {instructions} instructions; at most {MAX_INSTRUCTIONS}")
        self.instructions = instructions


def _match_shared(addresses: Sequence[IPv4Address], ports: Sequence[tuple[int, int]]) -> list[Instruction]:
    """Return instructions that decide about a packet to one of the addresses, and fall through if it is to none."""
    if not addresses:
        return []
    of_ports: list[Instruction] = [(_LOAD_HEADER, 0, 0, _HEADER), (_LOAD_HALF_AFTER, 0, 0, _HEADER + 2)]
    for first, last in ports:
        of_ports += [(_JUMP_NOT_LESS, 0, 2, first), (_JUMP_MORE, 1, 0, last), _TAKE]
    decision: list[Instruction] = [
        (_LOAD_HALF, 0, 0, _FRAGMENT),
        (_JUMP_BITS, 8, 0, _OFFSET_BITS),
        (_LOAD_BYTE, 0, 0, _PROTOCOL),
        (_JUMP_EQUAL, 7, 0, _TCP),
        (_JUMP_EQUAL, 6, 0, _UDP),
        (_JUMP_EQUAL, 0, 3, _ICMP),
        (_LOAD_HEADER, 0, 0, _HEADER),
        (_LOAD_BYTE_AFTER, 0, 0, _HEADER),
        (_JUMP_EQUAL, 0, 1, _ECHO_REQUEST),
        _LEAVE,
        _TAKE,
        *of_ports,
        _LEAVE,
    ]
    count = len(addresses)
    tests: list[Instruction] = [(_JUMP_EQUAL, count - k, 0, int(address)) for k, address in enumerate(addresses)]
    return [(_LOAD_WORD, 0, 0, _IPV4_DESTINATION), *tests, (_JUMP, 0, 0, len(decision)), *decision]


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
                program += [(_JUMP_EQUAL, 0, 1, int(prefix.network_address)), _TAKE]
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
    return [*program, _TAKE]


def prefix_filter(
    prefixes: Iterable[IPv4Network | IPv6Network],
    shared: Sequence[IPv4Address] = (),
    ports: Sequence[tuple[int, int]] = (),
) -> tuple[Instruction, ...]:
    """Return a program that takes ARP and the IP packets whose destination is in one of ``prefixes``.

    Args:
        prefixes: What is ours whoever else has it.
        shared: Addresses, at most 200, that are the host's too; it does not matter whether a prefix holds one.
        ports: Ranges, first and last, of the TCP and UDP ports that are ours at those addresses.

    Raises:
        FilterError: There are too many of them.
    """
    given = list(prefixes)
    four = _match4([prefix for prefix in given if isinstance(prefix, IPv4Network)])
    four = [*_match_shared(shared, ports), *four]
    six = [each for prefix in given if isinstance(prefix, IPv6Network) for each in _match6(prefix)]
    program = (
        (_LOAD_HALF, 0, 0, _ETHERTYPE),
        (_JUMP_EQUAL, 4, 0, _ARP),
        (_JUMP_EQUAL, 1, 0, _IPV4),
        (_JUMP_EQUAL, 1, 3, _IPV6),
        (_JUMP, 0, 0, 3),
        (_JUMP, 0, 0, 3 + len(four)),
        _TAKE,
        _LEAVE,
        *four,
        _LEAVE,
        *six,
        _LEAVE,
    )
    if len(program) > MAX_INSTRUCTIONS:
        raise FilterError(len(program))
    return program


def attach(sock: socket.socket, program: Iterable[Instruction]) -> None:
    """Let ``sock`` receive only what ``program`` takes; it replaces the program before it."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
