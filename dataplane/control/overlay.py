"""What the control API has changed in the services of the file.

The file stays the base: a reload reads it again and the changes are laid over it anew, so both an edit of the file and
an edit by the API are kept until the node stops. A service that the API set replaces the file's one whole; endpoints
that it added, drained or deleted are changed one by one in whatever service there is, and are dropped with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from dataplane.control.state import Address, Endpoint, Service

Key = TypeVar("Key")
Value = TypeVar("Value")
_Endpoints: TypeAlias = Mapping[Address, Endpoint | None]


@dataclass(frozen=True, slots=True)
class Overlay:
    """An immutable set of changes; None is something that was deleted.

    Attributes:
        services: By ``namespace/name``.
        endpoints: By the service's id and the endpoint's address.
    """

    services: Mapping[str, Service | None] = field(default_factory=lambda: MappingProxyType({}))
    endpoints: Mapping[str, _Endpoints] = field(default_factory=lambda: MappingProxyType({}))

    def with_service(self, service: Service) -> "Overlay":
        """Set a service, with its endpoints; what was known of its endpoints is forgotten."""
        return Overlay(
            {**self.services, service.id: replace(service, origin="api")}, _without(self.endpoints, service.id)
        )

    def without_service(self, name: str) -> "Overlay":
        """Delete a service, the file's too."""
        return Overlay({**self.services, name: None}, _without(self.endpoints, name))

    def with_endpoint(self, name: str, endpoint: Endpoint) -> "Overlay":
        """Add an endpoint to a service, or change the one at its address."""
        return self._set(name, endpoint.address, endpoint)

    def without_endpoint(self, name: str, address: Address) -> "Overlay":
        """Delete a service's endpoint."""
        return self._set(name, address, None)

    def _set(self, name: str, address: Address, endpoint: Endpoint | None) -> "Overlay":
        held = self.endpoints.get(name, {})
        return Overlay(self.services, {**self.endpoints, name: {**held, address: endpoint}})

    def over(self, base: tuple[Service, ...]) -> tuple[Service, ...]:
        """Return the services that there are: the file's in its order, then those that only the API knows.

        Services that nothing is known of are the same objects.
        """
        if not self.services and not self.endpoints:
            return base
        return tuple(self._changed(service) for service in self._services(base))

    def _services(self, base: tuple[Service, ...]) -> Iterator[Service]:
        new = dict(self.services)
        for service in base:
            name = service.id
            if name not in new:
                yield service
            elif (own := new.pop(name)) is not None:
                yield own
        yield from (service for service in new.values() if service is not None)

    def _changed(self, service: Service) -> Service:
        changes = self.endpoints.get(service.id)
        if not changes:
            return service
        endpoints: dict[Address, Endpoint | None] = {each.address: each for each in service.endpoints}
        endpoints.update(changes)
        return replace(service, endpoints=tuple(each for each in endpoints.values() if each is not None))

    def without_strays(self, base: tuple[Service, ...]) -> "Overlay":
        """Forget the endpoints of services that there are no more: the file has lost them."""
        names = {service.id for service in self._services(base)}
        return Overlay(self.services, {name: held for name, held in self.endpoints.items() if name in names})


def _without(mapping: Mapping[Key, Value], key: Key) -> dict[Key, Value]:
    return {other: value for other, value in mapping.items() if other != key}
