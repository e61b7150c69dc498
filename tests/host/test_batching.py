"""Prompts in one batch, with what the host's own encoders of language models give beside the text."""

from dataclasses import replace

import pytest
import torch
from membrane.core.host.runs.batching import fitting, join
from membrane.core.host.runs.sampling import Sampling
from membrane.core.host.runs.steps import encoded, measure

PROMPTS = ("a star", "a small green heart beside a ring", "a heart on snow")
LENGTH = 48  # tokens, of which the prompts and their template fill some


@pytest.fixture(scope="module")
def conditionings():
    """Conditionings of the host's Z-Image encoder at toy size, all filled up to one length."""
    try:
        from comfy.text_encoders import llama, z_image
    except ImportError:
        pytest.skip("this host has no encoder of Z-Image")
    from comfy import sd1_clip

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}

    def toy(device="cpu", dtype=None, attention_mask=True, model_options=None, **others):
        return sd1_clip.SDClipModel(
            device=device, layer="hidden", layer_idx=-2, dtype=dtype, special_tokens={"pad": 151643},
            textmodel_json_config={**small, "num_attention_heads": 1, "num_key_value_heads": 1},
            layer_norm_hidden_state=False, model_class=llama.Qwen3_4B, enable_attention_masks=attention_mask,
            return_attention_masks=attention_mask,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(z_image, "Qwen3_4BModel", toy)
        encoder = z_image.ZImageTEModel(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tokenizer, found = z_image.ZImageTokenizer(), []
    for prompt in PROMPTS:
        tokens = tokenizer.tokenize_with_weights(prompt, tokenizer_options={"qwen3_4b_min_length": LENGTH})
        with torch.no_grad():
            vectors, pooled, extra = encoder.encode_token_weights(tokens)
        found.append([[vectors, {"pooled_output": pooled, **extra}]])
    return found


def test_rows_of_a_language_model_keep_their_masks(conditionings):
    words = [int(rest["attention_mask"].sum()) for ((_, rest),) in conditionings]
    assert len(set(words)) == len(PROMPTS) and max(words) < LENGTH
    assert fitting(conditionings) == [[0, 1, 2]]
    ((vectors, options),) = join(conditionings)
    assert vectors.shape[:2] == (len(PROMPTS), LENGTH) and options["attention_mask"].sum(dim=1).tolist() == words
    for row, ((alone, rest),) in enumerate(conditionings):
        assert torch.equal(vectors[row], alone[0])
        assert torch.equal(options["attention_mask"][row], rest["attention_mask"][0])


def test_masks_reach_the_network_with_their_rows(demo):
    """Through the host's sampler: what the model's extra_conds gets for a batch of prompts."""
    seen, model = [], demo[0].clone()

    def extra_conds(**kwargs):
        if kwargs.get("prompt_type") == "positive":
            seen.append((kwargs["cross_attn"], kwargs["attention_mask"]))
        return type(model.model).extra_conds(model.model, **kwargs)

    model.add_object_patch("extra_conds", extra_conds)
    with torch.inference_mode():
        texts = [masked(encoded(demo[1], prompt), words) for words, prompt in enumerate(PROMPTS, 3)]
        measure(model, texts, encoded(demo[1], ""), [1, 2], Sampling(4, 1.5, "euler", "normal", 128, 128), 1)
    ((vectors, masks),) = seen
    assert masks.sum(dim=1).tolist() == [3, 3, 4, 4, 5, 5]
    for row, text in enumerate(text for text in texts for _ in range(2)):
        assert torch.equal(vectors[row].cpu(), text.conditioning[0][0][0].cpu())


def masked(text, words):
    ((vectors, options),) = text.conditioning
    mask = (torch.arange(vectors.shape[1]) < words).long()[None]
    return replace(text, conditioning=[[vectors, {**options, "attention_mask": mask}]])
