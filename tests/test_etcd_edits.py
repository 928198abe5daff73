"""Edits of services as transactions in a real etcd."""

import asyncio
from types import SimpleNamespace

import pytest

from dataplane.config import parse
from dataplane.control.api import MissingError
from dataplane.control.etcd import Etcd
from dataplane.control.etcd_edits import Edits
from tests.etcd_server import EtcdServer
from tests.node_file import NODE

STATE = parse(NODE, "node.toml").state
ANYTHING = SimpleNamespace(check_edit=lambda *_: ())


def test_deleting_what_is_gone_by_now_waits_for_nothing(tmp_path):
    async def work(server: EtcdServer) -> None:
        client = Etcd([server.url])
        server.put("/elsewhere", "x")
        done = await Edits(client, "/p", ANYTHING).carry_out("delete_service", ("default/web",), STATE)
        assert done is not None
        assert done.revision == 0
        await client.close()

    with EtcdServer(tmp_path) as server:
        asyncio.run(work(server))


@pytest.mark.parametrize("name", ["drain_endpoint", "delete_endpoint"])
def test_an_endpoint_that_is_gone_by_now_is_missing_also_where_others_were_added(tmp_path, name):
    async def work(server: EtcdServer) -> None:
        client = Etcd([server.url])
        key = "/p/endpoints/default/web/api"
        server.put(key, [{"ip": "10.244.1.10"}])
        with pytest.raises(MissingError, match=r"no such endpoint of default/web: 10\.244\.1\.11"):
            await Edits(client, "/p", ANYTHING).carry_out(name, ("default/web", {"ip": "10.244.1.11"}), STATE)
        assert server.range(key) == {key: '[{"ip": "10.244.1.10"}]'}
        await client.close()

    with EtcdServer(tmp_path) as server:
        asyncio.run(work(server))
