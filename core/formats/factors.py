"""Low-rank factors as files hold them: gathered by layer and checked, once for all formats."""

import logging
import math
import re

import torch

from ..adapters.deltas.low_rank import LowRank
from ..errors import ErasureError
from ..families.sites import site

log = logging.getLogger("membrane")

# what LoRA files hold beside the denoiser's layers: text encoders, and the embeddings of a bundled trigger word
BESIDE = re.compile(
    r"(base_model\.model\.)?(lora_te|lora_text_encoder|text_encoder(s|_\d)?\.|text_model\.|bundle_emb\.)"
)
HALF_ERROR = 1e-3  # of a layer's product, relative; above it the layer is stored in float32
LARGEST_KERNEL = 7  # of a convolution, along one side


def gather(contents, split):
    """{site: {part: tensor}} of a LoRA's layers; parts: up, down, mid, alpha, scalar, bias.

    split: a format's function from a key to (layer, part), or to None where the key is not the format's.
    What belongs to a text encoder is left out and logged. Raises ErasureError when nothing else is there, for
    keys of no known part, and for two tensors of one part.
    """
    layers, beside, unknown = {}, set(), []
    for key, tensor in contents.tensors.items():
        found = split(key)
        if BESIDE.match(key):
            beside.add(found[0] if found else key)
        elif not found:
            unknown.append(key)
        else:
            layer, part = site(found[0]), found[1]
            parts = layers.setdefault(layer, {})
            if part in parts:
                raise ErasureError(
                    f'"{contents.name}" holds two tensors for the part "{part}" of {layer}; expected one adapter in a '
                    "file, save them separately."
                )
            parts[part] = tensor
    if unknown:
        raise ErasureError(
            f'"{contents.name}" holds {len(unknown)} tensors that are no part of a LoRA as Membrane knows it '
            f"({', '.join(sorted(unknown)[:3])}); convert it to a plain LoRA."
        )
    if not layers:
        raise ErasureError(
            f'"{contents.name}" changes {len(beside)} layers of a text encoder and none of the denoiser; Membrane '
            "erases in the denoiser, use a LoRA loader for this file."
        )
    if beside:
        log.info("Membrane: %s: left out %d layers of text encoders", contents.name, len(beside))
    return layers


def low_rank(file, layer, parts):
    """One LowRank from its parts (see gather), checked; factors keep their number type.

    Convolutions of one point become linear, and a Tucker core (mid) goes into the down factor. Without alpha it is the
    rank; a trained scalar of LyCORIS (use_scalar) multiplies it, though most loaders pass over it.
    """
    missing = {"up", "down"} - parts.keys()
    if missing:
        found, wanted = " and ".join(sorted(parts)), " and no ".join(sorted(missing))
        raise ErasureError(
            f'"{file}" holds {found} of {layer} but no {wanted} factor; expected both factors, the file is incomplete '
            "or no plain LoRA, get it again."
        )
    parts = {part: _numbers(file, layer, part, tensor) for part, tensor in parts.items()}
    alike = parts["up"].dim() == parts["down"].dim()
    up, down = _flat(parts["up"], alike), _flat(parts["down"], alike)
    if up.dim() != 2 or not 2 <= down.dim() <= 5 or not 0 < up.shape[1] == down.shape[0]:
        raise ErasureError(
            f'"{file}" holds factors of shapes {tuple(parts["up"].shape)} (up) and {tuple(parts["down"].shape)} (down) '
            f"for {layer}; expected (out, rank) and (rank, in), the file is damaged or no plain LoRA, get it again."
        )
    alpha = _alpha(file, layer, parts.get("alpha"), up.shape[1])
    alpha *= _alpha(file, layer, parts.get("scalar"), 1, "scalar")
    if "mid" in parts:
        down = _with_core(file, layer, down, parts["mid"])
    # the product of the scale and a factor is what acts, in float32
    if not (torch.isfinite(up.float() * (alpha / up.shape[1])).all() and torch.isfinite(down.float()).all()):
        raise ErasureError(
            f'"{file}" holds factors of {layer} that are too large with the alpha {alpha:g}; the file is damaged or '
            "its training failed, get another one."
        )
    bias = parts.get("bias")
    if bias is not None and bias.shape != up.shape[:1]:
        raise ErasureError(
            f'"{file}" holds a bias of shape {tuple(bias.shape)} for {layer}; expected ({len(up)},), get it again.'
        )
    # copies: what a reader returns does not hang on the file any more
    up, down, bias = (t if t is None else t.clone(memory_format=torch.contiguous_format) for t in (up, down, bias))
    return LowRank(up, down, alpha, bias)


def balanced(up, down):
    """A product's factors, (out, r) and (r, in), in float16 where the product keeps its digits, else in float32."""
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


def _numbers(file, layer, part, tensor):
    """The tensor, when its numbers are finite floats; alpha may be whole. 8-bit floats become float16."""
    if not tensor.is_floating_point() and (part != "alpha" or tensor.is_complex()):
        raise ErasureError(
            f'"{file}" holds {part} of {layer} as {str(tensor.dtype).removeprefix("torch.")}; expected floating point '
            "numbers, get a file that is not quantised."
        )
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.half()
    if not torch.isfinite(tensor.float() if tensor.dtype == torch.float64 and part != "alpha" else tensor).all():
        raise ErasureError(
            f'"{file}" holds numbers that are not finite in {part} of {layer}; the file is damaged or its training '
            "failed, get another one."
        )
    return tensor


def _flat(tensor, alike=False):
    """The factor of a convolution of one point as a matrix; all others as they are. alike: whether both factors of a
    layer have as many dimensions, without which only pictures' convolutions are."""
    point = set(tensor.shape[2:]) == {1} and (alike or tensor.dim() == 4)
    return tensor.flatten(1) if point else tensor


def _alpha(file, layer, alpha, without, part="alpha"):
    """The number in a tensor of one, `without` where there is none; part: what it is called in messages."""
    if alpha is None:
        return float(without)
    if alpha.numel() != 1:
        raise ErasureError(
            f'"{file}" holds {part} of {layer} with the shape {tuple(alpha.shape)}; expected one number, get it again.'
        )
    value = float(alpha.reshape(()))
    if not math.isfinite(value):
        raise ErasureError(f'"{file}" holds the {part} {value} for {layer}; expected a finite number, get it again.')
    return value


def _with_core(file, layer, down, core):
    """down (r, in) and core (r, r, height, width) of a Tucker-decomposed convolution as one (r, in, height, width)."""
    rank = len(down)
    if down.dim() != 2 or core.dim() != 4 or core.shape[:2] != (rank, rank) or max(core.shape[2:]) > LARGEST_KERNEL:
        raise ErasureError(
            f'"{file}" holds a core of shape {tuple(core.shape)} (lora_mid) for {layer}; expected '
            f"({rank}, {rank}, height, width) of a small convolution, get it again."
        )
    return _flat(torch.einsum("orhw,ri->oihw", core.float(), down.float()))
