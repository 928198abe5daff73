"""TCP connections as netfilter's conntrack and as ip_vs see them: two state machines that look on from the middle.

Conntrack's (``nf_conntrack_proto_tcp.c`` of Linux 6.x) decides which segments belong to a flow and how long it lives.
It sees what is sent, never what arrives. Where it and the two ends may disagree it lets a segment pass, remembers it
(``last_*``) and believes the answer: "ignored" (``IG``) in the table. What cannot belong to the flow is invalid
(``IV``); the kernel hands that on without translating it, and kube-proxy then drops it, as we do at once.

ip_vs's is simpler. It reads flags only, and decides what a backend's connection counts for.

Drops (by the stage that calls): ct.invalid-flags, ct.not-syn, ct.bad-rst, ct.window.
"""

from typing import Any

from dataplane.batch import FLOWS, SETTINGS, TCP_LIBERAL, TIMEOUTS
from dataplane.codecs import tcp
from dataplane.jit import kernel
from dataplane.stages import tcp_window as w
from dataplane.tables.flow import ASSURED, ORIGINAL, REPLY, SEEN_REPLY, Count, LbState, TcpState, Timeout
from dataplane.verdict import Reason

RESTART = -1  # follow(): the flow is over and the segment begins another; delete it and look the packet up again

_MAX_RETRANS = 3  # nf_conntrack_tcp_max_retrans
_SHORTEST_SHRUNK = 120_000_000_000  # ns; a timeout below that is not shortened for FINs that nobody believes

# Flags of ``last_flags``: SCALED and SACK of a SYN that was let pass, its scale in the bits between, and these.
_SCALE_SHIFT, _SCALE_BITS = 2, 0x3C
_CHALLENGE = 0x40  # an ACK may be the answer to that SYN (RFC 5961, 4)
_SIMULTANEOUS = 0x80  # both sides have sent a SYN

_INVALID, _IGNORE = 10, 11  # beside the states

# Columns: the state before. Rows: what arrived, in the order of tcp_window.segment_kind().
_CONNTRACK_COLUMNS = "NO SS SR ES FW CW LA TW CL S2"
_CONNTRACK = """
    original                         reply
    SS SS IG IG IG IG IG SS SS S2    IV S2 IV IV IV IV IV SS IV S2   syn
    IV IV SR IV IV IV IV IV IV SR    IV SR IG IG IG IG IG IG IG SR   syn ack
    IV IV FW FW LA LA LA TW CL IV    IV IV FW FW LA LA LA TW CL IV   fin
    ES IV ES ES CW CW TW TW CL IV    IV IG SR ES CW CW TW TW CL IG   ack
    IV CL CL CL CL CL CL CL CL CL    IV CL CL CL CL CL CL CL CL CL   rst
    IV IV IV IV IV IV IV IV IV IV    IV IV IV IV IV IV IV IV IV IV   none
"""
_LB_COLUMNS = "NO ES SS SR FW TW CL CW LA LI SA"
_LB = """
    from the client                     from the backend
    SR ES ES SR SR SR SR SR SR SR SR    SS ES SS SR SS SS SS SS SS LI SR   syn
    CL CW SS TW TW TW CL CW LA LI TW    TW FW SS TW FW TW CL TW LA LI TW   fin
    ES ES SS ES FW TW CL CW CL LI ES    ES ES SS ES FW TW CL CW LA ES ES   ack
    CL CL CL SR CL CL CL CL LA LI SR    CL CL SS CL CL TW CL CL CL CL CL   rst
"""
_LB_SYN, _LB_FIN, _LB_ACK, _LB_RST = range(4)
_LB_ACTIVE = 1 << LbState.ESTABLISHED | 1 << LbState.SYN_SENT | 1 << LbState.SYN_RECV | 1 << LbState.SYNACK


def pack(table: str, columns: str) -> tuple[int, ...]:
    """Return one integer per row of a table, four bits per column: a kernel has no other constant arrays.

    The rows of the left half (original) come first, then those of the right half (reply).
    """
    states = columns.split()
    codes = {name: code for code, name in enumerate(states)} | {"IV": _INVALID, "IG": _IGNORE}
    rows = [[codes[word] for word in line.split()[: 2 * len(states)]] for line in table.strip().splitlines()[1:]]
    halves = [row[: len(states)] for row in rows] + [row[len(states) :] for row in rows]
    return tuple(sum(code << 4 * column for column, code in enumerate(half)) for half in halves)


