"""Against steps of the published SPM training loop with its own random draws; tests/data/README.md says how."""

import json
import math
from pathlib import Path

import pytest
import torch
from membrane.core.erasers.objectives import spm_losses as losses
from membrane.core.erasers.paths import NoiseSchedule, alphas_cumprod, rollout_timesteps, told_timestep
from membrane.core.erasers.spm import Settings, Texts, learning_rate, noise_anchors, rollout
from safetensors.torch import load_file

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = json.loads((DATA / "spm_training.json").read_text(encoding="utf-8"))
TENSORS = load_file(DATA / "spm_training.safetensors")
WEIGHTS = {k.removeprefix("unet/"): v.double() for k, v in TENSORS.items() if k.startswith("unet/")}
WORDS = dict(zip(PUBLISHED["texts"], TENSORS["texts"].double()))
CASES = ("la", "la_zero_up", "la_neutral", "erase")  # batches of one picture and four anchors, as by default


def close(found, expected, bound):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    found = torch.as_tensor(found, dtype=torch.float64)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * expected.abs().max().clamp_min(1e-15)


class Toy:
    """The toy network of tests/data/README.md in float64 with an adapter, as a Denoiser."""

    def __init__(self, case, factors):
        sizes = [math.prod(shape) for _, shape in case["layout"]]
        pieces = torch.split(factors.double(), sizes)
        self.scale = case["alpha"] / case["rank"]
        self.factors = {
            name: piece.reshape(shape).flatten(1).clone().requires_grad_()
            for (name, shape), piece in zip(case["layout"], pieces)
        }

    def parameters(self):
        return list(self.factors.values())

    def flat(self, what):
        return torch.cat([what(p).flatten() for p in self.parameters()])

    def linear(self, x, name, on):
        weight = WEIGHTS[name + ".weight"].flatten(1)
        key = "lora_unet_" + name.replace(".", "_")
        if on and key + ".lora_up.weight" in self.factors:
            up, down = (self.factors[f"{key}.lora_{kind}.weight"] for kind in ("up", "down"))
            weight = weight + self.scale * up @ down
        y = x @ weight.T
        return y + WEIGHTS[name + ".bias"] if name + ".bias" in WEIGHTS else y

    def transformer(self, h, c, path, on):
        h = self.linear(h, path + ".proj_in", on)
        attention = path + ".transformer_blocks.0.attn2."
        k, v = self.linear(c, attention + "to_k", on), self.linear(c, attention + "to_v", on)
        shares = torch.softmax(h @ k.mT / math.sqrt(h.shape[-1]), dim=-1)
        return h + self.linear(shares @ v, attention + "to_out.0", on)

    def predict(self, x, t, text, on):
        x, text = x.double(), text.double()
        wave = torch.sin(t.double()[:, None] / 1000 * WEIGHTS["time.frequency"] + WEIGHTS["time.phase"])
        h = x + wave[:, :, None, None]
        name = "down_blocks.0.resnets.0.conv1"
        h = h + torch.nn.functional.conv2d(h, WEIGHTS[name + ".weight"], WEIGHTS[name + ".bias"], padding=1)
        h = self.transformer(h.flatten(2).mT, text, "down_blocks.0.attentions.0", on)
        h = torch.tanh(self.linear(h, "linear", False))
        return self.transformer(h, text, "mid_block.attentions.0", on).mT.reshape(x.shape)


def settings_of(case):
    prompt = case["prompts"][0]
    return Settings(
        steps=case["total_iterations"], lr=case["lr"], warmup=case["lr_warmup_steps"], cycles=case["num_cycles"],
        eta=prompt["guidance_scale"], lam=prompt["la_strength"] if prompt["action"] == "erase_with_la" else 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps(name):
    case = PUBLISHED["cases"][name]
    prompt, settings = case["prompts"][0], settings_of(case)
    texts = Texts(*(WORDS[prompt[kind]] for kind in ("target", "neutral", "unconditional")))
    toy = Toy(case, TENSORS[f"{name}/factors_f64"][0])
    optimizer = torch.optim.AdamW(toy.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    for i, step in enumerate(case["steps"]):
        at = f"{name}/{i}/"
        assert told_timestep(step["k"], settings) == step["t"]
        x = rollout(toy, TENSORS[at + "latents"].double(), step["k"], texts, settings, NoiseSchedule(settings))
        close(x, TENSORS[at + "denoised_f64"], 1e-12)
        drawn = TENSORS[f"{'la' if name == 'la_zero_up' else name}/{i}/anchors"].double() if settings.lam else None
        drawn = texts.empty.expand(4, -1, -1) if drawn is None else drawn
        anchors, weights = torch.cat([texts.empty[None], drawn[2:]]), torch.tensor([0.5, 0.25, 0.25])
        erase, anchor = losses(toy, x, step["t"], texts, anchors, weights, settings)
        total = erase + settings.lam * anchor
        close(total.item(), step["losses_f64"]["loss"], 1e-12)
        if settings.lam:
            close(erase.item(), step["losses_f64"]["loss/erase"], 1e-12)
            close(anchor.item(), step["losses_f64"]["loss/anchoring"], 1e-12)
        optimizer.zero_grad()
        total.backward()
        close(toy.flat(lambda p: p.grad), TENSORS[f"{name}/grads_f64"][i], 1e-11)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i, settings)
        assert learning_rate(i, settings) == pytest.approx(step["lr"], rel=1e-12)
        optimizer.step()
        close(toy.flat(lambda p: p.detach()), TENSORS[f"{name}/factors_f64"][i + 1], 1e-13)


@pytest.mark.parametrize("table", PUBLISHED["learning_rates"], ids=lambda t: str(t["iterations"]))
def test_learning_rates(table):
    settings = Settings(
        steps=table["iterations"], lr=table["lr"], warmup=table["lr_warmup_steps"], cycles=table["num_cycles"]
    )
    for step, rate in table["rates"]:
        if step < settings.steps:
            assert learning_rate(step, settings) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_noise_schedule():
    assert rollout_timesteps(30) == PUBLISHED["ddim"]["timesteps"]
    assert [[k, told_timestep(k, Settings())] for k in range(1, 30)] == PUBLISHED["ddim"]["t_given"]
    close(alphas_cumprod()[rollout_timesteps(30)], PUBLISHED["ddim"]["alphas_cumprod_f64"], 1e-12)


def test_anchors_are_noise_of_the_targets_norm():
    """The published draws come from other generators; their norms and directions follow the same rule."""
    target, result = TENSORS["sample/target"][0], TENSORS["sample/result"][1::2]
    ours = noise_anchors(200, target, torch.Generator().manual_seed(0))
    for drawn in (result, ours):
        ratio = drawn.flatten(1).norm(dim=1) / target.norm()
        assert ratio.min() >= 0.8 - 1e-6 and ratio.max() <= 1.2 + 1e-6
