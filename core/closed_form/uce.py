"""Unified Concept Editing (Gandikota et al., WACV 2024) in its weight-free form."""

import torch

from .text_map import compress, gram, ridge_rows


def uce_terms(targets, replacements, preserve, *, erase_scale=1.0, preserve_scale=1.0, anchor=0.5):
    """Factors U (d, E), V (E, d), float64, with W_new = W (I + U V) for every edited matrix.

    targets C, replacements N: (E, d), row i is sent to row i; preserve R: (F, d). Minimises
    sum ||W' c - W n||^2 s + sum ||W' r - W r||^2 p + anchor ||W' - W||^2 (eq. 5 to 7): the numerator is
    W (G + s (N - C)^T C), so W cancels.
    """
    rows = ridge_rows(targets, gram(preserve, preserve_scale), erase_scale, anchor)
    return erase_scale * (replacements - targets).T, rows


def uce(targets, replacements, preserve, concept, count, **scales):
    """TextMap of UCE. concept: (E,) long, which concept a target row belongs to; count: how many there are."""
    targets, replacements, preserve = (t.to(torch.float64) for t in (targets, replacements, preserve))
    return compress(*uce_terms(targets, replacements, preserve, **scales), concept, count)
