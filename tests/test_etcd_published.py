"""What a node says of itself, and an etcd that will not have it."""

from dataplane.control import store_etcd
from dataplane.control.etcd import EtcdError
from tests.test_store_etcd import following, prefix, run, settings_of, shared  # noqa: F401 - fixtures


def test_what_etcd_refuses_for_good_is_said_once(shared, prefix, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(store_etcd, "_RETRY_SECONDS", (0.01, 0.01))
    tries = []

    async def refuse(*_: object) -> None:
        tries.append(1)
        raise EtcdError("mvcc: database space exceeded")

    async def work() -> None:
        async with following(settings_of(shared, prefix)) as (node,):
            await node.until(lambda: len(shared.range(f"{prefix}/pods/")) == 1)
            monkeypatch.setattr(node.source.etcd, "txn", refuse)
            shared.delete(f"{prefix}/pods/node1/default/web-1")
            await node.until(lambda: len(tries) > 3)

    run(work)
    assert caplog.text.count("mvcc: database space exceeded") == 1
