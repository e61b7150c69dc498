"""Runs the host's network so that gradients reach an adapter beside its layers, and nothing else."""

import contextlib
import re

import comfy.model_base
import comfy.model_management
import comfy.samplers
import torch

from ...adapters.beside import Bypass, Rows
from ...adapters.deltas.low_rank import Factors, LowRank
from ...adapters.deltas.text_rows import TextLowRank
from ...erasers.conditions import batches
from ...erasers.objectives import ADVERSARIAL, SPM, alpha_of
from ...erasers.paths import Flow, alphas_cumprod
from ...erasers.retained import RETAINED
from ...erasers.spm import NOISE, TEXTS
from ...erasers.spm_run import texts_of
from ...errors import ErasureError
from ...families.family import ALL
from ...families.sites import site
from ...families.table import role
from ...text.captions import AUTOMATIC, templates_for
from ...text.similarity import short_captions
from ..compat import attention_with_gradients, channels_and_ratio, fitted_latents
from ..model.inpainting import inpaints, reads_more, whole_masked
from ..model.layers import family, is_unet, layer_keys, modules, plain_key, reads_vector, text_rows, text_width
from ..text.conditions import conditions_for
from ..text.entries import encode_for
from .gradients import Differentiable

SCHEDULER = "simple"  # of the noise levels of a roll-out
OWN_GUIDANCE = "guidance_in"  # the layer by which a network reads how far it is to be guided
NOISE_KINDS = ("EPS", "V_PREDICTION")  # of U-Nets on Stable Diffusion's noise schedule


class TrainedLayer:
    """The factors of one layer while they are trained: down (r, in), up (out, r), float32; scale alpha / r.

    text_rows: TextRows of a layer that sees more than the text, whose text rows alone are changed; None for all rows.
    """

    outputs, columns = None, None

    def __init__(self, module, rank, alpha, generator, start=None, text_rows=None):
        self.module, self.text_rows = module, text_rows
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
        kind = LowRank if self.text_rows is None else TextLowRank
        return kind(self.up.detach().cpu().clone(), self.down.detach().cpu().clone(), float(self.alpha))


class HostDenoiser:
    """A MODEL of the host as the Denoiser of core/erasers/spm.py, inside `with`; what it changes is undone at the end.

    sites: {site: module} to put an adapter on; start: {site: LowRank} to go on from. U-Nets are asked for noise at
    timesteps, as SPM's code does it; all other networks for velocities at noise levels, through the host's own
    `apply_model`.
    """

    def __init__(self, model, sites, rank=1, alpha=1.0, seed=0, start=None):
        self.model, self.rows = model, Rows()
        generator = torch.Generator().manual_seed(seed)
        start, shared = start or {}, shared_rows(model, sites)
        self.layers = {
            name: TrainedLayer(module, rank, alpha, generator, start.get(name), shared.get(name))
            for name, module in sites.items()
        }
        self.text_rows = {rows for rows in shared.values() if rows is not None}
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
        """What the network predicts, float32 on the CPU, see Denoiser."""
        self.rows.gates, self.rows.active = (
            (torch.ones(1, 1, device=self.model.load_device), (0,)) if on else (None, ())
        )
        try:
            if isinstance(text, torch.Tensor):
                return self._noise(x, t, {"context": text})
            ask = self._noise_for if is_unet(self.model) else self._velocity
            return torch.cat([ask(x[rows], t[rows], given) for rows, given in batches(text)])
        finally:
            self.rows.gates, self.rows.texts = None, {}

    def _noise_for(self, x, t, given):
        return self._noise(x, t, {"context": given["c_crossattn"], **({"y": given["y"]} if "y" in given else {})})

    def _noise(self, x, t, given):
        base, device = self.model.model, self.model.load_device
        dtype = getattr(base, "manual_cast_dtype", None) or base.get_dtype()
        given = {name: tensor.to(device, dtype) for name, tensor in given.items()}
        read = torch.cat([x, whole_masked(base, x)], dim=1) if inpaints(base) else x
        out = base.diffusion_model(read.to(device, dtype), t.to(device), transformer_options={}, **given).float().cpu()
        if base.model_type == comfy.model_base.ModelType.V_PREDICTION:
            a = self.alphas[t].view(-1, 1, 1, 1)
            return a.sqrt() * out + (1 - a).sqrt() * x
        return out

    def _velocity(self, x, sigma, given):
        base, device = self.model.model, self.model.load_device
        given = {name: _moved(value, device) for name, value in given.items()}
        self.rows.texts = {rows: rows.count(given) for rows in self.text_rows}
        x, sigma = x.to(device), sigma.to(device)
        options = {"sigmas": sigma, "cond_or_uncond": [0] * len(x), **attention_with_gradients()}
        if cache := family(self.model).cache:
            options[cache] = {"device": "off"}
        concat, text = (given.pop(name, None) for name in ("c_concat", "c_crossattn"))
        clean = type(base).apply_model(base, x, sigma, concat, text, transformer_options=options, **given)
        return ((x - clean) / sigma.view(-1, *[1] * (x.dim() - 1))).float().cpu()

    def path(self, steps):
        """The path of a roll-out of so many steps on the model's own noise levels, None for one on Stable Diffusion's
        schedule."""
        if is_unet(self.model):
            return None
        sampler = comfy.samplers.KSampler(self.model, steps, self.model.load_device, "euler", SCHEDULER, 1.0)
        sigmas = sampler.calculate_sigmas(steps)[:-1].float().cpu()
        scale = self.model.model.model_sampling.noise_scaling
        first = sigmas[0].item()

        def mixed(clean, noise, sigma):
            return scale(torch.full((1,), sigma), noise, clean)

        return Flow(sigmas.tolist(), lambda noise: mixed(torch.zeros_like(noise), noise, first), mixed)

    def require_gradient(self, x, t, text):
        """Raises ErasureError where this host has no gradient for the network; asks it once, in latents x at t."""
        name = type(self.model.model).__name__
        try:
            self.predict(x, t, [text], on=True).square().sum().backward()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of an operation that has none
            with torch.no_grad():  # what fails without a gradient too is another matter, and is told as it is
                self.predict(x, t, [text], on=True)
            raise ErasureError(
                f"This ComfyUI has no gradient for the network of {name} ({str(error).splitlines()[0]}); update "
                "ComfyUI, or erase in closed form (Erase Concepts)."
            ) from error
        reached = [layer.up.grad is not None and bool(layer.up.grad.any()) for layer in self.layers.values()]
        for parameter in self.parameters():
            parameter.grad = None
        if not any(reached):
            raise ErasureError(
                f"No gradient reaches the {len(reached)} layers of {name} that are to be trained; choose other layers, "
                "or erase in closed form (Erase Concepts)."
            )


