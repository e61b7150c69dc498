"""What differs between releases of ComfyUI, from March 2024 on; the rest of core/host is written for today's."""

import contextlib
import contextvars
import dataclasses
import inspect
from importlib.util import find_spec

import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch


def ensure_own_network(model):
    """Puts the network of a MODEL back as it is without anybody's patches of whole modules.

    Hosts of 2024 put a torch.compile wrapper in its place for as long as the compiled MODEL is loaded, and some packs
    put modules of their own over an attention: every name below is another one then, also for the host's own LoRA
    loader. Unloading puts everything back.
    """
    covered = _covered(model.model)
    for name, before in covered.items():  # first, so that the host finds what it has noted at their layers
        comfy.utils.set_attr(model.model, name, before)
    if covered or hasattr(model.model.diffusion_model, "_orig_mod"):
        comfy.model_management.unload_all_models()


def _backups(base):
    """{path: what was there} of the patches of each MODEL of a base model that is loaded."""
    for loaded in comfy.model_management.current_loaded_models:
        patcher = loaded.model
        if patcher is not None and getattr(patcher, "model", None) is base:
            yield patcher.object_patches_backup


def _covered(base):
    """{path: module as it was} of those modules inside the network that patches stand for just now."""
    found = {}
    for backup in _backups(base):
        for name, before in backup.items():
            if name.startswith("diffusion_model.") and isinstance(before, torch.nn.Module):
                found[name] = before
    return {name: before for name, before in found.items() if module_at(base, name) is not before}


def module_at(base, name):
    """What lies at a path below the base model, None where it leads nowhere."""
    try:
        return comfy.utils.get_attr(base, name)
    except AttributeError:
        return None


def undo_modules_first(base):
    """Sees to it that the host can undo the patches of a base model that is loaded.

    It undoes them in the order in which they came. Where another pack has put a module over a layer with a patch, the
    layer cannot be reached before that module is gone again.
    """
    for backup in _backups(base):
        ordered = sorted(backup.items(), key=lambda item: item[0].count("."))
        backup.clear()
        backup.update(ordered)


_LOOKING = contextvars.ContextVar("looking", default=False)


def reading():
    """Whether it is the pack itself that reads a MODEL's weights just now."""
    return _LOOKING.get()


@contextlib.contextmanager
def _looked_at():
    token = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(token)


def key_patches(model, prefix):
    """{key: stored weight and its patches} of the weights and biases below a prefix, as get_key_patches() means it.

    That of hosts before November 2024 breaks a model whose own patches are in place: it takes the patched weights for
    plain ones and leaves them behind, so that the next load patches them once more. That of 2026 asks a quantised
    layer for tensors that are part of its weight; there it is each weight that is asked.
    """
    if hasattr(comfy.model_patcher, "get_key_weight"):
        try:
            with _looked_at():
                return model.get_key_patches(prefix)
        except AttributeError:
            return _patches_of_parameters(model, prefix)
    stored = {key: parameter for key, parameter in model.model.named_parameters() if key.startswith(prefix)}
    backups = {key: model.backup.get(key, parameter) for key, parameter in stored.items()}
    return {key: [getattr(backup, "weight", backup), *model.patches.get(key, ())] for key, backup in backups.items()}


def _patches_of_parameters(model, prefix):
    found = {}
    for key in dict(model.model.named_parameters()):
        if key.startswith(prefix):
            weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
            backup = model.backup.get(key)
            stored = weight if backup is None else backup.weight
            found[key] = [(stored, convert or (lambda tensor, **more: tensor)), *model.patches.get(key, ())]
    return found


def folds_activations(network):
    """Whether the host computes some layers of a network together with the activation before them, past their forward:
    hosts of 2026 do so where the weights are stored as int8."""
    weights = (getattr(module, "weight", None) for module in network.modules())
    return hasattr(comfy.ops, "linear_input_act") and any(
        getattr(weight, "_layout_cls", "") == "TensorWiseINT8Layout" for weight in weights
    )


@contextlib.contextmanager
def patched_layers_called():
    """While it lasts, the host calls the forward of every layer that has a patch in its place."""
    folded = getattr(comfy.ops, "linear_input_act", None)
    if folded is None:
        yield
        return

    def called(linear, x, activation):
        if "forward" in vars(linear):
            return linear(comfy.ops.INPUT_ACT_EAGER[activation](x))
        return folded(linear, x, activation)

    comfy.ops.linear_input_act = called
    try:
        yield
    finally:
        comfy.ops.linear_input_act = folded


def calculate_weight(model, patches, weight, key):
    """A weight with patches on it; a function of its own since August 2024, a method of the patcher before."""
    if hasattr(comfy.lora, "calculate_weight"):
        return comfy.lora.calculate_weight(patches, weight, key)
    return model.calculate_weight(patches, weight, key)


def stored_weight(weight, layer=None):
    """The number tensor of a stored weight; newer hosts give it together with how to turn it into numbers.

    layer: the module that it belongs to; of loaders of GGUF files it alone can do so.
    """
    if isinstance(weight, tuple):
        stored, convert = weight
        weight = convert(stored, inplace=False) if callable(convert) else stored
    if _is_plain(weight) or not hasattr(layer, "get_weight"):
        return plain_numbers(weight)
    patches = getattr(weight, "patches", None)  # which get_weight() would add, once more than the caller
    if patches:
        weight.patches = []
    try:
        return layer.get_weight(weight, torch.float32)
    finally:
        if patches:
            weight.patches = patches


def _is_plain(weight):
    return type(weight) in (torch.Tensor, torch.nn.Parameter)


def plain_numbers(weight):
    """A weight as a plain tensor; hosts of 2026 and loaders of GGUF files have tensors that stand for others."""
    return weight if _is_plain(weight) or not hasattr(weight, "dequantize") else weight.dequantize()


