"""A plain LoRA file with kohya's key names, for the stock LoRA loader of any user interface."""

import torch

from ..low_rank import compact, layer_factors
from .files import card_metadata, save_whole

HALF_ERROR = 1e-3  # of a layer's product, relative; above it the layer is stored in float32

# (start of the host's family name, kohya's ss_base_model_version, modelspec's architecture), the first that fits
FAMILIES = (
    ("SDXLRefiner", "", "stable-diffusion-xl-v1-refiner"),
    ("SDXL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    ("SD2", "sd_v2", "stable-diffusion-v2-512"),
    ("SD1", "sd_v1", "stable-diffusion-v1"),
)


def save(adapter, weights, path, names):
    """Writes W -> W + W A B of an adapter at strength 1 as a LoRA; the file appears whole or not at all.

    weights: (key, W (out, d)) pairs of the layers that read the text, as the model uses them; may be a
    generator. names: {key: lora_unet_... name}. Each layer gets lora_up (out, k), lora_down (k, d) and
    alpha = k, so that a loader's scale alpha / k is 1; the loader's strength scales the erasure linearly.
    """
    a, b = compact(adapter.text_map.a, adapter.text_map.b)
    tensors, rank = {}, 1
    for key, weight in weights:
        up, down = _stored(*layer_factors(weight.cpu(), a, b))
        rank = max(rank, len(down))
        name = names[key]
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    save_whole(tensors, path, _metadata(adapter.card, rank))


def _stored(up, down):
    """The factors in float16 where their product keeps its digits, else in float32."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = down.norm(dim=1).clamp_min(tiny) / up.norm(dim=0).clamp_min(tiny)
    # both factors in the middle of float16's range; powers of two change no digits
    scale = ratio.sqrt().log2().round().exp2()
    up, down = up * scale, down / scale[:, None]
    half = up.half(), down.half()
    product = up @ down
    if (half[0].double() @ half[1].double() - product).norm() <= HALF_ERROR * product.norm():
        return half
    return up.float(), down.float()


def _metadata(card, rank):
    concepts = ", ".join(card.concepts)
    version, architecture = next(
        ((version, name) for start, version, name in FAMILIES if card.family.startswith(start)),
        ("", card.family or "unknown"),
    )
    return card_metadata(card) | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": version,
        "ss_output_name": "erases " + concepts,
        "ss_training_comment": f"closed-form concept erasure ({card.method}), computed, not trained",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.description": f"Erases ({card.method}): {concepts}",
        "modelspec.usage_hint": "No trigger words; strength 1 is the erasure as computed on the model it is for.",
        "modelspec.license": card.licence,
        "membrane.format": "lora",
    }
