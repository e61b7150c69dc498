"""Gated low-rank changes beside the host's layers, and masks on them: the weights stay as they are.

SPM, Lyu et al. 2024, eq. 9: y = W x + sum_c g_c (v_reg_c^T x) v_sig_c, for all adapters of a layer at once, with
its own g for every row of the batch. Masks come last: of W, LoRAs and all gated changes, the marked entries are damped.
"""

import torch
from torch.nn import functional

from ..errors import ErasureError
from .plan import OPEN


class Rows:
    """The gates of the rows that are going through the network now, (rows, active channels), and which are active."""

    def __init__(self):
        self.gates, self.active = None, ()


class Part:
    """A GatedLayer as one layer's forward uses it: only the active columns, on the right device, in the right type."""

    def __init__(self, layer, outputs=None):
        self.layer = layer
        self.outputs = outputs  # (start, length) of the outputs it changes, or None for all
        self.wanted, self.ready = None, None

    def factors(self, active, like):
        """The Ready factors of the active channels, or None when no column belongs to them."""
        return self._kept((active, like.device, like.dtype))

    def prepare(self, active, device, dtype):
        """Makes the factors before the network is called: torch.compile would take the making into its graph, and
        compile it again without. A type that a layer turned out to work in stays."""
        self._kept((active, *(self.wanted[1:] if self.wanted else (device, dtype))))

    def _kept(self, wanted):
        if self.wanted != wanted:
            self.wanted, self.ready = wanted, self._prepare(*wanted)
        return self.ready

    def _prepare(self, active, device, dtype):
        layer = self.layer.columns(active)
        if layer is None:
            return None
        to = {"device": device, "dtype": dtype}
        up, down = _balanced(layer)
        return Ready(
            down.to(**to),
            up.T.contiguous().to(**to),
            torch.tensor(layer.channel, device=device),
            layer.paired,
            layer.rank,
            None if layer.bias is None else layer.bias.T.contiguous().to(**to),
            torch.tensor(layer.bias_channel, device=device),
        )


def _balanced(layer):
    """The factors of a GatedLayer, each column's two of about the same size, so that half precision holds both.

    Powers of two change no digits. Paired columns are multiplied with each other's, so they share one.
    """
    tiny = torch.finfo(torch.float32).tiny
    sizes = [x.abs().amax(dim=tuple(range(1, x.dim()))).double().clamp_min(tiny) for x in (layer.up.T, layer.down)]
    first = len(layer.channel) - layer.paired
    if layer.paired:
        sizes = [torch.cat([size[:first], size[first:].max().expand(layer.paired)]) for size in sizes]
    scale = (sizes[1] / sizes[0]).sqrt().log2().round().clamp(-120, 120).exp2().float()
    return layer.up * scale, layer.down / scale.view(-1, *[1] * (layer.down.dim() - 1))


