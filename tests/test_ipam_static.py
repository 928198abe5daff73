"""The books of a node that stands alone, in a file."""

import asyncio
import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from dataplane.config import parse
from dataplane.control.ipam import IpamError, NoAddressError, TakenError
from dataplane.control.ipam_static import StaticAddresses
from dataplane.control.state import DesiredState

NOW = 1_000_000.0
FILE = """
[pods]
cidr = ["10.244.1.0/29"]
[[pods.static]]
name = "web-0"
ip = ["10.244.1.2"]
"""


@pytest.fixture
def state() -> DesiredState:
    return parse(FILE, "node.toml").state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "node1.ipam.json"


def test_pods_get_what_the_file_leaves(path, state):
    async def run():
        addresses = StaticAddresses(path, state)
        given = [str(await addresses.assign(f"pod{number}", NOW)) for number in range(6)]
        assert given == [f"10.244.1.{last}" for last in (1, 3, 4, 5, 6, 7)]
        assert str(await addresses.assign("pod2", NOW)) == given[2]
        with pytest.raises(NoAddressError):
            await addresses.assign("pod6", NOW)
        with pytest.raises(TakenError, match=r"10\.244\.1\.2 is reserved"):
            await addresses.assign("pod6", NOW, ip_address("10.244.1.2"))
        with pytest.raises(TakenError, match="already"):
            await addresses.assign("pod2", NOW, ip_address("10.244.1.7"))
        await addresses.release("pod2", NOW)
        assert str(await addresses.assign("pod6", NOW, ip_address(given[2]))) == given[2]

    asyncio.run(run())


def test_a_node_that_starts_again_knows_what_is_held(path, state):
    async def run():
        first = StaticAddresses(path, state)
        given = {f"pod{number}": await first.assign(f"pod{number}", NOW) for number in range(3)}
        again = StaticAddresses(path, state)
        assert await again.held() == given
        assert await again.assign("pod9", NOW) not in given.values()
        for handle in await again.held():
            await again.release(handle, NOW)
        assert not path.exists(), "a node that holds nothing leaves nothing"
        assert list(path.parent.iterdir()) == []

    asyncio.run(run())


def test_what_cools_down_does_so_over_a_restart(path, state):
    async def run():
        first = StaticAddresses(path, state, (ip_network("10.244.1.4/30"),), cooldown=30)
        given = [await first.assign(handle, NOW) for handle in "ab"]
        await first.release("a", NOW)
        again = StaticAddresses(path, state, (ip_network("10.244.1.4/30"),), cooldown=30)
        with pytest.raises(NoAddressError):
            await again.assign("c", NOW + 29)
        assert await again.assign("c", NOW + 30) == given[0]

    asyncio.run(run())


def test_blocks_that_change_leave_what_is_held(path, state):
    async def run():
        addresses = StaticAddresses(path, state)
        old = await addresses.assign("a", NOW)
        addresses.follow(replace(state, pod_network=replace(state.pod_network, cidrs=(ip_network("10.9.0.0/16"),))))
        new = await addresses.assign("b", NOW)
        assert new in ip_network("10.9.0.0/16")
        assert await addresses.held() == {"a": old, "b": new}
        await addresses.release("a", NOW)
        assert list(await addresses.held()) == ["b"]

    asyncio.run(run())


def test_books_that_cannot_be_read_are_an_error_and_stay(path, state):
    async def run():
        path.parent.mkdir()
        for text in ("{", "[]", '{"blocks/10.244.1.0-29": {}}', "\udcff"):
            path.write_text(text, errors="surrogateescape")
            addresses = StaticAddresses(path, state)
            for asking in (addresses.assign("a", NOW), addresses.release("a", NOW), addresses.held()):
                with pytest.raises(IpamError, match="the books of addresses cannot be read"):
                    await asking
            assert path.read_text(errors="surrogateescape") == text

    asyncio.run(run())


def test_an_address_that_cannot_be_written_down_is_not_given(path, state):
    async def run():
        addresses = StaticAddresses(path, state)
        assert await addresses.held() == {}
        path.parent.write_text("a file where the folder should be")
        with pytest.raises(IpamError, match="the books of addresses cannot be written"):
            await addresses.assign("a", NOW)
        path.parent.unlink()
        assert await addresses.held() == {}
        await addresses.assign("b", NOW)
        assert json.loads(path.read_text())

    asyncio.run(run())
