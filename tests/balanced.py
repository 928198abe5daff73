"""Pools and services of type LoadBalancer, in few words."""

from ipaddress import ip_address
from typing import Any

from dataplane.control.state import Address, AddressPool, Service, ServicePort


def pool(text: str, name: str = "default", **more: Any) -> AddressPool:
    """Return a pool of ranges such as ``192.0.2.1-192.0.2.3``, or single addresses."""
    pairs = [(part.partition("-")[0], part.rpartition("-")[2]) for part in text.split()]
    return AddressPool(name, tuple((ip_address(first), ip_address(last)) for first, last in pairs), **more)


def service(name: str = "web", *, port: int = 80, notes: dict[str, str] | None = None, **more: Any) -> Service:
    annotations = tuple((f"metallb.io/{key}", value) for key, value in (notes or {}).items())
    ports = more.pop("ports", (ServicePort(port),))
    return Service(name, type="LoadBalancer", ports=ports, annotations=annotations, **more)


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))
