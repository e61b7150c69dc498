"""The rules of the source tree that no single module can keep alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "__init__.py", *sorted((ROOT / "core").rglob("*.py")), *sorted((ROOT / "nodes").rglob("*.py"))]
HOST = {"comfy", "comfy_extras", "comfy_api", "folder_paths", "server", "nodes", "execution", "latent_preview"}


def imports(path):
    """(level, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_only_core_host_imports_the_host(path):
    if path.is_relative_to(ROOT / "core" / "host"):
        return
    assert not [m for level, m in imports(path) if level == 0 and m.split(".")[0] in HOST]


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_nothing_but_the_hosts_packages_is_imported(path):
    import sys

    allowed = {"torch", "safetensors", "numpy", "PIL", *HOST, *sys.stdlib_module_names}
    assert not [m for level, m in imports(path) if level == 0 and m.split(".")[0] not in allowed]


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=name)
def test_core_never_imports_nodes_and_core_host_stays_at_the_edge(path):
    inside_host = path.is_relative_to(ROOT / "core" / "host")
    for level, module in imports(path):
        if level:
            depth = len(path.relative_to(ROOT).parts) - level
            target = (*path.relative_to(ROOT).parts[:depth], *module.split("."))
            assert target[0] == "core", f"{name(path)} imports {'.'.join(target)}"
            assert inside_host or target[:2] != ("core", "host"), f"{name(path)} imports {'.'.join(target)}"


@pytest.mark.parametrize(
    "path",
    sorted(p for d in ("core", "nodes", "tools", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py")),
    ids=name,
)
def test_python_files_are_ascii(path):
    path.read_bytes().decode("ascii")


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_nothing_forbidden_in_what_is_shipped(path):
    text = path.read_text(encoding="utf-8")
    for word in ("torch.load(", "pickle", "eval(", "exec(", "subprocess", ".cuda(", "os.system", "urllib", "requests"):
        assert word not in text, f"{name(path)} contains {word}"


NODES = sorted((ROOT / "nodes").glob("*.py"))
LONGEST = 25  # lines of a node's method, without its head


@pytest.mark.parametrize("path", [path for path in NODES if path.name != "__init__.py"], ids=name)
def test_no_node_imports_another_node(path):
    """What several share is in nodes/inputs.py, which imports none of them."""
    others = {other.stem for other in NODES} - {"__init__"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    assert found & others <= ({"inputs"} if path.stem != "inputs" else set())


@pytest.mark.parametrize("path", NODES, ids=name)
def test_nodes_are_thin(path):
    """A node says what it is and hands its work to core; what it lists as its inputs may be long."""
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    lines = {f.name: f.body[-1].end_lineno - f.body[0].lineno + 1 for f in functions if f.name != "INPUT_TYPES"}
    assert {found: count for found, count in lines.items() if count > LONGEST} == {}
