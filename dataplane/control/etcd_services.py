"""Services out of pieces: what a service is, and its endpoints in any number of slices, in any order of arrival."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from dataplane.control.contest import Contest
from dataplane.control.services import ServerKey
from dataplane.control.state import Address, Endpoint, Service

_FILE = ""  # before the names of the file's services; those of a store begin with their namespace


class Services:
    """The services of a store, without those that want an address and port that an older one has.

    Args:
        claims: Returns what a service wants that no other can have.
        file: The node's own services: they are before all of the store's.
    """

    def __init__(self, claims: Callable[[Service], Iterable[ServerKey]], file: tuple[Service, ...]) -> None:
        self._claims = claims
        self._file = {service.id for service in file}
        self._contest: Contest[ServerKey] = Contest()
        for service in file:
            self._contest.enter(f"{_FILE}/{service.id}", (0,), claims(service))
        self._bases: dict[str, Service] = {}
        self._slices: dict[str, dict[str, tuple[Endpoint, ...]]] = {}
        self._whole: dict[str, Service] = {}
        self._dirty: dict[str, None] = {}  # in the order of arrival

    def set(self, name: str, service: Service | None, created: int) -> None:
        """Set a service without its endpoints; None: there is none of this name."""
        if service is None:
            rivals = self._contest.leave(name)
            self._bases.pop(name, None)
        else:
            # The file's service of the same name hides this one (``cluster.over``); they are no rivals.
            tokens = () if name in self._file else self._claims(service)
            rivals = self._contest.enter(name, (1, created), tokens)
            self._bases[name] = service
        self._dirty |= dict.fromkeys((name, *sorted(rivals)))

    def set_slice(self, name: str, piece: str, endpoints: tuple[Endpoint, ...]) -> None:
        """Set some of a service's endpoints; the service itself may come later."""
        slices = self._slices.setdefault(name, {})
        slices[piece] = endpoints
        if not endpoints:
            del slices[piece]
        if not slices:
            del self._slices[name]
        self._dirty[name] = None

    def settled(self, lost: Callable[[str, str], None]) -> tuple[Service, ...]:
        """Return all services; the ones that nothing happened to are the same objects as before.

        ``lost`` is told the keys of services, and why each is left out; "" for one that is in.
        """
        for name in self._dirty:
            base = self._bases.get(name)
            if base is None:
                self._whole.pop(name, None)
                continue
            defeat = self._contest.lost(name)
            if defeat is not None:
                self._whole.pop(name, None)
                lost(f"services/{name}", f"{defeat[0]} is used by service {defeat[1].removeprefix('/')}")
                continue
            lost(f"services/{name}", "")
            self._whole[name] = self._merged(base)
        self._dirty.clear()
        return tuple(self._whole.values())

    def _merged(self, base: Service) -> Service:
        slices = self._slices.get(base.id)
        if not slices:
            return base
        if len(slices) == 1:
            return replace(base, endpoints=next(iter(slices.values())))
        found: dict[Address, Endpoint] = {}
        for piece in sorted(slices):
            for endpoint in slices[piece]:
                found.setdefault(endpoint.address, endpoint)
        return replace(base, endpoints=tuple(found.values()))
