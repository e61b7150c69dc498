"""The demo model on a transformer behaves in the host's own nodes like any Flux checkpoint."""

import importlib
from pathlib import Path

import pytest
import torch
from membrane.core.host.model.layers import family
from membrane.tools.pixel_world import world
from membrane.tools.pixel_world.evaluate import FlowSampler, load_flux
from membrane.tools.pixel_world.flux import Flux
from membrane.tools.pixel_world.t5 import T5
from membrane.tools.pixel_world.train_flux import Text
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets" / "pixel_world"
FILE = ASSETS / "transformer.safetensors"
PROMPT = "a striped red star on snow"
NEEDS_FLUX = "needs the host's Flux network"


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture
def module(pack):
    return importlib.import_module(f"{pack.__name__}.core.host.demo.model")


@pytest.fixture
def demo(node, module):
    """Each test has one of its own, for some change its weights."""
    if not module.has_flux():
        pytest.skip("this host has no Flux")
    return node("MembraneDemoModel", variant="transformer")


@pytest.fixture(scope="module")
def reference_text():
    """Both text encoders outside the host."""
    return Text(FILE)


def encode(node, clip, text):
    return node("CLIPTextEncode", clip=clip, text=text)[0]


def sample(node, model, clip, steps=3, prompt=PROMPT, batch=1, cfg=1.5):
    return node(
        "KSampler",
        model=model,
        seed=5,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        positive=encode(node, clip, prompt),
        negative=encode(node, clip, ""),
        latent_image=node("EmptyLatentImage", width=128, height=128, batch_size=batch)[0],
        denoise=1.0,
    )[0]["samples"]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def differ(a, b):
    assert (a - b).abs().max() > 1e-3


def randomised(network):
    """Weights for a network of the training tools, none of them zero."""
    torch.manual_seed(0)
    return {k: torch.randn_like(v) / max(1, v[0].numel()) ** 0.5 for k, v in network.state_dict().items()}


def test_a_host_without_flux_says_so(node, module, monkeypatch):
    if module.has_flux():
        monkeypatch.setattr(module, "has_flux", lambda: False)
    with pytest.raises(module.ErasureError, match=NEEDS_FLUX) as error:
        node("MembraneDemoModel", variant="transformer")
    assert str(error.value).endswith(".") and str(error.value).count(". ") == 0
    node("MembraneDemoModel", variant="day")


def test_the_network_equals_the_training_one(demo):
    model = demo[0]
    flux = Flux(model.model.model_config.unet_config)
    state = randomised(flux)
    flux.load_state_dict(state)
    host = model.model.diffusion_model
    assert not any(host.load_state_dict(model.model.model_config.process_unet_state_dict(dict(state)), strict=True))
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.93])
    context, pooled = torch.randn(2, 37, 128), torch.randn(2, 128)
    expected = flux(x, t, context, pooled)
    assert expected.std() > 0.1
    close(host(x, t, context=context, y=pooled, guidance=None), expected, 1e-5)


@pytest.mark.parametrize("length", [32, 150])
def test_the_text_encoder_equals_the_training_one(demo, length):
    host = demo[1].cond_stage_model.t5xxl.transformer
    torch.manual_seed(0)
    t5 = T5({"vocab_size": 778, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 3})
    for weight in t5.parameters():
        weight.add_(0.2 * weight.std(correction=0) * torch.randn_like(weight) + 0.1 * (weight.dim() == 1))
    assert not any(host.load_state_dict(t5.state_dict(), strict=True))
    tokens = torch.randint(0, 778, (2, length))
    expected = t5(t5.embed(tokens))
    assert expected.std() > 0.1
    close(host(tokens, None)[0], expected, 1e-5)


@pytest.mark.parametrize("caption", ["", PROMPT, "star, purple, dotted, coal background", "portrait of captain bolt"])
def test_text_encoding_equals_the_reference(demo, node, reference_text, caption):
    ((cond, extras),) = encode(node, demo[1], caption)
    rows, pooled = reference_text.encode([caption])
    assert cond.shape == (1, 32, 128) and "attention_mask" not in extras
    close(cond, rows)
    close(extras["pooled_output"], pooled)


def test_the_concept_reaches_every_row(demo, node):
    star, ring = (encode(node, demo[1], PROMPT.replace("star", shape))[0][0][0] for shape in ("star", "ring"))
    assert ((star - ring).norm(dim=1) > 0.1 * star.norm(dim=1)).all()


