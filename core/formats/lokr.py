"""LyCORIS' LoKr (Yeh et al. 2024, section 3.2) where both factors of the Kronecker product are split.

W -> W + (alpha / r) kron(w1_a w1_b, w2_a w2_b). As kron(A B, C D) = kron(A, C) kron(B, D), that is the LoRA of rank r^2
with up = kron(w1_a, w2_a) and down = kron(w1_b, w2_b). A factor that is stored whole makes it one of high rank.
"""

import re

import torch

from ..adapters.adapter import Card, ErasureAdapter
from ..errors import ErasureError
from .factors import gather, low_rank
from .format import Format

KEY = re.compile(r"(.+)\.(?:lokr_(w[12]_[ab])|(alpha|scalar))$")
FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")
# layers of U-Nets that are convolutions of 3 by 3, whose second factor is stored flat
KERNEL = 3
CONVOLUTIONS = re.compile(
    r"(resnets_\d+_conv[12]|samplers_0_conv|^conv_(in|out)|in_layers_2|out_layers_3|_op|blocks_\d+_[12]_conv"
    r"|^input_blocks_0_0|^out_2)$"
)


def recognises(contents):
    """Whether all layers of a file have split factors."""
    return any("lokr_w" in key for key in contents.tensors) and all(map(KEY.match, contents.tensors))


def parse(contents):
    """Adapter of such a file; raises ErasureError for a damaged one."""
    layers = gather(contents, lambda key: _split(key))
    changes = {layer: _change(contents.name, layer, parts) for layer, parts in layers.items()}
    return ErasureAdapter(card(contents), {"low_rank": changes}, contents.name)


def card(contents):
    """Card of such a file, which says nothing of concepts."""
    return Card("LoRA", ())


def _split(key):
    found = KEY.match(key)
    return found[1], found[2] or found[3]


def _change(file, layer, parts):
    missing = [part for part in FACTORS if part not in parts]
    shapes = [tuple(parts[part].shape) for part in FACTORS if part in parts]
    fits = not missing and all(len(shape) == 2 and 0 not in shape for shape in shapes)
    if not fits or shapes[0][1] != shapes[1][0] or shapes[2][1] != shapes[3][0]:
        raise ErasureError(
            f'"{file}" holds LoKr factors of shapes {shapes} for {layer}; expected four factors that fit together, the '
            "file is damaged, get it again."
        )
    w1_a, w1_b, w2_a, w2_b = (parts[part].float() for part in FACTORS)
    up, down, rank = torch.kron(w1_a, w2_a), torch.kron(w1_b, w2_b), len(w2_b)
    if CONVOLUTIONS.search(layer) and down.shape[1] % KERNEL**2 == 0:
        down = down.unflatten(1, (-1, KERNEL, KERNEL))
    scale = float(parts["alpha"]) / rank if "alpha" in parts and parts["alpha"].numel() == 1 else 1.0
    scalar = {"scalar": parts["scalar"]} if "scalar" in parts else {}
    return low_rank(file, layer, {"up": up, "down": down, "alpha": torch.tensor(scale * up.shape[1]), **scalar})


FORMAT = Format("LoKr", recognises, parse, card)
