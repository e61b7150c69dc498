"""Pixel World on a transformer: the host's own Flux network and its pair of text encoders, at the demo's size.

Only hosts since November 2024 have the classes that these derive from, see compat.has_flux().
"""

import comfy.sd1_clip
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.t5
import torch

from ...demo.world import ASSETS, load_config
from ..compat import flux_options
from .model import ClipModel, LatentFormat, WordTokenizer, network, read, require, text_encoder


class PixelWorldFlux(comfy.supported_models.FluxSchnell):
    """Rectified flow without a guidance input, on the demo's four channels."""

    unet_config = {}
    latent_format = LatentFormat


class _T5(comfy.text_encoders.t5.T5):
    def __init__(self, config, dtype, device, operations):
        super().__init__(config["t5"], dtype, device, operations)


class _T5Model(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", **options):
        end = load_config()["t5"]["vocab_size"] - 1
        super().__init__(
            device=device,
            dtype=torch.float32,
            textmodel_json_config=str(ASSETS / "config.json"),
            model_class=_T5,
            special_tokens={"end": end, "pad": end - 1},
        )


class _TextEncoder(comfy.text_encoders.flux.FluxClipModel):
    """Flux's two encoders: CLIP for the pooled state, T5 for the rows."""

    def __init__(self, device="cpu", dtype=None, **options):
        torch.nn.Module.__init__(self)  # the parent's own would build both at their published sizes
        self.clip_l = ClipModel(device=device)
        self.t5xxl = _T5Model(device=device)
        self.dtypes = {torch.float32}


class _Words:
    """The demo's tokenizer, in the form in which T5's answers: no start token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path, **options):
        return cls(comfy.sd1_clip.CLIPTokenizer.from_pretrained(path))

    def __call__(self, text):
        return {"input_ids": self.tokenizer(text)["input_ids"][1:]}

    def get_vocab(self):
        return self.tokenizer.get_vocab()


class _T5Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None):
        sizes = load_config()["t5"]
        super().__init__(
            tokenizer_path=str(ASSETS / "tokenizer"),
            pad_with_end=False,
            embedding_directory=embedding_directory,
            embedding_size=sizes["d_model"],
            embedding_key="t5xxl",
            tokenizer_class=_Words,
            has_start_token=False,
            pad_to_max_length=False,
            max_length=99999999,
            min_length=sizes["min_length"],
        )
        self.pad_token = sizes["vocab_size"] - 2  # CLIP's start token, which no T5 prompt has


class _Tokenizer(comfy.text_encoders.flux.FluxTokenizer):
    def __init__(self, embedding_directory=None, **options):
        self.clip_l = WordTokenizer(embedding_directory=embedding_directory)
        self.t5xxl = _T5Tokenizer(embedding_directory=embedding_directory)


def model(variant, disable_dynamic):
    config = PixelWorldFlux({"image_model": "flux", **load_config()["flux"], **flux_options()})
    return network(config, read(variant, "flux"), "transformer", variant, disable_dynamic)


def clip(variant, disable_dynamic):
    clip = text_encoder(_Tokenizer, _TextEncoder, disable_dynamic)
    encoders = clip.cond_stage_model
    for encoder, file, part in ((encoders.clip_l, "day", "text"), (encoders.t5xxl, variant, "t5")):
        weights = read(file, part)
        require(encoder.transformer.state_dict(), weights, "text encoder", file)
        clip.load_sd(weights)
    return clip
