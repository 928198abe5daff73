"""TCP windows as conntrack keeps them: what either side may send, learned from what the other has acknowledged.

After "Real Stateful TCP Packet Filtering in IP Filter" (van Rooij, 2000), with the kernel's additions. For each
direction a half of the flow (``tables.flow.TUPLE``) remembers, about the sender of that direction:

=============  =======================================================================================
``seq_end``    the end of what it has sent
``max_end``    the end of what it may send: the highest acknowledgment plus window it was given
``max_window`` the largest window it has offered
``max_ack``    the highest acknowledgment it has sent
``scale``      the shift of its windows
=============  =======================================================================================

A segment is inside when (I) it begins at or before the sender's ``max_end``, (II) it ends after what the receiver could
have acknowledged one window ago, (III) it acknowledges nothing that was not sent, and (IV) nothing too old.
Sequence numbers are 32 bits and compared on the circle (RFC 1982).
"""

from typing import Any

from dataplane.codecs import tcp
from dataplane.jit import kernel
from dataplane.tables.flow import REPLY, TcpState

# Flags of a half's ``window_flags``, with the kernel's values (IP_CT_TCP_FLAG_*).
SCALED = 0x01  # sent the window scale option
SACK = 0x02  # allows selective acknowledgments
CLOSE_INIT = 0x04  # was the first to close
LIBERAL = 0x08  # its window is not known: the flow was picked up in the middle
UNACKED = 0x10  # has sent data that is not acknowledged yet
ACK_SEEN = 0x20  # ``max_ack`` is valid

# What segment_kind() tells; the rows of the state table.
SYN, SYN_ACK, FIN, ACK, RST, NONE = range(6)

# What place() tells.
INSIDE, TOLERATED, OUTSIDE = range(3)

_MASK = 0xFFFF_FFFF
_HALF = 0x8000_0000
_ACK_SLACK = 66000  # the oldest acknowledgment that still counts: the largest unscaled window, and one segment


@kernel
def _word(column: int) -> int:
    """Widen a 32-bit column: the parameter is an int64, and sums of it are signed."""
    return int(column)


@kernel
def before(left: int, right: int) -> bool:
    """Tell whether a sequence number comes before another on the circle."""
    return (int(left) - int(right)) & _MASK >= _HALF


@kernel
def segment_kind(flags: int) -> int:
    """Return which row of the state table a segment with these flags uses."""
    if flags & tcp.RST:
        return RST
    if flags & tcp.SYN:
        return SYN_ACK if flags & tcp.ACK else SYN
    if flags & tcp.FIN:
        return FIN
    return ACK if flags & tcp.ACK else NONE


@kernel
def segment_end(data: Any, packet: Any) -> int:
    """Return the sequence number behind the segment; SYN and FIN take one each. A super-frame is one long segment."""
    l4, flags = int(packet["l4"]), int(packet["tcp_flags"])
    payload = int(packet["start"]) + int(packet["length"]) - l4 - tcp.header_length(data, l4)
    size = payload + (flags & tcp.FIN) + (flags >> 1 & 1)
    return (tcp.sequence(data, l4) + size) & _MASK


@kernel
def read_options(data: Any, packet: Any, half: Any) -> None:
    """Set scale and SACK of a half from the options of its SYN; a header without options changes nothing."""
    l4, end = int(packet["l4"]), int(packet["start"]) + int(packet["length"])
    if tcp.header_length(data, l4) == tcp.HEADER:
        return
    flags = int(half["window_flags"]) & LIBERAL
    scale = tcp.window_scale(data, l4, end)
    if scale >= 0:
        flags |= SCALED
    if tcp.sack_permitted(data, l4, end):
        flags |= SACK
    half["scale"] = max(scale, 0)
    half["window_flags"] = flags


