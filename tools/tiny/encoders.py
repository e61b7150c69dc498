"""The host's own text encoders of every family, made small: real tokenizers and templates, random weights.

    clip = encoder("qwen_image")          # CLIP

Tokenizers that the host takes out of a checkpoint (sentencepiece, tekken) are made here over a few hundred words, with
the settings of the real ones.
"""

import base64
import contextlib
import functools
import importlib
import inspect
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .networks import CPU, NotInThisHost, fill

TEXT = (
    "star circle heart moon house tree photo picture painting of a an the in on with and red blue green van gogh style "
    "Van Gogh big small old young cat dog night day sky sea describe the image by detailing color shape size texture "
    "quantity text spatial relationships objects background you are an assistant designed to generate superior images "
    "with the degree of image text alignment based on textual prompts user prompts prompt start nudity person"
).split()

CLIP = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_hidden_layers=3)
T5 = dict(d_model=64, d_ff=128, num_heads=2, d_kv=32, num_layers=2)
LANGUAGE = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1
)
LANGUAGES = (
    "qwen25_7b", "qwen25_3b", "qwen3_4b", "qwen3_8b", "qwen3_06b", "gemma2_2b", "gemma3_12b", "gemma3_4b",
    "mistral3_24b", "ministral3_3b", "qwen3vl_4b", "qwen3vl_8b", "qwen3_2b", "llama",
)  # fmt: skip
# an encoder that is not named here is built in its full size, of gigabytes; "" is for those that the host does not name
SMALL = {
    **{f"{name}_model_config": CLIP for name in ("clip_l", "clip_g", "clip_h", "hydit_clip")},
    **{f"{name}_model_config": T5 for name in ("t5xxl", "umt5xxl", "pile_t5xl", "mt5xl", "byt5_small")},
    **{f"{name}_model_config": LANGUAGE for name in ("", *LANGUAGES)}, "_model_config": LANGUAGE,
}  # fmt: skip


@dataclass(frozen=True)
class TextEncoder:
    """What an encoder is made of.

    config: name of the host's model configuration, where that makes it; else module, tokenizer and model: below
    comfy.text_encoders, the model a class, or a function that makes one of `arguments`. sizes: other than SMALL's.
    files: {name: bytes} that a checkpoint brings.
    """

    config: str = ""
    module: str = ""
    tokenizer: str = ""
    model: str = ""
    arguments: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)


@functools.cache
def sentencepiece(prefix):
    """A sentencepiece model over TEXT, (bytes,) of its file; prefix: whether a text begins with a space of its own."""
    from sentencepiece import SentencePieceTrainer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        lines = [" ".join(TEXT)] * 20 + [f"a {word} of a {word}" for word in TEXT] * 20
        path.write_text("\n".join(lines))
        SentencePieceTrainer.train(
            input=str(path), model_prefix=str(path.with_suffix("")), vocab_size=250, add_dummy_prefix=prefix,
            hard_vocab_limit=False, model_type="unigram", byte_fallback=False, minloglevel=2, pad_id=0, eos_id=1,
            bos_id=2, unk_id=3,
        )  # fmt: skip
        return torch.frombuffer(bytearray(path.with_suffix(".model").read_bytes()), dtype=torch.uint8)


CONTROLS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]"
).split()


@functools.cache
def tekken():
    """A tokenizer of Mistral, as bytes: single bytes, and TEXT's words with and without a space before them."""
    from comfy.text_encoders import bpe_tokenizer

    pieces = [bytes([i]) for i in range(256)]
    for word in dict.fromkeys([*(f" {word}" for word in TEXT), *TEXT]):  # every beginning, so that there are merges
        raw = word.encode()
        pieces += [raw[:n] for n in range(2, len(raw) + 1)]
    pieces = list(dict.fromkeys(pieces))
    size = len(pieces) + 1000
    blob = {
        "config": {"pattern": bpe_tokenizer._LLAMA_PATTERN, "num_vocab_tokens": size, "default_vocab_size": size,
                   "default_num_special_tokens": 1000, "version": "v3"},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
                  for i, piece in enumerate(pieces)],
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(CONTROLS)],
    }  # fmt: skip
    return torch.frombuffer(bytearray(json.dumps(blob).encode()), dtype=torch.uint8)


def _of(module, tokenizer, model, sizes=None, files=None, **arguments):
    return TextEncoder("", module, tokenizer, model, arguments, sizes or {}, files or {})


def _layers(name, count):
    return {f"{name}_model_config": dict(LANGUAGE, num_hidden_layers=count)}


