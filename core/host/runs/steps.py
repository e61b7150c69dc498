"""Runs the host's sampler for some steps and listens to it: what the text adds to the prediction, where the end token
is looked at, and how much each token counts.
"""

import contextlib
import math
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ...adapters.beside import Bypass
from ...errors import ErasureError
from ...measures.detection import Trace, bright_ending, magnitude, text_part
from ..model.layers import context_width, modules
from ..patches.stack import ErasedSteps
from ..text.encode import _ids
from .sampling import conditioning, seeded_noise
from .training import HostDenoiser, _alias, _Checkpointed, refuse_pooled

# samplers whose pictures do not depend on what else is in the batch: they draw no noise and choose no step sizes
BATCHED = frozenset(
    "euler heun heunpp2 dpm_2 lms dpm_fast dpmpp_2m ipndm ipndm_v deis res_multistep gradient_estimation exp_heun_2_x0 "
    "ddim uni_pc uni_pc_bh2 euler_cfg_pp dpmpp_2m_cfg_pp res_multistep_cfg_pp gradient_estimation_cfg_pp".split()
)
FINEST = 2  # cross-attention layers on the way down whose look at the end token counts


@dataclass(frozen=True)
class Text:
    """A prompt as the host encodes it, and where its first end token is."""

    prompt: str
    conditioning: list
    end: int
    pieces: tuple  # (token's text or None, ends a word) between start and end token of the first context


@dataclass(frozen=True)
class Step:
    """One step of a batch: its number, the noisy latents x (B, C, h, w), sigma (B,), and the text part of the
    predicted noise (B, C, h, w), all on the device."""

    number: int
    x: torch.Tensor
    sigma: torch.Tensor
    delta: torch.Tensor


def require_cross_attention(model, clip):
    """Raises ErasureError for a model without cross-attention on the text, or a CLIP of another model."""
    if clip is None:
        raise ErasureError(
            "The CLIP input is empty, the checkpoint holds no text encoder; connect the CLIP that belongs to the model."
        )
    try:
        width = context_width(model)
    except ErasureError as error:
        raise ErasureError(
            f"The model {type(model.model).__name__} has no cross-attention that reads the text directly; memorised "
            "pictures are told by a text's pull in Stable Diffusion 1, 2 and XL type U-Nets only, use one of those."
        ) from error
    found = conditioning(clip, "")[0][0].shape[-1]
    if found != width:
        raise ErasureError(
            f"The text encoder gives vectors of width {found}, but the model reads vectors of width {width}; "
            "connect the CLIP that belongs to the model."
        )


def encoded(clip, prompt):
    """Text of a prompt, encoded as CLIPTextEncode does."""
    tokens = clip.tokenize(prompt)
    ids, end_id = _ids(tokens), _ids(clip.tokenize(""))[1]
    end = ids.index(end_id, 1) if end_id in ids[1:] else len(ids) - 1
    name = next(iter(tokens))
    tokenizer = getattr(clip.tokenizer, f"clip_{name}", clip.tokenizer)
    vocabulary = getattr(tokenizer, "inv_vocab", {})
    found = [vocabulary.get(i) for i in ids[1:end]]
    pieces = tuple((f and f.removesuffix("</w>"), f is None or f.endswith("</w>")) for f in found)
    return Text(prompt, conditioning(clip, prompt), end, pieces)


# ---------------------------------------------------------------- sampling


