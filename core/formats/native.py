"""Membrane's own file: safetensors with an adapter's text map, its changes of layers, and the card as metadata.

Version 1 has a text map: text_map.a, .b, .concept. Version 2 has more or other things: changes of layers as
low_rank.<site>.up, .down, .alpha and, where a layer's bias changes, .bias; a map of the pooled vector as pooled_map.*.
Version 3 has masks as well: mask.<site>.bits, the packed bits deflated by zlib, .shape (out, in) and, where something
is left of the marked weights, .kept. Version 4 has text maps by entry, map.<entry>.a, .b, .concept and, where the rows
were taken after a norm, .normed; and other kinds of deltas as <kind>.<site>.<part>. A file gets the oldest version that
can hold it, so that older releases read what they can.
"""

import zlib
from functools import partial

import torch

from ..adapters.adapter import ErasureAdapter
from ..adapters.deltas.delta import KINDS
from ..adapters.deltas.mask import Mask
from ..adapters.deltas.text_map import TextMap
from ..errors import ErasureError
from . import containers
from .factors import low_rank
from .files import card_metadata, own, read_card, save_whole

FORMAT = "erasure_adapter"
TEXT_MAP_VERSION, LAYERS_VERSION, MASKS_VERSION, VERSION = 1, 2, 3, 4
MAP_PARTS = ("a", "b", "concept")
OLD_MAPS = {"text": "text_map", "pooled": "pooled_map"}  # names of versions 1 to 3
TEXT_MAP, POOLED_MAP = (tuple(f"{name}.{part}" for part in MAP_PARTS) for name in OLD_MAPS.values())
MAP = "map."
MASK_PARTS = {"bits": (torch.uint8, 1), "shape": (torch.int64, 1), "kept": (torch.float16, 1)}  # type, dimensions
LARGEST_LAYER, LARGEST_MODEL = 2**28, 2**33  # weights; bound what a few deflated bytes may grow to
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def save(adapter, path):
    """Writes an adapter; the file appears whole or not at all. Factors of layers keep their number types."""
    card, version, tensors = adapter.card, _version(adapter), {}
    for entry, found in adapter.maps.items():
        prefix = MAP + entry if version == VERSION else OLD_MAPS[entry]
        owners = torch.tensor(found.concept, dtype=torch.int32)
        tensors |= {
            f"{prefix}.a": own(found.a.float()),
            f"{prefix}.b": own(found.b.float()),
            f"{prefix}.concept": owners,
        }
        if found.normed:
            tensors[f"{prefix}.normed"] = torch.tensor(1, dtype=torch.uint8)
    for kind, layer, delta in adapter.of_layers:
        parts = WRITERS.get(kind, type(delta).parts)(delta)
        tensors |= {f"{kind}.{layer}.{part}": tensor for part, tensor in parts.items()}
    what = f" for: {', '.join(card.concepts)}" if card.concepts else ""
    metadata = card_metadata(card) | {
        "membrane.format": FORMAT,
        "membrane.version": str(version),
        "modelspec.architecture": card.family or "unknown",
        "modelspec.description": f"Erasure adapter ({card.method}){what}",
    }
    save_whole(tensors, path, metadata)


def _version(adapter):
    """The oldest version that can hold an adapter."""
    maps = adapter.maps
    if set(maps) - OLD_MAPS.keys() or any(found.normed for found in maps.values()):
        return VERSION
    if set(adapter.deltas) - {"map", "low_rank", "mask"}:
        return VERSION
    if adapter.masks:
        return MASKS_VERSION
    return LAYERS_VERSION if adapter.low_rank or "pooled" in maps else TEXT_MAP_VERSION


def _low_rank_parts(change):
    parts = {"up": own(change.up), "down": own(change.down), "alpha": torch.tensor(change.alpha, dtype=torch.float64)}
    return parts if change.bias is None else {**parts, "bias": own(change.bias)}


def _mask_parts(mask):
    deflated = zlib.compress(mask.bits.contiguous().numpy().tobytes(), 9)
    parts = {"bits": torch.frombuffer(bytearray(deflated), dtype=torch.uint8), "shape": torch.tensor(mask.shape)}
    return parts if mask.kept is None else {**parts, "kept": own(mask.kept).half()}


WRITERS = {"low_rank": _low_rank_parts, "mask": _mask_parts}  # other kinds say it themselves


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
    deltas = {"map": _maps(name, tensors, card)}
    for kind, cls in KINDS.items():
        if not cls.of_text:
            deltas[kind] = READERS.get(kind, partial(_of_kind, cls))(name, _by_layer(tensors, f"{kind}."))
    if not any(deltas.values()):
        raise ErasureError(f'"{name}" lacks {", ".join(TEXT_MAP)}; it is damaged, save the adapter again.')
    return ErasureAdapter(card, deltas, name)


