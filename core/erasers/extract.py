"""From whole weights to an adapter: what an edit changed in each layer, as factors of low rank.

Closed-form edits (UCE, RECE, SPEED) are of low rank by construction; for others the truncated singular value
decomposition is the closest change of its rank (Eckart and Young 1936).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from ..adapters.adapter import Card, ErasureAdapter
from ..adapters.deltas.low_rank import LowRank
from ..errors import ErasureError
from ..families.table import by_text_width, role
from ..formats.factors import balanced

ROUNDING = 5e-4  # relative size of what storing a layer in float16 changes at most
RMS = 0.25  # of rounding to nearest, relative, in units of the number type's eps: 0.21 and a margin
FULL_RANK = 0.3  # share of the possible rank that holds MOST of a difference; above, it is of no low rank
MOST = 0.9
SAME_MAP = 10  # times what rounding explains; a difference this near to one map of the text is a closed-form edit
EXACT = 1e-10  # the same as a share of the weights, for numbers that were not rounded
KEPT = 0.3  # share of numbers that training in low precision leaves as they were, at least
EQUAL = 0.5  # share of a whole U-Net's layers that an edit leaves as they were, at least

TEXT_READERS = ("cross_attention.key", "cross_attention.value")


@dataclass(frozen=True)
class BaseLayer:
    """A layer of the base model.

    site: its name in the adapter; read(): (weight, bias or None) on the CPU, called at most once.
    """

    site: str
    read: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, eq=False)
class _Difference:
    """How one layer differs. state: equal, rounding, changed, or other for a change that no factors express."""

    site: str
    state: str
    size: float = 0.0  # relative to the weight
    change: LowRank | None = None
    energy: float = 0.0  # squared norm
    discarded: float = 0.0  # of the energy
    truncated: bool = False  # for want of rank
    spread: float = 0.0  # share of the possible rank that holds MOST of the energy
    kept: float = 0.0  # share of the weight's numbers that are as they were


def extract(base, edited, concepts=(), family="", energy=0.999, max_rank=128, on_progress=None):
    """Adapter that turns a base model's layers into edited ones at strength 1, and a report in words.

    base: {site: BaseLayer} with every spelling of a layer's site leading to the same BaseLayer; edited:
    EditedWeights. energy: share of each difference's squared norm to keep, up to max_rank; what rounding to the
    stored number types explains is not kept. concepts, family: for the card. on_progress(layers done).
    Raises ErasureError when no layer is in the base model, a shape differs, or nothing was changed.
    """
    layers = edited.layers()
    known = [layer for layer in layers if layer in base]
    if not known:
        raise ErasureError(
            f'"{edited.name}" holds {len(layers)} layers ({_some(layers)}), none of which the connected model has '
            f"(its {len({layer.site for layer in base.values()})} layers are {_some(base)}); connect the base model "
            "it was made from."
        )
    found, text = [], _OneMap()
    for i, layer in enumerate(known):
        found.append(_compare(base[layer], edited, layer, energy, max_rank, text))
        if on_progress:
            on_progress(i + 1)
    changes = {d.site: d.change for d in found if d.state == "changed"}
    if not changes:
        raise ErasureError(
            f'"{edited.name}" has no change that an adapter can hold: of the {len(found)} layers compared with the '
            f"connected model, {sum(d.state == 'other' for d in found)} differ by more than rounding; connect the "
            "base model from before the edit, and the edited weights."
        )
    settings = {"extracted_from": edited.name, "energy": energy, "max_rank": max_rank}
    card = Card(edited.source, tuple(concepts), family=family, settings=settings)
    unknown = [layer for layer in layers if layer not in base]
    return ErasureAdapter(card, {"low_rank": changes}), _report(edited, found, unknown, max_rank, text)


class _OneMap:
    """Whether the differences of the layers that read the text are one map of it, D_l = W_l E, as every edit in closed
    form makes (UCE, Gandikota et al. 2024, eq. 7, factored)."""

    def __init__(self):
        self.layers, self.others = 0, 0
        self.gram = self.product = None  # sums of W^T W and W^T D, (d, d) float64
        self.size = self.noise = self.difference = 0.0

    def add(self, site, weight, delta, noise):
        if role(site) not in TEXT_READERS or (self.gram is not None and self.gram.shape[0] != weight.shape[1]):
            self.others += 1
            return
        weight, delta = weight.double(), delta.double()
        gram, product = weight.T @ weight, weight.T @ delta
        self.gram, self.product = (gram, product) if self.gram is None else (self.gram + gram, self.product + product)
        self.size += weight.square().sum().item()
        self.difference += delta.square().sum().item()
        self.noise += noise
        self.layers += 1

    def explains(self):
        """True when one map leaves no more of the differences than rounding."""
        if self.layers < 2 or self.others:
            return False
        ridge = 1e-9 * self.gram.diagonal().mean()
        e = torch.linalg.solve(self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64), self.product)
        rest = self.difference - 2 * (e * self.product).sum().item() + (e * (self.gram @ e)).sum().item()
        return rest <= max(SAME_MAP * self.noise, EXACT * self.size)


def _compare(layer, edited, name, energy, max_rank, text):
    """_Difference of one layer; name: what the edited weights call it."""
    weight, bias = layer.read()
    new_weight, new_bias = (edited.tensors.get((name, kind)) for kind in ("weight", "bias"))
    _require_fit(edited.name, name, weight, new_weight)
    _require_fit(edited.name, f"the bias of {name}", bias, new_bias)
    delta, size = _delta(weight, new_weight)
    bias_delta, bias_size = _delta(bias, new_bias)
    size = max(size, bias_size)
    if delta is None and bias_delta is None:
        return _Difference(layer.site, "rounding" if size else "equal", size)
    if weight.dim() not in (2, 4):
        return _Difference(layer.site, "other", size)
    if delta is None:
        delta, new_weight = torch.zeros(weight.shape), weight
    touched = delta != 0
    eps = max(torch.finfo(_stored_as(tensor)).eps for tensor in (weight, new_weight))
    noise = (RMS * eps) ** 2 * (weight.float() * touched).square().sum().item()
    text.add(layer.site, weight, delta, noise)
    change, energies = _factors(delta, energy, noise, max_rank, bias_delta)
    total, discarded = energies.sum().item(), energies[change.rank :].sum().item()
    return _Difference(
        layer.site,
        "changed",
        size,
        change,
        total,
        discarded,
        discarded > max((1 - energy) * total, noise),
        _rank_within((1 - MOST) * total, energies) / len(energies),
        1 - touched.float().mean().item(),
    )


def _require_fit(name, layer, old, new):
    """Raises ErasureError where new does not have the shape of old, up to a 1x1 convolution's, or is not finite."""
    if new is None:
        return
    if old is None or _plain(old.shape) != _plain(new.shape):
        found, wanted = (_described(layer, tensor) for tensor in (new, old))
        raise ErasureError(
            f'"{name}" does not fit the connected model: {layer} is {found} in it and {wanted} in the model; connect '
            "the base model it was made from."
        )
    if not torch.isfinite(new.float()).all():
        raise ErasureError(
            f'"{name}" holds numbers that are not finite in {layer}; the file is damaged or its training failed, get '
            "another one."
        )


