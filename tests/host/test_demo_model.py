"""The demo model behaves in the host's own nodes like any Stable Diffusion 1 checkpoint."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from membrane.tools.pixel_world.unet import UNet
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets" / "pixel_world"
PROMPT = "a striped red star on snow"
SCALE_FACTOR = 0.18215


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture
def world(pack):
    return importlib.import_module(f"{pack.__name__}.core.demo.world")


@pytest.fixture
def module(pack):
    return importlib.import_module(f"{pack.__name__}.core.host.demo.model")


@pytest.fixture
def demo(node):
    """Each test has one of its own, for some change its weights."""
    return node("MembraneDemoModel", variant="day")


@pytest.fixture
def reference_text(world):
    """The text transformer outside the host, and a function from captions to its token ids."""
    from transformers import CLIPTokenizer

    text = world.TextTransformer(world.load_config()["text"])
    state = load_file(str(ASSETS / "day.safetensors"))
    text.load_state_dict({k[5:]: v.float() for k, v in state.items() if k.startswith("text.")})
    tokenizer = CLIPTokenizer.from_pretrained(str(ASSETS / "tokenizer"))

    def ids(caption):
        return torch.tensor(tokenizer([caption], padding="max_length", max_length=77)["input_ids"])

    return text, ids


def encode(node, clip, text):
    return node("CLIPTextEncode", clip=clip, text=text)[0]


def sample(node, model, clip, steps=3, prompt=PROMPT, batch=1):
    return node(
        "KSampler",
        model=model,
        seed=5,
        steps=steps,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        positive=encode(node, clip, prompt),
        negative=encode(node, clip, ""),
        latent_image=node("EmptyLatentImage", width=128, height=128, batch_size=batch)[0],
        denoise=1.0,
    )[0]["samples"]


def blocks(pictures):
    """(B, 3, 16, 16) -> the host's IMAGE (B, 128, 128, 3)."""
    return torch.nn.functional.interpolate(pictures, scale_factor=8).movedim(1, -1)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def differ(a, b):
    assert (a - b).abs().max() > 1e-3


def test_unet_equals_the_training_unet(demo, world):
    torch.manual_seed(0)
    unet = UNet(world.load_config()["unet"])
    state = {k: torch.randn_like(v) / max(1, v[0].numel()) ** 0.5 for k, v in unet.state_dict().items()}
    unet.load_state_dict(state)
    host_unet = demo[0].model.diffusion_model
    assert not any(host_unet.load_state_dict(state, strict=False))
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 812.4]), torch.randn(2, 77, 128)
    expected = unet(x, t, context)
    assert expected.std() > 0.1
    close(host_unet(x, t, context=context), expected)


@pytest.mark.parametrize("caption", ["", PROMPT, "star, purple, dotted, coal background", "portrait of captain bolt"])
def test_text_encoding_equals_the_reference(demo, node, reference_text, caption):
    text, ids = reference_text
    ((cond, extras),) = encode(node, demo[1], caption)
    tokens = ids(caption)
    expected = text(text.embed(tokens))
    close(cond, expected)
    end = tokens[0].tolist().index(tokens[0, -1])
    close(extras["pooled_output"], expected[:, end])


@pytest.mark.parametrize("last_layer", [-1, -2, -3])
def test_clip_skip(demo, node, reference_text, last_layer):
    text, ids = reference_text
    clip = node("CLIPSetLastLayer", clip=demo[1], stop_at_clip_layer=last_layer)[0]
    ((cond, extras),) = encode(node, clip, PROMPT)
    close(cond, text(text.embed(ids(PROMPT)), stop_at=text.num_layers + 1 + last_layer))
    close(extras["pooled_output"], encode(node, demo[1], PROMPT)[0][1]["pooled_output"])


def test_prompt_weights(demo, node, reference_text):
    _, ids = reference_text
    plain, empty = (encode(node, demo[1], p)[0][0] for p in (PROMPT, ""))
    weighted = encode(node, demo[1], PROMPT.replace("star", "(star:1.3)"))[0][0]
    star = ids(PROMPT)[0].tolist().index(ids("star")[0, 1])
    expected = plain.clone()
    expected[:, star] = empty[:, star] + 1.3 * (plain[:, star] - empty[:, star])
    close(weighted, expected)


def test_prompts_beyond_77_tokens(demo, node):
    long = encode(node, demo[1], " ".join(["red"] * 75 + ["blue"] * 30))[0][0]
    assert long.shape == (1, 154, 128)
    close(long[:, :77], encode(node, demo[1], " ".join(["red"] * 75))[0][0])
    close(long[:, 77:], encode(node, demo[1], " ".join(["blue"] * 30))[0][0])


