"""Runs the host's network so that gradients reach an adapter beside its layers, and nothing else."""

import contextlib
import re

import comfy.model_base
import comfy.model_management
import torch

from ...adapters.beside import Bypass, Rows
from ...adapters.deltas.low_rank import Factors, LowRank
from ...erasers.spm import alphas_cumprod
from ...errors import ErasureError
from ...families.sites import site
from ...families.table import role
from ..model.layers import family, layer_keys, modules, plain_key, require_unet
from .gradients import Differentiable, refuse_pooled


class TrainedLayer:
    """The factors of one layer while they are trained: down (r, in), up (out, r), float32; scale alpha / r."""

    outputs, text_rows, columns = None, None, None

    def __init__(self, module, rank, alpha, generator, start=None):
        self.module = module
        convolution = hasattr(module, "kernel_size")
        out, inside = (
            (module.out_channels, module.in_channels) if convolution else (module.out_features, module.in_features)
        )
        rank = min(rank, out, inside)
        if start is None:  # Kaiming uniform with a = sqrt(5), and zeros, as published: the adapter starts closed
            bound = inside**-0.5
            down = torch.empty(rank, inside).uniform_(-bound, bound, generator=generator)
            up = torch.zeros(out, rank)
        else:
            up, down, rank, alpha = start.up.float(), start.down.float(), start.rank, start.alpha
        device = comfy.model_management.get_torch_device()
        self.down = down.clone().to(device).requires_grad_()
        self.up = up.clone().to(device).requires_grad_()
        self.alpha, self.scale = alpha, alpha / rank

    def factors(self, active, like):
        """The factors as Bypass uses them, with a graph to the parameters."""
        channel = torch.zeros(len(self.down), dtype=torch.long, device=like.device)
        up = (self.up.T * self.scale).to(like.dtype)
        return Factors(up, self.down.to(like.dtype), channel)

    def finished(self):
        """The trained change, on the CPU."""
        return LowRank(self.up.detach().cpu().clone(), self.down.detach().cpu().clone(), float(self.alpha))


class HostDenoiser:
    """A MODEL of the host as the Denoiser of core/erasers/spm.py, inside `with`; what it changes is undone at the end.

    sites: {site: module} to put an adapter on; start: {site: LowRank} to go on from.
    """

    def __init__(self, model, sites, rank=1, alpha=1.0, seed=0, start=None):
        self.model, self.rows = model, Rows()
        generator = torch.Generator().manual_seed(seed)
        start = start or {}
        self.layers = {
            name: TrainedLayer(module, rank, alpha, generator, start.get(name)) for name, module in sites.items()
        }
        self.alphas = alphas_cumprod().float()

    def parameters(self):
        """All factors, in a fixed order."""
        return [p for layer in self.layers.values() for p in (layer.down, layer.up)]

    def trained(self):
        """{site: LowRank} as trained so far."""
        return {name: layer.finished() for name, layer in self.layers.items()}

    def __enter__(self):
        with contextlib.ExitStack() as entered:
            network = entered.enter_context(Differentiable(self.model, self.rows))
            for layer in self.layers.values():
                network.replace(layer.module, Bypass(layer.module, [layer], self.rows))
            self.undo = entered.pop_all()
        return self

    def __exit__(self, *error):
        self.undo.close()

    def predict(self, x, t, text, on):
        """Noise (rows, 4, h, w) float32 on the CPU, see Denoiser."""
        base = self.model.model
        device, dtype = self.model.load_device, base.get_dtype()
        self.rows.gates, self.rows.active = (torch.ones(1, 1, device=device), (0,)) if on else (None, ())
        try:
            out = base.diffusion_model(
                x.to(device, dtype), t.to(device), context=text.to(device, dtype), transformer_options={}
            )
        finally:
            self.rows.gates = None
        out = out.float().cpu()
        if base.model_type == comfy.model_base.ModelType.V_PREDICTION:
            a = self.alphas[t].view(-1, 1, 1, 1)
            return a.sqrt() * out + (1 - a).sqrt() * x
        return out


def resumed(model, adapter, sites):
    """{site of ours: LowRank} of an adapter to go on from, whatever program's names it has for the layers of a MODEL.

    Raises ErasureError for layers that are not among the sites to train.
    """
    keys = layer_keys(model)
    own = {name: site(plain_key(keys[name])) if name in keys else name for name in adapter.low_rank}
    strange = [name for name, ours in own.items() if ours not in sites]
    if strange:
        raise ErasureError(
            f"The adapter {adapter.describe()} has {len(strange)} layers such as {strange[0]}, which are not trained "
            'here; set layers to "all" or as it was trained, and connect the model that it belongs to.'
        )
    return {own[name]: change for name, change in adapter.low_rank.items()}


def trainable_sites(model, groups=()):
    """{site: module} of the linear layers and 1x1 convolutions in the transformers, as SPM adapts them.

    groups: names of roles that count, such as "cross_attention.key"; all when empty.
    Raises ErasureError for a model that cannot be trained against.
    """
    require_unet(
        model,
        "Training an adapter",
        "erase in closed form (Erase Concepts), or load an adapter that was trained for it",
    )
    refuse_pooled(model)
    found = {}
    for key, module in modules(model).items():
        own = site(key)
        layer = hasattr(module, "in_features") or getattr(module, "kernel_size", None) == (1, 1)
        if layer and re.search(family(model).trained, own) and (not groups or role(own) in groups):
            found[own] = module
    if not found:
        raise ErasureError(
            f"The model {type(model.model).__name__} has no layers in {', '.join(groups)}; choose others."
        )
    return found
