"""What a file says about itself, from its header alone: no weights are read."""

import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..adapters.adapter import Card
from ..errors import ErasureError
from . import containers, kohya, native, registry
from .card import read_card

UNOPENED = "not known before it is loaded (PyTorch file)"


@dataclass(frozen=True)
class Label:
    """A file's card; size in bytes; what else it says of its family and licence."""

    card: Card
    size: int
    family: str
    licence: str


def label(path):
    """Label of an adapter's file; raises ErasureError for a file that Load Erasure Adapter would refuse."""
    contents, size = header(path), os.path.getsize(path)
    if contents is None:
        return Label(Card(UNOPENED, ()), size, "", "")
    reader = registry._reader(contents)
    metadata = contents.metadata
    if reader is None:
        raise ErasureError(
            f'"{contents.name}" is no erasure adapter that Membrane reads; Load Erasure Adapter says what it is.'
        )
    if reader is native:
        card = read_card(contents.name, metadata)
    else:
        card = kohya._card(contents) if reader is kohya else Card("LoRA", ())
    family = card.family or metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    return Label(card, size, family, card.licence or metadata.get("modelspec.license", ""))


def header(path):
    """Contents of a safetensors file with tensors that have shapes but no numbers; None for a PyTorch file."""
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) == containers.ZIP:
                return None
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}
            return containers.Contents(name, containers.SAFETENSORS, tensors, file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, TypeError, OverflowError) as error:
        raise ErasureError(f'"{name}" cannot be read as a safetensors file; download or save it again.') from error