def patcher_class(dynamic):
    """The host's class of a MODEL's patcher; hosts of 2026 manage memory dynamically where they can."""
    plain = comfy.model_patcher.ModelPatcher
    return getattr(comfy.model_patcher, "CoreModelPatcher", plain) if dynamic else plain


def load_weights(patcher, weights):
    """Loads {name: tensor} into the network of a patcher, as its kind wants them."""
    dynamic = hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
    patcher.model.load_model_weights(weights, "", **({"assign": True} if dynamic else {}))


def embedding_class(operations):
    """The embedding of a host's operations; hosts of March 2024 cast every kind of layer but embeddings."""
    return getattr(operations, "Embedding", torch.nn.Embedding)


def has_flux():
    """Whether the host builds Flux of any size: the network came in August 2024, its patch size as a setting in
    November."""
    if find_spec("comfy.ldm.flux") is None:
        return False
    from comfy.ldm.flux.model import FluxParams

    return "patch_size" in {field.name for field in dataclasses.fields(FluxParams)}


def flux_options():
    """Settings that hosts of 2026 want for a Flux like that of 2024."""
    from comfy.ldm.flux.model import FluxParams

    return {"txt_ids_dims": []} if "txt_ids_dims" in {f.name for f in dataclasses.fields(FluxParams)} else {}


def show_text(server, text, node):
    """Shows a line of text on a node while it runs; hosts before 2025 have no place for it."""
    if hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node)


def rgb_previewer(latent_format):
    """The host's previewer that needs no file, None for a latent format without one; hosts of March 2024 know factors
    alone."""
    factors = getattr(latent_format, "latent_rgb_factors", None)
    names = ("latent_rgb_factors_bias", "latent_rgb_factors_reshape")
    more = [getattr(latent_format, name) for name in names if hasattr(latent_format, name)]
    return latent_preview.Latent2RGBPreviewer(factors, *more) if factors is not None else None


def encode_with_extras(clip, tokens):
    """{"cond", "pooled_output", and what else the encoder gives} of a tokenized text; hosts of March 2024 give no more
    than the two."""
    if "return_dict" in inspect.signature(clip.encode_from_tokens).parameters:
        return clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    vectors, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return {"cond": vectors, "pooled_output": pooled}


def text_after_picture(network):
    """Whether a network puts the text's rows behind the picture's, as those of Hunyuan did in 2025."""
    try:
        return "cat((img, txt)" in inspect.getsource(type(network).forward_orig)
    except (AttributeError, OSError):
        return False


def empty_latent(latent_format):
    """A small empty latent (1, C, 8, 8) of a format, (1, C, 1, 8, 8) for video."""
    video = getattr(latent_format, "latent_dimensions", 2) == 3
    return torch.zeros(1, channels_and_ratio(latent_format)[0], *([1] * video), 8, 8)


def channels_and_ratio(latent_format):
    """(channels of latents, pixels that one stands for) of a latent format; hosts of March 2024 know 4 and 8."""
    return getattr(latent_format, "latent_channels", 4), getattr(latent_format, "spacial_downscale_ratio", 8)


def fitted_latents(model, latents):
    """Empty latents with as many channels and dimensions as a MODEL works on, where the host can tell."""
    fix = getattr(comfy.sample, "fix_empty_latent_channels", None)
    return latents if fix is None else fix(model, latents)


def attention_with_gradients():
    """{transformer option} that makes a network compute attention as PyTorch does, which has a gradient whatever way
    the user chose; none on hosts before September 2025, which have no such option."""
    module = comfy.ldm.modules.attention
    if not hasattr(module, "wrap_attn"):
        return {}
    return {"optimized_attention_override": lambda own, *args, **kwargs: module.attention_pytorch(*args, **kwargs)}


def scheduled(clip, tokens):
    """A CONDITIONING of a tokenized text, with the schedules of hooks on hosts that have such."""
    if hasattr(clip, "encode_from_tokens_scheduled"):
        return clip.encode_from_tokens_scheduled(tokens)
    vectors, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return [[vectors, {"pooled_output": pooled}]]


def predictions(base, conditionings, x, sigma, options):
    """[what a base model takes for the clean latents] of one or two prepared conditionings; a function for a pair until
    2024."""
    if hasattr(comfy.samplers, "calc_cond_batch"):
        return comfy.samplers.calc_cond_batch(base, conditionings, x, sigma, options)
    pair = [*conditionings, None][:2]
    return list(comfy.samplers.calc_cond_uncond_batch(base, *pair, x, sigma, options))[: len(conditionings)]


def prepared(base, conditioning, noise, positive):
    """A CONDITIONING as the host's samplers have it while they run, with what the base model makes of it."""
    helpers = getattr(comfy, "sampler_helpers", comfy.sample)
    found = helpers.convert_cond(conditioning)
    side = "positive" if positive else "negative"
    return comfy.samplers.encode_model_conds(base.extra_conds, found, noise, noise.device, side)


def guidance_of(args):
    """The guidance scale of a post-CFG function's arguments. Those of 2024 leave it to be told from the predictions;
    None where another patch has changed these by then."""
    if args.get("cond_scale") is not None:
        return float(args["cond_scale"])
    with_text, without = args["cond_denoised"], args["uncond_denoised"]
    if without is None or not bool(without.any()):
        return 1.0
    apart, usual = ((found - without).double() for found in (with_text, args["denoised"]))
    length = float(apart.square().sum())
    scale = float((usual * apart).sum()) / length if length else 1.0
    if float((usual - scale * apart).square().sum()) > 1e-4 * float(usual.square().sum()):
        return None
    return 1.0 if abs(scale - 1) < 1e-3 else scale
