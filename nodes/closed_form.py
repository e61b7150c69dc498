"""What the nodes that erase in closed form have in common: the inputs of their methods, and how these are read."""

import hashlib

from ..core.erasers.closed_form.groups import EDITIONS, ROWS, TOKENS
from ..core.erasers.closed_form.job import METHODS, PRESERVED, REPLACEMENTS
from ..core.erasers.closed_form.rece import PENALTIES
from ..core.errors import ErasureError
from ..core.host.files.folders import input_text_file, input_text_files
from ..core.host.runs.erasing import PLACES, TEXT
from ..core.host.text.vocabulary import missing_embeddings, spelled_words
from ..core.text.concepts import remarks
from . import inputs

NONE = "none"
BOTH, LEAVE, EDIT, AUTOMATIC = "keys and values", "leave", "edit", "as the model needs"
POOLED = {LEAVE: False, EDIT: True, AUTOMATIC: None}
LAYERS = {BOTH: "", "keys": ".key", "values": ".value"}  # role of the layers
EVERY_PROMPT = (
    "The erasure is on the weights, which are the same for every prompt: it acts on prompts that do not ask for it too."
)

BY_WORDS = " It opens by the words of a prompt, as its meaning could not be told from that of others."


def method():
    return {
        "method": inputs.choice(
            METHODS, "UCE", "UCE: one edit, gentle. RECE: adds rounds that look for text vectors which "
            "still bring the concept back and erases those too; harder on the rest. SPEED, Double Projections: "
            "protect what you preserve and edit in the space beside it. RECE, regularised: its rounds leave what UCE "
            "erased as it is.",
        ),
    }  # fmt: skip


def scales():
    """Weights that every method of UCE's kind has."""
    return {
        "erase_scale": inputs.number(
            1.0, 0.0, 100.0, 0.01, "Weight of the erased concepts in the solution. Higher erases more "
            "thoroughly.", round=False,
        ),
        "preserve_scale": inputs.number(
            1.0, 0.0, 100.0, 0.01, "Weight of the preserved prompts. Higher protects them better against side "
            "effects.", round=False,
        ),
        "anchor": inputs.number(
            0.5, 0.0001, 100.0, 0.0001, "Weight of changing nothing. Lower erases more thoroughly, higher is "
            "gentler. The published value is 0.5.", round=False,
        ),
    }  # fmt: skip


def numbers():
    """Numbers of RECE, SPEED and Double Projections."""
    return {
        "epochs": inputs.whole(1, 1, 20, "Rounds of RECE; 3 for nudity. UCE ignores it.", step=None),
        "penalty": inputs.number(
            0.1, 0.0001, 100.0, 0.0001, "RECE: 0.1 for easy concepts, 0.001 for hard ones. UCE ignores it.",
            round=False,
        ),
        "tau": inputs.number(
            0.1, 0.0, 100.0, 0.0001, "SPEED: how weak a direction of the preserved prompts may be and still be "
            "protected. 0 protects all of them exactly, higher leaves more room to erase.", round=False,
        ),
        "rho": inputs.number(
            1.0, 0.0001, 100.0, 0.0001, "SPEED: weight of changing nothing. Lower erases harder: 1 for objects "
            "and styles, 0.05 for many people at once.", round=False,
        ),
        "tokens": inputs.choice(
            TOKENS, TOKENS[0], "SPEED and Double Projections: which tokens of a prompt are erased and "
            "protected. subject: the last one of the concept. all: every one.",
        ),
    }  # fmt: skip


