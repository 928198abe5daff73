"""defrag: make whole datagrams of IPv4 fragments (RFC 791 3.2, RFC 5722's rule on overlaps for both families).

Everything behind this stage (conntrack, services, NAT) sees whole datagrams only. A fragment's payload is copied to its
place in an assembly slot of the arena, and one bit per 8 bytes remembers what has come. When all is there, the row of
the last fragment is pointed at the slot: the datagram is never copied again, and transmit cuts it to the egress MTU,
into pieces no larger than the largest that came in.

Limits: 256 datagrams in reassembly, 64 of one source, 30 s each. Overlapping fragments drop the whole datagram; an
exact duplicate only itself, as in Linux.

A held fragment is STOLEN. If its datagram is given up later, it counts as injected and dropped, so sums always balance.

Steals: fragment.held. Drops: ip.frag-limit, ip.frag-overlap, ip.frag-timeout, ip.bad-hdr.
"""

from enum import IntEnum
from typing import Any

import numpy as np

from dataplane.batch import (
    ASSEMBLIES,
    ASSEMBLY,
    ASSEMBLY_BASE,
    COUNTERS,
    DONT_FRAGMENT,
    EMITTED,
    FRAGMENT,
    HEADROOM,
    INJECTED_TOTAL,
    IPV6,
    REASSEMBLED,
    SUPER_STRIDE,
)
from dataplane.codecs import checksum, ethernet
from dataplane.jit import MASK64, Array, copy, kernel, load8, load16, load32, store16
from dataplane.stages.parse import parse_transport
from dataplane.verdict import Reason, Verdict

TIMEOUT_NS = 30_000_000_000  # net.ipv4.ipfrag_time
PER_SOURCE = 64
WORDS = 128  # 8192 units of 8 bytes: the largest IPv4 payload
_PAYLOAD = HEADROOM + ethernet.HEADER + 60  # the payload's place, whatever the header's length will be
_MORE = 0x2000
_DONT = 0x4000


class Phase(IntEnum):
    """What an assembly slot is doing."""

    FREE = 0
    COLLECTING = 1
    EMITTED = 2  # its datagram is in the current burst; free when the next one begins


CONTEXT = np.dtype(
    {
        "names": [
            "src", "dst", "id", "protocol", "phase", "ecn", "has_first", "deadline", "total", "received", "pieces",
            "largest", "largest_df", "header",
        ],
        "formats": ["u4", "u4", "u4", "u1", "u1", "u1", "u1", "i8", "i4", "i4", "i4", "i4", "i4", "i4"],
        "offsets": [0, 4, 8, 12, 13, 14, 15, 16, 24, 28, 32, 36, 40, 44],
        "itemsize": 64,
    }
)  # fmt: skip
"""``total`` is the payload length, -1 until the last fragment has come; ``received`` counts its bytes; ``ecn`` has
a bit for each ECN codepoint seen; ``largest`` is the largest fragment's IP length, ``largest_df`` of those with DF."""


def make_assembly() -> tuple[Array, Array]:
    """Return the stage's table: ``(ASSEMBLIES,)`` of ``CONTEXT``, ``(ASSEMBLIES * WORDS,)`` uint64 of what has come."""
    return np.zeros(ASSEMBLIES, CONTEXT), np.zeros(ASSEMBLIES * WORDS, np.uint64)


@kernel
def defrag(batch: Any, count: int, tables: Any, now: int) -> None:
    """Hold the IPv4 fragments of rows [0, count); the row that completes a datagram becomes that datagram."""
    data, packets = batch
    for i in range(count):
        packet = packets[i]
        if packet["flags"] & (FRAGMENT | IPV6) != FRAGMENT or packet["verdict"] != Verdict.ACCEPT:
            continue
        why = _collect(data, packet, tables, now)
        packet["reason"] = why
        if why == Reason.FRAGMENT_HELD:
            packet["verdict"] = Verdict.STOLEN
        elif why != Reason.ACCEPTED:
            packet["verdict"] = Verdict.DROP


@kernel
def reclaim(tables: Any) -> None:
    """Free the slots whose datagrams left with the last burst; nearly always there are none, and nothing is scanned."""
    counters = tables[COUNTERS]
    if counters[EMITTED] == 0:
        return
    counters[EMITTED] = 0
    phase = tables[ASSEMBLY][0]["phase"]
    for slot in range(ASSEMBLIES):
        if phase[slot] == Phase.EMITTED:
            phase[slot] = Phase.FREE