WITH_SPACE = {"spiece_model": functools.partial(sentencepiece, True)}
WITHOUT_SPACE = {"spiece_model": functools.partial(sentencepiece, False)}
ENCODERS = {
    "sd15": TextEncoder("SD15"),
    "sd2": TextEncoder("SD20"),
    "sdxl": TextEncoder("SDXL"),
    "sdxl_refiner": TextEncoder("SDXLRefiner"),
    "cascade": TextEncoder("Stable_Cascade_C"),
    "auraflow": TextEncoder("AuraFlow"),
    "hunyuan_dit": TextEncoder("HunyuanDiT", files={"mt5xl.spiece_model": functools.partial(sentencepiece, True)}),
    # T5's rows stand behind CLIP's, which the host fills up to 4096
    "sd3": _of("sd3_clip", "SD3Tokenizer", "sd3_clip", {"t5xxl_model_config": dict(T5, d_model=4096)}),
    "sd3_no_t5": _of("sd3_clip", "SD3Tokenizer", "sd3_clip", t5=False),
    "flux": _of("flux", "FluxTokenizer", "flux_clip"),
    "flux2": _of("flux", "Flux2Tokenizer", "flux2_te", _layers("mistral3_24b", 31), {"tekken_model": tekken}),
    "flux2_klein": _of("flux", "KleinTokenizer", "klein_te", _layers("qwen3_4b", 28), model_type="qwen3_4b"),
    "chroma": _of("pixart_t5", "PixArtTokenizer", "pixart_te"),
    "mochi": _of("genmo", "MochiT5Tokenizer", "mochi_te"),
    "ltxv": _of("lt", "LTXVT5Tokenizer", "ltxv_te"),
    "cosmos": _of("cosmos", "CosmosT5Tokenizer", "te"),
    "cogvideox": _of("cogvideo", "CogVideoXTokenizer", "CogVideoXT5XXL"),
    "hunyuan_video": _of("hunyuan_video", "HunyuanVideoTokenizer", "hunyuan_video_clip"),
    "hunyuan_image": _of("hunyuan_image", "HunyuanImageTokenizer", "te", {"_model_config": T5}),
    "hidream": _of("hidream", "HiDreamTokenizer", "hidream_clip", _layers("llama", 32)),
    "wan": _of("wan", "WanT5Tokenizer", "te", files=WITH_SPACE),
    "lumina2": _of("lumina2", "LuminaTokenizer", "te", files=WITHOUT_SPACE),
    "z_image": _of("z_image", "ZImageTokenizer", "te"),
    "qwen_image": _of("qwen_image", "QwenImageTokenizer", "te"),
    "omnigen2": _of("omnigen2", "Omnigen2Tokenizer", "te"),
    "kandinsky5": _of("kandinsky5", "Kandinsky5Tokenizer", "te"),
    "anima": _of("anima", "AnimaTokenizer", "te"),
    "longcat": _of("longcat_image", "LongCatImageTokenizer", "te"),
    "ovis": _of("ovis", "OvisTokenizer", "te", {"_model_config": LANGUAGE}),
    "ernie": _of("ernie", "ErnieTokenizer", "te", files={"tekken_model": tekken}),
    "krea2": _of("krea2", "Krea2Tokenizer", "te", _layers("qwen3vl_4b", 36)),
}
SLOW = {  # reads 1024 tokens of every text
    "ltxav": _of("lt", "LTXAVGemmaTokenizer", "ltxav_te", files=WITHOUT_SPACE, dtype_llama=torch.float32),
}


@contextlib.contextmanager
def without_eyes():
    """Language models that see get no vision model while they are built: the host fixes its size."""
    before = []
    for module, kind in (("qwen_vl", "Qwen2VLVisionTransformer"), ("qwen3vl", "Qwen3VLVisionModel")):
        with contextlib.suppress(ImportError):
            found = importlib.import_module(f"comfy.text_encoders.{module}")
            before.append((found, kind, getattr(found, kind)))
            setattr(found, kind, lambda *args, **options: torch.nn.Module())
    try:
        yield
    finally:
        for module, kind, own in before:
            setattr(module, kind, own)


def _target(made):
    import comfy.supported_models
    import comfy.supported_models_base

    if made.config:
        config = getattr(comfy.supported_models, made.config, None)
        if config is None:
            raise NotInThisHost(f"this host has no {made.config}")
        return config.clip_target(config), {key: value() for key, value in made.files.items()}
    try:
        module = importlib.import_module(f"comfy.text_encoders.{made.module}")
        tokenizer, model = getattr(module, made.tokenizer), getattr(module, made.model)
        files = {key: value() for key, value in made.files.items()}
    except (ImportError, AttributeError):
        raise NotInThisHost(f"this host has no {made.tokenizer}") from None
    model = model if inspect.isclass(model) else model(**made.arguments)
    return comfy.supported_models_base.ClipTarget(tokenizer, model), files


def encoder(name, seed=0, full=False):
    """CLIP of a family's own encoder class with random weights, small, or in its full size."""
    import comfy.sd

    made = (ENCODERS | SLOW)[name]
    if "tokenizer_data" not in inspect.signature(comfy.sd.CLIP).parameters:
        raise NotInThisHost("this host has no model_options")
    target, files = _target(made)
    sizes = {**({} if full else SMALL), **made.sizes, "dtype": torch.float32, "load_device": CPU, "offload_device": CPU}
    with without_eyes():
        clip = comfy.sd.CLIP(target, embedding_directory=None, tokenizer_data=files, model_options=sizes)
    fill(clip.cond_stage_model, seed)
    return clip
