"""What is sent to the page while a model samples: once per conditioning, to the right rows, nothing per step."""

import json

import pytest
from membrane.core.host.page import live

FOLLOWS = {"mode": "facilitated transport"}


class Server:
    """Stands in for the host's server and keeps what is sent."""

    client_id = "a page"

    def __init__(self):
        self.sent = []

    def send_sync(self, event, data, sid=None):
        json.dumps(data)
        self.sent.append((event, data, sid))


@pytest.fixture
def server(monkeypatch):
    found = Server()
    monkeypatch.setattr(live.PromptServer, "instance", found, raising=False)
    return found


@pytest.fixture(scope="module")
def files(node, demo):
    names = {}
    for concept, other in (("star", "circle"), ("heart", "square")):
        adapter = node(
            "MembraneErase", model=demo[0], clip=demo[1], concepts=f"{concept} -> {other}", replace_with="",
            preserve="", method="UCE", strength=1.0,
        )[1]  # fmt: skip
        names[concept] = node("MembraneSaveAdapter", adapter=adapter, filename_prefix=f"live/{concept}").ui["text"][0]
    return names


def editor(node, node_id, *rows, stack=None):
    text = json.dumps({"membrane_stack": 1, "entries": list(rows)})
    return node("MembraneStackEditor", stack_json=text, stack=stack, unique_id=node_id)[0]


@pytest.fixture
def run(node, demo, sample):
    """run(stack, ...) samples with a stack and returns the latents."""

    def sampled(stack, positive="a red star on snow", negative="", steps=2):
        model = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
        return sample(model, positive, negative, steps=steps, seed=3)

    return sampled


def test_each_row_gets_its_opening_once_per_conditioning(node, files, server, run):
    rows = [{"adapter": files[c], "strength": 0.5, "permeability": FOLLOWS} for c in ("heart", "star")]
    run(editor(node, "12", *rows), steps=3)
    assert [(event, data["node"], sid) for event, data, sid in server.sent] == [(live.EVENT, "12", "a page")] * 2
    first, second = (data for _, data, _ in server.sent)
    assert first["negative"] == [] and second["positive"] == first["positive"]
    (heart, star), given = second["positive"], second["negative"]
    assert heart[:2] == [0, files["heart"]] and star[:2] == [1, files["star"]]
    assert star[2] == pytest.approx(0.5, abs=1e-3) and 0 < heart[2] < 0.25
    assert given == second["positive"]  # "same as positive"


def test_they_are_what_preview_permeability_shows(node, demo, files, server, run):
    stack = editor(node, "5", *({"adapter": files[c], "permeability": FOLLOWS} for c in ("heart", "star")))
    run(stack, "a blue heart on sand")
    report = node("MembranePreview", clip=demo[1], stack=stack, prompts="a blue heart on sand")[1]
    shown = [float(line.split()[-1]) for line in report.splitlines() if line.startswith("  ")]
    assert [value for *_, value in server.sent[-1][1]["positive"]] == pytest.approx(shown, abs=1e-3)


def test_chained_editors_each_get_their_own(node, files, server, run):
    upper = editor(node, "1", {"adapter": files["heart"], "permeability": FOLLOWS})
    both = editor(node, "2:7", {"adapter": files["star"], "permeability": {**FOLLOWS, "negative": "off"}}, stack=upper)
    run(both)
    last = {data["node"]: data for _, data, _ in server.sent}
    assert last["1"]["positive"][0][:2] == [0, files["heart"]]
    assert last["2:7"]["positive"][0] == [0, files["star"], pytest.approx(1.0, abs=1e-3)]
    assert last["2:7"]["negative"][0] == [0, files["star"], 0.0]


def test_nothing_is_sent_for_other_nodes_stacks(node, files, server, run):
    adapter = node("MembraneLoadAdapter", adapter_name=files["star"])[0]
    stack = node(
        "MembraneStack", adapter=adapter, strength=1.0, start_percent=0.0, end_percent=1.0,
        permeability="facilitated transport",
    )[0]  # fmt: skip
    run(stack)
    assert server.sent == []


def test_without_a_server_sampling_goes_on(node, files, monkeypatch, run):
    monkeypatch.setattr(live.PromptServer, "instance", None, raising=False)
    run(editor(node, "1", {"adapter": files["star"], "permeability": FOLLOWS}))
