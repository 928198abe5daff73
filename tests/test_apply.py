"""Rolling back: what a plan that cannot be carried out leaves behind. Links are stand-ins, namespaces are /dev/null."""

import asyncio
import os
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataplane.apply import PodLink, Wiring
from dataplane.control.edits import ChangePod
from dataplane.control.state import DesiredState, Node, Pod
from dataplane.devices.namespace import NamespaceError, NamespaceHandle
from dataplane.pipeline import Tables

PODS = [
    Pod(name, "default", name, (IPv4Address(f"10.244.1.{i}"),), i, 1450, f"cali{name}") for i, name in enumerate("abc")
]
STATE = DesiredState(node=Node("node1"), pods=tuple(PODS))


class FakeTap:
    """A TAP that is open, or not."""

    def __init__(self) -> None:
        self._fd = 7

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        self._fd = -1


def link(pod: Pod) -> PodLink:
    handle = NamespaceHandle(os.open("/dev/null", os.O_RDONLY), Path(pod.netns), created=False, cookie=0)
    tap: Any = FakeTap()
    return PodLink(pod, tap, handle, 0)


def test_a_link_that_cannot_be_put_back_hides_no_reason_and_keeps_no_other_down(caplog):
    engine: Any = SimpleNamespace(
        tables=Tables(flows=16), every_tick=lambda tick: None, refresh=lambda: None, detach=lambda row: None,
        attach=lambda row, fd, name: None,
    )  # fmt: skip
    wiring = Wiring(engine, SimpleNamespace())  # type: ignore[arg-type]
    wiring.state = STATE
    wiring.interfaces = {pod.interface: row for row, pod in enumerate(PODS, 4)}
    wiring.links = {pod.interface: link(pod) for pod in PODS}

    def opened(pod: Pod, state: DesiredState) -> PodLink:
        if (pod.name, pod.mtu) in (("b", 1400), ("a", 1450)):
            raise NamespaceError(pod.netns, "open", 2, f"gone at {pod.mtu}")
        return link(pod)

    wiring._open = opened  # type: ignore[method-assign]
    changes = [ChangePod(pod, replace(pod, mtu=1400)) for pod in PODS]
    try:
        with pytest.raises(NamespaceError, match="namespace b: open: gone at 1400"):
            asyncio.run(wiring.apply(changes, STATE))
        assert {name for name, each in wiring.links.items() if each.tap.fileno() < 0} == {"calia"}
    finally:
        for each in wiring.links.values():
            os.close(each.namespace.fd)
    assert "pod cannot be restored name=default/a: namespace a: open: gone at 1450" in caplog.text
