"""Membrane's own file: safetensors with an adapter's text map, its changes of layers, and the card as metadata.

Version 1 has a text map: text_map.a, .b, .concept. Version 2 has more or other things: changes of layers as
low_rank.<site>.up, .down, .alpha and, where a layer's bias changes, .bias; a map of the pooled vector as pooled_map.*.
"""

import torch

from ..adapter import ErasureAdapter, TextMap
from ..errors import ErasureError
from . import containers
from .factors import low_rank
from .files import card_metadata, own, read_card, save_whole

FORMAT = "erasure_adapter"
TEXT_MAP_VERSION, VERSION = 1, 2
TEXT_MAP, POOLED_MAP = (
    tuple(f"{name}.{part}" for part in ("a", "b", "concept")) for name in ("text_map", "pooled_map")
)
LOW_RANK = "low_rank."


def save(adapter, path):
    """Writes an adapter; the file appears whole or not at all. Factors of layers keep their number types."""
    card, tensors = adapter.card, {}
    for keys, found in ((TEXT_MAP, adapter.text_map), (POOLED_MAP, adapter.pooled_map)):
        if found is not None:
            owners = torch.tensor(found.concept, dtype=torch.int32)
            tensors |= dict(zip(keys, (found.a.float().contiguous(), found.b.float().contiguous(), owners)))
    for layer, change in adapter.low_rank.items():
        name = LOW_RANK + layer
        tensors[f"{name}.up"], tensors[f"{name}.down"] = own(change.up), own(change.down)
        tensors[f"{name}.alpha"] = torch.tensor(change.alpha, dtype=torch.float64)
        if change.bias is not None:
            tensors[f"{name}.bias"] = own(change.bias)
    what = f" for: {', '.join(card.concepts)}" if card.concepts else ""
    metadata = card_metadata(card) | {
        "membrane.format": FORMAT,
        # files that older releases can read keep the version those know
        "membrane.version": str(VERSION if adapter.low_rank or adapter.pooled_map else TEXT_MAP_VERSION),
        "modelspec.architecture": card.family or "unknown",
        "modelspec.description": f"Erasure adapter ({card.method}){what}",
    }
    save_whole(tensors, path, metadata)


def load(path):
    """Adapter of a native file; raises ErasureError for anything else or a damaged one."""
    return parse(containers.read(path))


def recognises(contents):
    """Whether a file says that it is one."""
    return contents.metadata.get("membrane.format") == FORMAT


def parse(contents):
    """Adapter of the contents of a native file; raises ErasureError for anything else or a damaged one."""
    name, tensors = contents.name, contents.tensors
    _check_header(contents)
    card = read_card(name, contents.metadata)
    text_map, pooled_map = (
        _text_map(name, tensors, card, keys) if any(key in tensors for key in keys) else None
        for keys in (TEXT_MAP, POOLED_MAP)
    )
    layers = {}
    for key, tensor in tensors.items():
        if key.startswith(LOW_RANK):
            layer, _, part = key.removeprefix(LOW_RANK).rpartition(".")
            layers.setdefault(layer, {})[part] = tensor
    changes = {layer: low_rank(name, layer, parts) for layer, parts in layers.items()}
    if text_map is None and not changes:
        raise ErasureError(f'"{name}" lacks {", ".join(TEXT_MAP)}; it is damaged, save the adapter again.')
    return ErasureAdapter(card, text_map, name, changes, pooled_map)


def _text_map(name, tensors, card, keys):
    missing = set(keys) - tensors.keys()
    if missing:
        raise ErasureError(f'"{name}" lacks {", ".join(sorted(missing))}; it is damaged, save the adapter again.')
    if not card.concepts:
        raise ErasureError(f'"{name}" names no concepts; it is damaged, save the adapter again.')
    a, b, concept = (tensors[key] for key in keys)
    if not (a.is_floating_point() and b.is_floating_point()) or concept.is_floating_point() or concept.dim() != 1:
        raise ErasureError(
            f'"{name}" holds a text map of the wrong number types; it is damaged, save the adapter again.'
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ErasureError(f'"{name}" holds numbers that are not finite; it is damaged, save the adapter again.')
    owners = tuple(concept.tolist())
    if any(not 0 <= i < len(card.concepts) for i in owners):
        raise ErasureError(
            f'"{name}" has terms for concept number {max(owners)} but names {len(card.concepts)} concepts; '
            "it is damaged, save the adapter again."
        )
    return TextMap(a.float(), b.float(), owners)


def _check_header(contents):
    name, metadata = contents.name, contents.metadata
    if not recognises(contents):
        raise ErasureError(
            f'"{name}" is not a Membrane erasure adapter (it holds {contents.some()}); '
            "choose a file made by Save Erasure Adapter."
        )
    version = metadata.get("membrane.version", "")
    if version not in map(str, range(1, VERSION + 1)):
        raise ErasureError(
            f'"{name}" is of format version {version or "unknown"}, and this pack reads up to {VERSION}; '
            "update Membrane."
        )