def guided_steps(model, positive, negative, seeds, settings, count, on_step, seed=0):
    """Runs the first `count` steps of the host's sampler; on_step(Step) after each. Returns the latents.

    positive: CONDITIONING of as many rows as there are seeds, or one for all. The guidance is that of settings, and
    both predictions are made whatever it is. Of samplers that ask the network more than once a step the answer counts
    that the step is told with, at its own noise level.
    """
    latents, noise = seeded_noise(model, seeds, settings)
    listening, seen = model.clone(), {}

    def listen(args):
        delta = text_part(args["cond_denoised"], args["uncond_denoised"], args["sigma"])
        seen.update(x=args["input"], sigma=args["sigma"], delta=delta)
        return args["denoised"]

    def after(number, denoised, x, total):
        if seen and number < count:
            on_step(Step(number, **seen))
        seen.clear()

    listening.set_model_sampler_post_cfg_function(listen, disable_cfg1_optimization=True)
    last = count if count < settings.steps else None
    return comfy.sample.sample(
        listening, noise, settings.steps, settings.cfg, settings.sampler, settings.scheduler, positive, negative,
        latents, last_step=last, callback=after, disable_pbar=True, seed=seed,
    )  # fmt: skip


def batches(texts, seeds, size, sampler):
    """[[(index of the text, seed)]] of at most `size`, in which conditionings fit together; one each for samplers that
    draw noise of their own."""
    if sampler not in BATCHED:
        size = 1
    groups = {}
    for i, text in enumerate(texts):
        (vectors, options), *more = text.conditioning
        fits = None if more else (vectors.shape[1:], tuple(sorted(options)))
        groups.setdefault(("alone", i) if fits is None else fits, []).extend((i, seed) for seed in seeds)
    return [rows[at : at + size] for rows in groups.values() for at in range(0, len(rows), size)]


def together(conditionings):
    """One CONDITIONING of several with a row each."""
    if all(found is conditionings[0] for found in conditionings):
        return conditionings[0]
    options = dict(conditionings[0][0][1])
    if options.get("pooled_output") is not None:
        options["pooled_output"] = torch.cat([found[0][1]["pooled_output"] for found in conditionings])
    return [[torch.cat([found[0][0] for found in conditionings]), options]]


@dataclass
class Found:
    """What a run gave: traces in the order of the prompts; with bright endings the score (prompts,) and the attention
    maps [(h, w)] of each prompt, means over the seeds."""

    traces: list
    endings: list | None = None
    maps: list | None = None


def measure(model, texts, empty, seeds, settings, count, size=8, endings=False, on_evaluations=lambda done: None):
    """Found of Texts: magnitudes of the first `count` steps for each prompt and seed, `size` pictures at a time.

    empty: the Text of the empty prompt, which is the unconditional side whatever the user's negative prompt is.
    endings: run on to the last step and listen to the end token too. on_evaluations: called with the number of picture
    steps done, may raise to stop.
    """
    magnitudes = {}
    sums = {i: [0.0, None] for i in range(len(texts))}
    done = 0
    for rows in batches(texts, seeds, size, settings.sampler):
        lengths, deltas = [], []

        def on_step(step, rows=rows, lengths=lengths, deltas=deltas):
            nonlocal done
            if step.number < count:
                lengths.append(magnitude(step.delta.float()).cpu())
            if endings:
                deltas.append(step.delta.float().cpu())
            done += len(rows)
            on_evaluations(done)

        positive = together([texts[i].conditioning for i, _ in rows])
        wanted = settings.steps if endings else count
        attention = EndAttention(model) if endings else None
        with attention or contextlib.nullcontext():
            guided_steps(
                attention.model if endings else model, positive, empty.conditioning, [seed for _, seed in rows],
                settings, wanted, on_step, rows[0][1],
            )  # fmt: skip
            maps = attention.maps([texts[i].end for i, _ in rows], deltas[-1].shape[-2:]) if endings else None
        for row, (i, seed) in enumerate(rows):
            magnitudes[i, seed] = torch.stack([length[row] for length in lengths])
        if endings:
            scores = bright_ending(deltas, maps)
            for row, (i, _) in enumerate(rows):
                score, total = sums[i]
                sums[i] = [score + float(scores[row]), maps[row] if total is None else total + maps[row]]
    traces = [Trace(t.prompt, torch.stack([magnitudes[i, s] for s in seeds])) for i, t in enumerate(texts)]
    if not endings:
        return Found(traces)
    n = len(seeds)
    return Found(traces, [sums[i][0] / n for i in sums], [sums[i][1] / n for i in sums])