def test_textual_inversion_embeddings(demo, node, reference_text, tmp_path):
    text, ids = reference_text
    save_file({"clip_l": text.embed(ids("star")[:, 1]).clone()}, str(tmp_path / "mine.safetensors"))
    clip = demo[1]
    clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    ((cond, extras),) = encode(node, clip, PROMPT.replace("star", "embedding:mine"))
    ((expected, expected_extras),) = encode(node, clip, PROMPT)
    close(cond, expected)
    close(extras["pooled_output"], expected_extras["pooled_output"])
    differ(cond, encode(node, clip, PROMPT.replace("star", "ring"))[0][0])


def test_samples_and_decodes(demo, node, world):
    model, clip, vae = demo
    latents = sample(node, model, clip, steps=20, batch=2)
    assert latents.shape == (2, 4, 16, 16) and latents.isfinite().all()
    differ(latents[0], latents[1])
    differ(latents, sample(node, model, clip, steps=20, batch=2, prompt="a plain blue ring on coal"))
    images = node("VAEDecode", samples={"samples": latents}, vae=vae)[0]
    assert images.shape == (2, 128, 128, 3) and images.std() > 0.05
    close(images, blocks(world.latent_to_rgb(latents * SCALE_FACTOR)), 2e-3)


def test_vae_is_exact(demo, node, world):
    vae = demo[2]
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures[0] = pictures[0].round()  # black, white and the pure colours
    latents = node("VAEEncode", pixels=blocks(pictures), vae=vae)[0]["samples"]
    close(latents * SCALE_FACTOR, world.rgb_to_latent(pictures), 1e-3)
    close(node("VAEDecode", samples={"samples": latents}, vae=vae)[0], blocks(pictures), 1e-3)
    wild = torch.randn(2, 4, 16, 24) * 4
    decoded = node("VAEDecode", samples={"samples": wild / SCALE_FACTOR}, vae=vae)[0]
    close(decoded, blocks(world.latent_to_rgb(wild)), 2e-3)


def test_vae_averages_fine_detail(demo, node, world):
    fine = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    mean = torch.nn.functional.avg_pool2d(fine.movedim(-1, 1), 8)
    latents = node("VAEEncode", pixels=fine, vae=demo[2])[0]["samples"]
    close(latents * SCALE_FACTOR, world.rgb_to_latent(mean), 1e-3)


def test_live_preview_shows_true_colours(demo, world):
    latent_format = demo[0].model.latent_format
    latents = torch.randn(1, 4, 16, 16)
    preview = latents[0].permute(1, 2, 0) @ torch.tensor(latent_format.latent_rgb_factors)
    close(((preview + 1) / 2).clamp(0, 1), world.latent_to_rgb(latents)[0].permute(1, 2, 0))
    assert latent_format.taesd_decoder_name is None
    close(latent_format.process_in(latent_format.process_out(latents)), latents)


def test_lora_by_kohya_names(demo, node, tmp_path, monkeypatch):
    import folder_paths

    model, clip, _ = demo
    torch.manual_seed(0)
    targets = {
        "lora_unet_" + k[len("diffusion_model.") : -len(".weight")].replace(".", "_"): v
        for k, v in model.model.state_dict().items()
        if ".attn" in k and k.endswith(".weight")
    }
    depth = len(targets)
    assert depth == 7 * 8
    text = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].self_attn.q_proj.weight
    targets["lora_te_text_model_encoder_layers_0_self_attn_q_proj"] = text
    lora = {}
    for name, weight in targets.items():
        lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2) * 0.2
        lora[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1]) * 0.2
    save_file(lora, str(tmp_path / "random.safetensors"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))

    def load(strength):
        return node(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name="random.safetensors",
            strength_model=strength,
            strength_clip=strength,
        )

    base, base_text = sample(node, model, clip), encode(node, clip, PROMPT)[0][0]
    changed_model, changed_clip = load(1.0)
    assert len(changed_model.patches) == depth and len(changed_clip.patcher.patches) == 1
    differ(sample(node, changed_model, clip), base)
    differ(encode(node, changed_clip, PROMPT)[0][0], base_text)
    unchanged_model, unchanged_clip = load(0.0)
    assert torch.equal(sample(node, unchanged_model, unchanged_clip), base)
    assert torch.equal(encode(node, clip, PROMPT)[0][0], base_text)


