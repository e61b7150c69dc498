"""Prompts as the text entries of a MODEL read them."""

import comfy.model_management
import torch

from ...errors import ErasureError
from ...families.family import CONTEXT
from ...text.encoded import Encoded
from ..compat import empty_latent
from ..model.layers import family, readers, text_entries
from .encode import described, each_given, encode, in_contexts, pooled_of
from .kept import KEPT

PADDING_KEPT = 4  # rows of a prompt's padding; they are many and alike


def encode_for(model, clip, prompts, on_progress=None):
    """Encoded prompts as the main text entry of a MODEL reads them; raises when the CLIP belongs to another one."""
    return encode_entries(model, clip, prompts, on_progress)[family(model).text.name]


def encode_entries(model, clip, prompts, on_progress=None, pooled=False):
    """{name of a text entry: Encoded prompts as it reads them} of a MODEL, the main entry first.

    pooled: with those of pooled vectors as well; None: where their family does not want to be asked. An entry that not
    every prompt has rows for is left out. Prompts that were encoded lately are not encoded again.
    """
    prompts, known = tuple(prompts), text_entries(model)
    entries = [entry for entry in known if pooled or not entry.pooled or (pooled is None and not entry.asked)]
    if all(entry.direct for entry in entries) and in_contexts(clip):
        found = _of_contexts(clip, prompts, entries, on_progress)
    else:
        found = _of_each(model, clip, prompts, entries, on_progress)
    for entry, encoded in found.items():
        _require_width(encoded, known[entry])
    return {entry.name: encoded for entry, encoded in found.items()}


def _require_width(encoded, width):
    if width is not None and encoded.width != width:
        raise ErasureError(
            f"The text encoder gives vectors of width {encoded.width}, but the model reads vectors of width {width}; "
            "connect the CLIP that belongs to the model."
        )


def _of_contexts(clip, prompts, entries, on_progress):
    """{entry: Encoded} of CLIP encoders, whose rows a network reads as they are."""
    main, *others = entries
    encoded = encode_contexts(clip, prompts, on_progress, bool(others))
    return {main: encoded.at(main), **{entry: encoded.pooled.at(entry) for entry in others}}


def encode_contexts(clip, prompts, on_progress=None, pooled=False):
    """Encoded prompts of CLIP encoders, as encode() gives them; lately encoded ones are kept."""
    key = ("contexts", prompts, pooled)
    return KEPT.get(clip, key) or KEPT.keep(clip, key, encode(clip, prompts, on_progress, pooled))


def _of_each(model, clip, prompts, entries, on_progress):
    """{entry: Encoded} of prompts one at a time: all of them through the text encoder, then, where a norm or layers of
    the model come first, through these."""
    keys = {entry: ("rows", entry, None if entry.direct else KEPT.key_of(model)) for entry in entries}
    missing = [p for p in dict.fromkeys(prompts) if any(KEPT.get(clip, (*keys[entry], p)) is None for entry in entries)]
    given = [(prompt, tokens, _on_cpu(found)) for prompt, tokens, found in each_given(clip, missing, on_progress)]
    behind = [entry for entry in entries if not entry.direct]
    read = Reading.loaded(model, behind) if behind and given else lambda found: {}
    fresh = {}
    for prompt, tokens, found in given:
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows = read(found)
        for entry in entries:
            own = rows.get(entry) if not entry.direct else _rows(entry, found)
            fresh[entry, prompt] = None if own is None else _described(clip, prompt, tokens, found, own, entry)
    every = {}
    for entry in entries:
        each = [fresh.get((entry, p)) or KEPT.get(clip, (*keys[entry], p)) for p in prompts]
        if all(prompt is not None for prompt in each):
            every[entry] = Encoded(each, contexts=entry is entries[0] and in_contexts(clip), entry=entry)
        elif entry.pooled:
            pooled_of(clip, [None])  # raises
    for (entry, prompt), encoded in fresh.items():
        if encoded is not None:
            KEPT.keep(clip, (*keys[entry], prompt), encoded)
    return every


def _on_cpu(given):
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def _rows(entry, given):
    """The entry's rows (T, d) as the encoder gave them, None where it gave none."""
    tensor = given.get("cond" if entry.argument == "cross_attn" else entry.argument)
    return None if tensor is None else entry.rows(tensor).float()


def _described(clip, prompt, tokens, given, rows, entry):
    if entry.pooled:
        return next(iter(Encoded.of_pooled([prompt], rows)))
    of_encoder = _rows(entry, given)
    if of_encoder is None or entry.prepared and entry.stream:
        of_encoder = _without_zeros(rows)
    found = described(clip, prompt, tokens, of_encoder, entry.stream).read_as(rows)
    return found if entry.reach == CONTEXT else found.with_padding(PADDING_KEPT)


