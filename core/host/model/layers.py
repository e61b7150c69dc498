"""The layers of the host's model and the names that adapters know them by."""

from dataclasses import replace

import comfy.lora
import comfy.ops

from ...adapters.beside import MIXED, PICTURES, TILED, WHOLE
from ...errors import ErasureError
from ...families import unet
from ...families.family import LAST
from ...families.joint import mixed
from ...families.sites import site
from ...families.table import family_of
from ..compat import ensure_own_network, plain_numbers, text_after_picture

NETWORK, WEIGHT = "diffusion_model.", ".weight"


def denoiser(model):
    """The network of a MODEL as its layers are named."""
    ensure_own_network(model)
    return model.model.diffusion_model


def family(model):
    """The Family of a MODEL, by the host's configuration of it and, where that is not enough, its modules."""
    names = [kind.__name__.lstrip("_") for kind in type(model.model.model_config).__mro__]
    return family_of(names, lambda mark: getattr(denoiser(model), mark, None) is not None)


def family_name(model):
    """The host's name of the model's family, such as SD15 or SDXL."""
    return type(model.model.model_config).__name__.lstrip("_")


def text_entries(model):
    """{TextEntry: width of its vectors, None where the model does not say} of a MODEL: the main one, and those beside
    it that the model has.

    Raises ErasureError for a model whose text no map can act on.
    """
    known = family(model)
    main, others = known.text, known.entries[1:]
    layers = list(denoiser(model).named_modules())
    found = {entry: _first_width(entry, layers) for entry in (main, *others)}
    has = {main, *(entry for entry in others if not entry.readers or found[entry] is not None)}
    _require_main(model, main, found[main])
    return {entry: None if entry.pooled else width for entry, width in found.items() if entry in has}


def text_width(model):
    """Width of the text vectors a MODEL reads first, None where it does not say; raises ErasureError for a model whose
    text no map can act on."""
    entry = family(model).text
    width = _first_width(entry, denoiser(model).named_modules())
    _require_main(model, entry, width)
    return width


def _first_width(entry, layers):
    """Inputs of the first of (name, module) layers that reads an entry, or None."""
    if not entry.readers:
        return None
    found = (module.in_features for name, module in layers if hasattr(module, "in_features") and entry.reads(name))
    return next(map(int, found), None)


def _require_main(model, entry, width):
    """Raises ErasureError where nothing in a MODEL reads its main entry in the way that its family says."""
    name = type(model.model).__name__
    stated = getattr(model.model.model_config, "unet_config", {}).get(entry.width) if entry.width else width
    stated = stated[0] if isinstance(stated, (list, tuple)) else stated
    if entry.width and (width is None or width != stated):
        raise ErasureError(
            f"The model {name} has no cross-attention that reads the text directly (no matching attn2.to_k layers were "
            "found); closed-form erasure needs a Stable Diffusion 1, 2 or XL type U-Net, or a transformer that "
            "Membrane knows."
        )
    if entry.norm and width is None:
        raise ErasureError(
            f"The model {name} has no linear layer behind {entry.norm}, where a {family(model).title} model reads its "
            "text; update ComfyUI or Membrane, or load the model with the stock loader."
        )


def is_unet(model):
    """Whether the blocks of a MODEL read CLIP's rows by cross-attention, as U-Nets do."""
    return family(model).text == unet.TEXT


def require_unet(model, doing, instead):
    """Raises ErasureError for a MODEL whose blocks do not read CLIP's rows by cross-attention, as U-Nets do.

    doing: what cannot be done with it; instead: what can.
    """
    if not is_unet(model):
        raise ErasureError(
            f"{doing} works on Stable Diffusion 1, 2 and XL type U-Nets only, and this is {family(model).title} "
            f"({type(model.model).__name__}); {instead}."
        )
    text_width(model)  # raises for one without


def readers(model, entry):
    """(key of the weight, module) of the layers of a MODEL that read a text entry first, in the network's order."""
    for name, module in denoiser(model).named_modules():
        if entry.reads(name) and hasattr(module, "in_features"):
            yield f"{NETWORK}{name}{WEIGHT}", module


def text_readers(model):
    """The same for the main text entry."""
    return readers(model, family(model).text)


def text_rows(model, key):
    """TextRows of the layer of a key of layer_keys(), as this MODEL has them; None where nothing is known of them."""
    found, network = family(model).text_rows(site(plain_key(key))), denoiser(model)
    if found is None:
        return None
    read = tuple(t for t in found.tensors if not t[1] or getattr(network, t[1], None) is not None)
    return replace(found, tensors=read, place=LAST if found.moved and text_after_picture(network) else found.place)


