"""Oracles: the same answers by the plainest means, in Python ints, dicts and loops."""

from dataplane.tables.address import V4_BITS, V4_MAPPED

MASK64 = (1 << 64) - 1


def keyed_hash(words: list[int], key: list[int]) -> int:
    """What ``hash3`` and ``hash5`` of ``tables.hash`` compute."""
    total = 0
    for word, secret in zip(words, key, strict=False):
        low = (word + secret) % 2**32
        high = ((word >> 32) + (secret >> 32)) % 2**32
        total += low * high
    total &= MASK64
    total ^= total >> 32
    total = total * key[-1] & MASK64
    total ^= total >> 29
    total = total * key[-1] & MASK64
    return total ^ total >> 32


def is_v4(address: int) -> bool:
    """Whether 128 bits are an IPv4 address."""
    return address >> 32 == V4_MAPPED


def mask(length: int) -> int:
    """``length`` leading ones of 128 bits."""
    return (1 << 128) - (1 << (128 - length))


class Lpm:
    """Longest prefix match by looking at every prefix."""

    def __init__(self) -> None:
        self.prefixes: dict[tuple[int, int], int] = {}

    def lookup(self, address: int) -> int:
        """The value of the longest prefix of the address's own family, or -1."""
        best, value = -1, -1
        for (prefix, length), candidate in self.prefixes.items():
            same_family = (length >= V4_BITS and is_v4(prefix)) == is_v4(address)
            if same_family and address & mask(length) == prefix and length > best:
                best, value = length, candidate
        return value


Tuple = tuple[int, int, int, int, int]  # src, dst, sport, dport, protocol
Source = tuple[int, int, int]  # src, sport, protocol


class Flows:
    """Flows by the tuples of both directions, and one flow per kept source: dicts."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.halves: dict[Tuple, int] = {}
        self.sources: dict[Source, int] = {}
        self.rows: dict[int, tuple[Tuple, Tuple]] = {}

    def refusal(self, original: Tuple, reply: Tuple) -> int:
        """What insert answers instead of a row; 0 if there is nothing against it."""
        if original == reply or original in self.halves or reply in self.halves:
            return -3
        return -2 if len(self.rows) == self.capacity else 0

    def insert(self, row: int, original: Tuple, reply: Tuple) -> None:
        """Enter a flow under the row that the table chose."""
        self.halves[original], self.halves[reply] = 2 * row, 2 * row + 1
        self.rows[row] = original, reply

    def delete(self, row: int) -> None:
        """Take a flow out."""
        for half in self.rows.pop(row):
            del self.halves[half]
        self.sources = {source: kept for source, kept in self.sources.items() if kept != row}

    def find(self, wanted: Tuple) -> int:
        """2 * row + direction, or -1."""
        return self.halves.get(wanted, -1)

    def keep_source(self, row: int) -> None:
        """Let a flow be found by the source of its original tuple."""
        self.sources.setdefault(source_of(self.rows[row][0]), row)

    def find_source(self, wanted: Tuple) -> int:
        """The row of the flow that has this source, or -1."""
        return self.sources.get(source_of(wanted), -1)


def source_of(wanted: Tuple) -> Source:
    """Source address, source port and protocol."""
    return wanted[0], wanted[2], wanted[4]
