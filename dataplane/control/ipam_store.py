"""What IPAM asks of a store, and a store in memory.

A transaction is a generator: it yields what it wants, is sent the answer, and returns its outcome. So the same code
runs on etcd and in memory, and a test can interleave several nodes at every step, or let one of them die there.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, TypeAlias, TypeVar

from dataplane.control.ipam import Affinity, Block, Given, IpamError
from dataplane.control.state import Network

RETRIES = 100  # Calico's datastoreRetries: whoever loses as often has no competitor but a bug
BLOCKS = "blocks/"
NODES = "nodes/"

Value: TypeAlias = Block | Affinity | Given
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store has under a key. ``value`` is None for what cannot be understood: it is left alone."""

    key: str
    value: Value | None
    revision: int


@dataclass(frozen=True, slots=True)
class Get:
    """Asks for some keys; the answer is a ``Stored`` or None for each."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class List:
    """Asks for all keys with a prefix, as a tuple of ``Stored``."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Keys:
    """Asks for all keys with a prefix, without what they have, as a tuple of text."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Swap:
    """Writes a value if the key has this revision (0: does not exist). The answer is whether it had; None deletes."""

    key: str
    revision: int
    value: Value | None


Operation: TypeAlias = Get | List | Keys | Swap
Steps: TypeAlias = Generator[Operation, Any, Result]


def block_key(cidr: Network) -> str:
    """Return the key of a block."""
    return f"{BLOCKS}{str(cidr).replace('/', '-')}"


def cidr_of(key: str) -> Network | None:
    """Return the block that a key is for; None if there is none like that."""
    address, _, size = key.removeprefix(BLOCKS).rpartition("-")
    try:
        return ip_network(f"{address}/{size}")
    except ValueError:
        return None


def affinities_prefix(node: str) -> str:
    """Return what the keys of a node's affinities begin with."""
    return f"affinities/{node}/"


def affinity_key(node: str, cidr: Network) -> str:
    """Return the key of a node's claim of a block."""
    return f"{affinities_prefix(node)}{str(cidr).replace('/', '-')}"


def busy() -> IpamError:
    """Return what to raise after ``RETRIES`` swaps that failed."""
    return IpamError(f"the same block was changed by others {RETRIES} times in a row")


class MemoryStore:
    """A store that nobody else sees.

    Attributes:
        revision: That of the last write.
    """

    def __init__(self, values: Iterable[tuple[str, Value]] = ()) -> None:
        self._kept: dict[str, Stored] = {}
        self.revision = 0
        for key, value in values:
            self._write(key, value)

    def answer(self, operation: Operation) -> Any:
        """Carry out an operation."""
        if isinstance(operation, Get):
            return tuple(self._kept.get(key) for key in operation.keys)
        if isinstance(operation, List):
            return tuple(self._kept[key] for key in sorted(self._kept) if key.startswith(operation.prefix))
        if isinstance(operation, Keys):
            return tuple(key for key in sorted(self._kept) if key.startswith(operation.prefix))
        kept = self._kept.get(operation.key)
        if (kept.revision if kept else 0) != operation.revision:
            return False
        self._write(operation.key, operation.value)
        return True

    def carry_out(self, steps: Steps[Result]) -> Result:
        """Carry out a whole transaction and return its outcome."""
        answer = None
        while True:
            try:
                operation = steps.send(answer)
            except StopIteration as done:
                result: Result = done.value
                return result
            answer = self.answer(operation)

    def copy(self) -> "MemoryStore":
        """Return a store with the same contents, which then goes its own way."""
        other = MemoryStore()
        other._kept, other.revision = dict(self._kept), self.revision
        return other

    def entries(self) -> dict[str, Value]:
        """Return all values by their keys."""
        return {key: stored.value for key, stored in self._kept.items() if stored.value is not None}

    def _write(self, key: str, value: Value | None) -> None:
        self.revision += 1
        if value is None:
            self._kept.pop(key, None)
        else:
            self._kept[key] = Stored(key, value, self.revision)
