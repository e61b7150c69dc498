"""Stacking adapters and applying the stack."""

import logging

from ..core.host.patching import apply_stack
from ..core.host.text import fingerprint
from ..core.host.weights import apply_to_weights
from ..core.stack import Entry, ErasureStack

log = logging.getLogger("membrane")


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
            "optional": {"stack": ("ERASURE_STACK", {"tooltip": "Adapters stacked so far."})},
        }

    def add(self, adapter, strength, start_percent, end_percent, stack=None):
        entry = Entry(adapter, strength, start_percent, end_percent)
        return ((stack or ErasureStack()).with_entry(entry),)


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
                        "tooltip": "Both give the same pictures. text: instant, costs nothing, acts on this model's "
                        "prompts, allows time ranges. weights: can be saved with CheckpointSave and merged; "
                        "LoRAs go before it.",
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
        return ((apply_to_weights if apply_to == "weights" else apply_stack)(model, stack),)


NODES = [MembraneStack, MembraneApply]