def test_the_hosts_diffusers_lora_names_reach_existing_layers(demo):
    import comfy.lora

    model = demo[0].model
    keys = comfy.lora.model_lora_keys_unet(model, {})
    assert {v for v in keys.values() if "transformer_blocks" in v} <= set(model.state_dict())
    for name, target in (
        ("down_blocks_1_attentions_0", "input_blocks.3.1"),
        ("down_blocks_2_attentions_0", "input_blocks.5.1"),
        ("mid_block_attentions_0", "middle_block.1"),
        ("up_blocks_0_attentions_1", "output_blocks.1.1"),
        ("up_blocks_1_attentions_0", "output_blocks.2.1"),
    ):
        layer = keys[f"lora_unet_{name}_transformer_blocks_0_attn2_to_k"]
        assert layer == f"diffusion_model.{target}.transformer_blocks.0.attn2.to_k.weight"


def test_merge_of_day_and_night(demo, node):
    day, clip, _ = demo
    night = node("MembraneDemoModel", variant="night")[0]
    merged = {r: node("ModelMergeSimple", model1=day, model2=night, ratio=r)[0] for r in (1.0, 0.5, 0.0)}
    pictures = {ratio: sample(node, model, clip) for ratio, model in merged.items()}
    close(pictures[1.0], sample(node, day, clip))
    close(pictures[0.0], sample(node, night, clip))
    mean = node("MembraneDemoModel", variant="day")[0]
    a, b = (m.model.diffusion_model.state_dict() for m in (day, night))
    mean.model.diffusion_model.load_state_dict({k: (v + b[k]) / 2 for k, v in a.items()})
    close(pictures[0.5], sample(node, mean, clip), 1e-3)


def test_both_variants_share_the_text_encoder(demo, node):
    night = node("MembraneDemoModel", variant="night")[1]
    assert torch.equal(encode(node, night, PROMPT)[0][0], encode(node, demo[1], PROMPT)[0][0])


def test_checkpoint_save(demo, node, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model, clip, vae = demo
    node("CheckpointSave", model=model, clip=clip, vae=vae, filename_prefix="pixel")
    (path,) = tmp_path.glob("pixel*.safetensors")
    saved = load_file(str(path))
    for name, weight in model.model.diffusion_model.state_dict().items():
        close(saved[f"model.diffusion_model.{name}"].float(), weight.float())
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in saved
    assert "first_stage_model.taesd_decoder.1.weight" in saved


def test_two_loads_are_independent(demo, node):
    model, clip, vae = demo
    other, other_clip, other_vae = node("MembraneDemoModel", variant="day")
    before = sample(node, other, other_clip)
    for network in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model):
        for weight in network.parameters():
            weight.zero_()
    assert torch.equal(sample(node, other, other_clip), before)
    assert node("VAEDecode", samples={"samples": before}, vae=other_vae)[0].std() > 0.01


def test_clones_with_weights_of_their_own(demo, node):
    model, clip, _ = demo
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this host has no such clones")
    clone = model.deepclone_multigpu(new_load_device=model.load_device)
    expected = sample(node, model, clip)
    for weight in model.model.diffusion_model.parameters():
        weight.zero_()
    assert torch.equal(sample(node, clone, clip), expected)
    for patcher in (model, clip.patcher, demo[2].patcher):
        reload, arguments = patcher.cached_patcher_init
        fresh = reload(*arguments, disable_dynamic=True)
        assert type(fresh.model) is type(patcher.model) and fresh.model is not patcher.model


def test_asset_errors_are_one_sentence(module, tmp_path, monkeypatch):
    def message(variant="day"):
        with pytest.raises(module.ErasureError) as error:
            module.load_demo_model(variant)
        assert str(tmp_path) not in str(error.value) and str(error.value).endswith(".")
        return str(error.value)

    state = load_file(str(ASSETS / "day.safetensors"))
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    assert "day.safetensors is missing" in message()
    (tmp_path / "day.safetensors").write_bytes((ASSETS / "day.safetensors").read_bytes()[:5000])
    assert "day.safetensors is damaged" in message()
    del state["unet.out.2.bias"]
    save_file(state, str(tmp_path / "day.safetensors"))
    assert "lacks 1 of 326 tensors of its U-Net, out.2.bias" in message()
    save_file({k: v for k, v in state.items() if "text." not in k}, str(tmp_path / "night.safetensors"))
    assert "night.safetensors lacks 1 of" in message("night")
    assert "day, night" in message("noon")