def test_long_prompts_make_more_rows(demo, node):
    tokens = demo[1].tokenize(" ".join(["red"] * 40))
    assert len(tokens["t5xxl"][0]) == 41 and len(tokens["l"][0]) == 77
    assert encode(node, demo[1], " ".join(["red"] * 40))[0][0].shape == (1, 41, 128)


def test_prompt_weights(demo, node):
    plain, empty = (encode(node, demo[1], p)[0][0] for p in (PROMPT, ""))
    weighted = encode(node, demo[1], PROMPT.replace("star", "(star:1.3)"))[0][0]
    words = [token for token, _ in demo[1].tokenize(PROMPT)["t5xxl"][0]]
    star = words.index(demo[1].tokenize("star")["t5xxl"][0][0][0])
    changed = (weighted - plain).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [star]
    differ(weighted[:, star], empty[:, star])


def test_clip_skip(demo, node):
    clip = node("CLIPSetLastLayer", clip=demo[1], stop_at_clip_layer=-2)[0]
    differ(encode(node, clip, PROMPT)[0][0], encode(node, demo[1], PROMPT)[0][0])


def test_ksampler_is_the_reference_sampler(demo, node, reference_text):
    model, clip, vae = demo
    latents = sample(node, model, clip, steps=5, batch=2)
    flow = FlowSampler(load_flux(FILE), reference_text)
    expected = flow.draw([PROMPT, PROMPT], 5, 1.5, torch.Generator().manual_seed(5))
    images = node("VAEDecode", samples={"samples": latents}, vae=vae)[0]
    assert images.shape == (2, 128, 128, 3) and images.std() > 0.05
    close(images[:, ::8, ::8], torch.from_numpy(expected), 4e-3)
    differ(latents[0], latents[1])


