"""The books of a node that stands alone: its blocks are ``pods.cidr``, and a file of its run directory keeps them.

Each change is in the file before the caller learns of it, so a killed node knows the addresses of its pods when it
starts again. The directory is one that does not outlive the host's boot, as pods do not either: nothing is synced.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

from dataplane.control.ipam import BLOCK_SIZES, Allocation, Block, IpamError, Pool, Rules, TakenError, cooled
from dataplane.control.ipam_engine import Allocator
from dataplane.control.ipam_json import BookError, dump, load
from dataplane.control.ipam_store import MemoryStore, Result, Steps, Value
from dataplane.control.state import Address, DesiredState, Network


class StaticAddresses:
    """``Addresses`` out of the file's ``pods.cidr``.

    Args:
        path: The file of the books. It exists while an address is held or cools down.
        state: As the node's file has it, without what CNI adds.
        reservations: Never given out, beside the addresses of the file's pods.
    """

    def __init__(
        self, path: Path, state: DesiredState, reservations: tuple[Network, ...] = (), cooldown: float = 0
    ) -> None:
        self._path = path
        self._given = reservations
        self._cooldown = cooldown
        self._books: MemoryStore | None = None
        self._allocator = Allocator(state.node.name, Rules())
        self.follow(state)

    def follow(self, state: DesiredState) -> None:
        """Give out what this state leaves, from now on; what is held stays held."""
        cidrs = state.pod_network.cidrs
        used = [address for pod in state.pods for address in pod.addresses]
        used += [cidr.network_address for cidr in cidrs[:1]]  # the tunnel's own, and the host's
        reservations = (*self._given, *map(ip_network, used))
        self._allocator.rules = Rules(
            pools=tuple(_pool(cidr) for cidr in cidrs),
            reservations=reservations,
            strict_affinity=True,
            max_blocks=sum(_pool(cidr).blocks for cidr in cidrs),
            cooldown=self._cooldown,
        )

    async def assign(
        self, handle: str, now: float, requested: Address | None = None, attributes: Mapping[str, str] | None = None
    ) -> Address:
        """Return the handle's address, a new one if it has none (``Addresses.assign``)."""
        books = self._open()
        mine = books.carry_out(self._allocator.held()).get(handle)
        if mine is not None:
            if requested not in (None, mine):
                raise TakenError(f"{handle} has address {mine} already (asked for {requested})")
            return mine
        labels = tuple(sorted((attributes or {}).items()))
        if requested is None:
            return self._carry_out(self._allocator.assign(handle, now, labels), now)
        return self._carry_out(self._allocator.assign_requested(requested, handle, now, labels), now)

    async def release(self, handle: str, now: float) -> None:
        """Take back what the handle holds (``Addresses.release``)."""
        self._carry_out(self._allocator.release(handle, now), now)

    async def held(self) -> Mapping[str, Address]:
        """Return what is held (``Addresses.held``)."""
        return self._open().carry_out(self._allocator.held())

    async def look(self) -> tuple[Rules, tuple[Block, ...]]:
        """Return the rules in force and the node's blocks (``Books.look``)."""
        entries = self._open().entries().values()
        return self._allocator.rules, tuple(entry for entry in entries if isinstance(entry, Block))

    async def release_address(self, address: Address, seen: Allocation, now: float) -> bool:
        """Take back an address (``Books.release_address``)."""
        steps = self._allocator.release_address(address, now, seen.handle, seen.sequence)
        return self._carry_out(steps, now) is not None

    async def forget(self, node: str, now: float) -> tuple[Address, ...]:
        """Take back what a node has (``Books.forget``): these books know of one node only."""
        return self._carry_out(self._allocator.forget(node, now), now)

    # --- the file ----------------------------------------------------------------------------------------------------

    def _carry_out(self, steps: Steps[Result], now: float) -> Result:
        """Carry out a transaction on a copy of the books, and make that the books when it is in the file."""
        books = self._open()
        draft = books.copy()
        result = draft.carry_out(steps)
        if draft.revision != books.revision:
            self._save(draft, now)
            self._books = draft
        return result

    def _open(self) -> MemoryStore:
        if self._books is None:
            self._books = MemoryStore(self._read())
        return self._books

    def _read(self) -> Iterable[tuple[str, Value]]:
        try:
            given = json.loads(self._path.read_text())
            return [(key, load(key, json.dumps(value))) for key, value in given.items()]
        except FileNotFoundError:
            return []
        except (OSError, BookError, ValueError, AttributeError) as error:
            raise IpamError(f"{self._path}: the books of addresses cannot be read: {error}") from None

    def _save(self, books: MemoryStore, now: float) -> None:
        entries = books.entries()
        blocks = [cooled(value, now, self._cooldown) for value in entries.values() if isinstance(value, Block)]
        try:
            if all(block.empty for block in blocks):
                with suppress(FileNotFoundError):
                    self._path.unlink()
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_name(self._path.name + ".new")
            draft.write_text(json.dumps({key: json.loads(dump(value)) for key, value in entries.items()}))
            os.replace(draft, self._path)
        except OSError as error:
            raise IpamError(f"{self._path}: the books of addresses cannot be written: {error.strerror}") from None


def _pool(cidr: Network) -> Pool:
    """Return a prefix as one block, or as some where that would be too large."""
    return Pool(str(cidr), cidr, max(cidr.prefixlen, BLOCK_SIZES[cidr.version][0]))
