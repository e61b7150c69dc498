"""Builds the bundled demo model "Pixel World" out of the host's own classes.

Only what the host cannot know is ours: the sizes of the networks, the tokenizer's files, and the small
text transformer (hosts of March 2024 fix CLIP's vocabulary in code). The variants on a U-Net are built here,
the one on a transformer in transformer.py.
"""

import comfy.latent_formats
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch
from safetensors import SafetensorError, safe_open

from ...demo.world import ASSETS, LATENT_RGB_FACTORS, TextTransformer, load_config, taesd_state_dict
from ...errors import ErasureError
from ..compat import embedding_class, has_flux, load_weights, patcher_class

TRANSFORMER = "transformer"
VARIANTS = ("day", "night", TRANSFORMER)
_REINSTALL = "install Membrane again to restore the demo model"


class LatentFormat(comfy.latent_formats.SD15):
    """Stable Diffusion 1's latent format, whose live previews show this model's colours."""

    def __init__(self):
        super().__init__()
        self.latent_rgb_factors = LATENT_RGB_FACTORS
        self.taesd_decoder_name = None  # an installed TAESD would preview it as noise


class PixelWorld(comfy.supported_models.SD15):
    unet_config = {}
    latent_format = LatentFormat

    def __init__(self, unet_config):
        self.unet_extra_config = {"num_heads": unet_config["num_heads"], "num_head_channels": -1}
        super().__init__({**unet_config, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None})


class _TextModel(TextTransformer):
    """TextTransformer in the shape in which the host's SDClipModel calls a text model."""

    def __init__(self, config, dtype, device, operations):
        class Operations(operations):
            Embedding = embedding_class(operations)

        super().__init__(config["text"], Operations, dtype=dtype, device=device)

    def get_input_embeddings(self):
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, embeddings):
        self.text_model.embeddings.token_embedding = embeddings

    def forward(self, tokens, attention_mask=None, embeds=None, num_tokens=None, intermediate_output=None, **options):
        """Token ids (B, T), or embeddings (B, T, width) and the number of tokens of each row including its end token.

        Returns hidden states of the last layer (B, T, width), those of layer intermediate_output or None,
        and the last layer's state at the first end token (B, width); all after the final LayerNorm.
        """
        if embeds is None:
            embeds = self.embed(tokens)
            # Rows end in end tokens. Their id is not fixed: hosts of 2024 renumber it to make room for embeddings.
            ends = (tokens == tokens[:, -1:]).int().argmax(-1)
        else:
            ends = torch.tensor(num_tokens, device=embeds.device) - 1
        last = super().forward(embeds)
        hidden = None
        if intermediate_output is not None:
            hidden = super().forward(embeds, stop_at=intermediate_output % self.num_layers + 1)
        return last, hidden, last[torch.arange(len(last), device=last.device), ends]


class ClipModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", **options):
        end = load_config()["text"]["vocab_size"] - 1
        super().__init__(
            device=device,
            dtype=torch.float32,
            textmodel_json_config=str(ASSETS / "config.json"),
            model_class=_TextModel,
            special_tokens={"start": end - 1, "end": end, "pad": end},
            return_projected_pooled=False,
        )


class _TextEncoder(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, **options):
        super().__init__(device=device, dtype=torch.float32, clip_model=ClipModel)
        self.dtypes = {torch.float32}


class WordTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, **options):
        super().__init__(
            tokenizer_path=str(ASSETS / "tokenizer"),
            embedding_directory=embedding_directory,
            embedding_size=load_config()["text"]["width"],
        )


class _Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, **options):
        super().__init__(embedding_directory=embedding_directory, tokenizer=WordTokenizer)


def read(variant, part):
    """The float32 tensors of one part of an asset file ("unet", "text"; "flux", "t5"), by their names in that part."""
    path = ASSETS / f"{variant}.safetensors"
    prefix = f"{part}."
    try:
        with safe_open(str(path), "pt") as file:
            return {k[len(prefix) :]: file.get_tensor(k).float() for k in file.keys() if k.startswith(prefix)}
    except (FileNotFoundError, SafetensorError) as error:
        found = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise ErasureError(f"The demo model's file {path.name} is {found}; {_REINSTALL}.") from error


