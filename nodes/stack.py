"""Stacking adapters and applying the stack."""

import logging

from ..core.adapters.permeability import AUTOMATIC, FIXED, MODES, NEGATIVES, SAME, Permeability
from ..core.adapters.stack import Entry, ErasureStack
from ..core.adapters.stack_json import from_json, names
from ..core.errors import ErasureError
from ..core.formats import registry
from ..core.host.files.folders import adapter_path, load_adapter, lora_path, signature
from ..core.host.patches.on_weights import apply_to_weights
from ..core.host.patches.stack import apply_stack
from ..core.host.runs.locating import OTHER, distance_of_weights
from ..core.host.text.encode import fingerprint

log = logging.getLogger("membrane")

MODE_TOOLTIP = (
    "How far an adapter opens. automatic: as its method was published. fixed: always fully. facilitated transport: "
    "by how well the prompt matches its concepts, from the text and its tokens. reference: as the published SPM code "
    "combines adapters, to repeat its pictures. route: only the best match opens (top_k of Tune Permeability), so "
    "that many adapters do not disturb each other."
)


class MembraneStack:
    TITLE = "Stack Erasure Adapters"
    DESCRIPTION = "Adds one erasure adapter to a stack. Chain several; their order does not matter."
    SEARCH_ALIASES = ["eraser stack", "lora stack", "combine erasures"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("ERASURE_STACK",)
    RETURN_NAMES = ("stack",)
    OUTPUT_TOOLTIPS = ("The stack with this adapter in it.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls):
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "adapter": ("ERASURE_ADAPTER", {"tooltip": "The adapter to add."}),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": "How much of it to use. 0 changes nothing at all, 1 is the method as published, "
                        "above 1 pushes further, below 0 brings more of the concept.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        **percent,
                        "tooltip": "Where in the sampling it begins to act. 0 is the first step; later starts keep "
                        "more of the composition.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        **percent,
                        "tooltip": "Where in the sampling it stops. 1 is the last step; earlier ends leave the "
                        "details alone.",
                    },
                ),
            },
            "optional": {
                "stack": ("ERASURE_STACK", {"tooltip": "Adapters stacked so far."}),
                "permeability": (list(MODES), {"default": AUTOMATIC, "tooltip": MODE_TOOLTIP}),
                "enabled": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Off keeps the adapter in the stack without its effect."},
                ),
            },
        }

    def add(self, adapter, strength, start_percent, end_percent, stack=None, permeability=AUTOMATIC, enabled=True):
        entry = Entry(adapter, strength, start_percent, end_percent, Permeability(permeability), enabled)
        return ((stack or ErasureStack()).with_entry(entry),)


