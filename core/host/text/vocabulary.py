"""The words of a text encoder's vocabulary."""

import re

import torch

from ...errors import ErasureError
from ...text.words import plain_words
from .tokens import BEFORE, Tokenizer, fills_contexts

EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")  # of CLIP, T5 and language models
EMBEDDING = "embedding:"
NAMED_EMBEDDING = re.compile(rf"{EMBEDDING}([^\s,]+)")  # as the host finds it in a prompt
ROWS = 32768  # of a table of embeddings, compared at a time


def vocabulary_of(clip, name):
    """{id: piece} of the encoder of that name in a tokenized text, None where its tokenizer shows none."""
    return getattr(Tokenizer(clip.tokenizer).of(name), "inv_vocab", None)


def words_near(clip, concept, count):
    """The `count` whole words of a CLIP whose token embeddings are closest to those of a concept, the closest first.

    None of them is one of the concept's own words or contains one. Of several encoders the one counts whose rows a
    model reads.
    """
    tokens, tokenizer = clip.tokenize(concept), Tokenizer(clip.tokenizer)
    name = _encoder(tokens)
    vocabulary, table = tokenizer.vocabulary(name), _embeddings(clip, None if fills_contexts(tokens) else name)
    if vocabulary is None or table is None:
        raise ErasureError(
            f"The text encoder {type(clip.cond_stage_model).__name__} shows no vocabulary to search in; "
            "switch the text-only search off."
        )
    own = concept.lower().split()
    words = {i: word for i, word in vocabulary.words.items() if i < len(table)}
    plain = {i: word.lower() for i, word in words.items() if len(word) > 2 and word.isascii() and word.isalpha()}
    usable = [i for i, word in plain.items() if not any(part in word for part in own)]
    wanted = [i for i in _ids(clip, tokenizer, name, concept) if i >= 0]
    if not wanted:
        raise ErasureError("No concept to look for was given; write the word that was erased.")
    target = _unit(table[wanted])
    near = torch.cat([(_unit(table[some]) @ target.T).amax(dim=1) for some in torch.tensor(usable).split(ROWS)])
    first = {}
    for place in near.argsort(descending=True).tolist():
        first.setdefault(plain[usable[place]], words[usable[place]])  # in one spelling only
        if len(first) == count:
            break
    return list(first.values())


def spelled_words(clip, texts):
    """Words of texts, in lower case, that every tokenizer of a CLIP takes apart into pieces of one or two letters.

    Only words in letters with spaces between them count; Han, kana and Hangul are always taken apart. None of a CLIP
    that shows no tokenizer, as those of other packs may.
    """
    if getattr(clip, "tokenizer", None) is None:
        return []
    words = dict.fromkeys(word for text in texts for word in plain_words(text) if len(word) > 2 and word.isascii())
    return [word for word in words if word.isalpha() and _is_spelled(clip, word)]


def missing_embeddings(clip, texts):
    """Names of embeddings in texts that the host does not find: what is left of them is no token at all."""
    named = dict.fromkeys(name for text in texts for name in NAMED_EMBEDDING.findall(text))
    return [] if getattr(clip, "tokenizer", None) is None else [name for name in named if _is_nothing(clip, name)]


def _is_nothing(clip, name):
    tokens, tokenizer = clip.tokenize(f"{EMBEDDING}{name}"), Tokenizer(clip.tokenizer)
    return not any(tokenizer.word_ids(encoder, contexts) for encoder, contexts in tokens.items())


def _is_spelled(clip, word):
    tokens, tokenizer = clip.tokenize(word), Tokenizer(clip.tokenizer)
    pieces = [len(tokenizer.word_ids(name, contexts)) for name, contexts in tokens.items()]
    return bool(pieces) and min(pieces) > max(2, len(word) // 2)


def _encoder(tokens):
    """Name of the encoder that is searched: CLIP's first, or the last beside CLIP."""
    return next(iter(tokens)) if fills_contexts(tokens) else [name for name in tokens if not fills_contexts({name})][-1]


def _embeddings(clip, name):
    """The table of token embeddings (V, d) of an encoder, None for one without; name: None for the first of all."""
    tables = {k: w for k, w in clip.cond_stage_model.state_dict().items() if k.endswith(EMBEDDINGS)}
    own = (w for k, w in tables.items() if name is None or name in k.split("."))
    return next(own, None)


def _ids(clip, tokenizer, name, concept):
    """Token ids of a concept, as it is after another word where the tokenizer tells the two apart."""
    before, both, alone = (
        tokenizer.word_ids(name, clip.tokenize(text)[name]) for text in (BEFORE, f"{BEFORE} {concept}", concept)
    )
    return (both[len(before) :] if both[: len(before)] == before else ()) or alone


def _unit(rows):
    return torch.nn.functional.normalize(rows.float().cpu(), dim=1)
