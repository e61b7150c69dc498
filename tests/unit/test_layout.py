"""The rules of the source tree that no single module can keep alone."""

import ast
import json
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


def widgets(entry):
    return [v for k, v in entry["inputs"].items() if not isinstance(v, list)]


@pytest.mark.parametrize("path", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_example_and_api_twin_are_the_same_graph(path):
    ui = json.loads(path.read_text(encoding="utf-8"))
    api = json.loads((ROOT / "tests" / "workflows" / path.name).read_text(encoding="utf-8"))
    assert ui["version"] == 0.4 and "definitions" not in ui
    nodes = {str(n["id"]): n for n in ui["nodes"] if n["type"] != "Note"}
    assert {i: n["type"] for i, n in nodes.items()} == {i: n["class_type"] for i, n in api.items()}
    links = {link[0]: link for link in ui["links"]}
    for i, node in nodes.items():
        wired = {s["name"]: [str(links[s["link"]][1]), links[s["link"]][2]] for s in node["inputs"] if s["link"]}
        assert wired == {k: v for k, v in api[i]["inputs"].items() if isinstance(v, list)}
        values = [v for v in node["widgets_values"] if v not in ("fixed", "randomize")]
        assert values == widgets(api[i]), f"widget values of node {i}"
    assert path.with_suffix(".jpg").exists(), "a template needs its picture"