def more():
    """What else may be set; made anew each time, as files come and go."""
    return {
        "preserve_file": inputs.choice(
            [NONE, *input_text_files()], NONE, "A text file in ComfyUI's input folder with more to preserve, "
            "one concept or prompt per line.",
        ),
        "penalty_on": inputs.choice(
            PENALTIES, PENALTIES[0], "RECE: what the penalty keeps small of the vectors it finds. length: "
            "their size, as in all published runs. The others are the variants of the published code.",
        ),
        "layers": inputs.choice(
            LAYERS, BOTH, "Which layers hear the erased text. keys and values: all, at the text itself. keys "
            "or values: only those, as changes of this model's layers (SPEED is published for values).",
        ),
        "pooled": inputs.choice(
            POOLED, AUTOMATIC, "The pooled vector that SDXL, Flux.1, SD3 and others read beside the text. "
            "leave: it stays as it is. edit: erased from by the same formulas; erases more, damages more. "
            "as the model needs: edit on transformers, leave on SDXL as published.",
        ),
        "rows": inputs.choice(
            ROWS, ROWS[0], "Models with T5 or a language model only: which of a prompt's vectors carry a "
            "concept. as the encoder needs: all that the words reach. as published: from the concept's last "
            "word on (UCE), that word alone (SPEED), as for CLIP.",
        ),
    }  # fmt: skip


def editions():
    """Which edition of a method is meant, and what else its script can be told."""
    return {
        "replacements": inputs.choice(
            REPLACEMENTS, PRESERVED, "Where you preserve something: whether replacements are preserved, too. "
            "preserve: yes, else their own prompts may draw what is erased. as published: only what you list.",
        ),
        "edition": inputs.choice(
            EDITIONS, EDITIONS[0], "UCE and SPEED. first: as before. scripts of 2025: UCE edits and preserves "
            "the last token of the concept alone, and no empty prompt; SPEED sums over all tokens and keeps "
            "the best of 20 clusterings of the empty prompt. augmented: SPEED also protects what lies around your "
            "preserved prompts, as published.",
        ),
        "lam": inputs.number(
            0.0, 0.0, 100.0, 0.0001, "SPEED: slack of what the start token and the empty prompt keep. 0 keeps "
            "them exactly; 0.5 is published for nudity.", round=False,
        ),
        "prior_filter": inputs.switch(
            True, "SPEED: protect only preserved prompts that the erasure would disturb more than the mean, as "
            "published. Off: protect all of them.",
        ),
    }  # fmt: skip


def rounds():
    """The weights of UCE's three terms in RECE's rounds."""
    return {
        "edit_erase_scale": inputs.number(
            1.0, 0.0001, 100.0, 0.0001, "RECE: weight of what its rounds erase. Higher erases more of the vectors that "
            "they find.", round=False,
        ),
        "edit_preserve_scale": inputs.number(
            0.1, 0.0001, 100.0, 0.0001, "RECE: weight of the preserved prompts in its rounds. Higher protects them "
            "better. The published value is 0.1.", round=False,
        ),
        "edit_anchor": inputs.number(
            0.1, 0.0001, 100.0, 0.0001, "RECE: weight of changing nothing in its rounds. Higher is gentler. The "
            "published value is 0.1.", round=False,
        ),
    }  # fmt: skip


def apply_to():
    return {
        "apply_to": inputs.choice(
            PLACES, TEXT, "What the erasure is put on; both give the same pictures. text: costs nothing and can follow "
            "the prompt. weights: can be saved with CheckpointSave and merged; LoRAs go before it.",
        ),
    }  # fmt: skip


def validate_preserve_file(name):
    """True, or a sentence on a file that is not there; so that the host skips its own check of the list."""
    try:
        preserve_text(name)
    except ErasureError as error:
        return str(error)
    return True


def preserve_stamp(name):
    """Another value whenever the content of a file in the input folder is another."""
    return hashlib.sha256(preserve_text(name).encode()).hexdigest()


def preserve_text(name):
    """Content of a file in the input folder, nothing for none."""
    return "" if name == NONE else input_text_file(name)


def taken(job, clip):
    """Sentences on how the words of a job were taken where they may be meant otherwise."""
    texts = [concept.text for concept in job.concepts]
    everything = [*texts, *(concept.surrogate for concept in job.concepts), *job.preserve]
    return remarks(job.concepts, job.preserve, spelled_words(clip, texts), missing_embeddings(clip, everything))
