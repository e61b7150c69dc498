"""Evaluate Erasure on a real host: what the numbers must say, files, going on, mistakes."""

import json
import os
import types

import comfy.model_management
import folder_paths
import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.files import reports
from membrane.core.host.model.weights import text_gram
from membrane.core.host.page.progress import Progress
from membrane.core.host.patches.opened import attack_grams
from membrane.core.host.runs.sampling import Sampling, conditioning, denoised, preview_pictures, sample
from membrane.core.measures import record as records

pytestmark = pytest.mark.slow
ERASE = "a red star on snow\na red pentagram on snow = star"
NEIGHBOUR = "a plain pink heart on coal"
UNRELATED = "a dotted yellow moon on stone"
TEMPLATES = "{}\na red {} on snow\na plain pink {} on coal\na striped blue {} on coal\na dotted yellow {} on stone"


def erased(node, demo, strength):
    return node(
        "MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart\nmoon\ncircle\ncross",
        templates=TEMPLATES, strength=strength,
    )[0]  # fmt: skip


@pytest.fixture
def evaluate(node, demo):
    """(grid, text, record as JSON) of a small evaluation; the files lie in a folder of their own."""

    def run(model, **inputs):
        wanted = {
            "erase_prompts": ERASE, "neighbour_prompts": NEIGHBOUR, "unrelated_prompts": UNRELATED, "steps": 3,
            "cfg": 1.5, "width": 64, "height": 64, "seed": 3, "filename_prefix": "evaluation/test",
        }  # fmt: skip
        found = node(
            "MembraneEvaluate", original=demo[0], erased=model, clip=demo[1], **{"vae": demo[2], **wanted, **inputs}
        )
        files = {f["filename"].rpartition(".")[2]: f for f in found.ui["membrane_files"]}
        path = os.path.join(folder_paths.get_output_directory(), files["json"]["subfolder"], files["json"]["filename"])
        with open(path, encoding="utf-8") as file:
            return types.SimpleNamespace(grid=found[0], text=found[1], data=json.load(file), path=path)

    return run


def integrity(found, stratum, distance="pixel"):
    return found.data["summary"]["strata"][stratum][distance]["integrity"]


