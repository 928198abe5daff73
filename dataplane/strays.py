"""UDP flows that began before the service did that they are addressed to.

A client that goes on sending from one port would stay with what was at the address before: a server on the LAN, the
node itself. TCP has connections that end; UDP flows live for as long as they are used, so those that a new service is
meant to have are ended (kube-proxy: ``pkg/proxy/conntrack/cleanup.go``). Flows of a backend that is deleted are none of
this: they remember its generation.
"""

import asyncio
from collections.abc import Collection, Iterable

import numpy as np

from dataplane.control.edits import AddServer, Edit
from dataplane.control.services import ServerKey
from dataplane.tables.address import to_address
from dataplane.tables.flow import END, FREE, TUPLE, FlowTable

_CHUNK = 8192  # flows that are looked at in one step, 0.1 ms
_UDP = 17


def claimed(edits: Iterable[Edit]) -> frozenset[ServerKey]:
    """Return what new UDP services are found by."""
    return frozenset(
        edit.server.key for edit in edits if isinstance(edit, AddServer) and edit.server.key.protocol == "UDP"
    )


async def end(flows: FlowTable, keys: Collection[ServerKey], now: int) -> int:
    """Let the time be over for flows to these services that have no backend; return how many those were.

    Packets have their turn all the while. The next one of such a flow begins another, with a backend.
    """
    ports = np.array(sorted({key.port for key in keys}), np.uint16)
    used = flows.flows[: int(flows.state[END]) if keys else 0]
    ended = 0
    for start in range(0, len(used), _CHUNK):
        chunk = used[start : start + _CHUNK]
        originals = chunk.view(TUPLE)[::2]
        alive = (chunk["expires_ns"] != FREE) & (chunk["backend"] < 0) & (originals["protocol"] == _UDP)
        for row in np.flatnonzero(alive & np.isin(originals["dport"], ports)).tolist():
            original = originals[row]
            address = to_address(original["dst_hi"], original["dst_lo"])
            if ServerKey("UDP", address, int(original["dport"])) in keys:
                chunk["expires_ns"][row] = now
                ended += 1
        await asyncio.sleep(0)
    return ended
