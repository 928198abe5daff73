"""Random conversations, drawn where conntrack's rules have their edges.

A `Walk` looks into the naive model to know where these are: the next byte, the ends of the windows, the last
acknowledgment, each with its neighbors. It proposes segments that two hosts in their right mind would send just often
enough to reach every state.
"""

from random import Random

from tests.naive_conntrack import Flow, Naive
from tests.tcp_segments import TIMEOUTS, WORD, Segment, Settings

FLAGS = {"S": 6, "SA": 8, "A": 30, "PA": 6, "FA": 10, "R": 2, "RA": 2, "SU": 1, "F": 1, "SF": 1, "": 1, "SEC": 1}
OPENING = ("S", "SA", "A")
SEEDS, STEPS = 400, 25  # what is played to Linux


class Walk:
    """One conversation, segment by segment.

    Attributes:
        settings: changed by a `Walk` as it goes.
        model: a naive conntrack that has seen all segments so far.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        # Below 120 s FINs that are not believed shorten no timeout: Linux's clock, which runs, would be at that edge.
        timeouts = {name: seconds + 5 * (seconds == 120 and name != "syn_sent2") for name, seconds in TIMEOUTS.items()}
        self.settings = Settings(timeouts, liberal=random.choice([0, 0, 0, 1]), loose=random.choice([0, 1, 1]))
        self._redraw()
        self.model = Naive()
        self.model.configure(self.settings)
        self.initial = (random.choice([1000, WORD - 2]), random.choice([5000, WORD - 40_000, WORD // 2 - 3]))
        self.orderly = random.random() < 0.8  # begins as connections do
        self.sent = 0
        self.previous: list[Segment] = []

    def __next__(self) -> Segment:
        if self.sent in (5, 12):
            self._redraw()
        segment = self._repeat() or self._draw()
        self.previous.append(segment)
        self.sent += 1
        self.model.send(segment, 1000)
        return segment

    def _redraw(self) -> None:
        """Change some timeouts: what is refreshed, and with which of them, shows at once."""
        for name in TIMEOUTS:
            if name != "syn_sent2" and self.random.random() < 0.2:  # that one has no sysctl
                self.settings.timeouts[name] = self.random.choice([45, 100, 250, 350, 1000])

    def _repeat(self) -> Segment | None:
        """The last segment again, mostly if that begins a row of repetitions."""
        recent = self.previous[-4:]
        again = len(recent) > 1 and recent[-1] == recent[-2] and len(set(recent)) > 1
        if self.previous and self.random.random() < (0.8 if again else 0.12):
            return recent[-1]
        return None

    def _draw(self) -> Segment:
        random = self.random
        if self.orderly and self.sent < 3:
            return self._orderly()
        flags = random.choices([*FLAGS], [*FLAGS.values()])[0]
        side, flow = random.randrange(2), self.model.flow
        wild = random.random() < 0.3
        seq, ack = self._numbers(side, flow, wild)
        first = "S" in flags
        return Segment(
            side, flags, seq, ack if "A" in flags or random.random() < 0.1 else 0,
            window=random.choice([8192, 8192, 500, 65535, 1, 0]),
            length=0 if first or random.random() < 0.5 else random.choice([1, 100, 700, 1400]),
            scale=random.choice([None, 0, 3, 14, 15]) if first else None,
            sack_permitted=first and random.random() < 0.5,
            sack=self._sack(ack) if not first and random.random() < 0.1 else (),
        )  # fmt: skip

    def _orderly(self) -> Segment:
        flags, side = OPENING[self.sent], int(self.sent == 1)
        mine, theirs = self.initial[side], self.initial[1 - side]
        return Segment(
            side, flags, (mine + (self.sent == 2)) % WORD, (theirs + 1) % WORD if "A" in flags else 0,
            window=self.random.choice([8192, 500, 65535]),
            scale=self.random.choice([None, 0, 7]) if self.sent < 2 else None,
            sack_permitted=self.sent < 2 and self.random.random() < 0.5,
        )  # fmt: skip

    def _numbers(self, side: int, flow: Flow | None, wild: bool) -> tuple[int, int]:
        """A sequence and an acknowledgment number: what comes next, or at the edge of a rule."""
        if flow is None:
            # Linux compares the acknowledgment of a connection that it picks up with 0: see tcp.begin.
            return self.initial[side], self.random.choice([5001, WORD // 2 + 5, WORD - 100_000])
        mine, theirs = flow.sides[side ^ flow.originator], flow.sides[1 - (side ^ flow.originator)]
        if not wild:
            return mine.end, theirs.end
        seqs = [mine.end, mine.limit, mine.end - theirs.window, theirs.acked, flow.last.end, flow.last.ack, 0]
        slack = max(66000, mine.window)
        acks = [theirs.end, theirs.end, theirs.end - slack, flow.last.end, mine.acked, 0]
        near = (-1400, -100, -1, 0, 0, 0, 1, 2, 100, 501)
        seq = self.random.choice(seqs) + self.random.choice(near)
        ack = self.random.choice(acks) + self.random.choice(near)
        if self.random.random() < 0.05:
            seq = self.random.randrange(WORD)
        return seq % WORD, ack % WORD

    def _sack(self, ack: int) -> tuple[tuple[int, int], ...]:
        blocks = self.random.randrange(1, 4)
        return tuple(
            ((ack + 100 * k) % WORD, (ack + self.random.choice([-5, 0, 1, 50, 8000])) % WORD) for k in range(blocks)
        )