_CONNTRACK_ROWS = pack(_CONNTRACK, _CONNTRACK_COLUMNS)
_LB_ROWS = pack(_LB, _LB_COLUMNS)


@kernel
def transition(direction: int, kind: int, state: int) -> int:
    """Return the state that a segment of this kind leads to, or one of the table's two marks (10: IV, 11: IG)."""
    return _CONNTRACK_ROWS[6 * direction + kind] >> 4 * state & 15


@kernel
def is_malformed(data: Any, packet: Any) -> bool:
    """Tell whether the header is torn or carries flags that no segment has; PSH, ECE and CWR go with all."""
    l4 = int(packet["l4"])
    if l4 == 0 or not tcp.valid(data, l4, int(packet["start"]) + int(packet["length"])):
        return True
    flags = int(packet["tcp_flags"]) & (tcp.FIN | tcp.SYN | tcp.RST | tcp.ACK | tcp.URG)
    bare = flags & ~tcp.URG
    if bare in (tcp.SYN, tcp.ACK, tcp.FIN | tcp.ACK):
        return False
    return flags not in (tcp.SYN | tcp.ACK, tcp.RST, tcp.RST | tcp.ACK)


# --- the first segment -----------------------------------------------------------------------------------------------


@kernel
def may_begin(data: Any, packet: Any, loose: int) -> int:
    """Return ``ACCEPTED`` if a segment that belongs to no flow may begin one, or the reason to drop it.

    Args:
        data: the arena.
        packet: its record.
        loose: whether an ACK may: a connection that is older than this table.
    """
    if is_malformed(data, packet):
        return Reason.CT_INVALID_FLAGS
    state = transition(ORIGINAL, w.segment_kind(int(packet["tcp_flags"])), 0)
    if state == TcpState.SYN_SENT or (loose and state == TcpState.ESTABLISHED):
        return Reason.ACCEPTED
    return Reason.CT_NOT_SYN


@kernel
def begin(data: Any, packet: Any, tables: Any, row: int, now: int) -> None:
    """Fill in state, windows and timeout of a new flow from the segment that ``may_begin`` has let pass.

    The segment is done with: ``follow`` is for the next ones. The flow's record is as ``insert`` leaves it, zeroed.
    """
    tuples, flow, timeouts = tables[FLOWS][2], tables[FLOWS][3][row], tables[TIMEOUTS]
    sender, receiver = tuples[2 * row], tuples[2 * row + 1]
    if int(packet["tcp_flags"]) & tcp.SYN:
        flow["state"] = TcpState.SYN_SENT
        flow["last_index"] = w.SYN
        w.begin_half(data, packet, sender)
        receiver["max_end"] = max(tcp.window(data, int(packet["l4"])), 1)
        limit = timeouts[Timeout.RETRANS]
    else:
        flow["state"] = TcpState.ESTABLISHED
        flow["last_index"] = w.ACK
        w.pick_up_half(data, packet, sender)
        # Nobody knows the scale of its windows. Linux now checks the segment against a peer that it knows nothing of:
        # an acknowledgment within 66,000 of zero counts as the peer's number. That accident is not imitated.
        sender["window_flags"] = w.SACK | w.LIBERAL
        receiver["window_flags"] = w.SACK | w.LIBERAL
        limit = min(timeouts[Timeout.RETRANS], timeouts[Timeout.UNACK])
    flow["expires_ns"] = now + min(timeouts[Timeout.TCP + int(flow["state"])], limit)


# --- all others ------------------------------------------------------------------------------------------------------


@kernel
def follow(data: Any, packet: Any, tables: Any, e: int, now: int) -> int:
    """Move a flow on by a segment of it.

    Returns ``ACCEPTED``, the reason to drop the segment, or ``RESTART``. State, windows, ``expires_ns`` and the flags
    ``ASSURED`` and ``SEEN_REPLY`` are up to date afterwards. A flow that is over has ``expires_ns == now``: the segment
    still passes, and the next one must not find it.

    Args:
        data: the arena.
        packet: the segment's record; its length is the whole payload's, also in a super-frame.
        tables: FLOWS, SETTINGS and TIMEOUTS are used.
        e: 2 * row + direction.
        now: ns.
    """
    if is_malformed(data, packet):
        return Reason.CT_INVALID_FLAGS
    why = _step(data, packet, tables, e, now)
    if why == Reason.ACCEPTED and e & 1 == REPLY:
        tables[FLOWS][3][e >> 1]["status"] |= SEEN_REPLY
    return why


