"""Sample Original and Erased on a real host, one node for a stack, and the page of an evaluation over the server."""

import json
import os

import folder_paths
import numpy as np
import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.host.files.reports import report_path
from PIL import Image

PROMPT = "a red star on snow"
SAMPLED = {"seed": 5, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


@pytest.fixture
def compared(node, demo, text):
    """compared(erased model, latent, **inputs) -> outputs of the node."""

    def run(erased, latent=None, **inputs):
        latent = latent or node("EmptyLatentImage", width=64, height=64, batch_size=2)[0]
        return node(
            "MembraneCompare", original=demo[0], erased=erased, positive=text(PROMPT), negative=text(""),
            latent_image=latent, vae=demo[2], **{**SAMPLED, **inputs},
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def erasure(node, demo):
    """(MODEL without stars, the adapter)."""
    return node("MembraneErase", model=demo[0], clip=demo[1], concepts="star -> circle")


def drawn_by_the_host(node, demo, text, model, latent, **inputs):
    latents = node(
        "KSampler", model=model, positive=text(PROMPT), negative=text(""), latent_image=latent, **{**SAMPLED, **inputs}
    )[0]
    return node("VAEDecode", samples=latents, vae=demo[2])[0]


@pytest.mark.parametrize("inputs", [{}, {"denoise": 0.6, "seed": 11}], ids=["whole", "part"])
def test_both_are_the_pictures_of_ksampler(node, demo, text, compared, erasure, inputs):
    latent = node("EmptyLatentImage", width=64, height=64, batch_size=2)[0]
    found = compared(erasure[0], latent, **inputs)
    for picture, model in zip(found, (demo[0], erasure[0])):
        expected = drawn_by_the_host(node, demo, text, model, latent, **inputs)
        assert picture.shape == expected.shape and torch.equal(picture, expected.cpu().clamp(0, 1))


def test_a_mask_keeps_what_lies_outside(node, demo, text, compared, erasure):
    latent = dict(node("EmptyLatentImage", width=64, height=64, batch_size=1)[0])
    latent["noise_mask"] = torch.zeros(1, 1, 64, 64)
    latent["noise_mask"][..., :32] = 1
    before, after = compared(erasure[0], latent)
    assert torch.equal(before, drawn_by_the_host(node, demo, text, demo[0], latent).cpu().clamp(0, 1))
    change = (before - after).abs().mean(dim=(0, 1, 3))
    assert change[:24].mean() > 10 * change[40:].mean()


def test_the_page_gets_pairs_and_a_sentence_for_each(compared, erasure, demo):
    found = compared(erasure[0])
    pairs, (said,) = found.ui["membrane_pairs"], found.ui["membrane"]
    assert len(pairs) == len(said["lines"]) == 2 and all(" differs in " in line for line in said["lines"])
    for number, pair in enumerate(pairs):
        for side, pictures in zip(("before", "after"), found):
            path = os.path.join(folder_paths.get_temp_directory(), pair[side]["subfolder"], pair[side]["filename"])
            written = np.asarray(Image.open(path), np.float32) / 255
            assert np.abs(written - pictures[number].numpy()).max() <= 0.5 / 255 + 1e-6
    same = compared(demo[0])
    assert torch.equal(same[0], same[1])
    assert all("is the same with the erasure" in line for line in same.ui["membrane"][0]["lines"])


# ---------------------------------------------------------------- one node for a stack


@pytest.fixture(scope="module")
def saved(node, erasure):
    """Stack JSON with the erasure as a file."""
    file = node("MembraneSaveAdapter", adapter=erasure[1], filename_prefix="compare/star").ui["text"][0]
    return json.dumps({"membrane_stack": 1, "entries": [{"adapter": file}]})


def test_the_editor_applies_its_stack_as_apply_does(node, demo, sample, saved):
    stack, concepts, model, clip = node("MembraneStackEditor", stack_json=saved, model=demo[0], clip=demo[1])
    applied = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
    assert clip is demo[1] and concepts == "star"
    assert torch.equal(sample(model), sample(applied)) and not torch.equal(sample(model), sample(demo[0]))


def test_the_editor_without_a_model_gives_a_stack_alone(node, saved):
    stack, _, model, clip = node("MembraneStackEditor", stack_json=saved)
    assert len(stack.entries) == 1 and model is None and clip is None


def test_apply_needs_no_stack_and_takes_an_adapter(node, demo, sample, erasure):
    assert node("MembraneApply", model=demo[0], clip=demo[1])[0] is demo[0]
    alone = node("MembraneApply", model=demo[0], clip=demo[1], adapter=erasure[1])[0]
    assert torch.equal(sample(alone), sample(erasure[0]))
    stack = node("MembraneStack", adapter=erasure[1], strength=0.5)[0]
    both = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack, adapter=erasure[1])[0]
    more = node("MembraneStack", adapter=erasure[1], strength=1.0, stack=stack)[0]
    assert torch.equal(sample(both), sample(node("MembraneApply", model=demo[0], clip=demo[1], stack=more)[0]))


# ---------------------------------------------------------------- the page of an evaluation


def test_only_reports_in_the_output_folder_are_given(tmp_path):
    root = folder_paths.get_output_directory()
    os.makedirs(os.path.join(root, "reports"), exist_ok=True)
    for name in ("a_00001_.html", "a_00001_.json", "alone.html"):
        with open(os.path.join(root, "reports", name), "w", encoding="utf-8") as file:
            file.write("x")
    for name in ("out.html", "out.json"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    link = os.path.join(root, "reports", "link.html")
    os.symlink(tmp_path / "out.html", link)
    try:
        assert report_path("a_00001_.html", "reports") == os.path.realpath(os.path.join(root, "reports/a_00001_.html"))
        wrong = ["a_00001_.json", "alone.html", "link.html", "none.html", "../../out.html", str(tmp_path / "out.html")]
        for name in [*wrong, "a\0.html", ""]:
            with pytest.raises(ErasureError, match="no report"):
                report_path(name, "reports")
    finally:
        os.unlink(link)