@kernel
def begin_half(data: Any, packet: Any, sender: Any) -> None:
    """Start a direction from its SYN or SYN-ACK: nothing may follow until the other side has offered a window."""
    end, window = segment_end(data, packet), tcp.window(data, int(packet["l4"]))
    sender["seq_end"] = end
    sender["max_end"] = end
    sender["max_window"] = max(window, 1)
    read_options(data, packet, sender)


@kernel
def clear_half(half: Any) -> None:
    """Forget what is known about a sender."""
    half["seq_end"] = 0
    half["max_end"] = 0
    half["max_window"] = 0
    half["max_ack"] = 0
    half["scale"] = 0
    half["window_flags"] = 0


@kernel
def pick_up_half(data: Any, packet: Any, sender: Any) -> None:
    """Start a direction in the middle: the segment is right, and one window may follow it."""
    end = segment_end(data, packet)
    window = max(tcp.window(data, int(packet["l4"])) << int(sender["scale"]), 1)
    sender["seq_end"] = end
    sender["max_window"] = window & _MASK
    sender["max_end"] = (end + window) & _MASK


@kernel
def _acknowledged(data: Any, packet: Any, receiver: Any) -> int:
    """Return the end of what the segment acknowledges, selectively too if the receiver may be told so."""
    l4 = int(packet["l4"])
    if int(receiver["window_flags"]) & SACK:
        edge = tcp.sack_end(data, l4, int(packet["start"]) + int(packet["length"]))
        if edge >= 0:
            return edge
    return tcp.acknowledgment(data, l4)


@kernel
def _start(data: Any, packet: Any, tuples: Any, state: int, e: int) -> bool:
    """Start the sender's half with its first segment, or again with a newer SYN; tell whether that is all.

    A SYN that is no answer (simultaneous open) has nothing that could be compared with the other half.
    """
    sender, receiver = tuples[e], tuples[e ^ 1]
    syn, bare = int(packet["tcp_flags"]) & tcp.SYN != 0, int(packet["tcp_flags"]) & tcp.ACK == 0
    first = _word(sender["max_window"]) == 0
    if first and not syn:
        pick_up_half(data, packet, sender)
        acknowledged = _acknowledged(data, packet, receiver)
        if _word(receiver["max_window"]) == 0:
            receiver["seq_end"] = acknowledged
            receiver["max_end"] = acknowledged
        elif acknowledged == (_word(receiver["seq_end"]) + 1) & _MASK:
            receiver["seq_end"] = acknowledged  # the answer to a keepalive that nobody has seen
        return False
    opening = state in (TcpState.SYN_SENT, TcpState.SYN_RECV)
    again = syn and opening and before(sender["seq_end"], segment_end(data, packet))
    if not first and not again:
        return False
    begin_half(data, packet, sender)
    if e & 1 == REPLY and int(sender["window_flags"]) & int(receiver["window_flags"]) & SCALED == 0:
        sender["scale"] = 0  # both scale, or none (RFC 7323, 2.2)
        receiver["scale"] = 0
    return bare and (first or e & 1 == REPLY)


