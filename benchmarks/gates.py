"""Gated adapters against the bare model, the published SPM layer and LoraLoader: time per step, time to apply.

A Stable Diffusion 1.5 U-Net of full size with random weights, 192 adapted layers as SPM has them, one thread, one step
with guidance (two rows, each with its own gates). All variants take turns, each right after a bare step; the figures
are medians of the ratios of the two. The SPM layer is written as its authors describe it: the branch is computed by two
layers of its own, scaled twice and added, whatever the number of adapters, which are merged anew for every prompt (not
timed).
"""

import argparse
import json
import time
from statistics import median

import torch
from membrane.tools.host_library import start

KS = (1, 8, 32, 100)
FULL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4), "num_heads": 8, "use_spatial_transformer": True,
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "context_dim": 768, "legacy": False,
    "use_temporal_attention": False, "use_linear_in_transformer": False, "adm_in_channels": None,
}  # fmt: skip
TEXT = (77, 768)


def sd15(config):
    """A MODEL of Stable Diffusion 1.5 with random weights, on the host's own classes."""
    import comfy.model_patcher
    import comfy.supported_models

    class Config(comfy.supported_models.SD15):
        unet_config = {}

        def __init__(self):
            super().__init__(dict(config))

    model_config = Config()
    model_config.set_inference_dtype(torch.float32, None) if hasattr(model_config, "set_inference_dtype") else None
    model = model_config.get_model({}, "model.diffusion_model.")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.02
            parameter.copy_(torch.empty(parameter.shape).uniform_(-scale, scale, generator=g))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def rank_one(sizes, count, word):
    """`count` SPM adapters of rank 1, of the concepts "<word> 0", "<word> 1" ...; sizes: {layer: (outputs, inputs)}."""
    from membrane.core.adapters.adapter import Card, ErasureAdapter
    from membrane.core.adapters.deltas.low_rank import LowRank

    found = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        change = {
            name: LowRank(torch.randn(out, 1, generator=g) * 0.01, torch.randn(1, n, generator=g) * n**-0.5, 1.0)
            for name, (out, n) in sizes.items()
        }
        found.append(ErasureAdapter(Card("SPM", (f"{word} {i}",)), {"low_rank": change}))
    return found


def adapters(model, count):
    """SPM adapters of rank 1 for every linear layer and 1x1 convolution of the transformers."""
    from membrane.core.host.runs.training import trainable_sites

    sites = {name: module.weight.shape[:2] for name, module in trainable_sites(model).items()}
    return rank_one(sites, count, "concept"), sites


class Words:
    """Stands in for a CLIP: random vectors for every text, the ids of its letters."""

    def tokenize(self, text):
        ids = [1, *(ord(c) for c in text[:60]), *[2] * (76 - len(text[:60]))]
        return {"l": [[(i, 1.0) for i in ids]]}

    def encode_from_tokens(self, tokens, **kwargs):
        chunks = next(iter(tokens.values()))
        rows = []
        for chunk in chunks:
            g = torch.Generator().manual_seed(sum(i * (n + 1) for n, (i, _) in enumerate(chunk)))
            rows.append(torch.randn(*TEXT, generator=g) + 2.0)
        return torch.cat(rows)[None]

    cond_stage_model = torch.nn.Identity()


def stacked(found, **entry):
    from membrane.core.adapters.stack import Entry, ErasureStack

    return ErasureStack(tuple(Entry(adapter, 0.1, **entry) for adapter in found))


