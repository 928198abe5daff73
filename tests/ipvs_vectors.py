"""Replay recordings of ip_vs through the shipped tables and schedulers: ``python -m tests.ipvs_vectors FILE...``.

A file is a JSON list of scenarios, each recorded from a Linux kernel on a fresh service:

- ``name``, ``sched``, ``proto`` (udp or tcp), ``flags`` (of ipvsadm, with commas), ``vip`` (where it matters),
- ``net``: destination number 7 is NET.7, port 8080; ``weights``: of the first destinations, added as 1, 2, ...,
- ``ops``, in order: ``["o", address, port]`` a client opens, ``["c", i]`` the i-th opened connection closes and becomes
  inactive, ``["w", n, weight]``, ``["a", n, weight]`` and ``["d", n]`` change, add and delete destination n,
- ``kernel``: the number of the destination that each open came to, null for none,
- ``table``: what ``ipvsadm -Ln`` printed in the end.

Exit status: 0 all agree, 1 a difference, 2 a file that cannot be read or is not of this form.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_address
from typing import Any, TypeAlias

import numpy as np

from dataplane.tables import backend, scheduler, service
from dataplane.tables.address import Address, halves
from dataplane.tables.scheduler import Scheduler
from dataplane.tables.service import Destination, Service, ServiceTable

PROTOCOLS = {"tcp": 6, "udp": 17}
FLAGS = {
    "sh-port": scheduler.PORT,
    "mh-port": scheduler.PORT,
    "sh-fallback": scheduler.FALLBACK,
    "mh-fallback": scheduler.FALLBACK,
}
DESTINATION_PORT = 8080
SHOWN = 5  # differences per file
_SERVICE = re.compile(r"(TCP|UDP)\s+([\d.]+):(\d+) (\w+)(?: \(([\w,-]+)\))?\s*")
_DESTINATION = re.compile(r"\s+-> ([\d.]+):(\d+)\s+Masq\s+(\d+)\s+(\d+)\s+(\d+)\s*")

Row: TypeAlias = tuple[str, int, int, int]  # address, weight, active, inactive


class VectorError(Exception):
    """A file is not a list of scenarios."""


@dataclass(frozen=True)
class Table:
    """The last lines of a recording."""

    protocol: str
    address: Address
    port: int
    scheduler: str
    flags: frozenset[str]
    rows: list[Row]


@dataclass
class Score:
    """What agreed, and the differences."""

    scenarios: int = 0
    scenarios_right: int = 0
    picks: int = 0
    picks_right: int = 0
    differences: list[str] = field(default_factory=list)


def parse_table(lines: Sequence[str]) -> Table:
    """Read what ``ipvsadm -Ln`` printed for one service."""
    head = _SERVICE.fullmatch(lines[0]) if lines else None
    if head is None:
        raise VectorError("table: the first line is not a service of ipvsadm")
    protocol, vip, port, name, flags = head.groups()
    rows = []
    for line in lines[1:]:
        match = _DESTINATION.fullmatch(line)
        if match is None or int(match[2]) != DESTINATION_PORT:
            raise VectorError(f"table: {line!r} is not a destination of ipvsadm")
        rows.append((match[1], int(match[3]), int(match[4]), int(match[5])))
    split = frozenset(flags.split(",")) if flags else frozenset()
    return Table(protocol.lower(), ip_address(vip), int(port), name, split, rows)


class Replay:
    """One scenario, on a table of its own, by the calls that a stage and the control plane make."""

    def __init__(self, scenario: dict[str, Any]) -> None:
        self.scenario = scenario
        self.recorded = parse_table(scenario["table"])
        self.flags = frozenset(scenario["flags"].split(",")) - {""}
        self._check()
        self.table = ServiceTable(capacity=4, seed=1)
        flags = 0
        for name in self.flags:
            flags |= FLAGS[name]
        kind = Service(Scheduler[scenario["sched"].upper()], flags)
        self.row = self.table.set(PROTOCOLS[scenario["proto"]], self.recorded.address, self.recorded.port, kind)
        self.numbers: dict[int, int] = {}
        self.opened: list[int] = []
        for number, weight in enumerate(scenario["weights"], 1):
            self.add(number, weight)

    def _check(self) -> None:
        said = self.scenario["proto"], self.scenario["sched"], self.flags
        if said != (self.recorded.protocol, self.recorded.scheduler, self.recorded.flags):
            raise VectorError("proto, sched and flags are not those of the table")
        if ip_address(self.scenario.get("vip", str(self.recorded.address))) != self.recorded.address:
            raise VectorError("vip is not that of the table")
        opens = sum(op[0] == "o" for op in self.scenario["ops"])
        if opens != len(self.scenario["kernel"]):
            raise VectorError(f"{opens} opens, but {len(self.scenario['kernel'])} answers of the kernel")

    def address(self, number: int) -> IPv4Address:
        return IPv4Address(f"{self.scenario['net']}.{number}")

    def add(self, number: int, weight: int) -> None:
        if self.table.find_backend(self.row, self.address(number), DESTINATION_PORT) >= 0:
            raise VectorError(f"destination {number} is added twice")
        at = self.table.add(self.row, self.address(number), DESTINATION_PORT, Destination(weight))
        self.numbers[at] = number

    def weigh(self, number: int, weight: int) -> None:
        if self.table.find_backend(self.row, self.address(number), DESTINATION_PORT) < 0:
            raise VectorError(f"destination {number} is changed, but not there")
        self.table.add(self.row, self.address(number), DESTINATION_PORT, Destination(weight))

    def delete(self, number: int) -> None:
        self.table.remove(self.row, self.address(number), DESTINATION_PORT)

    def open(self, client: str, port: int) -> int | None:
        """Schedule a client; return the number of its destination."""
        hi, lo = (np.uint64(half) for half in halves(client))
        at = int(scheduler.pick(self.table.arrays, self.row, hi, lo, port))
        self.opened.append(at)
        if at < 0:
            return None
        service.connect(self.table.arrays, self.row, at)
        if self.recorded.protocol == "tcp":
            backend.activate(self.table.backends, at, int(self.table.backends[at]["generation"]))
        return self.numbers[at]

    def close(self, opened: int) -> None:
        at = self.opened[opened]
        if at >= 0:
            backend.inactivate(self.table.backends, at, int(self.table.backends[at]["generation"]))

    def picks(self) -> list[int | None]:
        """Do all operations; return what the opens came to."""
        edits: dict[str, Callable[..., None]] = {"c": self.close, "w": self.weigh, "a": self.add, "d": self.delete}
        picked = []
        for name, *arguments in self.scenario["ops"]:
            if name == "o":
                picked.append(self.open(*arguments))
            else:
                edits[name](*arguments)
        return picked

    def rows(self) -> list[Row]:
        """Return the destinations as ``ipvsadm -Ln`` sorts them."""
        rows = []
        for at, address, _ in sorted(self.table.members(self.row), key=lambda member: int(member[1])):
            record = self.table.backends[at]
            rows.append((str(address), int(record["weight"]), int(record["active"]), int(record["inactive"])))
        return rows


def replay(scenario: dict[str, Any], score: Score) -> None:
    """Replay one scenario and add what agreed."""
    run = Replay(scenario)
    recorded, picked = scenario["kernel"], run.picks()
    right = sum(ours == theirs for ours, theirs in zip(picked, recorded, strict=True))
    rows = run.rows()
    score.scenarios += 1
    score.picks += len(recorded)
    score.picks_right += right
    if right == len(recorded) and rows == run.recorded.rows:
        score.scenarios_right += 1
        return
    if right == len(recorded):
        score.differences.append(f"{scenario['name']}: table: kernel {run.recorded.rows}, here {rows}")
        return
    first = next(i for i in range(len(recorded)) if picked[i] != recorded[i])
    score.differences.append(f"{scenario['name']}: open {first}: kernel {recorded[first]}, here {picked[first]}")


def replay_file(path: str, score: Score) -> None:
    """Replay all scenarios of a file.

    Raises:
        VectorError: The file is not of the form above.
        OSError: It cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            scenarios = json.load(file)
        except ValueError as error:
            raise VectorError(f"{path}: not JSON: {error}") from error
    if not isinstance(scenarios, list) or not scenarios:
        raise VectorError(f"{path}: not a list of scenarios")
    for number, scenario in enumerate(scenarios):
        name = scenario.get("name", number) if isinstance(scenario, dict) else number
        try:
            replay(scenario, score)
        except KeyError as error:
            raise VectorError(f"{path}: scenario {name}: {error} is missing or unknown") from error
        except (VectorError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise VectorError(f"{path}: scenario {name}: {error}") from error


def main(paths: Sequence[str]) -> int:
    """Replay files and print the score; return the exit status."""
    if not paths:
        print("usage: python -m tests.ipvs_vectors FILE...", file=sys.stderr)
        return 2
    score = Score()
    try:
        for path in paths:
            replay_file(path, score)
    except (VectorError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for difference in score.differences[:SHOWN]:
        print(difference)
    print(f"{score.scenarios_right}/{score.scenarios} scenarios, {score.picks_right}/{score.picks} picks")
    return int(score.scenarios_right != score.scenarios)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
