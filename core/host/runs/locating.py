"""Watches the host's network while prompts are sampled: what its feed-forward blocks see, and at which noise; or how
much its weights matter there.
"""

import contextlib
from dataclasses import replace

import comfy.model_management
import torch

from ...adapters.patch import Patch
from ...erasers.dampening import importance
from ...erasers.pruning import Activity
from ...errors import ErasureError
from ...families.sites import site
from ..model.layers import family, family_name, modules, require_unet
from ..model.weights import base_layers
from ..patches.steps import APPLY_MODEL
from .batching import fitting, join
from .gradients import refuse_pooled
from .sampling import Listeners, conditioning, run
from .training import HostDenoiser

FEED_FORWARD = ("feed_forward.down",)
TEXT = ("cross_attention.key", "cross_attention.value")
DIFFERENTIABLE = (torch.float32, torch.float16, torch.bfloat16)
CONDITIONAL = 0  # in the host's cond_or_uncond


def linear_layers(model, groups=FEED_FORWARD):
    """{site: module} of a MODEL's linear layers in some roles, in the network's order."""
    role = family(model).role
    found = {site(key): m for key, m in modules(model).items() if role(site(key)) in groups and _linear(m)}
    if not found:
        raise ErasureError(
            f"The {family_name(model)} model has no {' or '.join(groups)} layers that Membrane knows; locating needs "
            "a Stable Diffusion 1, 2 or XL type U-Net, or a transformer with such."
        )
    return found


def _linear(module):
    return hasattr(module, "in_features")


def layer_weights(model, layers):
    """(site, effective weight (out, in)) of some layers, one at a time, where the model computes."""
    known = base_layers(model)
    for name in layers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield name, known[name].read()[0].to(comfy.model_management.get_torch_device())