def loaded(model):
    """The model ready to run, all its patches in place."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model


def step(model, latents):
    """Seconds of one call of the network for a prompt and a negative prompt."""
    from membrane.core.host.patches.conditioning import GATES
    from membrane.core.host.patches.stack import applied

    words = Words()
    text = torch.cat([words.encode_from_tokens(words.tokenize(t)) for t in ("a concept 3", "ugly")])
    x = torch.randn(2, 4, latents, latents, generator=torch.Generator().manual_seed(1))
    call = {"c_crossattn": text, "transformer_options": {}}
    manager = applied(model)
    if manager is not None and manager.travels:
        noise = x[:1]
        gates = [manager.gates(text[i : i + 1], side, noise) for i, side in enumerate(("positive", "negative"))]
        call[GATES] = torch.cat(gates)
    # weights that were patched just now are touched for the first time by a small step
    model.model.apply_model(x[:, :, :8, :8], torch.tensor([5.0, 5.0]), **call)
    begin = time.perf_counter()
    model.model.apply_model(x, torch.tensor([5.0, 5.0]), **call)
    return time.perf_counter() - begin


class PublishedLayer:
    """What the published SPM layer does in a forward, on top of the layer it replaces the forward of."""

    def __init__(self, module, up, down):
        self.module, self.original, self.multiplier, self.scale = module, module.forward, 1.0, 1.0
        if hasattr(module, "kernel_size"):
            out, n = module.out_channels, module.in_channels
            self.down, self.up = torch.nn.Conv2d(n, 1, 1, bias=False), torch.nn.Conv2d(1, out, 1, bias=False)
        else:
            self.down = torch.nn.Linear(module.in_features, 1, bias=False)
            self.up = torch.nn.Linear(1, module.out_features, bias=False)
        self.down.weight.data = down.reshape(self.down.weight.shape)
        self.up.weight.data = up.reshape(self.up.weight.shape)

    def __call__(self, x):
        return self.original(x) + self.up(self.down(x)) * self.multiplier * self.scale


class Published:
    """A model with the published layers on it while one step is timed."""

    def __init__(self, model, adapter, sites):
        self.model, self.adapter, self.sites = model, adapter, sites

    def step(self, latents):
        layers = {n.replace(".", "_"): m for n, m in self.model.model.diffusion_model.named_modules()}
        loaded(self.model)
        changed = [layers[name] for name in self.sites]
        try:
            for name in self.sites:
                change = self.adapter.low_rank[name]
                layers[name].forward = PublishedLayer(layers[name], change.up, change.down)
            return step(self.model, latents)
        finally:
            for module in changed:
                del module.forward


def apply_times(model, found, repeats):
    """Seconds until 32 adapters are in place: (ours ungated, ours gated, one LoraLoader after the other)."""
    import comfy.sd
    from membrane.core.adapters.permeability import Permeability
    from membrane.core.host.patches.stack import apply_stack

    files = []
    for adapter in found:
        tensors = {}
        for name, change in adapter.low_rank.items():
            tensors[f"lora_unet_{name}.lora_up.weight"] = change.up
            tensors[f"lora_unet_{name}.lora_down.weight"] = change.down
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
        files.append(tensors)

    def loras():
        chained = model
        for tensors in files:
            chained = comfy.sd.load_lora_for_models(chained, None, dict(tensors), 0.1, 0.0)[0]
        return chained

    ways = (
        lambda: apply_stack(model, stacked(found, permeability=Permeability("fixed"))),
        lambda: apply_stack(model, stacked(found), Words()),
        loras,
    )
    times = [[] for _ in ways]
    for _ in range(repeats):
        for way, seconds in zip(ways, times):
            loaded(model)  # nothing of the one before is left
            begin = time.perf_counter()
            loaded(way())
            seconds.append(time.perf_counter() - begin)
    loaded(model)
    return [median(seconds) for seconds in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network, to see that it runs")
    parser.add_argument("--latents", type=int, default=32, help="latents are this many pixels wide and high")
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _, tidy = start()
    from membrane.core.adapters.adapter import Card, ErasureAdapter
    from membrane.core.adapters.deltas.text_map import TextMap
    from membrane.core.adapters.permeability import Permeability
    from membrane.core.host.patches.stack import apply_stack

    latents, turns = arguments.latents, arguments.turns
    config = FULL
    if arguments.quick:
        config = FULL | {
            "num_res_blocks": [1], "channel_mult": (1,), "transformer_depth": [1], "transformer_depth_output": [1, 1]
        }  # fmt: skip
        latents, turns = 8, 3
    with torch.inference_mode():
        model = sd15(config)
        found, sites = adapters(model, max(KS))
        print(f"{sum(p.numel() for p in model.model.parameters()) / 1e6:.0f} M parameters, {len(sites)} adapted layers")
        g = torch.Generator().manual_seed(9)
        words = TextMap(torch.randn(768, 8, generator=g) * 0.01, torch.randn(8, 768, generator=g) * 0.01, (0,) * 8)
        text = ErasureAdapter(Card("UCE", ("x",)), {"map": {"text": words}})
        variants = {}
        for k in KS:
            variants[f"gated {k}"] = apply_stack(model, stacked(found[:k]), Words())
        variants["route 100"] = apply_stack(model, stacked(found, permeability=Permeability("route")), Words())
        variants["text map"] = apply_stack(model, stacked([text]))
        variants["ungated 32"] = apply_stack(model, stacked(found[:32], permeability=Permeability("fixed")))
        published = Published(model, found[0], sites)
        steps = {name: lambda v=variant: step(loaded(v), latents) for name, variant in variants.items()}
        steps["published SPM"] = lambda: published.step(latents)
        ratios = {name: [] for name in steps}
        for turn in range(turns + 1):
            for name, measured in steps.items():
                bare = step(loaded(model), latents)  # right before each, as other work on the machine comes and goes
                ratio = measured() / bare
                if turn:  # the first one warms up
                    ratios[name].append(ratio)
            print(f"turn {turn} of {turns}: bare {bare:.2f} s", flush=True)
        step_ratio = {name: median(values) for name, values in ratios.items()}
        for name, value in step_ratio.items():
            print(f"{name:15} {value:.3f}x of the bare step")
        theirs = median(t / o for t, o in zip(ratios["published SPM"], ratios["gated 1"]))
        ungated, gated, loras = apply_times(model, found[:32], 1 if arguments.quick else 5)
        print(f"32 adapters in place: ungated {ungated:.2f} s, gated {gated:.3f} s, 32 LoraLoaders {loras:.2f} s")
    figures = {f"gated_{k}_ratio": round(step_ratio[f"gated {k}"], 3) for k in KS} | {
        "route_100_ratio": round(step_ratio["route 100"], 3),
        "text_map_ratio": round(step_ratio["text map"], 3),
        "ungated_ratio": round(step_ratio["ungated 32"], 3),
        "spm_code_ratio": round(theirs, 3),
        "apply_vs_lora_ratio": round(loras / ungated, 1),
        "apply_gated_vs_lora_ratio": round(loras / gated, 1),
    }
    tidy()
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