# ---------------------------------------------------------------- the end token


class EndAttention:
    """Listens to the cross-attention of the two finest layers on the way down, inside `with`; nothing stays behind.

    `model` is the clone to sample with.
    """

    def __init__(self, model):
        self.model = model.clone()
        self.undo, self.queries, self.keys, self.chunks = contextlib.ExitStack(), {}, {}, {}
        named = {key.removesuffix(".weight"): module for key, module in modules(model).items()}
        self.layers = [
            name for name in named if name.startswith("diffusion_model.input_blocks.") and name.endswith("attn2.to_q")
        ][:FINEST]
        if not self.layers:
            raise ErasureError(
                f"The model {type(model.model).__name__} has no cross-attention on the way down, where bright endings "
                "are seen; switch bright_ending off."
            )
        self.named, self.order = named, ()
        previous = self.model.model_options.get("model_function_wrapper")

        def called(apply_model, args):
            self.order = tuple(args["cond_or_uncond"])
            return (
                previous(apply_model, args) if previous else apply_model(args["input"], args["timestep"], **args["c"])
            )

        self.model.set_model_unet_function_wrapper(called)

    def __enter__(self):
        for name in self.layers:
            block = name.removesuffix(".to_q")
            for part, store in (("to_q", self.queries), ("to_k", self.keys)):
                hook = self.named[f"{block}.{part}"].register_forward_hook(self._keep(store, name))
                self.undo.callback(hook.remove)
        return self

    def __exit__(self, *error):
        self.undo.close()

    def _keep(self, store, name):
        def keep(module, inputs, output):
            if 0 in self.order:
                store[name] = output.detach()[self._rows(len(output))]

        return keep

    def _rows(self, count):
        """Which rows of a batch belong to the positive prompt."""
        size = count // len(self.order)
        first = self.order.index(0) * size
        return slice(first, first + size)

    def maps(self, ends, size):
        """Attention (B, h, w) to the end token of each row in the last call: the mean over heads and layers."""
        found = []
        for name in self.layers:
            q, k = self.queries[name].float(), self.keys[name].float()
            if len(q) != len(ends):
                raise ErasureError(
                    f"A layer got {len(q)} rows for {len(ends)} pictures; another node splits the batch inside the "
                    "network, detect on the model before it or switch bright_ending off."
                )
            heads = self._heads(name)
            q, k = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k))
            rows = []
            for row, end in enumerate(ends):
                logits = q[row] @ k[row].transpose(-1, -2) * q.shape[-1] ** -0.5
                rows.append(logits.softmax(dim=-1)[..., end].mean(dim=0))
            plane = torch.stack(rows).unflatten(-1, _plane(rows[0].numel(), size))
            found.append(torch.nn.functional.interpolate(plane[:, None], size, mode="bilinear")[:, 0])
        return torch.stack(found).mean(dim=0).cpu()

    def _heads(self, name):
        attention = self.model.model.diffusion_model.get_submodule(
            name.removeprefix("diffusion_model.").removesuffix(".to_q")
        )
        return attention.heads


def _plane(tokens, size):
    """(height, width) of so many tokens, in a network that halves latents of a size and rounds up."""
    height, width = size
    while height * width > tokens:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise ErasureError(
            f"A layer works on {tokens} places of latents {size[0]} x {size[1]}; another node changes the sizes inside "
            "the network, detect on the model before it or switch bright_ending off."
        )
    return height, width


# ---------------------------------------------------------------- the words


