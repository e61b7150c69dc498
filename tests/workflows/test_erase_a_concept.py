"""The example workflow over HTTP, as a script would queue it, and what a mistake in it looks like."""

import io
import json
from pathlib import Path

import pytest
from membrane.tools.run import comfy_server
from PIL import Image

pytestmark = pytest.mark.workflow


@pytest.fixture
def workflow():
    """The API twin of the example, made small: one picture, four steps."""
    text = (Path(__file__).parent / "erase_a_concept.json").read_text(encoding="utf-8")
    workflow = json.loads(text)
    workflow["5"]["inputs"]["batch_size"] = 1
    workflow["6"]["inputs"]["steps"] = 4
    return workflow


def pictures(server, workflow):
    entry = server.wait(server.queue(workflow))
    return {
        node: [data for _, data in server.images({**entry, "outputs": {node: entry["outputs"][node]}})]
        for node in ("10", "11")
    }


def test_it_runs_and_differs(server, workflow):
    found = pictures(server, workflow)
    before, after = (Image.open(io.BytesIO(found[node][0])) for node in ("10", "11"))
    assert before.size == after.size == (128, 128)
    assert before.tobytes() != after.tobytes()


def test_strength_zero_over_http_is_bit_identical(server, workflow):
    workflow["2"]["inputs"]["strength"] = 0.0
    found = pictures(server, workflow)
    before, after = (Image.open(io.BytesIO(found[node][0])) for node in ("10", "11"))
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"remove": ""}, "No concept to erase was given"),
        ({"remove": "star -> star"}, "replaced by itself"),
        ({"remove": "star " * 80}, "shorten it"),
    ],
)
def test_a_mistake_is_one_sentence_on_the_node_and_the_host_goes_on(server, workflow, inputs, message):
    good = json.loads(json.dumps(workflow))
    workflow["2"]["inputs"] |= inputs
    with pytest.raises(comfy_server.ExecutionFailed) as caught:
        server.wait(server.queue(workflow))
    assert (caught.value.node_id, caught.value.node_type) == ("2", "MembraneForget")
    assert message in caught.value.reason and "\n" not in caught.value.reason
    assert pictures(server, good)["11"]


def test_a_file_that_is_not_there_is_refused_before_queueing(server):
    prompt = {
        "1": {"class_type": "MembraneLoadAdapter", "inputs": {"adapter_name": "nothing.safetensors"}},
        "2": {"class_type": "MembraneSaveAdapter", "inputs": {"adapter": ["1", 0], "filename_prefix": "x"}},
    }
    with pytest.raises(comfy_server.PromptError, match="nothing.safetensors"):
        server.queue(prompt)