class MembraneStackEditor:
    TITLE = "Erasure Stack Editor"
    DESCRIPTION = (
        "A whole stack of erasure adapters as one text, to edit, copy and share. Files are those in "
        "models/erasure_adapters; a LORA_STACK of other packs can be added."
    )
    SEARCH_ALIASES = ["stack json", "erasure list", "lora stack", "multi lora"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("ERASURE_STACK", "STRING")
    RETURN_NAMES = ("stack", "concepts")
    OUTPUT_TOOLTIPS = ("The stack.", "What it erases, one concept per line; those switched off are not listed.")
    FUNCTION = "build"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "stack_json": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": False,  # old pages take {} for a choice and // for a comment
                        "default": '{"membrane_stack": 1, "entries": []}',
                        "tooltip": 'The stack as JSON, one {"adapter": "file name", "strength": 1.0} per adapter; '
                        "the help page lists all fields.",
                    },
                ),
            },
            "optional": {
                "stack": ("ERASURE_STACK", {"tooltip": "Adapters stacked so far; these come after them."}),
                "lora_stack": (
                    "LORA_STACK",
                    {"tooltip": "LoRAs from another pack's stack node, added with their model strength."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, stack_json, stack=None, lora_stack=None, unique_id=None):
        return [signature(adapter_path(name)) for name in names(stack_json)]

    def build(self, stack_json, stack=None, lora_stack=None, unique_id=None):
        whole = (stack or ErasureStack()) + from_json(stack_json, load_adapter, unique_id)
        for row in lora_stack or ():
            whole = whole.with_entry(_lora_entry(row))
        concepts = dict.fromkeys(c for entry in whole.entries if entry.acts for c in entry.adapter.card.concepts)
        return whole, "\n".join(concepts)


def _lora_entry(row):
    """Entry of a row of a LORA_STACK: (file name, strength of the model, strength of the CLIP)."""
    if not isinstance(row, list | tuple) or len(row) < 2 or not isinstance(row[0], str):
        raise ErasureError(
            f"The LORA_STACK has the row {row!r}; expected (file name, model strength, clip strength), "
            "connect a stack of LoRA files."
        )
    return Entry(registry.load(lora_path(row[0])), float(row[1]), permeability=Permeability(FIXED))


class MembranePermeability:
    TITLE = "Tune Permeability"
    DESCRIPTION = (
        "Sets how the adapters of a stack open for a prompt: all adapters of the stack that comes in get the same "
        "settings. Look at the result with Preview Permeability."
    )
    SEARCH_ALIASES = ["facilitated transport", "gate", "spm", "adapter routing", "prompt dependent strength"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("ERASURE_STACK",)
    RETURN_NAMES = ("stack",)
    OUTPUT_TOOLTIPS = ("The stack, opening this way.",)
    FUNCTION = "tune"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "stack": ("ERASURE_STACK", {"tooltip": "The adapters to tune."}),
                "mode": (list(MODES), {"default": AUTOMATIC, "tooltip": MODE_TOOLTIP}),
                "factor": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": "Multiplies how far adapters open. The authors of SPM use 2 for artists' styles.",
                    },
                ),
                "threshold": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Prompts that match a concept less than this leave its adapter closed. 0 closes "
                        "none; unrelated short prompts often match 0.5 and more.",
                    },
                ),
                "negative": (
                    list(NEGATIVES),
                    {
                        "default": SAME,
                        "tooltip": "What the negative prompt gets: the opening of the positive prompt, as published; "
                        "its own, by its own words; or none.",
                    },
                ),
                "top_k": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": 1000,
                        "tooltip": "Only for route: how many adapters may open for one prompt.",
                    },
                ),
            },
        }

    def tune(self, stack, mode, factor, threshold, negative, top_k):
        return (stack.with_permeability(Permeability(mode, factor, threshold, negative, top_k)),)


class MembraneApply:
    TITLE = "Apply Erasure"
    DESCRIPTION = (
        "Puts a stack of erasure adapters on a model. The model that came in is unchanged; a model that already "
        "carries erasures keeps them."
    )
    SEARCH_ALIASES = ["apply eraser", "unlearn", "remove concept", "concept erasure"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the stack on it.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to erase from."}),
                "clip": ("CLIP", {"tooltip": "The text encoder whose words the model reads."}),
                "stack": ("ERASURE_STACK", {"tooltip": "The adapters to apply."}),
            },
            "optional": {
                "apply_to": (
                    ["text", "weights"],
                    {
                        "default": "text",
                        "tooltip": "For closed-form erasures; both give the same pictures. text: instant, costs "
                        "nothing, allows time ranges and permeability. weights: can be saved with CheckpointSave and "
                        "merged; LoRAs go before it.",
                    },
                ),
            },
        }

    def apply(self, model, clip, stack, apply_to="text"):
        encoder = fingerprint(clip)
        for entry in stack.entries:
            made_with = entry.adapter.card.text_encoder
            if made_with and made_with != encoder:
                log.warning(
                    "Membrane: the adapter %s was made with another text encoder (%s, this one is %s); "
                    "it still applies, but may erase less or damage more",
                    entry.adapter.describe(), made_with, encoder,
                )  # fmt: skip
            layer, distance = distance_of_weights(model, entry.adapter)
            if distance > OTHER:
                log.warning(
                    "Membrane: the adapter %s was located on another checkpoint (the weights of %s differ by %.0f %%); "
                    "it prunes the same places here, which may hold something else; locate it on this one",
                    entry.adapter.describe(), layer, 100 * distance,
                )  # fmt: skip
        if apply_to == "weights":
            return (apply_to_weights(model, stack),)
        return (apply_stack(model, stack, clip),)


NODES = [MembraneStack, MembraneStackEditor, MembranePermeability, MembraneApply]
