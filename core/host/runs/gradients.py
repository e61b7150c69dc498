"""Gradients through a model of the host: its network made fit for them while they are needed, and what they tell of a
prompt's words, or of the vectors in place of them.
"""

import contextlib

import comfy.model_management
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...adapters.beside import Rows
from ...adapters.patch import Patch
from ...erasers.mitigation import softened
from ...errors import ErasureError
from ...measures.attack import descended
from ...measures.detection import gradient_lengths, magnitude, text_part
from ..compat import attention_with_gradients
from ..model.layers import reads_vector
from .sampling import ask_at, noised
from .steps import guided_steps

CHECKPOINTED = ("BasicTransformerBlock", "ResBlock")  # of U-Nets; of transformers, what their lists of blocks hold
GUIDED = 7.0  # any guidance that makes the host ask for both sides


def refuse_pooled(model):
    """Raises ErasureError for a model that gradients cannot be taken through."""
    if reads_vector(model):
        raise ErasureError(
            f"The model {type(model.model).__name__} reads pooled text beside the text vectors, which gradients do "
            "not support yet; use a Stable Diffusion 1 or 2 checkpoint, or a method without gradients."
        )


# ---------------------------------------------------------------- the network


class Differentiable:
    """A MODEL whose network can be differentiated, inside `with`; what it changes is undone at the end.

    rows: the Rows whose gates hold while a block is computed again in the backward pass, or None to keep what is in a
    block instead, which takes more memory.
    """

    def __init__(self, model, rows=None):
        self.model, self.rows = model, rows
        self.undo = contextlib.ExitStack()

    def __enter__(self):
        comfy.model_management.load_models_gpu([self.model])
        network = self.model.model.diffusion_model
        try:
            self._announce()
            blocks = set(_blocks(network)) if self.rows is not None else ()
            for module in network.modules():
                self._prepare(module, module in blocks, _is_unet(network))
        except BaseException:
            self.undo.close()
            raise
        return self

    def __exit__(self, *error):
        self.undo.close()

    def replace(self, module, forward):
        """Puts a forward in place of a module's until the end."""
        self._restore(module.__dict__, "forward")
        module.forward = forward

    def _announce(self):
        """Hosts since 2026 compute some layers in ways without a gradient unless they are told that it is wanted."""
        host = comfy.model_management
        if hasattr(host, "in_training"):
            self.undo.callback(setattr, host, "in_training", host.in_training)
            host.in_training = True

    def _prepare(self, module, block, of_unet):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._restore(module._parameters, name)
                module._parameters[name] = ordinary(parameter)
        if type(module).__name__.endswith("Norm") and not any(True for _ in module.children()):
            self.replace(module, _Norm(module))
        elif of_unet and all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "heads")):
            self.replace(module, _Attention(module))
        # the checkpointing of older hosts knows only the gradients of the network's own parameters
        switch = next((s for s in ("checkpoint", "use_checkpoint") if isinstance(getattr(module, s, None), bool)), None)
        if switch is not None:
            self._restore(module.__dict__, switch)
            setattr(module, switch, False)
        if block:
            self.replace(module, _Checkpointed(module, self.rows))

    def _restore(self, namespace, name):
        if name in namespace:
            self.undo.callback(namespace.__setitem__, name, namespace[name])
        else:
            self.undo.callback(namespace.pop, name, None)


def _lends(model):
    """Whether a patch of a MODEL lends the network something, on top of its place or below another."""
    for patch in model.object_patches.values():
        while isinstance(patch, Patch):
            if patch.lends:
                return True
            patch = patch.previous
    return False


def _is_unet(network):
    return hasattr(network, "input_blocks")


def _blocks(network):
    """The modules whose insides are computed again in the backward pass."""
    if _is_unet(network):
        return [module for module in network.modules() if type(module).__name__ in CHECKPOINTED]
    lists = [m for m in network.children() if isinstance(m, torch.nn.ModuleList | torch.nn.ModuleDict)]
    return [block for found in lists for block in found.children() if any(True for _ in block.children())]