def test_sampler_custom(demo, node):
    model, clip, _ = demo
    custom = node(
        "SamplerCustom",
        model=model,
        add_noise=True,
        noise_seed=5,
        cfg=1.5,
        positive=encode(node, clip, PROMPT),
        negative=encode(node, clip, ""),
        sampler=node("KSamplerSelect", sampler_name="euler")[0],
        sigmas=node("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0)[0],
        latent_image=node("EmptyLatentImage", width=128, height=128, batch_size=1)[0],
    )[0]["samples"]
    close(custom, sample(node, model, clip))


@pytest.mark.slow
def test_draws_what_it_is_told(demo, node):
    """Held-out combinations through the host's nodes, read by the judge."""
    from membrane.tools.pixel_world import classifier, evaluate

    model, clip, vae = demo
    sprites = evaluate.held_out_prompts(24, seed=5)
    latents = torch.cat([sample(node, model, clip, 20, caption) for caption in world.plain_captions(sprites)])
    pictures = node("VAEDecode", samples={"samples": latents}, vae=vae)[0][:, ::8, ::8]
    answers = classifier.read(classifier.load(), pictures.numpy())
    for attribute in world.ATTRIBUTES:
        assert (answers[attribute] == getattr(sprites, attribute)).mean() >= 0.9, attribute


def test_lora_by_diffusers_names(demo, node, tmp_path, monkeypatch):
    import folder_paths

    model, clip, _ = demo
    torch.manual_seed(0)
    targets = {
        "transformer.transformer_blocks.0.attn.to_q": (128, 128),
        "transformer.transformer_blocks.2.attn.add_v_proj": (128, 128),
        "transformer.transformer_blocks.1.ff.net.0.proj": (512, 128),
        "transformer.single_transformer_blocks.3.attn.to_k": (128, 128),
        "transformer.single_transformer_blocks.0.proj_mlp": (512, 128),
        "transformer.single_transformer_blocks.1.proj_out": (128, 640),
        "transformer.context_embedder": (128, 128),
    }
    lora = {}
    for name, (outputs, inputs) in targets.items():
        lora[f"{name}.lora_B.weight"] = torch.randn(outputs, 2) * 0.2
        lora[f"{name}.lora_A.weight"] = torch.randn(2, inputs) * 0.2
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

    base = sample(node, model, clip)
    changed = load(1.0)[0]
    assert sum(map(len, changed.patches.values())) == len(targets)
    differ(sample(node, changed, clip), base)
    assert torch.equal(sample(node, *load(0.0)), base)


def test_merge(demo, node):
    model, clip, _ = demo
    other, mean = (node("MembraneDemoModel", variant="transformer")[0] for _ in range(2))
    weights = model.model.diffusion_model.state_dict()
    torch.manual_seed(1)
    moved = {k: v + 0.1 * v.std(correction=0) * torch.randn_like(v) for k, v in weights.items()}
    other.model.diffusion_model.load_state_dict(moved)
    mean.model.diffusion_model.load_state_dict({k: (v + moved[k]) / 2 for k, v in weights.items()})
    merged = {r: node("ModelMergeSimple", model1=model, model2=other, ratio=r)[0] for r in (1.0, 0.5, 0.0)}
    pictures = {ratio: sample(node, one, clip) for ratio, one in merged.items()}
    close(pictures[1.0], sample(node, model, clip))
    close(pictures[0.5], sample(node, mean, clip), 1e-3)
    close(pictures[0.0], sample(node, other, clip))
    differ(pictures[0.0], pictures[1.0])


def test_checkpoint_save_and_load(demo, node, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model, clip, vae = demo
    node("CheckpointSave", model=model, clip=clip, vae=vae, filename_prefix="pixel")
    (path,) = tmp_path.glob("pixel*.safetensors")
    saved = load_file(str(path))

    def part(prefix):
        return {k.removeprefix(prefix): v.float() for k, v in saved.items() if k.startswith(prefix)}

    fresh, fresh_clip, _ = node("MembraneDemoModel", variant="transformer")
    networks = {
        "model.diffusion_model.": fresh.model.diffusion_model,
        "text_encoders.clip_l.transformer.": fresh_clip.cond_stage_model.clip_l.transformer,
        "text_encoders.t5xxl.transformer.": fresh_clip.cond_stage_model.t5xxl.transformer,
    }
    for prefix, network in networks.items():
        for weight in network.parameters():
            weight.zero_()
        network.load_state_dict(part(prefix))
    close(sample(node, fresh, fresh_clip), sample(node, model, clip), 1e-3)
    assert "vae.taesd_decoder.1.weight" in saved


def test_live_preview_shows_true_colours(demo, pack):
    from membrane.core.demo.world import LATENT_RGB_FACTORS

    assert demo[0].model.latent_format.latent_rgb_factors == LATENT_RGB_FACTORS
    assert demo[0].model.latent_format.taesd_decoder_name is None


def test_two_loads_are_independent(demo, node):
    model, clip, vae = demo
    other, other_clip, other_vae = node("MembraneDemoModel", variant="transformer")
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


def test_membrane_knows_the_family(demo):
    assert family(demo[0]).name == "Flux"


def test_a_closed_form_erasure_acts_and_strength_zero_is_no_node(demo, node):
    model, clip, _ = demo

    def erased(strength):
        return node(
            "MembraneErase",
            model=model,
            clip=clip,
            concepts="star -> circle",
            preserve="heart\nsquare\nring",
            templates="{}\na red {} on snow\na striped {}",
            strength=strength,
        )[0]

    base = sample(node, model, clip)
    assert torch.equal(sample(node, erased(0.0), clip), base)
    differ(sample(node, erased(1.0), clip), base)


def test_asset_errors_are_one_sentence(demo, module, tmp_path, monkeypatch):
    def message():
        with pytest.raises(module.ErasureError) as error:
            module.load_demo_model("transformer")
        assert str(tmp_path) not in str(error.value) and str(error.value).endswith(".")
        return str(error.value)

    state = load_file(str(FILE))
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    assert "transformer.safetensors is missing" in message()
    (tmp_path / FILE.name).write_bytes(FILE.read_bytes()[:5000])
    assert "transformer.safetensors is damaged" in message()
    kept = {k: v for k, v in state.items() if k != "flux.final_layer.linear.bias"}
    save_file(kept, str(tmp_path / FILE.name))
    assert "lacks 1 of 120 tensors of its transformer, final_layer.linear.bias" in message()
    for name in ("day.safetensors", "config.json", "tokenizer"):
        (tmp_path / name).symlink_to(ASSETS / name)
    save_file({k: v for k, v in state.items() if not k.startswith("t5.shared")}, str(tmp_path / FILE.name))
    assert "lacks 1 of 30 tensors of its text encoder, shared.weight" in message()
