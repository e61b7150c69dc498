"""Says so when weights are saved or merged that an erasure does not stand in.

An erasure on the text, or one that follows the prompt, acts beside the weights: a checkpoint saved below it draws what
was erased as before. Saving and merging read the weights through two functions of the host, which are watched; what
goes in and comes out is passed on untouched.
"""

import functools
import logging

import comfy.model_patcher
import comfy.sd
from server import PromptServer

from ...adapters.gates import gated
from ..compat import reading
from ..patches.stack import applied

log = logging.getLogger("membrane")

EVENT = "membrane.warning"
SAVED, MERGED = "This file does not have", "The merged model does not get"
HOW = 'set apply_to to "weights" on the node that erases (Erase Concepts or Apply Erasure) to have it there'


def watch():
    """Watches the host's saving and merging from now on; a second call changes nothing."""
    _replace(comfy.sd, "save_checkpoint", lambda output_path, model, *args, **kwargs: (model, SAVED))
    _replace(comfy.model_patcher.ModelPatcher, "get_key_patches", _of_merging)


def _of_merging(model, filter_prefix=None, **kwargs):
    """The MODEL that a merge takes weights from, and what to say; nothing when the host or the pack only looks."""
    return None if filter_prefix is None or reading() else (model, MERGED)


def _replace(owner, name, read_from):
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "membrane"):
        return

    @functools.wraps(original)
    def watched(*args, **kwargs):
        taken = read_from(*args, **kwargs)
        if taken is not None:
            warn(*taken)
        return original(*args, **kwargs)

    watched.membrane = True
    setattr(owner, name, watched)


def warn(model, what):
    """Says in the log and on the page that a MODEL's weights are taken without the erasures that act beside them."""
    beside = applied(model)
    if beside is None:
        return
    text = f"{what} {_named(beside.stack)}, which acts beside the weights; {HOW}."
    log.warning("Membrane: %s", text)
    server = getattr(PromptServer, "instance", None)
    node = getattr(server, "last_node_id", None)
    if node is not None:
        message = {"node": node, "title": "Not in the weights", "text": text}
        server.send_sync(EVENT, message, server.client_id)


def _named(stack):
    """ "the erasure of star, heart", of those entries of a stack that act beside the weights."""
    beside = (e.adapter for e in stack.entries if e.acts and (gated(e) or e.adapter.maps or e.adapter.masks))
    concepts = dict.fromkeys(concept for adapter in beside for concept in adapter.card.concepts)
    return f"the erasure of {', '.join(list(concepts)[:3])}" if concepts else "the erasure"