class _Norm:
    """A norm that keeps a copy of its input: hosts add to the input in place afterwards, U-Nets those of 2024, and
    transformers all."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x, *args, **kwargs):
        return type(self.module).forward(self.module, x.clone() if x.requires_grad else x, *args, **kwargs)


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

    def __call__(self, *args, **kwargs):
        forward, rows = type(self.module).forward.__get__(self.module), self.rows
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)

        lent = rows.gates, rows.active, rows.texts

        def once(*args):
            before = rows.gates, rows.active, rows.texts
            rows.gates, rows.active, rows.texts = lent  # the call is over when this is computed again
            try:
                # hosts change what they get in place
                return forward(*map(_copy, args), **{name: _copy(value) for name, value in kwargs.items()})
            finally:
                rows.gates, rows.active, rows.texts = before

        return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=False)


def _copy(x):
    return x.clone() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


# ---------------------------------------------------------------- tensors of inference mode


def ordinary(tensor):
    """A tensor on the same memory which is not an inference tensor: those cannot be saved for a backward pass."""
    tensor = tensor.detach()
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class _Ordinary(torch.overrides.TorchFunctionMode):
    """Inside, ordinary tensors on the same memory take the place of inference tensors in every call of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("__get__", "is_inference"):
            return func(*args, **(kwargs or {}))
        return func(*_swapped(args), **{name: _swapped(value) for name, value in (kwargs or {}).items()})


def _swapped(x):
    if isinstance(x, torch.Tensor):
        return ordinary(x) if x.is_inference() else x
    return type(x)(map(_swapped, x)) if type(x) in (list, tuple) else x


def _copied(found):
    """A CONDITIONING whose tensors were not made under inference mode."""
    return [
        [vectors.clone(), {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}]
        for vectors, options in found
    ]


# ---------------------------------------------------------------- the words of a prompt


def token_influence(model, text, empty, seeds, settings, count, on_evaluations=lambda done: None):
    """Gradient lengths (tokens,) of ||text part|| with respect to the vectors the network reads between start and end
    token, the mean over the first `count` steps and the seeds (Wen et al. 2024, section 4.1).

    Raises ErasureError for models that read pooled text beside it.
    """
    refuse_pooled(model)
    points, done = [], 0

    def tell():
        nonlocal done
        done += 1
        on_evaluations(done)

    def on_step(step):
        points.append((step.x.cpu().clone(), step.sigma.cpu().clone()))
        tell()

    for seed in seeds:
        guided_steps(model, text.conditioning, empty.conditioning, [seed], settings, count, on_step)
    listening = model.clone()
    comfy.model_management.load_models_gpu([listening])  # patches weights, which are inference tensors
    with torch.inference_mode(False), torch.enable_grad():
        points = [(x.clone(), sigma.clone()) for x, sigma in points]
        norms = _gradients(listening, _copied(text.conditioning), _copied(empty.conditioning), points, tell)
        return (sum(norms) / len(points))[1 : text.end]


def _gradients(listening, positive, negative, points, on_point):
    """[gradient_lengths() (T,) of the positive prompt's vectors] for each point (x (1, C, h, w), sigma (1,)), through
    the host's whole sampling path; listening: a clone of the MODEL to change."""
    leaves, deltas = _track_vectors(listening), []

    def listen(args):
        deltas.append(text_part(args["cond_denoised"], args["uncond_denoised"], args["sigma"]))
        return args["denoised"]

    def lengths(predict):
        leaves.clear()
        deltas.clear()
        with torch.enable_grad(), _Ordinary():
            predict()
            (leaf, row), *_ = leaves
            found = gradient_lengths(deltas.pop(), leaf)[row].cpu()
        on_point()
        return found

    listening.set_model_sampler_post_cfg_function(listen, disable_cfg1_optimization=True)
    with Differentiable(listening, None if _lends(listening) else Rows()):
        return ask_at(listening, positive, negative, points, lengths, cfg=GUIDED)


def _track_vectors(listening):
    """A list that each call of the network fills: (text vectors with gradients, the positive prompt's row)."""
    leaves, previous = [], listening.model_options.get("model_function_wrapper")

    def called(apply_model, args):
        c, order = dict(args["c"]), args["cond_or_uncond"]
        leaf = c["c_crossattn"].detach().clone().requires_grad_()
        c["c_crossattn"] = leaf
        leaves.extend([(leaf, order.index(0))] if 0 in order else [])
        if previous:
            return previous(apply_model, {**args, "c": c})
        return apply_model(args["input"], args["timestep"], **c)

    listening.set_model_unet_function_wrapper(called)
    return leaves


# ---------------------------------------------------------------- text vectors that bring a picture back


