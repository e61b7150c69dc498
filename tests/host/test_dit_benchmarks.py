"""The benchmarks of erasure and training on the demo transformer, with a few pictures, as they run with many."""

import json
import os
import subprocess
import sys

import pytest
import torch
from membrane.benchmarks import erasure_dit, training_dit
from membrane.core.host.compat import has_flux
from membrane.tools import ROOT
from membrane.tools.run.bench import read_figures


def bench(host, name, *arguments):
    """The figures of a quick run of a benchmark."""
    environment = {**os.environ, "MEMBRANE_HOST": str(host.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_figures(done.stdout.strip().splitlines()[-1], name)


@pytest.fixture(autouse=True)
def needs_flux():
    if not has_flux():
        pytest.skip("this host has no Flux")


@pytest.mark.slow
def test_erasure(host):
    figures = bench(host, "erasure_dit", "--models", "transformer")
    key = "transformer.1_shape"
    assert figures[f"{key}.uce.left_in_style_percent"] == 0 and figures[f"{key}.uce.lost_points"] <= 10
    assert figures[f"{key}.published_negative_prompt.left_in_style_percent"] >= 50
    asked = figures[f"{key}.erase_concepts_where_asked.same"], figures[f"{key}.uce.same"]
    assert asked[0] > asked[1] == 0 and figures[f"{key}.erase_concepts_where_asked.moved"] < 1


@pytest.mark.slow
def test_training(host):
    figures = bench(host, "training_dit", "--models", "transformer", "--methods", "GEM", "Latent Anchoring, quick",
                    "--rows", "star: ")  # fmt: skip
    ours = "transformer_star_latent_anchoring_quick_fixed"
    # after two steps nothing is erased yet
    assert figures[f"{ours}.erased_percent"] >= 75 and 0 < figures[f"{ours}.kilobytes"] < 100
    assert figures["transformer_star_published_gem.moved"] > 0


@pytest.mark.slow
def test_memory(host):
    figures = bench(host, "training_memory")
    for name in ("sdxl", "flux_blocks"):
        assert 1 < figures[f"{name}_peak_megabytes"] < 200 and figures[f"{name}_model_megabytes"] > 0.5


def test_the_ridge_is_uces_formula():
    """Against the normal equations in float64, state by state."""
    g = torch.Generator().manual_seed(0)
    concept, replacement, kept = (torch.randn(n, 3, 6, generator=g) for n in (4, 4, 5))
    found = erasure_dit.ridge([(concept, replacement)], kept).double()
    old, new, held = (x.flatten(0, 1).double() for x in (concept, replacement, kept))
    weight = erasure_dit.RIDGE * held.square().sum() / len(held)
    # the gradient of sum |E c - (s - c)|^2 / n + sum |E r|^2 / m + weight |E|^2
    gradient = ((old @ found.T - (new - old)).T @ old / len(old) + (held @ found.T).T @ held / len(held)
                + weight * found)  # fmt: skip
    assert gradient.abs().max() < 1e-5 and found.abs().max() > 0.01


def test_changes_of_weights_reach_the_hosts_network(node):
    model = node("MembraneDemoModel", variant="transformer")[0]
    name = "double_blocks.0.txt_attn.qkv"
    before = model.model.diffusion_model.state_dict()[f"{name}.weight"].clone()
    changed = training_dit.with_changes(model, {name: torch.ones_like(before)})
    assert torch.equal(changed.model_state_dict()[f"diffusion_model.{name}.weight"], before)  # the model's own stays
    weight = changed.patch_weight_to_device(f"diffusion_model.{name}.weight") or changed.model.diffusion_model
    found = weight.double_blocks[0].txt_attn.qkv.weight
    torch.testing.assert_close(found, before + 1)
    changed.unpatch_model()
    with pytest.raises(RuntimeError, match="did not take 1 weights"):
        training_dit.with_changes(model, {"double_blocks.9.txt_attn.qkv": before})


def test_rows_name_what_they_measure():
    rows = training_dit.rows_of("transformer", training_dit.METHODS)
    assert rows["star: published: GEM"] == ("transformer", "transformer", "GEM", ("star",), "fixed", "star")
    assert not any("published" in name for name in training_dit.rows_of("day", training_dit.METHODS))
    assert "night, heart: Latent Anchoring, quick, facilitated transport" in training_dit.rows_of(
        "day", training_dit.METHODS
    )
    assert json.dumps(list(erasure_dit.methods_of("day", "1 shape"))).count("published: ESD") == 0
