"""Who may have what nobody else can have: of those who want the same thing the first has it, on every node.

Objects in a store are written by people and programs that need not know of one another: two services may want the same
address and port, two nodes the same tunnel. Tables hold a thing once, so a loser is left out whole until nobody before
it wants any of its things. Who is first is said by a rank, not by the order of arrival, so that nodes that see the same
store agree. A loser counts as a contestant all the same: no chain of outcomes has to be followed.
"""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Token = TypeVar("Token", bound=Hashable)
Rank = tuple[int, ...]


class Contest(Generic[Token]):
    """Contestants by name, each with a rank (the lowest is first, then the name) and the things that it wants."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Rank, tuple[Token, ...]]] = {}
        self._wanted: dict[Token, tuple[str, ...]] = {}

    def enter(self, name: str, rank: Rank, tokens: Iterable[Token]) -> set[str]:
        """Enter a contestant, or change what it wants; return the others whose outcome may have changed."""
        entry = (rank, tuple(tokens))
        if self._entries.get(name) == entry:
            return set()
        rivals = self.leave(name)
        self._entries[name] = entry
        for token in entry[1]:
            wanting = self._wanted.get(token, ())
            rivals.update(wanting)
            self._wanted[token] = (*wanting, name)
        return rivals - {name}

    def leave(self, name: str) -> set[str]:
        """Forget a contestant; return the others whose outcome may have changed."""
        rivals: set[str] = set()
        for token in self._entries.pop(name, ((), ()))[1]:
            others = tuple(each for each in self._wanted.get(token, ()) if each != name)
            rivals.update(others)
            if others:
                self._wanted[token] = others
            else:
                self._wanted.pop(token, None)
        return rivals

    def lost(self, name: str) -> tuple[Token, str] | None:
        """Return a thing that somebody before this contestant wants, and who; None: it may have all of its own."""
        rank, tokens = self._entries[name]
        for token in tokens:
            for other in self._wanted[token]:
                if other != name and (self._entries[other][0], other) < (rank, name):
                    return token, other
        return None
