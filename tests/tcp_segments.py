"""TCP conversations for tests of conntrack: how they are written down, put into frames, drawn at random, and judged.

A conversation is text, one line per segment, with what conntrack must make of it behind the arrow:

    # side flags seq ack                 passed?  state        timeout
    a      S     0                    -> SYN_SENT    120 unreplied
    b      SA    0   1    win=100     -> SYN_RECV    60
    a      A     1   1                -> ESTABLISHED 86400 assured
    a      A     9999999 1            -> drop ESTABLISHED 86400 assured

Sequence and acknowledgment numbers count from the initial number of who sent the bytes; ``=0`` is the number itself,
and ``^5`` counts from the segment's sender also as an acknowledgment.
``len=``, ``win=``, ``ws=`` (window scale), ``sackok``, ``sack=1:9``, ``torn`` and ``doff=4`` follow. A ``-`` stands for
"no flow". ``set established 600``, ``set liberal 1`` and ``set loose 0`` change the settings, ``wait 50`` the clock,
and ``open win=1000`` stands for a handshake. ``tests/data/tcp_conversations.txt`` has them all.

Three trackers run them: the kernels, the naive model, and Linux.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.strategies import make_ethernet, make_ipv4, make_tcp

CLIENT, SERVER = 0xC000_0202, 0xC633_6402  # 192.0.2.2, 198.51.100.2
CLIENT_MAC, SERVER_MAC = 0x02_00_C0_00_02_02, 0x02_00_C6_33_64_02
PORT = 80
BITS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16, "U": 32, "E": 64, "C": 128}
WORD = 2**32
STATES = [
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT",
    "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2",
]  # fmt: skip
TIMEOUTS = {
    "syn_sent": 120,
    "syn_recv": 60,
    "established": 86400,
    "fin_wait": 120,
    "close_wait": 3600,
    "last_ack": 30,
    "time_wait": 120,
    "close": 10,
    "syn_sent2": 120,
    "max_retrans": 300,
    "unacknowledged": 300,
}
"""Seconds, by the end of their sysctl's name; ESTABLISHED and CLOSE_WAIT are kube-proxy's."""


@dataclass(frozen=True)
class Segment:
    """One segment; ``side`` 0 is the client, ``seq`` and ``ack`` are as on the wire."""

    side: int
    flags: str
    seq: int
    ack: int = 0
    window: int = 8192
    length: int = 0
    scale: int | None = None
    sack_permitted: bool = False
    sack: tuple[tuple[int, int], ...] = ()
    offset: int | None = None  # a wrong data offset, in words
    torn: bool = False  # ends within the header

    @property
    def bits(self) -> int:
        return sum(BITS[letter] for letter in self.flags)

    @property
    def end(self) -> int:
        return (self.seq + self.length + ("S" in self.flags) + ("F" in self.flags)) % WORD

    @property
    def options(self) -> bytes:
        octets = b"" if self.scale is None else bytes([1, 3, 3, self.scale])
        octets += b"\x01\x01\x04\x02" if self.sack_permitted else b""
        if self.sack:
            octets += bytes([1, 1, 5, 2 + 8 * len(self.sack)])
            octets += b"".join(struct.pack("!II", left % WORD, right % WORD) for left, right in self.sack)
        return octets

    def frame(self, sport: int = 4000, source_mac: int = CLIENT_MAC, target_mac: int = SERVER_MAC) -> bytes:
        """The Ethernet frame, all checksums right; ``sport`` is the client's port."""
        ends = [(CLIENT, sport), (SERVER, PORT)]
        (source, from_port), (target, to_port) = ends if self.side == 0 else ends[::-1]
        octets = make_tcp(
            source, target, from_port, to_port, bytes(self.length),
            seq=self.seq % WORD, ack=self.ack % WORD, flags=self.bits, window=self.window, options=self.options,
        )  # fmt: skip
        if self.offset is not None:
            octets = octets[:12] + bytes([self.offset << 4]) + octets[13:]
        if self.torn:
            octets = octets[:16]
        return make_ethernet(target_mac, source_mac, 0x0800, make_ipv4(source, target, 6, octets))


class Entry(NamedTuple):
    """What anybody can see of a flow. Pairs are those of the original and of the reply direction."""

    originator: int  # the side that sent its first segment
    state: str
    timeout: int  # seconds from now
    replied: bool
    assured: bool
    flags: tuple[int, int]
    scales: tuple[int, int]

    def __str__(self) -> str:
        status = " unreplied" if not self.replied else " assured" if self.assured else ""
        return f"{self.state} {self.timeout}{status}"


