"""Loading and saving erasure adapters."""

import logging

from ..core.erasers.extract import extract
from ..core.errors import ErasureError
from ..core.formats import kohya, native, registry
from ..core.host.files.folders import (
    adapter_names,
    adapter_path,
    load_adapter,
    new_adapter_path,
    not_saved,
    signature,
    stamp,
)
from ..core.host.model.layers import family_name
from ..core.host.model.names import kohya_names, kohya_sites, whole_layers
from ..core.host.model.weights import base_layers, edited_weights, map_weights
from ..core.host.page.progress import Progress
from ..core.host.patches.stack import applied
from ..core.text.concepts import parse_lines
from . import inputs
from .labels import labelled
from .shown import part, shown

log = logging.getLogger("membrane")

NATIVE, LORA = "membrane", "LoRA (kohya)"
ORIGINAL, FACTORS = "LoRA (kohya, original names)", "LoRA (kohya, factors only)"
NO_FILE = "none"


class MembraneLoadAdapter:
    TITLE = "Load Erasure Adapter"
    DESCRIPTION = "Loads an erasure adapter from the folder models/erasure_adapters."
    SEARCH_ALIASES = ["erasure", "unlearn", "load eraser", "SPM", "concept erasure"]
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ("ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("adapter", "concepts")
    OUTPUT_TOOLTIPS = ("The adapter, for Stack Erasure Adapters.", "What it erases, one concept per line.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        names = adapter_names()
        return labelled({"required": {"adapter_name": (names, {"tooltip": "A file in models/erasure_adapters."})}})

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
        return signature(adapter_path(adapter_name))

    def load(self, adapter_name):
        adapter = load_adapter(adapter_name)
        return adapter, "\n".join(adapter.card.concepts)


def _require_lora(adapter, model):
    """Raises ErasureError for an adapter that no LoRA can hold, and without a model."""
    if model is None:
        raise ErasureError(
            "The model input is empty, but a LoRA needs a model's weights or the names of its layers; "
            'connect the model it is for, or set format to "membrane".'
        )
    others = set(adapter.deltas) - {"map", "low_rank", "mask"}
    if others:
        raise ErasureError(
            f"The adapter {adapter.describe()} holds {', '.join(sorted(others))}, kinds of changes that a LoRA "
            'cannot hold; set format to "membrane".'
        )
    if sum(map(bool, (adapter.maps, adapter.low_rank, adapter.masks))) > 1:
        raise ErasureError(
            f"The adapter {adapter.describe()} changes the text, layers or single weights at the same time, which "
            'one LoRA cannot hold; set format to "membrane".'
        )


def _without_biases(adapter, count):
    """[sentence] on the changes of biases that a LoRA was written without, which is logged as well; [] of none."""
    if not count:
        return []
    said = f"The LoRA of {adapter.describe()} leaves out its changes of the biases of {count} layers."
    log.warning("Membrane: %s", said)
    return [said]


class MembraneSaveAdapter:
    TITLE = "Save Erasure Adapter"
    DESCRIPTION = (
        "Saves an erasure adapter into the folder models/erasure_adapters, where Load Erasure Adapter finds it, "
        "or as a LoRA for one model into the folder models/loras."
    )
    SEARCH_ALIASES = ["save eraser", "export erasure"]
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled(
            {
                "required": {
                    "adapter": ("ERASURE_ADAPTER", {"tooltip": "The adapter to save."}),
                    "filename_prefix": inputs.line(
                        "erasure",
                        "Name of the file; a number is added, nothing is overwritten. A subfolder may come before it.",
                    ),
                },
                "optional": {
                    "format": inputs.choice(
                        [NATIVE, LORA, ORIGINAL, FACTORS],
                        NATIVE,
                        "membrane: fits every model of the family. LoRA (kohya): for any LoRA loader of any program; "
                        "of a closed-form erasure exact on the model it is made from. Original names: of SDXL for "
                        "kohya's own scripts as well. Factors only: for diffusers, changes of biases are left out.",
                    ),
                    "model": inputs.model("Only for a LoRA: the model it is for, without this erasure in its weights."),
                },
            },
            model="Model for a LoRA",
        )

    def save(self, adapter, filename_prefix, format=NATIVE, model=None):
        try:
            lines = []
            if format != NATIVE:
                path, name, lines = self._save_lora(adapter, filename_prefix, model, format)
            else:
                path, name = new_adapter_path(filename_prefix)
                native.save(adapter, path)
        except OSError as error:
            raise not_saved(filename_prefix, error) from error
        log.info("Membrane: saved %s", path)
        folder = "models/erasure_adapters" if format == NATIVE else "models/loras"
        return shown((), part(f"Saved: {name}", [f"In the folder {folder}.", *lines]), text=[name])

    def _save_lora(self, adapter, filename_prefix, model, format):
        """(path, name, what is to be said) of a new LoRA."""
        _require_lora(adapter, model)
        original = format == ORIGINAL
        if adapter.masks:
            return *self._save_differences(adapter, filename_prefix, model, format), []
        if adapter.maps:
            weights = map_weights(model, adapter)  # before a file name is taken
            path, name = new_adapter_path(filename_prefix, "loras")
            kohya.save(adapter, weights, path, kohya_names(model, original))
            return path, name, []
        names, convolutions = kohya_sites(model, original)
        adapter = whole_layers(model, adapter)
        path, name = new_adapter_path(filename_prefix, "loras")
        left = kohya.save_low_rank(adapter, path, names, convolutions, biases=format != FACTORS)
        return path, name, _without_biases(adapter, left)

    def _save_differences(self, adapter, filename_prefix, model, format):
        if format == FACTORS:
            raise ErasureError(
                f"The adapter {adapter.describe()} takes single weights away, which no factors hold; set format to "
                f'"{LORA}" (whole differences, which diffusers and kohya\'s scripts do not read) or "{NATIVE}".'
            )
        layers, (names, _) = base_layers(model), kohya_sites(model, format == ORIGINAL)
        for layer, mask in adapter.masks.items():
            found = names.get(layer) and layers[layer].read()[0].shape
            if found and tuple(found) != mask.shape:
                raise ErasureError(
                    f"The adapter {adapter.describe()} changes {layer} as a layer of shape {mask.shape}, but in the "
                    f"connected model it has the shape {tuple(found)}; connect the model it was made for."
                )
        kohya.require_layers(adapter, adapter.masks, names)
        path, name = new_adapter_path(filename_prefix, "loras")
        kohya.save_masks(adapter, lambda layer: layers[layer].read()[0], path, names)
        return path, name


class MembraneExtract:
    TITLE = "Extract Erasure Adapter"
    DESCRIPTION = (
        "Turns whole edited weights (UCE, ESD, RECE, SPEED, Concept Ablation, an edited checkpoint) into a small "
        "erasure adapter: the difference to the model they were made from, as low-rank factors."
    )
    SEARCH_ALIASES = ["import UCE", "import ESD", "lora extract", "weights to adapter", "svd"]
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ("ERASURE_ADAPTER", "STRING")
    RETURN_NAMES = ("adapter", "report")
    OUTPUT_TOOLTIPS = (
        "The adapter, for Stack Erasure Adapters or Save Erasure Adapter.",
        "What was compared, kept and left out, and whether the model fits.",
    )
    FUNCTION = "extract"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled(
            {
                "required": {
                    "model": inputs.model("The model from before the edit, the one the edit was made from."),
                    "weights_file": (
                        [NO_FILE, *adapter_names()],
                        {
                            "tooltip": "A file with edited weights in models/erasure_adapters; not used with "
                            "edited_model."
                        },
                    ),
                    "concepts": inputs.text(
                        "",
                        "What the edit erases, one concept per line; the permeability needs it to follow prompts.",
                    ),
                    "energy": inputs.number(
                        0.999,
                        0.5,
                        1.0,
                        0.001,
                        "How much of the change in each layer to keep (share of its squared size). Less makes smaller "
                        "files.",
                    ),
                    "max_rank": inputs.whole(128, 1, 1024, "The largest rank a layer may get.", step=None),
                },
                "optional": {
                    "edited_model": inputs.model("The edited model itself, such as a checkpoint, instead of a file."),
                },
            },
            concepts="What the edit erases",
            model="Model before the edit",
        )

    @classmethod
    def VALIDATE_INPUTS(cls, weights_file):
        # named here so that either kind of slash is accepted; the host then skips its own list check
        return True if weights_file == NO_FILE else MembraneLoadAdapter.VALIDATE_INPUTS(weights_file)

    @classmethod
    def IS_CHANGED(cls, weights_file, **inputs):
        return "" if weights_file == NO_FILE else stamp(adapter_path(weights_file))

    def extract(self, model, weights_file, concepts, energy, max_rank, edited_model=None):
        for given in (model, edited_model):
            if given is not None and applied(given) is not None:
                raise ErasureError(
                    f"The model {type(given.model).__name__} carries erasures that are not in its weights; use Apply "
                    'Erasure with apply_to "weights", or save their adapters as they are.'
                )
        if edited_model is not None:
            edited = edited_weights(edited_model)
        elif weights_file == NO_FILE:
            raise ErasureError("There is nothing to extract from; choose a weights_file or connect edited_model.")
        else:
            edited = registry.load_weights(adapter_path(weights_file))
        progress = Progress(len(edited.layers()))
        names = tuple(parse_lines(concepts))
        adapter, report = extract(base_layers(model), edited, names, family_name(model), energy, max_rank, progress.at)
        log.info("Membrane: %s", report)
        return shown((adapter, report), part("Extracted", report))


NODES = [MembraneLoadAdapter, MembraneSaveAdapter, MembraneExtract]