def _maps(name, tensors, card):
    """{entry: TextMap} under the names of all versions."""
    found = {entry: old for entry, old in OLD_MAPS.items() if any(f"{old}.{part}" in tensors for part in MAP_PARTS)}
    found |= {place: MAP + place for place in _by_layer(tensors, MAP)}
    return {entry: _text_map(name, tensors, card, prefix) for entry, prefix in found.items()}


def _changes(name, layers):
    return {layer: low_rank(name, layer, parts) for layer, parts in layers.items()}


def _of_kind(cls, name, layers):
    """{layer: delta} of a kind that reads itself."""
    found = {}
    for layer, parts in layers.items():
        try:
            found[layer] = cls.of_parts(parts)
        except (ErasureError, KeyError, RuntimeError, ValueError) as error:
            raise ErasureError(
                f'"{name}" holds a change of {layer} ({cls.kind}) that does not fit together ({error}); it is damaged, '
                "save the adapter again."
            ) from error
    return found


def _by_layer(tensors, prefix):
    """{layer: {part: tensor}} of the tensors whose names start with a prefix."""
    layers = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            layer, _, part = key.removeprefix(prefix).rpartition(".")
            layers.setdefault(layer, {})[part] = tensor
    return layers


def _masks(name, layers):
    """{layer: Mask}; all shapes are looked at before anything is inflated."""
    shapes = {layer: _mask_shape(name, layer, parts) for layer, parts in layers.items()}
    if sum(out * inside for out, inside in shapes.values()) > LARGEST_MODEL:
        raise ErasureError(
            f'"{name}" holds masks of more than {LARGEST_MODEL} weights; it is damaged, save the adapter again.'
        )
    return {layer: _mask(name, layer, shapes[layer], parts) for layer, parts in layers.items()}


def _damaged_mask(name, layer, what):
    return ErasureError(f'"{name}" holds a mask of {layer} {what}; it is damaged, save the adapter again.')


def _mask_shape(name, layer, parts):
    """(out, in) of a mask whose parts are of the right kinds."""
    for part, (kind, dimensions) in MASK_PARTS.items():
        if part not in parts and part != "kept":
            raise _damaged_mask(name, layer, f"without its {part}")
        if part in parts and (parts[part].dtype != kind or parts[part].dim() != dimensions):
            raise _damaged_mask(name, layer, f"whose {part} is of the wrong type")
    shape = tuple(parts["shape"][:3].tolist())
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] > LARGEST_LAYER:
        raise _damaged_mask(name, layer, f"of shape {shape}")
    return shape


def _mask(name, layer, shape, parts):
    """Mask of a layer; never inflates more than its shape says."""
    out, inside = shape
    size = inside * -(-out // 8)
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(parts["bits"].numpy().tobytes(), size)
        more = not inflater.eof and inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error as error:
        raise _damaged_mask(name, layer, f"that cannot be unpacked ({error})") from error
    if len(data) != size or more:
        raise _damaged_mask(name, layer, f"with more or fewer bits than its shape {shape} has")
    bits = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(inside, -1)
    kept = parts.get("kept")
    if kept is not None and not torch.isfinite(kept).all():
        raise _damaged_mask(name, layer, "with numbers that are not finite")
    try:
        return Mask(bits, shape, kept)
    except ErasureError as error:
        raise _damaged_mask(name, layer, "that does not fit together") from error


READERS = {"low_rank": _changes, "mask": _masks}  # other kinds say it themselves


def _text_map(name, tensors, card, prefix):
    keys = tuple(f"{prefix}.{part}" for part in MAP_PARTS)
    missing = set(keys) - tensors.keys()
    if missing:
        raise ErasureError(f'"{name}" lacks {", ".join(sorted(missing))}; it is damaged, save the adapter again.')
    if not card.concepts:
        raise ErasureError(f'"{name}" names no concepts; it is damaged, save the adapter again.')
    a, b, concept = (tensors[key] for key in keys)
    if not (a.is_floating_point() and b.is_floating_point()) or concept.dtype not in INTEGERS or concept.dim() != 1:
        raise ErasureError(
            f'"{name}" holds a text map of the wrong number types; it is damaged, save the adapter again.'
        )
    a, b = a.float(), b.float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ErasureError(f'"{name}" holds numbers that are not finite; it is damaged, save the adapter again.')
    owners = tuple(concept.tolist())
    if not owners:
        raise ErasureError(f'"{name}" holds a text map without terms; it is damaged, save the adapter again.')
    if any(not 0 <= i < len(card.concepts) for i in owners):
        raise ErasureError(
            f'"{name}" has terms for concept number {max(owners)} but names {len(card.concepts)} concepts; '
            "it is damaged, save the adapter again."
        )
    return TextMap(a, b, owners, f"{prefix}.normed" in tensors)


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
