"""Closed-form erasure as a node."""

from ..core.closed_form.concepts import parse_concepts, parse_lines, parse_templates
from ..core.closed_form.job import METHODS, TOKENS, Job, erase
from ..core.host.patching import apply_stack, family
from ..core.host.progress import Progress
from ..core.host.text import encode_for, fingerprint
from ..core.host.weights import cross_attention_gram, cross_attention_layers
from ..core.stack import Entry, ErasureStack


class MembraneErase:
    TITLE = "Erase Concepts (Closed Form)"
    DESCRIPTION = (
        "Removes concepts from the model without any training, in a second or less. The result is an ordinary MODEL; "
        "nothing on disk changes, and the erasure itself comes out as an adapter that can be saved and stacked."
    )
    SEARCH_ALIASES = [
        "unlearn",
        "remove concept",
        "concept erasure",
        "UCE",
        "RECE",
        "forget",
        "negative prompt",
        "censor",
    ]
    CATEGORY = "membrane"
    RETURN_TYPES = ("MODEL", "ERASURE_ADAPTER")
    RETURN_NAMES = ("model", "adapter")
    OUTPUT_TOOLTIPS = (
        "The model with the concepts erased. The one that came in is unchanged.",
        "The erasure by itself, to save or to put on other models with the same text encoder.",
    )
    FUNCTION = "erase"

    @classmethod
    def INPUT_TYPES(cls):
        number = {"min": 0.0, "max": 100.0, "step": 0.01, "round": False}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to erase from."}),
                "clip": ("CLIP", {"tooltip": "The text encoder whose words the model reads."}),
                "concepts": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": False,  # old pages take {} for a choice and // for a comment
                        "default": "star -> circle",
                        "tooltip": "What to erase, one concept per line. 'concept -> replacement' says what "
                        "comes instead for that line.",
                    },
                ),
                "replace_with": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "What comes instead of concepts without a replacement of their own. "
                        "Empty: nothing in particular.",
                    },
                ),
                "preserve": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": False,
                        "default": "",
                        "tooltip": "Concepts or whole prompts that must keep their meaning, one per line. List close "
                        "relatives of what you erase. The empty prompt is always kept.",
                    },
                ),
                "method": (
                    list(METHODS),
                    {
                        "default": METHODS[0],
                        "tooltip": "UCE: one edit, gentle. RECE: adds rounds that look for text vectors which still "
                        "bring the concept back and erases those too; harder on the rest. SPEED, Double Projections: "
                        "protect what you preserve and edit in the space beside it.",
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": "How much of the erasure to use. 0 changes nothing at all, 1 is the method as "
                        "published, above 1 pushes further, below 0 brings more of the concept.",
                    },
                ),
            },
            "optional": {
                "templates": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": False,
                        "default": "{}\na photo of {}\na picture of a {}",
                        "tooltip": "Captions in which the concept is erased, one per line, {} is its place. Captions "
                        "like the ones you will write make the erasure much more thorough.",
                    },
                ),
                "erase_scale": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        **number,
                        "tooltip": "Weight of the erased concepts in the solution. Higher erases more thoroughly.",
                    },
                ),
                "preserve_scale": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        **number,
                        "tooltip": "Weight of the preserved prompts. Higher protects them better against side effects.",
                    },
                ),
                "anchor": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        **number,
                        "min": 0.0001,
                        "step": 0.0001,
                        "tooltip": "Weight of changing nothing. Lower erases more thoroughly, higher is gentler. "
                        "The published value is 0.5.",
                    },
                ),
                "epochs": (
                    "INT",
                    {"default": 1, "min": 1, "max": 20, "tooltip": "Rounds of RECE; 3 for nudity. UCE ignores it."},
                ),
                "penalty": (
                    "FLOAT",
                    {
                        "default": 0.1,
                        "min": 0.0001,
                        "max": 100.0,
                        "step": 0.0001,
                        "round": False,
                        "tooltip": "RECE: 0.1 for easy concepts, 0.001 for hard ones. UCE ignores it.",
                    },
                ),
                "tau": (
                    "FLOAT",
                    {
                        "default": 0.1,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.0001,
                        "round": False,
                        "tooltip": "SPEED: how weak a direction of the preserved prompts may be and still be "
                        "protected. 0 protects all of them exactly, higher leaves more room to erase.",
                    },
                ),
                "rho": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0001,
                        "max": 100.0,
                        "step": 0.0001,
                        "round": False,
                        "tooltip": "SPEED: weight of changing nothing. Lower erases harder: 1 for objects and styles, "
                        "0.05 for many people at once.",
                    },
                ),
                "tokens": (
                    list(TOKENS),
                    {
                        "default": TOKENS[0],
                        "tooltip": "SPEED and Double Projections: which tokens of a prompt are erased and protected. "
                        "subject: the last one of the concept. all: every one.",
                    },
                ),
            },
        }

    def erase(
        self, model, clip, concepts, replace_with, preserve, method, strength,
        templates="{}", erase_scale=1.0, preserve_scale=1.0, anchor=0.5, epochs=1, penalty=0.1,
        tau=0.1, rho=1.0, tokens=TOKENS[0],
    ):  # fmt: skip
        parsed = parse_concepts(concepts, replace_with)
        job = Job(
            concepts=tuple(parsed),
            preserve=tuple(parse_lines(preserve)),
            templates=tuple(parse_templates(templates)),
            method=method,
            erase_scale=erase_scale,
            preserve_scale=preserve_scale,
            anchor=anchor,
            epochs=epochs,
            penalty=penalty,
            tau=tau,
            rho=rho,
            tokens=tokens,
            safe_anchor=not any(concept.surrogate for concept in parsed),
        )
        prompts = job.prompts()
        layers = len(list(cross_attention_layers(model))) if method == "RECE" else 0
        progress = Progress(len(prompts) + layers + epochs)
        encoded = encode_for(model, clip, prompts, progress.at)
        progress.next_phase(len(prompts))
        gram = cross_attention_gram(model, progress.at) if method == "RECE" else None
        progress.next_phase(layers)
        adapter = erase(job, encoded, family(model), fingerprint(clip), gram, progress.at)
        progress.next_phase(epochs)
        return apply_stack(model, ErasureStack((Entry(adapter, strength),))), adapter


NODES = [MembraneErase]
