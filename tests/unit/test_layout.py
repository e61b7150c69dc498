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


# the floors of core and, inside it, of core/host: a room imports only from lower floors
FLOORS = (
    ("errors", "files"),
    ("families", "demo"),
    ("text",),
    ("adapters",),
    ("formats",),
    ("erasers", "measures"),
    ("host",),
)
HOST_FLOORS = (("compat",), ("model",), ("text",), ("patches",), ("runs",), ("files",), ("page", "demo"))


def floor(floors, room):
    """Number of a room's floor; fails for a room that none is given."""
    found = [number for number, rooms in enumerate(floors) if room in rooms]
    assert found, f"give the room {room} a floor, in tests/unit/test_layout.py and in CONTRIBUTING"
    return found[0]


def core_imports(path):
    """Parts of the path below core of every module of the pack that a file imports."""
    for level, module in imports(path):
        if level:
            depth = len(path.relative_to(ROOT).parts) - level
            target = (*path.relative_to(ROOT).parts[:depth], *filter(None, module.split(".")))
            assert target[0] == "core", f"{name(path)} imports {'.'.join(target)}"
            yield target[1:]


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=name)
def test_imports_run_one_way(path):
    own = path.relative_to(ROOT / "core").with_suffix("").parts
    for target in core_imports(path):
        said = f"{name(path)} imports core/{'/'.join(target)}"
        if target[0] != own[0]:
            assert floor(FLOORS, target[0]) < floor(FLOORS, own[0]), said
        elif own[0] == "host" and len(target) > 1 and target[1] != own[1]:
            assert floor(HOST_FLOORS, target[1]) < floor(HOST_FLOORS, own[1]), said


def test_no_room_for_what_has_no_name():
    rooms = [p for d in ("core", "nodes", "tools") for p in (ROOT / d).rglob("*") if "__pycache__" not in p.parts]
    assert not [p for p in rooms if p.stem in ("utils", "util", "helpers", "helper", "manager", "misc", "common")]


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
    """What several share is in files without NODES of their own, which import none that have some."""
    others = {other.stem for other in NODES if "\nNODES = " in other.read_text(encoding="utf-8")} - {path.stem}
    assert {"erase", "stack", "train"} - {path.stem} <= others and "inputs" not in others
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    assert not found & others


@pytest.mark.parametrize("path", NODES, ids=name)
def test_nodes_are_thin(path):
    """A node says what it is and hands its work to core; what it lists as its inputs may be long."""
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    lines = {f.name: f.body[-1].end_lineno - f.body[0].lineno + 1 for f in functions if f.name != "INPUT_TYPES"}
    assert {found: count for found, count in lines.items() if count > LONGEST} == {}
