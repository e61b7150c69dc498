"""LoRA files with the names of PEFT and diffusers: EraseAnything, GEM, MACE's attention processors, most DiT LoRAs.

<layer>.lora_A.weight (r, in) and <layer>.lora_B.weight (out, r), also without .weight, or .lora.down/.up,
_lora.down/.up; the layer with dots, or as XLabs name those of Flux' double blocks. Alpha is a tensor beside them, in
the metadata (diffusers' or that of Mochi's trainer), or in PEFT's adapter_config.json beside the file; without any it
is the rank.
"""

import json
import logging
import math
import re

import torch

from ..adapters.adapter import Card, ErasureAdapter
from ..errors import ErasureError
from ..families.sites import site
from .containers import PEFT_SETTINGS
from .factors import gather, low_rank
from .format import Format

log = logging.getLogger("membrane")

# the layer, then one of PEFT's (which may say the adapter's name) or diffusers' spellings of a factor, or alpha
KEY = re.compile(
    r"(.+)\.lora_([AB])(?:\.(?!bias)[^.]+)?(?:\.weight)?$"
    r"|(.+?)(?:_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight$"
    r"|(.+)\.alpha$"
)
XLABS = re.compile(r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12])\.(down|up)\.weight$")
STREAMS = {"1": "img", "2": "txt"}
PARTS = {"A": "down", "B": "up", "down": "down", "up": "up"}
LARGEST_ALPHA = 1e9
MOCHI = "kwargs"  # JSON of Mochi's trainer, which names its layers as the host does: blocks.0.attn.qkv_x.lora_A
MOCHI_ALPHAS = {"qkv": "qkv_proj_lora_alpha", "proj": "out_proj_lora_alpha"}
METADATA = "lora_adapter_metadata"  # diffusers' JSON of PEFT's settings, each under the model's name
PEFT_PREFIX = "base_model.model."  # of PEFT's own files, whose alpha is never in the file
BLOCK = re.compile(r"^transformer_blocks_(\d+)_attn_(\w+)$")
# layers of every block that a method adapts, and no others
METHODS = {
    frozenset({"add_q_proj", "add_k_proj"}): "EraseAnything",
    frozenset({"add_q_proj", "add_k_proj", "to_q", "to_k"}): "GEM",
}


def recognises(contents):
    """Whether a file has these keys."""
    return any(part in PARTS.values() for _, part in filter(None, map(_split, contents.tensors)))


def parse(contents):
    """Adapter of such a file; raises ErasureError for a damaged one."""
    layers = gather(contents, _split)
    settings = _settings(contents)
    changes = {}
    for layer, parts in layers.items():
        if "alpha" not in parts and "down" in parts and settings:
            rank = next(iter(parts["down"].shape), 1)
            parts["alpha"] = torch.tensor(_alpha(contents.name, settings, layer, rank))
        changes[layer] = low_rank(contents.name, layer, parts)
    return ErasureAdapter(card(contents), {"low_rank": changes}, contents.name)


def card(contents):
    """Card of such a file, which says nothing of concepts; some methods are known by the layers they adapt."""
    blocks = {}
    for layer in {site(found[0]) for found in map(_split, contents.tensors) if found}:
        found = BLOCK.match(layer)
        blocks.setdefault(found and found[1], set()).add(found and found[2])
    targets = {frozenset(found) for found in blocks.values()}
    return Card(METHODS.get(targets.pop(), "LoRA") if len(targets) == 1 else "LoRA", ())


FORMAT = Format("LoRA (PEFT, diffusers)", recognises, parse, card)


def _split(key):
    found = XLABS.match(key)
    if found:
        block, layer, stream, way = found.groups()
        return f"double_blocks.{block}.{STREAMS[stream]}_attn.{layer}", way
    found = KEY.match(key)
    if not found:
        return None
    peft, half, diffusers, way, other = found.groups()
    return (peft or diffusers or other), PARTS.get(half or way, "alpha")


def _settings(contents):
    """PEFT's settings of the denoiser, or {} where the file does not have them."""
    where = next((name for name in (METADATA, MOCHI) if name in contents.metadata), PEFT_SETTINGS)
    text = contents.metadata.get(where) or contents.settings
    if not text:
        if any(key.startswith(PEFT_PREFIX) for key in contents.tensors):
            log.warning(
                "Membrane: %s does not say its alpha, which PEFT keeps in %s; without that beside it (and the name "
                "adapter_model) its scale is taken as 1",
                contents.name,
                PEFT_SETTINGS,
            )
        return {}
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if not isinstance(whole, dict):
        raise ErasureError(
            f'"{contents.name}" has damaged settings ({where} is no JSON object), and its scale is unknown without '
            "them; get the file again."
        )
    for model in ("transformer.", "unet.", ""):
        settings = {key.removeprefix(model): value for key, value in whole.items() if key.startswith(model)}
        if "lora_alpha" in settings:
            return settings
    own = {
        f"attn.{part}_{stream}": whole[name] for part, name in MOCHI_ALPHAS.items() if name in whole for stream in "xy"
    }
    return {"alpha_pattern": own} if own else {}


def _alpha(file, settings, layer, rank):
    """PEFT's alpha for a layer; with rsLoRA (Kalajdzievski 2023) the scale is alpha / sqrt(r) instead of alpha / r."""
    patterns = settings.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    own = (value for name, value in patterns.items() if f"_{layer}".endswith(f"_{site(name)}"))
    alpha = next(own, settings.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < LARGEST_ALPHA:
        raise ErasureError(
            f'"{file}" has the alpha {str(alpha)[:40]} for {layer}; expected a number such as the rank, get the file '
            "again."
        )
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
