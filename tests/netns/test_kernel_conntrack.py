"""The kernel's own conntrack beside ours: the same segments, and after each the same verdict and the same flow.

    client ── left ┃ a kernel that forwards and tracks ┃ right ── server          (``tests/netns/conntrack.py``)

What is compared: whether the segment comes out on the other side, who began the flow, state, remaining time, status,
and both directions' window flags and scales. Not visible from outside are the windows' numbers; the walks draw their
segments at the edges that follow from these.
"""

import time
from collections.abc import Iterator
from random import Random

import pytest

from tests.netns.conntrack import Linux, one_processor
from tests.netns.harness import Network
from tests.tcp_kernels import Kernels
from tests.tcp_segments import Line, Settings, Step, conversations, lines
from tests.tcp_walks import SEEDS, STEPS, Walk

pytestmark = pytest.mark.netns

INITIAL = (3_000_000_000, 2_999_000_000)
CONVERSATIONS = {name: text for name, text in conversations().items() if "\nwait " not in text}  # its clock is its own
WALKS = 50  # per test
NOW = 1000  # ours stands still


@pytest.fixture(scope="module")
def linux(network: Network) -> Iterator[Linux]:
    with one_processor():
        made = Linux(network)
        try:
            yield made
        finally:
            made.close()


class Pair:
    """Both, and how long the flow may have aged in Linux alone."""

    def __init__(self, linux: Linux) -> None:
        linux.fresh()
        self.linux, self.kernels = linux, Kernels()
        self.started = time.monotonic()
        self.said: list[str] = []

    def configure(self, settings: Settings) -> None:
        self.linux.configure(settings)
        self.kernels.configure(settings)

    def send(self, line: Line) -> Step:
        """Send a segment to both and return what they agree on."""
        assert line.segment is not None
        theirs, ours = self.linux.send(line.segment, NOW), self.kernels.send(line.segment, NOW)
        self.said.append(f"{line.segment}\n  Linux: {theirs} {theirs.entry!r}\n  ours:  {ours} {ours.entry!r}")
        assert self._aged(theirs, ours) == ours, "\n".join(["they differ:", *self.said])
        return ours

    def _aged(self, theirs: Step, ours: Step) -> Step:
        """Linux's answer with our remaining time, if that is what is left of it; it rounds down."""
        if theirs.entry is None or ours.entry is None:
            return theirs
        missing = ours.entry.timeout - theirs.entry.timeout
        if 0 <= missing <= time.monotonic() - self.started + 1:
            return theirs._replace(entry=theirs.entry._replace(timeout=ours.entry.timeout))
        return theirs


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_linux_gives_the_written_answers(linux, name):
    pair, settings = Pair(linux), Settings()
    pair.configure(settings)
    for line in lines(CONVERSATIONS[name], INITIAL):
        if line.setting:
            settings.set(*line.setting)
            pair.configure(settings)
        else:
            assert str(pair.send(line)) == line.expected, "\n".join(pair.said)


@pytest.mark.parametrize("first", range(0, SEEDS, WALKS))
def test_linux_and_we_agree_on_random_conversations(linux, first):
    for seed in range(first, first + WALKS):
        walk, pair = Walk(Random(seed)), Pair(linux)
        for _ in range(STEPS):
            segment = next(walk)
            pair.configure(walk.settings)
            pair.send(Line(f"seed {seed}", segment))
