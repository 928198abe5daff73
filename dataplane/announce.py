"""The announcer on the event loop: its frames leave by the uplink when they are due."""

import asyncio
import time
from collections.abc import Callable

from dataplane.control.announcer import Announcer
from dataplane.control.state import DesiredState


class Announcing:
    """Keeps the one timer that the announcer needs.

    Args:
        announcer: Decides what is sent, and when.
        send: Sends frames by the uplink.
    """

    def __init__(self, announcer: Announcer, send: Callable[[list[bytes]], None]) -> None:
        self._announcer = announcer
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def follow(self, state: DesiredState) -> None:
        """Take over a new state, and tell the LAN at once what this node answers for from now on."""
        self._sent(self._announcer.update(state, _now()))

    def repeat(self, mac: int) -> None:
        """Tell the LAN anew, since it was away or knows us by another MAC."""
        self._announcer.mac = mac
        self._sent(self._announcer.repeat(_now()))

    def close(self) -> None:
        """Say nothing any more; a second call does nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def again(self) -> None:
        """Tell the LAN anew, since this node could not for a while."""
        self._sent(self._announcer.repeat(_now()))

    def _due(self) -> None:
        self._sent(self._announcer.tick(_now()))

    def _sent(self, frames: list[bytes]) -> None:
        if frames:
            self._send(frames)
        self.close()
        if self._announcer.next_at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._announcer.next_at / 1e9, self._due)


def _now() -> int:
    return time.monotonic_ns()  # the loop's clock, and not as it was when the loop's turn began
