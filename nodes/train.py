"""Training of SPM adapters in the graph."""

import logging
import time
from dataclasses import asdict, replace

import torch

from ..core.adapters.adapter import Card, ErasureAdapter
from ..core.erasers.spm import NOISE, TEXTS, Settings, Texts, preview, train
from ..core.errors import ErasureError
from ..core.formats import native
from ..core.host.files.folders import new_adapter_path
from ..core.host.model.layers import family
from ..core.host.page.progress import Progress
from ..core.host.runs.training import HostDenoiser, resumed, trainable_sites
from ..core.host.text.encode import encode_for, fingerprint
from ..core.text.concepts import fill, parse_concepts, parse_lines, parse_templates

log = logging.getLogger("membrane")

CUSTOM = "custom"
PRESETS = {  # appendix C.1 of the paper
    CUSTOM: {},
    "object": {"steps": 3000, "eta": 1.0, "lam": 1000.0},
    "style": {"steps": 3000, "eta": 1.0, "lam": 1000.0},
    "nudity": {"steps": 15000, "eta": 3.0, "lam": 100.0},
}
CROSS, SELF = (tuple(f"{kind}.{part}" for part in ("query", "key", "value", "out")) for kind in (
    "cross_attention", "self_attention"))  # fmt: skip
LAYERS = {
    "all": (),
    "attention": CROSS + SELF,
    "cross-attention": CROSS,
    "text keys and values": ("cross_attention.key", "cross_attention.value"),
}
TOLD_EVERY = 50  # steps


