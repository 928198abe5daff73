"""Oracles: the same answers by the plainest means, in Python ints, dicts and loops."""

from dataplane.tables.address import V4_BITS, V4_MAPPED

MASK64 = (1 << 64) - 1


def fold(a: int, b: int) -> int:
    """Both halves of a 128-bit product, XORed."""
    product = a * b
    return (product >> 64) ^ (product & MASK64)


def hash3(words: list[int], key: list[int]) -> int:
    """What ``tables.hash.hash3`` computes."""
    a, b, c = words
    return fold(fold(a ^ key[0], b ^ key[1]) ^ key[2], c ^ key[3])


def hash5(words: list[int], key: list[int]) -> int:
    """What ``tables.hash.hash5`` computes."""
    a, b, c, d, e = words
    return fold(fold(a ^ key[0], b ^ key[1]) ^ fold(c ^ key[2], d ^ key[3]) ^ key[1], e ^ key[2])


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
