"""Fixtures of the end-to-end tests: one network per module, gone when the module ends; and the table of conformance.

A test that shows what somebody else's test asserts says so: ``@pytest.mark.conformance("name", source="whose")``. With
``--conformance FILE`` the results of these tests are written as a table, one line per name: ``pass`` when every test of
that name has passed.
"""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.netns.harness import Namespace, Network
from tests.netns.services import Cluster, Spot

RESULTS: pytest.StashKey[dict[tuple[str, str], list[tuple[str, bool]]]] = pytest.StashKey()
HEAD = """# Conformance

What other projects' tests assert, and what became of it here. `make conformance` writes this page: every line stands
for one or more tests in `tests/netns`, which send real packets with real programs through network namespaces.

Kubernetes' names are those of `test/e2e/network`. The kernel's selftests are those of
`tools/testing/selftests/net/netfilter`, written afresh from what they describe. The rows of addresses ("client ->
target -> backend") were recorded from Linux 6.1 with the rules that kube-proxy writes for ip_vs: which source address
and port the backend sees, and from where the reply comes.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--conformance FILE``."""
    parser.addoption("--conformance", type=Path, help="write the results of the conformance tests to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Start with no results."""
    config.stash[RESULTS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the result of a phase of a conformance test: a failing fixture fails it, too."""
    report = yield
    for mark in item.iter_markers("conformance"):
        results = item.config.stash[RESULTS].setdefault((mark.kwargs["source"], mark.args[0]), [])
        if report.when == "call" or not report.passed:
            results.append((item.nodeid, report.passed))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table."""
    path = session.config.getoption("--conformance", default=None)
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(table(session.config.stash[RESULTS]))


def table(results: dict[tuple[str, str], list[tuple[str, bool]]]) -> str:
    """Return the page: a section for each source, a line for each name in it."""
    lines, last = [HEAD], ""
    passed = sum(all(good for _, good in runs) for runs in results.values())
    lines.append(f"**{passed} of {len(results)} pass.**\n")
    for (source, name), runs in sorted(results.items()):
        if source != last:
            lines += [f"\n## {source}\n", "| name | result | tests |", "|---|---|---|"]
            last = source
        tests = dict.fromkeys(node.rpartition("/")[2].partition("[")[0] for node, _ in runs)
        result = "pass" if runs and all(good for _, good in runs) else "**fail**"
        lines.append(f"| {name} | {result} | {', '.join(f'`{each}`' for each in tests)} |")
    return "\n".join([*lines, ""])


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A network without anything in it."""
    with Network(tmp_path_factory.mktemp("network")) as made:
        yield made


# The cluster is a module's own: which nodes and pods it has is what the tests of that module are about.


@pytest.fixture
def spot(cluster: Cluster) -> Spot:
    """The addresses and ports of one test, which no other has."""
    return cluster.spot()


@pytest.fixture
def client(cluster: Cluster) -> Namespace:
    """The namespace of the pod that asks."""
    return cluster.pods["client"].namespace
