"""Stacking adapters and applying the stack."""

from ..core.adapters.permeability import AUTOMATIC, FIXED, MODES, NEGATIVES, SAME, Permeability
from ..core.adapters.stack import Entry, ErasureStack
from ..core.adapters.stack_json import from_json, names
from ..core.erasers.closed_form.daily import receipt
from ..core.errors import ErasureError
from ..core.formats import registry
from ..core.host.files.folders import adapter_path, load_adapter, lora_path, signature
from ..core.host.page.progress import Progress
from ..core.host.patches.on_weights import apply_to_weights
from ..core.host.patches.origin import origin_warnings
from ..core.host.patches.stack import apply_stack
from ..core.host.runs.erasing import computed
from . import inputs
from .closed_form import taken
from .labels import labelled
from .shown import part, shown

MODE_TOOLTIP = (
    "How far an adapter opens. automatic: as its method was published. fixed: always fully. facilitated transport: "
    "by how well the prompt matches its concepts, from the text and its tokens. reference: as the published SPM code "
    "combines adapters, to repeat its pictures. route: only the best match opens (top_k of Tune Permeability), so "
    "that many adapters do not disturb each other. meaning: by what the model reads of the prompt, so that synonyms "
    "open it and all other prompts keep their pictures; for adapters that say what they erase."
)


