"""The example workflows in a real browser on a real server: each opens whole, and those of the demo model run."""

import json
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).absolute().parent
ROOT = HERE.parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
WORKFLOWS = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in EXAMPLES}
TYPES = {name: {node["type"] for node in workflow["nodes"]} for name, workflow in WORKFLOWS.items()}
RUNNING = [name for name, types in TYPES.items() if "CheckpointLoaderSimple" not in types]  # others need a download

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def opened(browser, page_server):
    """{name of an example: what examples.mjs says of it}."""
    node, environment = browser
    child = subprocess.run(
        [node, str(HERE / "examples.mjs"), page_server.url, *map(str, EXAMPLES)],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert not child.returncode, child.stderr
    return {found["name"]: found for found in map(json.loads, child.stdout.splitlines())}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_opens_whole(opened, name):
    found = opened[name]
    assert not found["error"], found["error"]
    assert not found["missing"]
    assert not found["changed"]
    twin = json.loads((ROOT / "tests" / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    assert found["prompt"].keys() == twin.keys()
    for key, node in twin.items():
        assert found["prompt"][key]["class_type"] == node["class_type"]
        assert node["inputs"].items() <= found["prompt"][key]["inputs"].items()  # newer pages know more inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_it_runs(page_server, opened, name):
    entry = page_server.wait(page_server.queue(opened[name]["prompt"]), timeout=300)
    for node in WORKFLOWS[name]["nodes"]:
        if node["type"] in ("SaveImage", "PreviewImage"):
            assert entry["outputs"][str(node["id"])]["images"], node.get("title")