class Step(NamedTuple):
    """What became of a segment, and the flow after it."""

    passed: bool
    entry: Entry | None

    def __str__(self) -> str:
        return ("" if self.passed else "drop ") + (str(self.entry) if self.entry else "-")


@dataclass
class Settings:
    """Of conntrack: seconds, and two switches."""

    timeouts: dict[str, int] = field(default_factory=lambda: dict(TIMEOUTS))
    liberal: int = 0
    loose: int = 1

    def set(self, name: str, value: int) -> None:
        if name in self.timeouts:
            self.timeouts[name] = value
        else:
            assert name in ("liberal", "loose"), name
            setattr(self, name, value)


class Tracker(Protocol):
    """Conntrack with one flow, or none."""

    def configure(self, settings: Settings) -> None: ...

    def send(self, segment: Segment, now: int) -> Step: ...


# --- conversations as text -------------------------------------------------------------------------------------------


HANDSHAKE = """
a S  0   {0} -> SYN_SENT 120 unreplied
b SA 0 1 {0} -> SYN_RECV 60
a A  1 1 {0} -> ESTABLISHED 86400 assured
"""


class Line(NamedTuple):
    """One line: a segment, or settings that hold from here on, or seconds that pass."""

    text: str
    segment: Segment | None = None
    expected: str = ""
    setting: tuple[str, int] | None = None
    wait: int = 0


def _number(word: str, initial: int, own: int) -> int:
    if word.startswith("="):
        return int(word[1:])
    return ((own if word.startswith("^") else initial) + int(word.lstrip("^"))) % WORD


def _segment(words: list[str], initial: tuple[int, int]) -> Segment:
    side = "ab".index(words[0])
    mine, theirs = initial[side], initial[1 - side]
    numbers = [word for word in words[2:] if word.lstrip("=^-").isdigit()]
    seq = _number(numbers[0], mine, mine)
    ack = _number(numbers[1], theirs, mine) if len(numbers) > 1 else 0
    made = Segment(side, words[1].strip("."), seq, ack)
    for word in words[2 + len(numbers) :]:
        key, _, value = word.partition("=")
        if key == "sack":
            left, right = (_number(each, theirs, mine) for each in value.split(":"))
            made = replace(made, sack=(*made.sack, (left, right)))
        elif key in ("sackok", "torn"):
            made = replace(made, sack_permitted=True) if key == "sackok" else replace(made, torn=True)
        else:
            name = {"len": "length", "win": "window", "ws": "scale", "doff": "offset"}[key]
            made = replace(made, **{name: int(value)})  # type: ignore[arg-type]
    return made


def lines(text: str, initial: tuple[int, int] = (1000, 5000)) -> Iterator[Line]:
    """Read a conversation; ``initial`` are the client's and the server's initial sequence numbers."""
    for raw in text.strip().splitlines():
        line = " ".join(raw.split("#")[0].split())
        words = line.split("->")[0].split()
        if not words:
            continue
        if words[0] == "open":
            yield from lines(HANDSHAKE.format(" ".join(words[1:])), initial)
            continue
        if words[0] == "set":
            yield Line(line, setting=(words[1], int(words[2])))
        elif words[0] == "wait":
            yield Line(line, wait=int(words[1]))
        else:
            yield Line(line, _segment(words, initial), line.split("->")[1].strip())


def conversations() -> dict[str, str]:
    """Return all that are written down, by name."""
    blocks = (Path(__file__).parent / "data/tcp_conversations.txt").read_text().split("\n== ")[1:]
    return {name: text for name, _, text in (block.partition("\n") for block in blocks)}


def play(tracker: Tracker, text: str, initial: tuple[int, int] = (1000, 5000)) -> tuple[list[str], list[str]]:
    """Run a conversation; return the lines as written, and as they would have to be written."""
    settings, now = Settings(), 1000
    tracker.configure(settings)
    written, found = [], []
    for line in lines(text, initial):
        if line.setting:
            settings.set(*line.setting)
            tracker.configure(settings)
        now += line.wait
        written.append(line.text)
        if line.segment:
            step = tracker.send(line.segment, now)
            found.append(line.text.split("->")[0] + f"-> {step}")
        else:
            found.append(line.text)
    return written, found
