"""Membrane's own file: safetensors with an adapter's deltas as tensors and its card as metadata.

What each version holds, where <site> is a layer and <entry> a text entry:

1   the map of the main text: text_map.a, text_map.b, text_map.concept.
2   also a map of the pooled vector, pooled_map.a, .b, .concept, and low-rank changes of layers: low_rank.<site>.up,
    .down, .alpha and, where the layer's bias changes, .bias.
3   also masks: mask.<site>.bits (packed bits, deflated by zlib), .shape (out, in) and, where something is left of the
    marked weights, .kept.
4   maps of any entry, map.<entry>.a, .b, .concept and, where the rows were taken after a norm, .normed; and every
    other kind of delta as <kind>.<site>.<part>. The low-rank changes and masks of versions 2 and 3 stay.

Maps of every version may have probes: <map>.probe (vectors), .probe_concept and .probe_range (low, high). Releases that
do not know them read the map without. Those of adapters that change layers are probes.<entry>.probe and so on.

A file gets the oldest version that can hold its adapter, so that older releases read what they can.
"""

import zlib
from dataclasses import replace
from functools import partial

import torch

from ..adapters.adapter import ErasureAdapter
from ..adapters.deltas.delta import KINDS
from ..adapters.deltas.mask import Mask
from ..adapters.deltas.text_map import TextMap
from ..adapters.probe import Probe
from ..errors import ErasureError
from ..files import save_whole
from . import containers
from .card import card_metadata, read_card
from .factors import low_rank
from .format import Format

MARK = "erasure_adapter"  # membrane.format
TEXT_MAP_VERSION, LAYERS_VERSION, MASKS_VERSION, VERSION = 1, 2, 3, 4
MAP_PARTS = ("a", "b", "concept")
OLD_MAPS = {"text": "text_map", "pooled": "pooled_map"}  # names of versions 1 to 3
MAP, PROBES = "map.", "probes."
PROBE_PARTS = ("probe", "probe_concept", "probe_range")
MASK_PARTS = {"bits": (torch.uint8, 1), "shape": (torch.int64, 1), "kept": (torch.float16, 1)}  # type, dimensions
LARGEST_LAYER, LARGEST_MODEL = 2**28, 2**33  # weights; bound what a few deflated bytes may grow to
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def save(adapter, path):
    """Writes an adapter; the file appears whole or not at all. Factors of layers keep their number types."""
    card, version, tensors = adapter.card, _version(adapter), {}
    for entry, found in adapter.maps.items():
        prefix = MAP + entry if version == VERSION else OLD_MAPS[entry]
        owners = torch.tensor(found.concept, dtype=torch.int32)
        tensors |= {f"{prefix}.a": found.a.float(), f"{prefix}.b": found.b.float(), f"{prefix}.concept": owners}
        tensors |= _probe_tensors(prefix, found.probes)
        if found.normed:
            tensors[f"{prefix}.normed"] = torch.tensor(1, dtype=torch.uint8)
    for kind, layer, delta in adapter.of_layers:
        parts = WRITERS.get(kind, type(delta).parts)(delta)
        tensors |= {f"{kind}.{layer}.{part}": tensor for part, tensor in parts.items()}
    for entry, probes in adapter.layer_probes.items():
        tensors |= _probe_tensors(PROBES + entry, probes)
    what = f" for: {', '.join(card.concepts)}" if card.concepts else ""
    metadata = card_metadata(card) | {
        "membrane.format": MARK,
        "membrane.version": str(version),
        "modelspec.architecture": card.family or "unknown",
        "modelspec.description": f"Erasure adapter ({card.method}){what}",
    }
    save_whole(tensors, path, metadata)


def _probe_tensors(prefix, probes):
    if not probes:
        return {}
    found = (
        torch.stack([probe.vector.float() for probe in probes]),
        torch.tensor([probe.concept for probe in probes], dtype=torch.int32),
        torch.tensor([[probe.low, probe.high] for probe in probes], dtype=torch.float64),
    )
    return {f"{prefix}.{part}": tensor for part, tensor in zip(PROBE_PARTS, found)}


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
    parts = {"up": change.up, "down": change.down, "alpha": torch.tensor(change.alpha, dtype=torch.float64)}
    return parts if change.bias is None else {**parts, "bias": change.bias}


def _mask_parts(mask):
    deflated = zlib.compress(mask.bits.contiguous().numpy().tobytes(), 9)
    parts = {"bits": torch.frombuffer(bytearray(deflated), dtype=torch.uint8), "shape": torch.tensor(mask.shape)}
    return parts if mask.kept is None else {**parts, "kept": mask.kept.half()}


WRITERS = {"low_rank": _low_rank_parts, "mask": _mask_parts}  # all other kinds by their own parts()


