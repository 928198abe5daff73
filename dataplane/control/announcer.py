"""When a node tells the LAN that it answers for an address; sans-IO, after MetalLB's L2 mode.

Which addresses those are is decided by the election (``control/election.py``).

A new owner sends a gratuitous ARP request and a gratuitous reply at once, since stations differ in which of them they
believe, again every 1.1 s for 5 s, and from then on once a minute: a switch or a router that has forgotten, or was told
otherwise, learns it again without a failover (metallb#2910).

The node's own addresses on an uplink that is ours alone are announced in the same way.
"""

import struct
from collections.abc import Callable
from ipaddress import IPv4Address

from dataplane.control.election import announced
from dataplane.control.state import Address, DesiredState

SECOND = 1_000_000_000
REPEAT_NS = 1_100_000_000
BURST_NS = 5 * SECOND
PERIOD_NS = 60 * SECOND

_REQUEST, _REPLY = 1, 2
_EVERYBODY = b"\xff" * 6
_FRAME = struct.Struct("!6s6sHHHBBH6s4s6s4s")


def gratuitous(mac: int, address: IPv4Address) -> tuple[bytes, bytes]:
    """Return the ARP request and the reply that tell everybody who has an address (RFC 5227 3)."""
    request, reply = (
        _FRAME.pack(
            _EVERYBODY, mac.to_bytes(6), 0x0806, 1, 0x0800, 6, 4, operation,
            mac.to_bytes(6), address.packed, _EVERYBODY, address.packed,
        )
        for operation in (_REQUEST, _REPLY)
    )  # fmt: skip
    return request, reply


class Announcer:
    """Says when to send what. Times are nanoseconds of any monotonic clock.

    Attributes:
        mac: The uplink's; what is sent next has the new one.
        sent: How many frames were handed out (``metallb_layer2_gratuitous_sent``).

    Args:
        is_owner: Whether the node still is the owner of what may move, as stages/arp.py asks; if not, nothing is said.
    """

    def __init__(self, mac: int, is_owner: Callable[[int], bool] = lambda now: True) -> None:
        self.mac = mac
        self._is_owner = is_owner
        self._fixed: frozenset[Address] = frozenset()
        self.sent = 0
        self._since: dict[IPv4Address, int] = {}
        self._due: dict[IPv4Address, int] = {}

    @property
    def owned(self) -> frozenset[IPv4Address]:
        """What this node answers for."""
        return frozenset(self._due)

    @property
    def next_at(self) -> int | None:
        """When `tick` has something to send; None: never."""
        return min(self._due.values(), default=None)

    def update(self, state: DesiredState, now: int) -> list[bytes]:
        """Take over a new state; return the frames to send now. Addresses that stay keep their times."""
        wanted = announced(state)
        self._fixed = frozenset(state.node.addresses)
        for address in self.owned - wanted:
            del self._since[address], self._due[address]
        for address in wanted - self.owned:
            self._since[address] = self._due[address] = now
        return self.tick(now)

    def repeat(self, now: int) -> list[bytes]:
        """Begin anew with everything that is owned, since the link or its MAC is another; return the frames."""
        for address in self._due:
            self._since[address] = self._due[address] = now
        return self.tick(now)

    def tick(self, now: int) -> list[bytes]:
        """Return the frames that are due."""
        due = sorted(address for address, at in self._due.items() if at <= now)
        for address in due:
            following = self._due[address] + REPEAT_NS  # not from now: a late tick does not shift those after it
            if following <= now:
                following = now + REPEAT_NS
            self._due[address] = following if following - self._since[address] <= BURST_NS else now + PERIOD_NS
        told = due if self._is_owner(now) else [address for address in due if address in self._fixed]
        frames = [frame for address in told for frame in gratuitous(self.mac, address)]
        self.sent += len(frames)
        return frames
