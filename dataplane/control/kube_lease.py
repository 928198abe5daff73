"""Who of all nodes writes: an election by a Lease object; sans-IO.

The rules are those of client-go's leader election. Whoever finds the Lease without a holder, or has seen it unchanged
for as long as it is good for, writes itself into it; the API server lets only one of two do that (``resourceVersion``).
Clocks are not compared: what counts is how long a record has not changed for this observer. The holder renews it, and
stops to lead well before others may think that it is dead, counted from when it *sent* the last renewal.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

API_VERSION = "coordination.k8s.io/v1"
SECONDS = 15  # client-go's defaults: 15, 10, and 2 for the period, which is 5 here to ask less of the server
DEADLINE = 2 / 3  # of the time for which a renewal is good


class Election:
    """One candidate. Times are seconds of any monotonic clock.

    Attributes:
        holder: Who leads, as far as this candidate has seen; "" is nobody.

    Args:
        me: What it writes into the Lease: no two candidates of all times have the same.
        seconds: For how long a renewal is good.
    """

    def __init__(self, me: str, name: str, namespace: str, seconds: int = SECONDS) -> None:
        self._me, self._seconds = me, seconds
        self._metadata = {"name": name, "namespace": namespace}
        self._seen: Any = None
        self._changed = 0.0
        self._renewed: float | None = None
        self._sent = 0.0
        self.holder = ""

    def saw(self, lease: Mapping[str, Any] | None, now: float) -> None:
        """Take note of the Lease as it is now; None: there is none."""
        spec = (lease or {}).get("spec")
        spec = spec if isinstance(spec, dict) else {}
        if spec != (self._seen or {}).get("spec") or self._seen is None:
            self._changed = now
        self._seen = {"metadata": (lease or {}).get("metadata"), "spec": spec}
        self.holder = str(spec.get("holderIdentity") or "")
        if self.holder != self._me:
            self._renewed = None

    def wish(self, now: float, wall: float) -> Mapping[str, Any] | None:
        """Return the Lease to write now; None when another one leads. ``wall`` is in seconds since the epoch."""
        spec = self._seen["spec"] if self._seen is not None else {}
        good = spec.get("leaseDurationSeconds")
        if self.holder not in ("", self._me) and now < self._changed + (
            good if isinstance(good, int) else self._seconds
        ):
            return None
        self._sent = now
        again = self.holder == self._me
        transitions = spec.get("leaseTransitions")
        return self._lease(
            holderIdentity=self._me,
            leaseDurationSeconds=self._seconds,
            acquireTime=spec.get("acquireTime") if again else _text(wall),
            renewTime=_text(wall),
            leaseTransitions=(transitions if isinstance(transitions, int) else 0) + (not again),
        )

    def won(self, lease: Mapping[str, Any], now: float) -> None:
        """Take note that the server has taken the wish; ``lease`` is its answer."""
        self.saw(lease, now)
        self._renewed = self._sent

    def leads(self, now: float) -> bool:
        """Say whether this candidate may act as the only one."""
        return self._renewed is not None and now < self._renewed + self._seconds * DEADLINE

    def farewell(self) -> Mapping[str, Any] | None:
        """Return the Lease to write at the end, so that nobody has to wait; None when another one leads."""
        if self._renewed is None:
            return None
        self._renewed = None
        kept = {key: value for key, value in self._seen["spec"].items() if key != "holderIdentity"}
        return self._lease(**{**kept, "leaseDurationSeconds": 1})

    def _lease(self, **spec: Any) -> Mapping[str, Any]:
        known = (self._seen or {}).get("metadata")
        return {"apiVersion": API_VERSION, "kind": "Lease", "metadata": known or self._metadata, "spec": spec}


def _text(wall: float) -> str:
    """Return a ``MicroTime`` of meta/v1."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
