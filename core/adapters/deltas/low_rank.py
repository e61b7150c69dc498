"""A low-rank change of a layer (SPM, LoRA, what edited weights become): its record, and its paths beside the layer."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn import functional

from ...errors import ErasureError
from .delta import OPEN, Delta, register

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}  # by the kernel's dimensions


@register
@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """A low-rank change of one layer, W -> W + (alpha / r) up down (LoRA; SPM, Lyu et al. 2024, eq. 2 with r = 1).

    up: (out, r); down: (r, in) of a linear layer, (r, in, *kernel) of a convolution; alpha: scale times rank; bias:
    (out,), added to the layer's bias, or None.
    """

    kind: ClassVar[str] = "low_rank"
    on_text: ClassVar[bool] = False  # whether it acts on the text's rows alone

    up: torch.Tensor
    down: torch.Tensor
    alpha: float
    bias: torch.Tensor | None = None

    def __post_init__(self):
        up, down, bias = self.up, self.down, self.bias
        kernel = down.dim() in (2, 4, 5) or (down.dim() == 3 and down.shape[2] > 1)  # of one point is a matrix
        fits = up.dim() == 2 and kernel and 0 < up.shape[1] == down.shape[0]
        if not fits or (bias is not None and bias.shape != up.shape[:1]):
            shapes = " and ".join(str(tuple(t.shape)) for t in (up, down, bias) if t is not None)
            raise ErasureError(
                f"A low-rank change has factors of shapes {shapes}; expected (out, rank) and (rank, in); "
                "the file is damaged, get it again."
            )

    @property
    def rank(self):
        """Rank r."""
        return self.up.shape[1]

    @property
    def scale(self):
        """The factor alpha / r of the product."""
        return self.alpha / self.rank

    @property
    def shape(self):
        """Shape of the weight it changes: (out, in), of a convolution (out, in, *kernel)."""
        return (len(self.up), *self.down.shape[1:])

    def low_rank(self):
        """Itself, see Delta."""
        return self


def turned(key, delta):
    """(key, delta) of a layer whose outputs other programs have in another order than the host: the host's key without
    the function that turns them, and the change with its outputs turned."""
    change = delta.low_rank()
    if isinstance(key, str) or len(key) < 3 or key[2] is None or change is None:
        return key, delta
    turn = key[2]
    change = replace(change, up=turn(change.up), bias=None if change.bias is None else turn(change.bias))
    return key[0] if key[1] is None else key[:2], change


def join(terms):
    """One LowRank of the Terms of a layer that are not gated, their factors folded in; None of none."""
    if not terms:
        return None
    changes = [(term.delta, term.factor) for term in terms]
    biases = [change.bias.float() * factor for change, factor in changes if change.bias is not None]
    down = torch.cat([change.down.float() for change, _ in changes])
    return LowRank(
        torch.cat([change.up.float() * (change.scale * factor) for change, factor in changes], dim=1),
        down,
        float(len(down)),
        sum(biases) if biases else None,
    )


@dataclass(frozen=True, eq=False)
class Factors:
    """All low-rank changes that run beside one layer: y -> y + U^T (g * (D x)), scales folded into U.

    up: U, (K, out); down: D, (K, in) or (K, in, *kernel); gate: (K,) numbers of gates, each row's g, or OPEN. The
    last
    `paired` rows belong to adapters of equal rank combined as the published SPM code does: the factors of all are
    added, scaled by their gates, before they are multiplied; rank: of each of these. bias: (n, out) with bias_gate
    (n,), or None.
    """

    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor
    paired: int = 0
    rank: int = 1
    bias: torch.Tensor | None = None
    bias_gate: torch.Tensor | None = None

    def rows(self, active):
        """The same with only the rows of some gates, renumbered by their place in `active`; None without any. What is
        not gated comes after these."""
        place = {gate: i for i, gate in enumerate((*active, OPEN))}
        keep, keep_bias = (
            [i for i, gate in enumerate(() if gates is None else gates.tolist()) if gate in place]
            for gates in (self.gate, self.bias_gate)
        )
        if not keep and not keep_bias:
            return None
        first_paired = len(self.gate) - self.paired
        return replace(
            self,
            up=self.up[keep],
            down=self.down[keep],
            gate=torch.tensor([place[g] for g in self.gate[keep].tolist()], dtype=torch.long),
            paired=sum(i >= first_paired for i in keep),
            bias=self.bias[keep_bias] if keep_bias else None,
            bias_gate=torch.tensor([place[g] for g in self.bias_gate[keep_bias].tolist()]) if keep_bias else None,
        )

    def balanced(self):
        """The same, each row's two factors of about the same size, so that half precision holds both.

        Powers of two change no digits. Paired rows are multiplied with each other's, so they share one.
        """
        tiny = torch.finfo(torch.float32).tiny
        sizes = [x.abs().amax(dim=tuple(range(1, x.dim()))).double().clamp_min(tiny) for x in (self.up, self.down)]
        first = len(self.gate) - self.paired
        if self.paired:
            sizes = [torch.cat([size[:first], size[first:].max().expand(self.paired)]) for size in sizes]
        scale = (sizes[1] / sizes[0]).sqrt().log2().round().clamp(-120, 120).exp2().float()
        down = self.down / scale.view(-1, *[1] * (self.down.dim() - 1))
        return replace(self, up=self.up * scale[:, None], down=down)

    def to(self, device, dtype):
        """The same on a device, its factors of a type."""

        def moved(x, **kind):
            return None if x is None else x.contiguous().to(device=device, **kind)

        return replace(
            self,
            up=moved(self.up, dtype=dtype),
            down=moved(self.down, dtype=dtype),
            gate=moved(self.gate),
            bias=moved(self.bias, dtype=dtype),
            bias_gate=moved(self.bias_gate),
        )

    def scaled(self, inner, gates):
        """Inner values (..., K) times their gates; paired ones added over the adapters and scaled once more."""
        inner = inner * gates
        if not self.paired:
            return inner
        first = inner.shape[-1] - self.paired
        summed = inner[..., first:].unflatten(-1, (-1, self.rank)).sum(dim=-2, keepdim=True)
        again = summed.expand(*summed.shape[:-2], self.paired // self.rank, self.rank).flatten(-2)
        return torch.cat([inner[..., :first], again * gates[..., first:]], dim=-1)

    def added(self, x, y, gates, columns, module, fresh):
        """(y, in place) of a layer's output y for its input x, with the changes; gates: (rows, active gates); columns:
        (rows, K), of them the gate of each row of the factors, of the type of x.

        module: the layer; fresh: whether y may be written into.
        """
        convolution = hasattr(module, "kernel_size")
        if convolution:
            delta = self._convolved(x, columns, module)
        else:
            row_gates = columns.view(-1, *[1] * (x.dim() - 2), len(self.gate))
            inner = self.scaled(functional.linear(x, self.down), row_gates)
            if fresh and self.bias is None and y.is_contiguous() and y.dtype == inner.dtype:
                # one pass over y, and no tensor of its size is made
                y.view(-1, y.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), self.up)
                return y, True
            delta = inner @ self.up
        if self.bias is not None:
            shift = gates[:, self.bias_gate].to(x.dtype) @ self.bias
            after = y.dim() - 2
            delta = delta + (shift.view(len(shift), -1, *[1] * after) if convolution else
                             shift.view(len(shift), *[1] * after, -1))  # fmt: skip
        return delta.to(y.dtype), False

    def _convolved(self, x, columns, module):
        places = len(module.kernel_size)
        down = self.down if self.down.dim() > 2 else self.down.view(*self.down.shape, *[1] * places)
        inner = CONVOLUTIONS[places](x, down, stride=module.stride, padding=module.padding)
        scaled = self.scaled(inner.movedim(1, -1), columns.view(len(columns), *[1] * places, -1))
        return (scaled @ self.up).movedim(-1, 1)

    def inside(self, weight, bias, gates, outputs=None):
        """A linear layer's (weight, bias) with the changes of one row in them; gates: (active gates,). outputs: see
        Part."""
        start, length = outputs or (0, len(weight))
        down = self.scaled(self.down.T, gates[self.gate].to(weight.dtype))
        weight = weight.clone()
        weight[start : start + length] += (down @ self.up).T
        if self.bias is None:
            return weight, bias
        shift = gates[self.bias_gate].to(weight.dtype) @ self.bias
        shift = functional.pad(shift, (start, len(weight) - start - length))
        return weight, shift if bias is None else shift + bias


def beside(terms, name):
    """Factors of the Terms that run beside one layer; name: of the layer, for messages; None of none.

    Raises ErasureError when adapters that are to be combined as the published code does differ in rank.
    """
    if not terms:
        return None
    plain, paired = ([t for t in terms if t.paired == kind] for kind in (False, True))
    ranks = {term.delta.rank for term in paired}
    if len(ranks) > 1:
        raise ErasureError(
            f"The adapters to be combined as in the reference have the ranks {', '.join(map(str, sorted(ranks)))} "
            f'at {name}; expected equal ranks, set the permeability to "facilitated transport".'
        )
    scale = paired[0].delta.scale if paired else 1.0  # the published code takes the first file's for all
    scales = [t.delta.scale * t.factor for t in plain] + [scale] * len(paired)
    ordered = plain + paired
    biases = [t for t in terms if t.delta.bias is not None]
    return Factors(
        torch.cat([(t.delta.up.float() * s).T for t, s in zip(ordered, scales)]),
        torch.cat([t.delta.down.float() for t in ordered]),
        torch.tensor([t.gate for t in ordered for _ in range(t.delta.rank)]),
        sum(t.delta.rank for t in paired),
        ranks.pop() if ranks else 1,
        torch.stack([t.delta.bias.float() * t.factor for t in biases]) if biases else None,
        torch.tensor([t.gate for t in biases]) if biases else None,
    )


class Part:
    """The Factors of a layer as its forward uses them: only the active rows, on the right device, of the right type.

    outputs: (start, length) of the outputs they change, where the host fuses layers; None for all. text_rows: TextRows
    of the layer where they act on the text's rows alone; None for all rows. numbers: places of the factors' gates among
    the active ones; columns: those gates (rows, K) of the call that is under way, or None.
    """

    def __init__(self, factors, outputs=None, text_rows=None):
        self.every, self.outputs, self.text_rows = factors, outputs, text_rows
        self.wanted, self.ready, self.numbers, self.columns = None, None, (), None

    def factors(self, active, like):
        """Factors of the active gates for an input like this, or None when no row belongs to them."""
        return self._kept((active, like.device, like.dtype))

    def prepare(self, active, device, dtype):
        """Makes the factors before the network is called: torch.compile would take the making into its graph, and
        compile it again without. A type that a layer turned out to work in stays."""
        self._kept((active, *(self.wanted[1:] if self.wanted else (device, dtype))))

    def forget(self):
        """Gives back the factors on the device."""
        self.wanted, self.ready, self.numbers, self.columns = None, None, (), None

    def _kept(self, wanted):
        if self.wanted != wanted:
            found = self.every.rows(wanted[0])
            self.numbers = tuple(found.gate.tolist()) if found else ()
            self.wanted, self.ready = wanted, found and found.balanced().to(*wanted[1:])
        return self.ready
