"""Source ports for masquerading: which one a new flow leaves with (netfilter's choice, B11).

A port is free when the reply would be unmistakable: no flow has the tuple (remote address and port, our address, this
port). So one port serves as many flows as there are destinations, and nothing is kept here: the flow table itself tells
what is in use. The order is that of ``get_unique_tuple`` in Linux's ``nf_nat_core.c``:

1. Another flow of the same source (address and port) has a mapping to the same address: use its port, if free. A host
   that talks to many peers from one socket is one endpoint to all of them (RFC 4787 4.1).
2. Keep the source's own port, if it is allowed and free.
3. Search: from a random port on, at most ``ATTEMPTS`` in a row; then half as many from another random port, and so on
   down to ``LEAST``. That bounds the search at 248 lookups, whatever the table holds; a burst is not held up by a
   destination that has taken nearly all ports.

A flow that asks for a random port (iptables ``--random-fully``) begins with the search. The search stays in the port's
class, as hosts expect privileged ports from privileged processes (RFC 4787 4.2.2); ``low`` and ``high`` replace the
classes. The randomness is the flow table's keyed hash of the tuple and the number of flows so far: nobody can predict
it, and a replay repeats it.
"""

from typing import Any

from dataplane.jit import kernel
from dataplane.tables.flow import MISS, ORIGINAL, REPLY, Count, find, find_source, hash_tuple
from dataplane.tables.hash import hash3

ATTEMPTS = 128
LEAST = 16

_ICMP = 1
_TCP = 6
_UDP = 17
_ICMPV6 = 58


@kernel
def allocate(arrays: Any, low: int, high: int, avoid: int, random: bool) -> bool:
    """Choose the port that a new flow's replies come to, and write it into ``dport`` of ``scratch[1]``.

    Args:
        arrays: ``FlowTable.arrays``. ``scratch[0]`` is the flow's original tuple. ``scratch[1]`` is its reply tuple:
            where the packets go to as source, the address to masquerade with as destination; its ``sport`` and
            ``protocol`` are those of the packets, its ``dport`` is chosen here.
        low: The first port that may be chosen, with ``high``, the last; 0: what the port's class allows. ICMP
            identifiers and protocols without ports have no range.
        high: See ``low``.
        avoid: The VXLAN port: replies to it over UDP would be taken for the tunnel's.
        random: Whether to choose any port rather than keep the source's.

    Returns:
        Whether there is a free one. If not, ``dport`` means nothing.
    """
    original, reply = arrays[6][ORIGINAL], arrays[6][REPLY]
    protocol, own = int(original["protocol"]), int(original["sport"])
    numbered = protocol in (_TCP, _UDP, _ICMP, _ICMPV6)
    reply["dport"] = own
    if not numbered:
        return bool(find(arrays, reply) == MISS)
    ranged = low > 0 and protocol in (_TCP, _UDP)
    if protocol != _UDP:
        avoid = -1
    first, last = (low, max(low, high)) if ranged else _class_of(protocol, own)
    if not random:
        allowed_first, allowed_last = (first, last) if ranged else (0, 0xFFFF)
        if _keep(arrays, allowed_first, allowed_last, avoid):
            return True
    return _search(arrays, first, last, avoid)


@kernel
def _class_of(protocol: int, port: int) -> tuple[int, int]:
    """Return the first and last port of the class that a search stays in."""
    if protocol in (_ICMP, _ICMPV6):
        return 0, 0xFFFF
    if port < 512:
        return 1, 511
    return (600, 1023) if port < 1024 else (1024, 0xFFFF)


@kernel
def _is_free(arrays: Any, port: int) -> bool:
    """Try a port; it stays in the reply tuple if no flow has that."""
    reply = arrays[6][REPLY]
    reply["dport"] = port
    return bool(find(arrays, reply) == MISS)


@kernel
def _keep(arrays: Any, first: int, last: int, avoid: int) -> bool:
    """Take the port that the source already has: from another flow of its, or its own."""
    tuples, original, reply = arrays[2], arrays[6][ORIGINAL], arrays[6][REPLY]
    own = int(original["sport"])
    own_allowed = first <= own <= last and own != avoid
    same_address = original["src_lo"] == reply["dst_lo"] and original["src_hi"] == reply["dst_hi"]
    # What needs no translation at all is not translated, whatever another flow had to take.
    if not (same_address and own_allowed):
        row = find_source(arrays, original)
        if row >= 0:
            mapping = tuples[2 * row + 1]
            port = int(mapping["dport"])
            reaches = mapping["dst_lo"] == reply["dst_lo"] and mapping["dst_hi"] == reply["dst_hi"]
            if reaches and first <= port <= last and port != avoid and _is_free(arrays, port):
                return True
    return own_allowed and _is_free(arrays, own)


@kernel
def _search(arrays: Any, first: int, last: int, avoid: int) -> bool:
    size = last - first + 1
    attempts = min(size, ATTEMPTS)
    word, nonce = hash_tuple(arrays, arrays[6][ORIGINAL]), int(arrays[5][Count.INSERT])
    step = 0
    while True:
        offset = int(hash3(word, nonce, step, arrays[1]) & 0xFFFF)
        for i in range(attempts):
            port = first + (offset + i) % size
            if port != avoid and _is_free(arrays, port):
                return True
        if attempts >= size or attempts < LEAST:
            return False
        attempts >>= 1
        step += 1
