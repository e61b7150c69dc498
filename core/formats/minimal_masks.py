"""Masks of Minimalist Concept Erasure (2025) for Flux.1: lists of numbers, each list with one tensor a layer.

A number is a logit; the published program keeps what is above 0. ff: 38 of (12288,), behind the activation of the
feed-forward layers of the picture and of the text of 19 blocks in turn. attn: 57 of (24,), the heads of 19 double and
38 single blocks. norm: 19 of (18432,), what the modulation of the text puts out.
"""

import torch

from ..adapters.adapter import Card, ErasureAdapter
from ..adapters.deltas.neurons import Neurons
from ..errors import ErasureError
from .format import Format

DOUBLE, SINGLE, HEADS, WIDTH = 19, 38, 24, 3072
FF, ATTENTION, NORM = (2 * DOUBLE, 4 * WIDTH), (DOUBLE + SINGLE, HEADS), (DOUBLE, 6 * WIDTH)


def recognises(contents):
    """Whether a file is a list of as many numbers as one of these."""
    return contents.listed and _kind(contents) is not None


def parse(contents):
    """Adapter of such a file; raises ErasureError for one that cannot be told exactly, or masks nothing."""
    kind, lists = _kind(contents), list(contents.tensors.values())
    if not all(tensor.is_floating_point() and torch.isfinite(tensor).all() for tensor in lists):
        raise ErasureError(f'"{contents.name}" holds masks that are no finite numbers; get it again.')
    off = [tensor.float() <= 0 for tensor in lists]
    if not any(bool(marks.any()) for marks in off):
        raise ErasureError(
            f'"{contents.name}" masks nothing: none of its {sum(map(len, off))} numbers is below 0; use the file of '
            "the feed-forward layers (ff.pt) of the same erasure."
        )
    if kind == NORM:
        raise ErasureError(
            f'"{contents.name}" masks what the modulation of the text puts out, its biases included, which an adapter '
            "cannot do; use the file of the feed-forward layers (ff.pt) of the same erasure."
        )
    changes = _neurons(off) if kind == FF else _heads(off)
    return ErasureAdapter(card(contents), {"neurons": changes}, contents.name)


def card(contents):
    """Card of such a file, which does not say what it erases."""
    return Card("Minimalist Concept Erasure", ())


def _kind(contents):
    shapes = {tuple(tensor.shape) for tensor in contents.tensors.values()}
    return next(
        (kind for kind in (FF, ATTENTION, NORM) if len(contents.tensors) == kind[0] and shapes == {kind[1:]}), None
    )


def _neurons(off):
    streams = ("img", "txt")
    names = [f"double_blocks_{block}_{stream}_mlp_2" for block in range(DOUBLE) for stream in streams]
    return {name: Neurons(marks, WIDTH) for name, marks in zip(names, off) if marks.any()}


def _heads(off):
    changes = {}
    for block, marks in enumerate(off):
        if not marks.any():
            continue
        inputs = marks.repeat_interleave(WIDTH // HEADS)
        if block < DOUBLE:
            for stream in ("img", "txt"):
                changes[f"double_blocks_{block}_{stream}_attn_proj"] = Neurons(inputs, WIDTH)
        else:  # the single blocks' layer reads their feed-forward layer behind the attention
            inputs = torch.cat([inputs, inputs.new_zeros(4 * WIDTH)])
            changes[f"single_blocks_{block - DOUBLE}_linear2"] = Neurons(inputs, WIDTH)
    return changes


FORMAT = Format("Minimalist Concept Erasure", recognises, parse, card)
