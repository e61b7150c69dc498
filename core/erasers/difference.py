"""How one layer differs from what it was: by rounding only, by weights set to 0, by factors of low rank, or by what
neither expresses."""

from dataclasses import dataclass

import torch

from ..adapters.deltas.low_rank import LowRank
from ..adapters.deltas.mask import Mask
from ..errors import ErasureError
from ..families.table import by_text_width, role
from ..formats.factors import balanced

ROUNDING = 5e-4  # relative size of what storing a layer in float16 changes at most
RMS = 0.25  # of rounding to nearest, relative, in units of the number type's eps: 0.21 and a margin
MOST = 0.9  # share of a difference's squared norm whose rank tells whether it is of low rank
SAME_MAP = 10  # times what rounding explains; a difference this near to one map of the text is a closed-form edit
EXACT = (
    1e-5  # share of a squared difference that one map leaves of an edit without rounding: UCE's script in float32 1e-6
)
ONE_MAP = (
    0.1  # the same of one whose layers were each edited a little differently, as SPEED's 2e-3; another base model: 0.4
)

TEXT_READERS = ("cross_attention.key", "cross_attention.value")
CHANGED, EQUAL, ROUNDED, OTHER = "changed", "equal", "rounding", "other"


@dataclass(frozen=True, eq=False)
class Difference:
    """How one layer differs.

    site: of the layer; state: CHANGED, EQUAL, ROUNDED (rounding explains it) or OTHER (no factors express it); size:
    of the difference, relative to the weight. Of a changed layer also: change: the difference as a LowRank, or as a
    Mask where all that changed became 0; energy: its squared norm; discarded: how much of that a LowRank leaves out;
    truncated: whether for want of rank;
    spread: share of the possible rank that holds MOST of the energy; rank: share of it that the change has, 1 when that
    was cut off; kept: share of the weight's numbers that are as
    they were.
    """

    site: str
    state: str
    size: float = 0.0
    change: LowRank | Mask | None = None
    energy: float = 0.0
    discarded: float = 0.0
    truncated: bool = False
    spread: float = 0.0
    rank: float = 0.0
    kept: float = 0.0


class OneMap:
    """Whether the differences of the layers that read the text are one map of it, D_l = W_l E.

    Every edit in closed form makes such differences (UCE, Gandikota et al. 2024, eq. 7, factored).
    """

    def __init__(self):
        self.layers, self.others = 0, 0
        self.gram = self.product = None  # sums of W^T W and W^T D, (d, d) float64
        self.noise = self.difference = 0.0

    def add(self, site, weight, delta, noise):
        """Takes in a layer's weight W and difference D, both (out, d); noise: what of ||D||^2 rounding explains."""
        if role(site) not in TEXT_READERS or (self.gram is not None and self.gram.shape[0] != weight.shape[1]):
            self.others += 1
            return
        weight, delta = weight.double(), delta.double()
        gram, product = weight.T @ weight, weight.T @ delta
        self.gram, self.product = (gram, product) if self.gram is None else (self.gram + gram, self.product + product)
        self.difference += delta.square().sum().item()
        self.noise += noise
        self.layers += 1

    def explains(self, roughly=False):
        """True when one map leaves no more of the differences than rounding, or roughly when it leaves little."""
        if self.layers < 2 or self.others:
            return False
        ridge = 1e-9 * self.gram.diagonal().mean()
        e = torch.linalg.solve(self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64), self.product)
        rest = self.difference - 2 * (e * self.product).sum().item() + (e * (self.gram @ e)).sum().item()
        return rest <= max(SAME_MAP * self.noise, (ONE_MAP if roughly else EXACT) * self.difference)


def compare(layer, edited, name, energy, max_rank, text):
    """Difference of one layer, which is taken into a OneMap as well.

    layer: BaseLayer; edited: EditedWeights, which call it `name`; energy: share of the squared norm to keep, up to
    max_rank; text: the OneMap. Raises ErasureError where the two do not have one shape.
    """
    weight, bias = layer.read()
    new_weight, new_bias = (edited.tensors.get((name, kind)) for kind in ("weight", "bias"))
    _require_fit(edited.name, name, weight, new_weight)
    _require_fit(edited.name, f"the bias of {name}", bias, new_bias)
    delta, size = _delta(weight, new_weight)
    bias_delta, bias_size = _delta(bias, new_bias)
    size = max(size, bias_size)
    if delta is None and bias_delta is None:
        return Difference(layer.site, ROUNDED if size else EQUAL, size)
    if weight.dim() not in (2, 4):
        return Difference(layer.site, OTHER, size)
    if delta is None:
        delta, new_weight = torch.zeros(weight.shape), weight
    touched = delta != 0
    if bias_delta is None and _pruned(touched, new_weight):
        found = Mask.of(touched)
        return Difference(layer.site, CHANGED, size, found, delta.square().sum().item(), kept=1 - found.density)
    eps = max(torch.finfo(_stored_as(tensor)).eps for tensor in (weight, new_weight))
    noise = (RMS * eps) ** 2 * (weight.float() * touched).square().sum().item()
    text.add(layer.site, weight, delta, noise)
    change, energies = _factors(delta, energy, noise, max_rank, bias_delta)
    total, discarded = energies.sum().item(), energies[change.rank :].sum().item()
    truncated = discarded > max((1 - energy) * total, noise)
    return Difference(
        layer.site,
        CHANGED,
        size,
        change=change,
        energy=total,
        discarded=discarded,
        truncated=truncated,
        spread=_rank_within((1 - MOST) * total, energies) / len(energies),
        rank=1.0 if truncated else change.rank / len(energies),
        kept=1 - touched.float().mean().item(),
    )


def _pruned(touched, weight):
    """Whether a linear layer's weight is 0 wherever it was touched: ConceptPrune (Chavhan et al. 2024)."""
    return weight.dim() == 2 and touched.dim() == 2 and not weight[touched].any()


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