@kernel
def expire(tables: Any, now: int) -> int:
    """Give up the datagrams that were not complete in time; return how many fragments that dropped."""
    contexts = tables[ASSEMBLY][0]
    dropped = 0
    for slot in range(ASSEMBLIES):
        if contexts["phase"][slot] == Phase.COLLECTING and int(contexts["deadline"][slot]) <= now:
            dropped += int(contexts["pieces"][slot])
            _give_up(tables, slot, Reason.IP_FRAG_TIMEOUT)
    return dropped


@kernel
def _give_up(tables: Any, slot: int, why: int) -> None:
    contexts, counters = tables[ASSEMBLY][0], tables[COUNTERS]
    pieces = int(contexts["pieces"][slot])
    counters[INJECTED_TOTAL] += pieces
    counters[why] += pieces
    contexts["phase"][slot] = Phase.FREE


@kernel
def _collect(data: Any, packet: Any, tables: Any, now: int) -> int:
    l3, l4 = int(packet["l3"]), int(packet["l4"])
    length = load16(data, l3 + 2) - (l4 - l3)
    word = int(packet["fragment"])
    offset = (word & 0x1FFF) * 8
    more = word & _MORE
    # Only the last fragment may have a length that is not a multiple of 8, and none may be empty (RFC 791).
    if length <= 0 or (more and length & 7) or offset + length > 65535 - (l4 - l3):
        return Reason.IP_BAD_HDR
    slot = _find(data, packet, tables, now)
    if slot < 0:
        return Reason.IP_FRAG_LIMIT
    contexts, units = tables[ASSEMBLY]
    overlap = _mark(units, slot, offset >> 3, (offset + length + 7) >> 3)
    if overlap == 2:
        # An exact duplicate says nothing new; it is held, and counted, with the rest.
        contexts["pieces"][slot] += 1
        return Reason.FRAGMENT_HELD
    ended = int(contexts["total"][slot])
    disagree = ended >= 0 and (offset + length > ended or not more)
    if overlap or disagree or (not more and _beyond(units, slot, offset + length)):
        _give_up(tables, slot, Reason.IP_FRAG_OVERLAP)
        return Reason.IP_FRAG_OVERLAP
    base = ASSEMBLY_BASE + slot * SUPER_STRIDE
    copy(data, base + _PAYLOAD + offset, data, l4, length)
    _note(data, packet, contexts, slot)
    contexts["received"][slot] += length
    if not more:
        contexts["total"][slot] = offset + length
    if contexts["has_first"][slot] and contexts["received"][slot] == contexts["total"][slot]:
        return _complete(data, packet, tables, slot)
    return Reason.FRAGMENT_HELD


@kernel
def _find(data: Any, packet: Any, tables: Any, now: int) -> int:
    """Return the slot that collects the packet's datagram, a new one if there is none, or -1 at the limits."""
    contexts, units = tables[ASSEMBLY]
    l3 = int(packet["l3"])
    src, dst, name = load32(data, l3 + 12), load32(data, l3 + 16), load16(data, l3 + 4)
    protocol = int(packet["protocol"])
    free, held = -1, 0
    for slot in range(ASSEMBLIES):
        if contexts["phase"][slot] != Phase.COLLECTING:
            if contexts["phase"][slot] == Phase.FREE and free < 0:
                free = slot
            continue
        if contexts["src"][slot] != src:
            continue
        held += 1
        if contexts["id"][slot] == name and contexts["dst"][slot] == dst and contexts["protocol"][slot] == protocol:
            if int(contexts["deadline"][slot]) > now:
                return slot
            _give_up(tables, slot, Reason.IP_FRAG_TIMEOUT)
            free = slot
            held -= 1
    if free < 0 or held >= PER_SOURCE:
        return -1
    entry = contexts[free]
    entry["src"], entry["dst"], entry["id"], entry["protocol"] = src, dst, name, protocol
    entry["phase"], entry["ecn"], entry["has_first"] = Phase.COLLECTING, 0, 0
    entry["deadline"], entry["total"] = now + TIMEOUT_NS, -1
    entry["received"], entry["pieces"], entry["largest"], entry["largest_df"], entry["header"] = 0, 0, 0, 0, 0
    for word in range(WORDS):
        units[free * WORDS + word] = 0
    return free


@kernel
def _unit_mask(word: int, first: int, last: int) -> Any:
    """Return the bits of units [first, last) that lie in ``word``; at least one does."""
    low, high = max(first - word * 64, 0), min(last - word * 64, 64)
    return np.uint64(MASK64) >> np.uint64(64 - (high - low)) << np.uint64(low)