def load(path):
    """Adapter of a native file; raises ErasureError for anything else or a damaged one."""
    return parse(containers.read(path))


def recognises(contents):
    """Whether a file says that it is one."""
    return contents.metadata.get("membrane.format") == MARK


def parse(contents):
    """Adapter of the contents of a native file; raises ErasureError for anything else or a damaged one."""
    name, tensors = contents.name, contents.tensors
    _check_header(contents)
    own_card = card(contents)
    deltas = {"map": _maps(name, tensors, own_card)}
    for kind, cls in KINDS.items():
        if not cls.of_text:
            deltas[kind] = READERS.get(kind, partial(_of_kind, cls))(name, _by_layer(tensors, f"{kind}."))
    if not any(deltas.values()):
        keys = ", ".join(f"{OLD_MAPS['text']}.{part}" for part in MAP_PARTS)
        raise ErasureError(f'"{name}" lacks {keys}; it is damaged, save the adapter again.')
    return ErasureAdapter(own_card, deltas, name, _layer_probes(name, tensors, own_card))


def card(contents):
    """Card of the contents of a native file; raises ErasureError where it is damaged."""
    return read_card(contents.name, contents.metadata)


FORMAT = Format("Membrane", recognises, parse, card, save, declared=True)


def _maps(name, tensors, card):
    """{entry: TextMap} under the names of all versions."""
    found = {entry: old for entry, old in OLD_MAPS.items() if any(f"{old}.{part}" in tensors for part in MAP_PARTS)}
    found |= {place: MAP + place for place in _by_layer(tensors, MAP)}
    return {entry: _text_map(name, tensors, card, prefix) for entry, prefix in found.items()}


def _changes(name, layers):
    return {layer: low_rank(name, layer, parts) for layer, parts in layers.items()}


def _of_kind(cls, name, layers):
    """{layer: delta} of a kind that reads its own parts."""
    found = {}
    for layer, parts in layers.items():
        for part, tensor in parts.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise ErasureError(
                    f'"{name}" holds numbers that are not finite in {part} of {layer}; it is damaged, get it again.'
                )
        try:  # copies, which do not hang on the file
            found[layer] = cls.of_parts({part: tensor.clone() for part, tensor in parts.items()})
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


READERS = {"low_rank": _changes, "mask": _masks}  # all other kinds by their own of_parts()


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
    found = TextMap(a, b, owners, f"{prefix}.normed" in tensors)
    return replace(found, probes=_probes(name, tensors, card, prefix, found.width))


def _layer_probes(name, tensors, card):
    """{text entry: Probes} of an adapter that changes layers."""
    entries = _by_layer(tensors, PROBES)
    if entries and not card.concepts:
        raise ErasureError(f'"{name}" names no concepts; it is damaged, save the adapter again.')
    found = {entry: _probes(name, tensors, card, PROBES + entry) for entry in entries}
    return {entry: probes for entry, probes in found.items() if probes}


def _probes(name, tensors, card, prefix, width=None):
    """Probes of a text map of a width, None for any; none where the file has none."""
    found = [tensors.get(f"{prefix}.{part}") for part in PROBE_PARTS]
    if all(tensor is None for tensor in found):
        return ()
    damaged = ErasureError(f'"{name}" holds probes that do not fit together; it is damaged, save the adapter again.')
    if any(tensor is None for tensor in found):
        raise damaged
    vectors, owners, ranges = found
    count = owners.numel()
    width = vectors.shape[-1] if width is None and vectors.dim() == 2 else width
    fit = owners.dim() == 1 and vectors.shape == (count, width) and ranges.shape == (count, 2)
    types = vectors.is_floating_point() and ranges.is_floating_point() and owners.dtype in INTEGERS
    if not (fit and types) or any(not 0 <= i < len(card.concepts) for i in owners.tolist()):
        raise damaged
    each = zip(owners.tolist(), vectors.float(), ranges.tolist())
    try:
        return tuple(Probe(concept, vector.clone(), *ends) for concept, vector, ends in each)
    except ErasureError as error:
        raise damaged from error


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
    if version == str(VERSION):
        _require_known_kinds(name, contents.tensors)


def _require_known_kinds(name, tensors):
    """Raises ErasureError for deltas of a later release, without which the others would erase less than they say."""
    known = tuple(f"{kind}." for kind in (*KINDS, *OLD_MAPS.values())) + (PROBES,)
    unknown = [key for key in tensors if not key.startswith(known)]
    if unknown:
        raise ErasureError(
            f'"{name}" holds {len(unknown)} tensors of a kind of change that this pack does not know '
            f"({', '.join(sorted(unknown)[:3])}); update Membrane."
        )