@kernel
def _step(data: Any, packet: Any, tables: Any, e: int, now: int) -> int:
    tuples, flow = tables[FLOWS][2], tables[FLOWS][3][e >> 1]
    kind, old = w.segment_kind(int(packet["tcp_flags"])), int(flow["state"])
    new = _next_state(data, packet, tuples, flow, e)
    if new == RESTART:
        return RESTART
    if new == _INVALID:
        return Reason.CT_NOT_SYN
    if new == _IGNORE:
        return Reason.ACCEPTED
    where, ruling = w.INSIDE, _CHECKED
    if kind == w.RST:
        ruling = _judge_reset(data, packet, tuples, flow, e)
        if ruling == _REFUSED:
            return Reason.CT_BAD_RST
        if ruling == _KEPT:
            new = old
    if ruling != _UNCHECKED:
        where = w.place(data, packet, tuples, flow, e)
    if where != w.INSIDE and not _is_liberal(tables, e):
        if where == w.TOLERATED:
            return Reason.ACCEPTED
        _doubt(tables, e, kind, now)
        return Reason.CT_WINDOW
    if old != new and new == TcpState.FIN_WAIT:
        tuples[e]["window_flags"] |= w.CLOSE_INIT
    flow["last_index"] = kind
    flow["last_direction"] = e & 1
    flow["state"] = new
    _refresh(tables, e >> 1, kind, old, now)
    return Reason.ACCEPTED


@kernel
def _next_state(data: Any, packet: Any, tuples: Any, flow: Any, e: int) -> int:
    """Return the state to which the segment leads if it is in the window, ``_INVALID``, ``_IGNORE`` or ``RESTART``."""
    direction, kind = e & 1, w.segment_kind(int(packet["tcp_flags"]))
    old = int(flow["state"])
    new = transition(direction, kind, old)
    reopens = new == TcpState.SYN_SENT and old >= TcpState.TIME_WAIT
    if reopens and _may_reopen(tuples, flow, e):
        return RESTART
    if reopens or new == _IGNORE:
        if kind == w.SYN_ACK and _answers_ignored_syn(data, packet, flow, direction):
            _believe_ignored_syn(tuples, flow, e)
            return TcpState.SYN_RECV
        _remember(data, packet, flow, direction)
        return _IGNORE
    if new == TcpState.TIME_WAIT and old == TcpState.LAST_ACK and _is_challenge(flow, direction, kind):
        flow["last_flags"] = int(flow["last_flags"]) & ~_CHALLENGE & 0xFF
        return _IGNORE
    if new == TcpState.SYN_SENT2:
        flow["last_flags"] = int(flow["last_flags"]) | _SIMULTANEOUS
    # What the table cannot tell: after a SYN from both sides, SYN_RECV needs one more ACK.
    if new == TcpState.SYN_RECV and direction == REPLY and kind == w.ACK and int(flow["last_flags"]) & _SIMULTANEOUS:
        return TcpState.ESTABLISHED
    return new


@kernel
def _may_reopen(tuples: Any, flow: Any, e: int) -> bool:
    """Tell whether a SYN after the end is a new connection: the old one was closed in order, or its sender reset it.

    In order means that either side has sent a FIN; Linux does not ask whether the SYN is from the one that did.
    """
    closed = (int(tuples[e]["window_flags"]) | int(tuples[e ^ 1]["window_flags"])) & w.CLOSE_INIT
    return closed != 0 or (int(flow["last_direction"]) == e & 1 and int(flow["last_index"]) == w.RST)


@kernel
def _answers_ignored_syn(data: Any, packet: Any, flow: Any, direction: int) -> bool:
    """Tell whether a SYN-ACK acknowledges the SYN that was let pass last: both ends know better than we do."""
    theirs = int(flow["last_index"]) == w.SYN and int(flow["last_direction"]) != direction
    return theirs and tcp.acknowledgment(data, int(packet["l4"])) == int(flow["last_end"])