def token_influence(model, text, empty, seeds, settings, count, on_evaluations=lambda done: None):
    """Gradient lengths (tokens,) of ||text part|| with respect to the vectors the network reads between start and end
    token, the mean over the first steps and seeds (Wen et al. 2024, section 4.1).

    Raises ErasureError for models that read pooled text beside it.
    """
    refuse_pooled(model)
    points, done = [], 0

    def on_step(step):
        nonlocal done
        points.append((step.x.cpu().clone(), step.sigma.cpu().clone()))
        done += 1
        on_evaluations(done)

    for seed in seeds:
        guided_steps(model, text.conditioning, empty.conditioning, [seed], settings, count, on_step, seed)
    total, listening = 0, model.clone()
    comfy.model_management.load_models_gpu([listening])  # patches weights, which are inference tensors
    with torch.inference_mode(False), torch.enable_grad():
        plain = [_ordinary(t.conditioning) for t in (text, empty)]
        points = [(x.clone(), sigma.clone()) for x, sigma in points]
        for norms in _gradients(listening, *plain, points):
            total = total + norms
            done += 1
            on_evaluations(done)
    return (total / len(points))[1 : text.end]


def _ordinary(found):
    """A CONDITIONING whose tensors were not made under inference mode."""
    return [
        [vectors.clone(), {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}]
        for vectors, options in found
    ]


class _Ordinary(torch.overrides.TorchFunctionMode):
    """Tensors made under inference mode cannot be saved for a backward pass; inside, other tensors on the same memory
    take their place."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("__get__", "is_inference"):
            return func(*args, **(kwargs or {}))
        return func(*_swapped(args), **{name: _swapped(value) for name, value in (kwargs or {}).items()})


def _swapped(x):
    if isinstance(x, torch.Tensor):
        return _alias(x) if x.is_inference() and x.is_floating_point() else x
    return type(x)(map(_swapped, x)) if type(x) in (list, tuple) else x


def _gradients(listening, positive, negative, points):
    """Gradient lengths (T,) of ||text part|| with respect to each vector of the positive prompt, for each point
    (x (1, C, h, w), sigma (1,)), through the host's whole sampling path; listening: a clone of the MODEL to change."""
    leaves, parts, norms = [], {}, []
    previous = listening.model_options.get("model_function_wrapper")

    def called(apply_model, args):
        c, order = dict(args["c"]), args["cond_or_uncond"]
        leaf = c["c_crossattn"].detach().clone().requires_grad_()
        c["c_crossattn"] = leaf
        leaves.extend([(leaf, order.index(0))] if 0 in order else [])
        if previous:
            return previous(apply_model, {**args, "c": c})
        return apply_model(args["input"], args["timestep"], **c)

    def listen(args):
        parts["delta"] = text_part(args["cond_denoised"], args["uncond_denoised"], args["sigma"])
        return args["denoised"]

    listening.set_model_unet_function_wrapper(called)
    listening.set_model_sampler_post_cfg_function(listen, disable_cfg1_optimization=True)

    def ask(network, x, sigmas, extra_args=None, callback=None, disable=None):
        for point, sigma in points:
            comfy.model_management.throw_exception_if_processing_interrupted()
            leaves.clear()
            with torch.enable_grad(), _Ordinary():
                network(point.to(x), sigma.to(x), **(extra_args or {}))
                (leaf, row), *_ = leaves
                length = magnitude(parts.pop("delta").float()).sum()
                (gradient,) = torch.autograd.grad(length, leaf)
            norms.append(gradient[row].float().norm(dim=-1).cpu())
        return x

    first = points[0][0]
    sigmas = torch.stack([sigma[0] for _, sigma in points] + [torch.zeros(())]).float()
    with HostDenoiser(listening, {}):
        _keep_erased(listening)
        comfy.sample.sample_custom(
            listening, torch.zeros_like(first), 7.0, comfy.samplers.KSAMPLER(ask), sigmas, positive, negative,
            torch.zeros_like(first), disable_pbar=True, seed=0,
        )  # fmt: skip
    return norms


def _keep_erased(model):
    """Without checkpoints where adapters act beside the layers: their gates are gone when a block is computed again."""
    if any(isinstance(patch, Bypass | ErasedSteps) for patch in model.object_patches.values()):
        for module in model.model.diffusion_model.modules():
            if isinstance(module.__dict__.get("forward"), _Checkpointed):
                del module.forward
