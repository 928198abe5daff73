"""Conntrack's TCP machine in plain Python, written from its description: the oracle of the kernels' tests.

It knows one pair of ports. Numbers are Python's, sets of words stand for bits, and every check of a segment is a line.
"""

from dataclasses import dataclass, field

from tests.tcp_segments import STATES, WORD, Entry, Segment, Settings, Step

NAMES = ["NO", "SS", "SR", "ES", "FW", "CW", "LA", "TW", "CL", "S2"]
TABLE = """
ORIG  syn    SS SS IG IG IG IG IG SS SS S2     REPLY syn    IV S2 IV IV IV IV IV SS IV S2
      synack IV IV SR IV IV IV IV IV IV SR           synack IV SR IG IG IG IG IG IG IG SR
      fin    IV IV FW FW LA LA LA TW CL IV           fin    IV IV FW FW LA LA LA TW CL IV
      ack    ES IV ES ES CW CW TW TW CL IV           ack    IV IG SR ES CW CW TW TW CL IG
      rst    IV CL CL CL CL CL CL CL CL CL           rst    IV CL CL CL CL CL CL CL CL CL
"""
BITS = {"scale": 1, "sack": 2, "first to close": 4, "liberal": 8, "unacknowledged": 16, "acknowledges": 32}
FLAGS = ["S", "SU", "SA", "R", "RA", "FA", "FAU", "A", "AU"]


def read_table() -> dict[tuple[int, str, str], str]:
    """Return the next state by direction, kind of segment and state."""
    found: dict[tuple[int, str, str], str] = {}
    for line in TABLE.strip().splitlines():
        words = [word for word in line.split() if word not in ("ORIG", "REPLY")]
        for direction in (0, 1):
            kind, *row = words[11 * direction : 11 * direction + 11]
            found |= {(direction, kind, before): after for before, after in zip(NAMES, row, strict=True)}
    return found


NEXT = read_table()


