"""Loading and saving erasure adapters."""

import hashlib
import logging

from ..core.errors import ErasureError
from ..core.formats import kohya, native
from ..core.host.folders import adapter_names, adapter_path, new_adapter_path
from ..core.host.patching import context_width
from ..core.host.weights import cross_attention_weights, kohya_names
from ..core.plan import require_width

log = logging.getLogger("membrane")

NATIVE, LORA = "membrane", "LoRA (kohya)"


class MembraneLoadAdapter:
    TITLE = "Load Erasure Adapter"
    DESCRIPTION = "Loads an erasure adapter from the folder models/erasure_adapters."
    SEARCH_ALIASES = ["erasure", "unlearn", "load eraser", "SPM", "concept erasure"]
    CATEGORY = "membrane"
    RETURN_TYPES = ("ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("adapter", "concepts")
    OUTPUT_TOOLTIPS = ("The adapter, for Stack Erasure Adapters.", "What it erases, one concept per line.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        names = adapter_names()
        return {"required": {"adapter_name": (names, {"tooltip": "A file in models/erasure_adapters."})}}

    @classmethod
    def VALIDATE_INPUTS(cls, adapter_name):
        # named here so that either kind of slash is accepted; the host then skips its own list check
        try:
            adapter_path(adapter_name)
        except ErasureError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, adapter_name):
        with open(adapter_path(adapter_name), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def load(self, adapter_name):
        adapter = native.load(adapter_path(adapter_name))
        return adapter, "\n".join(adapter.card.concepts)


class MembraneSaveAdapter:
    TITLE = "Save Erasure Adapter"
    DESCRIPTION = (
        "Saves an erasure adapter into the folder models/erasure_adapters, where Load Erasure Adapter finds it, "
        "or as a LoRA for one model into the folder models/loras."
    )
    SEARCH_ALIASES = ["save eraser", "export erasure"]
    CATEGORY = "membrane"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "adapter": ("ERASURE_ADAPTER", {"tooltip": "The adapter to save."}),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "erasure",
                        "tooltip": "Name of the file; a number is added, nothing is overwritten. "
                        "A subfolder may come before it.",
                    },
                ),
            },
            "optional": {
                "format": (
                    [NATIVE, LORA],
                    {
                        "default": NATIVE,
                        "tooltip": "membrane: fits every model of the family. LoRA (kohya): for any LoRA loader of any "
                        "program, exact on the model it is made from.",
                    },
                ),
                "model": (
                    "MODEL",
                    {"tooltip": "Only for a LoRA: the model it is for, without this erasure in its weights."},
                ),
            },
        }

    def save(self, adapter, filename_prefix, format=NATIVE, model=None):
        if format == LORA:
            if model is None:
                raise ErasureError(
                    "The model input is empty, but a LoRA holds the weights of one model times the erasure; "
                    'connect the model it is for, or set format to "membrane".'
                )
            require_width(adapter, context_width(model))  # before a file name is taken
            path, name = new_adapter_path(filename_prefix, "loras")
            kohya.save(adapter, cross_attention_weights(model), path, kohya_names(model))
        else:
            path, name = new_adapter_path(filename_prefix)
            native.save(adapter, path)
        log.info("Membrane: saved %s", path)
        return {"ui": {"text": [name]}}


NODES = [MembraneLoadAdapter, MembraneSaveAdapter]