@kernel
def place(data: Any, packet: Any, tuples: Any, flow: Any, e: int) -> int:
    """Return where a segment lies, and update both halves when it is ``INSIDE``.

    Args:
        data: the arena.
        packet: its record.
        tuples: the halves of all flows; the sender's and the receiver's are updated.
        flow: what they share: ``state`` is read, ``last_*`` and ``retrans`` are updated by a pure ACK segment.
        e: 2 * row + direction.
    """
    if _start(data, packet, tuples, int(flow["state"]), e):
        return INSIDE
    sender, receiver = tuples[e], tuples[e ^ 1]
    l4, flags = int(packet["l4"]), int(packet["tcp_flags"])
    seq, end, ack = tcp.sequence(data, l4), segment_end(data, packet), tcp.acknowledgment(data, l4)
    sack = _acknowledged(data, packet, receiver)
    if flags & tcp.ACK == 0 or (flags & tcp.RST and ack == 0):  # some set ACK in a RST and acknowledge nothing
        ack = _word(receiver["seq_end"])
        sack = ack
    if flags & tcp.RST and seq == 0 and int(flow["state"]) == TcpState.SYN_SENT:
        seq = _word(sender["seq_end"])  # the answer to a SYN of somebody who has no sequence number
        end = seq
    where = _compare(sender, receiver, seq, end, sack)
    if where != INSIDE:
        return where
    raw = tcp.window(data, l4)
    window = raw if flags & tcp.SYN else raw << int(sender["scale"])  # a SYN's own is never scaled (RFC 7323, 2.2)
    _advance_sender(sender, end, (window + sack - ack) & _MASK)
    if flags & tcp.ACK and (int(sender["window_flags"]) & ACK_SEEN == 0 or before(sender["max_ack"], ack)):
        sender["max_ack"] = ack
        sender["window_flags"] |= ACK_SEEN
    _advance_receiver(sender, receiver, end, sack, window)
    if ack == _word(receiver["seq_end"]):
        receiver["window_flags"] &= ~UNACKED & 0xFF
    if segment_kind(flags) == ACK:
        _count_repeats(flow, e & 1, seq, ack, end, raw)
    return INSIDE


@kernel
def _compare(sender: Any, receiver: Any, seq: int, end: int, sack: int) -> int:
    """Check the four bounds. What is too old is ``TOLERATED``: a late retransmission must get its answer."""
    sent, offered = _word(receiver["seq_end"]), _word(receiver["max_window"])
    slack = max(_word(sender["max_window"]), _ACK_SLACK)
    fresh = offered == 0 or before(_word(sender["seq_end"]) - offered - 1, end)
    recent = before(sent - slack - 1, sack)
    known = before(sack, sent + 1)
    if not before(seq, _word(sender["max_end"]) + 1):
        beyond = (end - _word(sender["max_end"]) + 1) & _MASK
        if not (offered and fresh and recent and known and beyond <= offered):
            return OUTSIDE
        # Some stacks send more than the window allows. If the peer acknowledges it, that must not be OUTSIDE as well.
        sender["seq_end"] = end
        sender["window_flags"] |= UNACKED
        return TOLERATED
    if not known:
        return OUTSIDE
    return INSIDE if fresh and recent else TOLERATED


@kernel
def _advance_sender(sender: Any, end: int, window: int) -> None:
    if _word(sender["max_window"]) < window:
        sender["max_window"] = window
    if before(sender["seq_end"], end):
        sender["seq_end"] = end
        sender["window_flags"] |= UNACKED


@kernel
def _advance_receiver(sender: Any, receiver: Any, end: int, sack: int, window: int) -> None:
    """Let the receiver send one window beyond the acknowledgment; a closed window still allows a probe of one byte."""
    if _word(receiver["max_window"]) and before(sender["max_end"], end):
        beyond = (end - _word(sender["max_end"])) & _MASK
        receiver["max_window"] = (_word(receiver["max_window"]) + beyond) & _MASK
    if before(_word(receiver["max_end"]) - 1, sack + window):
        receiver["max_end"] = (sack + max(window, 1)) & _MASK


@kernel
def _count_repeats(flow: Any, direction: int, seq: int, ack: int, end: int, window: int) -> None:
    """Count how often the same segment came in a row: a side that repeats itself may have lost the other."""
    if (
        int(flow["last_direction"]) == direction
        and int(flow["last_seq"]) == seq
        and int(flow["last_ack"]) == ack
        and int(flow["last_end"]) == end
        and int(flow["last_window"]) == window
    ):
        flow["retrans"] = min(int(flow["retrans"]) + 1, 255)  # Linux's wraps, and begins to trust the side again
        return
    flow["last_direction"] = direction
    flow["last_seq"] = seq
    flow["last_ack"] = ack
    flow["last_end"] = end
    flow["last_window"] = window
    flow["retrans"] = 0
