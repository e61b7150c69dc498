"""What gates compare texts with, as a CLIP reads it."""

import logging
import weakref

import comfy.utils

from ...text.similarity import Bank, WordConcepts, concepts_of, examples_of, neutral_captions
from .encode import encode
from .entries import encode_contexts
from .tokens import fills_contexts

log = logging.getLogger("membrane")

# {network of a CLIP: {its state: (Bank, {concept: WordConcept})}}
KNOWN = weakref.WeakKeyDictionary()


def compared_with(clip, names):
    """Concepts or WordConcepts of names, as a CLIP's kind of encoders needs them.

    T5 and language models are calibrated on neutral captions. These are encoded once for each CLIP, when the first gate
    that follows the text is put on a model: while a model samples, loading the text encoder could push the model out
    of memory, and which prompts will come, and whether their words decide, is not known before.
    """
    if clip is None or fills_contexts(clip.tokenize("")):
        return concepts_of(encode_contexts(clip, (*names, "")))
    states = KNOWN.setdefault(clip.cond_stage_model, {})
    bank, known = states.get(_state(clip), (None, {}))
    captions = () if bank else neutral_captions()
    missing = [name for name in names if name not in known]
    texts = examples_of(missing) if missing else ()
    progress = comfy.utils.ProgressBar(len(captions) + len(texts))
    if captions:
        log.info("Membrane: %d neutral texts are encoded once, to tell likeness from chance", len(captions))
        found = encode(clip, captions, lambda done: progress.update_absolute(done))
        bank = Bank.of(found)
    if missing:
        encoded = encode(clip, texts, lambda done: progress.update_absolute(len(captions) + done))
        fresh = WordConcepts.calibrated(missing, encoded, bank)
        known = {**known, **dict(zip(fresh.names, fresh.each))}
    states[_state(clip)] = bank, known
    return WordConcepts(tuple(known[name] for name in names))


def _state(clip):
    """What changes the rows of a CLIP: patches on its weights, the layer that is read, and options of its tokenizer."""
    options = repr(sorted(getattr(clip, "tokenizer_options", {}).items()))
    return getattr(clip.patcher, "patches_uuid", None), getattr(clip, "layer_idx", None), options
