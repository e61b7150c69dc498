"""Text encoding through the host's CLIP object."""

import hashlib
from numbers import Integral

import torch

from ...errors import ErasureError
from ...text.encoded import Encoded
from ..model.layers import context_width

BATCH = 32  # prompts per forward pass of the text encoder
EMBEDDING = -1  # stands for a textual-inversion vector among token ids


def _plain(text):
    """The text with the host's weighting syntax switched off."""
    for bracket in "()":
        text = text.replace(f"\\{bracket}", bracket).replace(bracket, f"\\{bracket}")
    return text


def _tokenize(clip, text):
    """{encoder: [its chunk of (token, weight)]} of a text; raises when it does not fit one context."""
    if clip is None:
        raise ErasureError(
            "The CLIP input is empty, the checkpoint holds no text encoder; connect the CLIP that belongs to the model."
        )
    tokens = clip.tokenize(_plain(text))
    if not isinstance(tokens, dict):
        raise ErasureError(
            f"The text encoder {type(clip.cond_stage_model).__name__} tokenises in a way this pack does not know; "
            "use the CLIP of a Stable Diffusion 1, 2 or XL checkpoint."
        )
    chunks = _first(tokens)
    if len(chunks) > 1:
        size = len(chunks[0])
        raise ErasureError(
            f'The text "{_shorten(text)}" needs more than the {size - 2} tokens that the text encoder reads '
            f"at once (it fills {sum(map(len, chunks)) // size} contexts); shorten it."
        )
    return tokens


def _first(tokens):
    """The chunks of the first encoder."""
    return next(iter(tokens.values()))


def _ids(tokens):
    """Token ids (T,) of a tokenized text in the first encoder's context."""
    return [int(token) if isinstance(token, Integral) else EMBEDDING for token, *_ in _first(tokens)[0]]


def encode(clip, prompts, on_progress=None, pooled=False):
    """Encoded prompts. The prompts of a batch travel as chunks of one long prompt, which every host batches.

    pooled: with the pooled vector of each as well, which the host gives for one prompt at a time only.
    """
    prompts = tuple(prompts)
    tokenized = [_tokenize(clip, prompt) for prompt in prompts]
    end = _ids(_tokenize(clip, ""))[1]  # follows the start token of an empty prompt
    vectors = []
    for start in range(0, len(prompts), BATCH):
        together = tokenized[start : start + BATCH]
        count = len(together)
        batch = clip.encode_from_tokens({name: sum((t[name] for t in together), []) for name in together[0]})
        if batch.shape[1] % count:
            raise ErasureError(
                f"The text encoder {type(clip.cond_stage_model).__name__} gave {batch.shape[1]} vectors for "
                f"{count} prompts; closed-form erasure needs the same number for each, "
                "use a Stable Diffusion 1, 2 or XL checkpoint."
            )
        vectors.append(batch.reshape(count, -1, batch.shape[-1]).float().cpu())
        if on_progress:
            on_progress(min(start + BATCH, len(prompts)))
    together = torch.cat([_pooled(clip, tokens) for tokens in tokenized]) if pooled else None
    return Encoded(prompts, tuple(map(_ids, tokenized)), torch.cat(vectors), end, together)


def _pooled(clip, tokens):
    """Pooled vector (1, p) of one tokenized prompt."""
    found = clip.encode_from_tokens(tokens, return_pooled=True)[1]
    if found is None:
        raise ErasureError(
            f"The text encoder {type(clip.cond_stage_model).__name__} gives no pooled vector; "
            'connect the CLIP of an SDXL checkpoint, or set pooled to "leave".'
        )
    return found.float().cpu()


def encode_for(model, clip, prompts, on_progress=None, pooled=False):
    """Encoded prompts in the width that a MODEL reads; raises when the CLIP belongs to another one."""
    width = context_width(model)
    encoded = encode(clip, prompts, on_progress, pooled)
    found = encoded.vectors.shape[-1]
    if found != width:
        raise ErasureError(
            f"The text encoder gives vectors of width {found}, but the model reads vectors of width {width}; "
            "connect the CLIP that belongs to the model."
        )
    return encoded


def fingerprint(clip):
    """Short name of a text encoder that survives file formats: a hash of its token embeddings, rounded to float16."""
    digest = hashlib.sha256()
    state = clip.cond_stage_model.state_dict()
    for key in sorted(
        k for k in state if k.endswith(("token_embedding.weight", "shared.weight", "embed_tokens.weight"))
    ):
        weight = state[key]
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(
            weight[:: max(1, len(weight) // 256)].detach().half().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def _shorten(text, length=60):
    return text if len(text) <= length else text[: length - 3] + "..."
