"""Shelves of objects, events and waiting times of a watch, without any server."""

import asyncio
import json
import socket
from itertools import pairwise
from typing import Any

import pytest

from dataplane.control import kube_api
from dataplane.control.kube_api import ApiError, AwayError, KubeApi, Resource
from dataplane.control.kube_config import Access
from dataplane.control.kube_watch import Backoff, Entry, Reflector, Shelf
from tests.test_kube_api import spec_of

SERVICES = Resource("services")


def test_an_object_whose_version_is_known_is_not_converted_again():
    converted = []

    def convert(item):
        converted.append(item)
        return item["spec"], ""

    shelf = Shelf("things", convert, lambda *_: None)
    item = {"metadata": {"name": "a", "resourceVersion": "7"}, "spec": {}}
    shelf.put(*shelf.read(item))
    key, entry = shelf.read(item)
    assert (key, entry is shelf.entries["a"], len(converted)) == ("a", True, 1)
    shelf.put(*shelf.read({"metadata": {"name": "a", "resourceVersion": "8"}, "spec": {}}))
    assert shelf.entries["a"] == Entry("8", {})


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"1", b'{"type": "ERROR"}', b'{"type": "ERROR", "object": {"kind": "Status", "code": 500}}'],
)
def test_an_event_that_is_none_breaks_the_watch_off(line):
    shelf: Shelf[str] = Shelf("things", spec_of, lambda *_: None)
    reflector = Reflector(KubeApi(Access("http://127.0.0.1:1")), (SERVICES,), shelf)

    async def lines():
        yield line

    with pytest.raises((ApiError, AwayError)):
        asyncio.run(reflector._follow(lines()))


@pytest.mark.parametrize("event", [{}, {"type": "NEW"}, {"type": "ADDED"}, {"type": "BOOKMARK"}, {"type": "DELETED"}])
def test_an_event_without_an_object_changes_nothing(event):
    shelf: Shelf[str] = Shelf("things", spec_of, lambda *_: None)
    reflector = Reflector(KubeApi(Access("http://127.0.0.1:1")), (SERVICES,), shelf)

    async def lines():
        yield json.dumps(event).encode()

    asyncio.run(reflector._follow(lines()))
    assert shelf.entries == {}


def test_an_event_without_an_end_is_not_collected_for_ever(monkeypatch):
    monkeypatch.setattr(kube_api, "LONGEST_EVENT", 5000)

    class Endless:
        async def readany(self):
            return b"x" * 1000

    async def whole():
        content: Any = Endless()
        return [line async for line in kube_api._lines(content, asyncio.get_running_loop().time() + 20)]

    with pytest.raises(AwayError, match="an event of more than 5000 bytes"):
        asyncio.run(whole())


def test_the_kernel_notices_a_server_that_has_vanished():
    made = kube_api._probed_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1)))
    with made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, interval, probes = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT
        assert [made.getsockopt(socket.IPPROTO_TCP, each) for each in (idle, interval, probes)] == [15, 5, 3]


def test_waiting_gets_longer_up_to_a_limit_and_is_never_the_same_for_all():
    longest, shortest = Backoff(lambda: 1.0), Backoff(lambda: 0.0)
    waits = [longest.failed() for _ in range(12)]
    assert waits[:4] == [0.2, 0.4, 0.8, 1.6]
    assert waits[-1] == 30.0
    assert all(a <= b for a, b in pairwise(waits))
    assert [shortest.failed() for _ in range(3)] == [0.1, 0.2, 0.4]
    longest.succeeded()
    assert longest.failed() == 0.2
