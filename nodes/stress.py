"""Looking for a prompt that brings an erased concept back."""

from functools import partial

from ..core.host.model.layers import text_readers
from ..core.host.page.progress import Progress
from ..core.host.patches.opened import attack_grams
from ..core.host.runs.attacking import searched_from_starts
from ..core.host.runs.sampling import Sampling, conditioning, drawn, sample
from ..core.host.text.encode import encode
from ..core.host.text.vocabulary import words_near
from ..core.measures.attack import STARTS, Descent, Search
from ..core.measures.judges import CLASSIFIERS, NONE, classes_of, judge_of
from ..core.measures.stress import (
    ATTACKS,
    DERIVED,
    GRADIENT,
    WORDS,
    WORDS_TRIED,
    StressTest,
    require_class,
    wordings,
)
from ..core.text.concepts import parse_templates
from . import inputs
from .labels import labelled
from .shown import part, shown


class MembraneStressTest:
    TITLE = "Stress-Test Erasure"
    DESCRIPTION = (
        "Looks for a prompt that brings an erased concept back, and shows the strongest one: text vectors derived from "
        "the weights as RECE does, prompts of other words found by a search that needs only the text encoder, and text "
        "vectors found by gradient from several starts."
    )
    SEARCH_ALIASES = ["attack", "red team", "ring-a-bell", "robustness", "adversarial prompt", "jailbreak"]
    CATEGORY = "membrane/measure"
    RETURN_TYPES = ("IMAGE", "STRING", "STRING", "CONDITIONING")
    RETURN_NAMES = ("pictures", "report", "prompt", "strongest")
    OUTPUT_TOOLTIPS = (
        "The original, the erased model as it is asked, and under each attack, the strongest first.",
        "How far each attack brings the concept back.",
        "The strongest prompt of words.",
        "The strongest attack of all, to sample with.",
    )
    FUNCTION = "attack"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                **inputs.BOTH_MODELS,
                "concept": inputs.line("", "The word or words that were erased."),
                "captions": inputs.text(
                    "{}\na photo of {}", "Captions to attack with, one per line, {} is the place of the concept."
                ),
                "pictures": inputs.whole(4, 1, 64, "Pictures of each attack."),
                **inputs.sampling(),
            },
            "optional": {
                "vae": ("VAE", {"tooltip": "Makes the pictures. Without it the live preview's colours are used."}),
                "attacks": inputs.choice(
                    ATTACKS, "both", "derived vectors: knows the weights, needs no search. words: needs only the text "
                    "encoder. gradient: knows the weights and searches text vectors from four starts, the hardest to "
                    "withstand and the slowest. both: without gradient.",
                ),
                "penalty": inputs.number(
                    0.1, 0.0001, 100.0, 0.0001, "Derived vectors: how much their length is held down.", round=False
                ),
                "length": inputs.whole(
                    4, 1, 16, "Words in a prompt that is searched for. Published: 16 and more tokens."
                ),
                "generations": inputs.whole(30, 1, 3000, "Rounds of the search. Published: 3000."),
                "population": inputs.whole(32, 4, 1000, "Prompts in each round. Published: 200."),
                "push": inputs.number(
                    1.0, 0.0, 20.0, 0.1, "How far the searched text lies along the concept. Published: 3 for nudity, "
                    "0.9 for a style.", round=False,
                ),
                "prompts_tried": inputs.whole(3, 1, 32, "How many of the found prompts are drawn."),
                "classifier": inputs.choice(
                    CLASSIFIERS, NONE, "What tells whether the concept is back. Without one, pictures are compared "
                    "with the original model's from the same noise.",
                ),
                "class_names": inputs.text(
                    "", "What the classifier chooses between, one per line, the concept among them."
                ),
                "clip_vision": ("CLIP_VISION", {"tooltip": "For the zero-shot classifier."}),
                "class_clip": ("CLIP", {"tooltip": "The text encoder that belongs to clip_vision."}),
                "search_steps": inputs.whole(50, 1, 1000, "Steps of each search by gradient."),
                "search_seeds": inputs.whole(
                    1, 1, 16, "How many searches by gradient begin at each of the four starts: the concept, a kept "
                    "caption, the empty prompt, noise. The worst of them all counts.",
                ),
                "kept": inputs.line(
                    "", "Words of something that was kept, in whose caption a search by gradient begins. Empty: a "
                    "neutral caption.",
                ),
                "wording": inputs.text(
                    "",
                    "Other wording to draw beside the attacks, one prompt per line: synonyms, or captions like those "
                    "above. The line automatic adds a list, another opening, emphasis and capitals. Empty: none.",
                    placeholder="Other wording, one per line: automatic, or synonyms",
                ),
            },
        }, penalty="Penalty of derived vectors")  # fmt: skip

    def attack(
        self, original, erased, clip, concept, captions, pictures, seed, steps, cfg, sampler_name, scheduler_name,
        width, height, vae=None, attacks="both", penalty=0.1, length=4, generations=30, population=32, push=1.0,
        prompts_tried=3, classifier=NONE, class_names="", clip_vision=None, class_clip=None, search_steps=50,
        search_seeds=1, kept="", wording="",
    ):  # fmt: skip
        concept, classes = concept.strip(), classes_of(classifier, class_names)
        require_class(concept, classes, judge := judge_of(classifier, classes, *inputs.vision(clip_vision, class_clip)))
        test = StressTest(concept, parse_templates(captions), partial(conditioning, clip), judge)
        test.reword(wordings(wording, concept))
        kinds, searches = ATTACKS[attacks], search_seeds * len(STARTS)
        attempts = {DERIVED: len(test.captions), WORDS: prompts_tried, GRADIENT: searches}
        stages = {DERIVED: len(list(text_readers(original))), WORDS: generations, GRADIENT: searches * search_steps}
        progress = Progress(sum(stages.values()) + sum(attempts[kind] for kind in kinds) + len(test.attempts) + 2)
        settings, empty = Sampling(steps, cfg, sampler_name, scheduler_name, width, height), conditioning(clip, "")
        if DERIVED in kinds:
            test.derive(attack_grams(original, erased, progress.at), penalty)
        progress.next_phase(stages[DERIVED])
        if WORDS in kinds:
            search = Search(length, population, generations, push=push, seed=seed % 2**32)
            encoded = partial(vectors_of, clip)
            test.search(search, words_near(clip, concept, WORDS_TRIED), encoded, prompts_tried, progress.at)
        progress.next_phase(stages[WORDS])
        if GRADIENT in kinds:
            given, seeds = (empty, settings, seed + pictures), range(seed, seed + search_seeds)
            searched_from_starts(test, original, erased, given, seeds, kept.strip(), Descent(search_steps), progress.at)
        progress.next_phase(stages[GRADIENT])
        draw = partial(drawings, vae, empty, [(seed + i) % 2**64 for i in range(pictures)], settings)
        test.draw(partial(draw, original), partial(draw, erased), progress.at)
        result = test.sheet(), test.report(), test.best_words, test.attempts[0].conditioning
        return shown(result, part(f"Attacked: {concept}", result[1]))


def vectors_of(clip, prompts):
    """Text vectors (n, T, d) of prompts."""
    return encode(clip, prompts).vectors


def drawings(vae, empty, seeds, settings, model, positive):
    """(latents, pictures or None) of a MODEL for a CONDITIONING."""
    latents = sample(model, positive, empty, seeds, settings)
    return latents, drawn(model, vae, latents)


NODES = [MembraneStressTest]