def distance(left: int, right: int) -> int:
    """How far a sequence number lies behind another: negative if it comes before."""
    return (left - right + WORD // 2) % WORD - WORD // 2


def kind_of(segment: Segment) -> str:
    if "R" in segment.flags:
        return "rst"
    if "S" in segment.flags:
        return "synack" if "A" in segment.flags else "syn"
    return "fin" if "F" in segment.flags else "ack"


def is_valid(segment: Segment) -> bool:
    if segment.torn or segment.offset is not None:
        return False
    meaning = {letter for letter in segment.flags if letter not in "PEC"}
    return meaning in [set(allowed) for allowed in FLAGS]


@dataclass
class Side:
    """What is known of the sender of one direction."""

    end: int = 0
    limit: int = 0  # it may send up to here
    window: int = 0  # the largest it has offered; 0: it was never seen
    acked: int = 0
    scale: int = 0
    marks: set[str] = field(default_factory=set)

    def learn(self, segment: Segment) -> None:
        """Begin with a SYN."""
        self.end = self.limit = segment.end
        self.window = max(segment.window, 1)
        if segment.options:
            self.scale = min(segment.scale or 0, 14)
            self.marks &= {"liberal"}
            self.marks |= {"scale"} if segment.scale is not None else set()
            self.marks |= {"sack"} if segment.sack_permitted else set()


@dataclass
class Last:
    """The last segment, as far as it was kept."""

    kind: str = ""
    direction: int = 0
    seq: int = 0
    ack: int = 0
    end: int = 0
    window: int = 0
    scale: int = 0
    marks: set[str] = field(default_factory=set)


@dataclass
class Flow:
    """One connection; sides by direction."""

    originator: int
    state: str = "NO"
    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    last: Last = field(default_factory=Last)
    repeats: int = 0
    replied: bool = False
    assured: bool = False
    expires: int = 0

    def established(self) -> bool:
        return self.state == "ES" and self.assured


class Naive:
    """A tracker (``tests.tcp_segments.Tracker``)."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.flow: Flow | None = None

    def configure(self, settings: Settings) -> None:
        self.settings = settings

    def timeout(self, state: str) -> int:
        return self.settings.timeouts[STATES[NAMES.index(state)].lower()]

    def send(self, segment: Segment, now: int) -> Step:
        if self.flow and self.flow.expires <= now:
            self.flow = None
        verdict = self._judge(segment, now)
        if verdict == "again":
            self.flow = None
            verdict = self._judge(segment, now)
        if self.flow and verdict == "pass" and segment.side != self.flow.originator:
            self.flow.replied = True
        if self.flow and self.flow.expires <= now:
            self.flow = None
        return Step(verdict == "pass", self._entry(now))

    def _entry(self, now: int) -> Entry | None:
        flow = self.flow
        if flow is None:
            return None
        one, two = flow.sides
        bits = [sum(BITS[mark] for mark in side.marks) for side in flow.sides]
        state = STATES[NAMES.index(flow.state)]
        left = flow.expires - now
        return Entry(
            flow.originator, state, left, flow.replied, flow.assured, (bits[0], bits[1]), (one.scale, two.scale)
        )

    def _judge(self, segment: Segment, now: int) -> str:
        if not is_valid(segment):
            return "drop"
        if self.flow:
            return self._follow(self.flow, segment, now)
        state = NEXT[0, kind_of(segment), "NO"]
        if state == "IV" or (state == "ES" and not self.settings.loose):
            return "drop"
        self.flow = self._begin(segment, state, now)
        return "pass"

    def _begin(self, segment: Segment, state: str, now: int) -> Flow:
        flow = Flow(segment.side, state, last=Last(kind_of(segment)))
        one, two = flow.sides
        limits = [self.timeout(state), self.settings.timeouts["max_retrans"]]
        if state == "SS":
            one.learn(segment)
            two.limit = max(segment.window, 1)
        else:
            one.end, one.window = segment.end, max(segment.window, 1)
            one.limit = (one.end + one.window) % WORD
            for side in flow.sides:
                side.marks = {"sack", "liberal"}
            limits.append(self.settings.timeouts["unacknowledged"])
        flow.expires = now + min(limits)
        return flow

    def _follow(self, flow: Flow, segment: Segment, now: int) -> str:
        direction, kind, last = segment.side ^ flow.originator, kind_of(segment), flow.last
        mine, theirs = flow.sides[direction], flow.sides[1 - direction]
        old = flow.state
        new = NEXT[direction, kind, old]
        if new == "SS" and old in ("TW", "CL"):
            if "first to close" in mine.marks | theirs.marks or (last.direction == direction and last.kind == "rst"):
                return "again"
            new = "IG"
        if new == "IV":
            return "drop"
        if new == "IG":
            believed = kind == "synack" and last.kind == "syn" and last.direction != direction
            if not believed or segment.ack != last.end:
                self._remember(flow, segment, direction, kind)
                return "pass"
            theirs.end = theirs.limit = last.end
            theirs.window, theirs.scale = max(last.window, 1), last.scale
            last.marks -= {"challenge"}
            theirs.marks = last.marks & {"scale", "sack"}
            mine.__init__()  # type: ignore[misc]
            new = "SR"
        challenge = last.kind == "syn" and last.direction != direction and "challenge" in last.marks
        if new == "TW" and old == "LA" and kind == "ack" and challenge:
            last.marks -= {"challenge"}
            return "pass"
        if new == "S2":
            last.marks |= {"simultaneous"}
        if new == "SR" and direction == 1 and kind == "ack" and "simultaneous" in last.marks:
            new = "ES"
        look = True
        if kind == "rst":
            ruling = self._reset(flow, segment, direction)
            if ruling == "bad":
                return "drop"
            look = ruling != "unseen"
            new = old if ruling == "keep" else new
        if look:
            where = self._window(flow, segment, direction)
            if where != "in" and not (self.settings.liberal or "liberal" in mine.marks):
                if where == "out":
                    self._doubt(flow, direction, kind, now)
                return "drop" if where == "out" else "pass"
        if new == "FW" and old != "FW":
            mine.marks |= {"first to close"}
        flow.state, last.kind, last.direction = new, kind, direction
        self._refresh(flow, kind, old, now)
        return "pass"

    @staticmethod
    def _remember(flow: Flow, segment: Segment, direction: int, kind: str) -> None:
        last = flow.last
        last.kind, last.direction = kind, direction
        last.seq, last.end, last.window = segment.seq, segment.end, segment.window
        if kind == "syn" and direction == 0:
            last.scale = min(segment.scale or 0, 14)
            last.marks = {"scale"} if segment.scale is not None else set()
            last.marks |= {"sack"} if segment.sack_permitted else set()
            last.marks |= {"challenge"} if flow.state == "LA" else set()
        if kind == "ack" and direction == 1 and flow.state == "SS":
            last.ack = segment.ack

    @staticmethod
    def _reset(flow: Flow, segment: Segment, direction: int) -> str:
        peer, last = flow.sides[1 - direction], flow.last
        if flow.state in ("FW", "CW", "LA", "TW", "CL"):
            return "unseen"
        if "acknowledges" in peer.marks and last.kind != "syn":
            if segment.seq == 0 and not flow.established():
                return "close"
            if distance(segment.seq, peer.acked) < 0:
                return "bad"
            train = last.kind == "ack" and last.direction == direction and segment.seq == last.end
            return "close" if not flow.established() or segment.seq == peer.acked or train else "keep"
        after_syn = flow.replied and last.kind == "syn" and last.direction != direction
        if (after_syn or (not flow.assured and last.kind == "ack")) and segment.ack == last.end:
            return "unseen"
        challenged = flow.state == "SS" and last.kind == "ack" and last.direction == 1 and segment.seq == last.ack
        return "unseen" if challenged else "close"

    @staticmethod
    def _acknowledges(segment: Segment, peer: Side) -> int:
        reach = segment.ack
        if "sack" in peer.marks:
            for _, right in segment.sack:
                reach = right % WORD if distance(reach, right) < 0 else reach
        return reach

    def _window(self, flow: Flow, segment: Segment, direction: int) -> str:
        mine, theirs, last = flow.sides[direction], flow.sides[1 - direction], flow.last
        seq, end, ack = segment.seq, segment.end, segment.ack
        sack = self._acknowledges(segment, theirs)
        syn, answers = "S" in segment.flags, "A" in segment.flags
        first = mine.window == 0
        if syn and (first or (flow.state in ("SS", "SR") and distance(mine.end, end) < 0)):
            mine.learn(segment)
            if direction == 1 and not ("scale" in mine.marks and "scale" in theirs.marks):
                mine.scale = theirs.scale = 0
            if not answers and (first or direction == 1):
                return "in"
        elif first:
            mine.end, mine.window = end, max(segment.window << mine.scale, 1)
            mine.limit = (end + mine.window) % WORD
            if theirs.window == 0:
                theirs.end = theirs.limit = sack
            elif sack == (theirs.end + 1) % WORD:
                theirs.end = sack
        if not answers or ("R" in segment.flags and ack == 0):
            ack = sack = theirs.end
        if "R" in segment.flags and seq == 0 and flow.state == "SS":
            seq = end = mine.end
        new_enough = theirs.window == 0 or distance(mine.end - theirs.window - 1, end) < 0
        recent = distance(theirs.end - max(66000, mine.window) - 1, sack) < 0
        known = distance(sack, theirs.end + 1) < 0
        if distance(seq, mine.limit + 1) >= 0:
            over = (end - mine.limit + 1) % WORD
            if theirs.window and new_enough and recent and over <= theirs.window and known:
                mine.end = end
                mine.marks |= {"unacknowledged"}
                return "old"
            return "out"
        if not known:
            return "out"
        if not new_enough or not recent:
            return "old"
        window = segment.window << (0 if syn else mine.scale)
        mine.window = max(mine.window, (window + sack - ack) % WORD)
        if distance(mine.end, end) < 0:
            mine.end = end
            mine.marks |= {"unacknowledged"}
        if answers and ("acknowledges" not in mine.marks or distance(mine.acked, ack) < 0):
            mine.acked = ack
            mine.marks |= {"acknowledges"}
        if theirs.window and distance(mine.limit, end) < 0:
            theirs.window += (end - mine.limit) % WORD
        if distance(theirs.limit - 1, sack + window) < 0:
            theirs.limit = (sack + max(window, 1)) % WORD
        if ack == theirs.end:
            theirs.marks -= {"unacknowledged"}
        if kind_of(segment) == "ack":
            same = (direction, seq, ack, end, segment.window)
            repeated = same == (last.direction, last.seq, last.ack, last.end, last.window)
            flow.repeats = flow.repeats + 1 if repeated else 0
            last.direction, last.seq, last.ack, last.end, last.window = same
        return "in"

    def _doubt(self, flow: Flow, direction: int, kind: str, now: int) -> None:
        last, limit = flow.last, self.settings.timeouts["unacknowledged"]
        if not flow.assured or kind not in ("fin", "rst"):
            return
        if last.direction != direction and last.kind in ("fin", "rst"):
            if flow.expires - now >= 120:
                flow.expires = min(flow.expires, now + limit)
        else:
            last.kind, last.direction = kind, direction

    def _refresh(self, flow: Flow, kind: str, old: str, now: int) -> None:
        usual, limits = self.timeout(flow.state), self.settings.timeouts
        unacknowledged = any("unacknowledged" in side.marks for side in flow.sides)
        if flow.repeats >= 3 and usual > limits["max_retrans"]:
            timeout = limits["max_retrans"]
        elif kind == "rst":
            timeout = limits["close"]
        elif unacknowledged and usual > limits["unacknowledged"]:
            timeout = limits["unacknowledged"]
        elif flow.last.window == 0 and usual > limits["max_retrans"]:
            timeout = limits["max_retrans"]
        else:
            timeout = usual
        if not flow.replied:
            if kind == "rst":
                timeout = 0
            elif kind == "syn" and old == "SS":
                return
            elif flow.state == "ES":
                timeout = min(timeout, limits["unacknowledged"])
        elif flow.state == "ES" and old in ("SR", "ES"):
            flow.assured = True
        flow.expires = now + timeout
