"""The files in example_workflows, without a host: every page of any year can open them, and they fit the nodes."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).absolute().parent.parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
NODES = json.loads((ROOT / "tests" / "contract" / "nodes.json").read_text(encoding="utf-8"))
NOTES = ("Note", "MarkdownNote")
# Nodes of the host that load a file: {class: (folder below models, how many of its values name files)}.
LOADERS = {
    "CheckpointLoaderSimple": ("checkpoints", 1), "UNETLoader": ("diffusion_models", 1),
    "CLIPLoader": ("text_encoders", 1), "DualCLIPLoader": ("text_encoders", 2), "VAELoader": ("vae", 1),
}  # fmt: skip
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))  # subgraphs that newer pages list among their nodes
INPUTS, OUTPUTS = -10, -20  # ids of a subgraph's own ends
KINDS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "FILES": str}


@pytest.fixture(params=EXAMPLES, ids=lambda file: file.stem)
def file(request):
    return request.param


@pytest.fixture
def workflow(file):
    return json.loads(file.read_text(encoding="utf-8"))


def widget_names(node):
    """Names of a node's values in order; None is what the page adds to a seed: what happens to it after a run."""
    names = []
    for input in NODES[node["type"]]["inputs"]:
        if isinstance(input["type"], list) or input["type"] in KINDS:
            names += [input["name"], None] if input["name"] == "seed" else [input["name"]]
    return names


def test_each_task_has_its_example():
    assert {file.stem for file in EXAMPLES} == {
        "closed_form_preview_and_save",
        "erase_a_concept",
        "erase_a_concept.app",
        "erase_on_flux1_dev",
        "erase_on_flux2_klein",
        "erase_on_qwen_image",
        "erase_on_sd15",
        "erase_on_sdxl",
        "erase_on_z_image_turbo",
        "evaluate_an_erasure",
        "find_and_prune_memorisation",
        "stack_with_permeability",
        "train_an_adapter",
    }


def test_it_is_of_the_version_that_every_page_reads(workflow):
    assert workflow["version"] == 0.4
    assert "definitions" not in workflow  # subgraphs
    assert all("subgraph" not in node for node in workflow["nodes"])


def test_it_has_a_picture(file):
    picture = file.with_suffix(".jpg")
    assert picture.stat().st_size < 80_000
    with Image.open(picture) as image:
        assert image.format == "JPEG" and 400 <= image.width <= 600


def test_a_note_says_what_it_does(workflow):
    notes = [node for node in workflow["nodes"] if node["type"] in NOTES]
    assert len(notes) == 1 and len(notes[0]["widgets_values"][0]) > 200


def test_nodes_fit_the_contract(workflow):
    """Every value has its widget, of its kind; every socket is there under its name and type."""
    for node in workflow["nodes"]:
        if not node["type"].startswith("Membrane"):
            continue
        contract = NODES[node["type"]]
        names, inputs = widget_names(node), {input["name"]: input for input in contract["inputs"]}
        assert len(node["widgets_values"]) == len(names), node["type"]
        for name, value in zip(names, node["widgets_values"]):
            if name is None:
                assert value == "fixed"
            elif isinstance(inputs[name]["type"], list):
                assert value in inputs[name]["type"], (node["type"], name)
            else:
                assert isinstance(value, KINDS[inputs[name]["type"]]), (node["type"], name)
                if "min" in inputs[name]:
                    assert inputs[name]["min"] <= value <= inputs[name]["max"], (node["type"], name)
        assert all(inputs[slot["name"]]["type"] == slot["type"] for slot in node["inputs"])
        outputs = [(slot["name"], slot["type"]) for slot in node["outputs"]]
        assert outputs == [(output["name"], output["type"]) for output in contract["outputs"]]
        assert node["properties"]["cnr_id"] == "membrane"


def test_the_api_twin_is_the_same_graph(file, workflow):
    twin = json.loads((Path(__file__).parent / file.name).read_text(encoding="utf-8"))
    nodes = {str(node["id"]): node for node in workflow["nodes"] if node["type"] not in NOTES}
    assert {key: node["type"] for key, node in nodes.items()} == {key: n["class_type"] for key, n in twin.items()}
    links = {link[0]: link for link in workflow["links"]}
    for key, node in nodes.items():
        inputs = twin[key]["inputs"]
        wired = {s["name"]: [str(links[s["link"]][1]), links[s["link"]][2]] for s in node["inputs"] if s["link"]}
        assert wired == {name: value for name, value in inputs.items() if isinstance(value, list)}
        if node["type"] in NODES:
            values = dict(zip(widget_names(node), node["widgets_values"]))
            values = {name: value for name, value in values.items() if name is not None and name not in wired}
            assert values == {name: value for name, value in inputs.items() if not isinstance(value, list)}
        else:
            values = [value for value in node["widgets_values"] if value != "fixed"]
            assert values == [value for value in inputs.values() if not isinstance(value, list)]


