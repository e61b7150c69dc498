"""Runs the host's network so that gradients reach an adapter beside its layers, and nothing else."""

import contextlib

import comfy.model_base
import comfy.model_management
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...adapters.beside import Bypass, Rows
from ...adapters.deltas.low_rank import Factors, LowRank
from ...erasers.spm import alphas_cumprod
from ...errors import ErasureError
from ...families.sites import site
from ...families.table import role
from ..model.layers import context_width, layer_keys, modules, plain_key, reads_pooled

CHECKPOINTED = ("BasicTransformerBlock", "ResBlock")


class TrainedLayer:
    """The factors of one layer while they are trained: down (r, in), up (out, r), float32; scale alpha / r."""

    outputs = None

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
    """A MODEL of the host as the Denoiser of latent_anchoring, inside `with`; what it changes is undone at the end.

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
        self.undo = contextlib.ExitStack()

    def parameters(self):
        """All factors, in a fixed order."""
        return [p for layer in self.layers.values() for p in (layer.down, layer.up)]

    def trained(self):
        """{site: LowRank} as trained so far."""
        return {name: layer.finished() for name, layer in self.layers.items()}

    def __enter__(self):
        comfy.model_management.load_models_gpu([self.model])
        network = self.model.model.diffusion_model
        try:
            for module in network.modules():
                self._prepare(module)
            for layer in self.layers.values():
                self._replace(layer.module, Bypass(layer.module, [layer], self.rows))
        except BaseException:
            self.undo.close()
            raise
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

    def _prepare(self, module):
        """Makes a module of the host fit for gradients."""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # made under inference mode they cannot be saved for a backward pass; same memory, other tensor
                self._restore(module._parameters, name)
                module._parameters[name] = _alias(parameter)
        kind = type(module).__name__
        if isinstance(module, torch.nn.LayerNorm):
            self._replace(module, _Norm(module))
        elif all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads")):
            self._replace(module, _Attention(module))
        if isinstance(getattr(module, "checkpoint", None), bool):
            # the checkpointing of older hosts knows only the gradients of the network's own parameters
            self._restore(module.__dict__, "checkpoint")
            module.checkpoint = False
        elif isinstance(getattr(module, "use_checkpoint", None), bool):
            self._restore(module.__dict__, "use_checkpoint")
            module.use_checkpoint = False
        if kind in CHECKPOINTED:
            self._replace(module, _Checkpointed(module, self.rows))

    def _replace(self, module, forward):
        self._restore(module.__dict__, "forward")
        module.forward = forward

    def _restore(self, namespace, name):
        if name in namespace:
            self.undo.callback(namespace.__setitem__, name, namespace[name])
        else:
            self.undo.callback(namespace.pop, name, None)


def _alias(tensor):
    """An ordinary tensor on the same memory."""
    tensor = tensor.detach()
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class _Norm:
    """A layer norm that keeps a copy of its input: hosts of 2024 add to the input in place afterwards."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return type(self.module).forward(self.module, x.clone() if x.requires_grad else x)


class _Attention:
    """Attention with gradients, which the memory-saving ways of some hosts do not have."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x, context=None, value=None, mask=None, **options):
        module = self.module
        context = x if context is None else context
        q = module.to_q(x)
        k, v = module.to_k(context), module.to_v(context if value is None else value)
        q, k, v = (y.unflatten(-1, (module.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return module.to_out(
            functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        )


class _Checkpointed:
    """A block that is computed again in the backward pass instead of keeping what is in it."""

    def __init__(self, module, rows):
        self.module, self.rows = module, rows

    def __call__(self, x, *args, **kwargs):
        forward = type(self.module).forward.__get__(self.module)
        if not torch.is_grad_enabled():
            return forward(x, *args, **kwargs)

        lent = self.rows.gates, self.rows.active

        def once(x, *args):
            before = self.rows.gates, self.rows.active
            self.rows.gates, self.rows.active = lent  # the call is over when this is computed again
            try:
                return forward(x.clone(), *args, **kwargs)  # hosts of 2024 change the input in place
            finally:
                self.rows.gates, self.rows.active = before

        return checkpoint(once, x, *args, use_reentrant=False, preserve_rng_state=False)


def refuse_pooled(model):
    """Raises ErasureError for a model that HostDenoiser cannot run."""
    if reads_pooled(model):
        raise ErasureError(
            f"The model {type(model.model).__name__} reads pooled text beside the text vectors, which gradients do "
            "not support yet; use a Stable Diffusion 1 or 2 checkpoint, or a method without gradients."
        )


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
    context_width(model)
    refuse_pooled(model)
    found = {}
    for key, module in modules(model).items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        linear = hasattr(module, "in_features") and "transformer_blocks" in name
        edge = name.endswith(("proj_in", "proj_out")) and getattr(module, "kernel_size", (1, 1)) == (1, 1)
        own = site(name)
        if (linear or edge) and (not groups or role(own) in groups):
            found[own] = module
    if not found:
        raise ErasureError(
            f"The model {type(model.model).__name__} has no layers in {', '.join(groups)}; choose others."
        )
    return found
