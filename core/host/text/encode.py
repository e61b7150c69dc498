"""Text encoding through the host's CLIP object."""

import hashlib
from numbers import Integral

import comfy.model_management
import torch

from ...errors import ErasureError
from ...text.encoded import UNKNOWN, WORD, Encoded, EncodedPrompt, Frame
from ..compat import encode_with_extras

BATCH = 32  # prompts per forward pass of the text encoder
CLIP_STREAMS = {"l", "g", "h"}  # what the host calls the encoders whose prompts all fill contexts of one length
BEFORE = "a"  # a word to tell a tokenizer's frame by, and to see other words behind


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


def ids_of(contexts):
    """Token ids of some contexts, one after the other; UNKNOWN for embeddings."""
    return [int(token[0]) if isinstance(token[0], Integral) else UNKNOWN for one in contexts for token in one]


def fills_contexts(tokens):
    """Whether a tokenized text is one of CLIP encoders alone, whose prompts all fill contexts of one length."""
    return set(tokens) <= CLIP_STREAMS


def encode(clip, prompts, on_progress=None, pooled=False):
    """Encoded prompts, as the text encoder gives them.

    Prompts of CLIP encoders are batched; those of all others have different lengths and are encoded one at a time.
    pooled: with the pooled vector of each as well.
    """
    prompts = tuple(prompts)
    if in_contexts(clip):
        return _contexts(clip, prompts, on_progress, pooled)
    frames, found, vectors = {}, [], []
    for prompt, tokens, given in each_given(clip, prompts, on_progress):
        found.append(described(clip, prompt, tokens, given["cond"][0].float().cpu(), frames))
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
        yield prompt, tokens, encode_with_extras(clip, tokens)
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
    each = [clip.encode_from_tokens(tokens, return_pooled=True)[1] for tokens in tokenized] if pooled else ()
    ids = [ids_of(_first(tokens)) for tokens in tokenized]
    return Encoded.of_contexts(prompts, ids, torch.cat(vectors), end, pooled_of(clip, each) if pooled else None)


def pooled_of(clip, vectors):
    """Pooled vectors (n, p) as one tensor; raises ErasureError where the encoder gives none."""
    if any(vector is None for vector in vectors):
        raise ErasureError(
            f"The text encoder {type(clip.cond_stage_model).__name__} gives no pooled vector; "
            'connect the CLIP of an SDXL checkpoint, or set pooled to "leave".'
        )
    return torch.cat([vector.float().cpu() for vector in vectors])


# ---------------------------------------------------------------- which row is which token


def described(clip, prompt, tokens, rows, frames, stream=""):
    """EncodedPrompt of rows (T, d) that an encoder gave for a tokenized prompt.

    frames: {encoder: Frame} so far; stream: the encoder whose tokens the rows belong to, "" where their number tells.
    """
    first = next(iter(tokens))
    streams, cut = _streams({stream: tokens[stream]} if stream in tokens else tokens, len(rows))
    for name in {first, *streams} - frames.keys():
        frames[name] = Frame.of(*(ids_of(_tokenize(clip, text)[name]) for text in ("", BEFORE)))
    heard = ids_of(tokens[first])
    spoken = (_words(frames[first], heard), _inside(clip, prompt, first, frames[first]))
    said = {"heard": frozenset(heard), "spoken": tuple(frozenset(ids) for ids in spoken if ids)}
    if not streams:
        return EncodedPrompt(prompt, rows, (UNKNOWN,) * len(rows), torch.full((len(rows),), WORD), **said)
    ids = [ids_of(tokens[name]) for name in streams]
    roles = torch.cat([frames[name].roles(own) for name, own in zip(streams, ids)])
    inside = _inside(clip, prompt, streams[-1], frames[streams[-1]])
    return EncodedPrompt(prompt, rows, tuple(sum(ids, []))[cut:], roles[cut:], inside, **said)


def _words(frame, ids):
    """The ids that stand for words."""
    return tuple(i for i, role in zip(ids, frame.roles(ids).tolist()) if role == WORD)


def _streams(tokens, length):
    """(names of the encoders whose tokens are the rows, how many rows were cut off in front).

    The rows are those of one encoder, or of the first and the last one after the other, as SD3 joins them; language
    models cut their template off the front.
    """
    sizes = {name: sum(map(len, contexts)) for name, contexts in tokens.items()}
    names = list(sizes)
    for name in names:
        if sizes[name] == length:
            return (name,), 0
    if len(names) > 1 and sizes[names[0]] + sizes[names[-1]] == length:
        return (names[0], names[-1]), 0
    longer = next((name for name in reversed(names) if sizes[name] > length), None)
    return ((longer,), sizes[longer] - length) if longer else ((), 0)


def _inside(clip, prompt, stream, frame):
    """Token ids of a prompt's words as they are behind another word, () where that cannot be told."""
    before, both = (_words(frame, ids_of(_tokenize(clip, text)[stream])) for text in (BEFORE, f"{BEFORE} {prompt}"))
    return both[len(before) :] if both[: len(before)] == before else ()


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
