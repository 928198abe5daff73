"""The control API's part for the books of addresses. The file needs aiohttp, as ``handlers``.

GET    /v1/ipam                       pools, blocks and who has what (``ipam_report``)
DELETE /v1/ipam/addresses/ADDRESS     take back an address that no pod has
DELETE /v1/ipam/nodes/NAME            take back all that a node has which will not come back
"""

import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address

from aiohttp import web

from dataplane.control.api import MissingError
from dataplane.control.ipam import TUNNEL, Allocation, Block, IpamError, Rules
from dataplane.control.ipam_addresses import Books
from dataplane.control.ipam_report import report
from dataplane.control.query import QueryError
from dataplane.control.state import Address

Users = Callable[[], Mapping[Address, str]]
Alive = Callable[[], frozenset[str]]


def ipam_routes(books: Books, users: Users, alive: Alive) -> Callable[[web.Application], None]:
    """Return what adds the routes to the application of the control socket.

    ``users`` returns the pods of the cluster, as far as they are known, by address: theirs are not leaked. ``alive``
    returns the names of the nodes that are there.
    """

    async def show(_: web.Request) -> web.StreamResponse:
        try:
            return web.json_response(report(*await books.look()))
        except IpamError as error:
            return _failed(error)

    async def release(request: web.Request) -> web.StreamResponse:
        address = _address(request.match_info["address"])
        try:
            seen = _holder(await books.look(), address)
            # Asked after the look: an address that is given out again meanwhile has another sequence, and stays.
            if address in users():
                raise QueryError(f"address {address} is in use: pod {users()[address]} has it")
            if seen is None or not await books.release_address(address, seen, time.time()):
                raise MissingError(f"address {address} is held by nobody")
        except IpamError as error:
            return _failed(error)
        line = f"address {address} released, held by {seen.handle} of node {seen.node}"
        return web.json_response({"applied": [line], "errors": []})

    async def forget(request: web.Request) -> web.StreamResponse:
        node = request.match_info["node"]
        if node in alive():
            raise QueryError(f"node {node} is there: only what a node has that will not come back is taken from it")
        try:
            released = await books.forget(node, time.time())
        except IpamError as error:
            return _failed(error)
        if not released:
            raise MissingError(f"node {node} has no address")
        return web.json_response({"applied": [f"address {each} released" for each in released], "errors": []})

    def add(app: web.Application) -> None:
        app.router.add_get("/v1/ipam", show)
        app.router.add_delete("/v1/ipam/addresses/{address}", release)
        app.router.add_delete("/v1/ipam/nodes/{node}", forget)

    return add


def _holder(books: tuple[Rules, tuple[Block, ...]], address: Address) -> Allocation | None:
    """Return whose an address is; None if it is nobody's. A tunnel's own is not to be released."""
    block = next((block for block in books[1] if address in block.cidr), None)
    holder = block.allocations.get(block.ordinal(address)) if block is not None else None
    if holder is not None and holder.handle.startswith(TUNNEL):
        raise QueryError(f"address {address} is the tunnel address of node {holder.node}")
    return holder


def _address(text: str) -> Address:
    try:
        return ip_address(text)
    except ValueError:
        raise QueryError(f"expected an IP address (got {text})") from None


def _failed(error: IpamError) -> web.Response:
    return web.json_response({"error": "unavailable", "message": str(error)}, status=503)
