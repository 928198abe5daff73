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
