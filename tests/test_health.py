"""healthCheckNodePort: what a load balancer in front of the nodes is told."""

import asyncio
import json
import logging
import socket
import urllib.error
import urllib.request
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest

from dataplane.control.health import HealthServer
from dataplane.control.state import Balancing, DesiredState, Node, Service
from tests.service_states import endpoint, state, web

LOOPBACK = IPv4Address("127.0.0.2")
ANOTHER = IPv4Address("127.0.0.3")


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def listening(monkeypatch):
    """Let the node's address be one of the loopback interface, which it never is."""
    monkeypatch.setattr("dataplane.control.services.node_port_addresses", lambda addresses, _: addresses)


def desired(*services: Service, **fields: Any) -> DesiredState:
    return state(*services, node=Node("node1", addresses=(LOOPBACK,)), balancing=Balancing(), **fields)


def checked(port: int, *given, **fields) -> Service:
    return web(*given, type="LoadBalancer", external_policy="Local", health_check_node_port=port, **fields)


def ask(port: int, path: str = "/", host: str = "127.0.0.2") -> tuple[int, dict[str, str], Any]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as answer:
            return answer.status, dict(answer.headers), json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.load(error)


async def served(server: HealthServer, port: int, *states: DesiredState) -> list[tuple[int, dict[str, str], Any]]:
    answers = []
    for each in states:
        await server.update(each)
        answers.append(await asyncio.to_thread(ask, port))
    await server.close()
    return answers


def test_a_node_with_an_endpoint_answers_200_and_how_many(listening, port):
    given = desired(checked(port, endpoint("10.244.1.10"), endpoint("10.244.2.10")))
    ((status, headers, body),) = asyncio.run(served(HealthServer(), port, given))
    assert status == 200
    assert body == {
        "service": {"namespace": "default", "name": "web"},
        "localEndpoints": 1,
        "serviceProxyHealthy": True,
    }
    assert headers["X-Load-Balancing-Endpoint-Weight"] == "1"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Type"].startswith("application/json")


def test_a_node_without_endpoints_answers_503_and_follows_the_state(listening, port):
    there, gone = desired(checked(port, endpoint("10.244.1.10"))), desired(checked(port, endpoint("10.244.2.10")))
    answers = asyncio.run(served(HealthServer(), port, gone, there, gone))
    assert [status for status, _, _ in answers] == [503, 200, 503]
    assert [body["localEndpoints"] for _, _, body in answers] == [0, 1, 0]
    assert answers[0][1]["X-Load-Balancing-Endpoint-Weight"] == "0"


def test_every_path_is_answered(listening, port):
    async def run():
        server = HealthServer()
        await server.update(desired(checked(port)))
        answer = await asyncio.to_thread(ask, port, "/healthz?x=1")
        await server.close()
        return answer

    assert asyncio.run(run())[0] == 503


def test_listeners_come_and_go_with_their_services(listening, port):
    async def run():
        server = HealthServer()
        ports = []
        for services in ((checked(port),), (), (checked(port),)):
            await server.update(desired(*services))
            ports.append(server.ports)
        await server.close()
        return ports, server.ports

    assert asyncio.run(run()) == ([[port], [], [port]], [])


def test_listeners_follow_the_addresses_of_node_ports(listening, port):
    async def run():
        server = HealthServer()
        for address in (LOOPBACK, ANOTHER):
            await server.update(replace(desired(checked(port)), node=Node("node1", addresses=(address,))))
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(ask, port)
        answer = await asyncio.to_thread(ask, port, host=str(ANOTHER))
        await server.close()
        return answer

    assert asyncio.run(run())[0] == 503


def test_a_port_that_is_taken_is_said_once_and_listened_on_when_it_is_free(listening, port, caplog):
    async def run():
        server = HealthServer()
        with socket.socket() as other:
            other.bind(("127.0.0.2", port))
            other.listen()
            for _ in range(2):
                await server.update(desired(checked(port)))
                assert server.ports == []
        await server.update(desired(checked(port)))
        answer = await asyncio.to_thread(ask, port)
        await server.close()
        return answer

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(run())[0] == 503
    text = f"health check cannot listen service=default/web address=127.0.0.2:{port}: Address already in use"
    assert caplog.messages == [text]


def test_nothing_is_opened_without_such_a_service():
    server = HealthServer()
    asyncio.run(server.update(desired(web(endpoint("10.244.1.10")))))
    assert server.ports == []
