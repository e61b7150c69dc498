"""Files that are known but not read, each with the reason, so that nobody searches for a mistake of their own."""

from ..errors import ErasureError
from . import lokr
from .factors import BESIDE

RECELER = (".down.weight", ".down.bias", ".up.weight", ".up.bias")
EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "t5xxl"}

LOKR = "LoKr factors"
NORMS = (".w_norm", ".b_norm")  # LyCORIS' train_norm
# what a key of such a file contains, and its kind
KINDS = {
    "hada_w": "LoHa factors",
    "lokr_w": LOKR,
    "dora_scale": "DoRA factors",
    "lora_magnitude_vector": "DoRA factors",
    "oft_blocks": "OFT factors",
    "oft_diag": "OFT factors",
}
OWN_PROGRAM = "use the program it was made with"


def look_alike(contents):
    """The ErasureError for a file that would pass for a LoRA or for weights of a denoiser but is none, or None."""
    keys, tensors = tuple(contents.tensors), contents.tensors
    if any("lora_gloce_" in key for key in keys):
        return _error(contents, "is a GLoCE file, a gated change of what attention puts out and no LoRA", OWN_PROGRAM)
    if any(_crossed(tensors, key) for key in keys) or any(key.startswith("attention_gate.") for key in keys):
        return _error(
            contents,
            "is a CPE file (three-dimensional factors and an attention_gate), which is no LoRA without its gate",
            OWN_PROGRAM,
        )
    if any(key.endswith(".down.bias") for key in keys) and all(key.endswith(RECELER) for key in keys):
        return _error(contents, "is a Receler file, a small network after each attention and no LoRA", OWN_PROGRAM)
    if any(key.startswith("controlnet_") for key in keys):
        return _error(contents, "is a ControlNet and no erasure", "load it as a ControlNet")
    norms = [key for key in keys if key.endswith(NORMS) and not BESIDE.match(key)]
    if norms:
        return _error(
            contents,
            f"changes {len({key.rpartition('.')[0] for key in norms})} layers of norms ({norms[0]}, LyCORIS' "
            "train_norm), which no low-rank pairs hold, and without them it is another adapter",
            "use a LoRA loader for this file, or train it without train_norm",
        )
    for part, kind in KINDS.items():
        if kind == LOKR and lokr.recognises(contents):
            continue
        found = next((key for key in keys if part in key), None)
        if found:
            return _no_pairs(contents, kind, found)
    found = next((key for key in keys if key.endswith(".diff")), None)
    return _no_pairs(contents, "whole differences of layers", found) if found else None


def _crossed(tensors, key):
    """Whether a factor has three dimensions and is none of a convolution along one line, whose factors meet in the
    rank."""
    up = tensors.get(key.removesuffix(".lora_down.weight") + ".lora_up.weight")
    if not key.endswith(".lora_down.weight") or tensors[key].dim() != 3:
        return False
    return up is None or up.dim() != 3 or up.shape[1] != tensors[key].shape[0] or up.shape[2] != 1


def other(contents):
    """The ErasureError for a file of no format that is read."""
    keys = contents.tensors.keys()
    if any(key.startswith(("text_model.", "text_encoder.")) for key in keys):
        return _error(
            contents,
            "holds a whole text encoder (such as AdvUnlearn's), and Membrane erases in the denoiser",
            "load it as the CLIP of your workflow",
        )
    if any(key.startswith(("unet:", "text_encoder:")) for key in keys):
        return _error(
            contents,
            "is a LoRA of the first kind (cloneofsimo, 2022), whose layers have numbers and no names",
            "convert it to a plain LoRA",
        )
    placeholder = len(keys) == 1 and next(iter(keys)).startswith("<")
    if keys & EMBEDDINGS or "string_to_param" in contents.outer or placeholder:
        return _error(
            contents, "is a textual inversion embedding", "put it into models/embeddings and name it in the prompt"
        )
    return _error(
        contents,
        f"is of no format that Membrane reads (it holds {contents.some()})",
        "choose an erasure adapter, a LoRA, or weights of a denoiser",
    )


def _no_pairs(contents, kind, found):
    return _error(
        contents,
        f"holds {kind} ({found}), and Membrane reads low-rank pairs (lora_up and lora_down)",
        "convert it to a plain LoRA",
    )


def _error(contents, found, do):
    return ErasureError(f'"{contents.name}" {found}; {do}.')
