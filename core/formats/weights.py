"""Whole weights: the layers of a denoiser as they are after an edit (UCE, RECE, ESD, SPEED, OCE, Concept Ablation).

Some files hold only the layers that were edited, some a whole U-Net, some a whole checkpoint, with the names of
diffusers or LDM. They fit one base model only; core/erasers/extract.py makes an adapter of them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ErasureError
from ..families.sites import PARAMETERS, site
from ..families.table import role
from .containers import TORCH

log = logging.getLogger("membrane")

# of a denoiser in a file with more than one model; the first that is there counts
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "")
ROOTS = frozenset(
    # U-Nets, diffusers and LDM
    "down_blocks mid_block up_blocks conv_in conv_out conv_norm_out time_embedding add_embedding class_embedding "
    "input_blocks middle_block output_blocks out time_embed label_emb "
    # transformers, diffusers and the host's own
    "transformer_blocks single_transformer_blocks context_embedder time_text_embed x_embedder norm_out proj_out "
    "caption_projection double_stream_blocks single_stream_blocks double_blocks single_blocks joint_blocks txt_in "
    "img_in vector_in time_in guidance_in final_layer y_embedder t_embedder cap_embedder noise_refiner "
    "context_refiner layers cond_seq_linear double_layers single_layers text_embedding text_proj p_embedder".split()
)
# first and last layer of the networks: who has both is whole
ENDS = (
    ("conv_in", "conv_out"),
    ("input_blocks_0_0", "out_2"),
    ("x_embedder", "proj_out"),
    ("x_embedder", "final_layer_linear"),
    ("img_in", "final_layer_linear"),
)
WEIGHTS = "weights"  # source of a file that no method is known to write
KEY_VALUE = {"cross_attention.key", "cross_attention.value"}
TEXT_ENTRIES = {"context_embedder", "time_text_embed", "caption_projection", "txt_in"}
TRANSFORMERS = {"transformer_blocks", "single_transformer_blocks"}
PARTS_OF_A_MODEL = {"unet", "state_dict"}


@dataclass(frozen=True, eq=False)
class EditedWeights:
    """Layers of a denoiser after an edit.

    tensors: {(site, "weight" or "bias"): tensor}; each is read once, so the mapping may make them when it is asked.
    name: of the file or the model, for messages; source: the method that writes such files, or "weights"; whole:
    whether all layers of the denoiser are there.
    """

    tensors: Mapping[tuple[str, str], torch.Tensor]
    name: str
    source: str = WEIGHTS
    whole: bool = False

    def layers(self):
        """Sites, each once, in the file's order."""
        return tuple(dict.fromkeys(layer for layer, _ in self.tensors))


def recognises(contents):
    """Whether a file has weights of a denoiser's layers."""
    return any(_denoiser(contents))


def parse(contents):
    """EditedWeights of such a file, not read from the disk yet; raises ErasureError for a quantised one."""
    tensors, roots = {}, set()
    for path, tensor in _denoiser(contents):
        if not tensor.is_floating_point():
            raise ErasureError(
                f'"{contents.name}" holds {path} as {str(tensor.dtype).removeprefix("torch.")}; expected floating '
                "point numbers, get a file that is not quantised."
            )
        roots.add(path.split(".")[0])
        tensors[site(path), path.rpartition(".")[2]] = tensor
    layers = {layer for layer, _ in tensors}
    whole = any(set(ends) <= layers for ends in ENDS)
    source = WEIGHTS if whole else _source(contents, layers, roots)
    log.info("Membrane: %s: %d layers of a denoiser (%s)", contents.name, len(layers), source)
    return EditedWeights(tensors, contents.name, source, whole)


def _denoiser(contents):
    """(path without prefix, tensor) of the weights and biases of a denoiser's layers."""
    for prefix in PREFIXES:
        paths = {
            key.removeprefix(prefix): tensor
            for key, tensor in contents.tensors.items()
            if key.startswith(prefix) and key.endswith(PARAMETERS)
        }
        paths = {path: tensor for path, tensor in paths.items() if path.split(".")[0] in ROOTS}
        if paths:
            return paths.items()
    return ()


def _source(contents, layers, roots):
    """The method that writes files with such layers, as far as they tell."""
    if contents.outer & PARTS_OF_A_MODEL:
        return "Concept Ablation"
    groups = {role(layer) for layer in layers}
    if groups == {"cross_attention.value"}:
        return "SPEED" if contents.container == TORCH else "OCE"
    bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in contents.tensors.values())
    # a dictionary for each layer, or bfloat16, or the blocks of Flux
    if contents.outer or bfloat16 or roots <= TRANSFORMERS:
        return "ESD"
    return "UCE" if groups <= KEY_VALUE or roots <= TEXT_ENTRIES else WEIGHTS