class MembraneStack:
    TITLE = "Stack Erasure Adapters"
    DESCRIPTION = "Adds one erasure adapter to a stack. Chain several; their order does not matter."
    SEARCH_ALIASES = ["eraser stack", "lora stack", "combine erasures"]
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ("ERASURE_STACK",)
    RETURN_NAMES = ("stack",)
    OUTPUT_TOOLTIPS = ("The stack with this adapter in it.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls):
        types = {
            "required": {
                "adapter": ("ERASURE_ADAPTER", {"tooltip": "The adapter to add."}),
                "strength": inputs.strength(
                    "How much of it to use. 0 changes nothing at all, 1 is the method as published, above 1 pushes "
                    "further, below 0 brings more of the concept."
                ),
                "start_percent": inputs.percent(
                    0.0,
                    "Where in the sampling it begins to act. 0 is the first step; later starts keep more of the "
                    "composition.",
                ),
                "end_percent": inputs.percent(
                    1.0,
                    "Where in the sampling it stops. 1 is the last step; earlier ends leave the details alone.",
                ),
            },
            "optional": {
                "stack": inputs.stack("Adapters stacked so far."),
                "permeability": inputs.choice(MODES, AUTOMATIC, MODE_TOOLTIP),
                "enabled": inputs.switch(True, "Off keeps the adapter in the stack without its effect."),
            },
        }
        return labelled(types)

    def add(self, adapter, strength, start_percent, end_percent, stack=None, permeability=AUTOMATIC, enabled=True):
        entry = Entry(adapter, strength, start_percent, end_percent, Permeability(permeability), enabled)
        return ((stack or ErasureStack()).with_entry(entry),)


class MembraneStackEditor:
    TITLE = "Erasure Stack Editor"
    DESCRIPTION = (
        "A whole stack of erasure adapters as one text, to edit, copy and share. Files are those in "
        "models/erasure_adapters; a LORA_STACK of other packs can be added. With model and clip connected it "
        "applies the stack itself, and can be bypassed."
    )
    SEARCH_ALIASES = ["stack json", "erasure list", "lora stack", "multi lora"]
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ("ERASURE_STACK", "STRING", "MODEL", "CLIP")
    RETURN_NAMES = ("stack", "concepts", "model", "clip")
    OUTPUT_TOOLTIPS = (
        "The stack.",
        "What it erases, one concept per line; those switched off are not listed.",
        "The model that came in, with the stack on it.",
        "The text encoder as it came in.",
    )
    FUNCTION = "build"

    @classmethod
    def INPUT_TYPES(cls):
        types = {
            "required": {
                "stack_json": inputs.text(
                    '{"membrane_stack": 1, "entries": []}',
                    'The stack as JSON, one {"adapter": "file name", "strength": 1.0} per adapter; the help page lists '
                    "all fields.",
                ),
            },
            "optional": {
                "stack": inputs.stack("Adapters stacked so far; these come after them."),
                "lora_stack": (
                    "LORA_STACK",
                    {"tooltip": "LoRAs from another pack's stack node, added with their model strength."},
                ),
                "model": inputs.model("Optional: the model to erase from. It comes out with the stack on it."),
                "clip": ("CLIP", {"tooltip": "The text encoder whose words the model reads, when model is connected."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }
        return labelled(types)

    @classmethod
    def IS_CHANGED(cls, stack_json, stack=None, lora_stack=None, model=None, clip=None, unique_id=None):
        return [signature(adapter_path(name)) for name in names(stack_json)]

    def build(self, stack_json, stack=None, lora_stack=None, model=None, clip=None, unique_id=None):
        whole = (stack or ErasureStack()) + from_json(stack_json, load_adapter, unique_id)
        for row in lora_stack or ():
            if not _is_empty(row):
                whole = whole.with_entry(_lora_entry(row))
        concepts = dict.fromkeys(c for entry in whole.entries if entry.acts for c in entry.adapter.card.concepts)
        said = []
        if model is not None:
            ready, jobs = computed(whole, model, clip, Progress)
            said = [*_erased(jobs, clip), *_origin(model, clip, ready)]
            model = apply_stack(model, ready, clip)
        result = whole, "\n".join(concepts), model, clip
        return shown(result, *said) if said else result


def _erased(jobs, clip):
    """What the page says of the words that were erased: no part, or one."""
    receipts, remarks = [receipt(job) for job in jobs], [line for job in jobs for line in taken(job, clip)]
    return [part(receipts[0], [*receipts[1:], *remarks], warning=bool(remarks))] if jobs else []


def _origin(model, clip, stack):
    """What the page says of adapters that were made elsewhere: no part, or one."""
    said = [] if clip is None else origin_warnings(model, clip, stack)
    return [part("Made elsewhere", said, warning=True)] if said else []


def _is_empty(row):
    """Whether a row of a LORA_STACK names no file, as other packs' stackers leave rows that are not used."""
    return isinstance(row, list | tuple) and len(row) > 0 and (row[0] is None or row[0] in ("None", ""))


def _lora_entry(row):
    """Entry of a row of a LORA_STACK: (file name, strength of the model, strength of the CLIP)."""
    numbers = isinstance(row, list | tuple) and len(row) > 1 and isinstance(row[1], int | float)
    if not numbers or not isinstance(row[0], str):
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
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ("ERASURE_STACK",)
    RETURN_NAMES = ("stack",)
    OUTPUT_TOOLTIPS = ("The stack, opening this way.",)
    FUNCTION = "tune"

    @classmethod
    def INPUT_TYPES(cls):
        types = {
            "required": {
                "stack": inputs.stack("The adapters to tune."),
                "mode": inputs.choice(MODES, AUTOMATIC, MODE_TOOLTIP),
                "factor": inputs.strength(
                    "Multiplies how far adapters open. The authors of SPM use 2 for artists' styles."
                ),
                "threshold": inputs.number(
                    0.0,
                    0.0,
                    1.0,
                    0.01,
                    "Prompts that match a concept less than this leave its adapter closed. 0 closes none; unrelated "
                    "short prompts often match 0.5 and more.",
                ),
                "negative": inputs.choice(
                    NEGATIVES,
                    SAME,
                    "What the negative prompt gets: the opening of the positive prompt, as published; its own, by its "
                    "own words; or none.",
                ),
                "top_k": inputs.whole(
                    1, 1, 1000, "Only for route: how many adapters may open for one prompt.", step=None
                ),
            },
        }
        return labelled(types)

    def tune(self, stack, mode, factor, threshold, negative, top_k):
        return (stack.with_permeability(Permeability(mode, factor, threshold, negative, top_k)),)


class MembraneApply:
    TITLE = "Apply Erasure"
    DESCRIPTION = (
        "Puts a stack of erasure adapters on a model. The model that came in is unchanged; a model that already "
        "carries erasures keeps them."
    )
    SEARCH_ALIASES = ["apply eraser", "unlearn", "remove concept", "concept erasure"]
    CATEGORY = "membrane/adapters"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the stack on it.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls):
        types = {
            "required": {
                "model": inputs.model("The model to erase from."),
                "clip": inputs.CLIP,
            },
            "optional": {
                "stack": inputs.stack("The adapters to apply; without any the model stays as it is."),
                "apply_to": inputs.choice(
                    ["text", "weights"],
                    "text",
                    "For closed-form erasures; both give the same pictures. text: instant, costs nothing, allows time "
                    "ranges and permeability. weights: can be saved with CheckpointSave and merged; LoRAs go before "
                    "it.",
                ),
                "adapter": ("ERASURE_ADAPTER", {"tooltip": "One adapter by itself, applied fully beside the stack."}),
            },
        }
        return labelled(types)

    def apply(self, model, clip, stack=None, apply_to="text", adapter=None):
        stack = stack or ErasureStack()
        if adapter is not None:
            stack = stack.with_entry(Entry(adapter))
        stack, jobs = computed(stack, model, clip, Progress)
        warned = _origin(model, clip, stack)
        erased = apply_to_weights(model, stack) if apply_to == "weights" else apply_stack(model, stack, clip)
        said, text = [*_erased(jobs, clip), *warned], {"text": warned[0]["lines"]} if warned else {}
        return shown((erased,), *said, **text) if said else (erased,)


NODES = [MembraneStack, MembraneStackEditor, MembranePermeability, MembraneApply]