@kernel
def _mark(units: Any, slot: int, first: int, last: int) -> int:
    """Mark units [first, last) as received; return 0 if all were new, 2 if all were there, 1 for anything between."""
    some, every = False, True
    for word in range(first >> 6, ((last - 1) >> 6) + 1):
        mask = _unit_mask(word, first, last)
        seen = units[slot * WORDS + word] & mask
        some = some or seen != 0
        every = every and seen == mask
    if some:
        return 2 if every else 1
    for word in range(first >> 6, ((last - 1) >> 6) + 1):
        units[slot * WORDS + word] |= _unit_mask(word, first, last)
    return 0


@kernel
def _beyond(units: Any, slot: int, end: int) -> bool:
    """Say whether something was received beyond payload byte ``end``, where this last fragment says it all ends."""
    first = (end + 7) >> 3
    found = np.uint64(0)
    for word in range(first >> 6, WORDS):
        found |= units[slot * WORDS + word] & _unit_mask(word, first, WORDS * 64)
    return bool(found)


@kernel
def _note(data: Any, packet: Any, contexts: Any, slot: int) -> None:
    """Remember what the whole datagram's header will need from this fragment."""
    l3, l4 = int(packet["l3"]), int(packet["l4"])
    word, size = int(packet["fragment"]), load16(data, l3 + 2)
    contexts["pieces"][slot] += 1
    contexts["ecn"][slot] = int(contexts["ecn"][slot]) | 1 << (load8(data, l3 + 1) & 3)
    if size > contexts["largest"][slot]:
        contexts["largest"][slot] = size
    if word & _DONT and size > contexts["largest_df"][slot]:
        contexts["largest_df"][slot] = size
    if word & 0x1FFF == 0:
        header = l4 - l3
        contexts["header"][slot] = header
        contexts["has_first"][slot] = 1
        copy(data, ASSEMBLY_BASE + slot * SUPER_STRIDE + _PAYLOAD - header, data, l3, header)


@kernel
def _complete(data: Any, packet: Any, tables: Any, slot: int) -> int:
    """Point row ``i`` at the whole datagram in its slot."""
    contexts = tables[ASSEMBLY][0]
    contexts["pieces"][slot] -= 1  # this last one goes on as the datagram
    header, total = int(contexts["header"][slot]), int(contexts["total"][slot])
    ecn = int(contexts["ecn"][slot])
    # RFC 3168 5.3: a mark on any piece marks the whole. Not-ECT beside anything else is nonsense, and Linux drops it.
    if header + total > 65535 or (ecn & 1 and ecn != 1):
        _give_up(tables, slot, Reason.IP_FRAG_OVERLAP)
        return Reason.IP_FRAG_OVERLAP
    base = ASSEMBLY_BASE + slot * SUPER_STRIDE
    l4 = base + _PAYLOAD
    l3 = l4 - header
    tos = load8(data, l3 + 1)
    if ecn & 0b1000:
        tos |= 3
    whole = int(contexts["largest_df"][slot]) == int(contexts["largest"][slot])
    store16(data, l3, load8(data, l3) << 8 | tos)
    store16(data, l3 + 2, header + total)
    store16(data, l3 + 6, _DONT if whole else 0)
    store16(data, l3 + 10, 0)
    store16(data, l3 + 10, checksum.checksum(data, l3, header, 0))
    start = l3 - ethernet.HEADER
    copy(data, start, data, packet["start"], ethernet.HEADER)
    contexts["phase"][slot] = Phase.EMITTED
    tables[COUNTERS][EMITTED] += 1
    packet["start"], packet["length"] = start, ethernet.HEADER + header + total
    packet["l3"], packet["l4"] = l3, l4
    packet["slot"], packet["size"] = base, SUPER_STRIDE
    packet["tos"], packet["ttl"], packet["fragment"] = tos, load8(data, l3 + 8), 0
    packet["max_fragment"] = int(contexts["largest"][slot]) & 0xFFFF
    flags = int(packet["flags"]) & ~(FRAGMENT | DONT_FRAGMENT) | REASSEMBLED | (DONT_FRAGMENT if whole else 0)
    packet["flags"] = flags & 0xFFFF
    packet["vnet_flags"] = 0
    packet["gso_type"] = 0
    parse_transport(data, packet, l4 + total)
    return Reason.ACCEPTED
