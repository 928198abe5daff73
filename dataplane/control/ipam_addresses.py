"""Where the addresses of pods come from that no file names: one interface, whatever keeps the books.

A handle has one address: who asks again gets the same one, so that a node that was killed between an assignment and
what it was for can ask again, or release it by what ``held`` says.
"""

from collections.abc import Mapping
from typing import Protocol

from dataplane.control.ipam import Allocation, Block, Rules
from dataplane.control.state import Address


class Addresses(Protocol):
    """The addresses for the pods of one node. Calls may come at once; each is carried out whole."""

    async def assign(
        self, handle: str, now: float, requested: Address | None = None, attributes: Mapping[str, str] | None = None
    ) -> Address:
        """Return the handle's address, a new one if it has none.

        Args:
            handle: Unique in the cluster.
            now: Seconds since the epoch.
            requested: This address and no other.
            attributes: For people who look at the books, such as ``namespace`` and ``pod``.

        Raises:
            IpamError: There is none (``NoAddressError``), the requested one is not to be had (``TakenError``), or the
                store that keeps the books cannot be reached.
        """
        ...

    async def release(self, handle: str, now: float) -> None:
        """Take back what the handle holds; nothing happens if that is nothing.

        Raises:
            IpamError: The store that keeps the books cannot be reached.
        """
        ...

    async def held(self) -> Mapping[str, Address]:
        """Return what is held by handles of this node, without the node's own tunnel address.

        Raises:
            IpamError: The store that keeps the books cannot be reached.
        """
        ...


class Books(Addresses, Protocol):
    """The same for people who look at the books, and put them right."""

    async def look(self) -> tuple[Rules, tuple[Block, ...]]:
        """Return the rules in force and all blocks of the cluster.

        Raises:
            IpamError: The store that keeps the books cannot be reached.
        """
        ...

    async def release_address(self, address: Address, seen: Allocation, now: float) -> bool:
        """Take back an address if it is still held as it was seen; return whether it was.

        Raises:
            IpamError: The store that keeps the books cannot be reached.
        """
        ...

    async def forget(self, node: str, now: float) -> tuple[Address, ...]:
        """Take back all that a node has which will not come back, its blocks too; return its addresses.

        Raises:
            IpamError: The store that keeps the books cannot be reached.
        """
        ...