class Ready:
    """Factors ready for a forward: down (K, in...), up (K, out), channel (K,), bias (n, out), bias_channel (n,)."""

    def __init__(self, down, up, channel, paired, rank, bias, bias_channel):
        self.down, self.up, self.channel, self.paired, self.rank = down, up, channel, paired, rank
        self.bias, self.bias_channel = bias, bias_channel

    def scaled(self, inner, gates):
        """Inner values (..., K) times their gates; paired ones added over the adapters and scaled once more."""
        inner = inner * gates
        if not self.paired:
            return inner
        first = inner.shape[-1] - self.paired
        summed = inner[..., first:].unflatten(-1, (-1, self.rank)).sum(dim=-2, keepdim=True)
        again = summed.expand(*summed.shape[:-2], self.paired // self.rank, self.rank).flatten(-2)
        return torch.cat([inner[..., :first], again * gates[..., first:]], dim=-1)


class Pruning:
    """The Dampings of a layer as its forward uses them: flat places of the marked weights, on the right device.

    read(module, like): (weight, bias) of a linear layer as it multiplies with them, for an input like this.
    """

    def __init__(self, dampings, read):
        self.dampings, self.read = dampings, read
        self.gated = any(d.channel != OPEN for d in dampings)
        self.device, self.ready = None, None

    def __call__(self, weight, gates=None, active=()):
        """A damped copy of a weight (out, in); gates: (active channels,) of one row, None where no gate is known."""
        weight = weight.clone(memory_format=torch.contiguous_format)
        flat = weight.view(-1)
        for damping, places, kept in self._places(weight.device):
            if damping.channel == OPEN:
                strength = damping.factor
            elif gates is not None and damping.channel in active:
                strength = gates[active.index(damping.channel)]
            else:
                continue
            factor = 1.0 - strength * (1.0 if kept is None else 1.0 - kept)
            flat[places] = (flat[places] * factor).to(weight.dtype)
        return weight

    def _places(self, device):
        if self.device != device:
            self.ready = [
                (d, d.mask.places().to(device), None if d.mask.kept is None else d.mask.kept.float().to(device))
                for d in self.dampings
            ]
            self.device = device
        return self.ready


class Bypass:
    """Stands in for a layer's `forward`: the class's own forward (or what another pack put there), then the parts,
    then the pruning; or the same with the changed weight, where a mask leaves no other way."""

    def __init__(self, module, parts, rows, previous=None, pruning=None):
        self.module, self.parts, self.rows, self.previous = module, parts, rows, previous
        self.pruning = pruning

    def __call__(self, x, *args, **kwargs):
        original = self.previous or type(self.module).forward.__get__(self.module)
        ready = []
        if self.rows.gates is not None:
            found = ((part.factors(self.rows.active, x), part.outputs) for part in self.parts)
            ready = [(factors, outputs) for factors, outputs in found if factors is not None]
        if self.pruning is not None and self.previous is None:
            return self._pruned(x, ready)
        y = original(x, *args, **kwargs)
        for factors, outputs in ready:
            y = self._added(x, y, factors, outputs)
        if self.pruning is not None:  # what another pack does beside the weight stays
            y = y - self._pruned(x, ready, removed=True).to(y.dtype)
        return y

    def _pruned(self, x, ready, removed=False):
        """Output of the pruned layer, or what pruning takes from it, with the gated changes inside the weight."""
        weight, bias = self.pruning.read(self.module, x)
        gates, active = self.rows.gates, self.rows.active
        if removed:
            bias = None
        if not ready and (gates is None or not self.pruning.gated):
            pruned = self.pruning(weight)
            return functional.linear(x, weight - pruned if removed else pruned, bias)
        rows = []
        for row, own in zip(x, _for_rows(gates, x).expand(len(x), -1)):
            full, shift = weight, bias
            for factors, _ in ready:
                down = factors.scaled(factors.down.T, own[factors.channel].to(x.dtype))
                full = full + (down @ factors.up).T
                if factors.bias is not None and not removed:
                    added = own[factors.bias_channel].to(x.dtype) @ factors.bias
                    shift = added if shift is None else shift + added
            pruned = self.pruning(full, own, active)
            rows.append(functional.linear(row, full - pruned if removed else pruned, shift))
        return torch.stack(rows)

    def _added(self, x, y, ready, outputs):
        """y with a part's changes; row by row where the memory is too small for all rows at once."""
        gates = _for_rows(self.rows.gates, x)
        try:
            return self._add(x, y, ready, outputs, gates)
        except torch.cuda.OutOfMemoryError:  # nothing was written yet
            rows = gates.expand(len(x), -1).split(1)
        try:
            found = [self._add(*row, ready, outputs, own) for *row, own in zip(x.split(1), y.split(1), rows)]
        except torch.cuda.OutOfMemoryError as error:
            # the host knows this kind of error and makes room
            raise torch.cuda.OutOfMemoryError(
                f"There is not enough memory for the {len(ready.channel)} columns of adapters beside a layer, even one "
                'picture at a time; make smaller pictures, stack fewer adapters, or set their permeability to "fixed".'
            ) from error
        in_place = found[0].data_ptr() == y.data_ptr()
        return y if in_place else torch.cat(found)

    def _add(self, x, y, ready, outputs, gates):
        convolution = hasattr(self.module, "kernel_size")
        if convolution:
            delta = self._convolved(x, ready, gates)
        else:
            column_gates = gates[:, ready.channel].view(-1, *[1] * (x.dim() - 2), len(ready.channel)).to(x.dtype)
            inner = ready.scaled(functional.linear(x, ready.down), column_gates)
            fresh = self.previous is None and y.is_contiguous() and y.dtype == inner.dtype
            if fresh and outputs is None and ready.bias is None:
                # in place: one pass over y, and no tensor of its size is made
                y.view(-1, y.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), ready.up)
                return y
            delta = inner @ ready.up
        if ready.bias is not None:
            shift = gates[:, ready.bias_channel].to(x.dtype) @ ready.bias
            after = y.dim() - 2
            delta = delta + (shift.view(len(shift), -1, *[1] * after) if convolution else
                             shift.view(len(shift), *[1] * after, -1))  # fmt: skip
        if outputs is None:
            return y + delta.to(y.dtype)
        start, length = outputs
        y = y.clone()
        y[..., start : start + length] += delta.to(y.dtype)
        return y

    def _convolved(self, x, ready, gates):
        down = ready.down if ready.down.dim() == 4 else ready.down[:, :, None, None]
        inner = functional.conv2d(x, down, stride=self.module.stride, padding=self.module.padding)
        column_gates = gates[:, ready.channel].to(x.dtype)
        scaled = ready.scaled(inner.movedim(1, -1), column_gates[:, None, None, :])
        return (scaled @ ready.up).movedim(-1, 1)

    def __deepcopy__(self, memo):
        return self


def _for_rows(gates, x):
    """Gates (batch, K) for a layer whose batch may be a multiple of the rows, as HyperTile makes it."""
    if len(gates) in (1, len(x)):
        return gates
    if len(x) % len(gates):
        raise ErasureError(
            f"A layer got a batch of {len(x)} for {len(gates)} rows of gates; another node splits the batch inside "
            'the network, apply it to another model or set the permeability to "fixed".'
        )
    return gates.repeat_interleave(len(x) // len(gates), dim=0)