class MembraneTrain:
    TITLE = "Train Erasure Adapter (SPM)"
    DESCRIPTION = (
        "Trains an SPM adapter that erases concepts: what the model sees for them is drawn to the surrogate, and "
        "everything else is anchored where it is. Saved while it trains; Cancel keeps what is there."
    )
    SEARCH_ALIASES = ["spm", "latent anchoring", "train eraser", "LECO", "unlearn"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("adapter", "report")
    OUTPUT_TOOLTIPS = ("The adapter, for Stack Erasure Adapters.", "Where it was saved and how the losses went.")
    FUNCTION = "train"

    @classmethod
    def INPUT_TYPES(cls):
        def number(default, low, high, step, tooltip):
            return ("FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip})

        def whole(default, low, high, tooltip, step=1):
            return ("INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip})

        text = {"multiline": True, "dynamicPrompts": False}  # old pages take {} for a choice and // for a comment
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to train against; it stays as it is."}),
                "clip": ("CLIP", {"tooltip": "The text encoder whose words the model reads."}),
                "concepts": (
                    "STRING",
                    {**text, "default": "star", "tooltip": "What to erase, one per line; a line may name its own "
                     "surrogate: concept -> surrogate. All lines share one adapter."},
                ),
                "surrogate": (
                    "STRING",
                    {"default": "", "tooltip": "What the model should see instead. Empty is the empty prompt."},
                ),
                "preset": (
                    list(PRESETS),
                    {"default": CUSTOM, "tooltip": "The published steps, eta and anchoring for a kind of concept, in "
                     "place of those three below."},
                ),
                "steps": whole(1000, 1, 100_000, "Steps of the optimiser. Published: 3000."),
                "learning_rate": (
                    "FLOAT",
                    {"default": 1e-4, "min": 1e-7, "max": 1.0, "step": 1e-6, "round": False,
                     "tooltip": "Peak learning rate of AdamW. Published: 0.0001."},
                ),
                "eta": number(1.0, 0.0, 20.0, 0.1, "How far beyond the surrogate the concept is pushed. Published: 1."),
                "anchoring": number(
                    1000.0, 0.0, 100_000.0, 1.0, "Weight of keeping everything else where it is (lambda). Published: "
                    "1000; lower erases sooner and keeps less."),
                "rank": whole(1, 1, 128, "Dimensions of the adapter in each layer. Published: 1."),
                "width": whole(512, 64, 4096, "Width in pixels of the pictures trained on.", 8),
                "height": whole(512, 64, 4096, "Height in pixels of the pictures trained on.", 8),
                "seed": whole(0, 0, 2**63 - 1, "Seed of everything that is drawn."),
                "layers": (
                    list(LAYERS), {"default": "all", "tooltip": "Which layers of the transformers get the adapter."},
                ),
                "filename_prefix": (
                    "STRING",
                    {"default": "spm", "tooltip": "Name of the file in models/erasure_adapters; a number is added, "
                     "nothing is overwritten. A subfolder may come before it."},
                ),
                "save_every": whole(500, 1, 100_000, "Steps after which the file is written anew."),
            },
            "optional": {
                "preserve": (
                    "STRING",
                    {**text, "default": "", "tooltip": "Prompts to anchor, one per line, drawn by their distance to "
                     "the concept. Empty: random texts, as in the published code."},
                ),
                "adapter": ("ERASURE_ADAPTER", {"tooltip": "A trained adapter to go on from, with the same settings."}),
                "preview_every": whole(100, 0, 100_000, "Steps after which a small picture of the concept is shown on "
                                       "the node, with previews switched on in the host. 0 shows none."),
                "timestep": (
                    ["published", "matching"],
                    {"default": "published", "tooltip": "The noise level the network is told: a little too high, as in "
                     "the published code, or that of the picture."},
                ),
                "warmup": whole(500, 0, 100_000, "Steps until the learning rate is reached; at most a fifth of all "
                                "steps. Published: 500."),
                "cycles": whole(3, 1, 100, "Cosine cycles of the learning rate after that. Published: 3."),
                "templates": (
                    "STRING",
                    {
                        **text,
                        "default": "",
                        "tooltip": "Captions to train the concepts in, one per line with {} for the concept; the "
                        "surrogate takes its place. Empty: the bare words, as published.",
                    },
                ),
                "rollout_steps": whole(30, 2, 1000, "Steps of the noise schedule on which the pictures trained on are "
                                       "made. Published: 30; 10 is faster and on small models as good."),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    def train(
        self, model, clip, concepts, surrogate, preset, steps, learning_rate, eta, anchoring, rank, width, height,
        seed, layers, filename_prefix, save_every, preserve="", adapter=None, preview_every=100, timestep="published",
        warmup=500, cycles=3, templates="", rollout_steps=30, unique_id=None,
    ):  # fmt: skip
        wanted = parse_concepts(concepts, surrogate)
        kept, shapes = parse_lines(preserve), parse_templates(templates)
        settings = Settings(
            steps=steps, lr=learning_rate, eta=eta, lam=anchoring, seed=seed, size=(height // 8, width // 8),
            anchor_kind=TEXTS if kept else NOISE, timestep=timestep, warmup=warmup, cycles=cycles,
            rollout_steps=rollout_steps,
        )  # fmt: skip
        settings = replace(settings, **PRESETS[preset])
        settings = replace(settings, warmup=min(settings.warmup, settings.steps // 5))
        sites = trainable_sites(model, LAYERS[layers])
        pairs = [(fill(t, c.text), fill(t, c.surrogate)) for c in wanted for t in shapes]
        encoded = encode_for(model, clip, dict.fromkeys([*(text for pair in pairs for text in pair), "", *kept]))
        said = {"size": list(settings.size), "rank": rank, "layers": layers, "preserve": kept, "templates": shapes}
        names, surrogates = zip(*((c.text, c.surrogate) for c in wanted))
        card = Card("SPM", names, surrogates, family(model), fingerprint(clip), {**asdict(settings), **said})
        run = Run(card, settings, adapter, new_adapter_path(filename_prefix), save_every, preview_every, unique_id)
        factors = resumed(model, adapter, sites) if adapter else {}
        with torch.inference_mode(False), torch.enable_grad():

            def row(prompt):
                return encoded.row(prompt).clone()  # not an inference tensor

            anchors = torch.stack([row(p) for p in kept]) if kept else None
            texts = [Texts(row(text), row(other), row(""), anchors) for text, other in pairs]
            with HostDenoiser(model, sites, rank, 1.0, seed, factors) as denoiser:
                return run(denoiser, texts, model)


class Run:
    """One training run: what it starts from, what it says and saves on the way."""

    def __init__(self, card, settings, adapter, place, save_every, preview_every, node):
        self.card, self.settings = card, settings
        self.path, self.name = place
        self.save_every, self.preview_every, self.node = save_every, preview_every, node
        self.start = 0
        if adapter is not None:
            self.start = int(adapter.card.settings.get("trained_steps", 0))
            if not adapter.low_rank:
                raise ErasureError(
                    f"The adapter {adapter.describe()} has no trained layers to go on from; leave it out."
                )
            if self.start >= settings.steps:
                raise ErasureError(
                    f"The adapter {adapter.describe()} is trained for {self.start} steps already; set steps above that."
                )
        self.reports = []

    def __call__(self, denoiser, texts, model):
        progress = Progress(self.settings.steps)
        begin = time.monotonic()

        def on_step(report):
            self.reports.append(report)
            done = report.step - self.start
            picture = None
            if self.preview_every and report.step % self.preview_every == 0:
                picture = progress.picture(model, preview(denoiser, texts[0], self.settings))
            if report.step % TOLD_EVERY == 0 or report.step == self.settings.steps:
                left = (time.monotonic() - begin) / done * (self.settings.steps - report.step)
                said = f"{self._losses(TOLD_EVERY)}, {_minutes(left)} left"
                log.info("Membrane: %s", said)
                progress.say(said, self.node)
            if report.step % self.save_every == 0 and report.step < self.settings.steps:
                self._save(denoiser, report.step)
            progress.at(report.step, picture)

        try:
            train(denoiser, denoiser.parameters(), texts, self.settings, on_step, self.start)
        except BaseException:
            if self.reports:  # Cancel, out of memory, a loss that is not finite: what was trained stays
                self._save(denoiser, self.reports[-1].step)
            raise
        adapter = self._save(denoiser, self.settings.steps)
        return adapter, f"{self._saved}\n{self._losses(len(self.reports))}"

    def _save(self, denoiser, step):
        card = replace(self.card, settings={**self.card.settings, "trained_steps": step})
        adapter = ErasureAdapter(card, {"low_rank": denoiser.trained()})
        try:
            native.save(adapter, self.path)
        except OSError as error:  # the adapter goes on through the graph
            self._saved = f"It could not be saved as {self.name} ({error}); make room and use Save Erasure Adapter."
            log.warning("Membrane: %s", self._saved)
            return adapter
        self._saved = f"Saved as {self.name} after {step} steps."
        log.info("Membrane: %s", self._saved)
        return replace(adapter, name=self.name)

    def _losses(self, last):
        some = self.reports[-last:]
        erase, anchor = (sum(getattr(r, kind) for r in some) / len(some) for kind in ("erase", "anchor"))
        return f"step {some[-1].step} of {self.settings.steps}: erase loss {erase:.2e}, anchor loss {anchor:.2e}"


def _minutes(seconds):
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


NODES = [MembraneTrain]
