"""What a file says about its adapter, in safetensors' map of strings: the card as formats write and read it."""

import json

from ..adapters.adapter import Card
from ..errors import ErasureError

LONGEST_CONCEPT, MOST_CONCEPTS = 2000, 10_000  # characters, concepts


def card_metadata(card):
    """What every file says about its adapter, as a map of strings; modelspec.* is what LoRA browsers read."""
    return {
        "membrane.method": card.method,
        "membrane.concepts": json.dumps(card.concepts),
        "membrane.surrogates": json.dumps(card.surrogates),
        "membrane.family": card.family,
        "membrane.text_encoder": card.text_encoder,
        "membrane.settings": json.dumps(card.settings, sort_keys=True),
        "membrane.licence": card.licence,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title(card),
        "modelspec.implementation": "membrane",
    }


def title(card):
    """A file's title: what it erases, or how, when that is not known."""
    return "erases " + ", ".join(card.concepts) if card.concepts else f"concept erasure ({card.method})"


def read_card(name, metadata):
    """The card that card_metadata() wrote; name: of the file, for messages."""
    try:
        concepts = json.loads(metadata["membrane.concepts"])
        surrogates = json.loads(metadata.get("membrane.surrogates", "[]"))
        settings = json.loads(metadata.get("membrane.settings", "{}"))
        json.dumps([concepts, surrogates], ensure_ascii=False).encode()  # half characters cannot be shown or encoded
    except (KeyError, ValueError, RecursionError) as error:
        raise ErasureError(f'"{name}" has a damaged description ({error}); save the adapter again.') from error
    if not all(isinstance(x, list) and all(isinstance(s, str) for s in x) for x in (concepts, surrogates)):
        raise ErasureError(f'"{name}" names no concepts; it is damaged, save the adapter again.')
    require_bounded(name, concepts)
    return Card(
        metadata.get("membrane.method", ""),
        tuple(concepts),
        tuple(surrogates),
        metadata.get("membrane.family", ""),
        metadata.get("membrane.text_encoder", ""),
        settings if isinstance(settings, dict) else {},
        metadata.get("membrane.licence", ""),
    )


def require_bounded(name, concepts):
    """Raises ErasureError for concepts that a text encoder would not come to the end of."""
    longest = max(map(len, concepts), default=0)
    if longest > LONGEST_CONCEPT or len(concepts) > MOST_CONCEPTS:
        raise ErasureError(
            f'"{name}" names {len(concepts)} concepts of up to {longest} characters; expected at most {MOST_CONCEPTS} '
            f"of {LONGEST_CONCEPT}, the file is damaged, get it again."
        )
