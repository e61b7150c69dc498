"""A text encoder that is a table: one vector a word, plus one a place, and whatever else a family's encoders give.

It stands for the encoders of every family, at any width, where a test is about the network; encoders.py makes the real
ones.
"""

import functools

import torch

WORDS = ["<pad>", "<start>", "<end>"] + (
    "a an the of in on with and red blue green star circle heart moon house tree photo picture painting van gogh style "
    "big small old young cat dog night day sky sea"
).split()
PAD, START, END = range(3)
LONGEST = 64


class Tokenizer:
    """Words by their place in WORDS; `padded` tokens for every text, or as many as it has."""

    def __init__(self, padded, longest=LONGEST):
        self.padded, self.longest = padded, longest

    def tokenize_with_weights(self, text, return_word_ids=False, **options):
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        ids = [START, *map(_id, words[: self.longest - 2]), END]
        if self.padded:
            ids = (ids + [PAD] * self.padded)[: self.padded]
        return {"tiny": [[(i, 1.0) for i in ids]]}

    def state_dict(self):
        return {}


def _id(word):
    return WORDS.index(word) if word in WORDS else 3 + sum(word.encode()) % (len(WORDS) - 3)


class Encoder(torch.nn.Module):
    """Vectors (1, T, width) of T tokens.

    extra(ids, generator): what it gives beside them, {name: tensor}; "pooled_output" is the pooled vector. longest: the
    most tokens of a prompt.
    """

    def __init__(self, width, extra, longest=LONGEST, device="cpu", dtype=None, model_options=None):
        super().__init__()
        self.extra, self.dtypes = extra, {torch.float32}
        generator = torch.Generator().manual_seed(7)
        vectors = torch.randn(len(WORDS), width, generator=generator)
        self.token_embedding = torch.nn.Embedding(len(WORDS), width)
        self.token_embedding.weight = torch.nn.Parameter(vectors, requires_grad=False)
        self.places = torch.nn.Parameter(0.3 * torch.randn(longest, width, generator=generator), requires_grad=False)

    def set_clip_options(self, options):
        pass

    def reset_clip_options(self):
        pass

    def load_sd(self, sd):
        return [], []

    def encode_token_weights(self, tokens):
        contexts = [[i for i, *_ in context] for context in tokens["tiny"]]
        rows = [self.token_embedding(torch.tensor([ids])) + self.places[: len(ids)] for ids in contexts]
        # the same prompt has the same pooled vector, and so on, every time
        generator = torch.Generator().manual_seed(sum(i * 61**n for n, i in enumerate(contexts[-1])) % 2**31)
        given = self.extra(contexts[-1], generator) if self.extra else {}
        pooled = given.pop("pooled_output", None)
        found = torch.cat(rows, dim=1), pooled
        return (*found, given) if given else found  # hosts before August 2024 take no more than two


def clip(width, extra=None, padded=8, longest=LONGEST):
    """comfy.sd.CLIP of an Encoder."""
    import comfy.sd
    import comfy.supported_models_base

    target = comfy.supported_models_base.ClipTarget(
        lambda embedding_directory=None, tokenizer_data=None: Tokenizer(padded, longest),
        functools.partial(Encoder, width, extra, longest),
    )
    return comfy.sd.CLIP(target, embedding_directory=None)


# ---------------------------------------------------------------- what encoders give beside the vectors


def pooled(width):
    """A pooled vector."""
    return lambda ids, g: {"pooled_output": torch.randn(1, width, generator=g)}


def every(ids, g):
    """A mask that leaves nothing out."""
    return {"attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def mask(ids, g):
    """A mask that leaves the padding out."""
    return {"attention_mask": (torch.tensor([ids]) != PAD).long()}


def both(*parts):
    """What several give."""
    return lambda ids, g: {name: value for part in parts for name, value in part(ids, g).items()}


def rows(name, width, masked=None):
    """As many rows of another encoder, and its mask."""

    def give(ids, g):
        given = {name: torch.randn(1, len(ids), width, generator=g)}
        return given if masked is None else {**given, masked: torch.ones(1, len(ids), dtype=torch.long)}

    return give


def layers(count, width):
    """The rows of every layer of a language model, as HiDream reads them."""
    return lambda ids, g: {"conditioning_llama3": torch.randn(1, count, len(ids), width, generator=g)}


def token_ids(ids, g):
    """Ids for the layers with which Anima reads the text."""
    return {"t5xxl_ids": torch.tensor(ids), "t5xxl_weights": torch.ones(len(ids))}