def _moved(value, device):
    if isinstance(value, list):
        return [_moved(part, device) for part in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def has_own_guidance(model):
    """Whether the network of a MODEL is told how far to guide, so that a roll-out needs no second prediction."""
    layer = getattr(model.model.diffusion_model, OWN_GUIDANCE, None)
    return layer is not None and any(True for _ in layer.parameters())


def latents_for(model, width, height):
    """Empty latents (1, C, h, w), of videos (1, C, 1, h, w), for a picture of so many pixels."""
    channels, ratio = channels_and_ratio(model.model.latent_format)
    return fitted_latents(model, torch.zeros(1, channels, height // ratio, width // ratio))


def fitted(model, width, height, preserves, objective=SPM):
    """What Settings say of a MODEL: the size of its latents for a picture of so many pixels, how a roll-out is guided,
    and of what kind the anchors are.

    Networks that are told how far to guide are not guided once more; transformers get real captions as anchors, for
    noise is unlike anything that their encoders give, and has no length of its own. So do objectives that draw the
    pictures of what is retained.
    """
    shape = latents_for(model, width, height).shape[1:]
    texts = preserves or objective in (*RETAINED, ADVERSARIAL) or not is_unet(model)
    guided = {"rollout_cfg": 1.0} if has_own_guidance(model) else {}
    return {
        "size": tuple(shape[-2:]),
        "channels": tuple(shape[:-2]),
        "anchor_kind": TEXTS if texts else NOISE,
        **guided,
    }


def templates_of_training(model, text, concepts):
    """Templates that concepts, some words, are trained in on a MODEL: those that a text names, "automatic" the built-in
    ones. Of an empty text the bare words on U-Nets, as published, and the built-in ones on transformers.

    Measured on the demo transformer: from the bare word a texture stays in 6 of 32 pictures of captions, from the
    built-in captions in 1.
    """
    return templates_for(text if text.strip() or is_unet(model) else AUTOMATIC, concepts)


def gradient_checked(denoiser, settings, text):
    """The path of the roll-outs of some Settings, None for Stable Diffusion's noise schedule; raises ErasureError where
    this host has no gradient for the network."""
    path = denoiser.path(settings.rollout_steps)
    if path is not None:
        x = torch.ones(1, *settings.channels, *settings.size)
        denoiser.require_gradient(x, torch.full((1,), path.told(1)), text)
    return path


def trained(run, model, clip, sites, rank, start, pairs, kept, pixels):
    """What a TrainingRun gives on some sites of a MODEL: (ErasureAdapter, report as text).

    start: {site: LowRank} to go on from, or None; pairs: (prompt with the concept, with its surrogate); kept: prompts
    to anchor, none for what is anchored without; pixels: (width, height) of the pictures trained on.
    """
    anchors = kept or (short_captions() if run.settings.anchor_kind == TEXTS else [])
    encoded = encoded_for(model, clip, [*(text for pair in pairs for text in pair), "", *anchors], *pixels)
    with torch.inference_mode(False), torch.enable_grad():
        texts = texts_of(encoded, pairs, anchors, run.card.concepts)
        alpha = alpha_of(run.settings.objective, rank)
        with HostDenoiser(model, sites, rank, alpha, run.settings.seed, start) as denoiser:
            run.path = gradient_checked(denoiser, run.settings, texts[0].concept)
            return run(denoiser, texts)


def encoded_for(model, clip, prompts, width, height):
    """What a MODEL's network gets for each of some prompts: Encoded rows of U-Nets that read nothing else, {prompt:
    Conditions} of all others, for a picture of so many pixels."""
    prompts = dict.fromkeys(prompts)
    if is_unet(model) and not reads_vector(model):
        return encode_for(model, clip, prompts)
    return conditions_for(model, clip, prompts, latents_for(model, width, height), (width, height))


def shared_rows(model, sites):
    """{site: TextRows} of those layers that see more than the text, None for the others.

    Raises ErasureError for a layer of a transformer whose text rows cannot be told from the picture's.
    """
    if is_unet(model):
        return {}
    keys, found = {site(key): key for key in modules(model)}, {}
    for name in sites:
        rows = text_rows(model, keys[name])
        if rows is None and not role(name).startswith(("cross_attention", "text_")):
            raise ErasureError(
                f"The layer {name} of this {family(model).title} model sees the picture as well, and where the text's "
                'rows stand in it is not known; set layers to "text attention".'
            )
        found[name] = None if rows is None or rows.place == ALL else rows
    return found


def resumed(model, adapter, sites):
    """{site of ours: LowRank} of an adapter to go on from, whatever program's names it has for the layers of a MODEL.

    Raises ErasureError for layers that are not among the sites to train.
    """
    keys, trained = layer_keys(model), {**adapter.low_rank, **adapter.deltas.get(TextLowRank.kind, {})}
    own = {name: site(plain_key(keys[name])) if name in keys else name for name in trained}
    strange = [name for name, ours in own.items() if ours not in sites]
    if strange:
        raise ErasureError(
            f"The adapter {adapter.describe()} has {len(strange)} layers such as {strange[0]}, which are not trained "
            'here; set layers to "all" or as it was trained, and connect the model that it belongs to.'
        )
    return {own[name]: change for name, change in trained.items()}


def trainable_sites(model, groups=()):
    """{site: module} of the linear layers that training adapts: of U-Nets those and the 1x1 convolutions in the
    transformers, as SPM does; of transformers the text's queries, keys and values, of Flux also where the text enters.

    groups: names of roles that count instead, such as "cross_attention.key".
    Raises ErasureError for a model that cannot be trained against.
    """
    known = family(model)
    text_width(model)  # raises for a model whose text no layer reads
    _require_kind(model, known)
    found = {}
    for key, module in modules(model).items():
        own = site(key)
        layer = hasattr(module, "in_features") or (is_unet(model) and getattr(module, "kernel_size", None) == (1, 1))
        if layer and (role(own) in groups if groups else re.search(known.trained, own)):
            found[own] = module
    if not found:
        raise ErasureError(
            f"The model {type(model.model).__name__} has no layers in {', '.join(groups)}; choose others."
        )
    return found


def _require_kind(model, known):
    name = type(model.model).__name__
    if not known.trained:
        raise ErasureError(
            f"Which layers of {known.title or name} models read the text is not known well enough to train them; erase "
            "in closed form (Erase Concepts), or load an adapter that was trained for it."
        )
    kind = getattr(model.model.model_type, "name", "")
    if is_unet(model) and kind not in NOISE_KINDS:
        raise ErasureError(
            f"The model {name} predicts in the way {kind}, but training on U-Nets knows {' and '.join(NOISE_KINDS)}; "
            "erase in closed form (Erase Concepts)."
        )
    if is_unet(model) and reads_more(model) and not inpaints(model.model):
        raise ErasureError(
            f"The U-Net of {name} reads more channels than its latents have, and what belongs into them is not known; "
            "train on the model that it was made from, or erase in closed form (Erase Concepts)."
        )
