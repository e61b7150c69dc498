"""What all formats share: files that appear whole or not at all, and what they say about an adapter."""

import json
import os
import uuid

from safetensors.torch import save_file


def card_metadata(card):
    """What every file of an adapter says about it, as safetensors' map of strings; modelspec.* is for LoRA browsers."""
    return {
        "membrane.method": card.method,
        "membrane.concepts": json.dumps(card.concepts),
        "membrane.surrogates": json.dumps(card.surrogates),
        "membrane.family": card.family,
        "membrane.text_encoder": card.text_encoder,
        "membrane.settings": json.dumps(card.settings, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "erases " + ", ".join(card.concepts),
        "modelspec.implementation": "membrane",
    }


def save_whole(tensors, path, metadata):
    """Writes a safetensors file beside its place and renames it; a failure leaves what was there before."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
