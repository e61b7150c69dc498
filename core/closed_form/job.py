"""One closed-form erasure from words to adapter; what it needs of the host comes in as functions."""

from dataclasses import dataclass

import torch

from ..adapter import Card, ErasureAdapter
from .concepts import Concept, aligned_rows, fill, last_subject_token, stack_rows
from .rece import rece
from .uce import uce

METHODS = ("UCE", "RECE")


@dataclass(frozen=True)
class Encoded:
    """Prompts as the model reads them."""

    prompts: tuple[str, ...]
    ids: tuple[list[int], ...]  # token ids of each, (T,)
    vectors: torch.Tensor  # (n, T, d), float32 on the CPU
    end: int  # id of the end token

    def row(self, prompt):
        """Vectors (T, d) of one of the prompts."""
        return self.vectors[self.prompts.index(prompt)]

    def id_row(self, prompt):
        """Token ids (T,) of one of the prompts."""
        return self.ids[self.prompts.index(prompt)]

    def words(self, prompt):
        """Token ids of one of the prompts without start, end and padding."""
        ids = self.id_row(prompt)
        return ids[1 : ids.index(self.end, 1)]


@dataclass(frozen=True)
class Job:
    """What to erase and how. Defaults are those of the published code.

    preserve: prompts or concepts whose meaning must stay; each also in every template. The empty prompt
    is always preserved. erase_scale, preserve_scale, anchor: the weights of UCE's three terms. epochs,
    penalty: RECE's rounds and the ridge of its derived embeddings.
    """

    concepts: tuple[Concept, ...]
    preserve: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    method: str = "UCE"
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    anchor: float = 0.5
    epochs: int = 1
    penalty: float = 0.1

    def pairs(self):
        """(concept's index, prompt with the concept, the same prompt with its surrogate)."""
        return [
            (i, fill(template, c.text), fill(template, c.surrogate))
            for i, c in enumerate(self.concepts)
            for template in self.templates
        ]

    def preserved(self):
        """The prompts to preserve, without repeats."""
        filled = [fill(template, line) for line in self.preserve for template in self.templates]
        return list(dict.fromkeys(["", *self.preserve, *filled]))

    def prompts(self):
        """Every prompt that has to be encoded, without repeats."""
        words = [w for c in self.concepts for w in (c.text, c.surrogate)]
        return list(dict.fromkeys([*words, *(p for _, *both in self.pairs() for p in both), *self.preserved()]))


def solve(job, encoded, weight_gram=None, on_epoch=None):
    """TextMap of a job. encoded: its prompts; weight_gram: S (d, d) of the key and value matrices, RECE only."""
    sliced, whole, owners = [], [], []
    for i, target, replacement in job.pairs():
        concept = job.concepts[i]
        old, new = encoded.row(target), encoded.row(replacement)
        first_old = last_subject_token(encoded.id_row(target), encoded.words(concept.text), encoded.end)
        first_new = last_subject_token(encoded.id_row(replacement), encoded.words(concept.surrogate), encoded.end)
        sliced.append(aligned_rows(old, new, first_old, first_new))
        whole.append((old, new))
        owners.append(i)
    rows = stack_rows(sliced, owners)
    preserve = torch.cat([encoded.row(p) for p in job.preserved()])
    scales = {"erase_scale": job.erase_scale, "preserve_scale": job.preserve_scale, "anchor": job.anchor}
    if job.method == "UCE":
        return uce(rows.targets, rows.replacements, preserve, rows.concept, len(job.concepts), **scales)
    full = stack_rows(whole, owners)
    return rece(
        rows.targets, rows.replacements, preserve, rows.concept,
        full.targets, full.replacements, full.concept, weight_gram, len(job.concepts),
        epochs=job.epochs, penalty=job.penalty, on_epoch=on_epoch, **scales,
    )  # fmt: skip


def erase(job, encoded, family, text_encoder, weight_gram=None, on_epoch=None):
    """ErasureAdapter of a job; family and text_encoder go on its card."""
    settings = {
        "preserve": list(job.preserve),
        "templates": list(job.templates),
        "erase_scale": job.erase_scale,
        "preserve_scale": job.preserve_scale,
        "anchor": job.anchor,
    }
    if job.method == "RECE":
        settings |= {"epochs": job.epochs, "penalty": job.penalty}
    card = Card(
        job.method,
        tuple(c.text for c in job.concepts),
        tuple(c.surrogate for c in job.concepts),
        family,
        text_encoder,
        settings,
    )
    return ErasureAdapter(card, solve(job, encoded, weight_gram, on_epoch))