@contextlib.contextmanager
def differentiated(model, instead):
    """A clone of a MODEL through whose whole sampling path gradients reach the text, inside `with`, outside of
    inference mode; the network is as before at the end.

    instead: what to do without gradients, for the ErasureError where none reaches the text.
    """
    listening = model.clone()
    options = listening.model_options.setdefault("transformer_options", {})
    listening.model_options["transformer_options"] = {**options, **attention_with_gradients()}
    comfy.model_management.load_models_gpu([listening])  # patches weights, which are inference tensors
    with torch.inference_mode(False), torch.enable_grad():
        with Differentiable(listening, None if _lends(listening) else Rows()):
            try:
                yield listening
            except RuntimeError as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise ErasureError(
                    f"No gradient reaches the text of {type(model.model).__name__} "
                    f"({str(error).splitlines()[0]}); {instead}."
                ) from error


def searched_text(model, start, clean, descent, rate, seed, on_step=lambda done: None):
    """A CONDITIONING whose text vectors are searched for by gradient from those of `start`, so that a MODEL takes the
    noise off pictures: mean square of (denoised - clean) / sigma over drawn pictures, noise and levels.

    The gradient goes through the host's whole sampling path, with all that acts on the MODEL. clean: LATENTs' samples
    (n, C, h, w) on the CPU; descent: Descent; rate: of Adam, in the vectors' own unit. Raises ErasureError where no
    gradient reaches the text.
    """
    vectors, options = start[0]
    generator = torch.Generator().manual_seed(seed)
    with differentiated(model, 'set attacks to "both"') as listening:
        (vectors, options), clean = _copied([[vectors, options]])[0], clean.clone()

        def loss(leaf):
            chosen = clean[torch.randint(len(clean), (descent.batch,), generator=generator)]
            return _removal(listening, [[leaf[None], options]], chosen, generator)

        found = descended(vectors[0], loss, descent, rate, on_step)
    return [[found[None], options]]


def _removal(listening, positive, clean, generator):
    """The mean square of what a MODEL leaves of drawn noise on clean latents (n, C, h, w), over the noise level."""
    network = listening.model
    clean = network.process_latent_in(clean)
    shares = torch.rand(len(clean), generator=generator).clamp(0.001, 0.999).tolist()
    sigmas = torch.tensor([float(network.model_sampling.percent_to_sigma(share)) for share in shares])
    noise = torch.randn(clean.shape, generator=generator)
    x = noised(listening, clean, noise, sigmas)

    def left(predict):
        difference = predict() - clean.to(listening.load_device)
        return (difference / sigmas.view(-1, *[1] * (clean.dim() - 1)).to(difference)).square().mean()

    with _Ordinary():  # erasures that act when the conditioning is prepared are on the way as well
        return ask_at(listening, positive, positive, [(x, sigmas)], left)[0]


# ---------------------------------------------------------------- text vectors that pull less


def softened_text(model, positive, points, unconditional, softening, on_step=lambda done: None):
    """(a CONDITIONING whose text vectors pull less, the Softened of core/erasers/mitigation.py).

    positive: a CONDITIONING of one row of text vectors; points: [(noisy latents x (1, C, h, w), sigma (1,))] of the
    CPU; unconditional: what the MODEL takes for the clean latents there without the prompt, as many (1, C, h, w);
    softening: Softening. Raises ErasureError where no gradient reaches the text.
    """
    with differentiated(model, "use Mitigate Memorization, which needs none") as listening:
        (vectors, options), *_ = _copied(positive)
        points = [tuple(part.clone() for part in point) for point in points]
        without = [part.clone() for part in unconditional]

        def pulls(leaf):
            """The gradient is taken point by point, so that one graph is kept at a time."""
            known = iter(zip(points, without))

            def length(predict):
                (_, sigma), plain = next(known)
                found = magnitude(text_part(predict().float().cpu(), plain, sigma)).sum()
                (gradient,) = torch.autograd.grad(found, leaf)
                return float(found.detach()), gradient

            with _Ordinary():
                found = ask_at(listening, [[leaf, options]], [[leaf, options]], points, length)
            lengths, gradients = zip(*found)
            return sum(lengths) / len(points), sum(gradients) / len(points)

        found = softened(vectors, pulls, softening, on_step)
    return [[found.vectors, positive[0][1]]], found
