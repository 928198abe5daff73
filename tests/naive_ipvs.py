"""An oracle for services: ip_vs's rules over plain lists, without hashes, rings or rows."""

from dataclasses import dataclass, field
from math import gcd

M = 4093


def rotate(word, bits):
    return (word << bits | word >> (64 - bits)) % 2**64


def siphash13(data, key):
    """SipHash with one round per block and three at the end (Aumasson and Bernstein, INDOCRYPT 2012)."""
    k0, k1 = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def sip_round():
        for a, b, turn, wide in ((0, 1, 13, True), (2, 3, 16, False), (0, 3, 21, False), (2, 1, 17, True)):
            v[a] = (v[a] + v[b]) % 2**64
            v[b] = rotate(v[b], turn) ^ v[a]
            if wide:
                v[a] = rotate(v[a], 32)

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) % 256])
    for start in range(0, len(padded), 8):
        word = int.from_bytes(padded[start : start + 8], "little")
        v[3] ^= word
        sip_round()
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(3):
        sip_round()
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def fold(address):
    """What ip_vs makes of an address before it hashes it."""
    if address.version == 4:
        return int(address)
    words = [int(address) >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)]
    return words[0] ^ words[1] ^ words[2] ^ words[3]


def maglev_hash(word, secret):
    key = secret.to_bytes(8, "little") * 2
    return siphash13((word % 2**32).to_bytes(4, "little"), key) % 2**32


def hash_32(word):
    return (word % 2**32) * 0x61C88647 % 2**32 >> 24


@dataclass(eq=False)
class Backend:
    """One destination; ``overload`` follows its thresholds."""

    address: object
    port: int
    weight: int = 0
    last_weight: int = 0
    active: int = 0
    inactive: int = 0
    upper: int = 0
    lower: int = 0
    overload: bool = False
    present: bool = True

    @property
    def usable(self):
        return self.weight > 0 and not self.overload

    @property
    def held(self):
        return self.active + self.inactive > 0

    def change(self, weight, upper, lower, new):
        if new or weight:
            self.last_weight = weight
        self.weight = weight
        if upper == 0 or upper > self.upper:
            self.overload = False
        self.upper, self.lower = upper, lower

    def connect(self):
        self.inactive += 1
        if self.upper and self.active + self.inactive >= self.upper:
            self.overload = True

    def disconnect(self, active):
        self.active -= active
        self.inactive -= not active
        total = self.active + self.inactive
        bound = self.lower or self.upper * 0.75 or total + 1
        if total < bound:
            self.overload = False


@dataclass(eq=False)
class Service:
    """A virtual service; ``backends`` has the newest first."""

    vip: object
    scheduler: str
    port: bool = False
    fallback: bool = False
    backends: list[Backend] = field(default_factory=list)
    last: Backend | None = None  # rr and wrr: the last pick; None is before the first
    cw: int = 0

    def use(self, scheduler):
        self.scheduler, self.last, self.cw = scheduler, None, 0
        self.changed()

    def unlink(self, backend):
        at = self.backends.index(backend)
        if self.last is backend:
            self.last = self.backends[at - 1] if at else None
        del self.backends[at]
        self.changed()

    def changed(self):
        if self.scheduler == "wrr":
            self.last = None
            if self.cw > self.mw or self.cw == 0:
                self.cw = self.mw
            elif self.di > 1:
                self.cw = self.cw // self.di * self.di + 1
        elif self.scheduler == "mh":
            self.table = self.maglev()

    @property
    def di(self):
        return gcd(*(backend.weight for backend in self.backends)) or 1

    @property
    def mw(self):
        return max((backend.weight for backend in self.backends), default=0) - (self.di - 1)

    def pick(self, client, sport):
        return getattr(self, self.scheduler)(fold(client) + (sport if self.port else 0))

    def rr(self, _):
        at = self.backends.index(self.last) + 1 if self.last else 0
        for backend in self.backends[at:] + self.backends[:at]:
            if backend.usable:
                self.last = backend
                return backend
        return None

    def wrr(self, _):
        """ip_vs's walk, step by step."""
        if self.mw == 0:
            return None
        start, stop, last_pass, restarted = self.last, None, False, False
        at = self.backends.index(start) + 1 if start else 0
        while True:
            for backend in self.backends[at:]:
                if backend.weight >= self.cw and not backend.overload:
                    self.last = backend
                    return backend
                if backend is stop:
                    self.last = backend
                    return None
            at = 0
            self.cw -= self.di
            if self.cw <= 0:
                self.cw = self.mw
                if last_pass or start is None:
                    self.last = None
                    return None
                restarted = True
            last_pass = self.cw <= self.di
            if last_pass and restarted:
                stop = start

    def _first_least(self, cost):
        """The first backend that no other undercuts; ``cost`` is (load, weight)."""
        best = None
        for backend in filter(lambda each: each.usable, self.backends):
            if best is None or cost(best)[0] * cost(backend)[1] > cost(backend)[0] * cost(best)[1]:
                best = backend
        return best

    def lc(self, _):
        return self._first_least(lambda backend: (256 * backend.active + backend.inactive, 1))

    def wlc(self, _):
        return self._first_least(lambda backend: (256 * backend.active + backend.inactive, backend.weight))

    def sed(self, _):
        return self._first_least(lambda backend: (backend.active + 1, backend.weight))

    def nq(self, word):
        idle = [backend for backend in self.backends if backend.usable and backend.active == 0]
        return idle[0] if idle else self.sed(word)

    def fo(self, _):
        return max((backend for backend in self.backends if backend.usable), key=lambda each: each.weight, default=None)

    def ovf(self, _):
        room = [backend for backend in self.backends if backend.usable and backend.active <= backend.weight]
        return max(room, key=lambda each: each.weight, default=None)

    def sh(self, word):
        dealt = [backend for backend in self.backends for _ in range(max(backend.weight, 1))]
        if not dealt:
            return None
        home = hash_32(word)
        tries = [home] + [(2 * home + offset) % 256 for offset in range(256)] * self.fallback
        return next((b for b in (dealt[at % len(dealt)] for at in tries) if b.usable), None)

    def dh(self, _):
        if not self.backends:
            return None
        backend = self.backends[hash_32(fold(self.vip)) % len(self.backends)]
        return backend if backend.usable else None

    def mh(self, word):
        home = maglev_hash(word, 2654435761) % M
        first = self.table[home]
        if first is None or first.usable:
            return first
        for offset in range(M if self.fallback else 0):
            backend = self.table[maglev_hash(word + (offset + home) % M, 2654435761) % M]
            if backend.usable:
                return backend
        return None

    def maglev(self):
        """Each backend's permutation as a whole, and turns until all buckets are taken."""
        divisor = gcd(*(backend.last_weight for backend in self.backends))
        table: list[Backend | None] = [None] * M
        if not divisor:
            return table
        shift = max(0, (max(backend.last_weight for backend in self.backends) // divisor).bit_length() - 6)
        orders = []
        for backend in self.backends:
            word = fold(backend.address) + backend.port
            start, step = maglev_hash(word, 2654435761) % M, maglev_hash(word, 2654446892) % (M - 1) + 1
            turns = backend.last_weight // divisor >> shift or int(backend.last_weight > 0)
            orders.append((backend, iter([(start + i * step) % M for i in range(M)]), turns))
        left = M
        while left:
            for backend, order, turns in orders:
                for _ in range(min(turns, left)):
                    table[next(bucket for bucket in order if table[bucket] is None)] = backend
                    left -= 1
        return table