def require(expected, found, what, variant):
    missing = sorted(set(expected) - set(found))
    if missing:
        raise ErasureError(
            f"The demo model's file {variant}.safetensors lacks {len(missing)} of {len(expected)} tensors of its "
            f"{what}, {missing[0]} among them; {_REINSTALL}."
        )


def network(config, weights, what, variant, disable_dynamic, adjust=None):
    """A MODEL of a model configuration with weights {name: tensor}.

    adjust(network, dtype, device): changes the network before the weights are loaded.
    """
    management = comfy.model_management
    device, kinds = management.get_torch_device(), config.supported_inference_dtypes
    parameters = sum(w.numel() for w in weights.values())
    dtype = management.unet_dtype(device=device, model_params=parameters, supported_dtypes=kinds)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, kinds))
    offload = management.unet_offload_device()
    model = config.get_model(weights, "", device=offload)
    if adjust is not None:
        adjust(model.diffusion_model, dtype, offload)
    patcher = patcher_class(not disable_dynamic)(model, load_device=device, offload_device=offload)
    found = config.process_unet_state_dict(dict(weights))
    require(model.diffusion_model.state_dict(), found, what, variant)
    load_weights(patcher, {k: w.to(dtype) for k, w in weights.items()})
    return patcher


def text_encoder(tokenizer, encoder, disable_dynamic):
    """A CLIP of a tokenizer's and a text encoder's class, without weights."""
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    options = {"disable_dynamic": True} if disable_dynamic else {}
    return comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"), **options)


def _model(variant, disable_dynamic):
    sizes = load_config()["unet"]

    def widen(unet, dtype, device):
        # The host takes the first channel multiplier to be 1 here, whatever the config says.
        channels = sizes["model_channels"] * sizes["channel_mult"][0]
        last = type(unet.out[2])
        unet.out[2] = last(channels, sizes["out_channels"], 3, padding=1, dtype=dtype, device=device)

    return network(PixelWorld(dict(sizes)), read(variant, "unet"), "U-Net", variant, disable_dynamic, widen)


def _clip(variant, disable_dynamic):
    weights = read(variant, "text")
    if not weights:
        variant, weights = "day", read("day", "text")
    clip = text_encoder(_Tokenizer, _TextEncoder, disable_dynamic)
    require(clip.cond_stage_model.clip_l.transformer.state_dict(), weights, "text encoder", variant)
    clip.load_sd(weights)
    return clip


def _vae(variant, disable_dynamic):
    # half precision would show: the VAE is exact to less than a grey level
    return comfy.sd.VAE(sd=taesd_state_dict(), dtype=torch.float32)


def _parts(variant):
    """What builds the MODEL, the CLIP and the VAE of a variant."""
    if variant != TRANSFORMER:
        return _model, _clip, _vae
    if not has_flux():
        raise ErasureError(
            f"The demo model's variant {TRANSFORMER} needs the host's Flux network, which this ComfyUI does not have "
            'or builds in another way; update ComfyUI to a release of 2025 or newer, or choose "day" or "night".'
        )
    from . import transformer  # its classes derive from some that older hosts lack

    return transformer.model, transformer.clip, _vae


def _patcher(loaded):
    return getattr(loaded, "patcher", loaded)


def _reload(variant, part, disable_dynamic=False):
    """A fresh patcher of one part: hosts of 2026 ask for it where a clone needs weights of its own."""
    return _patcher(_parts(variant)[part](variant, disable_dynamic))


def load_demo_model(variant):
    """The demo model as the host's own objects (MODEL, CLIP, VAE); every call gives independent ones.

    variant: "day", "night" or "transformer". Raises ErasureError if there is no such variant, if the host has no
    network for it, or if an asset file is missing, damaged or incomplete.
    """
    if variant not in VARIANTS:
        raise ErasureError(f"Demo model {variant!r} does not exist; choose one of: {', '.join(VARIANTS)}.")
    loaded = tuple(build(variant, False) for build in _parts(variant))
    for part, item in enumerate(loaded):
        _patcher(item).cached_patcher_init = (_reload, (variant, part))
    return loaded