@kernel
def _believe_ignored_syn(tuples: Any, flow: Any, e: int) -> None:
    """Take over what was remembered of that SYN; the SYN-ACK at hand then starts its own half."""
    peer, flags = tuples[e ^ 1], int(flow["last_flags"]) & ~_CHALLENGE
    flow["last_flags"] = flags & 0xFF
    peer["seq_end"] = flow["last_end"]
    peer["max_end"] = flow["last_end"]
    peer["max_window"] = max(int(flow["last_window"]), 1)
    peer["scale"] = (flags & _SCALE_BITS) >> _SCALE_SHIFT
    peer["window_flags"] = flags & (w.SCALED | w.SACK)
    w.clear_half(tuples[e])


@kernel
def _remember(data: Any, packet: Any, flow: Any, direction: int) -> None:
    """Keep what an ignored segment says, for the moment when its answer shows that it was right."""
    l4, end = int(packet["l4"]), int(packet["start"]) + int(packet["length"])
    kind = w.segment_kind(int(packet["tcp_flags"]))
    flow["last_index"] = kind
    flow["last_direction"] = direction
    flow["last_seq"] = tcp.sequence(data, l4)
    flow["last_end"] = w.segment_end(data, packet)
    flow["last_window"] = tcp.window(data, l4)
    if kind == w.SYN and direction == ORIGINAL:
        scale, flags = tcp.window_scale(data, l4, end), 0
        if scale >= 0:
            flags |= w.SCALED | scale << _SCALE_SHIFT
        if tcp.sack_permitted(data, l4, end):
            flags |= w.SACK
        if int(flow["state"]) == TcpState.LAST_ACK:
            flags |= _CHALLENGE
        flow["last_flags"] = flags
    if kind == w.ACK and direction == REPLY and int(flow["state"]) == TcpState.SYN_SENT:
        flow["last_ack"] = tcp.acknowledgment(data, l4)  # perhaps a challenge; its RST will be numbered so


@kernel
def _is_challenge(flow: Any, direction: int, kind: int) -> bool:
    """Tell whether an ACK in LAST_ACK answers the SYN that was let pass, and not the last FIN (RFC 5961, 4)."""
    after_syn = int(flow["last_index"]) == w.SYN and int(flow["last_direction"]) != direction
    return kind == w.ACK and after_syn and int(flow["last_flags"]) & _CHALLENGE != 0


# --- RST (RFC 5961, 3) -----------------------------------------------------------------------------------------------

_CHECKED, _UNCHECKED, _KEPT, _REFUSED = range(4)
_CLOSING = (
    1 << TcpState.FIN_WAIT
    | 1 << TcpState.CLOSE_WAIT
    | 1 << TcpState.LAST_ACK
    | 1 << TcpState.TIME_WAIT
    | 1 << TcpState.CLOSE
)


@kernel
def _judge_reset(data: Any, packet: Any, tuples: Any, flow: Any, e: int) -> int:
    """Return what a RST may do.

    ``_CHECKED``: close the flow if it is inside the window. ``_UNCHECKED``: close it. ``_KEPT``: pass, but the receiver
    will not believe it either, as it is not exactly at what it has acknowledged. ``_REFUSED``: it is older than that.
    """
    receiver, state = tuples[e ^ 1], int(flow["state"])
    if _CLOSING >> state & 1:
        return _UNCHECKED
    seq, ack = tcp.sequence(data, int(packet["l4"])), tcp.acknowledgment(data, int(packet["l4"]))
    last, same = int(flow["last_index"]), int(flow["last_direction"]) == e & 1
    assured = int(flow["status"]) & ASSURED != 0
    if int(receiver["window_flags"]) & w.ACK_SEEN and last != w.SYN:
        established = state == TcpState.ESTABLISHED and assured
        if seq == 0 and not established:
            return _CHECKED  # most likely the answer to a SYN that was let pass
        if w.before(seq, receiver["max_ack"]):
            return _REFUSED
        if not established or seq == int(receiver["max_ack"]):
            return _CHECKED
        continues = last == w.ACK and same and seq == int(flow["last_end"])
        return _CHECKED if continues else _KEPT
    # The answer to a SYN or ACK that was let pass may acknowledge what the windows do not know.
    after_syn = int(flow["status"]) & SEEN_REPLY and last == w.SYN and not same
    unknown = after_syn or (not assured and last == w.ACK)
    if unknown and ack == int(flow["last_end"]):
        return _UNCHECKED
    challenged = state == TcpState.SYN_SENT and last == w.ACK and int(flow["last_direction"]) == REPLY
    return _UNCHECKED if challenged and seq == int(flow["last_ack"]) else _CHECKED