class Watched(Patch):
    """Stands in for `apply_model`: keeps the noise level of a call and which of its rows are wanted."""

    function = APPLY_MODEL

    def __init__(self, base, previous, both):
        super().__init__(base, previous)
        self.both = both
        self.sigma, self.rows, self.evaluations = None, None, 0

    def __call__(self, x, t, *args, **kwargs):
        kinds = (kwargs.get("transformer_options") or {}).get("cond_or_uncond")
        if not kinds or len(x) % len(kinds):
            raise ErasureError(
                f"The host ran {len(x)} rows without saying which belong to the prompt (cond_or_uncond: {kinds}); "
                "another node changed how it samples, connect the model from before it."
            )
        wanted = torch.tensor([self.both or kind == CONDITIONAL for kind in kinds], device=x.device)
        self.sigma, self.rows = float(t.flatten()[0]), wanted.repeat_interleave(len(x) // len(kinds))
        self.evaluations += len(x)
        try:
            return self.original(x, t, *args, **kwargs)
        finally:
            self.sigma = self.rows = None


class Watcher:
    """Samples sets of prompts on a MODEL and gathers the Activity of its feed-forward blocks.

    settings: Sampling; first_steps: of its steps, those that are run; both: count the rows of the empty prompt as
    well, as published, or those of the prompts alone; batch: prompts at a time. evaluations: rows of the network.
    """

    def __init__(self, model, clip, settings, first_steps, seed, both=True, batch=4, on_prompts=lambda done: None):
        self.model, self.clip, self.settings, self.first_steps = model, clip, settings, first_steps
        self.seed, self.both, self.batch, self.on_prompts = seed, both, batch, on_prompts
        self.layers, self.evaluations, self.done = linear_layers(model), 0, 0

    def activity(self, prompts):
        """Activity of prompts, each with the same noise. Equal prompts are sampled once and counted as often."""
        found, times = Activity(), {}
        for prompt in prompts:
            times[prompt] = times.get(prompt, 0) + 1
        for count in dict.fromkeys(times.values()):
            same = [prompt for prompt, n in times.items() if n == count and prompt]
            for chunk in (same[i : i + self.batch] for i in range(0, len(same), self.batch)):
                self._run(found, chunk, count, self.settings.cfg)
            if times.get("") == count:  # guidance between two empty prompts changes nothing
                self._run(found, [""], count * (2 if self.both else 1), 1.0)
        return found

    def _run(self, found, prompts, times, cfg):
        texts = [conditioning(self.clip, prompt) for prompt in prompts]
        if len({vectors.shape[1] for (vectors, _), *_ in texts}) > 1:
            raise ErasureError(
                "Some prompts are longer than one context of the text encoder and some are not; shorten them to 75 "
                "tokens."
            )
        for rows in fitting(texts):
            self._watch(found, join([texts[i] for i in rows]), len(rows), times, cfg)
            self.done += len(rows)
            self.on_prompts(self.done)

    def _watch(self, found, positive, rows, times, cfg):
        """Adds what so many rows, all from the same noise, do in the first steps; each counts so many times."""
        model = self.model.clone()
        watched = Watched(model.model, model.object_patches.get(APPLY_MODEL), self.both)
        model.add_object_patch(APPLY_MODEL, watched)
        settings, empty = replace(self.settings, cfg=cfg), conditioning(self.clip, "")
        with contextlib.ExitStack() as hooks:
            for name, module in self.layers.items():
                hook = module.register_forward_pre_hook(_hook(found, name, watched, times))
                hooks.callback(hook.remove)
            run(model, positive, empty, settings, [self.seed] * rows, steps=self.first_steps)
        self.evaluations += watched.evaluations


def _hook(found, layer, watched, times):
    def see(module, inputs):
        hidden, rows = inputs[0], watched.rows
        if rows is None:  # not inside a call of this sampling
            return
        if len(hidden) % len(rows):
            raise ErasureError(
                f"The layer {layer} got {len(hidden)} rows for {len(rows)} of the sampling; another node splits the "
                "batch inside the network, connect the model from before it."
            )
        found.add(layer, watched.sigma, hidden[rows.repeat_interleave(len(hidden) // len(rows))], times)

    return see


def importances(model, clip, layers, prompts, settings, first_steps, seed, on_sample=lambda: None):
    """{site: importance (out, in)} of the weights of {site: module} for prompts; see dampening.importance().

    The samples are the first steps' noisy latents of each prompt, all from the same noise.
    """
    for name, module in layers.items():
        if module.weight is None or module.weight.dtype not in DIFFERENTIABLE:
            raise ErasureError(
                f"The layer {name} holds no weights that gradients reach ({getattr(module.weight, 'dtype', None)}); "
                "load the model in fp32, fp16 or bf16."
            )
    require_unet(model, "Selective Synaptic Dampening", "choose Wanda (ConceptPrune), which needs no gradients")
    refuse_pooled(model)
    texts = {prompt: conditioning(clip, prompt)[0][0] for prompt in (*prompts, "")}
    states = {prompt: _states(model, clip, prompt, settings, first_steps, seed) for prompt in dict.fromkeys(prompts)}
    with torch.inference_mode(False), torch.enable_grad(), HostDenoiser(model, {}) as denoiser:

        def samples():
            for prompt in prompts:
                for x, t in states[prompt]:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    yield x.clone(), t.clone(), texts[prompt].clone(), texts[""].clone()

        weights = {name: module.weight.requires_grad_() for name, module in layers.items()}
        return importance(denoiser, weights, samples(), on_sample)


def _states(model, clip, prompt, settings, first_steps, seed):
    """[(x (1, C, h, w) as the network sees it, t (1,))] of the first steps of sampling a prompt, on the CPU."""
    found, sampling = [], model.model.model_sampling

    def listen(args):
        x, sigma = args["input"], args["sigma"].flatten()[:1]
        scaled = sampling.calculate_input(sigma, x)
        found.append((scaled.float().cpu(), sampling.timestep(sigma).cpu()))

    texts = conditioning(clip, prompt), conditioning(clip, "")
    run(model, *texts, settings, [seed], Listeners(listen), first_steps)
    return found
