"""Training of SPM adapters in the graph."""

import torch

from ..core.adapters.adapter import Card
from ..core.erasers.objectives import METHODS, OBJECTIVES, SPM, require_surrogates
from ..core.erasers.paths import PUBLISHED, TIMESTEPS
from ..core.erasers.spm_presets import AS_SET, CUSTOM, LAYERS, PRESETS, QUALITIES, settings_of
from ..core.erasers.spm_run import TrainingRun, steps_done
from ..core.formats import native
from ..core.host.files.folders import new_adapter_path
from ..core.host.model.layers import family_name
from ..core.host.page.progress import Progress
from ..core.host.runs.probing import probes_if_any
from ..core.host.runs.training import fitted, resumed, templates_of_training, trainable_sites, trained
from ..core.host.text.encode import fingerprint
from ..core.text.concepts import fill, parse_concepts, parse_preserved
from . import inputs
from .labels import labelled
from .shown import part, shown


class MembraneTrain:
    TITLE = "Train Erasure Adapter (SPM)"
    DESCRIPTION = (
        "Trains an SPM adapter that erases concepts: what the model sees for them is drawn to the surrogate, and "
        "everything else is anchored where it is. Saved while it trains; Cancel keeps what is there."
    )
    SEARCH_ALIASES = ["spm", "latent anchoring", "train eraser", "LECO", "unlearn"]
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ("ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("adapter", "report")
    OUTPUT_TOOLTIPS = ("The adapter, for Stack Erasure Adapters.", "Where it was saved and how the losses went.")
    FUNCTION = "train"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                "model": inputs.model("The model to train against; it stays as it is."),
                "clip": inputs.CLIP,
                "concepts": inputs.text(
                    "",
                    "What to erase, one per line; a line may name its own surrogate: concept -> surrogate. All lines "
                    "share one adapter.",
                    placeholder="What to erase, one per line: van gogh -> a painting",
                ),
                "surrogate": inputs.line("", "What the model should see instead. Empty is the empty prompt."),
                "preset": inputs.choice(
                    PRESETS,
                    CUSTOM,
                    "The published steps, eta and anchoring for a kind of concept, in place of those three below.",
                ),
                "steps": inputs.whole(1000, 1, 100_000, "Steps of the optimiser. Published: 3000."),
                "learning_rate": inputs.number(
                    1e-4, 1e-7, 1.0, 1e-6, "Peak learning rate of AdamW. Published: 0.0001.", round=False
                ),
                "eta": inputs.number(
                    1.0, 0.0, 20.0, 0.1, "How far beyond the surrogate the concept is pushed. Published: 1."
                ),
                "anchoring": inputs.number(
                    1000.0, 0.0, 100_000.0, 1.0, "Weight of keeping everything else where it is (lambda). Published: "
                    "1000; lower erases sooner and keeps less.",
                ),
                "rank": inputs.whole(1, 1, 128, "Dimensions of the adapter in each layer. Published: 1."),
                "width": inputs.whole(512, 64, 4096, "Width in pixels of the pictures trained on.", step=8),
                "height": inputs.whole(512, 64, 4096, "Height in pixels of the pictures trained on.", step=8),
                "seed": inputs.whole(0, 0, 2**63 - 1, "Seed of everything that is drawn."),
                "layers": inputs.choice(
                    LAYERS,
                    "all",
                    "Which layers get the adapter. all: on U-Nets those of the transformers, as published; on "
                    "transformers the text's queries, keys and values, where one layer serves text and picture for "
                    "the text's rows alone, and on Flux the layer where the text enters.",
                ),
                "filename_prefix": inputs.line(
                    "spm",
                    "Name of the file in models/erasure_adapters; a number is added, nothing is overwritten. A "
                    "subfolder may come before it.",
                ),
                "save_every": inputs.whole(500, 1, 100_000, "Steps after which the file is written anew."),
            },
            "optional": {
                "preserve": inputs.text(
                    "",
                    "Prompts to anchor, one per line, drawn by their distance to the concept. Empty: random texts, as "
                    "in the published code; on transformers captions of everyday subjects.",
                ),
                "adapter": ("ERASURE_ADAPTER", {"tooltip": "A trained adapter to go on from, with the same settings."}),
                "preview_every": inputs.whole(
                    100, 0, 100_000, "Steps after which two small pictures of the concept from one seed are shown on "
                    "the node: the original at the left, erased so far at the right. 0 shows none."
                ),
                "timestep": inputs.choice(
                    TIMESTEPS,
                    PUBLISHED,
                    "The noise level the network is told: a little too high, as in the published code, or that of the "
                    "picture.",
                ),
                "warmup": inputs.whole(
                    500, 0, 100_000, "Steps until the learning rate is reached; at most a fifth of all steps. "
                    "Published: 500."
                ),
                "cycles": inputs.whole(
                    3, 1, 100, "Cosine cycles of the learning rate after that. Published: 3."
                ),
                "templates": inputs.text(
                    "",
                    "Captions to train the concepts in, one per line with {} for the concept; the surrogate takes its "
                    "place. Empty: the bare words on U-Nets, as published, and everyday captions on transformers, "
                    "which learn little from a bare word. The word automatic asks for those, {} for the bare words.",
                ),
                "rollout_steps": inputs.whole(
                    30, 2, 1000, "Steps of the noise schedule on which the pictures trained on are made. Published: "
                    "30; 10 is faster and on small models as good."
                ),
                "objective": inputs.choice(
                    OBJECTIVES,
                    SPM,
                    "What is minimised. spm: the surrogate takes the concept's place, everything else is anchored. "
                    "esd: the concept is pushed to the other side of the empty prompt. gem: it is drawn to the "
                    "surrogate and away from where it was, along a roll-out. esd and gem have no anchors. "
                    "weighted sum: as spm, with each kept prompt held in pictures of its own. projected gradient: the "
                    "same, without the part of each step that would harm what is kept. "
                    "adversarial: the concept is erased from text vectors too that are searched for while it trains, "
                    "which holds under attack and is some ten times as slow.",
                ),
                "quality": inputs.choice(
                    QUALITIES,
                    AS_SET,
                    "How long to train: steps, learning rate, warm-up, cycles, rollout_steps and, but for thorough, "
                    "anchoring, in place of those here. quick: 200 steps at 0.01; normal: 600 at 0.003, both with "
                    "anchoring 10; thorough: the published 3000 at 0.0001.",
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }, steps="Training steps")  # fmt: skip

    def train(
        self, model, clip, concepts, surrogate, preset, steps, learning_rate, eta, anchoring, rank, width, height,
        seed, layers, filename_prefix, save_every, preserve="", adapter=None, preview_every=100, timestep=PUBLISHED,
        warmup=500, cycles=3, templates="", rollout_steps=30, objective=SPM, quality=AS_SET, unique_id=None,
    ):  # fmt: skip
        wanted, kept = parse_concepts(concepts, surrogate), parse_preserved(preserve)
        shapes = templates_of_training(model, templates, [concept.text for concept in wanted])
        sites = trainable_sites(model, LAYERS[layers])
        settings = settings_of(
            preset, quality, steps=steps, lr=learning_rate, eta=eta, lam=anchoring, seed=seed, timestep=timestep,
            warmup=warmup, cycles=cycles, rollout_steps=rollout_steps, objective=objective,
            **fitted(model, width, height, bool(kept), objective),
        )  # fmt: skip
        require_surrogates(objective, wanted)
        pairs = [(fill(t, c.text), fill(t, c.surrogate)) for c in wanted for t in shapes]
        said = {"rank": rank, "layers": layers, "preserve": kept, "templates": shapes}
        names, surrogates = zip(*((c.text, c.surrogate) for c in wanted))
        said = {**settings.said(), **said}
        card = Card(METHODS[objective], names, surrogates, family_name(model), fingerprint(clip), said)
        path, name = new_adapter_path(filename_prefix)
        run = TrainingRun(card, settings, name, lambda found: native.save(found, path), save_every)
        run.start, run.preview_every = steps_done(adapter, settings) if adapter else 0, preview_every
        run.show, run.say = shown_on(Progress(settings.steps), model, unique_id, run)
        start = resumed(model, adapter, sites) if adapter else None
        run.probes = probes_if_any(card, model, clip, Progress)
        result = trained(run, model, clip, sites, rank, start, pairs, kept, (width, height))
        return shown(result, part(f"Trained: {name}", result[1]))


def shown_on(progress, model, node, run):
    """(show(step, latents), say(text)) of a training run on a node; pictures beside what they were without it."""

    def show(step, latents):
        pair = None if latents is None else torch.cat((run.original, latents), dim=-1)
        progress.at(step, None if pair is None else progress.picture(model, pair))

    return show, lambda text: progress.say(text, node)


NODES = [MembraneTrain]