def test_the_hosts_own_sampler_gives_the_same_latents(node, demo):
    latent = node("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
    with torch.inference_mode():
        positive, negative = (conditioning(demo[1], text) for text in ("a red star", ""))
        expected = node(
            "KSampler", model=demo[0], seed=7, steps=4, cfg=1.5, sampler_name="euler", scheduler="normal", denoise=1.0,
            positive=positive, negative=negative, latent_image=latent,
        )[0]["samples"]  # fmt: skip
        seen = []
        settings = Sampling(4, 1.5, "euler", "normal", 128, 128)
        found = sample(demo[0], positive, negative, [7, 8], settings, lambda x, sigma: seen.append((x, sigma)))
        assert len(seen) == 4 and found.shape[0] == 2
        assert torch.allclose(found[:1], expected, atol=1e-4)
        last = denoised(demo[0], positive, seen[-1:])[0]
        off = denoised(demo[0], negative, seen[-1:])[0]
        guided = demo[0].model.process_latent_out((off + 1.5 * (last - off)).cpu())
        assert torch.allclose(guided, found, atol=1e-4)  # the last step goes to what the network takes for clean


def test_identical_models_other_seeds_and_strength(node, demo, evaluate):
    same = evaluate(demo[0], seed=100)
    for stratum in ("erase", "neighbour", "unrelated", "empty"):
        for distance in ("pixel", "latent"):
            found = integrity(same, stratum, distance)
            assert found["value"] == pytest.approx(1, abs=1e-3) and found["high"] - found["low"] < 1e-3
    assert all(v["value"] < 1e-4 for v in same.data["summary"]["strata"]["erase"]["drift"])
    other = evaluate(demo[0], seed=100, seed_offset=1000, seeds=3)
    for stratum in ("neighbour", "unrelated", "erase"):
        found = integrity(other, stratum)
        assert found["low"] < 0.1 and found["high"] > -0.1 and abs(found["value"]) < 0.5
    rows = [row for row in other.data["rows"] if row["stratum"] != "empty"]
    moved, ceiling = (sum(row[k]["pixel"] for row in rows) / len(rows) for k in ("distance", "ceiling"))
    assert moved == pytest.approx(ceiling, rel=0.3)
    weaker = [evaluate(erased(node, demo, s), filename_prefix=f"evaluation/s{s}") for s in (0.25, 0.6, 1.0)]
    for distance in ("pixel", "latent"):
        values = [integrity(found, "erase", distance)["value"] for found in weaker]
        assert 1 > values[0] > values[1] > values[2]
    drifts = [sum(v["value"] for v in f.data["summary"]["strata"]["erase"]["drift"]) for f in weaker]
    assert 0 < drifts[0] < drifts[1] < drifts[2]
    assert integrity(weaker[-1], "neighbour")["value"] > integrity(weaker[-1], "erase")["value"] + 0.3
    assert weaker[-1].grid.shape[0] == 1 and weaker[-1].grid.shape[3] == 3


def test_scores_by_the_demo_worlds_classifier(node, demo, evaluate):
    found = evaluate(erased(node, demo, 1.0), steps=12, width=128, height=128, classifier="demo world")
    scores = found.data["summary"]["scores"]
    assert scores["erased_classes"] == ["star"]
    assert (scores["erased"]["of"], scores["synonym"]["of"], scores["kept"]["of"]) == (2, 2, 4)
    assert scores["erased_before"]["right"] == 2 and scores["erased"]["right"] == 0
    assert scores["kept_before"]["right"] == 4 and scores["kept"]["right"] == 4
    assert "still recognised" in found.text and "harmonic mean" in found.text
    with open(found.path.removesuffix("json") + "html", encoding="utf-8") as file:
        page = file.read()
    assert page.count("data:image/png;base64,") >= 3 * len(found.data["pictures"])
    assert "http" not in page.replace("http-equiv", "")


def test_it_stops_and_goes_on(node, demo, evaluate, monkeypatch):
    model = erased(node, demo, 1.0)
    whole = evaluate(model, filename_prefix="evaluation/whole")
    own = Progress.at

    def at(self, done, picture=None):
        if done >= 8:  # the user presses Cancel in the second prompt
            comfy.model_management.interrupt_current_processing()
        own(self, done, picture)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "at", at)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            evaluate(model, filename_prefix="evaluation/stopped")
    folder = os.path.join(folder_paths.get_output_directory(), "evaluation")
    (name,) = (n for n in os.listdir(folder) if n.startswith("stopped") and n.endswith(".json"))
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        part = json.load(file)
    assert part["finished"] is False and 0 < len(part["rows"]) < len(whole.data["rows"])
    resumed = evaluate(model, filename_prefix="evaluation/stopped")
    assert os.path.basename(resumed.path) == name and resumed.data["finished"] is True
    assert resumed.data["rows"][: len(part["rows"])] == part["rows"]
    for found, expected in zip(resumed.data["rows"], whole.data["rows"]):
        assert found["seed"] == expected["seed"] and found["prompt"] == expected["prompt"]
        assert found["distance"]["pixel"] == pytest.approx(expected["distance"]["pixel"], abs=1e-4)
    other = evaluate(erased(node, demo, 0.5), filename_prefix="evaluation/stopped")
    assert other.path != resumed.path  # other models, other file
    again = evaluate(model, filename_prefix="evaluation/stopped", resume=False)
    assert again.path not in (resumed.path, other.path)
    assert not [n for n in os.listdir(folder) if n.endswith(".tmp")]


def test_without_a_vae_the_preview_colours_are_used(node, demo, evaluate):
    found = evaluate(erased(node, demo, 1.0), vae=None, filename_prefix="evaluation/plain")
    assert set(found.data["summary"]["strata"]["erase"]) == {"latent", "drift"}
    assert found.data["pictures"]
    picture = records.decoded_picture(found.data["pictures"][0]["original"])
    assert picture.shape == (8, 8, 3)


class Vision:
    """A CLIP_VISION that sees the mean colours of four quarters."""

    def encode_image(self, image):
        small = torch.nn.functional.adaptive_avg_pool2d(image.permute(0, 3, 1, 2), 2).flatten(1)
        return {"image_embeds": small}


class Words:
    """The text encoder beside it: every class is a vector of its own."""

    def tokenize(self, text):
        return text

    def encode_from_tokens(self, tokens, return_pooled):
        g = torch.Generator().manual_seed(sum(map(ord, tokens)))
        return None, torch.rand(1, 12, generator=g)


