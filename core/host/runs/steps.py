"""Runs the host's sampler for some steps and listens to it: what the text adds to the prediction, for batches of
prompts and seeds.
"""

from dataclasses import dataclass

import torch

from ...errors import ErasureError
from ...measures.detection import Trace, bright_ending, magnitude, text_part
from ..model.layers import is_unet, text_width
from ..text.tokens import ids_of
from ..text.vocabulary import vocabulary_of
from .attention import EndAttention
from .batching import batches, join
from .sampling import Listeners, conditioning, run


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


def require_text_encoder(model, clip):
    """Raises ErasureError for a model without its CLIP, or a U-Net with the CLIP of another model."""
    if clip is None:
        raise ErasureError(
            "The CLIP input is empty, the checkpoint holds no text encoder; connect the CLIP that belongs to the model."
        )
    if not is_unet(model):
        return
    width = text_width(model)
    found = conditioning(clip, "")[0][0].shape[-1]
    if found != width:
        raise ErasureError(
            f"The text encoder gives vectors of width {found}, but the model reads vectors of width {width}; "
            "connect the CLIP that belongs to the model."
        )


def encoded(clip, prompt):
    """Text of a prompt, encoded as CLIPTextEncode does."""
    tokens = clip.tokenize(prompt)
    ids, nothing = (ids_of(next(iter(t.values()))[:1]) for t in (tokens, clip.tokenize("")))
    end_id = nothing[min(1, len(nothing) - 1)] if nothing else None  # encoders without a start token end at once
    end = ids.index(end_id, 1) if end_id in ids[1:] else len(ids) - 1
    vocabulary = vocabulary_of(clip, next(iter(tokens))) or {}
    found = [vocabulary.get(i) for i in ids[1:end]]
    pieces = tuple((f and f.removesuffix("</w>"), f is None or f.endswith("</w>")) for f in found)
    return Text(prompt, conditioning(clip, prompt), end, pieces)


# ---------------------------------------------------------------- sampling


def guided_steps(model, positive, negative, seeds, settings, count, on_step):
    """Runs the first `count` steps of the host's sampler; on_step(Step) after each. Returns the latents.

    positive: CONDITIONING of as many rows as there are seeds, or one for all. The guidance is that of settings, and
    both predictions are made whatever it is. Of samplers that ask the network more than once a step the answer counts
    that the step is told with, at its own noise level.
    """
    seen = {}

    def listen(args):
        delta = text_part(args["cond_denoised"], args["uncond_denoised"], args["sigma"])
        seen.update(x=args["input"], sigma=args["sigma"], delta=delta)

    def after(number, denoised, x, total):
        if seen and number < count:
            on_step(Step(number, **seen))
        seen.clear()

    return run(model, positive, negative, settings, seeds, Listeners(listen, True, after), count)


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
    traces, scores, maps, done = {}, {}, {}, 0

    def tell(rows):
        nonlocal done
        done += rows
        on_evaluations(done)

    for rows in batches([text.conditioning for text in texts], seeds, size, settings.sampler):
        chosen = [texts[i] for i, _ in rows]
        if endings:
            lengths, *ends = _to_the_end(model, chosen, empty, [s for _, s in rows], settings, count, tell)
            for (i, _), score, attention in zip(rows, *ends):
                scores.setdefault(i, []).append(float(score))
                maps.setdefault(i, []).append(attention)
        else:
            lengths = _first_steps(model, chosen, empty, [s for _, s in rows], settings, count, tell)
        traces.update(zip(rows, lengths))
    whole = [Trace(text.prompt, torch.stack([traces[i, seed] for seed in seeds])) for i, text in enumerate(texts)]
    if not endings:
        return Found(whole)
    n = len(seeds)
    return Found(whole, [sum(scores[i]) / n for i in range(len(texts))], [sum(maps[i]) / n for i in range(len(texts))])


def _first_steps(model, texts, empty, seeds, settings, count, tell):
    """Magnitudes (rows, count) of a batch of Texts, each with a seed; tell(rows) after each step."""
    lengths = []

    def on_step(step):
        lengths.append(magnitude(step.delta.float()).cpu())
        tell(len(seeds))

    guided_steps(model, _joined(texts), empty.conditioning, seeds, settings, count, on_step)
    return torch.stack(lengths, dim=1)


def _to_the_end(model, texts, empty, seeds, settings, count, tell):
    """(magnitudes (rows, count), bright ending scores (rows,), attention to the end token (rows, h, w)), as
    _first_steps() but over all steps."""
    lengths, deltas = [], []

    def on_step(step):
        if step.number < count:
            lengths.append(magnitude(step.delta.float()).cpu())
        deltas.append(step.delta.float().cpu())
        tell(len(seeds))

    with EndAttention(model) as attention:
        guided_steps(
            attention.model, _joined(texts), empty.conditioning, seeds, settings, settings.steps, on_step
        )  # fmt: skip
        maps = attention.maps([text.end for text in texts], deltas[-1].shape[-2:])
    return torch.stack(lengths, dim=1), bright_ending(deltas, maps), maps


def _joined(texts):
    return join([text.conditioning for text in texts])
