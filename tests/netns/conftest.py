"""Fixtures of the end-to-end tests: one network per module, gone when the module ends."""

from collections.abc import Iterator

import pytest

from tests.netns.harness import Network


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A network without anything in it."""
    with Network(tmp_path_factory.mktemp("network")) as made:
        yield made