def test_clip_vision(node, demo, evaluate):
    found = evaluate(
        erased(node, demo, 1.0), clip_vision=Vision(), class_clip=Words(), classifier="CLIP vision",
        class_names="star\nheart", filename_prefix="evaluation/vision",
    )  # fmt: skip
    values = found.data["summary"]["strata"]["erase"]["CLIP vision"]
    assert 0 < values["mean"]["value"] < 1
    assert {a for row in found.data["rows"] for a in row["answer"]} <= {"star", "heart"}
    with pytest.raises(ErasureError, match="at least two class names"):
        evaluate(demo[0], classifier="CLIP vision", clip_vision=Vision())


def test_what_is_no_record_is_not_gone_on_from(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    whole = records.Record({"seed": 1})
    assert reports.Place("report").earlier(lambda found: True) is None
    reports.Place("report").write("json", whole.to_json())
    assert reports.Place("report").earlier(lambda found: True) == whole
    (tmp_path / "report_00007_.json").mkdir()
    monkeypatch.setattr(reports, "LARGEST", 10)
    assert reports.Place("report").earlier(lambda found: True) is None


def test_mistakes(node, demo, evaluate):
    with pytest.raises(ErasureError, match="No prompt to compare"):
        evaluate(demo[0], erase_prompts=" ", neighbour_prompts="", unrelated_prompts="\n")
    with pytest.raises(ErasureError, match="points outside the output folder"):
        evaluate(demo[0], filename_prefix="../outside")
    with pytest.raises(ErasureError, match='asks for the class "stat"'):
        evaluate(demo[0], class_names="star\nheart", erase_prompts="a pentagram = stat")
    with pytest.raises(ErasureError, match="cannot tell star, red apart"):
        evaluate(demo[0], class_names="star\nred", classifier="demo world")
    with pytest.raises(ErasureError, match='needs the Python package "dreamsim"'):
        evaluate(demo[0], perceptual="DreamSim")


def test_attack_grams_of_text_maps_and_layers(node, demo):
    """Against the plain Gram matrix and the map itself."""
    plain = text_gram(demo[0])
    square, cross = attack_grams(demo[0], demo[0])
    assert torch.allclose(square, plain) and torch.allclose(cross, plain)
    model, adapter = node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle", preserve="heart")
    p = torch.eye(128, dtype=torch.float64) + adapter.maps["text"].matrix().double()
    gated = node("MembraneStack", adapter=adapter, permeability="facilitated transport")[0]
    for edited in (model, node("MembraneApply", model=demo[0], clip=demo[1], stack=gated)[0]):
        square, cross = attack_grams(demo[0], edited)
        assert torch.allclose(square, p.T @ plain @ p, atol=1e-5)
        assert torch.allclose(cross, p.T @ plain, atol=1e-5)
    weights = node(
        "MembraneApply", model=demo[0], clip=demo[1], stack=node("MembraneStack", adapter=adapter)[0],
        apply_to="weights",
    )[0]  # fmt: skip
    assert torch.allclose(attack_grams(demo[0], weights)[0], p.T @ plain @ p, atol=1e-3)


def test_preview_colours_of_latents_that_hold_several_points():
    """Flux.2: 8 channels are four points of 2 channels each, which the host's colours are for."""

    def unpacked(latents):
        parts = latents.unflatten(1, (2, 2, 2)).permute(0, 1, 4, 2, 5, 3)
        return parts.reshape(len(latents), 2, 2 * latents.shape[2], 2 * latents.shape[3])

    colours = types.SimpleNamespace(latent_rgb_factors=[[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]], process_in=lambda x: x)
    model = types.SimpleNamespace(model=types.SimpleNamespace(latent_format=colours))
    latents = torch.zeros(1, 8, 3, 3)
    assert preview_pictures(model, latents) is None  # the colours are for 2 channels
    colours.latent_rgb_factors_reshape = unpacked
    latents[:, :4], latents[:, 4:] = 1.0, -1.0
    found = preview_pictures(model, latents)
    assert found.shape == (1, 6, 6, 3)
    assert torch.equal(found[0, 0, 0], torch.tensor([1.0, 0.25, 0.5]))
