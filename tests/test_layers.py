"""The house's order: what may import what, how large a file may be, what has a test and a package."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dataplane"

# Lowest first. Names of one line stand beside each other and may not import one another; a folder is one name.
LAYERS = [
    {"linking", "cni"},
    {"jit"},
    {"codecs", "tables"},
    {"verdict"},
    {"batch"},
    {"stages", "devices", "control"},
    {"pipeline"},
    {"resolve"},
    {"slowpath"},
    {"engine"},
    {"config"},
    {"balance", "settle", "strays", "containers"},
    {"apply", "announce"},
    {"report_flows"},
    {"report_services"},
    {"underlay", "host", "report"},
    {"node"},
    {"failover", "follow", "dns_service", "forward", "addresses"},
    {"attach", "resolver"},
    {"daemon"},
    {"lab_plan", "lab_serve"},
    {"lab_file"},
    {"lab_machine"},
    {"lab_look"},
    {"lab", "lab_enter"},
    {"cli_base"},
    {"cli_show", "cli_lab"},
    {"cli_edit", "cli_dns", "cli_cni", "cli_cluster", "cli_ipam", "cli_loadbalancer"},
    {"cli"},
    {"__main__"},
]
# verdict and jit are constants and words that tables and codecs need; nothing else is lower than its layer.
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

SOURCES = sorted(
    path
    for folder in (
        PACKAGE,
        ROOT / "codecs",
        ROOT / "tables",
        PACKAGE / "stages",
        PACKAGE / "devices",
        PACKAGE / "control",
    )
    for path in folder.glob("*.py")
)
ALL = SOURCES + sorted((ROOT / "bench").glob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))


def layer_of(path: Path) -> str:
    """The name in ``LAYERS`` that a file belongs to; ``config_lines`` is part of ``config``."""
    parent = path.parent.name
    name = parent if parent in RANK else path.stem
    return "config" if name.startswith("config") else name


def imported(path: Path) -> set[str]:
    """The layers that a file imports, wherever in the file."""
    found = set()
    for statement in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(statement, ast.ImportFrom) and statement.module:
            modules = [f"{statement.module}.{alias.name}" for alias in statement.names]
        elif isinstance(statement, ast.Import):
            modules = [alias.name for alias in statement.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "dataplane" and len(parts) > 1:
                name = "config" if parts[1].startswith("config") else parts[1]
                if name in RANK:
                    found.add(name)
    return found


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=identify)
def test_a_layer_imports_only_lower_layers(path):
    own = layer_of(path)
    assert own in RANK, f"{own} has no place in LAYERS"
    wrong = {name for name in imported(path) if name != own and RANK[name] >= RANK[own]}
    assert not wrong


@pytest.mark.parametrize("path", ALL, ids=identify)
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines"


def kernels(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "kernel" for mark in node.decorator_list)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_kernels_have_few_parameters(path):
    # An ARP packet has seven fields, and its emit takes them all.
    for kernel in kernels(path):
        assert len(kernel.args.args) <= (7 if path.stem == "arp" else 6), kernel.name


def test_only_the_cli_starts_without_numba():
    """``--help``, ``check`` and ``show`` must start in a tenth of a second: their modules import nothing heavy."""
    heavy = {"numba", "numpy", "aiohttp", "rich", "uvloop"}
    control = [PACKAGE / "control" / f"{name}.py" for name in ("client", "query", "views", "ipvsadm", "conntrack")]
    for path in (*PACKAGE.glob("cli*.py"), *control):
        for statement in ast.parse(path.read_text()).body:
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            if isinstance(statement, ast.ImportFrom):
                names = [statement.module or ""]
            assert not {name.split(".")[0] for name in names} & heavy, path


def test_every_folder_with_sources_is_packaged_and_the_links_point_home():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in SOURCES}
    packaged = {ROOT / project["package-dir"].get(name, name.replace(".", "/")) for name in project["packages"]}
    assert packaged == folders
    for name in ("codecs", "tables"):
        assert (PACKAGE / name).is_symlink()
        assert (PACKAGE / name).resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()
    for name in ("node.toml", "cluster.toml"):
        assert (ROOT / "examples" / name).resolve() == PACKAGE / name


def test_numba_is_spoken_to_in_one_place():
    allowed = {PACKAGE / "linking.py", PACKAGE / "jit.py", PACKAGE / "devices" / "syscalls.py"}
    for path in SOURCES:
        if path in allowed:
            continue
        for statement in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            if isinstance(statement, ast.ImportFrom):
                names = [statement.module or ""]
            assert not any(name.split(".")[0] in ("numba", "llvmlite") for name in names), path
