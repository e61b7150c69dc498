"""Text encoding through the host's CLIP object."""

import hashlib
import logging

import comfy.model_management
import torch

from ...errors import ErasureError
from ...text.encoded import Encoded, EncodedPrompt
from ..compat import encode_with_extras
from .known_tokens import PROMPTS
from .tokens import BEFORE, Tokenizer, fills_contexts, ids_of
from .vocabulary import EMBEDDINGS

log = logging.getLogger("membrane")

BATCH = 32  # prompts per forward pass of the text encoder


def _plain(text):
    """The text with the host's weighting syntax switched off."""
    for bracket in "()":
        text = text.replace(f"\\{bracket}", bracket).replace(bracket, f"\\{bracket}")
    return text


def _tokenize(clip, text):
    """{encoder: [its contexts of (token, weight)]} of a text."""
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
    return tokens


def _require_one_context(text, tokens):
    contexts = _first(tokens)
    if len(contexts) > 1:
        size = len(contexts[0])
        raise ErasureError(
            f'The text "{_shorten(text)}" needs more than the {size - 2} tokens that the text encoder reads '
            f"at once (it fills {sum(map(len, contexts)) // size} contexts); shorten it."
        )


def _first(tokens):
    """The contexts of the first encoder."""
    return next(iter(tokens.values()))


def encode(clip, prompts, on_progress=None, pooled=False):
    """Encoded prompts, as the text encoder gives them.

    Prompts of CLIP encoders are batched; those of all others have different lengths and are encoded one at a time.
    pooled: with the pooled vector of each as well.
    """
    prompts = tuple(prompts)
    if in_contexts(clip):
        return _contexts(clip, prompts, on_progress, pooled)
    found, vectors = [], []
    for prompt, tokens, given in each_given(clip, prompts, on_progress):
        found.append(described(clip, prompt, tokens, given["cond"][0].detach().float().cpu()))
        vectors.append(given.get("pooled_output"))
    return Encoded(found, pooled=Encoded.of_pooled(prompts, pooled_of(clip, vectors)) if pooled else None)


def in_contexts(clip):
    """Whether a CLIP is one of CLIP encoders alone."""
    return fills_contexts(_tokenize(clip, ""))


def each_given(clip, prompts, on_progress=None):
    """(prompt, its tokens, {"cond", "pooled_output", and what else the encoder gives}) of prompts, one at a time."""
    for i, prompt in enumerate(prompts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        tokens = _tokenize(clip, prompt)
        with PROMPTS.aside():
            given = encode_with_extras(clip, tokens)
        yield prompt, tokens, given
        if on_progress:
            on_progress(i + 1)


def _contexts(clip, prompts, on_progress, pooled):
    """Encoded prompts of CLIP encoders, which travel as contexts of one long prompt, as every host batches them."""
    tokenized = [_tokenize(clip, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, tokenized):
        _require_one_context(prompt, tokens)
    end = ids_of(_first(_tokenize(clip, "")))[1]  # follows the start token of an empty prompt
    vectors = []
    for start in range(0, len(prompts), BATCH):
        together = tokenized[start : start + BATCH]
        count = len(together)
        with PROMPTS.aside():
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
    with PROMPTS.aside():
        each = [clip.encode_from_tokens(tokens, return_pooled=True)[1] for tokens in tokenized] if pooled else ()
    ids = [ids_of(_first(tokens)) for tokens in tokenized]
    rows = _one_a_token(clip, torch.cat(vectors), len(ids[0]))
    return Encoded.of_contexts(prompts, ids, rows, end, pooled_of(clip, each) if pooled else None)


def _one_a_token(clip, rows, tokens):
    """Rows (n, T, d) of contexts of T tokens; of an encoder that gives each vector twice, side by side, every second.

    NegPip does so, one for the keys and one for the values, which are equal where no weight is negative. Raises
    ErasureError where the rows are not those of the tokens.
    """
    if rows.shape[1] == tokens:
        return rows
    if rows.shape[1] != 2 * tokens or not torch.equal(rows[:, ::2], rows[:, 1::2]):
        raise ErasureError(
            f"The text encoder {type(clip.cond_stage_model).__name__} gives {rows.shape[1]} vectors for {tokens} "
            "tokens, so that no vector belongs to a token; connect the CLIP as the checkpoint loader gives it."
        )
    log.info(
        "Membrane: the text encoder gives %d vectors for %d tokens, each twice, as NegPip's does; the erasure is "
        "computed on one of each and acts on both",
        2 * tokens,
        tokens,
    )
    return rows[:, ::2]


def pooled_of(clip, vectors):
    """Pooled vectors (n, p) as one tensor; raises ErasureError where the encoder gives none."""
    if any(vector is None for vector in vectors):
        raise ErasureError(
            f"The text encoder {type(clip.cond_stage_model).__name__} gives no pooled vector; "
            'connect the CLIP of an SDXL checkpoint, or set pooled to "leave".'
        )
    return torch.cat([vector.float().cpu() for vector in vectors])


# ---------------------------------------------------------------- which row is which token


def described(clip, prompt, tokens, rows, stream=""):
    """EncodedPrompt of rows (T, d) that an encoder gave for a tokenized prompt.

    stream: the encoder whose tokens the rows belong to, "" where their number tells.
    """
    tokenizer, first = Tokenizer(clip.tokenizer), next(iter(tokens))
    own = {stream: tokens[stream]} if stream in tokens else tokens
    layout, heard = tokenizer.layout(own, len(rows)), tokenizer.heard(tokens, len(rows))
    spoken = (tokenizer.word_ids(first, tokens[first]), _inside(clip, tokenizer, prompt, first))
    inside = _inside(clip, tokenizer, prompt, layout.stream) if layout.stream else ()
    spoken = tuple(frozenset(ids) for ids in spoken if ids)
    return EncodedPrompt(prompt, rows, layout.ids, layout.roles, inside, heard, spoken, layout.head)


def _inside(clip, tokenizer, prompt, stream):
    """Token ids of a prompt's words as they are behind another word, () where that cannot be told."""
    before, both = (
        tokenizer.word_ids(stream, _tokenize(clip, text)[stream]) for text in (BEFORE, f"{BEFORE} {prompt}")
    )
    return both[len(before) :] if both[: len(before)] == before else ()


def fingerprint(clip):
    """Short name of a text encoder that survives file formats: a hash of its token embeddings, rounded to float16."""
    digest = hashlib.sha256()
    state = clip.cond_stage_model.state_dict()
    for key in sorted(k for k in state if k.endswith(EMBEDDINGS)):
        weight = state[key]
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(
            weight[:: max(1, len(weight) // 256)].detach().half().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def _shorten(text, length=60):
    return text if len(text) <= length else text[: length - 3] + "..."
