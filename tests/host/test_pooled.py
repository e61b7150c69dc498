"""SDXL's pooled vector, on a small network of that kind with random weights."""

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.formats import native
from membrane.core.host.patches.on_weights import apply_to_weights
from membrane.core.host.patches.stack import apply_stack, concepts_for
from membrane.core.host.runs.training import trainable_sites

SMALL = {  # 64 channels: with one channel in each group of a norm, nothing of the pooled vector would be left
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1],
    "channel_mult": (1,), "transformer_depth": [1], "transformer_depth_output": [1, 1], "transformer_depth_middle": 1,
    "context_dim": 2048, "use_linear_in_transformer": True, "num_head_channels": 16, "num_classes": "sequential",
    "adm_in_channels": 2816, "use_temporal_attention": False, "legacy": False, "use_spatial_transformer": True,
}  # fmt: skip


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    class Config(comfy.supported_models.SDXL):
        unet_config = {}

        def __init__(self):
            self.unet_extra_config = {}
            super().__init__(dict(SMALL))

        def model_type(self, state_dict, prefix=""):
            from comfy.model_base import ModelType

            return ModelType.EPS

    config = Config()
    if hasattr(config, "set_inference_dtype"):
        config.set_inference_dtype(torch.float32, None)
    made = config.get_model({}, "model.diffusion_model.")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 4.0 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.empty(parameter.shape).uniform_(-scale, scale, generator=g))
    return comfy.model_patcher.ModelPatcher(made, torch.device("cpu"), torch.device("cpu"))


def conditioning(seed, pooled=None):
    return [[numbers(seed, 1, 77, 2048), {"pooled_output": numbers(seed + 1, 1, 1280) if pooled is None else pooled}]]


def adapter():
    words = TextMap(numbers(5, 2048, 2) * 0.02, numbers(6, 2, 2048) * 0.02, (0, 0))
    pooled = TextMap(numbers(7, 1280, 3) * 0.05, numbers(8, 3, 1280) * 0.05, (0, 0, 0))
    return ErasureAdapter(Card("UCE", ("star",)), {"map": {"text": words, "pooled": pooled}})


def edited(entry, text_map, strength):
    """What an exact erasure makes of a conditioning, by hand."""
    vectors, options = entry[0]
    made = adapter()
    pooled = options["pooled_output"]
    return [[
        vectors + strength * vectors @ text_map.matrix().T,
        {"pooled_output": pooled + strength * pooled @ made.maps["pooled"].matrix().T},
    ]]  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("where", ["text", "weights"])
def test_both_vectors_are_edited(model, sample, where, strength):
    made = adapter()
    positive, negative = conditioning(1), conditioning(20)
    base = sample(model, positive, negative)
    expected = sample(model, *(edited(c, made.maps["text"], strength) for c in (positive, negative)))
    text_alone = sample(
        apply_stack(
            model, ErasureStack((Entry(ErasureAdapter(made.card, {"map": {"text": made.maps["text"]}}), strength),))
        ),
        positive,
        negative,
    )
    stack = ErasureStack((Entry(made, strength),))
    changed = apply_stack(model, stack) if where == "text" else apply_to_weights(model, stack)
    found = sample(changed, positive, negative)
    effect = (expected - base).norm()
    assert effect > 1e-4 * base.norm()
    assert (expected - text_alone).norm() > 0.1 * effect  # the pooled vector matters
    assert (found - expected).norm() < 0.01 * effect
    assert torch.equal(sample(model, positive, negative), base)


def test_a_timed_entry_leaves_the_pooled_vector(model, sample):
    """The model reads it once for all steps."""
    made = adapter()
    whole, part = (
        sample(apply_stack(model, ErasureStack((Entry(a, 1.0, 0.0, 0.999),))), conditioning(1), conditioning(20))
        for a in (made, ErasureAdapter(made.card, {"map": {"text": made.maps["text"]}}))
    )
    assert torch.equal(whole, part)


def test_the_file_keeps_it(tmp_path):
    made, path = adapter(), str(tmp_path / "pooled.safetensors")
    native.save(made, path)
    loaded = native.load(path)
    for found, expected in ((loaded.maps["text"], made.maps["text"]), (loaded.maps["pooled"], made.maps["pooled"])):
        assert torch.equal(found.a, expected.a) and torch.equal(found.b, expected.b)
        assert found.concept == expected.concept


def test_gates_need_no_clip_when_all_are_fixed(model):
    stack = ErasureStack((Entry(adapter(), permeability=Permeability("fixed", negative="off")),))
    assert concepts_for(stack, None) is None
    assert apply_stack(model, stack).object_patches


def test_training_adapts_the_layers_of_its_transformers(model):
    assert trainable_sites(model, ("cross_attention.key",)).keys() < trainable_sites(model).keys()


class Words:
    """Stands in for SDXL's CLIP: random vectors for every text, with a pooled one."""

    cond_stage_model = torch.nn.Identity()

    def tokenize(self, text):
        ids = [1, *(3 + ord(c) for c in text[:60]), *[2] * (76 - len(text[:60]))]
        return {"l": [[(i, 1.0) for i in ids]]}

    def encode_from_tokens(self, tokens, return_pooled=False):
        seeds = [sum(i * (n + 1) for n, (i, _) in enumerate(chunk)) for chunk in tokens["l"]]
        vectors = torch.cat([numbers(seed, 77, 2048) for seed in seeds])[None]
        return (vectors, numbers(seeds[0] + 1, 1, 1280)) if return_pooled else vectors


def test_the_node_computes_a_map_of_the_pooled_vector(model, node):
    """UCE sends the concept's pooled vector to its replacement's and leaves the preserved one."""
    clip = Words()
    inputs = {"model": model, "clip": clip, "concepts": "star -> circle", "preserve": "heart", "anchor": 0.001}
    assert node("MembraneErase", **inputs)[1].maps.get("pooled") is None
    made = node("MembraneErase", pooled="edit", **inputs)[1].maps["pooled"]

    def pooled(text):
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1]

    def changed(text):
        return pooled(text) + pooled(text) @ made.matrix().T

    assert (changed("star") - pooled("circle")).norm() < 0.01 * pooled("circle").norm()
    assert (changed("heart") - pooled("heart")).norm() < 0.01 * pooled("heart").norm()