def test_no_link_dangles(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    assert workflow["last_node_id"] == max(nodes) and workflow["last_link_id"] == max(links)
    for key, origin, slot, target, input, kind in links.values():
        assert nodes[origin]["outputs"][slot]["type"] == nodes[target]["inputs"][input]["type"] == kind
        assert key in nodes[origin]["outputs"][slot]["links"] and nodes[target]["inputs"][input]["link"] == key
    into = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    out_of = [key for node in nodes.values() for slot in node["outputs"] for key in slot["links"]]
    assert sorted(into) == sorted(out_of) == sorted(links)


def test_required_sockets_are_connected(workflow):
    for node in workflow["nodes"]:
        if node["type"].startswith("Membrane"):
            optional = {input["name"] for input in NODES[node["type"]]["inputs"] if input["optional"]}
            assert not [s["name"] for s in node["inputs"] if s["link"] is None and s["name"] not in optional]


def test_nodes_do_not_lie_on_each_other(workflow):
    title, gap = 30, 10
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    for i, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:i]:
            beside = x >= other_x + other_width + gap or other_x >= x + width + gap
            below = y - title >= other_y + other_height + gap or other_y - title >= y + height + gap
            assert beside or below, (workflow["nodes"][i]["type"], x, y)


def test_files_say_where_they_come_from(workflow):
    """In the node, where newer pages offer to load what is missing, and in the note."""
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in NOTES)
    for node in workflow["nodes"]:
        if node["type"] not in LOADERS:
            continue
        folder, count = LOADERS[node["type"]]
        models = node["properties"]["models"]
        assert [model["name"] for model in models] == node["widgets_values"][:count]
        for model in models:
            assert model["directory"] == folder and folder in note
            assert model["url"].startswith("https://") and model["url"].split("?")[0].endswith("/" + model["name"])
            assert "/" not in model["name"] and "\\" not in model["name"]
            assert model["url"].split("?")[0] in note


def test_groups_say_in_which_order(workflow):
    """Where there are groups: numbered from 1, each node in one of them."""
    groups = workflow["groups"]
    assert [group["title"][0] for group in groups] == [str(1 + i) for i in range(len(groups))]
    for node in workflow["nodes"] if groups else ():
        (x, y), (width, height) = node["pos"], node["size"]
        inside = [
            left <= x and top <= y - 30 and x + width <= left + wide and y + height <= top + high
            for left, top, wide, high in (group["bounding"] for group in groups)
        ]
        assert sum(inside) == 1, node["type"]


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_a_blueprint_fits_the_contract(file):
    """Values and sockets of its nodes, and both ends of each link; what it shows of them is there."""
    blueprint = json.loads(file.read_text(encoding="utf-8"))
    (outer,) = blueprint["nodes"]
    (inner,) = blueprint["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == file.stem
    nodes = {node["id"]: node for node in inner["nodes"]}
    for node in nodes.values():
        contract = NODES[node["type"]]
        assert [slot["name"] for slot in node["inputs"]] == [input["name"] for input in contract["inputs"]]
        assert [slot["name"] for slot in node["outputs"]] == [output["name"] for output in contract["outputs"]]
        assert len(node["widgets_values"]) == len(widget_names(node))
    for link in inner["links"]:
        origin, target = link["origin_id"], link["target_id"]
        start = inner["inputs"] if origin == INPUTS else nodes[origin]["outputs"]
        end = inner["outputs"] if target == OUTPUTS else nodes[target]["inputs"]
        assert start[link["origin_slot"]]["type"] == end[link["target_slot"]]["type"] == link["type"]
    assert [(slot["name"], slot["type"]) for slot in outer["inputs"]] == [
        (slot["name"], slot["type"]) for slot in inner["inputs"]
    ]
    for key, name in outer["properties"]["proxyWidgets"]:
        assert name in widget_names(nodes[int(key)])