def rows_order(model, key):
    """How the layer of a key gets the pictures of a batch, see Bypass: other packs cut them in U-Nets only."""
    if mixed(site(plain_key(key))):
        return MIXED
    if not hasattr(denoiser(model), "input_blocks"):
        return PICTURES
    return WHOLE if ".attn2." in plain_key(key) else TILED


def reads_vector(model):
    """Whether a MODEL reads a pooled vector beside the text, as SDXL does."""
    return getattr(model.model, "adm_channels", 0) > 0


def layer_keys(model):
    """{site: key} for every spelling the host's own LoRA loader knows of a layer that the model has; a key is that of
    a weight, or the host's tuple of it, the part of it that the name stands for where the host fuses layers, and the
    function that turns the weight round."""
    named = dict(denoiser(model).named_modules())
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = {site(name): key for name, key in names.items() if plain_key(key).endswith(WEIGHT)}
    return {name: key for name, key in keys.items() if _path(key) in named}


def _path(key):
    return plain_key(key).removeprefix(NETWORK).removesuffix(WEIGHT)


def plain_key(key):
    """The key of the weight in one of layer_keys()."""
    return key if isinstance(key, str) else key[0]


def modules(model):
    """{key of the weight: module} of the denoiser's layers."""
    named = denoiser(model).named_modules()
    return {f"{NETWORK}{name}{WEIGHT}": module for name, module in named if hasattr(module, "weight")}


def layer_weight(module, like):
    """(weight, bias) of a linear layer of the host as it multiplies with them, for an input like this."""
    cast = getattr(module, "cast_bias_weight", None)  # layers of GGUF loaders bring their own
    weight, bias = (cast(like) if cast else comfy.ops.cast_bias_weight(module, like))[:2]
    weight = plain_numbers(weight)
    scale = getattr(module, "scale_weight", None)  # of scaled fp8
    return weight if scale is None else weight * scale.to(weight), bias


def parameter_count(model):
    """Number of weights of the denoiser."""
    return sum(parameter.numel() for parameter in denoiser(model).parameters())


def require_fit(model, stack, keys):
    """Checks the changes of layers of a stack against a MODEL; returns how many of them the model has no layer for.

    Raises ErasureError when an adapter has no layer in common with the model or a change has another shape.
    """
    adapters = [entry.adapter for entry in stack.entries if entry.adapter.sites]
    layers, missing = modules(model) if adapters else {}, 0
    for adapter in adapters:
        known = [name for name in adapter.sites if name in keys]
        if not known:
            made_for = f" (made for {adapter.card.family})" if adapter.card.family else ""
            raise ErasureError(
                f"None of the {len(adapter.sites)} layers that the adapter {adapter.describe()}{made_for} changes "
                f"exists in this {family_name(model)} model (the first is {adapter.sites[0]}); "
                "use an adapter made for this family."
            )
        missing += len(adapter.sites) - len(known)
        for _, name, delta in adapter.of_layers:
            if name in keys:
                _require_shape(model, adapter, name, keys[name], layers.get(plain_key(keys[name])), delta)
    return missing


def _require_shape(model, adapter, name, key, layer, delta):
    wanted, found = _shape(layer, key), delta.shape
    # a change of low rank fits a convolution of one point and part of a fused layer as well
    low_rank = delta.low_rank() is not None
    if low_rank and (wanted is None or found == wanted or (*found, *[1] * (len(wanted) - 2)) == wanted):
        return
    if low_rank or found != wanted or not isinstance(key, str):
        raise _other_shape(model, adapter, name, found, wanted)


def _other_shape(model, adapter, name, found, wanted):
    return ErasureError(
        f"The adapter {adapter.describe()} changes {name} as a layer of shape {found}, but in this "
        f"{family_name(model)} model it has the shape {wanted}; use an adapter made for this family."
    )


def _shape(layer, key):
    """(out, in) of a linear layer, (out, in, height, width) of a convolution; None for anything else."""
    if hasattr(layer, "in_features"):
        out, shape = layer.out_features, (layer.in_features,)
    elif hasattr(layer, "in_channels") and hasattr(layer, "kernel_size") and layer.groups == 1:
        out, shape = layer.out_channels, (layer.in_channels, *layer.kernel_size)
    else:
        return None
    if not isinstance(key, str) and key[1] is not None:
        if key[1][0] != 0:
            return None
        out = key[1][2]
    return (out, *shape)