# --- windows and timeouts --------------------------------------------------------------------------------------------


@kernel
def _is_liberal(tables: Any, e: int) -> bool:
    """Count a segment outside the window and tell whether it counts as inside all the same."""
    if int(tables[FLOWS][2][e]["window_flags"]) & w.LIBERAL:
        return True  # nothing to count: this flow's windows are a guess
    tables[FLOWS][5][Count.OUT_OF_WINDOW] += 1
    return int(tables[SETTINGS][TCP_LIBERAL]) != 0


@kernel
def _doubt(tables: Any, e: int, kind: int, now: int) -> None:
    """Shorten the life of a flow that both ends close by segments outside the window: it is we who are out of step."""
    flow, timeouts = tables[FLOWS][3][e >> 1], tables[TIMEOUTS]
    if not int(flow["status"]) & ASSURED or kind not in (w.FIN, w.RST):
        return
    last = int(flow["last_index"])
    if int(flow["last_direction"]) == e & 1 or last not in (w.FIN, w.RST):
        flow["last_index"] = kind
        flow["last_direction"] = e & 1
        return
    limit = now + timeouts[Timeout.UNACK]
    if flow["expires_ns"] >= now + _SHORTEST_SHRUNK and flow["expires_ns"] > limit:
        flow["expires_ns"] = limit


@kernel
def _timeout(tables: Any, row: int, kind: int) -> int:
    """Return how long a flow lives after an accepted segment, in ns."""
    tuples, flow, timeouts = tables[FLOWS][2], tables[FLOWS][3][row], tables[TIMEOUTS]
    usual, repeating = int(timeouts[Timeout.TCP + int(flow["state"])]), int(timeouts[Timeout.RETRANS])
    if int(flow["retrans"]) >= _MAX_RETRANS and usual > repeating:
        return repeating
    if kind == w.RST:
        return int(timeouts[Timeout.TCP + TcpState.CLOSE])
    flags = int(tuples[2 * row]["window_flags"]) | int(tuples[2 * row + 1]["window_flags"])
    if flags & w.UNACKED and usual > int(timeouts[Timeout.UNACK]):
        return int(timeouts[Timeout.UNACK])
    return min(usual, repeating) if int(flow["last_window"]) == 0 else usual


@kernel
def _refresh(tables: Any, row: int, kind: int, old: int, now: int) -> None:
    """Set the timeout after an accepted segment, and the flag of a connection that both sides have confirmed."""
    flow, timeouts = tables[FLOWS][3][row], tables[TIMEOUTS]
    status, new, timeout = int(flow["status"]), int(flow["state"]), _timeout(tables, row, kind)
    if not status & SEEN_REPLY:
        if kind == w.RST:
            timeout = 0
        elif kind == w.SYN and old == TcpState.SYN_SENT:
            return  # a client that keeps trying would keep the flow, and its backend, for ever
        elif new == TcpState.ESTABLISHED:
            timeout = min(timeout, int(timeouts[Timeout.UNACK]))
    elif new == TcpState.ESTABLISHED and old in (TcpState.SYN_RECV, TcpState.ESTABLISHED):
        flow["status"] = status | ASSURED
    flow["expires_ns"] = now + timeout


# --- ip_vs -----------------------------------------------------------------------------------------------------------


@kernel
def lb_follow(packet: Any, flow: Any, direction: int) -> int:
    """Return the ``LbState`` that ip_vs would give a connection after this segment; the caller stores and counts it."""
    flags = int(packet["tcp_flags"])
    if flags & tcp.RST:
        row = _LB_RST
    elif flags & tcp.SYN:
        row = _LB_SYN
    elif flags & tcp.FIN:
        row = _LB_FIN
    elif flags & tcp.ACK:
        row = _LB_ACK
    else:
        return LbState.CLOSE
    return _LB_ROWS[4 * direction + row] >> 4 * int(flow["lb_state"]) & 15


@kernel
def is_lb_active(state: int) -> bool:
    """Tell whether a connection in this ``LbState`` counts as an active one of its backend."""
    return _LB_ACTIVE >> state & 1 != 0
