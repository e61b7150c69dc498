"""Which weights of the feed-forward blocks belong to memorised pictures or to a concept.

Chavhan et al. 2024, "Memorized Images in Diffusion Models share a Subspace that can be Located and Deleted", and
ConceptPrune (Chavhan et al., ICLR 2025): Wanda scores (Sun et al. 2024) of the second linear layer of each block, for
the prompts in question against base prompts, in each of the first steps of the sampling.
"""

from dataclasses import dataclass, field

import torch

from ..adapters.deltas.mask import Mask
from ..errors import ErasureError


def base_for(prompts, base):
    """As many base prompts as prompts, of a list of those given, or of one or none (the empty prompt) repeated."""
    lines = base or [""]
    if len(lines) not in (1, len(prompts)):
        raise ErasureError(
            f"There are {len(prompts)} prompts and {len(lines)} base prompts; expected one base prompt for each, or "
            "one for all, or none."
        )
    return lines if len(lines) == len(prompts) else lines * len(prompts)


def squares(hidden):
    """sum_r h_rj^2 / ||h_r||^2, (in,) float64, over rows h_r of hidden (..., in): the square of Wanda's column norm of
    rows that are scaled to length 1, as the published code scales them. Rows of zeros count as zeros."""
    rows = hidden.reshape(-1, hidden.shape[-1]).float()
    lengths = rows.norm(dim=1, keepdim=True)
    return (rows / lengths.clamp_min(torch.finfo(torch.float32).tiny)).square().sum(dim=0, dtype=torch.float64).cpu()


@dataclass
class Activity:
    """What a set of prompts does in each layer at each noise level.

    sums: {layer: {sigma: (in,) float64}}, squared column norms, see squares(); rows: {layer: {sigma: rows seen}}.
    """

    sums: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)

    def add(self, layer, sigma, hidden, times=1):
        """Counts the rows of hidden (..., in); times: how many equal prompts they stand for."""
        sums, rows = self.sums.setdefault(layer, {}), self.rows.setdefault(layer, {})
        found = squares(hidden) * times
        sums[sigma] = sums[sigma] + found if sigma in sums else found
        rows[sigma] = rows.get(sigma, 0) + hidden[..., 0].numel() * times

    def norms(self, layer):
        """{sigma: (in,) float64} column norms A of a layer, from the noisiest level on."""
        return {sigma: self.sums[layer][sigma].sqrt() for sigma in sorted(self.sums[layer], reverse=True)}


def marks(weight, target, base, count):
    """(out, in) bool: what belongs to the target at one noise level.

    S_ij = |W_ij| A_j; marked are, in each row i, those of the `count` largest S_target that are also larger than
    S_base. As |W| is common to both, the second is a gate on columns: A_target,j > A_base,j. Zeros are never marked.

    weight: (out, in); target, base: column norms (in,).
    """
    scores = weight.abs() * target.to(weight)
    found = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)
    return found & (target > base) & (weight != 0)


def locate(layers, target, base, sparsity, first_steps, select=0.0):
    """{layer: Mask}: M = [sum over the first noise levels of marks() > select * levels]; select = 0 is their union.

    layers: iterable of (layer, weight (out, in)), read one at a time; target, base: Activity of as many rows;
    sparsity: rho, the share of each row of a weight that may be marked at one level, rounded down.

    Raises ErasureError where the two sets were not seen at the same noise levels, or nothing could be marked.
    """
    found = {}
    for layer, weight in layers:
        levels = list(target.norms(layer))[:first_steps]
        require_equal(layer, target, base, first_steps)
        count = int(sparsity * weight.shape[1])
        if count < 1:
            raise ErasureError(
                f"A sparsity of {sparsity:g} marks no weight of {layer}, whose rows have {weight.shape[1]} weights; "
                f"raise it to at least {1 / weight.shape[1]:.2g}."
            )
        wanted, other, counts = target.norms(layer), base.norms(layer), torch.zeros(weight.shape, dtype=torch.int16)
        for sigma in levels:
            counts += marks(weight, wanted[sigma], other[sigma], count)
        found[layer] = Mask.of(counts > select * len(levels))
    return found


def require_equal(layer, target, base, first_steps):
    """Raises ErasureError unless both sets have the same levels and, as the norms are sums, equally many rows."""
    seen, other = target.rows[layer], base.rows.get(layer, {})
    if seen != other or len(seen) < first_steps:
        raise ErasureError(
            f"The two sets of prompts were seen at {len(seen)} and {len(other)} noise levels with "
            f"{sum(seen.values())} and {sum(other.values())} rows in {layer}, expected {first_steps} or more levels "
            "and equal numbers; choose a sampler with a fixed schedule, such as euler."
        )


def overlap(one, other):
    """Mean over the layers of both of the intersection over union of two {layer: Mask}; 1 where both are empty."""
    ratios = []
    for layer in one.keys() & other.keys():
        a, b = one[layer].marks(), other[layer].marks()
        union = (a | b).sum().item()
        ratios.append((a & b).sum().item() / union if union else 1.0)
    return sum(ratios) / len(ratios)


def union(masks):
    """{layer: Mask} of what any of several {layer: Mask} marks."""
    layers = dict.fromkeys(layer for found in masks for layer in found)
    return {
        layer: Mask.of(torch.stack([found[layer].marks() for found in masks if layer in found]).any(dim=0))
        for layer in layers
    }


def report(masks, total=None):
    """The density of each layer as text, then of all; total: number of weights of the denoiser, for its share."""
    width = max(map(len, masks))
    lines = [f"{layer:{width}}  {mask.density:7.2%}" for layer, mask in masks.items()]
    marked = sum(mask.marked for mask in masks.values())
    of_these = marked / sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    share = f", {marked / total:.3%} of the denoiser" if total else ""
    return "\n".join([*lines, f"marked: {marked:,} weights, {of_these:.2%} of these layers{share}"])
