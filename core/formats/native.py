"""Membrane's own file: safetensors with the text map's factors and the card as metadata."""

import json
import os

import torch
from safetensors import SafetensorError, safe_open

from ..adapter import Card, ErasureAdapter, TextMap
from ..errors import ErasureError
from .files import card_metadata, save_whole

FORMAT, VERSION = "erasure_adapter", 1
A, B, CONCEPT = "text_map.a", "text_map.b", "text_map.concept"


def save(adapter, path):
    """Writes an adapter; the file appears whole or not at all."""
    card, text_map = adapter.card, adapter.text_map
    tensors = {
        A: text_map.a.float().contiguous(),
        B: text_map.b.float().contiguous(),
        CONCEPT: torch.tensor(text_map.concept, dtype=torch.int32),
    }
    metadata = card_metadata(card) | {
        "membrane.format": FORMAT,
        "membrane.version": str(VERSION),
        "membrane.licence": card.licence,
        "modelspec.architecture": card.family or "unknown",
        "modelspec.description": f"Erasure adapter ({card.method}) for: {', '.join(card.concepts)}",
    }
    save_whole(tensors, path, metadata)


def load(path):
    """Adapter of a native file; raises ErasureError for anything else or a damaged one."""
    name = os.path.basename(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            keys = set(file.keys())
            _check_header(name, metadata, keys)
            tensors = {key: file.get_tensor(key) for key in (A, B, CONCEPT)}
    except (SafetensorError, OSError) as error:
        raise ErasureError(
            f'"{name}" cannot be read as a safetensors file ({error}); download or save it again.'
        ) from error
    a, b, concept = tensors[A], tensors[B], tensors[CONCEPT]
    card = _card(name, metadata)
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
    return ErasureAdapter(card, TextMap(a.float(), b.float(), owners), name)


def _check_header(name, metadata, keys):
    found = metadata.get("membrane.format")
    if found != FORMAT:
        some = ", ".join(sorted(keys)[:3]) or "nothing"
        raise ErasureError(
            f'"{name}" is not a Membrane erasure adapter (it holds {some}); choose a file made by Save Erasure Adapter.'
        )
    version = metadata.get("membrane.version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise ErasureError(
            f'"{name}" is of format version {version or "unknown"}, and this pack reads up to {VERSION}; '
            "update Membrane."
        )
    missing = {A, B, CONCEPT} - keys
    if missing:
        raise ErasureError(f'"{name}" lacks {", ".join(sorted(missing))}; it is damaged, save the adapter again.')


def _card(name, metadata):
    try:
        concepts = json.loads(metadata["membrane.concepts"])
        surrogates = json.loads(metadata.get("membrane.surrogates", "[]"))
        settings = json.loads(metadata.get("membrane.settings", "{}"))
    except (KeyError, ValueError) as error:
        raise ErasureError(f'"{name}" has a damaged description ({error}); save the adapter again.') from error
    if (
        not all(isinstance(x, list) and all(isinstance(s, str) for s in x) for x in (concepts, surrogates))
        or not concepts
    ):
        raise ErasureError(f'"{name}" names no concepts; it is damaged, save the adapter again.')
    return Card(
        metadata.get("membrane.method", ""),
        tuple(concepts),
        tuple(surrogates),
        metadata.get("membrane.family", ""),
        metadata.get("membrane.text_encoder", ""),
        settings if isinstance(settings, dict) else {},
        metadata.get("membrane.licence", ""),
    )