def _plain(shape):
    return shape[:2] if shape[2:] == (1, 1) else shape


def _described(layer, tensor):
    """A shape in words, with the family it tells of."""
    if tensor is None:
        return "missing"
    family = by_text_width(tensor.shape[-1]) if role(layer) in TEXT_READERS else None
    return " x ".join(map(str, tensor.shape)) + (f" ({family.title})" if family else "")


def _delta(old, new):
    """What an edit added to a weight or a bias, float32, or None where rounding explains it; and its relative size.

    The size is 0 where nothing differs, and the whole difference's where rounding explains it.
    """
    if new is None or (new.dtype == old.dtype and torch.equal(new.reshape(old.shape), old)):
        return None, 0.0
    stored, new = _stored_as(old), new.reshape(old.shape)
    old, kind, new = old.float(), new.dtype, new.float()
    delta = new - old
    size = (delta.norm() / old.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    if torch.finfo(kind).bits < 32:
        # What the new type makes of an old number is no change. Where the old one is rounded already, what it was
        # before may have gone to either side.
        slack = old.abs() * torch.finfo(stored).eps / 2 if torch.finfo(stored).eps < torch.finfo(kind).eps else 0.0
        low, high = ((old + sign * slack).to(kind).float() for sign in (-1, 1))
        delta[(low <= new) & (new <= high)] = 0
    rounded = size < ROUNDING or not delta.any() or torch.equal(new.to(stored).float(), old)
    return (None if rounded else delta), size


def _stored_as(tensor):
    """The narrowest number type that holds a tensor's numbers, which may have been widened since."""
    if tensor.element_size() < 4:
        return tensor.dtype
    kinds = (torch.bfloat16, torch.float16)
    return next((kind for kind in kinds if torch.equal(tensor.to(kind).to(tensor.dtype), tensor)), torch.float32)


def _factors(delta, energy, noise, max_rank, bias):
    """The LowRank nearest to a difference, and the squared singular values of the latter, falling.

    Of the smallest rank up to max_rank that leaves out no more than 1 - energy of the sum of squares, or than noise,
    the part of it that rounding made. From the eigenvectors of the smaller Gram matrix, in float64: an orthonormal
    basis Q of the leading ones gives Q (Q^T delta), which needs no division by small singular values.
    """
    matrix = delta.flatten(1).double()
    wide = matrix.shape[0] <= matrix.shape[1]
    energies, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    total = energies.sum().item()
    digits = len(energies) * torch.finfo(torch.float64).eps
    rank = min(_rank_within(max((1 - energy) * total, noise, digits * total), energies), max_rank)
    basis = vectors[:, :rank]
    up, down = balanced(*((basis, basis.T @ matrix) if wide else (matrix @ basis, basis.T)))
    if _plain(delta.shape) == delta.shape:
        down = down.reshape(rank, *delta.shape[1:])
    return LowRank(up.contiguous(), down.contiguous(), float(rank), bias), energies


def _rank_within(allowed, energies):
    """The smallest rank, at least 1, that leaves out no more than the allowed energy."""
    rest = energies.sum() - energies.cumsum(0)
    return min(int((rest > allowed).sum()) + 1, len(energies))


def _report(edited, found, unknown, max_rank, text):
    """What was compared, kept and left out, and whether the base model looks like the right one; a line each."""
    by_state = {state: [d for d in found if d.state == state] for state in ("changed", "equal", "rounding", "other")}
    changed = by_state["changed"]
    ranks = [d.change.rank for d in changed]
    energy = sum(d.energy for d in changed)
    worst = max(changed, key=lambda d: d.discarded / d.energy if d.energy else 0.0)
    lost, worst_lost = (
        sum(d.discarded for d in changed) / energy if energy else 0.0,
        worst.discarded / (worst.energy or 1),
    )
    factors = [t for d in changed for t in (d.change.up, d.change.down, d.change.bias) if t is not None]
    lines = [
        f"{edited.name} ({edited.source}): {len(found)} layers compared, {len(changed)} changed, "
        f"{len(by_state['equal'])} equal, {len(by_state['rounding'])} different by rounding only (below {ROUNDING:g}).",
        f"Rank {min(ranks)} to {max(ranks)}; discarded {lost:.3%} of the squared change, at most {worst_lost:.3%} "
        f"({worst.site}).",
        f"Size of the factors: {sum(t.nbytes for t in factors) / 1e6:.2f} MB.",
    ]
    cut = sum(d.truncated for d in changed)
    if cut:
        lines.append(f"{cut} layers need more than max_rank {max_rank} for the energy asked for.")
    if by_state["other"]:
        names = [d.site for d in by_state["other"]]
        lines.append(f"Left out, as low-rank factors cannot express them: {len(names)} layers ({_some(names)}).")
    if unknown:
        lines.append(f"Left out, as the connected model does not have them: {len(unknown)} layers ({_some(unknown)}).")
    lines.extend(_evidence(edited, found, changed, text))
    return "\n".join(lines)


def _evidence(edited, found, changed, text):
    """A line on how the differences speak for or against the base model, or none."""
    sizes = [d.size for d in changed]
    by = f"by {min(sizes):.2%} to {max(sizes):.2%} of their weights"
    if edited.whole:
        equal = sum(d.state in ("equal", "rounding") for d in found)
        share = f"{equal} of {len(found)} layers equal the connected model's ({equal / len(found):.0%})"
        if equal >= EQUAL * len(found):
            yield f"Base model: {share}, as of an edit of this very model."
        else:
            yield (
                f"WARNING: only {share}, the others differ {by}; either all layers were trained, or these weights "
                "were made from another base model and the adapter carries the difference of the two as well."
            )
        return
    spread, kept = median(d.spread for d in changed), median(d.kept for d in changed)
    if text.explains():
        yield (
            f"Base model: the differences of all {text.layers} layers are one map of the text, as of an edit of this "
            "very model."
        )
    elif kept >= KEPT:
        yield f"Base model: {kept:.0%} of the numbers are unchanged (median), as of training from this very model."
    elif text.others and spread <= FULL_RANK:
        yield (
            f"Base model: {MOST:.0%} of the difference lies in {spread:.0%} of the possible rank (median), "
            "as of an edit of this very model."
        )
    elif len(changed) > 1:
        yield (
            f"WARNING: all of the {len(changed)} layers differ {by}, neither in few directions nor by one map of the "
            "text; these weights were probably made from another base model, and the adapter carries the difference "
            "of the two as well."
        )


def _some(names):
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
