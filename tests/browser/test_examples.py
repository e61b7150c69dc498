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
DOWNLOADED = {"CheckpointLoaderSimple", "UNETLoader"}
RUNNING = [name for name, types in TYPES.items() if not types & DOWNLOADED]  # others need a download
MODERN = [name for name, types in TYPES.items() if "UNETLoader" in types]  # of models that came after March 2024
LONG = ["MembraneDetectMemorization", "benign_prompts"]  # 32 prompts, to be scrolled
FILES = ("ckpt_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name")

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


def twin_of(name):
    return json.loads((ROOT / "tests" / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def classes(page_server):
    """{class of a node: how the host describes it}."""
    return page_server.object_info()


def require_modern(classes, name):
    if name in MODERN and "EmptySD3LatentImage" not in classes:
        pytest.skip("this host has no EmptySD3LatentImage")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_host_knows_every_node_and_value(classes, name):
    require_modern(classes, name)
    for node in twin_of(name).values():
        described = classes[node["class_type"]]["input"]
        known = {**described["required"], **described.get("optional", {})}
        assert described["required"].keys() <= node["inputs"].keys()
        for input, value in node["inputs"].items():
            kind, *options = known[input]
            choices = kind if isinstance(kind, list) else (options or [{}])[0].get("options")
            if isinstance(value, list):
                assert isinstance(kind, str), (node["class_type"], input)
            elif choices is not None and input not in FILES:
                assert value in choices, (node["class_type"], input, value)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_is_readable(classes, opened, name):
    """At 1440x900, picked among the templates; the classic canvas draws no text below 57 %."""
    require_modern(classes, name)
    found = opened[name]
    assert found["zoom"] >= 0.65
    assert not found["overlaps"] and not [text for text in found["cut"] if text != LONG]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_opens_whole(classes, opened, name):
    require_modern(classes, name)
    found = opened[name]
    assert not found["error"], found["error"]
    assert not found["missing"]
    assert not found["changed"]
    twin = twin_of(name)
    assert found["prompt"].keys() == twin.keys()
    for key, node in twin.items():
        assert found["prompt"][key]["class_type"] == node["class_type"]
        assert node["inputs"].items() <= found["prompt"][key]["inputs"].items()  # newer pages know more inputs


APP = "erase_a_concept.app"
FORM = ["What to remove", "What to keep", "Kind", "Strength", "text", "Seed"]


def test_the_app_and_no_other_opens_as_one(opened):
    """A form in the place of the graph."""
    if opened[APP]["app"] is False:
        pytest.skip("this ComfyUI's page has no apps")
    early = opened[APP]["app"] == "every input"  # a page of 2025, where the form is not chosen from
    others = dict.fromkeys(opened, False if early else None)
    assert {name: found["app"] for name, found in opened.items()} == {**others, APP: "every input" if early else FORM}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_it_runs(page_server, opened, name):
    entry = page_server.wait(page_server.queue(opened[name]["prompt"]), timeout=300)
    for node in WORKFLOWS[name]["nodes"]:
        if node["type"] in ("SaveImage", "PreviewImage"):
            assert entry["outputs"][str(node["id"])]["images"], node.get("title")
        if node["type"] == "MembraneCompare":
            assert entry["outputs"][str(node["id"])]["membrane_pairs"], node.get("title")
