"""Z-Erase's files for Z-Image: a LoRA of rank 64 on the queries and keys, for the text's rows alone.

layers.<i>.attention.to_q.lora_up.weight (out, r) and .lora_down.weight (r, in), likewise to_k, in float32 and without
alpha. The keys are those of a plain LoRA, which would change the picture's rows as well.
"""

import logging
import re
from dataclasses import fields

from ..adapters.adapter import Card, ErasureAdapter
from ..adapters.deltas.text_rows import TextLowRank
from .factors import gather, low_rank
from .format import Format

log = logging.getLogger("membrane")

KEY = re.compile(r"(layers\.\d+\.attention\.to_[qk])\.lora_(down|up)\.weight$")
STRENGTH = (10, 15)  # between which its authors search the strength


def recognises(contents):
    """Whether a file has these keys and no others."""
    return bool(contents.tensors) and all(map(KEY.match, contents.tensors))


def parse(contents):
    """Adapter of such a file; raises ErasureError for a damaged one."""
    layers = gather(contents, lambda key: KEY.match(key).groups())
    changes = {layer: _on_text(low_rank(contents.name, layer, parts)) for layer, parts in layers.items()}
    log.info(
        "Membrane: %s: a Z-Erase file says no scale; its authors use strengths from %d to %d", contents.name, *STRENGTH
    )
    return ErasureAdapter(card(contents), {"text_rows": changes}, contents.name)


def card(contents):
    """Card of such a file, which does not say what it erases."""
    return Card("Z-Erase", (), settings={"published_strengths": list(STRENGTH)})


def _on_text(change):
    return TextLowRank(**{field.name: getattr(change, field.name) for field in fields(change)})


FORMAT = Format("Z-Erase", recognises, parse, card)
