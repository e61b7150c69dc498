"""What a file says about itself, from its header alone: no weights are read."""

import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..adapters.adapter import Card
from ..errors import ErasureError
from . import containers, registry
from .factors import BESIDE

UNOPENED = "not known before it is loaded (PyTorch file)"


@dataclass(frozen=True)
class Label:
    """What an adapter's file says about itself.

    card: as far as the format tells. size: of the file, in bytes. family, licence: the card's, or what LoRA files say
    of the model they are for and of their licence; "" where nothing does.
    """

    card: Card
    size: int
    family: str
    licence: str


def label(path):
    """Label of an adapter's file; raises ErasureError for a file that is no adapter.

    Of a PyTorch file nothing is known before it is loaded, and the card says so.
    """
    contents, size = header(path), os.path.getsize(path)
    if contents is None:
        return Label(Card(UNOPENED, ()), size, "", "")
    kind, metadata = registry.format_of(contents), contents.metadata
    if kind is None:
        raise ErasureError(
            f'"{contents.name}" is no erasure adapter that Membrane reads; Load Erasure Adapter says what it is.'
        )
    if contents.tensors and all(map(BESIDE.match, contents.tensors)):
        raise ErasureError(
            f'"{contents.name}" changes layers of a text encoder and none of the denoiser; Membrane erases in the '
            "denoiser, use a LoRA loader for this file."
        )
    card = kind.card(contents)
    family = card.family or metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    return Label(card, size, family, card.licence or metadata.get("modelspec.license", ""))


def header(path):
    """Contents of a safetensors file with tensors that have shapes but no numbers; None for a PyTorch file."""
    name = os.path.basename(path)
    try:
        if containers.is_torch(path):
            return None
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}
            return containers.Contents(name, containers.SAFETENSORS, tensors, file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, TypeError, OverflowError) as error:
        raise ErasureError(f'"{name}" cannot be read as a safetensors file; download or save it again.') from error
