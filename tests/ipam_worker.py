"""A process that takes addresses out of etcd and gives them back until it is killed: ``python -m tests.ipam_worker``.

Every address is written to one file that all workers append to: ``+`` after it was given, ``-`` before it is released.
So a second ``+`` without a ``-`` between says that an address was given twice.
"""

import asyncio
import os
import random
import sys
import time
from dataclasses import replace
from ipaddress import ip_network

from dataplane.control.etcd import Etcd
from dataplane.control.ipam import NoAddressError, Pool, Rules
from dataplane.control.ipam_etcd import EtcdAddresses

PREFIX = "/dataplane/v1"
POOL = Pool("default", ip_network("10.244.0.0/26"), 29)
RULES = Rules((POOL,), max_blocks=3)
FEW = 1  # blocks of the nodes with odd numbers: they have to borrow half of what they want
MOST = 14  # addresses of one worker: four of them want nearly all that there are
RELEASES = 0.4


def moment() -> float:
    """Return the time of a clock that runs sixty times as fast: a block may be taken after one second of no use."""
    return time.time() * 60


async def work(url: str, node: str, diary: int, seed: int) -> None:
    """Take and release addresses without end."""
    chance = random.Random(seed)
    etcd = Etcd([url])
    rules = replace(RULES, max_blocks=FEW) if int(node[-1]) % 2 else RULES
    addresses = EtcdAddresses(etcd, PREFIX, node, rules)
    await addresses.claim_first_block(moment())
    for handle, address in (await addresses.held()).items():  # what an earlier process of this node has left
        os.write(diary, f"- {address} {handle}\n".encode())
        await addresses.release(handle, moment())
    held: dict[str, object] = {}
    number = 0
    while True:
        if held and (len(held) >= MOST or chance.random() < RELEASES):
            handle = chance.choice(list(held))
            os.write(diary, f"- {held.pop(handle)} {handle}\n".encode())
            await addresses.release(handle, moment())
        else:
            number += 1
            handle = f"{node}-{os.getpid()}-{number}"
            try:
                held[handle] = await addresses.assign(handle, moment())
            except NoAddressError:
                continue
            os.write(diary, f"+ {held[handle]} {handle}\n".encode())
        if chance.random() < 0.05:
            await addresses.tidy(moment())


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND), int(sys.argv[4])))
