"""One closed-form erasure from words to adapter; what it needs of the host comes in as functions."""

from dataclasses import asdict, dataclass

import torch

from ...adapters.adapter import Card, ErasureAdapter
from ...text.concepts import Concept, aligned_rows, fill
from ...text.encoded import Encoded
from .double_projection import double_projection_of
from .rece import PENALTIES, rece_of
from .speed import speed_of
from .uce import uce_of

TOKENS = ("subject", "all")
SCALES = ("erase_scale", "preserve_scale", "anchor")
SETTINGS = {  # the fields of a job that its method reads; they go on the card
    "UCE": SCALES,
    "RECE": (*SCALES, "epochs", "penalty", "penalty_on"),
    "SPEED": ("tau", "rho", "lam", "prior_filter", "tokens"),
    "Double Projections": ("tau", "safe_anchor", "tokens"),
}
METHODS = tuple(SETTINGS)


@dataclass(frozen=True)
class Job:
    """What to erase and how. Defaults are those of the published code.

    preserve: prompts or concepts whose meaning must stay; each also in every template. The empty prompt
    is always preserved. erase_scale, preserve_scale, anchor: the weights of UCE's three terms. epochs,
    penalty, penalty_on: RECE's rounds, and the weight and object of the penalty on its derived embeddings.
    SPEED: tau, the mean square from which a direction of the preserved vectors is protected; rho, the ridge;
    lam, slack of what the start token and the empty prompt keep; prior_filter, protect only what the erasure
    would disturb. Double Projections: tau,
    for preserve lists with as many vectors as the text is wide; safe_anchor, replace by what the preserved
    vectors and the surrogates can express of the concept (published) instead of by the surrogate. tokens, for
    these two: the vector of the last "subject" token of each prompt, or of "all" tokens but the start token.
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
    penalty_on: str = PENALTIES[0]
    tau: float = 0.1
    rho: float = 1.0
    lam: float = 0.0
    prior_filter: bool = True
    safe_anchor: bool = True
    tokens: str = TOKENS[0]

    def pairs(self):
        """(concept's index, prompt with the concept, the same prompt with its surrogate)."""
        return [
            (i, fill(template, c.text), fill(template, c.surrogate))
            for i, c in enumerate(self.concepts)
            for template in self.templates
        ]

    def captions(self):
        """{prompt to preserve: what it is about}, the empty prompt first, without what is to be erased."""
        found = {"": ""}
        erased = [c.text.lower() for c in self.concepts]
        lines = [line for line in self.preserve if line.lower() not in erased]  # else the two wishes cancel
        for line in lines:
            found.setdefault(line, line)
        for line in lines:
            for template in self.templates:
                found.setdefault(fill(template, line), line)
        return found

    def preserved(self):
        """The prompts to preserve, without repeats."""
        return list(self.captions())

    def retained_captions(self):
        """The captions that SPEED retains: those that name no concept, as published.

        Without the empty prompt where only subject tokens count: its start token is a constraint of its own.
        """
        names = [c.text.lower() for c in self.concepts]
        kept = {p: word for p, word in self.captions().items() if not any(name in p.lower() for name in names)}
        if self.tokens == "subject":
            kept.pop("", None)
        return kept

    def prompts(self):
        """Every prompt that has to be encoded, without repeats."""
        words = [w for c in self.concepts for w in (c.text, c.surrogate)]
        return list(dict.fromkeys([*words, *(p for _, *both in self.pairs() for p in both), *self.preserved()]))


def aligned_groups(job, encoded):
    """By concept, the rows from the last subject token on of each prompt pair: what UCE edits."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        concept = job.concepts[i]
        first = encoded.subject(target, concept.text), encoded.subject(replacement, concept.surrogate)
        groups[i].append(aligned_rows(encoded.row(target), encoded.row(replacement), *first))
    return groups


def whole_groups(job, encoded, start=0):
    """By concept, all rows from index `start` on of each prompt pair: what RECE derives from."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        groups[i].append((encoded.row(target)[start:], encoded.row(replacement)[start:]))
    return groups


def subject_groups(job, encoded):
    """By concept, the row of the last subject token of each prompt pair: what null-space editing takes."""
    groups = [[] for _ in job.concepts]
    for i, target, replacement in job.pairs():
        concept = job.concepts[i]
        old, new = encoded.subject(target, concept.text), encoded.subject(replacement, concept.surrogate)
        groups[i].append((encoded.row(target)[old : old + 1], encoded.row(replacement)[new : new + 1]))
    return groups


def preserved_rows(job, encoded, captions):
    """Rows (F, d) of the {prompt: subject} that null-space editing protects; F may be 0."""
    if job.tokens == "all":
        rows = [encoded.row(prompt)[1:] for prompt in captions]
    else:
        rows = [encoded.row(prompt)[encoded.subject(prompt, word)][None] for prompt, word in captions.items()]
    return torch.cat(rows) if rows else encoded.vectors[0, :0]


def safe_surrogates(job, groups):
    """Rows of the surrogates that are not erased themselves: a concept in the safe span would stay as it is."""
    erased = [c.text.lower() for c in job.concepts]
    return [r for c, pairs in zip(job.concepts, groups) if c.surrogate.lower() not in erased for _, r in pairs]


def solve(job, encoded, weight_gram=None, on_epoch=None):
    """TextMap of a job. encoded: its prompts; weight_gram: S (d, d) of the key and value matrices, RECE only."""
    if job.method in ("UCE", "RECE"):
        groups = aligned_groups(job, encoded)
        preserve = [encoded.row(p) for p in job.preserved()]
        scales = {"erase_scale": job.erase_scale, "preserve_scale": job.preserve_scale, "anchor": job.anchor}
        if job.method == "UCE":
            return uce_of(groups, preserve, **scales)
        return rece_of(
            groups, whole_groups(job, encoded), preserve, weight_gram,
            epochs=job.epochs, penalty=job.penalty, penalty_on=job.penalty_on, on_epoch=on_epoch, **scales,
        )  # fmt: skip
    groups = subject_groups(job, encoded) if job.tokens == "subject" else whole_groups(job, encoded, 1)
    captions = job.retained_captions() if job.method == "SPEED" else job.captions()
    return _null_space(job, groups, preserved_rows(job, encoded, captions), encoded.row(""))


def _null_space(job, groups, retained, empty):
    """SPEED or Double Projections on rows: groups by concept, retained (F, d), those of the empty prompt (T, d)."""
    names = [c.text for c in job.concepts]
    if job.method == "SPEED":
        return speed_of(
            groups, retained, empty,
            tau=job.tau, rho=job.rho, lam=job.lam, prior_filter=job.prior_filter, names=names,
        )  # fmt: skip
    safe = torch.cat([retained, *safe_surrogates(job, groups)]) if job.safe_anchor else None
    return double_projection_of(groups, retained, safe=safe, tau=job.tau, names=names)


def solve_pooled(job, encoded):
    """TextMap (p wide) of the pooled vector that SDXL reads beside the text, c -> c + A (B c), or None without one.

    The same formulas with one row a prompt: the layer that reads the vector is linear in it, so that the weights
    cancel here too. RECE gets its UCE part: it derives embeddings from key and value matrices only.
    """
    if encoded.pooled is None:
        return None
    pooled = Encoded(encoded.prompts, encoded.ids, encoded.pooled[:, None], encoded.end)
    groups = whole_groups(job, pooled)
    if job.method in ("UCE", "RECE"):
        preserve = [pooled.row(p) for p in job.preserved()]
        return uce_of(
            groups, preserve,
            erase_scale=job.erase_scale, preserve_scale=job.preserve_scale, anchor=job.anchor,
        )  # fmt: skip
    captions = job.retained_captions() if job.method == "SPEED" else job.captions()
    retained = torch.cat([pooled.vectors[0, :0], *(pooled.row(p) for p in captions)])
    return _null_space(job, groups, retained, pooled.row(""))


def erase(job, encoded, family, text_encoder, weight_gram=None, on_epoch=None):
    """ErasureAdapter of a job; family and text_encoder go on its card."""
    fields = ("preserve", "templates", *SETTINGS[job.method])
    settings = {name: value for name, value in asdict(job).items() if name in fields}
    settings |= {"preserve": list(job.preserve), "templates": list(job.templates)}
    card = Card(
        job.method,
        tuple(c.text for c in job.concepts),
        tuple(c.surrogate for c in job.concepts),
        family,
        text_encoder,
        settings,
    )
    text_map = solve(job, encoded, weight_gram, on_epoch)
    pooled = solve_pooled(job, encoded)
    return ErasureAdapter(card, {"map": {"text": text_map} | ({"pooled": pooled} if pooled else {})})
