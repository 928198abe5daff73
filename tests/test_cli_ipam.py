"""``dataplane ipam`` as its users see it, and what the control API answers."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import cast

import pytest

from dataplane.control.handlers_ipam import ipam_routes
from dataplane.control.ipam import IpamError, Pool, Rules
from dataplane.control.ipam_addresses import Books
from dataplane.control.ipam_engine import Allocator
from dataplane.control.ipam_report import report
from dataplane.control.ipam_store import MemoryStore
from tests.fake_node import FakeNode, dataplane, serving

NOW = 1_000_000.0
RULES = Rules(
    (Pool("default", ip_network("10.244.0.0/27"), 29), Pool("more", ip_network("10.9.0.0/24"), 26, disabled=True)),
    reservations=(ip_network("10.244.0.30/31"), ip_network("10.244.0.31/32"), ip_network("10.9.0.7/32")),
    cooldown=30.0,
)


class SharedBooks:
    """The books of two nodes: node1 has all but one block, node2 borrows."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.first = Allocator("node1", RULES)
        self.second = Allocator("node2", replace(RULES, max_blocks=1))
        self.away = False
        run = self.store.carry_out
        run(self.second.claim_first_block(NOW))
        run(self.first.claim_first_block(NOW))
        for number in range(8):
            run(self.second.assign(f"cni/node2/{number}", NOW, (("pod", f"web-{number}"),)))
        run(self.first.assign("leaked", NOW))
        run(self.first.assign("gone", NOW))
        run(self.first.release("gone", NOW))

    def _check(self) -> None:
        if self.away:
            raise IpamError("etcd: nobody answers")

    async def look(self):
        self._check()
        return RULES, self.store.carry_out(self.first.blocks())

    async def release_address(self, address, seen, now):
        return self.store.carry_out(self.first.release_address(address, now, seen.handle, seen.sequence)) is not None

    async def forget(self, node, now):
        return self.store.carry_out(self.first.forget(node, now))


@pytest.fixture
def books() -> SharedBooks:
    return SharedBooks()


@pytest.fixture
def path(tmp_path: Path, books: SharedBooks) -> Iterator[Path]:
    used = books.store.carry_out(books.second.held())["cni/node2/0"]
    routes = ipam_routes(cast(Books, books), lambda: {used: "default/web-0"}, lambda: frozenset({"node1"}))
    with serving(FakeNode(), tmp_path / "node1.sock", extensions=[routes]):
        yield tmp_path / "node1.sock"


def test_show_lists_pools_and_blocks(path):
    assert (
        dataplane("ipam", "show", "--socket", path).stdout
        == """\
POOL     NODE  CIDR           TOTAL    IN USE  COOLING  RESERVED        FREE
default        10.244.0.0/27     32  11 (34%)        1         2    18 (56%)
more           10.9.0.0/24      256    0 (0%)        0         1  255 (100%)
"""
    )
    lines = dataplane("ipam", "show", "--show-blocks", "--socket", path).stdout.splitlines()
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["node2", "10.244.0.8/29", "8"],
        ["node1", "10.244.0.16/29", "8"],
    ]
    assert len(lines) == 5


def test_show_says_who_has_what(path):
    lines = dataplane("ipam", "show", "--show-addresses", "--socket", path).stdout.splitlines()
    assert len(lines) == 12
    assert sum("borrowed" in line for line in lines) == 1
    assert sum("vxlan-tunnel-addr-" in line for line in lines) == 2
    assert any(line.split() == ["10.244.0.9", "node2", "cni/node2/0", "pod=web-0"] for line in lines)
    result = dataplane("ipam", "show", "--show-addresses", "--show-blocks", "--socket", path)
    assert (result.returncode, result.stderr) == (2, "dataplane: --show-blocks and --show-addresses: choose one\n")


def test_show_prints_json(path, books):
    answer = json.loads(dataplane("ipam", "show", "-o", "json", "--socket", path).stdout)
    assert answer == report(*asyncio.run(books.look()))
    for entry in (*answer["pools"], *answer["blocks"]):
        use = entry["use"]
        assert use["total"] == use["in_use"] + use["cooling"] + use["reserved"] + use["free"]


def test_a_leaked_address_is_taken_back(path, books):
    leaked = books.store.carry_out(books.first.held())["leaked"]
    result = dataplane("ipam", "release", leaked, "--socket", path)
    assert result.stdout == f"address {leaked} released, held by leaked of node node1\nOK: 1 change\n"
    result = dataplane("ipam", "release", leaked, "--socket", path)
    assert (result.returncode, result.stderr) == (4, f"dataplane: address {leaked} is held by nobody\n")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["10.244.0.9"], 2, "address 10.244.0.9 is in use: pod default/web-0 has it"),
        (["10.244.0.8"], 2, "address 10.244.0.8 is the tunnel address of node node2"),
        (["10.99.0.1"], 4, "address 10.99.0.1 is held by nobody"),
        (["web-0"], 2, "expected an IP address (got web-0)"),
        (["--node", "node1"], 2, "node node1 is there: only what a node has that will not come back is taken from it"),
        (["--node", "node9"], 4, "node node9 has no address"),
        ([], 2, "expected an ADDRESS or --node NAME"),
        (["10.244.0.9", "--node", "node2"], 2, "expected an ADDRESS or --node NAME"),
    ],
)
def test_what_is_not_leaked_is_not_taken(path, books, arguments, code, line):
    before = books.store.revision
    result = dataplane("ipam", "release", *arguments, "--socket", path)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", f"dataplane: {line}\n")
    assert books.store.revision == before


def test_a_lost_node_gives_everything_back(path, books):
    result = dataplane("ipam", "release", "--node", "node2", "--socket", path)
    assert result.returncode == 0
    assert result.stdout.endswith("OK: 9 changes\n")
    assert {block.affinity for block in asyncio.run(books.look())[1]} == {"node1", ""}


def test_books_that_cannot_be_read_are_an_error(path, books):
    books.away = True
    for arguments in (["show"], ["release", "10.244.0.9"]):
        result = dataplane("ipam", *arguments, "--socket", path)
        assert (result.returncode, result.stderr) == (1, "dataplane: etcd: nobody answers\n")


def test_an_address_that_was_given_out_again_is_not_taken(books):
    address = ip_address(books.store.carry_out(books.first.held())["leaked"])
    _, blocks = asyncio.run(books.look())
    seen = next(block.allocations[block.ordinal(address)] for block in blocks if address in block.cidr)
    books.store.carry_out(books.first.release("leaked", NOW))
    books.store.carry_out(books.first.assign_requested(address, "leaked", NOW + 60))
    assert not asyncio.run(books.release_address(address, seen, NOW))