def _without_zeros(rows):
    """Rows (T, d) without those at either end that are zero."""
    there = rows.any(dim=1).nonzero().flatten().tolist()
    return rows[there[0] : there[-1] + 1] if there else rows[:1]


# ---------------------------------------------------------------- through layers of the model


class _Read(Exception):
    """Ends a call of the network at the layer whose input is wanted."""


class Reading:
    """What a MODEL's layers read of a conditioning: it is prepared as for sampling, by the model's own `extra_conds`,
    and where a norm or more stands before an entry, the network is run up to the layer that reads it.

    entries: TextEntries that are not read as the encoder gives them. What acts on the MODEL already is not seen, but
    for what is put on layers that stand before an entry.
    """

    def __init__(self, model, entries):
        self.base, self.device, self.entries = model.model, model.load_device, entries
        self.layers = {}
        for entry in entries:
            found = next((module for _, module in readers(model, entry)), None) if entry.norm else None
            self.layers[entry] = found
        self.latent = empty_latent(model.model.latent_format)

    @classmethod
    def loaded(cls, model, entries):
        """The same of a MODEL that is put on its device first."""
        comfy.model_management.load_models_gpu([model])
        return cls(model, entries)

    def __call__(self, given):
        """{entry: rows (T, d) float32 on the CPU} of what encoding one prompt gave, where it has rows for it."""
        more = {name: value for name, value in given.items() if name != "cond"}
        with torch.inference_mode():
            conds = type(self.base).extra_conds(
                self.base, cross_attn=given["cond"], noise=self.latent, device=self.device, prompt_type="positive",
                **more,
            )  # fmt: skip
            found = {entry: self._of(entry, conds) for entry in self.entries if entry.result in conds}
        return {entry: rows.float().cpu().clone() for entry, rows in found.items()}

    def _of(self, entry, conds):
        return entry.rows(self._input(entry, conds) if entry.norm else conds[entry.result].cond)

    def _input(self, entry, conds):
        """What the layer that reads an entry gets, as a tensor with one prompt."""
        network = {
            name: cond.process_cond(batch_size=1, device=self.device, area=None).cond for name, cond in conds.items()
        }
        sigma = torch.full((1,), float(self.base.model_sampling.percent_to_sigma(0.5)), device=self.device)
        found = []

        def stop(module, inputs):
            found.append(inputs[0])
            raise _Read

        hook = self.layers[entry].register_forward_pre_hook(stop)
        try:
            concat, text = (network.pop(name, None) for name in ("c_concat", "c_crossattn"))
            options = {"sigmas": sigma, "cond_or_uncond": [0]}
            type(self.base).apply_model(
                self.base, self.latent.to(self.device), sigma, concat, text, transformer_options=options, **network
            )
        except _Read:
            return found[0]
        finally:
            hook.remove()
        raise ErasureError(
            f"The network of {type(self.base).__name__} never reached the layer behind {entry.norm}, where it should "
            "read its text; update ComfyUI or Membrane."
        )


OF_PICTURES = (
    "noise",
    "device",
    "prompt_type",
    "control",
    "denoise_mask",
    "latent_image",
    "concat_latent_image",
    "concat_mask",
    "reference_latents",
)  # fmt: skip  of a conditioning, without a part in its text


class Texts:
    """What text entries of a MODEL read of a conditioning when it is sampled, of all its prompts; entries: TextEntries.

    An entry that the conditioning has nothing for is left out.
    """

    def __init__(self, model, entries):
        self.direct = [entry for entry in entries if entry.direct]
        behind = [entry for entry in entries if not entry.direct]
        self.read = Reading(model, behind) if behind else None

    def __call__(self, given):
        """{name of an entry: rows (n, T, d)} of what the host's `extra_conds` is called with."""
        there = [entry for entry in self.direct if given.get(entry.argument) is not None]
        found = {entry.name: entry.texts(given[entry.argument]) for entry in there}
        if self.read is None or given.get("cross_attn") is None:
            return found
        own = {name: value for name, value in given.items() if name not in OF_PICTURES and name != "cross_attn"}
        each = [self.read(_of_prompt(own, i, given["cross_attn"])) for i in range(len(given["cross_attn"]))]
        names = [entry for entry in self.read.entries if all(entry in rows for rows in each)]
        return found | {entry.name: torch.stack([rows[entry] for rows in each]) for entry in names}


def _of_prompt(given, place, text):
    """What is given for all prompts of a text (n, T, d), for one of them."""
    own = {name: value[place : place + 1] if _of_each_row(value, text) else value for name, value in given.items()}
    return {**own, "cond": text[place : place + 1]}


def _of_each_row(value, text):
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(text) > 1
