"""Looking at an erasure before sampling."""

import torch

from ..core.adapters.gates import (
    follow_meaning,
    meanings,
    openings,
    openings_report,
    require_probes,
    responses_report,
    side_by_side,
)
from ..core.adapters.written import by_words
from ..core.errors import ErasureError
from ..core.families.table import family_of
from ..core.host.model.layers import family, text_readers
from ..core.host.model.weights import text_gram
from ..core.host.page.progress import Progress
from ..core.host.patches.stack import concepts_for
from ..core.host.runs.erasing import computed
from ..core.host.text.encode import encode
from ..core.host.text.entries import encode_entries, encode_for
from ..core.measures.chart import bar_chart
from ..core.measures.impact import impacts, report
from ..core.text.similarity import calibration_report, matches
from . import inputs
from .labels import labelled
from .shown import part, shown

MOST_BARS = 60


class MembraneImpact:
    TITLE = "Preview Erasure Impact"
    DESCRIPTION = (
        "Shows, before any sampling, how much a stack of erasures changes what the model hears of each prompt: "
        "erased prompts should be far up, everything you want to keep near zero."
    )
    SEARCH_ALIASES = ["who gets hurt", "erasure damage", "side effects", "collateral", "prior shift"]
    CATEGORY = "membrane/measure"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("chart", "report")
    OUTPUT_TOOLTIPS = ("Bars, the most changed prompt first.", "The same as text, one prompt per line.")
    FUNCTION = "preview"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled(
            {
                "required": {
                    "model": inputs.model("The model whose layers read the text."),
                    "clip": inputs.CLIP,
                    "stack": inputs.stack("The erasures to look at."),
                    "prompts": inputs.PROMPTS,
                },
            }
        )

    def preview(self, model, clip, stack, prompts):
        lines, stack = inputs.prompt_lines(prompts), computed(stack, model, clip, Progress)[0]
        entry, layers = family(model).text, len(list(text_readers(model)))
        progress = Progress(len(lines) + layers)
        encoded = encode_for(model, clip, lines, progress.at)
        progress.next_phase(len(lines))
        concepts = concepts_for(stack, clip)
        heard = encode(clip, lines) if concepts and not encoded.contexts else None
        found = impacts(stack, encoded, text_gram(model, progress.at), concepts, entry, heard)
        title = "Change of what the model hears" + (f" ({MOST_BARS} of {len(found)})" if len(found) > MOST_BARS else "")
        chart = bar_chart(title, [(impact.prompt, impact.change) for impact in found[:MOST_BARS]])
        text = report(found)
        return shown((torch.from_numpy(chart)[None], text), part(title, text))


class MembranePreview:
    TITLE = "Preview Permeability"
    DESCRIPTION = (
        "Shows how far each adapter of a stack opens for each prompt, before any sampling: prompts with the concept "
        "should open it, all others should leave it as closed as possible."
    )
    SEARCH_ALIASES = ["facilitated transport", "gate", "spm", "which adapter opens"]
    CATEGORY = "membrane/measure"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("chart", "report")
    OUTPUT_TOOLTIPS = ("Bars for each prompt, an adapter or concept each.", "The same as text.")
    FUNCTION = "preview"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled(
            {
                "required": {
                    "clip": inputs.CLIP,
                    "stack": inputs.stack("The adapters to look at."),
                    "prompts": inputs.PROMPTS,
                },
                "optional": {
                    "model": inputs.model(
                        "Only for the permeability meaning: the model, where it changes the text before it reads it."
                    ),
                },
            }
        )

    def preview(self, clip, stack, prompts, model=None):
        lines = inputs.prompt_lines(prompts)
        stack = by_words(stack) if model is None else computed(stack, model, clip, Progress)[0]
        progress = Progress(len(lines))
        encoded = encode(clip, lines, progress.at)
        concepts = concepts_for(stack, clip)
        texts = _as_read(stack, clip, model, lines)
        score = side_by_side(matches(concepts, encoded), _meanings(stack, texts))
        rows = openings(stack, lines, score, concepts.names if concepts else ())
        bars = [(f"{opening.prompt}: {opening.adapter}", opening.value) for opening in rows]
        title = "How far adapters open" + (f" ({MOST_BARS} of {len(bars)})" if len(bars) > MOST_BARS else "")
        report = "\n\n".join(
            filter(
                None,
                (openings_report(rows), calibration_report(concepts, encoded), responses_report(stack, lines, texts)),
            )
        )
        chart = torch.from_numpy(bar_chart(title, bars[:MOST_BARS]))[None]
        return shown((chart, report), part(title, report))


def _as_read(stack, clip, model, lines):
    """[{text entry: (1, T, d)}] of prompts as a model reads them, for gates that follow meaning; [] where none does.

    Without a MODEL the rows that the text encoder gives, which the model reads where no norm and no layer comes first.
    """
    adapters = [stack.entries[number].adapter for number, _ in follow_meaning(stack)]
    for adapter in adapters:
        require_probes(adapter)
    names = {name for adapter in adapters for name in adapter.probes}
    if not names:
        return []
    if model is not None:
        entries = encode_entries(model, clip, lines, pooled=None)
    else:
        normed = next((a for a in adapters if not _as_encoded(a)), None)
        if normed is not None:
            raise ErasureError(
                f"The adapter {normed.describe()} follows the meaning of a text as the model reads it, behind a norm; "
                "connect the model to Preview Permeability."
            )
        encoded = encode(clip, lines, pooled="pooled" in names)
        entries = {"text": encoded} | ({"pooled": encoded.pooled} if encoded.pooled else {})
    return [{name: encoded[line].rows[None] for name, encoded in entries.items()} for line in lines]


def _as_encoded(adapter):
    """Whether the rows that an adapter's probes read are those that the text encoder gives."""
    behind = {entry.name for entry in family_of((adapter.card.family,)).entries if not entry.direct}
    return not behind & adapter.layer_probes.keys() and not any(found.normed for found in adapter.maps.values())


def _meanings(stack, texts):
    found = [meanings(stack, text) for text in texts]
    return torch.cat(found) if found else None


NODES = [MembraneImpact, MembranePreview]
