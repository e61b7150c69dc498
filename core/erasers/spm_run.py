"""A training run from beginning to end: what it goes on from, what it tells and saves on the way, what stays after a
stop.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..adapters.adapter import Card, ErasureAdapter
from ..adapters.deltas.text_rows import TextLowRank
from ..errors import ErasureError
from .conditions import Conditions, together
from .paths import Flow
from .spm import Settings, Texts, preview, train

log = logging.getLogger("membrane")

TOLD_EVERY, TOLD_AFTER = 50, 5.0  # steps, or seconds where these take longer


def texts_of(encoded, pairs, preserved, concepts=()):
    """[Texts] of pairs (prompt with the concept, with its surrogate) that are all among the encoded prompts, Conditions
    or rows, with the preserved prompts; their tensors are not inference tensors if this is called outside inference
    mode. concepts: the bare words."""

    def row(prompt):
        found = encoded[prompt]
        return found if isinstance(found, Conditions) else found.rows.clone()

    anchors = together([row(prompt) for prompt in preserved]) if preserved else None
    return [Texts(row(text), row(other), row(""), anchors, text in concepts) for text, other in pairs]


def steps_done(adapter, settings):
    """How many steps an adapter to go on from was trained; raises ErasureError when there is nothing to go on with."""
    done = int(adapter.card.settings.get("trained_steps", 0))
    if not adapter.low_rank and not adapter.deltas.get(TextLowRank.kind):
        raise ErasureError(f"The adapter {adapter.describe()} has no trained layers to go on from; leave it out.")
    if done >= settings.steps:
        raise ErasureError(
            f"The adapter {adapter.describe()} is trained for {done} steps already; set steps above that."
        )
    return done


@dataclass
class TrainingRun:
    """One training run, called with a denoiser and [Texts].

    card: what the adapter says of itself; name: of its file; save(adapter): writes that file, may raise OSError;
    save_every: steps after which it is written anew; start: steps that are done already; preview_every: steps after
    which a picture of the first concept is shown, 0 for none; show(step, latents): called after each step, latents (1,
    4, h, w) or None, may raise to stop; say(text): called with a line on how it goes; path: of the roll-outs,
    None for Stable Diffusion's noise schedule. probes: {text entry: Probes} that go with the adapter. original: the
    same picture without the adapter, once one was shown.
    """

    card: Card
    settings: Settings
    name: str
    save: Callable
    save_every: int
    start: int = 0
    preview_every: int = 0
    show: Callable = lambda step, latents: None
    say: Callable = lambda text: None
    path: Flow | None = None
    probes: dict = field(default_factory=dict)
    reports: list = field(default_factory=list)
    saved: str = ""
    original: torch.Tensor | None = None

    def __call__(self, denoiser, texts):
        """(ErasureAdapter, report as text). An exception, such as Cancel, leaves a file of what was trained."""
        begin, told = time.monotonic(), None

        def on_step(report):
            nonlocal told
            self.reports.append(report)
            shown = self.preview_every and report.step % self.preview_every == 0
            if shown and self.original is None:
                self.original = preview(denoiser, texts[0], self.settings, self.path, on=False)
            latents = preview(denoiser, texts[0], self.settings, self.path) if shown else None
            now, last = time.monotonic(), report.step == self.settings.steps
            told = told or now
            if report.step % TOLD_EVERY == 0 or last or now - told >= TOLD_AFTER:
                self._tell(report.step, now - begin)
                told = now
            if report.step % self.save_every == 0 and report.step < self.settings.steps:
                self._keep(denoiser, report.step)
            self.show(report.step, latents)

        try:
            train(denoiser, denoiser.parameters(), texts, self.settings, on_step, self.start, path=self.path)
        except BaseException:
            if self.reports:  # Cancel, out of memory, a loss that is not finite: what was trained stays
                self._keep(denoiser, self.reports[-1].step)
                self.say(f"Stopped. {self.saved} To go on, load it and connect it to the input adapter.")
            raise
        adapter = self._keep(denoiser, self.settings.steps)
        return adapter, f"{self.saved}\n{self._losses(len(self.reports))}"

    def _tell(self, step, seconds):
        left = seconds / (step - self.start) * (self.settings.steps - step)
        said = f"{self._losses(TOLD_EVERY)}, {_minutes(left)} left"
        log.info("Membrane: %s", said)
        self.say(said)

    def _keep(self, denoiser, step):
        """The adapter as trained so far, saved where that can be done."""
        card = replace(self.card, settings={**self.card.settings, "trained_steps": step})
        deltas = {}
        for site, change in denoiser.trained().items():
            deltas.setdefault(change.kind, {})[site] = change
        adapter = ErasureAdapter(card, deltas, layer_probes=self.probes)
        try:
            self.save(adapter)
        except OSError as error:  # the adapter goes on through the graph
            self.saved = f"It could not be saved as {self.name} ({error}); make room and use Save Erasure Adapter."
            log.warning("Membrane: %s", self.saved)
            return adapter
        self.saved = f"Saved as {self.name} after {step} steps."
        log.info("Membrane: %s", self.saved)
        return replace(adapter, name=self.name)

    def _losses(self, last):
        some = self.reports[-last:]
        erase, anchor = (sum(getattr(r, kind) for r in some) / len(some) for kind in ("erase", "anchor"))
        return f"step {some[-1].step} of {self.settings.steps}: erase loss {erase:.2e}, anchor loss {anchor:.2e}"


def _minutes(seconds):
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
